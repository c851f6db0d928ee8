"""The kernels as operations of tensors with gradients: what the network calls on a GPU, where `takes` says so.

As in `model.native.ops`, which does the same in C on a CPU; shapes and laws are told there and in `model.updates`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS_ELEMENTS = 2048
"""Elements of a tile: enough loads in flight, and few enough registers."""

_TILES = 8
"""Tiles that a program of a backward pass goes over: so many times fewer sums are written and added up."""

_BLOCK = 1024

SWITCH = "PHYSFORMER_FUSED"
"""Set to 0, it leaves everything to PyTorch."""


def switched_off() -> bool:
    """Whether the user wants none of them."""
    return os.environ.get(SWITCH) == "0"


@functools.cache
def why_not() -> str | None:
    """Why no kernel can run here, in a few words; None if they can. The first call tries them, once per process."""
    if switched_off():
        return f"{SWITCH}=0 switches them off"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which compiles them, is not installed"
    if not torch.cuda.is_available():
        return "they need CUDA, and there is none here"
    if torch.cuda.get_device_capability() < (8, 0):
        return "they need compute capability 8.0 (Ampere) or later"
    from physformer_core.model.fused.probe import what_fails  # which runs them

    return what_fails(torch.device("cuda", torch.cuda.current_device()))


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors can be worked on here and now: floats on CUDA, with memory of their own (not fake, not
    parts of ranks), not while a graph is made, and with kernels that can run."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return all(map(_is_plain, tensors)) and why_not() is None


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor) in (Tensor, torch.nn.Parameter)
    return kind and tensor.device.type == "cuda" and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def norm_modulate(hidden_states: Tensor, scale: Tensor, shift: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """``rms_norm(h) * (1 + scale) + shift``.

    Args:
        hidden_states: Float32 [B, N, dim].
        scale, shift: [B, 1, dim].
        epsilon: Added to the mean square.
        dtype: Of the result.
    """
    return _NormModulate.apply(hidden_states.contiguous(), scale.contiguous(), shift.contiguous(), epsilon, dtype)


def renormalized_update(hidden_states: Tensor, output: Tensor, gate: Tensor, tiny: float, opposed: float) -> Tensor:
    """`model.updates.renormalized_update` of float32 h and ``gate * output``; see `native.ops.renormalized_update`."""
    return _RenormalizedUpdate.apply(hidden_states.contiguous(), output.contiguous(), gate.contiguous(), tiny, opposed)


def norm_rotate(content: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """``rotate_pairs(rms_norm(content) * gain, cos, sin)``; see `native.ops.norm_rotate`."""
    return _NormRotate.apply(content.contiguous(), gain.contiguous(), cos.contiguous(), sin.contiguous(), epsilon)


def rms_norm(content: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """``rms_norm(content) * gain`` over the last dimension."""
    rows = content.reshape(1, -1, 1, content.shape[-1])
    nothing = torch.empty(1, rows.shape[1], 1, 0, device=content.device)
    return norm_rotate(rows, gain, nothing, nothing, epsilon).view(content.shape)


def gated_linear(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., 2 * hidden] -> [..., hidden]."""
    return _GatedLinear.apply(gate_up.contiguous())


