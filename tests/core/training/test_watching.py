"""What a run says of itself: its log's figures, event files, runs of Weights & Biases, panels, verdicts."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream
from physformer_core.errors import ConfigError, DataError
from physformer_core.flow.path import FlowPath
from physformer_core.hardware import matrix_peak, peak_memory
from physformer_core.model.native import ops as native
from physformer_core.training.objective import FlowObjective
from physformer_core.training.panels import add_panels
from physformer_core.training.sinks import TensorBoardSink, WandbSink, feed, scalars
from physformer_core.training.trainer import StepReport, Trainer
from physformer_core.training.verdict import judge
from physformer_core.training.watching import WorkMeter, batch_flops, newton_schulz_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(scene_set, tmp_path_factory):
    """A trainer that has run four steps, its reports, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    reports: list[StepReport] = []
    config = load_preset("debug").override("training", steps=4, sample_every=4)
    trainer = Trainer(config, scene_set, folder, device="cpu", on_report=reports.append, matrix_peak=1e12)
    assert trainer.run()
    return trainer, reports


def test_the_log_holds_the_figures(run):
    trainer, reports = run
    records = [json.loads(line) for line in (trainer.output_dir / "log.jsonl").read_text().splitlines()]
    for record, report in zip(records, reports, strict=True):
        assert record["statistics"] == report.statistics and record["memory_bytes"] > 1e7
        assert 0 < record["matrix_share"] < 1
        assert record["statistics"]["velocity_target_norm"] > 0


def test_statistics_are_those_of_the_batch(run, scene_set):
    trainer, _ = run
    stream = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.0)
    batch = stream.batch(0)
    objective = trainer.objective
    draws = objective.draw(batch, torch.Generator().manual_seed(1))
    statistics = objective(trainer.model, batch, draws).statistics
    assert statistics["field_mean"] == pytest.approx(batch.pixels_bchw.mean().item(), abs=1e-6)
    assert statistics["field_std"] == pytest.approx(batch.pixels_bchw.std().item(), rel=1e-5)
    target = batch.pixels_bchw - draws.noise_bchw  # of the linear path, at any time
    assert statistics["velocity_target_norm"] == pytest.approx(target.square().mean().sqrt().item(), rel=1e-5)


def test_a_network_that_is_right_has_velocities_of_the_right_size(run):
    trainer, _ = run
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.0).batch(0)
    exact = dataclasses.replace(trainer.objective, path=FlowPath(prediction="velocity"))
    draws = exact.draw(batch, torch.Generator().manual_seed(1))

    class Oracle(type(trainer.model)):
        def forward(self, *args, **kwargs):
            return (batch.pixels_bchw - draws.noise_bchw,)

    oracle = Oracle(**{**trainer.config.model, "text_dim": 384, "pooled_dim": 384})
    losses = FlowObjective.__call__(exact, oracle, batch, draws)
    assert losses.mean.item() == 0
    assert losses.statistics["velocity_norm"] == losses.statistics["velocity_target_norm"]


def test_the_meter_counts_what_the_estimate_counts(run):
    trainer, _ = run
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.5).batch(1)
    adamw, muon = WorkMeter(trainer.model, "adamw", 1.0), WorkMeter(trainer.model, "muon", 1.0)
    assert adamw.step(batch) == adamw.step(batch) == batch_flops(trainer.model, batch)
    assert muon.step(batch) > adamw.step(batch)


@pytest.mark.usefixtures("without_native")
def test_operations_of_muon_as_torch_does_them():
    assert newton_schulz_flops(torch.empty(3, 3)) == 5 * 3 * 2 * 27
    assert newton_schulz_flops(torch.empty(2, 9)) == newton_schulz_flops(torch.empty(9, 2)) == 2 * 2 * 36 + 17 * 2 * 8


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_operations_of_muon_in_c_are_half_but_for_the_last():
    assert newton_schulz_flops(torch.empty(9, 2)) == 36 + 17 * 8 + 2 * 36
    assert newton_schulz_flops(torch.empty(3, 3), torch.bfloat16) == 5 * 3 * 2 * 27


def test_the_peak_is_measured_once():
    matrix_peak.cache_clear()
    peak = matrix_peak(CPU, torch.float32, seconds=0.02)
    assert 1e8 < peak < 1e14 and matrix_peak(CPU, torch.float32, seconds=0.02) == peak
    matrix_peak.cache_clear()
    assert peak_memory(CPU) > 1e7


