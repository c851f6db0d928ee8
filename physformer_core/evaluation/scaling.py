"""How the loss falls with parameters, data and compute: the fit, its intervals, and what it says of other budgets.

    L(N, D) = E + A / N^a + B / D^b

(Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, "approach 3"): N parameters, D training examples, each seen
once or more. With u = log A - a log N and so on, log L is the logarithm of a sum of exponentials, and

    sum over runs of Huber(log L_fit - log L, delta = 0.001)

is minimised by L-BFGS from a grid of starts; the best end counts. Compute is C = k N D with k measured from the runs
(about 6 operations per parameter and *token* going forth and back). Of all pairs with N D = C / k the loss is least at

    N = G (C/k)^(b / (a + b)),    D = (C/k)^(a / (a + b)) / G,    G = (a A / (b B))^(1 / (a + b))

Intervals are percentiles over bootstrap samples of the runs (Efron 1979), redrawn where a sample holds fewer than three
sizes or three budgets. A family of small runs says little about models a hundred times as large: look at the intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from physformer_core.errors import DataError

HUBER_DELTA = 1e-3
LEAST_RUNS, LEAST_VALUES = 6, 3
_BOUNDS = ((-60.0, 60.0), (-60.0, 60.0), (-20.0, 20.0), (0.0, 3.0), (0.0, 3.0))
_STARTS = tuple(itertools.product((-4.0, -1.0, 1.0), (-4.0, -1.0, 1.0), (-3.0, -1.0), (0.3, 1.0), (0.3, 1.0)))


@dataclass(frozen=True)
class ScalingPoint:
    """One finished run.

    Args:
        name: What it is called.
        parameters: Of the network.
        examples: Examples that it was trained on, repetitions counted.
        flops: Floating-point operations that the training took.
        loss: On held-out examples, at the end.
    """

    name: str
    parameters: float
    examples: float
    flops: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """``floor + size_factor / parameters^size_exponent + data_factor / examples^data_exponent``.

    Args:
        floor: E, the loss of an endless model on endless data.
        size_factor, size_exponent: A and a.
        data_factor, data_exponent: B and b.
        flops_per_pair: k: operations per parameter and example.
    """

    floor: float
    size_factor: float
    size_exponent: float
    data_factor: float
    data_exponent: float
    flops_per_pair: float

    def loss(self, parameters: float, examples: float) -> float:
        """The loss that the law gives."""
        size = self.size_factor / parameters**self.size_exponent
        return self.floor + size + self.data_factor / examples**self.data_exponent

    def best(self, flops: float) -> tuple[float, float]:
        """Parameters and examples of the least loss for so many operations.

        Raises:
            DataError: The law does not fall with both, so that there is no best size.
        """
        a, b = self.size_exponent, self.data_exponent
        if not self.has_best:
            raise DataError(
                "these runs show no gain from larger models, or none from more data: there is no best size",
                hint="add runs with other sizes and budgets",
            )
        pairs = flops / self.flops_per_pair
        balance = (a * self.size_factor / (b * self.data_factor)) ** (1 / (a + b))
        return balance * pairs ** (b / (a + b)), pairs ** (a / (a + b)) / balance

    @property
    def has_best(self) -> bool:
        """Whether the loss falls with both, so that a best size exists."""
        numbers = (self.size_exponent, self.data_exponent, self.size_factor, self.data_factor)
        return min(self.size_exponent, self.data_exponent) > 1e-6 and min(numbers) > 0

    @property
    def compute_exponent(self) -> float:
        """How fast the part of the loss above the floor falls with compute at the best size: a b / (a + b)."""
        total = self.size_exponent + self.data_exponent
        return self.size_exponent * self.data_exponent / total if total else 0.0


@dataclass(frozen=True)
class Interval:
    """A value and the 2.5th and 97.5th percentile of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Frontier:
    """``loss = factor * flops^-exponent`` through the runs that no other run beats with as little compute.

    Args:
        factor, exponent: Of the line in logarithms.
        exponent_interval: Bootstrap over the runs; None where too few samples had a frontier.
        names: The runs on it.
    """

    factor: float
    exponent: float
    exponent_interval: tuple[float, float] | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The best size for a budget: operations, parameters, examples and loss, the last three with intervals."""

    flops: float
    parameters: Interval
    examples: Interval
    loss: Interval
    extrapolated: bool


@dataclass(frozen=True)
class ScalingReport:
    """A fit and everything derived from it.

    Args:
        points: The runs.
        law: The fit.
        intervals: Of its numbers and of ``compute_exponent``, by name.
        residual: Root mean square of log(loss / fitted loss).
        frontier: The line over compute, or None below three runs on it.
        predictions: For the budgets asked for.
        samples, seed: Of the bootstrap.
    """

    points: tuple[ScalingPoint, ...]
    law: ScalingLaw
    intervals: dict[str, Interval]
    residual: float
    frontier: Frontier | None
    predictions: tuple[Prediction, ...]
    samples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": "physformer-scaling/1", **asdict(self)}


def fit_law(points: Sequence[ScalingPoint]) -> ScalingLaw:
    """Fits the law to runs.

    Raises:
        DataError: There are fewer than `LEAST_RUNS` runs, or fewer than `LEAST_VALUES` sizes or amounts of data, or a
            run has a value that is not above zero.
    """
    check_points(points)
    return _fit(points, _STARTS)[0]


def analyse(
    points: Sequence[ScalingPoint],
    *,
    budgets: Sequence[float] | None = None,
    samples: int = 200,
    seed: int = 0,
    on_sample: Callable[[int], None] | None = None,
) -> ScalingReport:
    """Fits the law, its bootstrap, the frontier, and predicts the best size for budgets.

    Args:
        points: The runs.
        budgets: Operations to predict the best size for; ten times the largest run's if not given and there is a best.
        samples: Bootstrap samples.
        seed: Of the bootstrap.
        on_sample: Told how many are done.

    Raises:
        DataError: See `fit_law`; or a budget was asked for and there is no best size.
    """
    check_points(points)
    law, inner = _fit(points, _STARTS)
    if not budgets:
        budgets = [10 * max(point.flops for point in points)] if law.has_best else []
    best = [law.best(flops) for flops in budgets]
    generator = np.random.default_rng([seed, 0x5CA1E])
    laws: list[ScalingLaw] = []
    exponents: list[float] = []
    for number in range(samples):
        drawn = _resample(points, generator)
        laws.append(_fit(drawn, (tuple(inner), *_STARTS[:1]))[0])
        if (line := _frontier_line(drawn)) is not None:
            exponents.append(line[1])
        if on_sample is not None:
            on_sample(number + 1)
    names = ("floor", "size_factor", "size_exponent", "data_factor", "data_exponent", "compute_exponent")
    intervals = {name: _interval(getattr(law, name), [getattr(one, name) for one in laws]) for name in names}
    most = max(point.flops for point in points)
    predictions = []
    for flops, (parameters, examples) in zip(budgets, best, strict=True):
        useful = [one for one in laws if one.has_best]
        others = [one.best(flops) for one in useful]
        losses = [one.loss(*pair) for one, pair in zip(useful, others, strict=True)]
        predictions.append(
            Prediction(
                flops,
                _interval(parameters, [pair[0] for pair in others]),
                _interval(examples, [pair[1] for pair in others]),
                _interval(law.loss(parameters, examples), losses),
                flops > most,
            )
        )
    logs = [math.log(point.loss / law.loss(point.parameters, point.examples)) for point in points]
    return ScalingReport(
        tuple(points),
        law,
        intervals,
        float(np.sqrt(np.square(logs).mean())),
        _frontier(points, exponents),
        tuple(predictions),
        samples,
        seed,
    )


def frontier_points(points: Sequence[ScalingPoint]) -> list[ScalingPoint]:
    """The runs that no other beats with as little compute, by rising compute."""
    kept: list[ScalingPoint] = []
    for point in sorted(points, key=lambda one: (one.flops, one.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def check_points(points: Sequence[ScalingPoint]) -> None:
    """Refuses runs that no law can be fitted to; see `fit_law`."""
    for point in points:
        for name, value in asdict(point).items():
            if name != "name" and not (math.isfinite(value) and value > 0):
                raise DataError(f"the run {point.name} has {name} {value}", hint="it must be a number above 0")
    check_family(len(points), len({point.parameters for point in points}), len({point.examples for point in points}))


def check_family(runs: int, sizes: int, amounts: int) -> None:
    """Refuses so few runs, sizes and amounts of data that no law can be fitted to them.

    Raises:
        DataError: They are too few.
    """
    if runs < LEAST_RUNS or min(sizes, amounts) < LEAST_VALUES:
        raise DataError(
            f"{runs} runs of {sizes} sizes and {amounts} amounts of data are too few for five numbers",
            hint=f"at least {LEAST_RUNS} runs, {LEAST_VALUES} sizes and {LEAST_VALUES} amounts of data",
        )


def _fit(points: Sequence[ScalingPoint], starts: Sequence[Sequence[float]]) -> tuple[ScalingLaw, np.ndarray]:
    """The law, and where the search ended (about the means of log N and log D, so that starts fit any family)."""
    from scipy.optimize import minimize

    n = np.log([point.parameters for point in points])
    d = np.log([point.examples for point in points])
    y = np.log([point.loss for point in points])
    n0, d0 = n.mean(), d.mean()
    level = y.min()

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        log_a, log_b, log_e, a, b = values
        parts = np.stack([log_a - a * (n - n0), log_b - b * (d - d0), np.full_like(n, log_e)])
        top = parts.max(0)
        shares = np.exp(parts - top)
        total = shares.sum(0)
        error = top + np.log(total) + level - y
        shares /= total
        small = np.abs(error) <= HUBER_DELTA
        loss = np.where(small, error**2 / 2, HUBER_DELTA * (np.abs(error) - HUBER_DELTA / 2)).sum()
        slope = np.clip(error, -HUBER_DELTA, HUBER_DELTA)
        gradient = np.array([
            (slope * shares[0]).sum(), (slope * shares[1]).sum(), (slope * shares[2]).sum(),
            (slope * shares[0] * (n0 - n)).sum(), (slope * shares[1] * (d0 - d)).sum(),
        ])  # fmt: skip
        # In units of delta: L-BFGS stops by differences that are absolute.
        return float(loss / HUBER_DELTA**2), gradient / HUBER_DELTA**2

    ends = [
        minimize(objective, np.asarray(start, float), jac=True, method="L-BFGS-B", bounds=_BOUNDS) for start in starts
    ]
    best = min(ends, key=lambda end: end.fun)
    log_a, log_b, log_e, a, b = best.x
    pairs = np.log([point.flops / (point.parameters * point.examples) for point in points])
    law = ScalingLaw(
        floor=math.exp(log_e + level),
        size_factor=math.exp(log_a + level + a * n0),
        size_exponent=float(a),
        data_factor=math.exp(log_b + level + b * d0),
        data_exponent=float(b),
        flops_per_pair=math.exp(float(np.median(pairs))),
    )
    return law, np.asarray(best.x)


def _resample(points: Sequence[ScalingPoint], generator: np.random.Generator) -> list[ScalingPoint]:
    while True:
        drawn = [points[int(index)] for index in generator.integers(len(points), size=len(points))]
        values = ({point.parameters for point in drawn}, {point.examples for point in drawn})
        if min(map(len, values)) >= LEAST_VALUES:
            return drawn


def _frontier_line(points: Sequence[ScalingPoint]) -> tuple[float, float] | None:
    """(factor, exponent), or None below three runs."""
    best = frontier_points(points)
    if len(best) < LEAST_VALUES:
        return None
    slope, intercept = np.polyfit(np.log([p.flops for p in best]), np.log([p.loss for p in best]), 1)
    return math.exp(intercept), -float(slope)


def _frontier(points: Sequence[ScalingPoint], exponents: Sequence[float]) -> Frontier | None:
    line = _frontier_line(points)
    if line is None:
        return None
    spread = tuple(np.percentile(exponents, (2.5, 97.5)).tolist()) if len(exponents) >= 20 else None
    return Frontier(*line, spread, tuple(point.name for point in frontier_points(points)))  # type: ignore[arg-type]


def _interval(value: float, samples: Sequence[float]) -> Interval:
    if not samples:
        return Interval(value, -math.inf, math.inf)
    low, high = np.percentile(samples, (2.5, 97.5))
    return Interval(value, float(low), float(high))
