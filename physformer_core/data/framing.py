"""From a raw picture of any size to a bucket's frame, and pixels of any window of it at any level.

A level-l picture of a bucket (height, width) has height * 2^l by width * 2^l pixels. Every level shows the same frame:
the picture cut, never stretched, to the bucket's aspect. Windows come straight from the source at the level's
resolution: vector art is rasterised there, a bitmap is averaged over areas once, and never enlarged.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from physformer_core.data.scenes.render import render_svg
from physformer_core.errors import DataError

# Windows are compared at a quarter of their size: enough to tell a face from a sky, 16 times less to draw.
_VARIANCE_SHRINK = 4


class UnusablePicture(Exception):
    """A picture that cannot become a training example. The message is the reason under which it is counted."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a level's picture, in that level's pixels."""

    level: int
    top: int
    left: int
    height: int
    width: int


class FramedPicture(ABC):
    """A picture cut to a bucket.

    Attributes:
        bucket: (height, width) in pixels at level 0.
        max_level: The highest level that the source has the resolution for.
    """

    bucket: tuple[int, int]
    max_level: int

    def level_size(self, level: int) -> tuple[int, int]:
        """(height, width) in pixels of the whole picture at a level."""
        return self.bucket[0] << level, self.bucket[1] << level

    def whole(self) -> np.ndarray:
        """The level-0 picture: uint8 [height, width, 3]."""
        return self.pixels(Window(0, 0, 0, *self.bucket))

    def place(self, window: Window) -> tuple[float, float, float, float]:
        """(y0, x0, y1, x1) of a window as fractions of the whole picture."""
        height, width = self.level_size(window.level)
        return (
            window.top / height,
            window.left / width,
            (window.top + window.height) / height,
            (window.left + window.width) / width,
        )

    def variance(self, window: Window) -> float:
        """How much happens in a window: pixel variance over its area, of a small rendering."""
        return float(self._render(window, _VARIANCE_SHRINK).astype(np.float32).var(axis=(0, 1)).sum())

    def pixels(self, window: Window) -> np.ndarray:
        """A window at full resolution: uint8 [height, width, 3]."""
        return self._render(window, 1)

    @abstractmethod
    def _render(self, window: Window, shrink: int) -> np.ndarray: ...


