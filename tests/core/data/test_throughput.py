"""The measurements run on tiny sets and say what they should; figures themselves are never asserted."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from physformer_core.data.throughput import measure_memory, measure_rates, photograph
from physformer_core.errors import ConfigError


def test_rates_are_of_all_stages() -> None:
    told: list[tuple[int, int]] = []
    rates = measure_rates(128, 130, progress=lambda done, total: told.append((done, total)))
    assert (rates.side, rates.count) == (128, 130)
    assert all(getattr(rates, name) > 0 for name in ("limit", "fetched", "preprocessed", "captions", "examples"))
    assert 0 < rates.fetched_share < 100 and 0 < rates.preprocessed_share < 100
    assert told[-1] == (780, 780) and told == sorted(told)
    with pytest.raises(ConfigError, match="no measure"):
        measure_rates(32, 130)


@pytest.mark.slow
def test_memory_is_of_each_stage() -> None:
    (measured,) = measure_memory([40])
    assert measured.count == 40 and set(measured.peak) == {"fetch", "scan", "pictures"}
    assert all(peak > 20 << 20 for peak in measured.peak.values())


def test_photographs_differ() -> None:
    first, second = photograph(1, 96), photograph(2, 96)
    assert first != second and first == photograph(1, 96)
    assert Image.open(io.BytesIO(first)).size == (96, 96)
