"""Prompt accuracy: whether a picture shows what its prompt says, measured without a person and without a network.

Prompts ask for scenes that nobody has drawn yet (`prompt_cases`). A classifier that is fitted to scenes (`classifier`)
says how likely each drawn picture shows each concept; its prompt is right if the concept it names is the likeliest
(top-1) or among the five likeliest (top-5). Beside the score stand two others, from the same prompts, features and
arithmetic: the ceiling, where the very scene that the prompt describes is rendered instead of drawn, and the floor,
where each picture is judged by the other pictures' prompts. A network that ignores its prompt gets the floor, one that
draws like the data the ceiling.

Prompts with a relation count as right where both things are seen in places that fit the relation (`windows`), or, for
"in a cage", where the concept in a cage is likelier than any other, caged or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from physformer_core.data.scenes import Concept, render_svg
from physformer_core.data.scenes.composer import RELATIONS
from physformer_core.evaluation.classifier import ConceptClassifier
from physformer_core.evaluation.features import FeatureExtractor
from physformer_core.evaluation.prompt_cases import PromptCase
from physformer_core.evaluation.windows import OPPOSITE, Window, ranks, relation_found, search_windows, whole_windows

_THUMBNAIL = 160
_MOST = (1, 5)


@dataclass(frozen=True)
class Judgement:
    """What one picture was taken for.

    Args:
        scores: Single subjects: [concepts]. Relations: [windows, concepts], with caged concepts behind for "in".
        guess: Name of the likeliest concept.
        rank: How many concepts are no less likely than the right one; for relations 0, 1 or 5: found as the likeliest
            one, among the likeliest five, or not.
        windows: Relations: the windows of the scores' rows.
        both, subject, other: Relations: what was found as the likeliest one and among the likeliest five.
    """

    scores: np.ndarray
    guess: str
    rank: int
    windows: tuple[Window, ...] = ()
    both: tuple[bool, ...] = ()
    subject: tuple[bool, ...] = ()
    other: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Share:
    """A share of pictures with its 95 % interval (Wilson, 1927).

    Args:
        value, low, high: 0 to 1.
        count: Pictures.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: Sequence[bool] | np.ndarray) -> Share:
        """The share of hits; there must be at least one picture."""
        count = len(hits)
        z, p = 1.959964, float(np.mean(hits))
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        return cls(p, max(0.0, middle - half), min(1.0, middle + half), count)

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


