"""What quantizing costs and brings: the picture's difference, size, memory, time, prompt accuracy, sensitive layers."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from physformer_core.batching import PictureRequest
from physformer_core.checkpoints import Checkpoint, find_checkpoint, load_pipeline
from physformer_core.errors import DeviceError, PhysFormerError
from physformer_core.hardware import peak_memory
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.quantization.convert import (
    QuantizeSettings,
    layer_kind,
    linear_layers,
    quantize_layers,
    refuse_quantized,
    sample_activations,
)
from physformer_core.quantization.storage import torchao_module

if TYPE_CHECKING:
    from physformer_core.evaluation.prompt_accuracy import Judge

COMPARED_PROMPTS = (
    "a fox in the forest",
    "a yellow bus on a street in the rain",
    "an owl on a branch at night",
    "a hot air balloon over the desert",
    "a cow behind a fence",
    "a purple umbrella on the beach",
    "a penguin next to an igloo",
    "a robot in a garden",
)
"""Prompts whose pictures are compared; none of them calibrates."""

COMPARED_SEED = 10_000


@dataclass(frozen=True)
class Variant:
    """One of the two checkpoints compared.

    Args:
        file_bytes: Its weights on the disk.
        weight_bytes: Its weights in memory, as loaded to run.
        peak_bytes: Peak memory of a process that loads it and draws one picture, interpreter and libraries included.
        seconds: Median seconds per picture.
        prompt_accuracy: (top-1, low, high, top-5), or None if not measured.
    """

    file_bytes: int
    weight_bytes: int
    peak_bytes: int
    seconds: float
    prompt_accuracy: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """A quantized checkpoint beside the one that it was made of.

    Args:
        original, quantized: The two.
        difference: Mean absolute difference of their pictures' values, 0 to 255.
        psnr: Peak signal-to-noise ratio between their pictures in dB; infinite where they are equal.
        seeds_difference: Mean absolute difference of the original's pictures between two seeds: the scale to judge
            `difference` by.
        count, size, dtype, device: How many pictures, their side, and what the network computed in and where.
    """

    original: Variant
    quantized: Variant
    difference: float
    psnr: float
    seeds_difference: float
    count: int
    size: int
    dtype: str
    device: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_checkpoints(
    original: Checkpoint,
    quantized: Checkpoint,
    *,
    count: int = 4,
    size: int = 256,
    accuracy: int = 0,
    judge: Judge | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> Comparison:
    """Draws the same pictures with both, in turn, and judges them.

    Args:
        original, quantized: The two.
        count: Pictures to compare, each drawn twice by the original (with two seeds) and once by the other.
        size: Their side in pixels.
        accuracy: Prompts to measure prompt accuracy with; 0 leaves it out.
        judge: What says whether they are right. If not given it is loaded, or fitted, which takes minutes.
        dtype: What both compute in.
        device: Where.
        on_picture: Told how many pictures are done, of three per prompt.

    Raises:
        DeviceError: A process that measures memory dies.
        ConfigError: Prompt accuracy was asked for and its feature network is missing.
    """
    device = device or torch.device("cpu")
    both = [load_pipeline(one, device=device, dtype=dtype) for one in (original, quantized)]

    def draw(pipeline: PhysFormerPipeline, number: int, seed: int) -> tuple[np.ndarray, float]:
        prompt = COMPARED_PROMPTS[number % len(COMPARED_PROMPTS)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        (images,) = pipeline(
            prompt, height=size, width=size, seeds=seed, indices=[number], output_type="np", return_dict=False
        )
        return np.asarray(images[0], dtype=np.float64), time.perf_counter() - started

    for pipeline in both:
        draw(pipeline, 0, 0)  # kernels and the text encoder are loaded
    seconds: tuple[list[float], list[float]] = ([], [])
    squares, differences, others = [], [], []
    for number in range(count):
        pictures = []
        for pipeline, times in zip(both, seconds, strict=True):
            picture, took = draw(pipeline, number, COMPARED_SEED)
            pictures.append(picture)
            times.append(took)
            if on_picture is not None:
                on_picture(3 * number + len(pictures))
        again, _ = draw(both[0], number, COMPARED_SEED + 1)
        if on_picture is not None:
            on_picture(3 * number + 3)
        squares.append(float(np.square(pictures[0] - pictures[1]).mean()))
        differences.append(float(np.abs(pictures[0] - pictures[1]).mean()))
        others.append(float(np.abs(pictures[0] - again).mean()))
    weights = [_weight_bytes(pipeline.transformer) for pipeline in both]
    shares = [_prompt_accuracy(one, pipe, accuracy, judge) if accuracy else None for one, pipe in zip(
        (original, quantized), both, strict=True)]  # fmt: skip
    variants = [
        Variant(
            sum(path.stat().st_size for path in checkpoint.weights),
            weights[k],
            process_peak(checkpoint, size=size, dtype=dtype, device=device),
            statistics.median(seconds[k]),
            shares[k],
        )
        for k, checkpoint in enumerate((original, quantized))
    ]
    mean_square = statistics.fmean(squares)
    return Comparison(
        variants[0],
        variants[1],
        255 * statistics.fmean(differences),
        float("inf") if mean_square == 0 else float(-10 * np.log10(mean_square)),
        255 * statistics.fmean(others),
        count,
        size,
        str(dtype).removeprefix("torch."),
        str(device),
    )


def process_peak(checkpoint: Checkpoint, *, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Peak memory in bytes of a fresh process that loads a checkpoint and draws one picture.

    Raises:
        DeviceError: The process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, str(checkpoint.folder), size, str(dtype).removeprefix("torch."), str(device))
    process = context.Process(target=_draw_and_tell, args=arguments, daemon=True)  # ended with this one
    process.start()
    sender.close()
    try:
        told = receiver.recv()
    except EOFError:
        process.join()
        raise DeviceError(
            f"drawing with {checkpoint.folder} in a process of its own ended with exit code {process.exitcode}",
            hint="it probably ran out of memory; without this comparison: --compare 0",
        ) from None
    process.join()
    if isinstance(told, Exception):
        raise told
    return int(told)


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to quantize one kind of layer alone.

    Args:
        kind: For example ``blocks.*.attn.to_q``.
        weights: How many weights it has.
        error: Root mean square change of the pictures, 0 to 1.
        per_million: ``error`` for a million weights made smaller: where keeping a layer pays most.
    """

    kind: str
    weights: int
    error: float
    per_million: float


