"""Small charts of what a run's log holds besides losses: sizes of velocities and fields, gradient, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_Colour = tuple[int, int, int]
_BLUE: _Colour = (31, 92, 173)
_ORANGE: _Colour = (208, 98, 20)
_INK: _Colour = (40, 40, 40)
_GRID: _Colour = (228, 228, 228)
_PAPER: _Colour = (255, 255, 255)
_SCALE = 2  # drawn larger and reduced, for smooth lines
_COLUMNS = 3
_HEIGHT = 220


@dataclass(frozen=True)
class _Chart:
    """One panel: a title, and how its lines are read from a record (None where it has none)."""

    title: str
    lines: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...]


def _statistic(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record.get("statistics", {}).get(name)


def _field(name: str, factor: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    def read(record: dict[str, Any]) -> float | None:
        value = record.get(name)
        return None if value is None else factor * value

    return read


_CHARTS = (
    _Chart(
        "velocity (rms)",
        (("predicted", _statistic("velocity_norm")), ("in the data", _statistic("velocity_target_norm"))),
    ),
    _Chart("field", (("deviation", _statistic("field_std")), ("mean", _statistic("field_mean")))),
    _Chart("gradient norm", (("", _field("gradient_norm")),)),
    _Chart("learning rate", (("", _field("learning_rate")),)),
    _Chart("examples per second", (("", _field("examples_per_second")),)),
    _Chart("% of the matrix peak", (("", _field("matrix_share", 100.0)),)),
)


def add_panels(picture: Image.Image, records: Sequence[dict[str, Any]]) -> Image.Image:
    """Puts a panel for everything that the records hold below a picture.

    Args:
        picture: Of the losses; its width is kept.
        records: From `read_records`; of a log from before there were such figures, the picture stays alone.
    """
    charts = []
    for chart in _CHARTS:
        lines = [(name, _points(records, read)) for name, read in chart.lines]
        lines = [(name, points) for name, points in lines if points]
        if lines:
            charts.append((chart.title, lines))
    if not charts:
        return picture
    rows = -(-len(charts) // _COLUMNS)
    page = Image.new("RGB", (picture.width, picture.height + rows * _HEIGHT), _PAPER)
    page.paste(picture, (0, 0))
    width = picture.width // _COLUMNS
    last = float(records[-1]["step"])
    for number, (title, lines) in enumerate(charts):
        where = (number % _COLUMNS * width, picture.height + number // _COLUMNS * _HEIGHT)
        page.paste(_drawn(title, lines, width, last), where)
    return page


def _points(
    records: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, float]]:
    points = [(float(record["step"]), read(record)) for record in records]
    return [(step, float(value)) for step, value in points if value is not None and math.isfinite(value)]


def _drawn(title: str, lines: list[tuple[str, list[tuple[float, float]]]], width: int, last: float) -> Image.Image:
    """One panel on linear axes that begin at the smallest value, or at 0 where that is near."""
    picture = Image.new("RGB", (width * _SCALE, _HEIGHT * _SCALE), _PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13 * _SCALE)
    left, top, right, bottom = (side * _SCALE for side in (72, 40, width - 16, _HEIGHT - 26))
    values = sorted(value for _, points in lines for _, value in points)
    low, high = values[0], values[math.ceil(0.995 * len(values)) - 1]  # a spike would squeeze all the rest
    if 0 < low < 0.6 * high:
        low = 0.0
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if low == 0 else low - room), high + room

    def place(step: float, value: float) -> tuple[float, float]:
        share = min(1.0, (value - low) / (high - low))
        return left + (right - left) * step / max(last, 1.0), bottom - (bottom - top) * share

    for tick in _ticks(low, high):
        y = place(0, tick)[1]
        draw.line([(left, y), (right, y)], _GRID, _SCALE)
        draw.text((left - 6 * _SCALE, y), f"{tick:.3g}", _INK, font, "rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], _INK, _SCALE)
    draw.text((right, bottom + 5 * _SCALE), f"{last:,.0f} steps", _INK, font, "ra")
    draw.text((left, 10 * _SCALE), title, _INK, font, "la")
    x = left + font.getlength(title) + 14 * _SCALE
    for (name, points), colour in zip(lines, (_BLUE, _ORANGE), strict=False):
        drawn = [place(step, value) for step, value in points]
        if len(drawn) > 1:
            draw.line(drawn, colour, round(1.6 * _SCALE), joint="curve")
        else:
            ((dot_x, dot_y),) = drawn
            radius = 3 * _SCALE
            draw.ellipse([dot_x - radius, dot_y - radius, dot_x + radius, dot_y + radius], colour)
        draw.text((x, 10 * _SCALE), name, colour, font, "la")
        x += font.getlength(name) + 10 * _SCALE
    return picture.resize((width, _HEIGHT), Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values between."""
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
