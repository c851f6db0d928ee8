"""Clean renders of every scene concept as feature vectors, and the concept that a picture looks most like.

A concept's vector is the mean direction of a few renders of it, each alone and large on a plain colour (or in a cage).
A picture belongs to the concept whose vector makes the smallest angle with its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physformer_core.data.scenes import Concept, compose_scene, load_concepts, render_svg
from physformer_core.data.scenes.fetch import SCENES_VERSION
from physformer_core.errors import OutputError
from physformer_core.evaluation.features import FeatureExtractor
from physformer_core.files import atomic_write, cache_folder

GALLERY_SEED = 71_000_003
"""Collection that the clean renders come from; no training set should use it."""

CLEAN_VIEWS = 3
CAGED_VIEWS = 2
_BATCH = 16
_CACHE_FORMAT = "physformer-gallery/1"


@dataclass(frozen=True)
class Gallery:
    """One unit vector per concept.

    Args:
        concepts: The concepts, in the order of the rows.
        vectors_cd: [concepts, width], float32, of length 1.
        key: SHA-256 of everything that the vectors depend on.
    """

    concepts: tuple[Concept, ...]
    vectors_cd: np.ndarray
    key: str

    def scores(self, features_nd: np.ndarray) -> np.ndarray:
        """Cosine of every picture [n, width] with every concept: [n, concepts]."""
        cosines: np.ndarray = unit(features_nd) @ self.vectors_cd.T
        return cosines

    def index(self, name: str) -> int:
        """The row of a concept."""
        return next(row for row, concept in enumerate(self.concepts) if concept.name == name)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., width] scaled to length 1."""
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
    return scaled


def load_gallery(
    extractor: FeatureExtractor,
    *,
    caged: bool = False,
    concepts: Sequence[Concept] | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Gallery:
    """The gallery of a feature network, from the cache or made now (about a thousand renders).

    Args:
        extractor: The network.
        caged: Renders in a cage instead of plain ones.
        concepts: All scene concepts if not given.
        progress: Told (renders done, renders in all); not called where the cache has them.
        notify: Told where the cache cannot be written; the gallery is then made anew each time.
    """
    chosen = tuple(concepts) if concepts is not None else load_concepts()
    views = CAGED_VIEWS if caged else CLEAN_VIEWS
    about: dict[str, Any] = {
        "format": _CACHE_FORMAT,
        "extractor": extractor.recipe(),
        "scenes": SCENES_VERSION,
        "seed": GALLERY_SEED,
        "views": views,
        "caged": caged,
        "concepts": [[concept.name, concept.art, *concept.paint] for concept in chosen],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"gallery-{key[:32]}.npy"
    cached = _read(path, (len(chosen), extractor.width))
    if cached is not None:
        return Gallery(chosen, cached, key)
    total = np.zeros((len(chosen), extractor.width))
    jobs = [(row, view) for row in range(len(chosen)) for view in range(views)]
    for start in range(0, len(jobs), _BATCH):
        batch = jobs[start : start + _BATCH]
        renders = [_render(chosen[row], view * len(chosen) + row, caged, extractor.side) for row, view in batch]
        for (row, _), vector in zip(batch, unit(extractor.extract(renders)), strict=True):
            total[row] += vector
        if progress is not None:
            progress(start + len(batch), len(jobs))
    vectors = unit(total).astype(np.float32)
    try:
        with atomic_write(path) as temporary:
            np.save(temporary, vectors, allow_pickle=False)
    except OutputError as error:
        if notify is not None:
            notify(f"the renders of the concepts could not be kept for the next time: {error.message}")
    return Gallery(chosen, vectors, key)


def _render(concept: Concept, number: int, caged: bool, side: int) -> np.ndarray:
    kind = {"relation": "in"} if caged else {"kind": "single"}
    scene = compose_scene(GALLERY_SEED, number, aspect=1.0, concept=concept.name, **kind)  # type: ignore[arg-type]
    return render_svg(scene.svg, side, side)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached vectors, or None where there are none or something else is in their place."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return vectors if vectors.shape == shape and vectors.dtype == np.float32 and np.isfinite(vectors).all() else None