def measure_sensitivity(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    *,
    pictures: int = 4,
    device: torch.device | None = None,
    on_kind: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Quantizes each kind of layer alone and measures how far the pictures move; worst per weight first.

    Args:
        checkpoint: What to measure.
        settings: Bits, activations and calibration; nothing is kept.
        pictures: Pictures to compare, of ``settings.size`` and ``settings.steps``.
        device: Where.
        on_kind: Told how many kinds of how many are done.

    Raises:
        ConfigError: It is quantized already, or torchao is missing.
    """
    torchao_module("quantization")
    refuse_quantized(checkpoint)
    pipeline = load_pipeline(checkpoint, device=device or "cpu", dtype=torch.float32)
    everything = QuantizeSettings(**{**asdict(settings), "keep": ()})
    weights, _, _ = quantize_layers(pipeline.transformer, everything, sample_activations(pipeline, everything))
    prompts = [COMPARED_PROMPTS[number % len(COMPARED_PROMPTS)] for number in range(pictures)]

    def draw() -> np.ndarray:
        (images,) = pipeline(
            prompts,
            height=settings.size,
            width=settings.size,
            seeds=COMPARED_SEED,
            indices=list(range(pictures)),
            num_inference_steps=settings.steps,
            output_type="np",
            return_dict=False,
        )
        return np.asarray(images, dtype=np.float64)

    wanted = draw()
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(layer_kind(name), []).append(name)
    found = []
    for number, (kind, names) in enumerate(kinds.items()):
        chosen = {name: weights[name].tensor(torch.float32).to(pipeline.device) for name in names}
        with _replaced(pipeline.transformer, chosen):
            error = float(np.sqrt(np.square(draw() - wanted).mean()))
        count = sum(weights[name].values.numel() for name in names)
        found.append(Sensitivity(kind, count, error, error / count * 1e6))
        if on_kind is not None:
            on_kind(number + 1, len(kinds))
    return sorted(found, key=lambda one: -one.per_million)


@contextmanager
def _replaced(transformer: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Runs the block with other weights in some layers."""
    layers = linear_layers(transformer)
    before = {name: layers[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, parameter in before.items():
            layers[name].weight = parameter


def _weight_bytes(transformer: nn.Module) -> int:
    """Bytes of the parameters as they lie in memory, integers and scales of quantized ones included."""
    total = 0
    for parameter in transformer.parameters():
        inner, _ = parameter.data.__tensor_flatten__() if hasattr(parameter.data, "__tensor_flatten__") else ([], None)
        parts = [getattr(parameter.data, name) for name in inner] or [parameter.data]
        total += sum(part.nbytes for part in parts)
    return total


def _prompt_accuracy(
    checkpoint: Checkpoint, pipeline: PhysFormerPipeline, count: int, judge: Judge | None
) -> tuple[float, float, float, float]:
    """Top-1 with its interval, and top-5, of prompts of single subjects at 256x256 pixels."""
    from physformer_core.evaluation.classifier import load_classifier
    from physformer_core.evaluation.features import load_extractor
    from physformer_core.evaluation.pictures import draw_requests
    from physformer_core.evaluation.prompt_accuracy import Judge, judge_all, single_report
    from physformer_core.evaluation.prompt_cases import single_cases

    if judge is None:
        extractor = load_extractor("efficientnet", None, pipeline.device)
        judge = Judge(extractor, load_classifier(extractor))
    cases = single_cases(count, 0, aspect=1.0)
    requests = [
        PictureRequest(prompt=case.prompt, seed=0, index=index, width=256, height=256)
        for index, case in enumerate(cases)
    ]
    judged = judge_all(cases, draw_requests(checkpoint, pipeline, requests), judge)
    report = single_report(judged, judge.concepts)
    top1 = report["top1"]
    return top1["value"], top1["low"], top1["high"], report["top5"]["value"]


def _draw_and_tell(
    sender: multiprocessing.connection.Connection, folder: str, size: int, dtype: str, device: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        where = torch.device(device)
        pipeline = load_pipeline(find_checkpoint(folder), device=where, dtype=getattr(torch, dtype))
        pipeline(COMPARED_PROMPTS[0], height=size, width=size, seeds=COMPARED_SEED, output_type="pt")
        sender.send(peak_memory(where))
    except PhysFormerError as error:
        sender.send(error)
