"""Where the pictures of an evaluation come from: a folder, a raw set, a preprocessed set, or a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from physformer_core.batching import PictureRequest, Planner
from physformer_core.data.contact_sheet import set_format
from physformer_core.data.framing import UnusablePicture, open_bitmap
from physformer_core.data.latents import decode_picture
from physformer_core.data.loader import ShardSet
from physformer_core.data.scenes.render import render_svg
from physformer_core.data.set_folder import RAW_FORMAT
from physformer_core.drawing import draw_batch
from physformer_core.errors import DataError
from physformer_core.files import sha256_file
from physformer_core.metadata import read_metadata

if TYPE_CHECKING:
    import torch

    from physformer_core.checkpoints import Checkpoint
    from physformer_core.pipeline import PhysFormerPipeline

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Captioned:
    """A caption of a set, and the size of the picture it belongs to.

    Args:
        caption: The text.
        height, width: Pixels.
    """

    caption: str
    height: int
    width: int


class PictureSource(ABC):
    """A set of pictures that can be gone through any number of times.

    Attributes:
        count: How many there are.
    """

    count: int

    @abstractmethod
    def __iter__(self) -> Iterator[np.ndarray]:
        """RGB pictures, uint8 [height, width, 3], of any sizes, always in the same order."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What the pictures are, with a hash, to be stored with every score."""

    def captioned(self) -> Iterator[tuple[np.ndarray, str]]:
        """The pictures, each with its own (first) caption.

        Raises:
            DataError: One has none; said before the first picture is made, where that can be known.
        """
        raise DataError("these pictures have no captions of their own", hint="leave --clip-score out")

    def captions(self, count: int) -> list[Captioned]:
        """Captions evenly spread over the set, again from the start where it has fewer.

        Raises:
            DataError: The set has none.
        """
        raise DataError(
            "a folder of pictures or a statistics file has no captions to draw from",
            hint="name a prompt file: --prompts FILE",
        )


def _is_picture(name: Path, path: Path) -> bool:
    """Whether a file is one of a folder's pictures; hidden ones are what other programs keep, or half of one."""
    return not any(part.startswith(".") for part in name.parts) and name.suffix.lower() in SUFFIXES and path.is_file()


class FolderPictures(PictureSource):
    """Every picture in a folder and below it, in the order of their names.

    Args:
        folder: The folder.

    Raises:
        DataError: It holds no pictures.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = sorted(path for path in folder.rglob("*") if _is_picture(path.relative_to(folder), path))
        self.count = len(self._files)
        if not self._files:
            raise DataError(f"{folder} holds no pictures", hint="pictures are " + ", ".join(SUFFIXES))

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self._files:
            try:
                yield np.asarray(open_bitmap(path.read_bytes()))
            except UnusablePicture as error:
                raise DataError(f"{path} {error}", hint="remove it or mend it") from error

    def captioned(self) -> Iterator[tuple[np.ndarray, str]]:
        captions = [_caption_of(path) for path in self._files]
        return zip(self, captions, strict=True)

    @cached_property
    def _sha256(self) -> str:
        # Of contents alone, so that a copied or renamed set stays the same set.
        hashes = sorted(sha256_file(path) for path in self._files)
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def recipe(self) -> dict[str, Any]:
        return {"kind": "folder", "count": self.count, "sha256": self._sha256}


class RawPictures(PictureSource):
    """A raw set: drawings rendered at a size, stored pictures as they are.

    Args:
        folder: The set.
        size: A drawing of any aspect gets about size x size pixels.

    Raises:
        DataError: It is damaged.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.count = int(self._manifest["count"])

    def __iter__(self) -> Iterator[np.ndarray]:
        for row in self._rows(["key", "svg", "image", "width", "height"]):
            yield self._picture(row)

    def captioned(self) -> Iterator[tuple[np.ndarray, str]]:
        for row in self._rows(["key", "svg", "image", "width", "height", "captions"]):
            if not row["captions"]:
                raise DataError(f"{self._folder}: {row['key']} has no caption", hint="leave --clip-score out")
            yield self._picture(row), row["captions"][0]

    def _picture(self, row: dict[str, Any]) -> np.ndarray:
        if row["svg"] is not None:
            height, width = self._sides(row)
            return render_svg(row["svg"], width, height)
        try:
            return np.asarray(open_bitmap(row["image"]))
        except UnusablePicture as error:
            raise DataError(f"{self._folder}: {row['key']} {error}", hint="fetch the set again") from error

    def captions(self, count: int) -> list[Captioned]:
        found = [
            Captioned(row["captions"][0], *self._sides(row))
            for row in self._rows(["captions", "width", "height"])
            if row["captions"]
        ]
        return _spread(found, count, self._folder)

    def recipe(self) -> dict[str, Any]:
        return {"kind": "raw", "count": self.count, "sha256": self._manifest["sha256"], "size": self._size}

    def _sides(self, row: dict[str, Any]) -> tuple[int, int]:
        aspect = math.sqrt(row["width"] / row["height"])
        return max(1, round(self._size / aspect)), max(1, round(self._size * aspect))

    def _rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        for entry in self._manifest["files"]:
            try:
                with pq.ParquetFile(self._folder / entry["name"]) as file:
                    for batch in file.iter_batches(64, columns=columns):
                        yield from batch.to_pylist()
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
                raise DataError(
                    f"cannot read {self._folder / entry['name']}: {error}",
                    hint="fetch the set again: what is there is kept",
                ) from error


