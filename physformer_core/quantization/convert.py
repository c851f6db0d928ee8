"""From a checkpoint to a smaller one: which layers, calibration, per-layer error, and the folder."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from physformer_core.checkpoints import Checkpoint, load_pipeline
from physformer_core.errors import ConfigError, OutputError
from physformer_core.files import atomic_folder
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.quantization.calibration import (
    ActivationSample,
    calibration_prompts,
    group_size,
    output_error,
    quantize_weight,
)
from physformer_core.quantization.storage import (
    DESCRIPTION_NAME,
    FORMAT,
    WEIGHTS_NAME,
    Bits,
    LayerScheme,
    QuantizedWeight,
    torchao_module,
)

Activations = Literal["float", "int8"]

KEPT: dict[Bits, tuple[str, ...]] = {
    8: ("*patch_embed.*", "*final_layer.proj_out", "*refiner.*"),
    4: ("*patch_embed.*", "*condition_embed.*", "*final_layer.proj_out", "*refiner.*"),
}
"""Layers that stay as they are, by bits: chosen by `physformer quantize --sensitivity` (docs/quantization.md); the
refiner's, as it is where level 0 leaves and has one weight in two hundred."""

LEAST_SAVING = 0.1
"""A file must become smaller by this share, or quantizing is refused."""

LEAST_WEIGHTS = 4096
"""Smaller layers are left alone: their scales and the kernels' overhead eat what they save."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How to quantize.

    Args:
        bits: 8 or 4.
        activations: ``float``: only weights are rounded. ``int8``: also every token's activations, as they come.
        group: Weights of a row that share a scale with 4 bits; layers whose rows it does not divide take the next
            smaller number that does.
        keep: Patterns of layers that stay as they are, for example ``blocks.*.modulation``; None takes `KEPT`.
        calibrate: Whether scales are searched on real activations. Without, a scale is the largest weight's.
        prompts: What is drawn to calibrate; None takes `CALIBRATION_PROMPTS`.
        seed: Of the calibration's pictures and of the choice of activations.
        size: Side of the calibration's pictures in pixels.
        steps: Steps at their coarsest level.
    """

    bits: Bits = 8
    activations: Activations = "float"
    group: int = 32
    keep: tuple[str, ...] | None = None
    calibrate: bool = True
    prompts: tuple[str, ...] | None = None
    seed: int = 0
    size: int = 128
    steps: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ConfigError(f"{self.bits} bits are not supported", hint="8 or 4")
        if self.activations not in ("float", "int8"):
            raise ConfigError(f"unknown activations '{self.activations}'", hint="'float' or 'int8'")
        if self.bits == 4 and self.activations == "int8":
            raise ConfigError(
                "4 bits with 8-bit activations are not supported", hint="use 8 bits, or float activations"
            )
        if self.group < 8:
            raise ConfigError(f"a group of {self.group} weights is too small", hint="8 to 256; 32 is usual")

    @property
    def kept(self) -> tuple[str, ...]:
        """The patterns that hold."""
        return KEPT[self.bits] if self.keep is None else self.keep


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Args:
        name: For example ``blocks.0.attn.to_q``.
        shape: (out, in).
        group: Weights that share a scale; 0 for a whole row.
        error: Relative rms error of its output on real activations.
        uncalibrated: The same, had the scale been the largest weight's.
    """

    name: str
    shape: tuple[int, int]
    group: int
    error: float
    uncalibrated: float


@dataclass
class Quantized:
    """A quantized network that has not been written.

    Args:
        settings: How it was made.
        layers: The layers, in the network's order.
        kept: Linear layers left as they are.
        tensors: What goes to the disk.
        original_bytes: Size of the original's tensors on the disk.
    """

    settings: QuantizeSettings
    layers: list[LayerReport]
    kept: list[str]
    tensors: dict[str, Tensor]
    original_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Size of the tensors on the disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def layer_kind(name: str) -> str:
    """The name with its numbers replaced: ``blocks.3.attn.to_q`` -> ``blocks.*.attn.to_q``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Every `Linear` of the network that is worth rounding."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= LEAST_WEIGHTS and module.in_features % 2 == 0
    }


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises a `ConfigError` for a checkpoint that is quantized already."""
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"{checkpoint.folder} is quantized already, to {checkpoint.quantization['bits']} bits",
            hint="quantize the checkpoint that it was made of",
        )


def sample_activations(
    pipeline: PhysFormerPipeline, settings: QuantizeSettings, on_picture: Callable[[int], None] | None = None
) -> ActivationSample:
    """Draws the calibration's pictures, one after the other, and keeps what the layers read."""
    sample = ActivationSample(settings.seed)
    with sample.recording(linear_layers(pipeline.transformer)):
        for number, prompt in enumerate(calibration_prompts(settings.prompts)):
            pipeline(
                prompt,
                height=settings.size,
                width=settings.size,
                seeds=settings.seed,
                indices=[number],
                num_inference_steps=settings.steps,
                output_type="pt",
            )
            if on_picture is not None:
                on_picture(number + 1)
    return sample