class Judge:
    """Says what pictures show.

    Args:
        extractor: The feature network.
        classifier: What pictures of these features show.
    """

    def __init__(self, extractor: FeatureExtractor, classifier: ConceptClassifier) -> None:
        self._extractor, self._classifier = extractor, classifier

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What pictures may be taken for, in the order of the scores."""
        return self._classifier.concepts

    def judge(self, case: PromptCase, picture: np.ndarray) -> Judgement:
        """What a picture [height, width, 3] shows, and whether that is what its prompt asks for."""
        if case.kind == "in":
            return self._judge_caged(case, picture)
        if case.other is not None:
            return self._judge_relation(case, picture)
        windows = whole_windows(*picture.shape[:2])
        scores = self._classifier.scores(self._seen(picture, windows)).max(0)
        return Judgement(scores, self._name(int(scores.argmax())), int(ranks(scores, case.subject)))

    def _judge_caged(self, case: PromptCase, picture: np.ndarray) -> Judgement:
        concepts = len(self.concepts)
        scores = self._classifier.caged_scores(self._seen(picture, whole_windows(*picture.shape[:2]))).max(0)
        rank, likeliest = int(ranks(scores, concepts + case.subject)), int(scores.argmax())
        found = tuple(rank < most for most in _MOST)
        guess = self._name(likeliest) + (" in a cage" if likeliest >= concepts else "")
        return Judgement(scores[None], guess, _step(found), (), found, found, found)

    def _judge_relation(self, case: PromptCase, picture: np.ndarray) -> Judgement:
        assert case.other is not None
        windows = search_windows(*picture.shape[:2])
        scores = self._classifier.scores(self._seen(picture, windows))
        results = [relation_found(case.kind, windows, scores, case.subject, case.other, most) for most in _MOST]
        both, subject, other = zip(*results, strict=True)
        # What is seen most clearly: the two concepts with the highest scores anywhere.
        clearest = scores.max(0).argsort()[::-1][:2]
        guess = " and ".join(self._name(int(row)) for row in clearest)
        return Judgement(scores, guess, _step(both), tuple(windows), both, subject, other)

    def _seen(self, picture: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
        return self._extractor.extract([window.cut(picture) for window in windows])

    def _name(self, row: int) -> str:
        return self.concepts[row % len(self.concepts)].name


@dataclass(frozen=True)
class JudgedPrompt:
    """A prompt, its drawn picture and its ceiling, judged.

    Args:
        case: The prompt.
        drawn: The drawn picture.
        real: The rendered scene.
        thumbnail: The drawn picture, small.
    """

    case: PromptCase
    drawn: Judgement
    real: Judgement
    thumbnail: Image.Image


def judge_all(
    cases: Sequence[PromptCase],
    pictures: Iterator[tuple[int, np.ndarray]],
    judge: Judge,
    on_judged: Callable[[int], None] | None = None,
    watch: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> list[JudgedPrompt]:
    """Judges drawn pictures and, at the same size, the scenes that their prompts describe.

    Args:
        cases: The prompts.
        pictures: (number of the prompt, picture), in any order, each once.
        judge: What judges.
        on_judged: Told how many are done.
        watch: Shown each drawn picture and its scene, [height, width, 3].
    """
    judged: dict[int, JudgedPrompt] = {}
    for number, picture in pictures:
        case = cases[number]
        height, width = picture.shape[:2]
        thumbnail = Image.fromarray(picture)
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        scene = render_svg(case.scene.svg, width, height)
        judged[number] = JudgedPrompt(case, judge.judge(case, picture), judge.judge(case, scene), thumbnail)
        if watch is not None:
            watch(picture, scene)
        if on_judged is not None:
            on_judged(len(judged))
    return [judged[number] for number in sorted(judged)]


def single_report(judged: Sequence[JudgedPrompt], concepts: Sequence[Concept]) -> dict[str, Any]:
    """Shares of single subjects that were right: in all, by category and by kind, with ceiling and floor."""

    def shares(chosen: Sequence[JudgedPrompt]) -> dict[str, Any]:
        return {f"top{most}": Share.of([one.drawn.rank < most for one in chosen]).as_dict() for most in _MOST} | {
            "ceiling": {f"top{most}": Share.of([one.real.rank < most for one in chosen]).value for most in _MOST}
        }

    targets = np.array([one.case.subject for one in judged])
    floor: dict[str, float | None] = {}
    for most in _MOST:
        # Every picture against the prompts of all others: the same as shuffling, without its luck.
        hits = [
            np.mean(ranks(np.broadcast_to(one.drawn.scores, (len(others), len(one.drawn.scores))), others) < most)
            for one in judged
            if len(others := targets[targets != one.case.subject])
        ]
        floor[f"top{most}"] = float(np.mean(hits)) if hits else None
    categories = list(dict.fromkeys(concept.category for concept in concepts))
    return {
        "count": len(judged),
        **shares(judged),
        "floor": floor,
        "kinds": {kind: shares(chosen) for kind in ("plain", "place") if (chosen := _of_kind(judged, kind))},
        "categories": [
            {"category": category, **shares(chosen)}
            for category in categories
            if (chosen := [one for one in judged if concepts[one.case.subject].category == category])
        ],
    }


def relation_report(judged: Sequence[JudgedPrompt]) -> dict[str, Any]:
    """Shares of relations whose things were both found in the right places, with ceiling, floor and opposite.

    "floor" judges each picture by the other pictures' prompts of the same shape (cage or two things); "opposite" asks
    for the opposite relation of the same two things, which a good picture must not satisfy.
    """

    def shares(chosen: Sequence[JudgedPrompt]) -> dict[str, Any]:
        return {
            f"top{most}": Share.of([one.drawn.both[place] for one in chosen]).as_dict()
            for place, most in enumerate(_MOST)
        } | {
            "subject_top5": Share.of([one.drawn.subject[-1] for one in chosen]).value,
            "other_top5": Share.of([one.drawn.other[-1] for one in chosen]).value,
            "ceiling": {
                f"top{most}": Share.of([one.real.both[place] for one in chosen]).value
                for place, most in enumerate(_MOST)
            },
        }

    return {
        "count": len(judged),
        **shares(judged),
        "floor": {f"top{most}": _relation_floor(judged, most) for most in _MOST},
        "opposite": {"drawn": _opposite(judged, real=False), "ceiling": _opposite(judged, real=True)},
        "relations": [
            {"relation": relation, **shares(chosen)} for relation in RELATIONS if (chosen := _of_kind(judged, relation))
        ],
    }


def _relation_floor(judged: Sequence[JudgedPrompt], most: int) -> float | None:
    hits = []
    for one in judged:
        for prompt in judged:
            if (prompt.case.subject, prompt.case.other) == (one.case.subject, one.case.other):
                continue
            if one.case.kind == prompt.case.kind == "in":
                concepts = one.drawn.scores.shape[1] // 2
                hits.append(bool(ranks(one.drawn.scores[0], concepts + prompt.case.subject) < most))
            elif one.case.other is not None and prompt.case.other is not None:
                found = relation_found(
                    prompt.case.kind, one.drawn.windows, one.drawn.scores, prompt.case.subject, prompt.case.other, most
                )
                hits.append(found[0])
    return float(np.mean(hits)) if hits else None


def _opposite(judged: Sequence[JudgedPrompt], *, real: bool) -> float | None:
    """The share of pictures, of those whose relation has an opposite, that satisfy that one too (top-1)."""
    hits = []
    for one in judged:
        if one.case.kind in OPPOSITE and one.case.other is not None:
            seen = one.real if real else one.drawn
            opposite = OPPOSITE[one.case.kind]
            hits.append(relation_found(opposite, seen.windows, seen.scores, one.case.subject, one.case.other, 1)[0])
    return float(np.mean(hits)) if hits else None


def judged_table(judged: Sequence[JudgedPrompt], concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """Every prompt with what its picture was taken for, ready for JSON."""
    rows = []
    for one in judged:
        facts: Mapping[str, Any] = {
            "prompt": one.case.prompt,
            "kind": one.case.kind,
            "concept": concepts[one.case.subject].name,
            "other": concepts[one.case.other].name if one.case.other is not None else None,
            "guess": one.drawn.guess,
            "rank": one.drawn.rank,
            "right": one.drawn.rank == 0,
            "ceiling_rank": one.real.rank,
        }
        rows.append(dict(facts))
    return rows


def _of_kind(judged: Sequence[JudgedPrompt], kind: str) -> list[JudgedPrompt]:
    return [one for one in judged if one.case.kind == kind]


def _step(found: tuple[bool, ...]) -> int:
    """0 found as the likeliest, 1 among the likeliest five, 5 not."""
    return 0 if found[0] else 1 if found[-1] else _MOST[-1]
