"""Weights for patches of another size: a network that has learnt fields of one resolution goes on at another, with as
many tokens.

A field of half as many elements again and patches half as wide again has the same tokens, so what blocks have learnt of
where things are and how large stays true; only what reads and writes elements must change. Reading keeps of a patch the
frequencies that patches had, writing adds none (for images: Beyer et al. 2022, FlexiViT,
https://arxiv.org/abs/2212.08013, who resize by the pseudo-inverse of bilinear interpolation). By cosines it is
orthonormal: white noise on the larger patch is white on the smaller one, of ``old / new`` its deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosines(size: int) -> Tensor:
    """Orthonormal type-II cosine transform [frequency, element] in float64."""
    frequency, element = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows = (math.pi / size * frequency * (element + 0.5)).cos() * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def resampling(old: int, new: int) -> Tensor:
    """Matrix [old, new], float64, that makes ``old`` elements in a row of ``new``: of a constant the same constant, of
    frequencies that both have the same ones, and of others none."""
    shared = min(old, new)
    return cosines(old)[:shared].T @ cosines(new)[:shared] * math.sqrt(old / new)


def resized_reading(weight: Tensor, old: int, new: int) -> Tensor:
    """Weights [features, groups * old * old] over patches for patches of another size, [features, groups * new * new].

    Args:
        weight: Of a linear layer on patches that are flattened with the channel first.
    """
    across = resampling(old, new)
    patches = weight.double().unflatten(1, (-1, old, old))
    return (across.T @ patches @ across).flatten(1).to(weight.dtype)


def resized_writing(weight: Tensor, old: int, new: int) -> Tensor:
    """Weights or biases [groups * old * old, ...] that make patches for patches of another size."""
    across = resampling(new, old)
    patches = weight.double().unflatten(0, (-1, old, old))
    return torch.einsum("yh,ghw...,xw->gyx...", across, patches, across).flatten(0, 2).to(weight.dtype)
