"""`physformer eval variety` and `physformer eval steps`: how a checkpoint draws, beyond whether the prompt is seen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console
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
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE

if TYPE_CHECKING:
    import numpy as np

    from physformer_core.evaluation.effort import Effort
    from physformer_core.evaluation.prompt_accuracy import Share
    from physformer_core.evaluation.prompt_cases import PromptCase
    from physformer_core.evaluation.variety import Look, Neighbour

VARIETY_EPILOG = """Examples:

    physformer eval variety

    physformer eval variety --concepts everyday --prompts 36 --contact-sheet variety.png

    physformer eval variety --data-dir data/nano --json

Distances are between features (1 - cosine). The data's are those of scenes of the same subjects, framed alike. With
--data-dir, every picture is compared with all whole pictures of the set that have its shape; scenes that no set holds
show how near to a set an honest picture comes.
"""
STEPS_EPILOG = """Examples:

    physformer eval steps

    physformer eval steps 4,6,10,20 --concepts everyday --num 144 --plot steps.png

The distance is KID between the pictures and the scenes of the same prompts: with few steps, what a prompt leaves open
is averaged, and no scene looks so. The knee is the fewest evaluations whose top-5 is within one standard error of the
best and whose distance is within one of the least. Seconds are of drawing in batches on this machine; compare them
within one run.
"""
DEFAULT_COUNTS = "3,5,7,10,14,20"

ConceptsOption = Annotated[str, typer.Option(metavar="all|everyday|NAME,...", help="What the prompts may ask for.")]
SizeOption = Annotated[str, typer.Option(metavar="SIDE|RES|WxH", help="256 (square), 720p or 1280x720.")]


def register(parent: typer.Typer) -> None:
    """Adds the commands to `physformer eval`."""
    parent.command("variety", epilog=VARIETY_EPILOG)(variety)
    parent.command("steps", epilog=STEPS_EPILOG)(steps)


def variety(
    checkpoint: CheckpointOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, each of one subject.")] = 16,
    seeds: Annotated[int, typer.Option(min=2, help="Pictures of each prompt.")] = 8,
    concepts: ConceptsOption = "all",
    size: SizeOption = "256",
    data_dir: Annotated[
        Path | None, typer.Option(metavar="SET", help="Look for copies of this preprocessed set's pictures.")
    ] = None,
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
        typer.Option(metavar="FILE.png", help="A row for each prompt; with --data-dir also what is nearest to it."),
    ] = None,
    min_share: Annotated[
        float | None, typer.Option(min=0, help="Exit with code 3 if pictures differ by less of what the data's do.")
    ] = None,
    output: OutputOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Variety: how much the pictures of one prompt differ from seed to seed, beside scenes of the data.

    With --data-dir it also says how near each picture is to the nearest that was trained on, and how many are copies.
    """
    import numpy as np

    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.data.contact_sheet import sheet_size
    from physformer_core.data.scenes import render_svg
    from physformer_core.data.shard_set import ShardSet
    from physformer_core.evaluation.pictures import draw_requests
    from physformer_core.evaluation.prompt_cases import chosen_concepts, single_cases
    from physformer_core.evaluation.variety import (
        COPY_DISTANCE,
        level_0_group,
        look_at,
        mean_distance,
        nearest_pictures,
        neighbour_summary,
        scenes_like,
        variation_of,
    )
    from physformer_core.files import sha256_file
    from physformer_core.hardware import resolve_device
    from physformer_core.project import recorded_run

    width, height = pixels_of(size)
    with recorded_run("eval variety", record=not no_record, notify=console.say) as run:
        check_files(output, contact_sheet, "--contact-sheet")
        found, where = find_checkpoint(checkpoint), resolve_device(device)
        shards = ShardSet(data_dir) if data_dir is not None else None
        group = level_0_group(shards, width / height) if shards is not None else None
        variation = variation_of(shards) if shards is not None else 0.0
        cases = single_cases(prompts, seed, aspect=width / height, concepts=chosen_concepts(concepts))
        extractor = load_features(features, feature_model, where)
        # One picture for each prompt and seed: all of a prompt differ by their index alone.
        texts = [(case.prompt, width, height) for case in cases for _ in range(seeds)]
        drawn = load_drawn(found, make_requests(texts, seed, steps, guidance, detail), str(where), dtype, run)
        if contact_sheet is not None:  # told before an hour of drawing
            sheet_size(len(texts) * (1 if group is None else 2), columns=seeds)
        with console.progress() as add:
            task = add("pictures", len(texts), unit="pictures")
            looked: dict[int, Look] = {}
            for number, picture in draw_requests(found, drawn.pipeline, drawn.requests):
                looked[number] = look_at(picture, extractor, group)
                task.update(len(looked))
            looks = [looked[number] for number in range(len(texts))]
            task = add("scenes to compare with", len(cases), unit="prompts")
            rows: list[dict[str, Any]] = []
            scenes: list[Look] = []
            for number, case in enumerate(cases):
                like = scenes_like(case, number, seeds, seed, aspect=width / height, variation=variation)
                real = [look_at(render_svg(scene.svg, width, height), extractor, group) for scene in like]
                own = looks[seeds * number : seeds * (number + 1)]
                distances = [mean_distance(np.stack([one.features for one in some])) for some in (own, real)]
                rows.append({"prompt": case.prompt, "drawn": distances[0], "data": distances[1]})
                scenes += real
                task.update(number + 1)
            neighbours: list[Neighbour] = []
            nearest: dict[str, Any] | None = None
            if shards is not None and group is not None:
                task = add("nearest of the set", len(looks) + len(scenes), unit="pictures")
                neighbours = nearest_pictures(group, [one.small for one in looks])
                task.update(len(looks))
                nearest = {
                    "set": shards.key,
                    "examples": group.count,
                    "copy_distance": COPY_DISTANCE,
                    "drawn": neighbour_summary(neighbours),
                    "scenes": neighbour_summary(nearest_pictures(group, [one.small for one in scenes])),
                }
                task.update(len(looks) + len(scenes))
        means = {key: sum(float(row[key]) for row in rows) / len(rows) for key in ("drawn", "data")}
        result: dict[str, Any] = {
            "format": "physformer-variety/1",
            "prompts": prompts,
            "seeds": seeds,
            "distance": means | {"share": means["drawn"] / means["data"] if means["data"] else None},
            "nearest": nearest,
            "recipe": {"concepts": concepts, "extractor": extractor.recipe(), "generated": drawn.recipe()},
            "rows": rows,
        }
        run.device, run.seeds = str(where), [seed]
        run.config = {key: value for key, value in result.items() if key != "rows" and value is not None}
        if shards is not None:
            run.data_sha256 = sha256_file(shards.folder / "manifest.json")
        write_result(output, result, run)
        if contact_sheet is not None:
            _write_sheet(contact_sheet, cases, looks, neighbours, seeds, run)
        _replay(run, {"--output": output, "--contact-sheet": contact_sheet})
        if json_output:
            console.print_json(result)
        else:
            _print_variety(result)
        share = result["distance"]["share"]
        if min_share is not None and (share is None or share < min_share):
            miss(run, [f"pictures differ by {share or 0:.2f} of what the data's do, less than {min_share:g}"])


