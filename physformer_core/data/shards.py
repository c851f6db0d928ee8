"""Raw files -> parts, one at a time in any process; parts -> the shards that loaders map into memory.

A part is what of a raw file is done, and what is kept when a run is killed. Shards hold the parts of many raw files:
a loader keeps all of them open at once, so there must not be too many.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from physformer_core.data import framing
from physformer_core.data.examples import Example, chances, make_examples, split_of
from physformer_core.data.latents import FieldSpec, encode_pictures
from physformer_core.data.preprocess_config import PreprocessConfig
from physformer_core.data.scan import Scan
from physformer_core.data.set_folder import is_whole, read_json, write_json
from physformer_core.data.workers import one_thread, run_stream
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file

_MAX_SHARDS = 32
_MIN_SHARD_ROWS = 2000
_RECORD_BATCH_ROWS = 256
_RECORD_BATCH_BYTES = 8 << 20  # a writer holds as much, and there is one for each size
_RAW_ROWS = 32  # so many rows of a raw file are taken at a time
_ENCODED_PIXELS = 1 << 20  # so many pixels of pictures are encoded together
_COLUMNS = ["key", "svg", "image", "width", "height", "class_label"]


@dataclass(frozen=True)
class _Job:
    """A raw file to be made into a part."""

    number: int
    raw: Path
    partial: Path
    entry: dict[str, Any]
    scan: Scan
    config: PreprocessConfig
    field: FieldSpec

    @property
    def folder(self) -> Path:
        return _part_folder(self.partial, self.number)


def write_shards(
    raw: Path,
    output: Path,
    partial: Path,
    files: Sequence[dict[str, Any]],
    scan: Scan,
    config: PreprocessConfig,
    field: FieldSpec,
    *,
    workers: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Writes all shards that are not whole yet.

    Args:
        raw: The raw set.
        output: Where the shards go.
        partial: Where parts and records are kept meanwhile.
        files: The raw set's files, from its manifest.
        scan: Its captions.
        config, field: What to make of it.
        workers: Processes. They do not change the result.
        progress: Is told (examples done, examples in all).

    Returns:
        A record for each group of files: "chunk", "examples", "refused", "area" (by bucket: examples, and the sum of
        the shares of their areas that are cut off) and "shards" (as a manifest lists them).

    Raises:
        DataError: A raw file is damaged, or a process died.
    """
    groups = group_files(scan.examples)
    missing = {number: group for number, group in enumerate(groups) if not _chunk_is_whole(output, partial, number)}
    left = {number: {file for file in group if not _is_done(partial, file)} for number, group in missing.items()}
    group_of = {file: number for number, group in missing.items() for file in group}
    total = sum(scan.examples)
    done = total - sum(scan.examples[file] for open_files in left.values() for file in open_files)

    def finished(file: int) -> None:
        number = group_of[file]
        left[number].discard(file)
        if not left[number]:
            _join(output, partial, number, missing[number], field)

    progress(done, total)
    for number, open_files in left.items():
        if not open_files:  # killed while these were joined
            _join(output, partial, number, missing[number], field)
    jobs = (
        _Job(file, raw, partial, files[file], scan, config, field) for number in left for file in sorted(left[number])
    )
    run_stream(_write_part, jobs, workers, finished=finished, ticked=lambda count: progress(done + count, total))
    progress(total, total)
    return [read_json(chunk_record(partial, number)) for number in range(len(groups))]


def group_files(counts: Sequence[int]) -> list[list[int]]:
    """Consecutive files, so many together that there are at most `_MAX_SHARDS` groups or so."""
    target = max(_MIN_SHARD_ROWS, math.ceil(sum(counts) / _MAX_SHARDS))
    groups: list[list[int]] = []
    filled = target
    for index, count in enumerate(counts):
        if filled >= target:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += count
    return groups


def chunk_record(partial: Path, number: int) -> Path:
    """Where the record of a group's shards is kept until the set is finished."""
    return partial / f"chunk-{number:05d}.json"


def _part_folder(partial: Path, file: int) -> Path:
    return partial / f"part-{file:05d}"


def _part_record(partial: Path, file: int) -> Path:
    return partial / f"part-{file:05d}.json"


def _is_done(partial: Path, file: int) -> bool:
    return _part_record(partial, file).is_file()


def _chunk_is_whole(output: Path, partial: Path, number: int) -> bool:
    path = chunk_record(partial, number)
    return path.is_file() and all(is_whole(output, shard) for shard in read_json(path)["shards"])


