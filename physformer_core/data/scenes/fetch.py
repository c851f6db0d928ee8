"""Writes a RAW set of composed scenes: parquet files of SVG documents with captions, and a manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from physformer_core.data.scenes.composer import check_aspect, check_pair_share, compose_scene
from physformer_core.data.scenes.variation import check_variation, varied
from physformer_core.data.set_folder import (
    PARTIAL,
    RAW_FORMAT,
    START_AGAIN,
    begin,
    check_source,
    read_json,
    write_json,
)
from physformer_core.data.workers import run_stream
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file, sole_writer

SCENES_VERSION = 6
"""Raised whenever the same seed gives other pictures or captions, so that stale sets are told apart."""

LEAST_HELD_OUT, MOST_HELD_OUT = 0.05, 0.9
"""Bounds of the share of pairs that may be held out: of fewer, a relation might have none to be asked for."""

LICENSE = "CC-BY-4.0"
ATTRIBUTION = (
    "Graphics: Twemoji, copyright 2014-2023 Twitter, Inc and other contributors, CC-BY 4.0; "
    "composed into scenes by PhysFormer."
)

ROWS_PER_FILE = 2000


_Job = tuple[str, int, int, int, float | None, float, float | None, float]
"""File, seed, first and last scene, aspect, share of pairs held out, share of scenes that are pairs, variation."""


def _write_file(job: _Job, tick: Callable[[int], None]) -> _Job:
    """Composes the scenes of one file and writes it. Top-level, because worker processes call it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, seed, start, stop, aspect, held_out, pair_share, variation = job
    ranks = (held_out, 1.0)
    scenes = []
    for index in range(start, stop):
        scenes.append(
            varied(compose_scene(seed, index, aspect=aspect, pair_ranks=ranks, pair_share=pair_share), variation)
        )
        tick(1)
    table = pa.table(
        {
            "key": pa.array([scene.key for scene in scenes], pa.string()),
            "svg": pa.array([scene.svg for scene in scenes], pa.large_string()),
            "image": pa.nulls(len(scenes), pa.binary()),
            "width": pa.array([scene.width for scene in scenes], pa.int32()),
            "height": pa.array([scene.height for scene in scenes], pa.int32()),
            "captions": pa.array([list(scene.captions) for scene in scenes], pa.list_(pa.string())),
            "class_label": pa.array([scene.class_label for scene in scenes], pa.int32()),
            "meta": pa.array([scene.meta_json() for scene in scenes], pa.string()),
        }
    )
    with atomic_write(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=6)
    return job


def _sidecar(path: Path) -> Path:
    return path.parent / PARTIAL / f"{path.stem}.json"


def _finished(path: Path, job: _Job) -> bool:
    """Whether an earlier run wrote this very file completely."""
    sidecar = _sidecar(path)
    if not (path.exists() and sidecar.exists()):
        return False
    note = json.loads(sidecar.read_text("utf-8"))
    return note["job"] == [SCENES_VERSION, *job[1:]] and note["sha256"] == sha256_file(path)


def _read_manifest(path: Path, source: dict[str, object]) -> dict[str, Any] | None:
    """The manifest of a finished set of this very source, or None if there is no set yet."""
    if not path.exists():
        return None
    manifest = read_json(path, hint=START_AGAIN)
    check_source(path.parent, manifest.get("source"), source)
    return manifest


