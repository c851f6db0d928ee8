"""Between pictures and the field that the transformer works on: pixels themselves, or an autoencoder's latents."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from physformer_core.errors import CheckpointError, ConfigError


class Codec(ABC):
    """Field <-> picture.

    Attributes:
        name: As given to `load_codec`.
        channels: Channels of the field.
        factor: Pixels of the picture per element of the field, along one side.
    """

    name: str
    channels: int
    factor: int

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> field [B, channels, H / factor, W / factor]."""

    @abstractmethod
    def decode(self, field: Tensor) -> Tensor:
        """Field -> pictures [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what decides the field: the same wherever the weights lie and however they are stored."""


class PixelCodec(Codec):
    """The field is the picture."""

    name, channels, factor = "pixels", 3, 1

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, field: Tensor) -> Tensor:
        return field.clamp(-1, 1)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"pixels").hexdigest()


class AutoencoderCodec(Codec):
    """Latents of a diffusers ``AutoencoderKL`` or ``AutoencoderTiny``, shifted and scaled to unit variance.

    Args:
        name: Folder or hub name.
        model: The loaded autoencoder.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model.eval().requires_grad_(False)
        config = model.config
        self.channels = config.latent_channels
        blocks = config.get("down_block_types") or config.get("encoder_block_out_channels")
        self.factor = 2 ** (len(blocks) - 1)
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)

    def encode(self, pictures: Tensor) -> Tensor:
        encoded = self._model_for(pictures).encode(pictures)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents - self.shift) * self.scale

    def decode(self, field: Tensor) -> Tensor:
        return self._model_for(field).decode(field / self.scale + self.shift).sample.clamp(-1, 1)

    def fingerprint(self) -> str:
        # Keys that begin with "_" say where it was loaded from, and by which version.
        config = {key: value for key, value in self.model.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps([type(self.model).__name__, config], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _model_for(self, tensor: Tensor) -> Any:
        """The autoencoder, where the field is: the transformer's device may have changed since it was loaded."""
        return self.model.to(tensor.device)


def load_codec(name: str = "pixels") -> Codec:
    """``pixels``, or the folder or hub name of an autoencoder (a repository's ``vae`` subfolder is found).

    Raises:
        ConfigError: If the repository holds no known autoencoder.
        CheckpointError: If it cannot be read.
    """
    if name == "pixels":
        return PixelCodec()
    from diffusers import AutoencoderKL, AutoencoderTiny

    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    reasons = []
    for subfolder in ("", "vae"):
        try:
            config = AutoencoderKL.load_config(name, subfolder=subfolder or None)
        except (OSError, ValueError) as error:
            reasons.append(str(error).splitlines()[0])
            continue
        kind = config.get("_class_name", "model that is no autoencoder")
        if kind not in classes:
            raise ConfigError(f"'{name}' holds a {kind}", hint="known codecs: pixels, " + ", ".join(classes))
        try:
            model, loading = classes[kind].from_pretrained(
                name, subfolder=subfolder or None, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"cannot read the weights of codec '{name}' ({reason})", hint="fetch or copy them again"
            ) from error
        if loading["missing_keys"]:  # diffusers would leave them random, with a warning
            raise CheckpointError(
                f"the weights of codec '{name}' are not those of its {kind}: {loading['missing_keys'][0]} is missing",
                hint="fetch or copy them again",
            )
        return AutoencoderCodec(name, model)
    where = "is empty or has no config.json" if Path(name).exists() else "is no folder, and the hub did not answer"
    raise CheckpointError(f"cannot load codec '{name}': it {where} ({reasons[0]})", hint="'pixels' needs no download")
