"""Training batches from preprocessed shards: a pure function of (seed, step), read through memory maps.

Nothing is remembered from batch to batch. To resume a run it is enough to know the step, and the same pictures meet
the same captions whatever the number of ranks their global batch is divided over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from physformer_core.data.resident import ResidentCaptions, ResidentFields, Windows
from physformer_core.data.shard_set import TOKEN_MULTIPLE, Group, ShardSet
from physformer_core.errors import ConfigError, DataError
from physformer_core.flow.pyramid import Pyramid

__all__ = ["Batch", "BatchStream", "ShardSet"]

# Streams of random numbers that must not meet, even under one seed.
_PERMUTATION, _ORDER, _DRAWS = 1, 2, 3

_CROP_STEP = 2  # a window's coarse half-size copy must start on a whole element
_CROP_MARGIN = 2  # stored elements left around a window: its coarse field is interpolated from them too


@dataclass(frozen=True)
class Batch:
    """One training batch, on the CPU, or on the device whose memory holds the set.

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
        device: Take what is needed of the set into this device's memory, once, and make batches there; without one they
            are read from files, one by one, and made on the CPU. The last bit of a number may differ.

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
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise ConfigError("batch_size must be at least 1 and seed at least 0")
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
        self._seed = seed
        self._crop_fraction = crop_fraction
        self._crop_size = crop_size
        self._split = split
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._lock = threading.Lock()
        self._resident: dict[tuple[str, tuple[int, int], bool], ResidentFields] = {}
        self._captions: ResidentCaptions | None = None
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
        which = np.searchsorted(starts, rows, side="right") - 1
        inside = rows - starts[which]
        stored = np.array([group.size for group in groups], np.int64)[which]
        height, width = groups[0].size
        if kind == "crop" and self._crop_size is not None:
            height = width = self._crop_size
        top, left = _offsets(stored[:, 0], height, draws[:, 1]), _offsets(stored[:, 1], width, draws[:, 2])
        place_b4 = np.empty((len(rows), 4), np.float64)
        level_b, class_b, indices_b, captions_b = (np.empty(len(rows), np.int64) for _ in range(4))
        for number in np.unique(which):
            group, mine = groups[number], which == number
            of = inside[mine]
            place_b4[mine], level_b[mine], class_b[mine] = group.place[of], group.level[of], group.class_label[of]
            first, last = group.caption_starts[of], group.caption_starts[of + 1]
            captions_b[mine] = group.caption_rows[first + (draws[mine, 0] * (last - first)).astype(np.int64)]
            indices_b[mine] = group.first + of
        corner, step_yx = place_b4[:, :2], (place_b4[:, 2:] - place_b4[:, :2]) / stored
        offset_yx = np.stack([top, left], axis=1)
        place_b4 = np.concatenate(
            [corner + offset_yx * step_yx, corner + (offset_yx + np.array([height, width])) * step_yx], axis=1
        )

        spec, margin = self.shards.field, 0 if kind == "base" else _CROP_MARGIN
        windows = Windows(which, inside, top - margin, left - margin, height + 2 * margin, width + 2 * margin)
        field_bchw = self._fields(groups, windows)
        tokens_btd, mask_bt, pooled_bp = self._embeddings(captions_b)
        if spec.is_pixels:
            field_bchw = field_bchw.mul_(2 / 255).sub_(1)
        coarse_bchw = None
        if kind == "crop":
            if groups[0].has_coarse:
                half_bchw = self._fields(groups, windows.halved(), coarse=True)
                if spec.is_pixels:
                    half_bchw = half_bchw.mul_(2 / 255).sub_(1)
            else:
                half_bchw = F.avg_pool2d(field_bchw, 2)
            inner = (..., slice(margin, -margin), slice(margin, -margin))
            coarse_bchw = Pyramid.upsample(half_bchw)[inner].contiguous()
            field_bchw = field_bchw[inner].contiguous()
        batch = Batch(
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
        return batch if self._device is None else batch.to(self._device)

    def _fields(self, groups: list[Group], windows: Windows, *, coarse: bool = False) -> torch.Tensor:
        """Windows [B, channels, height, width] in float32, mirrored beyond the edge of what is stored."""
        if self._device is not None:
            return _channels_first(self._resident_fields(groups, coarse).take(windows))
        spec = self.shards.field
        shape = (len(windows.which), windows.height, windows.width, spec.channels)
        field_bhwc = np.empty(shape, spec.dtype)
        numbers = (one.tolist() for one in (windows.which, windows.inside, windows.top, windows.left))
        for i, (which, inside, top, left) in enumerate(zip(*numbers, strict=True)):
            stored = groups[which].coarse(inside) if coarse else groups[which].field(inside)
            field_bhwc[i] = _window(stored, top, left, windows.height, windows.width)
        return _channels_first(torch.from_numpy(field_bhwc))

    def _resident_fields(self, groups: list[Group], coarse: bool) -> ResidentFields:
        assert self._device is not None
        key = (groups[0].kind, groups[0].size, coarse)
        with self._lock:  # several threads may make batches
            if key not in self._resident:
                self._resident[key] = ResidentFields(groups, self._device, coarse=coarse)
            return self._resident[key]

    def _embeddings(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._device is None:
            return self.shards.embeddings(rows)
        with self._lock:
            if self._captions is None:
                self._captions = ResidentCaptions(self.shards, self._device)
        return self._captions.take(rows, TOKEN_MULTIPLE)


_Made = TypeVar("_Made")


def made_ahead(
    make: Callable[[int], _Made], first: int, *, ahead: int, threads: int = 1
) -> Generator[_Made, None, None]:
    """``make(first)``, ``make(first + 1)`` and so on without end, in order; threads make the next ones meanwhile.

    Args:
        make: May be called by several threads at once, if there are.
        first: Its first argument.
        ahead: How many are made before they are asked for, at least 1.
        threads: How many make them.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="batches") as executor:
        _work_alone(executor, threads)
        waiting = deque(executor.submit(make, first + i) for i in range(ahead))
        try:
            for number in itertools.count(first + ahead):
                made = waiting.popleft().result()
                waiting.append(executor.submit(make, number))
                yield made
        finally:
            for future in waiting:
                future.cancel()


def _work_alone(executor: ThreadPoolExecutor, threads: int) -> None:
    """Has every thread of an executor compute alone, without helpers.

    OpenMP gives each thread that computes a team of its own. Once all teams together have more threads than there are
    processors, it lets the idle ones sleep at once, and waking one takes 0.1 ms, for which every operation of the
    training step then waits: on two cores a step took a third longer (docs/performance.md).
    """
    everybody = threading.Barrier(threads + 1)
    of_others = torch.get_num_threads()

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # else the first operation here takes over the number that is set below
        everybody.wait()

    try:
        for _ in range(threads):
            executor.submit(settle)
        everybody.wait()
    except BaseException:
        everybody.abort()  # else those that came would wait for ever
        raise
    finally:
        # Each thread has its own number; torch's for threads to come, and MKL's, are everybody's and are put back.
        torch.set_num_threads(of_others)


def _offsets(stored: np.ndarray, wanted: int, draws: np.ndarray) -> np.ndarray:
    """Windows' offsets: even, with a margin on both sides; 0 where a stored crop is taken whole."""
    choices = (stored - wanted - 2 * _CROP_MARGIN) // _CROP_STEP + 1
    drawn = _CROP_MARGIN + _CROP_STEP * (draws * choices).astype(np.int64)
    return np.where(stored == wanted, 0, drawn)


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


def _channels_first(field_bhwc: torch.Tensor) -> torch.Tensor:
    return field_bhwc.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
