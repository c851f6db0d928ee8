"""The checkpoint that comes with the package: small, safe, and able to tell prompts apart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from physformer_core.checkpoints import find_checkpoint, load_pipeline, shipped_checkpoint
from physformer_core.pipeline import PhysFormerPipeline


@pytest.fixture(scope="module")
def pipeline() -> PhysFormerPipeline:
    import torch

    return load_pipeline(None, device="cpu", dtype=torch.float32)


def test_it_is_within_40_megabytes_and_holds_no_pickle() -> None:
    files = [path for path in shipped_checkpoint().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}


def test_its_card_names_the_weights_and_the_licence() -> None:
    card = (shipped_checkpoint() / "README.md").read_text(encoding="utf-8")
    assert find_checkpoint(None).sha256 in card
    assert "CC-BY 4.0" in card and "Twemoji" in card


def test_it_is_the_preset_of_its_name() -> None:
    from physformer_core.config import load_preset

    config = json.loads((shipped_checkpoint() / "transformer" / "config.json").read_text(encoding="utf-8"))
    model = load_preset("nano").model
    assert {key: config[key] for key in model} == model


@pytest.mark.parametrize(
    ("prompt", "channel"),
    [("an apple on a green background", 1), ("an apple on a blue background", 2), ("a cat on a red background", 0)],
)
def test_backgrounds_have_the_colour_that_is_asked_for(pipeline: PhysFormerPipeline, prompt: str, channel: int) -> None:
    picture = pipeline(prompt, height=64, width=64, seeds=1, output_type="np").images[0]
    border = np.concatenate([picture[:6].reshape(-1, 3), picture[:, :6].reshape(-1, 3), picture[:, -6:].reshape(-1, 3)])
    colour = np.median(border, axis=0)
    assert colour.argmax() == channel, colour


def test_sky_is_above_grass(pipeline: PhysFormerPipeline) -> None:
    prompts = [
        "a house on the grass during the day",
        "a house on the grass at night",
    ] * 2  # left open, it may be sunset
    drawn = pipeline(prompts, height=64, width=64, seeds=[0, 1, 2, 3], output_type="np")
    for picture in drawn.images:
        above, below = picture[:12].mean((0, 1)), picture[-12:].mean((0, 1))
        assert above.argmax() == 2, "the sky is blue, by day and by night"
        assert below.argmax() == 1, "the grass is green"


def test_work_and_seams_count_the_patches_of_each_level(pipeline: PhysFormerPipeline) -> None:
    from physformer_core.batching import PictureRequest, Planner

    levels = Planner(find_checkpoint(None)).levels(PictureRequest("a cat", 0, 0, 1280, 720))
    assert [level.tokens for level in levels[:2]] == [8 * 14, 8 * 14]  # 32x56 by patches of 4, 64x112 by those of 8
    first, second = pipeline.level_sizes(720, 1280)[:2]
    assert [pipeline.patch_side(size) for size in (first, second)] == pytest.approx([4 * 1280 / 56, 8 * 640 / 56])
