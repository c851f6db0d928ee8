"""Integrators on equations whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.flow.path import PATHS, FlowPath
from physformer_core.flow.solver import MIN_STEP, SOLVERS, SolverSettings, integrate

ORDERS = {"euler": 1, "heun": 2, "multistep": 2}


def swinging(z: Tensor, t: float) -> Tensor:
    """dz/dt = cos(3 t) z: z(1) = z(0) exp(sin(3) / 3)."""
    return math.cos(3 * t) * z


EXACT = math.exp(math.sin(3) / 3)


def start(*values: float) -> Tensor:
    return torch.tensor(values or (1.0,), dtype=torch.float64)[:, None, None, None]


def error(name: str, steps: int, **more: Any) -> float:
    return abs(integrate(swinging, start(), SolverSettings(name=name, steps=steps, **more)).item() - EXACT)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(name: str, shift: float) -> None:
    coarse, fine = (error(name, steps, shift=shift) for steps in (250, 1000))
    assert math.log(coarse / fine, 4) == pytest.approx(ORDERS[name], abs=0.2)
    assert fine < 1e-2


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_followed_exactly_to_the_end(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 2, 3, 4, 5, generator=generator).double()
    asked: list[float] = []
    told: list[tuple[int, float]] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        asked.append(t)
        assert torch.allclose(z, (1 - t) * x0 + t * x1, atol=1e-12)  # never off the path
        return x1 - x0

    end = integrate(velocity, x0, SolverSettings(name=name, steps=steps), lambda index, t, z: told.append((index, t)))
    assert torch.allclose(end, x1, atol=1e-12)
    assert [index for index, _ in told] == list(range(len(told)))
    assert told[-1][1] == 1.0 and all(a < b for (_, a), (_, b) in pairwise(told))
    assert asked[0] == 0.0 and max(asked) < 1.0  # the velocity at the data itself is not defined
    if name != "adaptive":
        assert len(told) == steps and len(asked) == (2 * steps - 1 if name == "heun" else steps)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("path_name", PATHS)
def test_a_perfect_network_ends_at_the_data(name: str, path_name: str) -> None:
    """Whatever the number of steps, and without noise left from the loss's margin at the end."""
    path = FlowPath(name=path_name)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 1, 3, 8, 8, generator=generator)

    def velocity(z: Tensor, t: float) -> Tensor:
        return path.velocity_of_sample(x1, z, torch.full((1,), t))

    for steps in (20, 25, 60):
        end = integrate(velocity, x0, SolverSettings(name=name, steps=steps, tolerance=1e-3))
        rest = (end - x1).square().mean().sqrt()
        assert rest < (1e-5 if path_name == "linear" else 1e-2), (steps, rest)


def test_times_and_shift() -> None:
    assert SolverSettings(steps=4).times() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    shifted = SolverSettings(steps=10, shift=3.0).times()
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    widths = [b - a for a, b in pairwise(shifted)]
    assert widths == sorted(widths)  # the shortest first


@pytest.mark.parametrize("steps", [1, 4, 20, 1000])
def test_adaptive_meets_its_tolerance(steps: int) -> None:
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        count = 0

        def velocity(z: Tensor, t: float) -> Tensor:
            nonlocal count
            count += 1
            return swinging(z, t)

        end = integrate(velocity, start(), SolverSettings(name="adaptive", steps=steps, tolerance=tolerance))
        errors.append(abs(end.item() - EXACT))
        evaluations.append(count)
        assert errors[-1] < 2 * tolerance
    assert evaluations == sorted(evaluations)
    assert evaluations[0] < 60 and evaluations[-1] <= 4 / MIN_STEP


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_adaptive_checks_its_last_step_too(steps: int) -> None:
    """A change after calm must not fall into a last step that nobody looks at."""

    def velocity(z: Tensor, t: float) -> Tensor:
        return torch.full_like(z, 5 / (1 + math.exp(-30 * (t - 0.4))))

    exact = 5 / 30 * math.log((1 + math.exp(18)) / (1 + math.exp(-12)))
    end = integrate(velocity, start(0.0), SolverSettings(name="adaptive", steps=steps, tolerance=1e-3))
    assert end.item() == pytest.approx(exact, abs=0.01)


def test_adaptive_ends_whatever_it_meets() -> None:
    """Neither roughness nor NaN keeps it going for ever."""
    generator = torch.Generator().manual_seed(0)
    for rough in (
        lambda z, t: 100 * torch.randn(z.shape, generator=generator),
        lambda z, t: torch.full_like(z, math.nan),
    ):
        told: list[float] = []
        settings = SolverSettings(name="adaptive", steps=3, tolerance=1e-6)
        integrate(rough, start(), settings, lambda index, t, z, told=told: told.append(t))
        assert told[-1] == 1.0 and len(told) <= 1 / MIN_STEP + 1


def test_adaptive_takes_the_worst_of_a_batch() -> None:
    def velocity(z: Tensor, t: float) -> Tensor:
        return torch.stack([torch.zeros_like(z[0]), swinging(z[1], t)])

    end = integrate(velocity, start(1.0, 1.0), SolverSettings(name="adaptive", steps=4, tolerance=1e-3))
    assert end[0].item() == 1.0 and end[1].item() == pytest.approx(EXACT, abs=2e-3)


@pytest.mark.parametrize(
    "wrong", [{"name": "rk4"}, {"steps": 0}, {"steps": -3}, {"shift": 0.0}, {"tolerance": 0.0}], ids=str
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SolverSettings(**wrong)
