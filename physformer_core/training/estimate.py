"""What a run will cost, before it runs: parameters, operations, memory, epochs. Nothing is computed or allocated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from physformer_core.config import RunConfig, TrainConfig
from physformer_core.data.loader import Batch, ShardSet
from physformer_core.errors import ConfigError
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.adapter import put_adapter, trainable_parameters
from physformer_core.training.batches import run_batches
from physformer_core.training.initial import freeze, model_arguments
from physformer_core.training.level_zero import check_level_zero
from physformer_core.training.optimizer import split_parameters
from physformer_core.training.watching import batch_flops, newton_schulz_flops

_SAMPLED_STEPS = 16
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class RunEstimate:
    """Figures of a run.

    Args:
        parameters: Of the network, with its adapter if one is trained.
        trainable: Those that the optimizer changes.
        flops_per_step: Matrix products of a mean step: forward, backward and optimizer.
        state_bytes: Weights, gradients, average and optimizer state, all float32.
        activation_bytes: What the backward pass keeps of the forward pass of the largest sampled batch (or part of one,
            if batches are accumulated), in float32 and uncompiled: bfloat16 and compiling take less. Prompts count with
            their padding, of which a CPU keeps nothing.
        steps_per_epoch: Steps of the run in which every example of a kind is seen once, by kind.
        steps: Of the run.
    """

    parameters: int
    trainable: int
    flops_per_step: int
    state_bytes: int
    activation_bytes: int
    steps_per_epoch: dict[str, float]
    steps: int

    def seconds(self, peak: float, share: float = 1.0) -> float:
        """How long all steps take at a share of a matrix peak (operations per second)."""
        return self.steps * self.flops_per_step / (peak * share)


def estimate_run(config: RunConfig, shards: ShardSet) -> RunEstimate:
    """Works a run's figures out from the configuration and from the shapes of its first batches.

    Raises:
        ConfigError, DataError: As the run itself would.
    """
    train = config.training
    check_level_zero(config, shards)
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**model_arguments(config, shards))
        if train.lora_rank:
            put_adapter(model, train)
        else:
            freeze(model, train)
    stream = run_batches(shards, train)
    batches = [stream.batch(step) for step in range(min(train.steps, _SAMPLED_STEPS))]
    forward_backward = sum(batch_flops(model, batch) for batch in batches) // len(batches)
    parameters, trainable = sum(p.numel() for p in model.parameters()), trainable_parameters(model)
    muon, adamw = split_parameters(model)
    if train.optimizer == "adamw":
        muon, adamw = {}, {**muon, **adamw}
    # AdamW keeps two moments of each parameter, Muon one.
    moments = 2 * sum(p.numel() for p in adamw.values()) + sum(p.numel() for p in muon.values())
    shares = {"base": 1 - train.crop_fraction, "crop": train.crop_fraction}
    largest: dict[str, Batch] = {}
    for batch in sorted(batches, key=lambda batch: batch.pixels_bchw.numel() + batch.prompt_embeds_btd.numel()):
        largest[batch.kind] = batch
    return RunEstimate(
        parameters=parameters,
        trainable=trainable,
        flops_per_step=forward_backward + sum(newton_schulz_flops(p) for p in muon.values()),
        # Gradients and the average are of what is trained alone.
        state_bytes=_FLOAT_BYTES * (parameters + 2 * trainable + moments),
        activation_bytes=max(
            _peak_activation_bytes(model, batch.parts(train.accumulate)[-1], train) for batch in largest.values()
        ),
        steps_per_epoch={kind: stream.steps_per_epoch(kind) / share for kind, share in shares.items() if share},
        steps=train.steps,
    )


def steps_of_epochs(config: RunConfig, shards: ShardSet, epochs: float) -> int:
    """Steps in which every whole picture is seen so many times; every crop, if the run trains on crops alone.

    Raises:
        ConfigError: Epochs are not above 0.
        DataError: As the run itself would.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs must be above 0, not {epochs}")
    train = config.training
    stream = run_batches(shards, train)
    kind, share = ("base", 1 - train.crop_fraction) if train.crop_fraction < 1 else ("crop", 1.0)
    return max(1, round(epochs * stream.steps_per_epoch(kind) / share))


def _peak_activation_bytes(model: PhysFormerTransformer2DModel, part: Batch, train: TrainConfig) -> int:
    """Checkpointed, only what goes in and out of blocks is kept, and the inside of one block at a time is made anew."""
    everything = _activation_bytes(model, part)
    if not train.gradient_checkpointing:
        return everything
    model.enable_gradient_checkpointing()
    between = _activation_bytes(model, part)
    model.disable_gradient_checkpointing()
    return between + (everything - between) // len(model.network(base=part.kind == "base").blocks)


def _activation_bytes(model: PhysFormerTransformer2DModel, batch: Batch) -> int:
    """Runs the forward pass on shapes alone and adds up what autograd keeps."""
    batch = batch.to(torch.device("meta"))
    count = batch.pixels_bchw.shape[0]
    drop = torch.zeros(count, dtype=torch.bool, device="meta")
    time = torch.zeros(count, device="meta")
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {_identity(p) for p in model.parameters()}

    @contextlib.contextmanager
    def counting() -> Iterator[None]:
        def keep(tensor: Tensor) -> Tensor:
            if _identity(tensor) not in weights:
                # The storage is held, so that its address is not given to another one.
                kept[_identity(tensor)] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    with counting():
        is_base = batch.kind == "base"
        prompt = model.encode_prompt(batch.prompt_embeds_btd, batch.prompt_mask_bt, batch.pooled_bp, drop, base=is_base)
        coarse = None if is_base else batch.pixels_bchw
        model(batch.pixels_bchw, time, prompt, batch.level_b, coarse, batch.place_b4)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
