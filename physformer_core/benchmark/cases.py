"""What is measured: a case is plain data that travels to a process of its own and is built there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from physformer_core.config import load_preset
from physformer_core.errors import ConfigError
from physformer_core.hardware import resolve_device, resolve_dtype

TEXT_TOKENS = 16
"""Tokens of the prompt in every measurement: a sentence."""

OURS = "physformer"

PEERS = {
    "global": "our own network with dense attention of every token to every token, no cut-off",
    "dense": "diffusers' PixArtTransformer2DModel: dense attention",
    "sana": "diffusers' SanaTransformer2DModel: linear attention",
    "natten": "neighbourhood attention of the package natten (bench attention)",
    "flex": "FlexAttention with a window of our size (bench attention)",
}
MODEL_PEERS = ("global", "dense", "sana")
ATTENTION_PEERS = ("dense", "sana", "natten", "flex")

QUADRATIC = ("global", "dense")
"""Contenders whose time grows with the square of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Args:
        what: ``attention`` (one layer with its projections), ``model`` (one evaluation of the network) or
            ``generate`` (prompt to picture).
        contender: `OURS` or one of `PEERS`.
        preset: Whose sizes are taken, with random weights.
        checkpoint: A checkpoint instead, for our own contender; peers take its sizes.
        backend: Our attention backend.
        height, width: In tokens; for ``generate`` in pixels.
        batch: Pictures at once.
        dtype, device: As `resolve_dtype` and `resolve_device` know them.
    """

    what: str
    contender: str
    height: int
    width: int
    preset: str = "nano"
    checkpoint: Path | None = None
    backend: str = "auto"
    batch: int = 1
    dtype: str = "auto"
    device: str = "auto"

    @property
    def tokens(self) -> int:
        """Tokens of one picture; pixels for ``generate``."""
        return self.height * self.width


@dataclass(frozen=True)
class Subject:
    """A case that has been built.

    Args:
        run: Does it once.
        warm_up: Does it once with a tiny picture, so that every kernel is loaded.
        parameters: Of what runs.
    """

    run: Callable[[], Any]
    warm_up: Callable[[], Any]
    parameters: int


def model_config(case: Case) -> dict[str, Any]:
    """Arguments of the network whose sizes the case takes.

    Raises:
        ConfigError, CheckpointError: There is no such preset or checkpoint.
    """
    from physformer_core.model.transformer import PhysFormerTransformer2DModel

    if case.checkpoint is None:
        given = load_preset(case.preset).of_one_network().model
    else:
        from physformer_core.checkpoints import find_checkpoint

        stored = find_checkpoint(case.checkpoint).transformer
        given = {key: value for key, value in stored.items() if not key.startswith("_")}
    with torch.device("meta"):
        return dict(PhysFormerTransformer2DModel(**given).config)


def why_not(what: str, contender: str, device: torch.device) -> str | None:
    """Why a contender cannot run here, or None if it can.

    Raises:
        ConfigError: There is no such contender for this measurement.
    """
    allowed = {"model": MODEL_PEERS, "attention": ATTENTION_PEERS}.get(what, ())
    if contender == OURS:
        return None
    if contender not in allowed:
        raise ConfigError(
            f"no peer '{contender}' for bench {what}",
            hint="one of " + ", ".join(allowed) if allowed else f"bench {what} has no peers",
        )
    if contender == "natten":
        try:
            import natten  # noqa: F401
        except ImportError:
            return "the package natten is not installed (its kernels need CUDA; natten.org says how)"
        if device.type != "cuda":
            return "natten's kernels need CUDA"
    if contender == "flex" and device.type != "cuda":
        return f"FlexAttention needs CUDA: on {device.type} compiling it takes most of a minute for every shape"
    return None


def build(case: Case) -> Subject:
    """Builds a case in this process, with weights from a fixed seed.

    Raises:
        ConfigError, DeviceError, CheckpointError: It cannot be.
    """
    device = resolve_device(case.device)
    dtype = resolve_dtype(case.dtype, device)
    torch.manual_seed(0)
    if case.what == "model":
        from physformer_core.benchmark.networks import network_subject

        return network_subject(case, device, dtype)
    if case.what == "attention":
        from physformer_core.benchmark.layers import layer_subject

        return layer_subject(case, device, dtype)
    if case.what == "generate":
        from physformer_core.benchmark.pictures import picture_subject

        return picture_subject(case, device, dtype)
    raise ConfigError(f"unknown measurement '{case.what}'", hint="attention, model or generate")
