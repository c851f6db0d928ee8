"""Kernels in C: equal to torch, to the bit with any number of threads, and honest where there are none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from physformer_core.model.native import ops, probe
from physformer_core.model.updates import OPPOSED, TINY, renormalized_update
from physformer_core.native import build
from physformer_core.native.build import SWITCH, Unavailable, load_library

NAMES = [
    "norm_modulate",
    "renormalized_update",
    "norm_rotate",
    "rms_norm",
    "gated_linear",
    "attention of 9",
    "attention of 24",
]
needs_kernels = pytest.mark.skipif(ops.why_not() is not None, reason=str(ops.why_not()))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "physformer" / "native"
    load_library.cache_clear()


@needs_kernels
@pytest.mark.parametrize("case", range(len(NAMES)), ids=NAMES)
def test_results_and_gradients_are_torchs(case: int) -> None:
    kernel, written, inputs = probe.cases()[case]
    found, wanted = kernel(*inputs), written(*inputs)
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max().clamp_min(1)
    leaves = [t.clone().requires_grad_() for t in inputs]
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    pairs = [torch.autograd.grad((run(*leaves) * weights).sum(), leaves) for run in (kernel, written)]
    for one, other in zip(*pairs, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


@needs_kernels
@pytest.mark.parametrize("case", range(len(NAMES)), ids=NAMES)
def test_threads_do_not_change_a_bit(case: int) -> None:
    kernel, _, inputs = probe.cases()[case]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            result = kernel(*leaves)
            results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_what_is_far_away_weighs_nothing_and_large_gates_do_not_overflow() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, 3.0]])
    found = ops.gated_linear(torch.cat([gate.repeat(1, 3), torch.ones(1, 24)], dim=1))
    assert torch.allclose(found, torch.nn.functional.silu(gate).repeat(1, 3), atol=1e-7)


@needs_kernels
def test_tokens_that_have_no_direction_stay_and_hand_their_gradient_on() -> None:
    h = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]], requires_grad=True)
    output = torch.tensor([[[1.0, 2.0], [-3.0, -4.0], [0.0, 0.0]]], requires_grad=True)
    gate = torch.ones(1, 1, 2, requires_grad=True)
    found = ops.renormalized_update(h, output, gate, TINY, OPPOSED)
    assert torch.equal(found, h)
    weights = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]]])
    gradients = torch.autograd.grad((found * weights).sum(), (h, output, gate))
    wanted = torch.autograd.grad((renormalized_update(h, gate * output) * weights).sum(), (h, output, gate))
    for one, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@needs_kernels
def test_a_network_draws_and_learns_the_same_without_them(build, prompt_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        model = build()
        prompt = prompt_of(model, 2)
        z = torch.randn(2, 3, 30, 42, generator=torch.Generator().manual_seed(1))
        arguments = (z, torch.tensor([0.3, 0.6]), prompt, torch.tensor([1, 1]))
        with torch.no_grad():
            drawn = model(*arguments).sample
        output = model(*arguments).sample
        output.square().mean().backward()
        return drawn, output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    drawn, output, gradients = run()
    assert torch.equal(drawn, output)
    monkeypatch.setattr(ops, "why_not", lambda: "left out by a test")
    _, plain, plain_gradients = run()
    assert (output - plain).abs().max() <= 1e-5 * plain.abs().max() and plain.std() > 0.01
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@needs_kernels
def test_they_are_compiled_once_and_anew_for_other_flags(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    (first,) = fresh.iterdir()
    changed = first.stat().st_mtime_ns
    load_library.cache_clear()
    load_library()
    assert first.stat().st_mtime_ns == changed
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DANYTHING"))
    load_library.cache_clear()
    load_library()
    assert len(list(fresh.iterdir())) == 2


def test_why_there_are_none(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        load_library.cache_clear()
        with pytest.raises(Unavailable) as caught:
            load_library()
        assert not fresh.exists() or not list(fresh.iterdir())
        return str(caught.value)

    monkeypatch.setenv("CC", "no-such-compiler")
    assert "does not run" in reason()
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] || { echo 'x.c:1: error: no OpenMP here' >&2; exit 1; }\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    assert "cannot compile them: x.c:1: error: no OpenMP here" in reason()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in reason()
    monkeypatch.setenv(SWITCH, "0")
    assert SWITCH in reason()


@needs_kernels
def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "physformer").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    try:
        with pytest.raises(Unavailable, match="cannot be kept"):
            load_library()
    finally:
        load_library.cache_clear()


@needs_kernels
def test_a_kernel_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.verified()
    right = ops.gated_linear
    monkeypatch.setattr(ops, "gated_linear", lambda gate_up: right(gate_up) * 1.001)
    assert not probe.verified()


@needs_kernels
def test_what_does_not_fit_is_left_to_torch() -> None:
    ones = torch.ones(2)
    assert ops.takes(ones, ones)
    assert not ops.takes(ones, ones.bfloat16()) and not ops.takes(ones.to("meta"))


@needs_kernels
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_a_shared_folder_serves_other_processors(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    monkeypatch.setattr(build, "_processor", lambda: "another")
    load_library.cache_clear()
    load_library()
    assert len(list(fresh.iterdir())) == 2 and os.listdir(fresh)[0].startswith("kernels-")
