"""Colours, simple shapes and the brush that settings are painted with.

Lengths are nominal units; the shorter side of a picture is 1000. Three times of day share one set of painters through
a :class:`Palette`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

TIMES = ("day", "sunset", "night")

COLOURS: dict[str, str] = {
    "white": "#f4f4f0",
    "grey": "#aab0b6",
    "black": "#1d1f24",
    "red": "#d9534f",
    "orange": "#f2a044",
    "yellow": "#f7dc6f",
    "green": "#7ec27e",
    "blue": "#6fa8dc",
    "purple": "#a58ad1",
    "pink": "#f3b6c8",
}
"""Named plain background colours."""


@dataclass(frozen=True)
class Backdrop:
    """A drawn setting.

    Attributes:
        svg: Markup that fills the picture.
        horizon: Height of the horizon as a share of the picture's height (0 is the top).
        ground: Where feet may stand: two shares of the height, near the horizon first. ``None`` if there is no ground.
        colour: Colour behind a subject in the middle, 0 to 255 each.
    """

    svg: str
    horizon: float
    ground: tuple[float, float] | None
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """Colours of one time of day."""

    sky_top: str
    sky_low: str
    shade: str
    """Colour mixed into everything that lies on the ground."""
    amount: float
    """How much of it, 0 to 1."""


PALETTES = {
    "day": Palette("#6db7ee", "#cfeafb", "#ffffff", 0.0),
    "sunset": Palette("#6a4c93", "#ff9f5a", "#8a3d3a", 0.34),
    "night": Palette("#0b1437", "#27406e", "#0a1433", 0.62),
}


def n(value: float) -> str:
    """A coordinate with one decimal, without a useless trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def rgb(colour: str) -> tuple[float, float, float]:
    """Components of a ``#rrggbb`` colour, 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def mix(colour: str, other: str, amount: float) -> str:
    """``colour`` with a share ``amount`` (0 to 1) of ``other``."""
    parts = (round(a + (b - a) * amount) for a, b in zip(rgb(colour), rgb(other), strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(height)}" fill="{fill}"/>'


def polygon(points: list[tuple[float, float]], fill: str) -> str:
    return f'<path d="M{"L".join(f"{n(x)} {n(y)}" for x, y in points)}Z" fill="{fill}"/>'


def circle(x: float, y: float, radius: float, fill: str, opacity: float = 1.0) -> str:
    faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<circle cx="{n(x)}" cy="{n(y)}" r="{n(radius)}" fill="{fill}"{faint}/>'


def ellipse(x: float, y: float, rx: float, ry: float, fill: str, opacity: float = 1.0) -> str:
    faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<ellipse cx="{n(x)}" cy="{n(y)}" rx="{n(rx)}" ry="{n(ry)}" fill="{fill}"{faint}/>'


class Painter:
    """Draws one setting; collects markup and remembers the picture's size and time of day."""

    def __init__(self, width: float, height: float, time: str, random: Random, *, lights: bool = True) -> None:
        self.lights = lights
        self.width, self.height, self.time, self.random = width, height, time, random
        self.palette = PALETTES[time]
        self.parts: list[str] = []

    def tint(self, colour: str) -> str:
        """The colour as it looks at this time of day."""
        return mix(colour, self.palette.shade, self.palette.amount)

    def add(self, *markup: str) -> None:
        self.parts.extend(markup)

    def gradient(self, name: str, y0: float, y1: float, top: str, low: str, *, middle: str | None = None) -> None:
        """Fills the band from y0 to y1 with a vertical gradient."""
        stops = [(0.0, top), (1.0, low)] if middle is None else [(0.0, top), (0.55, middle), (1.0, low)]
        self.add(
            f'<linearGradient id="{name}" gradientUnits="userSpaceOnUse" x1="0" y1="{n(y0)}" x2="0" y2="{n(y1)}">'
            + "".join(f'<stop offset="{offset:g}" stop-color="{colour}"/>' for offset, colour in stops)
            + f"</linearGradient>{rect(0, y0, self.width, y1 - y0, f'url(#{name})')}"
        )

    def sky(self, horizon: float, *, clouds: bool = True, lights: bool = True) -> None:
        """Sky down to the horizon, with clouds and a sun by day, a low sun at sunset, stars and a moon at night."""
        random, width = self.random, self.width
        bottom = horizon * self.height
        lights = lights and self.lights
        middle = {"day": None, "sunset": random.choice(["#d9627a", "#c8588a"]), "night": None}[self.time]
        self.gradient("sky", 0, bottom + 2, self.palette.sky_top, self.palette.sky_low, middle=middle)
        if self.time == "night":
            for _ in range(int(10 + 14 * width * bottom / 1e6)):
                self.add(
                    circle(random.uniform(0, width), random.uniform(0, bottom * 0.92), random.uniform(5, 9), "#fdf6d8")
                )
            if lights and random.random() < 0.7:
                x, y = random.uniform(0.12, 0.88) * width, random.uniform(0.14, 0.34) * bottom + 40
                self.add(
                    circle(x, y, 74, "#f7efc5"),
                    circle(x + 26, y - 10, 13, "#ddd3a0"),
                    circle(x - 22, y + 20, 17, "#ddd3a0"),
                )
        elif self.time == "day":
            if lights and random.random() < 0.45:
                x, y = random.choice([0.13, 0.87]) * width, min(150.0, bottom * 0.3)
                self.add(circle(x, y, 110, "#fff3b0", 0.5), circle(x, y, 78, "#ffd93b"))
            if clouds:
                for _ in range(random.randint(1, 2 + int(width / 1000))):
                    self.cloud(random.uniform(0, width), random.uniform(0.08, 0.55) * bottom, random.uniform(0.7, 1.2))

    def cloud(self, x: float, y: float, scale: float) -> None:
        self.add(
            f'<g fill="#fff"><ellipse cx="{n(x)}" cy="{n(y)}" rx="{n(130 * scale)}" ry="{n(34 * scale)}"/>'
            f'<circle cx="{n(x - 38 * scale)}" cy="{n(y - 24 * scale)}" r="{n(44 * scale)}"/>'
            f'<circle cx="{n(x + 34 * scale)}" cy="{n(y - 34 * scale)}" r="{n(56 * scale)}"/></g>'
        )

    def low_sun(self, x: float, y: float, radius: float) -> None:
        """The sun near the horizon, with a glow."""
        if not self.lights:
            return
        self.add(
            circle(x, y, radius * 1.9, "#ffd27a", 0.28),
            circle(x, y, radius * 1.4, "#ffd98a", 0.42),
            circle(x, y, radius, "#fff0b8"),
        )

    def floor(self, horizon: float, colour: str, *, far: str | None = None) -> None:
        """Flat ground from the horizon down."""
        self.gradient(
            "floor",
            horizon * self.height,
            self.height,
            self.tint(far or mix(colour, "#ffffff", 0.16)),
            self.tint(colour),
        )

    def ridge(self, base: float, peak: float, count: int, colour: str, snow: float = 0.0) -> None:
        """A row of triangular mountains standing on height ``base``, ``peak`` units tall, with snow caps."""
        random, step = self.random, self.width / count
        offset = random.uniform(-0.5, 0.5) * step
        for i in range(-1, count + 1):
            x = offset + (i + 0.5) * step + random.uniform(-0.12, 0.12) * step
            tall = peak * random.uniform(0.72, 1.0)
            half = max(step * 0.78, tall * 0.62)
            top = base - tall
            self.add(
                polygon([(x - half, base), (x, top), (x + half, base)], self.tint(colour)),
                polygon([(x, top), (x + half, base), (x + half * 0.16, base)], self.tint(mix(colour, "#000000", 0.16))),
            )
            if snow:
                w, d = half * snow, tall * snow
                teeth = [(x, top), (x + w, top + d), (x + w * 0.45, top + d * 0.78), (x + w * 0.05, top + d * 1.12)]
                teeth += [(x - w * 0.4, top + d * 0.76), (x - w, top + d)]
                self.add(polygon(teeth, self.tint("#f4f8fc")))

    def done(self, horizon: float, ground: tuple[float, float] | None, colour: str) -> Backdrop:
        return Backdrop("".join(self.parts), horizon, ground, rgb(colour))
