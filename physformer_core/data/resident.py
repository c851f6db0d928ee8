"""A preprocessed set in the memory of a device, where batches are gathered by one indexing operation each.

A GPU trains a small network on tens of thousands of pictures a second, far more than a process can copy out of files
one by one. Pictures of 32x32 pixels are 3 KB each and captions some 9 KB: a million of both is less than GPUs have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from physformer_core.data.shard_set import Group, ShardSet

SHARE_OF_FREE_MEMORY = 0.4
"""A set is taken into a device's memory if it needs at most this share of what is free there."""


@dataclass(frozen=True)
class Windows:
    """Parts of the stored fields of one kind: the same size of each, which may reach beyond the field.

    Args:
        which: [B] position of each example's group in the list of groups.
        inside: [B] row of each example in its group.
        top, left: [B] first row and column, in elements of the stored field.
        height, width: Of every window.
    """

    which: np.ndarray
    inside: np.ndarray
    top: np.ndarray
    left: np.ndarray
    height: int
    width: int

    def halved(self) -> Windows:
        """The same windows of fields of half the size; all sides and offsets must be even."""
        return Windows(self.which, self.inside, self.top // 2, self.left // 2, self.height // 2, self.width // 2)


class ResidentFields:
    """The stored fields of some groups, flat, one after the other.

    Args:
        groups: The groups, in the order that `Windows.which` counts.
        device: Where to.
        coarse: Take their coarse fields instead (of crops of latents).
    """

    def __init__(self, groups: list[Group], device: torch.device, *, coarse: bool = False) -> None:
        self._sizes = np.array([group.coarse_size if coarse else group.size for group in groups], np.int64)
        self._channels = groups[0].channels
        parts, self._firsts, first = [], [], 0
        for group in groups:
            self._firsts.append(first)
            for stored in group.stored(coarse=coarse):
                parts.append(torch.from_numpy(stored.flatten()).to(device))
                first += stored.size
        self._flat = torch.cat(parts)

    def take(self, windows: Windows) -> Tensor:
        """Windows [B, height, width, channels], in the dtype that is stored. Beyond its edge a field is mirrored."""
        sizes = self._sizes[windows.which]
        examples = np.array(self._firsts)[windows.which] + windows.inside * sizes.prod(1) * self._channels
        numbers = np.stack([examples, sizes[:, 0], sizes[:, 1], windows.top, windows.left])
        device = self._flat.device
        first, height, width, top, left = torch.from_numpy(numbers).to(device, non_blocking=True).unbind()
        y = _mirrored(top[:, None] + torch.arange(windows.height, device=device), height[:, None])
        x = _mirrored(left[:, None] + torch.arange(windows.width, device=device), width[:, None])
        cells = first[:, None, None] + (y[:, :, None] * width[:, None, None] + x[:, None, :]) * self._channels
        return self._flat[cells[..., None] + torch.arange(self._channels, device=device)]


def _mirrored(place: Tensor, size: Tensor) -> Tensor:
    """Places outside 0..size-1, mirrored at the edge of the field: -1 is 0 again, -2 is 1."""
    place = torch.where(place < 0, -1 - place, place)
    return torch.where(place >= size, 2 * size - 1 - place, place)


class ResidentCaptions:
    """All captions' embeddings.

    Args:
        shards: Whose.
        device: Where to.
    """

    def __init__(self, shards: ShardSet, device: torch.device) -> None:
        tokens, self._lengths = shards.all_tokens()
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._tokens = torch.cat([torch.from_numpy(part.copy()).to(device) for part in tokens])
        self._pooled = torch.from_numpy(shards.all_pooled()).to(device)

    def take(self, rows: np.ndarray, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `ShardSet.embeddings`: tokens padded to a multiple, mask and pooled vectors."""
        device, lengths = self._tokens.device, self._lengths[rows]
        padded = -(-int(lengths.max()) // multiple) * multiple
        numbers = torch.from_numpy(np.stack([self._starts[rows], lengths, rows])).to(device, non_blocking=True)
        first, length, row = numbers.unbind()
        column = torch.arange(padded, device=device)
        mask_bt = column < length[:, None]
        tokens_btd = self._tokens[(first[:, None] + column).clamp_(max=len(self._tokens) - 1)]
        return (tokens_btd * mask_bt[..., None]).float(), mask_bt, self._pooled[row].float()


def why_not_resident(shards: ShardSet, device: torch.device) -> str | None:
    """Why a set's training split is not taken into a device's memory, in a few words; None if it is."""
    if device.type != "cuda":
        return "the device is no GPU"
    free, _ = torch.cuda.mem_get_info(device)
    needed = shards.resident_bytes("train")
    if needed > SHARE_OF_FREE_MEMORY * free:
        return f"it needs {needed / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free"
    return None
