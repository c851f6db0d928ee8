"""From a number to a picture with captions: chooses what is shown and lays it out.

The same ``(seed, index)`` gives the same scene on every machine, whatever else was composed before.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from random import Random

from physformer_core.data.scenes.backdrops import draw_place, draw_plain
from physformer_core.data.scenes.captions import Description, write_captions
from physformer_core.data.scenes.casting import (
    background_for,
    paint_of,
    pick,
    pick_captive,
    pick_concept,
    pick_pair,
    pick_time,
    places_of,
)
from physformer_core.data.scenes.concepts import Concept, art_markup, art_shape, concept_named, load_concepts
from physformer_core.data.scenes.objects import Frame, cage, shadow
from physformer_core.data.scenes.painter import COLOURS, Backdrop, ellipse, mix, n
from physformer_core.errors import DataError

SHORT_SIDE = 1000.0
"""Shorter side of a scene in nominal units."""

ASPECTS: dict[str, float] = {
    "1:1": 0.38,
    "16:9": 0.38,
    "4:3": 0.07,
    "3:4": 0.05,
    "9:16": 0.06,
    "21:9": 0.03,
    "9:21": 0.03,
}
"""Width : height, and how often it is drawn: mostly squares, and the shape that names of resolutions stand for."""

KINDS: dict[str, float] = {"single": 0.20, "setting": 0.25, "pair": 0.45, "place": 0.05, "prompt": 0.05}
"""What a scene shows: one thing on a plain colour, one thing in a place, two things, a place alone,
or a familiar prompt."""

RELATIONS: dict[str, float] = {
    "in": 0.19, "next to": 0.27, "on": 0.15, "over": 0.12, "under": 0.11, "in front of": 0.10, "behind": 0.06,
}  # fmt: skip

FAMILIAR_PROMPTS = (
    "a bird in a cage",
    "a photo of a cat",
    "a red car on a city street",
    "a beautiful sunset over the ocean",
    "a dragon flying over mountains",
    "a painting of a mountain landscape",
    "a futuristic city at sunset",
)
"""Compositions that people ask for most; each has its own share of the scenes."""

PLACE_ALONE: dict[str, float] = {
    "ocean": 3, "mountains": 3, "futuristic city": 2.5, "city": 1.5, "street": 2, "sky": 2, "beach": 1.5, "forest": 1.5,
    "grass": 1, "desert": 1, "snow": 1, "space": 1, "room": 0.6, "underwater": 0.8, "table": 0.3,
}  # fmt: skip

ALONE = 0.66
"""Longer side of a thing that is alone in a picture, as a share of the picture's shorter side. One size and few places,
not a continuum: a small model then learns every drawing in full detail rather than the mean over places and sizes
(docs/training-log.md)."""

PAIRED = 0.44
"""The same where there are two."""

_AIRBORNE = ("air", "sky", "space")
_STANDING = ("land", "thing", "plant", "road", "building", "ground", "person")
_FORMAT = "physformer-scenes/2"


@dataclass(frozen=True)
class PlacedSubject:
    """Something drawn in a scene.

    Attributes:
        concept: Its name in ``concepts.toml``, or "cage".
        role: "subject" or "object".
        box: Top, left, bottom and right edge as shares of the picture, 0 to 1.
        colour: Colour it was painted in, ``None`` for its own.
    """

    concept: str
    role: str
    box: tuple[float, float, float, float]
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture with captions.

    Attributes:
        key: Unique name of the scene within a seed.
        width: Nominal width in units; the shorter side is 1000.
        height: Nominal height.
        svg: Self-contained SVG document with ``viewBox="0 0 width height"``.
        captions: Two captions.
        subjects: What is drawn, the main subject first.
        relation: How the subject stands to the object: "in", "over", "under", "on", "next to", "in front of", "behind".
        place: Setting, ``None`` for a plain background.
        time: Time of day, ``None`` for a plain background.
        background: Plain background colour.
    """

    key: str
    width: int
    height: int
    svg: str
    captions: tuple[str, ...]
    subjects: tuple[PlacedSubject, ...]
    relation: str | None
    place: str | None
    time: str | None
    background: str | None = None

    @property
    def class_label(self) -> int | None:
        """Position of the main subject in the list of concepts."""
        if not self.subjects:
            return None
        return load_concepts().index(concept_named(self.subjects[0].concept))

    def meta(self) -> dict[str, object]:
        """What is needed to judge a drawing of the same caption, ready for JSON."""
        facts = {"relation": self.relation, "place": self.place, "time": self.time, "background": self.background}
        return {"subjects": [asdict(subject) for subject in self.subjects], **facts}

    def meta_json(self) -> str:
        return json.dumps(self.meta(), sort_keys=True)


