"""Guidance: predictions carried further than the network goes, away from what it predicts knowing less.

Of the prompt that is classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598). At finer levels
what is known without the network is the blurred coarser picture, and away from that goes `Guidance.sharpen`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE, MAX_DETAIL

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the prompt is followed, and when; and how much detail is added.

    Args:
        scale: 1 follows the conditional prediction alone; more pushes away from the unconditional one.
        shape: ``constant``; ``linear`` and ``cosine`` fall from ``scale`` at t = 0 to 1 at t = 1.
        interval: Flow times (from, to) within which guidance acts (Kynkaanniemi et al. 2024,
            https://arxiv.org/abs/2404.07724); outside, the unconditional network is not run.
        rescale: 0 to 1: how far the guided sample's contrast is brought back to the conditional one's
            (Lin et al. 2023, https://arxiv.org/abs/2305.08891).
        fine_levels: Whether finer levels are guided too, at twice their cost.
        detail: Factor of the detail that finer levels add to the coarser picture. Where a network is not sure of an
            edge what it predicts is softer than any edge: 1 leaves it so, more sharpens.
    """

    scale: float = DEFAULT_GUIDANCE
    shape: Shape = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    fine_levels: bool = False
    detail: float = DEFAULT_DETAIL

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ConfigError(f"guidance {self.scale} is not a number from 0 up", hint="1 is off; 1.5 to 4 is usual")
        if self.shape not in ("constant", "linear", "cosine"):
            raise ConfigError(f"unknown guidance shape '{self.shape}'", hint="constant, linear or cosine")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ConfigError(f"guidance interval {self.interval} is not within 0 to 1, rising")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance rescale {self.rescale} is outside 0 to 1")
        if not 0 <= self.detail <= MAX_DETAIL:
            raise ConfigError(
                f"detail {self.detail} is outside 0 to {MAX_DETAIL:g}",
                hint=f"1 is what the network predicts, {DEFAULT_DETAIL:g} the default; from 1.2 on edges get halos",
            )

    def at(self, t: float, level: int = 0) -> float:
        """The scale at flow time t; 1 means that the unconditional prediction is not needed."""
        if (level > 0 and not self.fine_levels) or not self.interval[0] <= t <= self.interval[1]:
            return 1.0
        fade = {"constant": 1.0, "linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t))}[self.shape]
        return 1 + (self.scale - 1) * fade

    def combine(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided prediction; all [B, C, H, W]."""
        guided = torch.lerp(unconditional, conditional, scale)
        if self.rescale:
            dims = tuple(range(1, conditional.ndim))
            ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp_min(1e-6)
            guided = guided * torch.lerp(torch.ones_like(ratio), ratio, self.rescale)
        return guided

    def sharpen(self, sample: Tensor, coarse: Tensor | None) -> Tensor:
        """A finer level's predicted sample with `detail` times what it adds to the blurred field ``coarse``; both
        [B, C, H, W]. At level 0, where that is None, the sample itself."""
        return sample if coarse is None or self.detail == 1 else torch.lerp(coarse, sample, self.detail)
