"""Which captions a raw set has: each once, in the order in which they are stored, and which examples say them.

Everything but a block of captions is on the disk, in a small database that goes away when the set is finished: so the
memory it takes does not grow with the set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from physformer_core.data.workers import Progress
from physformer_core.errors import DataError, OutputError
from physformer_core.files import atomic_write

PART_ROWS = 4096
"""Captions that are encoded together; parts begin at multiples of it."""

_CACHE_KIB = 64 << 10
_ROWS_READ = 1000
_DATABASE = "captions.sqlite"
_RECORD = "scan.json"


@dataclass(frozen=True)
class Scan:
    """What the captions of a raw set come to.

    Attributes:
        folder: Where it is kept.
        captions: How many different captions are used. Their rows are in the order of (tokens, text): batches then
            need hardly any padding, and neighbours in time are neighbours on the disk.
        examples: How many examples each raw file has.
        refused: How many different captions are not used, by reason.
    """

    folder: Path
    captions: int
    examples: tuple[int, ...]
    refused: dict[str, int]

    def part(self, number: int) -> tuple[list[str], list[int]]:
        """The texts of rows `number * PART_ROWS` on, at most `PART_ROWS`, and their tokens."""
        with _connection(self.folder / _DATABASE, read_only=True) as database:
            first = database.execute("SELECT length, text FROM parts WHERE number = ?", (number,)).fetchone()
            found = database.execute(
                "SELECT text, length FROM captions WHERE (length, text) >= (?, ?) ORDER BY length, text LIMIT ?",
                (*first, min(PART_ROWS, self.captions - number * PART_ROWS)),
            ).fetchall()
        return [text for text, _ in found], [length for _, length in found]

    def caption_rows(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        """The caption rows of all examples of a raw file, and where each example's begin; one entry more at the end."""
        with np.load(_rows_path(self.folder, file)) as arrays:
            return arrays["rows"], arrays["starts"]


def scan_captions(
    raw: Path, files: list[str], folder: Path, *, encoder: str, max_tokens: int, progress: Progress | None
) -> Scan:
    """Reads all captions of a raw set, or takes what an earlier call has found.

    Args:
        raw: The raw set.
        files: Names of its files, in order.
        folder: Where to keep the result. What is there must be of the same set, encoder and limit.
        encoder: Text encoder, whose tokens count.
        max_tokens: Captions with more are not used.
        progress: Is told of each file, as the stage "scan".

    Raises:
        DataError: A file cannot be read, or two examples have one key.
    """
    record_path = folder / _RECORD
    if record_path.is_file():
        values = json.loads(record_path.read_text("utf-8"))
        return Scan(folder, values["captions"], tuple(values["examples"]), values["refused"])
    (folder / _DATABASE).unlink(missing_ok=True)  # a killed run's
    with _connection(folder / _DATABASE) as database:
        database.executescript(
            "CREATE TABLE keys (key TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE captions (length INTEGER, text TEXT, row INTEGER, PRIMARY KEY (length, text)) WITHOUT ROWID;"
            "CREATE TABLE parts (number INTEGER PRIMARY KEY, length INTEGER, text TEXT);"
        )
        examples = [0] * len(files)
        for number, name in enumerate(files):
            examples[number] = _collect(database, raw / name, encoder)
            if progress is not None:
                progress("scan", number + 1, len(files))
        (keys,) = database.execute("SELECT count(*) FROM keys").fetchone()
        if keys != sum(examples):
            raise DataError(f"{raw} has {sum(examples) - keys} examples with a key that another one has")
        captions = _number_rows(database, max_tokens)
        for number, name in enumerate(files):
            _write_rows(database, raw / name, encoder, _rows_path(folder, number))
        ((long,), (empty,)) = (
            database.execute(f"SELECT count(*) FROM captions WHERE length {condition}").fetchone()
            for condition in (f"> {int(max_tokens)}", "< 1")
        )
    refused = {reason: count for reason, count in (("too long", long), ("empty", empty)) if count}
    scan = Scan(folder, captions, tuple(examples), refused)
    values = {key: value for key, value in dataclasses.asdict(scan).items() if key != "folder"}
    with atomic_write(record_path) as temporary:
        temporary.write_text(json.dumps(values), "utf-8")
    return scan


