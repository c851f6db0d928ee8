"""Raw pictures and captions -> Arrow shards of training examples that a loader maps into memory.

Each example becomes level-0 pictures (whole, in one of a few sizes: buckets) and crops of finer levels; each distinct
caption is encoded once. What an example becomes depends on the configuration and the example's key alone, so the
number of worker processes and interruptions leave no trace in the result. A finished part is kept: a second call does
what is missing, and nothing if nothing is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from physformer_core.data import framing
from physformer_core.data.captions import write_captions
from physformer_core.data.workers import Progress, run_tasks
from physformer_core.errors import ConfigError, DataError
from physformer_core.files import atomic_write, sha256_file

RAW_FORMAT = "physformer-raw/1"
SHARDS_FORMAT = "physformer-shards/1"

# Raise it whenever the same configuration would give other bytes: it is a part of every set's key.
_CODE_VERSION = 1

_PARTIAL = ".partial"
_MAX_CHUNKS = 32  # bounds the number of shards, which a loader keeps open all at once
_MIN_CHUNK_ROWS = 2000
_SHARD_BATCH_ROWS = 256
_MAX_ZOOM = 1.18


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What decides the bytes of a preprocessed set, together with the raw set and the text encoder's weights.

    Attributes:
        buckets: (height, width) of level-0 pictures in pixels, multiples of 8, all of about one area.
        base_views: Level-0 pictures per example. The first shows as much as the bucket's aspect allows, further ones
            up to 15 % less, at a random place.
        min_kept_area: Pictures of which no bucket shows at least this fraction are refused.
        crops_per_example: Crops of finer levels per example; 1.5 gives one or two.
        levels: Levels that crops are taken from; level l has 2^l times a bucket's resolution.
        level_weights: How often each of them, relative to the others.
        crop_size: Side of a crop in pixels, a multiple of 8.
        crop_candidates: Windows drawn for each crop.
        variance_fraction: How often the one with the largest pixel variance is kept, instead of the first.
        validation_fraction: Fraction of examples set aside, by a hash of their keys.
        encoder: Text encoder, as for `text.load_text_encoder`.
        max_tokens: Captions with more tokens are left out.
        seed: Seed of all that is drawn.
    """

    buckets: tuple[tuple[int, int], ...] = ((64, 64), (56, 72), (72, 56), (48, 80), (80, 48), (40, 96), (96, 40))
    base_views: int = 1
    min_kept_area: float = 0.5
    crops_per_example: float = 1.0
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    level_weights: tuple[float, ...] = (0.3, 0.25, 0.2, 0.15, 0.1)
    crop_size: int = 96
    crop_candidates: int = 3
    variance_fraction: float = 2 / 3
    validation_fraction: float = 0.01
    encoder: str = "minilm"
    max_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        # TOML and JSON have lists where this has tuples.
        object.__setattr__(self, "buckets", tuple(tuple(bucket) for bucket in self.buckets))
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "level_weights", tuple(self.level_weights))
        if not self.buckets or any(len(b) != 2 or any(side < 8 or side % 8 for side in b) for b in self.buckets):
            raise ConfigError(f"buckets must be (height, width) pairs of multiples of 8, not {self.buckets}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ConfigError("a bucket is named twice")
        if len(set(self.levels)) != len(self.levels) or any(not 1 <= level <= 8 for level in self.levels):
            raise ConfigError(f"levels must be different whole numbers from 1 to 8, not {self.levels}")
        if len(self.levels) != len(self.level_weights):
            raise ConfigError(f"{len(self.levels)} levels need as many weights, not {len(self.level_weights)}")
        if any(weight <= 0 for weight in self.level_weights):
            raise ConfigError(f"level_weights must be positive, not {self.level_weights}")
        if self.crops_per_example > 0 and not self.levels:
            raise ConfigError("crops need levels", hint="set crops_per_example to 0 for a set without crops")
        if self.crop_size < 16 or self.crop_size % 8:
            raise ConfigError(f"crop_size must be a multiple of 8, at least 16, not {self.crop_size}")
        for name, low, high in (
            ("base_views", 1, 100),
            ("min_kept_area", 0, 1),
            ("crops_per_example", 0, 100),
            ("crop_candidates", 1, 16),
            ("variance_fraction", 0, 1),
            ("validation_fraction", 0, 0.9),
            ("max_tokens", 3, 32767),
            ("seed", 0, 2**63 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessConfig:
        """Builds it from a table of a configuration file.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown preprocessing option {unknown[0]!r}", hint=f"known ones: {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"a preprocessing option has a value of the wrong type: {error}") from error


def preprocess(
    raw_dir: str | Path,
    output_dir: str | Path,
    *,
    config: PreprocessConfig,
    progress: Progress | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a preprocessed set, or what of it is missing.

    Keys and distinct captions are held in memory (about 0.3 GB for a million of each); pictures and embeddings are
    streamed.

    Args:
        raw_dir: A raw set.
        output_dir: Where the shards go.
        config: What to make of it.
        progress: Is told how far it has come.
        workers: Processes, of one thread each. They do not change the result.
        overwrite: Replace a set that was made from something else, instead of refusing.

    Returns:
        The manifest, with "fresh" added: False if all was there already and nothing was done.

    Raises:
        ConfigError: The text encoder is unknown.
        DataError: The raw set is missing or damaged, or `output_dir` holds another set.
        OutputError: `output_dir` cannot be written.
    """
    from physformer_core.text import text_encoder_fingerprint

    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    raw, output = Path(raw_dir), Path(output_dir)
    source = _read_raw_manifest(raw)
    fingerprint = text_encoder_fingerprint(config.encoder)
    key = _key(config, source["sha256"], fingerprint)

    done = _finished_manifest(output, key, overwrite=overwrite)
    if done is not None and not _missing_files(output, done):
        return {**done, "fresh": False}
    with atomic_write(output / _PARTIAL / "key.json") as temporary:
        temporary.write_text(json.dumps({"format": SHARDS_FORMAT, "key": key}))
    with _sole_writer(output):
        if done is not None:
            _reopen(output, done)
        scan = _scan(raw, source, config, progress)
        captions = _captions(output, scan, config, fingerprint, workers, progress)
        chunks = _pictures(raw, output, scan, config, workers, progress)
        manifest = _manifest(key, config, source, captions, chunks, scan)
        if not any(shard["kind"] == "base" for shard in manifest["shards"]):
            raise DataError(f"no example of {raw} could be used: {manifest['refused']['examples']}")
        with atomic_write(output / "manifest.json") as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(output / _PARTIAL, ignore_errors=True)
    return {**manifest, "fresh": True}


# The folder: what is there, whose it is, what is missing


def _key(config: PreprocessConfig, source_sha256: str, encoder_sha256: str) -> str:
    parts = {
        "format": SHARDS_FORMAT,
        "code": _CODE_VERSION,
        "config": dataclasses.asdict(config),
        "source": source_sha256,
        "encoder": encoder_sha256,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value


def _read_raw_manifest(raw: Path) -> dict[str, Any]:
    path = raw / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{raw} is not a raw data set: it has no manifest.json", hint="write one: physformer data fetch"
        )
    manifest = _read_json(path)
    if manifest.get("format") != RAW_FORMAT:
        raise DataError(f"{path} has the format {manifest.get('format')!r}, not {RAW_FORMAT!r}")
    for file in manifest["files"]:
        if not (raw / file["name"]).is_file():
            raise DataError(f"{raw / file['name']} is missing", hint="fetch the raw set again: what is there is kept")
    return manifest


def _finished_manifest(output: Path, key: str, *, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of a set with this key, if it was finished. A set with another key is refused or removed."""
    manifest_path, partial_path = output / "manifest.json", output / _PARTIAL / "key.json"
    found = _read_json(manifest_path) if manifest_path.is_file() else None
    if found is not None and found.get("format") != SHARDS_FORMAT:
        raise DataError(
            f"{output} holds a set of the format {found.get('format')!r}", hint="choose another output folder"
        )
    if found is not None and found.get("key") == key:
        return found
    started = _read_json(partial_path) if found is None and partial_path.is_file() else found
    if started is None or started.get("key") == key:
        return None
    if not overwrite:
        raise DataError(
            f"{output} holds a set made with another configuration, source or text encoder",
            hint="choose another output folder, or replace that set with overwrite (--overwrite)",
        )
    manifest_path.unlink(missing_ok=True)  # first: without it the rest is no set
    for pattern in ("base-*.arrow", "crop-*.arrow", "captions.arrow"):
        for path in output.glob(pattern):
            path.unlink()
    shutil.rmtree(output / _PARTIAL, ignore_errors=True)
    return None


def _missing_files(output: Path, manifest: dict[str, Any]) -> list[str]:
    entries = [*manifest["shards"], manifest["captions"]]
    return [entry["name"] for entry in entries if not _is_whole(output, entry)]


def _is_whole(output: Path, entry: dict[str, Any]) -> bool:
    path = output / entry["name"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _reopen(output: Path, manifest: dict[str, Any]) -> None:
    """Turns a finished set that has lost files back into an unfinished one, so that the rest is kept."""
    _write_record(output / _PARTIAL / "captions.json", manifest["captions"])
    for chunk in manifest["chunks"]:
        shards = [shard for shard in manifest["shards"] if shard["chunk"] == chunk["chunk"]]
        _write_record(output / _PARTIAL / f"chunk-{chunk['chunk']:05d}.json", {**chunk, "shards": shards})
    (output / "manifest.json").unlink()


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record))


@contextlib.contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    lock = filelock.FileLock(output / _PARTIAL / "lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout as error:
        raise DataError(f"{output} is being written by another process", hint="wait until it is done") from error


def _manifest(
    key: str,
    config: PreprocessConfig,
    source: dict[str, Any],
    captions: dict[str, Any],
    chunks: list[dict[str, Any]],
    scan: _Scan,
) -> dict[str, Any]:
    refused: Counter[str] = Counter()
    for chunk in chunks:
        refused.update(chunk["refused"])
    return {
        "format": SHARDS_FORMAT,
        "key": key,
        "config": dataclasses.asdict(config),
        "source": {name: source.get(name) for name in ("source", "license", "attribution", "count", "sha256")},
        "shards": [shard for chunk in chunks for shard in chunk["shards"]],
        "captions": captions,
        "chunks": [{name: value for name, value in chunk.items() if name != "shards"} for chunk in chunks],
        "refused": {"examples": dict(sorted(refused.items())), "captions": scan.refused_captions},
    }


# Stage 1: which captions there are, and which rows of the raw set belong together


@dataclass
class _Scan:
    """What the captions of the raw set come to.

    Attributes:
        texts: Distinct captions that are used, shortest first: the rows of captions.arrow.
        lengths: Their tokens.
        rows: For each raw file, the caption rows of all its examples, and where each example's begin.
        chunks: Raw files (as indices) whose examples share shards.
        refused_captions: How many distinct captions are not used, by reason.
    """

    texts: list[str]
    lengths: np.ndarray
    rows: list[tuple[np.ndarray, np.ndarray]]
    chunks: list[list[int]]
    files: list[dict[str, Any]]
    refused_captions: dict[str, int]


def _scan(raw: Path, source: dict[str, Any], config: PreprocessConfig, progress: Progress | None) -> _Scan:
    from physformer_core.text import count_prompt_tokens

    ids: dict[str, int] = {}
    keys: set[str] = set()
    per_file: list[tuple[np.ndarray, np.ndarray]] = []
    for number, file in enumerate(source["files"]):
        if sha256_file(raw / file["name"]) != file["sha256"]:
            raise DataError(f"{raw / file['name']} is damaged", hint="delete it and fetch the raw set again")
        table = pq.read_table(raw / file["name"], columns=["key", "captions"])
        found = table.column("key").to_pylist()
        keys.update(found)
        rows: list[int] = []
        starts = [0]
        for captions in table.column("captions").to_pylist():
            rows.extend(ids.setdefault(" ".join(caption.split()), len(ids)) for caption in captions or ())
            starts.append(len(rows))
        per_file.append((np.array(rows, np.int32), np.array(starts, np.int64)))
        if progress is not None:
            progress("scan", number + 1, len(source["files"]))
    total = sum(len(starts) - 1 for _, starts in per_file)
    if len(keys) != total:
        raise DataError(f"{raw} has {total - len(keys)} examples with a key that another one has")

    texts = list(ids)
    lengths = np.array(count_prompt_tokens(texts, config.encoder), np.int64)
    usable = (lengths > 0) & (lengths <= config.max_tokens)
    # Shortest first: batches then need hardly any padding, and neighbours in time are neighbours on the disk.
    order = sorted(np.flatnonzero(usable).tolist(), key=lambda i: (lengths[i], texts[i]))
    row_of = np.full(len(texts), -1, np.int32)
    row_of[order] = np.arange(len(order), dtype=np.int32)
    refused = {"too long": int((lengths > config.max_tokens).sum()), "empty": int((lengths == 0).sum())}
    return _Scan(
        texts=[texts[i] for i in order],
        lengths=lengths[order] if order else lengths[:0],
        rows=[_keep_usable(row_of[rows], starts) for rows, starts in per_file],
        chunks=_group_files([len(starts) - 1 for _, starts in per_file]),
        files=source["files"],
        refused_captions={reason: count for reason, count in refused.items() if count},
    )


def _keep_usable(rows: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.concatenate([[0], np.cumsum(rows >= 0)])
    return rows[rows >= 0], kept[starts]


def _group_files(counts: Sequence[int]) -> list[list[int]]:
    """Consecutive files, so many together that there are at most `_MAX_CHUNKS` groups or so."""
    target = max(_MIN_CHUNK_ROWS, math.ceil(sum(counts) / _MAX_CHUNKS))
    groups: list[list[int]] = []
    filled = target
    for index, count in enumerate(counts):
        if filled >= target:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += count
    return groups


def _captions(
    output: Path, scan: _Scan, config: PreprocessConfig, fingerprint: str, workers: int, progress: Progress | None
) -> dict[str, Any]:
    """Writes captions.arrow if it is not whole yet and returns its entry in the manifest."""
    record_path = output / _PARTIAL / "captions.json"
    if record_path.is_file():
        record = _read_json(record_path)
        if _is_whole(output, record):
            return record
    record = write_captions(
        output / "captions.arrow",
        scan.texts,
        scan.lengths,
        config.encoder,
        parts=output / _PARTIAL,
        workers=workers,
        progress=progress,
    )
    record["max_tokens"] = config.max_tokens
    record["encoder"] = {"name": config.encoder, "sha256": fingerprint}
    _write_record(record_path, record)
    return record


# Stage 2: pictures -> shards


@dataclass(frozen=True)
class _ChunkTask:
    index: int
    raw: Path
    output: Path
    files: list[str]
    rows: list[tuple[np.ndarray, np.ndarray]]
    config: PreprocessConfig


def _pictures(
    raw: Path, output: Path, scan: _Scan, config: PreprocessConfig, workers: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """Writes the shards of all chunks that are not whole yet and returns all chunks' records in order."""
    tasks = [
        _ChunkTask(index, raw, output, [scan.files[i]["name"] for i in group], [scan.rows[i] for i in group], config)
        for index, group in enumerate(scan.chunks)
    ]
    missing = [task for task in tasks if not _chunk_is_whole(task)]
    sizes = {task.index: sum(len(starts) - 1 for _, starts in task.rows) for task in tasks}
    total = sum(sizes.values())
    done = total - sum(sizes[task.index] for task in missing)
    run_tasks(_write_chunk, missing, workers, progress, "pictures", done, total)
    return [_read_json(_chunk_record(task)) for task in tasks]


def _chunk_record(task: _ChunkTask) -> Path:
    return task.output / _PARTIAL / f"chunk-{task.index:05d}.json"


def _chunk_is_whole(task: _ChunkTask) -> bool:
    path = _chunk_record(task)
    return path.is_file() and all(_is_whole(task.output, shard) for shard in _read_json(path)["shards"])


def _write_chunk(task: _ChunkTask, tick: Callable[[int], None]) -> None:
    refused: Counter[str] = Counter()
    examples: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        shards: dict[tuple[str, int, int, str], _ShardWriter] = {}
        for file, (rows, starts) in zip(task.files, task.rows, strict=True):
            position = 0
            for batch in pq.ParquetFile(task.raw / file).iter_batches(
                batch_size=64, columns=["key", "svg", "image", "width", "height", "class_label"]
            ):
                for raw in batch.to_pylist():
                    captions = rows[starts[position] : starts[position + 1]]
                    position += 1
                    split = _split(raw["key"], task.config.validation_fraction)
                    try:
                        made = _make_example(raw, captions, task.config)
                    except framing.UnusablePicture as reason:
                        refused[str(reason)] += 1
                        made = []
                    else:
                        examples[split] += 1
                    for kind, pixels, extra in made:
                        height, width = pixels.shape[:2]
                        where = (kind, height, width, split)
                        if where not in shards:
                            shards[where] = _ShardWriter(stack, task.output, task.index, *where)
                        shards[where].add(
                            {
                                "pixels": pixels.tobytes(),
                                "captions": captions,
                                "class_label": raw["class_label"],
                                "key": raw["key"],
                                **extra,
                            }
                        )
                    tick(1)
        for shard in shards.values():
            shard.finish()
    record = {
        "chunk": task.index,
        "examples": dict(sorted(examples.items())),
        "refused": dict(sorted(refused.items())),
        "shards": [shards[where].entry() for where in sorted(shards)],
    }
    _write_record(_chunk_record(task), record)


class _ShardWriter:
    """One shard, written in record batches of `_SHARD_BATCH_ROWS` rows."""

    def __init__(
        self, stack: contextlib.ExitStack, output: Path, chunk: int, kind: str, height: int, width: int, split: str
    ) -> None:
        self._path = output / f"{kind}-{height}x{width}-{split}-{chunk:05d}.arrow"
        self._entry = {"kind": kind, "height": height, "width": width, "split": split, "chunk": chunk}
        fields = [
            ("pixels", pa.binary(height * width * 3)),
            ("captions", pa.list_(pa.int32())),
            ("class_label", pa.int32()),
            ("key", pa.string()),
        ]
        if kind == "crop":
            fields += [("level", pa.int8()), ("place", pa.list_(pa.float32(), 4))]
        self._schema = pa.schema(fields)
        temporary = stack.enter_context(atomic_write(self._path))
        self._sink = stack.enter_context(pa.OSFile(str(temporary), "wb"))
        self._writer = stack.enter_context(pa.ipc.new_file(self._sink, self._schema))
        self._rows: list[dict[str, Any]] = []
        self._count = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _SHARD_BATCH_ROWS:
            self._flush()

    def finish(self) -> None:
        if self._rows:
            self._flush()

    def entry(self) -> dict[str, Any]:
        """The manifest's entry of the finished file."""
        size, digest = self._path.stat().st_size, sha256_file(self._path)
        return {"name": self._path.name, **self._entry, "count": self._count, "bytes": size, "sha256": digest}

    def _flush(self) -> None:
        columns = [pa.array([row[field.name] for row in self._rows], field.type) for field in self._schema]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._count += len(self._rows)
        self._rows.clear()


def _split(key: str, validation_fraction: float) -> str:
    # Of the key alone: an example stays on its side whatever the seed, so no later set trains on what judged it.
    share = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def _make_example(
    raw: dict[str, Any], captions: np.ndarray, config: PreprocessConfig
) -> list[tuple[str, np.ndarray, dict[str, Any]]]:
    """All that one raw example becomes: (kind, uint8 [height, width, 3], further columns) each."""
    if len(captions) == 0:
        raise framing.UnusablePicture("no usable caption")
    digest = hashlib.sha256(f"{config.seed}/{raw['key']}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))

    image = None
    height, width = raw["height"], raw["width"]
    if raw["svg"] is None:
        if raw["image"] is None:
            raise framing.UnusablePicture("no picture")
        image = framing.open_bitmap(raw["image"])
        height, width = image.height, image.width
    bucket = framing.nearest_bucket(height, width, config.buckets)
    if framing.kept_area(height, width, bucket) < config.min_kept_area:
        raise framing.UnusablePicture("too long or too tall for every bucket")

    def frame(zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)) -> framing.FramedPicture:
        if image is not None:
            return framing.FramedBitmap(image, bucket, zoom=zoom, offset=offset)
        return framing.FramedDrawing(raw["svg"], (height, width), bucket, zoom=zoom, offset=offset)

    picture = frame()
    made: list[tuple[str, np.ndarray, dict[str, Any]]] = [("base", picture.whole(), {})]
    for _ in range(1, config.base_views):
        zoom, *offset = rng.random(3).tolist()
        made.append(("base", frame(1 + zoom * (_MAX_ZOOM - 1), (offset[0], offset[1])).whole(), {}))
    crops = math.floor(config.crops_per_example) + (rng.random() < config.crops_per_example % 1)
    for _ in range(crops):
        window = framing.choose_window(
            picture,
            rng,
            levels=config.levels,
            weights=config.level_weights,
            size=config.crop_size,
            candidates=config.crop_candidates,
            variance_fraction=config.variance_fraction,
        )
        if window is not None:
            extra = {"level": window.level, "place": picture.place(window)}
            made.append(("crop", picture.pixels(window), extra))
    return made
