"""Captions: what a person might type to ask for a scene. They always name what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from physformer_core.data.scenes.concepts import Concept, with_article

STYLES = (
    ("", 50),
    ("a photo of ", 16),
    ("a picture of ", 12),
    ("a painting of ", 8),
    ("an illustration of ", 7),
    ("a drawing of ", 7),
)

PLACE_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "sky": {"in": ("in the sky",), "over": ("in the sky", "flying in the sky")},
    "grass": {"in": ("on the grass", "in a field", "in a meadow"), "over": ("over a field", "flying over a field")},
    "ocean": {
        "in": ("on the ocean", "on the sea", "on the water"),
        "over": ("over the ocean", "flying over the ocean", "over the sea"),
    },
    "underwater": {"in": ("under the sea", "underwater", "in the ocean")},
    "beach": {"in": ("on the beach", "on a beach"), "over": ("over a beach", "flying over the beach")},
    "mountains": {
        "in": ("in the mountains", "in front of mountains"),
        "over": ("over mountains", "flying over mountains", "flying over the mountains"),
    },
    "street": {"in": ("on a city street", "on a street", "on the road")},
    "city": {"in": ("in the city", "in a city"), "over": ("over a city", "flying over a city", "flying over the city")},
    "futuristic city": {
        "in": ("in a futuristic city",),
        "over": ("over a futuristic city", "flying over a futuristic city"),
    },
    "room": {"in": ("in a room", "indoors", "in the house"), "over": ("in a room",)},
    "table": {"in": ("on a table", "on a wooden table", "on the table")},
    "forest": {
        "in": ("in a forest", "in the forest", "in the woods"),
        "over": ("over a forest", "flying over a forest"),
    },
    "desert": {"in": ("in the desert", "in a desert"), "over": ("over the desert", "flying over the desert")},
    "snow": {"in": ("in the snow", "on the snow"), "over": ("in the snow",)},
    "space": {"in": ("in space", "in outer space"), "over": ("in space", "flying in space")},
}

_ALONE: dict[str, tuple[str, ...]] = {
    "sky": ("the sky",),
    "grass": ("a green field", "a meadow", "a grass field"),
    "ocean": ("the ocean", "the sea", "ocean water"),
    "underwater": ("the bottom of the sea", "an underwater scene"),
    "beach": ("a beach", "a sandy beach"),
    "mountains": ("a mountain landscape", "mountains", "snowy mountains"),
    "street": ("a city street", "an empty street", "a road in the city"),
    "city": ("a city", "a city skyline", "tall buildings"),
    "futuristic city": ("a futuristic city", "a city of the future", "a sci-fi city"),
    "room": ("an empty room", "a room with a window"),
    "table": ("a wooden table", "an empty table"),
    "forest": ("a forest", "trees in a forest", "the woods"),
    "desert": ("a desert", "sand dunes"),
    "snow": ("a snowy landscape", "a winter landscape"),
    "space": ("outer space", "stars in space"),
}

_ALONE_AT: dict[tuple[str, str], tuple[str, ...]] = {
    ("sky", "day"): ("a blue sky with clouds", "a blue sky"),
    ("sky", "sunset"): ("a sunset sky", "a beautiful sunset", "a sunset"),
    ("sky", "night"): ("a night sky with stars", "a starry night", "a starry sky"),
    ("ocean", "sunset"): (
        "a beautiful sunset over the ocean",
        "a sunset over the ocean",
        "sunset over the sea",
        "a beautiful sunset",
    ),
    ("beach", "sunset"): ("a sunset on the beach", "a beautiful sunset at the beach"),
    ("mountains", "sunset"): ("a sunset over the mountains", "a beautiful sunset over mountains"),
    ("desert", "sunset"): ("a sunset in the desert",),
    ("grass", "sunset"): ("a sunset over a field",),
    ("city", "sunset"): ("a sunset over the city",),
    ("futuristic city", "sunset"): ("a futuristic city at sunset",),
    ("futuristic city", "night"): ("a futuristic city at night", "neon towers at night"),
}

_TIME_PHRASES = {
    "day": ("during the day", "on a sunny day"),
    "sunset": ("at sunset", "at dusk"),
    "night": ("at night",),
}

_RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "in": ("in", "inside"),
    "over": ("over", "above", "flying over"),
    "under": ("under", "below", "beneath"),
    "on": ("on", "on top of"),
    "next to": ("next to", "beside", "and"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}


@dataclass(frozen=True)
class Description:
    """What a scene shows, as far as its captions need it.

    Attributes:
        subject: The main thing, or ``None`` for a place alone.
        subject_colour: Colour the subject was painted in, ``None`` for its own.
        relation: How the subject stands to the other thing.
        other: The other thing: a concept, or "cage".
        place: Setting, ``None`` for a plain background.
        time: Time of day, ``None`` for a plain background.
        background: Plain background colour.
        flying: Whether the subject is in the air over the place.
        prompt: A caption that must be among the scene's captions.
    """

    subject: Concept | None = None
    subject_colour: str | None = None
    relation: str | None = None
    other: Concept | str | None = None
    place: str | None = None
    time: str | None = None
    background: str | None = None
    flying: bool = False
    prompt: str | None = None


def _weighted(random: Random, choices: tuple[tuple[str, int], ...]) -> str:
    return random.choices([text for text, _ in choices], [weight for _, weight in choices])[0]


def noun_phrase(concept: Concept, colour: str | None, random: Random, *, synonyms: bool = True) -> str:
    """A noun phrase with its article, such as "a kitten" or "a blue car"."""
    phrase = concept.phrase
    if synonyms and concept.synonyms and random.random() < 0.22:
        phrase = random.choice(concept.synonyms)
    if colour is None and concept.paint and random.random() < 0.3:
        colour = concept.paint[0]
    if colour is None or colour in phrase:
        return phrase
    article, noun = with_article(phrase)
    return f"{article} {colour} {noun}" if article in ("some", "the") else " ".join(with_article(f"{colour} {noun}"))


def _alone(description: Description, random: Random) -> str:
    place, time = description.place or "sky", description.time or "day"
    own = _ALONE_AT.get((place, time), ())
    if own and random.random() < 0.55:
        return _weighted(random, STYLES) + random.choice(own)
    text = random.choice(_ALONE[place])
    if text.startswith(("a ", "an ")) and random.random() < 0.2:
        text = "a beautiful " + text.partition(" ")[2]
    if (time in ("sunset", "night") and place != "space") or (
        random.random() < 0.1 and place not in ("underwater", "table", "space")
    ):
        text += " " + random.choice(_TIME_PHRASES[time])
    return _weighted(random, STYLES) + text


def _caption(description: Description, random: Random, detail: float) -> str:
    """One caption; ``detail`` is the chance that the place, the time and the background are stated."""
    if description.subject is None:
        return _alone(description, random)
    style = _weighted(random, STYLES)
    text = noun_phrase(description.subject, description.subject_colour, random)
    if description.relation and description.other is not None:
        other = (
            "a cage"
            if isinstance(description.other, str)
            else noun_phrase(description.other, None, random, synonyms=False)
        )
        if description.relation == "in":
            other = random.choices([other, "a bird cage"], [9, 1 if description.subject.lives == "air" else 0])[0]
        phrases = _RELATION_PHRASES[description.relation]
        if description.subject.lives != "air":
            phrases = tuple(phrase for phrase in phrases if "flying" not in phrase)
        link = random.choices(phrases, [3] + [1] * (len(phrases) - 1))[0]
        text += f" {link} {other}"
        detail *= 0.5
    elif not style and random.random() < 0.12 and description.subject.article != "the":
        text = text.partition(" ")[2]  # a bare "cat"
    if description.place and random.random() < detail:
        places = PLACE_PHRASES[description.place]
        text += " " + random.choice(places.get("over" if description.flying else "in", places["in"]))
    if description.time and description.place not in ("space", "underwater", "table"):
        stated = detail * {"day": 0.06, "sunset": 0.8, "night": 0.8}[description.time]
        if random.random() < stated:
            text += " " + random.choice(_TIME_PHRASES[description.time])
    if description.background and random.random() < detail * 0.45:
        text += (
            f" on a {description.background} background"
            if description.background != "orange"
            else " on an orange background"
        )
    return style + text


def write_captions(description: Description, random: Random) -> tuple[str, str]:
    """Two captions: one that mostly states the place and the time, one that often leaves them out."""
    first = description.prompt or _caption(description, random, 0.95)
    second = _caption(description, random, 0.95 if description.prompt else 0.5)
    return first, second
