"""What a checkpoint makes of level 0, in the place of what level 0 really is, for training the level above.

When a picture is drawn, level 1 starts from a level 0 that was drawn, too: as sharp as a real one, and wrong in its
small parts. A level 1 that was only ever shown averages of real pictures takes over what is wrong. So it is shown the
real level 0 noised, and completed by the checkpoint. Cascades of diffusion models blur or noise the lower resolution
for the same reason (conditioning augmentation, Ho et al. 2021, https://arxiv.org/abs/2106.15282); here it is damaged as
it will be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from physformer_core.data.loader import ShardSet
from physformer_core.data.set_folder import PARTIAL, is_whole, read_json, remove_half_written, write_json
from physformer_core.data.shard_set import REDRAWN, Arrow, Group
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file, sole_writer
from physformer_core.flow.pyramid import picture_noise

if TYPE_CHECKING:
    from physformer_core.pipeline import PhysFormerPipeline

REDRAWING_TIME = 0.5
"""Flow time that level 0 is noised to. The layout of the real one is kept; of what is in it, as much is lost as if it
had been drawn from nothing but noise (docs/training-log.md)."""

_BATCH = 64
_CODE_VERSION = 1
_LEVEL = 1  # whose coarse field is redrawn: the level above the one that everything is drawn in


@dataclass(frozen=True)
class _Whole:
    """Where the whole picture that a crop is of stands."""

    group: Group
    row: int


def redraw(
    folder: str | Path,
    pipeline: PhysFormerPipeline,
    *,
    checkpoint_sha256: str,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Stores beside a preprocessed set what crops of level 1 would be one level down, had `pipeline` drawn it.

    The files of the set stay as they are; its manifest names the new ones, and a trainer reads them from then on. What
    an interrupted call finished is kept, and of files that were lost since only those are made again. By another
    checkpoint the files are replaced; interrupted in that, the set is as it was preprocessed.

    Args:
        folder: The set.
        output: Folder of a copy that is redrawn in its place; of its files there are links, where the disk has them.
        pipeline: The checkpoint, for the codec and the text encoder of the set.
        checkpoint_sha256: Its fingerprint, for the manifest.
        seed: Of the noise that hides what is redrawn.
        progress: Told (examples done, examples in all).

    Returns:
        What the manifest says of it: "key", "checkpoint", "seed", "count" (how many examples were redrawn) and
        "files", with "fresh" added: False if all was there already.

    Raises:
        DataError: The set is of another codec, text encoder or size of level 0, or is damaged, or `output` holds
            something else.
        OutputError: The folder cannot be written.
    """
    shards = ShardSet(folder, redrawn=False)
    _refuse_others(shards, pipeline)
    if output is not None:
        shards = _copied(shards, Path(output))
    parts = {
        "code": _CODE_VERSION,
        "set": shards.manifest["key"],
        "checkpoint": checkpoint_sha256,
        "time": REDRAWING_TIME,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    known = shards.manifest.get(REDRAWN, {})
    same = known.get("key") == key
    kept = {entry["of"]: entry for entry in known["files"] if is_whole(shards.folder, entry)} if same else {}
    if same and len(kept) == len(known["files"]):
        return {**known, "fresh": False}
    entries = [entry for entry in shards.manifest["shards"] if entry["kind"] == "crop"]
    if not entries:
        raise DataError(f"{shards.folder} has no crops", hint="preprocess it with --crops-per-example 1")
    total, done, count, files = sum(entry["count"] for entry in entries), 0, 0, []
    plain = {name: value for name, value in shards.manifest.items() if name != REDRAWN}
    with sole_writer(shards.folder):
        remove_half_written(shards.folder)
        if known and not same:  # its files are replaced one by one: until the last is, the set is as it was
            write_json(shards.folder / "manifest.json", plain, indent=1)
        for entry in entries:
            drawer = _Drawer(shards, pipeline, entry, seed)

            def tell(rows: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + rows, total)

            tell(0)
            files.append(kept.get(entry["name"]) or _redrawn_file(shards.folder, entry, drawer, key, tell))
            count += files[-1]["redrawn"]
            done += entry["count"]
        told = {"key": key, "checkpoint": checkpoint_sha256, "seed": seed, "count": count, "files": files}
        write_json(shards.folder / "manifest.json", {**plain, REDRAWN: told}, indent=1)
        shutil.rmtree(shards.folder / PARTIAL)
    if progress is not None:
        progress(total, total)
    return {**told, "fresh": True}


def _copied(shards: ShardSet, output: Path) -> ShardSet:
    """The set as it was preprocessed, in another folder, if it is not there already."""
    if (output / "manifest.json").is_file():
        there = ShardSet(output, redrawn=False)
        if there.key != shards.key:
            raise DataError(f"{output} holds another set", hint="choose an empty folder")
        return there
    with sole_writer(output):
        for entry in [*shards.manifest["shards"], shards.manifest["captions"]]:
            path = output / entry["name"]
            path.unlink(missing_ok=True)
            try:
                path.hardlink_to(shards.folder / entry["name"])
            except OSError:
                with atomic_write(path) as temporary:
                    shutil.copyfile(shards.folder / entry["name"], temporary)
        manifest = {name: value for name, value in shards.manifest.items() if name != REDRAWN}
        write_json(output / "manifest.json", manifest, indent=1)
    return ShardSet(output, redrawn=False)


def _refuse_others(shards: ShardSet, pipeline: PhysFormerPipeline) -> None:
    for what, of_set, of_checkpoint in (
        ("codec", shards.field.codec, pipeline.config.codec_name),
        ("text encoder", shards.encoder["name"], pipeline.config.text_encoder_name),
    ):
        if of_set != of_checkpoint:
            raise DataError(
                f"the set's {what} is {of_set}, the checkpoint's is {of_checkpoint}",
                hint="a set is redrawn by a checkpoint of its own kind",
            )
    if wrong := pipeline.pyramid.why_not_begun(shards.sizes("base", "train")):
        raise DataError(wrong, hint="a set is redrawn by a checkpoint that draws level 0 in its size")


def _redrawn_file(
    folder: Path, entry: dict[str, Any], drawer: _Drawer, key: str, tell: Callable[[int], None]
) -> dict[str, Any]:
    """Writes the coarse fields of one shard, if that was not done yet, and returns their entry in the manifest."""
    name = f"coarse-{entry['name']}"
    record = folder / PARTIAL / f"{name}.json"
    if record.is_file():
        known = read_json(record)
        if known["key"] == key and is_whole(folder, known):
            return known
    path, count = folder / name, 0
    schema = pa.schema([("coarse", pa.binary(drawer.element_bytes))])
    with atomic_write(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        rows = 0
        for coarse_nhwc, redrawn in drawer.batches():
            values = pa.py_buffer(np.ascontiguousarray(coarse_nhwc))
            column = pa.Array.from_buffers(schema.field(0).type, len(coarse_nhwc), [None, values])
            out.write_batch(pa.record_batch([column], schema=schema))
            rows, count = rows + len(coarse_nhwc), count + redrawn
            tell(rows)
    told = {
        "name": name,
        "of": entry["name"],
        "key": key,
        "count": entry["count"],
        "redrawn": count,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }
    write_json(record, told)
    return told


class _Drawer:
    """The coarse fields of a shard of crops.

    Args:
        shards: The set.
        pipeline: Redraws.
        entry: The shard, from the manifest.
        seed: Of the noise.
    """

    def __init__(self, shards: ShardSet, pipeline: PhysFormerPipeline, entry: dict[str, Any], seed: int) -> None:
        self._shards, self._pipeline, self._entry, self._seed = shards, pipeline, entry, seed
        self._crops = shards.group_of(entry)
        height, width = self._crops.coarse_size
        self.element_bytes = shards.field.element_bytes(height, width)

    def batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """Coarse fields [n, height / 2, width / 2, channels] as they are stored, in the shard's own record batches, and
        how many of them were redrawn."""
        (file,) = self._crops.files
        wholes = self._wholes()
        for first, last in zip(file.starts[:-1].tolist(), file.starts[1:].tolist(), strict=True):
            rows = range(first, last)
            coarse_nhwc = np.stack([self._real(row) for row in rows])
            mine = [row for row in rows if self._crops.level[row] == _LEVEL]
            for size in sorted({wholes[row].group.size for row in mine}):
                same = [row for row in mine if wholes[row].group.size == size]
                for start in range(0, len(same), _BATCH):
                    some = same[start : start + _BATCH]
                    for row, field_hwc in zip(some, self._draw(some, wholes), strict=True):
                        coarse_nhwc[row - first] = self._cut(field_hwc, row)
            yield coarse_nhwc, len(mine)

    def _wholes(self) -> list[_Whole]:
        """The whole picture of every crop, by its key: both come from the same raw files, so from the same chunk."""
        found: dict[str, _Whole] = {}
        for entry in self._shards.manifest["shards"]:
            if (entry["kind"], entry["split"], entry["chunk"]) == ("base", self._entry["split"], self._entry["chunk"]):
                group = self._shards.group_of(entry)
                for row, key in enumerate(_keys(group.files[0])):
                    found.setdefault(key, _Whole(group, row))  # of several views, the first is that of the crops
        return [found[key] for key in _keys(self._crops.files[0])]

    def _real(self, row: int) -> np.ndarray:
        if not self._shards.field.is_pixels:
            return self._crops.coarse(row)
        pixels_hwc = self._crops.field(row).astype(np.uint16)
        height, width = self._crops.coarse_size
        return ((pixels_hwc.reshape(height, 2, width, 2, -1).sum((1, 3)) + 2) // 4).astype(np.uint8)

    @torch.no_grad()
    def _draw(self, rows: list[int], wholes: list[_Whole]) -> np.ndarray:
        """Whole level-0 fields [n, height, width, channels], redrawn, as they are stored."""
        spec, pipeline = self._shards.field, self._pipeline
        device, path = pipeline.device, pipeline.flow.flow_path()
        stored = np.stack([wholes[row].group.field(wholes[row].row) for row in rows]).transpose(0, 3, 1, 2)
        real_bchw = torch.from_numpy(stored).float()
        if spec.is_pixels:
            real_bchw = real_bchw.mul_(2 / 255).sub_(1)
        shape = tuple(real_bchw.shape[1:])
        noise = torch.stack([self._noise(shape, row) for row in rows])
        starts = self._crops.caption_starts
        tokens, mask, pooled = self._shards.embeddings(self._crops.caption_rows[starts[rows]])
        prompt = pipeline.transformer.encode_prompt(tokens.to(device), mask.to(device), pooled.to(device), base=True)
        level = torch.zeros(len(rows), dtype=torch.long, device=device)
        place = torch.tensor((0.0, 0.0, 1.0, 1.0), device=device).expand(len(rows), 4)
        t = torch.full((len(rows),), REDRAWING_TIME, device=device)
        z = path.interpolate(noise.to(device), real_bchw.to(device), t)
        output = pipeline.transformer(z, t, prompt, level, None, place, return_dict=False)[0].float()
        drawn = output if path.prediction == "sample" else path.sample_of_velocity(output, z, t)
        drawn = drawn.permute(0, 2, 3, 1).cpu()
        if spec.is_pixels:
            drawn = drawn.add(1).mul(255 / 2).round().clamp(0, 255)
        return drawn.numpy().astype(spec.dtype)

    def _noise(self, shape: tuple[int, ...], row: int) -> Tensor:
        channels, height, width = shape
        return picture_noise((channels, height, width), self._seed, row, 0, f"redraw {self._entry['name']}")

    def _cut(self, whole_hwc: np.ndarray, row: int) -> np.ndarray:
        """The part of a level-0 field that a crop of level 1 shows."""
        height, width = self._crops.coarse_size
        y, x = self._crops.place[row, :2].tolist()
        top, left = round(y * whole_hwc.shape[0]), round(x * whole_hwc.shape[1])
        return whole_hwc[top : top + height, left : left + width]


def _keys(file: Arrow) -> list[str]:
    return [key for batch in file.batches for key in batch.column("key").to_pylist()]
