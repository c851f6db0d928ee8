"""WebDataset tars: successive files of one name and different endings are an example."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physformer_core.data.sources.base import PICTURE_SUFFIXES, Candidate, Origin, Part, Reader, cut
from physformer_core.data.sources.files import FileList, find_files, printable
from physformer_core.data.sources.rows import CAPTION_NAMES, field, is_class_number, no_class_number, whole_number
from physformer_core.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_CUT_SHORT = "archive damaged or cut short"


def open_webdataset(
    location: str,
    *,
    image_column: str | None = None,
    caption_column: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    license: str | None = None,
) -> WebDatasetReader:
    """Opens WebDataset tars.

    Args:
        location: A tar, a folder of tars, or a pattern: `shards/*.tar`, `shards/{000..045}.tar`.
        image_column: Ending of the picture; the first that is a picture's by default.
        caption_column: Endings of captions; `json.prompt` goes into a JSON file. By default the first there is of
            txt, caption, text and the like, or one of these in json.
        label_column: Ending of the class's number; `cls` by default.
        limit: Look at so many examples at most.
        license: Licence of the pictures, for the manifest.

    Raises:
        DataError: There are no such files.
    """
    files = FileList(find_files(location, SUFFIXES, what="tars"))
    origin = Origin(
        name="webdataset",
        location=location,
        fingerprint=files.fingerprint,
        options={
            "image_column": image_column,
            "caption_column": list(caption_column) or None,
            "label_column": label_column,
            "limit": limit,
        },
        license=license,
    )
    return WebDatasetReader(origin, files, _Fields(image_column, tuple(caption_column), label_column), limit)


@dataclass(frozen=True)
class _Fields:
    """Endings that hold what, as the user has named them."""

    image: str | None
    captions: tuple[str, ...]
    label: str | None

    def candidate(self, members: dict[str, bytes], key: str, path: str) -> Candidate:
        endings = [self.image] if self.image else [ending for ending in members if ending in PICTURE_SUFFIXES]
        image = next((members[ending] for ending in endings if ending in members), None)
        usual = [*CAPTION_NAMES, *(f"json.{name}" for name in CAPTION_NAMES)]
        # The first of the usual names that this example has: a caption often stands in .txt and in .json.
        columns = self.captions or [name for name in usual if field(members, name) is not None][:1]
        captions: list[str | bytes] = []
        for column in columns:
            value = field(members, column)
            values = value if isinstance(value, list) else [value]
            captions += [one if isinstance(one, bytes) else str(one) for one in values if one is not None]
        said = whole_number(field(members, self.label or "cls"))
        return Candidate(
            key,
            path,
            image,
            tuple(captions),
            said if is_class_number(said) else None,
            endings[0] if image else "",
            **no_class_number(said if self.label else None),
        )


@dataclass(frozen=True)
class _Place:
    """Where an example lies in its tar."""

    key: str
    offset: int
    size: int
    repeated: bool = False
    damage: str = ""


@dataclass(frozen=True)
class _TarPart(Part):
    file: Path
    name: str
    places: tuple[_Place, ...]
    fields: _Fields
    position: dict[str, Any] | None = None

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.places)

    def read(self) -> Iterator[Candidate]:
        members = _examples(self.file, self.places[0].offset)
        for place in self.places:
            key, path = f"{self.name}/{printable(place.key)}", f"{self.name}: {printable(place.key)}"
            if place.damage:
                yield Candidate(key, path, None, problem=_CUT_SHORT, detail=place.damage)
                return
            found = next(members, None)
            if found is None or found[0] != place.key:
                raise DataError(f"{self.file} has changed while it was read", hint="fetch again")
            if place.repeated:
                key = f"{key}@{place.offset}"
                yield Candidate(key, path, None, problem="key occurs twice in its tar")
                continue
            yield self.fields.candidate(found[1], key, path)


class WebDatasetReader(Reader):
    """Tars, one after the other; each is read once for its table of contents, and its pictures by the workers."""

    def __init__(self, origin: Origin, files: FileList, fields: _Fields, limit: int | None) -> None:
        self.origin = origin
        self._files = files
        self._fields = fields
        self._limit = limit

    def count(self) -> int | None:
        return None

    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        # Where a tar begins in the numbering of parts only its predecessors tell, so a position names the next place.
        start = position or {"file": 0, "example": 0, "seen": 0}
        seen = start["seen"]
        for number in range(start["file"], len(self._files.files)):
            file = self._files.files[number]
            places = _contents(file)
            skip = start["example"] if number == start["file"] else 0
            parts = list(cut(places, lambda place: place.size))
            example = 0
            for index, part in enumerate(parts):
                example += len(part)
                if example <= skip:
                    continue
                if self._limit is not None:
                    part = part[: self._limit - seen]
                if not part:
                    return
                seen += len(part)
                last = index == len(parts) - 1
                following = {"file": number + last, "example": 0 if last else example, "seen": seen}
                yield _TarPart(file, self._files.name(file), tuple(part), self._fields, following)


def _split_name(name: str) -> tuple[str, str] | None:
    """(key, ending): the name is cut at the first dot after its folder. None for what belongs to no example."""
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def _open(file: Path, offset: int) -> tarfile.TarFile:
    """Opens a tar at a member. A compressed one is read from its beginning."""
    if file.suffix != ".tar":
        return tarfile.open(file, "r:*", errors="surrogateescape")
    # Both are closed with the archive that is returned.
    stream = open(file, "rb")  # noqa: SIM115
    stream.seek(offset)
    try:
        archive = tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape")  # noqa: SIM115
    except BaseException:
        stream.close()
        raise
    archive._extfileobj = False  # type: ignore[attr-defined]
    return archive


def _contents(file: Path) -> list[_Place]:
    """All examples of a tar in order, with what is wrong with it at the end."""
    places: list[_Place] = []
    keys: set[str] = set()
    try:
        with _open(file, 0) as archive:
            for member in archive:
                parts = _split_name(member.name) if member.isfile() else None
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every member for ever
                if parts is None:
                    continue
                if places and places[-1].key == parts[0]:
                    last = places[-1]
                    places[-1] = _Place(last.key, last.offset, last.size + member.size, last.repeated)
                    continue
                places.append(_Place(parts[0], member.offset, member.size, parts[0] in keys))
                keys.add(parts[0])
            end = archive.offset  # type: ignore[attr-defined]
            whole = _ends_at(archive, end)
        if not whole:
            places.append(_Place(f"(from byte {end} on)", end, 0, damage="what follows is no header"))
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and not places and not isinstance(error, tarfile.TarError):
            raise DataError(f"cannot read {file}: {error.strerror or error}", hint="check the file") from error
        # The example that the damage cuts is lost, and with it what follows.
        broken = places.pop() if places else _Place("(beginning)", 0, 0)
        places.append(_Place(broken.key, broken.offset, 0, damage=str(error)))
    return places


def _ends_at(archive: tarfile.TarFile, offset: int) -> bool:
    """Whether a tar ends there as it should: `tarfile` takes a damaged header for the end."""
    stream = archive.fileobj
    assert stream is not None
    stream.seek(offset)
    return not stream.read(tarfile.BLOCKSIZE).strip(b"\0")


def _examples(file: Path, offset: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, content by ending) of the examples of a tar from a member on."""
    with _open(file, offset) as archive:
        begun: tuple[str, dict[str, bytes]] | None = None
        for member in archive:
            parts = _split_name(member.name) if member.isfile() else None
            archive.members = []  # type: ignore[attr-defined]
            if parts is None or (file.suffix != ".tar" and member.offset < offset):
                continue
            key, ending = parts
            if begun is not None and begun[0] != key:
                yield begun
                begun = None
            if begun is None:
                begun = (key, {})
            content = archive.extractfile(member)
            assert content is not None
            begun[1].setdefault(ending, content.read())
        if begun is not None:
            yield begun
