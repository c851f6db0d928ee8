"""What a step's gradients do to weights and average: nothing, where they or the loss are not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from physformer_core.data.loader import Batch
from physformer_core.training.distributed import Ranks
from physformer_core.training.ema import WeightAverage
from physformer_core.training.gradients import StepLosses
from physformer_core.training.optimizer import Optimizer

MAX_BAD_STEPS = 10
"""Steps in a row with a non-finite loss or gradient after which training stops."""


class Updates:
    """Updates weights and their average, and counts the steps that were left out.

    Whether a step's numbers are finite is known where they are computed. A GPU that is asked has finished the step by
    the time that it answers, and then waits for Python to start the optimizer's hundreds of operations. So with
    ``ahead`` they are started unasked, with a switch on the device that turns them into nothing, and the answer is read
    when the next step is on its way. The weights are the same either way.

    Args:
        optimizer, average: What is updated.
        ranks: This process among the others.
        ahead: Start a step's update before it is known whether it is wanted.
        on_spoilt: Called with a step and its batch when it is the `MAX_BAD_STEPS`-th in a row to be left out; raises.

    Attributes:
        skipped: Steps left out so far. With ``ahead`` the last one is not counted before `settle`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        average: WeightAverage,
        ranks: Ranks,
        *,
        ahead: bool,
        on_spoilt: Callable[[int, Batch], None],
    ) -> None:
        self._optimizer, self._average, self._ranks = optimizer, average, ranks
        self._ahead, self._on_spoilt = ahead, on_spoilt
        self._asked: deque[tuple[int, Batch, _Answer]] = deque()
        self._in_a_row = 0
        self.skipped = 0

    def apply(self, step: int, factor: float, batch: Batch, losses: StepLosses) -> None:
        """Updates at ``factor`` of the peak learning rates, or leaves everything as it is; clears the gradients.

        Args:
            step: Its number, from 0.
            factor: See `schedule`.
            batch: What it was computed on, to name its examples.
            losses: Of the step, whose gradients are in the weights.
        """
        if self._ahead:
            finite = torch.isfinite(losses.norm) & torch.isfinite(losses.mean)
            found_inf = 1 - finite.float()
            self._optimizer.step(factor, found_inf)
            self._average.update(step, found_inf)
            self._asked.append((step, batch, _Answer(finite)))
            self._read(leave=1)
        else:
            # A loss can overflow whose gradients do not, on one rank alone; the norm is every rank's.
            spoilt = not torch.isfinite(losses.norm) or self._ranks.any(not torch.isfinite(losses.mean))
            if not spoilt:
                self._optimizer.step(factor)
                self._average.update(step)
            self._count(step, batch, spoilt)
        self._optimizer.zero_grad()

    def settle(self) -> None:
        """Waits for the last step, and counts it."""
        self._read(leave=0)

    def _read(self, leave: int) -> None:
        while len(self._asked) > leave:
            step, batch, answer = self._asked.popleft()
            self._count(step, batch, not answer.read())

    def _count(self, step: int, batch: Batch, spoilt: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if spoilt else 0
        self.skipped += spoilt
        if self._in_a_row >= MAX_BAD_STEPS:
            self._on_spoilt(step, batch)


@dataclass
class _Answer:
    """A truth value that is on its way from a device."""

    value: Tensor

    def __post_init__(self) -> None:
        self._arrived: torch.cuda.Event | None = None
        if self.value.device.type == "cuda":
            here = torch.empty((), dtype=torch.bool, pin_memory=True)
            stream = torch.cuda.current_stream(self.value.device)  # another device may be the current one
            self.value = here.copy_(self.value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)

    def read(self) -> bool:
        """Waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self.value)
