"""`physformer data`: fetch raw sets, preprocess them into training examples, and look at either."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console, data_look, data_redraw
from physformer_cli.data_common import (
    BucketsOption,
    PresetOption,
    WorkersOption,
    manifest_hash,
    numbers,
    progress_of,
    sizes_of_whole_pictures,
    worker_count,
)

if TYPE_CHECKING:
    from physformer_core.data.preprocess import PreprocessConfig

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_STAGES = {
    "scan": ("reading captions", "files"),
    "captions": ("encoding captions", "captions"),
    "pictures": ("cutting pictures", "examples"),
}


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.add_typer(data_app, name="data", help="Fetch pictures with captions, preprocess them, look at them.")


@data_app.command("fetch")
def fetch(
    source: Annotated[
        str, typer.Argument(help="Where from: scenes, folder, huggingface, webdataset or parquet.", show_default=False)
    ],
    location: Annotated[
        str | None,
        typer.Argument(help="A folder; a data set's name; tars or tables, also as a pattern.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the set.", show_default="data/SOURCE")
    ] = None,
    workers: WorkersOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Look at so many examples at most.", show_default="all")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the pictures, for the manifest.", show_default="of the card")
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="Of a folder: text (files), metadata (file) or classes.", show_default="what there is"),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column, or ending in a tar, of the picture.", show_default="image, jpg, ...")
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(help="Column or ending of captions; json.prompt goes inside.", show_default="caption, text, ..."),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column or ending of the class's number.", show_default="label, cls")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a Hub data set.", show_default="train")] = None,
    config_name: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    data_files: Annotated[str | None, typer.Option(help="Pattern of files of a Hub data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub data set.")] = None,
    streaming: Annotated[
        bool | None,
        typer.Option("--streaming/--no-streaming", help="Read as it arrives, or download first.", show_default="yes"),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="How many scenes to compose.", show_default="36000")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", min=0, help="Of scenes: the same seed, the same set.", show_default="0"),
    ] = None,
    aspect: Annotated[
        str | None, typer.Option(help="Width:height of every scene, for example 16:9; from 9:21 to 21:9 if not given.")
    ] = None,
    held_out_pairs: Annotated[
        float | None,
        typer.Option(
            help="Of scenes: share of pairs of things that no scene shows together, for eval prompts --pairs."
        ),
    ] = None,
    pair_share: Annotated[
        float | None, typer.Option(help="Of scenes: share of them that shows two things.", show_default="0.45")
    ] = None,
    variation: Annotated[
        float | None,
        typer.Option(
            help="Of scenes: how much framing and plain colours vary, 0 to 0.5: 0.1 shows things up to a tenth closer.",
            show_default="0",
        ),
    ] = None,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Fetch or compose a raw set of captioned pictures, and verify every one.

    An interrupted command goes on where it stopped when it is given again. Pictures that are refused are listed, with
    the reason, in quarantine.jsonl.

    [bold]Examples[/bold]

      physformer data fetch scenes --count 36000 --output data/scenes

      physformer data fetch folder photos/ --output data/photos

      physformer data fetch huggingface jackyhate/text-to-image-2M --data-files "data_512_2M/*.tar" --limit 10000

      physformer data fetch webdataset "shards/{000..045}.tar" --caption-column json.prompt -o data/shards

      physformer data fetch parquet "tables/*.parquet" --image-column img --workers 8 -o data/tables
    """
    from physformer_core.data import sources
    from physformer_core.project import recorded_run
    from physformer_core.resolution import parse_aspect

    found = sources.find_source(source)
    with recorded_run("data fetch", record=not no_record, notify=console.say) as run:
        if seed is None and "seed" in found.options:
            seed = int(run.settings.get("seed", 0))
        workers = worker_count(workers, run.settings)
        folder = output if output is not None else Path("data") / source
        options = {
            "limit": limit,
            "license": license,
            "captions": captions,
            "image_column": image_column,
            "caption_column": caption_column,
            "label_column": label_column,
            "split": split,
            "config_name": config_name,
            "data_files": data_files,
            "revision": revision,
            "streaming": streaming,
            "count": count,
            "seed": seed,
            "aspect": parse_aspect(aspect) if aspect is not None else None,
            "held_out_pairs": held_out_pairs,
            "pair_share": pair_share,
            "variation": variation,
        }
        run.seeds = [seed] if seed is not None else []
        given = {**found.defaults, **{key: value for key, value in options.items() if value is not None}}
        run.config = {"source": source, "location": location, "output": folder, "workers": workers, **given}
        run.replay_with("--output", "-o", output=folder, folder=True)

        with console.progress() as add:
            show = progress_of(add, {"": (f"fetching {source}", found.unit)})
            fetched = sources.fetch(
                source,
                folder,
                location=location,
                workers=workers,
                options=options,
                progress=lambda done, total: show("", done, total),
            )
        manifest = fetched.manifest
        names = [entry["name"] for entry in manifest["files"]]
        if manifest.get("quarantine"):
            names.append(manifest["quarantine"]["name"])
        manifest_sha256 = _add_set(run, folder, names)
    refused = manifest.get("refused", {})
    for reason, number in refused.items():
        console.warn(f"{number} {found.unit} refused: {reason}")
    if refused:
        console.say(f"the refused ones are listed in {folder / manifest['quarantine']['name']}")
    _report_set(
        folder,
        fresh=fetched.fresh,
        said=f"{manifest['count']} {found.unit}",
        result={"count": manifest["count"], "refused": refused, "sha256": manifest["sha256"]},
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
    crop_size: Annotated[int, typer.Option(help="Side of a stored crop in elements of the field.")] = 96,
    preset: PresetOption = None,
    buckets: BucketsOption = None,
    base_views: Annotated[int, typer.Option(help="Whole pictures per example; from 2 on slightly zoomed ones.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Captions with more tokens are left out.")] = 32,
    encoder: Annotated[str, typer.Option(help="Text encoder: minilm, a hub name, a folder; a+b for two.")] = "minilm",
    codec: Annotated[
        str, typer.Option(help="pixels, or an autoencoder (folder or hub name) whose latents to store.")
    ] = "pixels",
    device: Annotated[
        str | None,
        typer.Option(help="Where captions, and pictures for an autoencoder, are encoded.", show_default="cpu"),
    ] = None,
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

    Does only what is missing, and nothing if all is there. With an autoencoder, elements of the field are its latents:
    a level-0 picture of 32x32 elements is one of 256x256 pixels if the autoencoder shrinks by 8.

    [bold]Examples[/bold]

      physformer data preprocess data/scenes --output data/nano

      physformer data preprocess data/scenes -o data/sharp --crops-per-example 2 --levels 3,4,5 --workers 4

      physformer data preprocess data/photos -o data/latents --codec madebyollin/taesd --levels 1 --device cuda
    """
    from physformer_core.data.preprocess import PreprocessConfig
    from physformer_core.data.preprocess import preprocess as run_preprocessing
    from physformer_core.project import recorded_run

    chosen = tuple(numbers("--levels", levels, int))
    sizes = sizes_of_whole_pictures(preset, buckets)
    with recorded_run("data preprocess", record=not no_record, notify=console.say) as run:
        workers = worker_count(workers, run.settings)
        config = PreprocessConfig(
            crops_per_example=crops_per_example,
            levels=chosen,
            level_weights=_level_weights(PreprocessConfig, chosen, level_weights),
            crop_size=crop_size,
            base_views=base_views,
            max_tokens=max_tokens,
            encoder=encoder,
            codec=codec,
            validation_fraction=validation_fraction,
            seed=seed,
            buckets=sizes,
        )
        run.seeds = [seed]
        run.config = {**vars(config), "raw": raw, "output": output, "workers": workers, "overwrite": overwrite}
        run.config["device"] = device
        run.data_sha256 = manifest_hash(raw)
        run.replay_with("--output", "-o", output=output, folder=True)
        with console.progress() as add:
            manifest = run_preprocessing(
                raw,
                output,
                config=config,
                progress=progress_of(add, _STAGES),
                workers=workers,
                overwrite=overwrite,
                device=device,
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
        f"{manifest['captions']['count']} captions, {manifest['cut_area']:.1%} of the pictures' area cut off",
        result={
            **counts,
            "cut_area": manifest["cut_area"],
            "buckets": manifest["buckets"],
            "captions": manifest["captions"]["count"],
            "key": manifest["key"],
            "refused": refused,
        },
        manifest_sha256=manifest_sha256,
        as_json=as_json,
    )


data_app.command("redraw")(data_redraw.redraw)
data_app.command("show")(data_look.show)
data_app.command("inspect")(data_look.inspect)


@data_app.command("bench")
def bench(
    sides: Annotated[
        str, typer.Option(help="Sides in pixels of pictures that are made to be measured; empty for none.")
    ] = "72,512",
    scenes: Annotated[bool, typer.Option("--scenes", help="Also measure scenes.")] = False,
    folder: Annotated[
        list[Path] | None, typer.Option(help="Also measure the pictures of a folder.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=128, help="Pictures of each kind.")] = 500,
    memory: Annotated[
        str, typer.Option(help="Sizes of sets whose peak memory is measured, for example 10000,100000.")
    ] = "",
    need: Annotated[float, typer.Option(min=0.001, help="Examples a second that training takes.")] = 110.0,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure how fast pictures are fetched, preprocessed and served, against decoding and resizing them alone.

    Everything is written into a temporary folder. Rates are of one process; the shares are of processor time, which
    other work on the machine changes little. Scenes are compared with drawing them alone.

    [bold]Examples[/bold]

      physformer data bench

      physformer data bench --sides "" --scenes --folder photos/ --count 2000

      physformer data bench --sides "" --memory 10000,100000 --json
    """
    from physformer_core.data import throughput
    from physformer_core.project import recorded_run

    chosen, counts = numbers("--sides", sides, int), numbers("--memory", memory, int)
    if not (chosen or counts or scenes or folder):
        from physformer_core.errors import ConfigError

        raise ConfigError("nothing to measure", hint="name --sides, --scenes, --folder or --memory")
    with recorded_run("data bench", record=not no_record, notify=console.say) as run:
        folders = folder or []
        run.config = {"sides": chosen, "scenes": scenes, "folder": folders, "count": count, "memory": counts}
        run.config["need"] = need
        make: list[Callable[[], throughput.Subject]] = [
            *(functools.partial(throughput.photographs, side, count) for side in chosen),
            *([functools.partial(throughput.Scenes, count)] if scenes else []),
            *(functools.partial(throughput.pictures_of, path, count) for path in folders),
        ]
        rates = []
        with console.progress() as add:
            for one in make:
                subject = one()
                show = progress_of(add, {"": (subject.name, "pictures")})
                rates.append(throughput.measure_rates(subject, progress=functools.partial(show, "")))
            peaks = []
            if counts:
                show = progress_of(add, {"": ("measuring memory", "stages")})
                peaks = throughput.measure_memory(counts, progress=functools.partial(show, ""))
    if as_json:
        console.print_json({**throughput.as_dict(rates, peaks), "need": need})
        return
    for rate in rates:
        lines = [
            ("decoded and resized alone", f"{rate.limit:.0f} pictures/s", "1"),
            ("the same, crops too", f"{rate.limit_with_crops:.0f} pictures/s", "1"),
            ("fetched", f"{rate.fetched:.0f} pictures/s", f"{rate.fetched_share:.2f}"),
            (
                "preprocessed",
                f"{rate.preprocessed:.0f} pictures/s",
                f"{rate.preprocessed_share:.2f} (without crops in the limit: {rate.level0_share:.2f})",
            ),
            ("captions encoded", f"{rate.captions:.0f} captions/s", ""),
            ("served by the loader", f"{rate.examples:.0f} examples/s", f"{rate.examples / need:.0f} times the need"),
        ]
        console.print_table((f"{rate.count} {rate.pictures}", "rate", "share of the limit"), lines)
    if peaks:
        console.print_table(
            ("examples", "fetch", "captions and keys", "pictures"),
            [(f"{peak.count}", *(f"{size / 2**20:.0f} MiB" for size in peak.peak.values())) for peak in peaks],
        )


def _level_weights(config: type[PreprocessConfig], levels: tuple[int, ...], text: str | None) -> tuple[float, ...]:
    """The weights given, or the default ones of the levels chosen."""
    if text is not None:
        return tuple(numbers("--level-weights", text, float))
    usual = dict(zip(config.levels, config.level_weights, strict=True))
    return tuple(usual.get(level, min(usual.values())) for level in levels)


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
