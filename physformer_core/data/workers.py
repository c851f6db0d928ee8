"""Tasks over worker processes, with progress and a clean stop; one worker runs them in this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from physformer_core.errors import DataError
from physformer_core.interruptions import held_back


class Progress(Protocol):
    """Is told how far a stage ("scan", "captions", "pictures") has come."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for numpy's BLAS.

    The order of sums, hence the last bit of a result, depends on how many there are. And a second thread brings nothing
    to matrices as small as a picture's: it waits, and took three times the processor time of the work.
    """
    import threadpoolctl
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C, which a terminal sends to all, not even while they still import.

    They inherit that it is blocked. Here it is heard once this ends. Where signals have no masks (Windows) nothing
    changes.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Before Python 3.12 it unblocks the signal when it starts, which is with the first process.
    multiprocessing.resource_tracker.ensure_running()
    # Held back, too: blocked here, it may reach another thread, and Python would raise it here all the same.
    with held_back():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):
    """Raised in a worker when the parent no longer wants the result."""


_shared: dict[str, Any] = {}


def _start_worker(counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and says stop; where it cannot be blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared.update(counter=counter, stop=stop)


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone (kill -9): nobody else would, and it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _worker_tick(count: int) -> None:
    if _shared["stop"].is_set():
        raise _Stopped
    with _shared["counter"].get_lock():
        _shared["counter"].value += count


def _call_in_worker(function: Callable[..., Any], task: Any) -> Any:
    return function(task, _worker_tick)


def _died() -> DataError:
    return DataError(
        "a worker process died, probably for lack of memory",
        hint="run the command again with fewer workers: what is finished is kept",
    )


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
            with deaf_to_ctrl_c():
                pending: set[Future[None]] = {executor.submit(_call_in_worker, function, task) for task in tasks}
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                report(done + counter.value)
        except BrokenProcessPool as error:
            raise _died() from error
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)  # and wait: processes that just start need what is shared
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


def run_stream(
    function: Callable[[Any, Callable[[int], None]], Any],
    tasks: Iterable[Any],
    workers: int,
    *,
    finished: Callable[[Any], None],
    ticked: Callable[[int], None],
) -> None:
    """Like `run_tasks`, for tasks that are made while others run, and that return something.

    Two tasks more than there are workers are taken from `tasks` at a time, so that their number, and what they carry,
    does not fill the memory.

    Args:
        function: A module's function of a task and `tick`.
        tasks: What can be pickled, made one after the other in this process.
        workers: Processes; with one, everything happens in this process.
        finished: Is given each result, in the order in which they come.
        ticked: Is told the units ticked off so far in all.

    Raises:
        DataError: A process died.
        Exception: Whatever a task, or making one, raised.
    """
    if workers == 1:
        count = 0

        def tick(more: int) -> None:
            nonlocal count
            count += more
            ticked(count)

        for task in tasks:
            finished(function(task, tick))
        return

    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counter, stop)
    ) as executor:
        try:
            waiting, pending, more = iter(tasks), set[Future[Any]](), True
            while more or pending:
                while more and len(pending) < workers + 2:
                    try:
                        task = next(waiting)
                    except StopIteration:
                        more = False
                        break
                    with deaf_to_ctrl_c():
                        pending.add(executor.submit(_call_in_worker, function, task))
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    finished(future.result())
                ticked(counter.value)
        except BrokenProcessPool as error:
            raise _died() from error
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)  # and wait: processes that just start need what is shared
            raise
