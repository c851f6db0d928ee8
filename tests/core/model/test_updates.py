"""How sublayers change tokens: the law that each form keeps, to rounding, and what its gradient is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel
from physformer_core.model.updates import (
    RESIDUALS,
    ResidualForm,
    plain_inverse,
    plain_update,
    renormalized_inverse,
    renormalized_update,
    residual_form,
    rotation_update,
)

Build = Callable[..., PhysFormerTransformer2DModel]
PromptOf = Callable[..., EncodedPrompt]

EPS = torch.finfo(torch.float32).eps
HEADS = 4
CONSERVING = [name for name, form in RESIDUALS.items() if "norm" in form.conserves]
MOVES = {"rotation": rotation_update, "renormalized": renormalized_update}


def vectors(seed: int, count: int = 16, dim: int = 48) -> tuple[Tensor, Tensor]:
    """Tokens of about unit features, and updates of about their length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim, generator=generator)


def squares(vectors_nd: Tensor, form: ResidualForm) -> Tensor:
    """The energies that a form conserves one by one, in float64: [N], or [N, heads]."""
    if form.conserves == "head_norms":
        vectors_nd = vectors_nd.unflatten(-1, (HEADS, -1))
    return vectors_nd.double().square().sum(-1)


# --- laws -------------------------------------------------------------------------------------------------------


DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "free": lambda h, noise: noise,
    "along": lambda h, noise: h,
    "nearly along": lambda h, noise: h + 1e-3 * noise,
    "against": lambda h, noise: -h,
    "nearly against": lambda h, noise: -h + 1e-5 * noise,
}


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(CONSERVING),
    seed=st.integers(0, 1000),
    direction=st.sampled_from(list(DIRECTIONS)),
    size=st.floats(-11.5, 12).map(lambda power: 10.0**power),
    gain=st.floats(-8, 6).map(lambda power: 10.0**power),
)
@example(name="rotation", seed=0, direction="nearly along", size=1.0, gain=1e4)  # orthogonal once: lost 80 %
@example(name="rotation", seed=0, direction="along", size=1e-11, gain=1.0)
@example(name="renormalized", seed=0, direction="nearly against", size=1e-11, gain=1.0)
@example(name="renormalized", seed=0, direction="nearly against", size=1.0, gain=1.0)
def test_energy_is_kept_to_rounding(name: str, seed: int, direction: str, size: float, gain: float) -> None:
    """Whatever the sizes of token and update, and however nearly they are parallel."""
    h, noise = vectors(seed)
    f = size * gain * DIRECTIONS[direction](h, noise)
    h, form = size * h, RESIDUALS[name]
    before, after = squares(h, form), squares(form.apply(h, f, HEADS), form)
    assert ((after / before).sqrt() - 1).abs().max() < 4 * EPS


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_closed_gate_is_the_identity_to_the_bit(name: str) -> None:
    h, _ = vectors(0)
    h[3:6] = torch.tensor([0.0, 1e-20, 1e15])[:, None]
    for zero in (torch.zeros_like(h), -torch.zeros_like(h)):
        assert torch.equal(RESIDUALS[name].apply(h, zero, HEADS), h)


@pytest.mark.parametrize("name", CONSERVING)
def test_silent_tokens_stay_silent(name: str) -> None:
    """A token of no length has no direction to turn; neither value nor gradient may become infinite."""
    h = torch.zeros(4, 48)
    h[1:, 0] = torch.tensor([1e-30, 1e-18, 1e-13])
    h, f = h.requires_grad_(), torch.full((4, 48), 3.0, requires_grad=True)
    moved = RESIDUALS[name].apply(h, f, HEADS)
    assert torch.equal(moved, h)
    moved.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h)) and torch.equal(f.grad, torch.zeros_like(f))


@pytest.mark.parametrize("name", CONSERVING)
def test_opposed_updates_leave_finite_tokens_and_gradients(name: str) -> None:
    for factor in (-1.0, -1 + 1e-7, 1.0, 1e6):
        h = vectors(0)[0].requires_grad_()
        f = (factor * h.detach()).requires_grad_()
        moved = RESIDUALS[name].apply(h, f, HEADS)
        assert (moved.norm(dim=-1) / h.norm(dim=-1) - 1).abs().max() < 4 * EPS
        moved.square().sum().backward()
        assert torch.isfinite(h.grad).all() and torch.isfinite(f.grad).all()


