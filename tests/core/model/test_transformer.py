"""The model as a whole: what it conserves, what reaches what, prompts, tiles, and its life as a diffusers model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.model import attention, blocks
from physformer_core.model.attention import PhysFormerAttnProcessor
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel
from physformer_core.model.updates import RESIDUALS

Build = Callable[..., PhysFormerTransformer2DModel]
PromptOf = Callable[..., EncodedPrompt]
BACKENDS = ("reference", "dense", "halo")


def field(height: int, width: int, batch: int = 1, seed: int = 1) -> Tensor:
    """A random field of height x width tokens of 2 x 2 pixels."""
    return torch.randn(batch, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(seed))


def run(
    model: PhysFormerTransformer2DModel, z: Tensor, prompt: EncodedPrompt, *, backend: str = "auto", **more: Any
) -> Tensor:
    """The model's output without gradients, at a time, level and coarse field that are the same everywhere."""
    batch = z.shape[0]
    arguments = {"timestep": torch.full((batch,), 0.3), "level": torch.full((batch,), 2), "coarse_hidden_states": z / 2}
    model.set_attention_backend(backend)  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(z, encoded_prompt=prompt, **{**arguments, **more}).sample
    model.set_attention_backend("auto")
    return output


def token_norms(model: PhysFormerTransformer2DModel, z: Tensor, prompt: EncodedPrompt) -> list[Tensor]:
    """Norms [streams, B, N] of the tokens before the first block and after each."""
    norms: list[Tensor] = []

    def note(streams: tuple[Tensor, ...]) -> None:
        norms.append(torch.stack(streams).norm(dim=-1))

    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, given: note(given[0]))]
    hooks += [block.register_forward_hook(lambda _, given, out: note(out)) for block in model.blocks]
    run(model, z, prompt)
    for hook in hooks:
        hook.remove()
    return norms


# --- energy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_keeps_its_norm_through_the_whole_depth(
    build: Build, prompt_of: PromptOf, dtype: torch.dtype
) -> None:
    model = build(num_layers=8).to(dtype)
    norms = token_norms(model, field(9, 13, batch=2), prompt_of(model, 2))
    assert len(norms) == 9
    assert norms[0].std() > 0.05 * norms[0].mean()  # each is born with its own
    for after in norms[1:]:
        assert ((after - norms[0]) / norms[0]).abs().max() < 1e-5


def test_plain_residual_conserves_nothing(build: Build, prompt_of: PromptOf) -> None:
    model = build(num_layers=8, residual="plain")
    norms = token_norms(model, field(9, 13), prompt_of(model))
    assert ((norms[-1] - norms[0]) / norms[0]).abs().max() > 0.1


@pytest.mark.parametrize("residual", RESIDUALS)
def test_blocks_are_the_identity_when_freshly_initialised(residual: str, prompt_of: PromptOf) -> None:
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(
        patch_size=2,
        hidden_size=64,
        num_heads=4,
        num_layers=2,
        text_hidden_size=32,
        residual=residual,
    )
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    output = run(model, field(7, 5), prompt_of(model))
    assert all(torch.equal(now, first) for streams in seen[1:] for now, first in zip(streams, seen[0], strict=True))
    assert torch.equal(output, torch.zeros_like(output))


# --- backends and locality --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "origin"), [(1, 1, (0, 0)), (5, 17, (0, 0)), (12, 12, (4, 4)), (19, 9, (3, 50))]
)
def test_backends_draw_the_same(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf, height: int, width: int, origin: tuple[int, int]
) -> None:
    prompt = prompt_of(model, 2, tokens=6)
    z = field(height, width, batch=2)
    outputs = [run(model, z, prompt, backend=backend, token_origin=origin) for backend in BACKENDS]
    assert outputs[0].shape == z.shape and outputs[0].std() > 0.1
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() < 2e-5
    assert (run(model, z, prompt, token_origin=origin) - outputs[0]).abs().max() < 2e-5


