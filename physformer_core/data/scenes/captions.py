"""Captions: what a person might type to ask for a scene. They always name what is shown."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from random import Random

from physformer_core.data.scenes import wordings
from physformer_core.data.scenes.concepts import Concept, load_concepts, with_article

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


def described(phrase: str, word: str) -> str:
    """The phrase with a word before its noun: "owl" and "happy" -> "a happy owl"."""
    article, noun = with_article(phrase)
    return f"{article} {word} {noun}" if article in ("some", "the") else " ".join(with_article(f"{word} {noun}"))


def noun_phrase(concept: Concept, colour: str | None, random: Random, *, synonyms: float = 0.22) -> str:
    """A noun phrase with its article, such as "a kitten" or "a blue car"; ``synonyms`` is the chance of a synonym."""
    phrase = concept.phrase
    if synonyms and concept.synonyms and random.random() < synonyms:
        phrase = random.choice(concept.synonyms)
    if colour is None and concept.paint and random.random() < 0.3:
        colour = concept.paint[0]
    return phrase if colour is None or colour in phrase else described(phrase, colour)


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
            else noun_phrase(description.other, None, random, synonyms=0.0)
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


_MOST_WORDS = 20
_NOT_LIVELY = re.compile(r".*\b(face|head|seashell|skull|jack-o-lantern|walking|dancing|cyclist|snowboarder)\b.*")
"""Animals and figures that neither stand, sit nor have a mood, or say so themselves."""


def _lively(concept: Concept) -> bool:
    return concept.category in ("animal", "figure") and not _NOT_LIVELY.fullmatch(concept.name)


@functools.cache
def _nouns() -> frozenset[str]:
    """All nouns with which concepts are named."""
    phrases = [phrase for concept in load_concepts() for phrase in (concept.phrase, *concept.synonyms)]
    return frozenset(with_article(phrase)[1] for phrase in phrases)


def _thing(concept: Concept, colour: str | None, random: Random, *, bare: bool) -> str:
    """A noun phrase, more freely than `noun_phrase`; ``bare`` is without an article."""
    phrase = noun_phrase(concept, colour, random, synonyms=0.65)
    article, noun = with_article(phrase)
    word = random.choice(wordings.ADJECTIVES + (wordings.LIVELY_ADJECTIVES if _lively(concept) else ()))
    # A "small airplane" and an "old man" are concepts of their own.
    if random.random() < 0.3 and concept.name not in ("airplane", "baby") and f"{word} {noun}" not in _nouns():
        phrase = described(phrase, word)
        article, noun = with_article(phrase)
    if bare:
        return noun
    if article in ("a", "an") and random.random() < 0.1:
        return f"{random.choice(('the', 'the', 'one', 'one' if concept.category == 'figure' else 'my'))} {noun}"
    return phrase


def _pronoun(concept: Concept) -> str:
    return "them" if concept.article == "some" or concept.category == "figure" else "it"


def _related(description: Description, random: Random, *, listed: bool, bare: bool) -> str:
    """The subject and the other thing, in one of the wordings of their relation."""
    subject, other, relation = description.subject, description.other, description.relation
    assert subject is not None and other is not None and relation is not None
    thing = _thing(subject, description.subject_colour, random, bare=bare)
    if isinstance(other, Concept):
        second, it = _thing(other, None, random, bare=bare), _pronoun(other)
    else:
        cages = ("cage", "cage", "metal cage", "birdcage" if subject.lives == "air" else "cage")
        second, it = random.choice(cages), "it"
        second = second if bare else f"a {second}"
        if not bare and random.random() < 0.06 and thing.startswith(("a ", "an ")):
            return described(thing, "caged")
    templates = wordings.RELATIONS[relation] + (wordings.LIVELY_RELATIONS[relation] if _lively(subject) else ())
    if isinstance(other, Concept) and other.lives == "plant":  # a tree is not over what stands under it
        templates = tuple(text for text in templates if not text.startswith(("{b} over", "{b} above")))
    if listed or bare:
        templates = tuple(text for text in templates if "it" not in re.split(r"\W+|_", text))
        if listed and random.random() < 0.5:
            templates = wordings.LISTED.get(relation, templates)
    template = templates[0] if random.random() < 0.15 else random.choice(templates)
    if relation == "next to" and random.random() < 0.4 and template in wordings.RELATIONS[relation]:
        thing, second, subject = second, thing, other if isinstance(other, Concept) else subject
    return template.format(a=thing, b=second, it_a=_pronoun(subject), it_b=it)


def _shown(description: Description, random: Random, *, listed: bool, bare: bool) -> str:
    """What is shown, without its surroundings."""
    subject, place, time = description.subject, description.place, description.time
    if subject is None:
        place, time = place or "sky", time or "day"
        own = _ALONE_AT.get((place, time), ())
        text = random.choice(own if own and random.random() < 0.3 else _ALONE[place] + wordings.PLACES_ALONE[place])
        if text.startswith(("a ", "an ")) and "beautiful" not in text and random.random() < 0.25:
            text = described(text, random.choice(wordings.PLACE_ADJECTIVES))
        return text.removeprefix("a ").removeprefix("an ") if bare else text
    if description.relation and description.other is not None:
        return _related(description, random, listed=listed, bare=bare)
    medium = random.choice(wordings.MEDIA) if random.random() < 0.12 else None
    thing = _thing(subject, description.subject_colour, random, bare=bare or medium is not None)
    if medium is not None:
        return f"{thing} {medium}" if bare else " ".join(with_article(f"{thing} {medium}"))
    if not bare and not listed and random.random() < 0.15:
        lively = _lively(subject) and subject.lives in ("land", "face", "person")
        thing += " " + random.choice(wordings.LIVELY_FILLERS if lively else wordings.FILLERS)
    return thing


def _surroundings(description: Description, random: Random, *, listed: bool) -> list[str]:
    """Phrases for the place, the time and the background, each of which may be left out."""
    place, time, background, subject = (
        description.place, description.time, description.background, description.subject
    )  # fmt: skip
    detail = 0.65 if description.relation is None else 0.35
    found: list[str] = []
    if place and subject is not None and random.random() < detail:
        way = "over" if description.flying and "over" in PLACE_PHRASES[place] else "in"
        phrases = PLACE_PHRASES[place][way] + wordings.PLACES[place].get(way, ())
        if subject.lives == "sky":  # the sun doesn't fly
            phrases = tuple(text for text in phrases if "flying" not in text)
        found.append(place if listed and random.random() < 0.5 else random.choice(phrases))
    if time and place not in ("space", "underwater", "table"):
        stated = (detail + 0.1) * {"day": 0.1, "sunset": 0.85, "night": 0.85}[time]
        phrases = (wordings.LISTED_TIMES if listed else wordings.TIMES)[time]
        found += [random.choice(phrases)] if random.random() < stated else []
    if background and random.random() < detail:
        colour = "gray" if background == "grey" and random.random() < 0.5 else background
        text = random.choice(wordings.LISTED_BACKGROUNDS if listed else wordings.BACKGROUNDS).format(c=colour)
        found.append(text.replace("a orange", "an orange"))
    return found


def varied_caption(description: Description, random: Random) -> str:
    """A caption in everyday words: a request, a list of keywords or a few bare nouns."""
    while True:
        text = _varied(description, random)
        if len(text.split()) <= _MOST_WORDS:
            return _typed(text, random)


def _varied(description: Description, random: Random) -> str:
    listed = random.random() < 0.3
    bare = random.random() < (0.7 if listed else 0.15)
    shown = _shown(description, random, listed=listed, bare=bare)
    around = _surroundings(description, random, listed=listed)
    if listed:
        around += random.sample(wordings.KEYWORDS, random.choices([0, 1, 2, 3], [2, 4, 3, 1])[0])
        random.shuffle(around)
        return ("" if random.random() < 0.12 else ",").join((shown, *(f" {text}" for text in around)))
    if around and random.random() < 0.08 and "flying" not in around[0]:
        text = f"{around[0]}, {shown}"
        return " ".join((text, *around[1:]))
    text = " ".join((shown, *around))
    if random.random() < 0.15:
        text += " " + random.choice(wordings.SUFFIXES)
    return (wordings.FRAMES[0] if random.random() < 0.2 else random.choice(wordings.FRAMES)).format(x=text)


def _typed(text: str, random: Random) -> str:
    """The text as people type it: mostly in small letters, at times as a sentence or in capitals."""
    if text.endswith("?"):
        text = text[:-1] if random.random() < 0.3 else text
    elif random.random() < 0.2:
        text += random.choice("...!")
    how = random.random()
    if how < 0.2:
        text = re.sub(r"\bi\b", "I", text[0].upper() + text[1:])
    return text.upper() if how > 0.975 else text


def write_captions(description: Description, random: Random) -> tuple[str, str]:
    """Two captions: a plain one that mostly states the place and the time, and one in everyday words.

    The plain one comes first, as prompts for evaluation are taken from it.
    """
    return description.prompt or _caption(description, random, 0.95), varied_caption(description, random)
