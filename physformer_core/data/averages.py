"""Exact averages over areas of bitmaps whose borders lie within pixels.

Pillow's box filter is no substitute: it takes or leaves whole pixels, so at a reduction of 1.3 it only drops some.

Weights are whole numbers of 4096ths and sums are whole numbers, so that the kernel in C and numpy, which is there where
no C compiler is, give the same bytes: a prepared set does not depend on the machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from physformer_core.native.build import Unavailable, load_library

WHOLE = 4096
"""What the weights of an interval add up to. A pixel of 255 by its square and a half still fit 32 bits."""


@dataclass(frozen=True)
class Intervals:
    """Pixels under intervals along one axis.

    Attributes:
        first: The first pixel under each, int32 [count].
        taps: How many pixels, int32 [count].
        weights: Their shares in 4096ths, int32 [count, most taps]; 0 beyond `taps`.
    """

    first: np.ndarray
    taps: np.ndarray
    weights: np.ndarray

    @functools.cached_property
    def for_kernel(self) -> tuple[int, ...]:
        """What the kernel in C takes of them, here and now. To ask for addresses takes as long as a small average."""
        pointers = (self.first.ctypes.data, self.taps.ctypes.data, self.weights.ctypes.data)
        return len(self.first), *pointers, self.weights.shape[1]


@dataclass(frozen=True)
class Pixels:
    """A picture's pixels of 8 bits in memory, row by row.

    A buffer of Arrow, as it tells its address at once: an array of numpy takes as long for that as a small average.

    Attributes:
        memory: height * width * stored bytes.
        height, width: In pixels.
        stored: Bytes a pixel.
        channels: So many of them count, the first; 1 or 3.
    """

    memory: pa.Buffer
    height: int
    width: int
    stored: int
    channels: int

    @classmethod
    def of_image(cls, image: Image.Image) -> Pixels:
        """Those of a picture of the mode "L" or "RGB".

        Where Pillow has them, a fourth byte beside three channels: to pack them took as long as to average them. Only
        what does not lie in one piece there, from 16 MB up, is copied.
        """
        channels = 1 if image.mode == "L" else 3
        try:
            return cls(pa.array(image).buffers()[-1], image.height, image.width, 1 if channels == 1 else 4, channels)
        except ValueError:
            return cls.of_array(np.asarray(image).reshape(image.height, image.width, channels))

    @classmethod
    def of_array(cls, array: np.ndarray, channels: int | None = None) -> Pixels:
        """Those of uint8 [height, width, stored]."""
        height, width, stored = array.shape
        return cls(pa.py_buffer(np.ascontiguousarray(array)), height, width, stored, channels or stored)

    def array(self) -> np.ndarray:
        """The channels: uint8 [height, width, channels], perhaps with gaps."""
        stored = np.frombuffer(self.memory, np.uint8).reshape(self.height, self.width, self.stored)
        return stored[:, :, : self.channels]


# Pictures of one size are framed alike, and whole data sets are of one size: most intervals are asked for again.
@functools.lru_cache(maxsize=256)
def intervals(start: float, step: float, count: int, limit: int) -> Intervals:
    """The pixels under ``count`` intervals of length ``step`` from ``start`` on, of a row of ``limit`` pixels."""
    low = start + step * np.arange(count)
    high = np.minimum(low + step, limit)
    first = (low + 1e-6).astype(np.int64)
    last = np.minimum(np.maximum(np.ceil(high - 1e-6).astype(np.int64), first + 1), limit)
    taps = first[:, None] + np.arange(int((last - first).max()))
    covered = np.minimum(taps + 1, high[:, None]) - np.maximum(taps, low[:, None])
    covered[taps >= last[:, None]] = 0
    passed = np.cumsum(covered, axis=1)
    # Rounding what has passed, not each share, makes the shares add up.
    weights = np.diff(np.rint(WHOLE * passed / passed[:, -1:]), axis=1, prepend=0)
    return Intervals(first.astype(np.int32), (last - first).astype(np.int32), weights.astype(np.int32))


def area_average(source: Pixels, rows: Intervals, columns: Intervals) -> np.ndarray:
    """Averages over every interval of rows by every interval of columns.

    Args:
        source: The picture.
        rows, columns: Within it.

    Returns:
        uint8 [rows, columns, channels], halves rounded up.
    """
    return _in_c(source, rows, columns) if _kernel_runs() else _in_numpy(source, rows, columns)


def _in_c(source: Pixels, rows: Intervals, columns: Intervals) -> np.ndarray:
    out = np.empty((len(rows.first), len(columns.first), source.channels), np.uint8)
    done = load_library().area_average(
        source.memory.address,
        source.width * source.stored,
        source.stored,
        source.channels,
        *rows.for_kernel,
        *columns.for_kernel,
        pa.py_buffer(out).address,
    )
    if not done:
        raise MemoryError
    return out


def _in_numpy(source: Pixels, rows: Intervals, columns: Intervals) -> np.ndarray:
    height, width, channels = source.height, source.width, source.channels
    # Whole numbers below 2^24 are exact in float32, below 2^53 in float64, in whatever order they are added.
    down, across = _matrix(rows, height, np.float32), _matrix(columns, width, np.float64)
    begin, end = int(rows.first[0]), int(rows.first[-1] + rows.taps[-1])
    bands = down[:, begin:end] @ source.array()[begin:end].reshape(end - begin, -1).astype(np.float32)
    sums = bands.astype(np.float64).reshape(-1, width, channels).transpose(0, 2, 1) @ across.T
    return np.ascontiguousarray(((sums + WHOLE**2 // 2) // WHOLE**2).astype(np.uint8).transpose(0, 2, 1))


def _matrix(one: Intervals, limit: int, dtype: type) -> np.ndarray:
    """Weights of every pixel of a row for every interval: [intervals, limit]."""
    matrix = np.zeros((len(one.first), limit + one.weights.shape[1]), dtype)
    np.put_along_axis(matrix, one.first[:, None] + np.arange(one.weights.shape[1]), one.weights, axis=1)
    return matrix[:, :limit]


@functools.cache
def _kernel_runs() -> bool:
    """Whether there is a kernel and it gives what numpy gives, tried once per process."""
    try:
        load_library()
    except Unavailable:
        return False
    source = (np.arange(13 * 17 * 4) * 193 % 256).astype(np.uint8).reshape(13, 17, 4)
    case = Pixels.of_array(source, 3), intervals(0.4, 1.7, 7, 13), intervals(1.25, 2.6, 6, 17)
    return bool(np.array_equal(_in_c(*case), _in_numpy(*case)))
