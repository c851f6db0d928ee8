"""`physformer generate`: prompts to pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console
from physformer_cli.generate_plan import Options, Plan, check_combinations, make_plan
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE, DEFAULT_STEPS
from physformer_core.interruptions import held_back

if TYPE_CHECKING:
    from physformer_core.batching import PictureRequest
    from physformer_core.pipeline import PhysFormerPipeline, StepEvent
    from physformer_core.project import RunRecorder

_WHAT, _SIZE, _HOW, _WHERE = "What to draw", "Size", "How to draw it", "Where it goes"
_STEPS = ",".join(map(str, DEFAULT_STEPS))


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command(no_args_is_help=True)(generate)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='What to draw, for example "a bird in a cage".', show_default=False)
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A prompt a line (.txt), or a JSON object a line (.jsonl) with prompt and, if wanted, seed, width, "
            "height, res, aspect, steps, guidance, detail, negative_prompt, output. - is standard input.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE.png", help="Make a picture again from its metadata.", rich_help_panel=_WHAT
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to keep out of the picture.", rich_help_panel=_WHAT)
    ] = None,
    seed: Annotated[
        list[str] | None,
        typer.Option(
            "--seed",
            "-s",
            metavar="SEED",
            help="7, or several: 1,5,9 or 1-4, or repeat it. 0 if not given.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", "-n", metavar="N", help="Pictures per prompt and seed.", rich_help_panel=_WHAT),
    ] = None,
    res: Annotated[
        str | None,
        typer.Option(
            help="360p 480p 720p 1080p 1440p 4k 8k or WxH. 512x512 if nothing is said.", rich_help_panel=_SIZE
        ),
    ] = None,
    aspect: Annotated[
        str | None, typer.Option(metavar="W:H", help="16:9, 1:1, 9:16 ...", rich_help_panel=_SIZE)
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", "-W", help="Pixels; any number.", rich_help_panel=_SIZE)
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Pixels; any number.", rich_help_panel=_SIZE)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help=f"Steps at the coarsest level ({DEFAULT_STEPS[0]}), or one number per "
            f"level: {_STEPS}, the last for all beyond.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help=f"How strongly to follow the prompt: {DEFAULT_GUIDANCE:g}; 1 is off.", rich_help_panel=_HOW),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="FROM,TO", help="Flow times within which guidance acts: 0,1.", rich_help_panel=_HOW),
    ] = None,
    detail: Annotated[
        float | None,
        typer.Option(
            help=f"Factor of the detail that finer levels add: {DEFAULT_DETAIL:g}; 1 is softer, more is sharper.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="euler (default), heun, multistep or adaptive.", rich_help_panel=_HOW)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A checkpoint or a run; the shipped one if not given.", rich_help_panel=_HOW
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="An adapter that physformer train --lora-rank made, and how strongly it acts: 1 if not given. "
            "Repeat it for several.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_HOW)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16.", rich_help_panel=_HOW)] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the network first, for each size of picture and level: pays off for many pictures.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pictures of one size drawn together. By default as many as fit into a quarter of the memory, "
            "at most 64, on a CPU at most 8 small ones.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME",
            help="A file (bird.png), a folder (outputs/, the default), or a pattern with {prompt} {seed} {index} "
            "{number} {width} {height}. Nothing is overwritten: a name that is taken gets _1.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Save each level beside the picture: NAME_level0.png.", rich_help_panel=_WHERE),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be drawn; write nothing.", rich_help_panel=_WHERE)
    ] = False,
    as_json: console.JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and errors.")] = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Draw pictures from prompts.

    The same command makes the same bytes.
    Picture K of --num-images starts from noise of its own, drawn from the seed and K alone.
    Prints the names of the files on standard output.

    [bold]Examples[/bold]

      physformer generate "a bird in a cage" --res 720p --seed 7

      physformer generate "a red car on a city street" -n 4 -W 1000 -H 333 -o "cars/{seed}-{index}.png"

      physformer generate --prompt-file prompts.txt --seed 1-3 --output sheet/

      physformer generate "a bird in a cage" --lora runs/mine:0.8

      physformer generate --from outputs/a-bird-in-a-cage-7.png -o again.png
    """
    from physformer_core.project import recorded_run

    options = Options(
        prompt=prompt,
        prompt_file=prompt_file,
        source=source,
        negative_prompt=negative_prompt,
        seed=seed or None,
        num_images=num_images,
        width=width,
        height=height,
        res=res,
        aspect=aspect,
        steps=steps,
        guidance=guidance,
        guidance_interval=guidance_interval,
        detail=detail,
        solver=solver,
        batch_size=batch_size,
        checkpoint=checkpoint,
        lora=lora or None,
        dtype=dtype,
        device=device,
        compile=compile,
        output=output,
        preview=preview,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
    check_combinations(options)
    record = not (no_record or dry_run)
    say = (lambda _line: None) if quiet else console.say
    with recorded_run("generate", record=record, notify=say) as run:
        plan = make_plan(options, run)
        for bad in plan.bad_lines:
            console.error(f"{options.prompt_file}, {bad}")
        if dry_run:
            _show(plan, options)
        elif plan.pictures:
            _draw_all(plan, options, run)
        elif as_json:
            _print_result(plan, run, [])
        if plan.bad_lines:
            run.fail(f"{len(plan.bad_lines)} bad lines in {options.prompt_file}, the first: {plan.bad_lines[0]}")
            raise typer.Exit(1)


def _draw_all(plan: Plan, options: Options, run: RunRecorder) -> None:
    """Loads the network, draws batch after batch, and tells what was written, to the last file before a stop."""
    from physformer_core.checkpoints import load_pipeline
    from physformer_core.model.attention import kernels_missed

    if not options.quiet and (reason := kernels_missed(plan.device, plan.dtype)) is not None:
        kind = "Triton" if plan.device.type == "cuda" else "C"
        console.warn(f"kernels in {kind} do not run, so this takes up to twice as long: {reason}")
    written: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        with _progress(plan, options.quiet) as shown:
            pipeline = load_pipeline(
                plan.checkpoint,
                device=plan.device,
                dtype=plan.dtype,
                compile=plan.circumstances.compiled,
                adapters=plan.adapters,
            )
            for numbers in plan.batches:
                shown.begin(numbers)
                _draw_batch(plan, numbers, pipeline, options, run, shown, written)
    except BaseException:
        if not options.as_json:
            _print_names(written)
        if written and not options.quiet:
            console.say(f"{len(written)} of {len(plan.kept)} pictures were finished and are kept")
        raise
    if options.as_json:
        _print_result(plan, run, written)
    else:
        _print_names(written)
    if not options.quiet:
        seconds = console.human_time(time.monotonic() - started)
        console.say(f"{_count(written, 'picture')} in {seconds}")


def _draw_batch(
    plan: Plan,
    numbers: list[int],
    pipeline: PhysFormerPipeline,
    options: Options,
    run: RunRecorder,
    shown: _Shown,
    written: list[dict[str, Any]],
) -> None:
    from physformer_core.drawing import draw_batch, preview_images, preview_name, write_picture
    from physformer_core.files import next_free_name

    batch = plan.batch(numbers)
    wished = {number: plan.pictures[number].wished for number in numbers if number in plan.kept}
    if options.preview:  # previews carry the picture's name, so it must be known now
        wished = {number: next_free_name(name) for number, name in wished.items()}

    def metadata(number: int, level: int | None = None) -> Any:
        return plan.circumstances.metadata(batch, numbers.index(number), plan.steps(number), level)

    def on_level(event: StepEvent) -> None:
        if not options.preview or event.level == event.levels - 1:
            return
        images = preview_images(pipeline, event)
        for number, name in wished.items():
            image = images[numbers.index(number)]
            facts = metadata(number, event.level)
            with held_back():
                path, sha256 = write_picture(preview_name(name, event.level), image, facts)
                run.add_output(path, sha256=sha256)

    images = draw_batch(pipeline, batch, on_step=shown.step, on_level=on_level)
    for number, name in wished.items():
        facts = metadata(number)
        line = plan.pictures[number].line
        with held_back():  # a picture that is there is told of, whenever the command is stopped
            path, sha256 = write_picture(name, images[numbers.index(number)], facts, claimed=options.preview)
            run.add_output(path, sha256=sha256)
            written.append(
                {"file": str(path), "sha256": sha256, **({"line": line} if line else {}), "metadata": facts.as_dict()}
            )


def _show(plan: Plan, options: Options) -> None:
    """Says what would be drawn."""
    from physformer_core.batching import Planner
    from physformer_core.files import next_free_name

    planner = Planner(plan.checkpoint)
    of_batch = {number: place for place, numbers in enumerate(plan.batches, start=1) for number in numbers}
    rows = []
    taken: set[Path] = set()
    for number in sorted(plan.kept):
        picture = plan.pictures[number]
        taken.add(name := next_free_name(picture.wished, claim=False, taken=taken))
        levels = [
            {
                "width": level.size.width,
                "height": level.size.height,
                "steps": steps,
                "evaluations": sum(level.evaluations),
            }
            for level, steps in zip(plan.levels[number], plan.steps(number), strict=True)
        ]
        rows.append(
            {
                "file": str(name),
                **{key: value for key, value in dataclasses.asdict(picture.request).items() if key != "steps"},
                "levels": levels,
                "batch": of_batch[number],
            }
        )
    peak = max(
        (len(numbers) * planner.picture_bytes(*_size(plan.batch(numbers)[0])) for numbers in plan.batches), default=0
    )
    if options.as_json:
        bad = [{"line": one.line, "message": one.message} for one in plan.bad_lines]
        console.print_json(
            {
                "pictures": rows,
                "checkpoint": {"folder": str(plan.checkpoint.folder), "sha256": plan.checkpoint.sha256},
                "loras": list(plan.circumstances.loras),
                "device": plan.circumstances.device,
                "dtype": plan.circumstances.dtype,
                "batch_bytes": peak,
                "bad_lines": bad,
            }
        )
        return
    console.print_table(
        ("SIZE", "SEED", "INDEX", "BATCH", "STEPS", "FILE"),
        [
            (
                f"{row['width']}x{row['height']}",
                str(row["seed"]),
                str(row["index"]),
                str(row["batch"]),
                ",".join(str(level["steps"]) for level in row["levels"]),
                row["file"],
            )
            for row in rows
        ],
    )
    if not options.quiet:
        where = f"{plan.circumstances.device} in {plan.circumstances.dtype}"
        console.say(
            f"would draw {_count(rows, 'picture')} in {_count(plan.batches, 'batch')} on {where}, "
            f"with up to {console.human_size(peak)} for a batch; nothing was written"
        )


class _Shown:
    """The progress of all batches together, weighted by what levels cost: tokens times evaluations.

    Args:
        plan: The plan.
        task: The bar, or None to show nothing.
    """

    def __init__(self, plan: Plan, task: console.ProgressTask | None) -> None:
        self._plan, self._task = plan, task
        self._numbers: list[int] = []
        self._before = 0
        self._finished = 0

    def begin(self, numbers: list[int]) -> None:
        """The batch of these pictures begins; what went before is done."""
        self._before += self._work(self._numbers)
        self._finished += len(self._numbers)
        self._numbers = numbers
        if self._task is not None:
            self._task.describe("reading the prompts")
            self._task.update(_thousands(self._before), _thousands(self._plan.work))

    def step(self, event: StepEvent) -> None:
        """A step is done."""
        if self._task is None:
            return
        levels = self._plan.levels[self._numbers[0]]
        done = sum(level.work for level in levels[: event.level])
        level = levels[event.level]
        done += min(level.work, level.tokens * sum(level.evaluations[: event.step]))
        first, last, total = self._finished + 1, self._finished + len(self._numbers), len(self._plan.pictures)
        # The adaptive solver takes as many as it needs.
        of_steps = f"/{event.steps}" if event.step <= event.steps else ""
        which = f"picture {first}" if first == last else f"pictures {first}-{last}"
        self._task.describe(f"{which} of {total}, level {event.level + 1}/{event.levels}, step {event.step}{of_steps}")
        self._task.update(_thousands(self._before + done * len(self._numbers)))

    def _work(self, numbers: list[int]) -> int:
        return sum(level.work for number in numbers for level in self._plan.levels[number])


@contextlib.contextmanager
def _progress(plan: Plan, quiet: bool) -> Iterator[_Shown]:
    if quiet:
        yield _Shown(plan, None)
        return
    with console.progress() as add:
        yield _Shown(plan, add("loading the model", None, unit="k tokens"))


def _print_result(plan: Plan, run: RunRecorder, written: list[dict[str, Any]]) -> None:
    bad = [{"line": one.line, "message": one.message} for one in plan.bad_lines]
    console.print_json({"run": run.id, "pictures": written, "bad_lines": bad})


def _print_names(written: list[dict[str, Any]]) -> None:
    for one in written:
        typer.echo(one["file"])


def _count(things: Sized, name: str) -> str:
    plural = name + ("es" if name.endswith("ch") else "s")
    return f"{len(things)} {name if len(things) == 1 else plural}"


def _thousands(work: int) -> int:
    return -(-work // 1000)


def _size(request: PictureRequest) -> tuple[int, int]:
    return request.width, request.height
