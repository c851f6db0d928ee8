"""Kernels in C: equal to torch, to the bit with any number of threads, and honest where there are none."""

from __future__ import annotations

import functools
import os
import platform
import stat
from pathlib import Path

import pytest
import torch

from physformer_core.model.geometry import BlockGrid
from physformer_core.model.native import convolutions, ops, probe
from physformer_core.model.updates import OPPOSED, TINY, renormalized_update
from physformer_core.native import build
from physformer_core.native.build import SWITCH, Unavailable, load_library

CASES = probe.cases() if ops.why_not() is None else []
needs_kernels = pytest.mark.skipif(ops.why_not() is not None, reason=str(ops.why_not()))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "physformer" / "native"
    load_library.cache_clear()


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients_are_torchs(case: probe.Case) -> None:
    kernel, written, inputs = case.kernel, case.written, case.inputs
    found, wanted = kernel(*inputs), written(*inputs)
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max().clamp_min(1)
    leaves = [t.clone().requires_grad_() for t in inputs]
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    pairs = [torch.autograd.grad((run(*leaves) * weights).sum(), leaves) for run in (kernel, written)]
    for one, other in zip(*pairs, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_may_lie_in_any_order(case: probe.Case, layout: str) -> None:
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    result = case.kernel(*leaves)
    if layout == "expanded":
        given = torch.full((1,) * result.ndim, 0.5).expand(result.shape)
    else:
        given = torch.randn(result.shape[::-1], generator=torch.Generator().manual_seed(2)).permute(
            *reversed(range(result.ndim))
        )
    ballast = [torch.full_like(result, torch.nan) for _ in range(8)]  # what is freed too early is not what it was
    del ballast
    found = torch.autograd.grad(result, leaves, given, retain_graph=True)
    wanted = torch.autograd.grad(result, leaves, given.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@needs_kernels
def test_gradients_of_a_pictures_condition_sum_over_one_part_of_its_tokens_or_several() -> None:
    generator = torch.Generator().manual_seed(4)
    part = load_library().tokens_in_a_part()
    for tokens in (1, part, part + 1):
        h, output, weights = (torch.randn(3, tokens, 20, generator=generator) for _ in range(3))
        leaves = [torch.randn(3, 1, 20, generator=generator, requires_grad=True) for _ in range(3)]

        def changed(scale, shift, gate, h=h, output=output):
            return ops.renormalized_update(ops.norm_modulate(h, scale, shift, 1e-6), output, gate, TINY, OPPOSED)

        def written(scale, shift, gate, h=h, output=output):
            normed = torch.nn.functional.rms_norm(h, (20,), None, 1e-6) * (1 + scale) + shift
            return renormalized_update(normed, gate * output)

        pairs = [torch.autograd.grad((run(*leaves) * weights).sum(), leaves) for run in (changed, written)]
        for one, other in zip(*pairs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()


@needs_kernels
@pytest.mark.parametrize("channels", [3, 16, 32])
@pytest.mark.parametrize("height, width", [(1, 1), (8, 8), (5, 13)])
def test_fields_of_any_size_are_activated_and_no_field_is_copied(channels: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(5)
    field = torch.randn(2, height, width, channels, generator=generator).permute(0, 3, 1, 2).requires_grad_()
    modulation = torch.randn(1, 2 * channels, generator=generator, requires_grad=True)  # one for both pictures

    def plain(field: torch.Tensor, _: torch.Tensor, silu=torch.nn.functional.silu) -> torch.Tensor:
        return silu(field)

    def modulated(field: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale = modulation[:, :, None, None].chunk(2, 1)
        return torch.nn.functional.silu(field * (1 + scale) + shift)

    def kernel(field: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale = modulation.chunk(2, 1)
        return ops.modulated_silu(field, scale, shift)

    pairs = (functools.partial(plain, silu=ops.modulated_silu), plain), (kernel, modulated)
    for one, other in pairs:
        found, wanted = one(field, modulation), other(field, modulation)
        assert found.permute(0, 2, 3, 1).is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        given = torch.randn(wanted.shape, generator=generator)
        inputs = [field] if other is plain else [field, modulation]
        gradients = [torch.autograd.grad(result, inputs, given) for result in (found, wanted)]
        assert gradients[0][0].permute(0, 2, 3, 1).is_contiguous()
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)
    assert ops.checked(field.permute(0, 2, 3, 1), 2, height, width, channels).data_ptr() == field.data_ptr()


@needs_kernels
@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (3, 6, 8), (2, 4, 202), (5, 12, 10)])
def test_convolutions_of_any_even_size_are_those_of_torch(channels: int, batch: int, height: int, width: int) -> None:
    """One tile, rows of tiles together, rows that are cut into strips, and batches that end within a part."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (by * torch.randn(shape, generator=generator)).requires_grad_()

    field = normal(batch, channels, height, width)
    condition, taps = normal(1, 2 * channels), (9 * channels) ** -0.5
    weights = tuple(normal(channels, channels, 3, 3, by=taps) for _ in range(2))
    biases = tuple(normal(channels) for _ in range(2))

    def written() -> torch.Tensor:
        shift, scale = condition.double()[:, :, None, None].chunk(2, 1)
        inner = field.double() * (1 + scale) + shift
        for weight, bias in zip(weights, biases, strict=True):
            silu = torch.nn.functional.silu(inner)
            inner = torch.nn.functional.conv2d(silu, weight.double(), bias.double(), padding=1)
        return field.double() + inner

    shift, scale = condition.chunk(2, 1)  # one for all pictures
    found, wanted = convolutions.modulated_convolutions(field, scale, shift, weights, biases), written()
    given, leaves = torch.randn(wanted.shape, generator=generator), (field, condition, *weights, *biases)
    pairs = [torch.autograd.grad(result, leaves, given.to(result.dtype)) for result in (found, wanted)]
    assert found.permute(0, 2, 3, 1).is_contiguous()
    for one, other in ((found, wanted), *zip(*pairs, strict=True)):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@needs_kernels
@pytest.mark.parametrize("channels, out", [(16, 32), (48, 16)])
@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (3, 6, 8), (2, 62, 64), (5, 12, 10)])
def test_halving_convolutions_are_those_of_torch(channels: int, out: int, batch: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(7)
    shapes = (batch, channels, height, width), (out, channels, 4, 4), (out,)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    found = convolutions.halving_convolution(*leaves)
    field, weight, bias = (leaf.double() for leaf in leaves)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.silu(field), weight, bias, stride=2, padding=1)
    given = torch.randn(wanted.shape, generator=generator)
    pairs = [torch.autograd.grad(result, leaves, given.to(result.dtype)) for result in (found, wanted)]
    assert found.permute(0, 2, 3, 1).is_contiguous()
    for one, other in ((found, wanted), *zip(*pairs, strict=True)):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@needs_kernels
def test_what_is_one_for_all_pictures_is_one_for_all(build, prompt_of) -> None:
    """Timestep, level and prompt of batch 1 beside four pictures, as torch's own operations allow."""
    model = build()
    z = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(3))
    prompt = prompt_of(model, 1)
    with torch.no_grad():
        found = model(z, torch.tensor([0.4]), prompt, torch.tensor([1])).sample
        wanted = model(z, torch.full((4,), 0.4), prompt.repeat(torch.zeros(4, dtype=torch.long)), torch.ones(4).long())
    assert (found - wanted.sample).abs().max() < 1e-4 * found.abs().max()


@needs_kernels
def test_other_shapes_and_types_are_refused() -> None:
    ones = torch.ones(2, 6, 4)
    with pytest.raises(ValueError, match=r"\(3, 1, 4\) where \(2, 1, 4\)"):
        ops.norm_modulate(ones, torch.ones(3, 1, 4), torch.ones(2, 1, 4), 1e-6)
    with pytest.raises(ValueError, match="float32"):
        ops.gated_linear(ones.double())
    with pytest.raises(ValueError, match=r"\(2, 1, 5\) where \(2, 1, 4\)"):
        ops.modulated_silu(torch.ones(2, 4, 3, 3), torch.ones(2, 4), torch.ones(2, 5))
    for field, taps in (
        ((1, 16, 4, 5), (3, 3)),
        ((1, 16, 5, 4), (3, 3)),
        ((1, 16, 0, 4), (3, 3)),
        ((1, 16, 4, 4), (1, 3)),
        ((1, 8, 4, 4), (3, 3)),
        ((1, 80, 4, 4), (3, 3)),
    ):
        channels = torch.ones(1, field[1])
        weights = tuple(torch.ones(field[1], field[1], *taps) for _ in range(2))
        with pytest.raises(ValueError, match="no convolution in C"):
            convolutions.modulated_convolutions(
                torch.ones(field), channels, channels, weights, (channels[0], channels[0])
            )
    for field, shape in (
        ((1, 16, 4, 5), (32, 16, 4, 4)),
        ((1, 16, 4, 4), (24, 16, 4, 4)),
        ((1, 16, 4, 4), (16, 32, 4, 4)),
    ):
        with pytest.raises(ValueError, match="no convolution in C"):
            convolutions.halving_convolution(torch.ones(field), torch.ones(shape), torch.ones(shape[0]))
    qkv = torch.ones(5, 3, 1, 8)
    for starts in ([0, 3], [1, 5], [0, 4, 3, 5], [0, 6], [5]):
        with pytest.raises(ValueError, match="does not divide 5 rows"):
            ops.text_attention(qkv, torch.tensor(starts, dtype=torch.int32))
    with pytest.raises(ValueError, match="int64"):
        ops.text_attention(qkv, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="5 tokens where 4"):
        ops.text_values(qkv[:, 0], torch.tensor([0, 5], dtype=torch.int32), 4)
    query, value = torch.ones(1, 6, 1, 8), torch.ones(1, 6, 1, 16)
    drift, sigma = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(ValueError, match="6 tokens"):
        grid = BlockGrid(height=3, width=3, block=4, radius=2)
        ops.window_attention(query, query, value, None, None, drift, sigma, grid)
    text = torch.ones(1, 1, 3, 16)
    with pytest.raises(ValueError, match="where"):
        grid = BlockGrid(height=2, width=3, block=4, radius=2)
        ops.window_attention(query, query, value, text, text[:, :, :2], drift, sigma, grid)


@needs_kernels
def test_what_is_not_a_number_is_not_hidden() -> None:
    grid = BlockGrid(height=2, width=3, block=4, radius=2)
    query, value = torch.ones(1, 6, 1, 8), torch.ones(1, 6, 1, 16)
    query[0, 2] = torch.nan
    found = ops.window_attention(
        query, torch.ones(1, 6, 1, 8), value, None, None, torch.zeros(1, 2), torch.ones(1), grid
    )
    assert found[0, 2].isnan().all() and found.isfinite().sum() == 5 * 16
    assert ops.gated_linear(torch.full((1, 40), torch.nan)).isnan().all()
    assert ops.modulated_silu(torch.full((1, 5, 3, 3), torch.nan)).isnan().all()
    field, zero, taps = torch.zeros(1, 16, 4, 8), torch.zeros(1, 16), torch.zeros(16, 16, 3, 3)
    field[0, 3, 1, 6] = torch.inf
    found = convolutions.modulated_convolutions(field, zero, zero, (taps, taps), (zero[0], zero[0]))
    assert not found[0, :, 1, 6].isfinite().any() and found[0, :, :, 0].isfinite().all()


@needs_kernels
def test_no_default_of_the_process_reaches_the_probe() -> None:
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert probe.first_wrong() is None
    finally:
        torch.set_default_dtype(before)


@needs_kernels
def test_where_a_graph_is_made_torch_does_it(build, prompt_of) -> None:
    model = build()
    prompt = prompt_of(model, 1)
    z = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(4))

    class Drawing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.model(z, torch.tensor([0.5]), prompt, torch.tensor([1])).sample

    exported = torch.export.export(Drawing(), (z,)).module()
    with torch.no_grad():
        assert (exported(z) - Drawing()(z)).abs().max() < 1e-4


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flag", ["-march=x86-64-v3", "-march=x86-64-v2"])
def test_narrower_registers_give_the_same(fresh: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, flag))
    assert probe.first_wrong() is None


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_threads_do_not_change_a_bit(case: probe.Case) -> None:
    kernel, inputs = case.kernel, case.inputs
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
    field = torch.cat([gate.repeat(1, 3), torch.full((1, 3), -1e30)], dim=1)[:, :, None, None].requires_grad_()
    found, wanted = ops.modulated_silu(field), torch.nn.functional.silu(field)
    assert torch.allclose(found, wanted, atol=1e-7)
    found, wanted = (torch.autograd.grad(result.sum(), field)[0] for result in (found, wanted))
    assert torch.allclose(found, wanted, atol=1e-6)


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
    monkeypatch.setenv("CC", 'gcc "x')
    assert "quotation" in reason()
    monkeypatch.setenv(SWITCH, "off")
    assert SWITCH in reason()


@needs_kernels
def test_a_umask_that_lets_the_group_write_is_no_hindrance(fresh: Path) -> None:
    before = os.umask(0o002)
    try:
        load_library()
    finally:
        os.umask(before)
    (library,) = fresh.iterdir()
    assert library.stat().st_mode & 0o777 == 0o700


@needs_kernels
def test_what_others_could_have_written_is_not_loaded(fresh: Path) -> None:
    load_library()
    (library,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    library.chmod(0o666)
    load_library.cache_clear()
    with pytest.raises(Unavailable, match="others may write it"):
        load_library()


@needs_kernels
def test_without_a_home_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build, "cache_folder", nowhere)
    load_library.cache_clear()
    try:
        with pytest.raises(Unavailable, match="home directory"):
            load_library()
    finally:
        load_library.cache_clear()


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
    assert probe.first_wrong() is None
    right = ops.gated_linear
    monkeypatch.setattr(ops, "gated_linear", lambda gate_up: right(gate_up) * 1.001)
    assert probe.first_wrong() == "gated_linear"


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
