"""`physformer train`: trains a network on a preprocessed set, and can be stopped and gone on with at any step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.config import RunConfig
    from physformer_core.data.loader import ShardSet
    from physformer_core.project import RunRecorder
    from physformer_core.training.trainer import StepReport, Trainer

_SHOWN_NAMES = {"validation_base": "val base", "validation_crop": "val crop"}


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(train)


def train(
    preset: Annotated[
        str | None, typer.Option(help="Configuration to start from: debug, nano, s, b, l, xl.", show_default="nano")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Configuration file instead of a preset.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of a preprocessed set.", show_default="of physformer.toml")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run.", show_default="runs/PRESET")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Peak learning rate of Muon.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon (and AdamW) or adamw alone.")] = None,
    crop_fraction: Annotated[float | None, typer.Option(help="Share of steps on crops of finer levels.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of the averaged weights.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Seed of weights, noise and order.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, or auto: bf16 where the hardware has it.", show_default="auto")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best here")] = None,
    compile_blocks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the network first.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="How many of the newest checkpoints stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Checkpoints of every so many steps stay, too.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between records in log.jsonl.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|none|PATH",
            help="auto: go on from the newest checkpoint, if there is one. PATH: from that one. "
            "none: set an earlier run in the folder aside and start again.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Start a new run from a checkpoint's averaged weights.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and what it will cost, and stop.")
    ] = False,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Train a network on a preprocessed set.

    Options override the table train of physformer.toml, which overrides the preset or --config.

    Ctrl-C finishes the step and writes a checkpoint; --resume auto then goes on as if nothing had happened.

    [bold]Examples[/bold]

      physformer train --preset nano --data-dir data/nano --output runs/nano

      physformer train --data-dir data/nano --output runs/nano --resume auto

      physformer train --preset s --data-dir data/nano --batch-size 64 --dry-run > my.toml
    """
    from physformer_core.errors import ConfigError
    from physformer_core.project import read_settings, recorded_run

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config are both given", hint="a configuration file takes a preset's place")
    if init_from is not None and resume not in (None, "auto", "none"):
        raise ConfigError(
            "--init-from has no effect when a run is resumed from a checkpoint", hint="leave one of them out"
        )
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "muon_lr": muon_lr,
        "optimizer": optimizer,
        "crop_fraction": crop_fraction,
        "ema_decay": ema_decay,
        "seed": seed,
        "dtype": dtype,
        "compile": compile_blocks,
        "checkpoint_every": checkpoint_every,
        "keep_last": keep_last,
        "keep_every": keep_every,
        "validate_every": validate_every,
        "log_every": log_every,
    }

    def resolve(settings: Mapping[str, Any]) -> tuple[RunConfig, Path, Path]:
        name = str(config) if config is not None else preset or settings.get("preset", "nano")
        return (
            _resolve_config(name, options, settings),
            _resolve_data(data_dir, settings),
            output or Path(settings.get("output", f"runs/{Path(name).stem}")),
        )

    if dry_run:
        resolved, data, folder = resolve(read_settings("train"))
        _print_plan(resolved, data, folder, device or read_settings("train").get("device", "auto"), as_json=as_json)
        return

    with recorded_run("train", record=not no_record, notify=console.say) as run:
        resolved, data, folder = resolve(run.settings)
        run.config = {
            **resolved.to_dict(),
            "data_dir": data,
            "output": folder,
            "resume": resume,
            "init_from": init_from,
        }
        run.seeds = [resolved.training.seed]
        run.replay_with("--output", "-o", output=folder, folder=True)
        result = _train(run, resolved, data, folder, device or run.settings.get("device", "auto"), resume, init_from)
    if as_json:
        console.print_json(result)


