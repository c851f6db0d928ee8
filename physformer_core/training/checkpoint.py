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
        shutil.rmtree(temporary, ignore_errors=True)
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
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise output_error(target, error) from error
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise output_error(target, OSError(28, str(error))) from error
    kept = list_checkpoints(folder)
    for path in kept[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(path)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name) and (p / "state.json").is_file())


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