def reach(length: int, source: int, layers: int, block: int, radius: int) -> set[int]:
    """Tokens along an axis that ``source`` influences after ``layers``, the odd ones of which are shifted."""
    reached = {source}
    for layer in range(layers):
        shift = block // 2 * (layer % 2)
        reached = {
            q for q in range(length) for start in [(q + shift) // block * block - shift]
            if any(start - radius <= k < start + block + radius for k in reached)
        }  # fmt: skip
    return reached


@pytest.mark.parametrize("source", [(0, 0), (13, 20), (31, 7)])
@pytest.mark.parametrize("layers", [1, 2])
def test_influence_ends_at_the_receptive_field(
    build: Build, prompt_of: PromptOf, layers: int, source: tuple[int, int]
) -> None:
    """Not a bit changes beyond it. Without drift the kernel is flat and everything within it does change."""
    height, width, block, radius = 32, 30, 4, 2
    for drift in (True, False):
        model = build(num_layers=layers, block_size=block, radius=radius, drift=drift)
        z, prompt = field(height, width), prompt_of(model)
        other = z.clone()
        other[:, :, 2 * source[0] : 2 * source[0] + 2, 2 * source[1] : 2 * source[1] + 2] += 5
        changed = (run(model, z, prompt, backend="halo") != run(model, other, prompt, backend="halo")).any(1)[0]
        changed = changed.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).any(-1)
        expected = torch.zeros(height, width, dtype=torch.bool)
        rows = torch.tensor(sorted(reach(height, source[0], layers, block, radius)))
        expected[rows[:, None], torch.tensor(sorted(reach(width, source[1], layers, block, radius)))] = True
        assert 0 < expected.sum() < expected.numel()
        assert not (changed & ~expected).any()
        if not drift:
            assert torch.equal(changed, expected)


def interior(start: int, stop: int, length: int, layers: int, block: int, radius: int) -> list[int]:
    """Tokens along an axis of a tile [start, stop) whose whole receptive field is in the tile, or at the true edge."""
    outside = [k for k in range(length) if not start <= k < stop]
    spoilt = set().union(*(reach(length, k, layers, block, radius) for k in outside)) if outside else set()
    return [q for q in range(start, stop) if q not in spoilt]


@pytest.mark.parametrize("box", [(0, 40, 0, 64), (8, 64, 8, 56), (3, 50, 11, 64), (3, 63, 2, 61)])
def test_a_tile_with_margin_is_the_whole_to_the_bit(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf, box: tuple[int, int, int, int]
) -> None:
    """With places that float32 holds exactly, as in a picture of 64 x 64 tokens."""
    top, bottom, left, right = box
    z, prompt = field(64, 64), prompt_of(model)
    whole = run(model, z, prompt, backend="halo")
    tile = run(
        model, z[:, :, 2 * top : 2 * bottom, 2 * left : 2 * right], prompt, backend="halo", token_origin=(top, left),
        place=torch.tensor([[top / 64, left / 64, bottom / 64, right / 64]]),
    )  # fmt: skip
    rows, columns = (interior(a, b, 64, 3, 8, 4) for a, b in ((top, bottom), (left, right)))
    assert len(rows) >= 4 and len(columns) >= 4
    inner = slice(2 * rows[0], 2 * rows[-1] + 2), slice(2 * columns[0], 2 * columns[-1] + 2)
    moved = tuple(slice(s.start - 2 * at, s.stop - 2 * at) for s, at in zip(inner, (top, left), strict=True))
    assert torch.equal(tile[:, :, moved[0], moved[1]], whole[:, :, inner[0], inner[1]])
    assert not torch.equal(tile, whole[:, :, 2 * top : 2 * bottom, 2 * left : 2 * right])  # the margin is needed


def test_a_tile_of_any_picture_is_the_whole_but_for_the_rounding_of_places(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf
) -> None:
    z, prompt = field(45, 20), prompt_of(model)
    whole = run(model, z, prompt, backend="halo")
    place = torch.tensor([[7 / 45, 0, 1.0, 1.0]])
    tile = run(model, z[:, :, 14:], prompt, backend="halo", token_origin=(7, 0), place=place)
    first = interior(7, 45, 45, 3, 8, 4)[0]
    assert (tile[:, :, 2 * (first - 7) :] - whole[:, :, 2 * first :]).abs().max() < 2e-5


