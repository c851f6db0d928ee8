"""`physformer init` and `physformer runs`: the project file, what was run, and running it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.project import Project

runs_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_STYLES = {"ok": "green", "failed": "red", "interrupted": "yellow"}

RunArgument = Annotated[
    str, typer.Argument(metavar="ID", help='A run\'s id, its beginning, its last six characters, or "last".')
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(init)
    app.add_typer(runs_app, name="runs", help="List recorded runs, show one, plot one, or run it again.")


def init(
    folder: Annotated[Path, typer.Argument(help="Where to create physformer.toml.")] = Path("."),
) -> None:
    """Create a commented physformer.toml: defaults for options, and the place where runs are recorded.

    Commands use the nearest one from the current folder upwards,
    or the one that the environment variable PHYSFORMER_PROJECT names.

    [bold]Examples[/bold]

      physformer init

      physformer init my-pictures
    """
    from physformer_core.project import PROJECT_FILE, create_project

    console.say(f"created {create_project(folder / PROJECT_FILE)}")


@runs_app.command("list")
def list_runs(
    command: Annotated[str | None, typer.Option(help='Only runs of this command, for example "generate".')] = None,
    status: Annotated[str | None, typer.Option(help="Only runs that ended so: ok, failed or interrupted.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    as_json: console.JsonOption = False,
) -> None:
    """List recorded runs, the newest last.

    [bold]Examples[/bold]

      physformer runs list

      physformer runs list --command generate --status ok -n 5

      physformer runs list --json | jq '.[].outputs[].path'
    """
    from physformer_core.errors import ConfigError
    from physformer_core.project import RUN_STATES

    if status is not None and status not in RUN_STATES:
        raise ConfigError(f"unknown status {status!r}", hint="one of " + ", ".join(RUN_STATES))
    project = _project()
    runs = [
        run
        for run in project.runs
        if (command is None or run.command == command or run.command.startswith(f"{command} "))
        and (status is None or run.status == status)
    ][-limit:]
    if as_json:
        console.print_json([run.as_dict() for run in runs])
        return
    if not runs:
        console.say(f"no such runs in {project.path}")
        return

    rows = [
        (run.id, run.status, console.human_time(run.duration), str(len(run.outputs)), _one_line(run.command_line))
        for run in runs
    ]
    console.print_table(("ID", "STATUS", "TOOK", "OUTPUTS", "COMMAND"), rows, styles=_STYLES)


@runs_app.command("show")
def show(run_id: RunArgument, as_json: console.JsonOption = False) -> None:
    """Show everything that is recorded about one run.

    [bold]Examples[/bold]

      physformer runs show last

      physformer runs show k3f9q2 --json
    """
    record = _project().find_run(run_id)
    if as_json:
        console.print_json(record.as_dict())
    else:
        typer.echo(f"# {record.command_line}\n{record.to_toml()}", nl=False)


@runs_app.command("replay")
def replay(
    run_id: RunArgument,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the new outputs in this folder, new or empty.")
    ] = None,
    as_json: console.JsonOption = False,
) -> None:
    """Run a recorded command again, elsewhere, and say whether its outputs have the same bytes.

    The command gets the arguments, settings and seeds that it had.
    Its outputs go to a temporary folder.
    The exit code is 0 if all bytes agree, and 3 if they do not.

    [bold]Examples[/bold]

      physformer runs replay last

      physformer runs replay 20260131-142503-k3f9q2 --keep again
    """
    from physformer_cli.replay import replay_run
    from physformer_core.project import package_versions

    project = _project()
    record = project.find_run(run_id)
    versions = package_versions()
    for name, version in record.versions.items():
        if versions.get(name) != version:
            console.warn(f"the run had {name} {version}, this is {versions.get(name, 'without it')}")
    console.say(f"replaying: {record.command_line}")
    with _output_folder(keep) as folder:
        compared = replay_run(project, record, folder)
    agree = all(one.agrees for one in compared)
    if as_json:
        outputs = [
            {"path": one.path, "recorded": one.recorded, "replayed": one.replayed, "agrees": one.agrees}
            for one in compared
        ]
        console.print_json({"id": record.id, "agrees": agree, "outputs": outputs})
    else:
        for one in compared:
            if not one.agrees:
                before, after = ((text or "nothing")[:12] for text in (one.recorded, one.replayed))
                typer.echo(f"differs  {one.path}  (recorded {before}, replayed {after})")
        good = sum(one.agrees for one in compared)
        typer.echo(f"{'agrees' if agree else 'does not agree'}: {good} of {len(compared)} outputs have the same bytes")
    if not agree:
        raise typer.Exit(3)


@runs_app.command("plot")
def plot(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a training run, with its log.jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path("loss.png"),
    as_json: console.JsonOption = False,
) -> None:
    """Draw a training run's losses, also while it is running.

    Below them stand speed, gradient, learning rate, and the sizes of velocities and fields, where the log has them.

    [bold]Examples[/bold]

      physformer runs plot runs/nano

      physformer runs plot runs/nano --output nano-loss.png
    """
    from physformer_core.files import atomic_write, next_free_name
    from physformer_core.output_names import check_picture
    from physformer_core.training.curves import draw_curves, read_curves, read_records
    from physformer_core.training.panels import add_panels

    check_picture("a plot", "--output", output)
    curves = read_curves(run_dir / "log.jsonl")
    picture = draw_curves(curves, title=str(run_dir) if run_dir.name else run_dir.absolute().name)
    picture = add_panels(picture, read_records(run_dir / "log.jsonl"))
    name = next_free_name(output)
    with atomic_write(name) as temporary:
        picture.save(temporary, "PNG")
    last = {("validation_" if curve.validation else "") + curve.kind: float(curve.losses[-1]) for curve in curves}
    if as_json:
        console.print_json({"output": str(name), "step": int(max(curve.steps[-1] for curve in curves)), "losses": last})
    else:
        console.say(f"wrote {name}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _project() -> Project:
    """The nearest project file, read.

    Raises:
        ConfigError: There is none, or it is malformed.
    """
    from physformer_core.errors import ConfigError
    from physformer_core.project import Project, find_project

    path = find_project()
    if path is None or not path.exists():
        raise ConfigError(
            f"there is no {path or 'physformer.toml here or in a folder above'}",
            hint="physformer init creates one; the first recorded run does too",
        )
    return Project.load(path)


@contextlib.contextmanager
def _output_folder(keep: Path | None) -> Iterator[Path]:
    import tempfile

    from physformer_core.errors import OutputError
    from physformer_core.files import output_error

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="physformer-replay-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        occupied = any(keep.iterdir())
    except OSError as error:
        raise output_error(keep, error) from error
    if occupied:
        raise OutputError(f"{keep} is not empty", hint="name a new folder")
    yield keep.absolute()