class _Stage:
    """Collects markup and boxes while a scene is laid out."""

    def __init__(self, random: Random, width: float, height: float) -> None:
        self.random, self.width, self.height = random, width, height
        self.short = min(width, height)
        self.parts: list[str] = []
        self.subjects: list[PlacedSubject] = []
        self.backdrop = Backdrop("", 1.0, None, (255.0, 255.0, 255.0))
        self.description = Description()

    def set_place(self, place: str, time: str, *, lights: bool = True) -> None:
        self.backdrop = draw_place(place, time, self.width, self.height, self.random, lights=lights)
        self.parts.append(self.backdrop.svg)
        self.description = replace(self.description, place=place, time=time)

    def set_plain(self, colour: str) -> None:
        self.backdrop = draw_plain(colour, self.width, self.height)
        self.parts.append(self.backdrop.svg)
        self.description = replace(self.description, background=colour)

    def frame_of(
        self, concept: Concept, size: float, x: float, *, bottom: float | None = None, y: float | None = None
    ) -> Frame:
        """Box of a concept whose longer side is ``size``, centred on x, with its bottom or its centre at a height."""
        shape = art_shape(concept.art)
        scale = size / max(shape.width, shape.height)
        w, h = shape.width * scale, shape.height * scale
        top = bottom - h if bottom is not None else (self.height / 2 if y is None else y) - h / 2
        return Frame(x - w / 2, top, x + w / 2, top + h)

    def inside(self, frame: Frame, margin: float = 18.0) -> Frame:
        """The frame, moved so that it lies in the picture."""
        dx = max(margin - frame.left, 0.0) + min(self.width - margin - frame.right, 0.0)
        dy = max(margin - frame.top, 0.0) + min(self.height - margin - frame.bottom, 0.0)
        return frame.moved(right=dx, down=dy)

    def on_ground(self, bottom: float) -> float:
        """That height, or the nearest one below it at which there is ground: tall pictures have it further down."""
        return max(bottom, (self.backdrop.ground[0] + 0.02) * self.height) if self.backdrop.ground else bottom

    def draw(
        self,
        concept: Concept,
        frame: Frame,
        role: str,
        *,
        colour: str | None = None,
        grounded: bool = False,
    ) -> None:
        """Draws a concept into a frame that has its proportions."""
        shape = art_shape(concept.art)
        scale = frame.width / shape.width
        x, y = frame.left - shape.left * scale, frame.top - shape.top * scale
        if grounded:
            self.parts.append(
                shadow((frame.left + frame.right) / 2, frame.bottom - 0.012 * frame.height, frame.width * 0.46)
            )
        markup = art_markup(concept.art)
        if colour is not None:
            main, *darker = concept.paint[1:]
            markup = re.sub(re.escape(main), COLOURS[colour], markup, flags=re.IGNORECASE)
            for fill in darker:
                markup = re.sub(re.escape(fill), mix(COLOURS[colour], "#000000", 0.25), markup, flags=re.IGNORECASE)
        self.parts.append(f'<g transform="translate({n(x)} {n(y)}) scale({scale:.4f})">{markup}</g>')
        self.note(concept.name, role, frame, colour)

    def note(self, name: str, role: str, frame: Frame, colour: str | None = None) -> None:
        """Records what was drawn where."""
        edges = (frame.top / self.height, frame.left / self.width, frame.bottom / self.height, frame.right / self.width)
        top, left, bottom, right = (round(min(max(edge, 0.0), 1.0), 4) for edge in edges)
        self.subjects.append(PlacedSubject(name, role, (top, left, bottom, right), colour))

    def scene(self, key: str) -> Scene:
        width, height = round(self.width), round(self.height)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{"".join(self.parts)}</svg>'
        about = self.description
        captions = write_captions(about, self.random)
        return Scene(
            key,
            width,
            height,
            svg,
            captions,
            tuple(self.subjects),
            about.relation,
            about.place,
            about.time,
            about.background,
        )


