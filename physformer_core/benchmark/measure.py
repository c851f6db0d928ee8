"""Plans and takes measurements: sizes one after the other, contenders in turn, repeats in rounds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from physformer_core.benchmark.cases import QUADRATIC, Case
from physformer_core.benchmark.fit import PowerLaw, fit_power_law, fit_quadratic_law
from physformer_core.benchmark.machine import MachinePeak
from physformer_core.benchmark.workers import OutOfMemory, Sample, Worker
from physformer_core.errors import ConfigError, DeviceError

SLOW_SECONDS = 30.0
"""A run that takes longer is not repeated: its warm-up is its measurement."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one case took.

    Args:
        case: What was measured.
        status: ``measured``; ``extrapolated`` (from the contender's own fit over smaller sizes: time only);
            ``out of memory``; ``not run``.
        samples: Seconds of every timed run, in order.
        seconds: Their median.
        spread: Slowest less fastest.
        peak_bytes: Memory needed beyond the loaded model.
        process_bytes: Peak memory of the whole process (CPU) or of the allocator (CUDA).
        flops, bytes: Operations and bytes of one run, see `CostCounter`.
        parameters: Of the network or layer.
        note: Why there is no measurement, or what to know about it.
    """

    case: Case
    status: str
    samples: tuple[float, ...] = ()
    seconds: float | None = None
    spread: float | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    parameters: int | None = None
    note: str = ""


def measure_together(
    cases: Sequence[Case],
    *,
    repeats: int,
    peak: MachinePeak | None = None,
    slow_seconds: float = SLOW_SECONDS,
    on_run: Callable[[Case], None] | None = None,
) -> list[Measurement]:
    """Measures contenders of one size, each in a process of its own, in rounds: one run of each, and again.

    The first round warms up and counts operations, and is not timed, but for a contender that takes longer than
    `slow_seconds`: that one runs no more.

    Args:
        cases: The contenders.
        repeats: Timed rounds, at least 1.
        peak: Measured again in every round, so that what is compared with it saw the same machine.
        slow_seconds: See above.
        on_run: Called after each run.
    """
    samples: list[list[Sample]] = [[] for _ in cases]
    notes = [""] * len(cases)
    parameters: list[int | None] = [None] * len(cases)
    workers: dict[int, Worker] = {}
    with ExitStack() as stack:
        for index, case in enumerate(cases):
            try:
                worker = stack.enter_context(Worker(case))
            except OutOfMemory as error:
                notes[index] = error.message
                continue
            workers[index], parameters[index] = worker, worker.parameters
        for turn in range(repeats + 1):
            if peak is not None:
                peak.observe(0.1)
            for index, worker in list(workers.items()):
                try:
                    samples[index].append(worker.run(counted=turn == 0))
                except OutOfMemory as error:
                    notes[index] = error.message
                if on_run is not None:
                    on_run(cases[index])
                if notes[index] or samples[index][-1].seconds > slow_seconds:
                    workers.pop(index).close()
    return [
        _summary(case, taken, note, count)
        for case, taken, note, count in zip(cases, samples, notes, parameters, strict=True)
    ]


def _summary(case: Case, taken: Sequence[Sample], note: str, parameters: int | None) -> Measurement:
    if note or not taken:
        return Measurement(case=case, status="out of memory", note=note, parameters=parameters)
    timed = [sample.seconds for sample in (taken[1:] or taken)]
    return Measurement(
        case=case,
        status="measured",
        samples=tuple(timed),
        seconds=statistics.median(timed),
        spread=max(timed) - min(timed),
        peak_bytes=max(sample.peak_bytes for sample in taken),
        process_bytes=max(sample.process_bytes for sample in taken),
        flops=taken[0].flops,
        bytes=taken[0].bytes,
        parameters=parameters,
        note="" if taken[1:] else "one run, the first",
    )


def measure_sizes(
    sizes: Sequence[tuple[int, int]],
    contenders: Sequence[str],
    template: Case,
    *,
    repeats: int,
    quadratic_limit: int,
    peak: MachinePeak | None = None,
    slow_seconds: float = SLOW_SECONDS,
    on_run: Callable[[Case], None] | None = None,
) -> list[Measurement]:
    """Measures contenders over sizes.

    Args:
        sizes: (height, width), smallest first.
        contenders: Names; all meet at every size.
        template: A case whose size and contender are replaced.
        repeats, peak, slow_seconds, on_run: See `measure_together`.
        quadratic_limit: Tokens above which contenders of quadratic time are not run but extrapolated from their fit
            over the sizes below; if there are fewer than two, they are not run.
    """
    done: list[Measurement] = []
    for height, width in sizes:
        cases = [
            dataclasses.replace(template, contender=name, height=height, width=width)
            for name in contenders
            if name not in QUADRATIC or height * width <= quadratic_limit
        ]
        done += measure_together(cases, repeats=repeats, peak=peak, slow_seconds=slow_seconds, on_run=on_run)
        for name in contenders:
            if name in QUADRATIC and height * width > quadratic_limit:
                case = dataclasses.replace(template, contender=name, height=height, width=width)
                done.append(extrapolated(case, done))
    return done


def extrapolated(case: Case, done: Sequence[Measurement]) -> Measurement:
    """The time of a quadratic case by its contender's measured sizes; not run if there are fewer than two."""
    own = [one for one in done if group_of(one.case) == group_of(case) and one.status == "measured" and one.seconds]
    if len({one.case.tokens for one in own}) < 2:
        note = "above --dense-limit, and fewer than two smaller sizes to extrapolate from"
        return Measurement(case=case, status="not run", note=note)
    law = fit_quadratic_law([one.case.tokens for one in own], [one.seconds or 0.0 for one in own])
    sizes = sorted({one.case.tokens for one in own})
    met = f"which it meets to {100 * law.residual:.0f} %" if len(sizes) > 2 else "two sizes, so nothing checks it"
    return Measurement(
        case=case,
        status="extrapolated",
        seconds=law.at(case.tokens),
        note=f"a tokens + b tokens^2 through its sizes up to {sizes[-1]:,}, {met}",
    )


def group_of(case: Case) -> tuple[str, int, str]:
    """What must be alike for cases to lie on one line: contender, batch and dtype."""
    return case.contender, case.batch, case.dtype


def fits(done: Sequence[Measurement]) -> dict[tuple[str, int, str], dict[str, PowerLaw]]:
    """Growth of time and memory over tokens for every group (see `group_of`) with at least two measured sizes."""
    laws: dict[tuple[str, int, str], dict[str, PowerLaw]] = {}
    for group in dict.fromkeys(group_of(one.case) for one in done):
        own = [one for one in done if group_of(one.case) == group and one.status == "measured"]
        tokens = [one.case.tokens for one in own]
        if len(set(tokens)) < 2:
            continue
        laws[group] = {
            "time": fit_power_law(tokens, [one.seconds or 0.0 for one in own]),
            "memory": fit_power_law(tokens, [float(max(one.peak_bytes or 0, 1)) for one in own]),
        }
    return laws


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch that fits.

    Args:
        batch: Pictures at once; 0 if not even one fits.
        peak_bytes: What that batch needed beyond the model.
        limit_bytes: What it was allowed.
        tried: Every batch that was tried, with whether it fitted.
    """

    batch: int
    peak_bytes: int
    limit_bytes: int
    tried: tuple[tuple[int, bool], ...]


def find_batch_size(
    case: Case, *, limit_bytes: int, most: int = 4096, on_try: Callable[[int], None] | None = None
) -> BatchLimit:
    """Doubles the batch until it no longer fits into the limit, then halves the gap. Every try is a fresh process.

    A batch fits if its peak is below the limit; on Linux the process may not allocate much more than that, so that a
    try that is too large fails by itself.

    Args:
        case: What to run; its batch is replaced.
        limit_bytes: Memory that a batch may need beyond the loaded model.
        most: The largest batch that is tried.
        on_try: Called with each batch before it is tried.

    Raises:
        ConfigError: The limit is not above 0.
        DeviceError: Not even one picture fits.
    """
    if limit_bytes <= 0:
        raise ConfigError(f"a memory limit of {limit_bytes} bytes leaves no room")
    tried: dict[int, int | None] = {}

    def fits_in(batch: int) -> bool:
        if on_try is not None:
            on_try(batch)
        try:
            # Address space is more than what is used of it: the peak decides, this only stops the reckless.
            with Worker(dataclasses.replace(case, batch=batch), memory_limit=2 * limit_bytes + 2**30) as worker:
                needed: int | None = worker.run().peak_bytes
        except OutOfMemory:
            needed = None
        tried[batch] = needed if needed is not None and needed <= limit_bytes else None
        return tried[batch] is not None

    good, bad = 0, 1
    while bad <= most and fits_in(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits_in(middle):
            good = middle
        else:
            bad = middle
    if not good:
        raise DeviceError(
            f"not even one picture of {case.tokens} tokens fits into {limit_bytes / 1e9:.2f} GB",
            hint="a smaller size, or --memory with more",
        )
    return BatchLimit(good, tried[good] or 0, limit_bytes, tuple((b, n is not None) for b, n in sorted(tried.items())))
