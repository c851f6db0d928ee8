"""Several processes, really several: their run is that of one process, and what one cannot do ends all of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from physformer_core.config import load_preset
from physformer_core.errors import ConfigError
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.training.distributed import Ranks, resolve_parallel
from physformer_core.training.trainer import Trainer

pytestmark = pytest.mark.timeout(900)  # of several processes on a machine that may have other work

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

# A batch that neither two nor three ranks divide into parts of one kind, in arithmetic whose rounding can be bounded.
OPTIONS = {"batch_size": 5, "dtype": "fp32", "sample_every": 0, "steps": 4, "checkpoint_every": 2, "validate_every": 4}

TOLERANCE = 2e-5
"""Relative, of losses: sums in another order differ in the seventh digit, and steps add up."""

WEIGHT_TOLERANCE = 1e-4
"""Absolute, of weights that four steps move by up to 2e-3: AdamW divides small gradients, and their rounding, by their
size."""

# Runs named on the command line, each in as many processes, which are forked: imports take most of the time.
FORKED = """
import json, os, socket, sys, traceback
from pathlib import Path
import torch
from physformer_cli import main
from physformer_core.config import load_preset
from physformer_core.training.distributed import joined
from physformer_core.training.trainer import Trainer

torch.set_num_threads(1)

def train(data, folder, options, resume):
    with joined() as ranks:
        # In float16 a refiner's gradients overflow at the first scales, which are not what is looked at.
        channels = 0 if options.get("dtype") == "fp16" else 2
        model = json.loads(sys.argv[2]) | {"refiner_channels": channels}
        config = load_preset("debug").override("model", **model).override("training", **options)
        trainer = Trainer(config, Path(data), Path(folder), device="cpu", ranks=ranks)
        if ranks.is_main:
            trainer.matrix_peak = 1e12  # as the command line does, on one rank alone
        if resume:
            trainer.resume(resume)
        if options.get("dtype") == "fp16":
            spoil(trainer)
        trainer.run()
        if options.get("dtype") == "fp16":
            Path(folder, f"scale-{ranks.rank}").write_text(json.dumps(
                [trainer.updates.skipped, trainer.gradients.scaler.get_scale()]))

def spoil(trainer):
    compute = trainer.gradients.compute
    def overflowing(objective, batch, draws, optimizer):
        if batch.step == 1 and trainer.ranks.rank == 1:  # on one rank alone, and in the weights it holds
            batch.pixels_bchw[:] = float("inf")
        return compute(objective, batch, draws, optimizer)
    trainer.gradients.compute = overflowing

