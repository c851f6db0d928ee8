"""A network of its own for level 0: it draws that level alone, shares the text stream, and lives like all the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.model.attention import BACKENDS
from physformer_core.model.network import PhysFormerBaseNetwork
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel

Build = Callable[..., PhysFormerTransformer2DModel]
PromptOf = Callable[..., EncodedPrompt]

BASE = {"patch_size": 4, "base_num_layers": 2, "base_hidden_size": 48, "base_num_heads": 2, "base_patch_size": 2}


def field(height: int, width: int, batch: int = 1) -> Tensor:
    """A field of so many fine patches."""
    return torch.randn(batch, 3, 4 * height, 4 * width, generator=torch.Generator().manual_seed(1))


def draw(model: PhysFormerTransformer2DModel, z: Tensor, prompt: EncodedPrompt, coarse: Tensor | None) -> Tensor:
    batch, level = z.shape[0], 0 if coarse is None else 1
    with torch.no_grad():
        return model(z, torch.full((batch,), 0.3), prompt, torch.full((batch,), level), coarse).sample


def test_it_draws_level_0_alone(build: Build, prompt_of: PromptOf) -> None:
    model, z = build(**BASE), field(5, 6)
    prompt = prompt_of(model)
    before = draw(model, z, prompt, None), draw(model, z, prompt, z / 2)
    assert isinstance(model.base, PhysFormerBaseNetwork) and model.network(base=False) is model
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(1.5)
    after = draw(model, z, prompt_of(model), None), draw(model, z, prompt_of(model), z / 2)
    assert torch.equal(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 0.01
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.down.weight.mul_(1.5)
    assert torch.equal(draw(model, z, prompt_of(model), None), after[0])
    assert (draw(model, z, prompt_of(model), z / 2) - after[1]).abs().max() > 0.01


def test_its_patches_are_its_own(build: Build, prompt_of: PromptOf) -> None:
    model = build(**BASE)
    assert model.base is not None and model.base.sizes.patch_size == 2
    prompt, wide = prompt_of(model), torch.randn(1, 3, 6, 10)  # whole patches of 2, not of 4
    assert draw(model, wide, prompt, None).shape == wide.shape
    with pytest.raises(ValueError, match="not whole patches of 4"):
        draw(model, wide, prompt, wide)


def test_the_refiner_is_that_of_level_0s_network(build: Build, prompt_of: PromptOf) -> None:
    model = build(**BASE, refiner_channels=4)
    assert model.refiner is None and model.base is not None and model.base.refiner is not None
    z, plain = field(3, 4), build(**BASE)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("base.refiner.")}
    plain.load_state_dict(weights)
    assert (draw(model, z, prompt_of(model), None) - draw(plain, z, prompt_of(model), None)).abs().max() > 0.01


def test_a_fresh_one_is_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(
        hidden_size=64, num_heads=4, num_layers=1, text_hidden_size=32, text_dim=12, pooled_dim=10, **BASE
    )
    z = field(4, 4, batch=2)
    prompt = model.encode_prompt(torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 10))
    output = model(z, torch.rand(2), prompt, torch.zeros(2, dtype=torch.long)).sample
    assert torch.equal(output, torch.zeros_like(z))
    (output - z).square().mean().backward()
    assert model.base is not None and model.base.final_layer.proj_out.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.blocks.parameters())


def test_prompts_can_be_encoded_for_some_levels_alone(build: Build, prompt_of: PromptOf) -> None:
    model, z = build(**BASE), field(4, 5)
    embeds = torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 10)
    with torch.no_grad():
        both, of_base, of_fine = (model.encode_prompt(*embeds, base=base) for base in (None, True, False))
    assert of_base.key_values is None and of_fine.base_key_values is None
    assert torch.equal(draw(model, z, both, None), draw(model, z, of_base, None))
    assert torch.equal(draw(model, z, both, z), draw(model, z, of_fine, z))
    with pytest.raises(AssertionError, match="other levels"):
        draw(model, z, of_base, z)
    twice = both.repeat(torch.tensor([0, 0]))
    assert torch.allclose(draw(model, z.repeat(2, 1, 1, 1), twice, None)[1:], draw(model, z, both, None), atol=1e-5)


def test_backends_draw_the_same_at_level_0(build: Build, prompt_of: PromptOf) -> None:
    model, z = build(**BASE), field(7, 9)
    prompt, drawn = prompt_of(model), []
    for backend in BACKENDS:
        if backend != "flex":
            model.set_attention_backend(backend)  # type: ignore[arg-type]
            drawn.append(draw(model, z, prompt, None))
    model.set_attention_backend("auto")
    assert all(torch.allclose(one, drawn[0], atol=2e-4) for one in drawn[1:])


def test_checkpointed_blocks_have_the_same_gradients(build: Build, prompt_of: PromptOf) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(**BASE).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.base is not None and model.base.gradient_checkpointing
        model(field(4, 4), torch.tensor([0.4]), prompt_of(model), torch.tensor([0])).sample.square().mean().backward()
        gradients.append([p.grad for p in model.base.parameters() if p.grad is not None])  # type: ignore[union-attr]
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


def test_it_is_saved_and_loaded(build: Build, prompt_of: PromptOf, tmp_path: Path) -> None:
    model, z = build(**BASE, refiner_channels=4), field(4, 6)
    model.save_pretrained(tmp_path)
    loaded = PhysFormerTransformer2DModel.from_pretrained(tmp_path)
    assert torch.allclose(draw(loaded, z, prompt_of(loaded), None), draw(model, z, prompt_of(model), None), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_num_layers": 2},
        {"base_hidden_size": 64},
        {**BASE, "base_num_layers": -1},
        {**BASE, "base_patch_size": 0},
        {**BASE, "base_num_heads": 5},
        {**BASE, "base_hidden_size": 24},
    ],
)
def test_sizes_that_make_no_network_are_refused(build: Build, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        build(**wrong)
