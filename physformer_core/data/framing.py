"""From a raw picture of any size to a bucket's frame, and pixels of any window of it at any level.

A level-l picture of a bucket (height, width) has height * 2^l by width * 2^l pixels. Every level shows the same frame:
the picture cut, never stretched, to the bucket's aspect. Windows come straight from the source at the level's
resolution: vector art is rasterised there, a bitmap is averaged over areas once, and never enlarged.
"""

from __future__ import annotations

import functools
import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from PIL import Image, ImageOps

from physformer_core.data.scenes.render import render_svg
from physformer_core.errors import DataError

_DENSE_PIXELS = 192


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
        self.max_level = 30
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

    def pixels(self, window: Window) -> np.ndarray:
        height, width = window.height, window.width
        step = self._reduction / 2**window.level  # source pixels per pixel of the window's level, at least 1
        top, left = self._origin[0] + window.top * step, self._origin[1] + window.left * step
        if step.is_integer() and top.is_integer() and left.is_integer():
            whole = int(step)
            box = (int(left), int(top), int(left) + width * whole, int(top) + height * whole)
            pixels = np.asarray(self._image.reduce(whole, box) if whole > 1 else self._image.crop(box))
        else:
            channels = len(self._image.getbands())
            first_row, rows = _averages(top, step, height, self._image.height)
            first, columns = _averages(left, step, width, self._image.width, channels)
            source = self._array[first_row : first_row + rows.shape[1], channels * first :][:, : columns.shape[1]]
            # Down first, along contiguous rows, then across what is left of it.
            bands = rows @ source.astype(np.float32)
            across = columns @ np.ascontiguousarray(bands.T)
            pixels = np.rint(across.T).astype(np.uint8, order="C").reshape(height, width, channels)
        return pixels if pixels.shape[2:] == (3,) else np.repeat(pixels.reshape(height, width, 1), 3, axis=2)

    @functools.cached_property
    def _array(self) -> np.ndarray:
        """All pixels: uint8 [height, width * channels]."""
        return np.asarray(self._image).reshape(self._image.height, -1)


# Pictures of one size are framed alike, and whole data sets are of one size: most matrices are asked for again.
@functools.lru_cache(maxsize=256)
def _averages(
    start: float, step: float, count: int, limit: int, channels: int = 1
) -> tuple[int, scipy.sparse.csr_array | np.ndarray]:
    """Averages over `count` intervals of length `step` from `start` on, of pixels that lie side by side.

    Pillow's box filter is no substitute: it takes or leaves whole pixels, so at a reduction of 1.3 it only drops some.

    Returns:
        The first pixel under the intervals, and a matrix [count * channels, channels * pixels under them], float32:
        the fractions of each interval that the pixels cover, channel by channel.
    """
    low = start + step * np.arange(count)
    high = np.minimum(low + step, limit)
    first = (low + 1e-6).astype(np.int64)
    last = np.minimum(np.maximum(np.ceil(high - 1e-6).astype(np.int64), first + 1), limit)
    taps = first[:, None] + np.arange(int((last - first).max()))
    covered = np.minimum(taps + 1, high[:, None]) - np.maximum(taps, low[:, None])
    covered[taps >= last[:, None]] = 0
    covered /= covered.sum(axis=1, keepdims=True)
    used = np.repeat(covered > 0, channels, axis=0)
    wanted = (channels * (taps - first[0]))[:, None, :] + np.arange(channels)[:, None]
    # Put together by hand: where pictures differ in size, these are made for every one.
    matrix = scipy.sparse.csr_array(
        (
            np.repeat(covered.astype(np.float32), channels, axis=0)[used],
            wanted.reshape(used.shape)[used].astype(np.int32),
            np.concatenate([[0], used.sum(axis=1).cumsum()]).astype(np.int32),
        ),
        shape=(channels * count, channels * int(last[-1] - first[0])),
    )
    # What scipy looks at before it multiplies takes longer than to multiply by a few zeros.
    return int(first[0]), matrix.toarray() if matrix.shape[1] <= _DENSE_PIXELS else matrix


def open_bitmap(encoded: bytes, *, grey: bool = False) -> Image.Image:
    """Decodes a picture: upright (EXIF), RGB, transparent parts on white.

    Args:
        encoded: The file's content.
        grey: Leave pictures of one channel of 8 bits (mode "L") as they are.

    Raises:
        UnusablePicture: It cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
        if _may_be_turned(image):
            ImageOps.exif_transpose(image, in_place=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnusablePicture("cannot be decoded") from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" or (grey and image.mode == "L") else image.convert("RGB")


def _may_be_turned(image: Image.Image) -> bool:
    """Whether there is anything that could say so. To look costs as much as to decode a small picture."""
    notes = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
    return hasattr(image, "tag_v2") or any(note in image.info for note in notes)


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
    overview: np.ndarray,
    rng: np.random.Generator,
    *,
    levels: tuple[int, ...],
    weights: tuple[float, ...],
    size: int,
    candidates: int,
    variance_fraction: float,
    grid: int = 8,
) -> Window | None:
    """Draws a level and a window of it.

    Args:
        picture: The picture.
        overview: Its level-0 picture. Windows are compared in it: to draw each of them would take three times as long
            as all the rest, and it tells a face from a sky too.
        rng: Always advanced by as many draws, whatever comes out.
        levels, weights: Levels to draw from and their relative frequencies. Levels beyond the picture's resolution
            are left out.
        size: Side of the window in pixels, a multiple of `grid`; a picture that is smaller in one direction is shown
            whole in that direction.
        candidates: How many windows are drawn.
        variance_fraction: How often the candidate with the largest variance of pixels is kept, instead of the first.
        grid: The window's offsets are multiples of so many pixels.

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
            grid * int(y * ((full_height - height) // grid + 1)),
            grid * int(x * ((full_width - width) // grid + 1)),
            height,
            width,
        )
        for y, x in places
    ]
    if not lively or len(set(windows)) == 1:
        return windows[0]
    return max(windows, key=lambda window: _variance(overview, window))


def _variance(overview: np.ndarray, window: Window) -> float:
    """How much happens in a window: the variance of the level-0 pixels that it touches, summed over channels."""
    rows, columns = (
        slice(first >> window.level, -(-(first + length) >> window.level))
        for first, length in ((window.top, window.height), (window.left, window.width))
    )
    return float(overview[rows, columns].astype(np.float32).var(axis=(0, 1)).sum())
