"""What is in a raw set: sizes, buckets, captions, and what occurs twice; as figures and as an HTML page."""

from __future__ import annotations

import functools
import hashlib
import html
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from physformer_core.data.framing import UnusablePicture, kept_area, nearest_bucket, open_bitmap
from physformer_core.data.preprocess import PreprocessConfig
from physformer_core.data.scenes.render import render_svg
from physformer_core.data.set_folder import RAW_FORMAT
from physformer_core.data.workers import run_stream
from physformer_core.errors import DataError
from physformer_core.files import atomic_write

NEAR_BITS = 3
"""Perceptual hashes of 64 bits that differ in at most so many are taken for one picture."""

_COLUMNS = ["key", "svg", "image", "width", "height", "captions", "class_label"]
_HASH_SIDE = 64  # pictures are hashed at 32 pixels: drawings are rasterised at twice that
_SHOWN = 20


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        folder: The set.
        source: Where it comes from, as its manifest says.
        license: Its licence, or None.
        count: Examples.
        refused: How many were refused when it was fetched, by reason.
        notes: How many have which peculiarity.
        undecodable: How many pictures cannot be decoded or drawn now.
        classes: Examples by class label; empty if there are none.
        buckets: (bucket as "WIDTHxHEIGHT", examples, share of their area that the bucket cuts off).
        cut_area: Share of all pictures' area that buckets cut off.
        sides: (smallest, median, largest) of the shorter side in pixels; drawings count with their nominal size.
        captions: Captions in all.
        without_caption: Examples without any.
        words: (fewest, median, 95th percentile, most) words of a caption.
        repeated_captions: (caption, how often) of those that occur more than once, most often first; the first few.
        repeated_captions_count: How many different captions occur more than once.
        near_duplicates: Groups of keys of pictures that look the same; the first few.
        near_duplicates_count: How many pictures are like an earlier one.
    """

    folder: str
    source: dict[str, Any]
    license: str | None
    count: int
    refused: dict[str, int]
    notes: dict[str, int]
    undecodable: int
    classes: dict[str, int]
    buckets: list[tuple[str, int, float]]
    cut_area: float
    sides: tuple[int, int, int]
    captions: int
    without_caption: int
    words: tuple[int, int, int, int]
    repeated_captions: list[tuple[str, int]]
    repeated_captions_count: int
    near_duplicates: list[list[str]]
    near_duplicates_count: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_raw_set(
    folder: str | Path,
    *,
    buckets: Sequence[tuple[int, int]] = PreprocessConfig.buckets,
    workers: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> Inspection:
    """Reads a whole raw set once.

    Memory: about 100 bytes an example (hashes of pictures and captions) and its key.

    Args:
        folder: The set.
        buckets: (height, width) of the whole pictures that preprocessing would cut; each example goes to the nearest.
        workers: Processes, each of which takes files.
        progress: Called with (examples done, examples in all).

    Raises:
        DataError: It is no raw set, or damaged.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    total = manifest["count"]

    def ticked(done: int) -> None:
        if progress is not None:
            progress(done, total)

    found: dict[str, _FileFindings] = {}
    ticked(0)
    run_stream(
        functools.partial(_inspect_file, tuple(buckets)),
        [(folder / entry["name"]) for entry in manifest["files"]],
        workers,
        finished=lambda findings: found.update({findings.name: findings}),
        ticked=ticked,
    )
    files = [found[entry["name"]] for entry in manifest["files"]]
    return _merge(folder, manifest, files)


# One file


@dataclass(frozen=True)
class _FileFindings:
    name: str
    keys: list[str]
    hashes: np.ndarray  # uint64, of those that decode
    hashed: np.ndarray  # their rows
    buckets: dict[str, tuple[int, float]]  # examples, and the sum of the fractions of their areas that are cut off
    sides: np.ndarray
    words: np.ndarray
    captions: dict[bytes, tuple[int, str]]  # by hash: how often, and how it begins
    without_caption: int
    classes: Counter[int]


