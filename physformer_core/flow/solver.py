"""Integrators of dz/dt = v(z, t) from t = 0 (start) to t = 1 (data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.flow import DEFAULT_STEPS

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, float, Tensor], None]
"""Called after each step with its index, the time reached and the field."""

MIN_STEP = 1 / 200
"""Shortest step of the adaptive solver."""


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """Which integrator, and how finely.

    Args:
        name: One of `SOLVERS`.
        steps: Steps from 0 to 1 (``adaptive`` chooses its own and takes this as the first guess).
        shift: s >= 1 spends more of the steps near the start: t -> t / (t + s (1 - t)).
        tolerance: Local error (in field units, root mean square) that ``adaptive`` allows per step.
    """

    name: str = "euler"
    steps: int = DEFAULT_STEPS[0]
    shift: float = 1.0
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ConfigError(f"unknown solver '{self.name}'", hint="one of " + ", ".join(SOLVERS))
        if self.steps < 1:
            raise ConfigError(
                f"steps must be at least 1, not {self.steps}", hint=f"{DEFAULT_STEPS[0]} is the default at level 0"
            )
        if self.shift <= 0 or self.tolerance <= 0:
            raise ConfigError("shift and tolerance must be above 0")

    def times(self) -> list[float]:
        """steps + 1 times from 0 to 1."""
        t = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        return (t / (t + self.shift * (1 - t))).tolist()


def euler(velocity: Velocity, z: Tensor, settings: SolverSettings, on_step: OnStep | None = None) -> Tensor:
    """First order; one evaluation a step."""
    times = settings.times()
    for index, (t, t_next) in enumerate(pairwise(times)):
        z = z + (t_next - t) * velocity(z, t)
        if on_step is not None:
            on_step(index, t_next, z)
    return z


def heun(velocity: Velocity, z: Tensor, settings: SolverSettings, on_step: OnStep | None = None) -> Tensor:
    """Second order; two evaluations a step, one at the last, whose far end is the data itself."""
    times = settings.times()
    for index, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(z, t)
        ahead = z + (t_next - t) * v
        z = ahead if index == settings.steps - 1 else z + (t_next - t) * (v + velocity(ahead, t_next)) / 2
        if on_step is not None:
            on_step(index, t_next, z)
    return z


def multistep(velocity: Velocity, z: Tensor, settings: SolverSettings, on_step: OnStep | None = None) -> Tensor:
    """Second-order Adams-Bashforth with variable steps; one evaluation a step."""
    times = settings.times()
    before: Tensor | None = None
    last = 0.0
    for index, (t, t_next) in enumerate(pairwise(times)):
        v, step = velocity(z, t), t_next - t
        slope = v if before is None else v + step / (2 * last) * (v - before)
        z = z + step * slope
        before, last = v, step
        if on_step is not None:
            on_step(index, t_next, z)
    return z


def adaptive(velocity: Velocity, z: Tensor, settings: SolverSettings, on_step: OnStep | None = None) -> Tensor:
    """Heun with its own step size: the difference to Euler estimates the error, which is held at ``tolerance``.

    The error is that of the worst picture in the batch, so a picture may take other steps in company than alone:
    the pipeline runs pictures one by one with this solver.
    """
    t, step, index = 0.0, 1.0 / settings.steps, 0
    v = velocity(z, t)
    while True:
        is_last = 1 - t <= step + MIN_STEP
        if is_last:
            # By Euler in two halves: at t = 1 itself there is no velocity to take, and from the second half's start
            # it leads straight to the data that the network sees there. The halves' difference is an error alike.
            step = 1 - t
            half = z + step / 2 * v
            v_ahead = velocity(half, t + step / 2)
            arrived, difference = half + step / 2 * v_ahead, step * (v_ahead - v)
        else:
            v_ahead = velocity(z + step * v, t + step)
            arrived, difference = z + step * (v + v_ahead) / 2, step / 2 * (v_ahead - v)
        error = difference.square().mean(tuple(range(1, z.ndim))).sqrt().max().item()
        # Halving stops at MIN_STEP: a field that rough is not made better by time.
        accepted = error <= settings.tolerance or step <= (2 * MIN_STEP if is_last else MIN_STEP)
        growth = min(2.0, max(0.3, 0.9 * (settings.tolerance / max(error, 1e-9)) ** 0.5))
        if accepted:
            z, t, index = arrived, (1.0 if is_last else t + step), index + 1
            if on_step is not None:
                on_step(index - 1, t, z)
            if is_last:
                return z
            v = velocity(z, t)
        elif is_last:
            growth = min(growth, 0.5)
        step = max(MIN_STEP, step * growth)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "multistep": multistep,
    "adaptive": adaptive,
}


def integrate(velocity: Velocity, z: Tensor, settings: SolverSettings, on_step: OnStep | None = None) -> Tensor:
    """Integrates from the start to the data with the solver that ``settings`` names."""
    return SOLVERS[settings.name](velocity, z, settings, on_step)


def steps_per_level(steps: int | Sequence[int] | None, levels: int) -> list[int]:
    """Steps of every level from what the user gave.

    Args:
        steps: None for `DEFAULT_STEPS`; a number for level 0, with the default's at finer levels; or one number per
            level, the last of which serves all levels beyond.
        levels: Number of levels.

    Raises:
        ConfigError: If a number is below 1.
    """
    if steps is None:
        given = list(DEFAULT_STEPS)
    elif isinstance(steps, int):
        given = [steps, *DEFAULT_STEPS[1:]]
    else:
        given = list(steps)
    if not given or min(given) < 1:
        raise ConfigError(
            f"steps must be at least 1, not {steps}", hint=f"{DEFAULT_STEPS[0]} is the default at level 0"
        )
    return [given[min(level, len(given) - 1)] for level in range(levels)]
