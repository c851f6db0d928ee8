"""Semi-Lagrangian local attention: each token reads what lay upstream of it, and the text, in one softmax.

    logit(q, k) = q . k / sqrt(d_c) - |x_q + d_h - x_k|^2 / (2 sigma_h^2)

The second term is the logarithm of the advection-diffusion kernel with drift d_h and width sigma_h per head. It is
bilinear in features of the query's and the key's position and rides in ``GEOMETRY_DIM`` reserved dimensions, so that
plain ``scaled_dot_product_attention`` computes it and every fused kernel stays eligible. Keys outside a block's
window, outside the picture, or masked in the text are put infinitely far away instead of being masked.

Backends, all with the signature of `reference_attention`:

* ``reference``: logits, mask and softmax written out. What the others are tested against.
* ``dense``: one fused call over the whole field, with a mask only where the window does not cover it.
* ``halo``: blocks of queries against their windows, in chunks of block rows. Linear in the number of tokens.
* ``native``: the same blocks in C, without copies of windows: float32 on a CPU; see `physformer_core.model.native`.
* ``flex``: one fused kernel, on CUDA alone; see `physformer_core.model.flex`.

``auto`` takes ``native`` where it can run, elsewhere ``dense`` up to `DENSE_TOKENS` and above that ``halo``, and
on CUDA without gradients ``flex`` from `FLEX_TOKENS` where its kernel passes its own test. All return the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from physformer_core.errors import ConfigError
from physformer_core.model.flex import FLEX_TOKENS, flex_attend, flex_verified, why_no_flex
from physformer_core.model.fused import ops as fused
from physformer_core.model.geometry import (
    FAR,
    GEOMETRY_DIM,
    MAX_WINDOW,
    BlockGrid,
    kernel_logits,
    key_geometry,
    query_geometry,
    rotate_pairs,
    same_window,
    window_coordinates,
)
from physformer_core.model.native import ops as native
from physformer_core.model.text_rows import TextRows
from physformer_core.native.build import switched_off

Backend = Literal["auto", "reference", "dense", "halo", "native", "flex"]

DENSE_TOKENS = 512
"""Fields up to this many tokens take one dense call (measured: see docs/performance.md)."""

FLAT_SIGMA = 12.0
"""Kernel width (tokens) of the ablation without drift: nearly flat over a window, and still hides far keys."""

NORM_EPSILON = 1e-6
"""What norms add to a mean square."""

CHUNK_WINDOW_BYTES = 32 * 2**20
"""Key windows gathered at once without gradients, in bytes: large enough to feed all cores, small enough to stay
near the cache."""


@dataclass
class TextKeyValue:
    """Keys and values of the prompt for one block, computed once per prompt.

    Args:
        key: [B, heads, T, head_dim]; rotated dimensions are zero, the geometry carries the learned altitude.
        value: [B, heads, T, head_dim].
    """

    key: Tensor
    value: Tensor


@dataclass
class AttentionPlan:
    """What every block's attention shares: the grid, positions and the chosen backend, worked out once per field.

    Args:
        backend: The backend that runs (``auto`` already resolved).
        grid: How the field is cut.
        cos, sin: [1, N, 1, rotary_dim / 2] rotary factors.
        coordinates_nc: [N, 2] half-integer coordinates about the field's centre (``dense`` and ``reference``).
        mask_nn: Bool [N, N], or None where every window holds the whole field.
    """

    backend: Literal["reference", "dense", "halo", "native", "flex"]
    grid: BlockGrid
    cos: Tensor
    sin: Tensor
    coordinates_nc: Tensor | None = None
    mask_nn: Tensor | None = None


def plan_attention(grid: BlockGrid, backend: Backend, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> AttentionPlan:
    """Resolves ``auto`` and prepares what the backend needs.

    Raises:
        ConfigError: For ``dense`` in half precision over a field above `MAX_WINDOW`, whose coordinates would round, and
            for ``flex`` and ``native`` where they cannot run.
    """
    longest = max(grid.height, grid.width)
    if backend == "auto":
        small = grid.height * grid.width <= DENSE_TOKENS and longest <= MAX_WINDOW
        if why_no_native(cos.device, dtype) is None:
            backend = "native"
        else:
            backend = "dense" if small else "flex" if _takes_flex(grid, cos.device) else "halo"
    elif backend in ("flex", "native"):
        reason = why_no_flex(cos.device) if backend == "flex" else why_no_native(cos.device, dtype)
        if reason is not None:
            hint = "use 'auto' or 'halo'"
            raise ConfigError(f"the attention backend '{backend}' cannot run here: {reason}", hint=hint)
    if backend in ("halo", "native", "flex"):
        return AttentionPlan(backend, grid, cos, sin)
    if backend == "dense" and dtype != torch.float32 and longest > MAX_WINDOW:
        raise ConfigError(
            f"dense attention over {grid.height}x{grid.width} tokens needs float32",
            hint="use backend 'halo' (the default), or --dtype fp32",
        )
    coordinates = window_coordinates(grid.height, grid.width, cos.device).reshape(-1, 2)
    mask = None if grid.covers_everything() else same_window(grid, cos.device)
    return AttentionPlan(backend, grid, cos, sin, coordinates, mask)


def why_no_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``native`` cannot run with weights of a dtype on a device, in a few words, or None if it can."""
    if device.type != "cpu":
        return "its kernels are for CPUs"
    if native.graph_is_made():
        return "a graph is compiled or exported"
    if dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "its kernels are for float32"
    return native.why_not()


