"""Loss curves of a run, read from its log and drawn as a picture."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from physformer_core.errors import DataError

_Colour = tuple[int, int, int]

_COLOURS: dict[str, _Colour] = {"base": (31, 92, 173), "crop": (208, 98, 20)}
_OTHER_COLOUR: _Colour = (90, 90, 90)
_INK: _Colour = (40, 40, 40)
_GRID: _Colour = (228, 228, 228)
_PAPER: _Colour = (255, 255, 255)
_VALIDATION = "validation_"
_SCALE = 2  # drawn larger and reduced, for smooth lines
_SMOOTHED_SHARE = 0.03


@dataclass(frozen=True)
class Curve:
    """One loss over the steps.

    Args:
        kind: "base" (whole pictures) or "crop".
        validation: Whether it is of held-out examples.
        steps, losses: Where it was measured, and what.
    """

    kind: str
    validation: bool
    steps: np.ndarray
    losses: np.ndarray


def read_records(log: Path) -> list[dict[str, Any]]:
    """The records of a run's ``log.jsonl``; where a run went back to an earlier checkpoint, what counted in the end.

    Raises:
        DataError: There is no log, or it is damaged other than by a cut last line.
    """
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {log}: {error.strerror or error}", hint="name the folder of a run that physformer train made"
        ) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the process was killed while writing it
                break
            raise DataError(f"{log}, line {number}: not a record of training ({error})") from error
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    return records


def read_curves(log: Path) -> list[Curve]:
    """The losses in a run's ``log.jsonl``.

    Raises:
        DataError: It holds no losses, or see `read_records`.
    """
    records = read_records(log)
    names = dict.fromkeys(name for record in records for name in record["losses"])
    curves = []
    for name in names:
        points = [(r["step"], r["losses"][name]) for r in records if r["losses"].get(name, 0) > 0]
        if points:
            steps, losses = (np.array(column, np.float64) for column in zip(*points, strict=True))
            curves.append(Curve(name.removeprefix(_VALIDATION), name.startswith(_VALIDATION), steps, losses))
    if not curves:
        raise DataError(f"{log} holds no losses yet")
    return sorted(curves, key=lambda curve: (curve.kind, curve.validation))


def draw_curves(curves: list[Curve], *, title: str, width: int = 1100, height: int = 640) -> Image.Image:
    """Draws losses over steps, the losses on a logarithmic axis.

    Training losses are a pale line with a running mean upon it, validation losses dots joined by a line.

    Args:
        curves: At least one.
        title: Stands above.
        width, height: Of the picture in pixels.
    """
    chart = _Chart(curves, width, height)
    chart.axes(title)
    for curve in curves:
        if curve.validation:
            continue
        colour = _COLOURS.get(curve.kind, _OTHER_COLOUR)
        chart.line(curve.steps, curve.losses, _pale(colour), 1.0)
        chart.line(curve.steps, _running_mean(curve.losses), colour, 2.0)
    for curve in curves:
        if curve.validation:
            colour = _dark(_COLOURS.get(curve.kind, _OTHER_COLOUR))
            chart.line(curve.steps, curve.losses, colour, 1.2)
            chart.dots(curve.steps, curve.losses, colour)
    chart.legend(curves)
    return chart.finished()


class _Chart:
    """A plotting area with axes."""

    def __init__(self, curves: list[Curve], width: int, height: int) -> None:
        self._size = (width, height)
        self._picture = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._picture)
        self._font = ImageFont.load_default(14 * _SCALE)
        self._title_font = ImageFont.load_default(17 * _SCALE)
        self._left, self._top, self._right, self._bottom = 72, 86, width - 24, height - 56
        self._last_step = max(float(curve.steps[-1]) for curve in curves)
        # The first, huge losses would squeeze all that follows.
        settled = np.concatenate([curve.losses for curve in curves])
        low, high = math.log10(settled.min()), math.log10(np.quantile(settled, 0.995))
        room = max(0.03, 0.06 * (high - low))
        self._low, self._high = low - room, high + room

    def axes(self, title: str) -> None:
        """Grid, ticks, labels and title."""
        self._text((self._left, 12), title, self._title_font, "la")
        values = _log_ticks(10**self._low, 10**self._high)
        for value in values:
            y = self._y(value)
            self._segment((self._left, y), (self._right, y), _GRID, 1)
            self._text((self._left - 8, y), f"{value:g}", self._font, "rm")
        for step in _linear_ticks(self._last_step):
            x = self._x(step)
            self._segment((x, self._top), (x, self._bottom), _GRID, 1)
            self._text((x, self._bottom + 8), f"{step:,.0f}", self._font, "ma")
        self._segment((self._left, self._bottom), (self._right, self._bottom), _INK, 1.2)
        self._segment((self._left, self._top), (self._left, self._bottom), _INK, 1.2)
        self._text(((self._left + self._right) / 2, self._bottom + 30), "steps", self._font, "ma")
        self._text((self._left - 8, self._top - 14), "loss", self._font, "rm")

    def line(self, steps: np.ndarray, losses: np.ndarray, colour: _Colour, thickness: float) -> None:
        points = [(self._x(s) * _SCALE, self._y(v) * _SCALE) for s, v in zip(steps, losses, strict=True)]
        if len(points) > 1:
            self._draw.line(points, colour, round(thickness * _SCALE), joint="curve")
        else:
            self.dots(steps, losses, colour)

    def dots(self, steps: np.ndarray, losses: np.ndarray, colour: _Colour) -> None:
        radius = 3.2 if len(steps) < 60 else 2.2
        for s, v in zip(steps, losses, strict=True):
            self._dot(self._x(s), self._y(v), radius, colour)

    def legend(self, curves: list[Curve]) -> None:
        """Names and last values in a row above the axes, where no curve comes."""
        x, y = float(self._left), self._top - 34.0
        for curve in curves:
            colour = _COLOURS.get(curve.kind, _OTHER_COLOUR)
            last = (curve.losses if curve.validation else _running_mean(curve.losses))[-1]
            name = {"base": "whole pictures", "crop": "crops"}.get(curve.kind, curve.kind)
            text = f"{name}{', held out' if curve.validation else ''} {last:.4g}"
            if curve.validation:
                self._segment((x, y), (x + 28, y), _dark(colour), 1.2)
                self._dot(x + 14, y, 3.2, _dark(colour))
            else:
                self._segment((x, y), (x + 28, y), colour, 2.4)
            self._text((x + 36, y), text, self._font, "lm")
            x += 36 + self._font.getlength(text) / _SCALE + 28

    def finished(self) -> Image.Image:
        return self._picture.resize(self._size, Image.Resampling.LANCZOS)

    def _dot(self, x: float, y: float, radius: float, colour: _Colour) -> None:
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
        self._draw.ellipse(box, colour)

    def _x(self, step: float) -> float:
        return self._left + (self._right - self._left) * float(step) / max(self._last_step, 1)

    def _y(self, loss: float) -> float:
        share = (math.log10(loss) - self._low) / (self._high - self._low)
        return self._bottom - (self._bottom - self._top) * min(share, 1.0)

    def _segment(self, start: tuple[float, float], end: tuple[float, float], colour: _Colour, thickness: float) -> None:
        points = [(x * _SCALE, y * _SCALE) for x, y in (start, end)]
        self._draw.line(points, colour, round(thickness * _SCALE))

    def _text(
        self,
        where: tuple[float, float],
        text: str,
        font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
        anchor: str,
    ) -> None:
        self._draw.text((where[0] * _SCALE, where[1] * _SCALE), text, _INK, font, anchor)


def _running_mean(losses: np.ndarray) -> np.ndarray:
    """Geometric mean over the last few per cent of the curve, as suits a logarithmic axis."""
    window = max(1, round(_SMOOTHED_SHARE * len(losses)))
    sums = np.cumsum(np.concatenate([[0.0], np.log(losses)]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return np.exp((sums[ends] - sums[starts]) / (ends - starts))


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between, as many as read well: 1-2-5 in every decade, more where there is less than one."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [round(step * 10.0**decade, 12) for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: max(1, len(ticks) // 8)]
    return [float(f"{low:.3g}"), float(f"{high:.3g}")]


def _linear_ticks(last: float) -> list[float]:
    rough = max(last, 1) / 8
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = max(1.0, next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= rough) * magnitude)
    return [step * number for number in range(int(last / step) + 1)]


def _pale(colour: _Colour) -> _Colour:
    r, g, b = (round(255 - 0.35 * (255 - part)) for part in colour)
    return r, g, b


def _dark(colour: _Colour) -> _Colour:
    r, g, b = (round(0.6 * part) for part in colour)
    return r, g, b
