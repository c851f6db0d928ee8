"""What the stored field of a set is: pixels as they are, or an autoencoder's latents of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from physformer_core.data.workers import one_thread
from physformer_core.errors import DataError

if TYPE_CHECKING:
    from physformer_core.codec import Codec


@dataclass(frozen=True)
class FieldSpec:
    """The field of a preprocessed set.

    Attributes:
        codec: As for `codec.load_codec`.
        channels: Channels of the field.
        factor: Pixels per element of the field, along one side.
        sha256: The codec's fingerprint; None for pixels.
        device: What encodes, as "cpu" or "cuda:1"; of one that is read from a manifest its kind, which decides the last
            bits. None for pixels.
    """

    codec: str = "pixels"
    channels: int = 3
    factor: int = 1
    sha256: str | None = None
    device: str | None = None

    @property
    def is_pixels(self) -> bool:
        """Whether pixels are stored, as uint8; latents are float16."""
        return self.codec == "pixels"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.is_pixels else np.float16)

    def element_bytes(self, height: int, width: int) -> int:
        """Bytes of a stored field of that size."""
        return height * width * self.channels * self.dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """For a manifest, and for what a set is known by: any GPU gives what another does."""
        return dataclasses.asdict(self) | {"device": self.device and self.device.partition(":")[0]}


def field_of(codec_name: str, device: str) -> FieldSpec:
    """The field that a codec gives. Loads the codec.

    Raises:
        ConfigError, CheckpointError: As `load_codec`.
        DeviceError: The device does not exist here.
    """
    if codec_name == "pixels":
        return FieldSpec()
    codec = loaded_codec(codec_name, device)
    return FieldSpec(codec_name, codec.channels, codec.factor, codec.fingerprint(), device)


@functools.lru_cache(maxsize=1)
def loaded_codec(name: str, device: str) -> Codec:
    """A codec, loaded once per process."""
    from physformer_core.codec import AutoencoderCodec, load_codec
    from physformer_core.hardware import resolve_device

    target = resolve_device(device)
    codec = load_codec(name)
    if isinstance(codec, AutoencoderCodec):
        codec.model.to(target)
    return codec


def encode_pictures(field: FieldSpec, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Latents of pictures of one size.

    Args:
        field: What to encode with.
        pictures: uint8 [height, width, 3] each.

    Returns:
        float16 [n, height / factor, width / factor, channels].

    Raises:
        DataError: The autoencoder gives what float16 cannot hold.
    """
    import torch

    assert field.device is not None
    codec = loaded_codec(field.codec, field.device)
    # Sums depend on the number of threads, and so would the last bits of a latent on the number of processes.
    with one_thread(), torch.inference_mode():
        pixels = torch.from_numpy(np.stack(pictures)).to(field.device).permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)
        latents = codec.encode(pixels).permute(0, 2, 3, 1).to(torch.float16).cpu().numpy()
    if not np.isfinite(latents).all():
        raise DataError(
            f"the autoencoder '{field.codec}' gives latents beyond the range of float16",
            hint="check its scaling_factor, or take another one",
        )
    return latents


def decode_picture(field: FieldSpec, stored: np.ndarray) -> np.ndarray:
    """The picture that a stored field means: itself, or what the autoencoder makes of it on the CPU.

    Args:
        field: What is stored.
        stored: uint8 or float16 [height, width, channels].

    Returns:
        uint8 [height * factor, width * factor, 3].
    """
    if field.is_pixels:
        return stored
    import torch

    codec = loaded_codec(field.codec, "cpu")
    with torch.inference_mode():
        latents = torch.from_numpy(stored.astype(np.float32)).permute(2, 0, 1)[None]
        picture = codec.decode(latents)[0].permute(1, 2, 0)
    return (picture * 0.5 + 0.5).mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
