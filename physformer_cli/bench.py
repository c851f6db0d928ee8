"""`physformer bench`: what attention, a network, a picture and a training step cost, and how the cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import bench_show, console

if TYPE_CHECKING:
    from physformer_core.benchmark.campaign import Campaign

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure time, memory, operations and their growth, beside other transformers in the same run.",
)

SIZES = "512x512,720p,1080p,4k"
PICTURES = "512x512,720p"

PresetOption = Annotated[
    str | None, typer.Option(help="Whose sizes are taken, with random weights.", show_default="nano")
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Measure this checkpoint, quantized ones too, instead of a preset.")
]
ResOption = Annotated[
    str | None,
    typer.Option(help="Picture sizes, separated by commas: names (720p, 4k) or WIDTHxHEIGHT.", show_default=SIZES),
]
TokensOption = Annotated[str | None, typer.Option(help="Numbers of tokens instead, 16:9, separated by commas.")]
BatchOption = Annotated[str, typer.Option(help="Pictures at once, separated by commas.")]
DtypeOption = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16; several are separated by commas.")]
BackendOption = Annotated[
    str, typer.Option(help="Our attention backend: auto, native, halo, dense, reference or, on CUDA, flex.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Timed runs of each case, after a warm-up.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
LimitOption = Annotated[
    int, typer.Option(min=0, help="Tokens above which dense attention is extrapolated from its fit, not run.")
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw time and memory over the size, on logarithmic axes.")
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Compare with an earlier report (--json > FILE); needs --max-regression."),
]
RegressionOption = Annotated[
    str | None,
    typer.Option(metavar="PERCENT", help="Exit with 3 if time or memory is worse than the baseline by more: 10%."),
]


def register(parent: typer.Typer) -> None:
    """Adds the command to the app."""
    parent.add_typer(app, name="bench")


@app.command("attention")
def attention(
    preset: PresetOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Take this checkpoint's sizes instead of a preset's, with random weights.")
    ] = None,
    res: ResOption = None,
    tokens: TokensOption = None,
    peers: Annotated[
        str, typer.Option(help="Beside ours: dense, sana, natten, flex, separated by commas, or all.")
    ] = "",
    batch: BatchOption = "1",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    repeats: RepeatsOption = 3,
    dense_limit: LimitOption = 33_000,
    device: DeviceOption = "auto",
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    max_regression: RegressionOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure one attention layer with its projections.

    [bold]Examples[/bold]

      physformer bench attention

      physformer bench attention --peers all --res 512x512,720p --plot attention.png
    """
    from physformer_core.benchmark.campaign import Campaign
    from physformer_core.benchmark.cases import ATTENTION_PEERS

    network = _network(preset, checkpoint)
    campaign = Campaign(
        what="attention",
        sizes=_sizes(res, tokens, network, checkpoint),
        peers=_names(peers, ATTENTION_PEERS),
        preset=network,
        checkpoint=checkpoint,
        backend=backend,
        batches=_numbers("--batch", batch),
        dtypes=_split(dtype),
        device=device,
        repeats=repeats,
        quadratic_limit=dense_limit,
    )
    with bench_show.session(
        "bench attention", campaign, plot=plot, baseline=baseline, limit=max_regression, no_record=no_record
    ) as show:
        show.finish(_measure(campaign), as_json=json_output)


