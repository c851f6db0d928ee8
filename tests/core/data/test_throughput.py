"""The measurements run on tiny sets and say what they should; figures themselves are never asserted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from physformer_core.data.examples import make_examples
from physformer_core.data.loader import ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.throughput import (
    Scenes,
    measure_memory,
    measure_rates,
    photograph,
    photographs,
    pictures_of,
    stored_crops,
)
from physformer_core.errors import ConfigError


def test_rates_are_of_all_stages() -> None:
    told: list[tuple[int, int]] = []
    rates = measure_rates(photographs(128, 130), progress=lambda done, total: told.append((done, total)))
    assert (rates.pictures, rates.count) == ("pictures of 128 pixels", 130)
    assert all(getattr(rates, name) > 0 for name in ("limit", "fetched", "preprocessed", "captions", "examples"))
    # Shares are of limits that are measured at different moments: which is larger is up to what else the machine does.
    assert all(0 < getattr(rates, name) < 100 for name in ("fetched_share", "level0_share", "preprocessed_share"))
    assert told[-1] == (1040, 1040) and told == sorted(told)


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


def test_the_limit_has_the_crops_that_were_stored(tmp_path: Path) -> None:
    """Of every picture what preprocessing stored of it, where and at the level that it did."""
    pictures = photographs(128, 130)
    pictures.lay_out(tmp_path / "pictures", 130)
    pictures.fetch(tmp_path / "pictures", tmp_path / "raw", 130)
    config = PreprocessConfig(validation_fraction=0, crops_per_example=1.5, crop_size=48)
    preprocess(tmp_path / "raw", tmp_path / "set", config=config)
    crops = stored_crops(ShardSet(tmp_path / "set"))
    assert set(crops) == set(range(130)) and {len(found) for found in crops.values()} == {1, 2}
    for number in (0, 77):
        rows = pq.read_table(next((tmp_path / "raw").glob("*.parquet"))).to_pylist()
        row = next(row for row in rows if f"{number:06d}" in row["key"])
        made = [example for example in make_examples(row, config).examples if example.kind == "crop"]
        told = sorted((crop.size, crop.level, crop.place) for crop in crops[number])
        expected = sorted((e.pixels.shape[:2], e.columns["level"], e.columns["place"]) for e in made)
        assert [one[:2] for one in told] == [one[:2] for one in expected]
        assert np.allclose([one[2] for one in told], [one[2] for one in expected])


def test_photographs_differ() -> None:
    first, second = photograph(1, 96), photograph(2, 96)
    assert first != second and first == photograph(1, 96)
    assert Image.open(io.BytesIO(first)).size == (96, 96)
