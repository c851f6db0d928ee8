"""`physformer eval scaling`: how the loss falls with parameters, data and compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from physformer_cli import console
from physformer_cli.evaluate_common import check_files
from physformer_core.errors import ConfigError

if TYPE_CHECKING:
    from physformer_core.evaluation.scaling import Interval, ScalingPoint, ScalingReport
    from physformer_core.project import RunRecorder

EPILOG = """Examples:

    physformer eval scaling --train data/nano --sizes 32x2,64x2,96x3 --examples 2000,4000,8000 --output runs/scaling

    physformer eval scaling runs/scaling/* --plot scaling.png --budget 1e17

    physformer eval scaling table.csv --json
"""

SIZES, EXAMPLES, BATCH, PRESET = "32x2,64x2,96x3", "2048,4096,8192", 32, "nano"


def register(parent: typer.Typer) -> None:
    """Adds the command to `physformer eval`."""
    parent.command("scaling", epilog=EPILOG, no_args_is_help=True)(scaling)


def scaling(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of finished runs, or one CSV file (parameters, examples, loss[, flops, name])."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(metavar="SET", help="Train the family on this preprocessed set first.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help=f"With --train: widths x layers, separated by commas; {SIZES}.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help=f"With --train: amounts of data; each size gets all; {EXAMPLES}.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help=f"With --train; {BATCH}.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"With --train: flow and optimiser; {PRESET}.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="With --train: where the runs go.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --train: auto (if not given), cpu, cuda, cuda:1 or mps.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Of whole pictures (base) or of crops (crop).")] = "base",
    budget: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FLOPS",
            help="Predict the best size for so many operations; repeat it. 10x the largest run's, if there is a best.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=20, help="Bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the training and of the bootstrap.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw loss over compute.")] = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Fit L = E + A / parameters^a + B / examples^b to a family of runs, and say the best size for a budget.

    Intervals (95 %) are bootstrapped over the runs. They are wide for small families, and say nothing of what happens
    far beyond the largest run.
    """
    if (train is None) == (not runs):
        raise ConfigError(
            "name either finished runs or a set to train on", hint="physformer eval scaling runs/*, or --train SET"
        )
    if train is not None and output is None:
        raise ConfigError("no folder for the runs was named", hint="--output FOLDER")
    for option, value in (
        ("--sizes", sizes), ("--examples", examples), ("--batch-size", batch_size), ("--preset", preset),
        ("--output", output), ("--device", device),
    ):  # fmt: skip
        if train is None and value is not None:
            raise ConfigError(f"{option} has no effect without --train", hint="leave it out")
    for flops in budget or ():
        if not 0 < flops < float("inf"):
            raise ConfigError(f"--budget {flops:g} is no number of operations", hint="for example --budget 1e17")
    if loss not in ("base", "crop"):
        raise ConfigError(f"unknown loss '{loss}'", hint="base or crop")
    if loss != "base" and train is not None:
        raise ConfigError(
            "--loss has no effect with --train, which trains on whole pictures alone", hint="leave it out"
        )
    from physformer_core.project import recorded_run

    with recorded_run("eval scaling", record=not no_record, notify=console.say) as run:
        check_files(None, plot, "--plot")
        run.seeds = [seed]
        folders = list(runs or ())
        if train is not None and output is not None:
            members = (sizes or SIZES, examples or EXAMPLES, batch_size or BATCH, preset or PRESET)
            folders = _train(train, output, *members, seed=seed, device=device or "auto")
        points = _points(folders, loss)
        from physformer_core.evaluation.scaling import analyse

        with console.progress() as add:
            task = add("bootstrap", samples, unit="fits")
            report = analyse(points, budgets=budget, samples=samples, seed=seed, on_sample=task.update)
        run.config = json.loads(json.dumps(report.as_dict()))
        if plot is not None:
            _plot(report, plot, run)
        if json_output:
            console.print_json(report.as_dict())
        else:
            _show(report)


def _train(
    data: Path, output: Path, sizes: str, examples: str, batch_size: int, preset: str, *, seed: int, device: str
) -> list[Path]:
    from physformer_core.evaluation.scaling import check_family
    from physformer_core.evaluation.scaling_runs import family, member_config, parse_sizes, train_family

    try:
        counts = [int(part) for part in examples.split(",")]
    except ValueError:
        raise ConfigError(
            f"--examples '{examples}' is not a list of whole numbers", hint="for example 2048,4096"
        ) from None
    parsed = parse_sizes(sizes)
    members = family(parsed, counts)
    check_family(len(members), len(set(parsed)), len(set(counts)))
    configs = [member_config(member, preset=preset, batch_size=batch_size, seed=seed) for member in members]
    with console.progress() as add:
        task = add("training", sum(one.training.steps for one in configs) * batch_size, unit="examples")
        return train_family(
            members, data, output, preset=preset, batch_size=batch_size, seed=seed, device=device,
            on_example=task.update,
        )  # fmt: skip


def _points(folders: list[Path], loss: str) -> list[ScalingPoint]:
    from physformer_core.evaluation.scaling_runs import read_run, read_table

    if len(folders) == 1 and folders[0].is_file():
        if loss != "base":
            raise ConfigError("--loss has no effect with a CSV file", hint="leave it out")
        return read_table(folders[0])
    return [read_run(folder, loss) for folder in folders]


def _plot(report: ScalingReport, plot: Path, run: RunRecorder) -> None:
    from physformer_core.evaluation.scaling_plot import draw_scaling
    from physformer_core.files import atomic_write, next_free_name

    name = next_free_name(plot)
    with atomic_write(name) as temporary:
        draw_scaling(report).save(temporary, format="PNG")
    console.say(f"wrote {name}")
    run.add_output(name)
    run.replay_with("--plot", output=name, folder=False)


def _show(report: ScalingReport) -> None:
    law = report.law
    rows = [
        (one.name, f"{one.parameters:,.0f}", f"{one.examples:,.0f}", f"{one.flops:.3g}", f"{one.loss:.4f}",
         f"{law.loss(one.parameters, one.examples):.4f}")
        for one in report.points
    ]  # fmt: skip
    console.print_table(("RUN", "PARAMETERS", "EXAMPLES", "OPERATIONS", "LOSS", "FIT"), rows)
    typer.echo()
    console.print_table(
        ("NUMBER", "VALUE", "95 %"),
        [(name.replace("_", " "), *_cells(one)) for name, one in report.intervals.items()],
    )
    typer.echo(f"rms residual of log loss: {report.residual:.4f}")
    if report.frontier is not None:
        line, spread = report.frontier, report.frontier.exponent_interval
        told = f" (95 %: {spread[0]:.3f} to {spread[1]:.3f})" if spread else ""
        typer.echo(f"the best {len(line.names)} runs: loss falls as operations^-{line.exponent:.3f}{told}")
    if not report.predictions:
        console.say("these runs show no gain from larger models, or none from more data: there is no best size")
        return
    typer.echo()
    console.print_table(
        ("OPERATIONS", "BEST PARAMETERS", "95 %", "EXAMPLES", "95 %", "LOSS", "95 %"),
        [
            (f"{one.flops:.3g}", *_cells(one.parameters), *_cells(one.examples), *_cells(one.loss))
            for one in report.predictions
        ],
    )
    if any(one.extrapolated for one in report.predictions):
        console.say("a budget above that of every run is extrapolated")


def _cells(one: Interval) -> tuple[str, str]:
    return _number(one.value), f"{_number(one.low)} to {_number(one.high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e10 else f"{value:.3g}"