@app.command("model")
def model(
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    res: ResOption = None,
    tokens: TokensOption = None,
    peers: Annotated[
        str,
        typer.Option(
            help="Beside ours: global (ours with dense attention), dense (PixArt), sana, separated by commas, or all."
        ),
    ] = "",
    batch: BatchOption = "1",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    repeats: RepeatsOption = 3,
    dense_limit: LimitOption = 33_000,
    device: DeviceOption = "auto",
    find_batch_size: Annotated[
        bool, typer.Option("--find-batch-size", help="Find the largest batch of the first size that fits into memory.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(help="With --find-batch-size: GB that a batch may need.", show_default="80 % of what is free"),
    ] = None,
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    max_regression: RegressionOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure one evaluation of the network.

    Every contender has a process of its own, so that its peak memory is its own; they run in turn. An exponent of 1 is
    linear: twice the pixels, twice the cost.

    [bold]Examples[/bold]

      physformer bench model

      physformer bench model --peers global,sana --res 512x512,720p,1080p,4k --plot growth.png

      physformer bench model --res 720p --find-batch-size --memory 4

      physformer bench model --res 512x512 --json > baseline.json

      physformer bench model --res 512x512 --baseline baseline.json --max-regression 10%
    """
    from physformer_core.benchmark.campaign import Campaign, largest_batch
    from physformer_core.benchmark.cases import MODEL_PEERS
    from physformer_core.errors import ConfigError

    if memory is not None and not find_batch_size:
        raise ConfigError("--memory has no effect without --find-batch-size", hint="add --find-batch-size")
    if memory is not None and not 0 < memory < float("inf"):
        raise ConfigError(f"--memory must be above 0, not {memory:g}", hint="--memory 8, in GB")
    network = _network(preset, checkpoint)
    campaign = Campaign(
        what="model",
        sizes=_sizes(res, tokens, network, checkpoint),
        peers=_names(peers, MODEL_PEERS),
        preset=network,
        checkpoint=checkpoint,
        backend=backend,
        batches=_numbers("--batch", batch),
        dtypes=_split(dtype),
        device=device,
        repeats=repeats,
        quadratic_limit=dense_limit,
    )
    if find_batch_size:
        # What has nothing to compare or to draw must not look as if it did.
        for option, given in (
            ("--peers", peers),
            ("--plot", plot),
            ("--baseline", baseline),
            ("--batch", batch != "1"),
            ("--repeats", repeats != 3),
            ("--dense-limit", dense_limit != 33_000),
            ("a second --dtype", len(campaign.dtypes) > 1),
        ):
            if given:
                raise ConfigError(f"{option} has no effect with --find-batch-size", hint=f"leave {option} out")
    with bench_show.session(
        "bench model", campaign, plot=plot, baseline=baseline, limit=max_regression, no_record=no_record
    ) as show:
        if find_batch_size:
            with console.progress() as add:
                task = add("finding the largest batch", unit="tries")

                def on_try(count: int) -> None:
                    task.describe(f"trying a batch of {count}")
                    task.advance()

                limit = None if memory is None else round(memory * 1e9)
                found = largest_batch(campaign, limit_bytes=limit, on_try=on_try)
            bench_show.show_batch(campaign, found, as_json=json_output)
            return
        show.finish(_measure(campaign), as_json=json_output)


@app.command("generate")
def generate(
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    res: Annotated[str, typer.Option(help="Picture sizes, separated by commas.")] = PICTURES,
    batch: BatchOption = "1",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    repeats: RepeatsOption = 3,
    device: DeviceOption = "auto",
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    max_regression: RegressionOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure a picture from prompt to pixels, with the default steps: text encoder, every level, decoding.

    [bold]Examples[/bold]

      physformer bench generate

      physformer bench generate --res 720p,4k --repeats 1
    """
    from physformer_core.benchmark.campaign import Campaign, sizes_from

    network = _network(preset, checkpoint)
    campaign = Campaign(
        what="generate",
        sizes=sizes_from(res=_split(res)),
        preset=network,
        checkpoint=checkpoint,
        backend=backend,
        batches=_numbers("--batch", batch),
        dtypes=_split(dtype),
        device=device,
        repeats=repeats,
    )
    with bench_show.session(
        "bench generate", campaign, plot=plot, baseline=baseline, limit=max_regression, no_record=no_record
    ) as show:
        show.finish(_measure(campaign), as_json=json_output)


@app.command("train")
def train(
    preset: Annotated[str, typer.Option(help="What is trained.")] = "nano",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A set from `physformer data preprocess`.", show_default="a small one, composed for it"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step.", show_default="preset")] = None,
    crop_size: Annotated[
        int | None, typer.Option(min=16, help="Side of crops in elements of the field.", show_default="preset")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 24,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each before: compiling, filling caches.")] = 12,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.", show_default="preset")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Whether ours is compiled.", show_default="preset")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs", help="Whether ours records its steps on a GPU.", show_default="preset"
        ),
    ] = None,
    device: DeviceOption = "auto",
    baseline: BaselineOption = None,
    max_regression: RegressionOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure our training step beside a plain eager trainer over diffusers' dense transformer (PixArt).

    Both have the same number of parameters and the same batches, and train by turns in one process.

    [bold]Examples[/bold]

      physformer bench train

      physformer bench train --crop-size 256 --batch-size 16

      physformer bench train --data-dir data/nano --steps 40 --json
    """
    options = {
        "batch_size": batch_size,
        "crop_size": crop_size,
        "dtype": dtype,
        "compile": compile,
        "cuda_graphs": cuda_graphs,
    }
    config = {"preset": preset, "data_dir": data_dir, "steps": steps, "warmup": warmup, "device": device, **options}
    with bench_show.session(
        "bench train", config, plot=None, baseline=baseline, limit=max_regression, no_record=no_record
    ) as show:
        report = _train(preset, data_dir, steps=steps, warmup=warmup, device=device, **options)
        show.finish(report, as_json=json_output)


@app.command("all")
def everything(
    preset: Annotated[str, typer.Option(help="Whose sizes are taken, with random weights.")] = "nano",
    res: Annotated[str, typer.Option(help="Sizes for attention, model and generate.")] = PICTURES,
    peers: Annotated[bool, typer.Option("--peers", help="Measure every peer that runs here as well.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A set from `physformer data preprocess`.", show_default="a small one, composed for it"),
    ] = None,
    repeats: RepeatsOption = 3,
    device: DeviceOption = "auto",
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    max_regression: RegressionOption = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Measure attention, model, generate and train, one after the other, into one report.

    [bold]Examples[/bold]

      physformer bench all --json > baseline.json

      physformer bench all --baseline baseline.json --max-regression 10%
    """
    from physformer_core.benchmark.campaign import Campaign
    from physformer_core.benchmark.cases import ATTENTION_PEERS, MODEL_PEERS
    from physformer_core.benchmark.report import merge_reports

    config = {"preset": preset, "res": res, "peers": peers, "data_dir": data_dir, "repeats": repeats, "device": device}
    with bench_show.session(
        "bench all", config, plot=plot, baseline=baseline, limit=max_regression, no_record=no_record
    ) as show:
        parts = []
        for what, others in (("attention", ATTENTION_PEERS), ("model", MODEL_PEERS), ("generate", ())):
            sizes = _sizes(res, None, preset, None, pixels=what == "generate")
            parts.append(
                _measure(
                    Campaign(
                        what=what,
                        sizes=sizes,
                        peers=others if peers else (),
                        preset=preset,
                        repeats=repeats,
                        device=device,
                    )
                )
            )
        parts.append(_train(preset, data_dir, steps=24, warmup=12, device=device))
        show.finish(merge_reports(parts), as_json=json_output)


