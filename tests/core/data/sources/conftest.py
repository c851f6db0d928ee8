"""Small pictures, and the containers that they come in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image


def picture(
    number: int, kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any
) -> bytes:
    """A picture that no other number has."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def shard(path: Path, first: int, count: int) -> Path:
    """A tar as text-to-image-2M has them: a JPEG and a JSON file with the prompt, for each example."""
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:09d}.jpg", picture(number, "JPEG")),
            (f"{number:09d}.json", json.dumps({"prompt": f"picture number {number}"}).encode()),
        ]
    return tar(path, members)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The examples of a raw set, in order."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return [row for file in files for row in pq.read_table(folder / file["name"]).to_pylist()]


def quarantine(folder: Path) -> dict[str, str]:
    """Reason by key."""
    lines = (folder / "quarantine.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(set(entry) == {"key", "reason", "path", "detail"} for entry in entries)
    return {entry["key"]: entry["reason"] for entry in entries}


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], Path]:
    return tar


@pytest.fixture(scope="session")
def write_shard() -> Callable[[Path, int, int], Path]:
    return shard


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    return rows


@pytest.fixture(scope="session")
def quarantine_of() -> Callable[[Path], dict[str, str]]:
    return quarantine


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four examples, so that a dozen make several."""
    monkeypatch.setattr("physformer_core.data.sources.base.PART_EXAMPLES", 4)
