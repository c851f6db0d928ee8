"""`physformer eval`: what a model is worth, in figures that say how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console, evaluate_drawing, evaluate_scaling, evaluate_show
from physformer_cli.evaluate_common import (
    CheckpointOption,
    DetailOption,
    DeviceOption,
    DtypeOption,
    FeatureModelOption,
    FeaturesOption,
    GuidanceOption,
    OutputOption,
    SeedOption,
    StepsOption,
    check_files,
    load_drawn,
    load_features,
    load_judge,
    make_requests,
    miss,
    pixels_of,
    write_result,
)
from physformer_core.errors import ConfigError, OutputError
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE

if TYPE_CHECKING:
    import numpy as np

    from physformer_core.batching import PictureRequest
    from physformer_core.evaluation.pictures import PictureSource
    from physformer_core.project import RunRecorder

app = typer.Typer(no_args_is_help=True, help="Measure what a model draws: prompt accuracy, FID, what a codec loses.")

FID_EPILOG = """Examples:

    physformer eval fid data/scenes --checkpoint runs/nano --num 10000

    physformer eval fid photos/ --generated outputs/ --features inception --feature-model inception-2015-12-05.pt

    physformer eval fid photos/ --generated outputs/ --clip-score openai/clip-vit-base-patch32

    physformer eval fid data/scenes --features efficientnet --save-statistics scenes.npz
"""
PROMPTS_EPILOG = """Examples:

    physformer eval prompts

    physformer eval prompts --checkpoint runs/nano --num 64 --relations 0 --contact-sheet sheet.png

    physformer eval prompts --concepts everyday --num 72 --relations 0

    physformer eval prompts --size 1280x720 --json --min-top1 0.8
"""
RECONSTRUCT_EPILOG = """Examples:

    physformer eval reconstruct madebyollin/taesd photos/ --num 100

    physformer eval reconstruct stabilityai/sd-vae-ft-mse data/raw --size 512 --min-psnr 25