def test_chunks_do_not_change_the_picture(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, prompt = field(21, 18, batch=2), prompt_of(model, 2)
    whole = run(model, z, prompt, backend="halo")
    monkeypatch.setattr(attention, "CHUNK_WINDOW_BYTES", 1)
    assert torch.equal(run(model, z, prompt, backend="halo"), whole)
    monkeypatch.setattr(blocks, "FEED_FORWARD_CHUNK", 37)
    assert (run(model, z, prompt, backend="halo") - whole).abs().max() < 2e-5
    assert torch.equal(run(model, z, prompt, backend="halo"), run(model, z, prompt, backend="halo"))


def test_a_picture_does_not_depend_on_its_batch(model: PhysFormerTransformer2DModel, prompt_of: PromptOf) -> None:
    z, prompt = field(9, 20, batch=3), prompt_of(model, 3)
    for backend in BACKENDS:
        together = run(model, z, prompt, backend=backend)
        for k in range(3):
            alone = run(model, z[k : k + 1], prompt.repeat(torch.tensor([k])), backend=backend)
            assert (together[k] - alone[0]).abs().max() < 2e-5


# --- prompts ----------------------------------------------------------------------------------------------------


def test_dropping_a_prompt_is_feeding_the_null_embedding(model: PhysFormerTransformer2DModel) -> None:
    torch.manual_seed(0)
    embeds, pooled = torch.randn(2, 5, 12), torch.randn(2, 10)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        dropped = model.encode_prompt(embeds, mask, pooled, drop=torch.tensor([True, False]))
        null = model.encode_prompt(model.null_prompt[None], torch.ones(1, 2, dtype=torch.bool), model.null_pooled[None])
        kept = model.encode_prompt(embeds[1:], mask[1:], pooled[1:])
    z = field(6, 7)
    one, other = torch.tensor([0]), torch.tensor([1])
    assert torch.equal(dropped.pooled, torch.cat([null.pooled, kept.pooled]))
    assert (run(model, z, dropped.repeat(one)) - run(model, z, null)).abs().max() < 2e-5
    assert (run(model, z, dropped.repeat(other)) - run(model, z, kept)).abs().max() < 2e-5
    assert (run(model, z, null) - run(model, z, kept)).abs().max() > 0.05  # and the prompt does matter
    # What was dropped has no influence at all.
    with torch.no_grad():
        again = model.encode_prompt(embeds.flip(0), mask, pooled.flip(0), drop=torch.tensor([True, False]))
    assert torch.equal(run(model, z, again.repeat(one)), run(model, z, dropped.repeat(one)))
    # A prompt shorter than the null prompt makes room for it.
    with torch.no_grad():
        short = model.encode_prompt(embeds[:, :1], mask[:, :1], pooled, drop=torch.tensor([True, False]))
    assert (run(model, z, short.repeat(one)) - run(model, z, null)).abs().max() < 2e-5


def test_the_null_prompt_learns(build: Build) -> None:
    model = build(num_layers=1)
    prompt = model.encode_prompt(
        torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 10), torch.tensor([True, False])
    )
    model(field(3, 3, batch=2), torch.full((2,), 0.5), prompt, torch.zeros(2).long()).sample.square().sum().backward()
    assert model.null_prompt.grad.abs().sum() > 0 and model.null_pooled.grad.abs().sum() > 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_of_the_text_changes_nothing(model: PhysFormerTransformer2DModel) -> None:
    torch.manual_seed(0)
    embeds, pooled, z = torch.randn(1, 4, 12), torch.randn(1, 10), field(9, 20)
    padded = torch.cat([embeds, 100 * torch.randn(1, 7, 12)], dim=1)
    with torch.no_grad():
        exact = model.encode_prompt(embeds, torch.ones(1, 4, dtype=torch.bool), pooled)
        longer = model.encode_prompt(padded, torch.arange(11)[None] < 4, pooled)
    for backend in BACKENDS:
        assert (run(model, z, exact, backend=backend) - run(model, z, longer, backend=backend)).abs().max() < 2e-5


