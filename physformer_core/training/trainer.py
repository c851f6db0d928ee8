"""The training loop: any step can be the last one, and a resumed run goes on as if it had not stopped.

Everything random at step s (examples, crops, captions, times, noise) is a function of (seed, s), so the state of a
run is its step, its weights, their average and the optimizer's state. There is no loader position to lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError

from physformer_core.config import RunConfig
from physformer_core.data.loader import Batch, BatchStream, ShardSet
from physformer_core.errors import CheckpointError, ConfigError, PhysFormerError
from physformer_core.files import output_error
from physformer_core.hardware import has_fast_bfloat16, resolve_device, resolve_dtype
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.training.checkpoint import (
    list_checkpoints,
    load_training_state,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
)
from physformer_core.training.ema import WeightAverage
from physformer_core.training.objective import FlowObjective
from physformer_core.training.optimizer import Optimizer, schedule

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

MAX_BAD_STEPS = 10
"""Steps in a row with a non-finite loss or gradient after which training stops."""


@dataclass(frozen=True)
class StepReport:
    """What one log interval did.

    Args:
        step: Steps done.
        total: Steps of the run.
        losses: Mean normalised velocity loss per kind of batch ("base", "crop") over the interval; validation
            losses are named "validation_base" and "validation_crop".
        examples_per_second: Rate over the interval.
        wait_fraction: Share of the time spent waiting for data.
        learning_rate: AdamW's, at the last step.
        gradient_norm: Mean over the interval's finite ones, before clipping; None if none was.
        skipped: Steps skipped so far because loss or gradients were not finite.
    """

    step: int
    total: int
    losses: dict[str, float]
    examples_per_second: float
    wait_fraction: float
    learning_rate: float
    gradient_norm: float | None
    skipped: int


class TrainingDiverged(PhysFormerError):
    """Loss or gradients were not finite for `MAX_BAD_STEPS` steps in a row."""


def model_arguments(config: RunConfig, shards: ShardSet) -> dict[str, Any]:
    """Arguments of the network: text widths come from the data, for which the encoder was chosen."""
    return config.model | {"text_dim": shards.hidden_size, "pooled_dim": shards.pooled_size}


def transformer_folder(checkpoint: Path) -> Path:
    """The transformer's folder of a checkpoint or pipeline; the path itself if it has none below it."""
    return checkpoint / "transformer" if (checkpoint / "transformer").is_dir() else checkpoint


