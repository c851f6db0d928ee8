"""A tiny raw set of drawings and bitmaps, and a preprocessed set made of it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.files import sha256_file

RAW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("svg", pa.large_string()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("class_label", pa.int32()),
        ("meta", pa.string()),
    ]
)
COLOURS = ("red", "green", "blue", "gold", "purple", "teal", "orange")


def drawing(index: int, width: int = 640, height: int = 480) -> dict[str, Any]:
    """An example with a rectangle and a circle whose places depend on its index."""
    colour, other = COLOURS[index % 7], COLOURS[(index + 3) % 7]
    x, y = 40 + 37 * index % (width // 2), 30 + 53 * index % (height // 2)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<rect x="{x}" y="{y}" width="{width // 4}" height="{height // 3}" fill="{colour}"/>'
        f'<circle cx="{width - x}" cy="{height - y}" r="{min(width, height) / 6}" fill="{other}"/></svg>'
    )
    captions = [f"a {colour} box and a {other} ball", f"a {colour} box", "two things"]
    return row(f"drawing-{index}", svg=svg, width=width, height=height, captions=captions)


def bitmap(index: int, width: int = 300, height: int = 260, **options: Any) -> dict[str, Any]:
    """An example with a smooth bitmap of noise."""
    coarse = np.random.default_rng(index).integers(0, 256, (9, 11, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, "PNG", **options)
    captions = [f"noise number {index % 5}"]
    return row(f"bitmap-{index}", image=stream.getvalue(), width=width, height=height, captions=captions)


def row(key: str, **values: Any) -> dict[str, Any]:
    empty = {"svg": None, "image": None, "width": 64, "height": 64, "captions": [], "class_label": None, "meta": "{}"}
    return {"key": key, **empty, **values}


def write_raw(folder: Path, files: list[list[dict[str, Any]]]) -> Path:
    """Writes a raw set, a file per list of examples."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, rows in enumerate(files):
        path = folder / f"examples-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, RAW_SCHEMA), path, compression="zstd")
        entries.append({"name": path.name, "sha256": sha256_file(path), "count": len(rows)})
    digest = hashlib.sha256("".join(sorted(entry["sha256"] for entry in entries)).encode()).hexdigest()
    manifest = {
        "format": "physformer-raw/1",
        "source": {"name": "test"},
        "license": "CC0-1.0",
        "attribution": "",
        "count": sum(map(len, files)),
        "files": entries,
        "sha256": digest,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


ASPECTS = ((640, 480), (480, 640), (500, 500), (900, 400))
BUCKETS = ((64, 64), (56, 72), (72, 56), (48, 80), (80, 48), (40, 96), (96, 40))


@pytest.fixture(scope="session")
def raw_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawings of four aspects and 12 bitmaps in three files."""
    rows = [drawing(i, *ASPECTS[i % 4]) for i in range(48)]
    for i in range(12):
        rows.insert(5 * i, bitmap(i))
    rows[3]["class_label"] = 7
    return write_raw(tmp_path_factory.mktemp("raw"), [rows[:20], rows[20:40], rows[40:]])


@pytest.fixture(scope="session")
def config() -> PreprocessConfig:
    return PreprocessConfig(buckets=BUCKETS, validation_fraction=0.2, crops_per_example=1.5, seed=3)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every raw file gets shards of its own, as in a set of many thousands."""
    monkeypatch.setattr("physformer_core.data.shards._MIN_SHARD_ROWS", 20)


@pytest.fixture(scope="session")
def shard_folder(raw_set: Path, config: PreprocessConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw set, preprocessed in this process. Not to be changed."""
    folder = tmp_path_factory.mktemp("sets") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("physformer_core.data.shards._MIN_SHARD_ROWS", 20)
        preprocess(raw_set, folder, config=config)
    return folder


@pytest.fixture(scope="session")
def raw_writer() -> Callable[[Path, list[list[dict[str, Any]]]], Path]:
    return write_raw


@pytest.fixture(scope="session")
def make_drawing() -> Callable[..., dict[str, Any]]:
    return drawing


@pytest.fixture(scope="session")
def make_bitmap() -> Callable[..., dict[str, Any]]:
    return bitmap


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    return row