class ShardPictures(PictureSource):
    """The whole (level 0) pictures of a preprocessed set.

    Args:
        folder: The set.
        split: "train", "validation", or None for both.

    Raises:
        DataError: It is damaged or has no pictures in that split.
    """

    def __init__(self, folder: Path, split: str | None = None) -> None:
        self._shards = ShardSet(folder)
        self._splits = (split,) if split is not None else ("train", "validation")
        self.count = sum(self._shards.count("base", name) for name in self._splits)
        if not self.count:
            raise DataError(f"{folder} has no whole pictures of the split {split or 'train or validation'}")

    def __iter__(self) -> Iterator[np.ndarray]:
        for group, row in self._rows():
            yield decode_picture(self._shards.field, group.field(row))

    def captioned(self) -> Iterator[tuple[np.ndarray, str]]:
        for group, row in self._rows():
            yield decode_picture(self._shards.field, group.field(row)), self._caption(group, row)

    def captions(self, count: int) -> list[Captioned]:
        factor = self._shards.field.factor
        found = [
            Captioned(self._caption(group, row), *(side * factor for side in group.size)) for group, row in self._rows()
        ]
        return _spread(found, count, self._shards.folder)

    def _rows(self) -> Iterator[tuple[Any, int]]:
        """Every whole picture: its group and its row in it."""
        for split in self._splits:
            for group in self._shards.groups("base", split):
                yield from ((group, row) for row in range(group.count))

    def _caption(self, group: Any, row: int) -> str:
        return self._shards.caption(int(group.caption_rows[group.caption_starts[row]]))

    def recipe(self) -> dict[str, Any]:
        return {"kind": "preprocessed", "count": self.count, "sha256": self._shards.key, "splits": list(self._splits)}


class DrawnPictures(PictureSource):
    """Pictures that a checkpoint draws, batch by batch; none is kept.

    Args:
        checkpoint: For the hash and the batch sizes.
        pipeline: The loaded pipeline.
        requests: What to draw.
        dtype: The number format's name, for the recipe.
    """

    def __init__(
        self, checkpoint: Checkpoint, pipeline: PhysFormerPipeline, requests: Sequence[PictureRequest], dtype: str
    ) -> None:
        self._checkpoint, self.pipeline = checkpoint, pipeline
        self.requests, self._dtype = list(requests), dtype
        self.count = len(self.requests)

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, picture in draw_requests(self._checkpoint, self.pipeline, self.requests):
            yield picture

    def captioned(self) -> Iterator[tuple[np.ndarray, str]]:
        for number, picture in draw_requests(self._checkpoint, self.pipeline, self.requests):
            yield picture, self.requests[number].prompt

    def recipe(self) -> dict[str, Any]:
        return drawing_recipe(self._checkpoint, self.pipeline.device, self._dtype, self.requests)


