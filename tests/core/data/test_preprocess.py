"""Preprocessing: the same bytes however it is run, mended when interrupted, and every pixel where it says."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from physformer_core.data import framing
from physformer_core.data.examples import chances, make_examples
from physformer_core.data.inspection import inspect_raw_set
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.scenes import render_svg
from physformer_core.errors import ConfigError, DataError, OutputError
from physformer_core.files import sha256_file, sole_writer

Make = Callable[..., dict[str, Any]]
Write = Callable[[Path, list[list[dict[str, Any]]]], Path]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def shard_rows(folder: Path, kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(manifest entry, row) of every stored example of a kind."""
    found = []
    for entry in json.loads((folder / "manifest.json").read_text())["shards"]:
        if entry["kind"] == kind:
            table = pa.ipc.open_file(pa.memory_map(str(folder / entry["name"]))).read_all()
            found += [(entry, row) for row in table.to_pylist()]
    return found


def stored_pixels(entry: dict[str, Any], row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["pixels"], np.uint8).reshape(entry["height"], entry["width"], 3)


@pytest.fixture(scope="module")
def raw_rows(raw_set: Path) -> dict[str, dict[str, Any]]:
    return {r["key"]: r for path in sorted(raw_set.glob("*.parquet")) for r in pq.read_table(path).to_pylist()}


def test_workers_do_not_change_a_byte(
    raw_set: Path, shard_folder: Path, config: PreprocessConfig, tmp_path: Path, small_chunks: None
) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = preprocess(raw_set, tmp_path / "out", config=config, workers=3, progress=lambda *args: told.append(args))
    assert manifest["fresh"]
    assert contents(tmp_path / "out") == contents(shard_folder)
    assert {chunk["chunk"] for chunk in manifest["chunks"]} == {0, 1, 2}
    assert not (tmp_path / "out" / ".partial").exists()
    for stage, total in (("scan", 3), ("captions", manifest["captions"]["count"]), ("pictures", 60)):
        done = [d for s, d, n in told if s == stage and n == total]
        assert done == sorted(done) and done[-1] == total


def test_what_is_lost_is_made_again_and_nothing_else(
    raw_set: Path, shard_folder: Path, config: PreprocessConfig, tmp_path: Path, small_chunks: None
) -> None:
    before = contents(shard_folder)
    folder = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
    assert preprocess(raw_set, folder, config=config)["fresh"] is False
    lost, kept = next(folder.glob("crop-*-00001.arrow")), next(folder.glob("base-*-00002.arrow"))
    lost.unlink()
    times = kept.stat().st_mtime_ns, (folder / "captions.arrow").stat().st_mtime_ns
    assert preprocess(raw_set, folder, config=config)["fresh"] is True
    assert contents(folder) == before
    assert (kept.stat().st_mtime_ns, (folder / "captions.arrow").stat().st_mtime_ns) == times
    with open(folder / "captions.arrow", "r+b") as stream:  # cut short
        stream.truncate(1000)
    preprocess(raw_set, folder, config=config)
    assert contents(folder) == before


