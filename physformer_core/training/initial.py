"""The network that a run begins with: a new one, a checkpoint's, or a checkpoint's with an adapter; and which of its
weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from physformer_core.checkpoints import find_checkpoint
from physformer_core.config import RunConfig, TrainConfig
from physformer_core.data.shard_set import ShardSet
from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.model.patch_size import resized_reading, resized_writing
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.adapter import adapted_model, adapter_facts, check_text
from physformer_core.training.checkpoint import transformer_folder

_OF_LEVEL_0 = ("refiner_channels", "base_num_layers", "base_hidden_size", "base_num_heads", "base_patch_size")
"""Sizes of parts that level 0 alone has, and that a run may add to the network that it starts from."""


def model_arguments(config: RunConfig, shards: ShardSet) -> dict[str, Any]:
    """Arguments of the network: channels and text widths are those of the data's codec and encoder."""
    widths = {"text_dim": shards.hidden_size, "pooled_dim": shards.pooled_size}
    # Named even where they are left out: a checkpoint that a run starts from may have them.
    return dict.fromkeys(_OF_LEVEL_0, 0) | config.model | widths | {"in_channels": shards.field.channels}


def first_network(
    config: RunConfig, shards: ShardSet, init_from: Path | None
) -> tuple[PhysFormerTransformer2DModel, dict[str, Any] | None, list[str]]:
    """The network of a run before its first step, on the CPU; new weights come from torch's random state.

    Args:
        config: Of the run.
        shards: Its data.
        init_from: See `Trainer`.

    Returns:
        The network, with gradients only for what is trained; of an adapter what it adapts (`adapter_facts`); and what
        was changed of the network that it starts from, in words.

    Raises:
        ConfigError, CheckpointError: They do not fit each other, or nothing would be trained.
    """
    arguments, facts, changes = model_arguments(config, shards), None, []
    if config.training.lora_rank:
        checkpoint = find_checkpoint(init_from)
        check_text(checkpoint, shards.encoder["name"])
        facts, model = adapter_facts(checkpoint), adapted_model(config, checkpoint)
        _check_model(model, arguments, checkpoint.folder)
    elif init_from is None:
        model = PhysFormerTransformer2DModel(**arguments)
    else:
        start = _started_from(init_from, arguments)
        model = _with_parts_of_level_0(start, arguments)
        model = _with_patches_of_level_0(model, arguments["base_patch_size"])
        changes = _changes(start.config, model.config)
        _check_model(model, arguments, init_from)
    freeze(model, config.training)
    return model, facts, changes


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is other than in the network that a run starts from, in words."""
    if not before["base_num_layers"] and after["base_num_layers"]:
        return ["level 0 has a network of its own, which begins anew"]
    changes = []
    if not before["refiner_channels"] and after["refiner_channels"]:
        changes.append("level 0 has a refiner, which begins with no correction")
    if (old := before["base_patch_size"]) != (new := after["base_patch_size"]):
        changes.append(
            f"level 0's patches of {old} are resized to {new}, for as many tokens of another resolution"
            + ("; its refiner begins with no correction" if after["refiner_channels"] else "")
        )
    return changes


def freeze(model: PhysFormerTransformer2DModel, train: TrainConfig) -> None:
    """Takes the gradients of the weights that ``train.freeze`` names.

    Raises:
        ConfigError: There are no such weights, or some steps of the run would train nothing.
    """
    prefixes = [prefix for prefix in (part.strip() for part in train.freeze.split(",")) if prefix]
    params = dict(model.named_parameters())
    for prefix in prefixes:
        named = [param for name, param in params.items() if name.startswith(prefix)]
        if not named:
            parts = sorted({name.partition(".")[0] for name in params})
            raise ConfigError(f"no weights begin with '{prefix}' to be frozen", hint="there are " + ", ".join(parts))
        for param in named:
            param.requires_grad_(False)
    trained = [name for name, param in params.items() if param.requires_grad]
    of_base = [name for name in trained if model.base is None or not name.startswith(_FINE_ALONE)]
    of_fine = [name for name in trained if not name.startswith(("base.", "refiner."))]
    for names, share, what, other in (
        (of_base, 1 - train.crop_fraction, "whole pictures", "--crop-fraction 1"),
        (of_fine, train.crop_fraction, "crops", "--crop-fraction 0"),
    ):
        if share and not names:
            raise ConfigError(
                f"with '{train.freeze}' frozen, steps on {what} would train nothing", hint=f"freeze less, or {other}"
            )


_FINE_ALONE = ("patch_embed.", "condition_embed.", "blocks.", "final_layer.")
"""What level 0 has its own of, where it has a network of its own."""


def _started_from(init_from: Path, arguments: dict[str, Any]) -> PhysFormerTransformer2DModel:
    """A checkpoint's averaged weights."""
    folder = transformer_folder(init_from)
    if not folder.is_dir():  # else the name would be looked for on the hub
        raise CheckpointError(f"cannot start from '{init_from}': there is no such folder")
    # All residual forms have the same weights: training adapts to another form within some fifty steps.
    form = {key: value for key, value in arguments.items() if key == "residual"}
    try:
        model, loading = PhysFormerTransformer2DModel.from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True, **form
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
    return model  # type: ignore[no-any-return]


