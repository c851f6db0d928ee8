"""Raw sets of any source: the same bytes however they are made, mended when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.sources import fetch
from physformer_core.errors import ConfigError, DataError, OutputError
from physformer_core.files import sha256_file

Make = Callable[..., bytes]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, make_picture: Make) -> Path:
    """22 pictures with text files, two of which are no use."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(22):
        (folder / f"{i:02d}.png").write_bytes(make_picture(i, size=(120, 90)) if i not in (5, 13) else b"no")
        (folder / f"{i:02d}.txt").write_text(f"picture number {i}")
    return folder


def get(location: Path, output: Path, **options: Any) -> dict[str, Any]:
    return fetch("folder", output, location=str(location), **options).manifest


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "raw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("physformer_core.data.sources.base.PART_EXAMPLES", 4)
        get(photos, folder)
    assert len(contents(folder)) == 6 + 2
    return contents(folder)


def test_workers_do_not_change_a_byte(
    photos: Path, expected: dict[str, str], tmp_path: Path, small_parts: None
) -> None:
    told: list[tuple[int, int | None]] = []
    get(photos, tmp_path / "raw", workers=2, progress=lambda done, total: told.append((done, total)))
    assert contents(tmp_path / "raw") == expected
    assert told[0] == (0, 22) and told[-1] == (22, 22) and told == sorted(told)


def test_an_interrupted_fetch_goes_on(
    photos: Path, expected: dict[str, str], tmp_path: Path, small_parts: None
) -> None:
    def stop(done: int, total: int | None) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(photos, tmp_path / "raw", progress=stop)
    assert not (tmp_path / "raw" / "manifest.json").exists()
    kept = (tmp_path / "raw" / "examples-00001.parquet").stat().st_mtime_ns
    (tmp_path / "raw" / ".examples-00002.0123456789ab.tmp.parquet").write_bytes(b"half")
    with pytest.raises(DataError, match="already holds another set"):
        get(photos, tmp_path / "raw", options={"limit": 8})
    told: list[int] = []
    get(photos, tmp_path / "raw", progress=lambda done, total: told.append(done))
    assert told[0] == 8 and contents(tmp_path / "raw") == expected
    assert (tmp_path / "raw" / "examples-00001.parquet").stat().st_mtime_ns == kept


def test_killed_with_9_and_run_again(photos: Path, expected: dict[str, str], tmp_path: Path, small_parts: None) -> None:
    program = (
        "import sys, time\n"
        "from physformer_core.data.sources import base, fetch, writing\n"
        "base.PART_EXAMPLES = 4\n"
        "verify = writing.verify_picture\n"
        "def slowly(*args):\n"
        "    time.sleep(0.05)\n"
        "    return verify(*args)\n"
        "writing.verify_picture = slowly\n"
        "fetch('folder', sys.argv[2], location=sys.argv[1])\n"
    )
    raw = tmp_path / "raw"
    for part in (0, 2, 4):
        process = subprocess.Popen([sys.executable, "-c", program, str(photos), str(raw)])
        deadline = time.monotonic() + 60
        while not (raw / ".partial" / f"part-{part:05d}.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.07)  # into the next part
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (raw / "manifest.json").exists()
    get(photos, raw)
    assert contents(raw) == expected


def test_what_is_lost_is_made_again(photos: Path, expected: dict[str, str], tmp_path: Path, small_parts: None) -> None:
    raw = tmp_path / "raw"
    assert fetch("folder", raw, location=str(photos)).fresh
    assert not fetch("folder", raw, location=str(photos)).fresh
    for lost in (["examples-00001.parquet", "examples-00004.parquet"], ["quarantine.jsonl"]):
        kept = (raw / "examples-00002.parquet").stat().st_mtime_ns
        for name in lost:
            (raw / name).unlink()
        assert fetch("folder", raw, location=str(photos)).fresh
        assert contents(raw) == expected
        assert (raw / "examples-00002.parquet").stat().st_mtime_ns == kept


def test_a_folder_that_has_changed_is_noticed(make_picture: Make, tmp_path: Path, small_parts: None) -> None:
    photos, raw = tmp_path / "photos", tmp_path / "raw"
    photos.mkdir()
    for i in range(3):
        (photos / f"{i}.png").write_bytes(make_picture(i))
        (photos / f"{i}.txt").write_text("a picture")
    get(photos, raw)
    (photos / "1.txt").write_text("another caption")
    with pytest.raises(DataError, match=r"has changed since .*raw was fetched"):
        get(photos, raw)
    (raw / "manifest.json").unlink()
    with pytest.raises(DataError, match="already holds another set"):
        get(photos, raw)


def test_two_at_once_do_not_mix(photos: Path, tmp_path: Path, small_parts: None) -> None:
    def again(done: int, total: int | None) -> None:
        if done:
            with pytest.raises(OutputError, match="being written by another process"):
                get(photos, tmp_path / "raw")

    get(photos, tmp_path / "raw", progress=again)


@pytest.mark.slow
def test_preprocess_takes_it(photos: Path, tmp_path: Path, small_parts: None) -> None:
    manifest = get(photos, tmp_path / "raw")
    done = preprocess(tmp_path / "raw", tmp_path / "set", config=PreprocessConfig(validation_fraction=0.2))
    counts = [shard["count"] for shard in done["shards"] if shard["kind"] == "base"]
    assert sum(counts) == manifest["count"] == 20 and not done["refused"]["examples"]
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["source"]["sha256"] == manifest["sha256"]


def test_options_are_checked(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a location"):
        fetch("folder", tmp_path / "raw")
    with pytest.raises(ConfigError, match="takes no location"):
        fetch("scenes", tmp_path / "raw", location="here")
    with pytest.raises(DataError, match="workers"):
        get(photos, tmp_path / "raw", workers=0)