def _aside(stage: _Stage) -> float:
    """Offset of what is shown from the middle: none, or in wide pictures now and then the line of thirds."""
    spare = stage.width - stage.short
    return stage.random.choices([0.0, -spare / 3, spare / 3], [18, 1, 1])[0] if spare > 0 else 0.0


def _single(stage: _Stage, concept: Concept, colour: str | None = None) -> None:
    """One large thing on a plain colour."""
    random = stage.random
    stage.set_plain(background_for(random, concept, colour))
    frame = stage.frame_of(concept, ALONE * stage.short, stage.width / 2 + _aside(stage))
    stage.draw(concept, stage.inside(frame, 30), "subject", colour=colour, grounded=concept.lives in _STANDING)
    stage.description = replace(stage.description, subject=concept, subject_colour=colour)


def _in_place(stage: _Stage, concept: Concept, place: str, time: str, colour: str | None = None) -> None:
    """One thing where it belongs: on the ground, in the air, on the water."""
    stage.set_place(place, time, lights=concept.lives != "sky")
    flying = concept.lives in _AIRBORNE and place != "space"
    # In the middle as on a plain colour, so that one drawing is learnt from both: but higher if it flies, and not above
    # the ground if it stands.
    frame = stage.frame_of(concept, ALONE * stage.short, stage.width / 2 + _aside(stage))
    ground = stage.backdrop.ground
    if flying and place not in ("sky", "room"):
        frame = frame.moved(down=-0.13 * stage.height)
    elif ground is not None and not flying:
        steps = max(0.0, (ground[0] + 0.02) * stage.height - frame.bottom) / (stage.short / 16)
        frame = frame.moved(down=math.ceil(steps) * stage.short / 16)
    frame = stage.inside(frame, 30)
    afloat = place == "ocean" and not flying
    standing = not flying and ground is not None and not afloat
    stage.draw(concept, frame, "subject", colour=colour, grounded=standing)
    if afloat:
        _ripples(stage, frame)
    stage.description = replace(stage.description, subject=concept, subject_colour=colour, flying=flying)


def _ripples(stage: _Stage, frame: Frame) -> None:
    """Water along the lower edge of something that floats."""
    r, g, b = (round(part) for part in stage.backdrop.colour)
    sea = f"#{r:02x}{g:02x}{b:02x}"
    x, y = (frame.left + frame.right) / 2, frame.bottom
    stage.parts.append(ellipse(x, y + 8, frame.width * 0.6, 24, sea))
    stage.parts.append(ellipse(x, y + 2, frame.width * 0.5, 9, mix(sea, "#ffffff", 0.5), 0.85))


def _caged(stage: _Stage, concept: Concept, colour: str | None = None) -> None:
    """One thing in a cage, on a plain colour, in a room, on a table or on the grass."""
    random = stage.random
    place = pick(random, {"plain": 6.0, "room": 1.5, "grass": 1.5, "table": 1.0})
    pale = sum(art_shape(concept.art).colour) > 600 or colour == "white"
    if place == "plain" or pale:  # a pale subject vanishes against a pale wall
        place = "plain"
        stage.set_plain(background_for(random, concept, colour))
    else:
        stage.set_place(place, "day")
    tall = stage.short * 0.9
    wide = tall * 0.86
    x = stage.width / 2 + _aside(stage)
    bottom = stage.on_ground((stage.height + tall) / 2)
    outer = stage.inside(Frame(x - wide / 2, bottom - tall, x + wide / 2, bottom), 20)
    behind, front = cage(outer, random, avoid=stage.backdrop.colour)
    stage.parts += [shadow((outer.left + outer.right) / 2, outer.bottom - 6, wide * 0.54), behind]
    shape = art_shape(concept.art)
    room_w, room_h = wide * 0.8, tall * 0.58
    size = max(shape.width, shape.height) * min(room_w / shape.width, room_h / shape.height)
    frame = stage.frame_of(concept, size, (outer.left + outer.right) / 2, bottom=outer.bottom - tall * 0.095)
    if concept.lives in _AIRBORNE:
        frame = Frame(frame.left, frame.top - tall * 0.05, frame.right, frame.bottom - tall * 0.05)
    stage.draw(concept, frame, "subject", colour=colour)
    stage.parts.append(front)
    stage.note("cage", "object", outer)
    stage.description = replace(stage.description, subject=concept, subject_colour=colour, relation="in", other="cage")


