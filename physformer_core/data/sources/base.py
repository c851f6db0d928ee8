"""What every source of existing pictures gives: examples in a fixed order, cut into parts.

A part is what one worker process reads, verifies and writes at a time, and what an interrupted run keeps or does
again. Where parts begin and end follows from the data alone, so the result depends neither on the number of workers
nor on interruptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

# A part ends with the example that reaches one of these. They bound the memory of a run: a worker holds a few dozen
# megabytes of its part at a time, and of a stream as many parts are in flight as there are workers, and two.
PART_EXAMPLES = 1000
PART_BYTES = 64 << 20

PICTURE_SUFFIXES = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "apng",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "avifs",
        "jp2",
        "ppm",
        "pgm",
        "pnm",
        "mpo",
    ]
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Candidate:
    """An example as its source has it, not verified yet.

    Args:
        key: Name that no other example of the source has.
        path: Where it came from, for people: a file, or a file and a row.
        image: The encoded picture; None if there is none.
        captions: What it shows, as text or as bytes that should be UTF-8.
        class_label: Number of its class.
        suffix: What its name says it is, in lower case without a dot; empty if nothing.
        problem: Why the source itself refuses it.
        detail: More about that problem.
    """

    key: str
    path: str
    image: bytes | None
    captions: tuple[str | bytes, ...] = ()
    class_label: int | None = None
    suffix: str = ""
    problem: str | None = None
    detail: str = ""


class Part(ABC):
    """A stretch of examples, to be read in any process (so it can be pickled).

    Attributes:
        count: How many examples it has.
        position: Where the next part begins, as JSON, for sources that cannot jump there by number.
    """

    count: int
    position: dict[str, Any] | None = None

    @abstractmethod
    def read(self) -> Iterator[Candidate]:
        """Its examples, one at a time."""


@dataclass(frozen=True)
class StreamedPart(Part):
    """A part that has been read already, because only one process can read its source."""

    candidates: tuple[Candidate, ...]
    position: dict[str, Any] | None = None

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.candidates)

    def read(self) -> Iterator[Candidate]:
        return iter(self.candidates)


@dataclass(frozen=True)
class Origin:
    """What a manifest says about where a set comes from.

    Args:
        name: Name of the source.
        location: Folder, files or data set, as the user wrote it.
        fingerprint: Hash of what it holds (names and sizes, or a revision), to notice that it has changed.
        options: Options that have a say in the result.
        license: Licence of the pictures, if known.
        attribution: Whom to name, if known.
        classes: Names of the class labels 0, 1, ...
        ignored: How many files of which suffix were passed over because they are no pictures.
    """

    name: str
    location: str
    fingerprint: str
    options: Mapping[str, Any]
    license: str | None = None
    attribution: str | None = None
    classes: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What tells this source, in this state, with these options from any other."""
        return {
            "name": self.name,
            "location": self.location,
            "fingerprint": self.fingerprint,
            "options": {key: value for key, value in sorted(self.options.items()) if value is not None},
        }


class Reader(ABC):
    """A source that has been opened.

    Attributes:
        origin: What the manifest says about it.
    """

    origin: Origin

    @abstractmethod
    def count(self) -> int | None:
        """How many examples there are to look at; None if only reading them all would tell."""

    @abstractmethod
    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        """Its parts in order, from number `first` on.

        Args:
            first: How many parts to pass over.
            position: What the part before that one said about where the next begins.

        Raises:
            DataError: The source cannot be read.
        """


def cut(
    items: Iterable[Item], size: Callable[[Item], int], *, most: int | None = None, enough: int | None = None
) -> Iterator[list[Item]]:
    """Cuts a series into parts of so many items at most, each ending where so many bytes are reached.

    Args:
        items: In order.
        size: Bytes that an item will take.
        most: Items of a part; `PART_EXAMPLES` if not given.
        enough: Bytes of a part; `PART_BYTES` if not given.
    """
    most = PART_EXAMPLES if most is None else most
    enough = PART_BYTES if enough is None else enough
    part: list[Item] = []
    filled = 0
    for item in items:
        part.append(item)
        filled += size(item)
        if len(part) >= most or filled >= enough:
            yield part
            part, filled = [], 0
    if part:
        yield part
