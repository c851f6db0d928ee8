"""Training batches from preprocessed shards: a pure function of (seed, step), read through memory maps.

Nothing is remembered from batch to batch. To resume a run it is enough to know the step, and the same pictures meet
the same captions whatever the number of ranks their global batch is divided over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from physformer_core.errors import ConfigError, DataError
from physformer_core.files import sha256_file

SHARDS_FORMAT = "physformer-shards/1"

# Streams of random numbers that must not meet, even under one seed.
_PERMUTATION, _ORDER, _DRAWS = 1, 2, 3

_TOKEN_MULTIPLE = 8  # keeps tensor shapes few (compilers) and aligned (kernels)
_CROP_STEP = 2  # a window's coarse half-size copy must start on a whole pixel
_CROP_MARGIN = 2  # stored pixels left around a window


@dataclass(frozen=True)
class Batch:
    """One training batch, on the CPU.

    Attributes:
        pixels_bchw: float32 in [-1, 1], [batch, 3, height, width].
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
    """

    pixels_bchw: torch.Tensor
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

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


class _Arrow:
    """A memory-mapped Arrow IPC file. Columns are views of the map: nothing is read before it is touched."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batches = [self._reader.get_batch(index) for index in range(self._reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"cannot read {path}: {error}", hint="run the preprocessing again: it mends sets"
            ) from error
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """(record batch, row in it)."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        return index, row - int(self.starts[index])

    def text(self, name: str, row: int) -> str:
        index, inside = self.locate(row)
        return str(self.batches[index].column(name)[inside].as_py())

    def numbers(self, name: str, missing: int | None = None) -> np.ndarray:
        """A small fixed-width column, whole; nulls become `missing`."""
        parts = [batch.column(name) for batch in self.batches]
        if missing is not None:
            parts = [part.fill_null(missing) for part in parts]
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])


class _BinaryColumn:
    """Values of a binary column of a mapped file, as numpy views."""

    def __init__(self, arrow: _Arrow, name: str, dtype: type[np.generic]) -> None:
        self._arrow = arrow
        self._dtype = np.dtype(dtype)
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in arrow.batches:
            column = batch.column(name)
            _, offsets, data = column.buffers()
            self._parts.append((np.frombuffer(offsets, np.int32)[column.offset :], np.frombuffer(data, np.uint8)))

    def __getitem__(self, row: int) -> np.ndarray:
        index, inside = self._arrow.locate(row)
        offsets, data = self._parts[index]
        return data[offsets[inside] : offsets[inside + 1]].view(self._dtype)


class _Group:
    """All shards of one stored size: examples that can stand in one batch."""

    def __init__(
        self, folder: Path, kind: str, size: tuple[int, int], entries: list[dict[str, Any]], first: int
    ) -> None:
        self.kind = kind
        self.size = size
        self.first = first  # row of the group's first example within the kind
        self.files = [_Arrow(folder / entry["name"]) for entry in entries]
        self.starts = np.cumsum([0, *(file.count for file in self.files)])
        for file, entry in zip(self.files, entries, strict=True):
            if file.count != entry["count"]:
                raise DataError(f"{folder / entry['name']} has {file.count} examples, not {entry['count']}")
        self._pixels = [[self._view(batch.column("pixels")) for batch in file.batches] for file in self.files]
        self.class_label = np.concatenate([file.numbers("class_label", -1) for file in self.files])
        lists = [batch.column("captions") for file in self.files for batch in file.batches]
        self.caption_rows = np.concatenate([part.flatten().to_numpy() for part in lists])
        counts = np.concatenate([part.value_lengths().to_numpy() for part in lists])
        self.caption_starts = np.concatenate([[0], np.cumsum(counts)])
        if kind == "crop":
            self.level = np.concatenate([file.numbers("level") for file in self.files])
            places = [batch.column("place").flatten().to_numpy() for file in self.files for batch in file.batches]
            self.place = np.concatenate(places).reshape(-1, 4)
        else:
            self.level = np.zeros(self.count, np.int8)
            self.place = np.tile(np.array([0, 0, 1, 1], np.float32), (self.count, 1))

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """(file, row in it)."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        return index, row - int(self.starts[index])

    def pixels(self, row: int) -> np.ndarray:
        """A view of one picture in the memory map: uint8 [height, width, 3]."""
        index, inside = self.locate(row)
        part, inside = self.files[index].locate(inside)
        return self._pixels[index][part][inside]

    def _view(self, column: pa.FixedSizeBinaryArray) -> np.ndarray:
        height, width = self.size
        flat = np.frombuffer(column.buffers()[1], np.uint8)
        return flat.reshape(-1, height, width, 3)[column.offset : column.offset + len(column)]


