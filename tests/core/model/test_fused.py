"""Kernels in Triton give what PyTorch's operations give, forward and backward: on a GPU, or interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.model.fused import ops
from physformer_core.model.fused.probe import what_fails
from physformer_core.model.geometry import rotate_pairs
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel
from physformer_core.model.updates import OPPOSED, TINY
from physformer_core.model.updates import renormalized_update as written_out

pytest.importorskip("triton")

EPSILON = 1e-6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def assert_same(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 2e-5
) -> None:
    """Compares results and the gradients of all inputs, relative to the size of what is compared."""
    ours, theirs = ([one.clone().requires_grad_() for one in inputs] for _ in range(2))
    found, wanted = fused(*ours), reference(*theirs)
    upstream = normal(*wanted.shape, seed=7).to(wanted.dtype)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found.backward(upstream)
    wanted.backward(upstream)
    pairs = [(found.detach(), wanted.detach()), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for one, other in pairs:
        assert one is not None and other is not None and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1)


# Widths that are and are not powers of two; tokens that fill tiles, do not, and need several programs.
SIZES = [(2, 37, 48), (1, 5, 64), (3, 700, 24), (1, 1, 16)]


@pytest.mark.parametrize(("batch", "tokens", "dim"), SIZES)
def test_norm_and_modulation(batch: int, tokens: int, dim: int) -> None:
    hidden = normal(batch, tokens, dim)
    hidden[0, 0] = 0  # a norm of nothing
    assert_same(
        lambda h, scale, shift: ops.norm_modulate(h, scale, shift, EPSILON, torch.float32),
        lambda h, scale, shift: F.rms_norm(h, (dim,), None, EPSILON) * (1 + scale) + shift,
        hidden, normal(batch, 1, dim, seed=1), normal(batch, 1, dim, seed=2),
    )  # fmt: skip


@pytest.mark.parametrize(("batch", "tokens", "dim"), SIZES)
def test_the_update_and_tokens_that_stay(batch: int, tokens: int, dim: int) -> None:
    hidden, output, gate = normal(batch, tokens, dim), normal(batch, tokens, dim, seed=1), normal(batch, 1, dim, seed=2)
    gate = gate.sign() * gate.abs().clamp_min(0.3)
    if tokens > 4:
        hidden[0, 1] = 0  # no energy to turn
        output[0, 2] = -hidden[0, 2] / gate[0, 0]  # opposed: the sum points nowhere
    assert_same(
        lambda h, out, g: ops.renormalized_update(h, out, g, TINY, OPPOSED),
        lambda h, out, g: written_out(h, g * out),
        hidden, output, gate,
    )  # fmt: skip


def test_closed_gates_leave_every_bit() -> None:
    hidden = normal(2, 9, 24)
    assert torch.equal(ops.renormalized_update(hidden, hidden * 3, hidden.new_zeros(2, 1, 24), TINY, OPPOSED), hidden)


@pytest.mark.parametrize(("heads", "dim", "turning"), [(3, 20, 8), (1, 24, 12), (2, 16, 0), (4, 12, 4)])
def test_norm_and_rotation(heads: int, dim: int, turning: int) -> None:
    angles = normal(1, 70, 1, turning // 2, seed=3)

    def reference(content: Tensor, gain: Tensor) -> Tensor:
        normed = F.rms_norm(content, (dim,), gain, EPSILON)
        turned = rotate_pairs(normed[..., :turning], angles.cos(), angles.sin())
        return torch.cat([turned, normed[..., turning:]], dim=-1)

    assert_same(
        lambda content, gain: ops.norm_rotate(content, gain, angles.cos(), angles.sin(), EPSILON),
        reference, normal(2, 70, heads, dim), normal(dim, seed=1), tolerance=5e-5,
    )  # fmt: skip


def test_norm_over_any_rows() -> None:
    assert_same(
        lambda x, gain: ops.rms_norm(x, gain, EPSILON),
        lambda x, gain: F.rms_norm(x, (12,), gain, EPSILON),
        normal(2, 3, 5, 12), normal(12, seed=1), tolerance=5e-5,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [10, 96])
def test_gated_linear(hidden: int) -> None:
    assert_same(ops.gated_linear, lambda x: F.silu(x[..., :hidden]) * x[..., hidden:], normal(2, 41, 2 * hidden))


def test_inputs_that_do_not_lie_in_order() -> None:
    content = normal(2, 3, 70, 20).transpose(1, 2)
    nothing = torch.empty(1, 70, 1, 0, device=DEVICE)
    gain = normal(20, seed=1)
    found = ops.norm_rotate(content, gain, nothing, nothing, EPSILON)
    assert torch.allclose(found, F.rms_norm(content, (20,), gain, EPSILON), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("numpy, in which Triton interprets, has no bfloat16")
    hidden, scale, shift = normal(2, 9, 48), normal(2, 1, 48, seed=1), normal(2, 1, 48, seed=2)
    normed = ops.norm_modulate(hidden, scale, shift, EPSILON, dtype)
    wanted = F.rms_norm(hidden, (48,), None, EPSILON) * (1 + scale) + shift
    assert normed.dtype == dtype and torch.allclose(normed.float(), wanted, rtol=1e-2, atol=1e-2)
    gate_up = normal(2, 9, 96).to(dtype).requires_grad_()
    out = ops.gated_linear(gate_up)
    out.float().square().sum().backward()
    assert out.dtype == dtype and gate_up.grad is not None and gate_up.grad.isfinite().all()


def test_each_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_fails(DEVICE) is None
    right = ops.norm_rotate
    monkeypatch.setattr(ops, "norm_rotate", lambda *given: 1.001 * right(*given))
    assert what_fails(DEVICE) == "norm_rotate differs from what it should be"

    def broken(*given: object) -> Tensor:
        raise RuntimeError("no such instruction\nat 0x0")

    monkeypatch.setattr(ops, "gated_linear", broken)
    monkeypatch.setattr(ops, "norm_rotate", right)
    assert what_fails(DEVICE) == "gated_linear cannot run: no such instruction"


def test_they_run_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ops.takes(torch.randn(2, 3)) and not ops.takes(torch.empty(2, 3, device="meta"))
    if not torch.cuda.is_available():
        assert ops.why_not() == "they need CUDA, and there is none here"
    monkeypatch.setenv(ops.SWITCH, "0")
    assert ops.why_not.__wrapped__() == "PHYSFORMER_FUSED=0 switches them off"


@needs_cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_network_is_the_same_with_them(
    build: Callable[..., PhysFormerTransformer2DModel],
    prompt_of: Callable[..., EncodedPrompt],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype | None,
) -> None:
    results = []
    for available in (True, False):
        monkeypatch.setattr(ops, "why_not", lambda available=available: None if available else "for comparison")
        model = build(patch_size=4, base_num_layers=2, base_hidden_size=48, base_num_heads=2, base_patch_size=2).cuda()
        embeds = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).cuda()
        pooled = torch.randn(2, 10, generator=torch.Generator().manual_seed(1)).cuda()
        z = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(2)).cuda()
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            prompt = model.encode_prompt(embeds, torch.ones(2, 5, dtype=torch.bool, device="cuda"), pooled)
            level = torch.zeros(2, dtype=torch.long, device="cuda")
            drawn = [model(z, level + 0.3, prompt, level, coarse).sample for coarse in (None, z / 2)]
        sum(one.square().mean() for one in drawn).backward()  # type: ignore[union-attr]
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((torch.cat([one.detach().flatten() for one in drawn]), grads))
    tolerance = 1e-4 if dtype is None else 0.05
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
