"""Reports, their comparison and their picture, on numbers that are known."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from physformer_core.benchmark.cases import OURS, Case
from physformer_core.benchmark.machine import MachinePeak
from physformer_core.benchmark.measure import Measurement
from physformer_core.benchmark.plot import draw_report
from physformer_core.benchmark.report import build_report, compare, merge_reports, read_report, why_not_compared
from physformer_core.checkpoints import shipped_checkpoint
from physformer_core.errors import DataError

PEAKS = {"fp32": MachinePeak(torch.device("cpu"), torch.float32, flops=1e9, bandwidth=1e8)}


def one(contender: str = OURS, side: int = 16, seconds: float = 2.0, **more) -> Measurement:
    case = Case(what="model", contender=contender, height=side, width=side, dtype="fp32", device="cpu")
    given = {"status": "measured", "seconds": seconds, "spread": 0.1, "samples": (seconds,), "peak_bytes": 1000}
    return Measurement(case=case, **{**given, "flops": 10**9, "bytes": 10**7, "process_bytes": 9000, **more})


@pytest.fixture
def shipped_copy(tmp_path):
    """The shipped checkpoint in another place."""
    return shutil.copytree(shipped_checkpoint(), tmp_path / "moved")


def report(*results: Measurement, **more):
    return build_report("model", results or [one()], PEAKS, **more)


def test_shares_are_of_the_machines_own_figures() -> None:
    [case] = report(one(seconds=2.0))["cases"]
    assert case["matrix_share"] == pytest.approx(0.5)
    assert case["bandwidth_share"] == pytest.approx(0.05)


def test_a_report_survives_json() -> None:
    whole = report(one(), one("dense", seconds=6.0), one(side=32, seconds=8.0), not_run={"flex": "no CUDA"})
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    [fit] = whole["fits"]
    assert (
        fit["contender"] == OURS and fit["time"]["exponent"] == pytest.approx(1) and fit["time"]["half_width"] is None
    )
    [ratio] = whole["ratios"]
    assert ratio["peer"] == "dense" and ratio["time"] == pytest.approx(3) and ratio["memory"] == pytest.approx(1)


def test_compare_finds_what_became_worse() -> None:
    before = report(one(), one(side=32, seconds=8.0), one("dense", seconds=1.0))
    after = report(one(seconds=2.5), one(side=32, seconds=7.0, peak_bytes=3000), one("dense", seconds=9.0))
    changes = compare(after, before)
    assert [(change.figure, round(change.ratio, 3)) for change in changes] == [
        ("memory", 3.0),
        ("time", 1.25),
        ("memory", 1.0),
        ("time", 0.875),
    ]
    assert "32x32" in changes[0].name  # and the peer's own time is not ours to answer for


def test_another_machine_is_not_a_regression() -> None:
    before, after = report(one(seconds=2.0)), report(one(seconds=4.0))
    after["machine"]["processor"] = "slower"
    after["cases"][0]["matrix_share"] = 0.5  # its matrix products are half as fast, too
    assert [change.ratio for change in compare(after, before) if change.figure == "time"] == [1.0]


def test_what_no_longer_runs_is_a_regression() -> None:
    broken = Measurement(case=one().case, status="out of memory", note="no memory")
    [change] = compare(report(broken), report(one()))
    assert change.ratio == float("inf")


def test_reports_with_nothing_in_common_are_refused() -> None:
    other = one(side=64)
    with pytest.raises(DataError, match="no case in common"):
        compare(report(one()), report(dataclasses.replace(other)))


def test_checkpoints_are_compared_by_their_weights(shipped_copy) -> None:
    def of(path, seconds):
        ours = one(seconds=seconds)
        return report(dataclasses.replace(ours, case=dataclasses.replace(ours.case, checkpoint=path)))

    before, after = of(shipped_checkpoint(), 2.0), of(shipped_copy, 3.0)
    [case] = after["cases"]
    assert case["preset"] is None and case["checkpoint"] == str(shipped_copy)
    [change, _] = compare(after, before)
    assert change.ratio == pytest.approx(1.5) and str(shipped_copy) in change.name
    with pytest.raises(DataError, match="no case in common"):
        compare(after, report(one()))


def test_what_a_baseline_cannot_be_compared_with() -> None:
    before = report(one(), one(side=32))
    assert why_not_compared(before, "model", [(32, 32)]) is None and why_not_compared(before, "model") is None
    assert why_not_compared(before, "model", [(64, 64)]) == "it has none of these sizes, but 16x16, 32x32"
    assert why_not_compared(before, "attention", [(32, 32)]) == "it is of model, not of attention"
    assert why_not_compared(merge_reports([before]), "model", [(32, 32)]) is None
    assert why_not_compared(before, "all") is None


def test_parts_are_compared_each_with_its_own() -> None:
    whole = merge_reports([report(one(seconds=3.0))])
    assert compare(whole, report(one(seconds=2.0)))[0].ratio == pytest.approx(1.5)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', "{"])
def test_what_is_no_baseline(tmp_path, text: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(DataError, match="baseline"):
        read_report(path)
    with pytest.raises(DataError, match="cannot read the baseline"):
        read_report(tmp_path / "none.json")


def test_plot_has_a_line_for_everybody() -> None:
    import numpy as np

    results = [one(side=side, seconds=side / 16) for side in (16, 32, 64)]
    alone = np.asarray(draw_report(report(*results)))
    peers = [one("sana", side=side, seconds=side / 8) for side in (16, 32, 64)]
    guess = Measurement(case=one("dense", 64).case, status="extrapolated", seconds=50.0)
    both = np.asarray(draw_report(report(*results, *peers, guess)))
    assert alone.shape == both.shape == (560, 1200, 3)

    def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
        return int((np.abs(picture.astype(int) - colour).sum(-1) < 20).sum())

    green, blue = (60, 140, 70), (31, 92, 173)
    assert pixels(alone, blue) > 200 and pixels(alone, green) == 0
    assert pixels(both, green) > 200


def test_plot_keeps_dtypes_apart() -> None:
    """As one line they would go up, and back to where the next one begins."""
    import numpy as np

    def drawn(*dtypes: str) -> np.ndarray:
        ours = [one(side=side, seconds=side / (16 if name == "fp32" else 8)) for name in dtypes for side in (16, 64)]
        names = [name for name in dtypes for _ in (16, 64)]
        cases = [
            dataclasses.replace(a, case=dataclasses.replace(a.case, dtype=name))
            for a, name in zip(ours, names, strict=True)
        ]
        return np.asarray(draw_report(build_report("model", cases, dict.fromkeys(("fp32", "bf16"), PEAKS["fp32"]))))

    blue = (31, 92, 173)
    alone, both = (
        int((np.abs(drawn(*d).astype(int) - blue).sum(-1) < 20).sum()) for d in (("fp32",), ("fp32", "bf16"))
    )
    assert both < 1.15 * alone  # the second is paler


def test_nothing_measured_is_no_plot() -> None:
    with pytest.raises(DataError, match="nothing to plot"):
        draw_report(report(Measurement(case=one().case, status="out of memory")))
