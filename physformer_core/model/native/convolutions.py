"""The refiner's convolutions in C, with their gradients: float32 on a CPU. Each names what it is equal to in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physformer_core.model.native.ops import addresses, checked, thread_count
from physformer_core.native.build import load_library

_MOST = 64
"""Channels, and pixels of a row that is halved: what is worked in lies on the stacks of threads."""


def convolves(field: Tensor, *weights: Tensor) -> bool:
    """Whether `modulated_convolutions` takes these: taps of 3x3 that keep the channels, which are some sixteens; even
    sides."""
    channels = field.shape[1]
    return _fits(field) and all(weight.shape == (channels, channels, 3, 3) for weight in weights)


def halves(field: Tensor, weight: Tensor) -> bool:
    """Whether `halving_convolution` takes these: taps of 4x4, channels of both by sixteens, even sides."""
    out = len(weight)
    shape_fits = weight.shape == (out, field.shape[1], 4, 4) and out % 16 == 0 and out <= _MOST
    return shape_fits and _fits(field) and field.shape[3] <= _MOST


def _fits(field: Tensor) -> bool:
    channels, height, width = field.shape[1:]
    return field.numel() > 0 and channels % 16 == 0 and channels <= _MOST and height % 2 == 0 and width % 2 == 0


def modulated_convolutions(
    field: Tensor, scale: Tensor, shift: Tensor, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor]
) -> Tensor:
    """``field + conv(silu(conv(silu(field * (1 + scale) + shift))))`` of convolutions with a margin of a pixel.

    Args:
        field: [B, C, H, W]; it is copied unless its channels lie together in memory.
        scale, shift: [B, C].
        weights, biases: Of both, [C, C, 3, 3] and [C].

    Returns:
        [B, C, H, W], whose channels lie together in memory.

    Raises:
        ValueError: Not what `convolves` takes.
    """
    if not convolves(field, *weights):
        raise _no_convolution(field, *weights)
    batch, channels = field.shape[:2]
    scale, shift = (checked(t, batch, channels) for t in (scale, shift))
    one, other = (checked(t, *t.shape) for t in weights)
    of_one, of_other = (checked(t, channels) for t in biases)
    return _ModulatedConvolutions.apply(_pixels(field), scale, shift, one, of_one, other, of_other).permute(0, 3, 1, 2)


def halving_convolution(field: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``conv2d(silu(field), weight, bias, stride=2, padding=1)``.

    Args:
        field: [B, C, H, W]; it is copied unless its channels lie together in memory.
        weight, bias: [out, C, 4, 4] and [out].

    Returns:
        [B, out, H / 2, W / 2], whose channels lie together in memory.

    Raises:
        ValueError: Not what `halves` takes.
    """
    if not halves(field, weight):
        raise _no_convolution(field, weight)
    weight, bias = checked(weight, *weight.shape), checked(bias, len(weight))
    return _HalvingConvolution.apply(_pixels(field), weight, bias).permute(0, 3, 1, 2)


def _no_convolution(field: Tensor, *weights: Tensor) -> ValueError:
    shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
    return ValueError(f"no convolution in C of {tuple(field.shape)} by {shapes}")


def _pixels(field: Tensor) -> Tensor:
    batch, channels, height, width = field.shape
    return checked(field.permute(0, 2, 3, 1), batch, height, width, channels)


def _scratch(pixels: Tensor, taps: int, out: int) -> Tensor:
    """Where gradients of ``taps`` weights of every channel, and of biases, are summed by parts of the batch."""
    parts = -(-len(pixels) // load_library().images_in_a_part())
    return pixels.new_empty(parts, (taps * pixels.shape[-1] + 1) * out)


class _ModulatedConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, *given: Tensor) -> Tensor:
        scale, shift, weight, bias, weight2, bias2 = given
        inner, out = torch.empty_like(pixels), torch.empty_like(pixels)
        run, sizes = load_library().activated_convolution, (*pixels.shape, pixels.shape[-1], thread_count())
        run(*addresses(pixels, scale, shift, weight, bias, None, inner), *sizes)
        run(*addresses(inner, None, None, weight2, bias2, pixels, out), *sizes)
        ctx.save_for_backward(pixels, inner, scale, shift, weight, weight2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pixels, inner, scale, shift, weight, weight2 = ctx.saved_tensors
        grad, channels = grad.contiguous(), pixels.shape[-1]
        of_pixels, of_inner, of_scale, of_shift, of_weight, of_weight2 = map(torch.empty_like, ctx.saved_tensors)
        of_bias, of_bias2 = (weight.new_empty(channels) for _ in range(2))
        run, sizes = load_library().activated_convolution_back, (*pixels.shape, channels, thread_count())
        scratch = _scratch(pixels, 16, channels)  # of 4x4 parts, which 3x3 taps are made of in the end
        run(
            *addresses(grad, inner, None, None, weight2, None, scratch, of_inner, None, None, of_weight2, of_bias2),
            *sizes,
        )
        given = of_inner, pixels, scale, shift, weight, grad, scratch, of_pixels, of_scale, of_shift, of_weight, of_bias
        run(*addresses(*given), *sizes)
        return of_pixels, of_scale, of_shift, of_weight, of_bias, of_weight2, of_bias2


class _HalvingConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, height, width, _ = pixels.shape
        out, ctx.sizes = pixels.new_empty(batch, height // 2, width // 2, len(weight)), (*pixels.shape, len(weight))
        load_library().halving_convolution(*addresses(pixels, weight, bias, out), *ctx.sizes, thread_count())
        ctx.save_for_backward(pixels, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pixels, weight = ctx.saved_tensors
        grad, of_pixels, of_weight = grad.contiguous(), *map(torch.empty_like, ctx.saved_tensors)
        of_bias, scratch = weight.new_empty(len(weight)), _scratch(pixels, 16, len(weight))
        given = grad, pixels, weight, scratch, of_pixels, of_weight, of_bias
        load_library().halving_convolution_back(*addresses(*given), *ctx.sizes, thread_count())
        return of_pixels, of_weight, of_bias
