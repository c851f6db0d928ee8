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
from physformer_cli.train_plan import human_number, print_plan
from physformer_cli.train_ranks import as_one_run, is_main, ranks, resume_after_restart
from physformer_cli.train_view import Watch, train_view

if TYPE_CHECKING:
    from physformer_core.config import RunConfig
    from physformer_core.project import RunRecorder
    from physformer_core.training.sinks import Sink
    from physformer_core.training.trainer import Trainer


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(as_one_run(train))


def train(
    preset: Annotated[
        str | None,
        typer.Option(
            help="Where to start from: debug, overfit, hparam_tuning, stability, full_scale, nano, s, b, l, xl.",
            show_default="nano",
        ),
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
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps: how often every whole picture is seen.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step, over all processes and parts.")] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(metavar="PARTS", help="Compute a step's batch in so many parts: less memory, the same step."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute blocks twice instead of keeping them: less memory, about a third more time.",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Peak learning rate of Muon.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon (and AdamW) or adamw alone.")] = None,
    crop_fraction: Annotated[float | None, typer.Option(help="Share of steps on crops of finer levels.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of the averaged weights.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Seed of weights, noise and order.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of products: fp32, bf16, fp16 (scales the loss), or auto: bf16 on GPUs that have "
            "it. Weights are float32 in all of them.",
            show_default="auto",
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Short for --dtype fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Short for --dtype bf16.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best here")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ddp|fsdp",
            help="Under torchrun: each process holds the whole network (ddp), or a part of it (fsdp).",
            show_default="ddp",
        ),
    ] = None,
    compile_blocks: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the network first.", show_default="where it pays"),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Record steps on a GPU and replay them: a small network is several times faster.",
            show_default="where it can",
        ),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="How many of the newest checkpoints stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Checkpoints of every so many steps stay, too.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between records in log.jsonl.")] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between sample grids in RUN/samples; 0 draws none.")
    ] = None,
    sample_prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What the grids show, a prompt a line; else captions of held-out pictures."),
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Also write event files to RUN/tensorboard.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="offline|online", help="Also write a run of Weights & Biases.")
    ] = None,
    wandb_project: Annotated[str | None, typer.Option(help="Its project.", show_default="physformer")] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            metavar="BEGINNINGS",
            help="Weights whose names begin so stay as they are: text_,null_,base. trains finer levels alone.",
            show_default="none",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(help="Train an adapter of this rank, and not the network, which --init-from names."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="The adapter acts with alpha / rank.", show_default="as the rank")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|none|PATH",
            help="auto: go on from the newest checkpoint, if there is one. PATH: from that one. "
            "none: set an earlier run in the folder aside and start again.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Start a new run from a checkpoint's averaged weights; with --lora-rank, else from the shipped one.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and what it will cost, and stop.")
    ] = False,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Train a network on a preprocessed set.

    Options override the table train of physformer.toml, which overrides the preset or --config.

    Several processes, on one machine or many, are started by torchrun. They share each step's batch, whose size stays
    --batch-size: the run is the same, up to rounding, however many there are. docs/training.md has a page on it.

    Ctrl-C finishes the step and writes a checkpoint; --resume auto then goes on as if nothing had happened.

    [bold]Examples[/bold]

      physformer train --preset nano --data-dir data/nano --output runs/nano

      physformer train --data-dir data/nano --output runs/nano --resume auto

      physformer train --preset s --data-dir data/nano --batch-size 64 --dry-run > my.toml

      physformer train --preset overfit --data-dir data/nano

      physformer train --data-dir data/nano --batch-size 512 --accumulate 4 --gradient-checkpointing --fp16

      torchrun --standalone --nproc-per-node 8 $(which physformer) train --data-dir data/nano --output runs/nano

      torchrun --standalone --nproc-per-node 8 --max-restarts 3 $(which physformer) train --preset xl --parallel fsdp

      physformer train --data-dir data/mine --lora-rank 8 --lora-alpha 16 --init-from runs/nano --output runs/mine
    """
    from physformer_core.errors import ConfigError
    from physformer_core.project import read_settings, recorded_run

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config are both given", hint="a configuration file takes a preset's place")
    if steps is not None and epochs is not None:
        raise ConfigError("--steps and --epochs both say how long to train", hint="leave one of them out")
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "gradient_checkpointing": gradient_checkpointing,
        "parallel": parallel,
        "lr": lr,
        "muon_lr": muon_lr,
        "optimizer": optimizer,
        "crop_fraction": crop_fraction,
        "ema_decay": ema_decay,
        "seed": seed,
        "dtype": _dtype_option(dtype, fp16=fp16, bf16=bf16),
        "compile": compile_blocks,
        "cuda_graphs": cuda_graphs,
        "checkpoint_every": checkpoint_every,
        "keep_last": keep_last,
        "keep_every": keep_every,
        "validate_every": validate_every,
        "log_every": log_every,
        "sample_every": sample_every,
        "freeze": freeze,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "sample_prompts": _read_prompts(sample_prompts),
    }

    def resolve(settings: Mapping[str, Any]) -> tuple[RunConfig, Path, Path]:
        name = str(config) if config is not None else preset or settings.get("preset", "nano")
        data = _resolve_data(data_dir, settings)
        resolved = _resolve_epochs(_resolve_config(name, options, settings), data, epochs)
        if resolved.training.lora_rank:
            from physformer_core.checkpoints import find_checkpoint
            from physformer_core.training.adapter import adapted_config

            resolved = adapted_config(resolved, find_checkpoint(init_from))
        elif init_from is not None and resume not in (None, "auto", "none"):
            raise ConfigError(
                "--init-from has no effect when a run is resumed from a checkpoint", hint="leave one of them out"
            )
        return resolved, data, output or Path(settings.get("output", f"runs/{Path(name).stem}"))

    if dry_run:
        if not is_main():
            return
        resolved, data, folder = resolve(read_settings("train"))
        print_plan(resolved, data, folder, device or read_settings("train").get("device", "auto"), as_json=as_json)
        return

    resume = resume_after_restart(resume)
    with recorded_run("train", record=not no_record and is_main(), notify=console.say) as run:
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
        watch = Watch(
            tensorboard=bool(run.settings.get("tensorboard", False) if tensorboard is None else tensorboard),
            wandb=wandb or run.settings.get("wandb"),
            project=wandb_project or run.settings.get("wandb_project"),
        )
        device = device or run.settings.get("device", "auto")
        with contextlib.ExitStack() as held:
            result = _train(run, resolved, data, folder, device, resume, init_from, watch, held)
        if as_json:
            console.print_json(result)
        if result.get("passed") is False:
            run.fail(f"loss at {result['loss_share']:.1%} of what it began with")
            raise typer.Exit(1)


def _train(
    run: RunRecorder,
    config: RunConfig,
    data: Path,
    folder: Path,
    device: str,
    resume: str | None,
    init_from: Path | None,
    watch: Watch,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    """Trains, and returns what there is to say about it. The run's folder stays locked as long as ``held`` is open."""
    import time

    from physformer_core.errors import OutputError
    from physformer_core.files import sha256_file, sole_writer
    from physformer_core.hardware import matrix_peak
    from physformer_core.run_folder import CHECKPOINTS
    from physformer_core.training.checkpoint import list_checkpoints, step_of, weights_file
    from physformer_core.training.trainer import Trainer

    watch.check()
    main = is_main()
    earlier = list_checkpoints(folder / CHECKPOINTS)
    if earlier and resume is None:
        raise OutputError(
            f"{folder} already holds a run, at step {step_of(earlier[-1])}",
            hint="--resume auto goes on with it; --resume none sets it aside and starts again",
        )
    # An adapter is trained beside the weights it began with, also when it is gone on with.
    start = init_from if config.training.lora_rank or not (earlier and resume == "auto") else None
    trainer = Trainer(config, data, folder, device=device, init_from=start, ranks=ranks())
    with trainer.ranks.together():
        if main:
            held.enter_context(sole_writer(folder))
    if main:
        trainer.matrix_peak = matrix_peak(trainer.device, trainer.dtype)
    run.device = _device_name(trainer)
    run.data_sha256 = sha256_file(data / "manifest.json")
    source = _start(trainer, resume)
    if not main:
        pass  # its machine need not have these files, and it records nothing
    elif source is not None:
        # What --resume auto finds another time would be another checkpoint.
        run.pin("--resume", str(source.absolute()), instead_of=() if config.training.lora_rank else ("--init-from",))
        run.checkpoint_sha256 = sha256_file(weights_file(source))
    elif trainer.adapter is not None:
        run.checkpoint_sha256 = trainer.adapter["base_sha256"]
    elif init_from is not None:
        run.checkpoint_sha256 = sha256_file(weights_file(init_from))
    if trainer.adapter is not None:
        run.config["adapts"] = trainer.adapter
    if trainer.changes:
        run.config["changes"] = trainer.changes
    _announce(trainer, data)

    began, first_step = time.monotonic(), trainer.step
    if not main:
        outcome = _run_silently(trainer)
        if not outcome.finished:
            outcome.raise_signal()
        return {}
    with watch.sinks(trainer, folder, resumed=source is not None) as sinks:
        outcome, losses = _run_with_progress(trainer, sinks)
    saved = list_checkpoints(trainer.checkpoint_dir)
    if saved and step_of(saved[-1]) == trainer.step:
        run.add_output(weights_file(saved[-1]))
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
        console.say(f"wrote {checkpoint}: {trainer.step - first_step} steps, {took}")
    return {
        **_judged(trainer, outcome.finished),
        "output": str(folder),
        "checkpoint": str(checkpoint),
        "step": trainer.step,
        "steps_done": trainer.step - first_step,
        "skipped": trainer.updates.skipped,
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
    if trainer.later is not None:
        console.say(f"later checkpoints are in {trainer.later} now")
    return source


def _announce(trainer: Trainer, data: Path) -> None:
    import torch

    from physformer_core.hardware import has_fast_bfloat16
    from physformer_core.model.attention import kernels_missed

    settings, shards = trainer.config.training, trainer.shards
    number = sum(p.numel() for p in trainer.model.parameters())
    dtype = str(trainer.dtype).removeprefix("torch.")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    what = f"an adapter of {human_number(trained)} beside " if trainer.adapter is not None else ""
    number -= trained if trainer.adapter is not None else 0
    console.say(
        f"training {what}{human_number(number)} parameters on {trainer.device} in {dtype}: {settings.steps} steps of "
        f"{settings.batch_size} from {shards.count('base')} pictures and {shards.count('crop')} crops"
        + ("" if trainer.ranks.alone else f", {trainer.ranks.world_size} processes ({trainer.parallel})")
    )
    for change in trainer.changes:
        console.say(f"not as in the checkpoint that it starts from: {change}")
    if shards.redrawn_by is not None:
        console.say(f"crops of level 1 start from level 0 as checkpoint {shards.redrawn_by[:12]} drew it (data redraw)")
    if (reason := kernels_missed(trainer.device, trainer.dtype)) is not None:
        kind = "Triton" if trainer.device.type == "cuda" else "C"
        console.warn(f"kernels in {kind} do not run, so training is several times slower: {reason}")
    if trainer.dtype == torch.bfloat16 and not has_fast_bfloat16(trainer.device):
        console.warn(f"bf16 is slower than fp32 here: {trainer.device} has no hardware for it")
    if trainer.dtype == torch.float16 and trainer.device.type == "cpu":
        console.warn("fp16 is slower than fp32 on a CPU, and less exact than bf16: it is for GPUs without bf16")
    if not shards.count("base", "validation"):
        console.warn(f"{data} has no pictures held out: there will be no validation loss")


def _run_with_progress(trainer: Trainer, sinks: list[Sink]) -> tuple[_Outcome, dict[str, float]]:
    from physformer_core.training.sinks import feed

    with train_view(trainer) as view, _stop_gently(trainer) as outcome:
        trainer.on_step = view.step
        trainer.on_report, trainer.on_samples = feed([view, *sinks])
        outcome.finished = trainer.run()
    return outcome, view.losses


def _run_silently(trainer: Trainer) -> _Outcome:
    """Trains as one of the ranks for which the first one speaks."""
    with _stop_gently(trainer) as outcome:
        outcome.finished = trainer.run()
    return outcome


def _judged(trainer: Trainer, finished: bool) -> dict[str, Any]:
    """What comes of the configuration's pass criterion, said aloud; nothing if it has none."""
    below = trainer.config.training.pass_below
    if not below or not finished:
        return {}
    from physformer_core.training.verdict import judge

    verdict = judge(trainer.output_dir / "log.jsonl", below)
    console.say(verdict.line)
    return {"passed": verdict.passed, "loss_share": verdict.share}


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
        if asked and trainer.ranks.alone:
            hand_on(number, frame)
        if asked:  # torchrun hands a terminal's Ctrl-C on a second time, and ends who takes longer than 30 s
            return
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


def _dtype_option(dtype: str | None, *, fp16: bool, bf16: bool) -> str | None:
    from physformer_core.errors import ConfigError

    named = [name for name, given in (("fp16", fp16), ("bf16", bf16), (dtype, dtype is not None)) if given]
    if len(named) > 1:
        raise ConfigError("--dtype, --fp16 and --bf16 say the same thing", hint="leave all but one of them out")
    return named[0] if named else None


def _resolve_config(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """The preset or file, with the project file's keys over it, and the options over those."""
    from physformer_core.config import load_preset
    from physformer_core.errors import ConfigError

    values = {key: value if value is not None else settings.get(key) for key, value in options.items()}
    config = load_preset(name).override("training", **values)
    if options["muon_lr"] is not None and config.training.optimizer == "adamw":
        raise ConfigError(
            "--muon-lr has no effect with AdamW", hint="--lr is its learning rate; --optimizer muon takes both"
        )
    return config


def _resolve_epochs(config: RunConfig, data: Path, epochs: float | None) -> RunConfig:
    if epochs is None:
        return config
    from physformer_core.data.loader import ShardSet
    from physformer_core.training.estimate import steps_of_epochs

    return config.override("training", steps=steps_of_epochs(config, ShardSet(data), epochs))


def _read_prompts(name: str | None) -> str | None:
    if name is None:
        return None
    from physformer_core.prompts import read_plain_prompts

    return "\n".join(read_plain_prompts(name))


def _resolve_data(data_dir: Path | None, settings: Mapping[str, Any]) -> Path:
    from physformer_core.errors import ConfigError

    if data_dir is None and "data_dir" not in settings:
        raise ConfigError("no data to train on", hint="--data-dir FOLDER, a set made by physformer data preprocess")
    return data_dir if data_dir is not None else Path(settings["data_dir"])


def _device_name(trainer: Trainer) -> str:
    import torch

    if trainer.device.type == "cuda":
        return f"{trainer.device} {torch.cuda.get_device_name(trainer.device)}"
    return str(trainer.device)
