"""Whether the compiled kernels give what torch gives: tried once in a process, on small tensors of awkward sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.model.geometry import (
    BlockGrid,
    kernel_logits,
    rotate_pairs,
    same_window,
    window_coordinates,
)
from physformer_core.model.native import convolutions, ops

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A kernel, the same in torch, and what both are given: float32, whatever the default is."""

    name: str
    kernel: Callable[..., Tensor]
    written: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def first_wrong() -> str | None:
    """The first kernel whose result or gradients are not what torch's own operations give, or None.

    Asked in a thread of its own: the caller's modes (inference, autocast, counting) do not reach it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_first_wrong).result()


def _first_wrong() -> str | None:
    wrong = next((case.name for case in cases() if not _agree(case)), None)
    if wrong is None and not _orthogonalize_agrees():
        return "orthogonalize"
    return "muon_step" if wrong is None and not _muon_step_agrees() else wrong


def _agree(case: Case) -> bool:
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    found, wanted = case.kernel(*leaves), case.written(*leaves)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float32, device="cpu").reshape(wanted.shape)
    one, other = (torch.autograd.grad((result * weights).sum(), leaves) for result in (found, wanted))
    pairs = [(found, wanted), *zip(one, other, strict=True)]
    return all(bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp_min(1)) for a, b in pairs)


def _orthogonalize_agrees() -> bool:
    """It has no gradients. The sides are beyond a tile's, and one beyond what is summed at a time."""
    given = torch.randn(2, 37, 259, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu")
    wanted = given / given.norm(dim=(1, 2), keepdim=True)
    a, b, c = coefficients = (2.0, -1.5, 0.5)
    for _ in range(3):
        gram = wanted @ wanted.mT
        wanted = a * wanted + (b * gram + c * gram @ gram) @ wanted
    pairs = (given, wanted), (given.mT, wanted.mT)
    return all(bool((ops.orthogonalize(x, 3, coefficients) - y).abs().max() <= _TOLERANCE) for x, y in pairs)


def _muon_step_agrees() -> bool:
    generator = torch.Generator("cpu").manual_seed(2)
    drawn = [torch.randn(3, 19, 40, generator=generator, dtype=torch.float32, device="cpu") for _ in range(3)]
    iteration = (2, (2.0, -1.5, 0.5))
    weights, gradients, momenta = drawn
    moved = momenta.lerp(gradients, 0.25)
    wanted = weights * 0.9 - 0.3 * ops.orthogonalize(gradients.lerp(moved, 0.75), *iteration)
    one, other, third = (list(t.unbind()) for t in drawn)
    ops.muon_step(one, other, third, *iteration, 0.75, keep=0.9, rate=-0.3)
    return all(bool((a - b).abs().max() <= _TOLERANCE) for a, b in ((weights, wanted), (momenta, moved)))


def cases() -> list[Case]:
    """Of every kernel one or more."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def renormalized(h: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        total = h + gate * output
        return h.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True) * total

    angle = normal(1, 5, 1, 4)

    def rotated(content: Tensor, gain: Tensor) -> Tensor:
        turning, still = (norm(content) * gain).split([8, 14], dim=-1)
        return torch.cat([rotate_pairs(turning, angle.cos(), angle.sin()), still], dim=-1)

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def convolved(field: Tensor, scale: Tensor, shift: Tensor, *rest: Tensor) -> Tensor:
        inner = field * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        for weight, bias in zip(rest[:2], rest[2:], strict=True):
            inner = F.conv2d(F.silu(inner), weight, bias, padding=1)
        return field + inner

    prompts = [(0, 7), (7, 7), (7, 8), (8, 12)]
    starts = torch.tensor([0, 7, 7, 8, 12], dtype=torch.int32, device="cpu")

    def self_attended(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def told(rows: Tensor) -> Tensor:
        return F.pad(rows.transpose(0, 1), (0, 0, 0, 7 - len(rows)))

    def keys_of_text(content: Tensor, gain: Tensor, altitude: Tensor) -> Tensor:
        content = norm(content) * gain
        heights = altitude[:, None, None].expand(-1, len(content), 2).transpose(0, 1)
        rows = torch.cat([content, F.pad(heights, (4, 2))], dim=-1)
        keys = torch.stack([told(rows[first:last]) for first, last in prompts])
        for prompt, (first, last) in enumerate(prompts):
            keys[prompt, :, last - first :, 22:24] = -9
        return F.pad(keys, (4, 0))

    grid = BlockGrid(height=7, width=11, block=4, radius=2, shift=2)
    cpu = torch.device("cpu")
    places = window_coordinates(7, 11, cpu).reshape(-1, 2)

    def attended(q: Tensor, k: Tensor, v: Tensor, tk: Tensor, tv: Tensor, drift: Tensor, sigma: Tensor) -> Tensor:
        content = q.shape[-1]
        kernel = kernel_logits(places, places, drift, sigma).masked_fill(~same_window(grid, cpu), -torch.inf)
        told = q.transpose(1, 2) @ tk[..., :content].mT + (tk[..., content + 4] / sigma.square()[:, None])[:, :, None]
        logits = torch.cat([q.transpose(1, 2) @ k.permute(0, 2, 3, 1) + kernel, told], dim=-1)
        return (logits.softmax(-1) @ torch.cat([v.transpose(1, 2), tv], dim=2)).transpose(1, 2)

    widths = torch.tensor([0.8, 2.0], dtype=torch.float32, device="cpu")

    def attention_inputs(content: int) -> tuple[Tensor, ...]:
        dim = content + 8
        tokens, text = (2, 77, 2), (2, 2, 3)
        sides = normal(*tokens, content) * content**-0.5, normal(*tokens, content), normal(*tokens, dim)
        return *sides, normal(*text, dim), normal(*text, dim), normal(2, 2), widths

    return [
        Case(
            "norm_modulate",
            lambda h, scale, shift: ops.norm_modulate(h, scale, shift, 1e-6),
            lambda h, scale, shift: norm(h) * (1 + scale) + shift,
            (normal(2, 75, 37), normal(2, 1, 37), normal(2, 1, 37)),
        ),
        Case(
            "renormalized_update",
            lambda h, output, gate: ops.renormalized_update(h, output, gate, 0.0, 0.0),
            renormalized,
            (normal(2, 75, 37), normal(2, 75, 37), normal(2, 1, 37)),
        ),
        Case(
            "norm_rotate",
            lambda content, gain: ops.norm_rotate(content, gain, angle.cos(), angle.sin(), 1e-6),
            rotated,
            (normal(20, 5, 3, 22), normal(22)),
        ),
        Case(
            "rms_norm",
            lambda content, gain: ops.rms_norm(content, gain, 1e-6),
            lambda content, gain: norm(content) * gain,
            (normal(2, 5, 3, 22), normal(22)),
        ),
        Case("gated_linear", ops.gated_linear, gated, (normal(3, 5, 42),)),
        Case("silu", ops.modulated_silu, F.silu, (normal(2, 19, 5, 17),)),
        Case(
            "modulated_silu",
            lambda field, scale, shift: ops.modulated_silu(field, *torch.cat([scale, shift], 1).chunk(2, 1)),
            lambda field, scale, shift: F.silu(field * (1 + scale[:, :, None, None]) + shift[:, :, None, None]),
            (normal(2, 19, 5, 17), normal(2, 19), normal(2, 19)),
        ),
        Case(
            "modulated_convolutions",
            lambda field, scale, shift, *rest: convolutions.modulated_convolutions(
                field, scale, shift, rest[:2], rest[2:]
            ),
            convolved,
            (normal(5, 16, 4, 14), *normal(2, 5, 16), *normal(2, 16, 16, 3, 3) / 12, *normal(2, 16)),
        ),
        Case(
            "halving_convolution",
            convolutions.halving_convolution,
            lambda field, weight, bias: F.conv2d(F.silu(field), weight, bias, stride=2, padding=1),
            (normal(5, 16, 6, 14), normal(32, 16, 4, 4) / 16, normal(32)),
        ),
        Case(
            "text_attention",
            lambda qkv: ops.text_attention(qkv, starts),
            lambda qkv: torch.cat([self_attended(qkv[first:last]) for first, last in prompts]),
            (normal(12, 3, 2, 19),),
        ),
        Case(
            "text_keys",
            lambda content, gain, altitude: ops.text_keys(content, gain, altitude, starts, 7, 4, 1e-6).clamp_min(-9),
            keys_of_text,
            (normal(12, 3, 18), normal(18), normal(3)),
        ),
        Case(
            "text_values",
            lambda value: ops.text_values(value, starts, 7),
            lambda value: torch.stack([told(value[first:last]) for first, last in prompts]),
            (normal(12, 3, 18),),
        ),
        *(
            Case(
                f"window_attention of {content}",
                functools.partial(ops.window_attention, grid=grid),
                attended,
                attention_inputs(content),
            )
            for content in (9, 24)
        ),
    ]
