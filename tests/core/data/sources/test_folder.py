"""Folders: where captions come from, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from physformer_core.data.sources import fetch
from physformer_core.errors import ConfigError, DataError

Make = Callable[..., bytes]
Rows = Callable[[Path], list[dict[str, Any]]]
Quarantine = Callable[[Path], dict[str, str]]


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def get(location: Path, output: Path, **options: Any) -> dict[str, Any]:
    return fetch("folder", output, location=str(location), options=options).manifest


def test_text_files(tmp_path: Path, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine) -> None:
    photos = write(
        tmp_path / "photos",
        {
            "b.png": make_picture(1),
            "b.txt": "\ufeffa bird\n\nthe bird again\r\n",
            "a/c.JPG": make_picture(2, "JPEG"),
            "a/c.txt": "a cat",
            "a/wrong.jpg": make_picture(3, "PNG"),
            "a/wrong.txt": "a wrong ending",
            "bare.png": make_picture(4),
            "empty.png": make_picture(5),
            "empty.txt": "\n",
            "latin.png": make_picture(6),
            "latin.txt": b"caf\xe9",
            "short.png": make_picture(7)[:200],
            "short.txt": "cut short",
            "nothing.png": b"",
            "nothing.txt": "nothing",
            "note.pdf": b"%PDF",
            ".hidden.png": make_picture(8),
        },
    )
    manifest = get(photos, tmp_path / "raw", license="CC0-1.0")
    found = {row["key"]: row for row in rows_of(tmp_path / "raw")}
    assert list(found) == ["b.png", "a/c.JPG", "a/wrong.jpg"]
    assert found["b.png"]["captions"] == ["a bird", "the bird again"]
    assert found["b.png"]["image"] == (photos / "b.png").read_bytes() and found["b.png"]["svg"] is None
    assert (found["b.png"]["width"], found["b.png"]["height"]) == (40, 30)
    assert json.loads(found["a/c.JPG"]["meta"]) == {"path": "a/c.JPG"}
    assert quarantine_of(tmp_path / "raw") == {
        "bare.png": "no caption",
        "empty.png": "empty caption",
        "latin.png": "caption is not UTF-8",
        "short.png": "damaged or cut short",
        "nothing.png": "empty picture file",
    }
    assert manifest["refused"]["no caption"] == 1 and sum(manifest["refused"].values()) == 5
    assert (manifest["looked_at"], manifest["count"], manifest["license"]) == (8, 3, "CC0-1.0")
    assert manifest["notes"] == {"wrong extension": 1} and manifest["ignored"] == {"pdf": 1}


def test_class_folders(tmp_path: Path, make_picture: Make, rows_of: Rows) -> None:
    files = {f"{name}/{i}.png": make_picture(i) for i, name in enumerate(["tabby_cat", "dog", "dog/puppy"])}
    manifest = get(write(tmp_path / "photos", files), tmp_path / "raw")
    assert manifest["classes"] == ["dog", "tabby_cat"]
    found = [(row["key"], row["class_label"], row["captions"]) for row in rows_of(tmp_path / "raw")]
    assert found == [
        ("dog/1.png", 0, ["dog"]),
        ("dog/puppy/2.png", 0, ["dog"]),
        ("tabby_cat/0.png", 1, ["tabby cat"]),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path: Path, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine, kind: str) -> None:
    files: dict[str, bytes | str] = {f"{i}.png": make_picture(i) for i in range(4)}
    entries = [("0.png", "zero, or none", 5), ("0.png", "nought", 5), ("1.png", "one", 7), ("gone.png", "gone", 1)]
    entries += [("0.png", "again", 5), ("../secret.png", "secret", 1), ("2.png", "", 2)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text, "label": label}) for name, text, label in entries]
        files["metadata.jsonl"] = "\n".join([*lines, "{broken"]).encode() + b'\n{"file_name": "3.png", "text": "\xe9"}'
    else:
        lines = [f'{name},"{text}",{label}' for name, text, label in entries]
        files["metadata.csv"] = "\n".join(["file_name,text,label", *lines]).encode() + b"\n3.png,caf\xe9,1\n"
    get(write(tmp_path / "photos", files), tmp_path / "raw", label_column="label")
    found = [(row["key"], row["captions"], row["class_label"]) for row in rows_of(tmp_path / "raw")]
    # A class alone is enough for a picture without a caption.
    assert found == [("0.png", ["zero, or none", "nought"], 5), ("1.png", ["one"], 7), ("2.png", [], 2)]
    refused = quarantine_of(tmp_path / "raw")
    assert refused["gone.png"] == "no such file"
    assert sorted(refused.values()) == sorted(
        ["no such file", "named again", "file outside of the folder"]
        + (["metadata row cannot be read"] * 2 if kind == "jsonl" else ["caption is not UTF-8"])
    )


def test_metadata_that_no_file_can_have(
    tmp_path: Path, make_picture: Make, rows_of: Rows, quarantine_of: Quarantine
) -> None:
    entries = [("0.png", 5), ("1.png", 3_000_000_000), ("2.png", -1), ("3.png", "cat"), ("n" * 300 + ".png", 1)]
    lines = [json.dumps({"file_name": name, "text": "t", "label": label}) for name, label in entries]
    lines.append('{"file_name": "\\ud800.png", "text": "t", "label": 1}')
    files: dict[str, bytes | str] = {f"{i}.png": make_picture(i) for i in range(4)}
    files["metadata.jsonl"] = "\n".join(lines)
    get(write(tmp_path / "photos", files), tmp_path / "raw", label_column="label")
    assert [(row["key"], row["class_label"]) for row in rows_of(tmp_path / "raw")] == [("0.png", 5), ("2.png", None)]
    assert sorted(quarantine_of(tmp_path / "raw").values()) == [
        "cannot be read", "file outside of the folder", "no class number", "no class number",
    ]  # fmt: skip


def test_what_is_no_picture_may_change(tmp_path: Path, make_picture: Make) -> None:
    """The record of runs, say, which grows with each."""
    photos = write(tmp_path / "photos", {"0.png": make_picture(0), "0.txt": "a picture"})
    get(photos, tmp_path / "raw")
    (photos / "physformer.toml").write_text("[[runs]]")
    assert not fetch("folder", tmp_path / "raw", location=str(photos)).fresh


def test_a_licence_that_is_said_later(tmp_path: Path, make_picture: Make) -> None:
    photos = write(tmp_path / "photos", {"0.png": make_picture(0), "0.txt": "a picture"})
    get(photos, tmp_path / "raw")
    get(photos, tmp_path / "raw", license="CC0-1.0")
    get(photos, tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "manifest.json").read_text())["license"] == "CC0-1.0"


def test_a_limit_looks_at_the_first_ones(tmp_path: Path, make_picture: Make, rows_of: Rows, small_parts: None) -> None:
    files: dict[str, bytes | str] = {}
    for i in range(9):
        files |= {f"{i}.png": make_picture(i), f"{i}.txt": f"number {i}"}
    get(write(tmp_path / "photos", files), tmp_path / "raw", limit=6)
    assert [row["key"] for row in rows_of(tmp_path / "raw")] == [f"{i}.png" for i in range(6)]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(tmp_path: Path, make_picture: Make, rows_of: Rows) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in ((b"caf\xe9.png", make_picture(1)), (b"caf\xe9.txt", b"coffee")):
        with open(os.fsencode(tmp_path / "photos") + b"/" + name, "wb") as stream:
            stream.write(content)
    get(tmp_path / "photos", tmp_path / "raw")
    assert [(row["key"], row["captions"]) for row in rows_of(tmp_path / "raw")] == [("caf\\xe9.png", ["coffee"])]


@pytest.mark.parametrize(
    ("files", "options", "error", "message"),
    [
        ({}, {}, DataError, "has no pictures"),
        ({"a.png": b"x"}, {}, DataError, "1 pictures but no captions"),
        ({"a.png": b"x", "a.txt": "a"}, {"captions": "classes"}, DataError, "no sub-folders"),
        ({"a.png": b"x", "a.txt": "a"}, {"captions": "metadata"}, DataError, "no metadata.jsonl"),
        ({"a.png": b"x", "a.txt": "a"}, {"captions": "sound"}, ConfigError, "unknown style"),
        ({"a.png": b"x", "a.txt": "a"}, {"caption_column": ["text"]}, ConfigError, "columns are for metadata"),
        ({"a.png": b"x", "metadata.csv": "name,text\na,b"}, {}, DataError, "has no column file_name"),
        ({"a.png": b"x", "metadata.csv": "", "metadata.jsonl": ""}, {}, DataError, "has both"),
        ({"a.png": b"x", "a.txt": "a"}, {}, DataError, r"no example fit for use: not a picture \(1\)"),
        ({"a.png": b"x", "a.txt": "a"}, {"streaming": True}, ConfigError, "takes no option --streaming"),
    ],
)
def test_folders_that_are_no_use(
    tmp_path: Path, files: dict[str, bytes | str], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(error, match=message) as raised:
        get(write(tmp_path / "photos", files), tmp_path / "raw", **options)
    assert raised.value.hint  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no folder"):
        get(tmp_path / "nowhere", tmp_path / "raw")
