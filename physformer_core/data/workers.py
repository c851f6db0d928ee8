"""Tasks over worker processes, with progress and a clean stop; one worker runs them in this process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from physformer_core.errors import DataError


class Progress(Protocol):
    """Is told how far a stage ("scan", "captions", "pictures") has come."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


class _Stopped(Exception):
    """Raised in a worker when the parent no longer wants the result."""


_shared: dict[str, Any] = {}


def _start_worker(counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and says stop
    _shared.update(counter=counter, stop=stop)


def _worker_tick(count: int) -> None:
    if _shared["stop"].is_set():
        raise _Stopped
    with _shared["counter"].get_lock():
        _shared["counter"].value += count


def _call_in_worker(function: Callable[..., None], task: Any) -> None:
    function(task, _worker_tick)


def run_tasks(
    function: Callable[[Any, Callable[[int], None]], None],
    tasks: Sequence[Any],
    workers: int,
    progress: Progress | None,
    stage: str,
    done: int,
    total: int,
) -> None:
    """Runs `function(task, tick)` for all tasks and reports the units of work that they tick off.

    Args:
        function: A module's function, so that a process can find it; it calls `tick(n)` for each n units done.
        tasks: What can be pickled.
        workers: Processes at most; with one, or one task, everything happens in this process.
        progress: Is told how far the stage has come.
        stage: Its name.
        done: Units done before.
        total: Units in all.

    Raises:
        DataError: A process died.
        Exception: Whatever a task raised; the others are stopped at their next tick.
    """

    def report(count: int) -> None:
        if progress is not None:
            progress(stage, count, total)

    report(done)
    if not tasks:
        return
    workers = min(workers, len(tasks))
    if workers == 1:
        _run_here(function, tasks, done, report)
        return

    # Not fork: torch's and tokenizers' threads do not survive it.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counter, stop)
    ) as executor:
        try:
            pending: set[Future[None]] = {executor.submit(_call_in_worker, function, task) for task in tasks}
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                report(done + counter.value)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, probably for lack of memory",
                hint="run the command again with fewer workers: what is finished is kept",
            ) from error
        except BaseException:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _run_here(
    function: Callable[[Any, Callable[[int], None]], None],
    tasks: Sequence[Any],
    done: int,
    report: Callable[[int], None],
) -> None:
    count = done

    def tick(more: int) -> None:
        nonlocal count
        before, count = count, count + more
        if count // 64 != before // 64:
            report(count)

    for task in tasks:
        function(task, tick)
        report(count)
