"""`physformer data`: fetch raw sets, preprocess them into training examples, and look at either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.data.preprocess import PreprocessConfig
    from physformer_core.data.workers import Progress

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_STAGES = {
    "scan": ("reading captions", "files"),
    "captions": ("encoding captions", "captions"),
    "pictures": ("cutting pictures", "examples"),
}

WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes. They do not change the result.", show_default="one per processor"),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.add_typer(data_app, name="data", help="Fetch pictures with captions, preprocess them, look at them.")


@data_app.command("fetch")
def fetch(
    source: Annotated[str, typer.Argument(help='Where from: "scenes", composed of Twemoji\'s vector art.')],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many examples.")] = 36_000,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", min=0, help="The same seed gives the same set.", show_default="0")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the set.", show_default="data/SOURCE")
    ] = None,
    workers: WorkersOption = None,
    aspect: Annotated[
        str | None, typer.Option(help="Width:height of every scene, for example 16:9; from 9:21 to 21:9 if not given.")
    ] = None,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Fetch or compose a raw set of captioned pictures.

    An interrupted command goes on where it stopped when it is given again.

    [bold]Examples[/bold]

      physformer data fetch scenes --count 36000 --output data/scenes

      physformer data fetch scenes -n 500 --seed 3 --aspect 16:9 -o data/wide --workers 4
    """
    from physformer_core.data import sources
    from physformer_core.project import recorded_run
    from physformer_core.resolution import parse_aspect

    unit = sources.find_source(source).unit
    with recorded_run("data fetch", record=not no_record, notify=console.say) as run:
        seed = seed if seed is not None else int(run.settings.get("seed", 0))
        workers = _workers(workers, run.settings)
        folder = output if output is not None else Path("data") / source
        options = {"aspect": parse_aspect(aspect) if aspect is not None else None}
        run.seeds = [seed]
        run.config = {"source": source, "count": count, "seed": seed, "output": folder, "workers": workers, **options}
        run.replay_with("--output", "-o", output=folder, folder=True)

        with console.progress() as add:
            show = _progress_of(add, {"": (f"fetching {source}", unit)})
            fetched = sources.fetch(
                source,
                folder,
                count=count,
                seed=seed,
                workers=workers,
                options=options,
                progress=lambda done, total: show("", done, total),
            )
        manifest_sha256 = _add_set(run, folder, [entry["name"] for entry in fetched.manifest["files"]])
    _report_set(
        folder,
        fresh=fetched.fresh,
        said=f"{fetched.manifest['count']} {unit}",
        result={"count": fetched.manifest["count"], "sha256": fetched.manifest["sha256"]},
        manifest_sha256=manifest_sha256,
        as_json=as_json,
    )


