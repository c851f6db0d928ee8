"""Variety: how much pictures of one prompt differ, and whether they are copies of what was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from physformer_core.data.scenes import compose_scene
from physformer_core.data.scenes.composer import Scene
from physformer_core.data.scenes.variation import varied
from physformer_core.data.shard_set import Group, ShardSet
from physformer_core.errors import DataError
from physformer_core.evaluation.features import FeatureExtractor, unit
from physformer_core.evaluation.prompt_cases import CASE_SEED, PromptCase

COPY_DISTANCE = 4.0
"""Root mean square in steps of 255 at level 0's size below which a picture counts as a copy: what rounding, another
resize or JPEG leave between two files of one picture."""

THUMBNAIL = 160
_SCENES_OFFSET = 3_000_000
_SAME_SHAPE = 0.02  # ratio of the aspects, in logarithms
_BLOCK = 4096


def scenes_like(
    case: PromptCase, number: int, count: int, seed: int, *, aspect: float, variation: float = 0.0
) -> list[Scene]:
    """Other scenes of what a prompt asks for: the same subject in its colour, and the same place, time and background
    where there is one and the prompt names it.

    Args:
        case: Of a single subject.
        number: Of the case: no two cases get the same scenes.
        count: How many.
        seed: Decides them; none is in a training set.
        aspect: Width divided by height.
        variation: As that of the set which they are compared with, `variation_of`.
    """
    asked, first = case.scene, _SCENES_OFFSET + 100_000 * number
    scenes: list[Scene] = []
    for index in itertools.count(first):
        scene = compose_scene(
            CASE_SEED + seed,
            index,
            aspect=aspect,
            kind="setting" if asked.place else "single",
            concept=asked.subjects[0].concept,
            place=asked.place,
            time=asked.time,
        )
        same = scene.subjects[0].colour == asked.subjects[0].colour
        if same and (scene.background == asked.background or " background" not in case.prompt):
            scenes.append(varied(scene, variation))
        if len(scenes) == count:
            return scenes
    raise AssertionError("colours and backgrounds repeat")


def variation_of(shards: ShardSet) -> float:
    """How much the scenes of a set vary (`data fetch scenes --variation`); 0 of other sets."""
    source = shards.manifest["source"].get("source", {})
    return float(source.get("options", {}).get("variation", 0.0)) if source.get("name") == "scenes" else 0.0


def mean_distance(features_nd: np.ndarray) -> float:
    """Mean cosine distance (1 - cos, from 0 to 2) over all pairs of two or more pictures' features."""
    count = len(features_nd)
    cosines = unit(features_nd) @ unit(features_nd).T
    return float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


@dataclass(frozen=True)
class Look:
    """What is kept of a picture: not the picture, of which there may be many and large ones.

    Args:
        features: [width of the extractor].
        small: At level 0's size, uint8 [height, width, 3]; empty where no set is compared with.
        thumbnail: For a sheet, its longer side `THUMBNAIL`.
    """

    features: np.ndarray
    small: np.ndarray
    thumbnail: Image.Image


def look_at(picture: np.ndarray, extractor: FeatureExtractor, group: Group | None) -> Look:
    """Looks at a picture, uint8 [height, width, 3]; ``group`` is from `level_0_group`."""
    image = Image.fromarray(picture)
    scale = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = np.zeros((0, 0, 3), np.uint8) if group is None else level_0_of(group, picture)
    return Look(extractor.extract([picture])[0], small, image.resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Neighbour:
    """The nearest training picture.

    Args:
        distance: Root mean square difference at level 0's size, in steps of 255.
        picture: That picture, uint8 [height, width, 3].
    """

    distance: float
    picture: np.ndarray


def level_0_group(shards: ShardSet, aspect: float) -> Group:
    """The whole pictures of a set whose shape is nearest to width / height = ``aspect``.

    Raises:
        DataError: The set holds latents, or nothing of that shape.
    """
    if not shards.field.is_pixels:
        raise DataError(f"{shards.folder} holds latents", hint="copies are looked for among pixels; name such a set")
    groups = [group for group in shards.groups("base", "train") if group.count]
    nearest = min(groups, key=lambda group: abs(np.log(group.size[1] / group.size[0] / aspect)), default=None)
    if nearest is None or abs(np.log(nearest.size[1] / nearest.size[0] / aspect)) > _SAME_SHAPE:
        shapes = sorted({f"{8 * group.size[1]}x{8 * group.size[0]}" for group in groups})
        raise DataError(
            f"{shards.folder} has no whole pictures of this shape, and stretched ones are no copies",
            hint="--size " + " or ".join(shapes),
        )
    return nearest


def level_0_of(group: Group, picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [height, width, 3] of any size, averaged to the size of a group's."""
    height, width = group.size
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def nearest_pictures(group: Group, small: Sequence[np.ndarray]) -> list[Neighbour]:
    """For each picture of a group's size the nearest one of the group.

    Args:
        group: From `level_0_group`.
        small: From `level_0_of`.
    """
    wanted = np.stack(small).reshape(len(small), -1).astype(np.float32)
    best, where = np.full(len(small), np.inf), np.zeros(len(small), np.int64)
    for first in range(0, group.count, _BLOCK):
        rows = range(first, min(first + _BLOCK, group.count))
        block = np.stack([group.field(row) for row in rows]).reshape(len(rows), -1).astype(np.float32)
        squares = np.square(block).sum(1) - 2 * (wanted @ block.T)
        place = squares.argmin(1)
        found = squares[np.arange(len(small)), place]
        where = np.where(found < best, first + place, where)
        best = np.minimum(best, found)
    neighbours = []
    for own, row in zip(wanted, where.tolist(), strict=True):
        picture = np.array(group.field(row))
        # Once more from the difference itself: of nearly equal pictures, squares cancel.
        distance = np.sqrt(np.square(own - picture.reshape(-1).astype(np.float32)).mean())
        neighbours.append(Neighbour(float(distance), picture))
    return neighbours


def neighbour_summary(neighbours: Iterable[Neighbour]) -> dict[str, Any]:
    """Smallest and median distance, and the share of copies; there must be one neighbour."""
    distances = np.array([one.distance for one in neighbours])
    return {
        "smallest": float(distances.min()),
        "median": float(np.median(distances)),
        "copies": float(np.mean(distances < COPY_DISTANCE)),
    }
