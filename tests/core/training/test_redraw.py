"""Coarse fields as a checkpoint draws them: which ones, from what, and what a trainer is shown."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physformer_core.checkpoints import load_pipeline
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.errors import DataError
from physformer_core.files import sha256_file
from physformer_core.flow.pyramid import picture_noise
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.training.redraw import REDRAWING_TIME, redraw

CONFIG = PreprocessConfig(
    buckets=((32, 32), (32, 40)), levels=(1, 2), level_weights=(1, 1), crop_size=48, validation_fraction=0.2
)


@pytest.fixture(scope="module")
def plain(scene_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of crops of levels 1 and 2. Not to be changed."""
    folder = tmp_path_factory.mktemp("plain") / "set"
    preprocess(scene_raw, folder, config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> PhysFormerPipeline:
    return load_pipeline(tiny_checkpoint)


@pytest.fixture
def redrawn(plain: Path, pipeline: PhysFormerPipeline, tmp_path: Path) -> Path:
    """A copy of it, redrawn."""
    folder = shutil.copytree(plain, tmp_path / "redrawn")
    redraw(folder, pipeline, checkpoint_sha256="one", seed=5)
    return folder


def test_another_size_of_level_0_is_refused(scene_raw: Path, pipeline: PhysFormerPipeline, tmp_path: Path) -> None:
    preprocess(scene_raw, tmp_path / "set", config=replace(CONFIG, buckets=((48, 48), (48, 56))))
    with pytest.raises(DataError, match="pictures of that shape begin with 32x32"):
        redraw(tmp_path / "set", pipeline, checkpoint_sha256="one", seed=5)
    assert not list((tmp_path / "set").glob("coarse-*"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.arrow"))}


def test_level_1_is_redrawn_and_the_rest_averaged(
    plain: Path, redrawn: Path, pipeline: PhysFormerPipeline, tiny_checkpoint: Path
) -> None:
    shards = ShardSet(redrawn, verify=True)
    assert {**contents(redrawn), **contents(plain)} == contents(redrawn), "the set's own files stay as they are"
    assert set(contents(redrawn)) - set(contents(plain)) == {
        f"coarse-{name}" for name in contents(plain) if "crop" in name
    }
    wholes = {
        shards.example_key("base", group.first + row): group.field(row)
        for group in shards.groups("base", "train")
        for row in range(group.count)
    }
    levels = set()
    for entry in shards.manifest["shards"]:
        if (entry["kind"], entry["split"]) != ("crop", "train"):
            continue
        (group,) = (one for one in shards.groups("crop", "train") if one.size == (entry["height"], entry["width"]))
        for row in range(group.count):
            sharp, coarse = group.field(row).astype(float), group.coarse(row)
            average = sharp.reshape(sharp.shape[0] // 2, 2, sharp.shape[1] // 2, 2, 3).mean((1, 3))
            if group.level[row] == 2:
                assert np.abs(coarse - average).max() <= 0.5
                continue
            levels.add(int(group.level[row]))
            whole = wholes[shards.example_key("crop", group.first + row)]
            real = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            noise = picture_noise(tuple(real.shape[1:]), 5, row, 0, f"redraw {entry['name']}")
            t = torch.tensor([REDRAWING_TIME])
            caption = shards.caption(int(group.caption_rows[group.caption_starts[row]]))
            with torch.no_grad():
                expected = pipeline.transformer(
                    REDRAWING_TIME * real + (1 - REDRAWING_TIME) * noise,
                    t,
                    pipeline.encode_prompt([caption]),
                    torch.tensor([0]),
                    None,
                    torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
                ).sample
            pixels = ((expected[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
            top, left = (
                round(float(share) * side) for share, side in zip(group.place[row, :2], whole.shape[:2], strict=True)
            )
            part = pixels[top : top + coarse.shape[0], left : left + coarse.shape[1]]
            # Batches and float16 embeddings round otherwise.
            assert np.abs(coarse - part).max() <= 1.5
            assert np.abs(part - average).mean() > 10, "it can be told from the real one"
    assert levels == {1}


def test_the_trainer_is_shown_what_was_redrawn(plain: Path, redrawn: Path) -> None:
    sets = [ShardSet(plain), ShardSet(redrawn), ShardSet(redrawn, redrawn=False)]
    assert sets[0].key == sets[2].key != sets[1].key
    real, drawn, again = (
        BatchStream(one, seed=3, batch_size=8, crop_fraction=1.0, crop_size=32).batch(0) for one in sets
    )
    assert torch.equal(real.pixels_bchw, drawn.pixels_bchw) and torch.equal(real.indices, drawn.indices)
    assert torch.equal(real.coarse_bchw, again.coarse_bchw)
    apart = (real.coarse_bchw - drawn.coarse_bchw).abs().amax((1, 2, 3))
    assert set(real.level_b.tolist()) == {1, 2}
    assert (apart[real.level_b == 1] > 0.1).all() and (apart[real.level_b == 2] <= 1.01 / 255).all()
    resident = BatchStream(sets[1], seed=3, batch_size=8, crop_fraction=1.0, crop_size=32, device=torch.device("cpu"))
    assert torch.allclose(resident.batch(0).coarse_bchw, drawn.coarse_bchw, atol=1e-6)


def test_windows_lie_where_they_lie_in_the_whole_picture(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a network that sees no velocity anywhere, from next to no noise, level 0 is redrawn as it is."""
    monkeypatch.setattr("physformer_core.training.redraw.REDRAWING_TIME", 0.999)
    still = PhysFormerTransformer2DModel(
        hidden_size=32, num_layers=1, num_heads=2, text_hidden_size=32, num_text_layers=1, bottleneck=16
    )
    folder = shutil.copytree(plain, tmp_path / "set")
    redraw(folder, PhysFormerPipeline(still, flow={"prediction": "velocity"}), checkpoint_sha256="still")
    for group in ShardSet(folder).groups("crop", "train"):
        for row in range(group.count):
            sharp = group.field(row).astype(float)
            average = sharp.reshape(sharp.shape[0] // 2, 2, sharp.shape[1] // 2, 2, 3).mean((1, 3))
            # Drawings are rasterised anew at every level, so a real level 0 is not quite the average of level 1.
            assert np.abs(group.coarse(row) - average).mean() < 3


def test_what_was_finished_is_kept(plain: Path, redrawn: Path, pipeline: PhysFormerPipeline, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "set")
    total = ShardSet(plain).count("crop", "train") + ShardSet(plain).count("crop", "validation")

    def stop(done: int, of: int) -> None:
        assert of == total
        if list(folder.glob("coarse-*.arrow")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        redraw(folder, pipeline, checkpoint_sha256="one", seed=5, progress=stop)
    assert ShardSet(folder).key == ShardSet(plain).key, "as before, until all is done"
    first = next(iter(sorted(folder.glob("coarse-*.arrow"))))
    written = first.stat().st_mtime_ns
    seen: list[int] = []
    told = redraw(folder, pipeline, checkpoint_sha256="one", seed=5, progress=lambda done, _: seen.append(done))
    assert told["fresh"] and seen[-1] == total and first.stat().st_mtime_ns == written
    assert contents(folder) == contents(redrawn)
    assert not (folder / ".partial").exists() and not list(folder.glob(".*.tmp.*"))
    assert not redraw(folder, pipeline, checkpoint_sha256="one", seed=5)["fresh"]
    other = redraw(folder, pipeline, checkpoint_sha256="one", seed=6)
    assert other["fresh"] and contents(folder) != contents(redrawn)


def test_a_set_that_is_redrawn_anew_is_never_half_of_each(
    plain: Path, redrawn: Path, pipeline: PhysFormerPipeline
) -> None:
    before = contents(redrawn)

    def stop(done: int, of: int) -> None:
        if contents(redrawn) != before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        redraw(redrawn, pipeline, checkpoint_sha256="two", seed=6, progress=stop)
    assert ShardSet(redrawn).key == ShardSet(plain).key and ShardSet(redrawn).redrawn_by is None
    redraw(redrawn, pipeline, checkpoint_sha256="two", seed=6)
    assert ShardSet(redrawn, verify=True).redrawn_by == "two"


def test_a_lost_file_is_told_and_made_again(redrawn: Path, pipeline: PhysFormerPipeline) -> None:
    before = contents(redrawn)
    lost, *others = sorted(redrawn.glob("coarse-*.arrow"))
    assert others
    written = [path.stat().st_mtime_ns for path in others]
    lost.unlink()
    with pytest.raises(DataError, match="is missing") as caught:
        ShardSet(redrawn)
    assert caught.value.hint == "run the same physformer data redraw again"
    assert redraw(redrawn, pipeline, checkpoint_sha256="one", seed=5)["fresh"] and contents(redrawn) == before
    assert [path.stat().st_mtime_ns for path in others] == written, "it alone"


def test_preprocessing_again_keeps_it_and_replaces_it(scene_raw: Path, redrawn: Path) -> None:
    key, before = ShardSet(redrawn).key, contents(redrawn)
    assert not preprocess(scene_raw, redrawn, config=CONFIG)["fresh"]
    next(iter(redrawn.glob("base-*.arrow"))).unlink()
    assert preprocess(scene_raw, redrawn, config=CONFIG)["fresh"]
    assert ShardSet(redrawn).key == key and contents(redrawn) == before

    class Stop(Exception):
        pass

    def stop(stage: str, _done: int, _total: int) -> None:
        if stage == "pictures":
            raise Stop

    known = ShardSet(redrawn).manifest["redrawn"]
    next(iter(redrawn.glob("base-*.arrow"))).unlink()
    with pytest.raises(Stop):
        preprocess(scene_raw, redrawn, config=CONFIG, progress=stop)
    preprocess(scene_raw, redrawn, config=CONFIG)
    assert ShardSet(redrawn).manifest["redrawn"] == known and contents(redrawn) == before
    preprocess(scene_raw, redrawn, config=PreprocessConfig(crops_per_example=0.5), overwrite=True)
    assert not list(redrawn.glob("coarse-*")) and "redrawn" not in ShardSet(redrawn).manifest


def test_a_set_of_another_kind_is_refused(
    scene_raw: Path, plain: Path, pipeline: PhysFormerPipeline, tmp_path: Path
) -> None:
    preprocess(scene_raw, tmp_path / "whole", config=PreprocessConfig(crops_per_example=0))
    with pytest.raises(DataError, match="has no crops"):
        redraw(tmp_path / "whole", pipeline, checkpoint_sha256="one")
    other = PhysFormerPipeline(pipeline.transformer, text_encoder_name="minilm+minilm")
    with pytest.raises(DataError, match=r"text encoder is minilm, the checkpoint's is minilm\+minilm"):
        redraw(plain, other, checkpoint_sha256="one")
    assert not list(plain.glob("coarse-*"))
