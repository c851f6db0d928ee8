"""Checkpoints: a folder that is whole or absent, with the averaged weights in diffusers' layout and the run's state.

step-00001000/
    model_index.json    makes the folder a pipeline: generate, eval and quantize read it as it is
    transformer/        averaged weights
    state.safetensors   training weights and optimizer state
    state.json          step, configuration, data
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from physformer_core.errors import CheckpointError
from physformer_core.files import output_error
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.training.ema import WeightAverage
from physformer_core.training.optimizer import Optimizer

FORMAT = "physformer-checkpoint/1"
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run starts from.

    Args:
        step: Optimizer steps done.
        metadata: The content of ``state.json``.
        tensors: The content of ``state.safetensors``.
        average: Averaged weights by parameter name.
    """

    step: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    average: dict[str, Tensor]

    def restore(self, model: nn.Module, optimizer: Optimizer, ema: WeightAverage) -> None:
        """Puts everything back where it was."""
        weights = {k.removeprefix("model."): v for k, v in self.tensors.items() if k.startswith("model.")}
        model.load_state_dict(weights)
        optimizer.load_state_tensors(
            {k.removeprefix("optimizer."): v for k, v in self.tensors.items() if k.startswith("optimizer.")}
        )
        for name, value in ema.shadow.items():
            value.copy_(self.average[name])


def save_checkpoint(
    folder: Path,
    step: int,
    pipeline: PhysFormerPipeline,
    optimizer: Optimizer,
    ema: WeightAverage,
    metadata: dict[str, Any],
    *,
    keep_last: int,
    keep_every: int,
) -> Path:
    """Writes the checkpoint of ``step`` under ``folder`` and deletes the ones that are no longer kept.

    ``pipeline`` holds the model that is trained; what it saves are the averaged weights.

    Raises:
        OutputError: If the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.partial"
    model = pipeline.transformer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        ema.swap_in(model)
        try:
            pipeline.save_pretrained(temporary, max_shard_size="100GB")
        finally:
            ema.swap_out(model)
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
        tensors |= {f"optimizer.{name}": t.contiguous() for name, t in optimizer.state_tensors().items()}
        save_file(tensors, temporary / "state.safetensors")
        content = json.dumps({"format": FORMAT, "step": step, **metadata}, indent=2)
        (temporary / "state.json").write_text(content, encoding="utf-8")
        for path in [p for p in temporary.rglob("*") if p.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            _remove(target)
        temporary.rename(target)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fault = error if isinstance(error, OSError) else _system_error(error)
        if fault is None:
            raise
        raise output_error(target, fault) from error
    except BaseException:  # Ctrl-C for the second time
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kept = list_checkpoints(folder)
    for path in kept[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            _remove(path)
    return target


def set_aside(folder: Path, after_step: int) -> Path | None:
    """Moves the checkpoints after a step out of the way of a run that starts again from there.

    Otherwise the newest checkpoint of the run would be one that it did not write.

    Returns:
        The folder they are in now, beside ``folder``, or None if there were none.
    """
    later = [path for path in list_checkpoints(folder) if step_of(path) > after_step]
    if not later:
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    try:
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
    except OSError as error:
        raise output_error(aside, error) from error
    return aside


def _remove(path: Path) -> None:
    """Deletes a checkpoint; killed in the middle, it leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sweep(folder: Path) -> None:
    """Deletes what a killed process left half-written or half-deleted."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: SafetensorError) -> OSError | None:
    """The operating system's error that safetensors tells of in words only: "... (os error 28)"."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match.group(1)), os.strerror(int(match.group(1)))) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name) and (p / "state.json").is_file())


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a run's folder."""
    found = list_checkpoints(path / "checkpoints")
    return found[-1] if found else path


def step_of(path: Path) -> int:
    """The step a checkpoint folder was written at."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"'{path}' is not a training checkpoint", hint="its name should be step-NNNNNNNN")
    return int(match.group(1))


def load_training_state(path: Path) -> TrainingState:
    """Reads a checkpoint to resume from.

    Raises:
        CheckpointError: If it is missing, incomplete, truncated or of another format.
    """
    try:
        metadata = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"'{path}' has format {metadata.get('format')!r}", hint=f"expected {FORMAT}")
        tensors = load_file(path / "state.safetensors")
        average = load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"cannot read checkpoint '{path}' ({reason})", hint="resume from an earlier one with --resume PATH"
        ) from error
    return TrainingState(int(metadata["step"]), metadata, tensors, average)