def test_energy_does_not_pass_between_heads_where_that_is_promised() -> None:
    h, f = vectors(0)
    f[:, 12:] = 0
    kept = RESIDUALS["head_rotation"].apply(h, f, HEADS)
    assert torch.equal(kept[:, 12:], h[:, 12:]) and not torch.allclose(kept[:, :12], h[:, :12])
    leaked = RESIDUALS["rotation"].apply(h, f, HEADS)
    assert ((leaked[:, :12].norm(dim=-1) / h[:, :12].norm(dim=-1)) - 1).abs().max() > 0.1


def test_a_leapfrog_conserves_volume(build: Build, prompt_of: PromptOf) -> None:
    """The determinant of one block's Jacobian, over all tokens and both streams, is 1; that of others is not."""
    determinants = {}
    for name in ("leapfrog", "plain"):
        model = build(num_layers=1, hidden_size=32, num_heads=2, residual=name).double()
        block, streams = model.blocks[0], model.form.streams
        text = prompt_of(model.float()).key_values[0]
        model.double()
        text = type(text)(text.key.double(), text.value.double())
        plan = model.plan(2, 2, (0, 0), torch.zeros(1, 4, 32, dtype=torch.float64))[0]
        temb = torch.linspace(-1, 1, 32, dtype=torch.float64)[None]
        state = torch.randn(1, 4, 32 * streams, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def step(state: torch.Tensor, block=block, temb=temb, text=text, plan=plan, streams=streams) -> torch.Tensor:
            return torch.cat(block(state.chunk(streams, dim=-1), temb, text, plan), dim=-1)

        jacobian = torch.autograd.functional.jacobian(step, state)
        determinants[name] = torch.linalg.slogdet(jacobian.reshape(state.numel(), -1))[1].item()
    assert abs(determinants["leapfrog"]) < 1e-5 < 0.1 < abs(determinants["plain"])


# --- directions -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), gain=st.floats(1e-3, 5.0), size=st.floats(1e-2, 100.0))
def test_rotation_follows_its_formula(seed: int, gain: float, size: float) -> None:
    h, f = (size * t for t in vectors(seed))
    h64, f64 = h.double(), gain * f.double()
    w = f64 - (f64 * h64).sum(-1, keepdim=True) / h64.square().sum(-1, keepdim=True) * h64
    theta = w.norm(dim=-1, keepdim=True) / h64.norm(dim=-1, keepdim=True)
    expected = theta.cos() * h64 + theta.sin() / theta * w
    assert torch.allclose(rotation_update(h, gain * f).double(), expected, rtol=1e-5, atol=1e-5 * size)


def test_what_points_along_a_token_does_not_turn_it() -> None:
    h, _ = vectors(0)
    for gain in (0.7, 3.0, -0.9, 1e3):
        assert torch.allclose(rotation_update(h, gain * h), h, rtol=0, atol=3e-6 * max(1, abs(gain)))
        if gain > -1:
            assert torch.allclose(renormalized_update(h, gain * h), h, rtol=1e-6)


def test_conserving_forms_agree_to_first_order() -> None:
    h, f = (t.double() for t in vectors(0))
    orthogonal = f - (f * h).sum(-1, keepdim=True) / h.square().sum(-1, keepdim=True) * h
    for step in (1e-3, 1e-4):
        for move in MOVES.values():
            assert ((move(h, step * f) - h) / step - orthogonal).abs().max() < 20 * step


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("gain", [0.0, 1e-3, 1.0, 4.0])
def test_gradients_are_those_of_finite_differences(move: Callable[[Tensor, Tensor], Tensor], gain: float) -> None:
    h, f = (t.double() for t in vectors(0, count=3, dim=8))
    assert torch.autograd.gradcheck(move, (h.requires_grad_(), (gain * f).requires_grad_()))


# --- back again -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), gain=st.floats(0, 0.95))
def test_inverses_lead_back(seed: int, gain: float) -> None:
    h, f = vectors(seed)
    f = gain * f * h.norm(dim=-1, keepdim=True) / f.norm(dim=-1, keepdim=True)
    assert torch.allclose(renormalized_inverse(renormalized_update(h, f), f), h, atol=3e-5)
    assert torch.allclose(plain_inverse(plain_update(h, 9 * f), 9 * f), h, atol=1e-5)


def test_beyond_its_length_an_update_cannot_be_undone() -> None:
    """Two tokens of one norm that one update brings to one place: why `renormalized` is not always invertible."""
    f = torch.tensor([[2.0, 0.0]])
    h = torch.tensor([[2.0, 1.0]]) / 5**0.5
    image = renormalized_update(h, f)
    # The ray through the image, moved back by f, meets the circle twice; the two lengths along it add up to this.
    other = (2 * (image * f).sum() - (h + f).norm()) * image - f
    assert other.norm() == pytest.approx(1, abs=1e-5) and not torch.allclose(other, h, atol=0.1)
    assert torch.allclose(renormalized_update(other, f), image, atol=1e-5)


def gradients(model: PhysFormerTransformer2DModel, **settings_of_autocast: Any) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    with torch.autocast("cpu", **settings_of_autocast):
        prompt = model.encode_prompt(draw(2, 4, 12), torch.ones(2, 4, dtype=torch.bool), draw(2, 10))
        output = model(draw(2, 3, 18, 20), torch.tensor([0.4, 0.7]), prompt, torch.tensor([1, 0])).sample
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "bfloat16"])
def test_a_leapfrog_trained_from_its_last_state_alone_has_the_same_gradients(build: Build, enabled: bool) -> None:
    kept, recomputed = build(residual="leapfrog").train(), build(residual="leapfrog").train()
    recomputed.enable_gradient_checkpointing()
    for model in (kept, recomputed):
        model.blocks[0].attn.to_v.weight.requires_grad_(False)  # as adapters freeze weights
    expected, found = (gradients(model, dtype=torch.bfloat16, enabled=enabled) for model in (kept, recomputed))
    assert {k for k, v in expected.items() if v is None} == {k for k, v in found.items() if v is None}
    for name, gradient in expected.items():
        if gradient is not None:
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < (0.05 if enabled else 1e-5), name