def _train(
    run: RunRecorder,
    config: RunConfig,
    data: Path,
    folder: Path,
    device: str,
    resume: str | None,
    init_from: Path | None,
) -> dict[str, Any]:
    """Trains, and returns what there is to say about it."""
    import time

    from physformer_core.errors import OutputError
    from physformer_core.files import sha256_file
    from physformer_core.training.checkpoint import list_checkpoints, step_of
    from physformer_core.training.trainer import WEIGHTS_FILE, Trainer, transformer_folder

    earlier = list_checkpoints(folder / "checkpoints")
    if earlier and resume is None:
        raise OutputError(
            f"{folder} already holds a run, at step {step_of(earlier[-1])}",
            hint="--resume auto goes on with it; --resume none sets it aside and starts again",
        )
    trainer = Trainer(
        config, data, folder, device=device, init_from=None if earlier and resume == "auto" else init_from
    )
    run.device = _device_name(trainer)
    run.data_sha256 = sha256_file(data / "manifest.json")
    source = _start(trainer, resume)
    if source is None and init_from is not None:
        source = init_from
    elif source is not None:
        # What --resume auto finds another time would be another checkpoint.
        run.pin("--resume", str(source.absolute()))
    if source is not None:
        run.checkpoint_sha256 = sha256_file(transformer_folder(source) / WEIGHTS_FILE)
    _announce(trainer, data)

    began, first_step = time.monotonic(), trainer.step
    outcome, losses = _run_with_progress(trainer)
    saved = list_checkpoints(trainer.checkpoint_dir)
    if saved and step_of(saved[-1]) == trainer.step:
        run.add_output(transformer_folder(saved[-1]) / WEIGHTS_FILE)
    checkpoint = saved[-1] if saved else None
    if not outcome.finished:
        where = f"checkpoint {checkpoint}" if checkpoint is not None else "no step was finished"
        console.say(f"stopped at step {trainer.step} of {config.training.steps}, {where}")
        console.say("go on with the same command and --resume auto")
        outcome.raise_signal()
    if trainer.step == first_step:
        console.say(f"nothing to do: {folder} has all its {trainer.step} steps")
    else:
        took = console.human_time(time.monotonic() - began)
        console.say(f"wrote {checkpoint}: {trainer.step} steps, {took}")
    return {
        "output": str(folder),
        "checkpoint": str(checkpoint),
        "step": trainer.step,
        "steps_done": trainer.step - first_step,
        "skipped": trainer.skipped,
        "seconds": round(time.monotonic() - began, 3),
        "losses": losses,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "data_key": trainer.shards.key,
        "device": run.device,
    }


def _start(trainer: Trainer, resume: str | None) -> Path | None:
    """Puts the trainer where it is to begin, and returns the checkpoint that it goes on from, if any."""
    if resume in (None, "none"):
        aside = trainer.start_afresh()
        if aside is not None:
            console.say(f"the earlier run's checkpoints and log are in {aside} now")
        return None
    assert resume is not None
    source = trainer.resume(resume)
    if source is None:
        console.say(f"no checkpoint in {trainer.checkpoint_dir}: starting from step 0")
        return None
    console.say(f"going on from {source}")
    return source


def _announce(trainer: Trainer, data: Path) -> None:
    import torch

    from physformer_core.hardware import has_fast_bfloat16

    settings, shards = trainer.config.training, trainer.shards
    number = sum(p.numel() for p in trainer.model.parameters())
    dtype = str(trainer.dtype).removeprefix("torch.")
    console.say(
        f"training {_human_number(number)} parameters on {trainer.device} in {dtype}: {settings.steps} steps of "
        f"{settings.batch_size} from {shards.count('base')} pictures and {shards.count('crop')} crops"
    )
    if trainer.dtype == torch.bfloat16 and not has_fast_bfloat16(trainer.device):
        console.warn(f"bf16 is slower than fp32 here: {trainer.device} has no hardware for it")
    if not shards.count("base", "validation"):
        console.warn(f"{data} has no pictures held out: there will be no validation loss")


def _run_with_progress(trainer: Trainer) -> tuple[_Outcome, dict[str, float]]:
    losses: dict[str, float] = {}
    with console.progress() as add, _stop_gently(trainer) as outcome:
        waiting = "compiling, first step" if trainer.config.training.compile else "first step"
        task = add(waiting, trainer.config.training.steps, unit="steps", done=trainer.step)

        def on_report(report: StepReport) -> None:
            losses.update(report.losses)
            shown = [f"{_SHOWN_NAMES.get(kind, kind)} {value:.4f}" for kind, value in losses.items()]
            shown.append(f"{report.examples_per_second:.3g} examples/s")
            if report.skipped:
                shown.append(f"{report.skipped} skipped")
            task.describe(", ".join(shown))

        trainer.on_step, trainer.on_report = task.update, on_report
        outcome.finished = trainer.run()
    return outcome, losses


