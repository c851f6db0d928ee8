"""How a cost grows: a power law through measured sizes, its interval, and what it says about sizes not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physformer_core.errors import ConfigError


@dataclass(frozen=True)
class PowerLaw:
    """``cost = factor * tokens ** exponent``, least squares in logarithms.

    Args:
        factor, exponent: Of the fit.
        half_width: Half the 95 % confidence interval of the exponent; None below three points.
    """

    factor: float
    exponent: float
    half_width: float | None

    def at(self, tokens: float) -> float:
        """The cost that the law gives for so many tokens."""
        return self.factor * tokens**self.exponent


def fit_power_law(tokens: Sequence[float], costs: Sequence[float]) -> PowerLaw:
    """Fits costs over tokens; the interval is Student's for the slope of a line.

    Raises:
        ConfigError: For fewer than two sizes, or a cost that is not above 0.
    """
    if len(tokens) < 2 or len(set(tokens)) < 2:
        raise ConfigError("a fit needs at least two sizes", hint="e.g. --tokens 1024,4096,16384,65536")
    if min(costs) <= 0:
        raise ConfigError(f"a power law has no cost of {min(costs)}")
    from scipy import stats

    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(costs, float))
    line = stats.linregress(x, y)
    degrees = len(tokens) - 2
    half = float(line.stderr * stats.t.ppf(0.975, degrees)) if degrees > 0 else None
    return PowerLaw(float(np.exp(line.intercept)), float(line.slope), half)


def field_shape(tokens: int, aspect: float = 16 / 9) -> tuple[int, int]:
    """Height and width in tokens of a field of about ``tokens`` with the given aspect."""
    height = max(1, round(math.sqrt(tokens / aspect)))
    return height, max(1, round(tokens / height))
