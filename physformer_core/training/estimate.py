"""What a run will cost, before it runs: parameters, operations, memory, epochs. Nothing is computed or allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from physformer_core.config import RunConfig
from physformer_core.data.loader import Batch, BatchStream, ShardSet
from physformer_core.model.flops import training_flops
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.optimizer import NEWTON_SCHULZ_STEPS, split_parameters
from physformer_core.training.trainer import model_arguments

_SAMPLED_STEPS = 16
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class RunEstimate:
    """Figures of a run.

    Args:
        parameters: Of the network.
        flops_per_step: Matrix products of a mean step: forward, backward and optimizer.
        state_bytes: Weights, gradients, average and optimizer state, all float32.
        activation_bytes: What the backward pass keeps of the forward pass of the largest sampled batch, in float32
            and uncompiled: bfloat16 and compiling take less.
        steps_per_epoch: Steps of the run in which every example of a kind is seen once, by kind.
    """

    parameters: int
    flops_per_step: int
    state_bytes: int
    activation_bytes: int
    steps_per_epoch: dict[str, float]


def estimate_run(config: RunConfig, shards: ShardSet) -> RunEstimate:
    """Works a run's figures out from the configuration and from the shapes of its first batches.

    Raises:
        ConfigError, DataError: As the run itself would.
    """
    train = config.training
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**model_arguments(config, shards))
    stream = BatchStream(
        shards,
        seed=train.seed,
        batch_size=train.batch_size,
        crop_fraction=train.crop_fraction,
        crop_size=train.crop_size,
    )
    batches = [stream.batch(step) for step in range(min(train.steps, _SAMPLED_STEPS))]
    forward_backward = sum(_batch_flops(model, batch) for batch in batches) // len(batches)
    parameters = sum(p.numel() for p in model.parameters())
    muon, adamw = split_parameters(model)
    if train.optimizer == "adamw":
        muon, adamw = {}, {**muon, **adamw}
    # AdamW keeps two moments of each parameter, Muon one.
    moments = 2 * sum(p.numel() for p in adamw.values()) + sum(p.numel() for p in muon.values())
    shares = {"base": 1 - train.crop_fraction, "crop": train.crop_fraction}
    largest = max(batches, key=lambda batch: batch.pixels_bchw.numel() + batch.prompt_embeds_btd.numel())
    return RunEstimate(
        parameters=parameters,
        flops_per_step=forward_backward + sum(_newton_schulz_flops(p) for p in muon.values()),
        state_bytes=_FLOAT_BYTES * (3 * parameters + moments),
        activation_bytes=_activation_bytes(model, largest),
        steps_per_epoch={kind: stream.steps_per_epoch(kind) / share for kind, share in shares.items() if share},
    )


def _batch_flops(model: PhysFormerTransformer2DModel, batch: Batch) -> int:
    count, _, height, width = batch.pixels_bchw.shape
    patch = model.config.patch_size
    # Dropped prompts become the null prompt, for which room is made.
    tokens = max(batch.prompt_embeds_btd.shape[1], model.config.null_tokens)
    return count * training_flops(model, height // patch, width // patch, tokens)


def _newton_schulz_flops(matrix: Tensor) -> int:
    """Orthogonalising an m x n matrix, m <= n: per iteration X X^T (2 m^2 n), its square (2 m^3), that times X."""
    m, n = sorted(matrix.shape)
    return NEWTON_SCHULZ_STEPS * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


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
        prompt = model.encode_prompt(batch.prompt_embeds_btd, batch.prompt_mask_bt, batch.pooled_bp, drop)
        model(batch.pixels_bchw, time, prompt, batch.level_b, batch.pixels_bchw, batch.place_b4)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
