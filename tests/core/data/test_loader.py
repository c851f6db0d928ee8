"""Batches: a pure function of seed and step, every example in its turn, and each number where it belongs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from physformer_core.data import framing
from physformer_core.data.loader import Batch, BatchStream, ShardSet, _KindStream, _window, made_ahead
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.data.resident import ResidentFields, Windows, why_not_resident
from physformer_core.errors import ConfigError, DataError
from physformer_core.flow.pyramid import Pyramid
from physformer_core.text import load_text_encoder

OPTIONS: dict[str, Any] = {"seed": 5, "batch_size": 4, "crop_fraction": 0.5, "crop_size": 64}


@pytest.fixture(scope="module")
def shards(shard_folder: Path) -> ShardSet:
    return ShardSet(shard_folder, verify=True)


def same(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(value, getattr(second, name)) if isinstance(value, torch.Tensor) else value == getattr(second, name)
        for name, value in vars(first).items()
    )


def test_a_batch_depends_on_seed_and_step_alone(shards: ShardSet, shard_folder: Path) -> None:
    stream = BatchStream(shards, **OPTIONS)
    batches = [stream.batch(step) for step in range(30)]
    fresh = BatchStream(ShardSet(shard_folder), **OPTIONS)
    for step in (29, 3, 17, 0):
        assert same(fresh.batch(step), batches[step])
    assert [b.kind for b in batches[:6]] == ["base", "crop", "base", "crop", "base", "crop"]
    other = BatchStream(shards, **{**OPTIONS, "seed": 6})
    assert not all(torch.equal(other.batch(s).indices, batches[s].indices) for s in range(30))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_makes_batches_computes_alone_and_nobody_else_does(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def make(number: int) -> int:
            torch.ones(100_000).add_(1)  # a thread learns how many helpers it has when it first computes
            return torch.get_num_threads()

        made = made_ahead(make, 0, ahead=6, threads=threads)
        assert [next(made) for _ in range(9)] == [1] * 9
        assert torch.get_num_threads() == 2 and torch.__config__.parallel_info().count("get_num_threads() : 2") == 1
        made.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_made_ahead_are_the_batches_by_step(shards: ShardSet) -> None:
    stream = BatchStream(shards, **OPTIONS)
    expected = [stream.batch(step) for step in range(7, 12)]
    made = made_ahead(stream.batch, 7, ahead=4, threads=2)
    for batch, wanted in zip(itertools.islice(made, 5), expected, strict=True):
        assert same(batch, wanted)
    made.close()


def test_shapes_and_ranges(shards: ShardSet) -> None:
    stream = BatchStream(shards, **OPTIONS)
    shapes = set()
    for step in range(20):
        batch = stream.batch(step)
        tokens = batch.prompt_embeds_btd.shape[1]
        assert batch.pixels_bchw.dtype == batch.prompt_embeds_btd.dtype == batch.pooled_bp.dtype == torch.float32
        assert batch.pixels_bchw.is_contiguous() and batch.pixels_bchw.shape[:2] == (4, 3)
        assert -1 <= batch.pixels_bchw.min() < batch.pixels_bchw.max() <= 1
        assert batch.prompt_embeds_btd.shape == (4, tokens, shards.hidden_size) and tokens % 8 == 0
        assert batch.prompt_mask_bt.shape == (4, tokens) and batch.prompt_mask_bt.dtype == torch.bool
        assert batch.pooled_bp.shape == (4, shards.pooled_size)
        assert batch.level_b.dtype == torch.long and batch.place_b4.dtype == torch.float32
        if batch.kind == "base":
            shapes.add(tuple(batch.pixels_bchw.shape[2:]))
            assert not batch.level_b.any()
            assert torch.equal(batch.place_b4, torch.tensor([[0.0, 0, 1, 1]] * 4))
        else:
            assert batch.pixels_bchw.shape[2:] == (64, 64)
            assert batch.level_b.min() >= 1
    assert len(shapes) > 2


def test_pixels_and_places_are_those_of_the_shard(shards: ShardSet, shard_folder: Path) -> None:
    stored = {}
    index = 0
    entries = [e for e in shards.manifest["shards"] if e["kind"] == "crop" and e["split"] == "train"]
    for entry in sorted(entries, key=lambda e: (e["height"], e["width"], e["chunk"])):
        for row in pa.ipc.open_file(pa.memory_map(str(shard_folder / entry["name"]))).read_all().to_pylist():
            pixels = np.frombuffer(row["pixels"], np.uint8).reshape(entry["height"], entry["width"], 3)
            stored[index] = (row, pixels.astype(np.float32) / 127.5 - 1)
            index += 1
    offsets = set()
    stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": 1.0})
    for step in range(12):
        batch = stream.batch(step)
        for i in range(4):
            row, whole = stored[int(batch.indices[i])]
            assert shards.example_key("crop", int(batch.indices[i])) == row["key"]
            assert int(batch.level_b[i]) == row["level"]
            assert int(batch.caption_rows[i]) in row["captions"]
            height, width = whole.shape[:2]
            y0, x0, y1, x1 = row["place"]
            # Where the window lies in the stored crop, from its place in the picture.
            top = (float(batch.place_b4[i, 0]) - y0) / (y1 - y0) * height
            left = (float(batch.place_b4[i, 1]) - x0) / (x1 - x0) * width
            bottom = (float(batch.place_b4[i, 2]) - y0) / (y1 - y0) * height
            assert abs(bottom - top - 64) < 1e-2
            assert abs(top - round(top)) < 1e-2 and abs(left - round(left)) < 1e-2
            top, left = round(top), round(left)
            assert top % 2 == left % 2 == 0
            assert 2 <= top <= height - 64 - 2 and 2 <= left <= width - 64 - 2
            offsets.add((top, left))
            window = torch.from_numpy(whole[top : top + 64, left : left + 64].copy()).permute(2, 0, 1)
            assert torch.allclose(batch.pixels_bchw[i], window, atol=1e-6)
    assert len(offsets) > 20


def test_a_crops_coarse_field_is_that_of_the_whole_picture(
    tmp_path: Path, raw_writer: Callable[..., Path], make_bitmap: Callable[..., dict[str, Any]]
) -> None:
    # Pictures that are their own level 2, so that the whole field of every crop is known.
    rows = [make_bitmap(i, 256, 256) for i in range(8)]
    config = PreprocessConfig(levels=(2,), level_weights=(1,), validation_fraction=0, buckets=((64, 64),))
    preprocess(raw_writer(tmp_path / "raw", [rows]), tmp_path / "set", config=config)
    shards = ShardSet(tmp_path / "set")
    pixels = {row["key"]: torch.from_numpy(np.array(framing.open_bitmap(row["image"]))) for row in rows}
    whole = {key: picture.permute(2, 0, 1)[None].float() / 127.5 - 1 for key, picture in pixels.items()}
    stream = BatchStream(shards, seed=1, batch_size=8, crop_fraction=1.0, crop_size=64)
    for step in range(6):
        batch = stream.batch(step)
        assert batch.coarse_bchw is not None
        for i in range(8):
            picture = whole[shards.example_key("crop", int(batch.indices[i]))]
            top, left = (round(float(batch.place_b4[i, axis]) * 256) for axis in (0, 1))
            window = (0, slice(None), slice(top, top + 64), slice(left, left + 64))
            assert torch.allclose(picture[window], batch.pixels_bchw[i], atol=1e-6)
            assert torch.allclose(Pyramid.blur(picture)[window], batch.coarse_bchw[i], atol=1e-5)


def test_the_coarse_field_of_a_crop_that_is_taken_whole(shards: ShardSet) -> None:
    stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": 1.0, "crop_size": None, "batch_size": 2})
    for step in range(10):
        batch = stream.batch(step)
        assert batch.coarse_bchw is not None
        assert torch.allclose(Pyramid.blur(batch.pixels_bchw), batch.coarse_bchw, atol=1e-5)


def test_crops_can_be_taken_whole(shards: ShardSet) -> None:
    stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": 1.0, "crop_size": None, "batch_size": 2})
    sizes = {tuple(stream.batch(step).pixels_bchw.shape[2:]) for step in range(40)}
    assert sizes == set(shards.sizes("crop")) and (96, 96) in sizes


def test_prompts_are_what_the_encoder_gives(shards: ShardSet) -> None:
    batch = BatchStream(shards, **OPTIONS).batch(2)
    texts = [shards.caption(int(row)) for row in batch.caption_rows]
    embeddings = load_text_encoder("minilm").encode(texts)
    tokens = embeddings.tokens_btd.shape[1]
    assert torch.equal(batch.prompt_mask_bt[:, :tokens], embeddings.mask_bt)
    assert not batch.prompt_mask_bt[:, tokens:].any()
    assert torch.allclose(batch.prompt_embeds_btd[:, :tokens], embeddings.tokens_btd, atol=5e-3)
    assert not batch.prompt_embeds_btd[~batch.prompt_mask_bt].any()
    assert torch.allclose(batch.pooled_bp, embeddings.pooled_bp, atol=5e-3)


def test_all_captions_of_an_example_come_up(shards: ShardSet) -> None:
    stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": 0.0})
    seen: dict[int, set[int]] = {}
    for step in range(120):
        batch = stream.batch(step)
        for index, row in zip(batch.indices.tolist(), batch.caption_rows.tolist(), strict=True):
            seen.setdefault(index, set()).add(row)
    variants = Counter(len(rows) for rows in seen.values())
    assert variants[3] > 20  # drawings have three, bitmaps one
    assert set(variants) <= {1, 2, 3}


def test_class_labels_come_along(shards: ShardSet) -> None:
    labels: dict[str, int] = {}
    for split in ("train", "validation"):
        stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": 0.0}, split=split)
        for step in range(30):
            batch = stream.batch(step)
            for index, label in zip(batch.indices.tolist(), batch.class_label_b.tolist(), strict=True):
                labels[shards.example_key("base", index, split)] = label
    assert len(labels) == 60 and sorted(labels.values()) == [-1] * 59 + [7]


def test_splits_do_not_meet(shards: ShardSet) -> None:
    keys = {
        split: {
            shards.example_key(kind, i, split) for kind in ("base", "crop") for i in range(shards.count(kind, split))
        }
        for split in ("train", "validation")
    }
    assert not keys["train"] & keys["validation"]
    assert len(keys["train"]) > len(keys["validation"]) > 0


def test_nothing_comes_twice_before_all_came_once() -> None:
    stream = _KindStream([40, 8, 3, 21], batch=4, seed=1, kind=0)
    assert stream.per_epoch == 18
    rows: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    for number in range(18 * 12):
        group, found = stream.rows(number)
        rows[group] += found.tolist()
    for group, count in enumerate([40, 8, 3, 21]):
        assert abs(len(rows[group]) - 12 * count) < 4
        # Batches of a group come in shuffled order within an epoch: look at what whole epochs gave.
        times = Counter(rows[group])
        assert set(times) == set(range(count)) and max(times.values()) - min(times.values()) <= 2
    first_epoch = [stream.rows(number) for number in range(10 + 2 + 0 + 5)]
    for group in (0, 1):  # these fill whole batches
        shown = [row for g, found in first_epoch if g == group for row in found]
        assert sorted(shown) == list(range([40, 8][group]))
    assert [group for group, _ in first_epoch] != sorted(group for group, _ in first_epoch)


def test_epochs_are_shuffled_anew() -> None:
    stream = _KindStream([64], batch=8, seed=1, kind=0)
    epochs = [np.concatenate([stream.rows(8 * e + n)[1] for n in range(8)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_ranks_share_the_global_batch(shards: ShardSet) -> None:
    whole = BatchStream(shards, **{**OPTIONS, "batch_size": 6})
    ranks = [BatchStream(shards, **{**OPTIONS, "batch_size": 6}, rank=rank, world_size=3) for rank in range(3)]
    for step in range(12):
        expected, parts = whole.batch(step), [stream.batch(step) for stream in ranks]
        for name in ("pixels_bchw", "place_b4", "level_b", "indices", "caption_rows", "pooled_bp"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name)), name
        assert {part.kind for part in parts} == {expected.kind}


@pytest.mark.parametrize("kind", ["base", "crop"])
def test_no_example_is_lost_or_repeated_when_ranks_change(shards: ShardSet, shard_folder: Path, kind: str) -> None:
    """Three resumes in an epoch, each in a new process's stream, with other numbers of ranks."""
    options = {"seed": 2, "batch_size": 6, "crop_fraction": 1.0 if kind == "crop" else 0.0}
    straight = BatchStream(shards, **options)
    epochs = 6
    steps = math.ceil(epochs * straight.steps_per_epoch(kind))
    seen: list[int] = []
    worlds = [1, 3, 2, 1, 2, 3]
    for number, world in enumerate(worlds):
        first, last = steps * number // len(worlds), steps * (number + 1) // len(worlds)
        resumed = ShardSet(shard_folder)
        streams = [BatchStream(resumed, **options, rank=rank, world_size=world) for rank in range(world)]
        ranks = [made_ahead(stream.batch, first, ahead=2) for stream in streams]
        for step in range(first, last):
            parts = [next(rank) for rank in ranks]
            together = torch.cat([part.indices for part in parts])
            expected = straight.batch(step)
            assert torch.equal(together, expected.indices)
            assert torch.equal(torch.cat([part.caption_rows for part in parts]), expected.caption_rows), (
                "the same pictures met other captions"
            )
            seen += together.tolist()
        for rank in ranks:
            rank.close()
    # Of each size every example comes once before any comes again: so counts differ by one at most, also mid-way.
    times = Counter(seen)
    for group in shards.groups(kind, "train"):
        counts = [times[group.first + row] for row in range(group.count)]
        assert max(counts) - min(counts) <= (1 if kind == "base" else 2) and min(counts) >= epochs - 2
    assert sum(times.values()) == 6 * steps