def _pair(stage: _Stage, relation: str, subject: Concept, other: Concept) -> None:
    """Two things, in a place that suits both or on a plain colour."""
    random = stage.random
    indoor = {"thing"} & {subject.lives, other.lives}
    if random.random() < 0.4:
        stage.set_plain(_shared_background(random, subject, other))
    elif other.lives == "surface":
        stage.set_place("ocean", pick_time(random, subject, "ocean"))
    else:
        place = pick(
            random, {"room": 2.0, "grass": 1.0} if indoor else {"grass": 5.0, "desert": 0.7, "snow": 0.7, "beach": 0.7}
        )
        outside = {"sky"} & {subject.lives, other.lives}
        place = "grass" if outside and place == "room" else place
        anchor = other if other.lives == "sky" else subject
        stage.set_place(place, pick_time(random, anchor, place), lights=not outside)
    _LAYOUTS[relation](stage, subject, other)
    if other.lives == "surface" and stage.description.place == "ocean":
        _ripples(stage, _frame_back(stage, next(placed for placed in stage.subjects if placed.role == "object")))
    stage.subjects.sort(key=lambda placed: placed.role != "subject")
    stage.description = replace(stage.description, subject=subject, relation=relation, other=other)


def _frame_back(stage: _Stage, placed: PlacedSubject) -> Frame:
    top, left, bottom, right = placed.box
    return Frame(left * stage.width, top * stage.height, right * stage.width, bottom * stage.height)


def _shared_background(random: Random, first: Concept, second: Concept) -> str:
    """A plain colour that sets off both."""
    for _ in range(12):
        colour = background_for(random, first, None)
        own = art_shape(second.art).colour
        red, green, blue = (int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5))
        if abs(red - own[0]) + abs(green - own[1]) + abs(blue - own[2]) > 140:
            return colour
    return "white" if sum(art_shape(second.art).colour) < 500 else "green"


def _side_by_side(stage: _Stage, subject: Concept, other: Concept) -> None:
    pair = [(subject, "subject"), (other, "object")]
    if stage.random.random() < 0.5:
        pair.reverse()
    for (concept, role), side in zip(pair, (-0.25, 0.25), strict=True):
        x = stage.width / 2 + side * min(stage.width, 1.2 * stage.short)
        frame = stage.frame_of(concept, PAIRED * stage.short, x, bottom=_paired_base(stage))
        stage.draw(concept, stage.inside(frame), role, grounded=True)


def _paired_base(stage: _Stage) -> float:
    """Where feet stand in pairs: near the lower edge of the square in the middle, if that is on the ground."""
    return stage.on_ground(stage.height / 2 + 0.42 * stage.short)


def _over(stage: _Stage, subject: Concept, other: Concept) -> None:
    _stack(stage, upper=(subject, "subject"), lower=(other, "object"))


def _under(stage: _Stage, subject: Concept, other: Concept) -> None:
    if other.name in ("tree", "palm tree"):
        base, x = _paired_base(stage), stage.width / 2
        tree = stage.frame_of(other, 0.84 * stage.short, x, bottom=base)
        stage.draw(other, stage.inside(tree), "object", grounded=True)
        small = stage.frame_of(subject, PAIRED * stage.short, x + 0.2 * stage.short, bottom=base + 0.03 * stage.short)
        stage.draw(subject, stage.inside(small), "subject", grounded=True)
        return
    _stack(stage, upper=(other, "object"), lower=(subject, "subject"))