class ShardSet:
    """A preprocessed set, opened for reading. Files are mapped, not read.

    Args:
        folder: Where it is.
        verify: Also compare every file's SHA-256 with the manifest's (reads everything once).

    Attributes:
        manifest: As `preprocess` wrote it.
        hidden_size, pooled_size, max_tokens: Of the text embeddings.

    Raises:
        DataError: It is not a preprocessed set, not a finished one, or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        entries = [*self.manifest["shards"], self.manifest["captions"]]
        for entry in entries:
            path = self.folder / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path} is {'cut short' if path.is_file() else 'missing'}",
                    hint="run the same preprocessing again: it makes only what is missing",
                )
            if verify and sha256_file(path) != entry["sha256"]:
                raise DataError(f"{path} is damaged", hint="delete it and run the same preprocessing again")
        captions = self.manifest["captions"]
        self.hidden_size: int = captions["hidden_size"]
        self.pooled_size: int = captions["pooled_size"]
        self.max_tokens: int = captions["max_tokens"]
        self._captions = _Arrow(self.folder / captions["name"])
        self._tokens = _BinaryColumn(self._captions, "tokens", np.float16)
        self._pooled = _BinaryColumn(self._captions, "pooled", np.float16)

    @property
    def key(self) -> str:
        """Identifies configuration, source and encoder."""
        return str(self.manifest["key"])

    @property
    def encoder(self) -> dict[str, str]:
        """Name and sha256 of the text encoder that the captions were read by."""
        return dict(self.manifest["captions"]["encoder"])

    def count(self, kind: str, split: str = "train") -> int:
        """Examples of a kind ("base" or "crop") in a split ("train" or "validation")."""
        return sum(entry["count"] for entry in self._entries(kind, split))

    def sizes(self, kind: str, split: str = "train") -> list[tuple[int, int]]:
        """Stored (height, width) of a kind, sorted."""
        return sorted({(entry["height"], entry["width"]) for entry in self._entries(kind, split)})

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a set lives as long as the process
    def groups(self, kind: str, split: str) -> tuple[_Group, ...]:
        """Examples by stored size, in the order of `sizes`."""
        groups: list[_Group] = []
        first = 0
        for size in self.sizes(kind, split):
            entries = [e for e in self._entries(kind, split) if (e["height"], e["width"]) == size]
            groups.append(_Group(self.folder, kind, size, entries, first))
            first += groups[-1].count
        return tuple(groups)

    def example_key(self, kind: str, index: int, split: str = "train") -> str:
        """The raw set's key of an example, by a batch's `indices`."""
        for group in self.groups(kind, split):
            if index < group.first + group.count:
                file, row = group.locate(index - group.first)
                return group.files[file].text("key", row)
        raise IndexError(f"no {kind} example {index} in {self.folder}")

    def caption(self, row: int) -> str:
        """A caption's text, by a batch's `caption_rows`."""
        return self._captions.text("text", row)

    def embeddings(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [batch, tokens, hidden] (a multiple of 8, zero-padded), mask and pooled vectors of caption rows."""
        tokens = [self._tokens[row].reshape(-1, self.hidden_size) for row in rows.tolist()]
        longest = max(len(value) for value in tokens)
        padded = _TOKEN_MULTIPLE * math.ceil(longest / _TOKEN_MULTIPLE)
        tokens_btd = np.zeros((len(rows), padded, self.hidden_size), np.float16)
        mask_bt = np.zeros((len(rows), padded), np.bool_)
        for index, value in enumerate(tokens):
            tokens_btd[index, : len(value)] = value
            mask_bt[index, : len(value)] = True
        pooled_bp = np.stack([self._pooled[row] for row in rows.tolist()])
        return torch.from_numpy(tokens_btd).float(), torch.from_numpy(mask_bt), torch.from_numpy(pooled_bp).float()

    def _entries(self, kind: str, split: str) -> list[dict[str, Any]]:
        return [e for e in self.manifest["shards"] if e["kind"] == kind and e["split"] == split]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            partial = (self.folder / ".partial").is_dir()
            raise DataError(
                f"{self.folder} {'is a set that was not finished' if partial else 'has no manifest.json'}",
                hint="run the preprocessing again: what is finished is kept"
                if partial
                else "make a set first: physformer data preprocess",
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != SHARDS_FORMAT:
            raise DataError(
                f"{path} is not of the format {SHARDS_FORMAT}",
                hint="if it is a raw set, preprocess it first: physformer data preprocess",
            )
        return manifest


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
        batch_size: Examples per rank and step.
        crop_fraction: Fraction of steps that are crops of finer levels, [0, 1]; the others are whole pictures.
        crop_size: Side of the window taken from a stored crop, in pixels, an even number; None takes crops whole.
        split: "train" or "validation".
        rank, world_size: Which part of each global batch of `batch_size * world_size` this process gets. All ranks
            get the same kind and size at a step.
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
        crop_size: int | None = 64,
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
        self._streams: dict[str, tuple[list[list[_Group]], _KindStream]] = {}
        for number, kind in enumerate(("base", "crop")):
            if crop_fraction == (1.0, 0.0)[number]:
                continue
            merged = self._merge(kind, shards.groups(kind, split))
            counts = [sum(group.count for group in groups) for groups in merged]
            stream = _KindStream(counts, batch_size * world_size, seed, number)
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
        mine = slice(self._rank * self.batch_size, (self._rank + 1) * self.batch_size)
        return self._gather(kind, step, merged[bucket], rows[mine], draws[mine])

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

    def _merge(self, kind: str, groups: tuple[_Group, ...]) -> list[list[_Group]]:
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
            raise ConfigError(
                f"crop_size {size} does not fit into the stored crops, of which the smallest side is {smallest}",
                hint=f"at most {(smallest - 2 * _CROP_MARGIN) // 2 * 2} fits; none takes crops as they are stored",
            )
        return [list(groups)]

    def _gather(self, kind: str, step: int, groups: list[_Group], rows: np.ndarray, draws: np.ndarray) -> Batch:
        starts = np.cumsum([0, *(group.count for group in groups)])
        height, width = groups[0].size
        if kind == "crop" and self._crop_size is not None:
            height = width = self._crop_size
        pixels_bhwc = np.empty((len(rows), height, width, 3), np.uint8)
        place_b4 = np.empty((len(rows), 4), np.float64)
        level_b, class_b, indices_b, captions_b = (np.empty(len(rows), np.int64) for _ in range(4))
        for i, (row, (caption, y, x)) in enumerate(zip(rows.tolist(), draws.tolist(), strict=True)):
            which = int(np.searchsorted(starts, row, side="right")) - 1 if len(groups) > 1 else 0
            group, inside = groups[which], row - int(starts[which])
            stored_height, stored_width = group.size
            top, left = _offset(stored_height, height, y), _offset(stored_width, width, x)
            pixels_bhwc[i] = group.pixels(inside)[top : top + height, left : left + width]
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
        pixels_bchw = (
            torch.from_numpy(pixels_bhwc).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        )
        return Batch(
            pixels_bchw=pixels_bchw.mul_(2 / 255).sub_(1),
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
        )


def _offset(stored: int, wanted: int, draw: float) -> int:
    """A window's offset: even, with a margin on both sides; 0 when the stored crop is taken whole."""
    if stored == wanted:
        return 0
    choices = (stored - wanted - 2 * _CROP_MARGIN) // _CROP_STEP + 1
    return _CROP_MARGIN + _CROP_STEP * int(draw * choices)
