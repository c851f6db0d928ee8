"""Distances between two sets of pictures in one network's features, each with the recipe that it came by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physformer_core.errors import DataError
from physformer_core.evaluation.clip_score import ClipScore
from physformer_core.evaluation.features import FeatureExtractor
from physformer_core.evaluation.frechet import (
    TRUSTED_COUNT,
    FeatureStatistics,
    Reservoir,
    RunningStatistics,
    frechet_distance,
    kernel_distance,
    load_statistics,
    precision_recall,
)
from physformer_core.files import sha256_file

RECIPE_FORMAT = "physformer-score/1"
_NEIGHBOURS = 3
_COMPARED = ("name", "sha256", "input", "resize")


@dataclass(frozen=True)
class DistanceScore:
    """What `compare` found.

    Args:
        name: What the Fréchet distance is called: "FID" only in Inception's features.
        frechet: The distance.
        kid, kid_std: Kernel distance, mean and spread over subsets; None where a side is a statistics file.
        precision, recall: None where a side is a statistics file.
        clip, clip_error: CLIP score of the generated pictures and their captions, and the standard error of its mean;
            None if not asked for.
        recipe: How the score came about.
        warnings: What to bear in mind.
    """

    name: str
    frechet: float
    kid: float | None
    kid_std: float | None
    precision: float | None
    recall: float | None
    recipe: Mapping[str, Any]
    warnings: tuple[str, ...]
    clip: float | None = None
    clip_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "recipe": dict(self.recipe), "warnings": list(self.warnings)}


def gather(
    pictures: Iterable[np.ndarray],
    extractor: FeatureExtractor,
    recipe: Callable[[], Mapping[str, Any]],
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> FeatureStatistics:
    """Features of a set of pictures, in memory that does not grow with their number.

    Args:
        pictures: RGB, uint8 [height, width, 3], of any sizes.
        extractor: The network.
        recipe: Says what the pictures are; asked at the end.
        batch_size: Pictures in a batch. It changes the last bits of a score.
        seed: Of the sample that is kept for KID, precision and recall.

    Raises:
        DataError: There are fewer than two pictures.
    """
    running, sample = RunningStatistics(extractor.width), Reservoir(extractor.width, seed=seed)
    waiting: list[np.ndarray] = []

    def flush() -> None:
        features = extractor.extract(waiting)
        running.update(features)
        sample.update(features)
        waiting.clear()

    for picture in pictures:
        waiting.append(picture)
        if len(waiting) == batch_size:
            flush()
    flush()
    about = {
        "format": RECIPE_FORMAT,
        "extractor": extractor.recipe(),
        "pictures": dict(recipe()),
        "batch_size": batch_size,
    }
    return FeatureStatistics(running.mean, running.covariance(), running.count, about, sample.vectors())


def read_reference(path: str | Path, extractor: FeatureExtractor) -> FeatureStatistics:
    """A statistics file, checked against the network that the other side goes through.

    Raises:
        DataError: It cannot be read, or comes from other features.
    """
    statistics = load_statistics(path)
    stated = statistics.recipe.get("extractor")
    if isinstance(stated, dict):
        own = extractor.recipe()
        if differing := [key for key in _COMPARED if stated.get(key) != own[key]]:
            raise DataError(
                f"{path} was made with other features: its {differing[0]} is {stated.get(differing[0])!r}, "
                f"here it is {own[differing[0]]!r}",
                hint="name the same network: --features and --feature-model",
            )
    elif len(statistics.mean) != extractor.width:
        raise DataError(
            f"{path} holds features of width {len(statistics.mean)}, {extractor.model} gives {extractor.width}",
            hint="name the network that the file was made with: --features",
        )
    about = {**statistics.recipe, "file_sha256": sha256_file(path)}
    return FeatureStatistics(statistics.mean, statistics.covariance, statistics.count, about)


def compare(
    reference: FeatureStatistics,
    generated: FeatureStatistics,
    extractor: FeatureExtractor,
    *,
    seed: int = 0,
    clip: ClipScore | None = None,
) -> DistanceScore:
    """All distances that the two sides allow.

    Args:
        reference: The real pictures, or their statistics alone.
        generated: The pictures that are judged.
        extractor: The network both went through.
        seed: Of KID's subsets.
        clip: The generated pictures' CLIP score, if it was asked for.
    """
    frechet = frechet_distance(reference.mean, reference.covariance, generated.mean, generated.covariance)
    kid = kid_std = precision = recall = None
    if reference.vectors is not None and generated.vectors is not None:
        kid, kid_std = kernel_distance(reference.vectors, generated.vectors, seed=seed)
        if min(len(reference.vectors), len(generated.vectors)) > _NEIGHBOURS:
            precision, recall = precision_recall(reference.vectors, generated.vectors, neighbours=_NEIGHBOURS)
    recipe = {
        "format": RECIPE_FORMAT,
        "extractor": extractor.recipe(),
        "reference": {"count": reference.count, **{k: v for k, v in reference.recipe.items() if k != "extractor"}},
        "generated": {"count": generated.count, **{k: v for k, v in generated.recipe.items() if k != "extractor"}},
        "kid": {"subset_size": 1000, "subsets": 100, "seed": seed},
        "precision_recall": {"neighbours": _NEIGHBOURS},
    } | ({"clip_score": clip.recipe} if clip is not None else {})
    return DistanceScore(
        extractor.distance_name,
        frechet,
        kid,
        kid_std,
        precision,
        recall,
        recipe,
        tuple(_warnings(reference, generated, extractor)),
        clip=None if clip is None else clip.mean,
        clip_error=None if clip is None else clip.standard_error,
    )


def _warnings(reference: FeatureStatistics, generated: FeatureStatistics, extractor: FeatureExtractor) -> Iterable[str]:
    for name, side in (("reference", reference), ("generated", generated)):
        if side.count is None:
            yield f"the {name} file does not say how many pictures it was made of"
        elif side.count < TRUSTED_COUNT:
            few = side.count <= extractor.width
            singular = f", and no more than the {extractor.width} dimensions of the features" if few else ""
            yield (
                f"{side.count:,} {name} pictures are fewer than {TRUSTED_COUNT:,}{singular}: "
                "compare only scores of the same number"
            )
    if "extractor" not in reference.recipe:
        yield "the reference file does not say by which network it was made; its width fits"
