"""Feature networks: the real EfficientNet, and stand-ins of the others' formats built here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.evaluation import features
from physformer_core.evaluation.features import load_extractor, resize_square
from physformer_core.files import sha256_file


def pictures(count=2, height=40, width=56):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def test_resizing_is_antialiased_and_exact_where_nothing_is_to_do():
    picture = pictures(1, 32, 32)[0]
    np.testing.assert_array_equal(resize_square(picture, 32), picture.astype(np.float32))
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: any filter that aliases makes it black or white
    assert abs(resize_square(stripes, 16)[4:-4, 4:-4] - 127.5).max() < 8
    expected = Image.fromarray(picture[..., 1].astype(np.float32)).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_square(picture, 20)[..., 1], np.asarray(expected).clip(0, 255))


def test_efficientnet_offline():
    extractor = load_extractor("efficientnet")
    found = extractor.extract(pictures())
    assert found.shape == (2, 1280) and found.dtype == np.float32 and found.std() > 0
    alone = extractor.extract(pictures()[1:])
    np.testing.assert_allclose(alone[0], found[1], atol=1e-4)
    assert extractor.recipe()["sha256"] == features.EFFICIENTNET_SHA256
    assert "not FID" in extractor.distance_name and extractor.distance_name != "FID"


def test_efficientnet_weights_are_pinned(monkeypatch):
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="not the file that scores are compared by"):
        load_extractor("efficientnet")


def test_efficientnet_without_its_packages(monkeypatch):
    monkeypatch.setattr(features, "_EFFICIENTNET_WEIGHTS", ("no_such_package", "x"))
    with pytest.raises(CheckpointError) as raised:
        load_extractor("efficientnet")
    assert "physformer[eval]" in raised.value.hint


class _Layers(torch.nn.Module):
    def forward(self, x):
        # 2048 numbers that tell how the pixels came in.
        return torch.nn.functional.adaptive_avg_pool2d(x, 1).repeat(1, 683, 1, 1)[:, :2048]


class _Inception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = _Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def inception_script(tmp_path, monkeypatch):
    """A stand-in whose hash is taken for the real network's."""
    path = tmp_path / "inception.pt"
    torch.jit.script(_Inception()).save(path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256_file(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "INCEPTION_URL", path.as_uri())
    return path


def test_inception_from_a_torchscript_file(inception_script):
    extractor = load_extractor("inception", str(inception_script))
    grey = np.full((50, 70, 3), 192, np.uint8)
    found = extractor.extract([grey])
    assert found.shape == (1, 2048) and extractor.distance_name == "FID" and extractor.side == 299
    np.testing.assert_allclose(found, 0.5, atol=1e-6)  # (192 - 128) / 128


def test_only_the_networks_own_weights_give_a_fid(inception_script, monkeypatch):
    monkeypatch.setattr(features, "INCEPTION_SHA256", "0" * 64)
    name = load_extractor("inception", str(inception_script)).distance_name
    assert name != "FID" and "other weights" in name and "not FID" in name


def test_inception_is_downloaded_once_and_checked(inception_script):
    told = []
    extractor = load_extractor("inception", on_bytes=lambda done, total: told.append((done, total)))
    size = inception_script.stat().st_size
    assert told[-1] == (size, size) and extractor.distance_name == "FID"
    inception_script.unlink()  # now the cache has it
    assert load_extractor("inception").fingerprint == extractor.fingerprint
    cached = features.cache_folder() / features.INCEPTION_FILE
    cached.write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_extractor("inception")
    cached.unlink()
    with pytest.raises(CheckpointError, match="cannot be downloaded") as raised:
        load_extractor("inception")
    assert "--feature-model" in raised.value.hint and not cached.exists()


def test_another_file_is_never_kept(inception_script, monkeypatch):
    monkeypatch.setattr(features, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="gave another file"):
        load_extractor("inception")
    assert not list(features.cache_folder().iterdir())


def test_inception_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load_extractor("inception", str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(CheckpointError, match="cannot be read as TorchScript"):
        load_extractor("inception", str(tmp_path / "text.pt"))
    torch.jit.script(_Layers()).save(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no part 'layers'"):
        load_extractor("inception", str(tmp_path / "other.pt"))


@pytest.fixture
def transformers_folder(tmp_path):
    """A tiny DINOv2 or CLIP, as it would be downloaded."""

    def make(name):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        }
        if name == "dinov2":
            model = Dinov2Model(Dinov2Config(**sizes))
        else:
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, intermediate_size=32, projection_dim=12))
        folder = tmp_path / name
        model.save_pretrained(folder)
        statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
        return folder

    return make


@pytest.mark.parametrize(("name", "width", "side"), [("dinov2", 16, 224), ("clip", 12, 56)])
def test_transformers_models(transformers_folder, name, width, side):
    folder = transformers_folder(name)
    extractor = load_extractor(name, str(folder))
    found = extractor.extract(pictures())
    assert found.shape == (2, width) and extractor.side == side and len(extractor.fingerprint) == 64
    assert "not FID" in extractor.distance_name
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="mean and spread"):
        load_extractor(name, str(folder))


def test_a_model_of_another_kind(transformers_folder):
    with pytest.raises(ConfigError, match="of kind 'dinov2', not clip"):
        load_extractor("clip", str(transformers_folder("dinov2")))


def test_names_that_are_wrong():
    with pytest.raises(ConfigError, match="unknown features"):
        load_extractor("vgg")
    with pytest.raises(ConfigError, match="no effect"):
        load_extractor("efficientnet", "x.pt")
