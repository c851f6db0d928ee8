"""Settings drawn as plain vector shapes: skies, seas, mountains, streets, rooms.

Each painter returns a :class:`Backdrop`: markup that fills ``width x height`` nominal units (the shorter side is 1000)
and the heights at which things stand on it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from physformer_core.data.scenes.painter import (
    COLOURS,
    TIMES,
    Backdrop,
    Painter,
    circle,
    ellipse,
    mix,
    n,
    polygon,
    rect,
    rgb,
)


def _sky(p: Painter) -> Backdrop:
    p.sky(1.0)
    return p.done(1.0, None, mix(p.palette.sky_top, p.palette.sky_low, 0.5))


def _grass(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.52, 0.64)
    p.sky(horizon)
    if p.time == "sunset" and p.random.random() < 0.6:
        p.low_sun(p.random.uniform(0.15, 0.85) * p.width, horizon * p.height - 20, 100)
    green = p.random.choice(["#6cbf4b", "#7cc653", "#5fb257"])
    if p.random.random() < 0.5:
        y = horizon * p.height
        for i in range(1 + int(p.width / 900)):
            x = (i + p.random.uniform(0.1, 0.9)) * 900
            p.add(
                ellipse(
                    x, y + 20, p.random.uniform(420, 640), p.random.uniform(70, 130), p.tint(mix(green, "#2f6d3b", 0.3))
                )
            )
    p.floor(horizon, green)
    for _ in range(int(5 * p.width * p.height / 1e6) + 3):
        x, y = p.random.uniform(0, p.width), p.random.uniform(horizon + 0.08, 0.98) * p.height
        p.add(
            polygon(
                [
                    (x - 22, y),
                    (x - 26, y - 34),
                    (x - 8, y - 8),
                    (x, y - 44),
                    (x + 8, y - 8),
                    (x + 26, y - 34),
                    (x + 22, y),
                ],
                p.tint("#4a9a3a"),
            )
        )
    return p.done(horizon, (horizon + 0.12, 0.93), p.tint(green))


def _ocean(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.45, 0.58)
    p.sky(horizon)
    y = horizon * p.height
    sun_x = p.random.uniform(0.25, 0.75) * p.width
    if p.time == "sunset":
        p.low_sun(sun_x, y - p.random.uniform(-10, 70), p.random.uniform(110, 150))
    far, near = {"day": ("#5fb3e0", "#1f78b8"), "sunset": ("#e58a6a", "#4b3a78"), "night": ("#1d3c6e", "#0b1d44")}[
        p.time
    ]
    p.gradient("sea", y, p.height, far, near)
    light = {"day": "#a9d8f2", "sunset": "#ffcf94", "night": "#3f6399"}[p.time]
    if p.time == "sunset":
        rows = 9
        for i in range(rows):
            yy = y + 22 + (p.height - y) * i / rows
            half = (60 + 16 * i) * p.random.uniform(0.7, 1.15)
            p.add(ellipse(sun_x + p.random.uniform(-30, 30), yy, half, 9 + 1.2 * i, "#ffdf9e", 0.85))
    for _ in range(int(9 * p.width * (p.height - y) / 5e5) + 4):
        x, yy = p.random.uniform(0, p.width), p.random.uniform(y + 30, p.height)
        half = 30 + 80 * (yy - y) / (p.height - y)
        p.add(ellipse(x, yy, half, 5 + 5 * (yy - y) / (p.height - y), light, 0.7))
    return p.done(horizon, (horizon + 0.14, 0.86), mix(far, near, 0.5))


def _underwater(p: Painter) -> Backdrop:
    top, low = {"day": ("#5cc6e8", "#0f5f9c"), "sunset": ("#5cc6e8", "#0f5f9c"), "night": ("#1c5a8c", "#061c3f")}[
        p.time
    ]
    p.gradient("sea", 0, p.height, top, low)
    floor = p.height * p.random.uniform(0.86, 0.92)
    p.add(
        f'<path d="M0 {n(floor)}Q{n(p.width / 4)} {n(floor - 50)} {n(p.width / 2)} {n(floor)}'
        f'T{n(p.width)} {n(floor)}V{n(p.height)}H0Z" fill="{p.tint("#e2c98a")}"/>'
    )
    for _ in range(2 + int(p.width / 500)):
        x, tall = p.random.uniform(0, p.width), p.random.uniform(120, 240)
        p.add(
            f'<path d="M{n(x)} {n(p.height)}q-50 {n(-tall * 0.35)} 0 {n(-tall * 0.6)}t0 {n(-tall * 0.6)}" '
            f'fill="none" stroke="{p.tint("#2f9e63")}" stroke-width="30" stroke-linecap="round"/>'
        )
    for _ in range(4 + int(4 * p.width * p.height / 1e6)):
        p.add(
            circle(
                p.random.uniform(0, p.width),
                p.random.uniform(0, 0.8) * p.height,
                p.random.uniform(10, 24),
                "#d8f3ff",
                0.55,
            )
        )
    return p.done(0.0, None, mix(top, low, 0.5))


def _beach(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.36, 0.44)
    p.sky(horizon)
    y, shore = horizon * p.height, (horizon + p.random.uniform(0.13, 0.18)) * p.height
    if p.time == "sunset":
        p.low_sun(p.random.uniform(0.2, 0.8) * p.width, y - 20, 100)
    far, near = {"day": ("#4fa9dc", "#6fd0e0"), "sunset": ("#e58a6a", "#9a5f86"), "night": ("#16315f", "#28508a")}[
        p.time
    ]
    p.gradient("sea", y, shore + 40, far, near)
    w = p.width
    for lift, fill in ((26, p.tint("#ffffff")), (0, p.tint("#f2dca4"))):
        p.add(
            f'<path d="M0 {n(shore - lift)}Q{n(w / 4)} {n(shore - lift + 44)} {n(w / 2)} {n(shore - lift + 10)}'
            f'T{n(w)} {n(shore - lift)}V{n(p.height)}H0Z" fill="{fill}"/>'
        )
    return p.done(horizon, (shore / p.height + 0.12, 0.93), p.tint("#f2dca4"))


def _mountains(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.66, 0.76)
    p.sky(horizon)
    y, w = horizon * p.height, p.width
    if p.time == "sunset":
        p.low_sun(p.random.uniform(0.2, 0.8) * w, y - p.random.uniform(0.3, 0.5) * p.height, 92)
    count = max(2, round(w / 520))
    far, near = p.random.choice([("#8fa6c4", "#5d7595"), ("#9aa3b8", "#6a7183"), ("#a0a4c8", "#6d6b9a")])
    p.ridge(y + 10, min(p.height * 0.55, 620) * p.random.uniform(0.9, 1.05), count, far, snow=0.3)
    p.ridge(y + 10, min(p.height * 0.36, 420), count + 1, near, snow=p.random.choice([0.0, 0.26]))
    p.floor(horizon, p.random.choice(["#6fae55", "#5f9d63", "#7fae5a"]))
    if p.random.random() < 0.35:
        p.add(
            ellipse(
                p.random.uniform(0.3, 0.7) * w,
                (horizon + 1) / 2 * p.height,
                0.3 * w,
                0.07 * p.height,
                p.tint("#6fb6e0"),
            )
        )
    return p.done(horizon, (horizon + 0.08, 0.94), mix(p.palette.sky_low, p.tint(far), 0.6))


def _buildings(
    p: Painter, base: float, colours: list[str], lit: float, *, tall: tuple[float, float], window: str
) -> None:
    """A row of buildings with windows standing on height ``base``."""
    random, x = p.random, -random_gap(p.random)
    while x < p.width:
        w, h = random.uniform(130, 240), random.uniform(*tall)
        fill = p.tint(random.choice(colours))
        p.add(rect(x, base - h, w, h, fill), rect(x + w * 0.86, base - h, w * 0.14, h, mix(fill, "#000000", 0.18)))
        columns, rows = max(2, int(w / 62)), max(2, int(h / 84))
        dark = mix(fill, "#000000", 0.3) if p.time == "night" else p.tint("#bcd8ea")
        lit_path: list[str] = []
        dark_path: list[str] = []
        for i in range(columns):
            for j in range(rows):
                wx, wy = x + w * 0.84 * (i + 0.28) / columns, base - h + h * (j + 0.3) / rows
                (lit_path if random.random() < lit else dark_path).append(f"M{n(wx)} {n(wy)}h30v36h-30z")
        for path, colour in ((lit_path, window), (dark_path, dark)):
            if path:
                p.add(f'<path d="{"".join(path)}" fill="{colour}"/>')
        x += w + random.choice([0, 0, 16])


def random_gap(random: Random) -> float:
    """How far the first building starts outside the picture."""
    return random.uniform(0, 120)


def _street(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.5, 0.58)
    p.sky(min(1.0, horizon + 0.02), clouds=p.random.random() < 0.6, lights=p.random.random() < 0.5)
    y, w, h = horizon * p.height, p.width, p.height
    lit = {"day": 0.0, "sunset": 0.35, "night": 0.6}[p.time]
    colours = ["#c9785c", "#d9b48a", "#8fa3b5", "#b9a0a8", "#a8b59a", "#d6cdbf"]
    _buildings(p, y, colours, lit, tall=(0.4 * y, 0.86 * y), window="#ffdf7a")
    p.add(rect(0, y, w, h - y, p.tint("#b9b7b0")))
    road = p.tint("#5a5e66")
    p.add(
        polygon(
            [(w * 0.5 - 0.19 * w - 60, y + 12), (w * 0.5 + 0.19 * w + 60, y + 12), (w * 1.06, h), (-w * 0.06, h)], road
        )
    )
    for i in range(4):
        a, b = (i / 4) ** 1.5, ((i + 0.55) / 4) ** 1.5
        ya, yb = y + 12 + (h - y) * a, y + 12 + (h - y) * b
        ha, hb = 5 + 22 * a, 5 + 22 * b
        p.add(polygon([(w / 2 - ha, ya), (w / 2 + ha, ya), (w / 2 + hb, yb), (w / 2 - hb, yb)], p.tint("#f5e9b8")))
    return p.done(horizon, (horizon + 0.2, 0.92), road)


def _city(p: Painter) -> Backdrop:
    """A skyline seen from afar."""
    base = p.random.uniform(0.8, 0.88)
    p.sky(base)
    y = base * p.height
    if p.time == "sunset":
        p.low_sun(p.random.uniform(0.2, 0.8) * p.width, y * 0.55, 100)
    lit = {"day": 0.0, "sunset": 0.4, "night": 0.6}[p.time]
    _buildings(p, y, ["#8fa3b5", "#9fb0bf", "#a79fb0"], 0.0, tall=(0.3 * p.height, 0.62 * p.height), window="#ffdf7a")
    _buildings(
        p,
        y,
        ["#5f7285", "#6d7f90", "#75708a", "#8a6f6a"],
        lit,
        tall=(0.15 * p.height, 0.42 * p.height),
        window="#ffdf7a",
    )
    p.floor(base, "#6e7a70")
    return p.done(base, (base + 0.03, 0.97), mix(p.palette.sky_low, p.tint("#8fa3b5"), 0.5))


def _futuristic(p: Painter) -> Backdrop:
    """Tall glowing towers with round tops, spires and rings."""
    random, w, h = p.random, p.width, p.height
    base = random.uniform(0.86, 0.92)
    top, middle, low = {
        "day": ("#58b6e8", "#9fe0f2", "#d6f6fa"),
        "sunset": ("#43287a", "#d2518f", "#ffb066"),
        "night": ("#070b2a", "#1b1f5e", "#4a2a86"),
    }[p.time]
    p.gradient("sky", 0, h, top, low, middle=middle)
    if p.time == "night":
        for _ in range(int(14 * w * h / 1e6)):
            p.add(circle(random.uniform(0, w), random.uniform(0, 0.6) * h, random.uniform(4, 8), "#ffffff"))
    if p.time == "sunset":
        p.low_sun(random.uniform(0.3, 0.7) * w, h * random.uniform(0.5, 0.62), random.uniform(120, 160))
    dark = {"day": "#4f7f9e", "sunset": "#2e2158", "night": "#141840"}[p.time]
    for layer, (share, shade) in enumerate(((0.58, 0.35), (0.42, 0.0))):
        x = -random.uniform(0, 80)
        while x < w:
            tw, th = random.uniform(90, 170), h * share * random.uniform(0.6, 1.2)
            y, cx = base * h - th, x + tw / 2
            fill = mix(dark, middle, shade)
            kind = random.randrange(3)
            if kind == 0:
                p.add(
                    f'<path d="M{n(x)} {n(h)}V{n(y + tw / 2)}'
                    f'a{n(tw / 2)} {n(tw / 2)} 0 0 1 {n(tw)} 0V{n(h)}Z" fill="{fill}"/>'
                )
            elif kind == 1:
                p.add(polygon([(x, h), (x + tw * 0.18, y), (cx, y - 90), (x + tw * 0.82, y), (x + tw, h)], fill))
            else:
                p.add(
                    rect(x, y, tw, h - y, fill),
                    rect(cx - 6, y - 110, 12, 110, fill),
                    circle(cx, y - 110, 16, "#ff6ad5"),
                )
            if layer == 1:
                neon = random.choice(["#35e8ff", "#ff5ad1", "#ffe066", "#7dffb0"])
                p.add(rect(cx - 7, y + tw * 0.5, 14, h - y, neon))
                if random.random() < 0.6:
                    for j in range(3):
                        p.add(rect(x + tw * 0.2, y + th * (0.25 + 0.22 * j), tw * 0.6, 14, neon))
                if kind == 0 and random.random() < 0.6:
                    p.add(
                        f'<ellipse cx="{n(cx)}" cy="{n(y + tw * 0.55)}" rx="{n(tw * 0.8)}" ry="20" '
                        f'fill="none" stroke="{neon}" stroke-width="12"/>'
                    )
            x += tw + random.uniform(-10, 50)
    p.gradient("floor", base * h, h, mix(dark, "#35e8ff", 0.35), dark)
    return p.done(base, (base, 0.97), mix(middle, dark, 0.4))


def _room(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.66, 0.72)
    wall = p.tint(p.random.choice(["#f0dfc0", "#cfe0d8", "#d8d3e8", "#f3cfc4", "#c6d9ea"]))
    y, w, h = horizon * p.height, p.width, p.height
    p.add(rect(0, 0, w, y, wall), rect(0, y, w, h - y, p.tint("#b98556")), rect(0, y - 22, w, 26, p.tint("#fffaf0")))
    for i in range(1, 4):
        p.add(rect(0, y + (h - y) * i / 4, w, 7, p.tint("#9d6d42")))
    side = min(0.34 * h, 330.0)
    x, top = p.random.choice([0.08, 0.9]) * w, 0.1 * h
    x = min(max(x - side / 2, 30), w - side - 30)
    pane = {"day": "#9fd6f7", "sunset": "#ff9f6a", "night": "#14224d"}[p.time]
    p.add(rect(x - 20, top - 20, side + 40, side + 40, p.tint("#ffffff")), rect(x, top, side, side, pane))
    p.add(
        rect(x + side / 2 - 9, top, 18, side, p.tint("#ffffff")),
        rect(x, top + side / 2 - 9, side, 18, p.tint("#ffffff")),
    )
    return p.done(horizon, (horizon + 0.1, 0.94), wall)


def _table(p: Painter) -> Backdrop:
    edge = p.random.uniform(0.6, 0.68)
    wall = p.tint(p.random.choice(["#dfe9ee", "#f3e3cc", "#d7e6d2", "#e9d6e3", "#c9d8ea"]))
    y, w, h = edge * p.height, p.width, p.height
    p.add(rect(0, 0, w, y, wall))
    p.gradient("wood", y, h, p.tint("#c58f5c"), p.tint("#a8713f"))
    p.add(rect(0, y, w, 16, p.tint("#d9a978")))
    for i in range(1, 3):
        p.add(rect(0, y + (h - y) * i / 3, w, 6, p.tint("#94612f")))
    return p.done(edge, (edge + 0.14, 0.92), wall)


def _forest(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.56, 0.66)
    p.sky(horizon, clouds=False)
    y, w = horizon * p.height, p.width
    for row, (scale, colour) in enumerate((((0.75), "#5d9b6a"), ((1.0), "#3c7d4c"))):
        x = -p.random.uniform(0, 90)
        while x < w + 60:
            tall = min(0.92 * y, 620) * scale * p.random.uniform(0.72, 1.0)
            half = tall * p.random.uniform(0.2, 0.26)
            foot = y + 24 * row
            p.add(rect(x - 14, foot - tall * 0.16, 28, tall * 0.18, p.tint("#6b4a2f")))
            for k in range(3):
                top, spread = foot - tall * (1 - 0.25 * k), half * (0.56 + 0.22 * k)
                p.add(
                    polygon(
                        [(x - spread, top + tall * 0.36), (x, top), (x + spread, top + tall * 0.36)],
                        p.tint(mix(colour, "#000000", 0.06 * k)),
                    )
                )
            x += half * p.random.uniform(1.3, 2.0)
    p.floor(horizon, "#5c9a4a")
    return p.done(horizon, (horizon + 0.12, 0.93), p.tint("#4c8a52"))


def _desert(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.52, 0.62)
    p.sky(horizon, clouds=False)
    if p.time == "sunset":
        p.low_sun(p.random.uniform(0.15, 0.85) * p.width, horizon * p.height - 30, 105)
    y, w, h = horizon * p.height, p.width, p.height
    p.floor(horizon, "#e3b765")
    for k, colour in enumerate(("#eecb82", "#dcab58")):
        a, b = y + (0.02 + 0.16 * k) * (h - y), p.random.uniform(60, 120) * (1 if p.random.random() < 0.5 else -1)
        p.add(
            f'<path d="M0 {n(a)}C{n(w * 0.3)} {n(a - b)} {n(w * 0.6)} {n(a + b)} {n(w)} {n(a - b / 2)}'
            f'V{n(h)}H0Z" fill="{p.tint(colour)}"/>'
        )
    return p.done(horizon, (horizon + 0.16, 0.93), p.tint("#e3b765"))


def _snow(p: Painter) -> Backdrop:
    horizon = p.random.uniform(0.5, 0.6)
    p.sky(horizon, clouds=False)
    y, w = horizon * p.height, p.width
    for i in range(1 + int(w / 800)):
        p.add(
            ellipse(
                (i + p.random.random()) * 800,
                y + 30,
                p.random.uniform(400, 600),
                p.random.uniform(90, 150),
                p.tint("#d7e6f2"),
            )
        )
    x = p.random.uniform(0, 300)
    while x < w:
        tall = p.random.uniform(150, 240)
        p.add(polygon([(x - tall * 0.3, y + 20), (x, y - tall), (x + tall * 0.3, y + 20)], p.tint("#4f8068")))
        p.add(
            polygon(
                [(x - tall * 0.13, y - tall * 0.55), (x, y - tall), (x + tall * 0.13, y - tall * 0.55)],
                p.tint("#f4f9fd"),
            )
        )
        x += p.random.uniform(160, 520)
    p.floor(horizon, "#eef5fa", far="#dbe9f4")
    for _ in range(int(12 * w * p.height / 1e6)):
        p.add(circle(p.random.uniform(0, w), p.random.uniform(0, 0.95) * p.height, p.random.uniform(7, 12), "#ffffff"))
    return p.done(horizon, (horizon + 0.12, 0.93), p.tint("#eef5fa"))


def _space(p: Painter) -> Backdrop:
    top, low = p.random.choice([("#05061a", "#1a1446"), ("#04101f", "#0d2a4a"), ("#0b0420", "#2c1152")])
    p.gradient("sky", 0, p.height, top, low)
    for _ in range(int(26 * p.width * p.height / 1e6)):
        p.add(
            circle(
                p.random.uniform(0, p.width),
                p.random.uniform(0, p.height),
                p.random.uniform(4, 10),
                p.random.choice(["#ffffff", "#ffe9b8", "#bcd8ff"]),
            )
        )
    if p.random.random() < 0.4:
        p.add(
            circle(
                p.random.choice([0.06, 0.95]) * p.width,
                p.random.choice([0.08, 0.92]) * p.height,
                p.random.uniform(90, 150),
                p.random.choice(["#c97a4a", "#5a8fd0", "#9c6fc0"]),
            )
        )
    return p.done(1.0, None, mix(top, low, 0.5))


_PAINTERS: dict[str, Callable[[Painter], Backdrop]] = {
    "sky": _sky,
    "grass": _grass,
    "ocean": _ocean,
    "underwater": _underwater,
    "beach": _beach,
    "mountains": _mountains,
    "street": _street,
    "city": _city,
    "futuristic city": _futuristic,
    "room": _room,
    "table": _table,
    "forest": _forest,
    "desert": _desert,
    "snow": _snow,
    "space": _space,
}

PLACES = tuple(_PAINTERS)

PLACE_TIMES: dict[str, tuple[str, ...]] = {
    "underwater": ("day",),
    "space": ("night",),
    "table": ("day",),
    "room": ("day", "night"),
} | {place: TIMES for place in _PAINTERS if place not in ("underwater", "space", "table", "room")}
"""Times of day at which each place is drawn."""


def draw_place(place: str, time: str, width: float, height: float, random: Random, *, lights: bool = True) -> Backdrop:
    """Draws a setting.

    Args:
        place: One of :data:`PLACES`.
        time: One of :data:`TIMES`.
        width: Width of the picture in nominal units.
        height: Height of the picture in nominal units.
        random: Source of the details.
        lights: Whether a sun or a moon may be drawn.
    """
    return _PAINTERS[place](Painter(width, height, time, random, lights=lights))


def draw_plain(colour: str, width: float, height: float) -> Backdrop:
    """One flat colour of :data:`COLOURS`, with a place to stand low in the picture."""
    return Backdrop(rect(0, 0, width, height, COLOURS[colour]), 0.6, (0.8, 0.92), rgb(COLOURS[colour]))
