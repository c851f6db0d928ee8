"""One step's gradients: computed in parts, in a chosen precision, alone or with other ranks, and always the same.

The loss of a step is the mean over its global batch. However that is divided (over ranks, and on each of them over
``accumulate`` parts), the gradients are those of one process that takes it whole, up to the rounding of float32 sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from physformer_core.data.loader import Batch
from physformer_core.errors import ConfigError
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.distributed import Ranks, whole
from physformer_core.training.objective import Draws, FlowObjective, Losses
from physformer_core.training.optimizer import Optimizer
from physformer_core.training.recorded import RecordedPasses

_CLIP_EPSILON = 1e-6
"""What torch adds to a norm that it divides by."""


class _LossModule(nn.Module):
    """The network and its loss as one module: what DDP watches is all that happens between weights and loss."""

    def __init__(self, model: PhysFormerTransformer2DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: FlowObjective, batch: Batch, draws: Draws) -> Losses:
        return objective(self.model, batch, draws)


class Gradients:
    """Computes losses and gradients of global batches.

    Args:
        model: On its device; divided already if ``parallel`` is ``fsdp``.
        device, dtype: Where, and the arithmetic of matrix products. In float16 the loss is scaled by a factor that
            halves whenever a gradient overflows and doubles after 2,000 steps without (Micikevicius et al. 2018,
            https://arxiv.org/abs/1710.03740).
        parallel: ``none``, ``ddp`` or ``fsdp``.
        ranks: This process among the others.
        accumulate: Parts that each rank divides its share of a batch into.
        clip: Largest gradient norm.
        recorded: What records passes as CUDA graphs and replays them; None runs all as they are written.

    Raises:
        ConfigError: float16 on a device whose loss cannot be scaled.
    """

    def __init__(
        self,
        model: PhysFormerTransformer2DModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        parallel: str,
        ranks: Ranks,
        accumulate: int,
        clip: float,
        recorded: RecordedPasses | None = None,
    ) -> None:
        if dtype == torch.float16 and device.type not in ("cuda", "cpu"):
            raise ConfigError(f"training in fp16 needs loss scaling, which {device.type} has not", hint="--dtype fp32")
        self._model, self._device, self._dtype = model, device, dtype
        self._params = list(model.parameters())
        self._ranks, self._accumulate, self._clip = ranks, accumulate, clip
        self._module = _LossModule(model)
        self._copied: DistributedDataParallel | None = None
        if parallel == "ddp":
            self._copied = DistributedDataParallel(
                self._module, gradient_as_bucket_view=True, find_unused_parameters=_has_idle_parts(model)
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.recorded = recorded

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In which the network computes; its weights stay float32."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def restore_scale(self, state: dict[str, Any]) -> None:
        """Sets the loss scale as ``scaler.state_dict()`` gave it; without effect where losses are not scaled."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

    @torch.no_grad()
    def loss(self, objective: FlowObjective, batch: Batch, draws: Draws) -> float:
        """The mean loss of a global batch of which ``batch`` is this rank's part; all ranks must call it."""
        with self.autocast():
            losses = self._module(objective, batch.to(self._device), draws)
        share = losses.mean.double().cpu() * (batch.count / batch.total)
        return float(self._ranks.sum(share))

    def compute(self, objective: FlowObjective, batch: Batch, draws: Draws, optimizer: Optimizer) -> StepLosses:
        """Losses of this rank's part of a global batch; gradients of the whole of it, clipped, are left in the weights.

        Args:
            objective: The loss.
            batch: This rank's part, on the CPU.
            draws: Of the global batch.
            optimizer: Whose gradients are to be scaled back in float16.
        """
        parts = batch.parts(self._accumulate)
        done = []
        for number, part in enumerate(parts):
            with self._exchanging(last=number == len(parts) - 1):
                own = draws.part(part.first, part.count, self._device)
                given = (objective, dataclasses.replace(part.to(self._device), first=0), own)
                losses = self._pass(*given) if self.recorded is None else self.recorded.run(self._pass, *given)
            done.append((part, losses))
        for optimizer_part, _ in optimizer.parts:
            self.scaler.unscale_(optimizer_part)
        norm = self._clipped()
        self.scaler.update()
        return StepLosses(done, norm)

    def _clipped(self) -> Tensor:
        """The gradients' norm before they are clipped, which they are after."""
        norm = torch.nn.utils.get_total_norm(param.grad for param in self._params if param.grad is not None)
        told = whole(norm)
        # A factor of 1 takes a pass over all of them and changes nothing. Only a CPU can be asked without waiting.
        if self._device.type != "cpu" or not self._clip / (told + _CLIP_EPSILON) >= 1:
            torch.nn.utils.clip_grads_with_norm_(self._params, self._clip, norm)
        return told

    def _pass(self, objective: FlowObjective, batch: Batch, draws: Draws) -> Losses:
        """Forward and backward of a part that begins its draws; gradients are added to those that are there."""
        module = self._copied if self._copied is not None else self._module
        with self.autocast():
            losses: Losses = module(objective, batch, draws)
            # The ranks' gradients are averaged.
            share = batch.count / batch.total * self._ranks.world_size
            self.scaler.scale(losses.mean * share).backward()
        return dataclasses.replace(losses, mean=losses.mean.detach())

    def _exchanging(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Lets the ranks exchange gradients after the last part alone."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
        elif self._copied is not None and not last:
            return self._copied.no_sync()
        return contextlib.nullcontext()


def _has_idle_parts(model: PhysFormerTransformer2DModel) -> bool:
    """Whether some steps leave some of what is trained alone: crops ask neither level 0's network nor its refiner."""
    if model.base is not None:
        return True
    return model.refiner is not None and any(p.requires_grad for p in model.refiner.parameters())


class StepLosses:
    """What this rank computed in one step. Everything is detached and stays on the device, so that no step waits.

    Args:
        parts: Batches and their losses.
        norm: Of the gradients of the whole batch, before clipping.

    Attributes:
        mean: This rank's share of the global batch's mean loss: the ranks' sum is that.
        per_example, time, level: [B] over this rank's examples.
        statistics: See `Losses.statistics`; means over the parts.
    """

    def __init__(self, parts: list[tuple[Batch, Losses]], norm: Tensor) -> None:
        self.norm = norm.detach()
        means = [losses.mean * (batch.count / batch.total) for batch, losses in parts]
        self.mean = torch.stack(means).sum()
        self.per_example = torch.cat([losses.per_example for _, losses in parts])
        self.time = torch.cat([losses.time for _, losses in parts])
        self.level = torch.cat([batch.level_b for batch, _ in parts])
        names = parts[0][1].statistics
        self.statistics = {name: torch.stack([losses.statistics[name] for _, losses in parts]).mean() for name in names}
