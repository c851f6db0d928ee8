"""What the machine can do: devices and the number formats that are fast on them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import resource
import time
from typing import Literal

import torch

from physformer_core.errors import DeviceError

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        DeviceError: If it does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device '{name}'", hint="auto, cpu, cuda, cuda:1 or mps") from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }.get(device.type, False)
    if not present:
        raise DeviceError(f"device '{name}' does not exist on this machine", hint="try --device auto or --device cpu")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware. On CPUs without it they are several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; ``auto`` takes bfloat16 on GPUs where it is fast and float32 elsewhere.

    On CPUs float32 even where bfloat16 is in hardware: our kernels in C are for it, small networks are as fast with it
    or faster (docs/performance.md), nothing is compiled first, and a picture has the same bytes on more machines.

    Raises:
        DeviceError: If the name is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" and has_fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise DeviceError(f"unknown dtype '{name}'", hint="one of auto, " + ", ".join(DTYPES))
    return DTYPES[name]


def why_no_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks for a device, in a few words, or None if it can run there."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is missing"
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "there is no C++ compiler, for example: apt install g++"
    return None


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.4) -> float:
    """Floating-point operations per second of this machine's fastest large matrix product, measured once per process.

    The best of as many products as fit into the time, each waited for. On a CPU the processor's time counts, divided by
    the threads, and not the clock's: what else the machine does at the moment does not make its peak smaller.

    Args:
        device: Where.
        dtype: Of both factors. In float32 the settings for TF32 hold, as they do in training.
        seconds: How long to measure, at least two products.
    """
    # On a CPU a product is short, so that some of them come through between what else it does.
    side = 8192 if device.type == "cuda" else 768
    one = torch.ones(side, side, device=device, dtype=dtype)
    other, best = torch.ones_like(one), float("inf")
    started, count = time.perf_counter(), 0
    with torch.no_grad():
        while count < 3 or time.perf_counter() - started < seconds:
            began = _clock(device)
            torch.mm(one, other)
            _wait(device)
            if count:  # the first one loads the kernel
                best = min(best, _clock(device) - began)
            count += 1
    return 2 * side**3 / best


def peak_memory(device: torch.device, *, reserved: bool = False) -> int:
    """Peak memory of this process so far, in bytes: resident set on the CPU, of tensors on CUDA.

    Args:
        device: Whose.
        reserved: On CUDA count what tensors may be put into as well: that of CUDA graphs, too, which is free between
            replays.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if reserved else torch.cuda.max_memory_allocated(device)
    if platform.system() == "Linux":
        # Not getrusage: there, a child's peak begins with its parent's.
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def keep_freed_memory(device: torch.device) -> bool:
    """Has the C library keep what is freed for the tensors to come, for the rest of this process.

    glibc maps every tensor of more than 32 MB anew and gives it back when it is freed, so that the system clears it,
    page by page, each time: a quarter of one evaluation at 4K. What the process needed at its peak stays its own until
    it ends. Variables that begin with ``MALLOC_`` say that the user has settled it otherwise.

    Args:
        device: Where the tensors are; nothing is done for others than the CPU.

    Returns:
        Whether it could be done: not without glibc.
    """
    if device.type != "cpu" or platform.system() != "Linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or platform.libc_ver()[0] != "glibc":
        return False
    # malloc.h's M_MMAP_MAX: no mappings; M_TRIM_THRESHOLD, disabled; M_TOP_PAD: the heap grows by as much at once.
    return all(mallopt(option, value) == 1 for option, value in ((-4, 0), (-1, -1), (-2, 64 << 20)))


def give_back_freed_memory() -> None:
    """Has the C library give back, once, what is free: before memory is counted that `keep_freed_memory` has kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _clock(device: torch.device) -> float:
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
