"""Contact sheets: pictures of a raw or a preprocessed set with their captions, to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from physformer_core.data.framing import UnusablePicture, open_bitmap
from physformer_core.data.latents import decode_picture
from physformer_core.data.loader import ShardSet
from physformer_core.data.scenes.render import render_svg
from physformer_core.data.set_folder import RAW_FORMAT, SHARDS_FORMAT
from physformer_core.errors import DataError, OutputError
from physformer_core.files import atomic_write

_GAP = 10
_FONT_SIZE = 12
_LINE_HEIGHT = 15
_CAPTION_LINES = 3
_TEXT_HEIGHT = (_CAPTION_LINES + 1) * _LINE_HEIGHT
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_RAW_COLUMNS = ["key", "svg", "image", "width", "height", "captions"]
_MAX_SIDE = 30_000  # PNG readers and Pillow itself balk at more


@dataclass(frozen=True)
class Exhibit:
    """One picture of a sheet.

    Args:
        picture: RGB.
        caption: What the set says it shows.
        note: Where it comes from, in a few words.
    """

    picture: Image.Image
    caption: str
    note: str


def exhibits(folder: str | Path, count: int, *, kind: str | None = None, size: int = 160) -> list[Exhibit]:
    """Examples spread evenly over a set.

    Args:
        folder: A raw or a preprocessed set.
        count: How many at most.
        kind: "base" or "crop" of a preprocessed set; None takes as many of either. Without effect on raw sets.
        size: Longer side of a picture in pixels. Drawings are rendered at it, small stored pictures enlarged by
            whole factors, so that their pixels can be seen.

    Raises:
        DataError: It is no set, it is damaged, or it has nothing of that kind.
    """
    folder = Path(folder)
    found = set_format(folder)
    if found == RAW_FORMAT:
        return list(_raw_exhibits(folder, count, size))
    shards = ShardSet(folder)
    kinds = [kind] if kind is not None else [name for name in ("base", "crop") if shards.count(name)]
    shown: list[Exhibit] = []
    for number, name in enumerate(kinds):
        shown += _shard_exhibits(shards, name, (count - len(shown)) // (len(kinds) - number), size)
    if not shown:
        raise DataError(f"{folder} has no {kind or 'training'} examples")
    return shown


def set_format(folder: Path) -> str:
    """The format of the set in a folder.

    Raises:
        DataError: It holds none that is known.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no data set: it has no manifest.json",
            hint="make one with physformer data fetch; an interrupted one goes on with the same command",
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in (RAW_FORMAT, SHARDS_FORMAT):
        raise DataError(f"{path} has the format {found!r}", hint=f"known ones: {RAW_FORMAT}, {SHARDS_FORMAT}")
    return str(found)


def sheet_size(count: int, *, columns: int, size: int = 160) -> tuple[int, int]:
    """The most (width, height) in pixels of a sheet of so many pictures, to be asked for before they are drawn.

    Rows are as high as their highest picture: of square ones all of it is needed.

    Raises:
        OutputError: It would be larger than PNG readers take.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = columns * (size + _GAP) + _GAP, rows * (size + _TEXT_HEIGHT + _GAP) + _GAP
    if max(width, height) > _MAX_SIDE:
        raise OutputError(
            f"a sheet of {width}x{height} pixels is too large", hint="fewer pictures, more columns or a smaller size"
        )
    return width, height


def draw_sheet(shown: Sequence[Exhibit], *, columns: int, size: int = 160) -> Image.Image:
    """Lays pictures out in rows, each with its caption and note below.

    Raises:
        OutputError: The sheet would be larger than PNG readers take.
    """
    width, _ = sheet_size(len(shown), columns=columns, size=size)
    columns = min(columns, len(shown))
    rows = [shown[first : first + columns] for first in range(0, len(shown), columns)]
    highest = [max(exhibit.picture.height for exhibit in row) for row in rows]
    sheet = Image.new("RGB", (width, sum(highest) + len(rows) * (_TEXT_HEIGHT + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    bottom = 0
    for row, height in zip(rows, highest, strict=True):
        bottom += _GAP + height  # of the row's pictures
        for column, exhibit in enumerate(row):
            left, picture = _GAP + column * (size + _GAP), exhibit.picture
            sheet.paste(picture, (left + (size - picture.width) // 2, bottom - picture.height))
            y = bottom + 3
            for line in _wrap(exhibit.caption, font, size, _CAPTION_LINES):
                draw.text((left, y), line, _INK, font)
                y += _LINE_HEIGHT
            draw.text((left, y), _wrap(exhibit.note, font, size, 1)[0], _FAINT, font)
        bottom += _TEXT_HEIGHT
    return sheet


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG file, whole or not at all."""
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _raw_exhibits(folder: Path, count: int, size: int) -> Iterator[Exhibit]:
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    starts = np.cumsum([0, *(entry["count"] for entry in files)])
    wanted = _spread(int(starts[-1]), count)
    for number, entry in enumerate(files):
        inside = wanted[(wanted >= starts[number]) & (wanted < starts[number + 1])] - starts[number]
        if not len(inside):
            continue
        try:
            table = pq.read_table(folder / entry["name"], columns=_RAW_COLUMNS)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(
                f"cannot read {folder / entry['name']}: {error}", hint="fetch the set again: what is there is kept"
            ) from error
        for row in table.take(inside).to_pylist():
            note = row["key"]
            if row["svg"] is None:
                try:
                    picture = open_bitmap(row["image"])
                except UnusablePicture as reason:
                    picture, note = Image.new("RGB", (size, size), _FAINT), f"{reason}: {note}"
                picture.thumbnail((size, size), Image.Resampling.LANCZOS)
            else:
                scale = size / max(row["width"], row["height"])
                sides = max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale))
                picture = Image.fromarray(render_svg(row["svg"], *sides))
            yield Exhibit(picture, (row["captions"] or [""])[0], note)


def _shard_exhibits(shards: ShardSet, kind: str, count: int, size: int) -> Iterator[Exhibit]:
    """Examples of one kind, of both splits as they come."""
    split = "train" if shards.count(kind, "train") else "validation"
    wanted = _spread(shards.count(kind, split), count)
    for group in shards.groups(kind, split):
        for row in wanted[(wanted >= group.first) & (wanted < group.first + group.count)] - group.first:
            pixels = decode_picture(shards.field, group.field(int(row)))
            enlarge = max(1, size // max(pixels.shape[:2]))
            picture = Image.fromarray(np.repeat(np.repeat(pixels, enlarge, 0), enlarge, 1))
            picture.thumbnail((size, size), Image.Resampling.LANCZOS)
            caption = shards.caption(int(group.caption_rows[group.caption_starts[row]]))
            height, width = group.size
            level = int(group.level[row])
            where = "whole picture" if kind == "base" else f"level {level}, at {_percent(group.place[row])}"
            yield Exhibit(picture, caption, f"{width}x{height} {where}")


def _percent(place: np.ndarray) -> str:
    y, x = ((float(place[0]) + float(place[2])) / 2, (float(place[1]) + float(place[3])) / 2)
    return f"{100 * x:.0f}%, {100 * y:.0f}%"


def _spread(total: int, count: int) -> np.ndarray:
    """Up to `count` row numbers from 0 to total - 1, evenly apart."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in lines that fit, the last one cut with an ellipsis if it must be; at least one line."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    shown = wrapped[:lines]
    if len(wrapped) > lines:
        shown[-1] += " ..."
    return [_cut(line, font, width) for line in shown]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")
    while line and font.getlength(line + " ...") > width:
        line = line[:-1]
    return line + " ..."
