"""From a source's examples to a RAW set: verified, written part by part, whatever interrupts it.

While a set is being made, `.partial` in its folder holds a record of every finished part. A part is finished when its
examples and its record are on the disk; everything else is done again, so that a killed run neither loses nor repeats
an example. What is refused is listed in `quarantine.jsonl`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from physformer_core.data.set_folder import (
    PARTIAL,
    RAW_FORMAT,
    START_AGAIN,
    begin,
    check_source,
    is_whole,
    read_json,
    write_json,
)
from physformer_core.data.sources.base import Candidate, Part, Reader, cut
from physformer_core.data.sources.verification import Refused, verify_captions, verify_picture
from physformer_core.data.workers import run_stream
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file, sole_writer

# Raise it whenever the same source would give other bytes.
FETCH_VERSION = 1

QUARANTINE = "quarantine.jsonl"
_GROUP_BYTES = 16 << 20  # a reader holds a row group in memory
_GROUP_ROWS = 256
# Small files are read some at a time and then looked at: by turns, one work drove the other's code out of the
# processor's caches, and both took a tenth longer.
_READ_AHEAD = 16
_READ_AHEAD_BYTES = 1 << 20

RAW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("svg", pa.large_string()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("class_label", pa.int32()),
        ("meta", pa.string()),
    ]
)
# Encoded pictures do not get smaller: only the rest is compressed.
_COMPRESSION = {
    **dict.fromkeys(("key", "svg", "width", "height", "class_label", "meta"), "zstd"),
    "captions.list.element": "zstd",
    "image": "NONE",
}

FetchProgress = Callable[[int, "int | None"], None]


def write_raw_set(
    reader: Reader, output_dir: str | Path, *, workers: int = 1, progress: FetchProgress | None = None
) -> dict[str, Any]:
    """Writes a RAW set of all that a source has, or what of it is missing.

    Args:
        reader: The source.
        output_dir: Folder of the set; made if missing.
        workers: Processes that read, verify and write. They do not change the result.
        progress: Called with (examples looked at, examples in all or None) before the first and then about twice a
            second; not at all if the set is there already.

    Returns:
        The manifest. Besides what every raw set has: "looked_at", "refused" (reason to count), "notes" (peculiarity
        to count), "quarantine", "classes", "ignored" and "parts".

    Raises:
        DataError: The source cannot be read, has nothing fit for use, has changed since the set was begun, or the
            folder holds another set.
        OutputError: The folder cannot be written.
    """
    if workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")
    output = Path(output_dir)
    source = {**reader.origin.identity(), "version": FETCH_VERSION}
    known = _finished(output, source)
    if known is not None and not _lost_parts(output, known):
        if reader.origin.license not in (None, known["license"]):  # said, or said otherwise, only now
            known["license"] = reader.origin.license
            with sole_writer(output):
                write_json(output / "manifest.json", known, indent=1)
        return known
    with _claimed(output):
        begin(output, source)
        if known is not None:
            _reopen(output, known)
        records = _records(output)
        _write_parts(reader, output, records, workers, progress)
        return _finish(reader, output, source, [records[number] for number in sorted(records)])


# Parts


@dataclass(frozen=True)
class _Job:
    number: int
    part: Part
    output: Path


def _write_parts(
    reader: Reader, output: Path, records: dict[int, dict[str, Any]], workers: int, progress: FetchProgress | None
) -> None:
    """Writes the parts that have no record yet, and adds their records."""
    first = next(number for number in range(len(records) + 1) if number not in records)
    position = records[first - 1]["position"] if first else None
    total = reader.count()
    before = sum(record["looked_at"] for record in records.values())

    def jobs() -> Iterator[_Job]:
        number = first - 1
        for number, part in enumerate(reader.parts(first, position), start=first):
            if number not in records:
                yield _Job(number, part, output)
        if records and max(records) > number:
            raise DataError(
                f"the source has fewer examples than when {output} was begun",
                hint="delete that folder, or choose another one",
            )

    def finished(record: dict[str, Any]) -> None:
        write_json(_record_path(output, record["part"]), record)
        records[record["part"]] = record

    def ticked(count: int) -> None:
        if progress is not None:
            progress(before + count, total)

    ticked(0)
    run_stream(_write_part, jobs(), workers, finished=finished, ticked=ticked)


def _write_part(job: _Job, tick: Callable[[int], None]) -> dict[str, Any]:
    """Reads, verifies and writes one part. Returns its record."""
    refused: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    quarantine: list[str] = []
    looked_at = 0
    writer = _ExamplesWriter(job.output / f"examples-{job.number:05d}.parquet")
    with writer:
        for group in cut(job.part.read(), _picture_bytes, most=_READ_AHEAD, enough=_READ_AHEAD_BYTES):
            for candidate in group:
                try:
                    row, peculiar = _example(candidate)
                except Refused as reason:
                    refused[reason.reason] += 1
                    entry = {"key": candidate.key, "reason": reason.reason, "path": candidate.path}
                    quarantine.append(json.dumps({**entry, "detail": reason.detail}, ensure_ascii=True))
                else:
                    notes.update(peculiar)
                    writer.add(row)
            looked_at += len(group)
            tick(len(group))
    with atomic_write(_quarantine_path(job.output, job.number)) as temporary:
        temporary.write_text("".join(line + "\n" for line in quarantine), "utf-8")
    return {
        "part": job.number,
        "looked_at": looked_at,
        "examples": writer.entry(),
        "refused": dict(sorted(refused.items())),
        "notes": dict(sorted(notes.items())),
        "position": job.part.position,
    }


def _picture_bytes(candidate: Candidate) -> int:
    return len(candidate.image or b"")


def _example(candidate: Candidate) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row of the raw set, and what is not plain about it."""
    if candidate.problem is not None:
        raise Refused(candidate.problem, candidate.detail)
    captions, of_captions = verify_captions(candidate.captions, alone=candidate.class_label is not None)
    picture = verify_picture(candidate.image, candidate.suffix)
    row = {
        "key": candidate.key,
        "svg": None,
        "image": picture.image,
        "width": picture.width,
        "height": picture.height,
        "captions": captions,
        "class_label": candidate.class_label,
        "meta": json.dumps({"path": candidate.path}),
    }
    return row, picture.notes + of_captions


