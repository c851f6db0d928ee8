"""Levels: a picture is grown from a few dozen tokens to its full size, twice as large at each level.

Level 0 flows from noise. Level l > 0 flows from the upsampled level l - 1 plus a little noise to the sharp field: a
short path, on which a few steps are enough. Sizes run backwards from the target, so any width and height will do: by
halves where those end at the area that level 0 was trained on. Elsewhere one level grows by less, and all others by
two from such an area.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.errors import ConfigError

BASE_AREA = 32 * 32
"""Area in pixels that level 0 comes nearest to, in ratio."""

DETAIL_SCALE = 0.12
"""Root mean square of what blurring takes from crops of scenes, in field units."""

_NEAR = 1.02
"""How many times larger or smaller level 0's sides may be than the base area asks, to be reached by halving or to be
whole patches. A network knows things in the sizes that it was trained on: of pairs that were drawn a sixteenth smaller
half as many were found (docs/training-log.md)."""

_LONGER = (1.25, 1.75, 2.25)
"""Longer over shorter side of the wide and tall pictures that level 0 is trained on, beside square ones."""

_ODD_LEVEL = 3
"""The level that grows by less, or the last if there are fewer: what it takes of the level before is drawn anew. By
then what is shown is decided, and it costs little. At the last level it takes a fifth more work at 720p, for pictures
that were no better (docs/training-log.md)."""


@dataclass(frozen=True)
class LevelSize:
    """Size of one level.

    Args:
        level: 0 is the coarsest.
        height, width: The picture's own size at this level, which need not be whole patches.
        padded_height, padded_width: Rounded up to whole patches: what the network computes.
        factor: Elements of the finished field per element of this level, in each direction.
        growth: Elements of this level per element of the one before; 1 at level 0.
    """

    level: int
    height: int
    width: int
    padded_height: int
    padded_width: int
    factor: float
    growth: float

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
        base_area: Area of level 0 in field elements; of a square one, if `base_widening` is above 0.
        base_widening: Power of the picture's longer side over its shorter one by which level 0's area grows, 0 to 1: at
            0 every shape has the same area, at 1 the same shorter side, so that things as large as the shorter side
            allows have as many elements in wide pictures as in square ones.
        patch_size: Levels are rounded up to whole patches.
        base_patch_size: Side of level 0's patches; 0: as at the others.
    """

    start_noise: float = 0.25
    coarse_noise: float = 0.05
    base_area: int = BASE_AREA
    base_widening: float = 0.0
    patch_size: int = 8
    base_patch_size: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.start_noise < math.inf and 0 <= self.coarse_noise < math.inf):
            raise ConfigError("start_noise must be above 0 and coarse_noise at least 0")
        if self.patch_size < 1 or self.base_patch_size < 0:
            raise ConfigError("patch_size must be at least 1, and base_patch_size at least 0")
        if self.base_area < 1:
            raise ConfigError(f"base_area must be at least 1, not {self.base_area}", hint="1024 is 32x32 elements")
        if not 0 <= self.base_widening <= 1:
            raise ConfigError(
                f"base_widening must be from 0 to 1, not {self.base_widening:g}",
                hint="0: level 0 of every shape has the same area; 1: the same shorter side",
            )

    def area_of_base(self, height: float, width: float) -> float:
        """Area in elements that level 0 of a field of this shape should have."""
        return self.base_area * (max(height, width) / min(height, width)) ** self.base_widening

    def level_sizes(self, height: int, width: int) -> list[LevelSize]:
        """Sizes of all levels of a field of this size, coarsest first."""
        first = self._first_factor(height, width)
        last = math.ceil(math.log2(first) - 0.05)  # hardly more than twice, rather than one level more
        odd = min(_ODD_LEVEL, last)
        factors = [first / 2**level if level < odd else 2.0 ** (last - level) for level in range(last + 1)]
        sizes = []
        for level, factor in enumerate(factors):
            h, w = (math.ceil(side / factor - 1e-9) for side in (height, width))
            growth = factors[level - 1] / factor if level else 1.0
            padded_h, padded_w = (_whole(side, self._base_patch if level == 0 else self.patch_size) for side in (h, w))
            sizes.append(LevelSize(level, h, w, padded_h, padded_w, factor, growth))
        return sizes

    @property
    def _base_patch(self) -> int:
        return self.base_patch_size or self.patch_size

    def training_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of whole pictures to train level 0 on: a square, and three wide and tall shapes."""
        unit, sizes = self._training_unit, []
        for ratio in (1.0, *_LONGER):
            shorter = math.sqrt(self.area_of_base(1, ratio) / ratio)
            short, long = (max(1, round(side / unit)) * unit for side in (shorter, shorter * ratio))
            sizes += [(short, long)] if ratio == 1 else [(short, long), (long, short)]
        return tuple(dict.fromkeys(sizes))

    @property
    def _training_unit(self) -> int:
        """Sides of pictures to train level 0 on are multiples of it: whole patches, and even, as sets store them."""
        return math.lcm(self._base_patch, 2)

    def why_not_begun(self, sizes: Sequence[tuple[int, int]]) -> str | None:
        """What is wrong with the first of these whole pictures that is not what a picture of its shape begins with.

        A network draws what it was trained on, so they must be rounded to whole patches from a size within 2 % of what
        `area_of_base` asks for.

        Args:
            sizes: (height, width) in elements of the field.
        """
        patch, rounding = self._base_patch, self._training_unit / 2
        if self.base_widening == 0:  # sets of one area were made of multiples of 8, whatever the patches
            rounding = max(rounding, 4)

        def larger(height: float, width: float) -> float:
            return math.sqrt(height * width / self.area_of_base(height, width))  # grows with either side

        for height, width in sizes:
            named = f"this set's whole pictures have {width}x{height} elements"
            if height % patch or width % patch:
                return f"{named}, which are not whole patches of {patch}"
            most = larger(height + rounding, width + rounding)
            least = larger(max(1, height - rounding), max(1, width - rounding))
            if most < 1 / _NEAR or least > _NEAR:
                begun = larger(height, width)
                return (
                    f"{named}, where pictures of that shape begin with {width / begun:.0f}x{height / begun:.0f}: "
                    "a size that would not be trained"
                )
        return None

    def _first_factor(self, height: int, width: int) -> float:
        """Elements of the finished field per element of level 0, in each direction: 1 for a single level.

        A power of two where that leads to the base area, within `_NEAR`. Else what wastes least on padding, as near.
        """
        ideal = math.sqrt(height * width / self.area_of_base(height, width))
        halvings = 2.0 ** max(0, round(math.log2(ideal)))
        if halvings == 1 or 1 / _NEAR <= ideal / halvings <= _NEAR:
            return halvings
        candidates, patch = [ideal], self._base_patch
        for side in (height, width):  # whole patches along one side
            fewest, most = (side / (patch * ideal * times) for times in (_NEAR, 1 / _NEAR))
            candidates += [side / (patch * count) for count in range(math.ceil(fewest), math.floor(most) + 1) if count]

        def waste(factor: float) -> float:
            return _whole(height / factor, patch) * _whole(width / factor, patch) / (height * width / factor**2)

        return min(candidates, key=waste)

    @staticmethod
    def blur(sharp: Tensor) -> Tensor:
        """What the next coarser level knows of a field [B, C, H, W]: area-averaged to half and upsampled again."""
        return Pyramid.upsample(F.avg_pool2d(sharp, 2))

    @staticmethod
    def upsample(coarse: Tensor) -> Tensor:
        """Twice the resolution, bilinearly."""
        return F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)

    def coarse_for(self, previous: Tensor, size: LevelSize) -> Tensor:
        """The coarser level's padded field, upsampled to this level's padded size, where it ends by its edge."""
        doubles = abs(size.growth - 2) < 1e-6
        wanted = (math.ceil(side / size.growth) + (not doubles) for side in (size.padded_height, size.padded_width))
        below, behind = (max(0, most - side) for most, side in zip(wanted, previous.shape[-2:], strict=True))
        if below or behind:
            previous = F.pad(previous, (0, behind, 0, below), mode="replicate")
        if doubles:
            return self.upsample(previous)[:, :, : size.padded_height, : size.padded_width]
        # To half of this level's size first: a network learns to sharpen what was doubled, and of what grew by less,
        # which is sharper, it makes blocks with halos. What that takes of the level before is drawn anew, as often as
        # levels grow by less: so only one does. Pixels' centres stay where they are in the picture, so the ratio
        # is that of the factors, not of the sizes.
        half = F.interpolate(
            previous,
            scale_factor=size.growth / 2,
            mode="bicubic",
            align_corners=False,
            recompute_scale_factor=False,
            antialias=True,
        )
        return self.upsample(half)[:, :, : size.padded_height, : size.padded_width]

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


def _whole(side: float, patch: int) -> int:
    """A side rounded up to whole patches."""
    return math.ceil(side / patch - 1e-9) * patch


def picture_seed(seed: int, index: int, level: int, purpose: str = "start") -> int:
    """Seed of the noise of picture ``index`` at ``level``: independent of batch, tile and device."""
    digest = hashlib.sha256(f"physformer:{seed}:{index}:{level}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def picture_noise(shape: tuple[int, int, int], seed: int, index: int, level: int, purpose: str = "start") -> Tensor:
    """Standard normal noise [C, H, W] drawn on the CPU in float32 from (seed, index, level) alone."""
    generator = torch.Generator().manual_seed(picture_seed(seed, index, level, purpose))
    return torch.randn(shape, generator=generator)
