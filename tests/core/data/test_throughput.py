"""The measurements run on tiny sets and say what they should; figures themselves are never asserted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from physformer_core.data.throughput import Scenes, measure_memory, measure_rates, photograph, photographs, pictures_of
from physformer_core.errors import ConfigError


def test_rates_are_of_all_stages() -> None:
    told: list[tuple[int, int]] = []
    rates = measure_rates(photographs(128, 130), progress=lambda done, total: told.append((done, total)))
    assert (rates.pictures, rates.count) == ("pictures of 128 pixels", 130)
    assert all(getattr(rates, name) > 0 for name in ("limit", "fetched", "preprocessed", "captions", "examples"))
    assert 0 < rates.fetched_share < 100 and 0 < rates.preprocessed_share < 100
    assert told[-1] == (780, 780) and told == sorted(told)


def test_what_is_measured(tmp_path: Path) -> None:
    rates = measure_rates(Scenes(16))
    assert (rates.pictures, rates.count) == ("scenes", 16) and rates.fetched > 0 and rates.preprocessed > 0
    with pytest.raises(ConfigError, match="too small"):
        photographs(16, 130)
    (tmp_path / "inside").mkdir()
    for number in range(130):
        (tmp_path / "inside" / f"{number}.JPG").write_bytes(photograph(number % 3, 64))
        (tmp_path / f"{number}.txt").write_text("not a picture")
    assert pictures_of(tmp_path, 128).count == 128
    with pytest.raises(ConfigError, match="0 pictures are no measure"):
        pictures_of(tmp_path / "nowhere", 128)


@pytest.mark.slow
def test_memory_is_of_each_stage() -> None:
    (measured,) = measure_memory([40])
    assert measured.count == 40 and set(measured.peak) == {"fetch", "scan", "pictures"}
    assert all(peak > 20 << 20 for peak in measured.peak.values())


def test_photographs_differ() -> None:
    first, second = photograph(1, 96), photograph(2, 96)
    assert first != second and first == photograph(1, 96)
    assert Image.open(io.BytesIO(first)).size == (96, 96)
