"""Contact sheets: rows as high as what they show, pictures above their own captions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from physformer_core.data.contact_sheet import Exhibit, draw_sheet, exhibits, sheet_size
from physformer_core.errors import OutputError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def exhibit(width: int, height: int, colour: tuple[int, int, int]) -> Exhibit:
    return Exhibit(Image.new("RGB", (width, height), colour), "a picture", "")


def rows_of(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((np.asarray(sheet) == colour).all(-1).any(1))


def test_wide_pictures_leave_no_empty_squares() -> None:
    square = draw_sheet([exhibit(160, 160, RED)] * 4, columns=2)
    assert square.size == sheet_size(4, columns=2)
    wide = draw_sheet([exhibit(160, 90, RED)] * 4, columns=2)
    assert wide.width == square.width and wide.height == square.height - 2 * (160 - 90)
    assert len(rows_of(wide, RED)) == 2 * 90, "nothing is cut off"


def test_a_picture_that_cannot_be_decoded_is_told(
    tmp_path: Path, raw_writer: Callable[..., Path], make_bitmap: Callable[..., dict[str, Any]]
) -> None:
    broken = make_bitmap(1)
    broken["image"] = broken["image"][:60] + bytes(len(broken["image"]) - 60)
    raw = raw_writer(tmp_path / "raw", [[make_bitmap(0), broken]])
    whole, other = exhibits(raw, 4)
    assert (
        whole.note == "bitmap-0"
        and other.note == "cannot be decoded: bitmap-1"
        and other.caption == whole.caption[:-1] + "1"
    )


def test_a_row_is_as_high_as_its_highest_picture() -> None:
    sheet = draw_sheet([exhibit(160, 90, RED), exhibit(90, 160, BLUE), exhibit(160, 40, RED)], columns=2)
    red, blue = rows_of(sheet, RED), rows_of(sheet, BLUE)
    assert len(red) == 90 + 40 and len(blue) == 160
    assert red[89] == blue[-1], "pictures of a row stand on one line"
    assert sheet.height < sheet_size(3, columns=2)[1]


def test_a_sheet_that_no_reader_takes_is_refused_beforehand() -> None:
    with pytest.raises(OutputError, match="too large"):
        sheet_size(10_000, columns=8)
