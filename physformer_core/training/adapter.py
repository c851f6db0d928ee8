"""Training a low-rank adapter beside frozen weights: what it starts from, and what it may be resumed with."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from physformer_core.checkpoints import Checkpoint, load_pipeline, refuse_adapters
from physformer_core.config import RunConfig, TrainConfig
from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.lora import TARGETS, require_peft
from physformer_core.model.transformer import PhysFormerTransformer2DModel


def adapted_config(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The configuration with the model and the flow of the checkpoint that is adapted: an adapter fits no other."""
    known = set(inspect.signature(PhysFormerTransformer2DModel.__init__).parameters)
    known -= {"self", "text_dim", "pooled_dim"}  # the data's, and compared with the model's later
    values = config.to_dict() | {
        "model": {key: value for key, value in checkpoint.transformer.items() if key in known},
        "flow": dict(checkpoint.pipeline["flow"]),
    }
    return RunConfig.from_dict(values, f"{checkpoint.folder}")


def adapted_model(config: RunConfig, checkpoint: Checkpoint) -> PhysFormerTransformer2DModel:
    """The checkpoint's network with a fresh adapter; only the adapter has gradients.

    One of its two factors starts at zero, so the network draws what it drew. The other comes from torch's random state.

    Args:
        config: Of which ``training.lora_rank`` is above 0.
        checkpoint: Whose averaged weights stay as they are.

    Raises:
        ConfigError: PEFT is not installed, or the weights are quantized.
        CheckpointError: The weights cannot be read.
    """
    require_peft()
    refuse_adapters(checkpoint)
    model = load_pipeline(checkpoint, dtype=torch.float32).transformer
    put_adapter(model, config.training)
    return model.train()


def put_adapter(model: PhysFormerTransformer2DModel, train: TrainConfig) -> None:
    """Puts a fresh adapter beside a network's weights, and freezes those.

    Raises:
        ConfigError: PEFT is not installed.
    """
    require_peft()
    from peft import LoraConfig

    rank = train.lora_rank
    alpha = train.lora_alpha or rank
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))  # type: ignore[arg-type]


def adapter_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an adapter's file says about the network it was trained on."""
    return {"base": checkpoint.name, "base_sha256": checkpoint.sha256}


def check_resumed_adapter(
    source: str, metadata: dict[str, Any], config: RunConfig, facts: dict[str, Any] | None
) -> None:
    """Refuses to go on with another adapter than the one that a training checkpoint is of.

    Args:
        source: The checkpoint, for messages.
        metadata: The checkpoint's ``state.json``.
        config: Of the run.
        facts: From `adapter_facts`; None if the run trains the whole network.

    Raises:
        CheckpointError: Either trains no adapter, or of another rank or strength, or upon another network.
    """
    before, train = metadata.get("adapter"), config.training
    if before is None and facts is None:
        return
    if before is None:
        raise CheckpointError(
            f"'{source}' is of a whole network, not of an adapter",
            hint="leave --lora-rank out, or start the adapter with --init-from in a folder of its own",
        )
    earlier = metadata["config"]["training"]
    rank, alpha = earlier["lora_rank"], earlier["lora_alpha"] or earlier["lora_rank"]
    if facts is None:
        raise CheckpointError(f"'{source}' is of an adapter of rank {rank}", hint=f"resume it with --lora-rank {rank}")
    if (rank, alpha) != (train.lora_rank, train.lora_alpha or train.lora_rank):
        raise CheckpointError(
            f"'{source}' is of an adapter of rank {rank} and alpha {alpha:g}, not of rank {train.lora_rank} and alpha "
            f"{train.lora_alpha or train.lora_rank:g}",
            hint=f"resume it with --lora-rank {rank} --lora-alpha {alpha:g}",
        )
    if before["base_sha256"] != facts["base_sha256"]:
        raise CheckpointError(
            f"'{source}' adapts {before['base']} ({before['base_sha256']:.12}), not {facts['base']} "
            f"({facts['base_sha256']:.12})",
            hint="name what it adapts with --init-from",
        )


def check_text(checkpoint: Checkpoint, encoder: str) -> None:
    """Refuses data whose captions another text encoder has read than the one that the checkpoint knows.

    Raises:
        ConfigError: They differ.
    """
    if checkpoint.text_encoder_name != encoder:
        raise ConfigError(
            f"{checkpoint.folder} reads prompts with {checkpoint.text_encoder_name}, and the data were made with "
            f"{encoder}",
            hint=f"preprocess the data with --encoder {checkpoint.text_encoder_name}",
        )


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