def test_text_is_computed_once_and_knows_neither_picture_nor_time(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf
) -> None:
    prompt = prompt_of(model)
    before = [(pair.key.clone(), pair.value.clone()) for pair in prompt.key_values]
    for time, height in ((0.1, 3), (0.9, 20)):
        run(model, field(height, 9), prompt, timestep=torch.tensor([time]))
    for (key, value), pair in zip(before, prompt.key_values, strict=True):
        assert torch.equal(key, pair.key) and torch.equal(value, pair.value)
    # No part of the text's way is called when a field goes through.
    called: list[str] = []
    parts = [model.text_embed, *model.text_blocks, model.text_norm]
    parts += [part for block in model.blocks for part in (block.attn.add_k_proj, block.attn.add_v_proj)]
    hooks = [part.register_forward_hook(lambda module, *_: called.append(type(module).__name__)) for part in parts]
    run(model, field(5, 5), prompt)
    for hook in hooks:
        hook.remove()
    assert called == []


@pytest.mark.parametrize("what", ["timestep", "level", "place", "coarse_hidden_states", "class_labels"])
def test_every_condition_is_heard(build: Build, prompt_of: PromptOf, what: str) -> None:
    model = build(num_classes=3)
    z = field(5, 6)
    other = {
        "timestep": torch.tensor([0.8]), "level": torch.tensor([1]), "place": torch.tensor([[0.2, 0.0, 0.6, 1.0]]),
        "coarse_hidden_states": None, "class_labels": torch.tensor([1]),
    }[what]  # fmt: skip
    prompt = prompt_of(model)
    assert (run(model, z, prompt) - run(model, z, prompt, **{what: other})).abs().max() > 1e-3


def test_levels_beyond_the_last_share_it_and_no_class_is_the_null_class(build: Build, prompt_of: PromptOf) -> None:
    model = build(num_classes=3)
    z, prompt = field(4, 4), prompt_of(model)
    assert torch.equal(run(model, z, prompt, level=torch.tensor([3])), run(model, z, prompt, level=torch.tensor([9])))
    assert torch.equal(run(model, z, prompt), run(model, z, prompt, class_labels=torch.tensor([3])))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert torch.equal(run(model, z, prompt), run(model, z, prompt, place=whole))


# --- a diffusers model ------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    loaded = PhysFormerTransformer2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(model.config) or loaded.config.hidden_size == 64
    assert not loaded.training
    z, prompt = field(7, 11), prompt_of(model)
    stored, given = loaded.state_dict(), model.state_dict()
    assert stored.keys() == given.keys() and all(torch.equal(stored[name], given[name]) for name in given)
    # Not to the bit everywhere: some processors' products depend on how weights lie in memory.
    assert torch.allclose(run(loaded, z, prompt_of(loaded)), run(model, z, prompt), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_run_and_keep_the_kernel_exact(
    model: PhysFormerTransformer2DModel, prompt_of: PromptOf, tmp_path: Path, dtype: torch.dtype
) -> None:
    model.save_pretrained(tmp_path)
    half = PhysFormerTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    kept = {name.rsplit(".", 1)[-1] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"drift_logit", "sigma_logit", "text_altitude"}
    assert torch.equal(half.blocks[1].attn.drift_logit, model.blocks[1].attn.drift_logit)
    z = field(13, 21)
    exact = run(model, z, prompt_of(model), backend="reference")
    for backend in ("halo", "dense"):
        output = run(half, z, prompt_of(half), backend=backend)
        assert output.dtype == torch.float32 and torch.isfinite(output).all()
        assert (output - exact).square().mean().sqrt() < (0.02 if dtype == torch.float16 else 0.1) * exact.std()


def test_checkpointed_gradients_are_the_same(build: Build) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        prompt = model.encode_prompt(torch.randn(1, 4, 12), torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 10))
        for backend in ("dense", "halo"):
            model.set_attention_backend(backend)
            output = model(field(9, 10), torch.tensor([0.4]), prompt, torch.tensor([1])).sample
            output.square().mean().backward(retain_graph=True)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, plain in gradients[0].items():
        again = gradients[1][name]
        assert (plain is None) == (again is None), name
        assert plain is None or torch.allclose(plain, again, rtol=1e-5, atol=1e-7), name


