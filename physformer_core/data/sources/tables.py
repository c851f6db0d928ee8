"""Parquet and Arrow files with encoded pictures in a column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from physformer_core.data.sources.base import Candidate, Origin, Part, Reader, StreamedPart, cut
from physformer_core.data.sources.files import FileList, find_files
from physformer_core.data.sources.rows import Columns, choose_columns
from physformer_core.errors import DataError

SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")

_BATCH_ROWS = 32


def open_tables(
    location: str,
    *,
    image_column: str | None = None,
    caption_column: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    license: str | None = None,
) -> TableReader:
    """Opens Parquet or Arrow files.

    Args:
        location: A file, a folder of files, or a pattern.
        image_column: Column of the encoded picture: bytes, or a struct with `bytes`; by default the first that is
            called image, jpg or the like.
        caption_column: Columns of captions: text, or lists of it; by default the first that is called caption, text
            or the like. A dot goes into a struct or JSON: `json.prompt`.
        label_column: Column of the class's number; by default one called label.
        limit: Look at so many rows at most.
        license: Licence of the pictures, for the manifest.

    Raises:
        ConfigError: A column is not there.
        DataError: There are no such files, or one cannot be read.
    """
    files = FileList(find_files(location, SUFFIXES, what="Parquet or Arrow files"))
    tables = [_Table(file) for file in files.files]
    first = next((row for table in tables for row in table.read(0)), None)
    if first is None:
        raise DataError(f"{location} has no rows")
    columns = choose_columns(
        first, image=image_column, captions=caption_column, label=label_column, where=str(files.files[0])
    )
    origin = Origin(
        name="parquet",
        location=location,
        fingerprint=files.fingerprint,
        options={
            "image_column": columns.image,
            "caption_column": list(columns.captions),
            "label_column": columns.label,
            "limit": limit,
        },
        license=license,
    )
    return TableReader(origin, files, tables, columns, limit)


class TableReader(Reader):
    """Rows of files, one file after the other. This process reads them, a few dozen at a time."""

    def __init__(
        self, origin: Origin, files: FileList, tables: Sequence[_Table], columns: Columns, limit: int | None
    ) -> None:
        self.origin = origin
        self._files = files
        self._tables = tables
        self._columns = columns
        self._rows = sum(table.rows for table in tables)
        self._limit = limit

    def count(self) -> int | None:
        return self._rows if self._limit is None else min(self._rows, self._limit)

    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        row = position["row"] if position is not None else 0
        for candidates in cut(self._candidates(row), lambda candidate: len(candidate.image or b"")):
            row += len(candidates)
            yield StreamedPart(tuple(candidates), {"row": row})

    def _candidates(self, start: int) -> Iterator[Candidate]:
        number, stop = 0, self.count()
        assert stop is not None
        named = [self._columns.image, *self._columns.captions, *filter(None, [self._columns.label])]
        wanted = list(dict.fromkeys(name.partition(".")[0] for name in named))
        for table in self._tables:
            if number + table.rows <= start:
                number += table.rows
                continue
            name = self._files.name(table.file)
            inside = max(0, start - number)
            for offset, row in enumerate(table.read(inside, wanted), start=inside):
                if number + offset >= stop:
                    return
                yield self._columns.candidate(row, f"{name}:{offset}", f"{name}, row {offset}")
            number += table.rows


class _Table:
    """A Parquet file, or an Arrow file or stream.

    Attributes:
        rows: How many it has.

    Raises:
        DataError: It is neither.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with open(file, "rb") as stream:
                magic = stream.read(6)
            self._parquet = magic[:4] == b"PAR1"
            self._random_access = magic == b"ARROW1"
            if self._parquet:
                self.rows = int(pq.read_metadata(file).num_rows)
            else:
                self.rows = sum(batch.num_rows for batch in self._arrow_batches())
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def read(self, start: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Its rows from number `start` on."""
        try:
            for batch in self._batches(start, columns):
                # Row by row: the pictures of a batch would be in memory twice.
                for index in range(batch.num_rows):
                    yield batch.slice(index, 1).to_pylist()[0]
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        said = next(iter(str(error).splitlines()), "")
        return DataError(f"cannot read {self.file}: {said}", hint="it must be a whole Parquet or Arrow file")

    def _batches(self, start: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        before = 0
        for batch in self._parquet_batches(start, columns) if self._parquet else self._arrow_batches():
            if isinstance(batch, int):
                before += batch
                continue
            stop = before + batch.num_rows
            if stop > start:
                batch = batch.slice(max(0, start - before))
                yield batch if columns is None or self._parquet else batch.select(list(dict.fromkeys(columns)))
            before = stop

    def _parquet_batches(self, start: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch | int]:
        """Batches; the number of rows in place of row groups that end before `start`."""
        with pq.ParquetFile(self.file, pre_buffer=False) as file:
            # A struct's columns are named by their paths, and a name stands for all below it.
            chosen = list(dict.fromkeys(columns)) if columns is not None else None
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                before += rows
                if before <= start:
                    yield rows
                else:
                    yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=chosen)

    def _arrow_batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.file)) as source:
            if self._random_access:
                reader = pa.ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
            else:
                yield from pa.ipc.open_stream(source)
