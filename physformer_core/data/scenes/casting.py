"""Who may appear where: which places suit a concept, at which times, and what may stand in which relation."""

from __future__ import annotations

import hashlib
from random import Random

from physformer_core.data.scenes.backdrops import PLACE_TIMES
from physformer_core.data.scenes.concepts import Concept, art_shape, concept_named, load_concepts
from physformer_core.data.scenes.painter import COLOURS, rgb

_PLACES: dict[str, dict[str, float]] = {
    "land": {"grass": 5, "forest": 2, "beach": 1, "desert": 1, "snow": 1, "mountains": 1.5, "street": 1},
    "face": {"grass": 3, "forest": 1, "beach": 1, "snow": 1, "mountains": 1, "street": 1, "room": 1},
    "air": {
        "sky": 3,
        "mountains": 2,
        "ocean": 1,
        "city": 1,
        "forest": 1,
        "grass": 1,
        "desert": 0.5,
        "beach": 0.5,
        "futuristic city": 0.5,
    },
    "under": {"underwater": 1},
    "surface": {"ocean": 1},
    "plant": {"grass": 4, "mountains": 1, "forest": 0.5},
    "thing": {"table": 5, "grass": 0.6},
    "road": {"street": 5, "grass": 1, "desert": 1, "mountains": 1, "snow": 0.5, "beach": 0.5},
    "space": {"space": 1},
    "sky": {"sky": 3, "mountains": 1, "ocean": 1, "city": 1, "grass": 1},
    "building": {"grass": 4, "mountains": 1, "snow": 1, "desert": 0.7, "beach": 0.7},
    "ground": {"grass": 2, "forest": 1, "beach": 1, "desert": 1, "mountains": 1},
    "person": {
        "grass": 2,
        "street": 2,
        "beach": 1,
        "room": 1,
        "snow": 0.5,
        "mountains": 1,
        "forest": 0.5,
        "futuristic city": 0.5,
    },
}

_OWN_PLACES: dict[str, dict[str, float]] = {
    "penguin": {"snow": 4, "beach": 1},
    "polar bear": {"snow": 1},
    "seal": {"snow": 1, "beach": 1},
    "mammoth": {"snow": 2, "grass": 1},
    "camel": {"desert": 1},
    "scorpion": {"desert": 1},
    "cactus": {"desert": 1},
    "palm tree": {"beach": 2, "desert": 1},
    "lotus": {"ocean": 1},
    "duck": {"ocean": 2, "grass": 2},
    "goose": {"ocean": 1, "grass": 2},
    "crab": {"beach": 2, "underwater": 1},
    "lobster": {"beach": 1, "underwater": 1},
    "seashell": {"beach": 3, "underwater": 1},
    "potted plant": {"room": 2, "table": 1},
    "bouquet": {"table": 1},
    "christmas tree": {"room": 1, "snow": 1},
    "snowman": {"snow": 1},
    "snowflake": {"sky": 1, "snow": 1},
    "wave": {"ocean": 1},
    "mermaid": {"underwater": 2, "beach": 1},
    "snowboarder": {"snow": 1},
    "astronaut": {"space": 3, "room": 1},
    "alien": {"space": 2, "grass": 1, "futuristic city": 1},
    "robot": {"futuristic city": 2, "room": 1, "street": 1, "grass": 1},
    "rocket": {"space": 3, "sky": 2, "mountains": 1, "city": 1, "futuristic city": 1},
    "ufo": {"space": 2, "sky": 1, "city": 1, "grass": 1, "futuristic city": 1},
    "star": {"sky": 1, "space": 1},
    "anchor": {"underwater": 1, "beach": 1},
    "soccer ball": {"grass": 1},
    "baseball": {"grass": 1},
    "cat": {"grass": 3, "room": 3, "street": 1, "snow": 0.5, "beach": 0.5, "forest": 0.5},
    "dog": {"grass": 3, "room": 2, "street": 1, "snow": 0.5, "beach": 1, "forest": 0.5},
    "dragon": {"mountains": 4, "sky": 2, "ocean": 1, "forest": 1, "city": 1, "desert": 0.5},
    "train": {"grass": 1, "mountains": 1, "desert": 1},
    "fast train": {"grass": 1, "mountains": 1},
}

_OWN_TIMES: dict[str, tuple[str, ...]] = {
    "sun": ("day",),
    "moon": ("night",),
    "crescent moon": ("night",),
    "star": ("night",),
    "rainbow": ("day",),
    "cloud": ("day",),
}

SUPPORTS = (
    "cardboard box", "couch", "bed", "rock", "log", "car", "skateboard", "stack of books", "drum", "elephant", "horse",
    "cow", "turtle", "gift", "chair", "suitcase", "bus", "pig", "hippopotamus", "boat",
)  # fmt: skip
"""Things with a top on which something small can stand."""

_UPPERS = (
    "cloud",
    "rain cloud",
    "rainbow",
    "moon",
    "sun",
    "balloon",
    "umbrella",
    "star",
    "airplane",
    "ufo",
    "tree",
    "palm tree",
    "bird",
    "kite",
)
_SCREENS = (
    "rock",
    "cardboard box",
    "log",
    "couch",
    "car",
    "gift",
    "potted plant",
    "suitcase",
    "cactus",
    "pine tree",
    "snowman",
)


def pick(random: Random, weights: dict[str, float]) -> str:
    """A key, drawn by weight."""
    return random.choices(list(weights), list(weights.values()))[0]