def test_attention_processors_are_listed_and_set(build: Build, prompt_of: PromptOf) -> None:
    model = build()
    names = {f"blocks.{i}.attn.processor" for i in range(3)}
    assert set(model.attn_processors) == names
    heard: list[int] = []

    class Listening(PhysFormerAttnProcessor):
        def __call__(self, attn: Any, hidden_states: Tensor, text: Any, plan: Any) -> Tensor:
            heard.append(hidden_states.shape[1])
            return super().__call__(attn, hidden_states, text, plan)

    model.set_attn_processor(Listening())
    z, prompt = field(4, 5), prompt_of(model)
    output = run(model, z, prompt)
    assert heard == [20] * 3
    model.fuse_qkv_projections()  # of no use here, and must do no harm
    assert torch.equal(run(model, z, prompt), output)


def test_lora_is_added_learns_and_is_removed(build: Build, prompt_of: PromptOf) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    z, prompt = field(5, 6), prompt_of(model)
    before = run(model, z, prompt)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    added = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert added == {f"blocks.{i}.attn.{name}" for i in range(3) for name in names}
    assert (run(model, z, prompt) - before).abs().max() > 1e-3
    output = model(z, torch.tensor([0.3]), prompt, torch.tensor([2])).sample
    output.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    model.disable_adapters()
    assert (run(model, z, prompt) - before).abs().max() < 1e-6


def test_attention_can_be_cached_between_steps(build: Build, prompt_of: PromptOf) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    model = build()
    z, prompt = field(5, 6), prompt_of(model)
    exact = run(model, z, prompt, timestep=torch.tensor([0.9]))
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: 0,
        )
    )
    run(model, z, prompt)
    assert model.is_cache_enabled
    assert (run(model, z, prompt, timestep=torch.tensor([0.9])) - exact).abs().max() > 1e-4  # attention was skipped
    model.disable_cache()
    assert torch.equal(run(model, z, prompt, timestep=torch.tensor([0.9])), exact)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 65}, {"hidden_size": 60}, {"block_size": 7}, {"radius": 0}, {"radius": 13}, {"residual": "x"},
        {"max_drift": 1.0}, {"max_sigma": 0.3}, {"max_sigma": 40.0}, {"refiner_channels": -1},
        {"refiner_channels": 4, "patch_size": 3},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_cannot_work_are_refused(build: Build, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(**wrong)


def test_calls_that_cannot_work_are_refused(model: PhysFormerTransformer2DModel, prompt_of: PromptOf) -> None:
    with pytest.raises(ConfigError, match="backend"):
        model.set_attention_backend("fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole patches"):
        run(model, torch.zeros(1, 3, 9, 8), prompt_of(model))


def test_golden_values(model: PhysFormerTransformer2DModel) -> None:
    """Weights and inputs follow formulas: the same numbers on every machine."""
    steps = torch.arange(3 * 22 * 26, dtype=torch.float64)
    z = (steps * 0.7).sin().float().reshape(1, 3, 22, 26)
    embeds = (torch.arange(4 * 12, dtype=torch.float64) * 0.9).cos().float().reshape(1, 4, 12)
    with torch.no_grad():
        prompt = model.encode_prompt(embeds, torch.arange(4)[None] < 3, embeds[:, 0, :10])
    for backend in BACKENDS:
        output = run(model, z, prompt, backend=backend, place=torch.tensor([[0.1, 0.2, 0.7, 0.9]]))
        corner = output[0, :, 9:11, 12:14].flatten()
        assert torch.allclose(corner, torch.tensor(GOLDEN), atol=1e-4), corner.tolist()
        assert output.square().mean().sqrt().item() == pytest.approx(GOLDEN_RMS, abs=1e-4)


GOLDEN = [
    -0.42639,
    2.05781,
    -0.15011,
    -0.4949,
    2.12913,
    -0.10281,
    -0.48126,
    -0.22995,
    -0.11431,
    -1.818,
    -0.56281,
    0.64957,
]
GOLDEN_RMS = 1.29645
