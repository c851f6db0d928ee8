"""How fast data is prepared and served, against what cannot be avoided, and how much memory that takes.

Everything is measured in one run, on pictures that are made for it, scenes, or a folder's: rates of a busy machine mean
little, their ratios more. The limit is what a plain preparation does with a picture: decode it whole, and resize it to
what is stored of it; a drawing is rasterised instead. To fetch stores no pixels: there the limit is one small picture.
To preprocess stores a small picture and a window or more of a large one, so these are resized (rasterised) too. A JPEG
that preprocessing decodes only as finely as it needs can pass the limit.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from physformer_core.data.framing import nearest_bucket
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.scenes import compose_scene, render_svg
from physformer_core.data.shards import write_shards
from physformer_core.data.sources import fetch
from physformer_core.data.sources.base import PICTURE_SUFFIXES
from physformer_core.errors import ConfigError, DataError

_TAR_EXAMPLES = 1000
_SMALL_SIDE = 32
_STAGES = ("fetch", "scan", "pictures")
_FEWEST = 128
_BATCH, _BATCHES = 128, 32


@dataclass(frozen=True)
class Rates:
    """What was measured on pictures of one kind, in one process.

    Attributes:
        pictures: Which ones.
        count: How many there were.
        limit: Pictures decoded and resized to level 0 (scenes: rasterised there) a second: the mean of a measurement
            before, between and after the others.
        limit_with_crops: The same with every crop that the set stores resized (rasterised) too, each straight from the
            picture by Pillow's box filter: the mean of two measurements after the others.
        fetched: Pictures read, verified and written a second.
        preprocessed: Pictures cut into training examples a second, without the encoding of captions.
        fetched_share: The same over `limit`, in processor time: what else runs on the machine has no part in it.
        preprocessed_share: The same over `limit_with_crops`, in processor time.
        level0_share: `preprocessed` over `limit`, in processor time: crops are then counted as overhead.
        captions: Captions encoded a second.
        examples: Examples that the loader serves a second, in batches of 128, a quarter of them crops if there are
            any; nothing is made ahead.
    """

    pictures: str
    count: int
    limit: float
    limit_with_crops: float
    fetched: float
    preprocessed: float
    fetched_share: float
    preprocessed_share: float
    level0_share: float
    captions: float
    examples: float


@dataclass(frozen=True)
class Memory:
    """Peak resident memory in bytes of a process that prepares a set of `count` examples, by stage."""

    count: int
    peak: dict[str, int]


def photograph(number: int, side: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have: 1.3 bits a pixel at 512 pixels, 3.5 at 72.

    Args:
        number: No two numbers have the same picture.
        side: Width and height in pixels.
    """
    rng = np.random.default_rng(number)
    pixels = np.zeros((side, side, 3), np.float32)
    cells = 4
    while cells <= side:
        octave = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += (np.asarray(octave.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128) / cells**0.6
        cells *= 2
    pixels = np.clip(128 + pixels * 0.8, 0, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@dataclass(frozen=True)
class StoredCrop:
    """A crop that preprocessing stored: of so many pixels, at a level, of a part of the picture's frame."""

    size: tuple[int, int]
    level: int
    place: tuple[float, float, float, float]


Crops = Mapping[int, Sequence[StoredCrop]]
"""Stored crops by the number of the picture."""


class Subject(ABC):
    """Pictures that rates are measured on. The last digits of an example's key are the picture's number.

    Attributes:
        name: Which ones, for people.
        count: How many.
    """

    name: str
    count: int

    @abstractmethod
    def lay_out(self, folder: Path, count: int) -> None:
        """Puts the first so many where `fetch` finds them."""

    @abstractmethod
    def fetch(self, folder: Path, raw: Path, count: int) -> None:
        """Makes a raw set of the first so many."""

    @abstractmethod
    def limit(self, crops: Crops) -> None:
        """Does with each what cannot be avoided, to store a small picture and these crops."""


class Bitmaps(Subject):
    """Encoded pictures with a caption each.

    Raises:
        ConfigError: There are too few.
    """

    def __init__(self, name: str, encoded: Sequence[tuple[str, bytes]]) -> None:
        """
        Args:
            name: Which ones.
            encoded: (ending of a file's name, content) of each.
        """
        if len(encoded) < _FEWEST:
            raise ConfigError(f"{len(encoded)} pictures are no measure", hint=f"at least {_FEWEST}")
        self.name, self.count = name, len(encoded)
        self._encoded = encoded
        sizes = (Image.open(io.BytesIO(picture)).size for _, picture in encoded)
        self._buckets = [nearest_bucket(height, width, PreprocessConfig.buckets) for width, height in sizes]

    def lay_out(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True)
        for number, (suffix, picture) in enumerate(self._encoded[:count]):
            (folder / f"{number:06d}{suffix}").write_bytes(picture)
            (folder / f"{number:06d}.txt").write_text(f"picture number {number % 64}")

    def fetch(self, folder: Path, raw: Path, count: int) -> None:
        fetch("folder", raw, location=str(folder))

    def limit(self, crops: Crops) -> None:
        for number, ((_, picture), (height, width)) in enumerate(zip(self._encoded, self._buckets, strict=True)):
            image = Image.open(io.BytesIO(picture)).convert("RGB")
            image.resize((width, height), Image.Resampling.BOX)
            reduction = min(image.height / height, image.width / width)
            down, across = height * reduction, width * reduction
            top, left = (image.height - down) / 2, (image.width - across) / 2
            for crop in crops.get(number, ()):
                y0, x0, y1, x1 = crop.place
                box = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
                image.resize(crop.size[::-1], Image.Resampling.BOX, box)


class Scenes(Subject):
    """Scenes as `data fetch scenes` composes them."""

    name = "scenes"

    def __init__(self, count: int) -> None:
        self.count = count
        scenes = (compose_scene(0, number) for number in range(count))
        self._drawn = [
            (scene.svg, nearest_bucket(scene.height, scene.width, PreprocessConfig.buckets)) for scene in scenes
        ]

    def lay_out(self, folder: Path, count: int) -> None:
        pass  # they are composed

    def fetch(self, folder: Path, raw: Path, count: int) -> None:
        fetch("scenes", raw, options={"count": count})

    def limit(self, crops: Crops) -> None:
        for number, (svg, (height, width)) in enumerate(self._drawn):
            render_svg(svg, width, height)
            for crop in crops.get(number, ()):
                full_height, full_width = height << crop.level, width << crop.level
                top, left = round(crop.place[0] * full_height), round(crop.place[1] * full_width)
                render_svg(svg, *crop.size[::-1], full_width=full_width, full_height=full_height, top=top, left=left)


def photographs(side: int, count: int) -> Bitmaps:
    """So many pictures of `photograph`.

    Raises:
        ConfigError: They are too small to be trained on, or too few.
    """
    if side < _SMALL_SIDE:
        raise ConfigError(f"pictures of {side} pixels are too small", hint=f"at least {_SMALL_SIDE} pixels")
    return Bitmaps(f"pictures of {side} pixels", [(".jpg", photograph(number, side)) for number in range(count)])


def pictures_of(folder: str | Path, count: int) -> Bitmaps:
    """The first so many picture files of a folder and those in it, in the order of their names.

    Raises:
        ConfigError: There are too few.
        DataError: One cannot be read.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix[1:].lower() in PICTURE_SUFFIXES)
    try:
        return Bitmaps(f"pictures of {folder}", [(path.suffix, path.read_bytes()) for path in paths[:count]])
    except OSError as error:  # Pillow's tell neither file nor cause
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def measure_rates(subject: Subject, *, progress: Callable[[int, int], None] | None = None) -> Rates:
    """Measures all stages on pictures, in this process alone."""
    count, done = subject.count, 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done * count, 8 * count)

    def limit(crops: Crops) -> np.ndarray:
        started = _clock()
        subject.limit(crops)
        passed = _clock() - started
        tell()
        return passed

    with tempfile.TemporaryDirectory(prefix="physformer-bench-") as name:
        folder = Path(name)
        _prepare(subject, folder / "warm")  # imports, and tables of the decoder
        subject.lay_out(folder / "pictures", count)
        tell()
        limits = [limit({})]
        fetched = _clock()
        subject.fetch(folder / "pictures", folder / "raw", count)
        fetched_time = _clock() - fetched
        tell()
        limits.append(limit({}))
        stages: dict[str, list[np.ndarray]] = {}
        manifest = preprocess(
            folder / "raw",
            folder / "set",
            config=PreprocessConfig(validation_fraction=0),
            progress=lambda stage, done, total: stages.setdefault(stage, []).append(_clock()),
        )
        pictures_time = stages["pictures"][-1] - stages["pictures"][0]
        captions_time = stages["captions"][-1] - stages["captions"][0]
        tell()
        limits.append(limit({}))
        shards = ShardSet(folder / "set")
        crops = stored_crops(shards)
        full = np.mean([limit(crops), limit(crops)], axis=0)
        served = _served(shards)
    mean = np.mean(limits, axis=0)
    return Rates(
        pictures=subject.name,
        count=count,
        limit=count / mean[0],
        limit_with_crops=count / full[0],
        fetched=count / fetched_time[0],
        preprocessed=count / pictures_time[0],
        fetched_share=mean[1] / fetched_time[1],
        preprocessed_share=full[1] / pictures_time[1],
        level0_share=mean[1] / pictures_time[1],
        captions=manifest["captions"]["count"] / captions_time[0],
        examples=served,
    )


def stored_crops(shards: ShardSet) -> dict[int, list[StoredCrop]]:
    """The training crops of a set, by the number that their example's key ends in."""
    found: dict[int, list[StoredCrop]] = {}
    index = 0
    for group in shards.groups("crop", "train"):
        for row in range(group.count):
            digits = re.search(r"(\d+)(?:\.\w+)?$", shards.example_key("crop", index))
            assert digits is not None
            y0, x0, y1, x1 = group.place[row].tolist()
            crop = StoredCrop(group.size, int(group.level[row]), (y0, x0, y1, x1))
            found.setdefault(int(digits[1]), []).append(crop)
            index += 1
    return found


def _prepare(subject: Subject, folder: Path) -> None:
    subject.lay_out(folder / "pictures", 16)
    subject.fetch(folder / "pictures", folder / "raw", 16)
    preprocess(folder / "raw", folder / "set", config=PreprocessConfig(validation_fraction=0))


def _served(shards: ShardSet) -> float:
    """Examples that the loader makes a second."""
    crops = 0.25 if shards.count("crop") else 0.0
    stream = BatchStream(shards, seed=0, batch_size=_BATCH, crop_fraction=crops)
    stream.batch(0), stream.batch(3)
    started = time.perf_counter()
    for step in range(_BATCHES):
        stream.batch(step)
    return _BATCH * _BATCHES / (time.perf_counter() - started)


def _clock() -> np.ndarray:
    """(time of day, processor time of this process), in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


# Memory


def measure_memory(counts: Sequence[int], *, progress: Callable[[int, int], None] | None = None) -> list[Memory]:
    """Prepares sets of so many tiny pictures with a caption of its own each, every stage in a process of its own.

    The stages: "fetch" from tars, "scan" (captions and keys are read and put in order) and "pictures" (training
    examples are cut). Encoding captions is left out: it goes by 4096, whatever the size of the set.

    Raises:
        ConfigError: A count is not positive.
        DataError: A process died.
    """
    if any(count < 1 for count in counts):
        raise ConfigError("a set has at least one example")
    measured = []
    for number, count in enumerate(counts):
        with tempfile.TemporaryDirectory(prefix="physformer-bench-") as name:
            folder = Path(name)
            _write_tars(folder / "tars", count)
            peak: dict[str, int] = {}
            for index, stage in enumerate(_STAGES):
                if progress is not None:
                    progress(number * len(_STAGES) + index, len(counts) * len(_STAGES))
                command = [sys.executable, "-m", "physformer_core.data.throughput", stage, name]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise DataError(f"stage {stage} on {count} examples failed: {done.stderr.strip()[-300:]}")
                peak[stage] = int(json.loads(done.stdout)["peak"])
        measured.append(Memory(count, peak))
    if progress is not None:
        progress(len(counts) * len(_STAGES), len(counts) * len(_STAGES))
    return measured


def _write_tars(folder: Path, count: int) -> None:
    folder.mkdir()
    # Few pictures and many names: what matters here is how many examples there are.
    encoded = [photograph(number, _SMALL_SIDE) for number in range(64)]
    for first in range(0, count, _TAR_EXAMPLES):
        with tarfile.open(folder / f"{first // _TAR_EXAMPLES:06d}.tar", "w") as archive:
            for number in range(first, min(first + _TAR_EXAMPLES, count)):
                caption = f"picture {number} of a thing in place {number * 7919 % 104729}"
                for name, content in (("jpg", encoded[number % 64]), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{number:09d}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def _run_stage(stage: str, folder: Path) -> None:
    from physformer_core.data.latents import FieldSpec
    from physformer_core.data.scan import scan_captions

    if stage == "fetch":
        fetch("webdataset", folder / "raw", location=str(folder / "tars"))
        return
    files = json.loads((folder / "raw" / "manifest.json").read_text("utf-8"))["files"]
    partial = folder / "partial"
    partial.mkdir(exist_ok=True)
    names = [file["name"] for file in files]
    scan = scan_captions(folder / "raw", names, partial, encoder="minilm", max_tokens=32, progress=None)
    if stage == "pictures":
        config = PreprocessConfig(buckets=((_SMALL_SIDE, _SMALL_SIDE),))
        write_shards(
            folder / "raw", folder / "set", partial, files, scan, config, FieldSpec(),
            workers=1, progress=lambda done, total: None,
        )  # fmt: skip


def as_dict(rates: Sequence[Rates], memory: Sequence[Memory]) -> dict[str, Any]:
    """For JSON."""
    return {
        "rates": [dataclasses.asdict(one) for one in rates],
        "memory": [dataclasses.asdict(one) for one in memory],
    }


if __name__ == "__main__":
    import resource

    _run_stage(sys.argv[1], Path(sys.argv[2]))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    sys.stdout.write(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}))
