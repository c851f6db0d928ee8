"""The kernels of kernels.c on tensors: float32 on a CPU, without gradients. Each names what it is equal to in torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from physformer_core.model.geometry import (
    GEOMETRY_DIM,
    BlockGrid,
    kernel_logits,
    rotate_pairs,
    same_window,
    window_coordinates,
)
from physformer_core.model.native.build import Unavailable, load_library

_PROBE_TOLERANCE = 1e-5


def why_not() -> str | None:
    """Why the kernels cannot run here, in a few words, or None if they can."""
    try:
        load_library()
    except Unavailable as reason:
        return str(reason)
    return None if _verified() else "compiled, they fail their own test on this processor"


@functools.cache
def available() -> bool:
    """Whether the kernels can run in this process. The first call may compile them, which takes a second or two."""
    return why_not() is None


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors can be worked on here and now: float32 on a CPU, without gradients, not while a graph is
    compiled, and with kernels that can run."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and available()


def norm_modulate(hidden_states: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """``rms_norm(h) * (1 + scale) + shift``.

    Args:
        hidden_states: [B, N, dim].
        scale, shift: [B, 1, dim].
        epsilon: Added to the mean square.
    """
    h, out = hidden_states.contiguous(), torch.empty(hidden_states.shape)
    batch, tokens, dim = h.shape
    load_library().norm_modulate(
        *_pointers(h, scale.contiguous(), shift.contiguous(), out), batch, tokens, dim, epsilon, _threads()
    )
    return out


def renormalized_update(hidden_states: Tensor, output: Tensor, gate: Tensor, tiny: float, opposed: float) -> Tensor:
    """`model.updates.renormalized_update` of h and ``gate * output``.

    Args:
        hidden_states, output: [B, N, dim].
        gate: [B, 1, dim].
        tiny: Energy below which a token stays.
        opposed: Share of its energy below which what the sum has left points nowhere, so that it stays.
    """
    h, out = hidden_states.contiguous(), torch.empty(hidden_states.shape)
    batch, tokens, dim = h.shape
    load_library().renormalized_update(
        *_pointers(h, output.contiguous(), gate.contiguous(), out), batch, tokens, dim, tiny, opposed, _threads()
    )
    return out


def norm_rotate_(content: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> None:
    """Norms each head and turns its first dimensions, in place: ``rotate_pairs(rms_norm(content) * gain, cos, sin)``.

    Args:
        content: [B, N, heads, dim], contiguous.
        gain: [dim].
        cos, sin: [1, N, 1, turning / 2].
        epsilon: Added to the mean square.
    """
    assert content.is_contiguous()
    batch, tokens, heads, dim = content.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    load_library().norm_rotate(
        *_pointers(content, gain.contiguous(), cos, sin),
        *(batch, tokens, heads, dim, 2 * cos.shape[-1], epsilon, _threads()),
    )


def gated_linear(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., 2 * hidden] -> [..., hidden]."""
    gate_up = gate_up.contiguous()
    hidden = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], hidden))
    load_library().gated_linear(*_pointers(gate_up, out), out.numel() // hidden, hidden, _threads())
    return out


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    drift_hc: Tensor,
    sigma_h: Tensor,
    grid: BlockGrid,
) -> Tensor:
    """Blocks of queries against their windows and the text, of which nothing is copied and no logits are kept.

    Args:
        query, key: [B, N, heads, d_c] content in row order, the query already divided by sqrt(d_c).
        value: [B, N, heads, head_dim].
        text_key: [B, heads, T, head_dim] as `TextKeyValue` has it, or None.
        text_value: [B, heads, T, head_dim], or None.
        drift_hc: [heads, 2] in tokens.
        sigma_h: [heads] in tokens.
        grid: How the field is cut.

    Returns:
        [B, N, heads, head_dim], what `model.attention.reference_attention` returns.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, _, heads, content = query.shape
    dim = value.shape[-1]
    assert dim == content + GEOMETRY_DIM
    text = 0 if text_key is None else text_key.shape[2]
    pairs = [torch.empty(0) if t is None else t.contiguous() for t in (text_key, text_value)]
    drift, sigma, out = drift_hc.contiguous(), sigma_h.contiguous(), torch.empty(value.shape)
    library, threads = load_library(), _threads()
    scratch = torch.empty(
        threads * library.window_scratch(content, dim, text, grid.block, grid.radius), dtype=torch.uint8
    )
    library.window_attention(
        *_pointers(query, key, value, *pairs, drift, sigma, out, scratch),
        *(batch, grid.height, grid.width, heads, content, dim, text, grid.block, grid.radius, *grid.lead, threads),
    )
    return out


def _pointers(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _threads() -> int:
    return torch.get_num_threads()


@functools.cache
def _verified() -> bool:
    """Whether every kernel gives what torch gives, tried once per process on small tensors of awkward sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    with torch.no_grad():
        h, f, scale, shift = normal(2, 5, 37), normal(2, 5, 37), normal(2, 1, 37), normal(2, 1, 37)
        total = h + scale * f
        back = h.norm(dim=-1, keepdim=True) / total.norm(dim=-1, keepdim=True)
        content, gain, angle = normal(2, 5, 3, 22), normal(22), normal(1, 5, 1, 4)
        turning, still = (norm(content) * gain).split([8, 14], dim=-1)
        turned = torch.cat([rotate_pairs(turning, angle.cos(), angle.sin()), still], dim=-1)
        norm_rotate_(content, gain, angle.cos(), angle.sin(), 1e-6)
        query, key, text_key = 0.3 * normal(2, 77, 2, 9), normal(2, 77, 2, 9), normal(2, 2, 3, 17)
        value, text_value, drift, sigma = (
            normal(2, 77, 2, 17),
            normal(2, 2, 3, 17),
            normal(2, 2),
            torch.tensor([0.8, 2]),
        )
        grid = BlockGrid(height=7, width=11, block=4, radius=2, shift=2)
        places = window_coordinates(7, 11).reshape(-1, 2)
        logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) + kernel_logits(places, places, drift, sigma)
        told = query.transpose(1, 2) @ text_key[..., :9].mT + (text_key[..., 13] / sigma.square()[:, None])[:, :, None]
        logits = torch.cat([logits.masked_fill(~same_window(grid), -torch.inf), told], dim=-1)
        read = logits.softmax(-1) @ torch.cat([value.transpose(1, 2), text_value], dim=2)
        pairs = [
            (norm_modulate(h, scale, shift, 1e-6), norm(h) * (1 + scale) + shift),
            (renormalized_update(h, f, scale, 0.0, 0.0), back * total),
            (gated_linear(h[..., :36]), torch.nn.functional.silu(h[..., :18]) * h[..., 18:36]),
            (content, turned),
            (window_attention(query, key, value, text_key, text_value, drift, sigma, grid), read.transpose(1, 2)),
        ]
        return all(bool((found - wanted).abs().max() < _PROBE_TOLERANCE) for found, wanted in pairs)