def _inspect_file(among: tuple[tuple[int, int], ...], path: Path, tick: Callable[[int], None]) -> _FileFindings:
    keys: list[str] = []
    hashes: list[int] = []
    hashed: list[int] = []
    sides: list[int] = []
    words: list[int] = []
    buckets: dict[str, tuple[int, float]] = {}
    captions: dict[bytes, tuple[int, str]] = {}
    classes: Counter[int] = Counter()
    without = 0
    for row in _rows(path):
        size = row["height"], row["width"]
        sides.append(min(size))
        bucket = nearest_bucket(*size, among)
        name = f"{bucket[1]}x{bucket[0]}"
        count, cut = buckets.get(name, (0, 0.0))
        buckets[name] = count + 1, cut + 1 - kept_area(*size, bucket)
        without += not row["captions"]
        for caption in row["captions"] or ():
            text = " ".join(caption.split())
            words.append(len(text.split()))
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            captions[digest] = captions.get(digest, (0, ""))[0] + 1, text[:200]
        if row["class_label"] is not None:
            classes[row["class_label"]] += 1
        try:
            hashes.append(_perceptual_hash(row))
            hashed.append(len(keys))
        except UnusablePicture:
            pass  # counted: it has a key and no hash
        keys.append(row["key"])
        tick(1)
    return _FileFindings(
        path.name,
        keys,
        np.array(hashes, np.uint64),
        np.array(hashed, np.int64),
        buckets,
        np.array(sides, np.int32),
        np.array(words, np.int32),
        captions,
        without,
        classes,
    )


def _rows(path: Path) -> Any:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(32, columns=_COLUMNS):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}", hint="fetch the set again: what is there is kept") from error


def _decoded(row: dict[str, Any], side: int) -> Image.Image:
    """The picture, its longer side at most `side` pixels."""
    if row["svg"] is not None:
        scale = side / max(row["width"], row["height"])
        try:
            return Image.fromarray(
                render_svg(row["svg"], max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale)))
            )
        except DataError as error:
            raise UnusablePicture("cannot be drawn") from error
    if row["image"] is None:
        raise UnusablePicture("no picture")
    picture = open_bitmap(row["image"])
    picture.thumbnail((side, side), Image.Resampling.BOX)
    return picture


def _perceptual_hash(row: dict[str, Any]) -> int:
    import imagehash

    bits = imagehash.phash(_decoded(row, _HASH_SIDE)).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes())


# All files


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder} is not a raw data set: it has no manifest.json", hint="physformer data fetch")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != RAW_FORMAT:
        raise DataError(f"{folder} is not a raw data set", hint="physformer data show draws preprocessed ones")
    return manifest


def _merge(folder: Path, manifest: dict[str, Any], files: Sequence[_FileFindings]) -> Inspection:
    buckets: dict[str, tuple[int, float]] = {}
    captions: dict[bytes, tuple[int, str]] = {}
    classes: Counter[int] = Counter()
    for file in files:
        classes.update(file.classes)
        for name, (count, cut) in file.buckets.items():
            before = buckets.get(name, (0, 0.0))
            buckets[name] = before[0] + count, before[1] + cut
        for digest, (often, text) in file.captions.items():
            captions[digest] = captions.get(digest, (0, ""))[0] + often, text
    repeated = sorted(
        ((text, often) for often, text in captions.values() if often > 1), key=lambda one: (-one[1], one[0])
    )
    keys = list(itertools.chain.from_iterable(file.keys for file in files))
    starts = np.cumsum([0, *(len(file.keys) for file in files)])
    hashes = np.concatenate([file.hashes for file in files])
    places = np.concatenate([file.hashed + start for file, start in zip(files, starts, strict=False)])
    groups = near_groups(hashes)
    sides = np.concatenate([file.sides for file in files])
    words = np.concatenate([file.words for file in files])
    names = manifest.get("classes") or []
    count = len(keys)
    return Inspection(
        folder=str(folder),
        source=manifest["source"],
        license=manifest.get("license"),
        count=count,
        refused=manifest.get("refused", {}),
        notes=manifest.get("notes", {}),
        undecodable=count - len(hashes),
        classes={names[label] if label < len(names) else str(label): classes[label] for label in sorted(classes)},
        buckets=[(name, many, cut / many) for name, (many, cut) in sorted(buckets.items(), key=lambda one: -one[1][0])],
        cut_area=sum(cut for _, cut in buckets.values()) / max(1, count),
        sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        captions=len(words),
        without_caption=sum(file.without_caption for file in files),
        words=_spread_of(words),
        repeated_captions=repeated[:_SHOWN],
        repeated_captions_count=len(repeated),
        near_duplicates=[[keys[places[member]] for member in group] for group in groups[:_SHOWN]],
        near_duplicates_count=sum(len(group) - 1 for group in groups),
    )