def test_ranks_that_do_not_divide_a_batch_and_parts_of_their_shares(shards: ShardSet) -> None:
    whole = BatchStream(shards, **{**OPTIONS, "batch_size": 8}).batch(3)
    shares = [BatchStream(shards, **{**OPTIONS, "batch_size": 8}, rank=r, world_size=3).batch(3) for r in range(3)]
    assert [share.count for share in shares] == [2, 3, 3] and {share.total for share in shares} == {8}
    parts = [part for share in shares for part in share.parts(2)]
    assert [(part.first, part.count) for part in parts] == [(0, 1), (1, 1), (2, 1), (3, 2), (5, 1), (6, 2)]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    assert torch.equal(torch.cat([part.pixels_bchw for part in parts]), whole.pixels_bchw)
    with pytest.raises(ValueError, match="2 examples do not make 3 parts"):
        shares[0].parts(3)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.65, 1.0])
def test_crops_come_as_often_as_asked(shards: ShardSet, fraction: float) -> None:
    stream = BatchStream(shards, **{**OPTIONS, "crop_fraction": fraction})
    kinds = [stream.kind(step) for step in range(300)]
    assert abs(kinds.count("crop") - 300 * fraction) <= 1
    assert stream.batch(299).kind == kinds[299]


def test_what_cannot_be_given_is_refused(shards: ShardSet, shard_folder: Path, raw_set: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"crop_size": 94}, "does not fit"),
        ({"crop_size": 63}, "even number"),
        ({"crop_fraction": 1.5}, "from 0 to 1"),
        ({"rank": 2, "world_size": 2}, "not one of 2"),
        ({"batch_size": 1, "world_size": 2}, "cannot be divided over 2 processes"),
        ({"split": "test"}, "validation"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            BatchStream(shards, **{**OPTIONS, **wrong})
    with pytest.raises(DataError, match="not of the format"):
        ShardSet(raw_set)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        ShardSet(tmp_path)
    folder = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
    name = shards.manifest["shards"][0]["name"]
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    ShardSet(folder)
    with pytest.raises(DataError, match="is damaged"):
        ShardSet(folder, verify=True)
    (folder / name).write_bytes(data[:-8])
    with pytest.raises(DataError, match="cut short"):
        ShardSet(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["kind"] == "base" and shard["name"] != name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no crops"):
        BatchStream(ShardSet(folder), **OPTIONS)


@pytest.mark.parametrize("crop_size", [64, None])
def test_batches_from_a_devices_memory_are_those_from_files(shards: ShardSet, crop_size: int | None) -> None:
    options = {**OPTIONS, "crop_size": crop_size, "batch_size": 4 if crop_size else 2}
    from_files = BatchStream(shards, **options)
    from_memory = BatchStream(shards, **options, device=torch.device("cpu"))
    assert {from_files.batch(step).kind for step in range(24)} == {"base", "crop"}
    for step in range(24):
        assert same(from_files.batch(step), from_memory.batch(step))


def test_windows_beyond_a_field_are_mirrored_in_memory_too(shards: ShardSet) -> None:
    groups = list(shards.groups("crop", "train"))
    which, inside = np.arange(len(groups)), np.array([group.count - 1 for group in groups])
    reach = np.full(len(groups), -5)
    sides = [side for group in groups for side in group.size]
    windows = Windows(which, inside, reach, reach, min(sides) + 8, min(sides) + 6)
    taken = ResidentFields(groups, torch.device("cpu")).take(windows)
    for group, row, found in zip(groups, inside, taken, strict=True):
        wanted = _window(group.field(int(row)), -5, -5, windows.height, windows.width)
        assert torch.equal(found, torch.from_numpy(wanted.copy()))


def test_threads_make_ahead_in_order_and_stop() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        made.append(number)
        return number * number

    numbers = made_ahead(make, 3, ahead=6, threads=3)
    assert list(itertools.islice(numbers, 10)) == [number * number for number in range(3, 13)]
    numbers.close()
    assert sorted(made) == list(range(3, 3 + len(made))) and len(made) <= 10 + 7


def test_what_a_thread_raises_comes_out() -> None:
    def fail(number: int) -> int:
        raise DataError(f"no {number}")

    with pytest.raises(DataError, match="no 7"):
        next(made_ahead(fail, 7, ahead=2))


def test_only_gpus_hold_sets_in_their_memory(shards: ShardSet) -> None:
    assert why_not_resident(shards, torch.device("cpu")) == "the device is no GPU"
    stored = sum(entry["bytes"] for entry in shards.manifest["shards"] if entry["split"] == "train")
    assert shards.resident_bytes("train") == stored + shards.manifest["captions"]["bytes"]
