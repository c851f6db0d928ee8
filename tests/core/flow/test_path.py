"""Paths between start and data: ends, slopes, and the ways from a prediction to a velocity and back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.flow.path import PATHS, FlowPath, TimeDensity
from physformer_core.flow.solver import SOLVERS, SolverSettings, integrate

INNER = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def fields(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 2, 3, 4)
    return torch.randn(shape, generator=generator).double(), torch.randn(shape, generator=generator).double()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> FlowPath:
    return FlowPath(name=request.param)


def test_ends(path: FlowPath) -> None:
    for dtype in (torch.float32, torch.float64):
        a, b, slope_a, slope_b = path.coefficients(torch.tensor([0.0, 1.0], dtype=dtype))
        assert torch.allclose(a, torch.tensor([0.0, 1.0], dtype=dtype), atol=1e-5)
        assert torch.allclose(b, torch.tensor([1.0, 0.0], dtype=dtype), atol=1e-5)
        assert torch.isfinite(slope_a).all() and torch.isfinite(slope_b).all()


def test_signal_only_grows_and_noise_only_shrinks(path: FlowPath) -> None:
    a, b, _, _ = path.coefficients(torch.linspace(0, 1, 201))
    assert (a.diff() > 0).all() and (b.diff() < 0).all()
    if path.name in ("cosine", "vp"):
        assert torch.allclose(a.square() + b.square(), torch.ones_like(a), atol=1e-6)


def test_slopes_are_those_of_the_coefficients_up_to_the_ends(path: FlowPath) -> None:
    h = 1e-6
    for t in (INNER, torch.tensor([2e-5, 1e-3, 1 - 1e-3, 1 - 2e-5], dtype=torch.float64)):
        before, after, at = path.coefficients(t - h), path.coefficients(t + h), path.coefficients(t)
        for value in (0, 1):
            difference = (after[value] - before[value]) / (2 * h)
            assert torch.allclose(at[2 + value], difference, rtol=1e-5, atol=1e-5)
    # At the ends themselves no slope jumps: a sampler's first step starts at exactly 0.
    for end, near in ((0.0, 1e-3), (1.0, 1 - 1e-3)):
        ends = path.coefficients(torch.tensor([end, near], dtype=torch.float64))
        for slope in ends[2:]:
            assert (slope[0] - slope[1]).abs() < 0.02


def test_known_values() -> None:
    half = torch.tensor([0.5])
    expected = {
        "linear": (0.5, 0.5, 1.0, -1.0),
        "cosine": (math.sqrt(0.5), math.sqrt(0.5), math.pi / 2 * math.sqrt(0.5), -math.pi / 2 * math.sqrt(0.5)),
        "quadratic": (0.25, 0.25, 1.0, -1.0),
    }
    for name, values in expected.items():
        got = FlowPath(name=name).coefficients(half)  # type: ignore[arg-type]
        assert [c.item() for c in got] == pytest.approx(values, abs=1e-6)


def test_velocity_is_the_slope_of_the_path(path: FlowPath) -> None:
    x0, x1 = fields(99)
    h = 1e-6
    slope = (path.interpolate(x0, x1, INNER + h) - path.interpolate(x0, x1, INNER - h)) / (2 * h)
    assert torch.allclose(path.velocity(x0, x1, INNER), slope, rtol=1e-5, atol=1e-5)


def test_velocity_of_the_true_sample_is_the_true_velocity(path: FlowPath) -> None:
    for t in (INNER, torch.tensor([0.0, 1e-4, 0.96, 0.9995], dtype=torch.float64)):
        x0, x1 = fields(len(t))
        z = path.interpolate(x0, x1, t)
        assert torch.allclose(path.velocity_of_sample(x1, z, t), path.velocity(x0, x1, t), rtol=1e-4, atol=1e-4)


def test_sample_and_velocity_are_inverse(path: FlowPath) -> None:
    x0, x1 = fields(99)
    z = path.interpolate(x0, x1, INNER)
    assert torch.allclose(path.sample_of_velocity(path.velocity(x0, x1, INNER), z, INNER), x1, rtol=1e-6, atol=1e-6)
    guess = x1 + 0.3
    assert torch.allclose(
        path.sample_of_velocity(path.velocity_of_sample(guess, z, INNER), z, INNER), guess, rtol=1e-6, atol=1e-6
    )


def test_every_path_is_the_straight_one_at_other_times_and_scales(path: FlowPath) -> None:
    for time in (0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0):
        t, scale = path.at_straight_time(time)
        a, b, _, _ = (c.item() for c in path.coefficients(torch.tensor([t], dtype=torch.float64)))
        assert a == pytest.approx(scale * time, abs=2e-6) and b == pytest.approx(scale * (1 - time), abs=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_knows_the_picture_lands_on_it(path: FlowPath, solver: str, steps: int) -> None:
    """However few the steps: along bent paths the first went to twice the picture, or to its negative."""
    x0, x1 = fields(3)
    asked: list[float] = []

    def sample(z: Tensor, time: float) -> Tensor:
        asked.append(time)
        t = torch.full((3,), time, dtype=torch.float64)
        torch.testing.assert_close(z, path.interpolate(x0, x1, t), rtol=1e-4, atol=1e-4)
        return x1

    arrived = integrate(path.straight_velocity(sample), x0, SolverSettings(name=solver, steps=steps))
    torch.testing.assert_close(arrived, x1, rtol=1e-4, atol=1e-4)
    assert asked[0] == 0 and max(asked) < 1


def test_sample_weight_is_what_an_error_does_to_the_velocity(path: FlowPath) -> None:
    x0, x1 = fields(99)
    z = path.interpolate(x0, x1, INNER)
    error = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1)).double()
    shown = path.velocity_of_sample(x1 + error, z, INNER) - path.velocity_of_sample(x1, z, INNER)
    expected = path.sample_weight(INNER)[:, None, None, None] * error
    outside = 1 - path.end_margin - 1e-9 > INNER
    assert torch.allclose(shown[outside], expected[outside], rtol=1e-6, atol=1e-6)
    # In the margin the weight is bounded, the velocity is not: sampling goes all the way.
    weights = path.sample_weight(torch.linspace(0, 1, 101))
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert weights.max() <= 2.0 / path.end_margin + 2


def test_linear_weight_is_that_of_velocity_loss() -> None:
    weight = FlowPath().sample_weight(torch.tensor([0.0, 0.5, 0.9, 0.95]))
    assert torch.allclose(weight, torch.tensor([1.0, 2.0, 10.0, 20.0]), rtol=1e-5)


def test_logit_normal_times() -> None:
    def draw(**settings: float) -> Tensor:
        return TimeDensity(**settings).sample(20_000, torch.Generator().manual_seed(3))

    plain = draw(mean=-0.6, std=0.9)
    assert ((plain > 0) & (plain < 1)).all()
    logit = plain.double().logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((-0.6, 0.9), abs=0.03)
    shifted = draw(mean=-0.6, std=0.9, shift=3.0)
    assert torch.allclose(shifted, plain / (plain + 3 * (1 - plain)))
    assert shifted.mean() < plain.mean()  # towards noise
    assert torch.equal(plain, draw(mean=-0.6, std=0.9))


@pytest.mark.parametrize(
    "wrong", [{"name": "straight"}, {"prediction": "noise"}, {"end_margin": 0.0}, {"end_margin": 0.5}], ids=str
)
def test_wrong_paths_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FlowPath(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"shift": 0.0}, {"shift": -1.0}], ids=str)
def test_wrong_densities_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TimeDensity(**wrong)
