"""One evaluation of a whole network: ours, and diffusers' transformers of the same width and depth, random weights.

All see the same tokens: the noisy and the coarse field (twice the channels) and a prompt of the same length. Ours gets
its prompt encoded, as it does in every step but a picture's first; peers project theirs anew each time, as they do in
use. That is 16 tokens beside thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from physformer_core.benchmark.cases import OURS, TEXT_TOKENS, Case, Subject, model_config
from physformer_core.errors import ConfigError
from physformer_core.model.attention import AttentionPlan
from physformer_core.model.geometry import BlockGrid, rotary_angles, window_coordinates
from physformer_core.model.transformer import PhysFormerTransformer2DModel

WARM_TOKENS = 8
"""Side in tokens of the field that loads the kernels."""


class GlobalPhysFormer(PhysFormerTransformer2DModel):
    """Our network with every token reading every token: the same weights and operations but for attention's reach.

    Its geometry counts from the field's centre and rounds on large fields, so its pictures mean nothing: it is here
    for its cost.
    """

    def plan(self, height: int, width: int, origin: tuple[int, int], like: Tensor) -> list[AttentionPlan]:
        """Dense plans without a mask."""
        angles = rotary_angles(height, width, origin, self.attentions()[0].rotary_dim, like.device).flatten(0, 1)
        grid = BlockGrid(height=height, width=width, block=self.config.block_size, radius=self.config.radius)
        coordinates = window_coordinates(height, width, like.device).reshape(-1, 2)
        dense = AttentionPlan(
            "dense", grid, angles.cos()[None, :, None], angles.sin()[None, :, None], coordinates, None
        )
        return [dense, dense]


def network_subject(case: Case, device: torch.device, dtype: torch.dtype) -> Subject:
    """Builds the network of a case and the field it is evaluated on; see `build`."""
    config = model_config(case)
    if case.contender in (OURS, "global"):
        network, evaluate = _ours(case, config, device, dtype)
    elif case.contender in ("dense", "sana"):
        network, evaluate = _peer(case.contender, config, device, dtype)
    else:
        raise ConfigError(f"no network '{case.contender}' is known")
    patch, channels = config["patch_size"], config["in_channels"]
    generator = torch.Generator().manual_seed(0)

    def field(batch: int, height: int, width: int) -> Tensor:
        shape = (batch, channels, height * patch, width * patch)
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    whole, small = field(case.batch, case.height, case.width), field(1, WARM_TOKENS, WARM_TOKENS)
    # Of the network that runs: what is measured is a finer level.
    parameters = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("base."))
    return Subject(run=evaluate(whole), warm_up=evaluate(small), parameters=parameters)


def _ours(
    case: Case, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Tensor], Callable[[], Any]]]:
    if case.contender == "global":
        model: PhysFormerTransformer2DModel = GlobalPhysFormer(**config)
    elif case.checkpoint is not None:
        from physformer_core.checkpoints import load_pipeline

        model = load_pipeline(case.checkpoint, device=device, dtype=dtype).transformer
    else:
        model = PhysFormerTransformer2DModel(**config)
    if case.checkpoint is None or case.contender == "global":  # a checkpoint comes as it is to be run
        cast_network(model, device, dtype)
    if case.contender == OURS:
        model.set_attention_backend(case.backend)  # type: ignore[arg-type]

    def evaluate(field: Tensor) -> Callable[[], Any]:
        batch = field.shape[0]
        with torch.inference_mode():
            prompt = model.encode_prompt(
                torch.randn(batch, TEXT_TOKENS, config["text_dim"], device=device),
                torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=device),
                torch.randn(batch, config["pooled_dim"], device=device),
            )
        time = torch.full((batch,), 0.5, device=device)
        level = torch.ones(batch, dtype=torch.long, device=device)
        return lambda: model(field, time, prompt, level, field, return_dict=False)

    return model, evaluate


def peer_network(name: str, config: dict[str, Any], layers: int | None = None) -> nn.Module:
    """A transformer of diffusers with the width, heads, patches and text width of ours.

    Args:
        name: ``dense`` or ``sana``.
        config: Arguments of our network.
        layers: Blocks; as many as ours has if not given.
    """
    heads = config["num_heads"]
    shared = {
        "in_channels": 2 * config["in_channels"],
        "out_channels": config["in_channels"],
        "num_attention_heads": heads,
        "attention_head_dim": config["hidden_size"] // heads,
        "num_layers": layers or config["num_layers"],
        "cross_attention_dim": config["hidden_size"],
        "caption_channels": config["text_dim"],
        "patch_size": config["patch_size"],
    }
    if name == "dense":
        from diffusers import PixArtTransformer2DModel

        # A sample size of 128 would bring conditions on resolution and aspect ratio.
        return PixArtTransformer2DModel(**shared, sample_size=64, use_additional_conditions=False)
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        **shared,
        sample_size=64,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=config["hidden_size"] // heads,
    )


def evaluate_peer(name: str, model: nn.Module, field: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """One call of a network from `peer_network`.

    Args:
        name: ``dense`` or ``sana``.
        model: The network.
        field: [B, 2 C, H, W], the noisy and the coarse field.
        time: [B], 0 to 1000.
        text: [B, T, text_dim].
    """
    conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name == "dense" else {}
    output: Tensor = model(field, encoder_hidden_states=text, timestep=time, return_dict=False, **conditions)[0]
    return output


def _peer(
    name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Tensor], Callable[[], Any]]]:
    model = peer_network(name, config)
    cast_network(model, device, dtype)

    def evaluate(field: Tensor) -> Callable[[], Any]:
        batch, _, height, width = field.shape
        both = torch.cat([field, field], dim=1)
        text = torch.randn(batch, TEXT_TOKENS, config["text_dim"], device=device).to(dtype)
        time = torch.full((batch,), 500.0, device=device)
        size = (height // config["patch_size"], width // config["patch_size"])

        def once() -> Tensor:
            if name == "dense":
                _fix_positions(model, size)
            return evaluate_peer(name, model, both, time, text)

        return once

    return model, evaluate


def cast_network(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a network, and casts its weights but for those that it names as needing float32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    nn.Module.to(model, device)  # diffusers' own warns about those
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not exact & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.eval()


def _fix_positions(model: nn.Module, size: tuple[int, int]) -> None:
    """Keeps PixArt from working out its table of positions anew in every call: a size that repeats needs it once."""
    embed: Any = model.pos_embed
    if (embed.height, embed.width) == size:
        return
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    old = embed.pos_embed
    table = get_2d_sincos_pos_embed(
        old.shape[-1],
        size,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=old.device,
        output_type="pt",
    )
    embed.pos_embed = table.float().unsqueeze(0)
    embed.height, embed.width = size