"""


def register(parent: typer.Typer) -> None:
    """Adds the commands to the app."""
    evaluate_drawing.register(app)
    evaluate_scaling.register(app)
    parent.add_typer(app, name="eval")


@app.command("fid", epilog=FID_EPILOG, no_args_is_help=True)
def fid(
    reference: Annotated[
        Path,
        typer.Argument(help="Real pictures: a folder, a raw or preprocessed set, or a statistics file (.npz)."),
    ],
    generated: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Pictures that are there already, instead of drawing some.")
    ] = None,
    checkpoint: CheckpointOption = None,
    num: Annotated[int | None, typer.Option(min=2, help="Pictures to draw; 10000 if not given.")] = None,
    features: FeaturesOption = "efficientnet",
    feature_model: FeatureModelOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to draw, a line each; the reference's captions if not given."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=16, help="Side of pictures drawn from prompts or raw sets' drawings; 256 if not given."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of a preprocessed set, train or validation; both if not given.")
    ] = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option(help=f"How strongly to follow the prompts; {DEFAULT_GUIDANCE:g} if not given.")
    ] = None,
    detail: Annotated[
        float | None,
        typer.Option(help=f"Factor of the detail that finer levels add; {DEFAULT_DETAIL:g} if not given."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="What the drawing network computes in: auto (if not given), fp32, bf16 or fp16."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that the feature network sees at once.")] = 32,
    clip_score: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Also score generated pictures against their captions with this CLIP. Captions are the prompts; those "
            "of files stand beside them (NAME.txt) or in the PNG.",
        ),
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Keep the reference's statistics. Alone, nothing else is done."),
    ] = None,
    max_distance: Annotated[
        float | None, typer.Option(min=0, help="Exit with code 3 if the Fréchet distance is larger.")
    ] = None,
    output: OutputOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Fréchet distance, KID, precision and recall between real and generated pictures.

    Only with --features inception is it the FID of papers. Every score comes with its recipe.
    """
    is_file = reference.suffix == ".npz"
    only_save = save_statistics is not None and generated is None and checkpoint is None and num is None
    _refuse_without_effect(
        [
            ("--checkpoint", checkpoint is not None and generated is not None, "--generated"),
            ("--num", num is not None and generated is not None, "--generated"),
            ("--prompts", prompts is not None and (generated is not None or only_save), "no drawing"),
            ("--steps", steps is not None and (generated is not None or only_save), "no drawing"),
            ("--guidance", guidance is not None and (generated is not None or only_save), "no drawing"),
            ("--detail", detail is not None and (generated is not None or only_save), "no drawing"),
            ("--clip-score", clip_score is not None and only_save, "no generated pictures"),
            ("--dtype", dtype is not None and (generated is not None or only_save), "no drawing"),
            ("--split", split is not None and is_file, "a statistics file"),
            ("--save-statistics", save_statistics is not None and is_file, "a statistics file"),
            ("--max-distance", max_distance is not None and only_save, "no generated pictures"),
            ("--output", output is not None and only_save, "no generated pictures"),
        ]
    )
    if save_statistics is not None and save_statistics.suffix != ".npz":
        raise OutputError(
            f"statistics are a file .npz, not {save_statistics.name!r}",
            hint="--save-statistics statistics.npz",
        )
    if split not in (None, "train", "validation"):
        raise ConfigError(f"unknown split '{split}'", hint="train or validation")
    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.project import recorded_run

    with recorded_run("eval fid", record=not no_record, notify=console.say) as run:
        check_files(output)
        check_files(save_statistics)
        found = find_checkpoint(checkpoint) if generated is None and not only_save else None
        from physformer_core.evaluation.clip_score import ClipScorer
        from physformer_core.evaluation.frechet import save_statistics as write_statistics
        from physformer_core.evaluation.pictures import open_source
        from physformer_core.evaluation.scores import compare, gather, read_reference
        from physformer_core.files import next_free_name
        from physformer_core.hardware import resolve_device

        where = resolve_device(device)
        extractor = load_features(features, feature_model, where)
        scorer = None if clip_score is None else ClipScorer(clip_score, where, batch_size=batch_size)
        source = None if is_file else open_source(reference, size=size or 256, split=split)
        _check_set_options(source, size, split, drawn_by_size=prompts is not None and not only_save)
        statistics = read_reference(reference, extractor) if source is None else None
        drawn: PictureSource | None = None
        with console.progress() as add:
            if found is not None:
                requests = _fid_requests(
                    source,
                    prompts,
                    num or 10_000,
                    size or 256,
                    seed,
                    steps,
                    DEFAULT_GUIDANCE if guidance is None else guidance,
                    DEFAULT_DETAIL if detail is None else detail,
                )
                drawn = load_drawn(found, requests, str(where), dtype or "auto", run)
            elif generated is not None:
                drawn = open_source(generated, size=size or 256)
            # Asked for now: missing captions are told before the reference is gone through.
            seen = None if drawn is None else drawn if scorer is None else scorer.watch(drawn.captioned())
            if statistics is None:
                assert source is not None
                statistics = gather(
                    _shown(source, add("reference", source.count, unit="pictures")),
                    extractor, source.recipe, batch_size=batch_size, seed=seed,
                )  # fmt: skip
            if save_statistics is not None:
                save_statistics = next_free_name(save_statistics)
                write_statistics(save_statistics, statistics)
                run.add_output(save_statistics)
                if drawn is not None:
                    console.say(f"wrote {save_statistics}")
            if drawn is not None and seen is not None:
                other = gather(
                    _shown(seen, add("generated", drawn.count, unit="pictures")),
                    extractor, drawn.recipe, batch_size=batch_size, seed=seed,
                )  # fmt: skip
        run.device, run.seeds = str(where), [seed]
        run.config = {"extractor": extractor.recipe()}
        if drawn is None:
            assert save_statistics is not None
            run.replay_with("--save-statistics", output=save_statistics, folder=False)
            console.say(f"wrote {save_statistics}: statistics of {statistics.count} pictures")
            return
        clip = None if scorer is None else scorer.result()
        score = compare(statistics, other, extractor, seed=seed, clip=clip)
        run.config = score.as_dict()
        write_result(output, score.as_dict(), run)
        if output is not None and save_statistics is None:  # a replay can send only one file elsewhere
            run.replay_with("--output", "-o", output=output, folder=False)
        evaluate_show.print_distances(score, json_output)
        if max_distance is not None and score.frechet > max_distance:
            miss(run, [f"{score.name} {score.frechet:.4g} is more than {max_distance:g}"])


