"""The flow-matching loss over a batch of one level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from physformer_core.data.loader import Batch
from physformer_core.flow.path import FlowPath, TimeDensity
from physformer_core.flow.pyramid import Pyramid
from physformer_core.model.transformer import PhysFormerTransformer2DModel


@dataclass
class Losses:
    """What a batch's loss is made of.

    Args:
        mean: The mean loss, to differentiate.
        per_example: [B] normalised velocity errors.
        time: [B] the times they were taken at.
        statistics: Scalars that tell whether data and velocities have the size they should: ``field_mean`` and
            ``field_std`` of the data, ``velocity_norm`` (predicted) and ``velocity_target_norm``, root mean squares.
    """

    mean: Tensor
    per_example: Tensor
    time: Tensor
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class Draws:
    """What is drawn at random for one step: for its global batch, so that it is the same whoever computes which part.

    Args:
        time_b: Flow times [B].
        noise_bchw: Noise where the path starts.
        drop_b: Bool [B], True where the prompt is dropped.
        coarse_noise_bchw: Noise on the coarse field that the network is shown; None at level 0.
    """

    time_b: Tensor
    noise_bchw: Tensor
    drop_b: Tensor
    coarse_noise_bchw: Tensor | None

    def to(self, device: torch.device) -> Draws:
        """The same draws on a device; the copy may still be under way on CUDA, in the order of its work."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        coarse_noise = None if self.coarse_noise_bchw is None else moved(self.coarse_noise_bchw)
        return Draws(moved(self.time_b), moved(self.noise_bchw), moved(self.drop_b), coarse_noise)

    def part(self, first: int, count: int, device: torch.device) -> Draws:
        """The draws of ``count`` examples from ``first`` on, on a device."""

        def take(tensor: Tensor) -> Tensor:
            return tensor[first : first + count].to(device)

        coarse_noise = None if self.coarse_noise_bchw is None else take(self.coarse_noise_bchw)
        return Draws(take(self.time_b), take(self.noise_bchw), take(self.drop_b), coarse_noise)


@dataclass(frozen=True, kw_only=True)
class FlowObjective:
    """Velocity error, divided by the size of the level's velocities so that levels weigh alike.

    Args:
        path: Path and prediction.
        pyramid: Noise where finer levels start.
        base_density, fine_density: Training times at level 0 and above.
        prompt_dropout: Share of prompts replaced by the learned null prompt, for guidance.
    """

    path: FlowPath
    pyramid: Pyramid
    base_density: TimeDensity
    fine_density: TimeDensity
    prompt_dropout: float

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """Everything random for the global batch that ``batch`` is of, on the CPU and in a fixed order."""
        is_base, shape = batch.kind == "base", (batch.total, *batch.pixels_bchw.shape[1:])
        return Draws(
            time_b=(self.base_density if is_base else self.fine_density).sample(batch.total, generator),
            noise_bchw=torch.randn(shape, generator=generator),
            drop_b=torch.rand(batch.total, generator=generator) < self.prompt_dropout,
            coarse_noise_bchw=None if is_base else torch.randn(shape, generator=generator),
        )

    def __call__(self, model: PhysFormerTransformer2DModel, batch: Batch, draws: Draws) -> Losses:
        """Computes the loss of a batch.

        Args:
            model: The network.
            batch: On the network's device.
            draws: Of the whole global batch, from `draw`.
        """
        sharp, device = batch.pixels_bchw, batch.pixels_bchw.device
        is_base = batch.kind == "base"
        own = draws.part(batch.first, sharp.shape[0], device)
        t, noise, drop = own.time_b, own.noise_bchw, own.drop_b
        coarse = shown = None
        if not is_base:
            assert own.coarse_noise_bchw is not None and batch.coarse_bchw is not None
            coarse = batch.coarse_bchw
            shown = coarse + self.pyramid.coarse_noise * own.coarse_noise_bchw
        start = self.pyramid.start(coarse, noise)
        z = self.path.interpolate(start, sharp, t)
        labels = None
        if classes := model.config.num_classes:
            # A dropped prompt drops the class too: the null class comes after the last.
            labels = torch.where(drop | (batch.class_label_b < 0), classes, batch.class_label_b)
        prompt = model.encode_prompt(batch.prompt_embeds_btd, batch.prompt_mask_bt, batch.pooled_bp, drop, base=is_base)
        output = model(z, t, prompt, batch.level_b, shown, batch.place_b4, class_labels=labels, return_dict=False)[
            0
        ].float()
        if self.path.prediction == "sample":
            sample = self.pyramid.sample(coarse, output)
            error = self.path.sample_weight(t)[:, None, None, None] * (sample - sharp)
        else:
            error = output - self.path.velocity(start, sharp, t)
        per_example = error.square().mean((1, 2, 3)) / self.pyramid.velocity_scale(is_base) ** 2
        statistics = self._statistics(sharp, self.path.velocity(start, sharp, t), error.detach())
        return Losses(per_example.mean(), per_example.detach(), t, statistics)

    @staticmethod
    @torch.no_grad()
    def _statistics(sharp: Tensor, target: Tensor, error: Tensor) -> dict[str, Tensor]:
        """See `Losses`. The predicted velocity is the true one plus the error that the loss is of."""
        return {
            "field_mean": sharp.mean(),
            "field_std": sharp.std(),
            "velocity_norm": _root_mean_square(target + error),
            "velocity_target_norm": _root_mean_square(target),
        }


def _root_mean_square(values: Tensor) -> Tensor:
    """In one pass over memory."""
    return torch.linalg.vector_norm(values) / math.sqrt(values.numel())
