"""Whether a run that is a check has passed: its loss at the end against its loss at the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from physformer_core.training.curves import read_curves

_LAST_SHARE = 0.1


@dataclass(frozen=True)
class Verdict:
    """A run's outcome.

    Args:
        first: Loss of the first log record.
        last: Mean loss of the records of the last tenth of the steps.
        below: The share of ``first`` that ``last`` must stay below.
    """

    first: float
    last: float
    below: float

    @property
    def share(self) -> float:
        """What is left of the loss."""
        return self.last / self.first

    @property
    def passed(self) -> bool:
        """Whether little enough is left."""
        return self.share < self.below

    @property
    def line(self) -> str:
        """The verdict in one line that begins with PASS or FAIL."""
        sign = "<" if self.passed else "is not below"
        return (
            f"{'PASS' if self.passed else 'FAIL'}: the loss went from {self.first:.4g} to {self.last:.4g}, "
            f"{self.share:.1%} of it, {sign} {self.below:.1%}"
        )


def judge(log: Path, below: float) -> Verdict:
    """Judges a finished run by its ``log.jsonl``, by whole pictures if it trained on any, else by crops.

    Args:
        log: The log.
        below: Share of the first loss that the last ones must stay below.

    Raises:
        DataError: There is no log, or it holds no training losses.
    """
    curve = next(curve for curve in read_curves(log) if not curve.validation)
    settled = curve.steps > (1 - _LAST_SHARE) * curve.steps[-1]
    return Verdict(float(curve.losses[0]), float(np.mean(curve.losses[settled])), below)