def steps(
    counts: Annotated[
        str, typer.Argument(metavar="N,N,...", help="Steps of the coarsest level to try.")
    ] = DEFAULT_COUNTS,
    checkpoint: CheckpointOption = None,
    num: Annotated[int, typer.Option(min=3, help="Prompts of single subjects, half of them in a place.")] = 144,
    concepts: ConceptsOption = "everyday",
    size: SizeOption = "256",
    seed: SeedOption = 0,
    guidance: GuidanceOption = DEFAULT_GUIDANCE,
    detail: DetailOption = DEFAULT_DETAIL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    features: FeaturesOption = "efficientnet",
    feature_model: FeatureModelOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw both over evaluations, with the knee."),
    ] = None,
    output: OutputOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Quality against effort: accuracy, and distance to real scenes, at several numbers of steps."""
    from physformer_core.batching import Planner
    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.data.contact_sheet import write_sheet
    from physformer_core.data.scenes import render_svg
    from physformer_core.evaluation.effort import Effort, distances, draw_efforts, knee
    from physformer_core.evaluation.pictures import draw_requests
    from physformer_core.evaluation.prompt_accuracy import Judge, Share
    from physformer_core.evaluation.prompt_cases import chosen_concepts, single_cases
    from physformer_core.files import next_free_name
    from physformer_core.hardware import resolve_device
    from physformer_core.project import recorded_run

    tried = _counts(counts)
    width, height = pixels_of(size)
    with recorded_run("eval steps", record=not no_record, notify=console.say) as run:
        check_files(output, plot, "--plot")
        found, where = find_checkpoint(checkpoint), resolve_device(device)
        cases = single_cases(num, seed, aspect=width / height, concepts=chosen_concepts(concepts))
        texts = [(case.prompt, width, height) for case in cases]
        extractor = load_features(features, feature_model, where)
        drawn = load_drawn(found, make_requests(texts, seed, str(tried[0]), guidance, detail), str(where), dtype, run)
        tries: list[tuple[dict[str, Any], np.ndarray]] = []
        with console.progress() as add:
            classifier = load_judge(extractor, add)
            judge = Judge(extractor, classifier)
            task = add("pictures", (1 + len(tried)) * num, unit="pictures")

            def real_pictures() -> Iterator[np.ndarray]:
                for number, case in enumerate(cases):
                    yield render_svg(case.scene.svg, width, height)
                    task.update(number + 1)

            real = extractor.extract_all(real_pictures())
            for _ in draw_requests(found, drawn.pipeline, make_requests(texts[:1], seed, "1", guidance, detail)):
                pass  # loads the text encoder and tries the kernels, which is no count's own time
            for count in tried:
                requests = make_requests(texts, seed, str(count), guidance, detail)
                started = time.monotonic()
                pictures = {}
                for number, picture in draw_requests(found, drawn.pipeline, requests):
                    pictures[number] = picture
                    task.update((1 + len(tries)) * num + len(pictures))
                seconds = (time.monotonic() - started) / num
                ranks = [judge.judge(case, pictures[number]).rank for number, case in enumerate(cases)]
                shown = {
                    "steps": count,
                    "evaluations": sum(sum(level.evaluations) for level in Planner(found).levels(requests[0])),
                    "seconds": seconds,
                    "top1": Share.of([rank < 1 for rank in ranks]),
                    "top5": Share.of([rank < 5 for rank in ranks]),
                }
                tries.append((shown, extractor.extract_all(pictures[number] for number in range(num))))
        found_distances = distances(real, [vectors for _, vectors in tries])
        efforts = [
            Effort(**shown, distance=distance, beyond_least=beyond)
            for (shown, _), (distance, beyond) in zip(tries, found_distances, strict=True)
        ]
        best = knee(efforts)
        recipe = {key: value for key, value in drawn.recipe().items() if key != "steps"}
        # Without times, which no run repeats: the same run must write the same bytes.
        result: dict[str, Any] = {
            "format": "physformer-steps/1",
            "efforts": [{key: value for key, value in one.as_dict().items() if key != "seconds"} for one in efforts],
            "knee": {"steps": best.steps, "evaluations": best.evaluations},
            "recipe": {
                "concepts": concepts,
                "extractor": extractor.recipe(),
                "classifier": classifier.key,
                "generated": recipe,
            },
        }
        run.device, run.seeds, run.config = str(where), [seed], result
        write_result(output, result, run)
        if plot is not None:
            # Left out of the run's outputs, as it shows times.
            plot = next_free_name(plot)
            write_sheet(draw_efforts(efforts), plot)
            console.say(f"wrote {plot}")
        _replay(run, {"--output": output, "--plot": plot})
        if json_output:
            console.print_json(result | {"seconds": [one.seconds for one in efforts]})
            return
        _print_efforts(efforts, best)


def _counts(text: str) -> list[int]:
    from physformer_core.batching import parse_steps

    parsed = parse_steps(text)
    return sorted({parsed} if isinstance(parsed, int) else set(parsed))


def _replay(run: Any, files: dict[str, Path | None]) -> None:
    """A replay can send only one file elsewhere."""
    named = [(option, path) for option, path in files.items() if path is not None]
    if len(named) == 1:
        option, path = named[0]
        spellings = (option, "-o") if option == "--output" else (option,)
        run.replay_with(*spellings, output=path, folder=False)


def _write_sheet(
    path: Path,
    cases: Sequence[PromptCase],
    looks: Sequence[Look],
    neighbours: Sequence[Neighbour],
    seeds: int,
    run: Any,
) -> None:
    """Writes a row of pictures for each prompt and, if known, one of what is nearest to each."""
    from PIL import Image

    from physformer_core.data.contact_sheet import Exhibit, draw_sheet, write_sheet
    from physformer_core.evaluation.variety import THUMBNAIL
    from physformer_core.files import next_free_name

    exhibits = []
    for number, case in enumerate(cases):
        own = range(seeds * number, seeds * (number + 1))
        exhibits += [Exhibit(looks[k].thumbnail, case.prompt, f"picture {k - own.start}") for k in own]
        if neighbours:
            exhibits += [
                Exhibit(
                    Image.fromarray(neighbours[k].picture).resize(looks[k].thumbnail.size, Image.Resampling.BICUBIC),
                    "nearest of the set",
                    f"distance {neighbours[k].distance:.1f}",
                )
                for k in own
            ]
    name = next_free_name(path)
    write_sheet(draw_sheet(exhibits, columns=seeds, size=THUMBNAIL), name)
    console.say(f"wrote {name}")
    run.add_output(name)


def _print_variety(result: dict[str, Any]) -> None:
    rows = [(row["prompt"], f"{row['drawn']:.3f}", f"{row['data']:.3f}") for row in result["rows"]]
    distance = result["distance"]
    rows.append(("all", f"{distance['drawn']:.3f}", f"{distance['data']:.3f}"))
    console.print_table(("PROMPT", "DRAWN", "DATA"), rows)
    if distance["share"] is not None:
        typer.echo(f"pictures of a prompt differ by {distance['share']:.2f} of what the data's do")
    if (nearest := result["nearest"]) is not None:
        for name, words in (("drawn", "drawn pictures"), ("scenes", "scenes that no set holds")):
            one = nearest[name]
            typer.echo(
                f"{words}: {100 * one['copies']:.0f}% copies of the set's {nearest['examples']} pictures of this "
                f"shape; distance to the nearest {one['smallest']:.1f} at least, {one['median']:.1f} in the middle, "
                "of 255"
            )


def _print_efforts(efforts: Sequence[Effort], best: Effort) -> None:
    rows = [
        (
            str(one.steps) + (" (knee)" if one is best else ""),
            str(one.evaluations),
            f"{one.seconds:.2g}",
            _with_interval(one.top1),
            _with_interval(one.top5),
            f"{1000 * one.distance:.1f}",
            f"+{1000 * one.beyond_least[0]:.1f} ± {1000 * one.beyond_least[1]:.1f}",
        )
        for one in efforts
    ]
    names = ("STEPS", "EVALUATIONS", "SECONDS", "TOP-1 (95 %)", "TOP-5 (95 %)", "KID x 1000", "ABOVE THE LEAST")
    console.print_table(names, rows)


def _with_interval(share: Share) -> str:
    return f"{100 * share.value:.0f}% ({100 * share.low:.0f}-{100 * share.high:.0f})"