class FramedDrawing(FramedPicture):
    """An SVG cut to a bucket; it has every level.

    Args:
        svg: The document.
        size: (height, width) that its viewBox stands for; only the ratio matters.
        bucket: (height, width) at level 0.
        zoom: 1 shows as much as the aspect allows, 1.1 a tenth less in each direction.
        offset: Where the frame lies in what is left over, as (y, x) fractions; the middle by default.
    """

    def __init__(
        self,
        svg: str,
        size: tuple[int, int],
        bucket: tuple[int, int],
        *,
        zoom: float = 1.0,
        offset: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        self._svg = svg
        self.bucket = bucket
        self.max_level = 30
        scale = max(bucket[0] / size[0], bucket[1] / size[1]) * zoom
        # Even sizes, so that the frame's place is a whole number of pixels at every level.
        self._full = tuple(max(side, 2 * round(raw * scale / 2)) for side, raw in zip(bucket, size, strict=True))
        self._origin = tuple(
            round((full - side) * part) for full, side, part in zip(self._full, bucket, offset, strict=True)
        )

    def _render(self, window: Window, shrink: int) -> np.ndarray:
        level = window.level
        try:
            return render_svg(
                self._svg,
                window.width // shrink,
                window.height // shrink,
                full_width=(self._full[1] << level) // shrink,
                full_height=(self._full[0] << level) // shrink,
                top=((self._origin[0] << level) + window.top) // shrink,
                left=((self._origin[1] << level) + window.left) // shrink,
            )
        except DataError as error:
            raise UnusablePicture("cannot be drawn") from error


class FramedBitmap(FramedPicture):
    """A bitmap cut to a bucket.

    Args:
        image: RGB.
        bucket, zoom, offset: As in `FramedDrawing`; a zoom that would need more resolution than there is is lowered.

    Raises:
        UnusablePicture: The picture is smaller than the bucket.
    """

    def __init__(
        self,
        image: Image.Image,
        bucket: tuple[int, int],
        *,
        zoom: float = 1.0,
        offset: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        self._image = image
        self.bucket = bucket
        reduction = min(image.height / bucket[0], image.width / bucket[1])  # source pixels per level-0 pixel
        if reduction < 1:
            raise UnusablePicture("smaller than its bucket")
        self._reduction = max(1.0, reduction / zoom)
        self.max_level = int(math.log2(self._reduction) + 1e-9)
        self._origin = (
            (image.height - bucket[0] * self._reduction) * offset[0],
            (image.width - bucket[1] * self._reduction) * offset[1],
        )

    def _render(self, window: Window, shrink: int) -> np.ndarray:
        step = self._reduction / 2**window.level  # source pixels per pixel of this level, at least 1
        top, left = self._origin[0] + window.top * step, self._origin[1] + window.left * step
        rows = _overlaps(top, step * shrink, window.height // shrink, self._image.height)
        columns = _overlaps(left, step * shrink, window.width // shrink, self._image.width)
        first_row, last_row = rows[0][0], rows[-1][0] + len(rows[-1][1])
        first, last = columns[0][0], columns[-1][0] + len(columns[-1][1])
        source = np.asarray(self._image.crop((first, first_row, last, last_row)))
        across = np.zeros((len(columns), last - first), np.float32)
        for index, (start, weights) in enumerate(columns):
            across[index, start - first : start - first + len(weights)] = weights
        pixels = np.empty((len(rows), len(columns), 3), np.float32)
        for index, (start, weights) in enumerate(rows):
            band = source[start - first_row : start - first_row + len(weights)].astype(np.float32)
            pixels[index] = across @ np.tensordot(weights, band, 1)
        return np.rint(pixels).astype(np.uint8)


def _overlaps(start: float, step: float, count: int, limit: int) -> list[tuple[int, np.ndarray]]:
    """For each of `count` intervals of length `step` from `start` on: the first source pixel under it, and the
    fractions of the interval that this one and the next ones cover.

    Pillow's box filter is no substitute: it takes or leaves whole pixels, so at a reduction of 1.3 it only drops some.
    """
    overlaps = []
    for index in range(count):
        low, high = start + index * step, min(start + (index + 1) * step, limit)
        first, last = int(low + 1e-6), max(math.ceil(high - 1e-6), int(low + 1e-6) + 1)
        pixels = np.arange(first, min(last, limit))
        covered = np.minimum(pixels + 1, high) - np.maximum(pixels, low)
        overlaps.append((first, (covered / covered.sum()).astype(np.float32)))
    return overlaps


def open_bitmap(encoded: bytes) -> Image.Image:
    """Decodes a picture: upright (EXIF), RGB, transparent parts on white.

    Raises:
        UnusablePicture: It cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnusablePicture("cannot be decoded") from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def nearest_bucket(height: float, width: float, buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose aspect is nearest on a logarithmic scale; the first of equals."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - aspect))


def kept_area(height: float, width: float, bucket: tuple[int, int]) -> float:
    """The fraction of a picture's area that its bucket shows, (0, 1]."""
    ratio = (width / height) / (bucket[1] / bucket[0])
    return min(ratio, 1 / ratio)


def choose_window(
    picture: FramedPicture,
    rng: np.random.Generator,
    *,
    levels: tuple[int, ...],
    weights: tuple[float, ...],
    size: int,
    candidates: int,
    variance_fraction: float,
) -> Window | None:
    """Draws a level and a window of it, whose offsets are multiples of 8 pixels.

    Args:
        picture: The picture.
        rng: Always advanced by as many draws, whatever comes out.
        levels, weights: Levels to draw from and their relative frequencies. Levels beyond the picture's resolution
            are left out.
        size: Side of the window in pixels, a multiple of 8; a picture that is smaller in one direction is shown
            whole in that direction.
        candidates: How many windows are drawn.
        variance_fraction: How often the liveliest candidate is kept, instead of the first.

    Returns:
        The window, or None if the picture has none of the levels.
    """
    pick, lively, places = rng.random(), rng.random() < variance_fraction, rng.random((candidates, 2))
    possible = [(level, weight) for level, weight in zip(levels, weights, strict=True) if level <= picture.max_level]
    total = sum(weight for _, weight in possible)
    if total <= 0:
        return None
    level, passed = possible[-1][0], 0.0
    for candidate, weight in possible:
        passed += weight / total
        if pick < passed:
            level = candidate
            break
    full_height, full_width = picture.level_size(level)
    height, width = min(size, full_height), min(size, full_width)
    windows = [
        Window(
            level,
            8 * int(y * ((full_height - height) // 8 + 1)),
            8 * int(x * ((full_width - width) // 8 + 1)),
            height,
            width,
        )
        for y, x in places
    ]
    if not lively or len(set(windows)) == 1:
        return windows[0]
    return max(windows, key=picture.variance)