def kernels_missed(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels (in C on a CPU, in Triton on CUDA) do not run where they are made for, in a few words; None if they
    do, or nobody expects them to."""
    if device.type == "cuda":
        return None if fused.switched_off() else fused.why_not()
    made_for = device.type == "cpu" and dtype == torch.float32
    return native.why_not() if made_for and not switched_off() else None


def _takes_flex(grid: BlockGrid, device: torch.device) -> bool:
    """Whether ``auto`` takes ``flex``. Not with gradients: those of drift and width go through it untested."""
    if device.type != "cuda" or grid.height * grid.width < FLEX_TOKENS or torch.is_grad_enabled():
        return False
    return why_no_flex(device) is None and flex_verified(device)


@dataclass(frozen=True)
class Transport:
    """One block's learned kernel: drift [heads, 2] and width [heads], in tokens."""

    drift_hc: Tensor
    sigma_h: Tensor


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, text: TextKeyValue | None, transport: Transport, plan: AttentionPlan
) -> Tensor:
    """Attention written out in float32, for checking.

    Args:
        query, key: [B, N, heads, d_c] content of the field's tokens in row order, the query already divided by
            sqrt(d_c).
        value: [B, N, heads, head_dim].
        text: Keys and values of the prompt, or None.
        transport: Drift and width of the heads.
        plan: Geometry of the field.

    Returns:
        [B, N, heads, head_dim].
    """
    assert plan.coordinates_nc is not None
    q, k, v = (t.transpose(1, 2).float() for t in (query, key, value))
    kernel = kernel_logits(plan.coordinates_nc, plan.coordinates_nc, transport.drift_hc, transport.sigma_h)
    logits = q @ k.transpose(-1, -2) + kernel
    if plan.mask_nn is not None:
        logits = logits.masked_fill(~plan.mask_nn, -math.inf)
    if text is not None:
        content, geometry = text.key.float().split([text.key.shape[-1] - GEOMETRY_DIM, GEOMETRY_DIM], dim=-1)
        altitude = geometry[..., 4] / transport.sigma_h.float().square()[None, :, None]
        logits = torch.cat([logits, q @ content.transpose(-1, -2) + altitude[:, :, None]], dim=-1)
        v = torch.cat([v, text.value.float()], dim=2)
    return (logits.softmax(-1) @ v).transpose(1, 2).to(value.dtype)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, text: TextKeyValue | None, transport: Transport, plan: AttentionPlan
) -> Tensor:
    """One fused call over the whole field; see `reference_attention` for shapes."""
    assert plan.coordinates_nc is not None
    batch, _, heads, _ = query.shape
    q_geometry = query_geometry(plan.coordinates_nc, transport.drift_hc, transport.sigma_h, query.dtype)
    k_geometry = key_geometry(plan.coordinates_nc, key.dtype)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    q = torch.cat([q, q_geometry[None].expand(batch, -1, -1, -1)], dim=-1)
    k = torch.cat([k, k_geometry[None, None].expand(batch, heads, -1, -1)], dim=-1)
    mask = plan.mask_nn
    if text is not None:
        k = torch.cat([k, text.key], dim=2)
        v = torch.cat([v, text.value], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, text.key.shape[2]), value=True)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return output.transpose(1, 2)