@contextlib.contextmanager
def _connection(path: Path, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    # Nothing here has to survive a crash: what `scan.json` does not vouch for is thrown away.
    database = sqlite3.connect(f"{path.absolute().as_uri()}{'?mode=ro' if read_only else ''}", uri=True)
    try:
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        if not read_only:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
        with database:
            yield database
    except sqlite3.OperationalError as error:
        raise OutputError(f"cannot use {path}: {error}", hint="check the space on the disk") from error
    finally:
        database.close()


def _rows_path(folder: Path, file: int) -> Path:
    return folder / f"rows-{file:05d}.npz"


def _blocks(path: Path, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_READ, columns=columns):
                yield batch.to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged", hint="delete it and fetch the raw set again") from error


def _plain(captions: list[str] | None) -> list[str]:
    return [" ".join(caption.split()) for caption in captions or ()]


def _lengths(texts: set[str], encoder: str) -> dict[str, int]:
    from physformer_core.text import count_prompt_tokens

    ordered = sorted(texts)
    return dict(zip(ordered, count_prompt_tokens(ordered, encoder), strict=True)) if ordered else {}


def _collect(database: sqlite3.Connection, path: Path, encoder: str) -> int:
    """Notes the keys and captions of a file. Returns how many examples it has."""
    count = 0
    texts: set[str] = set()
    for block in _blocks(path, ["key", "captions"]):
        count += len(block["key"])
        database.executemany("INSERT OR IGNORE INTO keys VALUES (?)", ((key,) for key in block["key"]))
        texts.update(text for captions in block["captions"] for text in _plain(captions))
    lengths = _lengths(texts, encoder)
    database.executemany(
        "INSERT OR IGNORE INTO captions VALUES (?, ?, NULL)", ((length, text) for text, length in lengths.items())
    )
    return count


def _number_rows(database: sqlite3.Connection, max_tokens: int) -> int:
    """Gives every caption that is used its row, and notes where parts begin. Returns how many there are."""
    after: tuple[int, str] = (0, "")
    row = 0
    while True:
        block = database.execute(
            "SELECT length, text FROM captions WHERE (length, text) > (?, ?) AND length BETWEEN 1 AND ? "
            "ORDER BY length, text LIMIT ?",
            (*after, max_tokens, PART_ROWS),
        ).fetchall()
        if not block:
            return row
        database.execute("INSERT INTO parts VALUES (?, ?, ?)", (row // PART_ROWS, *block[0]))
        database.executemany(
            "UPDATE captions SET row = ? WHERE length = ? AND text = ?",
            ((row + index, *caption) for index, caption in enumerate(block)),
        )
        row += len(block)
        after = block[-1]


def _write_rows(database: sqlite3.Connection, path: Path, encoder: str, output: Path) -> None:
    captions: list[list[str]] = [_plain(one) for block in _blocks(path, ["captions"]) for one in block["captions"]]
    rows: dict[str, int | None] = {}
    for text, length in _lengths({text for texts in captions for text in texts}, encoder).items():
        query = "SELECT row FROM captions WHERE length = ? AND text = ?"
        (rows[text],) = database.execute(query, (length, text)).fetchone()
    used = [[row for text in texts if (row := rows[text]) is not None] for texts in captions]
    starts = np.cumsum([0, *map(len, used)], dtype=np.int64)
    with atomic_write(output) as temporary:
        with open(temporary, "wb") as stream:
            np.savez(stream, rows=np.array([row for one in used for row in one], np.int32), starts=starts)
