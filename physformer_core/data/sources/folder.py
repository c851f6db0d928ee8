"""A folder of pictures with captions: same-named text files, a metadata file, or class sub-folders."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physformer_core.data.sources.base import PICTURE_SUFFIXES, Candidate, Origin, Part, Reader, cut
from physformer_core.data.sources.files import fingerprint, printable, read_file
from physformer_core.data.sources.rows import NO_CLASS_NUMBER, is_class_number, whole_number
from physformer_core.errors import ConfigError, DataError

CAPTION_STYLES = ("auto", "text", "metadata", "classes")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")

_FILE_COLUMNS = ("file_name", "file", "image", "path", "filename")
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")


def open_folder(
    location: str,
    *,
    captions: str = "auto",
    caption_column: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    license: str | None = None,
) -> FolderReader:
    """Opens a folder of pictures.

    Args:
        location: The folder. Hidden files and linked folders in it are passed over.
        captions: "text": a text file beside each picture, a caption a line; "metadata": `metadata.jsonl` or
            `metadata.csv` with a column `file_name`; "classes": each sub-folder is a class, and its name the caption;
            "auto": the first of metadata, text, classes that there is.
        caption_column: Columns of the metadata with captions; `text`, `caption`, `captions`, `prompt` or
            `description` by default.
        label_column: Column of the metadata with the class's number.
        limit: Look at so many pictures at most.
        license: Licence of the pictures, for the manifest.

    Raises:
        ConfigError: An option has no effect on this folder.
        DataError: There is no such folder, or it has no pictures or no captions.
    """
    root = Path(location)
    if not root.is_dir():
        raise DataError(
            f"{location} is not a folder" if root.exists() else f"there is no folder {location}",
            hint="give the folder that holds the pictures",
        )
    if captions not in CAPTION_STYLES:
        raise ConfigError(f"unknown style of captions {captions!r}", hint="one of " + ", ".join(CAPTION_STYLES))
    survey = _survey(root)
    style = _style(root, survey, captions)
    if style != "metadata" and (caption_column or label_column):
        raise ConfigError(
            "columns are for metadata files, and this folder's captions come from "
            + ("text files" if style == "text" else "the names of its sub-folders"),
            hint="leave --caption-column and --label-column out",
        )
    origin = Origin(
        name="folder",
        location=location,
        fingerprint=survey.digest,
        options={
            "captions": style,
            "caption_column": list(caption_column) or None,
            "label_column": label_column,
            "limit": limit,
        },
        license=license,
        classes=tuple(sorted(survey.classes)) if style == "classes" else (),
        ignored=survey.ignored,
    )
    if style == "metadata":
        return MetadataReader(origin, root, _metadata_file(root), tuple(caption_column), label_column, limit)
    return FolderReader(origin, root, survey.pictures, limit)


# What there is


@dataclass(frozen=True)
class _Survey:
    pictures: int
    captioned: int
    outside: int
    classes: Counter[str]
    ignored: dict[str, int]
    digest: str


def _walk(folder: Path, inside: str = "") -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder's path below the first and its files, in order of names; only one folder is held in memory."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda one: one.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}", hint="check the folder's rights") from error
    yield inside, [entry for entry in entries if entry.is_file()]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{inside}{entry.name}/")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _survey(root: Path) -> _Survey:
    pictures = captioned = outside = 0
    classes: Counter[str] = Counter()
    ignored: Counter[str] = Counter()

    def count(inside: str, entries: Sequence[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
        nonlocal pictures, captioned, outside
        texts = {entry.name[: -len(".txt")] for entry in entries if entry.name.endswith(".txt")}
        for entry in entries:
            name = entry.name
            stem, suffix = os.path.splitext(name)
            suffix = suffix[1:].lower()
            if suffix in PICTURE_SUFFIXES or suffix == "txt":  # what else lies there may change
                yield f"{inside}{name}", entry.stat().st_size
            if suffix in PICTURE_SUFFIXES:
                pictures += 1
                captioned += stem in texts
                if inside:
                    classes[printable(inside.split("/")[0])] += 1
                else:
                    outside += 1
            elif suffix != "txt" and (inside or name not in METADATA_FILES):
                ignored[printable(suffix) or "no suffix"] += 1

    files = itertools.chain.from_iterable(itertools.starmap(count, _walk(root)))
    metadata = (path.read_bytes() for name in METADATA_FILES if (path := root / name).is_file())
    digest = fingerprint(files, metadata)
    return _Survey(pictures, captioned, outside, classes, dict(ignored), digest)


def _style(root: Path, survey: _Survey, wanted: str) -> str:
    if not survey.pictures:
        raise DataError(f"{root} has no pictures", hint="pictures end in one of " + ", ".join(sorted(PICTURE_SUFFIXES)))
    has_metadata = any((root / name).is_file() for name in METADATA_FILES)
    possible = {
        "metadata": has_metadata,
        "text": survey.captioned > 0,
        "classes": bool(survey.classes) and not survey.outside,
    }
    if wanted == "auto":
        found = [style for style, there in possible.items() if there]
        if found:
            return found[0]
        raise DataError(
            f"{root} has {survey.pictures} pictures but no captions",
            hint="put a .txt file of the same name beside each, or a metadata.jsonl or metadata.csv with file_name and "
            "text, or the pictures into a sub-folder per class",
        )
    if wanted == "classes" and survey.classes:
        return wanted  # pictures outside of any class are refused one by one
    if not possible[wanted]:
        missing = {
            "metadata": "no " + " or ".join(METADATA_FILES),
            "text": "no picture with a .txt file of the same name",
            "classes": "no sub-folders with pictures",
        }
        raise DataError(f"{root} has {missing[wanted]}", hint="leave --captions out to take what there is")
    return wanted


# Text files and classes


@dataclass(frozen=True)
class _FolderPart(Part):
    root: Path
    files: tuple[str, ...]
    style: str
    classes: tuple[str, ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.files)

    def read(self) -> Iterator[Candidate]:
        for file in self.files:
            key = printable(file)
            path = os.path.join(self.root, file)
            try:
                image = read_file(path)
                captions: tuple[str | bytes, ...] = self._captions(path)
            except OSError as error:
                yield Candidate(key, key, None, problem="cannot be read", detail=error.strerror or str(error))
                continue
            label = None
            if self.style == "classes":
                name = key.split("/")[0] if "/" in key else None
                if name is None:
                    yield Candidate(key, key, None, problem="not in a class's folder")
                    continue
                label = self.classes.index(name)
                captions = (" ".join(name.replace("_", " ").replace("-", " ").split()),)
            yield Candidate(key, key, image, captions, label, _suffix(file))

    def _captions(self, picture: str) -> tuple[str | bytes, ...]:
        if self.style != "text":
            return ()
        try:
            content = read_file(f"{_stem(picture)}.txt")
        except FileNotFoundError:
            return ()
        return tuple(line for line in content.splitlines() if line.strip()) or (b"",)


class FolderReader(Reader):
    """Pictures with text files beside them, or in class sub-folders."""

    def __init__(self, origin: Origin, root: Path, pictures: int, limit: int | None) -> None:
        self.origin = origin
        self._root = root
        self._pictures = pictures
        self._limit = limit

    def count(self) -> int | None:
        return self._pictures if self._limit is None else min(self._pictures, self._limit)

    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        files = itertools.islice(self._files(), self._limit)
        style = self.origin.options["captions"]
        for part in itertools.islice(cut(files, lambda file: file[1]), first, None):
            yield _FolderPart(self._root, tuple(name for name, _ in part), style, self.origin.classes)

    def _files(self) -> Iterator[tuple[str, int]]:
        """(path below the root, bytes) of every picture."""
        for inside, entries in _walk(self._root):
            for entry in entries:
                if _suffix(entry.name) in PICTURE_SUFFIXES:
                    yield inside + entry.name, entry.stat().st_size


# Metadata files


def _metadata_file(root: Path) -> Path:
    found = [root / name for name in METADATA_FILES if (root / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{root} has both {' and '.join(METADATA_FILES)}", hint="move one of them away")
    return found[0]


@dataclass(frozen=True)
class _Row:
    """A picture that the metadata names, with all captions of successive rows of it."""

    line: int
    file: str | None
    captions: tuple[str | bytes, ...] = ()
    label: int | None = None
    problem: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class _MetadataPart(Part):
    root: Path
    metadata: str
    rows: tuple[_Row, ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.rows)

    def read(self) -> Iterator[Candidate]:
        for row in self.rows:
            where = f"{self.metadata}, line {row.line}"
            if row.file is None or row.problem is not None:
                key = f"{self.metadata}:{row.line}"
                yield Candidate(key, where, None, problem=row.problem, detail=row.detail)
                continue
            key = printable(row.file)
            try:
                image = read_file(os.path.join(self.root, row.file))
            except FileNotFoundError:
                yield Candidate(key, where, None, problem="no such file", detail=key)
                continue
            except OSError as error:
                yield Candidate(key, where, None, problem="cannot be read", detail=error.strerror or str(error))
                continue
            yield Candidate(key, key, image, row.captions, row.label, _suffix(row.file))


class MetadataReader(FolderReader):
    """Pictures that a `metadata.jsonl` or `metadata.csv` names.

    Successive rows of one picture are its captions. A picture that comes again later is refused there: it could land
    on both sides of the split into training and validation.
    """

    def __init__(
        self,
        origin: Origin,
        root: Path,
        metadata: Path,
        caption_columns: tuple[str, ...],
        label_column: str | None,
        limit: int | None,
    ) -> None:
        super().__init__(origin, root, 0, limit)
        self._metadata = metadata
        self._caption_columns = caption_columns
        self._label_column = label_column
        self._pictures = sum(1 for _ in self._rows())

    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        rows = itertools.islice(self._rows(), self._limit)
        for part in itertools.islice(cut(rows, self._size), first, None):
            yield _MetadataPart(self._root, self._metadata.name, tuple(part))

    def _size(self, row: _Row) -> int:
        path = self._root / row.file if row.file is not None and row.problem is None else None
        try:
            return path.stat().st_size if path is not None and path.is_file() else 0
        except OSError:  # its name is longer than a file's can be: told when it is read
            return 0

    def _rows(self) -> Iterator[_Row]:
        seen: set[int] = set()  # 64 bits of a hash each: a fraction of what the names would take
        tables = self._json_rows() if self._metadata.suffix == ".jsonl" else self._csv_rows()
        whole = (self._row(line, table) for line, table in tables)
        for file, rows in itertools.groupby(whole, key=lambda row: row.file if row.problem is None else row):
            group = list(rows)
            if not isinstance(file, str):
                yield from group
                continue
            digest = hash_of(os.fsencode(os.path.normpath(file)))
            if digest in seen:
                yield _Row(group[0].line, None, problem="named again", detail=printable(file))
                continue
            seen.add(digest)
            captions = tuple(caption for row in group for caption in row.captions)
            yield _Row(group[0].line, file, captions, group[0].label)

    def _row(self, line: int, table: dict[str, Any] | str) -> _Row:
        if isinstance(table, str):
            return _Row(line, None, problem="metadata row cannot be read", detail=table)
        file = next((table[name] for name in _FILE_COLUMNS if table.get(name)), None)
        if not isinstance(file, str):
            return _Row(line, None, problem="metadata row names no file")
        if os.path.isabs(file) or ".." in Path(file).parts or "\0" in file or not _can_be_named(file):
            return _Row(line, None, problem="file outside of the folder", detail=file)
        columns = self._caption_columns or next(((name,) for name in _CAPTION_COLUMNS if name in table), ())
        captions: list[str | bytes] = []
        for column in columns:
            value = table.get(column)
            captions += [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
        label = None
        if self._label_column is not None:
            label = whole_number(table.get(self._label_column))
            if label == -1:  # not known
                label = None
            elif not is_class_number(label):
                return _Row(line, None, problem=NO_CLASS_NUMBER, detail=str(label)[:100])
        return _Row(line, file, tuple(captions), label)

    def _json_rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        with open(self._metadata, "rb") as stream:
            for line, content in enumerate(stream, start=1):
                if not content.strip():
                    continue
                try:
                    table = json.loads(content.decode("utf-8-sig"))
                except ValueError as error:
                    yield line, str(error)
                    continue
                yield line, table if isinstance(table, dict) else "not a JSON object"

    def _csv_rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        # Bytes that are not UTF-8 survive as lone surrogates, and the verification of captions finds them.
        with open(self._metadata, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if not set(columns) & set(_FILE_COLUMNS):
                raise DataError(
                    f"{self._metadata} has no column file_name",
                    hint=f"its first line must name the columns; it says {', '.join(columns)[:100]!r}",
                )
            try:
                for table in reader:
                    yield reader.line_num, table
            except csv.Error as error:
                raise DataError(f"{self._metadata}, line {reader.line_num}: {error}", hint="correct it") from error


def _can_be_named(file: str) -> bool:
    """Whether a file can be called so: JSON may hold half a character."""
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return False
    return True


def hash_of(name: bytes) -> int:
    """64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