def halo_attention(
    query: Tensor, key: Tensor, value: Tensor, text: TextKeyValue | None, transport: Transport, plan: AttentionPlan
) -> Tensor:
    """Blocks of queries against their windows; see `reference_attention` for shapes.

    Every block is one small dense attention of block^2 queries over window^2 + T keys, batched over blocks: the work
    per token does not depend on the size of the field. Without gradients the windows are gathered a few block rows
    at a time, which bounds memory.
    """
    grid = plan.grid
    height, width = grid.height, grid.width
    batch, _, heads, head_dim = value.shape
    query, key, value = (t.unflatten(1, (height, width)) for t in (query, key, value))
    blocks_y, blocks_x = grid.blocks
    block, radius, window = grid.block, grid.radius, grid.window
    (lead_y, lead_x), text_tokens = grid.lead, 0 if text is None else text.key.shape[2]
    tail_y, tail_x = blocks_y * block - lead_y - height, blocks_x * block - lead_x - width

    cells = window * window
    row_bytes = batch * blocks_x * (cells + text_tokens) * heads * head_dim * 2 * value.element_size()
    rows_at_once = blocks_y if torch.is_grad_enabled() else max(1, min(blocks_y, CHUNK_WINDOW_BYTES // row_bytes))

    query = F.pad(query, (0, 0, 0, 0, lead_x, tail_x, lead_y, tail_y))
    halo = (0, 0, 0, 0, lead_x + radius, tail_x + radius, lead_y + radius, tail_y + radius)
    key, value = F.pad(key, halo), F.pad(value, halo)

    window_yx = window_coordinates(window, window, query.device)
    own = window_yx[radius : radius + block, radius : radius + block].reshape(-1, 2)
    q_geometry = query_geometry(own, transport.drift_hc, transport.sigma_h, query.dtype).transpose(0, 1)
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=query.device), halo[4:])

    # Windows are copied straight into the tensors that attention reads. With gradients there is one chunk, so that
    # nothing autograd has saved is overwritten.
    content = key.shape[-1]
    keys = key.new_empty(batch, rows_at_once, blocks_x, cells + text_tokens, heads, head_dim)
    values = value.new_empty(keys.shape)
    if text is not None:
        keys[:, :, :, cells:] = text.key.transpose(1, 2)[:, None, None]
        values[:, :, :, cells:] = text.value.transpose(1, 2)[:, None, None]
    outputs = []
    for first in range(0, blocks_y, rows_at_once):
        count = min(rows_at_once, blocks_y - first)
        rows = slice(first * block, (first + count) * block)
        halo_rows = slice(first * block, (first + count) * block + 2 * radius)
        number = batch * count * blocks_x

        q = query[:, rows].unflatten(1, (count, block)).unflatten(3, (blocks_x, block)).transpose(2, 3)
        q = torch.cat([q.flatten(3, 4), q_geometry.expand(batch, count, blocks_x, -1, -1, -1)], dim=-1)

        valid = inside[halo_rows].unfold(0, window, block).unfold(1, window, block).reshape(count, blocks_x, cells)
        k, v = keys[:, :count], values[:, :count]
        k[:, :, :, :cells, :, content:] = key_geometry(window_yx.reshape(-1, 2), key.dtype, valid)[None, :, :, :, None]
        k[:, :, :, :cells, :, :content].unflatten(3, (window, window)).copy_(_windows(key[:, halo_rows], grid))
        v[:, :, :, :cells].unflatten(3, (window, window)).copy_(_windows(value[:, halo_rows], grid))
        q, k, v = (t.reshape(number, -1, heads, head_dim).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        out = out.transpose(1, 2).reshape(batch, count, blocks_x, block, block, heads, head_dim).transpose(2, 3)
        outputs.append(out.reshape(batch, count * block, blocks_x * block, heads, head_dim))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output[:, lead_y : lead_y + height, lead_x : lead_x + width].flatten(1, 2)


def _windows(rows: Tensor, grid: BlockGrid) -> Tensor:
    """Overlapping windows [B, ny, nx, window, window, heads, D] of padded rows [B, H, W, heads, D], as a view."""
    windows = rows.unfold(1, grid.window, grid.block).unfold(2, grid.window, grid.block)
    return windows.permute(0, 1, 2, 5, 6, 3, 4)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, text: TextKeyValue | None, transport: Transport, plan: AttentionPlan
) -> Tensor:
    """One fused kernel over the field in block order; see `reference_attention` for shapes."""
    text_key, text_value = (None, None) if text is None else (text.key, text.value)
    return flex_attend(query, key, value, text_key, text_value, transport.drift_hc, transport.sigma_h, plan.grid)


