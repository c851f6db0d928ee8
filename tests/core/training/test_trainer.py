"""The training loop: stopped anywhere and gone on with, it ends with the same bytes; nothing half-written stays."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.data.preprocess import PreprocessConfig, preprocess
from physformer_core.errors import CheckpointError, ConfigError, DeviceError, OutputError
from physformer_core.training import checkpoint
from physformer_core.training.checkpoint import list_checkpoints, load_training_state
from physformer_core.training.estimate import estimate_run
from physformer_core.training.level_zero import check_level_zero
from physformer_core.training.trainer import Trainer, TrainingDiverged
from physformer_core.training.update import MAX_BAD_STEPS

pytestmark = pytest.mark.timeout(900)  # a machine with other work may take its time

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

# Trains and kills itself, the hard way, at two moments. Processes are forked: imports take most of the time.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from physformer_core.config import load_preset
from physformer_core.training import checkpoint
from physformer_core.training.trainer import Trainer

data, folder = map(Path, sys.argv[1:])
save = checkpoint.save_file

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path):
    save(tensors, path)
    if "step-00000008" in str(path):
        os.truncate(path, 1000)
        die()

for moment in ("between", "saving"):
    child = os.fork()
    if not child:
        trainer = Trainer(load_preset("debug"), data, folder / moment, device="cpu")
        if moment == "between":
            trainer.on_step = lambda step: die() if step == 6 else None
        else:
            checkpoint.save_file = half
        trainer.run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def make(data, folder, *, init_from=None, **training) -> Trainer:
    config = load_preset("debug").override("training", **training)
    return Trainer(config, data, folder, device="cpu", init_from=init_from)


def same_state(one, two) -> bool:
    """Whether two checkpoints have the same average, weights and optimizer state, to the bit."""
    for name in (WEIGHTS, "state.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True


def names(trainer: Trainer) -> list[str]:
    return sorted(path.name for path in trainer.checkpoint_dir.iterdir())


@pytest.fixture(scope="module")
def straight(scene_set, tmp_path_factory):
    """The run's folder of eight steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert make(scene_set, folder).run()
    return folder


@pytest.fixture
def final(straight):
    return straight / "checkpoints" / "step-00000008"


def test_a_run_leaves_checkpoints_and_a_log(straight, final):
    assert [path.name for path in list_checkpoints(straight / "checkpoints")] == ["step-00000004", "step-00000008"]
    assert {path.name for path in final.iterdir()} == {
        "model_index.json",
        "transformer",
        "state.json",
        "state.safetensors",
    }
    records = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [next(iter(record["losses"])) for record in records] == ["base", "crop"] * 4
    assert {"validation_base", "validation_crop"} < records[3]["losses"].keys()


def test_the_objective_is_as_the_run_says(scene_set, tmp_path):
    objective = make(scene_set, tmp_path, fine_huber=0.25, coarse_blur=0.7, prompt_dropout=0.3).objective
    assert (objective.fine_huber, objective.coarse_blur, objective.prompt_dropout) == (0.25, 0.7, 0.3)


@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_and_resumed_equals_straight(scene_set, tmp_path, final, stop):
    first = make(scene_set, tmp_path)
    first.on_step = lambda step: first.request_stop() if step == stop else None
    assert not first.run()
    assert names(first) == [f"step-{stop:08d}"]
    second = make(scene_set, tmp_path)
    saved = first.checkpoint_dir / f"step-{stop:08d}"
    assert second.resume("auto") == saved and second.step == stop
    second.request_stop()
    written = (saved / "state.json").stat().st_ino
    assert not second.run()
    assert (saved / "state.json").stat().st_ino == written, "what is safe is not written again"
    # In a folder of its own it is: the run goes on from there.
    elsewhere = make(scene_set, tmp_path / "elsewhere")
    elsewhere.resume(saved)
    elsewhere.request_stop()
    assert not elsewhere.run() and names(elsewhere) == [saved.name]
    second._stop = False
    assert second.run()
    assert same_state(second.checkpoint_dir / "step-00000008", final)


