"""A tiny transformer whose weights follow a formula, so that they are the same everywhere, and whose gates are open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel

TINY: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 2,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "bottleneck": 24,
    "text_dim": 12,
    "pooled_dim": 10,
    "text_hidden_size": 32,
    "num_text_layers": 1,
    "max_levels": 4,
    "null_tokens": 2,
}


def wave(shape: torch.Size, phase: float) -> Tensor:
    """Numbers of unit variance without visible order, from a formula."""
    index = torch.arange(shape.numel(), dtype=torch.float64)
    return ((index * 12.9898 + phase).sin() * 43758.5453).frac().mul(3**0.5).float().reshape(shape)


def open_gates(model: PhysFormerTransformer2DModel) -> PhysFormerTransformer2DModel:
    """Gives every weight a value of the size that training would, gates, drifts and altitudes included."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            values = wave(parameter.shape, float(number))
            if "norm" in name:
                parameter.copy_(1 + 0.2 * values)
            elif "drift_logit" in name or "sigma_logit" in name or name.endswith("bias"):
                parameter.add_(0.3 * values)
            elif parameter.ndim == 2 and "null" not in name and "level" not in name:
                # Modest gates, as trained ones are: with large ones a block turns rounding into another picture.
                gain = 0.15 if "blocks" in name and "modulation" in name else 0.5 if "final" in name else 1.0
                parameter.copy_(gain * values * parameter.shape[1] ** -0.5)
            elif parameter.ndim == 4:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(values)
    return model


@pytest.fixture(scope="session")
def build() -> Callable[..., PhysFormerTransformer2DModel]:
    """Builds a tiny model in evaluation mode; keyword arguments change its config."""

    def make(**changes: Any) -> PhysFormerTransformer2DModel:
        torch.manual_seed(0)
        return open_gates(PhysFormerTransformer2DModel(**{**TINY, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def model(build: Callable[..., PhysFormerTransformer2DModel]) -> PhysFormerTransformer2DModel:
    """One that tests must leave as it is."""
    return build()


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., EncodedPrompt]:
    """Encodes random prompts of a length."""

    def make(model: PhysFormerTransformer2DModel, batch: int = 1, tokens: int = 5, seed: int = 0) -> EncodedPrompt:
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(batch, tokens, model.config.text_dim, generator=generator)
        pooled = torch.randn(batch, model.config.pooled_dim, generator=generator)
        with torch.no_grad():
            return model.encode_prompt(embeds, torch.ones(batch, tokens, dtype=torch.bool), pooled)

    return make
