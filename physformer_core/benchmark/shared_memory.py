"""Whose a GPU's memory is, when two take turns in one process."""

from __future__ import annotations

import torch


class SharedMemory:
    """Keeps account of what each side holds of a CUDA device's memory and of the most it had at once.

    Sides begin to be told apart when it is made: what is allocated then is the first side's. On other devices nothing
    is counted.

    Args:
        device: Which.
        first: Name of the side whose turn it is.
    """

    def __init__(self, device: torch.device, first: str) -> None:
        self._device, self._side = device, first
        self._counts = device.type == "cuda"
        self._at_start = 0
        self._held: dict[str, int] = {}
        self._peak: dict[str, int] = {}
        if self._counts:
            torch.cuda.reset_peak_memory_stats(device)

    def turn(self, side: str) -> None:
        """Ends one side's turn and begins another's."""
        if not self._counts:
            return
        now, most = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        held = self._held.get(self._side, 0)
        self._peak[self._side] = max(self._peak.get(self._side, 0), held + most - self._at_start)
        self._held[self._side] = held + now - self._at_start
        self._side, self._at_start = side, now
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self, side: str, *, graphs: bool = False) -> int | None:
        """The most bytes that a side had in its turns; None where nothing was counted.

        Args:
            side: Which.
            graphs: CUDA graphs are this side's. What they work in is set aside for them alone and counts as free
                between replays; it is added to what the side holds besides.
        """
        if side not in self._peak:
            return None
        pools = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if graphs and tuple(segment["segment_pool_id"]) != (0, 0)
        )
        return max(self._peak[side], self._held[side] + pools)