@pytest.fixture(scope="module")
def killed(scene_set, tmp_path_factory):
    """The folder of two runs that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, scene_set, folder]
    ending = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert ending.stdout.split() == [str(-signal.SIGKILL)] * 2
    return folder


@pytest.mark.parametrize("moment", ["between", "saving"])
def test_killed_and_resumed_equals_straight(scene_set, killed, final, moment):
    trainer = make(scene_set, killed / moment)
    assert [path.name for path in list_checkpoints(trainer.checkpoint_dir)] == ["step-00000004"]
    assert trainer.resume("auto") is not None and trainer.step == 4
    assert trainer.run()
    assert same_state(trainer.checkpoint_dir / "step-00000008", final)
    assert names(trainer) == ["step-00000004", "step-00000008"], "what was half-written is gone"


def test_half_a_line_of_a_killed_run_is_cut_off(scene_set, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]) + '{"step": 5, "los')
    trainer = make(scene_set, tmp_path / "run")
    trainer.resume(trainer.checkpoint_dir / "step-00000004")
    trainer.run()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 9))


def test_other_steps_differ(straight):
    folder = straight / "checkpoints"
    assert not same_state(folder / "step-00000004", folder / "step-00000008")


def test_a_finished_run_has_nothing_to_do(scene_set, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    trainer = make(scene_set, tmp_path / "run")
    trainer.resume("auto")
    assert trainer.run() and trainer.step == 8
    with pytest.raises(ConfigError, match="8 steps already"):
        make(scene_set, tmp_path / "run", steps=6).resume("auto")


def test_resume_without_a_checkpoint(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path)
    assert trainer.resume("auto") is None and trainer.step == 0
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        trainer.resume(tmp_path / "none")


def test_resume_from_an_earlier_step_sets_later_ones_aside(scene_set, straight, tmp_path, final):
    shutil.copytree(straight, tmp_path / "run")
    trainer = make(scene_set, tmp_path / "run")
    trainer.resume(trainer.checkpoint_dir / "step-00000004")
    assert names(trainer) == ["step-00000004"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints-earlier-1").iterdir()] == ["step-00000008"]
    trainer.run()
    assert same_state(trainer.checkpoint_dir / "step-00000008", final)


def test_starting_afresh_keeps_the_earlier_run(scene_set, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    trainer = make(scene_set, tmp_path / "run")
    aside = trainer.start_afresh()
    assert {path.name for path in aside.iterdir()} == {"step-00000004", "step-00000008", "log.jsonl"}
    assert names(trainer) == [] and trainer.start_afresh() is None


def test_resume_refuses_what_belongs_elsewhere(scene_set, straight, tmp_path):
    trainer = make(scene_set, tmp_path)
    trainer.shards.manifest["key"] = "another set's"
    with pytest.raises(CheckpointError, match="other data"):
        trainer.resume(straight)
    config = load_preset("debug").override("model", num_layers=1)
    with pytest.raises(CheckpointError, match="another model configuration"):
        Trainer(config, scene_set, tmp_path, device="cpu").resume(straight)
    config = load_preset("debug").override("flow", prediction="velocity")
    with pytest.raises(CheckpointError, match="another flow configuration"):
        Trainer(config, scene_set, tmp_path, device="cpu").resume(straight)


def test_keys_that_are_newer_than_a_checkpoint_have_their_defaults(scene_set, straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "older")
    (state,) = folder.glob("checkpoints/step-00000008/state.json")
    content = json.loads(state.read_text())
    del content["config"]["flow"]["settling"]
    content["config"]["model"].pop("max_sigma", None)
    state.write_text(json.dumps(content))
    assert make(scene_set, tmp_path / "a").resume(folder)
    content["config"]["flow"]["of_a_later_version"] = 1
    state.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="another flow configuration"):
        make(scene_set, tmp_path / "b").resume(folder)


def test_memory_that_ends_after_a_step_leaves_the_step(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, validate_every=3, checkpoint_every=8)

    def validate():
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.validate = validate
    with pytest.raises(DeviceError, match="validation after step 3 does not fit"):
        trainer.run()
    assert names(trainer) == ["step-00000003"]


def test_damaged_checkpoints_are_refused(scene_set, final, tmp_path):
    for number, damage in enumerate(
        (
            lambda folder: os.truncate(folder / "state.safetensors", 5000),
            lambda folder: (folder / WEIGHTS).unlink(),
            lambda folder: (folder / "state.json").write_text("{"),
            lambda folder: (folder / "state.json").write_text('{"format": "other/1"}'),
            lambda folder: (folder / "state.json").write_text("[]"),
            lambda folder: (folder / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": 8})),
        )
    ):
        folder = tmp_path / str(number) / "step-00000008"
        shutil.copytree(final, folder)
        damage(folder)
        with pytest.raises(CheckpointError):
            load_training_state(folder)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_TOLD_BY_SAFETENSORS = SafetensorError("Error while serializing: No space left on device (os error 28)")


@pytest.mark.parametrize("fault", [FULL, FULL_TOLD_BY_SAFETENSORS])
def test_a_full_disk_leaves_the_last_whole_checkpoint(scene_set, tmp_path, monkeypatch, fault):
    trainer = make(scene_set, tmp_path)
    save = checkpoint.save_file

    def fill(tensors, path):
        save(tensors, path)
        if "step-00000008" in str(path):
            os.truncate(path, 1000)
            raise fault

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(OutputError, match="no space left on the disk"):
        trainer.run()
    assert names(trainer) == ["step-00000004"]
    assert load_training_state(trainer.checkpoint_dir / "step-00000004").step == 4


def test_a_file_too_large_for_the_system(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*step-00000001"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(trainer) == []


def test_a_second_ctrl_c_while_saving_leaves_nothing_half(scene_set, tmp_path, monkeypatch):
    trainer = make(scene_set, tmp_path, steps=1)

    def interrupted(tensors, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert names(trainer) == []
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters()), "the average is out again"


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"keep_last": 1}, [8]), ({"keep_last": 3}, [6, 7, 8]), ({"keep_last": 2, "keep_every": 3}, [3, 6, 7, 8])],
)
def test_which_checkpoints_are_kept(scene_set, tmp_path, options, kept):
    trainer = make(scene_set, tmp_path, checkpoint_every=1, validate_every=8, **options)
    trainer.run()
    assert names(trainer) == [f"step-{step:08d}" for step in kept]


def test_validation_is_deterministic_and_changes_nothing(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, validation_batches=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first = trainer.validate()
    torch.randn(7)  # what anyone drew in between
    assert trainer.validate() == first and first.keys() == {"validation_base", "validation_crop"}
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert make(scene_set, tmp_path, validation_batches=2, seed=1).validate() != first


def test_validation_with_fewer_held_out_than_a_batch(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, batch_size=32)
    assert trainer.shards.count("base", "validation") < 32
    assert trainer.validate().keys() == {"validation_base", "validation_crop"}


def test_divergence_is_told_with_its_step(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, lr=1e30, muon_lr=1e30, steps=40, checkpoint_every=40, validate_every=40)
    with pytest.raises(
        TrainingDiverged, match=rf"{MAX_BAD_STEPS} steps in a row, up to step \d+ \(examples .*checkpoint is none"
    ) as caught:
        trainer.run()
    assert "lower learning rate" in caught.value.hint
    assert f"up to step {trainer.step} " in caught.value.message and trainer.updates.skipped == MAX_BAD_STEPS
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.5).batch(trainer.step)
    assert all(trainer.shards.example_key(batch.kind, one) in caught.value.message for one in batch.indices.tolist())

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_one_bad_step_is_skipped(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, steps=3)
    objective, weights = trainer.objective, []

    def spoiled(model, batch, draws):
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        losses = objective(model, batch, draws)
        if batch.step == 1:
            losses.mean = losses.mean * float("nan")
        return losses

    spoiled.draw = objective.draw
    trainer.objective = spoiled
    trainer.validate = dict
    trainer.run()
    assert trainer.updates.skipped == 1
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert load_training_state(trainer.checkpoint_dir / "step-00000003").metadata["skipped"] == 1


def test_a_step_whose_loss_alone_is_not_finite_is_skipped_too(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, steps=2)
    objective = trainer.objective

    def overflowing(model, batch, draws):
        losses = objective(model, batch, draws)
        if batch.step == 1:
            losses.mean = losses.mean + float("inf")  # its gradients are what they were
        return losses

    overflowing.draw = objective.draw
    trainer.objective = overflowing
    trainer.validate = dict
    trainer.run()
    assert trainer.updates.skipped == 1


@pytest.mark.parametrize(
    ("flow", "said", "hint"),
    [
        ({"base_area": 400}, "begin with 20x20", r"base_area = (\d+)"),
        ({"base_area": 100}, "begin with 10x10", r"base_area = (\d+)"),
        ({"base_area": 2048}, "begin with 45x45: a size that would not be trained", r"base_area = (\d+)"),
        ({"base_widening": 0.0}, r"begin with \d+x\d+", r"base_widening = (1)"),
    ],
)
def test_whole_pictures_that_are_no_level_0_are_refused(scene_set, tmp_path, flow, said, hint):
    config = load_preset("debug")
    for name, value in flow.items():
        config = config.override("flow", **{name: value})
    with pytest.raises(ConfigError, match=rf"whole pictures have \d+x\d+ elements, .*{said}") as caught:
        Trainer(config, scene_set, tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=said):
        estimate_run(config, ShardSet(scene_set))
    named = re.search(rf"`{hint}` under", caught.value.hint)
    assert named, caught.value.hint
    Trainer(config.override("flow", **{hint.split()[0]: int(named[1])}), scene_set, tmp_path, device="cpu")


def test_a_set_of_pictures_of_one_area_asks_for_no_widening(scene_raw, tmp_path):
    same_area = PreprocessConfig(buckets=((32, 32), (24, 40), (40, 24)), crops_per_example=0)
    preprocess(scene_raw, tmp_path / "set", config=same_area)
    config = load_preset("debug").override("training", crop_fraction=0.0)
    with pytest.raises(ConfigError, match="begin with 53x32: a size that would not be trained") as caught:
        Trainer(config, tmp_path / "set", tmp_path, device="cpu")
    assert caught.value.hint.startswith("give `base_widening = 0` under [flow]")
    with pytest.raises(ConfigError) as caught:
        Trainer(config.override("training", lora_rank=2), tmp_path / "set", tmp_path, device="cpu")
    assert "how pictures begin is the adapted checkpoint's" in caught.value.hint
    Trainer(config.override("flow", base_widening=0.0), tmp_path / "set", tmp_path, device="cpu")
    check_level_zero(config.override("training", crop_fraction=1.0), ShardSet(tmp_path / "set"))


def test_a_batch_in_parts_is_the_same_step(scene_set, tmp_path):
    options = {"batch_size": 5, "dtype": "fp32", "steps": 3, "sample_every": 0, "checkpoint_every": 3}
    whole = make(scene_set, tmp_path / "whole", **options)
    parts = make(scene_set, tmp_path / "parts", accumulate=3, **options)
    curves = []
    for trainer in (whole, parts):
        reports = []
        trainer.on_report = reports.append
        trainer.run()
        curves.append([report.losses | report.level_losses | report.time_losses for report in reports])
    for expected, found in zip(*curves, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(scene_set, tmp_path):
    gradients = []
    for on in (False, True):
        trainer = make(scene_set, tmp_path, gradient_checkpointing=on, dtype="fp32", sample_every=0)
        for weight in trainer.model.parameters():
            if not weight.any():  # gates start at zero, and would hide what is behind them
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
        stream = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.5)
        for step in (0, 1):
            batch = stream.batch(step)
            draws = trainer.objective.draw(batch, torch.Generator().manual_seed(step))
            trainer.gradients.compute(trainer.objective, batch, draws, trainer.optimizer)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    assert all(grad.any() for grad in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_fp16_scales_the_loss_and_remembers_by_how_much(scene_set, tmp_path):
    options = {"dtype": "fp16", "sample_every": 0, "validate_every": 1000}
    plain = make(scene_set, tmp_path / "plain", **options | {"dtype": "fp32"})
    half = make(scene_set, tmp_path / "half", **options)
    assert half.gradients.scaler.is_enabled() and not plain.gradients.scaler.is_enabled()
    compute = half.gradients.compute

    def overflowing(objective, batch, draws, optimizer):
        if batch.step == 2:
            batch.pixels_bchw.fill_(float("inf"))
        return compute(objective, batch, draws, optimizer)

    half.gradients.compute = overflowing
    first, second = [], []
    plain.on_report, half.on_report = first.append, second.append
    plain.run()
    half.run()
    assert half.updates.skipped == 1 and half.gradients.scaler.get_scale() == 2.0**15
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    for before, after in zip(first[:2], second[:2], strict=True):
        assert after.losses == pytest.approx(before.losses, rel=0.01)

    again = make(scene_set, tmp_path / "half", **options)
    again.resume("auto")
    assert again.gradients.scaler.state_dict() == half.gradients.scaler.state_dict() and again.updates.skipped == 1
    # A run goes on in another format.
    make(scene_set, tmp_path / "half", **options | {"dtype": "fp32", "steps": 9}).resume("auto")


def test_fp16_in_parts_killed_and_resumed_equals_straight(scene_set, tmp_path):
    options = {"dtype": "fp16", "accumulate": 2, "sample_every": 0, "validate_every": 1000}
    make(scene_set, tmp_path / "straight", **options).run()
    stopped = make(scene_set, tmp_path / "stopped", **options)
    stopped.on_step = lambda step: stopped.request_stop() if step == 3 else None
    stopped.run()
    resumed = make(scene_set, tmp_path / "stopped", **options)
    resumed.resume("auto")
    resumed.run()
    assert same_state(*(tmp_path / name / "checkpoints" / "step-00000008" for name in ("straight", "stopped")))


def test_losses_are_told_by_level_and_by_time(straight):
    records = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    for record in records:
        (kind,) = (name for name in record["losses"] if not name.startswith("validation_"))
        levels, times = record["level_losses"], record["time_losses"]
        assert levels.keys() == {"0"} if kind == "base" else "0" not in levels
        assert times and all(name.startswith(f"{kind} 0.") for name in times)
        # One step of four examples: the loss is a mean of theirs, however they are told apart.
        assert min(levels.values()) - 1e-6 <= record["losses"][kind] <= max(levels.values()) + 1e-6
        assert min(times.values()) - 1e-6 <= record["losses"][kind] <= max(times.values()) + 1e-6


def test_init_from(scene_set, final, tmp_path):
    average = load_file(final / WEIGHTS)
    for folder in (final, final / "transformer"):
        trainer = make(scene_set, tmp_path, init_from=folder, seed=3)
        assert trainer.step == 0
        assert all(torch.equal(p, average[name]) for name, p in trainer.model.named_parameters())
        assert all(torch.equal(trainer.ema.shadow[name], average[name]) for name in average)


def test_init_from_another_residual_form(scene_set, final, tmp_path):
    average = load_file(final / WEIGHTS)
    config = load_preset("debug").override("model", residual="leapfrog_renormalized")
    model = Trainer(config, scene_set, tmp_path, device="cpu", init_from=final).model
    assert model.config.residual == "leapfrog_renormalized" and model.form.streams == 2
    assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())


def test_init_from_a_checkpoint_without_a_refiner(scene_set, final, tmp_path):
    average = load_file(final / WEIGHTS)
    config = load_preset("debug").override("model", refiner_channels=4).override("training", steps=3)
    trainer = Trainer(config, scene_set, tmp_path / "a", device="cpu", init_from=final)
    plain = Trainer(load_preset("debug"), scene_set, tmp_path / "b", device="cpu", init_from=final)
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(own[name], average[name]) for name in average)
    assert trainer.validate() == plain.validate()  # it begins with the very same pictures
    trainer.run()
    assert own["refiner.leave.weight"].abs().max() > 0
    with pytest.raises(ConfigError, match="has refiner_channels 4, this run 0"):
        Trainer(
            load_preset("debug"),
            scene_set,
            tmp_path / "c",
            device="cpu",
            init_from=trainer.checkpoint_dir / "step-00000003",
        )


def test_init_from_a_runs_folder_takes_its_newest_checkpoint(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path / "a", steps=4, checkpoint_every=2)
    trainer.run()
    assert len(list(trainer.checkpoint_dir.iterdir())) == 2
    started = make(scene_set, tmp_path / "b", init_from=tmp_path / "a").model
    newest = load_file(trainer.checkpoint_dir / "step-00000004" / WEIGHTS)
    assert all(torch.equal(p, newest[name]) for name, p in started.named_parameters())


def test_init_from_a_checkpoint_without_a_network_for_level_0(scene_set, final, tmp_path):
    average = load_file(final / WEIGHTS)
    sizes = {"base_num_layers": 1, "base_hidden_size": 32, "base_num_heads": 2, "base_patch_size": 4}
    config = load_preset("debug").override("model", refiner_channels=4, **sizes).override("training", steps=4)
    trainer = Trainer(config, scene_set, tmp_path / "a", device="cpu", init_from=final)
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(own[name], average[name]) for name in average)
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    trainer.run()
    for name in ("base.blocks.0.feed_forward.down.weight", "base.refiner.leave.weight", "blocks.0.attn.to_v.weight"):
        assert not torch.equal(own[name], before[name])
    again = Trainer(config, scene_set, tmp_path / "b", device="cpu", init_from=tmp_path / "a")
    assert again.model.base is not None and again.model.config.refiner_channels == 4
    with pytest.raises(ConfigError, match="has refiner_channels 4, this run 0"):
        make(scene_set, tmp_path / "c", init_from=tmp_path / "a")


def test_init_from_what_does_not_fit(scene_set, final, tmp_path):
    with pytest.raises(CheckpointError, match="cannot start from"):
        make(scene_set, tmp_path, init_from=tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(final, broken)
    os.truncate(broken / WEIGHTS, 3000)
    with pytest.raises(CheckpointError, match="cannot start from"):
        make(scene_set, tmp_path, init_from=broken)
    config = load_preset("debug").override("model", num_layers=1)
    with pytest.raises(ConfigError, match="has num_layers 2, this run 1"):
        Trainer(config, scene_set, tmp_path, device="cpu", init_from=final)


def test_an_output_folder_that_cannot_be(scene_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of its path is a file"):
        make(scene_set, tmp_path / "file" / "run").run()
