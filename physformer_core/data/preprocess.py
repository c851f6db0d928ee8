"""Raw pictures and captions -> Arrow shards of training examples that a loader maps into memory.

Each example becomes level-0 pictures (whole, in one of a few sizes: buckets) and crops of finer levels; each distinct
caption is encoded once. What an example becomes depends on the configuration and the example's key alone, so the
number of worker processes and interruptions leave no trace in the result. A finished part is kept: a second call does
what is missing, and nothing if nothing is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from physformer_core.data.captions import write_captions
from physformer_core.data.latents import FieldSpec, field_of, loaded_codec
from physformer_core.data.preprocess_config import PreprocessConfig
from physformer_core.data.scan import Scan, scan_captions
from physformer_core.data.set_folder import (
    PARTIAL,
    RAW_FORMAT,
    SHARDS_FORMAT,
    is_whole,
    read_json,
    remove_half_written,
    write_json,
)
from physformer_core.data.shard_set import REDRAWN
from physformer_core.data.shards import chunk_record, write_shards
from physformer_core.data.workers import Progress
from physformer_core.errors import ConfigError, DataError
from physformer_core.files import sole_writer

__all__ = ["PreprocessConfig", "preprocess"]

# Raise it whenever the same configuration would give other bytes: it is a part of every set's key.
_CODE_VERSION = 5


def preprocess(
    raw_dir: str | Path,
    output_dir: str | Path,
    *,
    config: PreprocessConfig,
    progress: Progress | None = None,
    workers: int = 1,
    overwrite: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Writes a preprocessed set, or what of it is missing.

    Memory does not grow with the set: captions and keys are on the disk while it is made, pictures are streamed. The
    disk holds up to a sixteenth of the finished set in addition.

    Args:
        raw_dir: A raw set.
        output_dir: Where the shards go.
        config: What to make of it.
        progress: Is told how far it has come.
        workers: Processes, of one thread each. They do not change the result.
        overwrite: Replace a set that was made from something else, instead of refusing.
        device: Where the text encoder and the codec's autoencoder encode; the CPU if not given. It decides the last
            bits of what they give.

    Returns:
        The manifest, with "fresh" added: False if all was there already and nothing was done.

    Raises:
        ConfigError: The text encoder or codec is unknown.
        CheckpointError, DeviceError: The codec cannot be read, or the device is not there.
        DataError: The raw set is missing or damaged, or `output_dir` holds another set.
        OutputError: `output_dir` cannot be written.
    """
    from physformer_core.hardware import resolve_device
    from physformer_core.text import most_prompt_tokens, text_encoder_fingerprint

    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    where = resolve_device(device or "cpu")
    if config.max_tokens > (most := most_prompt_tokens(config.encoder)):
        raise ConfigError(
            f"the text encoder {config.encoder} takes {most} tokens, not {config.max_tokens}",
            hint=f"--max-tokens {most}",
        )
    raw, output = Path(raw_dir), Path(output_dir)
    partial = output / PARTIAL
    source = _read_raw_manifest(raw)
    fingerprint = text_encoder_fingerprint(config.encoder)
    try:
        field = field_of(config.codec, str(where))
        key = _key(config, source["sha256"], fingerprint, field)
        if (whole := _finished_manifest(output, key)) is not None and not _missing_files(output, whole):
            return {**whole, "fresh": False}
        with sole_writer(output):
            done = _finished_manifest(output, key)  # once more, as another process may have finished it meanwhile
            _make_way(output, key, overwrite=overwrite)
            write_json(partial / "key.json", {"format": SHARDS_FORMAT, "key": key})
            remove_half_written(output)
            if done is not None:
                _reopen(output, done)
            names = [file["name"] for file in source["files"]]
            scan = scan_captions(
                raw, names, partial, encoder=config.encoder, max_tokens=config.max_tokens, progress=progress
            )
            captions = _captions(output, scan, config, fingerprint, workers, progress, str(where))

            def tell(count: int, total: int) -> None:
                if progress is not None:
                    progress("pictures", count, total)

            chunks = write_shards(
                raw, output, partial, source["files"], scan, config, field, workers=workers, progress=tell
            )
            manifest = _manifest(key, config, field, source, captions, chunks, scan)
            if not any(shard["kind"] == "base" for shard in manifest["shards"]):
                raise DataError(f"no example of {raw} could be used: {manifest['refused']['examples']}")
            if (partial / _REDRAWN).is_file():  # of the same pictures, and as whole as it was
                manifest[REDRAWN] = read_json(partial / _REDRAWN)
            write_json(output / "manifest.json", manifest, indent=1)
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        loaded_codec.cache_clear()
    return {**manifest, "fresh": True}


# The folder: what is there, whose it is, what is missing


_REDRAWN = "redrawn.json"


