"""`physformer data fetch|preprocess|show`."""

import json
import shutil

import pytest
from PIL import Image

from physformer_core.files import sha256_file
from physformer_core.project import Project

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def last_run():
    return Project.load("physformer.toml").runs[-1]


def fetch(physformer, *more, count=12):
    return physformer("data", "fetch", "scenes", "--count", count, "--output", "raw", "--workers", 1, *more)


def test_fetch_again_has_nothing_to_do(physformer, tmp_path):
    code, out, err = fetch(physformer, "--json")
    assert code == 0 and "fetching scenes: 12/12" in err
    result = json.loads(out)
    assert result["fresh"] and result["count"] == 12
    record = last_run()
    assert record.command == "data fetch" and record.seeds == [0] and record.config["count"] == 12
    assert {output.path for output in record.outputs} == {"raw/examples-00000.parquet", "raw/manifest.json"}
    assert result["manifest_sha256"] == sha256_file("raw/manifest.json")

    code, out, err = fetch(physformer)
    assert (code, out) == (0, "") and err == "nothing to do: raw is complete (12 scenes)\n"


def test_fetch_mends_a_set_that_lost_a_file(physformer, tmp_path):
    fetch(physformer)
    file = tmp_path / "raw" / "examples-00000.parquet"
    before = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(before[:100])):
        damage()
        code, _, err = fetch(physformer)
        assert code == 0 and "wrote raw" in err and file.read_bytes() == before


def test_fetch_is_replayed(physformer):
    fetch(physformer, "--seed", 3, "--aspect", "16:9")
    assert last_run().config["aspect"] == pytest.approx(16 / 9)
    code, out, _ = physformer("runs", "replay", "last")
    assert code == 0 and out == "agrees: 2 of 2 outputs have the same bytes\n"


def test_settings_of_the_project_file(physformer, tmp_path):
    (tmp_path / "physformer.toml").write_text("[data]\nseed = 5\nworkers = 1\n")
    physformer("data", "fetch", "scenes", "-n", 2, "-o", "raw")
    assert last_run().seeds == [5] and last_run().config["workers"] == 1
    physformer("data", "fetch", "scenes", "-n", 2, "-o", "other", "--seed", 6, "--no-record")
    assert last_run().seeds == [5]
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())["source"]["seed"] == 6


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["moon"], ["error: unknown source 'moon'", "hint: known ones: scenes (captioned scenes"]),
        (["scenes", "-o", "raw", "-n", "13"], ["error: raw already holds another set", "hint: choose an empty folder"]),
        (["scenes", "--aspect", "wide"], ["error: 'wide' is not an aspect ratio", "hint: give width:height"]),
        (["scenes", "--aspect", "99:1", "-o", "new"], ["error: aspect 99 is not between", "hint: for example 16:9"]),
        (["scenes", "-n", "2", "-o", "file/x"], ["error: cannot write file/x", "hint: check the path"]),
    ],
)
def test_fetch_refuses(physformer, tmp_path, arguments, lines):
    fetch(physformer)
    (tmp_path / "file").write_text("")
    code, out, err = physformer("data", "fetch", *arguments)
    shown = err.splitlines()
    assert code == 1 and out == "" and len(shown) == 2
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))
    assert not (tmp_path / "new").exists()


def test_preprocess(physformer, scene_raw, tmp_path):
    command = ("data", "preprocess", scene_raw, "--output", "set", "--validation-fraction", 0.2, "--workers", 1)
    options = ("--levels", "2,3", "--crop-size", 80)
    code, out, err = physformer(*command, *options, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["fresh"] and result["train_base"] + result["validation_base"] == 60
    assert "cutting pictures: 60/60" in err and "encoding captions: " in err
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["config"]["levels"] == [2, 3] and manifest["config"]["level_weights"] == [0.25, 0.2]
    record = last_run()
    assert record.data_sha256 == sha256_file(scene_raw / "manifest.json")
    assert record.config["crop_size"] == 80 and "set/captions.arrow" in {output.path for output in record.outputs}

    code, _, err = physformer(*command, *options)
    assert code == 0 and err.startswith("nothing to do: set is complete (")
    (tmp_path / "set" / "captions.arrow").unlink()
    code, out, _ = physformer(*command, *options, "--json")
    assert code == 0 and json.loads(out)["fresh"] and (tmp_path / "set" / "captions.arrow").exists()

    code, _, err = physformer(*command)
    assert code == 1 and "another configuration" in err and "--overwrite" in err
    code, out, _ = physformer(*command, *options, "--crops-per-example", 0, "--overwrite", "--json")
    assert code == 0 and json.loads(out)["train_crop"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "1,two"], "--levels takes numbers with commas between them, not '1,two'"),
        (["--levels", "1,2", "--level-weights", "1"], "2 levels need as many weights, not 1"),
        (["--crop-size", "90"], "crop_size must be a multiple of 8"),
        (["--preset", "nano", "--buckets", "32x32"], "--preset has no effect beside --buckets"),
        (["--validation-fraction", "2"], "validation_fraction must be from 0 to 0.9"),
    ],
)
def test_preprocess_refuses(physformer, scene_raw, options, message):
    code, _, err = physformer("data", "preprocess", scene_raw, "-o", "set", *options)
    assert code == 1 and f"error: {message}" in err


