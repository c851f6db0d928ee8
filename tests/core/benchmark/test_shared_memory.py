"""Whose a GPU's memory is: counted on CUDA, and nowhere else."""

import pytest
import torch
from torch import nn

from physformer_core.benchmark.shared_memory import SharedMemory, held_bytes

MIB = 2**20


def test_nothing_is_counted_without_a_gpu() -> None:
    memory = SharedMemory(torch.device("cpu"), lambda: 5)
    memory.begin()
    memory.end(guest=False)
    memory.begin()
    memory.end(guest=True)
    assert memory.ours() is None and memory.guests() is None


def test_what_our_threads_take_in_the_guests_turns_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, most = [100 * MIB], [0]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: most.__setitem__(0, allocated[0]))
    graphs = {"total_size": 50 * MIB, "segment_pool_id": (0, 3)}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [graphs, {"total_size": 7, "segment_pool_id": (0, 0)}])

    def take(number: int) -> None:
        allocated[0] += number
        most[0] = max(most[0], allocated[0])

    memory = SharedMemory(torch.device("cuda"), lambda: 30 * MIB)  # of the 100
    for _ in range(5):
        memory.begin()
        take(10 * MIB)  # a batch that the guest's turn began with is used, and freed
        take(-10 * MIB)
        memory.end(guest=False)
        memory.begin()
        take(20 * MIB)
        take(-20 * MIB)
        memory.end(guest=True)
    assert memory.guests() == 50 * MIB
    assert memory.ours() == (100 - 30 + 50) * MIB, "more than the 80 of a turn: graphs have their own"


def test_what_a_trainer_holds() -> None:
    network = nn.Linear(4, 2, device="meta")  # 10 numbers
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    assert held_bytes(network, optimizer) == 40
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    assert held_bytes(network, optimizer) == 120