# Parts


def _write_part(job: _Job, tick: Callable[[int], None]) -> int:
    """Makes a raw file into a part. Returns the file's number."""
    path = job.raw / job.entry["name"]
    if sha256_file(path) != job.entry["sha256"]:
        raise DataError(f"{path} is damaged", hint="delete it and fetch the raw set again")
    refused: Counter[str] = Counter()
    examples: Counter[str] = Counter()
    area: dict[str, list[float]] = {}
    rows, starts = job.scan.caption_rows(job.number)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        writers: dict[tuple[str, int, int, str], _PartWriter] = {}
        of_examples = (rows[first:last] for first, last in itertools.pairwise(starts.tolist()))
        for (raw, chance), captions in zip(_raw_rows(path, job.config, tick), of_examples, strict=True):
            split = split_of(raw["key"], job.config.validation_fraction)
            try:
                if len(captions) == 0:
                    raise framing.UnusablePicture("no usable caption")
                made = make_examples(raw, job.config, job.field.factor, chance=chance)
            except framing.UnusablePicture as reason:
                refused[str(reason)] += 1
                continue
            examples[split] += 1
            sums = area.setdefault(f"{made.bucket[1]}x{made.bucket[0]}", [0, 0.0])
            sums[0] += 1
            sums[1] += made.cut
            for example in made.examples:
                height, width = (side // job.field.factor for side in example.pixels.shape[:2])
                where = (example.kind, height, width, split)
                if where not in writers:
                    writers[where] = _PartWriter(stack, job.folder, job.field, *where)
                writers[where].add(example, captions, raw["class_label"], raw["key"])
        for writer in writers.values():
            writer.finish()
    record = {
        "examples": dict(sorted(examples.items())),
        "refused": dict(sorted(refused.items())),
        "area": dict(sorted(area.items())),
        "parts": [writers[where].entry() for where in sorted(writers)],
    }
    write_json(_part_record(job.partial, job.number), record)
    return job.number


def _raw_rows(
    path: Path, config: PreprocessConfig, tick: Callable[[int], None]
) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """The rows of a raw file, and what chance says of each.

    Some at a time: one by one, chance took several times as long, for its code was never in the processor's caches.
    Those that have been worked on are ticked off.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:
        # Threads of Arrow's would wait for one another: a worker has one.
        for batch in file.iter_batches(_RAW_ROWS, columns=_COLUMNS, use_threads=False):
            rows = batch.to_pylist()
            yield from zip(rows, [chances(config, row["key"]) for row in rows], strict=True)
            tick(len(batch))


def _schema(kind: str, height: int, width: int, field: FieldSpec) -> pa.Schema:
    if field.is_pixels:
        stored = [("pixels", pa.binary(field.element_bytes(height, width)))]
    else:
        stored = [("latents", pa.binary(field.element_bytes(height, width)))]
        if kind == "crop":
            stored.append(("coarse", pa.binary(field.element_bytes(height // 2, width // 2))))
    columns = [("captions", pa.list_(pa.int32())), ("class_label", pa.int32()), ("key", pa.string())]
    if kind == "crop":
        columns += [("level", pa.int8()), ("place", pa.list_(pa.float32(), 4))]
    return pa.schema([*stored, *columns])


def _batch_rows(height: int, width: int, field: FieldSpec) -> int:
    return max(1, min(_RECORD_BATCH_ROWS, _RECORD_BATCH_BYTES // field.element_bytes(height, width)))


class _PartWriter:
    """Examples of one kind, size and split in a part."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        field: FieldSpec,
        kind: str,
        height: int,
        width: int,
        split: str,
    ) -> None:
        name = f"{kind}-{height}x{width}-{split}.arrow"
        self._entry = {"name": name, "kind": kind, "height": height, "width": width, "split": split}
        self._field = field
        self._schema = _schema(kind, height, width, field)
        self._batch_rows = _batch_rows(height, width, field)
        self._encoded_rows = max(1, _ENCODED_PIXELS // (height * width * field.factor**2))
        temporary = stack.enter_context(atomic_write(folder / name))
        sink = stack.enter_context(pa.OSFile(str(temporary), "wb"))
        self._writer = stack.enter_context(pa.ipc.new_file(sink, self._schema))
        self._waiting: list[tuple[Example, dict[str, Any]]] = []
        # Pixels go straight to where Arrow takes them from: as bytes of each row they would be copied twice more.
        self._stored = {
            column.name: np.empty((self._batch_rows, column.type.byte_width), np.uint8)
            for column in self._schema
            if pa.types.is_fixed_size_binary(column.type)
        }
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names if name not in self._stored}
        self._count = 0

    def add(self, example: Example, captions: np.ndarray, class_label: int | None, key: str) -> None:
        columns = {"captions": captions, "class_label": class_label, "key": key, **example.columns}
        if self._field.is_pixels:
            self._append({"pixels": example.pixels}, columns)
        else:
            self._waiting.append((example, columns))
            if len(self._waiting) == self._encoded_rows:
                self._encode()

    def finish(self) -> None:
        if self._waiting:
            self._encode()
        if self._count:
            self._flush()

    def entry(self) -> dict[str, Any]:
        """What a part's record says about the file."""
        return self._entry

    def _encode(self) -> None:
        latents = encode_pictures(self._field, [example.pixels for example, _ in self._waiting])
        small = [example.coarse for example, _ in self._waiting if example.coarse is not None]
        coarse = encode_pictures(self._field, small) if small else ()
        for index, (_, columns) in enumerate(self._waiting):
            stored = {"latents": latents[index]}
            if len(coarse):
                stored["coarse"] = coarse[index]
            self._append(stored, columns)
        self._waiting.clear()

    def _append(self, stored: dict[str, np.ndarray], columns: dict[str, Any]) -> None:
        for name, element in stored.items():
            self._stored[name][self._count] = element.reshape(-1).view(np.uint8)
        for name, values in self._columns.items():
            values.append(columns[name])
        self._count += 1
        if self._count == self._batch_rows:
            self._flush()

    def _flush(self) -> None:
        arrays = [
            pa.Array.from_buffers(
                column.type, self._count, [None, pa.py_buffer(self._stored[column.name][: self._count])]
            )
            if column.name in self._stored
            else pa.array(self._columns[column.name], column.type)
            for column in self._schema
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for values in self._columns.values():
            values.clear()
        self._count = 0


# Shards


def _join(output: Path, partial: Path, number: int, group: Sequence[int], field: FieldSpec) -> None:
    """Makes the parts of a group of raw files into shards, and removes them."""
    records = {file: read_json(_part_record(partial, file)) for file in group}
    sources: dict[tuple[str, int, int, str], list[Path]] = {}
    examples: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    area: dict[str, list[float]] = {}
    for file, record in records.items():
        examples.update(record["examples"])
        refused.update(record["refused"])
        for bucket, (count, cut) in record["area"].items():
            before = area.get(bucket, [0, 0.0])
            area[bucket] = [before[0] + count, before[1] + cut]
        for part in record["parts"]:
            where = (part["kind"], part["height"], part["width"], part["split"])
            sources.setdefault(where, []).append(_part_folder(partial, file) / part["name"])
    shards = [_write_shard(output, number, where, sources[where], field) for where in sorted(sources)]
    record = {
        "chunk": number,
        "examples": dict(sorted(examples.items())),
        "refused": dict(sorted(refused.items())),
        "area": dict(sorted(area.items())),
        "shards": shards,
    }
    write_json(chunk_record(partial, number), record)
    for file in group:
        # The record first: without it the rest is no part.
        _part_record(partial, file).unlink()
        shutil.rmtree(_part_folder(partial, file), ignore_errors=True)


def _write_shard(
    output: Path, number: int, where: tuple[str, int, int, str], parts: Sequence[Path], field: FieldSpec
) -> dict[str, Any]:
    kind, height, width, split = where
    path = output / f"{kind}-{height}x{width}-{split}-{number:05d}.arrow"
    schema, rows = _schema(kind, height, width, field), _batch_rows(height, width, field)
    with contextlib.ExitStack() as stack:
        maps = [stack.enter_context(pa.memory_map(str(part))) for part in parts]
        table = pa.concat_tables([pa.ipc.open_file(one).read_all() for one in maps])
        temporary = stack.enter_context(atomic_write(path))
        sink = stack.enter_context(pa.OSFile(str(temporary), "wb"))
        writer = stack.enter_context(pa.ipc.new_file(sink, schema))
        for start in range(0, len(table), rows):
            writer.write_batch(table.slice(start, rows).combine_chunks().to_batches()[0])
        count = len(table)
    return {
        "name": path.name,
        "kind": kind,
        "height": height,
        "width": width,
        "split": split,
        "chunk": number,
        "count": count,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }
