"""Averages over areas: beside fractions written out, the same bytes with and without a kernel in C."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from physformer_core.data import averages
from physformer_core.data.averages import WHOLE, Pixels, area_average, intervals


def picture(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def shares(start: Fraction, step: Fraction, index: int, limit: int) -> dict[int, Fraction]:
    """What an interval covers of each pixel, of its own length."""
    low, high = start + index * step, min(start + (index + 1) * step, Fraction(limit))
    covered = {k: min(k + 1, high) - max(k, low) for k in range(math.floor(low), math.ceil(high))}
    return {k: share / (high - low) for k, share in covered.items() if share > 0}


@pytest.mark.parametrize(("step", "start"), [("1.3", "0"), ("2.5", "1.25"), ("9.375", "0.5"), ("1", "0.5"), ("3", "2")])
def test_it_is_the_average_over_the_area(step: str, start: str) -> None:
    count, channels = 4, 3
    length, first = Fraction(step), Fraction(start)
    side = math.ceil(first + count * length)
    source = picture(side, side, channels)
    along = intervals(float(first), float(length), count, side)
    found = area_average(Pixels.of_array(source), along, along)
    for y in range(count):
        for x in range(count):
            down, across = shares(first, length, y, side), shares(first, length, x, side)
            for channel in range(channels):
                wanted = sum(a * b * int(source[k, m, channel]) for k, a in down.items() for m, b in across.items())
                assert abs(float(wanted) - int(found[y, x, channel])) < 0.5 + 0.1


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), stored=st.sampled_from([(1, 1), (3, 3), (4, 3)]),
    rows=st.integers(1, 12), columns=st.integers(1, 12), slack=st.floats(0, 1), at=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_gives_the_same_bytes_as_numpy(
    height: int, width: int, stored: tuple[int, int], rows: int, columns: int, slack: float, at: float, seed: int
) -> None:
    rows, columns = min(rows, height), min(columns, width)
    both = []
    for count, limit in ((rows, height), (columns, width)):
        step = 1 + slack * (limit / count - 1)
        both.append(intervals(at * (limit - step * count), step, count, limit))
    source = Pixels.of_array(picture(height, width, stored[0], seed), stored[1])
    slow = averages._in_numpy(source, *both)
    assert slow.shape == (rows, columns, stored[1])
    if averages._kernel_runs():
        assert np.array_equal(averages._in_c(source, *both), slow)


def test_shares_add_up_and_white_stays_white() -> None:
    along = intervals(0.7, 13.37, 20, 300)
    assert (along.weights.sum(axis=1) == WHOLE).all() and (along.weights >= 0).all()
    for value in (0, 1, 127, 255):
        flat = Pixels.of_array(np.full((300, 300, 3), value, np.uint8))
        assert (area_average(flat, along, along) == value).all()
        assert (averages._in_numpy(flat, along, along) == value).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(72, 72), (37, 5), (1, 1)])
def test_pixels_are_read_where_pillow_has_them(mode: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*size, 3)).convert(mode)
    pixels = Pixels.of_image(image)
    assert pixels.stored == (4 if mode == "RGB" else 1)
    assert np.array_equal(pixels.array(), np.asarray(image).reshape(*size, -1))


def test_pixels_that_lie_in_several_pieces_are_packed() -> None:
    image = Image.fromarray(picture(2100, 2101, 3))
    pixels = Pixels.of_image(image)
    assert pixels.stored == 3 and np.array_equal(pixels.array(), np.asarray(image))


def test_without_a_compiler_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise averages.Unavailable("left out by a test")

    source, along = Pixels.of_array(picture(30, 30, 3)), intervals(0.2, 2.9, 10, 30)
    wanted = area_average(source, along, along)
    monkeypatch.setattr(averages, "load_library", unavailable)
    averages._kernel_runs.cache_clear()
    try:
        assert not averages._kernel_runs()
        assert np.array_equal(area_average(source, along, along), wanted)
    finally:
        averages._kernel_runs.cache_clear()
