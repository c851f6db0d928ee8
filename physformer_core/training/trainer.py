"""The training loop: any step can be the last one, and a resumed run goes on as if it had not stopped.

Everything random at step s (examples, crops, captions, times, noise) is a function of (seed, s), so the state of a
run is its step, its weights, their average and the optimizer's state. There is no loader position to lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from physformer_core.config import FlowConfig, RunConfig, model_defaults
from physformer_core.data.loader import Batch, BatchStream, ShardSet, made_ahead
from physformer_core.data.resident import why_not_resident
from physformer_core.errors import CheckpointError, ConfigError, DeviceError, PhysFormerError
from physformer_core.hardware import keep_freed_memory, resolve_dtype, why_no_compiler
from physformer_core.model.attention import why_no_native
from physformer_core.model.fused import ops as fused
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.run_folder import CHECKPOINTS, step_folder
from physformer_core.training.adapter import check_resumed_adapter
from physformer_core.training.batches import run_batches
from physformer_core.training.checkpoint import (
    TrainingState,
    gathered,
    list_checkpoints,
    load_training_state,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
    training_tensors,
    write_averaged,
    write_gathered,
)
from physformer_core.training.distributed import Ranks, copy_from_first, resolve_parallel, shard
from physformer_core.training.ema import WeightAverage
from physformer_core.training.gradients import Gradients
from physformer_core.training.initial import first_network
from physformer_core.training.level_zero import check_level_zero
from physformer_core.training.objective import Draws, FlowObjective
from physformer_core.training.optimizer import Optimizer, muon_dtype, schedule
from physformer_core.training.recorded import RecordedPasses, resolve_recording, why_not_recorded
from physformer_core.training.report import Interval, RunLog, StepReport, open_log
from physformer_core.training.samples import SampleGrid
from physformer_core.training.update import MAX_BAD_STEPS, Updates
from physformer_core.training.watching import WorkMeter

_NAMED_EXAMPLES = 8

_DRAWING_THREADS = 8
"""Threads that draw noise ahead for a GPU. It is drawn on the CPU, so that it is the same everywhere, and one thread
draws the 14 million numbers of a thousand crops in some 100 ms: three times as long as such a step takes."""


class TrainingDiverged(PhysFormerError):
    """Loss or gradients were not finite for `MAX_BAD_STEPS` steps in a row."""


class Trainer:
    """Trains one model on one preprocessed set into one folder.

    Args:
        config: Model, flow and training configuration.
        data_dir: A set written by ``data preprocess``.
        output_dir: Where checkpoints and ``log.jsonl`` go.
        device: Device name.
        init_from: A checkpoint, or its transformer folder, whose averaged weights the run starts from. With
            ``lora_rank``, the checkpoint that is adapted; the shipped one if None.
        on_step: Called with the number of steps done, after each.
        on_report: Called with each `StepReport`.
        on_samples: Called with the step and the file of each sample grid.
        matrix_peak: Operations per second of the machine, for `StepReport.matrix_share`.
        ranks: This process among those that train the model together; all of them must make a trainer, and call the
            same methods in the same order. Alone if not given.

    Raises:
        ConfigError, DataError, CheckpointError, DeviceError: Before anything is written.
    """

    def __init__(
        self,
        config: RunConfig,
        data_dir: Path,
        output_dir: Path,
        *,
        device: str = "auto",
        init_from: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        on_report: Callable[[StepReport], None] | None = None,
        on_samples: Callable[[int, Path], None] | None = None,
        matrix_peak: float | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.output_dir = config, Path(output_dir)
        self.on_step, self.on_report, self.on_samples = on_step, on_report, on_samples
        self.matrix_peak = matrix_peak
        train = config.training
        self.ranks = ranks or Ranks()
        with self.ranks.together():
            self.parallel = resolve_parallel(train.parallel, self.ranks)
            self._check_shares()
            self.device = self.ranks.device(device)
            keep_freed_memory(self.device)
            self.dtype = resolve_dtype(train.dtype, self.device)
            self.compiled = _compiles(train.compile, self.device, self.dtype)
            self.recorded = resolve_recording(
                train.cuda_graphs,
                why_not_recorded(
                    self.device,
                    dtype=self.dtype,
                    parallel=self.parallel,
                    compiled=self.compiled,
                    gradient_checkpointing=train.gradient_checkpointing,
                ),
            )
            self.shards = ShardSet(data_dir)
            self.resident = why_not_resident(self.shards, self.device) is None
            self._threads = _DRAWING_THREADS if self.device.type == "cuda" else 1
            check_level_zero(config, self.shards)
            torch.manual_seed(train.seed)
            self.model, self.adapter, self.changes = first_network(
                config, self.shards, init_from if self.ranks.is_main or train.lora_rank else None
            )
            self.model.to(self.device)
        self._check_same_data()
        copy_from_first(self.model, self.ranks)
        if train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
            if self.parallel == "fsdp" and self.model.form.always_invertible:
                raise ConfigError(
                    f"residual '{self.model.config.residual}' is computed backwards, which FSDP2 cannot follow",
                    hint="leave --gradient-checkpointing out, or --parallel ddp",
                )
        if self.parallel == "fsdp":
            shard(self.model, self.device, self.ranks)
        self.gradients = Gradients(
            self.model,
            device=self.device,
            dtype=self.dtype,
            parallel=self.parallel,
            ranks=self.ranks,
            accumulate=train.accumulate,
            clip=train.grad_clip,
            recorded=RecordedPasses(self.model, self.device, always=train.cuda_graphs == "on")
            if self.recorded
            else None,
        )
        self.ema = WeightAverage(self.model, train.ema_decay)
        self.optimizer = Optimizer(
            self.model,
            name=train.optimizer,
            lr=train.lr,
            muon_lr=train.muon_lr,
            weight_decay=train.weight_decay,
            betas=(train.beta1, train.beta2),
            muon_dtype=muon_dtype(self.device),
        )
        base_density, fine_density = config.flow.densities()
        self.objective = FlowObjective(
            path=config.flow.flow_path(),
            pyramid=config.flow.pyramid(self.model.config.patch_size, self.model.config.base_patch_size),
            base_density=base_density,
            fine_density=fine_density,
            prompt_dropout=train.prompt_dropout,
            fine_huber=train.fine_huber,
            coarse_blur=train.coarse_blur,
        )
        self.pipeline = PhysFormerPipeline(
            self.model,
            text_encoder_name=self.shards.encoder["name"],
            codec_name=self.shards.field.codec,
            flow=dataclasses.asdict(config.flow),
            prompt_tokens=self.shards.max_tokens,
        )
        self.samples: SampleGrid | None = None
        if train.sample_every:
            self.samples = SampleGrid(self.pipeline, self.shards, train, self.output_dir / "samples")
        self.updates = Updates(
            self.optimizer,
            self.ema,
            self.ranks,
            ahead=self.device.type == "cuda" and self.ranks.alone and not self.gradients.scaler.is_enabled(),
            on_spoilt=self._give_up,
        )
        self.step = 0
        self._saved = 0  # the last step that this run has a checkpoint of
        self.later: Path | None = None  # where `resume` has put checkpoints of later steps
        self._stop = False
        self._stopped = False

    def _check_shares(self) -> None:
        train, world_size = self.config.training, self.ranks.world_size
        if train.batch_size // world_size < train.accumulate:
            raise ConfigError(
                f"a batch of {train.batch_size} cannot be divided over {world_size} processes and, on each, into "
                f"{train.accumulate} parts",
                hint="lower --accumulate, or raise --batch-size",
            )
        if train.lora_rank and self.parallel == "fsdp":
            raise ConfigError("an adapter is too small to be divided over processes", hint="--parallel ddp")

    def _check_same_data(self) -> None:
        """Refuses to train on different sets at once, as several machines with disks of their own might."""
        key, config = self.ranks.share_json([self.shards.key, self.config.to_dict()])
        with self.ranks.together():
            if not self.ranks.alone and config != self.config.to_dict():
                raise ConfigError(
                    f"rank {self.ranks.rank} has another configuration than the first one",
                    hint="start every machine with the same options, and physformer.toml with the same table train",
                )
            if key != self.shards.key:
                raise ConfigError(
                    f"rank {self.ranks.rank} has other data in {self.shards.folder} than the first one",
                    hint="copy one set to every machine",
                )

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / CHECKPOINTS

    @property
    def _log_path(self) -> Path:
        return self.output_dir / "log.jsonl"

    def start_afresh(self) -> Path | None:
        """Sets an earlier run in the output folder aside, checkpoints and log, and returns where they are now."""
        aside = None
        with self.ranks.together():
            if self.ranks.is_main:
                aside = set_aside(self.checkpoint_dir, after_step=-1)
                if aside is not None and self._log_path.exists():
                    self._log_path.rename(aside / self._log_path.name)
        return aside

    def resume(self, source: str | Path) -> Path | None:
        """Goes on from a checkpoint: its path, a run's folder (its newest), or ``auto`` for this run's newest.

        Checkpoints that this run has after that step are set aside.

        Returns:
            The checkpoint, or None if ``auto`` found none.

        Raises:
            CheckpointError: If it cannot be read or belongs to another model or other data.
            ConfigError: If it has more steps than the configuration asks for.
        """
        state: TrainingState | None = None
        with self.ranks.together():
            if self.ranks.is_main:
                path = self._checkpoint_of(source)
                state = None if path is None else self._readable(path)
        # The other ranks' machines need not have the checkpoint.
        shared = self.ranks.share_json(None if state is None else [str(path), state.step, state.metadata])
        if shared is None:
            return None
        found, step, metadata = Path(shared[0]), int(shared[1]), shared[2]
        state = state or TrainingState(step, metadata, {}, {})
        state.restore(self.model, self.optimizer, self.ema, self.ranks)
        if scale := metadata.get("loss_scale"):
            self.gradients.restore_scale(scale)
        self.step = step
        if found.resolve().parent == self.checkpoint_dir.resolve():  # else this run has none yet, and must have one
            self._saved = step
        self.updates.skipped = int(metadata["skipped"])
        with self.ranks.together():
            if self.ranks.is_main:
                self.later = set_aside(self.checkpoint_dir, self.step)
        return found

    def _checkpoint_of(self, source: str | Path) -> Path | None:
        """The checkpoint that `resume` means, if there is one."""
        if source != "auto":
            return newest_checkpoint(Path(source))
        found = list_checkpoints(self.checkpoint_dir)
        return found[-1] if found else None

    def _readable(self, source: Path) -> TrainingState:
        """Reads a checkpoint, and refuses what this run cannot go on from."""
        state = load_training_state(source)
        if state.step > self.config.training.steps:
            raise ConfigError(
                f"'{source}' has done {state.step} steps already, more than the {self.config.training.steps} asked for",
                hint="raise --steps",
            )
        if state.metadata["data_key"] != self.shards.manifest["key"]:
            raise CheckpointError(
                f"'{source}' was trained on other data", hint="use --init-from to start a new run from its weights"
            )
        check_resumed_adapter(str(source), state.metadata, self.config, self.adapter)
        before, now = state.metadata["config"], self.config.to_dict()
        if (frozen := before["training"].get("freeze", "")) != self.config.training.freeze:
            raise CheckpointError(
                f"'{source}' was trained with '{frozen}' frozen, this run has '{self.config.training.freeze}'",
                hint="use --init-from to start a new run from its weights",
            )
        # With defaults, so that a key that was added since has its own.
        for part, defaults in (("model", model_defaults()), ("flow", dataclasses.asdict(FlowConfig()))):
            before[part], now[part] = defaults | before[part], defaults | now[part]
        if other := [part for part in ("model", "flow") if before[part] != now[part]]:
            hint = "resume with the same preset"
            raise CheckpointError(f"'{source}' has another {other[0]} configuration", hint=hint)
        return state

    def request_stop(self) -> None:
        """Ends `run` after the step in progress, with a checkpoint. Safe to call from a signal handler."""
        self._stop = True

    @contextlib.contextmanager
    def _log(self) -> Iterator[RunLog | None]:
        """The run's log, on the first rank."""
        with contextlib.ExitStack() as held:
            log = None
            with self.ranks.together():
                if self.ranks.is_main:
                    log = held.enter_context(open_log(self._log_path))
            yield log

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop; all ask before every step, so that all end after the same one."""
        self._stopped = self.ranks.any(self._stop)
        return self._stopped

    def run(self) -> bool:
        """Trains to the configured number of steps.

        Returns:
            True if they were all done, False if stopped before.

        Raises:
            TrainingDiverged: After `MAX_BAD_STEPS` non-finite steps in a row.
            OutputError: If a checkpoint or the log cannot be written; the last whole checkpoint stays.
        """
        train = self.config.training
        if self.compiled:
            torch._dynamo.config.recompile_limit = 64
            # On CUDA a few graphs of any size: they are as fast there. On CPUs those of one size are faster.
            self.model.compile_repeated_blocks(dynamic=None if self.device.type == "cuda" else False)
        stream = run_batches(
            self.shards,
            train,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.device if self.resident else None,
        )
        interval = Interval()
        meter = None if self.matrix_peak is None else WorkMeter(self.model, train.optimizer, self.matrix_peak)
        batches = made_ahead(self._preparing(stream), self.step, ahead=2 * self._threads, threads=self._threads)
        with contextlib.closing(batches), self._log() as log:
            while self.step < train.steps and not self._stopping():
                asked = time.perf_counter()
                batch, draws = next(batches)
                interval.waited += time.perf_counter() - asked
                if meter is not None:
                    interval.operations += meter.step(batch)
                self._train_step(batch, draws, interval)
                self.step += 1
                last = self.step == train.steps
                validation: dict[str, float] = {}
                if last or self.step % train.validate_every == 0:
                    with interval.paused(), self._keeping_the_step("validation", "a smaller --batch-size"):
                        validation = self.validate()
                if last or validation or self.step % train.log_every == 0:
                    self.updates.settle()
                    report = interval.report(self, validation)
                    with self.ranks.together():
                        if log is not None:
                            log.write({"time": time.time(), **vars(report)})
                    if self.on_report is not None and self.ranks.is_main:
                        self.on_report(report)
                    interval = Interval()
                if self.samples is not None and self.step % train.sample_every == 0:
                    with interval.paused(), self._keeping_the_step("drawing samples", "--sample-every 0"):
                        self._draw_samples(self.samples)
                if self.on_step is not None:
                    self.on_step(self.step)
                if last or self.step % train.checkpoint_every == 0:
                    self.save()
        if self._stopped and self.step != self._saved:
            self.save()
        return self.step == train.steps

    @contextlib.contextmanager
    def _keeping_the_step(self, what: str, instead: str) -> Iterator[None]:
        """Where the GPU's memory is not enough for what comes after a step, the step is saved before the run ends."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.ranks.alone:
                self.save()
            raise DeviceError(
                f"{what} after step {self.step} does not fit into the memory of {self.device}",
                hint=f"{instead}; --resume auto goes on",
            ) from error

    def _preparing(self, stream: BatchStream) -> Callable[[int], tuple[Batch, Draws]]:
        """What makes a step's batch and draws, in whichever thread: both are functions of seed and step alone."""
        train = self.config.training
        repeated = stream.batch(0) if train.repeat_batch else None

        def prepare(step: int) -> tuple[Batch, Draws]:
            batch = stream.batch(step) if repeated is None else repeated
            # Offset by one, so that training noise and validation noise (step -1) never coincide.
            generator = torch.Generator().manual_seed(_step_seed(train.seed, step))
            draws = self.objective.draw(batch, generator)
            return batch, draws.to(self.device) if self.device.type == "cuda" else draws

        return prepare

    def _train_step(self, batch: Batch, draws: Draws, interval: Interval) -> None:
        train = self.config.training
        try:
            losses = self.gradients.compute(self.objective, batch, draws, self.optimizer)
        except torch.OutOfMemoryError as error:
            graphs = ", or --no-cuda-graphs" if self.recorded else ""
            raise DeviceError(
                f"step {self.step} does not fit into the memory of {self.device}",
                hint=f"--accumulate 2 or more, --gradient-checkpointing{graphs}; --resume auto goes on",
            ) from error
        factor = schedule(self.step, train.steps, warmup_fraction=train.warmup_fraction)
        self.updates.apply(self.step, factor, batch, losses)
        interval.note(losses.statistics)
        interval.add(batch, losses)

    def _give_up(self, step: int, batch: Batch) -> NoReturn:
        keys = [self.shards.example_key(batch.kind, index) for index in batch.indices[:_NAMED_EXAMPLES].tolist()]
        more = f" and {batch.total - len(keys)} more" if batch.total > len(keys) else ""
        saved = list_checkpoints(self.checkpoint_dir)
        with self.ranks.together():
            if self.ranks.is_main:
                raise TrainingDiverged(
                    f"loss or gradients were not finite for {MAX_BAD_STEPS} steps in a row, up to step {step} "
                    f"(examples {', '.join(keys)}{more}); the last good checkpoint is {saved[-1] if saved else 'none'}",
                    hint=f"--resume {saved[-1] if saved else 'none'} with a lower learning rate"
                    + (", or --bf16" if self.dtype == torch.float16 else ""),
                )
        raise AssertionError("the first rank has raised")

    def _draw_samples(self, grid: SampleGrid) -> None:
        # Every rank draws, as each may hold but a part of the network.
        try:
            pictures = grid.draw(self.ema, self.gradients.autocast())
        except DeviceError:  # spoilt weights have no pictures; whether they end the run is for the losses to say
            return
        with self.ranks.together():
            if self.ranks.is_main:
                path = grid.write(pictures, self.step)
                if self.on_samples is not None:
                    self.on_samples(self.step, path)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out examples, the same ones with the same noise every time."""
        train = self.config.training
        results: dict[str, float] = {}
        self.ema.swap_in(self.model)
        try:
            for kind, fraction in (("base", 0.0), ("crop", 1.0)):
                if not self.shards.count(kind, "validation"):
                    continue
                stream = run_batches(
                    self.shards,
                    train,
                    crop_fraction=fraction,
                    split="validation",
                    rank=self.ranks.rank,
                    world_size=self.ranks.world_size,
                )
                total = 0.0
                for index in range(train.validation_batches):
                    generator = torch.Generator().manual_seed(_step_seed(train.seed, -1 - index))
                    batch = stream.batch(index)
                    total += self.gradients.loss(self.objective, batch, self.objective.draw(batch, generator))
                results[f"validation_{kind}"] = total / train.validation_batches
        finally:
            self.ema.swap_out(self.model)
        return results

    def save(self) -> Path:
        """Writes a checkpoint of the present step."""
        self.updates.settle()
        train = self.config.training
        metadata = {
            "config": self.config.to_dict(),
            "data_key": self.shards.manifest["key"],
            "text_encoder": self.shards.manifest["captions"]["encoder"],
            "skipped": self.updates.skipped,
            "adapter": self.adapter,
            "loss_scale": self.gradients.scaler.state_dict(),
        }
        tensors = training_tensors(self.model, self.optimizer, self.ranks)
        write_average = functools.partial(write_averaged, self.pipeline, self.ema, metadata)
        if self.parallel == "fsdp":
            average = gathered(dict(self.model.named_parameters()) | self.ema.shadow, self.ranks)
            write_average = functools.partial(write_gathered, self.pipeline, average, metadata)
        with self.ranks.together():
            if self.ranks.is_main:
                save_checkpoint(
                    self.checkpoint_dir,
                    self.step,
                    write_average,
                    tensors,
                    metadata,
                    keep_last=train.keep_last,
                    keep_every=train.keep_every,
                )
        self._saved = self.step
        return self.checkpoint_dir / step_folder(self.step)


def _step_seed(seed: int, step: int) -> int:
    """Seed of all draws at one step; validation uses negative steps."""
    return (seed * 1_000_003 + 2 * step + (1 if step < 0 else 0)) % (2**63)


def _compiles(setting: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are compiled, by the configuration's word.

    Raises:
        DeviceError: They are to be, and cannot.
    """
    has_kernels = why_no_native(device, dtype) is None or (device.type == "cuda" and fused.why_not() is None)
    if setting == "auto" and (device.type == "mps" or has_kernels):
        return False
    missing = why_no_compiler(device) if setting != "off" else None
    if setting == "on" and missing is not None:
        raise DeviceError(f"the network cannot be compiled here: {missing}", hint="leave --compile out")
    return setting != "off" and missing is None
