"""A preprocessed set, opened for reading: shards and captions as memory maps, of which nothing is read unasked."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from physformer_core.data.latents import FieldSpec
from physformer_core.data.set_folder import PARTIAL, SHARDS_FORMAT, is_whole, read_json
from physformer_core.errors import DataError
from physformer_core.files import sha256_file

REDRAWN = "redrawn"
"""Key of a manifest under which it is told what a model redrew."""

TOKEN_MULTIPLE = 8  # keeps tensor shapes few (compilers) and aligned (kernels)


class Arrow:
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

    def __init__(self, arrow: Arrow, name: str, dtype: type[np.generic]) -> None:
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

    def whole(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(all values one after the other, their lengths in elements) of each record batch."""
        for (offsets, data), batch in zip(self._parts, self._arrow.batches, strict=True):
            used = offsets[: batch.num_rows + 1]
            yield data[used[0] : used[-1]].view(self._dtype), np.diff(used) // self._dtype.itemsize


class Group:
    """All shards of one stored size: examples that can stand in one batch.

    Attributes:
        size: (height, width) of the stored fields.
        first: Row of the group's first example within the kind.
        has_coarse: Whether it is stored what crops are one level down: of latents, and where a model redrew it
            (`training.redraw`). Of other pixels it is their average.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        size: tuple[int, int],
        entries: list[dict[str, Any]],
        first: int,
        field: FieldSpec,
        redrawn: dict[str, dict[str, Any]],
    ) -> None:
        self.kind = kind
        self.size = size
        self._spec = field
        self.first = first
        self.files = [Arrow(folder / entry["name"]) for entry in entries]
        self.starts = np.cumsum([0, *(file.count for file in self.files)])
        for file, entry in zip(self.files, entries, strict=True):
            if file.count != entry["count"]:
                raise DataError(f"{folder / entry['name']} has {file.count} examples, not {entry['count']}")
        height, width = size
        self._fields = self._views("pixels" if field.is_pixels else "latents", height, width, self.files)
        coarse_files = self.files
        if redrawn and kind == "crop":
            coarse_files = [Arrow(folder / redrawn[entry["name"]]["name"]) for entry in entries]
            for file, coarse in zip(self.files, coarse_files, strict=True):
                if not np.array_equal(file.starts, coarse.starts):
                    raise DataError(f"{folder}: what was redrawn is not of these examples", hint="redraw the set again")
        # Of pixels the loader takes averages, unless they were redrawn.
        self.has_coarse = kind == "crop" and (bool(redrawn) or not field.is_pixels)
        self._coarse = self._views("coarse", height // 2, width // 2, coarse_files) if self.has_coarse else []
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

    @property
    def channels(self) -> int:
        """Of a field."""
        return self._spec.channels

    @property
    def coarse_size(self) -> tuple[int, int]:
        """(height, width) of what crops are one level down."""
        return self.size[0] // 2, self.size[1] // 2

    def stored(self, *, coarse: bool = False) -> Iterator[np.ndarray]:
        """All fields, or coarse ones, in order, in parts [n, height, width, channels]: views of the memory map."""
        for file in self._coarse if coarse else self._fields:
            yield from file

    def field(self, row: int) -> np.ndarray:
        """A view of one field in the memory map: uint8 or float16 [height, width, channels]."""
        index, inside = self.locate(row)
        part, inside = self.files[index].locate(inside)
        return self._fields[index][part][inside]

    def coarse(self, row: int) -> np.ndarray:
        """A view of what a crop is one level down, where that is stored: [height / 2, width / 2, channels]."""
        index, inside = self.locate(row)
        part, inside = self.files[index].locate(inside)
        return self._coarse[index][part][inside]

    def _views(self, name: str, height: int, width: int, files: list[Arrow]) -> list[list[np.ndarray]]:
        shape = (-1, height, width, self._spec.channels)

        def view(column: pa.FixedSizeBinaryArray) -> np.ndarray:
            flat = np.frombuffer(column.buffers()[1], self._spec.dtype)
            return flat.reshape(shape)[column.offset : column.offset + len(column)]

        return [[view(batch.column(name)) for batch in file.batches] for file in files]


class ShardSet:
    """A preprocessed set, opened for reading. Files are mapped, not read.

    Args:
        folder: Where it is.
        verify: Also compare every file's SHA-256 with the manifest's (reads everything once).
        redrawn: Read what a model redrew (`training.redraw`), if one did; False opens the set as it was preprocessed.

    Attributes:
        manifest: As `preprocess` wrote it.
        field: What is stored: pixels, or whose latents.
        hidden_size, pooled_size, max_tokens: Of the text embeddings.

    Raises:
        DataError: It is not a preprocessed set, not a finished one, or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False, redrawn: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        coarse = self.manifest.get(REDRAWN, {}).get("files", []) if redrawn else []
        self._redrawn: dict[str, dict[str, Any]] = {entry["of"]: entry for entry in coarse}
        for entry in [*self.manifest["shards"], self.manifest["captions"], *coarse]:
            path = self.folder / entry["name"]
            again = "run the same preprocessing again: it makes only what is missing"
            if "of" in entry:
                again = "run the same physformer data redraw again"
            if not is_whole(self.folder, entry):
                raise DataError(f"{path} is {'cut short' if path.is_file() else 'missing'}", hint=again)
            if verify and sha256_file(path) != entry["sha256"]:
                raise DataError(f"{path} is damaged", hint=f"delete it and {again}")
        # Sets from before there were latents say nothing about it.
        self.field = FieldSpec(**self.manifest.get("field", {}))
        captions = self.manifest["captions"]
        self.hidden_size: int = captions["hidden_size"]
        self.pooled_size: int = captions["pooled_size"]
        self.max_tokens: int = captions["max_tokens"]
        self._captions = Arrow(self.folder / captions["name"])
        self._tokens = _BinaryColumn(self._captions, "tokens", np.float16)
        self._pooled = _BinaryColumn(self._captions, "pooled", np.float16)

    @property
    def key(self) -> str:
        """Identifies configuration, source and encoder, and what was redrawn."""
        return str((self.manifest[REDRAWN] if self._redrawn else self.manifest)["key"])

    @property
    def redrawn_by(self) -> str | None:
        """SHA-256 of the checkpoint that redrew level 0 of its crops (`training.redraw`), if one did."""
        return str(self.manifest[REDRAWN]["checkpoint"]) if self._redrawn else None

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
    def groups(self, kind: str, split: str) -> tuple[Group, ...]:
        """Examples by stored size, in the order of `sizes`."""
        groups: list[Group] = []
        first = 0
        for size in self.sizes(kind, split):
            entries = [e for e in self._entries(kind, split) if (e["height"], e["width"]) == size]
            groups.append(Group(self.folder, kind, size, entries, first, self.field, self._redrawn))
            first += groups[-1].count
        return tuple(groups)

    def group_of(self, entry: dict[str, Any]) -> Group:
        """The examples of one shard of the manifest, as they were preprocessed."""
        return Group(self.folder, entry["kind"], (entry["height"], entry["width"]), [entry], 0, self.field, {})

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
        padded = TOKEN_MULTIPLE * math.ceil(longest / TOKEN_MULTIPLE)
        tokens_btd = np.zeros((len(rows), padded, self.hidden_size), np.float16)
        mask_bt = np.zeros((len(rows), padded), np.bool_)
        for index, value in enumerate(tokens):
            tokens_btd[index, : len(value)] = value
            mask_bt[index, : len(value)] = True
        pooled_bp = np.stack([self._pooled[row] for row in rows.tolist()])
        return torch.from_numpy(tokens_btd).float(), torch.from_numpy(mask_bt), torch.from_numpy(pooled_bp).float()

    def all_tokens(self) -> tuple[Iterator[np.ndarray], np.ndarray]:
        """Tokens of all captions one after the other, float16 [tokens, hidden] in parts, and how many each has."""
        lengths = np.concatenate([sizes for _, sizes in self._tokens.whole()]) // self.hidden_size
        return (values.reshape(-1, self.hidden_size) for values, _ in self._tokens.whole()), lengths

    def all_pooled(self) -> np.ndarray:
        """Pooled vectors of all captions, float16 [captions, pooled]."""
        return np.concatenate([values.reshape(-1, self.pooled_size) for values, _ in self._pooled.whole()])

    def resident_bytes(self, split: str) -> int:
        """Bytes of a split's fields and of all captions' embeddings."""
        shards = [entry for entry in self.manifest["shards"] if entry["split"] == split]
        redrawn = [self._redrawn[entry["name"]] for entry in shards if entry["name"] in self._redrawn]
        files = [self.folder / entry["name"] for entry in [*shards, *redrawn, self.manifest["captions"]]]
        return sum(path.stat().st_size for path in files)

    def _entries(self, kind: str, split: str) -> list[dict[str, Any]]:
        return [e for e in self.manifest["shards"] if e["kind"] == kind and e["split"] == split]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            partial = (self.folder / PARTIAL).is_dir()
            raise DataError(
                f"{self.folder} {'is a set that was not finished' if partial else 'has no manifest.json'}",
                hint="run the preprocessing again: what is finished is kept"
                if partial
                else "make a set first: physformer data preprocess",
            )
        manifest = read_json(path)
        if manifest.get("format") != SHARDS_FORMAT:
            raise DataError(
                f"{path} is not of the format {SHARDS_FORMAT}",
                hint="if it is a raw set, preprocess it first: physformer data preprocess",
            )
        return manifest
