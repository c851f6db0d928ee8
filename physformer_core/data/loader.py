"""Training batches from preprocessed shards: a pure function of (seed, step), read through memory maps.

Nothing is remembered from batch to batch. To resume a run it is enough to know the step, and the same pictures meet
the same captions whatever the number of ranks their global batch is divided over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from physformer_core.data.shard_set import Group, ShardSet
from physformer_core.errors import ConfigError, DataError
from physformer_core.flow.pyramid import Pyramid

__all__ = ["Batch", "BatchStream", "ShardSet"]

# Streams of random numbers that must not meet, even under one seed.
_PERMUTATION, _ORDER, _DRAWS = 1, 2, 3

_CROP_STEP = 2  # a window's coarse half-size copy must start on a whole element
_CROP_MARGIN = 2  # stored elements left around a window: its coarse field is interpolated from them too


@dataclass(frozen=True)
class Batch:
    """One training batch, on the CPU.

    Attributes:
        pixels_bchw: The field: pixels, float32 in [-1, 1], [batch, 3, height, width]; or latents, of about unit
            variance, [batch, channels, height, width].
        coarse_bchw: Of crops what the next coarser level knows of the field, upsampled to the same size; None for
            whole pictures.
        level_b: int64, the level the pictures are of; 0 for whole pictures.
        place_b4: float32 (y0, x0, y1, x1): where they lie in the whole picture, fractions.
        prompt_embeds_btd: float32 [batch, tokens, hidden], tokens a multiple of 8, zeros where the mask is False.
        prompt_mask_bt: bool, True for real tokens.
        pooled_bp: float32 [batch, pooled].
        class_label_b: int64, -1 where an example has none.
        kind: "base" or "crop".
        indices: int64, rows within the kind and split (for messages, and `ShardSet.example_key`).
        caption_rows: int64, rows of captions.arrow (for messages, and `ShardSet.caption`).
        step: The step it belongs to.
        first, total: Its first example's place in the step's global batch, and that batch's size.
    """

    pixels_bchw: torch.Tensor
    coarse_bchw: torch.Tensor | None
    level_b: torch.Tensor
    place_b4: torch.Tensor
    prompt_embeds_btd: torch.Tensor
    prompt_mask_bt: torch.Tensor
    pooled_bp: torch.Tensor
    class_label_b: torch.Tensor
    kind: str
    indices: torch.Tensor
    caption_rows: torch.Tensor
    step: int
    first: int
    total: int

    @property
    def count(self) -> int:
        """How many examples it holds."""
        return self.pixels_bchw.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        return self._with_tensors(lambda tensor: tensor.to(device))

    def parts(self, number: int) -> list[Batch]:
        """The batch in ``number`` parts of about the same size, in order.

        Raises:
            ValueError: There are fewer examples than parts.
        """
        if not 1 <= number <= self.count:
            raise ValueError(f"{self.count} examples do not make {number} parts")
        bounds = [self.count * index // number for index in range(number + 1)]
        return [
            dataclasses.replace(self._with_tensors(lambda tensor, s=slice(a, b): tensor[s]), first=self.first + a)  # type: ignore[misc]
            for a, b in itertools.pairwise(bounds)
        ]

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **changed)


class _KindStream:
    """Which examples the n-th global batch of a kind holds.

    Each group (a stored size) is an endless row of permutations of its examples, cut in batches: so every example
    comes once before any comes twice, none is left over, and a group with fewer examples than a batch is not shown
    more often than its share. An epoch has about as many batches of each group as the group has batches' worth of
    examples, in shuffled order.
    """

    def __init__(self, counts: list[int], batch: int, seed: int, kind: int) -> None:
        self._counts = counts
        self._batch = batch
        self._seed = (seed, kind)
        self.per_epoch = sum(counts) / batch

    def rows(self, number: int) -> tuple[int, np.ndarray]:
        """(group, rows in it) of the number-th batch."""
        # The epoch is the last one that begins at or before the batch.
        epoch = int(number / self.per_epoch)
        while self._before(epoch) > number:
            epoch -= 1
        while self._before(epoch + 1) <= number:
            epoch += 1
        group, turn = self._order(epoch)[number - self._before(epoch)]
        count = self._counts[group]
        wanted = np.arange(turn * self._batch, (turn + 1) * self._batch)
        rounds = wanted // count
        rows = np.empty(self._batch, np.int64)
        for turn_of_all in range(int(rounds[0]), int(rounds[-1]) + 1):
            here = rounds == turn_of_all
            rows[here] = self._permutation(group, turn_of_all)[wanted[here] % count]
        return group, rows

    def _before(self, epoch: int) -> int:
        """Batches before an epoch."""
        return sum(epoch * count // self._batch for count in self._counts)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a stream lives as long as the process
    def _order(self, epoch: int) -> list[tuple[int, int]]:
        turns = [
            (group, turn)
            for group, count in enumerate(self._counts)
            for turn in range(epoch * count // self._batch, (epoch + 1) * count // self._batch)
        ]
        order = np.random.default_rng((_ORDER, *self._seed, epoch)).permutation(len(turns))
        return [turns[i] for i in order]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _permutation(self, group: int, turn: int) -> np.ndarray:
        return np.random.default_rng((_PERMUTATION, *self._seed, group, turn)).permutation(self._counts[group])


class BatchStream:
    """Batches by step.

    Args:
        shards: The set.
        seed: Decides order, captions and windows.
        batch_size: Examples per step, over all ranks.
        crop_fraction: Fraction of steps that are crops of finer levels, [0, 1]; the others are whole pictures.
        crop_size: Side of the window taken from a stored crop, in pixels, an even number; None takes crops whole.
        split: "train" or "validation".
        rank, world_size: Which part of each batch this process gets; where the ranks do not divide it, parts differ
            by one example. All ranks get the same kind and size at a step.
        start_step: Where iteration begins.
        prefetch: Batches that a thread makes ahead while iterating; 0 makes them when asked.

    Raises:
        ConfigError: An option is out of range, or contradicts what is stored.
        DataError: The split has no examples of a kind that is needed.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        seed: int,
        batch_size: int,
        crop_fraction: float,
        crop_size: int | None = 48,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or seed < 0 or start_step < 0 or prefetch < 0:
            raise ConfigError("batch_size must be at least 1; seed, start_step and prefetch at least 0")
        if not 0 <= crop_fraction <= 1:
            raise ConfigError(f"crop_fraction must be from 0 to 1, not {crop_fraction}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size}")
        if batch_size < world_size:
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided over {world_size} processes",
                hint="raise --batch-size, or start fewer processes",
            )
        if split not in ("train", "validation"):
            raise ConfigError(f'split must be "train" or "validation", not {split!r}')
        self.shards = shards
        self.batch_size = batch_size
        self.start_step = start_step
        self._seed = seed
        self._crop_fraction = crop_fraction
        self._crop_size = crop_size
        self._split = split
        self._rank, self._world_size = rank, world_size
        self._prefetch = prefetch
        self._streams: dict[str, tuple[list[list[Group]], _KindStream]] = {}
        for number, kind in enumerate(("base", "crop")):
            if crop_fraction == (1.0, 0.0)[number]:
                continue
            merged = self._merge(kind, shards.groups(kind, split))
            counts = [sum(group.count for group in groups) for groups in merged]
            stream = _KindStream(counts, batch_size, seed, number)
            self._streams[kind] = (merged, stream)

    def kind(self, step: int) -> str:
        """ "base" or "crop", the same on every rank."""
        fraction = self._crop_fraction
        return "crop" if math.floor((step + 1) * fraction) > math.floor(step * fraction) else "base"

    def steps_per_epoch(self, kind: str) -> float:
        """How many batches of a kind show each of its examples once."""
        return self._streams[kind][1].per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of a step: always the same, whatever was asked for before."""
        kind = self.kind(step)
        crops_before = math.floor(step * self._crop_fraction)
        merged, stream = self._streams[kind]
        bucket, rows = stream.rows(crops_before if kind == "crop" else step - crops_before)
        # Drawn for the global batch, so that it is the same however many ranks share it.
        draws = np.random.default_rng((_DRAWS, self._seed, step)).random((len(rows), 3))
        first, last = (self.batch_size * rank // self._world_size for rank in (self._rank, self._rank + 1))
        mine = slice(first, last)
        return self._gather(kind, step, merged[bucket], rows[mine], draws[mine], first)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches from a step on, without end; a thread makes the next ones meanwhile."""
        if self._prefetch == 0:
            step = start_step
            while True:
                yield self.batch(step)
                step += 1
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
            ahead = deque(executor.submit(self.batch, start_step + i) for i in range(self._prefetch))
            step = start_step + self._prefetch
            try:
                while True:
                    batch = ahead.popleft().result()
                    ahead.append(executor.submit(self.batch, step))
                    step += 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(self.start_step)

    def _merge(self, kind: str, groups: tuple[Group, ...]) -> list[list[Group]]:
        """Groups that can share a batch: those of one size, and all crops when windows of one size are taken."""
        if not groups:
            raise DataError(
                f"{self.shards.folder} has no {'crops' if kind == 'crop' else 'pictures'} in its {self._split} split",
                hint="set crop_fraction to 0" if kind == "crop" else "raise validation_fraction in the preprocessing",
            )
        size = self._crop_size
        if kind == "base" or size is None:
            return [[group] for group in groups]
        if size < 8 or size % 2:
            raise ConfigError(f"crop_size must be an even number of at least 8, not {size}")
        smallest = min(min(group.size) for group in groups)
        if any(side != size and side < size + 2 * _CROP_MARGIN for group in groups for side in group.size):
            sides = {side for group in groups for side in group.size} - {smallest}
            whole = all(side >= smallest + 2 * _CROP_MARGIN for side in sides)
            fits = smallest if whole else (smallest - 2 * _CROP_MARGIN) // 2 * 2
            raise ConfigError(
                f"crop_size {size} does not fit into the stored crops, of which the smallest side is {smallest}",
                hint=f"`crop_size = {fits}` under [training] does",
            )
        return [list(groups)]

    def _gather(
        self, kind: str, step: int, groups: list[Group], rows: np.ndarray, draws: np.ndarray, first_row: int
    ) -> Batch:
        starts = np.cumsum([0, *(group.count for group in groups)])
        height, width = groups[0].size
        if kind == "crop" and self._crop_size is not None:
            height = width = self._crop_size
        spec, margin = self.shards.field, 0 if kind == "base" else _CROP_MARGIN
        framed = (height + 2 * margin, width + 2 * margin)
        field_bhwc = np.empty((len(rows), *framed, spec.channels), spec.dtype)
        half_bhwc = None
        if kind == "crop" and not spec.is_pixels:
            half_bhwc = np.empty((len(rows), framed[0] // 2, framed[1] // 2, spec.channels), spec.dtype)
        place_b4 = np.empty((len(rows), 4), np.float64)
        level_b, class_b, indices_b, captions_b = (np.empty(len(rows), np.int64) for _ in range(4))
        for i, (row, (caption, y, x)) in enumerate(zip(rows.tolist(), draws.tolist(), strict=True)):
            which = int(np.searchsorted(starts, row, side="right")) - 1 if len(groups) > 1 else 0
            group, inside = groups[which], row - int(starts[which])
            stored_height, stored_width = group.size
            top, left = _offset(stored_height, height, y), _offset(stored_width, width, x)
            field_bhwc[i] = _window(group.field(inside), top - margin, left - margin, *framed)
            if half_bhwc is not None:
                corner = (top - margin) // 2, (left - margin) // 2
                half_bhwc[i] = _window(group.coarse(inside), *corner, framed[0] // 2, framed[1] // 2)
            y0, x0, y1, x1 = group.place[inside].tolist()
            row_step, column_step = (y1 - y0) / stored_height, (x1 - x0) / stored_width
            place_b4[i] = (
                y0 + top * row_step,
                x0 + left * column_step,
                y0 + (top + height) * row_step,
                x0 + (left + width) * column_step,
            )
            level_b[i], class_b[i] = group.level[inside], group.class_label[inside]
            first, last = int(group.caption_starts[inside]), int(group.caption_starts[inside + 1])
            captions_b[i] = group.caption_rows[first + int(caption * (last - first))]
            indices_b[i] = group.first + inside
        tokens_btd, mask_bt, pooled_bp = self.shards.embeddings(captions_b)
        field_bchw = _channels_first(field_bhwc)
        if spec.is_pixels:
            field_bchw = field_bchw.mul_(2 / 255).sub_(1)
        coarse_bchw = None
        if kind == "crop":
            half_bchw = F.avg_pool2d(field_bchw, 2) if half_bhwc is None else _channels_first(half_bhwc)
            inner = (..., slice(margin, -margin), slice(margin, -margin))
            coarse_bchw = Pyramid.upsample(half_bchw)[inner].contiguous()
            field_bchw = field_bchw[inner].contiguous()
        return Batch(
            pixels_bchw=field_bchw,
            coarse_bchw=coarse_bchw,
            level_b=torch.from_numpy(level_b),
            place_b4=torch.from_numpy(place_b4).float(),
            prompt_embeds_btd=tokens_btd,
            prompt_mask_bt=mask_bt,
            pooled_bp=pooled_bp,
            class_label_b=torch.from_numpy(class_b),
            kind=kind,
            indices=torch.from_numpy(indices_b),
            caption_rows=torch.from_numpy(captions_b),
            step=step,
            first=first_row,
            total=self.batch_size,
        )


def _offset(stored: int, wanted: int, draw: float) -> int:
    """A window's offset: even, with a margin on both sides; 0 when the stored crop is taken whole."""
    if stored == wanted:
        return 0
    choices = (stored - wanted - 2 * _CROP_MARGIN) // _CROP_STEP + 1
    return _CROP_MARGIN + _CROP_STEP * int(draw * choices)


def _window(stored: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A window of a stored field; where it reaches beyond, the field is mirrored.

    A mirrored pair of elements has the mean of the pair at the edge: so the coarse field is extended by its own edge,
    which is what upsampling does at the edge of a picture.
    """
    bottom, right = top + height, left + width
    inner = stored[max(0, top) : bottom, max(0, left) : right]
    if inner.shape[:2] == (height, width):
        return inner
    beyond = (
        (max(0, -top), max(0, bottom - stored.shape[0])),
        (max(0, -left), max(0, right - stored.shape[1])),
        (0, 0),
    )
    return np.pad(inner, beyond, mode="symmetric")


def _channels_first(field_bhwc: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(field_bhwc).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
