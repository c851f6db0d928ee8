"""Whose a GPU's memory is, when a guest takes turns with us in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SharedMemory:
    """The most of a CUDA device's memory that we had in our turns, and the guest in its own.

    What the guest holds between its turns is counted from its tensors; all else is ours, as our threads go on making
    batches in its turns. On other devices nothing is counted.

    Args:
        device: Which.
        held_by_guest: Bytes that the guest holds at this moment.
    """

    def __init__(self, device: torch.device, held_by_guest: Callable[[], int]) -> None:
        self._device, self._held_by_guest = device, held_by_guest
        self._counts = device.type == "cuda"
        self._at_start = self._of_guest = 0
        self._peaks: dict[str, int] = {}

    def begin(self) -> None:
        """A turn begins."""
        if self._counts:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._at_start = torch.cuda.memory_allocated(self._device)
            self._of_guest = self._held_by_guest()

    def end(self, *, guest: bool) -> None:
        """The turn ends that began last: the guest's, or ours."""
        if not self._counts:
            return
        most = torch.cuda.max_memory_allocated(self._device)
        side, peak = "ours", most - self._of_guest
        if guest:
            side, peak = "guest", most - self._at_start + self._of_guest
        self._peaks[side] = max(self._peaks.get(side, 0), peak)

    def ours(self) -> int | None:
        """Our peak in bytes; None where nothing was counted.

        What CUDA graphs work in is set aside for them and counts as free between replays: it is added to what we hold.
        """
        if "ours" not in self._peaks:
            return None
        segments = torch.cuda.memory_snapshot()
        graphs = sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) != (0, 0))
        return max(self._peaks["ours"], torch.cuda.memory_allocated(self._device) - self._held_by_guest() + graphs)

    def guests(self) -> int | None:
        """The guest's peak in bytes; None where nothing was counted."""
        return self._peaks.get("guest")


def held_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a network's weights, gradients and optimizer state on its device."""
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    grads = [param.grad for param in network.parameters() if param.grad is not None]
    return sum(
        one.nbytes for one in (*network.parameters(), *network.buffers(), *grads, *state) if one.device.type != "cpu"
    )
