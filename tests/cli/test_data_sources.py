"""`physformer data fetch` from sources of existing pictures, and `physformer data inspect`."""

import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from physformer_core.files import sha256_file
from physformer_core.project import Project

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def photos(tmp_path):
    """20 captioned pictures, and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture number {i}")
    (folder / "web.jpg").write_text("<html>")
    (folder / "web.txt").write_text("a page")
    return folder


def test_fetch_inspect_preprocess(physformer, photos, tmp_path):
    fetch = ("data", "fetch", "folder", photos, "--output", "raw", "--workers", 1, "--license", "CC0-1.0")
    code, out, err = physformer(*fetch, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["count"] == 20 and result["refused"] == {"not a picture": 1}
    assert "fetching folder: 21/21" in err and "1 pictures refused: not a picture" in err
    run = Project.load("physformer.toml").runs[-1]
    assert {os.path.basename(output.path) for output in run.outputs} == {
        "examples-00000.parquet", "manifest.json", "quarantine.jsonl",
    }  # fmt: skip
    assert run.config["source"] == "folder" and run.config["license"] == "CC0-1.0"
    assert run.seeds == [] and "seed" not in run.config
    code, _, err = physformer(*fetch)
    assert code == 0 and "nothing to do: raw is complete (20 pictures)" in err
    code, out, _ = physformer("runs", "replay", run.id)
    assert code == 0 and out == "agrees: 3 of 3 outputs have the same bytes\n"

    begun = time.time()
    code, out, err = physformer("data", "inspect", "raw", "--workers", 1)
    assert code == 0 and "examples" in out and "bucket 40x32" in out, err
    assert Image.open(tmp_path / "raw-inspection" / "sheet.png").width == 8 * 170 + 10
    assert "not a picture" in (tmp_path / "raw-inspection" / "index.html").read_text()
    other = ("--buckets", "64x64", "-o", "report", "--json")
    code, out, _ = physformer("data", "inspect", "raw", "--workers", 1, *other)
    assert code == 0 and json.loads(out)["buckets"][0][:2] == ["64x64", 20]
    code, out, _ = physformer("data", "inspect", "raw", "--workers", 1, *other[2:])
    assert code == 0 and json.loads(out)["count"] == 20 and (tmp_path / "report" / "index.html").exists()
    assert Project.load("physformer.toml").runs[-1].data_sha256 == sha256_file("raw/manifest.json")

    code, _, err = physformer("data", "inspect", "raw", "--count", 5000)
    assert code == 1 and "is too large" in err and "inspecting" not in err
    with contextlib.chdir("raw"):
        code, _, err = physformer("data", "inspect", ".", "--workers", 1, "--no-record")
        assert code == 0 and (tmp_path / "raw-inspection" / "index.html").stat().st_mtime > begun, err
    code, _, err = physformer("data", "show", "raw", "-o", ".")
    assert code == 1 and "a sheet is a PNG file" in err and "hint: --output picture.png" in err
    text = Path("physformer.toml").read_text()
    Path("physformer.toml").write_text(text.replace("[data]\n", "[data]\nworkers = 0\n", 1))
    code, _, err = physformer("data", "inspect", "raw")
    assert code == 1 and "workers must be at least 1, not 0" in err
    Path("physformer.toml").write_text(text)

    code, out, err = physformer("data", "preprocess", "raw", "-o", "set", "--workers", 1, "--levels", "1", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["train_base"] + made["validation_base"] == 20


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["folder"], ["error: source 'folder' needs a location: a folder", "hint: fetch folder LOCATION"]),
        (["folder", "nowhere"], ["error: there is no folder nowhere", "hint: give the folder"]),
        (["folder", "photos", "--count", "3"], ["error: source 'folder' takes no option --count", "hint: it takes"]),
        (["scenes", "--split", "test"], ["error: source 'scenes' takes no option --split", "hint: it takes --count"]),
        (["scenes", "photos"], ["error: source 'scenes' takes no location", "hint: leave 'photos' out"]),
        (["webdataset", "photos/*.tar"], ["error: there is no file photos/*.tar", "hint: give tars"]),
        (["parquet", "gs://a/b"], ["error: gs://a/b is not on this machine", "hint: mount the bucket"]),
        (["huggingface", "a/b/c"], ["error: 'a/b/c' is neither a folder nor a name", "hint: names have the form"]),
    ],
)
def test_fetch_refuses(physformer, photos, arguments, lines):
    code, out, err = physformer("data", "fetch", *arguments, "--no-record")
    shown = err.splitlines()
    assert code == 1 and out == "" and len(shown) == 2, err
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True)), err
