"""What the machine is and the most that it does, measured in the same run as what is compared with it."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MATRIX_SHAPES = {
    "cpu": ((256, 256, 256), (1024, 1024, 1024), (2048, 2048, 2048), (8192, 512, 512)),
    "cuda": ((8192, 8192, 8192),),
}
"""Products [m, k] x [k, n] of which the fastest is the peak: no single shape is the best on every machine."""

LONGEST_PRODUCT = 0.5
"""Seconds. Where a smaller product says that one would take longer, it is left out: a processor without instructions
for bfloat16 or AVX-512 has 1 GFLOP/s in it, and would be busy for minutes."""

STREAM_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Length of each of the three arrays that are added: several times any cache."""


@dataclass
class MachinePeak:
    """The most that was measured so far; grows as `observe` is called between other measurements.

    Args:
        device, dtype: Of the products.
        flops: Operations per second of the fastest large matrix product.
        bandwidth: Bytes per second of c = a + b over arrays larger than the caches (two reads and a write).
    """

    device: torch.device
    dtype: torch.dtype
    flops: float = 0.0
    bandwidth: float = 0.0

    def observe(self, seconds: float = 0.5) -> None:
        """Measures both for about so long, and keeps the better of the old and the new figures.

        A machine that others use as well is measured too slow, never too fast: so the best of many is kept.
        """
        shapes = MATRIX_SHAPES.get(self.device.type, MATRIX_SHAPES["cpu"])
        for m, k, n in shapes:
            if self.flops and 2 * m * k * n > LONGEST_PRODUCT * self.flops:
                continue
            one = torch.randn(m, k, device=self.device, dtype=self.dtype)
            other = torch.randn(k, n, device=self.device, dtype=self.dtype)
            out = torch.empty(m, n, device=self.device, dtype=self.dtype)
            best = _fastest(functools.partial(torch.mm, one, other, out=out), self.device, seconds)
            self.flops = max(self.flops, 2 * m * k * n / best)
        size = STREAM_BYTES.get(self.device.type, STREAM_BYTES["cpu"])
        a, b, c = (torch.ones(size // 4, device=self.device) for _ in range(3))
        best = _fastest(functools.partial(torch.add, a, b, out=c), self.device, seconds)
        self.bandwidth = max(self.bandwidth, 3 * size / best)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least three calls, as many as fit into the time, after one that is not counted."""
    with torch.inference_mode():
        work()
        best, started, count = float("inf"), time.perf_counter(), 0
        while count < 3 or time.perf_counter() - started < seconds:
            began = time.perf_counter()
            work()
            wait_for(device)
            best = min(best, time.perf_counter() - began)
            count += 1
    return best


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What figures were taken on, to be stored beside them."""
    facts: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        facts["device_name"] = torch.cuda.get_device_name(device)
    return facts


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had without swapping, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
