"""Windows, and the places of things in them."""

import numpy as np
import pytest

from physformer_core.data.scenes import compose_scene
from physformer_core.data.scenes.composer import RELATIONS
from physformer_core.evaluation.windows import (
    OPPOSITE,
    Window,
    ranks,
    relation_found,
    search_windows,
    stands_in_relation,
    whole_windows,
)


@pytest.mark.parametrize(("height", "width", "whole", "halves"), [(64, 64, 1, 9), (72, 128, 3, 21), (128, 64, 3, 21)])
def test_windows_cover_the_picture(height, width, whole, halves):
    assert len(whole_windows(height, width)) == whole
    windows = search_windows(height, width)
    assert len(windows) == whole + halves
    seen = np.zeros((height, width), bool)
    for window in windows:
        part = window.cut(seen)
        assert part.shape[0] == part.shape[1] > 0
        part[:] = True
    assert seen.all()


def test_windows_are_cut_where_they_say():
    picture = np.arange(8 * 12).reshape(8, 12)
    np.testing.assert_array_equal(Window(0.5, 1.0, 0.5).cut(picture), picture[4:8, 8:12])


def test_ranks():
    scores = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.7]])
    assert ranks(scores, np.array([2, 1])).tolist() == [1, 2]
    assert ranks(scores, 0).tolist() == [2, 1]  # equals count against it


@pytest.mark.parametrize("relation", [name for name in RELATIONS if name != "in"])
def test_real_layouts_stand_in_their_relation(relation):
    """The boxes that the composer notes, taken as windows, satisfy the relation, and hardly ever its opposite."""
    right = wrong = 0
    for index in range(40):
        scene = compose_scene(5, index, aspect=1.0, relation=relation)
        windows = []
        for placed in scene.subjects[:2]:
            top, left, bottom, right_edge = placed.box
            side = max(bottom - top, right_edge - left)
            windows.append(Window((top + bottom - side) / 2, (left + right_edge - side) / 2, side))
        right += stands_in_relation(relation, *windows)
        wrong += relation in OPPOSITE and stands_in_relation(OPPOSITE[relation], *windows)
    assert right >= 36, right
    if relation in ("over", "on", "under"):
        assert wrong == 0


def test_a_relation_is_found_only_where_both_are_in_place():
    windows = [Window(0.0, 0.0, 0.5), Window(0.5, 0.0, 0.5)]
    scores = np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]])  # 0 above, 1 below, 2 second everywhere
    assert relation_found("over", windows, scores, 0, 1, 1) == (True, True, True)
    assert relation_found("over", windows, scores, 1, 0, 1) == (False, True, True)
    assert relation_found("under", windows, scores, 1, 0, 1) == (True, True, True)
    assert relation_found("over", windows, scores, 0, 2, 1) == (False, True, False)
    assert relation_found("over", windows, scores, 0, 2, 2) == (True, True, True)
    nothing = relation_found("over", windows, np.zeros((2, 3)), 0, 1, 1)
    assert nothing == (False, False, False)
    with pytest.raises(ValueError, match="no layout"):
        stands_in_relation("inside", *windows)
