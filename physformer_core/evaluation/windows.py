"""Where in a picture things are: square windows, the concepts seen in them, and the relations of their places.

A picture is looked at through squares: the whole (in a picture that is not square, several squares along its longer
side), and halves of the shorter side at every quarter of it. A thing is found in a window if its concept is among the
likeliest ones there. Two things stand in a relation if some window of the one and some window of the other lie to each
other as the relation's layout in the scenes says. This tells left from right and above from below, not near from far:
for "in front of" and "behind" it asks that both be seen, the nearer one lower down or to the side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HALF = 0.5
STEP = 0.25
OFFSET = 0.1
"""How far apart, in shares of the shorter side, the centres of two windows must be to count as above or beside."""

OPPOSITE = {
    "over": "under", "on": "under", "under": "over", "in front of": "behind", "behind": "in front of",
}  # fmt: skip
"""The relation that a picture of another one must not satisfy: how sharply places are told apart."""


@dataclass(frozen=True)
class Window:
    """A square part of a picture, in shares of its shorter side.

    Args:
        top, left: Its corner.
        side: Its side.
    """

    top: float
    left: float
    side: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.top + self.side / 2, self.left + self.side / 2

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The part of a picture [height, width, 3]."""
        short = min(picture.shape[:2])
        side = max(1, round(self.side * short))
        top = min(round(self.top * short), picture.shape[0] - side)
        left = min(round(self.left * short), picture.shape[1] - side)
        return picture[top : top + side, left : left + side]


def whole_windows(height: int, width: int) -> list[Window]:
    """Squares as large as fit, that cover the picture along its longer side, half overlapping."""
    short, long = min(height, width), max(height, width)
    beyond = long / short - 1
    count = 1 + math.ceil(2 * beyond - 1e-9)
    places = np.linspace(0, beyond, count)
    return [Window(0.0, float(p), 1.0) if width >= height else Window(float(p), 0.0, 1.0) for p in places]


def search_windows(height: int, width: int) -> list[Window]:
    """The whole windows and the halves, a quarter of the shorter side apart."""
    short = min(height, width)
    rows, columns = (
        np.linspace(0, side / short - HALF, 1 + math.ceil((side / short - HALF) / STEP - 1e-9))
        for side in (height, width)
    )
    return whole_windows(height, width) + [Window(float(top), float(left), HALF) for top in rows for left in columns]


def stands_in_relation(relation: str, subject: Window, other: Window) -> bool:
    """Whether two windows lie to each other as a subject and the other thing in a relation do.

    Args:
        relation: "over", "on", "under", "next to", "in front of" or "behind".
        subject, other: Their windows.
    """
    (subject_y, subject_x), (other_y, other_x) = subject.centre, other.centre
    below, beside = subject_y - other_y, abs(subject_x - other_x)
    if relation in ("over", "on"):
        return below < -OFFSET
    if relation == "under":
        return below > OFFSET
    if relation == "next to":
        return beside > OFFSET and beside > abs(below)
    if relation == "in front of":
        return below > OFFSET / 2 or (beside > OFFSET and below > -OFFSET / 2)
    if relation == "behind":
        return below < -OFFSET / 2 or (beside > OFFSET and below < OFFSET / 2)
    raise ValueError(f"no layout is known for the relation {relation!r}")


def ranks(scores: np.ndarray, targets: np.ndarray | int) -> np.ndarray:
    """How many concepts score no lower than the target, 0 for the best: [..., concepts] -> [...].

    Equal scores count against the target: a picture that might be anything alike shows nothing.
    """
    wanted = np.broadcast_to(np.asarray(targets), scores.shape[:-1])
    own = np.take_along_axis(scores, wanted[..., None], axis=-1)
    counts: np.ndarray = (scores >= own).sum(-1) - 1
    return counts


def relation_found(
    relation: str, windows: Sequence[Window], scores_wc: np.ndarray, subject: int, other: int, most: int
) -> tuple[bool, bool, bool]:
    """Whether both things are where the relation says, and whether each is seen at all.

    Args:
        relation: See `stands_in_relation`.
        windows: The windows.
        scores_wc: Scores [windows, concepts].
        subject, other: Their concepts.
        most: 1: a thing is seen where its concept is the likeliest; 5: where it is among the five likeliest.
    """
    of_subject = np.flatnonzero(ranks(scores_wc, subject) < most).tolist()
    of_other = np.flatnonzero(ranks(scores_wc, other) < most).tolist()
    both = any(stands_in_relation(relation, windows[a], windows[b]) for a in of_subject for b in of_other)
    return both, bool(len(of_subject)), bool(len(of_other))
