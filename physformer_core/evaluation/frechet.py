"""Distances between two sets of feature vectors: Fréchet, kernel (KID), precision and recall; statistics in files.

Mean and covariance are gathered batch by batch in float64 and constant memory. KID, precision and recall need vectors
themselves, and take a random sample of at most `KEPT_VECTORS` of them, which is constant too.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from physformer_core.errors import DataError
from physformer_core.files import atomic_write

KEPT_VECTORS = 10_000
"""Vectors kept of a set, drawn at random, for KID, precision and recall."""

TRUSTED_COUNT = 10_000
"""Below this number of pictures a Fréchet distance depends more on the number than on the pictures."""

_DISTANCE_ROWS = 1000


class RunningStatistics:
    """Mean and covariance of vectors that come in batches; memory does not grow with their number.

    Batches are joined by the update of Chan, Golub and LeVeque (1979), which, unlike sums of squares, loses no digits
    where the mean is large against the spread.

    Args:
        width: Length of a vector.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def update(self, features: np.ndarray) -> None:
        """Adds vectors [batch, width]."""
        if not len(features):
            return
        batch = np.asarray(features, np.float64)
        mean = batch.mean(0)
        centred = batch - mean
        shift = mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """Covariance [width, width], divided by the number less one, as `numpy.cov` does.

        Raises:
            DataError: There are fewer than two vectors.
        """
        if self.count < 2:
            raise DataError(
                f"a covariance needs at least two pictures, and there is {self.count or 'none'}",
                hint="10,000 or more make a score that can be compared",
            )
        return self._scatter / (self.count - 1)


class Reservoir:
    """A uniform random sample of vectors of a stream of unknown length (Vitter's algorithm R).

    Args:
        width: Length of a vector.
        capacity: Vectors kept at most.
        seed: Of the draws.
    """

    def __init__(self, width: int, capacity: int = KEPT_VECTORS, seed: int = 0) -> None:
        self._capacity = capacity
        self._random = np.random.default_rng(seed)
        self._seen = 0
        self._rows: list[np.ndarray] = []
        self._width = width

    def update(self, features: np.ndarray) -> None:
        """Offers vectors [batch, width]."""
        for row in features:
            self._seen += 1
            if len(self._rows) < self._capacity:
                self._rows.append(np.array(row, np.float32))
            elif (place := int(self._random.integers(self._seen))) < self._capacity:
                self._rows[place] = np.array(row, np.float32)

    def vectors(self) -> np.ndarray:
        """float32 [vectors, width]."""
        return np.stack(self._rows) if self._rows else np.zeros((0, self._width), np.float32)


@dataclass(frozen=True)
class FeatureStatistics:
    """What is known of the features of a set of pictures.

    Args:
        mean: [width], float64.
        covariance: [width, width], float64.
        count: Pictures; None if the file does not say.
        recipe: How the features came about; empty if the file does not say.
        vectors: A sample of the features [vectors, width], float32; None if read from a file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    vectors: np.ndarray | None = None


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Writes an .npz file with `mu` and `sigma` as pytorch-fid reads them, and `count` and `recipe` (JSON) beside them.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=np.int64(-1 if statistics.count is None else statistics.count),
            recipe=np.array(json.dumps(dict(statistics.recipe), sort_keys=True, ensure_ascii=False)),
        )


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Reads an .npz file of ours, or one of pytorch-fid's with `mu` and `sigma` alone. Pickles inside are refused.

    Raises:
        DataError: It cannot be read or holds no statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean = np.asarray(archive["mu"], np.float64)
            covariance = np.asarray(archive["sigma"], np.float64)
            count = int(archive["count"]) if "count" in archive else -1
            recipe = json.loads(str(archive["recipe"])) if "recipe" in archive else {}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{path} holds no feature statistics: {reason}",
            hint="an .npz file with mu and sigma, as --save-statistics and pytorch-fid write it",
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not isinstance(recipe, dict):
        raise DataError(f"{path} is damaged: mu is {list(mean.shape)}, sigma is {list(covariance.shape)}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} is damaged: it has values that are not finite")
    return FeatureStatistics(mean, covariance, count if count >= 0 else None, recipe)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Fréchet distance of two normal distributions: |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2).

    The trace is that of (A^1/2 B A^1/2)^1/2, which has the same eigenvalues as (A B)^1/2 and is symmetric: two
    symmetric eigenproblems, no complex numbers, and no trouble where fewer pictures than dimensions make A singular.

    Args:
        mean_a, mean_b: [width].
        covariance_a, covariance_b: [width, width], symmetric, positive semi-definite.

    Raises:
        DataError: The widths differ.
    """
    if mean_a.shape != mean_b.shape or covariance_a.shape != covariance_b.shape:
        raise DataError(
            f"features of width {len(mean_a)} and {len(mean_b)} cannot be compared",
            hint="take the same network for both sets: --features",
        )
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ covariance_b @ root
    overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    shift = mean_a - mean_b
    return float(shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap)


