"""Quality against effort: prompt accuracy at several numbers of steps, and the fewest that are enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from physformer_core.evaluation.prompt_accuracy import Share

_INK, _GRID, _PAPER = (40, 40, 40), (228, 228, 228), (255, 255, 255)
_TOP1, _TOP5 = (208, 98, 20), (31, 92, 173)
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
    """

    steps: int
    evaluations: int
    seconds: float
    top1: Share
    top5: Share

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def knee(efforts: Sequence[Effort]) -> Effort:
    """The fewest evaluations whose top-5 is within one standard error of the best."""
    best = max(efforts, key=lambda one: one.top5.value)
    share = best.top5.value
    error = math.sqrt(max(share * (1 - share), 0.25 / best.top5.count) / best.top5.count)
    return min((one for one in efforts if one.top5.value >= share - error), key=lambda one: one.evaluations)


def draw_efforts(efforts: Sequence[Effort], *, width: int = 900, height: int = 520) -> Image.Image:
    """Draws top-1 and top-5 with their 95 % intervals over evaluations, on a logarithmic axis, and the knee.

    Args:
        efforts: One or more.
        width, height: In pixels.
    """
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(picture)
    font, title = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(16 * _SCALE)
    ordered = sorted(efforts, key=lambda one: one.evaluations)
    low, high = math.log(ordered[0].evaluations / 1.25), math.log(ordered[-1].evaluations * 1.25)
    most = min(1.0, max(one.top5.high for one in ordered) + 0.05)

    def place(evaluations: float, share: float) -> tuple[float, float]:
        x = _LEFT + (width - _LEFT - _RIGHT) * (math.log(evaluations) - low) / (high - low)
        return x * _SCALE, (height - _BOTTOM - (height - _TOP - _BOTTOM) * share / most) * _SCALE

    for tick in range(11):
        if tick / 10 <= most:
            start, end = place(math.exp(low), tick / 10), place(math.exp(high), tick / 10)
            draw.line([start, end], _GRID, _SCALE)
            draw.text((start[0] - 8 * _SCALE, start[1]), f"{10 * tick} %", _INK, font, "rm")
    chosen = knee(ordered)
    draw.line([place(chosen.evaluations, 0), place(chosen.evaluations, most)], _GRID, 3 * _SCALE)
    for one in ordered:
        x, y = place(one.evaluations, 0)
        draw.text((x, y + 6 * _SCALE), str(one.evaluations), _INK, font, "ma")
        draw.text((x, y + 22 * _SCALE), f"{one.seconds:.2g} s", _INK, font, "ma")
    for name, colour, row in (("top5", _TOP5, 0), ("top1", _TOP1, 1)):
        shares = [(one.evaluations, getattr(one, name)) for one in ordered]
        draw.line([place(x, share.value) for x, share in shares], colour, 2 * _SCALE)
        for x, share in shares:
            draw.line([place(x, share.low), place(x, min(share.high, most))], colour, _SCALE)
            centre = place(x, share.value)
            draw.circle(centre, 4 * _SCALE, colour)
        where = ((width - _RIGHT - 8) * _SCALE, (_TOP + 10 + 18 * row) * _SCALE)
        draw.text(where, {"top5": "among the best five", "top1": "best"}[name], colour, font, "rm")
    draw.text((_LEFT * _SCALE, 14 * _SCALE), "pictures that show their prompt", _INK, title)
    below = ((_LEFT + width - _RIGHT) / 2 * _SCALE, (height - 24) * _SCALE)
    draw.text(below, "evaluations of the network, and seconds a picture; the thick line is the knee", _INK, font, "ma")
    draw.rectangle([*place(math.exp(low), most), *place(math.exp(high), 0)], None, _INK, _SCALE)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
