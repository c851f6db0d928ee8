"""The flow-matching loss over a batch of one level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from physformer_core.data.loader import Batch
from physformer_core.flow.path import FlowPath, TimeDensity
from physformer_core.flow.pyramid import Pyramid
from physformer_core.model.transformer import PhysFormerTransformer2DModel


@dataclass
class Losses:
    """Mean loss (to differentiate) and, per example, the normalised velocity error and the time it was taken at."""

    mean: Tensor
    per_example: Tensor
    time: Tensor


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

    def __call__(self, model: PhysFormerTransformer2DModel, batch: Batch, generator: torch.Generator) -> Losses:
        """Computes the loss; all draws come from ``generator`` (CPU), in a fixed order."""
        sharp, count, device = batch.pixels_bchw, batch.pixels_bchw.shape[0], batch.pixels_bchw.device
        is_base = bool(batch.level_b[0] == 0)
        t = (self.base_density if is_base else self.fine_density).sample(count, generator).to(device)
        noise = torch.randn(sharp.shape, generator=generator).to(device)
        drop = (torch.rand(count, generator=generator) < self.prompt_dropout).to(device)
        coarse = shown = None
        if not is_base:
            coarse = self.pyramid.blur(sharp)
            shown = coarse + self.pyramid.coarse_noise * torch.randn(sharp.shape, generator=generator).to(device)
        start = self.pyramid.start(coarse, noise)
        z = self.path.interpolate(start, sharp, t)
        labels = None
        if classes := model.config.num_classes:
            # A dropped prompt drops the class too: the null class comes after the last.
            labels = torch.where(drop | (batch.class_label_b < 0), classes, batch.class_label_b)
        prompt = model.encode_prompt(batch.prompt_embeds_btd, batch.prompt_mask_bt, batch.pooled_bp, drop)
        output = model(z, t, prompt, batch.level_b, shown, batch.place_b4, class_labels=labels, return_dict=False)[
            0
        ].float()
        if self.path.prediction == "sample":
            sample = self.pyramid.sample(coarse, output)
            error = self.path.sample_weight(t)[:, None, None, None] * (sample - sharp)
        else:
            error = output - self.path.velocity(start, sharp, t)
        per_example = error.square().mean((1, 2, 3)) / self.pyramid.velocity_scale(is_base) ** 2
        return Losses(per_example.mean(), per_example.detach(), t)
