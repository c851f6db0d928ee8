"""What a codec loses: pictures encoded and decoded again, by PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from physformer_core.codec import Codec
from physformer_core.errors import DataError, SizeError

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5


@dataclass(frozen=True)
class Reconstruction:
    """Averages over pictures.

    Args:
        count: Pictures.
        psnr: Decibels, mean over pictures; None if every picture came back exactly.
        ssim: Mean over pictures, 1 for identical ones.
        exact: Pictures that came back exactly; they are left out of the mean of `psnr`.
    """

    count: int
    psnr: float | None
    ssim: float
    exact: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels of pictures [B, 3, H, W] in [0, 1]: [B]; infinite for identical ones."""
    return -10 * (first - second).double().square().mean((1, 2, 3)).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of pictures [B, C, H, W] in [0, 1]: [B].

    Gaussian window of 11 x 11 with sigma 1.5, only where it fits, mean over places and channels.

    Raises:
        SizeError: A side is below 11 pixels.
    """
    if min(first.shape[-2:]) < _SSIM_WINDOW:
        raise SizeError(f"SSIM needs pictures of at least {_SSIM_WINDOW} pixels a side")
    axis = torch.arange(_SSIM_WINDOW, dtype=torch.float64) - _SSIM_WINDOW // 2
    weights = torch.exp(-(axis**2) / (2 * _SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def blur(planes: Tensor) -> Tensor:
        flat = planes.double().reshape(-1, 1, *planes.shape[-2:])
        flat = torch.nn.functional.conv2d(flat, weights.view(1, 1, -1, 1))
        flat = torch.nn.functional.conv2d(flat, weights.view(1, 1, 1, -1))
        return flat.reshape(*planes.shape[:2], *flat.shape[-2:])

    a, b = first.double(), second.double()
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    index = index / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return index.mean((1, 2, 3))


@torch.inference_mode()
def reconstruct(
    pictures: Iterable[np.ndarray], codec: Codec, *, on_picture: Callable[[int], None] | None = None
) -> Reconstruction:
    """Encodes and decodes pictures one by one, and compares 8-bit pictures with 8-bit pictures.

    Args:
        pictures: RGB, uint8 [height, width, 3]; cut to whole codec cells at the right and the bottom.
        codec: What is judged.
        on_picture: Told how many are done.

    Raises:
        DataError: There are no pictures.
        SizeError: One is smaller than a cell of the codec or than SSIM's window.
    """
    decibels: list[float] = []
    similarities: list[float] = []
    for number, picture in enumerate(pictures, start=1):
        height, width = (side - side % codec.factor for side in picture.shape[:2])
        if not height or not width:
            raise SizeError(f"a picture of {picture.shape[1]}x{picture.shape[0]} is smaller than a cell of the codec")
        original = torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
        decoded = codec.decode(codec.encode(original * 2 - 1)) / 2 + 0.5
        decoded = (decoded.float() * 255).round().clamp(0, 255) / 255
        decibels.append(float(psnr(original, decoded)))
        similarities.append(float(ssim(original, decoded)))
        if on_picture is not None:
            on_picture(number)
    if not similarities:
        raise DataError("there are no pictures to reconstruct")
    finite = [value for value in decibels if np.isfinite(value)]
    return Reconstruction(
        len(similarities),
        float(np.mean(finite)) if finite else None,
        float(np.mean(similarities)),
        len(similarities) - len(finite),
    )