def _stack(stage: _Stage, *, upper: tuple[Concept, str], lower: tuple[Concept, str]) -> None:
    """One thing above another, with air between them."""
    middle, size = stage.width / 2 + _aside(stage), PAIRED * stage.short
    low = stage.inside(stage.frame_of(lower[0], size, middle, bottom=_paired_base(stage)))
    high = stage.inside(stage.frame_of(upper[0], size, middle, y=low.bottom - 0.67 * stage.short), 10)
    high = high.moved(down=min(0.0, low.top - 0.01 * stage.short - high.bottom))
    stage.draw(lower[0], low, lower[1], grounded=lower[0].lives != "surface")
    stage.draw(upper[0], high, upper[1])


def _on_top(stage: _Stage, subject: Concept, other: Concept) -> None:
    x, size = stage.width / 2 + _aside(stage), PAIRED * stage.short
    support = stage.inside(stage.frame_of(other, size, x, bottom=_paired_base(stage)))
    shape = art_shape(other.art)
    scale = support.width / shape.width
    columns = [round((shape.left + share * shape.width) * 2) for share in (0.42, 0.46, 0.5, 0.54, 0.58)]
    heights = sorted(shape.surface[min(column, 71)] for column in columns)
    surface = support.top + (heights[2] - shape.top) * scale
    small = stage.frame_of(subject, size, (support.left + support.right) / 2, bottom=surface + 0.012 * stage.short)
    stage.draw(other, support, "object", grounded=other.lives != "surface")
    stage.draw(subject, stage.inside(small, 8), "subject")


def _in_front(stage: _Stage, subject: Concept, other: Concept) -> None:
    _one_before_another(stage, front=(subject, "subject"), back=(other, "object"))


def _behind(stage: _Stage, subject: Concept, other: Concept) -> None:
    _one_before_another(stage, front=(other, "object"), back=(subject, "subject"))


def _one_before_another(stage: _Stage, *, front: tuple[Concept, str], back: tuple[Concept, str]) -> None:
    """Something large, and something smaller that hides a part of it, to one side."""
    base, x = _paired_base(stage), stage.width / 2
    side = stage.random.choice([-1, 1]) * 0.2 * stage.short
    far = stage.frame_of(back[0], ALONE * stage.short, x, bottom=base - 0.08 * stage.short)
    near = stage.frame_of(front[0], PAIRED * stage.short, x + side, bottom=base)
    stage.draw(back[0], stage.inside(far), back[1], grounded=True)
    stage.draw(front[0], stage.inside(near), front[1], grounded=True)


_LAYOUTS = {
    "next to": _side_by_side,
    "over": _over,
    "under": _under,
    "on": _on_top,
    "in front of": _in_front,
    "behind": _behind,
}


def _familiar(stage: _Stage) -> None:
    """One of the compositions that people ask for most, with their words as its first caption."""
    prompt = stage.random.choice(FAMILIAR_PROMPTS)
    if prompt == "a bird in a cage":
        _caged(stage, concept_named("bird"))
    elif prompt == "a photo of a cat":
        cat = concept_named("cat")
        if stage.random.random() < 0.6:
            _single(stage, cat)
        else:
            _in_place(stage, cat, pick(stage.random, {"grass": 1.0, "room": 1.0}), "day")
    elif prompt == "a red car on a city street":
        _in_place(
            stage, concept_named("car"), "street", pick(stage.random, {"day": 0.7, "sunset": 0.15, "night": 0.15})
        )
    elif prompt == "a dragon flying over mountains":
        _in_place(
            stage, concept_named("dragon"), "mountains", pick(stage.random, {"day": 0.6, "sunset": 0.3, "night": 0.1})
        )
    else:
        place = next(
            place
            for word, place in (("ocean", "ocean"), ("mountain", "mountains"), ("futuristic", "futuristic city"))
            if word in prompt
        )
        time = "sunset" if "sunset" in prompt else pick(stage.random, {"day": 0.7, "sunset": 0.3})
        stage.set_place(place, time)
    stage.description = replace(stage.description, prompt=prompt)


