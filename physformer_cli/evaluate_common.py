"""Options and steps that the commands of `physformer eval` share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    import torch

    from physformer_core.batching import PictureRequest
    from physformer_core.checkpoints import Checkpoint
    from physformer_core.evaluation.classifier import ConceptClassifier
    from physformer_core.evaluation.features import FeatureExtractor
    from physformer_core.evaluation.pictures import DrawnPictures
    from physformer_core.pipeline import PhysFormerPipeline
    from physformer_core.project import RunRecorder

MISSED = 3
"""Exit code where a threshold was missed."""

CheckpointOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="What draws the pictures; the shipped checkpoint if not given.")
]
FeaturesOption = Annotated[
    str, typer.Option(metavar="NAME", help="Network that looks at them: efficientnet, inception, dinov2 or clip.")
]
FeatureModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Inception's TorchScript file (else cached or downloaded), or a DINOv2 or CLIP by folder or hub name.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of the noise.")]
StepsOption = Annotated[
    str | None, typer.Option(metavar="N[,N...]", help="Steps of the coarsest level, or one number per level.")
]
GuidanceOption = Annotated[float, typer.Option(help="How strongly to follow the prompt.")]
DetailOption = Annotated[float, typer.Option(help="Factor of the detail that finer levels add; 1 is softer.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
DtypeOption = Annotated[str, typer.Option(help="What the network computes in: auto, fp32, bf16 or fp16.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Also write scores and recipe to a file.")
]


def check_files(output: Path | None, picture: Path | None = None, option: str = "") -> None:
    """Refuses what could not be written at the end, before anything is drawn.

    Args:
        output: A file for scores.
        picture: A file for a picture, which must be a PNG.
        option: What names the picture.
    """
    from physformer_core.output_names import check_folder, check_picture

    if picture is not None:
        check_picture(option, option, picture)
    for path in (output, picture):
        if path is not None:
            check_folder(path.parent, create=False)


def pixels_of(size: str) -> tuple[int, int]:
    """Width and height of `--size`: a side, or what `--res` takes."""
    from physformer_core.resolution import resolve_size

    return resolve_size(res=f"{size}x{size}" if size.isascii() and size.isdigit() else size)


def make_requests(
    pictures: Sequence[tuple[str, int, int]], seed: int, steps: str | None, guidance: float, detail: float
) -> list[PictureRequest]:
    """One request per (prompt, width, height): all of one seed, each a picture of its own."""
    from physformer_core.batching import PictureRequest, parse_steps

    parsed = parse_steps(steps) if steps is not None else None
    return [
        PictureRequest(
            prompt=prompt,
            seed=seed,
            index=index,
            width=width,
            height=height,
            steps=parsed,
            guidance=guidance,
            detail=detail,
        )
        for index, (prompt, width, height) in enumerate(pictures)
    ]


def load_drawn(
    found: Checkpoint, requests: list[PictureRequest], device: str, dtype: str, run: RunRecorder
) -> DrawnPictures:
    """Loads the network; the pictures are drawn when they are asked for."""
    import torch

    from physformer_core.batching import check_step_levels
    from physformer_core.checkpoints import load_pipeline
    from physformer_core.evaluation.pictures import DrawnPictures
    from physformer_core.hardware import DTYPES, resolve_dtype

    requests[0].settings()
    _check_lengths({one.prompt for one in requests}, found)
    kind = resolve_dtype(dtype, torch.device(device))
    run.checkpoint_sha256 = found.sha256
    pipeline: PhysFormerPipeline = load_pipeline(found, device=device, dtype=kind)
    check_step_levels(requests, max(len(pipeline.level_sizes(one.height, one.width)) for one in requests))
    name = next(name for name, value in DTYPES.items() if value == kind)
    return DrawnPictures(found, pipeline, requests, name)


def _check_lengths(prompts: Collection[str], checkpoint: Checkpoint) -> None:
    """Refuses prompts that the checkpoint does not take, before anything is drawn."""
    from physformer_core.errors import PromptError
    from physformer_core.text import count_prompt_tokens, shortened

    ordered = sorted(prompts)
    for prompt, count in zip(ordered, count_prompt_tokens(ordered, checkpoint.text_encoder_name), strict=True):
        if count > checkpoint.prompt_tokens:
            raise PromptError(
                f"a prompt has {count} tokens, the model takes {checkpoint.prompt_tokens}: {shortened(prompt)!r}",
                hint="shorten it, or leave it out; nothing is cut silently",
            )


def load_features(name: str, model: str | None, device: torch.device) -> FeatureExtractor:
    """Loads a feature network, with a bar where it has to be downloaded first."""
    from physformer_core.evaluation.features import INCEPTION_FILE, load_extractor

    with console.progress() as add:
        tasks: list[console.ProgressTask] = []

        def on_bytes(done: int, total: int | None) -> None:
            if not tasks:
                tasks.append(add(f"downloading {INCEPTION_FILE}", total, unit="bytes"))
            tasks[0].update(done)

        return load_extractor(name, model, device, on_bytes)


def load_judge(extractor: FeatureExtractor, add: Callable[..., console.ProgressTask]) -> ConceptClassifier:
    """The classifier that judges pictures, with bars where it has to be fitted first: some ten minutes on two cores."""
    from physformer_core.evaluation.classifier import load_classifier

    tasks: dict[str, console.ProgressTask] = {}

    def bar(description: str, unit: str) -> Callable[[int, int], None]:
        def update(done: int, total: int) -> None:
            if description not in tasks:  # none where the cache has the judge
                tasks[description] = add(description, total, unit=unit)
            tasks[description].update(done)

        return update

    return load_classifier(
        extractor,
        progress=bar("scenes for the judge", "scenes"),
        fitting=bar("fitting the judge", "steps"),
        notify=console.warn,
    )


def write_result(output: Path | None, result: Mapping[str, Any], run: RunRecorder) -> None:
    """Writes scores and recipe; the same run gives the same bytes."""
    if output is None:
        return
    from physformer_core.files import atomic_write, next_free_name

    text = json.dumps(dict(result), indent=2, ensure_ascii=False) + "\n"
    name = next_free_name(output)
    with atomic_write(name) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.say(f"wrote {name}")
    run.add_output(name, sha256=hashlib.sha256(text.encode()).hexdigest())


def miss(run: RunRecorder, reasons: Sequence[str]) -> None:
    """Ends the command with `MISSED`, each reason on a line of its own."""
    for reason in reasons:
        console.error(reason)
    run.fail(reasons[0])
    raise typer.Exit(MISSED)