@data_app.command("preprocess")
def preprocess(
    raw: Annotated[Path, typer.Argument(metavar="RAW", help="Folder of a raw set, made by data fetch.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the preprocessed set.", show_default=False)],
    crops_per_example: Annotated[float, typer.Option(help="Crops of finer levels per example; 1.5: one or two.")] = 1.0,
    levels: Annotated[
        str, typer.Option(help="Levels that crops are taken from; level L has 2^L times level 0's resolution.")
    ] = "1,2,3,4,5",
    level_weights: Annotated[
        str | None,
        typer.Option(help="How often each level, for example 3,2,1.", show_default="coarser more often"),
    ] = None,
    crop_size: Annotated[int, typer.Option(help="Side of a stored crop in pixels, a multiple of 8.")] = 96,
    base_views: Annotated[int, typer.Option(help="Whole pictures per example; from 2 on slightly zoomed ones.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Captions with more tokens are left out.")] = 32,
    encoder: Annotated[str, typer.Option(help="Text encoder: minilm, a hub name, a folder; a+b for two.")] = "minilm",
    validation_fraction: Annotated[float, typer.Option(help="Share of examples that is held out.")] = 0.01,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of places and levels of crops.")] = 0,
    workers: WorkersOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a set that was made from something else.")
    ] = False,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Cut a raw set into training examples and encode its captions.

    Does only what is missing, and nothing if all is there.

    [bold]Examples[/bold]

      physformer data preprocess data/scenes --output data/nano

      physformer data preprocess data/scenes -o data/sharp --crops-per-example 2 --levels 3,4,5 --workers 4
    """
    from physformer_core.data.preprocess import PreprocessConfig
    from physformer_core.data.preprocess import preprocess as run_preprocessing
    from physformer_core.project import recorded_run

    chosen = tuple(_numbers("--levels", levels, int))
    with recorded_run("data preprocess", record=not no_record, notify=console.say) as run:
        workers = _workers(workers, run.settings)
        config = PreprocessConfig(
            crops_per_example=crops_per_example,
            levels=chosen,
            level_weights=_level_weights(PreprocessConfig, chosen, level_weights),
            crop_size=crop_size,
            base_views=base_views,
            max_tokens=max_tokens,
            encoder=encoder,
            validation_fraction=validation_fraction,
            seed=seed,
        )
        run.seeds = [seed]
        run.config = {**vars(config), "raw": raw, "output": output, "workers": workers, "overwrite": overwrite}
        run.data_sha256 = _manifest_sha256(raw)
        run.replay_with("--output", "-o", output=output, folder=True)
        with console.progress() as add:
            manifest = run_preprocessing(
                raw,
                output,
                config=config,
                progress=_progress_of(add, _STAGES),
                workers=workers,
                overwrite=overwrite,
            )
        names = [entry["name"] for entry in [*manifest["shards"], manifest["captions"]]]
        manifest_sha256 = _add_set(run, output, names)

    counts = {
        f"{split}_{kind}": sum(e["count"] for e in manifest["shards"] if (e["split"], e["kind"]) == (split, kind))
        for split in ("train", "validation")
        for kind in ("base", "crop")
    }
    refused = manifest["refused"]
    for what, reasons in refused.items():
        for reason, number in reasons.items():
            console.warn(f"{number} {what} left out: {reason}")
    _report_set(
        output,
        fresh=manifest["fresh"],
        said=f"{counts['train_base']} pictures and {counts['train_crop']} crops to train on, "
        f"{counts['validation_base']} and {counts['validation_crop']} held out, "
        f"{manifest['captions']['count']} captions",
        result={**counts, "captions": manifest["captions"]["count"], "key": manifest["key"], "refused": refused},
        manifest_sha256=manifest_sha256,
        as_json=as_json,
    )


@data_app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of a raw or a preprocessed set.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path("sheet.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures, spread over the set.")] = 64,
    kind: Annotated[
        str | None,
        typer.Option(help='Of a preprocessed set: "base" (whole pictures) or "crop".', show_default="half of each"),
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 8,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Longer side of a picture in pixels.")] = 160,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Draw a contact sheet of a set, with captions: look at your data.

    [bold]Examples[/bold]

      physformer data show data/scenes --output scenes.png

      physformer data show data/nano --kind crop --count 24 --columns 6 -o crops.png
    """
    from physformer_core.data import contact_sheet
    from physformer_core.data.preprocess import RAW_FORMAT
    from physformer_core.errors import ConfigError, OutputError
    from physformer_core.files import next_free_name
    from physformer_core.project import recorded_run

    if kind not in (None, "base", "crop"):
        raise ConfigError(f"unknown kind {kind!r}", hint="base or crop")
    if output.suffix.lower() != ".png":
        raise OutputError(f"a sheet is a PNG file, not {output.name!r}", hint=f"--output {output.with_suffix('.png')}")
    with recorded_run("data show", record=not no_record, notify=console.say) as run:
        if kind is not None and contact_sheet.set_format(folder) == RAW_FORMAT:
            raise ConfigError("--kind is for preprocessed sets", hint="a raw set has whole pictures only")
        run.config = {"set": folder, "output": output, "count": count, "kind": kind, "columns": columns, "size": size}
        run.data_sha256 = _manifest_sha256(folder)
        run.replay_with("--output", "-o", output=output, folder=False)
        contact_sheet.sheet_size(count, columns=columns, size=size)
        shown = contact_sheet.exhibits(folder, count, kind=kind, size=size)
        sheet = contact_sheet.draw_sheet(shown, columns=columns, size=size)
        name = next_free_name(output)
        contact_sheet.write_sheet(sheet, name)
        run.add_output(name)
    if as_json:
        console.print_json({"output": str(name), "count": len(shown), "width": sheet.width, "height": sheet.height})
    else:
        console.say(f"wrote {name}: {len(shown)} pictures")


def _workers(given: int | None, settings: dict[str, Any]) -> int:
    if given is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = int(settings.get("workers", available))
    return given


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    from physformer_core.errors import ConfigError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} takes numbers with commas between them, not {text!r}") from None


def _level_weights(config: type[PreprocessConfig], levels: tuple[int, ...], text: str | None) -> tuple[float, ...]:
    """The weights given, or the default ones of the levels chosen."""
    if text is not None:
        return tuple(_numbers("--level-weights", text, float))
    usual = dict(zip(config.levels, config.level_weights, strict=True))
    return tuple(usual.get(level, min(usual.values())) for level in levels)


def _progress_of(add: Callable[..., console.ProgressTask], stages: dict[str, tuple[str, str]]) -> Progress:
    """Progress by stage: a bar appears when its stage begins, and does not count what an earlier run did as speed."""
    tasks: dict[str, console.ProgressTask] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            description, unit = stages[stage]
            tasks[stage] = add(description, total, unit=unit, done=done if done < total else 0)
        tasks[stage].update(done, total)

    return show


def _manifest_sha256(folder: Path) -> str | None:
    from physformer_core.files import sha256_file

    path = folder / "manifest.json"
    return sha256_file(path) if path.is_file() else None


def _add_set(run: Any, folder: Path, names: list[str]) -> str:
    """Notes a set's files as the run's outputs, and returns the hash of its manifest."""
    for name in names:
        run.add_output(folder / name)
    run.add_output(folder / "manifest.json")
    return str(run.outputs[(folder / "manifest.json").absolute()])


def _report_set(
    folder: Path, *, fresh: bool, said: str, result: dict[str, Any], manifest_sha256: str, as_json: bool
) -> None:
    if as_json:
        console.print_json({"output": str(folder), "fresh": fresh, "manifest_sha256": manifest_sha256, **result})
    elif fresh:
        console.say(f"wrote {folder}: {said}")
    else:
        console.say(f"nothing to do: {folder} is complete ({said})")
