"""What `physformer bench` prints, draws and compares once something is measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.benchmark.campaign import Campaign
    from physformer_core.benchmark.measure import BatchLimit
    from physformer_core.benchmark.report import Change
    from physformer_core.project import RunRecorder


class Session:
    """One bench command, whose options have been checked and whose baseline has been read before anything runs."""

    def __init__(
        self, run: RunRecorder, plot: Path | None, baseline: Mapping[str, Any] | None, limit: float | None
    ) -> None:
        self._run, self._plot, self._baseline, self._limit = run, plot, baseline, limit

    def finish(self, report: dict[str, Any], *, as_json: bool) -> None:
        """Prints the report, draws the plot, compares with the baseline.

        Raises:
            DataError: The baseline has nothing in common with the report.
            typer.Exit: With 3 if something regressed.
        """
        from physformer_core.errors import DataError

        self._run.device = report["machine"]["device"]
        changes: list[Change] = []
        wrong = None
        if self._baseline is not None:
            from physformer_core.benchmark.report import compare

            try:
                changes = compare(report, self._baseline)
            except DataError as error:
                wrong = error  # once what was measured is told
            report["changes"] = [dataclasses.asdict(change) for change in changes]
        if as_json:
            console.print_json(report)
        else:
            show_report(report)
        if self._plot is not None:
            console.say(f"wrote {_draw(report, self._plot)}")
        if wrong is not None:
            raise wrong
        if self._limit is None:
            return
        bad = [change for change in changes if change.ratio > 1 + self._limit]
        for change in bad:
            console.error(
                f"{change.name}: {change.figure} was {change.before:.4g}, is {change.after:.4g} "
                f"({100 * (change.ratio - 1):+.0f} %)"
            )
        if bad:
            raise typer.Exit(3)
        worst = changes[0]
        console.say(
            f"no regression beyond {100 * self._limit:g} %: of {len(changes)} figures the worst is "
            f"{worst.figure} of {worst.name}, {100 * (worst.ratio - 1):+.1f} %"
        )


@contextlib.contextmanager
def session(
    command: str,
    config: Campaign | Mapping[str, Any],
    *,
    plot: Path | None,
    baseline: Path | None,
    limit: str | None,
    no_record: bool,
) -> Iterator[Session]:
    """Checks what can be checked beforehand, and records the run."""
    from physformer_core.benchmark.report import read_report, why_not_compared
    from physformer_core.errors import ConfigError, DataError
    from physformer_core.output_names import check_picture
    from physformer_core.project import recorded_run

    if (baseline is None) != (limit is None):
        raise ConfigError(
            "--baseline and --max-regression go together", hint="--baseline baseline.json --max-regression 10%"
        )
    if plot is not None:
        check_picture("a plot", "--plot", plot)
    earlier = None if baseline is None else read_report(baseline)
    most = None if limit is None else parse_share(limit)
    checkpoint, sizes = (None, ()) if isinstance(config, Mapping) else (config.checkpoint, config.sizes)
    if earlier is not None and (reason := why_not_compared(earlier, command.removeprefix("bench "), sizes)):
        raise DataError(
            f"nothing can be compared with {baseline}: {reason}", hint="give the options that it was made with"
        )
    with recorded_run(command, record=not no_record, notify=console.say) as run:
        run.config = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
        run.seeds = [0]
        if checkpoint is not None:
            from physformer_core.checkpoints import find_checkpoint

            run.checkpoint_sha256 = find_checkpoint(checkpoint).sha256
        yield Session(run, plot, earlier, most)


def parse_share(text: str) -> float:
    """A share from ``10%`` or ``0.1``.

    Raises:
        ConfigError: It is neither, or below 0; or from 1 on without a sign of what it is a share of.
    """
    from physformer_core.errors import ConfigError

    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ConfigError(f"--max-regression '{text}' is not a share", hint="for example 10% or 0.1")
    if share >= 1 and not text.strip().endswith("%"):
        raise ConfigError(f"--max-regression {text} is {100 * share:g} %", hint=f"{text}%, or {100 * share:g}% if so")
    return share


def show_report(report: Mapping[str, Any]) -> None:
    """Prints tables and a line for everything that is a ratio or an exponent."""
    if report["what"] == "all":
        for part in report["parts"].values():
            typer.echo(f"== {part['what']}")
            show_report(part)
        return
    machine = report["machine"]
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, flops in machine["matrix_flops"].items())
    typer.echo(
        f"{machine['processor']}, {machine['threads']} threads: matrix peak {peaks}, "
        f"memory {machine['bandwidth'] / 1e9:.0f} GB/s"
    )
    if report["what"] == "train":
        _show_training(report)
        return
    unit = "pixels" if report["what"] == "generate" else "tokens"
    rows = [_row(case) for case in report["cases"]]
    names = (unit, "contender", "batch", "dtype", "time", "spread", "memory", "GFLOP", "matrix peak", "bandwidth", "")
    console.print_table(names, rows)
    for fit in report["fits"]:
        grown = ", ".join(
            f"{cost} as {unit}^{fit[cost]['exponent']:.2f} ({_interval(fit[cost]['half_width'])})"
            for cost in ("time", "memory")
        )
        typer.echo(f"{fit['contender']}, batch {fit['batch']}, {fit['dtype']}: {grown}")
    several = {key: len({ratio[key] for ratio in report["ratios"]}) > 1 for key in ("batch", "dtype")}
    for ratio in report["ratios"]:
        of = (f", batch {ratio['batch']}" if several["batch"] else "") + (
            f", {ratio['dtype']}" if several["dtype"] else ""
        )
        memory = "" if ratio["memory"] is None else f", {ratio['memory']:.2g}x the memory"
        note = " (time extrapolated)" if ratio["extrapolated"] else ""
        typer.echo(f"{ratio['tokens']:,} {unit}{of}: {ratio['peer']} takes {ratio['time']:.3g}x our time{memory}{note}")
    for name, reason in report["not_run"].items():
        typer.echo(f"{name}: not run: {reason}")


def show_batch(campaign: Campaign, found: BatchLimit, *, as_json: bool) -> None:
    """Prints the largest batch that fits."""
    height, width = campaign.sizes[0]
    if as_json:
        weights = {"checkpoint": str(campaign.checkpoint)} if campaign.checkpoint else {"preset": campaign.preset}
        console.print_json({"height": height, "width": width} | weights | dataclasses.asdict(found))
        return
    typer.echo(
        f"{width}x{height} tokens: a batch of {found.batch} fits, needing "
        f"{console.human_size(found.peak_bytes)} of {console.human_size(found.limit_bytes)}"
    )


def _row(case: Mapping[str, Any]) -> list[str]:
    def shown(value: Any, text: Any) -> str:
        return "-" if value is None else text(value)

    return [
        f"{case['tokens']:,} ({case['width']}x{case['height']})",
        case["contender"],
        str(case["batch"]),
        case["dtype"],
        shown(case["seconds"], lambda s: f"{s:.4f} s" if s < 0.1 else f"{s:.3f} s"),
        shown(case["spread"], lambda s: f"{s:.3f} s"),
        shown(case["peak_bytes"], console.human_size),
        shown(case["flops"], lambda f: f"{f / 1e9:.1f}"),
        shown(case["matrix_share"], lambda s: f"{100 * s:.0f} %"),
        shown(case["bandwidth_share"], lambda s: f"{100 * s:.0f} %"),
        "; ".join(text for text in (case["status"] if case["status"] != "measured" else "", case["note"]) if text),
    ]


def _interval(half_width: float | None) -> str:
    return "two sizes, no interval" if half_width is None else f"95 %: +-{half_width:.2f}"


def _show_training(report: Mapping[str, Any]) -> None:
    names = {"base": "whole pictures", "crop": "crops"}
    rows = [
        [
            name,
            f"{one['parameters'] / 1e6:.2f} M",
            f"{one['seconds']:.3f} s",
            ", ".join(f"{names[kind]} {seconds:.3f} s" for kind, seconds in one["seconds_by_kind"].items()),
            f"{one['images_per_second']:.1f}",
            *(() if one["peak_bytes"] is None else (console.human_size(one["peak_bytes"]),)),
        ]
        for name, one in (("physformer", report["ours"]), ("plain, dense", report["peer"]))
    ]
    columns = ("trainer", "parameters", "step", "of which", "images/s", "memory")
    console.print_table(columns[: len(rows[0])], rows)
    ours = report["ours"]
    tokens = [
        f"{names[kind]} {seen['picture']:.0f} + {seen['prompt']:.0f} (with padding {seen['padded']:.0f})"
        for kind, seen in report["tokens"].items()
    ]
    ratios = ", ".join(f"{names[kind]} {ratio:.2f}x" for kind, ratio in report["ratio_by_kind"].items())
    typer.echo(
        f"{report['ratio']:.2f}x the images/s ({ratios}); "
        f"waiting for data {100 * ours['wait_share']:.2f} % of the step; "
        f"{100 * ours['matrix_share']:.0f} % of the matrix peak ({report['dtype']}); batch {report['batch']}, "
        f"{report['steps']} steps of each by turns, the peer with {report['peer_layers']} blocks; tokens of a picture "
        f"and its prompt: {', '.join(tokens)}"
    )


def _draw(report: Mapping[str, Any], wished: Path) -> Path:
    from physformer_core.benchmark.plot import draw_report
    from physformer_core.files import atomic_write, next_free_name

    picture = draw_report(report["parts"]["model"] if report["what"] == "all" else report)
    name = next_free_name(wished)
    with atomic_write(name) as temporary:
        picture.save(temporary, "PNG")
    return name