def pick_concept(
    random: Random,
    *,
    lives: tuple[str, ...] = (),
    sizes: tuple[int, int] = (1, 6),
    category: tuple[str, ...] = (),
    not_name: str = "",
) -> Concept:
    """A concept drawn by weight among those that match."""
    pool = [
        concept
        for concept in load_concepts()
        if (not lives or concept.lives in lives)
        and (not category or concept.category in category)
        and sizes[0] <= concept.size <= sizes[1]
        and concept.name != not_name
    ]
    return random.choices(pool, [concept.weight for concept in pool])[0]


def places_of(concept: Concept) -> dict[str, float]:
    """Places that suit a concept, with sampling weights."""
    if concept.name in _OWN_PLACES:
        return _OWN_PLACES[concept.name]
    places = _PLACES[concept.lives]
    if concept.lives == "thing" and concept.size >= 4:
        return {"room": 5, "grass": 1}
    if concept.lives == "land" and concept.size <= 3:
        return places | {"room": 1}
    if concept.lives == "plant" and concept.size == 2:
        return places | {"table": 1.5}
    return places


def times_of(concept: Concept | None, place: str) -> tuple[str, ...]:
    """Times of day at which a concept can be seen in a place."""
    times = tuple(
        time
        for time in PLACE_TIMES[place]
        if concept is None or time in _OWN_TIMES.get(concept.name, PLACE_TIMES[place])
    )
    if concept is not None and sum(art_shape(concept.art).colour) < 240:
        times = tuple(time for time in times if time != "night") or times  # a dark thing can't be seen at night
    return times


def pick_time(random: Random, concept: Concept | None, place: str) -> str:
    weights = {"day": 0.6, "sunset": 0.2, "night": 0.2}
    return pick(random, {time: weights[time] for time in times_of(concept, place)} or {"day": 1.0})


def paint_of(random: Random, concept: Concept) -> str | None:
    """A colour to paint a concept in, or ``None`` for its own."""
    if not concept.paint or random.random() < 0.65:
        return None
    return random.choice([name for name in COLOURS if name not in (concept.paint[0], "grey")])


def background_for(random: Random, concept: Concept, colour: str | None) -> str:
    """A plain colour against which a concept can be seen; white more often than the others."""
    own = rgb(COLOURS[colour]) if colour else art_shape(concept.art).colour

    def distance(name: str) -> float:
        return sum((a - b) ** 2 for a, b in zip(rgb(COLOURS[name]), own, strict=True)) ** 0.5

    fit = {name: (3.0 if name == "white" else 1.0) for name in COLOURS if distance(name) > 85 and name != colour}
    return pick(random, fit)


def pair_rank(first: Concept, second: Concept) -> float:
    """A number in [0, 1) that belongs to two concepts, in either order: pairs below a share are the ones held out."""
    names = "|".join(sorted((first.name, second.name)))
    return int.from_bytes(hashlib.sha256(f"physformer-pair:{names}".encode()).digest()[:7], "big") / 2**56


def pick_pair(random: Random, relation: str, ranks: tuple[float, float] = (0.0, 1.0)) -> tuple[Concept, Concept]:
    """Subject and object of a relation other than being in a cage, whose `pair_rank` is within [from, to)."""
    low, high = ranks
    while True:
        pair = _pick_pair(random, relation)
        if low <= pair_rank(*pair) < high:
            return pair


def _pick_pair(random: Random, relation: str) -> tuple[Concept, Concept]:
    """Subject and object of a relation other than being in a cage."""
    animals = ("land", "face", "air")
    if relation == "over":
        subject = pick_concept(random, lives=("air",))
        return subject, pick_concept(
            random, lives=("land", "building", "plant", "road", "surface"), sizes=(3, 6), not_name=subject.name
        )
    if relation == "under":
        other = concept_named(random.choice(_UPPERS))
        return pick_concept(
            random, lives=("land", "road", "building", "person", "face"), sizes=(2, 5), not_name=other.name
        ), other
    if relation == "on":
        other = concept_named(random.choice(SUPPORTS))
        lives = ("land", "thing", "face", "air") if other.lives != "surface" else ("land", "face")
        return pick_concept(random, lives=lives, sizes=(2, 3), not_name=other.name), other
    if relation == "in front of":
        subject = pick_concept(random, lives=("land", "road", "person", "face"), sizes=(2, 5))
        return subject, pick_concept(random, lives=("building", "plant"), sizes=(6, 6))
    if relation == "behind":
        subject = pick_concept(random, lives=("land", "person", "face"), sizes=(3, 6))
        return subject, concept_named(random.choice(_SCREENS))
    first = pick_concept(random, lives=("land", "face", "thing", "road", "plant", "person", "building"))
    same = {"thing": ("thing",), "road": ("road", "person", "building"), "building": ("plant", "road", "land")}
    return first, pick_concept(
        random, lives=same.get(first.lives, (*animals[:2], "plant", "person")), not_name=first.name
    )


def pick_captive(random: Random) -> Concept:
    """Something to keep in a cage: a bird in every third picture, else mostly an animal."""
    if random.random() < 0.34:
        return random.choices(
            [
                concept_named(name)
                for name in ("bird", "parrot", "owl", "black bird", "dove", "chicken", "chick", "eagle")
            ],
            [8, 3, 2, 2, 2, 1, 1, 2],
        )[0]
    if random.random() < 0.15:
        return pick_concept(random, lives=("person", "face", "under", "thing"), sizes=(2, 4))
    return pick_concept(random, lives=("land", "face", "air"), category=("animal",))
