"""What a picture shows: a linear classifier of all scene concepts, fitted to windows of composed scenes.

It learns from scenes alone, never from a drawn picture: each concept by itself on a plain colour and in a place, in a
cage, and through windows around the things of a pair, where it is small, cut off or partly covered. Every view is seen
twice, as it is and as an unsteady hand draws it: bent, smeared in places, blurred and noisy. Fitted to views that are
clean or evenly blurred, it missed things that every eye told (docs/evaluation.md). Views are rendered small and large,
so that the size of a picture tells nothing.

A softmax regression over the concepts and, on the same features, a logistic regression of whether there is a cage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from physformer_core.data.scenes import Concept, compose_scene, load_concepts, render_svg
from physformer_core.data.scenes.composer import RELATIONS, Scene
from physformer_core.data.scenes.fetch import SCENES_VERSION
from physformer_core.errors import OutputError
from physformer_core.evaluation.features import FeatureExtractor, unit
from physformer_core.files import atomic_write, cache_folder

CLASSIFIER_SEED = 71_000_011
"""Collection of the scenes that are learnt from; no training set should use it."""

VIEWS = (*["single"] * 2, *["setting"] * 2, *["pair"] * 4, *["caged"] * 6)
"""Scenes of each concept; what pairs show the composer picks. Cages hide much, so many of them are seen."""

SIDES = (256, 720)
"""Pixels along a side of the scenes, by turns."""

WINDOW_SIDES = (0.5, 0.58, 0.67)
"""Sides of the windows around things of a pair, in shares of the picture; a thing fills 0.44 of it."""

_OFF_CENTRE = 0.06
# What an unsteady hand does, in pixels of a picture of 256; noise in steps of 255.
_BENT, _SMEAR, _BLUR, _NOISE = (0.5, 3.0), (1.0, 4.0), (0.2, 1.2), (0.0, 6.0)
_MESH = 8  # parts along a side that are bent
_SCALE, _WEIGHT_DECAY, _MAX_STEPS = 10.0, 1e-4, 150
_BATCH = 16
_CACHE_FORMAT = "physformer-classifier/2"


@dataclass(frozen=True)
class ConceptClassifier:
    """Probabilities of concepts, and of a cage, from the features of a picture.

    Args:
        concepts: The concepts, in the order of the rows.
        weights_cd: [concepts + 1, width + 1], float32: a row per concept and one for the cage; the bias comes last.
        key: SHA-256 of everything that the weights depend on.
    """

    concepts: tuple[Concept, ...]
    weights_cd: np.ndarray
    key: str

    def scores(self, features_nd: np.ndarray) -> np.ndarray:
        """Logarithm of every concept's probability, caged or not, for pictures [n, width]: [n, concepts]."""
        return _log_softmax(self._logits(features_nd)[:, :-1])

    def caged_scores(self, features_nd: np.ndarray) -> np.ndarray:
        """Logarithm of the probability of every concept without a cage, then of each in one: [n, 2 * concepts]."""
        logits = self._logits(features_nd)
        concepts, cage = _log_softmax(logits[:, :-1]), logits[:, -1:]
        return np.concatenate([concepts - np.logaddexp(0, cage), concepts - np.logaddexp(0, -cage)], axis=1)

    def index(self, name: str) -> int:
        """The row of a concept."""
        return next(row for row, concept in enumerate(self.concepts) if concept.name == name)

    def _logits(self, features_nd: np.ndarray) -> np.ndarray:
        logits: np.ndarray = _SCALE * unit(features_nd) @ self.weights_cd[:, :-1].T + self.weights_cd[:, -1]
        return logits


