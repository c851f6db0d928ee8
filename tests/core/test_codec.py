"""Codecs: pixels, and tiny autoencoders built from a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from physformer_core.codec import AutoencoderCodec, PixelCodec, load_codec
from physformer_core.errors import CheckpointError, ConfigError


def tiny_kl(latents: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=latents,
        scaling_factor=0.36,
        shift_factor=0.11,
    )


def tiny_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``kl/`` holds an autoencoder, ``pipeline/vae/`` another of 16 channels, ``taesd/`` a tiny one."""
    folder = tmp_path_factory.mktemp("codecs")
    tiny_kl().save_pretrained(folder / "kl")
    tiny_kl(16).save_pretrained(folder / "pipeline" / "vae")
    tiny_taesd().save_pretrained(folder / "taesd")
    return folder


def test_pixels_are_the_field() -> None:
    codec = load_codec()
    assert isinstance(codec, PixelCodec)
    assert (codec.name, codec.channels, codec.factor) == ("pixels", 3, 1)
    pictures = torch.rand(2, 3, 5, 7) * 2 - 1
    assert torch.equal(codec.decode(codec.encode(pictures)), pictures)
    assert codec.decode(3 * pictures).abs().max() <= 1


@pytest.mark.parametrize(("name", "channels", "factor"), [("kl", 4, 4), ("pipeline", 16, 4), ("taesd", 4, 2)])
def test_autoencoders_are_read_by_folder(folders: Path, name: str, channels: int, factor: int) -> None:
    codec = load_codec(str(folders / name))
    assert isinstance(codec, AutoencoderCodec)
    assert (codec.channels, codec.factor) == (channels, factor)
    assert not any(p.requires_grad for p in codec.model.parameters()) and not codec.model.training
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    field = codec.encode(pictures)
    assert field.shape == (2, channels, 16 // factor, 24 // factor)
    assert torch.equal(codec.encode(pictures), field)  # the mode of the latents, not a draw
    decoded = codec.decode(field)
    assert decoded.shape == pictures.shape and decoded.abs().max() <= 1


def test_latents_are_shifted_and_scaled_as_diffusers_does(folders: Path) -> None:
    codec, model = load_codec(str(folders / "kl")), tiny_kl().eval()
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pictures).latent_dist.mode()
        assert torch.allclose(codec.encode(pictures), (latents - 0.11) * 0.36, atol=1e-6)
        expected = model.decode(latents).sample.clamp(-1, 1)
        assert torch.allclose(codec.decode(codec.encode(pictures)), expected, atol=1e-5)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    def failing(*, config: str | None, weights: bytes | None = None) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config, encoding="utf-8")
        if weights is not None:
            (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        return str(folder)

    tiny_taesd().save_pretrained(tmp_path / "whole")
    config = (tmp_path / "whole" / "config.json").read_text(encoding="utf-8")
    weights = (tmp_path / "whole" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="VQModel"):
        load_codec(failing(config='{"_class_name": "VQModel"}'))
    with pytest.raises(ConfigError, match="no autoencoder"):
        load_codec(failing(config='{"model_type": "bert"}'))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_codec(failing(config=None))
    with pytest.raises(CheckpointError):
        load_codec(failing(config="{not json"))
    for broken in (None, b"", weights[:200], weights[:-50]):
        with pytest.raises(CheckpointError, match="weights of codec"):
            load_codec(failing(config=config, weights=broken))
    other = tmp_path / "other"
    tiny_kl().save_pretrained(other)
    with pytest.raises(CheckpointError, match="weights of codec"):
        load_codec(failing(config=config, weights=(other / "diffusion_pytorch_model.safetensors").read_bytes()))
