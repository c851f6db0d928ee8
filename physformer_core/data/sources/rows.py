"""Rows of a table -> examples: which columns hold the picture, the captions and the class."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from physformer_core.data.sources.base import PICTURE_SUFFIXES, Candidate
from physformer_core.errors import ConfigError

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt", "description", "sentence")
LABEL_NAMES = ("label", "class_label", "cls")
NO_CLASS_NUMBER = "no class number"
_NESTED = ("json", "metadata", "meta")


@dataclass(frozen=True)
class Columns:
    """Where a row has what. A dot goes into a JSON or struct column: `json.prompt`.

    Args:
        image: The encoded picture: bytes, or a struct with `bytes`.
        captions: Text, or lists of text.
        label: The class's number, if there is one.
        label_named: Whether the user named it: then what is there must be a number.
    """

    image: str
    captions: tuple[str, ...]
    label: str | None = None
    label_named: bool = False

    def candidate(self, row: Mapping[str, Any], key: str, path: str) -> Candidate:
        """The example in a row."""
        image, suffix = _picture(field(row, self.image), self.image)
        captions: list[str | bytes] = []
        for column in self.captions:
            value = field(row, column)
            captions += [_text(one) for one in (value if isinstance(value, list | tuple) else [value])]
        said = field(row, self.label) if self.label is not None else None
        label = said if is_class_number(said) else None
        told = no_class_number(said if self.label_named else None)
        return Candidate(key, path, image, tuple(captions), label, suffix, **told)


def choose_columns(
    row: Mapping[str, Any], *, image: str | None, captions: Sequence[str], label: str | None, where: str
) -> Columns:
    """The columns to read: those given, or those that are usually called so.

    Args:
        row: The first row.
        image, captions, label: Columns that the user has named.
        where: What the table is called in messages.

    Raises:
        ConfigError: A named column is not there, or none is called anything known.
    """
    names = [*row, *(f"{name}.{inner}" for name in _NESTED for inner in _inside(row.get(name)))]
    for option, column in (("--image-column", image), *(("--caption-column", one) for one in captions)):
        if column is not None and not _has(row, column):
            raise ConfigError(f"{where} has no column {column!r}", hint=f"{option}: one of {', '.join(names)}")
    if label is not None and not _has(row, label):
        raise ConfigError(f"{where} has no column {label!r}", hint=f"--label-column: one of {', '.join(names)}")
    named = label is not None
    if image is None:
        image = next((name for name in IMAGE_NAMES if name in row), None)
    if image is None:
        raise ConfigError(
            f"{where} has no column that is called like a picture", hint=f"--image-column: one of {', '.join(names)}"
        )
    if label is None:
        label = next((name for name in LABEL_NAMES if isinstance(row.get(name), int)), None)
    if not captions:
        usual = [*CAPTION_NAMES, *(f"{outer}.{name}" for outer in _NESTED for name in CAPTION_NAMES)]
        captions = [next((name for name in usual if _has(row, name)), "")]
        if not captions[0]:
            if label is None:
                raise ConfigError(
                    f"{where} has no column that is called like a caption",
                    hint=f"--caption-column: one of {', '.join(names)}",
                )
            captions = ()
    return Columns(image, tuple(captions), label, named)


def whole_number(said: Any) -> Any:
    """The number, if text says a whole one; else what was said."""
    if isinstance(said, str | bytes):
        try:
            return int(said)
        except ValueError:
            return said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    return said


def is_class_number(value: Any) -> bool:
    """Whether it is a class's number that a set can store."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def no_class_number(said: Any) -> dict[str, str]:
    """What is wrong with what a column says that the user named as that of class numbers; -1 and nothing: not known."""
    if said is None or said == -1 or is_class_number(said):
        return {}
    return {"problem": NO_CLASS_NUMBER, "detail": str(said)[:100]}


def field(row: Mapping[str, Any], column: str) -> Any:
    """A column's value; None where there is none."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    nested = row.get(outer)
    if not inner or nested is None:
        return None
    table = _table(nested)
    return field(table, inner) if table is not None else None


def _has(row: Mapping[str, Any], column: str) -> bool:
    outer, _, inner = column.partition(".")
    return column in row or (bool(inner) and inner in _inside(row.get(outer)))


def _inside(value: Any) -> Iterable[str]:
    return _table(value) or ()


def _table(value: Any) -> Mapping[str, Any] | None:
    """A struct, or JSON that holds an object."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


def _picture(value: Any, column: str) -> tuple[bytes | None, str]:
    """A picture's bytes, and what its name says it is."""
    name = ""
    if isinstance(value, Mapping):
        name, value = value.get("path") or "", value.get("bytes")
    suffix = os.path.splitext(name)[1][1:].lower()
    if not suffix and column.lower() in PICTURE_SUFFIXES:
        suffix = column.lower()
    return (bytes(value) if isinstance(value, bytes | bytearray | memoryview) else None), suffix


def _text(value: Any) -> str | bytes:
    if value is None:
        return ""
    return value if isinstance(value, str | bytes) else str(value)
