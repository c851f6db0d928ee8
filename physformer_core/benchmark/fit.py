"""How a cost grows: laws through measured sizes, and what they say about sizes not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    _check_sizes(tokens, costs)
    from scipy import stats

    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(costs, float))
    line = stats.linregress(x, y)
    degrees = len(tokens) - 2
    half = float(line.stderr * stats.t.ppf(0.975, degrees)) if degrees > 0 else None
    return PowerLaw(float(np.exp(line.intercept)), float(line.slope), half)


@dataclass(frozen=True)
class QuadraticLaw:
    """``cost = linear * tokens + square * tokens ** 2``: what dense attention and everything beside it cost.

    Args:
        linear, square: Of the fit; neither is negative.
        residual: Root mean square of the relative differences to the costs it was made from.
    """

    linear: float
    square: float
    residual: float

    def at(self, tokens: Any) -> Any:
        """The cost that the law gives for so many tokens, a number or an array."""
        return self.linear * tokens + self.square * tokens**2


def fit_quadratic_law(tokens: Sequence[float], costs: Sequence[float]) -> QuadraticLaw:
    """Fits costs over tokens, least squares of relative differences.

    A power law through sizes of which the smaller ones are mostly linear has too low an exponent for the larger ones.

    Raises:
        ConfigError: For fewer than two sizes, or a cost that is not above 0.
    """
    _check_sizes(tokens, costs)
    from scipy.optimize import nnls

    x, y = np.asarray(tokens, float), np.asarray(costs, float)
    scale = x.max()  # both columns of about one size, whatever the unit
    (linear, square), _ = nnls(np.stack([x / scale, (x / scale) ** 2], axis=1) / y[:, None], np.ones(len(x)))
    law = QuadraticLaw(float(linear / scale), float(square / scale**2), 0.0)
    return replace(law, residual=float(np.sqrt(np.mean((law.at(x) / y - 1) ** 2))))


def _check_sizes(tokens: Sequence[float], costs: Sequence[float]) -> None:
    if len(tokens) < 2 or len(set(tokens)) < 2:
        raise ConfigError("a fit needs at least two sizes", hint="e.g. --tokens 1024,4096,16384,65536")
    if min(costs) <= 0:
        raise ConfigError(f"a cost of {min(costs)} cannot be fitted")


def field_shape(tokens: int, aspect: float = 16 / 9) -> tuple[int, int]:
    """Height and width in tokens of a field of about ``tokens`` with the given aspect."""
    height = max(1, round(math.sqrt(tokens / aspect)))
    return height, max(1, round(tokens / height))
