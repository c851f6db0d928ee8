"""The scaling law: known laws are found again, budgets are spent best, and runs are read as they were trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from physformer_core.checkpoints import find_checkpoint
from physformer_core.errors import CheckpointError, ConfigError, DataError
from physformer_core.evaluation.scaling import ScalingLaw, ScalingPoint, analyse, fit_law, frontier_points
from physformer_core.evaluation.scaling_plot import draw_scaling
from physformer_core.evaluation.scaling_runs import (
    family,
    member_config,
    parse_sizes,
    read_run,
    read_table,
    train_family,
)

CHINCHILLA = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28, 6.0)


def runs(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[ScalingPoint]:
    generator = np.random.default_rng(seed)
    return [
        ScalingPoint(
            f"{n:g}/{d:g}", n, d, law.flops_per_pair * n * d, law.loss(n, d) * math.exp(noise * generator.normal())
        )
        for n in (1e7, 1e8, 1e9, 1e10)
        for d in (1e9, 1e10, 1e11, 1e12)
    ]


def test_a_known_law_is_found_again() -> None:
    found = fit_law(runs(CHINCHILLA))
    assert found.floor == pytest.approx(CHINCHILLA.floor, rel=0.01)
    assert found.size_exponent == pytest.approx(CHINCHILLA.size_exponent, rel=0.02)
    assert found.data_exponent == pytest.approx(CHINCHILLA.data_exponent, rel=0.02)
    assert found.flops_per_pair == pytest.approx(6)


def test_one_run_that_went_wrong_does_not_bend_it() -> None:
    points = runs(CHINCHILLA)
    points[5] = ScalingPoint("bad", points[5].parameters, points[5].examples, points[5].flops, 2 * points[5].loss)
    assert fit_law(points).size_exponent == pytest.approx(CHINCHILLA.size_exponent, rel=0.05)


def test_no_pair_of_equal_compute_is_better_than_the_best() -> None:
    flops = 1e20
    parameters, examples = CHINCHILLA.best(flops)
    assert 6 * parameters * examples == pytest.approx(flops)
    least = CHINCHILLA.loss(parameters, examples)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert CHINCHILLA.loss(parameters * factor, examples / factor) > least
    assert CHINCHILLA.compute_exponent == pytest.approx(0.34 * 0.28 / 0.62)


def test_intervals_hold_the_truth_and_the_report_is_json() -> None:
    told: list[int] = []
    report = analyse(runs(CHINCHILLA, noise=0.005), budgets=[1e24], samples=30, seed=1, on_sample=told.append)
    assert told[-1] == 30
    for name in ("size_exponent", "data_exponent", "compute_exponent"):
        one = report.intervals[name]
        assert one.low <= one.value <= one.high and one.low <= getattr(CHINCHILLA, name) <= one.high, name
    assert report.predictions[0].extrapolated and report.predictions[0].loss.value < min(p.loss for p in report.points)
    assert 0 < report.residual < 0.02 and report.frontier is not None and report.frontier.exponent > 0
    assert json.loads(json.dumps(report.as_dict()))["format"] == "physformer-scaling/1"
    again = analyse(runs(CHINCHILLA, noise=0.005), budgets=[1e24], samples=30, seed=1)
    assert again.intervals == report.intervals
    picture = np.asarray(draw_scaling(report)).astype(int)
    assert picture.shape == (620, 1000, 3)
    assert (picture[..., 0] - picture[..., 2] > 60).sum() > 300  # the law's red line


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [ScalingPoint(str(f), 1, 1, f, loss) for f, loss in ((1, 3.0), (2, 3.5), (3, 2.0), (3, 2.5), (4, 2.0))]
    assert [point.name for point in frontier_points(points)] == ["1", "3"]


def test_too_little_to_fit_is_refused() -> None:
    points = runs(CHINCHILLA)
    with pytest.raises(DataError, match="too few"):
        fit_law(points[:5])
    with pytest.raises(DataError, match="too few"):
        fit_law([point for point in points if point.parameters < 1e9])
    with pytest.raises(DataError, match="loss"):
        fit_law([*points, ScalingPoint("nan", 1e7, 1e9, 1e17, math.nan)])
    flat = ScalingLaw(1.0, 1.0, 0.0, 5.0, 0.5, 6.0)
    with pytest.raises(DataError, match="no best size"):
        flat.best(1e20)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("name,parameters,examples,loss,flops\nfirst,1e6,2e6,0.5,1e13\n,2e6,2e6,0.4,\n")
    first, second = read_table(path)
    assert (first.name, first.parameters, first.flops, first.loss) == ("first", 1e6, 1e13, 0.5)
    assert (second.name, second.flops) == ("line 3", 24e12)
    path.write_text("parameters,loss\n1,2\n")
    with pytest.raises(DataError, match="no column examples"):
        read_table(path)
    path.write_text("parameters,examples,loss\n1,2,3\n1,x,3\n")
    with pytest.raises(DataError, match="line 3"):
        read_table(path)


def test_sizes_and_families() -> None:
    assert parse_sizes("64x2, 96x3") == [(64, 2), (96, 3)]
    for wrong in ("64", "64x2x1", "60x2", "64x0", "ax2"):
        with pytest.raises(ConfigError):
            parse_sizes(wrong)
    members = family([(64, 2), (32, 1)], [16, 8])
    assert [member.name for member in members] == ["32x1-8", "32x1-16", "64x2-8", "64x2-16"]
    config = member_config(members[-1], preset="nano", batch_size=4, seed=3)
    assert config.model["num_heads"] == 2 and config.training.steps == 4 and config.training.seed == 3
    with pytest.raises(ConfigError, match="less than a batch"):
        member_config(members[0], preset="nano", batch_size=32, seed=0)


def test_a_family_is_trained_read_and_not_trained_twice(scene_set: Path, tmp_path: Path) -> None:
    members, told = family([(32, 1)], [8, 16]), []
    folders = train_family(members, scene_set, tmp_path, batch_size=4, device="cpu", on_example=told.append)
    assert told[-1] == 24 and [folder.name for folder in folders] == ["32x1-8", "32x1-16"]
    points = [read_run(folder) for folder in folders]
    assert [point.examples for point in points] == [8, 16]
    assert points[0].parameters == points[1].parameters > 1e4
    assert points[1].flops == 2 * points[0].flops > 6 * 64 * 1e4 and all(0 < point.loss < 10 for point in points)

    before = [(folder / "log.jsonl").read_bytes() for folder in folders]
    train_family(members, scene_set, tmp_path, batch_size=4, device="cpu")
    assert [(folder / "log.jsonl").read_bytes() for folder in folders] == before
    # A run from before there was one of today's keys has its default.
    state_path = find_checkpoint(folders[0]).folder / "state.json"
    state = json.loads(state_path.read_text("utf-8"))
    del state["config"]["training"]["cuda_graphs"]
    state_path.write_text(json.dumps(state), "utf-8")
    train_family(members, scene_set, tmp_path, batch_size=4, device="cpu")
    assert [(folder / "log.jsonl").read_bytes() for folder in folders] == before
    with pytest.raises(ConfigError, match="other settings"):
        train_family(members, scene_set, tmp_path, batch_size=4, seed=1, device="cpu")
    with pytest.raises(DataError, match="'other'"):
        read_run(folders[0], "other")


def test_what_is_no_finished_run_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.jsonl"):
        read_run(tmp_path)
    import shutil

    copy = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (copy / "log.jsonl").write_text('{"step": 1, "losses": {"validation_base": 1.0}}\n')
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_run(copy)
    config = {"training": {"steps": 10, "batch_size": 4}, "flow": {}}
    (copy / "state.json").write_text(json.dumps({"step": 5, "config": config}))
    with pytest.raises(DataError, match="step 5 of 10"):
        read_run(copy)