def load_classifier(
    extractor: FeatureExtractor,
    *,
    concepts: Sequence[Concept] | None = None,
    progress: Callable[[int, int], None] | None = None,
    fitting: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> ConceptClassifier:
    """The classifier of a feature network, from the cache or fitted now.

    Args:
        extractor: The network.
        concepts: All scene concepts if not given.
        progress, fitting: See `fit_classifier`; not called where the cache has it.
        notify: Told where the cache cannot be written; the classifier is then fitted anew each time.
    """
    chosen = tuple(concepts) if concepts is not None else load_concepts()
    key = _key(extractor, chosen)
    path = cache_folder() / f"classifier-{key[:32]}.npy"
    cached = _read(path, (len(chosen) + 1, extractor.width + 1))
    if cached is not None:
        return ConceptClassifier(chosen, cached, key)
    fitted = fit_classifier(extractor, concepts=chosen, progress=progress, fitting=fitting)
    try:
        with atomic_write(path) as temporary:
            np.save(temporary, fitted.weights_cd, allow_pickle=False)
    except OutputError as error:
        if notify is not None:
            notify(f"the fitted judge could not be kept for the next time: {error.message}")
    return fitted


def fit_classifier(
    extractor: FeatureExtractor,
    *,
    concepts: Sequence[Concept] | None = None,
    progress: Callable[[int, int], None] | None = None,
    fitting: Callable[[int, int], None] | None = None,
) -> ConceptClassifier:
    """Fits a classifier to scenes; the same machine fits the same bits.

    Args:
        extractor: The network.
        concepts: All scene concepts if not given.
        progress: Told (scenes seen, scenes in all), from 0 on.
        fitting: Told (steps done, steps at most), from 0 on, and once that all are done when fewer are enough.
    """
    chosen = tuple(concepts) if concepts is not None else load_concepts()
    features, labels, caged = [], [], []
    jobs = [(row, number) for row in range(len(chosen)) for number in range(len(VIEWS))]
    if progress is not None:
        progress(0, len(jobs))
    seen = 0
    for scenes in _drawn_ahead(chosen, jobs):
        windows = [window for scene in scenes for window in scene]
        features.append(extractor.extract([window.picture for window in windows]))
        labels += [window.row for window in windows]
        caged += [window.caged for window in windows]
        seen += len(scenes)
        if progress is not None:
            progress(seen, len(jobs))
    weights = _fit(unit(np.concatenate(features)), np.array(labels), np.array(caged), len(chosen), fitting)
    return ConceptClassifier(chosen, weights, _key(extractor, chosen))


class _Window(NamedTuple):
    """Something to learn from: a picture, the row of its concept, and whether that is in a cage."""

    picture: np.ndarray
    row: int
    caged: bool


def _drawn_ahead(concepts: Sequence[Concept], jobs: Sequence[tuple[int, int]]) -> Iterator[list[list[_Window]]]:
    """The windows of every job's scene, in batches of scenes; the next batch is drawn while the network sees one."""
    rows = {concept.name: row for row, concept in enumerate(concepts)}
    with ThreadPoolExecutor(1) as pool:

        def drawing(start: int) -> list[Future[list[_Window]]]:
            return [pool.submit(_windows, concepts, rows, *job) for job in jobs[start : start + _BATCH]]

        coming = drawing(0)
        for start in range(_BATCH, len(jobs) + _BATCH, _BATCH):
            batch, coming = coming, drawing(start)
            yield [scene.result() for scene in batch]


def _windows(concepts: Sequence[Concept], rows: Mapping[str, int], row: int, number: int) -> list[_Window]:
    """What to learn from a scene: the whole of it where it shows one thing, else a window around each."""
    view, pairs = VIEWS[number], [relation for relation in RELATIONS if relation != "in"]
    turn = row + VIEWS[:number].count(view)
    random = np.random.default_rng([CLASSIFIER_SEED, row, number])
    options: dict[str, Any] = {"concept": concepts[row].name}
    if view == "pair":  # the composer picks both, as not everything goes with everything
        options = {"relation": pairs[turn % len(pairs)]}
    elif view == "caged":
        options["relation"] = "in"
    else:
        options["kind"] = view
    scene = compose_scene(CLASSIFIER_SEED, len(VIEWS) * row + number, aspect=1.0, **options)
    side = SIDES[turn % len(SIDES)]
    picture = render_svg(scene.svg, side, side)
    if view != "pair":
        found = [(picture, row)]
    else:
        found = [(cut, rows[name]) for name, cut in _around_each(scene, picture, random) if name in rows]
    return [
        _Window(seen, label, view == "caged") for cut, label in found for seen in (cut, _worse(cut, side / 256, random))
    ]


def _around_each(scene: Scene, picture: np.ndarray, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each thing in a square scene, with a window around it, off its centre."""
    whole = len(picture)
    for subject in scene.subjects:
        side = round(whole * random.choice(WINDOW_SIDES))
        top, left, bottom, right = (whole * edge for edge in subject.box)
        centred = np.array([top + bottom - side, left + right - side]) / 2
        moved = centred + random.uniform(-_OFF_CENTRE, _OFF_CENTRE, 2) * whole
        y, x = moved.clip(0, whole - side).astype(int)
        yield subject.concept, picture[y : y + side, x : x + side]


def _worse(picture: np.ndarray, scale: float, random: np.random.Generator) -> np.ndarray:
    """A window of a picture as an unsteady hand draws it.

    Args:
        picture: The window.
        scale: How large the picture is that the window is of, beside one of 256 pixels.
        random: What is drawn, in a fixed order.
    """
    bent = _bent(Image.fromarray(picture), scale * random.uniform(*_BENT), random)
    smeared = bent.filter(ImageFilter.GaussianBlur(scale * random.uniform(*_SMEAR)))
    spots = Image.fromarray((255 * (random.random((_MESH, _MESH)) < 1 / 3)).astype(np.uint8))
    drawn = Image.composite(smeared, bent, spots.resize(bent.size, Image.Resampling.BICUBIC))
    blurred = drawn.filter(ImageFilter.GaussianBlur(scale * random.uniform(*_BLUR)))
    noisy = np.asarray(blurred, np.float32) + random.normal(0, random.uniform(*_NOISE), picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _bent(picture: Image.Image, most: float, random: np.random.Generator) -> Image.Image:
    """A picture whose parts are moved by some pixels, smoothly; its edge stays where it is."""
    width, height = picture.size
    moves = most / 2 * random.standard_normal((_MESH + 1, _MESH + 1, 2))
    moves[[0, -1]] = moves[:, [0, -1]] = 0
    xs, ys = (np.linspace(0, side, _MESH + 1).round().astype(int) for side in (width, height))

    def corner(row: int, column: int) -> tuple[float, float]:
        return float(xs[column] + moves[row, column, 0]), float(ys[row] + moves[row, column, 1])

    mesh = [
        (
            (xs[x], ys[y], xs[x + 1], ys[y + 1]),
            (*corner(y, x), *corner(y + 1, x), *corner(y + 1, x + 1), *corner(y, x + 1)),
        )
        for y, x in itertools.product(range(_MESH), repeat=2)
    ]
    return picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _fit(
    units_nd: np.ndarray,
    labels_n: np.ndarray,
    caged_n: np.ndarray,
    concepts: int,
    fitting: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Weights [concepts + 1, width + 1] of both regressions by L-BFGS, from zero, so nothing is drawn by chance."""
    inputs_nd = _SCALE * torch.from_numpy(units_nd)
    targets_n, cages_n = torch.from_numpy(labels_n), torch.from_numpy(caged_n).float()
    weights_cd = torch.zeros(concepts + 1, inputs_nd.shape[1], requires_grad=True)
    bias_c = torch.zeros(concepts + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_cd, bias_c], max_iter=_MAX_STEPS, max_eval=_MAX_STEPS, history_size=20, line_search_fn="strong_wolfe"
    )
    tell, steps = fitting or (lambda done, total: None), itertools.count()

    def loss() -> torch.Tensor:
        tell(min(next(steps), _MAX_STEPS), _MAX_STEPS)  # the last line search may need a few more
        optimizer.zero_grad()
        logits_nc = F.linear(inputs_nd, weights_cd, bias_c)
        value = F.cross_entropy(logits_nc[:, :-1], targets_n)
        value = value + F.binary_cross_entropy_with_logits(logits_nc[:, -1], cages_n)
        value = value + _WEIGHT_DECAY * weights_cd.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    tell(_MAX_STEPS, _MAX_STEPS)
    return torch.cat([weights_cd, bias_c[:, None]], dim=1).detach().numpy()


def _log_softmax(logits_nc: np.ndarray) -> np.ndarray:
    shifted = logits_nc - logits_nc.max(-1, keepdims=True)
    scores: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return scores


def _key(extractor: FeatureExtractor, concepts: Sequence[Concept]) -> str:
    """SHA-256 of everything that a classifier depends on."""
    about: dict[str, Any] = {
        "format": _CACHE_FORMAT,
        "extractor": extractor.recipe(),
        "scenes": SCENES_VERSION,
        "seed": CLASSIFIER_SEED,
        "views": VIEWS,
        "sides": SIDES,
        "windows": [*WINDOW_SIDES, _OFF_CENTRE],
        "worse": [_BENT, _SMEAR, _BLUR, _NOISE, _MESH],
        "fit": [_SCALE, _WEIGHT_DECAY, _MAX_STEPS],
        "concepts": [[concept.name, concept.art, *concept.paint] for concept in concepts],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached weights, or None where there are none or something else is in their place."""
    try:
        weights = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return weights if weights.shape == shape and weights.dtype == np.float32 and np.isfinite(weights).all() else None
