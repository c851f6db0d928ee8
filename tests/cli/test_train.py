"""`physformer train` and `runs plot`."""

import json
import os
import signal
import tomllib

import pytest
from PIL import Image

from physformer_core.config import load_preset
from physformer_core.files import sha256_file, sole_writer
from physformer_core.project import Project
from physformer_core.training import trainer as trainer_module

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def train(physformer, scene_set):
    def call(*more):
        return physformer(
            "train", "--preset", "debug", "--data-dir", scene_set, "--output", "run", "--device", "cpu", *more
        )

    return call


@pytest.fixture
def at_step(monkeypatch):
    """Does something in the middle of a step."""

    def arrange(step, action):
        original = trainer_module.Trainer._train_step

        def watched(self, *given):
            if self.step == step:
                action()
            original(self, *given)

        monkeypatch.setattr(trainer_module.Trainer, "_train_step", watched)

    return arrange


def last_run():
    return Project.load("physformer.toml").runs[-1]


def test_a_run(train, scene_set, tmp_path):
    code, out, err = train("--json", "--steps", 4, "--seed", 5)
    assert code == 0, err
    result = json.loads(out)
    assert result["checkpoint"] == "run/checkpoints/step-00000004" and result["step"] == result["steps_done"] == 4
    assert result["losses"].keys() == {"base", "crop", "validation_base", "validation_crop"}
    assert "4 steps of 4 from" in err and "val base" in err and "4/4" in err

    record = last_run()
    assert record.status == "ok" and record.seeds == [5] and record.device == "cpu"
    assert record.config["training"]["steps"] == 4 and record.config["model"]["hidden_size"] == 64
    assert record.data_sha256 == sha256_file(scene_set / "manifest.json")
    assert [output.path for output in record.outputs] == [f"run/checkpoints/step-00000004/{WEIGHTS}"]
    assert record.outputs[0].sha256 == sha256_file(tmp_path / record.outputs[0].path)

    code, out, _ = train("--json", "--steps", 4, "--seed", 5, "--resume", "auto")
    assert code == 0 and json.loads(out)["steps_done"] == 0


def test_a_second_run_into_the_same_folder(train, tmp_path):
    assert train("--steps", 2)[0] == 0
    code, _, err = train("--steps", 2)
    assert code == 1 and err.splitlines()[0] == "error: run already holds a run, at step 2"
    assert "--resume auto" in err and "--resume none" in err
    code, _, err = train("--steps", 1, "--resume", "none")
    assert code == 0 and "run/checkpoints-earlier-1" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "run" / "checkpoints-earlier-1" / "step-00000002" / "state.json").exists()


def test_two_runs_into_the_same_folder_at_once(train, tmp_path):
    with sole_writer(tmp_path / "run"):
        code, _, err = train("--steps", 2)
    assert code == 1 and "error: run is being written by another process" in err.splitlines()
    assert train("--steps", 2)[0] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "log.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(train, at_step, tmp_path, number, code, monkeypatch):
    before = signal.getsignal(number)
    at_step(2, lambda: os.kill(os.getpid(), number))
    ended, out, err = train("--json")
    assert (ended, out) == (code, "") and "stopped at step 3 of 8" in err and "--resume auto" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert last_run().status == "interrupted" and signal.getsignal(number) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ended, out, _ = train("--json", "--resume", "auto")
    assert ended == 0 and json.loads(out)["steps_done"] == 5
    assert last_run().checkpoint_sha256 is not None and last_run().replay.pinned[0] == "--resume"


