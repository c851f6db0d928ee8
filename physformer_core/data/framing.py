"""From a raw picture of any size to a bucket's frame, and pixels of any window of it at any level.

A level-l picture of a bucket (height, width) has height * 2^l by width * 2^l pixels. Every level shows the same frame:
the picture cut, never stretched, to the bucket's aspect. Windows come straight from the source at the level's
resolution: vector art is rasterised there, a bitmap is averaged over areas once, and never enlarged. A JPEG of which
only coarse levels are wanted is decoded at a half, a quarter or an eighth, which takes a fraction of the time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from physformer_core.data.averages import Pixels, area_average, intervals
from physformer_core.data.scenes.render import render_svg
from physformer_core.errors import DataError

DRAWN_LEVELS = 30
"""The highest level of vector art: it has every one."""


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

    def halved(self) -> Window:
        """The same rectangle one level down. All sides and offsets must be even."""
        return Window(self.level - 1, self.top // 2, self.left // 2, self.height // 2, self.width // 2)


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

    @abstractmethod
    def pixels(self, window: Window) -> np.ndarray:
        """A window at full resolution: uint8 [height, width, 3]."""


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
        self.max_level = DRAWN_LEVELS
        scale = max(bucket[0] / size[0], bucket[1] / size[1]) * zoom
        # Even sizes, so that the frame's place is a whole number of pixels at every level.
        self._full = tuple(max(side, 2 * round(raw * scale / 2)) for side, raw in zip(bucket, size, strict=True))
        self._origin = tuple(
            round((full - side) * part) for full, side, part in zip(self._full, bucket, offset, strict=True)
        )

    def pixels(self, window: Window) -> np.ndarray:
        level = window.level
        try:
            return render_svg(
                self._svg,
                window.width,
                window.height,
                full_width=self._full[1] << level,
                full_height=self._full[0] << level,
                top=(self._origin[0] << level) + window.top,
                left=(self._origin[1] << level) + window.left,
            )
        except DataError as error:
            raise UnusablePicture("cannot be drawn") from error


class FramedBitmap(FramedPicture):
    """A bitmap cut to a bucket.

    Args:
        image: RGB, or grey (mode "L"), which is averaged in a third of the time.
        bucket, zoom, offset: As in `FramedDrawing`; a zoom that would need more resolution than there is is lowered.
        size: (height, width) of the picture, if `image` is it decoded smaller (`EncodedBitmap.decode`).
        shrunk: How many times smaller. Levels that need more than `image` has are then an error.

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
        size: tuple[int, int] | None = None,
        shrunk: int = 1,
    ) -> None:
        height, width = size or (image.height, image.width)
        self._image = image
        self.bucket = bucket
        reduction = max(1.0, reduction_to(bucket, height, width) / zoom)
        self.max_level = finest_level(reduction)
        # Pixels of `image` per pixel of level 0. The last one of a smaller picture may be there in part only.
        self._reduction = reduction / shrunk
        self._origin = (
            (height / shrunk - bucket[0] * self._reduction) * offset[0],
            (width / shrunk - bucket[1] * self._reduction) * offset[1],
        )

    def pixels(self, window: Window) -> np.ndarray:
        height, width = window.height, window.width
        step = self._reduction / 2**window.level  # source pixels per pixel of the window's level
        if step < 1 - 1e-9:
            raise ValueError(f"level {window.level} of a picture that was decoded for coarser ones")
        top, left = self._origin[0] + window.top * step, self._origin[1] + window.left * step
        if step.is_integer() and top.is_integer() and left.is_integer():
            whole = int(step)
            box = (int(left), int(top), int(left) + width * whole, int(top) + height * whole)
            pixels = np.asarray(self._image.reduce(whole, box) if whole > 1 else self._image.crop(box))
        else:
            rows = intervals(top, step, height, self._image.height)
            pixels = area_average(self._pixels, rows, intervals(left, step, width, self._image.width))
        return pixels if pixels.shape[2:] == (3,) else np.repeat(pixels.reshape(height, width, 1), 3, axis=2)

    @functools.cached_property
    def _pixels(self) -> Pixels:
        return Pixels.of_image(self._image)


