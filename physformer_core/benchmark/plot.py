"""Time and memory over tokens on logarithmic axes, every contender a line, of each batch and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from physformer_core.errors import DataError

_Colour = tuple[int, int, int]
_Point = tuple[float, float]
_Line = tuple[str, str, float]

_COLOURS: dict[str, _Colour] = {
    "physformer": (31, 92, 173),
    "global": (120, 120, 120),
    "dense": (190, 60, 50),
    "sana": (60, 140, 70),
    "natten": (150, 90, 180),
    "flex": (208, 148, 20),
}
_INK, _GRID, _PAPER = (40, 40, 40), (228, 228, 228), (255, 255, 255)
_ROW = 18  # pixels of a row of the legend
_SCALE = 2  # drawn larger and reduced, for smooth lines


def draw_report(report: Mapping[str, Any], *, width: int = 1200, height: int = 560) -> Image.Image:
    """Two panels, time and peak memory; extrapolated points are hollow.

    Args:
        report: From `build_report`.
        width, height: In pixels.

    Raises:
        DataError: Nothing was measured.
    """
    cases = [case for case in report["cases"] if case["seconds"]]
    if not cases:
        raise DataError("there is nothing to plot: no case was measured")
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(picture)
    machine = report["machine"]
    title = f"physformer bench {report['what']}: {machine['processor']}, {', '.join(machine['matrix_flops'])}"
    draw.text((24 * _SCALE, 14 * _SCALE), title, _INK, ImageFont.load_default(17 * _SCALE))
    unit = "pixels" if report["what"] == "generate" else "tokens"
    half = width / 2
    for index, (name, key, label) in enumerate((("time", "seconds", _time), ("peak memory", "peak_bytes", _memory))):
        lines: dict[_Line, list[tuple[_Point, bool]]] = {}
        for case in cases:
            if case[key]:
                point = (float(case["tokens"] * case["batch"]), float(case[key]))
                lines.setdefault(_line(case, cases), []).append((point, case["status"] == "extrapolated"))
        if lines:
            left, right = index * half + 84, (index + 1) * half - 24
            box = (left, 66.0 + _ROW * len(_legend(lines, right - left)), right, height - 56.0)
            _Panel(draw, box, [point for line in lines.values() for point, _ in line]).draw(name, unit, label, lines)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _line(case: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> _Line:
    """Contender, what besides tells its line from others of it, and how pale it is drawn."""
    kinds = list(dict.fromkeys((one["batch"], one["dtype"]) for one in cases))
    batches, dtypes = (len({kind[axis] for kind in kinds}) > 1 for axis in (0, 1))
    told = ([f"batch {case['batch']}"] if batches else []) + ([case["dtype"]] if dtypes else [])
    return case["contender"], ", ".join(told), kinds.index((case["batch"], case["dtype"])) / max(2, len(kinds))


class _Panel:
    def __init__(self, draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], points: Sequence[_Point]):
        self._draw, self._box = draw, box
        self._font = _font()
        self._x, self._y = (_span([point[axis] for point in points]) for axis in (0, 1))

    def draw(self, name: str, unit: str, label: Any, lines: Mapping[_Line, Sequence[tuple[_Point, bool]]]) -> None:
        left, top, right, bottom = self._box
        for value in _ticks(*self._x):
            x, _ = self._place((value, 10 ** self._y[0]))
            self._segment((x, top), (x, bottom), _GRID)
            self._text((x, bottom + 8), _count(value), "ma")
        for value in _ticks(*self._y):
            _, y = self._place((10 ** self._x[0], value))
            self._segment((left, y), (right, y), _GRID)
            self._text((left - 8, y), label(value), "rm")
        self._segment((left, bottom), (right, bottom), _INK)
        self._segment((left, top), (left, bottom), _INK)
        self._text(((left + right) / 2, bottom + 28), unit, "ma")
        for key, line in lines.items():
            colour = _colour(key)
            places = [self._place(point) for point, _ in line]
            if len(places) > 1:
                self._draw.line([(px * _SCALE, py * _SCALE) for px, py in places], colour, 2 * _SCALE)
            for place, (_, hollow) in zip(places, line, strict=True):
                self._dot(place, colour, hollow)
        rows = _legend(lines, right - left)
        for number, row in enumerate(rows):
            x, y = left, top - 18 - _ROW * (len(rows) - 1 - number)
            for key in row:
                self._dot((x + 5, y), _colour(key), False)
                self._text((x + 14, y), _name(key), "lm")
                x += _width(key)
        self._text((left, top - 18 - _ROW * len(rows)), name, "lm")

    def _place(self, point: _Point) -> _Point:
        left, top, right, bottom = self._box
        x = (math.log10(point[0]) - self._x[0]) / (self._x[1] - self._x[0])
        y = (math.log10(point[1]) - self._y[0]) / (self._y[1] - self._y[0])
        return left + (right - left) * x, bottom - (bottom - top) * y

    def _dot(self, place: _Point, colour: _Colour, hollow: bool) -> None:
        x, y = place
        box = [(x - 4) * _SCALE, (y - 4) * _SCALE, (x + 4) * _SCALE, (y + 4) * _SCALE]
        self._draw.ellipse(box, _PAPER if hollow else colour, colour, 2 * _SCALE)

    def _segment(self, start: _Point, end: _Point, colour: _Colour) -> None:
        self._draw.line([(x * _SCALE, y * _SCALE) for x, y in (start, end)], colour, _SCALE)

    def _text(self, where: _Point, text: str, anchor: str) -> None:
        self._draw.text((where[0] * _SCALE, where[1] * _SCALE), text, _INK, self._font, anchor)


def _name(line: _Line) -> str:
    return ", ".join(text for text in line[:2] if text)


def _width(line: _Line) -> float:
    """Of its entry in the legend, in pixels."""
    return 32 + _font().getlength(_name(line)) / _SCALE


def _legend(lines: Iterable[_Line], room: float) -> list[list[_Line]]:
    """The lines' entries in rows of so many pixels."""
    rows: list[list[_Line]] = [[]]
    for line in lines:
        if rows[-1] and sum(map(_width, rows[-1])) + _width(line) > room:
            rows.append([])
        rows[-1].append(line)
    return rows


def _colour(line: _Line) -> _Colour:
    return _towards(_COLOURS.get(line[0], _INK), _PAPER, line[2])


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13 * _SCALE)


def _towards(colour: _Colour, other: _Colour, share: float) -> _Colour:
    red, green, blue = (round(one + share * (two - one)) for one, two in zip(colour, other, strict=True))
    return red, green, blue


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Range of decimal logarithms with some room."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.1, 0.06 * (high - low))
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round values within a range of decimal logarithms."""
    for steps in ((1,), (1, 3), (1, 2, 5)):
        exponents = range(math.floor(low), math.ceil(high) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _count(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _time(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _memory(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
