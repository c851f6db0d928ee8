"""Killed with -9 at random moments, during saves too, a run ends with the bytes of one that nothing interrupted."""

import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from physformer_core.training.checkpoint import list_checkpoints

# Forks a trainer and kills it, again and again; then lets it finish. Every other time it is killed a random time after
# it began to train, and the times between a random time after it began to save, which it does after every step.
SCRIPT = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
import torch
from physformer_core.config import load_preset
from physformer_core.training.checkpoint import list_checkpoints, step_of
from physformer_core.training.trainer import Trainer

torch.set_num_threads(1)
data, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
moments = random.Random(int(sys.argv[4]))
options = {"steps": 24, "checkpoint_every": 1, "keep_last": 3, "keep_every": 8, "validate_every": 1000,
           "sample_every": 0, "batch_size": 4}

def train(folder, ready=None):
    trainer = Trainer(load_preset("debug").override("training", **options), data, folder, device="cpu")
    trainer.resume("auto")
    if ready is not None:
        os.write(ready, b"x")
    trainer.run()

began = time.perf_counter()
child = os.fork()
if not child:
    train(folder / "straight")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
took = time.perf_counter() - began

def half_written(since):
    found = (folder / "killed" / "checkpoints").glob(".step-*.partial")
    with contextlib.suppress(FileNotFoundError):  # it has just become whole
        return any(path.stat().st_ctime >= since for path in found)  # an older one is what the last kill left
    return False

def reached():
    return max((step_of(path) for path in list_checkpoints(folder / "killed" / "checkpoints")), default=0)

during_saves = 0
for done in range(kills):
    latest = 20 * (done + 1) // kills  # however fast the machine: there is something left to do after the last kill
    seen, ready = os.pipe()
    child = os.fork()
    if not child:
        train(folder / "killed", ready)
        os._exit(0)
    os.close(ready)
    os.read(seen, 1)
    began = time.time()
    os.close(seen)
    if done % 2:
        until = time.monotonic() + moments.uniform(0, 1.5 * took / kills)
        while time.monotonic() < until and reached() < latest:
            time.sleep(0.0005)
    else:  # while it saves: a moment after it has begun to
        while not half_written(began) and reached() < latest:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it had ended before"
    during_saves += half_written(began)
print(during_saves)
child = os.fork()
if not child:
    train(folder / "killed")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.timeout(1800)  # a machine with other work may take its time
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(scene_set, tmp_path, kills, record_property):
    seed = random.randrange(10**6)
    record_property("seed", seed)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, (scene_set, tmp_path, kills, seed))]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    during_saves = int(ended.stdout)
    told = f"seed {seed}, {kills} kills, {during_saves} of them during a save"
    print(told)
    assert during_saves or kills == 2, told

    straight, killed = (tmp_path / name / "checkpoints" for name in ("straight", "killed"))
    steps = [path.name for path in list_checkpoints(straight)]
    assert steps == [f"step-{step:08d}" for step in (8, 16, 22, 23, 24)], "every eighth and the last three"
    assert sorted(path.name for path in killed.iterdir()) == steps, f"{told}: nothing half is left"
    for step in steps:
        for name in ("transformer/diffusion_pytorch_model.safetensors", "state.safetensors"):
            first, second = load_file(straight / step / name), load_file(killed / step / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), f"{told}: {step}/{name} differs"
