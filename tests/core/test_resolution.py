"""Sizes: every name, every combination, and every way to get it wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physformer_core.errors import SizeError
from physformer_core.resolution import MAX_SIDE, MIN_SIDE, SHORT_SIDES, parse_aspect, resolve_size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (512, 512)),
        ({"default": (64, 80)}, (64, 80)),
        ({"res": "360p"}, (640, 360)),
        ({"res": "480p"}, (854, 480)),
        ({"res": "720p"}, (1280, 720)),
        ({"res": "1080P"}, (1920, 1080)),
        ({"res": "1440p"}, (2560, 1440)),
        ({"res": "4k"}, (3840, 2160)),
        ({"res": "4K"}, (3840, 2160)),
        ({"res": "2160p"}, (3840, 2160)),
        ({"res": "8k"}, (7680, 4320)),
        ({"res": "720p", "aspect": "16:9"}, (1280, 720)),
        ({"res": "720p", "aspect": "1:1"}, (720, 720)),
        ({"res": "720p", "aspect": "9:16"}, (720, 1280)),
        ({"res": "720p", "aspect": "21:9"}, (1680, 720)),
        ({"res": "720p", "aspect": "9:21"}, (720, 1680)),
        ({"res": "1000x333"}, (1000, 333)),
        ({"res": "1000 X 333"}, (1000, 333)),
        ({"res": "1000×333"}, (1000, 333)),
        ({"width": 641, "height": 359}, (641, 359)),
        ({"width": 640}, (640, 640)),
        ({"width": 640, "aspect": "16:9"}, (640, 360)),
        ({"height": 360, "aspect": "16:9"}, (640, 360)),
        ({"height": 100, "default": (200, 100)}, (200, 100)),
        ({"aspect": "2:1"}, (1024, 512)),
        ({"aspect": "1:2"}, (512, 1024)),
    ],
)
def test_sizes(options, expected):
    assert resolve_size(**options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"res": "720"}, "did you mean 720p"),
        ({"res": "1080i"}, "did you mean 1080p"),
        ({"res": "enormous"}, "unknown resolution 'enormous'"),
        ({"res": ""}, "unknown resolution"),
        ({"res": "0x100"}, "width of 0"),
        ({"res": "100x-5"}, "height of -5"),
        ({"res": "16385x16"}, "width of 16385"),
        ({"res": "720p", "width": 100}, "twice"),
        ({"res": "720p", "height": 100}, "twice"),
        ({"res": "64x64", "aspect": "1:1"}, "no effect"),
        ({"width": 64, "height": 64, "aspect": "1:1"}, "no effect"),
        ({"width": 0, "height": 64}, "width of 0"),
        ({"width": 64, "height": -64}, "height of -64"),
        ({"width": 0}, "width of 0"),
        ({"height": 10**9}, "height of 1000000000"),
        ({"res": "8k", "aspect": "4:1"}, "width of 17280"),
        ({"res": "9" * 5000 + "x16"}, "unknown resolution"),
        ({"aspect": "9" * 5000 + ":1"}, "not an aspect ratio"),
        ({"aspect": "16x9"}, "not an aspect ratio"),
        ({"aspect": "0:9"}, "not an aspect ratio"),
        ({"aspect": "-1:1"}, "not an aspect ratio"),
        ({"aspect": "nan:1"}, "not an aspect ratio"),
    ],
)
def test_refused(options, words):
    with pytest.raises(SizeError, match=words) as caught:
        resolve_size(**options)
    assert caught.value.hint


def test_unknown_resolution_lists_all():
    with pytest.raises(SizeError) as caught:
        resolve_size(res="5k")
    assert all(name in caught.value.hint for name in SHORT_SIDES)


@given(st.sampled_from(sorted(SHORT_SIDES)), st.integers(9, 21), st.integers(9, 21))
def test_a_name_keeps_the_short_side(name, wide, high):
    width, height = resolve_size(res=name, aspect=f"{wide}:{high}")
    assert min(width, height) == SHORT_SIDES[name]
    assert abs(width / height - wide / high) < 0.02 * wide / high
    assert MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_size_error(text):
    for call in (lambda: resolve_size(res=text), lambda: parse_aspect(text)):
        try:
            call()
        except SizeError as error:
            assert error.hint