def fetch_scenes(
    output_dir: str | Path,
    *,
    count: int,
    seed: int,
    aspect: float | None = None,
    held_out_pairs: float = 0.0,
    pair_share: float | None = None,
    variation: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    rows_per_file: int = ROWS_PER_FILE,
) -> dict[str, Any]:
    """Composes scenes and writes them as a RAW set.

    A run that was interrupted goes on where it stopped, and files that a finished set has lost are made again. The
    files don't depend on ``workers``.

    Args:
        output_dir: Folder of the set; made if missing.
        count: How many scenes.
        seed: Number of the collection.
        aspect: Width divided by height of all scenes; drawn for each by default.
        held_out_pairs: Share of the pairs of concepts that no scene shows together: 0, or `LEAST_HELD_OUT` to
            `MOST_HELD_OUT`.
        pair_share: Share of the scenes that show two things, 0 to 1; that of `composer.KINDS` by default.
        variation: How much closer scenes may be shown, and how much plain colours may differ; see `variation.varied`.
        progress: Called with (scenes done, scenes in all) before the first and after every file; not at all if the
            set is there already.
        workers: Processes that compose.
        rows_per_file: Scenes in a file.

    Returns:
        The manifest, which is also in ``manifest.json``.

    Raises:
        DataError: If a number is out of range, or the folder holds another set.
        OutputError: If the folder cannot be written.
    """
    if count < 1 or workers < 1 or rows_per_file < 1:
        raise DataError(
            f"count, workers and rows per file must be positive, got {count}, {workers} and {rows_per_file}"
        )
    if held_out_pairs and not LEAST_HELD_OUT <= held_out_pairs <= MOST_HELD_OUT:
        raise DataError(
            f"the share of pairs held out is {held_out_pairs:g}",
            hint=f"0, or from {LEAST_HELD_OUT:g} to {MOST_HELD_OUT:g}; 0.1 is usual",
        )
    if aspect is not None:
        check_aspect(aspect)
    if pair_share is not None:
        check_pair_share(pair_share)
    check_variation(variation)
    folder = Path(output_dir)
    options = {"aspect": aspect, "rows_per_file": rows_per_file, "version": SCENES_VERSION}
    if held_out_pairs:  # left out where there are none: sets from before there was a choice stay the same set
        options["held_out_pairs"] = held_out_pairs
    if pair_share is not None:
        options["pair_share"] = pair_share
    if variation:
        options["variation"] = variation
    source = {"name": "scenes", "seed": seed, "count": count, "options": options}
    manifest_path = folder / "manifest.json"
    jobs = [
        (
            str(folder / f"examples-{number:05d}.parquet"),
            seed,
            start,
            min(start + rows_per_file, count),
            aspect,
            held_out_pairs,
            pair_share,
            variation,
        )
        for number, start in enumerate(range(0, count, rows_per_file))
    ]

    def look() -> tuple[dict[str, Any] | None, list[_Job]]:
        """The finished set's manifest, if there is one, and what is not there yet."""
        known = _read_manifest(manifest_path, source)
        hashes = {entry["name"]: entry["sha256"] for entry in known["files"]} if known is not None else {}
        waiting = []
        for job in jobs:
            file = Path(job[0])
            listed = file.name in hashes and file.exists() and sha256_file(file) == hashes[file.name]
            if not listed and not _finished(file, job):
                waiting.append(job)
        return known, waiting

    known, waiting = look()
    if known is not None and not waiting:
        return known
    with sole_writer(folder):
        begin(folder, source)
        known, waiting = look()  # once more, as another process may have written some meanwhile
        done = count - sum(job[3] - job[2] for job in waiting)

        def ticked(more: int) -> None:
            if progress is not None:
                progress(done + more, count)

        def finished(job: _Job) -> None:
            path = Path(job[0])
            write_json(_sidecar(path), {"job": [SCENES_VERSION, *job[1:]], "sha256": sha256_file(path)})

        ticked(0)
        run_stream(_write_file, waiting, min(workers, max(1, len(waiting))), finished=finished, ticked=ticked)
        manifest = _manifest(jobs, source, count)
        write_json(manifest_path, manifest, indent=2)
        shutil.rmtree(folder / PARTIAL)
    return manifest


def _manifest(jobs: Sequence[_Job], source: dict[str, Any], count: int) -> dict[str, Any]:
    files = [{"name": Path(job[0]).name, "sha256": sha256_file(job[0]), "count": job[3] - job[2]} for job in jobs]
    return {
        "format": RAW_FORMAT,
        "source": source,
        "license": LICENSE,
        "attribution": ATTRIBUTION,
        "count": count,
        "files": files,
        "sha256": hashlib.sha256("".join(sorted(str(entry["sha256"]) for entry in files)).encode()).hexdigest(),
    }
