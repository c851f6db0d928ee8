"""Prompts without their padding: layers that take each token for itself need not see what only fills a batch up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.model.native import ops as native


@dataclass(frozen=True)
class TextRows:
    """Where the tokens of a batch of prompts stand.

    Args:
        index: Long [R], places of the real tokens among all ``batch * tokens``, ascending.
        starts: int32 [batch + 1], where each prompt's rows begin, and R.
        batch, tokens: Size of the batch with its padding.
    """

    index: Tensor
    starts: Tensor
    batch: int
    tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> TextRows | None:
        """The real tokens of a mask [B, T], where it pays to take them alone; else None.

        It pays in training on a CPU, where of captions as long as people write them half of a batch is padding. On
        CUDA shapes that change from batch to batch cannot be recorded, and to draw a prompt is encoded once.
        """
        if not torch.is_grad_enabled() or mask.device.type != "cpu" or type(mask) is not Tensor:
            return None
        if native.graph_is_made():
            return None
        index = mask.flatten().nonzero()[:, 0]
        if index.numel() == mask.numel():
            return None
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(index, starts, *mask.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [1, R, ...]."""
        return padded.flatten(0, 1).index_select(0, self.index)[None]

    def spread(self, packed: Tensor) -> Tensor:
        """[1, R, ...] -> [B, T, ...], zero where there is padding."""
        everywhere = packed.new_zeros(self.batch * self.tokens, *packed.shape[2:])
        return everywhere.index_copy(0, self.index, packed[0]).unflatten(0, (self.batch, self.tokens))
