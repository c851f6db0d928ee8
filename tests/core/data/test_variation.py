"""Scenes that are shown a little closer, aside, and on colours of their own."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from physformer_core.data.scenes import compose_scene, fetch_scenes, render_svg
from physformer_core.data.scenes.painter import COLOURS
from physformer_core.data.scenes.variation import varied
from physformer_core.errors import DataError

VIEW = re.compile(r'<g transform="scale\(([\d.]+)\) translate\((-?[\d.]+) (-?[\d.]+)\)">')


@pytest.mark.parametrize("index", range(12))
def test_what_is_shown_is_a_part_of_the_scene(index):
    scene = compose_scene(3, index, kind=("setting", "pair", "place")[index % 3])
    closer = varied(scene, 0.3)
    assert closer.captions == scene.captions and (closer.width, closer.height) == (scene.width, scene.height)
    view = VIEW.search(closer.svg)
    assert view
    zoom, x, y = float(view[1]), -float(view[2]), -float(view[3])
    assert 1 <= zoom <= 1.3
    side = 240
    whole = Image.fromarray(render_svg(scene.svg, 4 * side, 4 * side))
    box = [4 * side * part for part in (x / scene.width, y / scene.height)]
    cut = whole.resize((side, side), Image.Resampling.BOX, box=(*box, *(corner + 4 * side / zoom for corner in box)))
    drawn = render_svg(closer.svg, side, side)
    difference = np.abs(np.asarray(cut, np.float32) - drawn).mean(2)
    if scene.background is None:
        assert difference.mean() < 1.5
    else:  # its colour is another one: but things are where they were, and so are most edges
        assert difference.mean() < 25


@pytest.mark.parametrize("kind", ["single", "setting", "pair"])
def test_things_stay_whole_and_boxes_follow_them(kind):
    sides = set()
    for index in range(40):
        scene = compose_scene(5, index, kind=kind)
        closer = varied(scene, 0.5)
        view = VIEW.search(closer.svg)
        assert view
        for before, after in zip(scene.subjects, closer.subjects, strict=True):
            assert (before.concept, before.role, before.colour) == (after.concept, after.role, after.colour)
            size, now = (one.box[2] - one.box[0] for one in (before, after))
            assert now == pytest.approx(size * float(view[1]), abs=3e-4), "nothing of it is cut off"
            corner = -float(view[3]) / scene.height, -float(view[2]) / scene.width
            moved = [(edge - start) * float(view[1]) for edge, start in zip(before.box, corner * 2, strict=True)]
            assert after.box == pytest.approx(moved, abs=5e-4)
        sides.add(view[1])
    assert len(sides) > 20


def test_plain_colours_are_never_the_same_and_never_far():
    scene = next(one for one in (compose_scene(1, i, kind="single") for i in range(99)) if one.background == "blue")
    corner = render_svg(varied(scene, 0.1).svg, 32, 32)[0, 0].astype(int)
    named = [int(COLOURS["blue"][i : i + 2], 16) for i in (1, 3, 5)]
    assert 0 < np.abs(corner - named).max() <= 13


def test_none_changes_nothing_and_the_same_key_the_same_scene():
    scene = compose_scene(1, 2)
    assert varied(scene, 0.0) is scene
    assert varied(scene, 0.2) == varied(compose_scene(1, 2), 0.2) != varied(scene, 0.1)


def test_a_varied_set_is_another_set(tmp_path):
    plain = fetch_scenes(tmp_path / "plain", count=4, seed=1)
    assert "variation" not in plain["source"]["options"], "sets from before there was a choice stay the same set"
    manifest = fetch_scenes(tmp_path / "varied", count=4, seed=1, variation=0.1)
    assert manifest["source"]["options"]["variation"] == 0.1 and manifest["sha256"] != plain["sha256"]
    with pytest.raises(DataError, match="already holds another set"):
        fetch_scenes(tmp_path / "varied", count=4, seed=1)
    with pytest.raises(DataError, match=r"variation of 0\.6 is not from 0 to 0\.5"):
        fetch_scenes(tmp_path / "wrong", count=4, seed=1, variation=0.6)
    assert not (tmp_path / "wrong").exists()
