"""Checkpoints: a folder that is whole or absent, with the averaged weights in diffusers' layout and the run's state.

step-00001000/
    model_index.json    makes the folder a pipeline: generate, eval and quantize read it as it is
    transformer/        averaged weights
    state.safetensors   training weights and optimizer state
    state.json          step, configuration, data

A run that trains an adapter alone has `adapter/` in the place of `model_index.json` and `transformer/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from physformer_core.errors import CheckpointError
from physformer_core.files import atomic_folder, output_error
from physformer_core.lora import ADAPTER_FILE, ADAPTER_FOLDER, PREFIX, adapter_bytes
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.run_folder import CHECKPOINTS, step_folder, step_of_folder, steps_in
from physformer_core.training.distributed import Ranks, divided_like, whole
from physformer_core.training.ema import WeightAverage
from physformer_core.training.optimizer import Optimizer

FORMAT = "physformer-checkpoint/1"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


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

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer, ema: WeightAverage, ranks: Ranks) -> None:
        """Puts everything back where it was, on every rank. Only the first one needs to have the tensors.

        Raises:
            CheckpointError: If weights are missing.
        """
        missing = _kept_parameters(model)

        def optimizer_state() -> Iterator[tuple[str, Tensor]]:
            for key, value in ranks.share_tensors(self.tensors):
                group, _, name = key.partition(".")
                if group == "optimizer":
                    yield name, value
                elif name in missing:
                    parameter = missing.pop(name)
                    parameter.copy_(divided_like(value, parameter))

        optimizer.load_state_tensors(optimizer_state())
        for name, value in ranks.share_tensors(self.average):
            if name in ema.shadow:  # of frozen weights there is no average but themselves
                ema.shadow[name].copy_(divided_like(value, ema.shadow[name]))
        if missing:
            raise CheckpointError(f"the checkpoint has no {min(missing)}", hint="copy it again")


def save_checkpoint(
    folder: Path,
    step: int,
    write_average: Callable[[Path], None],
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    keep_last: int,
    keep_every: int,
) -> Path:
    """Writes the checkpoint of ``step`` under ``folder`` and deletes the ones that are no longer kept.

    Args:
        folder: Where checkpoints are.
        step: Optimizer steps done.
        write_average: Writes what inference reads into a folder.
        tensors: From `training_tensors`, whole.
        metadata: For ``state.json``.
        keep_last, keep_every: How many of the last ones stay, and every how many-th step (0: only the last ones).

    Raises:
        OutputError: If the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    target = folder / step_folder(step)
    try:
        _sweep(folder)
    except OSError as error:
        raise output_error(target, error) from error
    with atomic_folder(target) as temporary:
        write_average(temporary)
        save_file(tensors, temporary / "state.safetensors")
        content = json.dumps({"format": FORMAT, "step": step, **metadata}, indent=2)
        (temporary / "state.json").write_text(content, encoding="utf-8")
        if target.exists():
            _remove(target)
    kept = list_checkpoints(folder)
    for path in kept[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            _remove(path)
    return target


def training_tensors(model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """Weights and optimizer state for `save_checkpoint`, whole on the first rank; all must call it."""
    tensors = {f"model.{name}": p.detach() for name, p in _kept_parameters(model).items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state_tensors().items()}
    return gathered(tensors, ranks)


def _kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a checkpoint keeps to be resumed from: all, or of an adapted network the adapter's alone, as the
    others are in the checkpoint that it adapts."""
    params = dict(model.named_parameters())
    return {name: param for name, param in params.items() if "lora_" in name} or params


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors put together on the first rank, in main memory if they were divided; empty on the others."""
    result = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if ranks.is_main:
            result[name] = (complete if complete is tensor else complete.cpu()).contiguous()
    return result


def write_averaged(pipeline: PhysFormerPipeline, ema: WeightAverage, metadata: dict[str, Any], folder: Path) -> None:
    """Writes what inference reads, with the averaged weights of the network that ``pipeline`` holds."""
    ema.swap_in(pipeline.transformer)
    try:
        _save_average(pipeline, folder, metadata)
    finally:
        ema.swap_out(pipeline.transformer)


def write_gathered(
    pipeline: PhysFormerPipeline, average: dict[str, Tensor], metadata: dict[str, Any], folder: Path
) -> None:
    """Writes what inference reads, of a network that is divided over ranks, from its gathered averaged weights."""
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel.from_config(pipeline.transformer.config)
    model.load_state_dict(average, assign=True)
    keys = ("text_encoder_name", "codec_name", "flow", "prompt_tokens")
    _save_average(PhysFormerPipeline(model, **{key: pipeline.config[key] for key in keys}), folder, metadata)


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


def weights_file(checkpoint: Path) -> Path:
    """The file of a checkpoint's averaged weights: the network's, or those of the adapter that was trained."""
    adapter = checkpoint / ADAPTER_FOLDER / ADAPTER_FILE
    return adapter if adapter.is_file() else transformer_folder(checkpoint) / WEIGHTS_FILE


def transformer_folder(checkpoint: Path) -> Path:
    """The transformer's folder of a checkpoint, a pipeline or a run's newest checkpoint; the path itself if it has none
    below it."""
    checkpoint = newest_checkpoint(checkpoint)
    return checkpoint / "transformer" if (checkpoint / "transformer").is_dir() else checkpoint


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first."""
    return steps_in(folder, holding="state.json")


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a run's folder."""
    found = list_checkpoints(path / CHECKPOINTS)
    return found[-1] if found else path


def step_of(path: Path) -> int:
    """The step a checkpoint folder was written at."""
    step = step_of_folder(path)
    if step is None:
        raise CheckpointError(f"'{path}' is not a training checkpoint", hint="its name should be step-NNNNNNNN")
    return step


def load_training_state(path: Path) -> TrainingState:
    """Reads a checkpoint to resume from.

    Raises:
        CheckpointError: If it is missing, incomplete, truncated or of another format.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint '{path}'", hint="name a run's folder, or a step-NNNNNNNN in it")
    try:
        metadata = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError("state.json holds no object")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"'{path}' has format {metadata.get('format')!r}", hint=f"expected {FORMAT}")
        if missing := {"step", "config", "data_key", "skipped"} - set(metadata):
            raise ValueError(f"state.json lacks {min(missing)}")
        tensors = load_file(path / "state.safetensors")
        average = _load_average(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"cannot read checkpoint '{path}' ({reason})", hint="resume from an earlier one with --resume PATH"
        ) from error
    return TrainingState(int(metadata["step"]), metadata, tensors, average)


def _save_average(pipeline: PhysFormerPipeline, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes what inference reads: the pipeline, or of a network that carries an adapter, that adapter alone."""
    if metadata.get("adapter") is None:
        pipeline.save_pretrained(folder, max_shard_size="100GB")
        return
    (folder / ADAPTER_FOLDER).mkdir()
    content = adapter_bytes(pipeline.transformer, metadata["adapter"])
    (folder / ADAPTER_FOLDER / ADAPTER_FILE).write_bytes(content)


def _load_average(path: Path) -> dict[str, Tensor]:
    """The averaged weights by parameter name."""
    file = weights_file(path)
    tensors = load_file(file)
    if file.name != ADAPTER_FILE:
        return tensors
    # PEFT puts the adapter's name into the names of parameters, and leaves it out of files.
    return {key.removeprefix(PREFIX).replace(".weight", ".default.weight"): value for key, value in tensors.items()}