class Trainer:
    """Trains one model on one preprocessed set into one folder.

    Args:
        config: Model, flow and training configuration.
        data_dir: A set written by ``data preprocess``.
        output_dir: Where checkpoints and ``log.jsonl`` go.
        device: Device name.
        init_from: A checkpoint, or its transformer folder, whose averaged weights the run starts from.
        on_step: Called with the number of steps done, after each.
        on_report: Called with each `StepReport`.

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
    ) -> None:
        self.config, self.output_dir = config, Path(output_dir)
        self.on_step, self.on_report = on_step, on_report
        train = config.training
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(train.dtype, self.device)
        self.shards = ShardSet(data_dir)
        torch.manual_seed(train.seed)
        self.model = self._build_model(init_from).to(self.device)
        self.ema = WeightAverage(self.model, train.ema_decay)
        self.optimizer = Optimizer(
            self.model,
            name=train.optimizer,
            lr=train.lr,
            muon_lr=train.muon_lr,
            weight_decay=train.weight_decay,
            betas=(train.beta1, train.beta2),
            muon_dtype=torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32,
        )
        base_density, fine_density = config.flow.densities()
        self.objective = FlowObjective(
            path=config.flow.flow_path(),
            pyramid=config.flow.pyramid(self.model.config.patch_size),
            base_density=base_density,
            fine_density=fine_density,
            prompt_dropout=train.prompt_dropout,
        )
        self.pipeline = PhysFormerPipeline(
            self.model,
            text_encoder_name=self.shards.encoder["name"],
            flow=dataclasses.asdict(config.flow),
            prompt_tokens=self.shards.max_tokens,
        )
        self.step = 0
        self.skipped = 0
        self._bad_in_a_row = 0
        self._stop = False

    def _build_model(self, init_from: Path | None) -> PhysFormerTransformer2DModel:
        arguments = model_arguments(self.config, self.shards)
        if init_from is None:
            return PhysFormerTransformer2DModel(**arguments)
        folder = transformer_folder(init_from)
        if not folder.is_dir():  # else the name would be looked for on the hub
            raise CheckpointError(f"cannot start from '{init_from}': there is no such folder")
        try:
            model, loading = PhysFormerTransformer2DModel.from_pretrained(
                folder, torch_dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot start from '{init_from}': {str(error).splitlines()[0]}",
                hint="name a checkpoint, or the transformer folder in it",
            ) from error
        # diffusers draws missing weights at random and says so in a log line.
        if wrong := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
            raise CheckpointError(
                f"'{init_from}' holds other weights than its configuration describes: {wrong[0]}",
                hint="copy the checkpoint again",
            )
        for key, value in arguments.items():
            if model.config[key] != value:
                raise ConfigError(
                    f"'{init_from}' has {key} {model.config[key]}, this run {value}",
                    hint="the text encoder of the data must be the same"
                    if key in ("text_dim", "pooled_dim")
                    else "start with the preset that it was trained with",
                )
        return model

    @property
    def checkpoint_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def _log_path(self) -> Path:
        return self.output_dir / "log.jsonl"

    def start_afresh(self) -> Path | None:
        """Sets an earlier run in the output folder aside, checkpoints and log, and returns where they are now."""
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
        if source == "auto":
            found = list_checkpoints(self.checkpoint_dir)
            if not found:
                return None
            source = found[-1]
        source = newest_checkpoint(Path(source))
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
        if state.metadata["config"]["model"] != self.config.to_dict()["model"]:
            raise CheckpointError(f"'{source}' has another model configuration", hint="resume with the same preset")
        state.restore(self.model, self.optimizer, self.ema)
        self.step, self.skipped = state.step, int(state.metadata["skipped"])
        set_aside(self.checkpoint_dir, self.step)
        return source

    def request_stop(self) -> None:
        """Ends `run` after the step in progress, with a checkpoint. Safe to call from a signal handler."""
        self._stop = True

    def run(self) -> bool:
        """Trains to the configured number of steps.

        Returns:
            True if they were all done, False if stopped before.

        Raises:
            TrainingDiverged: After `MAX_BAD_STEPS` non-finite steps in a row.
            OutputError: If a checkpoint or the log cannot be written; the last whole checkpoint stays.
        """
        train = self.config.training
        if train.compile:
            torch._dynamo.config.recompile_limit = 64
            for block in self.model.blocks:
                block.compile(dynamic=False)
        stream = BatchStream(
            self.shards,
            seed=train.seed,
            batch_size=train.batch_size,
            crop_fraction=train.crop_fraction,
            crop_size=train.crop_size,
        )
        interval = _Interval()
        batches = stream.iterate(start_step=self.step)
        with contextlib.closing(batches), _open_log(self._log_path) as log:
            while self.step < train.steps and not self._stop:
                asked = time.perf_counter()
                batch = next(batches)
                interval.waited += time.perf_counter() - asked
                self._train_step(batch, interval)
                self.step += 1
                last = self.step == train.steps
                validation: dict[str, float] = {}
                if last or self.step % train.validate_every == 0:
                    validation = self.validate()
                if last or validation or self.step % train.log_every == 0:
                    report = interval.report(self, validation)
                    log.write({"time": time.time(), **vars(report)})
                    if self.on_report is not None:
                        self.on_report(report)
                    interval = _Interval()
                if self.on_step is not None:
                    self.on_step(self.step)
                if last or self.step % train.checkpoint_every == 0:
                    self.save()
        if self._stop and self.step % train.checkpoint_every and self.step < train.steps:
            self.save()
        return self.step == train.steps

    def _train_step(self, batch: Batch, interval: _Interval) -> None:
        train = self.config.training
        # Offset by one, so that training noise and validation noise (step -1) never coincide.
        generator = torch.Generator().manual_seed(_step_seed(train.seed, self.step))
        with self._autocast():
            losses = self.objective(self.model, batch.to(self.device), generator)
        losses.mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        if not torch.isfinite(norm):
            self.skipped += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= MAX_BAD_STEPS:
                saved = list_checkpoints(self.checkpoint_dir)
                raise TrainingDiverged(
                    f"loss or gradients were not finite for {MAX_BAD_STEPS} steps in a row, up to step {self.step} "
                    f"(examples {batch.indices[:4].tolist()} ...)",
                    hint=f"resume from {saved[-1] if saved else 'the start'} with a lower learning rate",
                )
        else:
            self._bad_in_a_row = 0
            factor = schedule(self.step, train.steps, warmup_fraction=train.warmup_fraction)
            self.optimizer.step(factor)
            self.ema.update(self.model, self.step)
        self.optimizer.zero_grad()
        interval.add(batch.kind, losses.mean.detach(), norm, batch.pixels_bchw.shape[0])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

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
                stream = BatchStream(
                    self.shards,
                    seed=train.seed,
                    batch_size=train.batch_size,
                    crop_fraction=fraction,
                    crop_size=train.crop_size,
                    split="validation",
                )
                total = 0.0
                for index in range(train.validation_batches):
                    generator = torch.Generator().manual_seed(_step_seed(train.seed, -1 - index))
                    with self._autocast():
                        losses = self.objective(self.model, stream.batch(index).to(self.device), generator)
                    total += losses.mean.item()
                results[f"validation_{kind}"] = total / train.validation_batches
        finally:
            self.ema.swap_out(self.model)
        return results

    def save(self) -> Path:
        """Writes a checkpoint of the present step."""
        train = self.config.training
        metadata = {
            "config": self.config.to_dict(),
            "data_key": self.shards.manifest["key"],
            "text_encoder": self.shards.manifest["captions"]["encoder"],
            "skipped": self.skipped,
        }
        return save_checkpoint(
            self.checkpoint_dir,
            self.step,
            self.pipeline,
            self.optimizer,
            self.ema,
            metadata,
            keep_last=train.keep_last,
            keep_every=train.keep_every,
        )


class _Log:
    """Appends JSON lines; each is whole on the disk's cache before the next step begins."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise output_error(self._path, error) from error


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[_Log]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield _Log(path, file)
    finally:
        # Closing tries once more to write what could not be written, and would hide the first fault.
        with contextlib.suppress(OSError):
            file.close()


