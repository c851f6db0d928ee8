"""Sets of latents: what is stored is what the autoencoder gives, its weights are part of the key, and it trains."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from physformer_core.codec import load_codec
from physformer_core.config import load_preset
from physformer_core.data.contact_sheet import exhibits
from physformer_core.data.examples import make_examples
from physformer_core.data.latents import FieldSpec
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.shards import group_files
from physformer_core.errors import CheckpointError, DataError, DeviceError
from physformer_core.files import sha256_file
from physformer_core.flow.pyramid import Pyramid
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.training.redraw import redraw
from physformer_core.training.trainer import Trainer

Make = Callable[..., dict[str, Any]]
Write = Callable[[Path, list[list[dict[str, Any]]]], Path]


def save_kl(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.7,
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four channels, half the size. It has attention over the whole picture, as large ones do."""
    return save_kl(tmp_path_factory.mktemp("codecs") / "kl")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, raw_writer: Write, make_drawing: Make, make_bitmap: Make) -> Path:
    """Ten drawings, two bitmaps that are large enough for level 1, in two files."""
    rows = [make_drawing(i, 400, 400) for i in range(10)] + [make_bitmap(i, 200, 200) for i in range(2)]
    return raw_writer(tmp_path_factory.mktemp("raw"), [rows[:7], rows[7:]])


@pytest.fixture(scope="module")
def latent_config(autoencoder: Path) -> PreprocessConfig:
    return PreprocessConfig(
        codec=str(autoencoder),
        buckets=((32, 32),),
        crop_size=48,
        levels=(1, 2),
        level_weights=(1, 1),
        validation_fraction=0.2,
    )