def _spread_of(words: np.ndarray) -> tuple[int, int, int, int]:
    if not len(words):
        return 0, 0, 0, 0
    return int(words.min()), int(np.median(words)), int(np.percentile(words, 95)), int(words.max())


def near_groups(hashes: np.ndarray, bits: int = NEAR_BITS) -> list[list[int]]:
    """Groups of hashes that are linked by differences of at most `bits` bits; those of one member are left out.

    Of `bits + 1` bands of a hash, two hashes that differ in `bits` bits share one: only those that share a band are
    compared.

    Args:
        hashes: uint64 [n].

    Returns:
        Groups of indices in rising order, in the order of their first members.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    leader = np.arange(len(values))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = int(leader[index])
        return index

    width = 64 // (bits + 1)
    for band in range(bits + 1):
        shared = (values >> np.uint64(band * width)) & np.uint64((1 << width) - 1)
        order = np.argsort(shared, kind="stable")
        edges = np.flatnonzero(np.diff(shared[order])) + 1
        for members in np.split(order, edges):
            for position in range(len(members) - 1):
                rest = members[position + 1 :]
                apart = np.bitwise_count(values[rest] ^ values[members[position]])
                for other in rest[apart <= bits]:
                    one, two = find(int(members[position])), find(int(other))
                    leader[max(one, two)] = min(one, two)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(inverse.tolist()):
        groups[find(value)].append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


# The page


def write_page(inspection: Inspection, path: Path, *, sheet: str | None = None) -> None:
    """Writes an HTML page that needs no network and no script.

    Args:
        inspection: What to show.
        path: The file.
        sheet: Name of a contact sheet beside it.
    """
    one = inspection
    few, median, high, most = one.words
    tables: list[tuple[str, Sequence[tuple[object, object]]]] = [
        (
            "The set",
            [
                ("source", json.dumps(one.source, ensure_ascii=False)),
                ("licence", one.license or "not known"),
                ("examples", one.count),
                ("captions", one.captions),
                ("examples without a caption", one.without_caption),
                ("pictures that cannot be decoded", one.undecodable),
                ("shorter side (smallest, median, largest)", ", ".join(map(str, one.sides))),
                ("words of a caption (fewest, median, 95 %, most)", f"{few}, {median}, {high}, {most}"),
                ("captions that occur more than once", one.repeated_captions_count),
                ("pictures like an earlier one", one.near_duplicates_count),
                ("area that buckets cut off", f"{one.cut_area:.1%}"),
            ],
        ),
        ("Buckets", [(name, f"{count} ({cut:.1%} cut off)") for name, count, cut in one.buckets]),
        ("Classes", list(one.classes.items())[:200]),
        ("Refused when fetched", list(one.refused.items())),
        ("Kept, but not plain", list(one.notes.items())),
        ("Captions that occur most often", one.repeated_captions),
        (
            "Pictures that look the same",
            [(number, ", ".join(keys)) for number, keys in enumerate(one.near_duplicates, 1)],
        ),
    ]
    parts = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">',
        f"<title>{html.escape(one.folder)}</title>",
        "<style>body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
        "td{padding:.1em 1em .1em 0;vertical-align:top;overflow-wrap:anywhere}img{max-width:100%}</style>",
        f"<h1>{html.escape(one.folder)}</h1>",
    ]
    for title, rows in tables:
        if rows:
            cells = "".join(f"<tr><td>{html.escape(str(a))}<td>{html.escape(str(b))}" for a, b in rows)
            parts.append(f"<h2>{title}</h2>\n<table>{cells}</table>")
    if sheet is not None:
        parts.append(f'<h2>Contact sheet</h2>\n<img src="{html.escape(sheet)}" alt="pictures with captions">')
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(parts) + "\n", "utf-8")