def _run(kernel: str, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
    """Runs a kernel on the device of its first tensor: Triton would take the one that is current."""
    from physformer_core.model.fused import kernels  # imports triton

    with torch.cuda.device_of(arguments[0]):
        getattr(kernels, kernel)[grid](*arguments, **sizes)


def _tile(dim: int) -> dict[str, int]:
    """Columns, a power of two as Triton wants them, and as many rows as make a tile."""
    columns = max(16, 1 << (dim - 1).bit_length())
    return {"D": dim, "COLS": columns, "ROWS": max(1, min(128, _ROWS_ELEMENTS // columns))}


def _programs(rows: int, tile: dict[str, int], tiles: int = 1) -> int:
    return -(-rows // (tile["ROWS"] * tiles))


def _tiles(rows: int, tile: dict[str, int]) -> int:
    """Of a program of a backward pass: no more than there are."""
    return min(_TILES, _programs(rows, tile))


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor, shift: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        batch, tokens, dim = h.shape
        tile, out = _tile(dim), torch.empty_like(h, dtype=dtype)
        grid = (batch, _programs(tokens, tile))
        _run("norm_modulate", grid, h, scale, shift, out, tokens, epsilon, **tile)
        ctx.save_for_backward(h, scale)
        ctx.epsilon, ctx.dtypes = epsilon, (scale.dtype, shift.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, scale = ctx.saved_tensors
        batch, tokens, dim = h.shape
        tile = _tile(dim)
        tiles = _tiles(tokens, tile)
        grid = (batch, _programs(tokens, tile, tiles))
        of_h = torch.empty_like(h)
        of_scale, of_shift = (h.new_empty(*grid, dim, dtype=torch.float32) for _ in range(2))
        _run(
            "norm_modulate_back",
            grid,
            grad.contiguous(),
            h,
            scale,
            of_h,
            of_scale,
            of_shift,
            tokens,
            ctx.epsilon,
            **tile,
            TILES=tiles,
        )
        sums = (one.sum(1, keepdim=True).to(dtype) for one, dtype in zip((of_scale, of_shift), ctx.dtypes, strict=True))
        return of_h, *sums, None, None


class _RenormalizedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, output: Tensor, gate: Tensor, tiny: float, opposed: float) -> Tensor:
        batch, tokens, dim = h.shape
        tile, out = _tile(dim), torch.empty_like(h)
        grid = (batch, _programs(tokens, tile))
        _run("renormalized_update", grid, h, output, gate, out, tokens, tiny, opposed, **tile)
        ctx.save_for_backward(h, output, gate)
        ctx.limits = tiny, opposed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, output, gate = ctx.saved_tensors
        batch, tokens, dim = h.shape
        tile = _tile(dim)
        tiles = _tiles(tokens, tile)
        grid = (batch, _programs(tokens, tile, tiles))
        of_h, of_output = torch.empty_like(h), torch.empty_like(output)
        of_gate = h.new_empty(*grid, dim)
        arguments = (grad.contiguous(), h, output, gate, of_h, of_output, of_gate, tokens, *ctx.limits)
        _run("renormalized_update_back", grid, *arguments, **tile, TILES=tiles)
        return of_h, of_output, of_gate.sum(1, keepdim=True).to(gate.dtype), None, None


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, content: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
        tokens, heads, dim = content.shape[1:]
        rows, tile, out = content.shape[:3].numel(), _tile(dim), torch.empty_like(content)
        sizes = (rows, tokens, heads, 2 * cos.shape[-1], epsilon)
        _run("norm_rotate", (_programs(rows, tile),), content, gain, cos, sin, out, *sizes, **tile)
        ctx.save_for_backward(content, gain, cos, sin)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        content, gain, cos, sin = ctx.saved_tensors
        rows, tile = ctx.sizes[0], _tile(content.shape[-1])
        tiles = _tiles(rows, tile)
        programs = _programs(rows, tile, tiles)
        of_content = torch.empty_like(content)
        of_gain = gain.new_empty(programs, gain.shape[0], dtype=torch.float32)
        arguments = (grad.contiguous(), content, gain, cos, sin, of_content, of_gain, *ctx.sizes)
        _run("norm_rotate_back", (programs,), *arguments, **tile, TILES=tiles)
        return of_content, of_gain.sum(0).to(gain.dtype), None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        hidden = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], hidden)
        grid = (-(-out.numel() // _BLOCK),)
        _run("gated_linear", grid, gate_up, out, out.numel(), hidden, BLOCK=_BLOCK)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        of_gate_up = torch.empty_like(gate_up)
        grid = (-(-grad.numel() // _BLOCK),)
        arguments = (grad.contiguous(), gate_up, of_gate_up, grad.numel(), gate_up.shape[-1] // 2)
        _run("gated_linear_back", grid, *arguments, BLOCK=_BLOCK)
        return of_gate_up
