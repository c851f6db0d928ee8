"""Scenes as a camera would see them: a little closer, a little aside, on plain colours that are never quite the same.

The composer gives a thing one size and few places, so that small networks learn its drawing in full detail. What they
learn is that drawing in that many pixels, and no other, and some of their pictures are copies of scenes, as the scenes
are of each other (docs/results.md). Networks with more training than two cores can give may have scenes that vary.
(`PreprocessConfig.base_views` zooms, too: whole pictures alone, not their crops, whatever that cuts off.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from physformer_core.data.scenes.composer import PlacedSubject, Scene
from physformer_core.data.scenes.painter import COLOURS, n, rect
from physformer_core.errors import DataError

MOST_VARIATION = 0.5

_MARGIN = 0.015
"""Around things, as a share of the picture: so much of their shadows and ripples stays, too."""


def check_variation(variation: float) -> None:
    """Refuses what is no amount of variation.

    Raises:
        DataError: It is not from 0 to `MOST_VARIATION`.
    """
    if not 0 <= variation <= MOST_VARIATION:
        raise DataError(
            f"a variation of {variation:g} is not from 0 to {MOST_VARIATION:g}", hint="0: none; 0.1 is visible"
        )


def varied(scene: Scene, variation: float) -> Scene:
    """The scene from a little closer: by a factor from 1 to ``1 + variation``, towards anywhere that leaves its things
    whole; a plain colour of its background is changed by up to half of ``variation`` of the range, channel by channel.

    Args:
        scene: As it was composed. What chance says of it hangs on its key alone.
        variation: 0, which changes nothing, to `MOST_VARIATION`.

    Returns:
        A scene of the same key, size and captions, whose subjects' boxes are where its things are now.
    """
    if not variation:
        return scene
    random = Random(int.from_bytes(hashlib.sha256(f"physformer-variation/1:{scene.key}".encode()).digest(), "big"))
    boxes = [subject.box for subject in scene.subjects]
    rows = _span([box[0] for box in boxes], [box[2] for box in boxes])
    columns = _span([box[1] for box in boxes], [box[3] for box in boxes])
    side = max(1 / (1 + variation * random.random()), rows[1] - rows[0], columns[1] - columns[0])
    top, left = (random.uniform(max(0.0, last - side), min(1 - side, first)) for first, last in (rows, columns))

    def moved(subject: PlacedSubject) -> PlacedSubject:
        edges = ((edge - corner) / side for edge, corner in zip(subject.box, (top, left, top, left), strict=True))
        up, before, down, after = (round(min(max(edge, 0.0), 1.0), 4) for edge in edges)
        return replace(subject, box=(up, before, down, after))

    svg = scene.svg
    if scene.background is not None:
        colour = COLOURS[scene.background]
        plain, near = (rect(0, 0, scene.width, scene.height, one) for one in (colour, _near(colour, variation, random)))
        assert plain in svg
        svg = svg.replace(plain, near, 1)
    head, body = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 : -len("</svg>")]
    view = f"scale({1 / side:.6f}) translate({n(-left * scene.width)} {n(-top * scene.height)})"
    return replace(
        scene,
        svg=f'{head}<g transform="{view}">{body}</g></svg>',
        subjects=tuple(moved(subject) for subject in scene.subjects),
    )


def _span(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """From the first of some edges to the last, with a margin; the middle where there are none."""
    return max(0.0, min(first, default=0.5) - _MARGIN), min(1.0, max(last, default=0.5) + _MARGIN)


def _near(colour: str, variation: float, random: Random) -> str:
    """A colour near ``#rrggbb``."""
    parts = (int(colour[i : i + 2], 16) + random.uniform(-0.5, 0.5) * variation * 255 for i in (1, 3, 5))
    return "#" + "".join(f"{round(min(max(part, 0.0), 255.0)):02x}" for part in parts)