def test_tensorboard_holds_every_number(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, reports = run
    picture = next((trainer.output_dir / "samples").glob("*.png"))
    sink = TensorBoardSink(tmp_path, first_step=0, text="[training]\nsteps = 4\n")
    on_report, on_samples = feed([sink])
    for report in reports:
        on_report(report)
    on_samples(4, picture)
    sink.close()
    # A run that went back to step 2 hides what came after it.
    resumed = TensorBoardSink(tmp_path, first_step=2, text="")
    resumed.report(dataclasses.replace(reports[2], learning_rate=0.5))
    resumed.close()

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    learning = [(event.step, event.value) for event in events.Scalars("training/learning_rate")]
    assert [step for step, _ in learning] == [1, 2, 3] and learning[-1][1] == 0.5
    for name, value in scalars(reports[0]).items():
        (first, *_) = events.Scalars(name)
        assert first.step == 1 and first.value == pytest.approx(value, rel=1e-6), name
    assert {"loss/base", "statistics/velocity_norm", "speed/matrix_share"} <= set(events.Tags()["scalars"])
    assert "configuration/text_summary" in events.Tags()["tensors"]


def test_tensorboard_holds_the_grid(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, _ = run
    picture = next((trainer.output_dir / "samples").glob("*.png"))
    sink = TensorBoardSink(tmp_path, first_step=0, text="")
    sink.samples(4, picture)
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (4, *Image.open(picture).size)


def test_wandb_offline_writes_a_run(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    trainer, reports = run
    picture = next((trainer.output_dir / "samples").glob("*.png"))
    sink = WandbSink(tmp_path / "run", mode="offline", project="p", config=trainer.config.to_dict(), resumed=False)
    sink.report(reports[0])
    sink.samples(1, picture)
    sink.close()
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert identity in file.name and b"loss/base" in file.read_bytes()
    (image,) = (folder / "files" / "media" / "images").iterdir()
    assert Image.open(image).size == Image.open(picture).size

    resumed = WandbSink(tmp_path / "run", mode="offline", project="p", config={}, resumed=True)
    resumed.close()
    assert json.loads((tmp_path / "run" / "wandb.json").read_text())["id"] == identity


@pytest.mark.parametrize(("package", "option"), [("tensorboard", "--tensorboard"), ("wandb", "--wandb")])
def test_a_missing_package_is_told(tmp_path, monkeypatch, package, option):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{option} needs the package {package}") as caught:
        if package == "tensorboard":
            TensorBoardSink(tmp_path, first_step=0, text="")
        else:
            WandbSink(tmp_path, mode="offline", project="p", config={}, resumed=False)
    assert caught.value.hint == f'pip install "physformer[{package}]"' and not list(tmp_path.iterdir())


def test_panels_stand_below_the_losses(run):
    trainer, _ = run
    records = [json.loads(line) for line in (trainer.output_dir / "log.jsonl").read_text().splitlines()]
    above = Image.new("RGB", (900, 300), (1, 2, 3))
    page = add_panels(above, records)
    assert page.width == 900 and page.height == 300 + 2 * 220
    assert page.crop((0, 0, 900, 300)).tobytes() == above.tobytes()
    panels = np.asarray(page.crop((0, 300, 900, 740)))
    blue = (np.abs(panels.astype(int) - (31, 92, 173)).sum(-1) < 40).reshape(2, 220, 3, 300).sum((1, 3))
    assert (blue > 20).all(), "every panel has its line"
    assert add_panels(above, [{"step": 1, "losses": {}}]) is above


def log(folder, losses):
    lines = [json.dumps({"step": step, "losses": {"base": loss}}) for step, loss in losses]
    path = folder / "log.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_verdict(tmp_path):
    path = log(tmp_path, [(10, 2.0), (50, 0.3), (95, 0.05), (100, 0.03)])
    verdict = judge(path, 0.021)
    assert verdict.passed and verdict.share == pytest.approx(0.02)
    assert verdict.line == "PASS: the loss went from 2 to 0.04, 2.0% of it, < 2.1%"
    assert not judge(path, 0.019).passed and judge(path, 0.019).line.startswith("FAIL: ")
    with pytest.raises(DataError):
        judge(tmp_path / "none", 0.5)


def test_scalars_leave_out_what_is_not_finite(run):
    _, reports = run
    odd = dataclasses.replace(reports[0], gradient_norm=None, examples_per_second=math.inf, matrix_share=None)
    assert not {"training/gradient_norm", "speed/examples_per_second", "speed/matrix_share"} & scalars(odd).keys()


@pytest.mark.slow
def test_the_overfit_preset_passes(scene_set, tmp_path):
    config = load_preset("overfit").override("training", sample_every=0)
    trainer = Trainer(config, scene_set, tmp_path, device="cpu")
    assert trainer.run()
    assert judge(tmp_path / "log.jsonl", config.training.pass_below).passed


def test_a_repeated_batch_is_one_batch(scene_set, tmp_path):
    seen = []
    config = load_preset("debug").override("training", repeat_batch=True, steps=3, sample_every=0)
    trainer = Trainer(config, scene_set, tmp_path, device="cpu")
    draw = trainer.objective.draw

    def watched(batch, generator):
        draws = draw(batch, generator)
        seen.append((batch.indices.tolist(), batch.kind, draws.noise_bchw))
        return draws

    object.__setattr__(trainer.objective, "draw", watched)
    trainer.validate = dict
    trainer.run()
    assert len({str(one[:2]) for one in seen}) == 1 and len(seen) >= 3  # some are drawn ahead
    assert not torch.equal(seen[0][2], seen[1][2]), "its noise is new"