class _Outcome:
    """How the loop ended: whether it did all its steps, and what raises the signal that it was stopped by."""

    def __init__(self) -> None:
        self.finished = False
        self.raise_signal: Callable[[], None] = lambda: None


@contextlib.contextmanager
def _stop_gently(trainer: Trainer) -> Iterator[_Outcome]:
    """The first Ctrl-C or SIGTERM lets the step finish and a checkpoint be written; the second one stops at once."""
    outcome = _Outcome()
    previous: dict[int, Any] = {}

    def hand_on(number: int, frame: FrameType | None) -> None:
        before = previous[number]
        if callable(before):
            before(number, frame)  # raises: KeyboardInterrupt, or the command line's own for SIGTERM
        raise KeyboardInterrupt

    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            hand_on(number, frame)
        asked = True
        outcome.raise_signal = lambda: hand_on(number, None)
        trainer.request_stop()
        console.say("stopping after this step, with a checkpoint; once more to stop at once")

    for caught in (signal.SIGINT, signal.SIGTERM):
        previous[caught] = signal.signal(caught, on_signal)
    try:
        yield outcome
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resolve_config(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """The preset or file, with the project file's keys over it, and the options over those."""
    from physformer_core.config import load_preset

    values = {key: value if value is not None else settings.get(key) for key, value in options.items()}
    return load_preset(name).override("training", **values)


def _resolve_data(data_dir: Path | None, settings: Mapping[str, Any]) -> Path:
    from physformer_core.errors import ConfigError

    if data_dir is None and "data_dir" not in settings:
        raise ConfigError("no data to train on", hint="--data-dir FOLDER, a set made by physformer data preprocess")
    return data_dir if data_dir is not None else Path(settings["data_dir"])


def _print_plan(config: RunConfig, data: Path, folder: Path, device: str, *, as_json: bool) -> None:
    """The configuration, as TOML that --config takes, with what it costs in comments."""
    import tomli_w

    from physformer_core.data.loader import ShardSet
    from physformer_core.hardware import resolve_device, resolve_dtype
    from physformer_core.training.estimate import estimate_run

    chosen = resolve_device(device)
    dtype = str(resolve_dtype(config.training.dtype, chosen)).removeprefix("torch.")
    shards: ShardSet = ShardSet(data)
    estimate = estimate_run(config, shards)
    if as_json:
        console.print_json(
            {
                "config": config.to_dict(),
                "data_dir": str(data),
                "output": str(folder),
                "device": str(chosen),
                "dtype": dtype,
                **vars(estimate),
            }
        )
        return
    epochs = ", ".join(f"{kind} {steps:.0f}" for kind, steps in estimate.steps_per_epoch.items())
    memory = console.human_size(estimate.state_bytes), console.human_size(estimate.activation_bytes)
    figures = {
        "data": f"{data}: {shards.count('base')} pictures, {shards.count('crop')} crops",
        "output": f"{folder}",
        "device": f"{chosen}, {dtype}",
        "parameters": _human_number(estimate.parameters),
        "per step": f"{_human_number(estimate.flops_per_step)} floating-point operations",
        "in all": f"{_human_number(estimate.flops_per_step * config.training.steps)} of them, "
        f"{_human_number(config.training.steps * config.training.batch_size)} examples",
        "memory": f"{memory[0]} for weights and optimizer, at most {memory[1]} for activations",
        "steps per epoch": epochs,
    }
    width = max(map(len, figures))
    lines = [f"# {name:<{width}}  {value}" for name, value in figures.items()]
    typer.echo("\n".join(lines) + "\n\n" + tomli_w.dumps(config.to_dict()), nl=False)


def _human_number(count: float) -> str:
    for unit in ("", " thousand", " million", " billion", " trillion"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} thousand trillion"


def _device_name(trainer: Trainer) -> str:
    import torch

    if trainer.device.type == "cuda":
        return f"{trainer.device} {torch.cuda.get_device_name(trainer.device)}"
    return str(trainer.device)
