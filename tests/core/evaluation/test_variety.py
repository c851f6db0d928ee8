import numpy as np
import pytest

from physformer_core.data.loader import ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.scenes import fetch_scenes
from physformer_core.data.scenes.variation import varied
from physformer_core.errors import DataError
from physformer_core.evaluation.prompt_cases import chosen_concepts, single_cases
from physformer_core.evaluation.variety import (
    COPY_DISTANCE,
    level_0_group,
    level_0_of,
    mean_distance,
    nearest_pictures,
    neighbour_summary,
    scenes_like,
    variation_of,
)


def test_distance_of_equal_opposite_and_random_features():
    same = np.tile(np.array([[1.0, 2.0]]), (4, 1)) * np.array([[1], [2], [3], [4]])
    assert mean_distance(same) == pytest.approx(0, abs=1e-6)  # length says nothing
    assert mean_distance(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(2)
    assert mean_distance(np.random.default_rng(0).standard_normal((40, 2000))) == pytest.approx(1, abs=0.02)


def test_scenes_show_what_the_prompt_asks_for():
    seen = set()
    for number, case in enumerate(single_cases(12, 0, aspect=1.0, concepts=chosen_concepts("car,apple,cat"))):
        scenes = scenes_like(case, number, 4, 0, aspect=1.0)
        for scene in scenes:
            assert (scene.place, scene.time) == (case.scene.place, case.scene.time)
            assert scene.subjects[0].concept == case.scene.subjects[0].concept
            assert scene.subjects[0].colour == case.scene.subjects[0].colour
            assert scene.background == case.scene.background or "background" not in case.prompt
        seen |= {scene.key for scene in scenes}
    assert len(seen) == 12 * 4  # none is counted twice


def test_scenes_vary_as_those_of_the_set_do(scene_set, tmp_path):
    assert variation_of(ShardSet(scene_set)) == 0
    fetch_scenes(tmp_path / "raw", count=12, seed=1, aspect=1.0, variation=0.2)
    config = PreprocessConfig(crops_per_example=0, buckets=((32, 32),), validation_fraction=0)
    preprocess(tmp_path / "raw", tmp_path / "set", config=config)
    assert variation_of(ShardSet(tmp_path / "set")) == 0.2
    (case,) = single_cases(1, 0, aspect=1.0, concepts=chosen_concepts("apple"))
    plain, others = (scenes_like(case, 0, 3, 0, aspect=1.0, variation=amount) for amount in (0.0, 0.2))
    assert [varied(scene, 0.2) for scene in plain] == others != plain


def test_copies_are_found_and_others_are_not(scene_set):
    group = level_0_group(ShardSet(scene_set), 1.0)
    height, width = group.size
    rows = [0, group.count // 2, group.count - 1]
    copies = [np.array(group.field(row)) for row in rows]
    larger = [one.repeat(4, axis=0).repeat(4, axis=1) for one in copies]
    assert larger[0].shape == (4 * height, 4 * width, 3)
    grey = np.clip(copies[0].astype(int) + np.random.default_rng(0).integers(-1, 2, copies[0].shape), 0, 255)
    found = nearest_pictures(group, [level_0_of(group, one) for one in (*copies, *larger, grey.astype(np.uint8))])
    assert [one.distance for one in found[:6]] == [0.0] * 6
    assert all(np.array_equal(one.picture, copy) for one, copy in zip(found, copies * 2, strict=False))
    assert 0 < found[-1].distance < COPY_DISTANCE
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    summary = neighbour_summary([*found, *nearest_pictures(group, [level_0_of(group, noise)] * 7)])
    assert summary["copies"] == 0.5 and summary["smallest"] == 0 and summary["median"] > 1


def test_a_shape_that_the_set_has_not(scene_set):
    with pytest.raises(DataError, match="no whole pictures of this shape"):
        level_0_group(ShardSet(scene_set), 9.0)
    group = level_0_group(ShardSet(scene_set), 1.0)
    aspect = group.size[1] / group.size[0]
    with pytest.raises(DataError, match="stretched ones are no copies"):
        level_0_group(ShardSet(scene_set), 1.05 * aspect)