@torch.compiler.disable
def native_attention(
    query: Tensor, key: Tensor, value: Tensor, text: TextKeyValue | None, transport: Transport, plan: AttentionPlan
) -> Tensor:
    """Blocks of queries against their windows, in C; see `reference_attention` for shapes."""
    text_key, text_value = (None, None) if text is None else (text.key, text.value)
    kernel = (transport.drift_hc, transport.sigma_h)
    return native.window_attention(query, key, value, text_key, text_value, *kernel, plan.grid)


_halo_as_written = torch.compiler.disable(halo_attention)


def _halo(query: Tensor, *rest: Any) -> Tensor:
    """`halo_attention`, left out of compiled graphs on CPUs and where there are gradients: torch 2.13 compiles the
    backward pass of its overlapping windows, on a CPU, to code whose gradients are wrong and that reads beyond its
    memory, and the forward pass to code that takes longer than what it replaces, after minutes of compiling."""
    written = torch.is_grad_enabled() or query.device.type == "cpu"
    return _halo_as_written(query, *rest) if written else halo_attention(query, *rest)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_attention,
    "dense": dense_attention,
    "halo": _halo,
    "native": native_attention,
    "flex": fused_attention,
}


def check_backend(name: str) -> None:
    """Refuses what is neither ``auto`` nor a backend.

    Raises:
        ConfigError: It is not.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"unknown attention backend '{name}'", hint="one of auto, " + ", ".join(BACKENDS))


class GainNorm(nn.Module):
    """RMS norm over the last dimension with a learned gain, one at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for kernels in (native, fused):
            if kernels.takes(hidden_states, self.weight):
                return kernels.rms_norm(hidden_states, self.weight, NORM_EPSILON)
        return F.rms_norm(hidden_states, self.weight.shape, self.gain(hidden_states), NORM_EPSILON)

    def gain(self, hidden_states: Tensor) -> Tensor:
        """The weight, for tokens of this dtype."""
        return self.weight


class HeadNorm(GainNorm):
    """The same over the content of a head (QK-norm): logits of unrelated tokens have unit variance at first."""

    def gain(self, hidden_states: Tensor) -> Tensor:
        return self.weight.to(hidden_states.dtype)  # under autocast the fused norm wants one dtype


class PhysFormerAttnProcessor:
    """Runs `PhysFormerAttention` with the backend its plan names."""

    def __call__(
        self, attn: PhysFormerAttention, hidden_states: Tensor, text: TextKeyValue | None, plan: AttentionPlan
    ) -> Tensor:
        query, key, value = attn.project(hidden_states, plan.cos, plan.sin)
        output = BACKENDS[plan.backend](query, key, value, text, Transport(attn.drift(), attn.sigma()), plan)
        return attn.to_out[0](output.flatten(2))


