"""A process for every contender, so that its peak memory is its own, all asked in turn, so that a busy hour is shared.

The parent asks one worker at a time: none runs while another is timed. On Linux workers are forked from a server that
has imported torch, which starts them in milliseconds; elsewhere they are spawned.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import platform
import resource
import signal
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from physformer_core.benchmark.cases import Case, build
from physformer_core.benchmark.counting import CostCounter
from physformer_core.benchmark.machine import wait_for
from physformer_core.errors import DeviceError, PhysFormerError
from physformer_core.hardware import give_back_freed_memory, keep_freed_memory, peak_memory, resolve_device

_PRELOADED = ["physformer_core.benchmark.preloaded"]


class OutOfMemory(DeviceError):
    """A contender asked for more memory than there is, or than it was allowed."""


@dataclass(frozen=True)
class Sample:
    """One run of a subject.

    Args:
        seconds: What it took.
        peak_bytes: Peak memory so far beyond what the process held before its first run, the model included in that.
        process_bytes: Peak memory of the whole process (CPU) or of its allocator (CUDA).
        flops, bytes: Counted in this run, see `CostCounter`; None in runs that were not counted.
    """

    seconds: float
    peak_bytes: int
    process_bytes: int
    flops: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class _Fault:
    """What went wrong in a worker, other than what it may refuse: told here, as its own process is not looked at."""

    error: str
    traceback: str


class Worker:
    """A process that has built one case and runs it when asked.

    Args:
        case: The case.
        memory_limit: Bytes that it may allocate beyond what it has when it starts (CPU, Linux); no limit if None.

    Raises:
        PhysFormerError: The case cannot be built.
        OutOfMemory: It does not fit.
        RuntimeError: Anything else, with the worker's traceback as a note.
    """

    def __init__(self, case: Case, *, memory_limit: int | None = None) -> None:
        self.case = case
        context = _context()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, memory_limit), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.parameters: int = self._receive()
        except BaseException:
            self.close()
            raise

    def run(self, *, counted: bool = False) -> Sample:
        """Runs the case once.

        Args:
            counted: Whether operations and bytes are counted, which takes a little time of its own.

        Raises:
            OutOfMemory: The process ran out of memory, or was ended for it.
            RuntimeError: Anything else, with the worker's traceback as a note.
        """
        self._connection.send(counted)
        sample: Sample = self._receive()
        return sample

    def close(self) -> None:
        """Ends the process and frees what it holds."""
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            name = f"{self.case.contender} at {self.case.tokens}"
            if code >= 0:
                raise RuntimeError(f"the process of {name} ended with exit code {code}") from None
            raise OutOfMemory(
                f"{name} was ended by signal {-code}",
                hint="it probably ran out of memory: leave out the largest size",
            ) from None
        if isinstance(answer, PhysFormerError):
            raise answer
        if isinstance(answer, _Fault):
            error = RuntimeError(f"{self.case.contender} at {self.case.tokens}: {answer.error}")
            error.add_note(answer.traceback)
            raise error
        return answer


def _context() -> Any:
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        return context
    return multiprocessing.get_context("spawn")


def _serve(connection: multiprocessing.connection.Connection, case: Case, memory_limit: int | None) -> None:
    """The worker's process: builds, then runs once for every message, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this one
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            if memory_limit is not None:
                _limit_memory(memory_limit)
            device = resolve_device(case.device)
            keep_freed_memory(device)
            subject = build(case)
            with torch.inference_mode():
                subject.warm_up()
                before = _forget_peak(device)
                connection.send(subject.parameters)
                while True:
                    connection.send(_run(subject.run, device, before, counted=connection.recv()))
        except PhysFormerError as error:
            connection.send(error)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 told by the parent
            told = _out_of_memory(case, error) if _is_memory(error) else _Fault(repr(error), traceback.format_exc())
            connection.send(told)


def _run(run: Any, device: torch.device, before: int, *, counted: bool) -> Sample:
    with CostCounter() if counted else contextlib.nullcontext() as cost:
        started = time.perf_counter()
        run()
        wait_for(device)
        seconds = time.perf_counter() - started
    peak = peak_memory(device)
    flops, moved = (cost.flops, cost.bytes) if cost is not None else (None, None)
    return Sample(seconds, max(0, peak - before), peak, flops, moved)


def _is_memory(error: Exception) -> bool:
    """CUDA has a class for it, and Python; the CPU's allocator, oneDNN and the system only say so."""
    said = ("can't allocate memory", "Cannot allocate memory", "could not create a", "can't start new thread")
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in said))


def _out_of_memory(case: Case, error: BaseException) -> OutOfMemory:
    first = next(iter(str(error).splitlines()), "no memory")
    return OutOfMemory(
        f"{case.contender} with {case.tokens} tokens, batch {case.batch}: {first[:120]}",
        hint="measure a smaller size or batch",
    )


def _limit_memory(limit: int) -> None:
    """Lets the allocator fail before the system looks for a process to end."""
    if platform.system() != "Linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))


def _forget_peak(device: torch.device) -> int:
    """Starts the count of peak memory anew and returns what is held now.

    Building a network may have needed more than its weights. Where the system keeps its count (macOS, or a container
    without the right), what was needed then is not counted for the runs, as before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        give_back_freed_memory()
        with contextlib.suppress(PermissionError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    return peak_memory(device)