def _check_model(model: PhysFormerTransformer2DModel, arguments: dict[str, Any], source: Path) -> None:
    for key, value in arguments.items():
        if model.config[key] != value:
            raise ConfigError(
                f"'{source}' has {key} {model.config[key]}, this run {value}",
                hint="the text encoder of the data must be the same"
                if key in ("text_dim", "pooled_dim")
                else "start with the preset that it was trained with",
            )


def _with_parts_of_level_0(
    model: PhysFormerTransformer2DModel, arguments: dict[str, Any]
) -> PhysFormerTransformer2DModel:
    """The network with the parts of level 0 that it lacks and a run asks for; the other weights stay.

    A refiner is zero at first: training goes on from the very pictures of the checkpoint. A network for level 0 begins
    anew, its refiner with it.
    """
    added = {key: arguments[key] for key in _OF_LEVEL_0 if not model.config[key] and arguments[key]}
    if not added:
        return model
    given = {key: value for key, value in model.config.items() if key[0] != "_"} | added
    if "base_num_layers" in added:
        given["refiner_channels"] = arguments["refiner_channels"]
    kept = model.state_dict()
    grown = PhysFormerTransformer2DModel(**given)
    weights = grown.state_dict()
    grown.load_state_dict(weights | {name: tensor for name, tensor in kept.items() if name in weights})
    return grown


def _with_patches_of_level_0(model: PhysFormerTransformer2DModel, new: int) -> PhysFormerTransformer2DModel:
    """The network with other patches in its network of level 0: of as many tokens, pictures of another resolution.

    It begins with what it would have drawn of the pictures' lower frequencies, without a correction by its refiner,
    which is of single elements and learns anew what to correct.
    """
    old = model.config.base_patch_size
    if not old or not new or old == new:
        return model
    given = {key: value for key, value in model.config.items() if key[0] != "_"} | {"base_patch_size": new}
    weights = model.state_dict()
    for name, resized in (
        ("patch_embed.proj1.weight", resized_reading),
        ("final_layer.proj_out.weight", resized_writing),
        ("final_layer.proj_out.bias", resized_writing),
    ):
        weights[f"base.{name}"] = resized(weights[f"base.{name}"], old, new)
    changed = PhysFormerTransformer2DModel(**given)
    if "base.refiner.tokens.weight" in weights:
        for kind in ("weight", "bias"):
            told = weights[f"base.refiner.tokens.{kind}"]
            weights[f"base.refiner.tokens.{kind}"] = resized_writing(told, old // 2, new // 2)
            weights[f"base.refiner.leave.{kind}"].zero_()
    changed.load_state_dict(weights)
    return changed
