"""Sets of pictures, and scores between them with their recipes."""

import numpy as np
import pytest
from PIL import Image

from physformer_core.errors import DataError
from physformer_core.evaluation.frechet import save_statistics
from physformer_core.evaluation.pictures import open_source
from physformer_core.evaluation.scores import compare, gather, read_reference


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for number in range(12):
        size = (40, 30, 3) if number % 2 else (20, 50, 3)
        path = tmp_path / "pictures" / f"{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_a_folder_and_its_hash(folder):
    source = open_source(folder)
    assert source.count == 12 and len(list(source)) == 12 and source.recipe()["kind"] == "folder"
    before = source.recipe()["sha256"]
    (folder / "0" / "00.png").rename(folder / "renamed.png")
    assert open_source(folder).recipe()["sha256"] == before
    Image.new("RGB", (9, 9)).save(folder / "renamed.png")
    assert open_source(folder).recipe()["sha256"] != before
    (folder / ".half.0123.tmp.png").write_bytes(b"what a killed process left")
    (folder / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(folder / ".hidden" / "a.png")
    assert open_source(folder).count == 12
    (folder / "bad.png").write_text("text")
    with pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
        list(open_source(folder))
    with pytest.raises(DataError, match="no captions"):
        source.captions(3)


def test_sets(scene_raw, scene_set):
    raw = open_source(scene_raw, size=48)
    first = next(iter(raw))
    assert (
        raw.count == 60 and first.dtype == np.uint8 and first.shape[0] * first.shape[1] == pytest.approx(48**2, rel=0.1)
    )
    captions = raw.captions(5)
    assert len(captions) == 5 and (captions[0].height, captions[0].width) == first.shape[:2]
    assert len(raw.captions(70)) == 70
    both, part = open_source(scene_set), open_source(scene_set, split="validation")
    assert both.count == 60 and 0 < part.count < 60 and len(list(part)) == part.count
    caption = part.captions(1)[0]
    assert caption.caption and (caption.height, caption.width) == next(iter(part)).shape[:2]


def test_what_is_no_set(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        open_source(tmp_path / "none")


def test_a_score_and_its_recipe(folder, scene_raw, tiny_extractor):
    source, raw = open_source(folder), open_source(scene_raw, size=32)
    one = gather(source, tiny_extractor, source.recipe, batch_size=5)
    other = gather(raw, tiny_extractor, raw.recipe)
    same = compare(one, one, tiny_extractor)
    assert same.frechet == pytest.approx(0, abs=1e-6) and same.precision == same.recall == 1
    score = compare(other, one, tiny_extractor)
    assert score.frechet > 0.1 and score.name != "FID"
    recipe = score.as_dict()["recipe"]
    assert recipe["reference"]["pictures"]["sha256"] == raw.recipe()["sha256"] and recipe["reference"]["count"] == 60
    assert recipe["generated"]["pictures"]["kind"] == "folder" and recipe["extractor"]["resize"]
    assert len(score.warnings) == 2 and "fewer than 10,000" in score.warnings[0]
    # The batch changes the last bits alone.
    again = gather(source, tiny_extractor, source.recipe, batch_size=12)
    assert compare(other, again, tiny_extractor).frechet == pytest.approx(score.frechet, rel=1e-5)


def test_statistics_of_other_features_are_refused(folder, tiny_extractor, tmp_path):
    source, path = open_source(folder), tmp_path / "s.npz"
    statistics = gather(source, tiny_extractor, source.recipe)
    save_statistics(path, statistics)
    read = read_reference(path, tiny_extractor)
    score = compare(read, statistics, tiny_extractor)
    assert score.frechet == pytest.approx(0, abs=1e-6) and score.kid is None and score.precision is None
    assert score.recipe["reference"]["file_sha256"]
    changed = dict(statistics.recipe) | {"extractor": {**tiny_extractor.recipe(), "sha256": "0" * 64}}
    save_statistics(path, type(statistics)(statistics.mean, statistics.covariance, 12, changed))
    with pytest.raises(DataError, match="made with other features: its sha256"):
        read_reference(path, tiny_extractor)
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(DataError, match="width 7"):
        read_reference(path, tiny_extractor)
