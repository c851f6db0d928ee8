"""The flow-matching loss over a batch of one level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
        blur_b: Standard deviations [B] of the coarse fields' blur, in elements of the level below; None without.
    """

    time_b: Tensor
    noise_bchw: Tensor
    drop_b: Tensor
    coarse_noise_bchw: Tensor | None
    blur_b: Tensor | None = None

    def to(self, device: torch.device) -> Draws:
        """The same draws on a device; the copy may still be under way on CUDA, in the order of its work."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        coarse_noise = None if self.coarse_noise_bchw is None else moved(self.coarse_noise_bchw)
        blur = None if self.blur_b is None else moved(self.blur_b)
        return Draws(moved(self.time_b), moved(self.noise_bchw), moved(self.drop_b), coarse_noise, blur)

    def part(self, first: int, count: int, device: torch.device) -> Draws:
        """The draws of ``count`` examples from ``first`` on, on a device."""

        def take(tensor: Tensor) -> Tensor:
            return tensor[first : first + count].to(device)

        coarse_noise = None if self.coarse_noise_bchw is None else take(self.coarse_noise_bchw)
        blur = None if self.blur_b is None else take(self.blur_b)
        return Draws(take(self.time_b), take(self.noise_bchw), take(self.drop_b), coarse_noise, blur)


@dataclass(frozen=True, kw_only=True)
class FlowObjective:
    """Velocity error, divided by the size of the level's velocities so that levels weigh alike.

    Its square teaches the mean of what a field may be, which is what a flow follows. A finer level that is drawn in one
    step from its start shows that mean itself, and the mean of two places that an edge may have is no edge. With
    ``fine_huber`` c the error e of an element counts 2 c^2 (sqrt(1 + (e / c)^2) - 1) there: as its square up to c, and
    in proportion beyond it (pseudo-Huber, Charbonnier et al. 1997, https://doi.org/10.1109/83.551699). What is taught
    is then between mean and median, and the median of two places is one of them.

    Args:
        path: Path and prediction.
        pyramid: Noise where finer levels start.
        base_density, fine_density: Training times at level 0 and above.
        prompt_dropout: Share of prompts replaced by the learned null prompt, for guidance.
        fine_huber: The size c, in the level's velocities, of finer levels' errors; 0 squares them all.
        coarse_blur: From level 2 on crops start from a coarse field that was blurred, by a standard deviation between 0
            and this, in its own elements. When a picture is drawn that field was drawn, too, and is softer than a real
            one; who was only shown real ones passes the softness on. (Ho et al. 2021, https://arxiv.org/abs/2106.15282,
            for cascades of diffusion models. Level 1 has `training.redraw`: a drawn level 0 is sharp, and wrong.)
    """

    path: FlowPath
    pyramid: Pyramid
    base_density: TimeDensity
    fine_density: TimeDensity
    prompt_dropout: float
    fine_huber: float = 0.0
    coarse_blur: float = 0.0

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """Everything random for the global batch that ``batch`` is of, on the CPU and in a fixed order."""
        is_base, shape = batch.kind == "base", (batch.total, *batch.pixels_bchw.shape[1:])
        return Draws(
            time_b=(self.base_density if is_base else self.fine_density).sample(batch.total, generator),
            noise_bchw=torch.randn(shape, generator=generator),
            drop_b=torch.rand(batch.total, generator=generator) < self.prompt_dropout,
            coarse_noise_bchw=None if is_base else torch.randn(shape, generator=generator),
            blur_b=torch.rand(batch.total, generator=generator) * self.coarse_blur
            if self.coarse_blur and not is_base
            else None,
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
            if own.blur_b is not None:
                # Twice as wide: the coarse field is given at the size of the finer one.
                coarse = blurred(coarse, 2 * torch.where(batch.level_b >= 2, own.blur_b, 0), 2 * self.coarse_blur)
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
        relative = error / self.pyramid.velocity_scale(is_base)
        counted = relative.square() if is_base or not self.fine_huber else pseudo_huber(relative, self.fine_huber)
        per_example = counted.mean((1, 2, 3))
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


def pseudo_huber(error: Tensor, size: float) -> Tensor:
    """2 size^2 (sqrt(1 + (error / size)^2) - 1): about error^2 of errors well below ``size``, and 2 ``size`` |error| of
    those well above. Written without the difference, of which float32 leaves nothing where errors are small."""
    return 2 * error.square() / (1 + torch.sqrt(1 + (error / size).square()))


def blurred(field_bchw: Tensor, sigma_b: Tensor, largest: float) -> Tensor:
    """Every field under a Gaussian of its own standard deviation, in elements; as it is where that is 0.

    Args:
        field_bchw: [B, C, H, W].
        sigma_b: [B].
        largest: What none of them is above; given, so that nothing has to wait for the device.
    """
    batch, channels = field_bchw.shape[:2]
    reach = math.ceil(3 * largest)
    offsets = torch.arange(-reach, reach + 1, device=field_bchw.device)
    weights = torch.exp(-0.5 * (offsets / sigma_b.clamp_min(1e-3)[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
    padded = F.pad(field_bchw, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[None]
    across = F.conv2d(padded, weights, groups=batch * channels)
    return F.conv2d(across, weights.transpose(2, 3), groups=batch * channels)[0].unflatten(0, (batch, channels))


def _root_mean_square(values: Tensor) -> Tensor:
    """In one pass over memory."""
    return torch.linalg.vector_norm(values) / math.sqrt(values.numel())