def _key(config: PreprocessConfig, source_sha256: str, encoder_sha256: str, field: FieldSpec) -> str:
    parts = {
        "format": SHARDS_FORMAT,
        "code": _CODE_VERSION,
        "config": dataclasses.asdict(config),
        "source": source_sha256,
        "encoder": encoder_sha256,
        "field": field.as_dict(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_raw_manifest(raw: Path) -> dict[str, Any]:
    path = raw / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{raw} is not a raw data set: it has no manifest.json", hint="write one: physformer data fetch"
        )
    manifest = read_json(path)
    if manifest.get("format") != RAW_FORMAT:
        raise DataError(f"{path} has the format {manifest.get('format')!r}, not {RAW_FORMAT!r}")
    for file in manifest["files"]:
        if not (raw / file["name"]).is_file():
            raise DataError(f"{raw / file['name']} is missing", hint="fetch the raw set again: what is there is kept")
    return manifest


def _finished_manifest(output: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a set with this key, if it was finished.

    Raises:
        DataError: The folder holds a set of another kind.
    """
    path = output / "manifest.json"
    found = read_json(path) if path.is_file() else None
    if found is not None and found.get("format") != SHARDS_FORMAT:
        raise DataError(
            f"{output} holds a set of the format {found.get('format')!r}", hint="choose another output folder"
        )
    return found if found is not None and found.get("key") == key else None


def _make_way(output: Path, key: str, *, overwrite: bool) -> None:
    """Removes a set with another key, finished or begun, or refuses to; for who alone writes the folder."""
    manifest_path, partial_path = output / "manifest.json", output / PARTIAL / "key.json"
    there = next((path for path in (manifest_path, partial_path) if path.is_file()), None)
    if there is None or read_json(there).get("key") == key:
        return
    if not overwrite:
        raise DataError(
            f"{output} holds a set made with another configuration, source or text encoder",
            hint="choose another output folder, or replace that set with overwrite (--overwrite)",
        )
    manifest_path.unlink(missing_ok=True)  # first: without it the rest is no set
    for pattern in ("base-*.arrow", "crop-*.arrow", "coarse-*.arrow", "captions.arrow"):
        for path in output.glob(pattern):
            path.unlink()
    shutil.rmtree(output / PARTIAL, ignore_errors=True)


def _missing_files(output: Path, manifest: dict[str, Any]) -> list[str]:
    entries = [*manifest["shards"], manifest["captions"]]
    return [entry["name"] for entry in entries if not is_whole(output, entry)]


def _reopen(output: Path, manifest: dict[str, Any]) -> None:
    """Turns a finished set that has lost files back into an unfinished one, so that the rest is kept."""
    write_json(output / PARTIAL / "captions.json", manifest["captions"])
    for chunk in manifest["chunks"]:
        shards = [shard for shard in manifest["shards"] if shard["chunk"] == chunk["chunk"]]
        write_json(chunk_record(output / PARTIAL, chunk["chunk"]), {**chunk, "shards": shards})
    if REDRAWN in manifest:
        write_json(output / PARTIAL / _REDRAWN, manifest[REDRAWN])
    (output / "manifest.json").unlink()


def _manifest(
    key: str,
    config: PreprocessConfig,
    field: FieldSpec,
    source: dict[str, Any],
    captions: dict[str, Any],
    chunks: list[dict[str, Any]],
    scan: Scan,
) -> dict[str, Any]:
    refused: Counter[str] = Counter()
    area: dict[str, tuple[int, float]] = {}
    for chunk in chunks:
        refused.update(chunk["refused"])
        for bucket, (count, cut) in chunk["area"].items():
            before = area.get(bucket, (0, 0.0))
            area[bucket] = before[0] + count, before[1] + cut
    used = sum(count for count, _ in area.values())
    return {
        "format": SHARDS_FORMAT,
        "key": key,
        "config": dataclasses.asdict(config),
        "field": field.as_dict(),
        "source": {name: source.get(name) for name in ("source", "license", "attribution", "count", "sha256")},
        "shards": [shard for chunk in chunks for shard in chunk["shards"]],
        "captions": captions,
        "chunks": [{name: value for name, value in chunk.items() if name != "shards"} for chunk in chunks],
        "refused": {"examples": dict(sorted(refused.items())), "captions": scan.refused},
        # By bucket (width x height) the examples, and the mean share of their pictures' area that it cuts off.
        "buckets": {name: {"examples": count, "cut_area": cut / count} for name, (count, cut) in sorted(area.items())},
        "cut_area": sum(cut for _, cut in area.values()) / max(1, used),
    }


def _captions(
    output: Path,
    scan: Scan,
    config: PreprocessConfig,
    fingerprint: str,
    workers: int,
    progress: Progress | None,
    device: str,
) -> dict[str, Any]:
    """Writes captions.arrow if it is not whole yet and returns its entry in the manifest."""
    record_path = output / PARTIAL / "captions.json"
    if record_path.is_file():
        record = read_json(record_path)
        if is_whole(output, record):
            return record
    record = write_captions(
        output / "captions.arrow",
        scan,
        config.encoder,
        parts=output / PARTIAL,
        workers=workers,
        progress=progress,
        device=device,
    )
    record["max_tokens"] = config.max_tokens
    record["encoder"] = {"name": config.encoder, "sha256": fingerprint}
    write_json(record_path, record)
    return record
