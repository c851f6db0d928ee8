"""The refiner of level 0: nothing at first, nothing at other levels, local, and part of the network's life."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from physformer_core.model.native import convolutions
from physformer_core.model.native import ops as native
from physformer_core.model.refiner import PhysFormerRefiner, activated
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel

Build = Callable[..., PhysFormerTransformer2DModel]
PromptOf = Callable[..., EncodedPrompt]


def field(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(1))


def draw(model: PhysFormerTransformer2DModel, z: Tensor, prompt: EncodedPrompt, coarse: Tensor | None) -> Tensor:
    batch, level = z.shape[0], 0 if coarse is None else 1
    with torch.no_grad():
        return model(z, torch.full((batch,), 0.3), prompt, torch.full((batch,), level), coarse).sample


def test_a_fresh_one_changes_nothing_but_learns(prompt_of: PromptOf) -> None:
    refiner = PhysFormerTransformer2DModel(patch_size=4, refiner_channels=4).refiner
    assert refiner is not None
    sample, noisy = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    refined = refiner(sample, noisy, torch.randn(2, 4, 6, 256), torch.randn(2, 256))
    assert torch.equal(refined, sample)
    refined.square().mean().backward()
    assert refiner.leave.weight.grad is not None and refiner.leave.weight.grad.abs().max() > 0


def test_it_is_asked_at_level_0_alone(build: Build, prompt_of: PromptOf) -> None:
    with_it, without = build(refiner_channels=4), build()
    assert with_it.state_dict().keys() > without.state_dict().keys()
    with_it.load_state_dict(with_it.state_dict() | without.state_dict())
    z, prompt = field(6, 7), prompt_of(without)
    assert torch.equal(draw(with_it, z, prompt, z / 2), draw(without, z, prompt, z / 2))
    assert (draw(with_it, z, prompt, None) - draw(without, z, prompt, None)).abs().max() > 0.01


def test_its_reach_is_local_and_the_same_everywhere(build: Build) -> None:
    refiner = build(refiner_channels=4).refiner
    assert isinstance(refiner, PhysFormerRefiner)
    sample, noisy = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    tokens, temb = torch.randn(1, 32, 32, 64), torch.randn(1, 64)
    with torch.no_grad():
        before = refiner(sample, noisy, tokens, temb)
        noisy[..., 32, 32] += 1
        tokens[:, 16, 16] += 1
        changed = (refiner(sample, noisy, tokens, temb) - before).abs().amax((0, 1)) > 0
        rows, columns = changed.nonzero().unbind(1)
        assert rows.min() >= 20 and rows.max() <= 45 and columns.min() >= 20 and columns.max() <= 45
        # Moved by a patch, everything moves along: whatever is far from the border cannot know where it is.
        moved = [torch.roll(one, (2, 2), (2, 3)) for one in (sample, noisy)]
        again = refiner(*moved, torch.roll(tokens, (1, 1), (1, 2)), temb)
        old = torch.roll(refiner(sample, noisy, tokens, temb), (2, 2), (2, 3))
    assert torch.allclose(again[..., 20:44, 20:44], old[..., 20:44, 20:44], atol=1e-5)


def test_pictures_of_a_batch_are_refined_alone(build: Build, prompt_of: PromptOf) -> None:
    model, z = build(refiner_channels=4), field(5, 8, batch=3)
    prompt = prompt_of(model, batch=3)
    together = draw(model, z, prompt, None)
    alone = torch.cat([draw(model, z[k : k + 1], prompt.repeat(torch.tensor([k])), None) for k in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_saved_and_runs_in_every_dtype(
    build: Build, prompt_of: PromptOf, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = build(refiner_channels=4)
    model.save_pretrained(tmp_path)
    loaded = PhysFormerTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.refiner is not None and loaded.refiner.outer.conv1.weight.dtype == dtype
    z = field(6, 7)
    exact, output = draw(model, z, prompt_of(model), None), draw(loaded, z, prompt_of(loaded), None)
    assert output.dtype == torch.float32
    # In float32 not the same bits everywhere: where a library's products depend on how weights lie in memory.
    assert (output - exact).square().mean().sqrt() <= {torch.float32: 1e-5, torch.float16: 0.02}.get(dtype, 0.1)


def test_doubling_is_a_pixel_shuffle() -> None:
    torch.manual_seed(0)
    refiner = PhysFormerRefiner(3, 16, 4, 5)
    half = torch.randn(2, 10, 3, 7, requires_grad=True)
    leaves = (half, refiner.up.weight, refiner.up.bias)
    results = refiner.doubled(half), torch.nn.functional.pixel_shuffle(refiner.up(half), 2)
    weights = torch.randn(results[1].shape)
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad((result * weights).sum(), leaves) for result in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_kernels_in_c_activate_all_its_fields_and_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    refiner = build(refiner_channels=4).refiner
    assert refiner is not None
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 3, 16, 24), (2, 3, 16, 24), (2, 8, 12, 64), (2, 64)
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    kernel, fields = native.modulated_silu, []

    def watched(field: Tensor, *modulation: Tensor) -> Tensor:
        fields.append(field)
        return kernel(field, *modulation)

    def run() -> tuple[Tensor, ...]:
        result = refiner(*given)
        return result, *torch.autograd.grad(result.square().sum(), tuple(refiner.parameters()))

    monkeypatch.setattr(native, "modulated_silu", watched)
    found = run()
    assert len(fields) == 7 and all(one.permute(0, 2, 3, 1).is_contiguous() for one in fields)
    monkeypatch.setattr(native, "why_not", lambda: "left out by a test")
    wanted = run()
    assert len(fields) == 7
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_kernels_in_c_convolve_both_blocks_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    refiner = PhysFormerRefiner(3, 24, 8, 16)
    for layer in refiner.zero_at_first():
        torch.nn.init.normal_(layer.weight, std=0.05)
    given = torch.randn(3, 3, 16, 24), torch.randn(3, 3, 16, 24), torch.randn(3, 2, 3, 24), torch.randn(3, 24)
    kernel, halving, widths, halved = convolutions.modulated_convolutions, convolutions.halving_convolution, [], []

    def watched(field: Tensor, *rest: Any) -> Tensor:
        widths.append(field.shape[1:])
        return kernel(field, *rest)

    def watched_too(field: Tensor, *rest: Tensor) -> Tensor:
        halved.append(field.shape[1:])
        return halving(field, *rest)

    def run() -> tuple[Tensor, ...]:
        result = refiner(*given)
        return result, *torch.autograd.grad(result.square().sum(), tuple(refiner.parameters()))

    monkeypatch.setattr(convolutions, "halving_convolution", watched_too)
    monkeypatch.setattr(convolutions, "modulated_convolutions", watched)
    found = run()
    assert widths == [(32, 8, 12), (16, 16, 24)] and halved == [(16, 16, 24)]
    with torch.autocast("cpu", torch.bfloat16):
        assert refiner(*given).isfinite().all()
    monkeypatch.setattr(native, "why_not", lambda: "left out by a test")
    wanted = run()
    monkeypatch.undo()
    refiner.outer.conv1, refiner.down = (torch.nn.Sequential(one) for one in (refiner.outer.conv1, refiner.down))
    adapted = run()  # as with adapters around them
    assert len(widths) == 2 and len(halved) == 1
    for one, other, third in zip(found, wanted, adapted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert (third - other).norm() <= 1e-5 * other.norm()


def test_fields_that_lie_otherwise_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "modulated_silu", None)
    field = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(activated(field), torch.nn.functional.silu(field))