def test_memory_of_a_leapfrog_in_training_does_not_grow_with_depth(build: Build) -> None:
    """Bytes that autograd holds between forward and backward, weights and prompts left out."""

    def held(layers: int, residual: str) -> int:
        model = build(num_layers=layers, residual=residual).train()
        model.enable_gradient_checkpointing()
        with torch.no_grad():
            prompt = model.encode_prompt(torch.ones(1, 4, 12), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 10))
        known = {t.data_ptr() for t in model.parameters()}
        known |= {t.data_ptr() for pair in prompt.key_values for t in (pair.key, pair.value)}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.ones(1, 3, 40, 40), torch.tensor([0.4]), prompt, torch.tensor([1])).sample
        del output
        return sum(found.values())

    assert held(6, "leapfrog") == held(2, "leapfrog")
    assert held(6, "rotation") > 1.5 * held(2, "rotation")


# --- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESIDUALS)
def test_every_form_has_the_same_weights_and_trains(build: Build, name: str) -> None:
    """So a checkpoint's form can be told from its configuration alone, and forms can be compared."""
    model = build(residual=name).train()
    assert list(model.state_dict()) == list(build().state_dict())
    found = gradients(model, enabled=False)
    assert all(torch.isfinite(g).all() for g in found.values() if g is not None)
    assert found["blocks.0.attn.to_v.weight"].abs().max() > 0


@pytest.mark.parametrize("name", CONSERVING)
def test_conserved_energies_hold_through_the_whole_depth(build: Build, prompt_of: PromptOf, name: str) -> None:
    model = build(num_layers=12, residual=name)
    form, states = model.form, []
    model.blocks[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, output: states.append(output))
    with torch.no_grad():
        z = torch.randn(1, 3, 14, 18, generator=torch.Generator().manual_seed(0))
        model(z, torch.tensor([0.3]), prompt_of(model), torch.tensor([1]))
    energies = [torch.stack([squares(s, form) for s in state]) for state in states]
    assert len(energies) == 13 and (states[-1][0] - states[0][0]).abs().mean() > 0.1  # they do move
    for after in energies[1:]:
        assert ((after / energies[0]).sqrt() - 1).abs().max() < 1e-5


def test_unknown_forms_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="swirl") as refused:
        residual_form("swirl")
    assert "head_rotation" in str(refused.value.hint)
