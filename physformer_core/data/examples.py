"""What one raw example becomes: whole pictures of level 0, and crops of finer levels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from physformer_core.data import framing
from physformer_core.data.preprocess_config import PreprocessConfig

_MAX_ZOOM = 1.18
# A bitmap is decoded at so many times the resolution that is wanted of it: averaged by 1.6 after its decoder averaged
# it by 8, a picture full of detail came out with a tenth less contrast than averaged by 12.8 at once.
_SPARE = 2


@dataclass(frozen=True)
class Example:
    """One training example, in pixels.

    Attributes:
        kind: "base" or "crop".
        pixels: uint8 [height, width, 3].
        coarse: The same window at half the resolution, one level down; None for whole pictures, and where the codec is
            of pixels: there it is the average of `pixels`, which the loader takes.
        columns: What else is stored: level and place of a crop.
    """

    kind: str
    pixels: np.ndarray
    coarse: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """All that a raw example becomes.

    Attributes:
        bucket: (height, width) in elements of the field.
        cut: Share of the picture's area that the bucket cuts off.
        examples: Pictures first.
    """

    bucket: tuple[int, int]
    cut: float
    examples: list[Example]


def split_of(key: str, validation_fraction: float) -> str:
    """The side of an example, "train" or "validation".

    Of its key alone: it stays there whatever the seed, so that no later set trains on what judged it.
    """
    share = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def chances(config: PreprocessConfig, key: str) -> list[float]:
    """All that chance says of an example, in [0, 1), of the configuration's seed and the example's key alone."""
    digest = hashlib.sha256(f"{config.seed}/{key}".encode()).digest()
    # The words of a whole number, lowest first, which numpy is quicker to take than the number.
    rng = np.random.default_rng(np.frombuffer(digest[15::-1], "<u4"))
    crops = math.ceil(config.crops_per_example)
    count = 3 * (config.base_views - 1) + 1 + crops * framing.chances_of_window(config.crop_candidates)
    return rng.random(count).tolist()


def make_examples(
    raw: dict[str, Any], config: PreprocessConfig, factor: int = 1, *, chance: Sequence[float] | None = None
) -> Made:
    """Frames a raw example and cuts crops from it.

    Args:
        raw: Row of a raw set.
        config: How. All draws are from its seed and the example's key.
        factor: Pixels per element of the field.
        chance: Its `chances`, where they are known already.

    Raises:
        UnusablePicture: It cannot become a training example.
    """
    bitmap = None
    height, width = raw["height"], raw["width"]
    if raw["svg"] is None:
        if raw["image"] is None:
            raise framing.UnusablePicture("no picture")
        bitmap = framing.EncodedBitmap(raw["image"])
        height, width = bitmap.height, bitmap.width
    bucket = framing.nearest_bucket(height, width, config.buckets)
    kept = framing.kept_area(height, width, bucket)
    if kept < config.min_kept_area:
        raise framing.UnusablePicture("too long or too tall for every bucket")
    pixels = bucket[0] * factor, bucket[1] * factor
    reduction = math.inf if bitmap is None else framing.reduction_to(pixels, height, width)
    max_level = framing.DRAWN_LEVELS if bitmap is None else framing.finest_level(reduction)

    # All draws come first: they decide how finely a bitmap is decoded.
    views: list[tuple[float, tuple[float, float]]] = [(1.0, (0.5, 0.5))]
    draws: list[framing.WindowDraw] = []
    has_crops = config.crops_per_example > 0 and max_level >= min(config.levels)
    if config.base_views > 1 or has_crops:
        told = iter(chances(config, raw["key"]) if chance is None else chance)
        for _ in range(1, config.base_views):
            zoom, down, across = next(told), next(told), next(told)
            views.append((1 + zoom * (_MAX_ZOOM - 1), (down, across)))
        crops = math.floor(config.crops_per_example) + (next(told) < config.crops_per_example % 1)
        for _ in range(crops):
            draw = framing.draw_window(
                told,
                max_level,
                levels=config.levels,
                weights=config.level_weights,
                candidates=config.crop_candidates,
                variance_fraction=config.variance_fraction,
            )
            if draw is not None:
                draws.append(draw)

    image, shrunk = None, 1
    if bitmap is not None:
        finest = max((draw.level for draw in draws), default=0)
        needed = max(2**finest, max(zoom for zoom, _ in views))
        image, shrunk = bitmap.decode(grey=True, shrink=reduction / needed / _SPARE)

    def frame(zoom: float, offset: tuple[float, float]) -> framing.FramedPicture:
        if image is not None:
            return framing.FramedBitmap(image, pixels, zoom=zoom, offset=offset, size=(height, width), shrunk=shrunk)
        return framing.FramedDrawing(raw["svg"], (height, width), pixels, zoom=zoom, offset=offset)

    pictures = [frame(*view) for view in views]
    wholes = [picture.whole() for picture in pictures]
    made = [Example("base", whole) for whole in wholes]
    for draw in draws:
        window = draw.choose(pictures[0], wholes[0], size=config.crop_size * factor, grid=8 * factor)
        # An autoencoder's latents of a small picture are no average of those of the large one: a level starts from the
        # former when a picture is drawn, so a crop of latents needs them.
        coarse = None if config.codec == "pixels" else pictures[0].pixels(window.halved())
        columns = {"level": window.level, "place": pictures[0].place(window)}
        made.append(Example("crop", pictures[0].pixels(window), coarse, columns))
    return Made(bucket, 1 - kept, made)
