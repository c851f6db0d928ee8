"""Time and memory of one network evaluation against the number of tokens, each size in a process of its own.

A fresh process per measurement makes peak memory honest: nothing is left over from a larger or smaller size.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from physformer_core.config import load_preset
from physformer_core.errors import ConfigError, DeviceError
from physformer_core.hardware import resolve_device, resolve_dtype
from physformer_core.model.transformer import PhysFormerTransformer2DModel

TEXT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class EvaluationCase:
    """One network evaluation to measure.

    Args:
        preset: Whose model is built, with random weights.
        backend: Attention backend.
        height, width: Size in tokens.
        dtype: Name of the weights' dtype.
        device: Device name.
        repeats: Timed evaluations, after one warm-up.
    """

    preset: str
    backend: str
    height: int
    width: int
    dtype: str = "auto"
    device: str = "auto"
    repeats: int = 3

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, kw_only=True)
class EvaluationMeasurement:
    """What one case took.

    Args:
        tokens: Tokens of the field.
        seconds: Median time of an evaluation.
        spread: Slowest less fastest, in seconds.
        peak_bytes: Memory that the evaluations needed beyond the loaded model.
        process_bytes: Peak memory of the whole process (CPU) or of the allocator (CUDA).
    """

    tokens: int
    seconds: float
    spread: float
    peak_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class PowerLaw:
    """``cost = factor * tokens ** exponent``, least squares in logarithms.

    Args:
        factor, exponent: Of the fit.
        half_width: Half the 95 % confidence interval of the exponent (nan below three points).
    """

    factor: float
    exponent: float
    half_width: float


def field_shape(tokens: int, aspect: float = 16 / 9) -> tuple[int, int]:
    """Height and width in tokens of a field of about ``tokens`` with the given aspect."""
    height = max(1, round(math.sqrt(tokens / aspect)))
    return height, max(1, round(tokens / height))


def fit_power_law(tokens: Sequence[float], costs: Sequence[float]) -> PowerLaw:
    """Fits costs over tokens; the interval is Student's for the slope of a line.

    Raises:
        ConfigError: For fewer than two sizes.
    """
    if len(tokens) < 2:
        raise ConfigError("a fit needs at least two sizes", hint="e.g. --tokens 1024,4096,16384,65536")
    from scipy import stats

    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(costs, float))
    line = stats.linregress(x, y)
    degrees = len(tokens) - 2
    half = float(line.stderr * stats.t.ppf(0.975, degrees)) if degrees > 0 else math.nan
    return PowerLaw(float(np.exp(line.intercept)), float(line.slope), half)


def measure(case: EvaluationCase) -> EvaluationMeasurement:
    """Measures one case in this process; `measure_all` gives each its own."""
    device = resolve_device(case.device)
    dtype = resolve_dtype(case.dtype, device)
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(**load_preset(case.preset).model).to(device=device, dtype=dtype).eval()
    model.set_attention_backend(case.backend)  # type: ignore[arg-type]
    patch = model.config.patch_size
    seconds = []
    with torch.inference_mode():
        field = torch.randn(1, model.config.in_channels, case.height * patch, case.width * patch, device=device)
        prompt = model.encode_prompt(
            torch.randn(1, TEXT_TOKENS, model.config.text_dim, device=device),
            torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device),
            torch.randn(1, model.config.pooled_dim, device=device),
        )
        time_b, level_b = torch.full((1,), 0.5, device=device), torch.ones(1, dtype=torch.long, device=device)
        # A first evaluation of a small field loads every kernel, so that its memory is not counted.
        model(field[:, :, : 8 * patch, : 8 * patch], time_b, prompt, level_b, return_dict=False)
        before = _peak_bytes(device)
        for _ in range(case.repeats + 1):
            started = time.perf_counter()
            model(field, time_b, prompt, level_b, field, return_dict=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    timed = seconds[1:]
    peak = _peak_bytes(device)
    return EvaluationMeasurement(
        tokens=case.tokens,
        seconds=statistics.median(timed),
        spread=max(timed) - min(timed),
        peak_bytes=peak - before,
        process_bytes=peak,
    )


def measure_all(
    cases: Sequence[EvaluationCase], on_result: Callable[[EvaluationMeasurement], None] | None = None
) -> list[EvaluationMeasurement]:
    """Measures cases one after the other, each in a fresh process.

    Raises:
        DeviceError: If a process dies, as when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    results = []
    for case in cases:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure_into, args=(sender, case))
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            raise DeviceError(
                f"measuring {case.tokens} tokens with '{case.backend}' ended with exit code {process.exitcode}",
                hint="it probably ran out of memory: leave out the largest size",
            ) from None
        process.join()
        if isinstance(result, Exception):
            raise result
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def _measure_into(sender: multiprocessing.connection.Connection, case: EvaluationCase) -> None:
    try:
        sender.send(measure(case))
    except (ConfigError, DeviceError) as error:
        sender.send(error)


def _peak_bytes(device: torch.device) -> int:
    """Peak memory so far: resident set on the CPU, allocator on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Linux":
        # Not getrusage: there, a child's peak begins with its parent's.
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def machine() -> dict[str, str | int]:
    """What the figures were taken on, to be stored beside them."""
    return {"processor": _processor_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count() or 0}


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
