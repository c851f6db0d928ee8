"""Prompts to pictures with a tiny random network: sizes, batches, guidance, callbacks, saving, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from physformer_core.codec import AutoencoderCodec
from physformer_core.errors import ConfigError, DeviceError, PromptError, SizeError
from physformer_core.flow import DEFAULT_STEPS
from physformer_core.flow.guidance import Guidance
from physformer_core.flow.solver import steps_per_level
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.pipeline import PhysFormerPipeline, StepEvent
from physformer_core.text import PromptEmbeddings, TextEncoder

WIDTH = 12


class WordEncoder(TextEncoder):
    """Every word is a token, whose embedding follows from its letters."""

    name, hidden_size, pooled_size, max_tokens, fingerprint = "words", WIDTH, WIDTH, 64, "0" * 64

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt.split()) for prompt in prompts]

    def encode(self, prompts: list[str], *, max_length: int | None = None) -> PromptEmbeddings:
        self.calls.append(prompts)
        longest = max(self.token_counts(prompts))
        tokens, mask = torch.zeros(len(prompts), longest, WIDTH), torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.split()):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                tokens[row, column] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
                mask[row, column] = True
        return PromptEmbeddings(tokens, mask, tokens.sum(1) / mask.sum(1, keepdim=True) ** 0.5)


@pytest.fixture(scope="module")
def network() -> PhysFormerTransformer2DModel:
    """Random, with open gates of the size that training gives them."""
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(
        patch_size=8, hidden_size=64, num_layers=2, num_heads=4, bottleneck=32, text_dim=WIDTH, pooled_dim=WIDTH,
        text_hidden_size=32, num_text_layers=1, null_tokens=3,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "proj_out" in name:
                parameter.normal_(0, 0.3 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture
def pipeline(network: PhysFormerTransformer2DModel) -> PhysFormerPipeline:
    pipeline = PhysFormerPipeline(network, text_encoder_name="words", prompt_tokens=8)
    pipeline._text_encoder = WordEncoder()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: PhysFormerPipeline, prompt: str | list[str] = "a bird in a cage", **more: Any) -> np.ndarray:
    """Pictures as float arrays, small and in few steps unless said otherwise."""
    settings = {"height": 44, "width": 68, "num_inference_steps": [3, 2], "output_type": "np", "seeds": 7}
    return pipeline(prompt, **{**settings, **more}).images


def test_the_same_call_draws_the_same_bytes(pipeline: PhysFormerPipeline) -> None:
    first, again = draw(pipeline), draw(pipeline)
    assert first.shape == (1, 44, 68, 3) and first.std() > 0.05
    assert np.array_equal(first, again)
    assert not np.array_equal(first, draw(pipeline, seeds=8))
    assert not np.array_equal(first, draw(pipeline, indices=[1]))
    assert np.abs(first - draw(pipeline, "two cats on a sofa")).max() > 0.02


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "adaptive"])
def test_a_picture_of_a_batch_is_the_picture_alone(
    pipeline: PhysFormerPipeline, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("physformer_core.flow.solver.MIN_STEP", 1 / 12)
    prompts = ["a bird in a cage", "cat", "a very long prompt about some cars"]
    seeds, indices, more = [7, 7, 9], [0, 1, 0], {"solver": solver, "negative_prompt": "blur"}
    if solver == "adaptive":
        more |= {"height": 40, "width": 32}
    together = draw(pipeline, prompts, seeds=seeds, indices=indices, **more)
    for k, prompt in enumerate(prompts):
        alone = draw(pipeline, prompt, seeds=[seeds[k]], indices=[indices[k]], **more)
        assert np.abs(together[k] - alone[0]).max() <= 2 / 255
        assert np.abs(together[k] - together[(k + 1) % 3]).max() > 2 / 255


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (64, 64), (65, 63), (7, 150), (201, 333)])
def test_any_size(pipeline: PhysFormerPipeline, height: int, width: int) -> None:
    image = pipeline("cat", height=height, width=width, num_inference_steps=[1, 1], seeds=1).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (width, height) and image.mode == "RGB"


def test_output_types_agree(pipeline: PhysFormerPipeline) -> None:
    array = draw(pipeline)
    tensor = draw(pipeline, output_type="pt")
    pil = np.asarray(draw(pipeline, output_type="pil")[0])
    assert array.min() >= 0 and array.max() <= 1 and tensor.shape == (1, 3, 44, 68)
    assert np.allclose(tensor.permute(0, 2, 3, 1).numpy() / 2 + 0.5, array, atol=1e-6)
    assert np.array_equal(pil, (array[0] * 255).round().astype(np.uint8))
    settings = {"height": 44, "width": 68, "num_inference_steps": [3, 2], "seeds": 7, "output_type": "np"}
    assert np.array_equal(pipeline("a bird in a cage", return_dict=False, **settings)[0], array)


def test_guidance(pipeline: PhysFormerPipeline) -> None:
    asked: list[tuple[int, bool]] = []
    network = pipeline.transformer

    def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _z, _, prompt, level = args[:4]
        asked.append((int(level[0]), torch.equal(prompt.pooled[0], network.null_pooled)))

    hook = network.register_forward_pre_hook(listen, with_kwargs=True)
    plain = draw(pipeline, guidance=1.0)
    assert asked == [(0, False)] * 3 + [(1, False)] * 2  # off: the network runs once
    asked.clear()
    guided = draw(pipeline, guidance=4.0)
    assert asked == [(0, False), (0, True)] * 3 + [(1, False)] * 2  # and at fine levels too
    asked.clear()
    draw(pipeline, guidance=Guidance(scale=4.0, interval=(0.3, 0.6), fine_levels=True))
    assert sum(unconditional for level, unconditional in asked if level == 0) == 1
    assert sum(unconditional for level, unconditional in asked if level == 1) == 1
    hook.remove()
    assert np.abs(guided - plain).max() > 2 / 255
    negative = draw(pipeline, negative_prompt="two cats")
    assert np.abs(negative - guided).max() > 2 / 255
    # Guidance away from the prompt itself leads nowhere.
    assert np.abs(draw(pipeline, negative_prompt="a bird in a cage") - plain).max() <= 1 / 255


def test_detail_is_what_finer_levels_add(pipeline: PhysFormerPipeline) -> None:
    levels: list[torch.Tensor] = []
    size = pipeline.level_sizes(64, 64)[1]

    def detail_of(factor: float) -> torch.Tensor:
        """What level 1 adds to level 0, in one step."""
        levels.clear()
        draw(
            pipeline, height=64, width=64, num_inference_steps=[2, 1], guidance=Guidance(scale=1.0, detail=factor),
            callback_on_level_end=lambda event: levels.append(event.field),
        )  # fmt: skip
        coarse, fine = levels
        return fine - pipeline.pyramid.coarse_for(coarse, size)

    plain = detail_of(1.0)
    assert plain.std() > 0.01 and detail_of(0.0).abs().max() < 1e-5
    assert torch.allclose(detail_of(1.5), 1.5 * plain, atol=1e-5)
    # A network that predicts velocities is sharpened by way of the sample that they lead to.
    pipeline.flow = dataclasses.replace(pipeline.flow, prediction="velocity")
    plain = detail_of(1.0)
    assert plain.std() > 0.01 and torch.allclose(detail_of(1.5), 1.5 * plain, atol=2e-3)


def test_predictions_of_the_first_levels_may_be_averaged(pipeline: PhysFormerPipeline) -> None:
    def levels(shifted: int, **more: Any) -> list[torch.Tensor]:
        pipeline.flow = dataclasses.replace(pipeline.flow, shifted_levels=shifted)
        found: list[torch.Tensor] = []
        draw(pipeline, height=120, width=180, callback_on_level_end=lambda event: found.append(event.field), **more)
        return found

    plain, first, both = (levels(count) for count in (0, 1, 2))
    assert len(plain) == 4
    assert torch.equal(plain[0], first[0]) and not torch.allclose(plain[1], first[1], atol=1e-3)
    assert torch.equal(first[1], both[1]) and not torch.allclose(first[2], both[2], atol=1e-3)
    given = {1: first[1]}
    assert not torch.allclose(levels(0, given_levels=given)[-1], levels(2, given_levels=given)[-1], atol=1e-3)
    # The level's own network is asked, where it lies in the picture; a picture still does not depend on its company.
    company = levels(2, prompt=["two cats", "a bird in a cage"], seeds=[3, 7])
    torch.testing.assert_close(company[2][1:], both[2], atol=1e-5, rtol=0)


def test_level_0_may_settle(pipeline: PhysFormerPipeline) -> None:
    def levels(settling: int, **more: Any) -> list[torch.Tensor]:
        pipeline.flow = dataclasses.replace(pipeline.flow, settling=settling)
        found: list[torch.Tensor] = []
        draw(pipeline, callback_on_level_end=lambda event: found.append(event.field), **more)
        return found

    plain, once, often = (levels(count)[0] for count in (0, 1, 6))
    assert not torch.allclose(plain, once, atol=1e-3) and not torch.allclose(once, often, atol=1e-3)
    assert torch.equal(often, levels(6)[0]), "its noise comes from the seed"
    assert not torch.allclose(often, levels(6, seeds=8)[0], atol=1e-3)
    company = levels(6, prompt=["two cats", "a bird in a cage"], seeds=[3, 7])
    torch.testing.assert_close(company[0][1:], often, atol=1e-5, rtol=0)
    # Levels that are given are taken as they are, and so is what finer ones make of them.
    given = {0: plain}
    assert torch.equal(levels(6, given_levels=given)[-1], levels(0, given_levels=given)[-1])
    for prediction in ("velocity", "sample"):
        pipeline.flow = dataclasses.replace(pipeline.flow, prediction=prediction)
        assert np.isfinite(levels(2)[0].numpy()).all()


def test_a_picture_that_is_not_finite_is_refused(pipeline: PhysFormerPipeline) -> None:
    with torch.no_grad():
        bias = pipeline.transformer.final_layer.proj_out.bias
        before = bias.clone()
        bias.fill_(float("nan"))
    with pytest.raises(DeviceError, match="left the range of float32"):
        draw(pipeline)
    with torch.no_grad():
        bias.copy_(before)


def test_prompts_are_encoded_once_and_alone(pipeline: PhysFormerPipeline) -> None:
    draw(pipeline, ["cat", "a red car", "cat"], negative_prompt="cat", num_inference_steps=[1, 1])
    encoder = pipeline.prompt_encoder
    assert isinstance(encoder, WordEncoder)
    assert encoder.calls == [["cat"], ["a red car"], ["cat"]]
    with torch.no_grad():
        encoded = pipeline.encode_prompt(["cat", None, "a red car"])
    network = pipeline.transformer
    assert torch.equal(encoded.pooled[1], network.null_pooled)
    with torch.no_grad():
        null = network.encode_prompt(
            network.null_prompt[None], torch.ones(1, 3, dtype=torch.bool), network.null_pooled[None]
        )
    for pair, expected in zip(encoded.key_values, null.key_values, strict=True):
        assert torch.allclose(pair.value[1, :, :3], expected.value[0], atol=1e-5)


def test_callbacks_see_every_step_and_level(pipeline: PhysFormerPipeline) -> None:
    steps: list[StepEvent] = []
    levels: list[StepEvent] = []
    draw(pipeline, ["cat", "dog"], callback_on_step_end=steps.append, callback_on_level_end=levels.append)
    assert [(e.level, e.step, e.steps, e.levels) for e in steps] == [
        (0, 1, 3, 2), (0, 2, 3, 2), (0, 3, 3, 2), (1, 1, 2, 2), (1, 2, 2, 2),
    ]  # fmt: skip
    assert [(e.level, e.step, e.steps) for e in levels] == [(0, 3, 3), (1, 2, 2)]
    assert levels[0].field.shape == (2, 3, 32, 40) and levels[1].field.shape == (2, 3, 48, 72)
    assert torch.equal(steps[-1].field, levels[-1].field)
    preview = pipeline.postprocess(levels[0].field, levels[0].size.height, levels[0].size.width)
    assert preview[0].size == (40, 26)


def test_levels_that_are_given_are_not_drawn(pipeline: PhysFormerPipeline) -> None:
    fields: dict[int, torch.Tensor] = {}

    def keep(event: StepEvent) -> None:
        fields[event.level] = event.field.clone()

    settings = {"height": 72, "width": 100, "seeds": 3, "output_type": "pt", "num_inference_steps": 2}
    whole = pipeline("a b", **settings, callback_on_level_end=keep).images
    last = max(fields)
    assert last > 0
    given = {0: fields.pop(0)}
    kept = dict(fields)
    fields.clear()
    again = pipeline("a b", **settings, callback_on_level_end=keep, given_levels=given).images
    assert torch.equal(whole, again) and fields.keys() == kept.keys()
    other = pipeline("a b", **settings, given_levels={0: -given[0]}).images
    assert (other - whole).abs().max() > 0.1
    fields.clear()
    finished = pipeline("a b", **settings, callback_on_level_end=keep, given_levels={last: kept[last]}).images
    assert torch.equal(finished, whole) and not fields  # nothing below it is drawn for nothing
    with pytest.raises(SizeError, match="no level 9"):
        pipeline("a b", **settings, given_levels={9: given[0]})
    with pytest.raises(SizeError, match="level 0 was given as"):
        pipeline("a b", **settings, given_levels={0: given[0][..., :-1]})


def test_steps_per_level() -> None:
    assert steps_per_level(None, 6) == [5, 1, 1, 1, 1, 1]
    assert steps_per_level(None, 1) == [DEFAULT_STEPS[0]]
    assert steps_per_level(40, 5) == [40, 1, 1, 1, 1]
    assert steps_per_level(1, 3) == [1, 1, 1]
    assert steps_per_level([9, 2], 4) == [9, 2, 2, 2]
    for wrong in (0, -5, [], [3, 0]):
        with pytest.raises(ConfigError):
            steps_per_level(wrong, 3)


def test_saved_and_loaded_it_draws_the_same(pipeline: PhysFormerPipeline, tmp_path: Path) -> None:
    flow = {"path": "cosine", "start_noise": 0.4, "coarse_noise": 0.1}
    original = PhysFormerPipeline(pipeline.transformer, text_encoder_name="words", flow=flow, prompt_tokens=9)
    original._text_encoder = WordEncoder()
    original.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["flow"] == flow and index["prompt_tokens"] == 9
    loaded = PhysFormerPipeline.from_pretrained(tmp_path)
    assert (loaded.config.text_encoder_name, loaded.config.codec_name) == ("words", "pixels")
    assert loaded.config.prompt_tokens == 9 and loaded.flow == original.flow
    assert loaded.flow.path == "cosine" and loaded.pyramid == original.pyramid
    loaded._text_encoder = WordEncoder()
    assert np.array_equal(draw(loaded), draw(original))
    assert not np.array_equal(draw(loaded), draw(pipeline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(pipeline: PhysFormerPipeline, tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline.save_pretrained(tmp_path)
    half = PhysFormerPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.transformer.dtype == dtype
    half._text_encoder = WordEncoder()
    difference = np.abs(draw(half) - draw(pipeline))
    assert difference.mean() < 0.02


def test_one_step_along_any_path_lands_on_what_is_predicted(pipeline: PhysFormerPipeline) -> None:
    """All paths begin with the same field at the same time, so they are drawn alike."""

    def drawn(path: str) -> np.ndarray:
        other = PhysFormerPipeline(pipeline.transformer, text_encoder_name="words", flow={"path": path})
        other._text_encoder = WordEncoder()
        return draw(other, num_inference_steps=[1])

    straight = drawn("linear")
    for path in ("cosine", "quadratic", "vp"):
        np.testing.assert_allclose(drawn(path), straight, atol=2e-3)


def test_velocity_prediction_and_other_paths_run(pipeline: PhysFormerPipeline) -> None:
    for flow in ({"prediction": "velocity"}, {"path": "vp"}, {"path": "quadratic"}):
        other = PhysFormerPipeline(pipeline.transformer, text_encoder_name="words", flow=flow)
        other._text_encoder = WordEncoder()
        assert np.isfinite(draw(other)).all()


def test_latents_of_an_autoencoder(pipeline: PhysFormerPipeline) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=3,
    )  # fmt: skip
    pipeline._codec = AutoencoderCodec("tiny", autoencoder)
    assert [(s.height, s.width) for s in pipeline.level_sizes(128, 124)] == [(32, 31), (64, 62)]
    assert draw(pipeline, height=128, width=123).shape == (1, 128, 123, 3)


def test_what_cannot_be_drawn_is_refused(pipeline: PhysFormerPipeline) -> None:
    for prompt, reason in (
        ("", "empty"),
        (["cat", "  "], "empty"),
        ("a b c d e f g h i", "9 tokens"),
        ([], "no prompt"),
    ):
        with pytest.raises(PromptError, match=reason):
            draw(pipeline, prompt)
    with pytest.raises(PromptError, match="empty"):
        draw(pipeline, negative_prompt=" ")
    with pytest.raises(PromptError, match="seeds"):
        draw(pipeline, ["cat", "dog"], seeds=[1])
    for size in ({"height": 0}, {"width": -8}):
        with pytest.raises(SizeError):
            draw(pipeline, **size)
    for wrong in ({"num_inference_steps": 0}, {"solver": "rk4"}, {"guidance": -1.0}, {"output_type": "jpeg"}):
        with pytest.raises(ConfigError):
            draw(pipeline, **wrong)
    for flow in ({"path": "zigzag"}, {"path": "quadratic", "prediction": "velocity"}, {"start_noise": math.nan}):
        with pytest.raises(ConfigError):
            PhysFormerPipeline(pipeline.transformer, flow=flow)


def test_golden_values(pipeline: PhysFormerPipeline) -> None:
    """Noise, levels, guidance and solver together; the weights follow a formula and are the same everywhere."""
    model = PhysFormerTransformer2DModel(**pipeline.transformer.config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            fan = parameter.shape[1] if parameter.ndim == 2 else 4.0
            parameter.copy_(((index * 1.7 + number).sin() * 0.4 * fan**-0.5).float().reshape(parameter.shape))
    golden = PhysFormerPipeline(model.eval(), text_encoder_name="words")
    golden._text_encoder = WordEncoder()
    picture = draw(golden, "a bird in a cage", output_type="pt", seeds=[7], guidance=Guidance(scale=4.0, detail=1.0))[0]
    assert torch.allclose(picture[:, 40, 60:64].flatten(), torch.tensor(GOLDEN), atol=1e-4), picture[:, 40, 60:64]
    assert picture.square().mean().sqrt().item() == pytest.approx(GOLDEN_RMS, abs=1e-4)


GOLDEN = [
    -0.18672, -0.10641, 0.12058, 0.36345, 0.15651, 0.07276,
    0.14194, 0.17342, 0.33752, 0.22998, -0.06826, -0.33968,
]  # fmt: skip
GOLDEN_RMS = 0.18587
