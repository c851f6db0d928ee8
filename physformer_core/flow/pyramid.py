"""Levels: a picture is grown from a few dozen tokens to its full size, twice as large at each level.

Level 0 flows from noise. Level l > 0 flows from the upsampled level l - 1 plus a little noise to the sharp field: a
short path, on which a few steps are enough. Sizes run backwards from the target, so any width and height will do.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.errors import ConfigError

BASE_AREA = 32 * 32
"""Area in pixels that level 0 comes nearest to, in ratio."""

DETAIL_SCALE = 0.12
"""Root mean square of what blurring takes from crops of scenes, in field units."""


@dataclass(frozen=True)
class LevelSize:
    """Size of one level.

    Args:
        level: 0 is the coarsest.
        height, width: The picture's own size at this level, which need not be whole patches.
        padded_height, padded_width: Rounded up to whole patches: what the network computes.
    """

    level: int
    height: int
    width: int
    padded_height: int
    padded_width: int

    @property
    def place(self) -> tuple[float, float, float, float]:
        """Box of the padded field in the picture: reaches beyond 1 where the field is padded."""
        return (0.0, 0.0, self.padded_height / self.height, self.padded_width / self.width)


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """The recipe that levels share between training and sampling.

    Args:
        start_noise: Standard deviation of the noise added to the upsampled field where a finer level starts.
        coarse_noise: Standard deviation of the noise on the coarse field that the network is shown, so that it
            does not trust the coarser level's small errors.
        base_area: Area of level 0 in field elements.
        patch_size: Levels are rounded up to whole patches.
    """

    start_noise: float = 0.25
    coarse_noise: float = 0.05
    base_area: int = BASE_AREA
    patch_size: int = 8

    def __post_init__(self) -> None:
        if self.start_noise <= 0 or self.coarse_noise < 0:
            raise ConfigError("start_noise must be above 0 and coarse_noise at least 0")
        if self.base_area < 1:
            raise ConfigError(f"base_area must be at least 1, not {self.base_area}", hint="1024 is 32x32 elements")

    def level_sizes(self, height: int, width: int, levels: int | None = None) -> list[LevelSize]:
        """Sizes of all levels, coarsest first.

        Args:
            height, width: Size of the finished field.
            levels: Number of levels; by default as many as bring level 0 nearest to ``base_area``.
        """
        if levels is None:
            levels = 1 + max(0, round(math.log2(height * width / self.base_area) / 2))
        sizes = []
        for level in range(levels):
            factor = 2 ** (levels - 1 - level)
            h, w = -(-height // factor), -(-width // factor)
            p = self.patch_size
            sizes.append(LevelSize(level, h, w, -(-h // p) * p, -(-w // p) * p))
        return sizes

    @staticmethod
    def blur(sharp: Tensor) -> Tensor:
        """What the next coarser level knows of a field [B, C, H, W]: area-averaged to half and upsampled again."""
        return Pyramid.upsample(F.avg_pool2d(sharp, 2))

    @staticmethod
    def upsample(coarse: Tensor) -> Tensor:
        """Twice the resolution, bilinearly."""
        return F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)

    def coarse_for(self, previous: Tensor, size: LevelSize) -> Tensor:
        """The coarser level's padded field, upsampled and cut to this level's padded size."""
        return self.upsample(previous)[:, :, : size.padded_height, : size.padded_width]

    def start(self, coarse: Tensor | None, noise: Tensor) -> Tensor:
        """x0 of a level: noise at level 0, the blurred field plus a little noise above."""
        return noise if coarse is None else coarse + self.start_noise * noise

    @staticmethod
    def sample(coarse: Tensor | None, output: Tensor) -> Tensor:
        """The sharp field that a network's output means: itself at level 0, scaled detail upon the coarse above.

        The scale keeps the network's output at unit size on every level. Without it, training fine levels together
        with level 0 diverged within 20 steps.
        """
        return output if coarse is None else coarse + DETAIL_SCALE * output

    @staticmethod
    def velocity_scale(is_base: bool) -> float:
        """Rough size of what a level's velocities must guess, by which losses of levels are made comparable."""
        return 1.0 if is_base else DETAIL_SCALE


def picture_seed(seed: int, index: int, level: int, purpose: str = "start") -> int:
    """Seed of the noise of picture ``index`` at ``level``: independent of batch, tile and device."""
    digest = hashlib.sha256(f"physformer:{seed}:{index}:{level}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def picture_noise(shape: tuple[int, int, int], seed: int, index: int, level: int, purpose: str = "start") -> Tensor:
    """Standard normal noise [C, H, W] drawn on the CPU in float32 from (seed, index, level) alone."""
    generator = torch.Generator().manual_seed(picture_seed(seed, index, level, purpose))
    return torch.randn(shape, generator=generator)
