"""Drawn things that are not Twemoji pictures: the cage, and shadows on the ground."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from physformer_core.data.scenes.painter import ellipse, mix, n, rect

_METALS = {"golden": "#d9a93a", "steel": "#7d8894", "dark": "#3f454d", "white": "#eef1f4"}


@dataclass(frozen=True)
class Frame:
    """A rectangle in nominal units."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    def moved(self, *, right: float = 0.0, down: float = 0.0) -> Frame:
        """The same, elsewhere."""
        return Frame(self.left + right, self.top + down, self.right + right, self.bottom + down)


def shadow(x: float, y: float, half_width: float) -> str:
    """Soft ellipse under something that stands at (x, y)."""
    return ellipse(x, y, half_width, half_width * 0.17, "#000000", 0.13) + ellipse(
        x, y, half_width * 0.78, half_width * 0.12, "#000000", 0.13
    )


def cage(outer: Frame, random: Random, *, avoid: tuple[float, float, float]) -> tuple[str, str]:
    """A bird cage with a dome, a base and a ring.

    Args:
        outer: Extent of the whole cage, ring and base included.
        random: Chooses the metal and the number of bars.
        avoid: Colour of what lies behind, 0 to 255 each; the metal differs from it.

    Returns:
        Markup to draw behind the subject and markup to draw in front of it.
    """

    def difference(colour: str) -> float:
        return sum(abs(int(colour[1 + 2 * i : 3 + 2 * i], 16) - avoid[i]) for i in range(3))

    colour = random.choice([metal for metal in _METALS.values() if difference(metal) > 150] or ["#3f454d"])
    w, h = outer.width, outer.height
    dome = w * 0.5
    ring, base = h * 0.075, h * 0.085
    top, foot = outer.top + ring * 1.6, outer.bottom - base
    left, right, middle = outer.left + w * 0.03, outer.right - w * 0.03, outer.left + w / 2
    shoulder = top + min(dome, (foot - top) * 0.45)
    bar = w * 0.021
    outline = (
        f"M{n(left)} {n(foot)}V{n(shoulder)}C{n(left)} {n(top + (shoulder - top) * 0.3)} "
        f"{n(middle - w * 0.24)} {n(top)} {n(middle)} {n(top)}"
        f"S{n(right)} {n(top + (shoulder - top) * 0.3)} {n(right)} {n(shoulder)}V{n(foot)}"
    )
    behind = f'<path d="{outline}Z" fill="#ffffff" opacity=".22"/>'
    bars = []
    count = 6
    for i in range(1, count):
        x = left + (right - left) * i / count
        lean = middle + (x - middle) * 0.25
        bars.append(
            f"M{n(x)} {n(foot)}V{n(shoulder)}Q{n(x)} {n(top + (shoulder - top) * 0.35)} {n(lean)} {n(top + bar)}"
        )
    front = (
        f'<path d="{outline}" fill="none" stroke="{colour}" stroke-width="{n(bar * 1.7)}"/>'
        f'<path d="{"".join(bars)}" fill="none" stroke="{colour}" stroke-width="{n(bar)}"/>'
        + rect(left, shoulder - bar, right - left, bar * 2, colour)
        + rect(outer.left, foot - bar, w, base + bar, colour)
        + rect(outer.left, foot + base * 0.55, w, base * 0.45, mix(colour, "#000000", 0.25))
        + f'<circle cx="{n(middle)}" cy="{n(outer.top + ring * 0.9)}" r="{n(ring * 0.62)}" '
        f'fill="none" stroke="{colour}" stroke-width="{n(bar * 1.5)}"/>'
    )
    return behind, front