def test_an_interrupted_run_goes_on(
    raw_set: Path, shard_folder: Path, config: PreprocessConfig, tmp_path: Path, small_chunks: None
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pictures" and done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(raw_set, tmp_path / "out", config=config, progress=stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match="another configuration"):
        preprocess(raw_set, tmp_path / "out", config=dataclasses.replace(config, seed=4))
    told: list[tuple[str, int, int]] = []
    preprocess(raw_set, tmp_path / "out", config=config, progress=lambda *args: told.append(args))
    assert ("pictures", 40, 60) in told and ("pictures", 0, 60) not in told
    assert contents(tmp_path / "out") == contents(shard_folder)


def test_killed_with_9_and_run_again(
    raw_set: Path, shard_folder: Path, config: PreprocessConfig, tmp_path: Path
) -> None:
    # Killed in a part, while parts are joined, between two shards, and between captions and pictures.
    program = (
        "import json, os, signal, sys\n"
        "from physformer_core.data import preprocess as room, shards\n"
        "raw, output, values, where, after = sys.argv[1:]\n"
        "shards._MIN_SHARD_ROWS = 20\n"
        "module = room if where == 'write_shards' else shards\n"
        "function, left = getattr(module, where), [int(after)]\n"
        "def deadly(*args, **options):\n"
        "    if not left[0]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    return function(*args, **options)\n"
        "setattr(module, where, deadly)\n"
        "room.preprocess(raw, output, config=room.PreprocessConfig.from_dict(json.loads(values)))\n"
    )
    output = tmp_path / "out"
    for where, after in (("write_shards", 0), ("make_examples", 25), ("_write_shard", 1), ("_join", 1)):
        command = [sys.executable, "-c", program, str(raw_set), str(output), json.dumps(vars(config)), where]
        done = subprocess.run([*command, str(after)], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (output / "manifest.json").exists()
    (output / ".base-64x64-train-00001.0123456789ab.tmp.arrow").write_bytes(b"half a shard")
    told: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("physformer_core.data.shards._MIN_SHARD_ROWS", 20)
        preprocess(raw_set, output, config=config, progress=lambda *args: told.append(args))
    assert next(entry for entry in told if entry[0] == "pictures")[1] >= 40  # two of three files were kept
    assert ("captions", 0) not in {entry[:2] for entry in told}
    assert contents(output) == contents(shard_folder)
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_the_area_cut_off_is_told(tmp_path: Path, raw_writer: Write, make_drawing: Make, shard_folder: Path) -> None:
    # 40x32 shows all of the first, and 10/11 of the width of the second.
    rows = [make_drawing(0, 800, 640), make_drawing(1, 880, 640), make_drawing(2, 64, 64)]
    raw = raw_writer(tmp_path / "raw", [rows])
    manifest = preprocess(raw, tmp_path / "set", config=PreprocessConfig())
    assert manifest["buckets"]["40x32"] == {"examples": 2, "cut_area": pytest.approx((0 + 1 / 11) / 2)}
    assert manifest["buckets"]["32x32"] == {"examples": 1, "cut_area": 0}
    assert manifest["cut_area"] == pytest.approx(1 / 33)
    stored = json.loads((shard_folder / "manifest.json").read_text())
    assert sum(bucket["examples"] for bucket in stored["buckets"].values()) == 60
    # The inspection of the raw set foretells it.
    assert inspect_raw_set(raw).cut_area == pytest.approx(manifest["cut_area"])


def test_a_set_of_another_configuration_is_refused_then_replaced(
    raw_set: Path, shard_folder: Path, config: PreprocessConfig, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
    other = dataclasses.replace(config, crops_per_example=0.0)
    with pytest.raises(DataError, match="another configuration") as error:
        preprocess(raw_set, folder, config=other)
    assert "another output folder" in str(error.value.hint)
    assert contents(folder) == contents(shard_folder)
    with (
        sole_writer(folder),
        pytest.raises(OutputError, match="being written by another process"),
    ):
        preprocess(raw_set, folder, config=other, overwrite=True)
    assert contents(folder) == contents(shard_folder), "nothing goes while another process writes"
    preprocess(raw_set, folder, config=other, overwrite=True)
    assert not list(folder.glob("crop-*"))
    with pytest.raises(DataError, match="physformer-raw/1"):
        preprocess(raw_set, raw_set, config=config, overwrite=True)


def test_pictures_are_cut_not_stretched(shard_folder: Path, raw_rows: dict[str, dict[str, Any]]) -> None:
    rows = shard_rows(shard_folder, "base")
    assert len(rows) == 60 and len({row["key"] for _, row in rows}) == 60
    for entry, row in rows:
        raw = raw_rows[row["key"]]
        if raw["svg"] is None:
            continue
        height, width = entry["height"], entry["width"]
        scale = max(height / raw["height"], width / raw["width"])
        # A large rendering at the exact scale, cut to the bucket's aspect and averaged.
        big = render_svg(raw["svg"], round(raw["width"] * scale * 8), round(raw["height"] * scale * 8))
        top, left = (big.shape[0] - 8 * height) // 2, (big.shape[1] - 8 * width) // 2
        cut = big[top : top + 8 * height, left : left + 8 * width].astype(float)
        expected = cut.reshape(height, 8, width, 8, 3).mean((1, 3))
        difference = np.abs(stored_pixels(entry, row) - expected)
        assert difference.mean() < 2.5 and np.median(difference) < 1, row["key"]


def test_crops_lie_where_they_say(shard_folder: Path, raw_rows: dict[str, dict[str, Any]]) -> None:
    rows = shard_rows(shard_folder, "crop")
    levels = set()
    buckets = {row["key"]: (entry["height"], entry["width"]) for entry, row in shard_rows(shard_folder, "base")}
    for entry, row in rows:
        raw, bucket = raw_rows[row["key"]], buckets[row["key"]]
        levels.add(row["level"])
        if row["level"] == 5:
            continue  # whole pictures of 2048 pixels take the time of all others together
        height, width = bucket[0] << row["level"], bucket[1] << row["level"]
        y0, x0, y1, x1 = row["place"]
        top, left = round(y0 * height), round(x0 * width)
        assert top % 8 == left % 8 == 0
        assert (round(y1 * height) - top, round(x1 * width) - left) == (entry["height"], entry["width"])
        if raw["svg"] is not None:
            picture: framing.FramedPicture = framing.FramedDrawing(raw["svg"], (raw["height"], raw["width"]), bucket)
        else:
            image = Image.open(io.BytesIO(raw["image"]))
            assert height <= image.height and width <= image.width, "enlarged"
            picture = framing.FramedBitmap(image, bucket)
        whole = picture.pixels(framing.Window(row["level"], 0, 0, height, width)).astype(int)
        window = whole[top : top + entry["height"], left : left + entry["width"]]
        difference = np.abs(window - stored_pixels(entry, row))
        # The rasteriser's coverage of a pixel on an edge may fall on the other side of a rounding.
        assert difference.mean() < 0.2 and (difference > 2).mean() < 0.01, row["key"]
        if raw["image"] is not None:
            assert difference.max() <= 1
    assert {1, 2, 3} <= levels <= {1, 2, 3, 4, 5}
    assert 60 <= len(rows) <= 120


def test_a_drawing_shows_the_same_frame_at_every_level(make_drawing: Make) -> None:
    raw = make_drawing(5, 700, 480)
    picture = framing.FramedDrawing(raw["svg"], (480, 700), (56, 72))
    base = picture.whole().astype(float)
    fine = picture.pixels(framing.Window(3, 0, 0, 448, 576)).astype(float)
    difference = np.abs(fine.reshape(56, 8, 72, 8, 3).mean((1, 3)) - base)
    # The rasteriser knows coverage to a quarter of a pixel; a shift by half a pixel would give 127 along every edge.
    assert difference.max() < 70 and difference.mean() < 0.5


def test_a_bitmap_is_averaged_over_areas_once(make_bitmap: Make) -> None:
    image = framing.open_bitmap(make_bitmap(1, 256, 256)["image"])
    picture = framing.FramedBitmap(image, (64, 64))
    assert picture.max_level == 2
    expected = np.asarray(image).astype(float).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(picture.whole() - expected).max() <= 0.51
    assert np.array_equal(picture.pixels(framing.Window(2, 0, 0, 256, 256)), np.asarray(image))
    with pytest.raises(framing.UnusablePicture, match="smaller"):
        framing.FramedBitmap(image.resize((60, 256)), (64, 64))


def test_bitmaps_are_upright_and_on_white() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (40, 20), "red").save(stream, "JPEG", exif=exif)
    assert framing.open_bitmap(stream.getvalue()).size == (20, 40)
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(stream, "PNG")
    assert framing.open_bitmap(stream.getvalue()).getpixel((3, 3)) == (255, 255, 255)
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(stream, "PNG")
    assert framing.open_bitmap(stream.getvalue()).getpixel((3, 3)) == (128, 128, 128)


def photograph_file(height: int, width: int, **options: Any) -> bytes:
    stream = io.BytesIO()
    coarse = np.random.default_rng(0).integers(0, 256, (height // 12, width // 12, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
        stream, "JPEG", quality=92, **options
    )
    return stream.getvalue()


@pytest.mark.parametrize(("height", "width"), [(301, 333), (512, 512), (263, 511)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_jpeg_is_decoded_as_finely_as_it_is_needed(height: int, width: int, level: int) -> None:
    encoded, bucket = photograph_file(height, width), (32, 40)
    whole = framing.FramedBitmap(framing.open_bitmap(encoded), bucket)
    reduction = framing.reduction_to(bucket, height, width)
    image, shrunk = framing.EncodedBitmap(encoded).decode(shrink=reduction / 2**level / 2)
    assert shrunk == 2 ** max(0, int(np.log2(reduction / 2**level)) - 1) and image.width == -(-width // shrunk)
    small = framing.FramedBitmap(image, bucket, size=(height, width), shrunk=shrunk)
    assert small.max_level == whole.max_level
    window = framing.Window(level, 8, 16, (bucket[0] << level) - 8, (bucket[1] << level) - 16)
    difference = np.abs(whole.pixels(window).astype(int) - small.pixels(window))
    # A shift by half a pixel of the level would give 10 to 23 on average.
    assert difference.mean() < 3 and np.percentile(difference, 99) < 11
    if shrunk > 1:
        with pytest.raises(ValueError, match="coarser"):
            small.pixels(framing.Window(whole.max_level, 0, 0, 8, 8))


def test_a_jpeg_that_was_turned_is_decoded_smaller_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = photograph_file(240, 400, exif=exif)
    bitmap = framing.EncodedBitmap(encoded)
    assert (bitmap.height, bitmap.width) == (400, 240)
    small, shrunk = bitmap.decode(shrink=5.0)
    assert shrunk == 4 and small.size == (60, 100)
    upright = np.asarray(framing.open_bitmap(encoded)).astype(float).reshape(100, 4, 60, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(small) - upright).mean() < 2
    # Of sides that it does not divide, a part of a pixel would come to the front.
    exif[0x0112] = 3
    assert framing.EncodedBitmap(photograph_file(242, 400, exif=exif)).decode(shrink=5.0)[1] == 2
    assert framing.EncodedBitmap(photograph_file(243, 400, exif=exif)).decode(shrink=5.0)[1] == 1
    assert framing.EncodedBitmap(photograph_file(243, 400)).decode(shrink=5.0)[1] == 4


def test_examples_of_a_jpeg_are_those_of_its_pixels(config: PreprocessConfig) -> None:
    """The same windows whether it can be decoded smaller or not, and nearly the same pixels."""
    config = dataclasses.replace(config, base_views=2, crops_per_example=2, levels=(1,), level_weights=(1.0,))
    encoded = photograph_file(803, 1041)
    stream = io.BytesIO()
    framing.open_bitmap(encoded).save(stream, "PNG")
    for key in ("a", "b", "c", "d"):
        raw = {"key": key, "svg": None, "height": 803, "width": 1041}
        jpeg, png = (make_examples(raw | {"image": file}, config) for file in (encoded, stream.getvalue()))
        assert [one.columns for one in jpeg.examples] == [one.columns for one in png.examples]
        for one, other in zip(jpeg.examples, png.examples, strict=True):
            assert 0 < np.abs(one.pixels.astype(int) - other.pixels).mean() < 3


def test_chance_is_of_the_seed_and_the_key_alone() -> None:
    """The same numbers as ever: they are what a set's bytes come from."""
    config = PreprocessConfig(seed=3, base_views=3, crops_per_example=1.5, crop_candidates=2)
    digest = hashlib.sha256(b"3/some key").digest()
    told = chances(config, "some key")
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    assert told == [rng.random() for _ in range(3 * 2 + 1 + 2 * 6)]
    assert chances(dataclasses.replace(config, seed=4), "some key") != told != chances(config, "another key")


def test_lively_windows_are_preferred(make_drawing: Make) -> None:
    picture = framing.FramedDrawing(make_drawing(2, 500, 500)["svg"], (500, 500), (64, 64))
    overview = picture.whole()

    def mean_variance(fraction: float) -> float:
        chance = iter(np.random.default_rng(0).random(40 * framing.chances_of_window(3)).tolist())
        options = {"levels": (3,), "weights": (1.0,), "candidates": 3, "variance_fraction": fraction}
        draws = [framing.draw_window(chance, picture.max_level, **options) for _ in range(40)]
        windows = [draw.choose(picture, overview, size=96) for draw in draws if draw]
        return float(np.mean([picture.pixels(window).var(axis=(0, 1)).sum() for window in windows]))

    # They are compared in the small picture, and differ as much at their own resolution.
    assert mean_variance(1.0) > 1.3 * mean_variance(0.0)


def test_what_cannot_be_used_is_counted(
    tmp_path: Path, raw_writer: Write, make_drawing: Make, make_bitmap: Make, make_row: Make
) -> None:
    good, long_only, some_long = make_drawing(0), make_drawing(1), make_drawing(2)
    long_only["captions"] = ["word " * 60]
    some_long["captions"] = ["many " * 60, "  a  short one ", "a short one"]
    damaged, tiny, thin = make_bitmap(1), make_bitmap(2, 30, 30), make_drawing(3, 900, 100)
    damaged["image"] = damaged["image"][:200]
    broken = make_row("broken", svg="<svg viewBox='x'>", captions=["a thing"])
    nothing = make_row("nothing", captions=["a thing"])
    empty = make_row("empty", svg=good["svg"], captions=["", "  "])
    rows = [good, long_only, some_long, damaged, tiny, thin, broken, nothing, empty]
    manifest = preprocess(
        raw_writer(tmp_path / "raw", [rows]), tmp_path / "out", config=PreprocessConfig(validation_fraction=0.0)
    )
    assert manifest["refused"] == {
        "examples": {
            "cannot be decoded": 1,
            "cannot be drawn": 1,
            "no picture": 1,
            "no usable caption": 2,
            "smaller than its bucket": 1,
            "too long or too tall for every bucket": 1,
        },
        "captions": {"too long": 2, "empty": 1},
    }
    assert {row["key"] for _, row in shard_rows(tmp_path / "out", "base")} == {"drawing-0", "drawing-2"}
    captions = pa.ipc.open_file(pa.memory_map(str(tmp_path / "out" / "captions.arrow"))).read_all().to_pylist()
    assert [c["length"] for c in captions] == sorted(c["length"] for c in captions)
    assert all(len(c["tokens"]) == c["length"] * 384 * 2 and len(c["pooled"]) == 384 * 2 for c in captions)
    assert [c["text"] for c in captions].count("a short one") == 1


def test_a_raw_set_that_is_no_good_is_refused(tmp_path: Path, raw_writer: Write, make_drawing: Make) -> None:
    config = PreprocessConfig()
    with pytest.raises(DataError, match="not a raw data set"):
        preprocess(tmp_path / "nowhere", tmp_path / "out", config=config)
    raw_writer(tmp_path / "twice", [[make_drawing(0), make_drawing(0)]])
    with pytest.raises(DataError, match="a key that another one has"):
        preprocess(tmp_path / "twice", tmp_path / "out", config=config)
    raw = raw_writer(tmp_path / "raw", [[make_drawing(0)]])
    with open(raw / "examples-00000.parquet", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="damaged"):
        preprocess(raw, tmp_path / "other", config=config)
    (raw / "examples-00000.parquet").unlink()
    with pytest.raises(DataError, match="missing"):
        preprocess(raw, tmp_path / "other", config=config)


def test_further_views_differ_and_validation_stays_apart(tmp_path: Path, raw_writer: Write, make_drawing: Make) -> None:
    raw = raw_writer(tmp_path / "raw", [[make_drawing(i) for i in range(12)]])
    folders = {}
    for seed in (0, 1):
        config = PreprocessConfig(base_views=2, crops_per_example=0, validation_fraction=0.4, seed=seed)
        preprocess(raw, tmp_path / str(seed), config=config)
        rows = shard_rows(tmp_path / str(seed), "base")
        assert len(rows) == 24
        pairs = [(first, second) for (_, first), (_, second) in zip(rows[::2], rows[1::2], strict=True)]
        assert all(first["key"] == second["key"] for first, second in pairs)
        assert sum(first["pixels"] != second["pixels"] for first, second in pairs) >= 10
        folders[seed] = {row["key"] for entry, row in rows if entry["split"] == "validation"}
    assert folders[0] == folders[1] and 0 < len(folders[0]) < 12


def test_more_tokens_than_the_encoder_takes_are_refused(tmp_path: Path, raw_writer: Write, make_bitmap: Make) -> None:
    raw = raw_writer(tmp_path / "raw", [[make_bitmap(0)]])
    with pytest.raises(ConfigError, match="minilm takes 256 tokens, not 512") as caught:
        preprocess(raw, tmp_path / "set", config=PreprocessConfig(max_tokens=512))
    assert caught.value.hint == "--max-tokens 256" and not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buckets": [[64, 63]]}, "even sides"),
        ({"buckets": [[64, 64], [64, 64]]}, "twice"),
        ({"levels": [1, 2]}, "as many weights"),
        ({"levels": [0], "level_weights": [1.0]}, "from 1 to 8"),
        ({"level_weights": [1, 1, 1, 1, 0]}, "positive"),
        ({"crop_size": 90}, "multiple of 8"),
        ({"validation_fraction": 1.5}, "from 0 to 0.9"),
        ({"bucket": []}, "unknown preprocessing option 'bucket'"),
        ({"crop_size": "96"}, "wrong type"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessConfig.from_dict(values)
    assert PreprocessConfig.from_dict({"buckets": [[64, 64]]}).buckets == ((64, 64),)