for run in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(run["ranks"]):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run["ranks"]), "LOCAL_RANK": str(rank),
                           "LOCAL_WORLD_SIZE": str(run["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                if "command" in run:
                    code = main.main([part.replace("RANK", str(rank)) for part in run["command"]])
                else:
                    train(run["data"], run["folder"], run["options"], run.get("resume"))
                    code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


OF_LEVEL_0 = {"base_num_layers": 1, "base_hidden_size": 32, "base_num_heads": 2, "base_patch_size": 4}
"""A network of its own, which only some steps train, as they do the refiner."""


def in_processes(*runs) -> tuple[list[list[int]], str]:
    """Runs one after the other; exit codes by run and rank, and what was said on standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-W", "ignore", "-c", FORKED, json.dumps(runs, default=str), json.dumps(OF_LEVEL_0)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [[int(code) for code in line.split()] for line in ended.stdout.splitlines()], ended.stderr


def losses(folder) -> list[dict[str, float]]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record["losses"] | record["level_losses"] | record["time_losses"] for record in records]


def distance(one, two) -> float:
    """The largest difference of two checkpoints' tensors: averages, weights and optimizer state."""
    largest = 0.0
    for name in (WEIGHTS, "state.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        largest = max(largest, *((first[key] - second[key]).abs().max().item() for key in first))
    return largest


def last(folder):
    return folder / "checkpoints" / "step-00000004"


def trained(data, folder, *, resume=None, **options):
    model = OF_LEVEL_0 | {"refiner_channels": 2}
    config = load_preset("debug").override("model", **model).override("training", **OPTIONS, **options)
    trainer = Trainer(config, data, folder, device="cpu")
    if resume is not None:
        trainer.resume(resume)
    assert trainer.run()
    return folder


@pytest.fixture(scope="module")
def one(scene_set, tmp_path_factory):
    """The folder of the run of one process."""
    return trained(scene_set, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(scene_set, tmp_path_factory):
    """The folder of the run of two processes, each of which holds everything."""
    folder = tmp_path_factory.mktemp("two") / "run"
    codes, err = in_processes({"ranks": 2, "data": scene_set, "folder": folder, "options": OPTIONS | {"accumulate": 2}})
    assert codes == [[0, 0]], err
    return folder


@pytest.fixture(scope="module")
def divided(scene_set, tmp_path_factory):
    """The folder of the run of two processes, each of which holds a part."""
    folder = tmp_path_factory.mktemp("divided") / "run"
    options = OPTIONS | {"parallel": "fsdp", "gradient_checkpointing": True, "accumulate": 2}
    codes, err = in_processes({"ranks": 2, "data": scene_set, "folder": folder, "options": options})
    assert codes == [[0, 0]], err
    return folder


def same_curve(first, second) -> None:
    for expected, found in zip(losses(first), losses(second), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_two_processes_train_as_one(one, two):
    same_curve(one, two)
    assert distance(last(one), last(two)) < WEIGHT_TOLERANCE


def test_a_checkpoint_of_two_goes_on_in_one(one, two, scene_set, tmp_path):
    folder = trained(scene_set, tmp_path / "run", resume=two / "checkpoints" / "step-00000002")
    assert distance(last(one), last(folder)) < WEIGHT_TOLERANCE


@pytest.mark.slow
def test_a_divided_network_trains_as_a_whole_one(one, two, divided):
    same_curve(two, divided)
    assert (
        distance(last(one), last(divided)) < WEIGHT_TOLERANCE and distance(last(two), last(divided)) < WEIGHT_TOLERANCE
    )
    pipeline = PhysFormerPipeline.from_pretrained(last(divided))
    assert type(pipeline.transformer).__name__ == "PhysFormerTransformer2DModel"


@pytest.mark.slow
def test_checkpoints_go_on_in_any_number_of_processes(one, two, divided, scene_set, tmp_path):
    from_two, from_parts = (folder / "checkpoints" / "step-00000002" for folder in (two, divided))
    fsdp = OPTIONS | {"parallel": "fsdp"}
    runs = [
        {"ranks": 3, "folder": tmp_path / "two-three", "options": OPTIONS, "resume": from_two},
        {"ranks": 3, "folder": tmp_path / "two-parts", "options": fsdp, "resume": from_two},
        {"ranks": 3, "folder": tmp_path / "parts-parts", "options": fsdp, "resume": from_parts},
    ]
    codes, err = in_processes(*({"data": scene_set, **run} for run in runs))
    assert codes == [[0, 0, 0]] * 3, err
    folders = [*(run["folder"] for run in runs), trained(scene_set, tmp_path / "parts-one", resume=from_parts)]
    assert max(distance(last(one), last(folder)) for folder in folders) < WEIGHT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_is_every_ranks(scene_set, tmp_path, parallel):
    options = OPTIONS | {"dtype": "fp16", "parallel": parallel, "validate_every": 1000, "steps": 3}
    codes, err = in_processes({"ranks": 2, "data": scene_set, "folder": tmp_path, "options": options})
    assert codes == [[0, 0]], err
    assert [json.loads((tmp_path / f"scale-{rank}").read_text()) for rank in range(2)] == [[1, 2.0**15]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_frozen_weights_stay_in_every_process(scene_set, tmp_path, parallel):
    frozen = {"freeze": "text_,null_,base.", "crop_fraction": 1.0}
    alone = trained(scene_set, tmp_path / "alone", **frozen)
    run = {"data": scene_set, "folder": tmp_path / "two", "options": OPTIONS | frozen | {"parallel": parallel}}
    codes, err = in_processes({"ranks": 2, **run})
    assert codes == [[0, 0]], err
    assert distance(last(alone), last(tmp_path / "two")) < WEIGHT_TOLERANCE
    steps = [
        load_file(folder / "checkpoints" / name / WEIGHTS)
        for folder in (alone, tmp_path / "two")
        for name in ("step-00000002", "step-00000004")
    ]
    stay = {key for key in steps[0] if key.startswith(("text_", "null_", "base."))}
    assert 0 < len(stay) < len(steps[0])
    for key in steps[0]:
        assert all(torch.equal(steps[0][key], step[key]) for step in steps[1:]) == (key in stay), key


def test_a_users_fault_is_told_once(scene_set, tmp_path):
    command = ["train", "--preset", "debug", "--no-record", "--device", "cpu", "--output", tmp_path / "run"]
    (tmp_path / "0").symlink_to(scene_set)
    runs = [
        {"ranks": 2, "command": [*command, "--data-dir", tmp_path / "nowhere"]},
        {"ranks": 2, "command": [*command, "--data-dir", tmp_path / "RANK"]},
        {"ranks": 2, "command": [*command, "--data-dir", scene_set, "--batch-size", "1"]},
        {"ranks": 2, "command": [*command, "--data-dir", scene_set, "--output", scene_set / "manifest.json" / "run"]},
    ]
    codes, err = in_processes(*({**run, "command": list(map(str, run["command"]))} for run in runs))
    assert codes == [[1, 1]] * 4, err
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert [line.partition(" ")[2].replace(str(tmp_path), "") for line in told[:3]] == [
        "/nowhere has no manifest.json",
        "/1 has no manifest.json",
        "a batch of 1 cannot be divided over 2 processes and, on each, into 1 parts",
    ]
    assert len(told) == 4 and "a part of its path is a file" in told[3] and "Traceback" not in err


def test_alone():
    ranks = Ranks()
    assert ranks.alone and ranks.is_main and ranks.any(True) and not ranks.any(False)
    assert ranks.share_json({"a": [1]}) == {"a": [1]} and ranks.device("cpu") == torch.device("cpu")
    assert resolve_parallel("auto", ranks) == "none" and resolve_parallel("auto", Ranks(world_size=2)) == "ddp"
    with pytest.raises(ConfigError, match="needs several processes"):
        resolve_parallel("fsdp", ranks)
    with ranks.together(), pytest.raises(ConfigError):
        raise ConfigError("mine")


def test_more_parts_than_examples_are_refused(scene_set, tmp_path):
    config = load_preset("debug").override("training", batch_size=4, accumulate=3)
    with pytest.raises(ConfigError, match="over 2 processes and, on each, into 3 parts"):
        Trainer._check_shares(type("", (), {"config": config, "ranks": Ranks(world_size=2), "parallel": "ddp"}))
