"""Forward and backward passes recorded as CUDA graphs, one per shape, and replayed.

A GPU is done with a small network's operations before Python has started the next ones: forward and backward of `nano`
are some 4,400, at 10 to 25 microseconds each. A CUDA graph starts all of a pass at once (Nguyen et al. 2021,
https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/). What is replayed are the same kernels on the same
memory, so batches are copied to where the recorded one lay, and gradients are always added to the same tensors.

A large network keeps the GPU busy while Python is ahead. There a recording wins nothing and holds memory, so each shape
is timed before: see `RecordedPasses`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from physformer_core.data.loader import Batch
from physformer_core.errors import ConfigError
from physformer_core.training.objective import Draws, FlowObjective, Losses

EAGER_PASSES = 2
"""Passes of a shape before it is recorded: in them libraries choose, and kernels are compiled and loaded."""

MOST_SHAPES = 32
"""Shapes that are recorded; passes of any further one run as they are written."""

GPU_IS_BEHIND = 0.05
"""If after a pass the GPU still works for more than this share of the pass's time, it is the GPU that takes the time,
and the shape is not recorded. (Where Python takes it, little more than the last kernel is left.)"""

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


def resolve_recording(setting: str, reason: str | None) -> bool:
    """Whether passes are recorded, by the configuration's word (on, off or auto) and `why_not_recorded`.

    Raises:
        ConfigError: They are to be, and cannot.
    """
    if setting == "on" and reason is not None:
        raise ConfigError(f"steps cannot be recorded as CUDA graphs: {reason}", hint="leave --cuda-graphs out")
    return setting != "off" and reason is None


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

    Memory: activations of the largest shape stay set aside for replays, and the first passes of a later shape need
    theirs beside them; and of each shape one batch with its draws.

    Args:
        model: Whose weights are trained; they must stay where they are in memory.
        device: A CUDA device, where all of it happens.
        always: Record every shape, also where the GPU is what takes the time.

    Attributes:
        settled: Whether the last pass ran as all later ones of its shape will.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, always: bool = False) -> None:
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._device, self._always = device, always
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._passes: Counter[_Key] = Counter()
        self._trained: dict[_Key, list[nn.Parameter]] = {}
        self._as_written: set[_Key] = set()
        self._recordings: dict[_Key, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # torch's own capturing stream is on whichever device was current when it was first wanted.
        self._stream = torch.cuda.Stream(device)
        self.settled = False

    @property
    def shapes(self) -> int:
        """How many shapes are recorded."""
        return len(self._recordings)

    def run(self, written: Pass, objective: FlowObjective, batch: Batch, draws: Draws) -> Losses:
        """A pass over a batch on the device and draws that are its own, with the first example as number 0.

        Weights whose gradients are None, as `torch.optim.Optimizer.zero_grad` leaves them, begin at zero.

        Args:
            written: The pass, the same at every call. It must not wait for the device, nor read anything that changes
                between steps but weights, batch and draws.
            objective, batch, draws: What it is given.
        """
        key = _key(batch)
        recording = self._recordings.get(key)
        self.settled = recording is not None or key in self._as_written
        if key in self._as_written:
            return written(objective, batch, draws)
        if recording is None:
            self._passes[key] += 1
            if self._passes[key] <= EAGER_PASSES:
                return self._try(key, written, objective, batch, draws)
            recording = self._recordings[key] = self._record(key, written, objective, batch, draws)
        _copy(batch, recording.batch)
        _copy(draws, recording.draws)
        self._place_gradients(recording.trained)
        recording.graph.replay()
        return _cloned(recording.losses)

    def _try(self, key: _Key, written: Pass, objective: FlowObjective, batch: Batch, draws: Draws) -> Losses:
        """Runs one of a shape's first passes as it is written, and decides in the last whether to record."""
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        losses = written(objective, batch, draws)
        started = time.perf_counter()
        torch.cuda.synchronize(self._device)
        ended = time.perf_counter()
        self._trained[key] = [param for param in self._params if param.grad is not None]
        if self._passes[key] == EAGER_PASSES:
            behind = ended - started > GPU_IS_BEHIND * (ended - began)
            if len(self._recordings) >= MOST_SHAPES or (behind and not self._always):
                self._as_written.add(key)
        return losses

    def _record(self, key: _Key, written: Pass, objective: FlowObjective, batch: Batch, draws: Draws) -> _Recording:
        batch, draws = _own_memory(batch), _own_memory(draws)
        trained = self._trained[key]
        before = [param.grad for param in trained]
        for param in trained:
            # Where gradients are when a pass begins, autograd adds to them, in place: so do the replays.
            param.grad = self._gradient(param)
        graph = torch.cuda.CUDAGraph()
        # Threads that make batches go on, and may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            losses = written(objective, batch, draws)
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