def quantize_layers(
    transformer: nn.Module, settings: QuantizeSettings, sample: ActivationSample
) -> tuple[dict[str, QuantizedWeight], list[LayerReport], list[str]]:
    """Quantizes every layer that is not kept.

    Returns:
        The weights by layer, a report of each, and the names of the layers kept.

    Raises:
        ConfigError: A pattern of ``keep`` names nothing, or the calibration never used a layer.
    """
    layers = linear_layers(transformer)
    unused = [p for p in settings.keep or () if not any(fnmatch.fnmatchcase(name, p) for name in layers)]
    if unused:
        raise ConfigError(
            f"--keep {unused[0]} names no layer", hint="for example 'blocks.*.modulation' or 'text_blocks.*'"
        )
    weights: dict[str, QuantizedWeight] = {}
    reports, kept = [], []
    for name, layer in layers.items():
        group = group_size(layer.in_features, settings.group) if settings.bits == 4 else 0
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.kept) or (settings.bits == 4 and not group):
            kept.append(name)
            continue
        scheme = LayerScheme(settings.bits, group, settings.activations == "int8")
        rows = sample.of(name)
        plain = quantize_weight(layer.weight, scheme)
        found = quantize_weight(layer.weight, scheme, rows.square().mean(0)) if settings.calibrate else plain
        error, uncalibrated = output_error(layer, found, rows), output_error(layer, plain, rows)
        if error > uncalibrated:  # the search sees inputs one by one, the output their sum
            found, error = plain, uncalibrated
        weights[name] = found
        shape = (layer.out_features, layer.in_features)
        reports.append(LayerReport(name, shape, group, float(f"{error:.4g}"), float(f"{uncalibrated:.4g}")))
    return weights, reports, kept


def quantize(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    *,
    device: torch.device | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> Quantized:
    """Quantizes a checkpoint in memory.

    Args:
        checkpoint: From `find_checkpoint`.
        settings: How.
        device: Where the calibration's pictures are drawn.
        on_picture: Told how many of them are done.

    Raises:
        ConfigError: It is quantized already, would not become smaller, or torchao is missing.
        CheckpointError: It cannot be read.
    """
    torchao_module("quantization")  # before minutes of drawing
    refuse_quantized(checkpoint)
    pipeline = load_pipeline(checkpoint, device=device or "cpu", dtype=torch.float32)
    sample = sample_activations(pipeline, settings, on_picture)
    weights, layers, kept = quantize_layers(pipeline.transformer, settings, sample)
    stored: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        stored |= load_file(path)
    original = sum(tensor.nbytes for tensor in stored.values())
    tensors = {name: tensor for name, tensor in stored.items() if name.removesuffix(".weight") not in weights}
    for name, weight in weights.items():
        tensors |= {f"{name}.{kind}": tensor.cpu() for kind, tensor in weight.stored().items()}
    result = Quantized(settings, layers, kept, tensors, original)
    if result.stored_bytes > (1 - LEAST_SAVING) * original:
        raise ConfigError(
            f"{settings.bits} bits would bring nothing: {checkpoint.name} would have {result.stored_bytes:,} bytes of "
            f"weights instead of {original:,}",
            hint="its layers are too small, or too many are kept; physformer export --dtype fp16 halves a float32 file",
        )
    return result


def write_quantized(checkpoint: Checkpoint, quantized: Quantized, output_dir: Path) -> Path:
    """Writes the folder, whole or not at all.

    Returns:
        The weights' file.

    Raises:
        OutputError: The folder exists or cannot be written.
    """
    check_output(output_dir)
    with atomic_folder(output_dir) as folder:
        inner = folder / "transformer"
        inner.mkdir()
        shutil.copyfile(checkpoint.folder / "model_index.json", folder / "model_index.json")
        shutil.copyfile(checkpoint.folder / "transformer" / "config.json", inner / "config.json")
        description = json.dumps(describe(checkpoint, quantized), indent=1) + "\n"
        (inner / DESCRIPTION_NAME).write_text(description, encoding="utf-8")
        # One key only: safetensors writes several in any order, and equal commands shall make equal bytes.
        save_file(quantized.tensors, inner / WEIGHTS_NAME, metadata={"format": "pt"})
    return output_dir / "transformer" / WEIGHTS_NAME


def check_output(output_dir: Path) -> None:
    """Refuses a folder that exists, before anything is computed."""
    if output_dir.exists():
        raise OutputError(f"{output_dir} exists already", hint="name a new folder, or delete that one first")


def describe(checkpoint: Checkpoint, quantized: Quantized) -> dict[str, Any]:
    """The content of `quantization.json`."""
    settings = quantized.settings
    return {
        "format": FORMAT,
        "bits": settings.bits,
        "activations": settings.activations,
        "group": settings.group if settings.bits == 4 else None,
        "made_from": {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "calibration": {
            "scales": "searched" if settings.calibrate else "largest weight",
            "prompts": list(calibration_prompts(settings.prompts)),
            "seed": settings.seed,
            "size": settings.size,
            "steps": settings.steps,
        },
        "kept": quantized.kept,
        "layers": {
            report.name: {key: value for key, value in dataclasses.asdict(report).items() if key != "name"}
            for report in quantized.layers
        },
    }


def worst_kinds(layers: Sequence[LayerReport]) -> list[tuple[str, int, int, float, float, float]]:
    """Layers by kind: (kind, layers, weights, mean error, largest error, mean error without calibration)."""
    kinds: dict[str, list[LayerReport]] = {}
    for report in layers:
        kinds.setdefault(layer_kind(report.name), []).append(report)
    return [
        (
            kind,
            len(group),
            sum(one.shape[0] * one.shape[1] for one in group),
            sum(one.error for one in group) / len(group),
            max(one.error for one in group),
            sum(one.uncalibrated for one in group) / len(group),
        )
        for kind, group in kinds.items()
    ]
