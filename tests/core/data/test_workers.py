"""Processes that work for a command: they never hear Ctrl-C themselves, however early it comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from physformer_core.data.workers import deaf_to_ctrl_c

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard here, and so by what is started: a shell has it ignored in what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def hears_ctrl_c(process: int) -> bool:
    """Whether Ctrl-C would reach a process: SIGINT is neither blocked nor ignored."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return not any(int(status[name], 16) >> (signal.SIGINT - 1) & 1 for name in ("SigBlk", "SigIgn"))


@contextlib.contextmanager
def started() -> Iterator[int]:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_processes_are_deaf_from_their_first_moment_on() -> None:
    with deaf_to_ctrl_c(), started() as process:
        assert not hears_ctrl_c(process)
    with started() as process:
        assert hears_ctrl_c(process)


def test_what_was_pressed_meanwhile_is_heard_afterwards() -> None:
    went_on = False
    with pytest.raises(KeyboardInterrupt), deaf_to_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        went_on = True
    assert went_on


@pytest.mark.parametrize("stage", ["fetch", "preprocess"])
def test_a_command_that_just_started_its_processes_ends_quietly(tmp_path: Path, scene_raw: Path, stage: str) -> None:
    what = {
        "fetch": ["fetch", "scenes", "--count", "4000"],
        "preprocess": ["preprocess", str(scene_raw)],
    }[stage]
    command = [sys.executable, "-m", "physformer_cli", "data", *what, "--output", str(tmp_path / "set"), "--no-record"]
    # As in a terminal: a group of its own, in which a Ctrl-C reaches everyone.
    running = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        workers: list[int] = []
        until = time.monotonic() + 60
        while not workers and running.poll() is None and time.monotonic() < until:
            workers = [child for child in children(running.pid) if "spawn_main" in command_line(child)]
        assert workers
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130 and "Traceback" not in err, err


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def command_line(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""
