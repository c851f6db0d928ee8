"""Which files a location means (a file, a folder of them, or a pattern), what they are called, and what tells them from
others."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from physformer_core.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMOTE = re.compile(r"(?:[a-z][a-z0-9+.-]*://|pipe:|hf:)", re.IGNORECASE)


class FileList:
    """Files that are read one after the other.

    Args:
        files: At least one.

    Attributes:
        files: In order.
        fingerprint: Of their names and sizes.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.fingerprint = fingerprint((file.name, file.stat().st_size) for file in files)
        self._root = os.path.commonpath([str(file.parent) for file in files])

    def name(self, file: Path) -> str:
        """What examples of a file are named after: its path below the folder that holds all of them."""
        return printable(file.relative_to(self._root).as_posix())


def fingerprint(files: Iterable[tuple[str, int]], contents: Iterable[bytes] = ()) -> str:
    """Hash of the names and sizes of files, and of the contents of some, by which a change is noticed."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(os.fsencode(f"{name}\0{size}\0"))
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def read_file(path: str) -> bytes:
    """A small file's content, without the buffer that it would not fill.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb", buffering=0) as stream:
        return stream.read()


def printable(name: str) -> str:
    """A file's name as UTF-8 text, whatever bytes it has on the disk."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_files(location: str, suffixes: tuple[str, ...], *, what: str) -> list[Path]:
    """The files that a location means, in the order of their names, each once.

    Args:
        location: A file; a folder, all of whose files with such a suffix are meant; or a pattern with `*`, `?`,
            `[...]`, `**`, `{a,b}` or `{000..045}`.
        suffixes: Endings of the files, as `(".tar",)`.
        what: What they are called in messages.

    Raises:
        DataError: There are none, or one that is named is missing.
    """
    if _REMOTE.match(location):
        raise DataError(
            f"{location} is not on this machine",
            hint="mount the bucket as a folder, or take the source huggingface for what lies on the Hub",
        )
    if Path(location).is_dir():
        found = [path for path in Path(location).rglob("*") if path.name.endswith(suffixes) and path.is_file()]
        if not found:
            raise DataError(f"{location} has no {what}", hint=f"their names end in {' or '.join(suffixes)}")
        return sorted(found)
    files: dict[Path, None] = {}
    for pattern in _expand(location):
        if Path(pattern).is_file():
            files[Path(pattern)] = None
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"there is no file {pattern}", hint=f"give {what}: a file, a folder or a pattern")
        files.update((Path(match), None) for match in matches if os.path.isfile(match))
    if not files:
        raise DataError(f"{location} has no {what}", hint="it matches folders only")
    return list(files)


def _expand(pattern: str) -> list[str]:
    """Braces written out: `{a,b}` and `{000..045}`, as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None or os.path.exists(pattern):
        return [pattern]
    numbers = _RANGE.fullmatch(braces[1])
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    else:
        choices = braces[1].split(",")
    if len(choices) < 2 and numbers is None:
        return [pattern]
    return [one for choice in choices for one in _expand(pattern[: braces.start()] + choice + pattern[braces.end() :])]