def kernel_distance(
    vectors_a: np.ndarray, vectors_b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al., 2018): unbiased squared MMD with the kernel (x.y / width + 1)^3, over random subsets.

    Args:
        vectors_a, vectors_b: [vectors, width].
        subsets: How many subsets.
        subset_size: Vectors of either set in each; all of the smaller set if that is less.
        seed: Of the draws.

    Returns:
        Mean and standard deviation over the subsets; the latter is 0 where both sets fit into one subset.

    Raises:
        DataError: A set has fewer than two vectors.
    """
    size = min(subset_size, len(vectors_a), len(vectors_b))
    if size < 2:
        raise DataError("KID needs at least two pictures on either side")
    random = np.random.default_rng(seed)
    values = []
    for _ in range(1 if size == len(vectors_a) == len(vectors_b) else subsets):
        a = vectors_a[random.permutation(len(vectors_a))[:size]].astype(np.float64)
        b = vectors_b[random.permutation(len(vectors_b))[:size]].astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(a, a), _kernel(b, b)))
        values.append(within - 2 * _kernel(a, b).mean())
    return float(np.mean(values)), float(np.std(values))


def paired_kernel_distance(vectors_a: np.ndarray, vectors_b: np.ndarray) -> tuple[float, np.ndarray]:
    """KID of two sets whose vectors belong together in pairs, and what it is without each of the pairs.

    The two of a pair, such as two pictures of one prompt, are more alike than two vectors of the sets are. So they are
    not compared with each other: with them the distance of two equally good sets would be below 0, by twice what they
    are more alike over the number of pairs.

    From the latter comes the error of a difference: of two sets against a third the distances rise and fall together.

    Args:
        vectors_a, vectors_b: [pairs, width].

    Returns:
        The distance, and [pairs] distances with one pair left out.

    Raises:
        DataError: There are fewer than three pairs.
    """
    count = len(vectors_a)
    if count < 3 or len(vectors_b) != count:
        raise DataError(f"pairs of pictures are needed, three at least, not {count} and {len(vectors_b)}")
    a, b = vectors_a.astype(np.float64), vectors_b.astype(np.float64)
    total, left_out = 0.0, np.zeros(count)
    for kernel in (_kernel(a, a), _kernel(b, b)):
        np.fill_diagonal(kernel, 0)
        total += kernel.sum() / (count * (count - 1))
        left_out += (kernel.sum() - 2 * kernel.sum(1)) / ((count - 1) * (count - 2))
    across = _kernel(a, b)
    np.fill_diagonal(across, 0)
    total -= 2 * across.sum() / (count * (count - 1))
    left_out -= 2 * (across.sum() - across.sum(0) - across.sum(1)) / ((count - 1) * (count - 2))
    return float(total), left_out


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / width + 1)^3 of all pairs of vectors."""
    powered: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return powered


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    Precision is the share of generated vectors that lie within reach of a real one, recall the share of real vectors
    within reach of a generated one. A vector's reach is the distance to its k-th neighbour in its own set.

    Args:
        real, generated: [vectors, width].
        neighbours: k.

    Raises:
        DataError: A set has no more than k vectors.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise DataError(f"precision and recall need more than {neighbours} pictures on either side")
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(probes: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    # The nearest is the vector itself, at distance zero.
    reach = np.concatenate(
        [
            np.partition(_squared_distances(rows, manifold), neighbours, axis=1)[:, neighbours]
            for rows in _chunks(manifold)
        ]
    )
    inside = [(_squared_distances(rows, manifold) <= reach).any(1) for rows in _chunks(probes)]
    return float(np.concatenate(inside).mean())


def _chunks(vectors: np.ndarray) -> list[np.ndarray]:
    return [vectors[start : start + _DISTANCE_ROWS] for start in range(0, len(vectors), _DISTANCE_ROWS)]


def _squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    x, y = rows.astype(np.float64), columns.astype(np.float64)
    distances: np.ndarray = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return distances.clip(0)
