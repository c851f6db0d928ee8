"""`physformer train`: what it shows and where its figures go, presets that are checks, epochs, adapters to pictures."""

import io
import json
import sys

import pytest
from PIL import Image

from physformer_cli import console
from physformer_cli.train_view import TrainView, sparkline
from physformer_core.config import load_preset
from physformer_core.files import sha256_file
from physformer_core.metadata import read_metadata
from physformer_core.project import Project

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def train(physformer, scene_set):
    def call(*more):
        return physformer(
            "train", "--preset", "debug", "--data-dir", scene_set, "--output", "run", "--device", "cpu", *more
        )

    return call


def last_run():
    return Project.load("physformer.toml").runs[-1]


def test_sinks_and_samples(train, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "prompts.txt").write_text("a red bird\na dog\n")
    code, _, err = train("--steps", 2, "--sample-every", 2, "--sample-prompts", "prompts.txt", "--tensorboard")
    assert code == 0, err
    assert "drew run/samples/step-00000002.png" in err and "of the matrix peak" in err
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002.png").format == "PNG"
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert last_run().config["training"]["sample_prompts"] == "a red bird\na dog"
    assert [output.path.rsplit("/", 1)[-1] for output in last_run().outputs] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wandb", "sometimes"], "unknown --wandb 'sometimes'"),
        (["--wandb-project", "mine"], "--wandb-project has no effect without --wandb"),
        (["--steps", "2", "--epochs", "1"], "--steps and --epochs both say how long to train"),
        (["--epochs", "0"], "epochs must be above 0"),
        (["--sample-prompts", "nowhere.txt"], "cannot read the prompt file nowhere.txt"),
        (["--lora-alpha", "8"], "lora_alpha has no effect without lora_rank"),
        (["--lora-rank", "4", "--init-from", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_what_is_refused(train, tmp_path, options, message):
    code, out, err = train(*options)
    assert code == 1 and out == "" and f"error: {message}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_written(train, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = train("--tensorboard") if package == "tensorboard" else train("--wandb", "offline")
    assert code == 1 and f'hint: pip install "physformer[{package}]"' in err and not (tmp_path / "run").exists()


def test_epochs(train, scene_set):
    code, out, _ = train("--epochs", 2, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["config"]["training"]["steps"] == plan["steps"] == round(2 * plan["steps_per_epoch"]["base"])
    assert plan["matrix_peak"] > 1e6
    assert 0 < plan["seconds_at_peak"] < plan["seconds_typical"]


def test_the_dry_run_counts_parts(train):
    whole, parts, again = (
        json.loads(train("--dry-run", "--json", *more)[1])
        for more in ([], ["--accumulate", 2], ["--gradient-checkpointing"])
    )
    assert parts["flops_per_step"] == whole["flops_per_step"] == again["flops_per_step"]
    assert parts["activation_bytes"] < 0.7 * whole["activation_bytes"]
    assert again["activation_bytes"] < whole["activation_bytes"]
    text = train("--dry-run", "--accumulate", 2)[1]
    assert "of one of 2 parts" in text and "of its matrix peak" in text


def test_a_check_that_fails_and_one_that_passes(physformer, scene_set, tmp_path):
    command = ("train", "--config", "check.toml", "--data-dir", scene_set, "--output", "run", "--device", "cpu")
    preset = "\n".join(line for line in load_text("debug").splitlines() if "sample" not in line)
    (tmp_path / "check.toml").write_text(preset + "\nrepeat_batch = true\npass_below = 0.000001\nsample_every = 0\n")
    code, out, err = physformer(*command, "--json", "--steps", 3)
    assert code == 1 and "FAIL: the loss went from" in err and json.loads(out)["passed"] is False
    assert last_run().status == "failed" and "of what it began with" in last_run().error
    (tmp_path / "check.toml").write_text(preset + "\nrepeat_batch = true\npass_below = 1.0\nsample_every = 0\n")
    code, out, err = physformer(*command, "--json", "--steps", 6, "--resume", "none")
    assert code == 0 and "PASS: the loss went from" in err and json.loads(out)["passed"] is True


def load_text(name):
    from importlib import resources

    return (resources.files("physformer_core") / "presets" / f"{name}.toml").read_text()


def test_the_panel_shows_what_is_known(scene_set, tmp_path):
    from rich.console import Console

    from physformer_cli.train_view import _panel
    from physformer_core.training.trainer import Trainer

    reports = []
    config = load_preset("debug").override("training", steps=4, sample_every=0)
    trainer = Trainer(config, scene_set, tmp_path / "run", device="cpu", on_report=reports.append, matrix_peak=2.5e11)
    trainer.run()
    bars = console.progress_bars()
    view = TrainView(trainer, console.ProgressTask("first step", 4, "steps", bars), panel=True)
    assert view.rows() == []
    for report in reports:
        view.step(report.step)
        view.report(report)
    view.samples(4, tmp_path / "run" / "samples" / "step-00000004.png")
    terminal = Console(width=300, record=True, force_terminal=True, file=io.StringIO())
    terminal.print(_panel(view, bars))
    shown = terminal.export_text()
    for words in (
        "4/4",
        "whole pictures",
        "held out",
        "(step 4)",
        "examples/s",
        "250 GFLOP/s",
        "predicted",
        "at most",
    ):
        assert words in shown, shown
    assert "step-00000004.png" in shown and "▁" in shown


def test_a_sparkline():
    from collections import deque

    assert sparkline(deque([1.0, 2.0, 16.0, 256.0])) == "▁▂▅█" and sparkline(deque([1.0, 1.0])) == "▁▁"


def test_an_adapter_from_training_to_pictures(train, physformer, tiny_checkpoint, tmp_path):
    pytest.importorskip("peft")
    adapt = ("--lora-rank", 2, "--lora-alpha", 4, "--init-from", tiny_checkpoint, "--lr", 0.05, "--checkpoint-every", 2)
    code, out, err = train("--steps", 4, "--json", *adapt)
    assert code == 0, err
    assert "training an adapter of" in err
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    file = step / "adapter" / "pytorch_lora_weights.safetensors"
    record = last_run()
    assert record.checkpoint_sha256 == record.config["adapts"]["base_sha256"]
    assert record.outputs[0].sha256 == sha256_file(file) and record.config["model"]["hidden_size"] == 32
    assert json.loads(train("--steps", 4, "--json", "--resume", "auto", *adapt)[1])["steps_done"] == 0
    code, _, err = train("--steps", 6, "--resume", "auto", *adapt[4:], "--lora-rank", 3)
    assert code == 1 and "of rank 2 and alpha 4, not of rank 3" in err

    draw = ("generate", "a red bird", "--checkpoint", tiny_checkpoint, "-W", 64, "-H", 64, "--steps", 2)
    assert physformer(*draw, "-o", "plain.png")[0] == 0
    code, _, err = physformer(*draw, "--lora", "run:0.5", "--lora", step, "-o", "with.png")
    assert code == 0, err
    record, digest = last_run(), sha256_file(file)
    known = [{"name": "run/step-00000004", "scale": scale, "sha256": digest} for scale in (0.5, 1.0)]
    assert read_metadata(tmp_path / "with.png").extra["loras"] == known and record.config["loras"] == known
    assert "Lora hashes: " in Image.open("with.png").text["parameters"]
    assert Image.open("with.png").tobytes() != Image.open("plain.png").tobytes()
    code, out, _ = physformer("runs", "replay", "last")
    assert code == 0 and out == "agrees: 1 of 1 outputs have the same bytes\n"


def test_an_export_is_made_again(physformer, tiny_checkpoint):
    assert physformer("export", tiny_checkpoint, "--output", "out")[0] == 0
    code, out, err = physformer("runs", "replay", "last")
    assert code == 0 and out.startswith("agrees: "), err


def test_a_picture_with_an_adapter_is_made_again(train, physformer, tiny_checkpoint, tmp_path):
    pytest.importorskip("peft")
    assert train("--steps", 1, "--lora-rank", 2, "--init-from", tiny_checkpoint, "--lr", 0.5)[0] == 0
    draw = ("generate", "a dog", "--checkpoint", tiny_checkpoint, "-W", 64, "-H", 64, "--steps", 2)
    assert physformer(*draw, "--lora", "run:2", "-o", "one.png")[0] == 0
    again = ("generate", "--from", "one.png", "--checkpoint", tiny_checkpoint, "-o", "two.png")
    code, _, err = physformer(*again)
    assert code == 1 and "one.png was made with the adapter run/step-00000001" in err and "hint: name it: --lora" in err
    assert physformer(*again, "--lora", "run")[0] == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert physformer(*draw, "--lora", "run:1.5", "--lora", "run:0.5", "-o", "twice.png")[0] == 0
    twice = ("generate", "--from", "twice.png", "--checkpoint", tiny_checkpoint, "--lora", "run", "-o", "again.png")
    assert physformer(*twice)[0] == 0
    assert (tmp_path / "twice.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    code, _, err = physformer("generate", "a dog", "--lora", "run", "-W", 64, "-H", 64)
    assert code == 1 and "does not fit nano: it changes blocks.0." in err and "--checkpoint" in err
    code, _, err = physformer(*draw, "--lora", "nowhere")
    assert code == 1 and err.splitlines()[0].endswith("there is no adapter nowhere")
