"""How fast data is prepared and served, against what cannot be avoided, and how much memory that takes.

Everything is measured in one run, on pictures that are made for it: rates of a busy machine mean little, their ratios
more. The limit is what any preparation must do with a picture: decode it, and resize it to the size that is stored.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.shards import write_shards
from physformer_core.data.sources import fetch
from physformer_core.errors import ConfigError, DataError

_TAR_EXAMPLES = 1000
_SMALL_SIDE = 32
_STAGES = ("fetch", "scan", "pictures")


@dataclass(frozen=True)
class Rates:
    """What was measured on pictures of one size, in one process.

    Attributes:
        side: Side of the pictures in pixels.
        count: How many there were.
        limit: Pictures decoded and resized a second: the mean of a measurement before, between and after the others.
        fetched: Pictures read, verified and written a second.
        preprocessed: Pictures cut into training examples a second, without the encoding of captions.
        fetched_share, preprocessed_share: The same over the limit, in processor time: what else runs on the machine
            has no part in it.
        captions: Captions encoded a second.
        examples: Examples that the loader serves a second, in batches of 128, a quarter of them crops if there are
            any; its prefetching thread is off.
    """

    side: int
    count: int
    limit: float
    fetched: float
    preprocessed: float
    fetched_share: float
    preprocessed_share: float
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


def measure_rates(side: int, count: int, *, progress: Callable[[int, int], None] | None = None) -> Rates:
    """Measures all stages on `count` pictures of `side` pixels, in this process alone.

    Raises:
        ConfigError: The pictures are too small for a bucket, or too few.
    """
    if side < 64 or count < 128:
        raise ConfigError(f"{count} pictures of {side} pixels are no measure", hint="at least 128 of 64 pixels")
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, 6 * count)

    with tempfile.TemporaryDirectory(prefix="physformer-bench-") as name:
        folder = Path(name)
        encoded = [photograph(number, side) for number in range(count)]
        _write_folder(encoded, folder / "pictures")
        _prepare(encoded[:16], folder / "warm")  # imports, and tables of the decoder
        tell(count)
        limits = [_limit(encoded, tell)]
        fetched = _clock()
        fetch("folder", folder / "raw", location=str(folder / "pictures"))
        fetched_time = _clock() - fetched
        tell(count)
        limits.append(_limit(encoded, tell))
        stages: dict[str, list[np.ndarray]] = {}
        manifest = preprocess(
            folder / "raw",
            folder / "set",
            config=PreprocessConfig(validation_fraction=0),
            progress=lambda stage, done, total: stages.setdefault(stage, []).append(_clock()),
        )
        pictures_time = stages["pictures"][-1] - stages["pictures"][0]
        captions_time = stages["captions"][-1] - stages["captions"][0]
        tell(count)
        limits.append(_limit(encoded, tell))
        shards = ShardSet(folder / "set")
        crops = 0.25 if shards.count("crop") else 0.0
        stream = BatchStream(shards, seed=0, batch_size=128, crop_fraction=crops, prefetch=0)
        stream.batch(0), stream.batch(3)
        started, batches = time.perf_counter(), 32
        for step in range(batches):
            stream.batch(step)
        served = time.perf_counter() - started
    limit = np.mean(limits, axis=0)
    return Rates(
        side=side,
        count=count,
        limit=count / limit[0],
        fetched=count / fetched_time[0],
        preprocessed=count / pictures_time[0],
        fetched_share=limit[1] / fetched_time[1],
        preprocessed_share=limit[1] / pictures_time[1],
        captions=manifest["captions"]["count"] / captions_time[0],
        examples=128 * batches / served,
    )


def _write_folder(encoded: Sequence[bytes], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(encoded):
        (folder / f"{number:06d}.jpg").write_bytes(picture)
        (folder / f"{number:06d}.txt").write_text(f"picture number {number % 64}")


def _prepare(encoded: Sequence[bytes], folder: Path) -> None:
    _write_folder(encoded, folder / "pictures")
    fetch("folder", folder / "raw", location=str(folder / "pictures"))
    preprocess(folder / "raw", folder / "set", config=PreprocessConfig())


def _clock() -> np.ndarray:
    """(time of day, processor time of this process), in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _limit(encoded: Sequence[bytes], tell: Callable[[int], None]) -> np.ndarray:
    started = _clock()
    for picture in encoded:
        Image.open(io.BytesIO(picture)).convert("RGB").resize((64, 64), Image.Resampling.BOX)
    passed = _clock() - started
    tell(len(encoded))
    return passed


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
