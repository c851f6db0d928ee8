"""A scaling study as a picture: loss over compute, a line for every size, and the law at the best size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from physformer_core.evaluation.scaling import ScalingReport

_INK, _GRID, _PAPER, _LAW = (40, 40, 40), (228, 228, 228), (255, 255, 255), (190, 60, 50)
_SCALE = 2  # drawn larger and reduced, for smooth lines
_MARGIN = (84, 56, 24, 64)


def draw_scaling(report: ScalingReport, *, width: int = 1000, height: int = 620) -> Image.Image:
    """Draws loss over compute on logarithmic axes.

    Dots are runs, those of one size joined; dashes are the law for that size, the red line the law at the best size of
    each budget, where there is one.

    Args:
        report: From `analyse`.
        width, height: In pixels.
    """
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(picture)
    font, title = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(16 * _SCALE)
    flops = [point.flops for point in report.points] + [one.flops for one in report.predictions]
    span = np.geomspace(min(flops) / 1.3, max(flops) * 1.3, 80)
    law = report.law
    envelope = [(one, law.loss(*law.best(one))) for one in span] if law.has_best else []
    losses = [point.loss for point in report.points] + [loss for _, loss in envelope]
    x_range = (math.log10(span[0]), math.log10(span[-1]))
    y_range = (math.log10(min(losses)) - 0.03, math.log10(max(losses)) + 0.03)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], width - _MARGIN[2], height - _MARGIN[3]

    def place(one: tuple[float, float]) -> tuple[float, float]:
        x = (math.log10(one[0]) - x_range[0]) / (x_range[1] - x_range[0])
        y = (math.log10(one[1]) - y_range[0]) / (y_range[1] - y_range[0])
        return (left + (right - left) * x) * _SCALE, (bottom - (bottom - top) * y) * _SCALE

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, int, int], thick: float) -> None:
        draw.line([place(one) for one in points], colour, round(thick * _SCALE))

    for exponent in range(math.ceil(x_range[0]), math.floor(x_range[1]) + 1):
        line([(10.0**exponent, 10 ** y_range[0]), (10.0**exponent, 10 ** y_range[1])], _GRID, 1)
        x, y = place((10.0**exponent, 10 ** y_range[0]))
        draw.text((x, y + 8 * _SCALE), f"1e{exponent}", _INK, font, "ma")
    for value in _loss_ticks(10 ** y_range[0], 10 ** y_range[1]):
        line([(10 ** x_range[0], value), (10 ** x_range[1], value)], _GRID, 1)
        x, y = place((10 ** x_range[0], value))
        draw.text((x - 8 * _SCALE, y), f"{value:.3g}", _INK, font, "rm")
    draw.rectangle([left * _SCALE, top * _SCALE, right * _SCALE, bottom * _SCALE], None, _INK, _SCALE)
    draw.text(((left + right) / 2 * _SCALE, (height - 26) * _SCALE), "operations of the training", _INK, font, "ma")
    draw.text((left * _SCALE, 14 * _SCALE), "loss on held-out examples", _INK, title)

    sizes = sorted({point.parameters for point in report.points})
    for index, size in enumerate(sizes):
        colour = _shade(index / max(1, len(sizes) - 1))
        runs = sorted((p for p in report.points if p.parameters == size), key=lambda p: p.flops)
        curve = [(f, law.loss(size, f / (law.flops_per_pair * size))) for f in span]
        inside = [one for one in curve if math.log10(one[1]) < y_range[1]]
        for first, second in zip(inside[::2], inside[1::2], strict=False):
            line([first, second], colour, 1)
        line([(p.flops, p.loss) for p in runs], colour, 2)
        for point in runs:
            x, y = place((point.flops, point.loss))
            draw.ellipse([x - 5 * _SCALE, y - 5 * _SCALE, x + 5 * _SCALE, y + 5 * _SCALE], colour)
        where = ((right - 10) * _SCALE, (top + 14 + 18 * index) * _SCALE)
        draw.text(where, f"{_count(size)} parameters", colour, font, "rm")
    if envelope:
        line(envelope, _LAW, 2)
        where = ((right - 10) * _SCALE, (top + 14 + 18 * len(sizes)) * _SCALE)
        draw.text(where, "law at the best size", _LAW, font, "rm")
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _loss_ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(high - low))
    for divisor in (1, 2, 5):
        ticks = [n * step / divisor for n in range(1, 1000) if low <= n * step / divisor <= high]
        if len(ticks) >= 4:
            return ticks
    return ticks


def _shade(share: float) -> tuple[int, int, int]:
    """From light blue to dark blue: the larger the darker."""
    return round(140 - 120 * share), round(185 - 130 * share), round(230 - 90 * share)


def _count(value: float) -> str:
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.3g} k"