def _measure(campaign: Campaign) -> dict[str, Any]:
    from physformer_core.benchmark.campaign import run_campaign

    with console.progress() as add:
        task = add(f"measuring {campaign.what}", total=campaign.runs(), unit="runs")

        def on_run(case: Any) -> None:
            task.describe(f"{case.contender}, {case.width}x{case.height}")
            task.advance()

        report = run_campaign(campaign, on_run=on_run)
        task.update(campaign.runs())
    return report


def _train(
    preset: str, data_dir: Path | None, *, steps: int, warmup: int, device: str, **options: Any
) -> dict[str, Any]:
    import contextlib
    import tempfile

    from physformer_core.benchmark.training import compose_data, measure_training
    from physformer_core.config import load_preset

    config = load_preset(preset).override("training", **options)
    with contextlib.ExitStack() as stack:
        if data_dir is None:
            console.say("composing a small set of scenes to train on")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="physformer-bench-"))
            data_dir = compose_data(Path(folder), config)
        add = stack.enter_context(console.progress())
        task = add("training by turns", total=steps + warmup, unit="steps")
        return measure_training(
            config, data_dir, preset=preset, steps=steps, warmup=warmup, device=device, on_step=task.update
        )


def _sizes(
    res: str | None, tokens: str | None, preset: str, checkpoint: Path | None, *, pixels: bool = False
) -> tuple[tuple[int, int], ...]:
    from physformer_core.benchmark.campaign import patch_size, sizes_from

    if tokens is not None:
        return sizes_from(res=() if res is None else _split(res), tokens=_numbers("--tokens", tokens))
    return sizes_from(res=_split(res or SIZES), patch=1 if pixels else patch_size(preset, checkpoint))


def _network(preset: str | None, checkpoint: Path | None) -> str:
    """The preset that is asked for."""
    from physformer_core.errors import ConfigError

    if preset is not None and checkpoint is not None:
        raise ConfigError("--preset has no effect beside --checkpoint", hint="leave one of them out")
    return preset or "nano"


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return known if text.strip() == "all" else _split(text)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from a comma list, rising."""
    from physformer_core.errors import ConfigError

    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option} '{text}' is not a list of whole numbers", hint=f"e.g. {option} 1,4") from None