@pytest.mark.parametrize(("preset", "side"), [((), 32), (("--preset", "mine.toml"), 40), (("--buckets", "16x16"), 16)])
def test_whole_pictures_are_those_of_what_is_to_be_trained(physformer, scene_raw, tmp_path, preset, side):
    (tmp_path / "mine.toml").write_text("[flow]\nbase_area = 1600\nbase_widening = 1.0\n")
    command = ("data", "preprocess", scene_raw, "-o", "set", "--workers", 1, "--crops-per-example", 0)
    code, _, err = physformer(*command, *preset)
    assert code == 0, err
    buckets = json.loads((tmp_path / "set" / "manifest.json").read_text())["config"]["buckets"]
    assert buckets[0] == [side, side] and {min(bucket) for bucket in buckets} == {side}


def test_preprocess_without_a_raw_set(physformer, tmp_path):
    code, _, err = physformer("data", "preprocess", tmp_path, "-o", "set")
    assert code == 1 and "is not a raw data set" in err
    assert last_run().status == "failed"


def test_redraw(physformer, scene_set, tiny_checkpoint, tmp_path):
    shutil.copytree(scene_set, "set")
    command = ("data", "redraw", "set", "--checkpoint", tiny_checkpoint, "--seed", 4)
    code, out, err = physformer(*command, "--json")
    assert code == 0 and "redrawing level 0: " in err
    result = json.loads(out)
    assert result["fresh"] and 0 < result["count"] < 60
    record = last_run()
    assert record.command == "data redraw" and record.seeds == [4]
    assert record.checkpoint_sha256 == result["checkpoint"] and record.data_sha256 != result["manifest_sha256"]
    assert result["manifest_sha256"] == sha256_file("set/manifest.json")
    code, out, err = physformer(*command)
    assert (code, out) == (0, "") and err == "nothing to do: set was redrawn by this checkpoint\n"
    options = ("--steps", 1, "--batch-size", 2, "--output", "run", "--no-record")
    code, _, err = physformer("train", "--preset", "debug", "--data-dir", "set", *options)
    assert code == 0 and f"as checkpoint {result['checkpoint'][:12]} drew it" in err
    code, out, _ = physformer("runs", "replay", record.id)
    count = len(record.outputs)
    assert code == 0 and out == f"agrees: {count} of {count} outputs have the same bytes\n"


def test_redraw_a_copy(physformer, scene_set, tiny_checkpoint):
    before = {path.name: sha256_file(path) for path in scene_set.iterdir()}
    command = ("data", "redraw", scene_set, "--checkpoint", tiny_checkpoint, "--output", "copy")
    code, _, err = physformer(*command)
    assert code == 0 and "crops of copy" in err
    assert before == {path.name: sha256_file(path) for path in scene_set.iterdir()}
    assert physformer(*command)[2] == "nothing to do: copy was redrawn by this checkpoint\n"


@pytest.mark.parametrize("what", ["raw", "nothing"])
def test_redraw_refuses(physformer, scene_raw, tiny_checkpoint, tmp_path, what):
    folder = scene_raw if what == "raw" else tmp_path / "none"
    code, out, err = physformer("data", "redraw", folder, "--checkpoint", tiny_checkpoint)
    assert code == 1 and out == "" and "hint: " in err
    assert ("is not of the format" if what == "raw" else "has no manifest.json") in err
    assert last_run().status == "failed"


def test_show(physformer, scene_raw, scene_set, tmp_path):
    code, out, _ = physformer("data", "show", scene_raw, "--count", 10, "--columns", 5, "--json")
    assert code == 0 and json.loads(out)["count"] == 10
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 5 * 170 + 10 and len(sheet.getcolors(1 << 20)) > 100
    before = sha256_file("sheet.png")
    code, _, err = physformer("data", "show", scene_set, "--count", 9)
    assert code == 0 and err == "wrote sheet_1.png: 9 pictures\n", "nothing is overwritten"
    assert sha256_file("sheet.png") == before
    code, out, _ = physformer("data", "show", scene_set, "--kind", "crop", "-o", "deep/crops.png", "--json")
    assert code == 0 and (tmp_path / "deep" / "crops.png").exists() and 30 < json.loads(out)["count"] <= 60
    assert last_run().data_sha256 == sha256_file(scene_set / "manifest.json")


def test_show_shows_the_pictures_of_the_set(scene_set):
    """The pixels on the sheet are those of the shards, enlarged."""
    import numpy as np

    from physformer_core.data.contact_sheet import exhibits
    from physformer_core.data.loader import ShardSet

    shards = ShardSet(scene_set)
    group = shards.groups("base", "train")[0]
    first = exhibits(scene_set, 4, kind="base", size=4 * max(group.size))[0]
    assert (np.asarray(first.picture)[::4, ::4] == group.field(0)).all()
    assert first.caption == shards.caption(int(group.caption_rows[0]))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["none"], "none holds no data set"),
        (None, ["raw", "-o", "sheet.jpg"], "a sheet is a PNG file"),
        (None, ["raw", "--kind", "crop"], "--kind is for preprocessed sets"),
        (None, ["raw", "--kind", "all"], "unknown kind 'all'"),
        ("examples-00000.parquet", ["raw"], "cannot read raw/examples-00000.parquet"),
        ("manifest.json", ["raw"], "cannot read raw/manifest.json"),
        (None, ["raw", "--size", "2000", "--columns", "60"], "a sheet of"),
    ],
)
def test_show_refuses(physformer, scene_raw, tmp_path, change, arguments, message):
    shutil.copytree(scene_raw, tmp_path / "raw")
    if change is not None:
        (tmp_path / "raw" / change).write_bytes(b"PAR1 nothing")
    code, _, err = physformer("data", "show", *arguments)
    assert code == 1 and f"error: {message}" in err and not list(tmp_path.glob("sheet*"))
