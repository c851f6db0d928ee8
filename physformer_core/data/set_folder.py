"""The folder of a set while it is made: its formats, its records, and what a killed run leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from physformer_core.errors import DataError
from physformer_core.files import atomic_write

RAW_FORMAT = "physformer-raw/1"
"""Pictures as they are, with captions: what `data fetch` writes."""

SHARDS_FORMAT = "physformer-shards/1"
"""Training examples: what `data preprocess` writes."""

START_AGAIN = "delete it and fetch again"

PARTIAL = ".partial"
"""Folder in a set's folder for what only an unfinished set needs."""


def read_json(path: Path, *, hint: str | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: The file.
        hint: What to do if it cannot be read.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object", hint=hint)
    return value


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Writes a JSON object, whole or not at all; indented, if it is for people."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", "utf-8")


def is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file that a manifest or a record lists is there, with its size.

    By its size alone: a file is renamed into place when it is synced, and every later stage reads its hash.
    """
    path = folder / entry["name"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def remove_half_written(folder: Path) -> None:
    """Removes what a killed run left: files that were never renamed into place. Folders below are other sets'."""
    for path in (*folder.glob(".*.tmp.*"), *(folder / PARTIAL).rglob(".*.tmp.*")):
        path.unlink(missing_ok=True)


def begin(output: Path, source: Mapping[str, Any]) -> None:
    """Claims a raw set's folder for a source, and removes what a killed run left half-written; for who alone writes it.

    Raises:
        DataError: It holds another set, finished or begun.
    """
    path = output / PARTIAL / "source.json"
    if path.exists():
        check_source(output, read_json(path, hint=START_AGAIN).get("source"), source)
    elif (output / "manifest.json").exists() or not any(output.glob("examples-*.parquet")):
        write_json(path, {"source": source})
    else:
        raise DataError(f"{output} already holds another set", hint="choose an empty folder, or delete this one")
    remove_half_written(output)


def check_source(output: Path, found: Any, source: Mapping[str, Any]) -> None:
    """Refuses a folder whose raw set is of something else.

    Raises:
        DataError: It is.
    """
    if found == source:
        return
    ours, theirs = dict(source), dict(found) if isinstance(found, dict) else {}
    fingerprint = ours.pop("fingerprint", None), theirs.pop("fingerprint", None)
    if ours == theirs and None not in fingerprint:
        raise DataError(
            f"{source['location']} has changed since {output} was fetched from it",
            hint="choose an empty folder, or delete this one",
        )
    raise DataError(f"{output} already holds another set", hint="choose an empty folder, or delete this one")