def draw_requests(
    checkpoint: Checkpoint, pipeline: PhysFormerPipeline, requests: Sequence[PictureRequest]
) -> Iterator[tuple[int, np.ndarray]]:
    """Draws pictures in batches that fit the machine.

    Yields:
        The number of the request and its picture, uint8 [height, width, 3].
    """
    planner = Planner(checkpoint)
    for numbers in planner.batches(requests, lambda request: planner.batch_limit(request, pipeline.device)):
        images = draw_batch(pipeline, [requests[number] for number in numbers])
        for number, image in zip(numbers, images, strict=True):
            yield number, np.asarray(image)


def drawing_recipe(
    checkpoint: Checkpoint, device: torch.device, dtype: str, requests: Sequence[PictureRequest]
) -> dict[str, Any]:
    """How drawn pictures came about: the weights, the captions, and every setting of the drawing."""
    captions = "\n".join(request.prompt for request in requests)
    first = requests[0]
    planner = Planner(checkpoint)
    sizes = sorted({(request.width, request.height) for request in requests})
    return {
        "kind": "checkpoint",
        "count": len(requests),
        "checkpoint": checkpoint.name,
        "sha256": checkpoint.sha256,
        "captions_sha256": hashlib.sha256(captions.encode()).hexdigest(),
        "sizes": [f"{width}x{height}" for width, height in sizes[:8]] + (["..."] if len(sizes) > 8 else []),
        "steps": [len(level.evaluations) for level in planner.levels(max(requests, key=lambda r: r.width * r.height))],
        "guidance": first.guidance,
        "detail": first.detail,
        "solver": first.solver,
        "seeds": sorted({request.seed for request in requests})[:8],
        "indices": [min(request.index for request in requests), max(request.index for request in requests)],
        "device": str(device),
        "dtype": dtype,
    }


def open_source(path: str | Path, *, size: int = 256, split: str | None = None) -> PictureSource:
    """The pictures at a path: a raw or a preprocessed set, or a folder of pictures.

    Args:
        path: The folder.
        size: For the drawings of raw sets.
        split: For preprocessed sets.

    Raises:
        DataError: It is none of these.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}",
            hint="a folder of pictures, a raw or a preprocessed set, or a statistics file (.npz)",
        )
    if not (folder / "manifest.json").is_file():
        return FolderPictures(folder)
    return RawPictures(folder, size) if set_format(folder) == RAW_FORMAT else ShardPictures(folder, split)


def counted(pictures: Iterable[np.ndarray], on_picture: Callable[[int], None] | None) -> Iterator[np.ndarray]:
    """The pictures, telling how many have been taken."""
    for number, picture in enumerate(pictures, start=1):
        yield picture
        if on_picture is not None:
            on_picture(number)


def _caption_of(path: Path) -> str:
    """The caption of a picture file: a text file of the same name beside it, else the prompt that a PNG tells.

    Raises:
        DataError: There is neither.
    """
    beside = path.with_suffix(".txt")
    try:
        caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the caption {beside}: {error}") from error
    if not caption and path.suffix.lower() == ".png":
        try:
            caption = read_metadata(path).prompt
        except DataError as error:
            raise _captionless(path) from error
    if not caption:
        raise _captionless(path)
    return caption


def _captionless(path: Path) -> DataError:
    return DataError(
        f"{path} has no caption",
        hint=f"{path.stem}.txt beside it, or a PNG that physformer wrote; or leave --clip-score out",
    )


def _spread(found: Sequence[Captioned], count: int, folder: Path) -> list[Captioned]:
    if not found:
        raise DataError(f"{folder} has no captions", hint="name a prompt file: --prompts FILE")
    if count >= len(found):
        return [found[number % len(found)] for number in range(count)]
    return [found[int(number)] for number in np.linspace(0, len(found) - 1, count).round()]