@pytest.fixture(scope="module")
def latents(raw: Path, latent_config: PreprocessConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "set"
    preprocess(raw, folder, config=latent_config)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def test_latents_are_those_of_the_pictures(
    raw: Path, latents: Path, latent_config: PreprocessConfig, autoencoder: Path
) -> None:
    rows = [row for path in sorted(raw.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    examples = {
        (row["key"], example.kind): example for row in rows for example in make_examples(row, latent_config, 2).examples
    }
    shards, codec = ShardSet(latents, verify=True), load_codec(str(autoencoder))
    assert (shards.field.channels, shards.field.factor, shards.field.is_pixels) == (4, 2, False)
    assert shards.field.sha256 == codec.fingerprint()

    def encoded(pixels: np.ndarray) -> np.ndarray:
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            return codec.encode(picture)[0].permute(1, 2, 0).numpy()

    for kind, size in (("base", (32, 32)), ("crop", (48, 48))):
        assert shards.count(kind) + shards.count(kind, "validation") == 12
        (group,) = shards.groups(kind, "train")
        assert group.size == size
        for row in range(group.count):
            example = examples[shards.example_key(kind, row), kind]
            assert example.pixels.shape[:2] == (2 * size[0], 2 * size[1])
            assert np.abs(group.field(row) - encoded(example.pixels)).max() < 5e-3
            if kind == "crop":
                assert group.level[row] == example.columns["level"]
                assert np.allclose(group.place[row], example.columns["place"])
                # What a level grows from is the autoencoder's view of the small picture, not the mean of its latents.
                assert example.coarse is not None
                smaller = example.pixels.reshape(48, 2, 48, 2, 3).mean((1, 3))
                assert np.abs(smaller - example.coarse).mean() < 2
                assert np.abs(group.coarse(row) - encoded(example.coarse)).max() < 5e-3


def test_batches_of_latents(latents: Path) -> None:
    shards = ShardSet(latents)
    stream = BatchStream(shards, seed=1, batch_size=3, crop_fraction=0.5, crop_size=32)
    base, crop = stream.batch(0), stream.batch(1)
    assert base.pixels_bchw.shape == (3, 4, 32, 32) and base.coarse_bchw is None
    assert crop.pixels_bchw.shape == (3, 4, 32, 32) and crop.coarse_bchw is not None
    (group,) = shards.groups("crop", "train")
    for i in range(3):
        index = int(crop.indices[i])
        whole = torch.from_numpy(group.field(index).astype(np.float32)).permute(2, 0, 1)
        half = torch.from_numpy(group.coarse(index).astype(np.float32)).permute(2, 0, 1)
        upsampled = Pyramid.upsample(half[None])[0]
        found = [
            (top, left)
            for top in range(17)
            for left in range(17)
            if torch.equal(whole[:, top : top + 32, left : left + 32], crop.pixels_bchw[i])
        ]
        assert len(found) == 1
        top, left = found[0]
        assert torch.allclose(upsampled[:, top : top + 32, left : left + 32], crop.coarse_bchw[i], atol=1e-6)


def trained(latents: Path, folder: Path) -> PhysFormerPipeline:
    config = load_preset("debug").override("training", steps=2, checkpoint_every=2, crop_size=32, batch_size=2)
    trainer = Trainer(config, latents, folder, device="cpu")
    assert trainer.run() and trainer.model.config.in_channels == 4
    drawn: PhysFormerPipeline = PhysFormerPipeline.from_pretrained(next((folder / "checkpoints").glob("step-*")))
    return drawn


def test_a_set_of_latents_trains_and_draws(latents: Path, tmp_path: Path, autoencoder: Path) -> None:
    drawn = trained(latents, tmp_path / "run")
    assert drawn.config.codec_name == str(autoencoder)
    assert drawn("two things", height=64, width=96, num_inference_steps=1).images[0].size == (96, 64)


def test_latents_are_redrawn(latents: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(latents, tmp_path / "set")
    pipeline = trained(latents, tmp_path / "run")
    redraw(folder, pipeline, checkpoint_sha256="one")
    for before, after in zip(
        ShardSet(latents).groups("crop", "train"), ShardSet(folder).groups("crop", "train"), strict=True
    ):
        same = [np.array_equal(before.coarse(row), after.coarse(row)) for row in range(before.count)]
        assert same == (before.level != 1).tolist() and {True, False} == set(same)
        assert after.coarse(0).dtype == np.float16 and after.coarse(0).shape == before.coarse(0).shape
    batch = BatchStream(ShardSet(folder), seed=0, batch_size=2, crop_fraction=1.0, crop_size=32).batch(0)
    assert batch.coarse_bchw is not None and torch.isfinite(batch.coarse_bchw).all()


def test_a_sheet_of_latents_shows_pictures(latents: Path) -> None:
    shown = exhibits(latents, 4, size=160)
    assert len(shown) == 4 and shown[0].picture.size == (128, 128)  # 64 pixels, enlarged by a whole factor


def test_the_autoencoder_is_part_of_the_key(
    raw: Path, latents: Path, latent_config: PreprocessConfig, autoencoder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(latents, tmp_path / "set"))
    assert preprocess(raw, folder, config=latent_config)["fresh"] is False
    other = save_kl(tmp_path / "other", seed=1)
    shutil.copytree(autoencoder, tmp_path / "kept")
    try:  # other weights under the same name
        shutil.copytree(other, autoencoder, dirs_exist_ok=True)
        with pytest.raises(DataError, match="another configuration"):
            preprocess(raw, folder, config=latent_config)
    finally:
        shutil.copytree(tmp_path / "kept", autoencoder, dirs_exist_ok=True)
    assert preprocess(raw, folder, config=latent_config)["fresh"] is False


@pytest.mark.slow
def test_workers_do_not_change_a_latent(
    raw: Path, latents: Path, latent_config: PreprocessConfig, tmp_path: Path
) -> None:
    preprocess(raw, tmp_path / "set", config=latent_config, workers=2)
    assert contents(tmp_path / "set") == contents(latents)


def test_a_tiny_autoencoder_will_do(raw: Path, latent_config: PreprocessConfig, tmp_path: Path) -> None:
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=6,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "taesd")
    config = dataclasses.replace(latent_config, codec=str(tmp_path / "taesd"), crops_per_example=0.0)
    manifest = preprocess(raw, tmp_path / "set", config=config)
    assert manifest["field"]["channels"] == 6 and ShardSet(tmp_path / "set").count("crop") == 0


def test_what_cannot_be_is_refused(raw: Path, latent_config: PreprocessConfig, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="does not exist on this machine"):
        preprocess(raw, tmp_path / "a", config=dataclasses.replace(latent_config, codec="pixels"), device="cuda:99")
    with pytest.raises(CheckpointError, match="cannot load codec"):
        preprocess(raw, tmp_path / "a", config=dataclasses.replace(latent_config, codec=str(tmp_path / "nothing")))
    assert not (tmp_path / "a").exists()


def test_shards_stay_few() -> None:
    groups = group_files([1000] * 2000)
    assert len(groups) <= 33 and [file for group in groups for file in group] == list(range(2000))
    assert group_files([10, 10]) == [[0, 1]]


def test_a_gpu_is_as_good_as_another() -> None:
    """What encodes is told by its kind: that decides the last bits, and the set's key."""
    assert FieldSpec("x", 4, 8, "s", "cuda:1").as_dict() == FieldSpec("x", 4, 8, "s", "cuda").as_dict()
    assert FieldSpec().as_dict()["device"] is None


def test_the_device_may_be_found(tmp_path: Path, raw_writer: Write, make_bitmap: Make) -> None:
    raw = raw_writer(tmp_path / "raw", [[make_bitmap(0, 96, 96)]])
    config = PreprocessConfig(
        codec=str(save_kl(tmp_path / "vae")), buckets=((16, 16),), levels=(1,), level_weights=(1,), crop_size=24
    )
    made = preprocess(raw, tmp_path / "set", config=config, device="auto")
    assert made["field"]["device"] in ("cpu", "cuda", "mps")
