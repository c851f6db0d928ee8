"""What the machine is asked to do: memory that was freed is kept, and products are in the format that suits it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from physformer_core.hardware import resolve_dtype

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Where it says "[always]", 100 MB are fifty pages, and nothing can be told from their number."""

counts_pages = pytest.mark.skipif(
    not sys.platform.startswith("linux") or (HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text()),
    reason="pages of glibc's allocator are counted",
)

SCRIPT = """
import resource, sys, torch
from physformer_core.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.zeros(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = keep_freed_memory(torch.device(sys.argv[1]))
# Small objects settle in the first gaps: it takes a few tensors until one finds the place of the last.
print(int(done), min(faults() for _ in range(12)))
"""


def run(device: str = "cpu", **environment: str) -> list[int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ending = subprocess.run(
        [sys.executable, "-c", SCRIPT, device], capture_output=True, text=True, check=True, env=kept | environment
    )
    return [int(word) for word in ending.stdout.split()]


@counts_pages
def test_memory_that_was_freed_is_there_for_the_next_tensor() -> None:
    done, fewest = run()
    if not done:
        pytest.skip("not glibc")
    assert fewest < 1000  # 100 MB are 24,000 pages


@counts_pages
def test_a_user_who_has_settled_it_is_not_overruled() -> None:
    done, fewest = run(MALLOC_ARENA_MAX="4")
    assert not done and fewest > 1000
    assert run("meta")[0] == 0


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_chosen_on_gpus_alone(fast, monkeypatch):
    monkeypatch.setattr("physformer_core.hardware.has_fast_bfloat16", lambda device: fast)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if fast else torch.float32)
    assert resolve_dtype("bf16", torch.device("cpu")) == torch.bfloat16
