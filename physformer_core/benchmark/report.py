"""A benchmark's report as plain data (``physformer-bench/1``), and the comparison of one with an earlier one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physformer_core.benchmark.cases import OURS
from physformer_core.benchmark.machine import MachinePeak, machine_facts
from physformer_core.benchmark.measure import Measurement, fits
from physformer_core.checkpoints import find_checkpoint
from physformer_core.errors import DataError

FORMAT = "physformer-bench/1"


def build_report(
    what: str,
    results: Sequence[Measurement],
    peaks: Mapping[str, MachinePeak],
    *,
    not_run: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report of one kind of measurement.

    Args:
        what: ``attention``, ``model`` or ``generate``.
        results: In the order they were taken.
        peaks: Of the machine, from the same run, by the dtype's name; at least one.
        not_run: Contenders that cannot run here, and why.

    Returns:
        Plain values. Every case has the key fields of `Case`, what was measured, and ``matrix_share`` and
        ``bandwidth_share``: its counted operations and bytes per second over the machine's.
    """
    weights = {path: find_checkpoint(path).sha256 for path in {one.case.checkpoint for one in results} if path}
    return {
        "format": FORMAT,
        "what": what,
        "machine": machine_facts(next(iter(peaks.values())).device) | peak_facts(peaks),
        "cases": [_entry(one, peaks[one.case.dtype], weights) for one in results],
        "fits": [
            {"contender": group[0], "batch": group[1], "dtype": group[2]}
            | {cost: vars(law) for cost, law in laws.items()}
            for group, laws in fits(results).items()
        ],
        "ratios": ratios(results),
        "not_run": dict(not_run or {}),
    }


def peak_facts(peaks: Mapping[str, MachinePeak]) -> dict[str, Any]:
    """The machine's figures in a report: operations per second by dtype, and bytes per second."""
    return {
        "matrix_flops": {dtype: peak.flops for dtype, peak in peaks.items()},
        "bandwidth": max(peak.bandwidth for peak in peaks.values()),
    }


def _entry(one: Measurement, peak: MachinePeak, weights: Mapping[Path, str]) -> dict[str, Any]:
    entry = {key: value for key, value in dataclasses.asdict(one.case).items() if key != "what"}
    if one.case.checkpoint is not None:
        entry |= {"preset": None, "checkpoint": str(one.case.checkpoint)}
        entry["checkpoint_sha256"] = weights[one.case.checkpoint]
    entry["tokens"] = one.case.tokens
    entry |= {key: value for key, value in vars(one).items() if key != "case"}
    entry["samples"] = list(one.samples)
    entry["matrix_share"] = _share(one.flops, one.seconds, peak.flops)
    entry["bandwidth_share"] = _share(one.bytes, one.seconds, peak.bandwidth)
    return entry


def _share(amount: int | None, seconds: float | None, most: float) -> float | None:
    return None if not amount or not seconds or not most else amount / seconds / most


def ratios(results: Sequence[Measurement]) -> list[dict[str, Any]]:
    """How many times our time and memory every peer takes, at each size where both are known."""
    found = []
    for ours in results:
        if ours.case.contender != OURS or not ours.seconds:
            continue
        for peer in results:
            same = dataclasses.replace(peer.case, contender=OURS) == ours.case
            if peer.case.contender == OURS or not same or not peer.seconds:
                continue
            memory = peer.peak_bytes / ours.peak_bytes if peer.peak_bytes and ours.peak_bytes else None
            found.append(
                {
                    "peer": peer.case.contender,
                    "tokens": ours.case.tokens,
                    "batch": ours.case.batch,
                    "dtype": ours.case.dtype,
                    "time": peer.seconds / ours.seconds,
                    "memory": memory,
                    "extrapolated": peer.status == "extrapolated",
                }
            )
    return found


