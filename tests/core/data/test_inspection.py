"""What an inspection finds is what was put there."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from physformer_core.data.inspection import inspect_raw_set, near_groups, write_page
from physformer_core.errors import DataError

Make = Callable[..., dict[str, Any]]


def test_inspection(
    tmp_path: Path, raw_writer: Callable[..., Path], make_bitmap: Make, make_drawing: Make, make_row: Make
) -> None:
    twin = make_bitmap(3)
    stream = io.BytesIO()
    smaller = Image.open(io.BytesIO(twin["image"])).resize((150, 130), Image.Resampling.LANCZOS)
    smaller.save(stream, "JPEG", quality=80)
    twin |= {"key": "twin", "image": stream.getvalue(), "captions": ["noise  number 3", "another <caption>"]}
    broken = make_row("broken", image=b"nothing", captions=[])
    wide = make_drawing(1, 1200, 500) | {"class_label": 1}
    raw = raw_writer(tmp_path / "raw", [[make_bitmap(i) for i in range(5)], [twin, broken, wide]])
    found = inspect_raw_set(raw)
    assert found == inspect_raw_set(raw, workers=2)
    assert (found.count, found.undecodable, found.without_caption) == (8, 1, 1)
    assert found.near_duplicates == [["bitmap-3", "twin"]] and found.near_duplicates_count == 1
    assert found.repeated_captions == [("noise number 3", 2)] and found.captions == 5 + 2 + 3
    assert found.classes == {"1": 1} and found.words[0] == 2
    assert {name: count for name, count, _ in found.buckets} == {"40x32": 6, "32x32": 1, "72x32": 1}
    assert found.sides[0] == 64 and 0 < found.cut_area < 0.2
    square = inspect_raw_set(raw, buckets=((48, 48),), workers=2)
    assert [(name, count) for name, count, _ in square.buckets] == [("48x48", 8)] and square.cut_area > found.cut_area
    write_page(found, tmp_path / "index.html", sheet="sheet.png")
    page = (tmp_path / "index.html").read_text()
    assert "bitmap-3, twin" in page and "<caption>" not in page and 'src="sheet.png"' in page


def test_near_groups_are_those_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 60, np.uint64)
    for index in range(30, 60):  # some a few bits beside others
        for bit in rng.integers(0, 64, index % 6):
            hashes[index] = hashes[index - 30] ^ np.uint64(1 << int(bit))
    linked = {(a, b) for a in range(60) for b in range(a) if int(np.bitwise_count(hashes[a] ^ hashes[b])) <= 3}
    groups = near_groups(hashes)
    of = {member: number for number, group in enumerate(groups) for member in group}
    assert linked and all(of[a] == of[b] for a, b in linked)
    for group in groups:
        assert all(any((max(a, b), min(a, b)) in linked for b in group if b != a) for a in group)


def test_what_is_no_raw_set(
    tmp_path: Path, shard_folder: Path, raw_writer: Callable[..., Path], make_bitmap: Make
) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        inspect_raw_set(tmp_path)
    with pytest.raises(DataError, match="not a raw data set"):
        inspect_raw_set(shard_folder)
    raw = raw_writer(tmp_path / "raw", [[make_bitmap(1)]])
    (raw / "examples-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot read"):
        inspect_raw_set(raw)
