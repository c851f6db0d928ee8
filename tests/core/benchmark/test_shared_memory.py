"""Whose a GPU's memory is: counted on CUDA, and nowhere else."""

import pytest
import torch

from physformer_core.benchmark.shared_memory import SharedMemory

MIB = 2**20


def test_nothing_is_counted_without_a_gpu() -> None:
    memory = SharedMemory(torch.device("cpu"), "ours")
    kept = torch.ones(1000)
    memory.turn("peer")
    assert kept.sum() == 1000 and memory.peak("ours") is None and memory.peak("peer", graphs=True) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_side_has_what_it_asked_for() -> None:
    device = torch.device("cuda")
    memory = SharedMemory(device, "ours")
    ours = torch.empty(8 * MIB, dtype=torch.uint8, device=device)
    memory.turn("peer")
    peer = torch.empty(2 * MIB, dtype=torch.uint8, device=device)
    for_a_moment = torch.empty(4 * MIB, dtype=torch.uint8, device=device)
    del for_a_moment
    memory.turn("ours")
    more = torch.empty(16 * MIB, dtype=torch.uint8, device=device)
    memory.turn("neither")
    assert memory.peak("ours") == 24 * MIB and memory.peak("peer") == 6 * MIB and memory.peak("neither") is None
    assert ours.numel() + peer.numel() + more.numel() == 26 * MIB
