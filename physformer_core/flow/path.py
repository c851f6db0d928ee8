"""Paths between the start x0 (noise, or the blurred field plus noise) and the data x1, and what is predicted.

Along a path ``z_t = a(t) x1 + b(t) x0`` with t = 0 at the start and t = 1 at the data, the velocity is
``a'(t) x1 + b'(t) x0`` (flow matching: Lipman et al. 2022, https://arxiv.org/abs/2210.02747). A network predicts
either the velocity or the sample x1 itself; the loss is always on the velocity (JiT, Li & He 2025,
https://arxiv.org/abs/2511.13720), which weights the end of the path where details are decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from physformer_core.errors import ConfigError

PathName = Literal["linear", "cosine", "quadratic", "vp"]
Prediction = Literal["sample", "velocity"]

PATHS: tuple[PathName, ...] = ("linear", "cosine", "quadratic", "vp")
VP_SHARPNESS = 3.0
"""Exponent of the ``vp`` path's noise schedule: b(t) = exp(-VP_SHARPNESS t^2 / 2), made to end at 0. (Were b^2 made to
end at 0, b would fall with an infinite slope there, and a sampler's last step would leave noise behind.)"""

LAST_MOMENT = 1e-4
"""Distance to t = 1 below which `FlowPath.velocity_of_sample` takes the velocity of that distance."""


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """A path and the kind of prediction made along it.

    Args:
        name: ``linear`` (a = t, b = 1 - t), ``cosine`` (a = sin, b = cos of pi t / 2), ``quadratic`` (a = t^2,
            b = (1 - t)^2) or ``vp`` (variance preserving, a^2 + b^2 = 1, with a squared-exponential schedule).
        prediction: ``sample`` (the network returns x1) or ``velocity``.
        end_margin: Distance to t = 1 below which the weight of a sample's error in the loss grows no more.
    """

    name: PathName = "linear"
    prediction: Prediction = "sample"
    end_margin: float = 0.05

    def __post_init__(self) -> None:
        if self.name not in PATHS:
            raise ConfigError(f"unknown path '{self.name}'", hint="one of " + ", ".join(PATHS))
        if self.prediction not in ("sample", "velocity"):
            raise ConfigError(f"unknown prediction '{self.prediction}'", hint="'sample' or 'velocity'")
        if not 0 < self.end_margin < 0.5:
            raise ConfigError(f"end_margin {self.end_margin} is outside (0, 0.5)")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a(t), b(t), a'(t), b'(t), each of t's shape."""
        if self.name == "linear":
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
        if self.name == "cosine":
            angle = t * (math.pi / 2)
            return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()
        if self.name == "quadratic":
            return t.square(), (1 - t).square(), 2 * t, -2 * (1 - t)
        t = t.clamp_min(1e-6)  # the slope of a is finite at 0, but 0 / 0 as it is written
        rest = 1 - math.exp(-VP_SHARPNESS / 2)
        distance = -torch.expm1(-VP_SHARPNESS / 2 * t.square()) / rest  # 1 - b, without cancellation near t = 0
        b = 1 - distance
        a = (distance * (1 + b)).sqrt()
        slope_b = -VP_SHARPNESS * t * torch.exp(-VP_SHARPNESS / 2 * t.square()) / rest
        return a, b, -b * slope_b / a, slope_b

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """z_t for fields [B, C, H, W] and times [B]."""
        a, b, _, _ = (c[:, None, None, None] for c in self.coefficients(t))
        return a * x1 + b * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """dz/dt for fields [B, C, H, W] and times [B]."""
        _, _, slope_a, slope_b = (c[:, None, None, None] for c in self.coefficients(t))
        return slope_a * x1 + slope_b * x0

    def velocity_of_sample(self, sample: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity at z_t = z if the path ended in ``sample``.

        The division by what is left of the path is exact up to `LAST_MOMENT` of its end: a step is never longer
        than what is left, so it does no harm, and a margin as in the loss would leave noise in the picture.
        """
        a, b, slope_a, slope_b = self.coefficients(t.clamp(max=1 - LAST_MOMENT))
        gain = (slope_a - slope_b * a / b)[:, None, None, None]
        return gain * sample + (slope_b / b)[:, None, None, None] * z

    def at_straight_time(self, time: float) -> tuple[float, float]:
        """Where this path is when the straight one is at ``time``, in [0, 1].

        All these paths are one up to time and scale: z_t = s (u x1 + (1 - u) x0) with s = a(t) + b(t), u = a(t) / s.

        Returns:
            This path's time t, and its scale s there.
        """
        to_data, to_start = time, 1 - time
        if self.name == "linear":
            return time, 1.0
        if self.name == "cosine":
            angle = math.atan2(to_data, to_start)
            return angle / (math.pi / 2), math.sin(angle) + math.cos(angle)
        if self.name == "quadratic":
            t = math.sqrt(to_data) / (math.sqrt(to_data) + math.sqrt(to_start))
            return t, t**2 + (1 - t) ** 2
        length = math.hypot(to_data, to_start)
        rest = 1 - math.exp(-VP_SHARPNESS / 2)
        t = math.sqrt(-2 / VP_SHARPNESS * math.log1p(-(1 - to_start / length) * rest))
        return t, (to_data + to_start) / length

    def straight_velocity(self, sample: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
        """The velocity along the straight path of a network that knows this path's fields and times.

        Along the straight path a step to the end lands on the sample, however long it is. Along others it does not:
        their velocity at the start is that of where they begin to bend. (DDIM, Song et al. 2021,
        https://arxiv.org/abs/2010.02502, is Euler's method on the straight path.)

        Args:
            sample: From a field on this path and its time to the predicted sample.

        Returns:
            From a field on the straight path [B, C, H, W] and its time to dz/dt there.
        """
        straight = FlowPath()

        def velocity(z: Tensor, time: float) -> Tensor:
            t, scale = self.at_straight_time(time)
            time_b = torch.full((z.shape[0],), time, device=z.device)
            return straight.velocity_of_sample(sample(scale * z, t), z, time_b)

        return velocity

    def sample_weight(self, t: Tensor) -> Tensor:
        """Factor [B] by which an error of the sample shows in the velocity: the square root of the v-loss weight.

        Inside ``end_margin`` of t = 1 the division is by the margin, so that the weight stays bounded.
        """
        a, b, slope_a, slope_b = self.coefficients(t)
        _, b_margin, _, _ = self.coefficients(torch.full_like(t, 1 - self.end_margin))
        return slope_a - slope_b * a / torch.maximum(b, b_margin)

    def sample_of_velocity(self, velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The data that a path through z with this velocity ends in, for t within (0, 1)."""
        a, b, slope_a, slope_b = (c[:, None, None, None] for c in self.coefficients(t))
        return (b * velocity - slope_b * z) / (slope_a * b - slope_b * a)


@dataclass(frozen=True, kw_only=True)
class TimeDensity:
    """Logit-normal density of training times (Esser et al. 2024, https://arxiv.org/abs/2403.03206).

    Args:
        mean, std: Of the normal variable; a negative mean prefers the noisy end.
        shift: Resolution shift s >= 1: t <- t / (t + s (1 - t)), towards noise for larger pictures.
    """

    mean: float = -0.6
    std: float = 0.9
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0 or self.shift <= 0:
            raise ConfigError(f"time density needs std and shift above 0, not {self.std} and {self.shift}")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` times in (0, 1), drawn on the CPU."""
        t = torch.sigmoid(torch.randn(count, generator=generator) * self.std + self.mean)
        return t / (t + self.shift * (1 - t))
