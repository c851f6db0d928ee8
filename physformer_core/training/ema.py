"""Exponential moving average of the weights: what is validated, sampled from and shipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Float32 average of a model's trained parameters, with a decay that warms up so that early weights are forgotten.

    Args:
        model: Whose weights are averaged.
        decay: Final decay per step; at step t it is at most (1 + t) / (10 + t).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._params: list[Tensor] = [p.detach() for _, p in _trained(model)]
        self.shadow: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in _trained(model)}
        self._held: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int, found_inf: Tensor | None = None) -> None:
        """Moves the average towards the weights after optimizer step ``step`` (counted from 0).

        ``found_inf`` is a number on the device: the average stays where it is if it is 1.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        params, averages = self._params, list(self.shadow.values())
        if found_inf is None:
            torch._foreach_lerp_(averages, params, 1 - decay)
        else:  # there is no lerp with a weight on the device
            moves = torch._foreach_sub(params, averages)
            torch._foreach_mul_(moves, (1 - decay) * (1 - found_inf))
            torch._foreach_add_(averages, moves)

    @torch.no_grad()
    def swap_in(self, model: nn.Module) -> None:
        """Puts the average into the model; `swap_out` undoes it."""
        self._held = {name: p.detach().clone() for name, p in _trained(model)}
        for name, param in _trained(model):
            param.copy_(self.shadow[name])

    @torch.no_grad()
    def swap_out(self, model: nn.Module) -> None:
        """Restores the weights that `swap_in` set aside."""
        assert self._held is not None
        for name, param in _trained(model):
            param.copy_(self._held[name])
        self._held = None


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters but for frozen ones, which stay what they are."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]