@dataclass(frozen=True)
class Change:
    """One figure beside the baseline's.

    Args:
        name: What it is of, in words.
        figure: ``time``, ``memory`` or ``images/s``.
        before, after: The figures; time in seconds, or in units of the machine's matrix peak if machines differ.
        ratio: How many times worse it has become: above 1 is worse.
    """

    name: str
    figure: str
    before: float
    after: float
    ratio: float


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report written with ``--json``.

    Raises:
        DataError: There is none, or it is not one.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read the baseline {path}: {error.strerror or error}",
            hint="make one: the same command with --json > baseline.json",
        ) from error
    except ValueError as error:
        raise DataError(f"the baseline {path} is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise DataError(f"the baseline {path} is not a report of the format {FORMAT}")
    return report


def why_not_compared(baseline: Mapping[str, Any], what: str, sizes: Sequence[tuple[int, int]] = ()) -> str | None:
    """Why nothing of a measurement to come can be compared with a baseline, or None if it may be.

    Args:
        baseline: An earlier report.
        what: Kind of the measurement, as in the report.
        sizes: (height, width) that will be measured; any if there are none.
    """
    parts = _parts(baseline)
    if what != "all" and what not in parts:
        return f"it is of {', '.join(parts)}, not of {what}"
    if what in parts and sizes and "cases" in parts[what]:
        known = {(case["height"], case["width"]) for case in parts[what]["cases"]}
        if not known & set(sizes):
            return "it has none of these sizes, but " + ", ".join(
                f"{width}x{height}" for height, width in sorted(known)
            )
    return None


def compare(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Change]:
    """Every figure of ours that both reports have, slower or larger ones first.

    On the same processor with as many threads, times are compared as they are. Otherwise they are first divided by
    what the machine's own matrix product takes for as many operations, so that another machine is not a regression.

    Raises:
        DataError: They have nothing in common.
    """
    changes: list[Change] = []
    for name in _parts(report):
        before, after = _parts(baseline).get(name), _parts(report)[name]
        if before is not None:
            changes += _train_changes(before, after) if name == "train" else _case_changes(name, before, after)
    if not changes:
        raise DataError(
            "the baseline has no case in common with this run",
            hint="run with the options that the baseline was made with",
        )
    return sorted(changes, key=lambda change: -change.ratio)


def _parts(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The reports within a report of ``bench all``, or the one itself, by kind."""
    return dict(report["parts"]) if report["what"] == "all" else {report["what"]: report}


def _same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one["machine"].get(key) == other["machine"].get(key) for key in ("processor", "threads", "device_name"))


_KEY = ("contender", "preset", "checkpoint_sha256", "backend", "height", "width", "batch", "dtype")


def _key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case.get(key) for key in _KEY)


def _case_changes(what: str, baseline: Mapping[str, Any], report: Mapping[str, Any]) -> list[Change]:
    earlier = {_key(case): case for case in baseline["cases"]}
    same_machine = _same_machine(report, baseline)
    changes = []
    for case in report["cases"]:
        before = earlier.get(_key(case))
        measured = before is not None and case["status"] == before["status"] == "measured"
        if case["contender"] != OURS or before is None:
            continue
        name = f"{what} {case['preset'] or case['checkpoint']} {case['width']}x{case['height']} batch {case['batch']}"
        if not measured:
            if before["status"] == "measured":  # it ran once, and now it does not
                changes.append(Change(name, "time", before["seconds"], float("inf"), float("inf")))
            continue
        times = (before["seconds"], case["seconds"])
        if not same_machine and before["matrix_share"] and case["matrix_share"]:
            times = (1 / before["matrix_share"], 1 / case["matrix_share"])
        changes.append(Change(name, "time", *times, times[1] / times[0]))
        if before["peak_bytes"] and case["peak_bytes"]:
            sizes = (before["peak_bytes"], case["peak_bytes"])
            changes.append(Change(name, "memory", *sizes, sizes[1] / sizes[0]))
    return changes


def _train_changes(baseline: Mapping[str, Any], report: Mapping[str, Any]) -> list[Change]:
    key = ("preset", "batch", "dtype", "peer_layers")
    if any(report[name] != baseline[name] for name in key):
        return []
    name = f"train {report['preset']} batch {report['batch']}"
    # The ratio to the peer was measured side by side: it holds on any machine.
    before, after = baseline["ratio"], report["ratio"]
    changes = [Change(name, "images/s over the peer's", before, after, before / after)]
    if _same_machine(report, baseline):
        before, after = baseline["ours"]["images_per_second"], report["ours"]["images_per_second"]
        changes.append(Change(name, "images/s", before, after, before / after))
    return changes


def merge_reports(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several, by kind."""
    return {
        "format": FORMAT,
        "what": "all",
        "machine": parts[0]["machine"],
        "parts": {part["what"]: part for part in parts},
    }
