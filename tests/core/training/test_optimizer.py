"""Muon, the division of parameters between the optimizers, their state, and the schedule."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from physformer_core.config import load_preset
from physformer_core.errors import ConfigError
from physformer_core.model.native import ops as native
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.optimizer import (
    NEWTON_SCHULZ,
    Muon,
    Optimizer,
    iterates_on_gram,
    orthogonalize,
    schedule,
    split_parameters,
)

SHAPES = [(24, 24), (64, 16), (16, 64), (96, 24), (1, 8)]


def model(**changes: Any) -> PhysFormerTransformer2DModel:
    torch.manual_seed(0)
    return PhysFormerTransformer2DModel(**load_preset("debug").model | changes)


def optimizer(network: nn.Module, name: str = "muon") -> Optimizer:
    return Optimizer(
        network,
        name=name,
        lr=1e-2,
        muon_lr=1e-2,
        weight_decay=0.1,
        betas=(0.9, 0.98),
        muon_dtype=torch.float32,
    )


def take_steps(network: nn.Module, optimizers: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.step(1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_brings_singular_values_near_1(shape):
    torch.manual_seed(1)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    result = orthogonalize(matrices, 5, torch.float32)
    singular = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape and singular.min() > 0.6 and singular.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right
    cosine = (result * nearest).sum((1, 2)) / (result.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2)))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("without", [False, True], ids=["in C, if that can run", "in torch"])
@pytest.mark.parametrize("shape", [(24, 64), (24, 24), (47, 31), (9, 600), (101, 260), (300, 310)])
def test_orthogonalize_by_products_is_the_iteration_itself(shape, without, request):
    if without:
        request.getfixturevalue("without_native")
    torch.manual_seed(1)
    decades = torch.logspace(0, -3, shape[0])[:, None]  # singular values over three
    matrices = torch.randn(2, *shape) * decades
    x = matrices.double()
    x = x / x.norm(dim=(1, 2), keepdim=True)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    # Of nearly square matrices the smallest singular values are some 1e-5, whose squares float32 drowns.
    close = {"atol": 3e-4 if 2 * min(shape) > max(shape) else 2e-5, "rtol": 0}
    torch.testing.assert_close(orthogonalize(matrices, 5, torch.float32).double(), x, **close)
    torch.testing.assert_close(orthogonalize(matrices.mT, 5, torch.float32).double(), x.mT, **close)


def test_torch_iterates_on_products_where_that_takes_fewer_operations():
    assert iterates_on_gram(24, 64, torch.float32) and not iterates_on_gram(24, 64, torch.bfloat16)
    assert not iterates_on_gram(24, 24, torch.float32)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("shape", [(5, 24, 64), (3, 70, 33), (1, 300, 300)])
def test_orthogonalize_in_c_is_the_same_to_the_bit_with_any_number_of_threads(shape):
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(orthogonalize(matrices, 5, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)
    assert torch.equal(orthogonalize(matrices.mT.contiguous().mT, 5, torch.float32), results[0])
    assert orthogonalize(torch.full((1, 3, 4), torch.nan), 5, torch.float32).isnan().all()
    with pytest.raises(ValueError, match="0 steps"):
        native.orthogonalize(matrices, 0, NEWTON_SCHULZ)


def test_orthogonalize_does_not_mix_a_batch():
    torch.manual_seed(1)
    matrices = torch.randn(4, 12, 20)
    alone = torch.cat([orthogonalize(matrix[None], 5, torch.float32) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, 5, torch.float32), alone)
    assert not orthogonalize(torch.zeros(1, 4, 4), 5, torch.float32).any()


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_muon_agrees_with_torch(shape):
    torch.manual_seed(2)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pair = (
        (ours, Muon([ours], **options, dtype=torch.bfloat16)),
        (theirs, torch.optim.Muon([theirs], **options, nesterov=True, adjust_lr_fn="match_rms_adamw")),
    )
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, part in pair:
            parameter.grad = gradient.clone()
            part.step()
    moved = (theirs - start).norm()
    assert moved > 0.1 and (ours - theirs).norm() < 0.01 * moved  # both in bfloat16, in another order of operations


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_muon_in_c_is_muon_in_torch(request, monkeypatch):
    torch.manual_seed(3)
    in_c, kernel = [], native.muon_step
    monkeypatch.setattr(
        native, "muon_step", lambda weights, *rest, **more: (in_c.append(1), kernel(weights, *rest, **more))
    )
    shapes = [(24, 24), (24, 24), (50, 300), (8, 3, 4, 4), (40, 9)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    gradients[1][0] = gradients[1][0].T.contiguous().T  # not in order in memory: torch does those of its shape

    def weights() -> list[torch.Tensor]:
        params = [nn.Parameter(t.clone()) for t in start]
        muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5)
        for step in gradients:
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.clone()
            muon.step()
        return params + [muon.state[param]["momentum_buffer"] for param in params]

    found = weights()
    assert len(in_c) == 4 + 3 + 4
    request.getfixturevalue("without_native")
    for one, other in zip(found, weights(), strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be taken"):
        native.muon_step(
            [torch.ones(2, 3).T], [torch.ones(3, 2)], [torch.ones(3, 2)], 1, (1, 1, 1), 0.9, keep=1, rate=1
        )


def test_every_parameter_is_trained_exactly_once():
    network = model()
    muon, adamw = split_parameters(network)
    assert not muon.keys() & adamw.keys()
    assert muon.keys() | adamw.keys() == dict(network.named_parameters()).keys()
    for name in ("muon", "adamw"):
        held = [p for part, _ in optimizer(network, name).parts for group in part.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(network.parameters()))


def test_muon_has_the_matrices_of_blocks_alone():
    muon, adamw = split_parameters(model())
    assert {"blocks.0.attn.to_q.weight", "text_blocks.0.to_qkv.weight"} < muon.keys()
    assert all(p.ndim == 2 and name.startswith(("blocks.", "text_blocks.")) for name, p in muon.items())
    assert {"blocks.0.modulation.weight", "blocks.0.attn.drift_logit", "patch_embed.proj1.weight"} < adamw.keys()


def test_muon_takes_kernels_as_matrices():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(4, 3, 2, 2))
    kernel.grad = torch.randn(4, 3, 2, 2)
    Muon([kernel], lr=1.0, momentum=0.0).step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1)) / (0.2 * 12**0.5)
    assert values.min() > 0.5 and values.max() < 1.3  # what the quintic calls orthogonal
    muon, adamw = split_parameters(model(refiner_channels=4))
    assert {"refiner.inner.conv1.weight", "refiner.down.weight", "refiner.tokens.weight"} < muon.keys()
    assert {"refiner.enter.weight", "refiner.leave.weight", "refiner.outer.modulation.weight"} < adamw.keys()


def test_a_network_for_level_0_is_divided_like_the_other():
    sizes = {"base_num_layers": 1, "base_hidden_size": 32, "base_num_heads": 2, "base_patch_size": 4}
    muon, adamw = split_parameters(model(refiner_channels=4, **sizes))
    assert {"base.blocks.0.attn.to_q.weight", "base.refiner.down.weight"} < muon.keys()
    assert {
        "base.blocks.0.modulation.weight",
        "base.patch_embed.proj1.weight",
        "base.refiner.enter.weight",
    } < adamw.keys()
    names = {name.removeprefix("base.") for name in muon if name.startswith("base.")}
    assert {name for name in muon if name.startswith("blocks.0.")} <= names


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_goes_through_tensors(name):
    straight, stopped, resumed = model(), model(), model()
    take_steps(straight, optimizer(straight, name), 0, 4)
    first = optimizer(stopped, name)
    take_steps(stopped, first, 0, 2)
    resumed.load_state_dict(stopped.state_dict())
    second = optimizer(resumed, name)
    second.load_state_tensors(first.state_tensors().items())
    take_steps(resumed, second, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    forgetful = model()
    forgetful.load_state_dict(stopped.state_dict())
    take_steps(forgetful, optimizer(forgetful, name), 2, 4)
    assert not all(torch.equal(a, b) for a, b in zip(straight.parameters(), forgetful.parameters(), strict=True))


def test_the_count_of_steps_lies_where_the_form_of_adamw_wants_it():
    trained = model()
    part = optimizer(trained, "adamw")
    take_steps(trained, part, 0, 1)
    elsewhere = model().to("meta")  # no device that AdamW has a fused form for here: its count is on the CPU
    second = optimizer(elsewhere, "adamw")
    assert second.parts[0][0].param_groups[0]["fused"] is None and part.parts[0][0].param_groups[0]["fused"] is True
    second.load_state_tensors(
        (name, value if name.endswith("step") else value.to("meta")) for name, value in part.state_tensors().items()
    )
    for state in second.parts[0][0].state.values():
        assert state["step"].device.type == "cpu" and state["step"].item() == 1
        assert state["exp_avg"].device.type == "meta"


def test_loaded_state_is_a_copy():
    network = model()
    part = optimizer(network)
    take_steps(network, part, 0, 1)
    tensors = {name: value.clone() for name, value in part.state_tensors().items()}
    other = model()
    second = optimizer(other)
    second.load_state_tensors(tensors.items())
    before = {name: value.clone() for name, value in tensors.items()}
    take_steps(other, second, 1, 2)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'"):
        optimizer(model(), "sgd")


def test_schedule():
    def at(step: int) -> float:
        return schedule(step, 1000, warmup_fraction=0.1)

    assert at(0) == pytest.approx(0.1) and at(50) == pytest.approx(0.55) and at(100) == pytest.approx(1.0)
    assert at(550) == pytest.approx(0.55) and at(1000) == pytest.approx(0.1) and at(2000) == pytest.approx(0.1)
    values = [at(step) for step in range(100, 1001)]
    assert values == sorted(values, reverse=True)
    assert all(math.isfinite(schedule(step, 1, warmup_fraction=0.0)) for step in range(3))
