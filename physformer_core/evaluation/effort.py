"""Quality against effort: several numbers of steps, and the fewest that are enough.

Prompt accuracy says whether a picture shows its subject. With few steps it does before it is a good picture: what the
prompt leaves open is averaged, a wall is two colours at once, a window is half there. That shows in how far drawn
pictures as a set are from the scenes of the same prompts (KID), so that both have a say in which number is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from physformer_core.evaluation.frechet import paired_kernel_distance
from physformer_core.evaluation.prompt_accuracy import Share

_INK, _GRID, _PAPER = (40, 40, 40), (228, 228, 228), (255, 255, 255)
_TOP1, _TOP5, _DISTANCE = (208, 98, 20), (31, 92, 173), (60, 130, 70)
_SCALE = 2  # drawn larger and reduced, for smooth lines
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 56, 24, 70


@dataclass(frozen=True)
class Effort:
    """What a number of steps brings.

    Args:
        steps: At the coarsest level.
        evaluations: Of the network over all levels, guidance included.
        seconds: A picture, drawn in batches.
        top1, top5: Prompt accuracy.
        distance: Kernel distance of the pictures to the scenes of the same prompts, 0 where they are alike.
        beyond_least: How far that is above the least of all numbers of steps, and the standard error of that.
    """

    steps: int
    evaluations: int
    seconds: float
    top1: Share
    top5: Share
    distance: float
    beyond_least: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def distances(real: np.ndarray, drawn: Sequence[np.ndarray]) -> list[tuple[float, tuple[float, float]]]:
    """`Effort.distance` and `Effort.beyond_least` of several sets of pictures of the same prompts.

    Args:
        real: Features [prompts, width] of the scenes that the prompts describe.
        drawn: Features of the pictures of each number of steps, in the same order.
    """
    found = [paired_kernel_distance(real, features) for features in drawn]
    least, least_without = min(found, key=lambda one: one[0])
    results = []
    for value, without in found:
        # The jackknife's error (Efron & Stein 1981), of the difference: of both the prompts are the same.
        change = without - least_without
        spread = float(np.sqrt((len(change) - 1) * np.mean((change - change.mean()) ** 2)))
        results.append((value, (value - least, spread)))
    return results


def knee(efforts: Sequence[Effort]) -> Effort:
    """The fewest evaluations whose top-5 is within one standard error of the best, and whose distance to real scenes is
    within one of the least; those of the least distance if no number of steps is both."""
    best = max(efforts, key=lambda one: one.top5.value)
    share = best.top5.value
    error = math.sqrt(max(share * (1 - share), 0.25 / best.top5.count) / best.top5.count)
    enough = [one for one in efforts if one.top5.value >= share - error and one.beyond_least[0] <= one.beyond_least[1]]
    return min(enough or [min(efforts, key=lambda one: one.distance)], key=lambda one: one.evaluations)


def draw_efforts(efforts: Sequence[Effort], *, width: int = 900, height: int = 760) -> Image.Image:
    """Draws, over evaluations on a logarithmic axis, top-1 and top-5 with their 95 % intervals, below them the distance
    to real scenes, and the knee.

    Args:
        efforts: One or more.
        width, height: In pixels.
    """
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(picture)
    font, title = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(16 * _SCALE)
    ordered = sorted(efforts, key=lambda one: one.evaluations)
    low, high = math.log(ordered[0].evaluations / 1.25), math.log(ordered[-1].evaluations * 1.25)
    middle = _TOP + round((height - _TOP - _BOTTOM) * 0.6)
    chosen = knee(ordered)

    def panel(top: int, bottom: int, most: float, ticks: Sequence[float], words: str) -> Callable[..., Any]:
        def place(evaluations: float, value: float) -> tuple[float, float]:
            x = _LEFT + (width - _LEFT - _RIGHT) * (math.log(evaluations) - low) / (high - low)
            return x * _SCALE, (bottom - (bottom - top) * value / most) * _SCALE

        for tick in ticks:
            start, end = place(math.exp(low), tick), place(math.exp(high), tick)
            draw.line([start, end], _GRID, _SCALE)
            label = f"{100 * tick:.0f} %" if most <= 1 else f"{tick:g}"
            draw.text((start[0] - 8 * _SCALE, start[1]), label, _INK, font, "rm")
        draw.line([place(chosen.evaluations, 0), place(chosen.evaluations, most)], _GRID, 3 * _SCALE)
        draw.text((_LEFT * _SCALE, (top - 30) * _SCALE), words, _INK, title)
        draw.rectangle([*place(math.exp(low), most), *place(math.exp(high), 0)], None, _INK, _SCALE)
        return place

    def curve(place: Callable[..., Any], points: Sequence[tuple[float, float, float, float]], colour: Any) -> None:
        """Of (evaluations, value, from, to)."""
        draw.line([place(x, value) for x, value, _, _ in points], colour, 2 * _SCALE)
        for x, value, start, end in points:
            draw.line([place(x, start), place(x, end)], colour, _SCALE)
            draw.circle(place(x, value), 4 * _SCALE, colour)

    most = min(1.0, max(one.top5.high for one in ordered) + 0.05)
    shares = [tick / 10 for tick in range(11) if tick / 10 <= most]
    place = panel(_TOP, middle - _BOTTOM // 2, most, shares, "pictures that show their prompt")
    for name, colour, row in (("top5", _TOP5, 0), ("top1", _TOP1, 1)):
        of_name = [(one.evaluations, getattr(one, name)) for one in ordered]
        curve(place, [(x, share.value, share.low, min(share.high, most)) for x, share in of_name], colour)
        where = ((width - _RIGHT - 8) * _SCALE, (_TOP + 10 + 18 * row) * _SCALE)
        draw.text(where, {"top5": "among the best five", "top1": "best"}[name], colour, font, "rm")

    # In thousandths, and never on the scale of shares.
    points = []
    for one in ordered:
        value, error = 1000 * one.distance, 1000 * one.beyond_least[1]
        points.append((one.evaluations, max(0.0, value), max(0.0, value - error), max(0.0, value + error)))
    most = max(1.1 * max(end for _, _, _, end in points), 1.01)
    spacing = 10 ** math.floor(math.log10(most / 2)) * (5 if most / 10 ** math.floor(math.log10(most / 2)) > 10 else 1)
    ticks = [spacing * number for number in range(math.floor(most / spacing) + 1)]
    place = panel(middle + _BOTTOM // 2, height - _BOTTOM, most, ticks, "distance to real scenes (KID, thousandths)")
    curve(place, points, _DISTANCE)
    for one in ordered:
        x, y = place(one.evaluations, 0)
        draw.text((x, y + 6 * _SCALE), str(one.evaluations), _INK, font, "ma")
        draw.text((x, y + 22 * _SCALE), f"{one.seconds:.2g} s", _INK, font, "ma")
    below = ((_LEFT + width - _RIGHT) / 2 * _SCALE, (height - 24) * _SCALE)
    draw.text(below, "evaluations of the network, and seconds a picture; the thick line is the knee", _INK, font, "ma")
    return picture.resize((width, height), Image.Resampling.LANCZOS)