class EncodedBitmap:
    """A bitmap's file, of which so much has been read that its size is known.

    Args:
        encoded: The file's content.

    Attributes:
        height, width: In pixels, upright (EXIF).

    Raises:
        UnusablePicture: It cannot be read.
    """

    height: int
    width: int

    def __init__(self, encoded: bytes) -> None:
        orientation = 1
        with _readable():
            self._image: Image.Image = Image.open(io.BytesIO(encoded))
            if self._image.format == "JPEG":
                if may_be_turned(self._image):
                    orientation = self._image.getexif().get(_ORIENTATION, 1)
            else:  # what says which side is up may stand behind the pixels
                self._load()
        self._turned = orientation != 1
        self.width, self.height = self._image.size[::-1] if orientation in _SIDEWAYS else self._image.size

    def decode(self, *, grey: bool = False, shrink: float = 1) -> tuple[Image.Image, int]:
        """Decodes it: upright, RGB, transparent parts on white. To be called once.

        Args:
            grey: Leave pictures of one channel of 8 bits (mode "L") as they are.
            shrink: It may be so many times smaller. Only JPEGs become smaller, by 2, 4 or 8: their blocks are decoded
                without the finest frequencies, which is an average but for rounding and a little ringing.

        Returns:
            The picture, and how many times smaller it is. A side is rounded up: its last pixel may be there in part.

        Raises:
            UnusablePicture: It cannot be decoded.
        """
        image, shrunk = self._image, 1
        with _readable():
            if image.format == "JPEG":
                # A turn would bring the pixel that is there in part to the front, and shift the picture.
                if shrink >= 2:
                    shrunk = max(
                        scale
                        for scale in (1, 2, 4, 8)
                        if scale <= shrink and not (self._turned and (image.width % scale or image.height % scale))
                    )
                if shrunk > 1:
                    image.draft(None, (max(1, image.width // shrunk), max(1, image.height // shrunk)))
                self._load()
        return _plain(image, grey), shrunk

    def _load(self) -> None:
        self._image.load()
        if may_be_turned(self._image):
            ImageOps.exif_transpose(self._image, in_place=True)


_ORIENTATION = 0x0112
_TURNING_NOTES = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
# Its values that exchange height and width.
_SIDEWAYS = (5, 6, 7, 8)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnusablePicture("cannot be decoded") from error


def open_bitmap(encoded: bytes) -> Image.Image:
    """Decodes a picture whole: upright (EXIF), RGB, transparent parts on white.

    Args:
        encoded: The file's content.

    Raises:
        UnusablePicture: It cannot be decoded.
    """
    return EncodedBitmap(encoded).decode()[0]


def _plain(image: Image.Image, grey: bool) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:  # nearly every one
        return image
    if image.mode == "I":  # 32 bits: what writes these means 16
        low, high = image.getextrema()
        if not 0 <= int(low) <= int(high) <= 0xFFFF:  # type: ignore[arg-type]
            raise UnusablePicture(f"has values from {low} to {high}, more than 16 bits")
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnusablePicture("has pixels that are not whole numbers")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" or (grey and image.mode == "L") else image.convert("RGB")


def may_be_turned(image: Image.Image) -> bool:
    """Whether there is anything that could say so. To look costs as much as to decode a small picture."""
    return not _TURNING_NOTES.isdisjoint(image.info) or hasattr(image, "tag_v2")


def reduction_to(bucket: tuple[int, int], height: int, width: int) -> float:
    """Pixels of a picture per pixel of its bucket, in each direction.

    Raises:
        UnusablePicture: The picture is smaller than the bucket.
    """
    reduction = min(height / bucket[0], width / bucket[1])
    if reduction < 1:
        raise UnusablePicture("smaller than its bucket")
    return reduction


def finest_level(reduction: float) -> int:
    """The highest level that a picture of so many pixels per pixel of level 0 has the resolution for."""
    return int(math.log2(reduction) + 1e-9)


@functools.lru_cache(maxsize=4096)
def nearest_bucket(height: float, width: float, buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose aspect is nearest on a logarithmic scale; the first of equals."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - aspect))


def kept_area(height: float, width: float, bucket: tuple[int, int]) -> float:
    """The fraction of a picture's area that its bucket shows, (0, 1]."""
    ratio = (width / height) / (bucket[1] / bucket[0])
    return min(ratio, 1 / ratio)


@dataclass(frozen=True)
class WindowDraw:
    """What chance says of a window: enough to know how finely its picture must be decoded.

    Attributes:
        level: The window's level.
        lively: Whether the candidate with the largest variance of pixels is kept, instead of the first.
        places: Where candidates lie: (y, x) in [0, 1).
    """

    level: int
    lively: bool
    places: Sequence[tuple[float, float]]

    def choose(self, picture: FramedPicture, overview: np.ndarray, *, size: int, grid: int = 8) -> Window:
        """The window.

        Args:
            picture: The picture.
            overview: Its level-0 picture. Windows are compared in it: to draw each of them would take three times as
                long as all the rest, and it tells a face from a sky too.
            size: Side of the window in pixels, a multiple of `grid`; a picture that is smaller in one direction is
                shown whole in that direction.
            grid: The window's offsets are multiples of so many pixels.
        """
        full_height, full_width = picture.level_size(self.level)
        height, width = min(size, full_height), min(size, full_width)
        down, across = (full_height - height) // grid + 1, (full_width - width) // grid + 1
        # Where several candidates are compared; all are one where there is only one place.
        places = self.places if self.lively and down * across > 1 else self.places[:1]
        windows = [Window(self.level, grid * int(y * down), grid * int(x * across), height, width) for y, x in places]
        return max(windows, key=lambda window: _variance(overview, window)) if len(windows) > 1 else windows[0]


def chances_of_window(candidates: int) -> int:
    """How many numbers `draw_window` takes."""
    return 2 + 2 * candidates


def draw_window(
    chance: Iterator[float],
    max_level: int,
    *,
    levels: tuple[int, ...],
    weights: tuple[float, ...],
    candidates: int,
    variance_fraction: float,
) -> WindowDraw | None:
    """Draws a level and places of windows.

    Args:
        chance: Numbers in [0, 1). As many are taken whatever comes out.
        max_level: The picture's. Levels beyond it are left out.
        levels, weights: Levels to draw from and their relative frequencies.
        candidates: How many windows are drawn.
        variance_fraction: How often the one with the largest variance is kept.

    Returns:
        The draw, or None if the picture has none of the levels.
    """
    pick, lively, *places = itertools.islice(chance, chances_of_window(candidates))
    possible = _shares(max_level, levels, weights)
    if not possible:
        return None
    level = next((level for level, passed in possible if pick < passed), possible[-1][0])
    return WindowDraw(level, lively < variance_fraction, tuple(zip(places[::2], places[1::2], strict=True)))


@functools.lru_cache(maxsize=256)
def _shares(max_level: int, levels: tuple[int, ...], weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """The levels up to a highest one, each with what its share and those before it add up to; none if they weigh
    nothing."""
    possible = [(level, weight) for level, weight in zip(levels, weights, strict=True) if level <= max_level]
    total = sum(weight for _, weight in possible)
    if total <= 0:
        return ()
    passed = itertools.accumulate(weight / total for _, weight in possible)
    return tuple(zip((level for level, _ in possible), passed, strict=True))


def _variance(overview: np.ndarray, window: Window) -> float:
    """How much happens in a window: the variance of the level-0 pixels that it touches, summed over channels."""
    rows, columns = (
        slice(first >> window.level, -(-(first + length) >> window.level))
        for first, length in ((window.top, window.height), (window.left, window.width))
    )
    return float(overview[rows, columns].astype(np.float32).var(axis=(0, 1)).sum())
