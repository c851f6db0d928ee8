"""`torchrun $(which physformer) train`: a killed rank is started again, and a signal stops all ranks after one step."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from physformer_core.project import Project
from physformer_core.training.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("in_an_empty_folder")]

STEPS = 60


@pytest.fixture
def launch(scene_set, tmp_path):
    """Starts torchrun with two processes that train into the folder ``run``."""
    started: list[subprocess.Popen[str]] = []

    def call(*torchrun, more=()):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", *torchrun, shutil.which("physformer"), "train", "--preset", "debug"]
        command += [
            "--data-dir",
            scene_set,
            "--output",
            "run",
            "--device",
            "cpu",
            "--steps",
            STEPS,
            "--sample-every",
            0,
        ]
        command += ["--checkpoint-every", 10, "--validate-every", 1000, *more]
        with open(tmp_path / "said", "w", encoding="utf-8") as said:
            started.append(subprocess.Popen([*map(str, command)], cwd=tmp_path, stderr=said, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    while not list_checkpoints(folder / "checkpoints"):
        assert process.poll() is None, "it ended"
        time.sleep(0.02)


def rank_process(parent: int, rank: int) -> int:
    """The process that torchrun has started as a rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"there is no rank {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again(launch, tmp_path, rank):
    torchrun = launch("--max-restarts", "2", more=("--resume", "auto"))
    wait_for_checkpoint(tmp_path / "run", torchrun)
    os.kill(rank_process(torchrun.pid, rank), signal.SIGKILL)
    assert torchrun.wait() == 0
    said = (tmp_path / "said").read_text()
    assert said.count("started again by torchrun (restart 1)") == 1 and said.count("going on from ") == 1
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{STEPS:08d}"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == STEPS and set(steps) == set(range(1, STEPS + 1))
    assert [run.status for run in Project.load(tmp_path / "physformer.toml").runs][-1] == "ok", "and by one rank alone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_after_one_step(launch, tmp_path, number):
    torchrun = launch()
    wait_for_checkpoint(tmp_path / "run", torchrun)
    torchrun.send_signal(number)
    assert torchrun.wait() != 0
    said = (tmp_path / "said").read_text()
    assert said.count(f" of {STEPS}, checkpoint run/checkpoints/step-") == 1, said
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name
    assert f"stopped at step {int(last[5:])} of {STEPS}" in said
    assert [run.status for run in Project.load(tmp_path / "physformer.toml").runs] == ["interrupted"]