def check_aspect(aspect: float) -> None:
    """Refuses width : height that nothing can be laid out in.

    Raises:
        DataError: It is not between 0.1 and 10.
    """
    if not 0.1 <= aspect <= 10:
        raise DataError(f"aspect {aspect:g} is not between 0.1 and 10", hint="for example 16:9")


def check_pair_share(share: float) -> None:
    """Refuses what is no share of scenes.

    Raises:
        DataError: It is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"a share of pairs of {share:g} is not from 0 to 1", hint=f"{KINDS['pair']:g} is usual")


def _kinds_with(pair_share: float) -> dict[str, float]:
    """:data:`KINDS` with another share of pairs."""
    check_pair_share(pair_share)
    rest = (1 - pair_share) / (1 - KINDS["pair"])
    return {kind: weight * rest for kind, weight in KINDS.items()} | {"pair": pair_share}


def compose_scene(
    seed: int,
    index: int,
    *,
    aspect: float | None = None,
    kind: str | None = None,
    relation: str | None = None,
    place: str | None = None,
    time: str | None = None,
    concept: str | None = None,
    pair_ranks: tuple[float, float] = (0.0, 1.0),
    pair_share: float | None = None,
) -> Scene:
    """Composes the scene of a number.

    Args:
        seed: Number of the collection.
        index: Number of the scene within it, from 0.
        aspect: Width divided by height, drawn from :data:`ASPECTS` by default.
        kind: One of :data:`KINDS`, drawn by default.
        relation: One of :data:`RELATIONS`; makes the kind "pair".
        place: Setting of a "setting" or "place" scene.
        time: Time of day of a "setting" or "place" scene.
        concept: Main subject of a "single" or "setting" scene, or of a scene with a cage.
        pair_ranks: Two things are shown together only if their `casting.pair_rank` is within [from, to): the pairs
            that a training set holds out are ranked below a share.
        pair_share: How often the kind is "pair" where it is drawn, 0 to 1; the other kinds keep their proportions. As
            in :data:`KINDS` by default.

    Raises:
        DataError: If an option is unknown or doesn't go with the kind.
    """
    random = Random(int.from_bytes(hashlib.sha256(f"{_FORMAT}:{seed}:{index}".encode()).digest(), "big"))
    drawn_aspect = pick(random, ASPECTS)
    drawn_kind = pick(random, KINDS if pair_share is None else _kinds_with(pair_share))
    if aspect is None:
        across, down = drawn_aspect.split(":")
        aspect = int(across) / int(down)
    check_aspect(aspect)
    if not 0 <= pair_ranks[0] <= pair_ranks[1] - 0.05 <= 0.95:  # fewer, and a relation might have none
        raise DataError(f"pairs ranked {pair_ranks[0]:g} to {pair_ranks[1]:g} are too few, or out of 0 to 1")
    kind = "pair" if relation else (kind or drawn_kind)
    if kind not in KINDS or (relation and relation not in RELATIONS):
        raise DataError(f"unknown kind {kind!r} or relation {relation!r}", hint=f"kinds: {', '.join(KINDS)}")
    width, height = (SHORT_SIDE * aspect, SHORT_SIDE) if aspect >= 1 else (SHORT_SIDE, SHORT_SIDE / aspect)
    stage = _Stage(random, float(round(width)), float(round(height)))
    chosen = concept_named(concept) if concept else None
    if kind == "single":
        subject = chosen or pick_concept(random)
        _single(stage, subject, paint_of(random, subject))
    elif kind == "setting":
        subject = chosen or pick_concept(random)
        where = place or pick(random, places_of(subject))
        _in_place(stage, subject, where, time or pick_time(random, subject, where), paint_of(random, subject))
    elif kind == "pair":
        how = relation or pick(random, RELATIONS)
        if how == "in":
            subject = chosen or pick_captive(random)
            _caged(stage, subject, paint_of(random, subject))
        else:
            _pair(stage, how, *pick_pair(random, how, pair_ranks))
    elif kind == "place":
        where = place or pick(random, PLACE_ALONE)
        stage.set_place(where, time or pick_time(random, None, where))
    else:
        _familiar(stage)
    return stage.scene(f"scene-{seed}-{index:08d}")