class PhysFormerAttention(nn.Module, AttentionModuleMixin):
    """Multi-head semi-Lagrangian attention of a field to its neighbourhood and to the text.

    Of a head's ``head_dim`` query/key dimensions, `GEOMETRY_DIM` are reserved for the transport kernel; of the rest,
    the content, about half turns with position (axial rotary embedding) and half does not. Text keys use only the
    half that does not turn, so what a token reads from the text does not depend on where it stands.

    Args:
        dim: Width of the tokens.
        num_heads: Heads.
        text_dim: Width of the text stream.
        max_drift: Bound on the drift in tokens.
        max_sigma: Bound on the kernel's width in tokens.
        drift: Whether the heads drift and weigh distance at all; without it only the window's cut-off is local.
    """

    _default_processor_cls = PhysFormerAttnProcessor
    _available_processors = [PhysFormerAttnProcessor]
    _supports_qkv_fusion = False  # queries and keys are narrower than values

    def __init__(
        self, dim: int, num_heads: int, text_dim: int, max_drift: float, max_sigma: float, drift: bool = True
    ) -> None:
        super().__init__()
        self.heads = num_heads
        self.head_dim = dim // num_heads
        self.content_dim = self.head_dim - GEOMETRY_DIM
        self.rotary_dim = self.content_dim // 2 // 4 * 4
        self.max_drift, self.max_sigma, self.use_drift = max_drift, max_sigma, drift
        inner = num_heads * self.content_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q, self.norm_k = HeadNorm(self.content_dim), HeadNorm(self.content_dim)
        self.add_k_proj = nn.Linear(text_dim, num_heads * (self.content_dim - self.rotary_dim), bias=False)
        self.add_v_proj = nn.Linear(text_dim, dim, bias=False)
        self.norm_added_k = HeadNorm(self.content_dim - self.rotary_dim)
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
        compass = torch.stack([-angle.cos(), angle.sin()], dim=-1)  # north first, then clockwise
        self.drift_logit = nn.Parameter(torch.atanh(compass / max_drift))
        width = torch.where(torch.arange(num_heads) % 2 == 0, 0.9 * max_sigma, 0.5 * max_sigma)
        self.sigma_logit = nn.Parameter(torch.logit(width / max_sigma))
        self.text_altitude = nn.Parameter(torch.zeros(num_heads))
        self.processor: Callable[..., Tensor] = PhysFormerAttnProcessor()

    def drift(self) -> Tensor:
        """[heads, 2] drift (y, x) in tokens, within ``max_drift`` per axis."""
        return self.max_drift * torch.tanh(self.drift_logit.float()) * self.use_drift

    def sigma(self) -> Tensor:
        """[heads] kernel width in tokens, in (0.3, max_sigma)."""
        if not self.use_drift:
            return torch.full_like(self.sigma_logit, FLAT_SIGMA, dtype=torch.float32)
        return 0.3 + (self.max_sigma - 0.3) * torch.sigmoid(self.sigma_logit.float())

    def project(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed, scaled and rotated query and key content, and the value: each [B, N, heads, .]."""
        query = self.to_q(hidden_states).unflatten(-1, (self.heads, -1))
        key = self.to_k(hidden_states).unflatten(-1, (self.heads, -1))
        value = self.to_v(hidden_states).unflatten(-1, (self.heads, -1))
        for kernels in (native, fused):
            if kernels.takes(query):
                gain = self.norm_q.weight * self.content_dim**-0.5
                query = kernels.norm_rotate(query, gain, cos, sin, NORM_EPSILON)
                return query, kernels.norm_rotate(key, self.norm_k.weight, cos, sin, NORM_EPSILON), value
        query, key = self.norm_q(query) * self.content_dim**-0.5, self.norm_k(key)
        # CUDA's autocast norms in float32. The geometry must be split for the dtype that attention will run in.
        query, key = query.to(value.dtype), key.to(value.dtype)
        split = [self.rotary_dim, self.content_dim - self.rotary_dim]
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)

        def rotate(content: Tensor) -> Tensor:
            turning, still = content.split(split, dim=-1)
            return torch.cat([rotate_pairs(turning, cos, sin), still], dim=-1)

        return rotate(query), rotate(key), value

    def encode_text(self, text_states: Tensor, mask: Tensor, rows: TextRows | None = None) -> TextKeyValue:
        """Keys and values of the prompt.

        Args:
            text_states: [B, T, text_dim], or [1, R, text_dim] of ``rows``.
            mask: Bool [B, T]; False hides a token.
            rows: Where packed text states stand.
        """
        batch, tokens = mask.shape
        content = self.add_k_proj(text_states).unflatten(-1, (self.heads, -1))
        value = self.add_v_proj(text_states).unflatten(-1, (self.heads, -1))
        if rows is not None and native.takes(content, value, self.norm_added_k.weight, self.text_altitude):
            layout = (rows.starts, tokens)
            shape = (self.norm_added_k.weight, self.text_altitude, *layout, self.rotary_dim, NORM_EPSILON)
            return TextKeyValue(native.text_keys(content[0], *shape), native.text_values(value[0], *layout))
        content = self.norm_added_k(content)
        if rows is not None:
            content, value = rows.spread(content), rows.spread(value)
        content, value = content.transpose(1, 2).to(value.dtype), value.transpose(1, 2)
        altitude = self.text_altitude.float()[None, :, None].expand(batch, -1, tokens)
        altitude = torch.where(mask[:, None], altitude, -FAR).to(content.dtype)
        # One altitude in the pair of slots that the query multiplies by 1/sigma^2 (its high and its low part).
        geometry = torch.stack([altitude, altitude], dim=-1)
        return TextKeyValue(torch.cat([F.pad(content, (self.rotary_dim, 0)), F.pad(geometry, (4, 2))], dim=-1), value)

    def forward(self, hidden_states: Tensor, text: TextKeyValue | None, plan: AttentionPlan) -> Tensor:
        """Attention output [B, N, dim] for tokens [B, N, dim] in row order."""
        output: Tensor = self.processor(self, hidden_states, text, plan)
        return output
