"""Tars, tables and Hub data sets (from a local repository of the same layout): every example, once."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from physformer_core.data.sources import fetch
from physformer_core.errors import ConfigError, DataError, PhysFormerError

Make = Callable[..., bytes]
Rows = Callable[[Path], list[dict[str, Any]]]
Quarantine = Callable[[Path], dict[str, str]]
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]
WriteShard = Callable[[Path, int, int], Path]


def get(source: str, location: Path | str, output: Path, **options: Any) -> dict[str, Any]:
    return fetch(source, output, location=str(location), options=options).manifest


class Stop(Exception):
    """An interruption."""


def interrupted_then_resumed(source: str, location: Path | str, output: Path, after: int, **options: Any) -> int:
    """Stops a fetch when `after` examples are done, and goes on. Returns how many were kept."""

    def stop(done: int, total: int | None) -> None:
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        fetch(source, output, location=str(location), options=options, progress=stop)
    told: list[int] = []
    fetch(source, output, location=str(location), options=options, progress=lambda done, total: told.append(done))
    return told[0]


def same(first: Path, second: Path) -> bool:
    return all(
        (first / path.name).read_bytes() == path.read_bytes()
        for path in second.iterdir()
        if path.name != "manifest.json"
    ) and json.loads((first / "manifest.json").read_text()) == json.loads((second / "manifest.json").read_text())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> Path:
    """A data set repository with the layout of jackyhate/text-to-image-2M: two folders of tars, and a card."""
    folder = tmp_path_factory.mktemp("hub") / "text-to-image"
    for number, (first, count) in enumerate([(0, 7), (7, 6), (13, 5)]):
        write_shard(folder / "data_512_2M" / f"data_{number:06d}.tar", first, count)
    write_shard(folder / "data_1024_10K" / "data_000000.tar", 100, 3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    return folder


# WebDataset


@pytest.mark.parametrize("pattern", ["*.tar", "data_{000000..000002}.tar", "data_{000000,000001,000002}.tar", ""])
def test_tars_by_pattern(repository: Path, tmp_path: Path, rows_of: Rows, pattern: str, small_parts: None) -> None:
    manifest = get("webdataset", repository / "data_512_2M" / pattern, tmp_path / "raw")
    found = rows_of(tmp_path / "raw")
    assert [row["captions"] for row in found] == [[f"picture number {i}"] for i in range(18)]
    assert found[0]["key"] == "data_000000.tar/000000000" and len({row["key"] for row in found}) == 18
    assert manifest["count"] == manifest["looked_at"] == 18 and not manifest["notes"]


def test_tars_resume_and_stop_at_the_limit(repository: Path, tmp_path: Path, rows_of: Rows, small_parts: None) -> None:
    shards = str(repository / "data_512_2M" / "*.tar")
    get("webdataset", shards, tmp_path / "once", limit=12)
    assert interrupted_then_resumed("webdataset", shards, tmp_path / "twice", 9, limit=12) == 7
    assert [row["captions"][0] for row in rows_of(tmp_path / "once")] == [f"picture number {i}" for i in range(12)]
    assert same(tmp_path / "once", tmp_path / "twice")
    fetch("webdataset", tmp_path / "workers", location=shards, options={"limit": 12}, workers=2)
    assert same(tmp_path / "once", tmp_path / "workers")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_odd_tars(
    tmp_path: Path, write_tar: WriteTar, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine, name: str,
    small_parts: None,
) -> None:  # fmt: skip
    members = [
        ("./x/one.jpg", make_picture(1, "JPEG")), ("./x/one.txt", b"one"), ("./x/one.json", b'{"prompt": "other"}'),
        ("README", b"none of them"),
        ("two.caption", b"two"), ("two.cls", b"3"), ("two.seg.png", b"mask"), ("two.PNG", make_picture(2)),
        ("three.txt", b"no picture"),
        ("four.webp", make_picture(4, "WEBP")), ("four.json", b'{"captions": ["four", "IV"]}'),
        ("two.png", make_picture(5)), ("two.txt", b"the key again"),
        ("six" * 60 + ".png", make_picture(6)), ("six" * 60 + ".txt", b"a long name"),
        ("seven.png", make_picture(7)), ("seven.txt", b"\xff\xfe"),
    ]  # fmt: skip
    get("webdataset", write_tar(tmp_path / name, members), tmp_path / "raw")
    found = [
        (row["key"].removeprefix(f"{name}/"), row["captions"], row["class_label"]) for row in rows_of(tmp_path / "raw")
    ]
    assert found == [
        ("./x/one", ["one"], None), ("two", ["two"], 3), ("four", ["four", "IV"], None),
        ("six" * 60, ["a long name"], None),
    ]  # fmt: skip
    refused = {
        key.removeprefix(f"{name}/").partition("@")[0]: why for key, why in quarantine_of(tmp_path / "raw").items()
    }
    assert refused == {
        "three": "no picture", "two": "key occurs twice in its tar", "seven": "caption is not UTF-8",
    }  # fmt: skip


def test_class_numbers_of_tars(
    tmp_path: Path, write_tar: WriteTar, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine
) -> None:
    members = []
    for number, label in enumerate(("3", '"cat"', "null", "-1")):
        text = f'{{"caption": "t", "label": {label}}}'.encode()
        members += [(f"{number}.png", make_picture(number)), (f"{number}.json", text)]
    get("webdataset", write_tar(tmp_path / "a.tar", members), tmp_path / "raw", label_column="json.label")
    assert [row["class_label"] for row in rows_of(tmp_path / "raw")] == [3, None, None]
    assert list(quarantine_of(tmp_path / "raw").values()) == ["no class number"]
    members = [("0.png", make_picture(0)), ("0.txt", b"t"), ("0.cls", b" 3\n"), ("1.png", make_picture(1))]
    members += [("1.txt", b"t"), ("1.cls", b"-1"), ("2.png", make_picture(2)), ("2.txt", b"t"), ("2.cls", b"cat")]
    get("webdataset", write_tar(tmp_path / "b.tar", members), tmp_path / "named", label_column="cls")
    assert [row["class_label"] for row in rows_of(tmp_path / "named")] == [3, None]


def test_a_compressed_tar_with_flipped_bytes(
    repository: Path, tmp_path: Path, rows_of: Rows, quarantine_of: Quarantine
) -> None:
    """Some are only noticed as what cannot be decompressed."""
    content = gzip.compress((repository / "data_512_2M" / "data_000000.tar").read_bytes(), mtime=0)

    def flipped(seed: int) -> bytes:
        bad = bytearray(content)
        for place in random.Random(seed).sample(range(len(content) // 2, len(content) - 50), 20):
            bad[place] ^= 255
        return bytes(bad)

    def fails(bad: bytes) -> bool:
        try:
            gzip.decompress(bad)
        except zlib.error:
            return True
        except (OSError, EOFError):
            pass
        return False

    bad = next(bad for seed in range(1000) if fails(bad := flipped(seed)))
    (tmp_path / "a.tar.gz").write_bytes(bad)
    get("webdataset", tmp_path / "a.tar.gz", tmp_path / "raw")
    assert "archive damaged or cut short" in quarantine_of(tmp_path / "raw").values()
    assert [row["captions"][0] for row in rows_of(tmp_path / "raw")][:2] == ["picture number 0", "picture number 1"]


@pytest.mark.parametrize("damage", ["cut in a picture", "cut in a header", "header overwritten"])
def test_damaged_tars(
    repository: Path, tmp_path: Path, rows_of: Rows, quarantine_of: Quarantine, damage: str, small_parts: None
) -> None:
    import tarfile

    broken = Path(shutil.copy(repository / "data_512_2M" / "data_000000.tar", tmp_path / "broken.tar"))
    with tarfile.open(broken) as archive:
        place = archive.getmembers()[10]  # the picture of number 5
    content = broken.read_bytes()
    if damage == "header overwritten":
        content = content[: place.offset] + b"\x55" * 512 + content[place.offset + 512 :]
    else:
        content = content[: place.offset + (900 if damage == "cut in a picture" else 100)]
    broken.write_bytes(content)
    get("webdataset", broken, tmp_path / "raw")
    assert [row["captions"][0] for row in rows_of(tmp_path / "raw")] == [f"picture number {i}" for i in range(5)]
    assert set(quarantine_of(tmp_path / "raw").values()) == {"archive damaged or cut short"}


# Tables


def table(make_picture: Make, count: int, first: int = 0) -> pa.Table:
    return pa.table(
        {
            "image": [{"bytes": make_picture(i, "JPEG"), "path": f"{i}.jpg"} for i in range(first, first + count)],
            "id": list(range(count)),
            "json": [{"prompt": f"picture number {i}", "score": 1.0} for i in range(first, first + count)],
            "label": [i % 3 - 1 for i in range(first, first + count)],
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_tables(tmp_path: Path, make_picture: Make, rows_of: Rows, kind: str, small_parts: None) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for number, count in enumerate((5, 0, 6)):
        rows = table(make_picture, count, 10 * number) if count else table(make_picture, 1).slice(0, 0)
        if kind == "parquet":
            pq.write_table(rows, folder / f"{number}.parquet", row_group_size=2)
        else:
            create = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
            with create(folder / f"{number}.arrow", rows.schema) as writer:
                writer.write_table(rows, max_chunksize=2)
    get("parquet", folder, tmp_path / "raw", limit=10)
    found = rows_of(tmp_path / "raw")
    numbers = [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
    assert [row["captions"][0] for row in found] == [f"picture number {i}" for i in numbers]
    assert [row["class_label"] for row in found] == [None if i % 3 == 0 else i % 3 - 1 for i in numbers]
    suffix = "parquet" if kind == "parquet" else "arrow"
    assert found[0]["image"] == make_picture(0, "JPEG") and found[5]["key"] == f"2.{suffix}:0"
    assert interrupted_then_resumed("parquet", folder, tmp_path / "twice", 9, limit=10) == 8
    assert same(tmp_path / "raw", tmp_path / "twice")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_class_inside_of_json(tmp_path: Path, make_picture: Make, rows_of: Rows, kind: str) -> None:
    texts = [json.dumps({"prompt": f"number {i}", "label": i % 2}) for i in range(4)]
    rows = pa.table({"image": [{"bytes": make_picture(i), "path": None} for i in range(4)], "json": texts})
    if kind == "parquet":
        pq.write_table(rows, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(tmp_path / "a.arrow", rows.schema) as writer:
            writer.write_table(rows)
    get("parquet", tmp_path / f"a.{kind}", tmp_path / "raw", caption_column=["json.prompt"], label_column="json.label")
    assert [row["class_label"] for row in rows_of(tmp_path / "raw")] == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"no example fit for use: no class number \(4\)"):
        get("parquet", tmp_path / f"a.{kind}", tmp_path / "raw2", caption_column=["json.prompt"], label_column="json")


def test_tables_that_are_no_use(tmp_path: Path, make_picture: Make) -> None:
    rows = table(make_picture, 2)
    pq.write_table(rows, tmp_path / "a.parquet")
    for options, message in (
        ({"image_column": "jpg"}, "has no column 'jpg'"),
        ({"caption_column": ["json.text"]}, "has no column 'json.text'"),
        ({"label_column": "class"}, "has no column 'class'"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            get("parquet", tmp_path / "a.parquet", tmp_path / "raw", **options)
        assert "image, id, json, label, json.prompt" in str(raised.value.hint)
    pq.write_table(rows.select(["id", "json"]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="called like a picture"):
        get("parquet", tmp_path / "b.parquet", tmp_path / "raw")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:500])
    with pytest.raises(DataError, match=r"cannot read .*c\.parquet"):
        get("parquet", tmp_path / "c.parquet", tmp_path / "raw")
    for location, message in (
        (tmp_path / "d.parquet", "there is no file"),
        (tmp_path / "raw", "there is no file"),
        ("s3://bucket/a.parquet", "not on this machine"),
    ):
        with pytest.raises(DataError, match=message):
            get("parquet", location, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


# The Hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_repository_of_tars(
    repository: Path, tmp_path: Path, rows_of: Rows, make_picture: Make, streaming: bool, small_parts: None
) -> None:
    options = {"data_files": "data_512_2M/*.tar", "streaming": streaming, "limit": 15}
    manifest = get("huggingface", repository, tmp_path / "once", **options)
    found = rows_of(tmp_path / "once")
    assert [row["captions"][0] for row in found] == [f"picture number {i}" for i in range(15)]
    assert all(row["image"] == make_picture(i, "JPEG") for i, row in enumerate(found))
    assert found[7]["key"] == "train-000000007" and "data_000001.tar: 000000007" in found[7]["meta"]
    assert manifest["license"] == "mit" and manifest["source"]["options"]["caption_column"] == ["json.prompt"]
    assert interrupted_then_resumed("huggingface", repository, tmp_path / "twice", 9, **options) == 8
    assert same(tmp_path / "once", tmp_path / "twice")


def test_a_repository_of_tables(tmp_path: Path, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine) -> None:
    import datasets

    broken = make_picture(2, "JPEG")[:200]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bird", "cat"]),
        }
    )
    encoded = [make_picture(0), make_picture(1), broken]
    values = {"image": [{"bytes": one, "path": None} for one in encoded], "text": ["a", "b", "c"], "label": [1, 0, 1]}
    folder = tmp_path / "repository"
    for split in ("train", "test"):
        datasets.Dataset.from_dict(values, features).to_parquet(folder / "data" / f"{split}-00000.parquet")
    manifest = get("huggingface", folder, tmp_path / "raw", split="test")
    found = rows_of(tmp_path / "raw")
    assert [(row["captions"], row["class_label"]) for row in found] == [(["a"], 1), (["b"], 0)]
    assert manifest["classes"] == ["bird", "cat"]
    assert quarantine_of(tmp_path / "raw") == {"test-000000002": "damaged or cut short"}
    with pytest.raises(DataError, match="validation") as raised:
        get("huggingface", folder, tmp_path / "other", split="validation")
    assert "--split" in str(raised.value.hint)
    with pytest.raises(DataError, match=r"no such data files|cannot read"):
        get("huggingface", folder, tmp_path / "other", data_files="none/*.tar")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("location", "message"),
    [("no such/name/here", "neither a folder nor a name"), ("owner/name", "cannot reach the Hub for owner/name")],
)
def test_a_name_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PhysFormerError, match=message) as raised:
        get("huggingface", location, tmp_path / "raw")
    assert raised.value.hint and "\n" not in raised.value.message
    assert not (tmp_path / "raw").exists()