@app.command("prompts", epilog=PROMPTS_EPILOG)
def prompts(
    checkpoint: CheckpointOption = None,
    num: Annotated[int, typer.Option(min=0, help="Prompts of single subjects, half of them in a place.")] = 200,
    relations: Annotated[int, typer.Option(min=0, help="Prompts of two things in a relation.")] = 100,
    phrased: Annotated[
        int, typer.Option(min=0, help="Prompts of single subjects in words of everyday, with synonyms.")
    ] = 50,
    pairs: Annotated[
        str,
        typer.Option(metavar="all|seen|held-out", help="Relations of which pairs of things, in what was trained on."),
    ] = "all",
    held_out_pairs: Annotated[
        float, typer.Option(help="The share that data fetch scenes --held-out-pairs was given.")
    ] = 0.1,
    concepts: Annotated[
        str, typer.Option(metavar="all|everyday|NAME,...", help="What single subjects may be; compared with all.")
    ] = "all",
    size: Annotated[str, typer.Option(metavar="SIDE|RES|WxH", help="256 (square), 720p or 1280x720.")] = "256",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = DEFAULT_GUIDANCE,
    detail: DetailOption = DEFAULT_DETAIL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    features: FeaturesOption = "efficientnet",
    feature_model: FeatureModelOption = None,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="All pictures with prompt and verdict, none picked or left out."),
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with code 3 if single subjects' top-1 is below.")
    ] = None,
    min_top5: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with code 3 if single subjects' top-5 is below.")
    ] = None,
    min_relations: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with code 3 if fewer relations are right (top-5).")
    ] = None,
    output: OutputOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Prompt accuracy: how often the picture shows what its prompt says.

    A classifier, fitted to composed scenes (once, in some ten minutes), says what each picture shows; right means
    that its own concept is the likeliest of all. The ceiling is the score of real scenes, the floor that of other
    pictures' prompts. Needs no network.
    """
    if num + relations + phrased == 0:
        raise ConfigError("--num 0, --relations 0 and --phrased 0 leave nothing to measure")
    _refuse_without_effect(
        [
            ("--concepts", concepts != "all" and not num, "--num 0"),
            ("--min-top1", min_top1 is not None and not num, "--num 0"),
            ("--min-top5", min_top5 is not None and not num, "--num 0"),
            ("--min-relations", min_relations is not None and not relations, "--relations 0"),
            ("--pairs", pairs != "all" and not relations, "--relations 0"),
            ("--held-out-pairs", held_out_pairs != 0.1 and pairs == "all", "--pairs all"),
        ]
    )
    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.project import recorded_run

    width, height = pixels_of(size)
    ranks = _pair_ranks(pairs, held_out_pairs)
    with recorded_run("eval prompts", record=not no_record, notify=console.say) as run:
        check_files(output, contact_sheet, "--contact-sheet")
        found = find_checkpoint(checkpoint)
        from physformer_core.data.contact_sheet import sheet_size, write_sheet
        from physformer_core.evaluation.pictures import draw_requests
        from physformer_core.evaluation.prompt_accuracy import (
            Judge,
            judge_all,
            judged_table,
            relation_report,
            single_report,
        )
        from physformer_core.evaluation.prompt_cases import (
            chosen_concepts,
            phrased_cases,
            relation_cases,
            single_cases,
        )
        from physformer_core.evaluation.prompt_sheet import prompt_sheet
        from physformer_core.evaluation.spectra import GradientSpectrum, spectra_report
        from physformer_core.files import next_free_name
        from physformer_core.hardware import resolve_device

        where = resolve_device(device)
        if contact_sheet is not None:  # told before an hour of drawing
            sheet_size(num + relations + phrased, columns=8)
        aspect = width / height
        singles = single_cases(num, seed, aspect=aspect, concepts=chosen_concepts(concepts))
        two = relation_cases(relations, seed, aspect=aspect, pair_ranks=ranks)
        cases = [*singles, *two, *phrased_cases(phrased, seed, aspect=aspect)]
        extractor = load_features(features, feature_model, where)
        requests = make_requests([(case.prompt, width, height) for case in cases], seed, steps, guidance, detail)
        drawn = load_drawn(found, requests, str(where), dtype, run)
        with console.progress() as add:
            classifier = load_judge(extractor, add)
            task = add("prompts", len(cases), unit="prompts")
            pictures = draw_requests(found, drawn.pipeline, requests)
            sides = [drawn.pipeline.patch_side(size) for size in reversed(drawn.pipeline.level_sizes(height, width))]
            # Others blur over frequencies; two levels may have patches of one side.
            periods = list(dict.fromkeys(round(side) for side in sides if abs(side - round(side)) < 1e-6))
            spectra = GradientSpectrum(periods), GradientSpectrum(periods)

            def watch(*both: np.ndarray) -> None:
                for spectrum, picture in zip(spectra, both, strict=True):
                    spectrum.add(picture)

            judged = judge_all(cases, pictures, Judge(extractor, classifier), task.update, watch)
        result: dict[str, Any] = {"format": "physformer-prompts/1"}
        if singles:
            result["single"] = single_report(judged[:num], classifier.concepts)
        if two:
            result["relations"] = relation_report(judged[num : num + relations])
        if phrased:
            result["phrased"] = single_report(judged[num + relations :], classifier.concepts)
        result["spectra"] = spectra_report(*spectra)
        result["recipe"] = {
            "concepts": concepts,
            "pair_ranks": list(ranks),
            "extractor": extractor.recipe(),
            "classifier": classifier.key,
            "generated": drawn.recipe(),
        }
        result["pictures"] = judged_table(judged, classifier.concepts)
        run.device, run.seeds = str(where), [seed]
        run.config = {key: value for key, value in result.items() if key != "pictures"}
        write_result(output, result, run)
        if contact_sheet is not None:
            name = next_free_name(contact_sheet)
            write_sheet(prompt_sheet(judged, classifier.concepts), name)
            console.say(f"wrote {name}")
            run.add_output(name)
        if (output is None) != (contact_sheet is None):  # a replay can send only one file elsewhere
            spelling = ("--output", "-o") if contact_sheet is None else ("--contact-sheet",)
            run.replay_with(*spelling, output=output or contact_sheet or "", folder=False)
        if json_output:
            console.print_json(result)
        else:
            evaluate_show.print_prompts(result)
        _check_least(result, {"top1": min_top1, "top5": min_top5}, min_relations, run)


@app.command("reconstruct", epilog=RECONSTRUCT_EPILOG, no_args_is_help=True)
def reconstruct(
    codec: Annotated[str, typer.Argument(help="Folder or hub name of an autoencoder, or pixels.")],
    pictures: Annotated[Path, typer.Argument(help="A folder of pictures, a raw or a preprocessed set.")],
    num: Annotated[int | None, typer.Option(min=1, help="Use the first so many pictures; all if not given.")] = None,
    size: Annotated[
        int | None, typer.Option(min=16, help="Side that a raw set's drawings are rendered at; 256 if not given.")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Exit with code 3 if the PSNR is below, in dB.")] = None,
    output: OutputOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """What a codec loses: PSNR and SSIM of pictures that it encoded and decoded."""
    import itertools

    from physformer_core.project import recorded_run

    with recorded_run("eval reconstruct", record=not no_record, notify=console.say) as run:
        check_files(output)
        from physformer_core.codec import load_codec
        from physformer_core.evaluation.pictures import open_source
        from physformer_core.evaluation.reconstruction import reconstruct as measure

        source = open_source(pictures, size=size or 256)
        _check_set_options(source, size, None, drawn_by_size=False)
        loaded = load_codec(codec)
        total = min(num or source.count, source.count)
        with console.progress() as add:
            task = add("reconstructing", total, unit="pictures")
            found = measure(itertools.islice(source, total), loaded, on_picture=task.update)
        recipe = {"codec": codec, "pictures": source.recipe()}
        result = {"format": "physformer-reconstruction/1", **found.as_dict(), "recipe": recipe}
        run.config = result
        write_result(output, result, run)
        if output is not None:
            run.replay_with("--output", "-o", output=output, folder=False)
        if json_output:
            console.print_json(result)
        else:
            decibels = "every one exact" if found.psnr is None else f"{found.psnr:.2f} dB"
            rows = [("PSNR", decibels), ("SSIM", f"{found.ssim:.4f}"), ("pictures", str(found.count))]
            console.print_table(("MEASURE", "VALUE"), rows)
        if min_psnr is not None and found.psnr is not None and found.psnr < min_psnr:
            miss(run, [f"PSNR {found.psnr:.2f} dB is below {min_psnr:g}"])


def _pair_ranks(pairs: str, held_out: float) -> tuple[float, float]:
    from physformer_core.data.scenes.fetch import LEAST_HELD_OUT, MOST_HELD_OUT

    if not LEAST_HELD_OUT <= held_out <= MOST_HELD_OUT:
        raise ConfigError(
            f"--held-out-pairs {held_out:g} is not from {LEAST_HELD_OUT:g} to {MOST_HELD_OUT:g}", hint="0.1 is usual"
        )
    known = {"all": (0.0, 1.0), "seen": (held_out, 1.0), "held-out": (0.0, held_out)}
    if pairs not in known:
        raise ConfigError(f"unknown pairs '{pairs}'", hint="all, seen or held-out")
    return known[pairs]


def _fid_requests(
    source: PictureSource | None,
    prompts: Path | None,
    num: int,
    size: int,
    seed: int,
    steps: str | None,
    guidance: float,
    detail: float,
) -> list[PictureRequest]:
    """Pictures to draw: from the reference's captions at their sizes, or from a prompt file."""
    if prompts is not None:
        from physformer_core.prompts import read_plain_prompts

        texts = read_plain_prompts(prompts)
        return make_requests(
            [(texts[number % len(texts)], size, size) for number in range(num)], seed, steps, guidance, detail
        )
    if source is None:
        raise ConfigError("a statistics file has no captions to draw from", hint="name a prompt file: --prompts FILE")
    captions = source.captions(num)
    return make_requests([(one.caption, one.width, one.height) for one in captions], seed, steps, guidance, detail)