class _ExamplesWriter:
    """A Parquet file that grows by row groups; no file at all if no example comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._count = 0

    def __enter__(self) -> _ExamplesWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._flush()
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        self._stack.__exit__(kind, *rest)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += len(row["image"])
        if self._bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def entry(self) -> dict[str, Any] | None:
        """The manifest's entry of the finished file."""
        if not self._count:
            return None
        size, digest = self._path.stat().st_size, sha256_file(self._path)
        return {"name": self._path.name, "sha256": digest, "count": self._count, "bytes": size}

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            temporary = self._stack.enter_context(atomic_write(self._path))
            self._writer = self._stack.enter_context(
                pq.ParquetWriter(
                    temporary, RAW_SCHEMA, compression=_COMPRESSION, use_dictionary=False, write_statistics=["key"]
                )
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, RAW_SCHEMA), row_group_size=len(self._rows))
        self._count += len(self._rows)
        self._rows.clear()
        self._bytes = 0


# The folder: whose it is, what is there, what is missing


def _record_path(output: Path, number: int) -> Path:
    return output / PARTIAL / f"part-{number:05d}.json"


def _quarantine_path(output: Path, number: int) -> Path:
    return output / PARTIAL / f"quarantine-{number:05d}.jsonl"


def _finished(output: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished set of this very source, or None if there is none."""
    path = output / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path, hint=START_AGAIN)
    check_source(output, manifest.get("source"), source)
    return manifest


def _lost_parts(output: Path, manifest: dict[str, Any]) -> list[int]:
    """Numbers of the parts of which something is missing on the disk."""
    listed = manifest["quarantine"] is None or _is_whole(output, manifest["quarantine"])
    return [
        part["part"]
        for part in manifest["parts"]
        if not _is_whole(output, part["examples"]) or (part["refused"] and not listed)
    ]


def _is_whole(output: Path, entry: dict[str, Any] | None) -> bool:
    return entry is None or is_whole(output, entry)  # a part may have no example


def _reopen(output: Path, manifest: dict[str, Any]) -> None:
    """Turns a finished set that has lost files back into an unfinished one, so that the rest is kept."""
    lost = set(_lost_parts(output, manifest))
    lines: list[str] = []
    if manifest["quarantine"] is not None and _is_whole(output, manifest["quarantine"]):
        lines = (output / QUARANTINE).read_text("utf-8").splitlines(keepends=True)
    start = 0
    for part in manifest["parts"]:
        stop = start + sum(part["refused"].values())
        if part["part"] not in lost:
            with atomic_write(_quarantine_path(output, part["part"])) as temporary:
                temporary.write_text("".join(lines[start:stop]), "utf-8")
            write_json(_record_path(output, part["part"]), part)
        start = stop
    (output / "manifest.json").unlink()


def _records(output: Path) -> dict[int, dict[str, Any]]:
    """The records of the parts that are whole, by number."""
    found = (read_json(path, hint=START_AGAIN) for path in (output / PARTIAL).glob("part-*.json"))
    return {
        record["part"]: record
        for record in found
        if _is_whole(output, record["examples"]) and _quarantine_path(output, record["part"]).exists()
    }


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    with sole_writer(output):
        try:
            yield
        except BaseException:
            if not (output / PARTIAL / "source.json").exists():  # refused before anything was begun
                shutil.rmtree(output / PARTIAL, ignore_errors=True)
            raise


def _finish(reader: Reader, output: Path, source: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the quarantine list and the manifest, and removes what only an unfinished set needs."""
    refused: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for record in records:
        refused.update(record["refused"])
        notes.update(record["notes"])
    files = [record["examples"] for record in records if record["examples"] is not None]
    quarantine = None
    if refused:
        with atomic_write(output / QUARANTINE) as temporary, open(temporary, "wb") as stream:
            for record in records:
                stream.write(_quarantine_path(output, record["part"]).read_bytes())
        path = output / QUARANTINE
        quarantine = {
            "name": QUARANTINE,
            "sha256": sha256_file(path),
            "count": refused.total(),
            "bytes": path.stat().st_size,
        }
    if not files:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common(3))
        raise DataError(
            f"{source['location']} has no example fit for use" + (f": {reasons}" if reasons else ""),
            hint=f"see {output / QUARANTINE}" if refused else "check the location and the options",
        )
    origin = reader.origin
    manifest = {
        "format": RAW_FORMAT,
        "source": source,
        "license": origin.license,
        "attribution": origin.attribution,
        "count": sum(entry["count"] for entry in files),
        "looked_at": sum(record["looked_at"] for record in records),
        "refused": dict(sorted(refused.items())),
        "notes": dict(sorted(notes.items())),
        "ignored": dict(sorted(origin.ignored.items())),
        "classes": list(origin.classes),
        "quarantine": quarantine,
        "files": files,
        "sha256": hashlib.sha256("".join(sorted(entry["sha256"] for entry in files)).encode()).hexdigest(),
        "parts": records,
    }
    write_json(output / "manifest.json", manifest, indent=1)
    shutil.rmtree(output / PARTIAL, ignore_errors=True)
    return manifest
