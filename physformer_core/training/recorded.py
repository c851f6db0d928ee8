"""Forward and backward passes recorded as CUDA graphs, one per shape, and replayed.

A GPU is done with a small network's operations before Python has started the next ones: a step of `nano` starts some
4,400, at 10 to 25 microseconds each. A CUDA graph starts all of a pass at once (Nguyen et al. 2021,
https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/). What is replayed are the same kernels on the same
memory, so batches are copied to where the recorded one lay, and gradients are always added to the same tensors.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from physformer_core.data.loader import Batch
from physformer_core.training.objective import Draws, FlowObjective, Losses

EAGER_PASSES = 2
"""Passes of a shape before it is recorded: in them libraries choose, and kernels are compiled and loaded."""

MOST_SHAPES = 64
"""Shapes that are recorded; passes of any further one run as they are written."""

_Key = tuple[object, ...]
_Held = TypeVar("_Held", Batch, Draws)

Pass = Callable[[FlowObjective, Batch, Draws], Losses]
"""Computes losses, detached, and adds gradients to the weights' ``grad``."""


def why_not_recorded(
    device: torch.device, *, dtype: torch.dtype, parallel: str, compiled: bool, gradient_checkpointing: bool
) -> str | None:
    """Why passes are not recorded, in a few words; None if they are."""
    if device.type != "cuda":
        return "CUDA graphs need CUDA"
    if parallel != "none":
        return "ranks exchange gradients while they are computed"
    if dtype == torch.float16:
        return "the loss is scaled anew at every step"
    if compiled:
        return "blocks are compiled"
    if gradient_checkpointing:
        return "blocks are computed again in the backward pass"
    return None


@dataclass
class _Recording:
    """A pass of one shape.

    Args:
        graph: Its kernels.
        batch, draws: What they read.
        losses: What they write, besides gradients.
        trained: Weights that they give gradients.
    """

    graph: torch.cuda.CUDAGraph
    batch: Batch
    draws: Draws
    losses: Losses
    trained: list[nn.Parameter]


class RecordedPasses:
    """Runs passes, and from the third of a shape on replays them.

    Memory: activations of the largest shape once more, beside what the allocator keeps of the first passes, and one
    set of gradients.

    Args:
        run: A pass as it is written. It must not wait for the device, nor read anything that changes between steps but
            weights, batch and draws.
        model: Whose weights are trained; they must stay where they are in memory.
    """

    def __init__(self, run: Pass, model: nn.Module) -> None:
        self._run = run
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._passes: Counter[_Key] = Counter()
        self._trained: dict[_Key, list[nn.Parameter]] = {}
        self._recordings: dict[_Key, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def shapes(self) -> int:
        """How many shapes are recorded."""
        return len(self._recordings)

    def __call__(self, objective: FlowObjective, batch: Batch, draws: Draws) -> Losses:
        """As ``run``, of a batch on the device and draws that are its own, with the first example as number 0.

        Weights whose gradients are None, as `torch.optim.Optimizer.zero_grad` leaves them, begin at zero.
        """
        key = _key(batch)
        recording = self._recordings.get(key)
        if recording is None:
            self._passes[key] += 1
            if self._passes[key] <= EAGER_PASSES or len(self._recordings) >= MOST_SHAPES:
                losses = self._run(objective, batch, draws)
                self._trained[key] = [param for param in self._params if param.grad is not None]
                return losses
            recording = self._recordings[key] = self._record(key, objective, batch, draws)
        _copy(batch, recording.batch)
        _copy(draws, recording.draws)
        self._place_gradients(recording.trained)
        recording.graph.replay()
        return _cloned(recording.losses)

    def _record(self, key: _Key, objective: FlowObjective, batch: Batch, draws: Draws) -> _Recording:
        batch, draws = _own_memory(batch), _own_memory(draws)
        trained = self._trained[key]
        before = [param.grad for param in trained]
        for param in trained:
            # Where gradients are when a pass begins, autograd adds to them, in place: so do the replays.
            param.grad = self._gradient(param)
        graph = torch.cuda.CUDAGraph()
        # Threads that make batches go on, and may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._run(objective, batch, draws)
        for param, grad in zip(trained, before, strict=True):
            param.grad = grad
        return _Recording(graph, batch, draws, losses, trained)

    def _gradient(self, param: nn.Parameter) -> Tensor:
        if param not in self._gradients:
            self._gradients[param] = torch.zeros_like(param)
        return self._gradients[param]

    def _place_gradients(self, params: list[nn.Parameter]) -> None:
        """Gradients to where replays add to them: zero, or what parts of this batch have left elsewhere."""
        fresh = []
        for param in params:
            own = self._gradient(param)
            if param.grad is None:
                fresh.append(own)
            elif param.grad is not own:
                own.copy_(param.grad)
            param.grad = own
        if fresh:
            torch._foreach_zero_(fresh)


def _key(batch: Batch) -> _Key:
    """What must be the same for the same kernels to be right."""
    shapes = [tuple(value.shape) for value in vars(batch).values() if isinstance(value, Tensor)]
    return (batch.kind, batch.total, *shapes)


def _own_memory(held: _Held) -> _Held:
    changed: dict[str, Any] = {name: value.clone() for name, value in vars(held).items() if isinstance(value, Tensor)}
    return dataclasses.replace(held, **changed)


def _copy(source: Batch | Draws, target: Batch | Draws) -> None:
    for name, value in vars(source).items():
        if isinstance(value, Tensor):
            getattr(target, name).copy_(value, non_blocking=True)


def _cloned(losses: Losses) -> Losses:
    return Losses(
        losses.mean.clone(),
        losses.per_example.clone(),
        losses.time.clone(),
        {name: value.clone() for name, value in losses.statistics.items()},
    )
