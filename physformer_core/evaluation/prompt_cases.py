"""The prompts of `prompt_accuracy`, each with the scene that it describes: its ceiling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physformer_core.data.scenes import compose_scene, load_concepts
from physformer_core.data.scenes.composer import RELATIONS, Scene
from physformer_core.data.scenes.concepts import with_article
from physformer_core.errors import ConfigError

CASE_SEED = 72_000_000
"""Collections from this number on give the prompts; no training set should use them."""

_RELATION_OFFSET = 1_000_000
_PHRASED_OFFSET = 2_000_000


@dataclass(frozen=True)
class PromptCase:
    """A prompt and the scene it describes.

    Args:
        prompt: One of the scene's captions; of "phrased" cases, words that none of them has.
        scene: The scene.
        subject: Row of its main concept in the list of concepts.
        other: Row of the other thing; None for a single subject or a cage.
        kind: "plain", "place" or "phrased" for a single subject, else the relation.
    """

    prompt: str
    scene: Scene
    subject: int
    other: int | None
    kind: str


def chosen_concepts(text: str) -> list[int]:
    """Rows of the concepts that a person names.

    Args:
        text: "all", "everyday" (those that scenes show most often) or names, separated by commas.

    Raises:
        ConfigError: One is unknown.
    """
    concepts = load_concepts()
    if text == "all":
        return list(range(len(concepts)))
    if text == "everyday":
        return [row for row, concept in enumerate(concepts) if concept.weight > 1]
    rows = {concept.name: row for row, concept in enumerate(concepts)}
    named = [name.strip().lower() for name in text.split(",") if name.strip()]
    if unknown := [name for name in named if name not in rows]:
        near = difflib.get_close_matches(unknown[0], rows, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "all, everyday, or names such as cat,dog"
        raise ConfigError(f"no concept is called '{unknown[0]}'", hint=hint)
    if not named:
        raise ConfigError("no concept is named", hint="all, everyday, or names such as cat,dog")
    return sorted({rows[name] for name in named})


def single_cases(count: int, seed: int, *, aspect: float, concepts: Sequence[int] | None = None) -> list[PromptCase]:
    """Prompts of single subjects, alternately on a plain colour and in a place; every concept once before any twice.

    Args:
        count: How many.
        seed: Decides concepts and scenes.
        aspect: Width divided by height.
        concepts: Rows of the concepts that may be subjects; all by default. Pictures are compared with all anyway.
    """
    names = [concept.name for concept in load_concepts()]
    pool = np.arange(len(names)) if concepts is None else np.asarray(concepts)
    order = np.random.default_rng([CASE_SEED, seed])
    rows: list[int] = []
    while len(rows) < count:
        rows += pool[order.permutation(len(pool))].tolist()
    cases = []
    for number, row in enumerate(rows[:count]):
        kind = "place" if number % 2 else "single"
        scene = compose_scene(
            CASE_SEED + seed,
            number,
            aspect=aspect,
            kind="setting" if kind == "place" else "single",
            concept=names[row],
        )
        cases.append(PromptCase(scene.captions[0], scene, row, None, "place" if kind == "place" else "plain"))
    return cases


PHRASINGS = (
    "a cute {} sitting there and looking at me",
    "can you draw me {a}?",
    "close-up of {a}, highly detailed",
    "one {} please, nice and big",
    "{a}, simple flat icon",
    "I would like to see {a}",
    "my favourite {}",
    "{} clipart",
    "the most beautiful {} in the world",
    "a single {}, centered, 4k",
    "show me what {a} looks like",
    "sticker of a happy little {}",
    "{a} all by itself",
    "minimalist poster with {a}",
    "something like {a}, but cartoonish",
    "just {a}",
    "portrait of {a}, bright colours",
    "big {} in the middle",
    "{a} for my daughter's birthday card",
    "old {}, soft light",
)
"""Ways in which people ask, none of them used in captions of scenes: ``{}`` is the noun, ``{a}`` with its article."""


def phrased_cases(count: int, seed: int, *, aspect: float) -> list[PromptCase]:
    """Prompts of single subjects in words that no caption has: other sentences, and a synonym where there is one.

    Args:
        count, seed, aspect: As in `single_cases`.
    """
    concepts = load_concepts()
    order = np.random.default_rng([CASE_SEED, seed, _PHRASED_OFFSET])
    rows: list[int] = []
    while len(rows) < count:
        rows += order.permutation(len(concepts)).tolist()
    cases = []
    for number, row in enumerate(rows[:count]):
        concept = concepts[row]
        scene = compose_scene(
            CASE_SEED + seed, _PHRASED_OFFSET + number, aspect=aspect, kind="single", concept=concept.name
        )
        # A painted colour must be asked for, as a person would who wants it.
        phrase = concept.synonyms[number % len(concept.synonyms)] if concept.synonyms else concept.phrase
        article, noun = with_article(phrase)
        if colour := scene.subjects[0].colour:
            noun = f"{colour} {noun}"
            article = article if article in ("some", "the") else with_article(noun)[0]
        words = PHRASINGS[number % len(PHRASINGS)].replace("{a}", f"{article} {noun}").replace("{}", noun)
        cases.append(PromptCase(words, scene, row, None, "phrased"))
    return cases


def relation_cases(
    count: int, seed: int, *, aspect: float, pair_ranks: tuple[float, float] = (0.0, 1.0)
) -> list[PromptCase]:
    """Prompts of two things, each relation in turn.

    Args:
        count, seed, aspect: As in `single_cases`.
        pair_ranks: Only pairs of such ranks (`compose_scene`): those that a training set held out, or the others. Of a
            bird in a cage there is no pair, so that relation is left out where a choice is made.
    """
    names = [concept.name for concept in load_concepts()]
    relations = [relation for relation in RELATIONS if relation != "in" or pair_ranks == (0.0, 1.0)]
    cases = []
    for number in range(count):
        relation = relations[number % len(relations)]
        scene = compose_scene(
            CASE_SEED + seed, _RELATION_OFFSET + number, aspect=aspect, relation=relation, pair_ranks=pair_ranks
        )
        subject, other = scene.subjects[0].concept, scene.subjects[1].concept
        # In a cage nothing is between; the cage is no concept of its own.
        row = None if relation == "in" else names.index(other)
        cases.append(PromptCase(scene.captions[0], scene, names.index(subject), row, relation))
    return cases
