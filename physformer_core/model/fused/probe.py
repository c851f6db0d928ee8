"""Holds every kernel to what PyTorch's operations give, once in a process: compilers and GPUs differ."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.model.fused import ops
from physformer_core.model.geometry import rotate_pairs
from physformer_core.model.updates import OPPOSED, TINY
from physformer_core.model.updates import renormalized_update as written_out

_TOLERANCE = 1e-4
_EPSILON = 1e-6


def what_fails(device: torch.device) -> str | None:
    """What differs from PyTorch's operations on a device, in a few words; None if nothing does.

    Asked in a thread of its own: the caller's modes (inference, autocast, counting) do not reach it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_first_that_fails, device).result()


def _first_that_fails(device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    hidden, output, of_picture, other = normal(2, 37, 48), normal(2, 37, 48), normal(2, 1, 48), normal(2, 1, 48)
    heads, gain, angle = normal(2, 37, 3, 20), normal(20), normal(1, 37, 1, 4)
    cos, sin = angle.cos(), angle.sin()

    def turned(content: Tensor, gain: Tensor) -> Tensor:
        normed = F.rms_norm(content, (20,), gain, _EPSILON)
        return torch.cat([rotate_pairs(normed[..., :8], cos, sin), normed[..., 8:]], dim=-1)

    cases: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]], ...] = (
        (
            "norm_modulate",
            lambda h, scale, shift: ops.norm_modulate(h, scale, shift, _EPSILON, torch.float32),
            lambda h, scale, shift: F.rms_norm(h, (48,), None, _EPSILON) * (1 + scale) + shift,
            (hidden, of_picture, other),
        ),
        (
            "renormalized_update",
            lambda h, out, gate: ops.renormalized_update(h, out, gate, TINY, OPPOSED),
            lambda h, out, gate: written_out(h, gate * out),
            (hidden, output, of_picture),
        ),
        ("norm_rotate", lambda x, gain: ops.norm_rotate(x, gain, cos, sin, _EPSILON), turned, (heads, gain)),
        ("gated_linear", ops.gated_linear, lambda x: F.silu(x[..., :24]) * x[..., 24:], (hidden,)),
    )
    for name, ours, theirs, inputs in cases:
        try:
            found, wanted = _with_gradients(ours, inputs), _with_gradients(theirs, inputs)
        except Exception as error:  # noqa: BLE001 - a compiler's faults have no common class
            return f"{name} cannot run: {next(iter(str(error).strip().splitlines()), repr(error))}"
        for one, right in zip(found, wanted, strict=True):
            if not (one - right).abs().max() <= _TOLERANCE * right.abs().max().clamp_min(1):
                return f"{name} differs from what it should be"
    return None


def _with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of its sum of cubes."""
    given = [one.detach().clone().requires_grad_() for one in inputs]
    result = function(*given)
    return [result.detach(), *torch.autograd.grad(result.pow(3).sum(), given)]
