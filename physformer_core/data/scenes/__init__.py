"""Captioned scenes composed from openly licensed vector art, sharp at any resolution."""

from physformer_core.data.scenes.composer import FAMILIAR_PROMPTS, PlacedSubject, Scene, compose_scene
from physformer_core.data.scenes.concepts import Concept, concept_named, load_concepts
from physformer_core.data.scenes.fetch import fetch_scenes
from physformer_core.data.scenes.render import render_svg

__all__ = [
    "FAMILIAR_PROMPTS",
    "Concept",
    "PlacedSubject",
    "Scene",
    "compose_scene",
    "concept_named",
    "fetch_scenes",
    "load_concepts",
    "render_svg",
]