def test_a_second_signal_stops_at_once(train, at_step, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(2, twice)
    code, _, err = train()
    assert code == 130 and "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists() and last_run().status == "interrupted"


def test_options_over_settings_over_preset(physformer, scene_set, tmp_path):
    (tmp_path / "physformer.toml").write_text(
        '[train]\npreset = "debug"\ndata_dir = "set"\noutput = "mine"\nsteps = 3\nlr = 0.5\nbatch_size = 2\n'
    )
    (tmp_path / "set").symlink_to(scene_set)
    code, out, _ = physformer("train", "--dry-run", "--json", "--lr", 0.25, "--device", "cpu")
    plan = json.loads(out)
    training = plan["config"]["training"]
    assert code == 0 and (training["steps"], training["lr"], training["batch_size"]) == (3, 0.25, 2)
    assert training["checkpoint_every"] == 4, "of the preset"
    assert plan["data_dir"] == str(tmp_path / "set") and plan["output"] == str(tmp_path / "mine")
    assert not Project.load("physformer.toml").runs and not (tmp_path / "mine").exists()


def test_the_dry_run_is_a_configuration_file(train, physformer, scene_set, tmp_path):
    code, out, _ = train("--dry-run", "--steps", 3)
    assert code == 0
    for word in ("parameters", "272 thousand", "floating-point operations", "memory", "steps per epoch"):
        assert word in out
    assert tomllib.loads(out) == load_preset("debug").override("training", steps=3).to_dict()
    (tmp_path / "my.toml").write_text(out)
    command = ("train", "--config", "my.toml", "--data-dir", scene_set, "--device", "cpu", "--json")
    code, again, _ = physformer(*command, "--dry-run")
    assert code == 0 and json.loads(again)["config"]["training"]["steps"] == 3
    assert json.loads(again)["output"] == "runs/my"


def test_init_from(train, tmp_path, capfd):
    train("--steps", 2)
    (tmp_path / "run").rename(tmp_path / "first")
    code, _, err = train("--steps", 1, "--init-from", "first/checkpoints/step-00000002")
    assert code == 0, err
    assert last_run().checkpoint_sha256 == sha256_file(tmp_path / "first/checkpoints/step-00000002" / WEIGHTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp16", "--bf16"], "--dtype, --fp16 and --bf16 say the same thing"),
        (["--bf16", "--dtype", "fp32"], "--dtype, --fp16 and --bf16 say the same thing"),
        (["--parallel", "fsdp"], "--parallel fsdp needs several processes"),
        (["--accumulate", "5"], "a batch of 4 cannot be computed in 5 parts"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--lr", "-1"], "lr must be above 0, not -1"),
        (["--optimizer", "adamw", "--muon-lr", "0.01"], "--muon-lr has no effect with AdamW"),
        (["--optimizer", "sgd"], "unknown optimizer 'sgd'"),
        (["--config", "my.toml"], "--preset and --config are both given"),
        (["--resume", "run/x", "--init-from", "y"], "--init-from has no effect"),
        (["--resume", "nowhere"], "there is no checkpoint 'nowhere'"),
        (["--init-from", "nowhere"], "cannot start from 'nowhere'"),
        (["--data-dir", "nowhere"], "nowhere has no manifest.json"),
        (["--device", "abacus"], "unknown device 'abacus'"),
    ],
)
def test_what_is_refused(train, tmp_path, options, message):
    code, out, err = train(*options)
    assert code == 1 and out == "" and f"error: {message}" in err
    assert len(err.replace("created", "\ncreated").splitlines()) <= 4 and not (tmp_path / "run").exists()


def test_data_is_asked_for(physformer):
    code, _, err = physformer("train", "--preset", "debug", "--no-record")
    assert code == 1 and err.splitlines()[0] == "error: no data to train on" and "--data-dir" in err


def test_slow_bf16_is_warned_of_and_done(train, monkeypatch):
    monkeypatch.setattr("physformer_core.hardware.has_fast_bfloat16", lambda device: False)
    code, _, err = train("--dtype", "bf16", "--steps", 1)
    assert code == 0 and "in bfloat16" in err and "warning: bf16 is slower than fp32 here" in err


def test_short_options_for_precision(train):
    code, out, err = train("--fp16", "--steps", 1, "--accumulate", 2, "--gradient-checkpointing", "--json")
    assert code == 0 and "in float16" in err and "warning: fp16 is slower than fp32 on a CPU" in err, err
    training = last_run().config["training"]
    assert (training["dtype"], training["accumulate"], training["gradient_checkpointing"]) == ("fp16", 2, True)
    code, out, _ = train("--bf16", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["dtype"] == "bfloat16"


def test_a_run_is_replayed_to_the_same_bytes(train, physformer):
    assert train("--steps", 2)[0] == 0
    code, out, err = physformer("runs", "replay", "last")
    assert code == 0, err
    assert out == "agrees: 1 of 1 outputs have the same bytes\n"


def test_runs_plot(train, physformer, tmp_path):
    train("--steps", 4)
    code, out, _ = physformer("runs", "plot", "run", "--json")
    result = json.loads(out)
    assert code == 0 and result["step"] == 4 and "validation_crop" in result["losses"]
    assert Image.open(tmp_path / "loss.png").size == (1100, 640 + 2 * 220), "with panels below"
    code, _, err = physformer("runs", "plot", "run")
    assert code == 0 and err == "wrote loss_1.png\n"
    code, _, err = physformer("runs", "plot", "nowhere")
    assert code == 1 and "error: cannot read nowhere/log.jsonl" in err
    code, _, err = physformer("runs", "plot", "run", "-o", "loss.pdf")
    assert code == 1 and "a plot is a PNG file" in err