def _shown(source: Iterable[np.ndarray], task: console.ProgressTask) -> Any:
    from physformer_core.evaluation.pictures import counted

    return counted(source, task.update)


def _check_set_options(
    source: PictureSource | None, size: int | None, split: str | None, *, drawn_by_size: bool
) -> None:
    from physformer_core.evaluation.pictures import RawPictures, ShardPictures

    if split is not None and not isinstance(source, ShardPictures):
        raise ConfigError("--split has no effect: the reference is no preprocessed set")
    if size is not None and not drawn_by_size and not isinstance(source, RawPictures):
        raise ConfigError(
            "--size has no effect here", hint="it is the side of a raw set's drawings, or of pictures from --prompts"
        )


def _refuse_without_effect(options: Sequence[tuple[str, bool, str]]) -> None:
    """Refuses the first option that says something which nothing comes of: (option, whether, beside what)."""
    for option, useless, beside in options:
        if useless:
            raise ConfigError(f"{option} has no effect with {beside}", hint="leave it out")


def _check_least(
    result: Mapping[str, Any], least: Mapping[str, float | None], relations: float | None, run: RunRecorder
) -> None:
    missed = []
    for key, threshold in least.items():
        if threshold is not None and (value := result["single"][key]["value"]) < threshold:
            missed.append(f"single subjects' {key} {value:.3f} is below {threshold:g}")
    if relations is not None and (value := result["relations"]["top5"]["value"]) < relations:
        missed.append(f"relations' top5 {value:.3f} is below {relations:g}")
    if missed:
        miss(run, missed)