class _Interval:
    """Sums between two log records. Losses stay tensors until then, so that no step waits for the device."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.examples = 0
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.norms: list[torch.Tensor] = []

    def add(self, kind: str, loss: torch.Tensor, norm: torch.Tensor, examples: int) -> None:
        self.losses.setdefault(kind, []).append(loss)
        self.norms.append(norm)
        self.examples += examples

    def report(self, trainer: Trainer, validation: dict[str, float]) -> StepReport:
        means = {kind: torch.stack(values).mean().item() for kind, values in self.losses.items()}
        elapsed = time.perf_counter() - self.started
        norms = torch.stack(self.norms)
        finite = norms[torch.isfinite(norms)]
        train = trainer.config.training
        return StepReport(
            step=trainer.step,
            total=train.steps,
            losses={kind: value for kind, value in (means | validation).items() if math.isfinite(value)},
            examples_per_second=self.examples / elapsed,
            wait_fraction=self.waited / elapsed,
            learning_rate=train.lr * schedule(trainer.step, train.steps, warmup_fraction=train.warmup_fraction),
            gradient_norm=float(finite.mean()) if len(finite) else None,
            skipped=trainer.skipped,
        )


def _step_seed(seed: int, step: int) -> int:
    """Seed of all draws at one step; validation uses negative steps."""
    return (seed * 1_000_003 + 2 * step + (1 if step < 0 else 0)) % (2**63)
