"""The ``flex`` backend: one fused kernel for windows, drift, width and text, on CUDA.

FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496) compiles the logarithm of the transport kernel into
the attention kernel as a score modification, in float32 whatever q and k are, and skips tiles of keys that no query of
a tile may see. Neither windows nor logits are ever written to memory, where ``halo`` gathers each key about four times.

Tokens are put in the order of attention blocks first, so that the tokens of a tile are neighbours in the picture and
the number of tiles that are not skipped grows with the number of tokens, not faster.

Without a compiler for it, on a CPU, FlexAttention writes all logits out: right, slow and quadratic. `flex_attend` can
be asked for that, which is how it is tested against ``reference``; the backend refuses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from physformer_core.model.geometry import GEOMETRY_DIM, BlockGrid, kernel_logits

FLEX_TOKENS = 4096
"""Fields from this many tokens take ``flex`` under ``auto`` on CUDA: below, compiling it costs more than it saves."""

_PROBE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class FlexGrid:
    """A field in the order of its attention blocks.

    Args:
        order: Long [N], the token in row order that stands at each place.
        inverse: Long [N], the place at which each token in row order stands.
        rows, columns: Long [N], where the token at each place is, counted from the padded field's corner.
        first_row, first_column: Long [N], where the window of its block begins.
        window: Side of a window.
    """

    order: Tensor
    inverse: Tensor
    rows: Tensor
    columns: Tensor
    first_row: Tensor
    first_column: Tensor
    window: int


def why_no_flex(device: torch.device) -> str | None:
    """Why ``flex`` cannot run on a device, in a few words, or None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "its kernels need CUDA, and there is none here"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton, which compiles it, is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or later"
    return None


@functools.cache
def flex_verified(device: torch.device) -> bool:
    """Whether the compiled kernel gives what attention written out gives, tried once per process on a small field."""
    grid = BlockGrid(height=19, width=23, block=8, radius=4, shift=4)
    generator = torch.Generator().manual_seed(0)
    tokens, heads, content = grid.height * grid.width, 2, 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    query, key = normal(1, tokens, heads, content) * content**-0.5, normal(1, tokens, heads, content)
    value = normal(1, tokens, heads, content + GEOMETRY_DIM)
    drift, sigma = torch.tanh(normal(heads, 2)), torch.full((heads,), 1.5, device=device)
    with torch.no_grad():
        found = flex_attend(query, key, value, None, None, drift, sigma, grid)
        places = torch.stack(torch.meshgrid(torch.arange(19.0), torch.arange(23.0), indexing="ij"), -1).to(device)
        logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        logits = logits + kernel_logits(places.reshape(-1, 2), places.reshape(-1, 2), drift, sigma)
        laid = flex_grid(grid, device)
        near = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
        near[laid.order[:, None], laid.order[None]] = _near(laid)
        wanted = (logits.masked_fill(~near, float("-inf")).softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
        return bool((found - wanted).abs().max() < _PROBE_TOLERANCE)


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    drift_hc: Tensor,
    sigma_h: Tensor,
    grid: BlockGrid,
    *,
    compiled: bool = True,
) -> Tensor:
    """Local attention of a field to itself and to the text.

    Args:
        query, key: [B, N, heads, d_c] content in row order, the query already divided by sqrt(d_c).
        value: [B, N, heads, head_dim].
        text_key: [B, heads, T, head_dim] as `TextKeyValue` has it, or None.
        text_value: [B, heads, T, head_dim], or None.
        drift_hc: [heads, 2] in tokens.
        sigma_h: [heads] in tokens.
        grid: How the field is cut.
        compiled: False writes all logits out: for tests.

    Returns:
        [B, N, heads, head_dim].
    """
    batch, tokens, heads, _ = query.shape
    laid = flex_grid(grid, query.device)
    # Zeros in the reserved dimensions: the kernel computes the geometry itself, and the text's altitude rides there.
    q, k = (F.pad(t[:, laid.order].transpose(1, 2), (0, GEOMETRY_DIM)) for t in (query, key))
    v = value[:, laid.order].transpose(1, 2)
    inverse_h = 1 / sigma_h.float().square()
    drift_y, drift_x = drift_hc.float().unbind(-1)
    text_tokens = 0 if text_key is None else text_key.shape[2]
    bias = q.new_zeros(batch, heads, 1, dtype=torch.float32)
    if text_key is not None and text_value is not None and text_tokens:
        k, v = torch.cat([k, text_key], dim=2), torch.cat([v, text_value], dim=2)
        altitude = text_key[..., -GEOMETRY_DIM:][..., 4].float()
        bias = (altitude * inverse_h[None, :, None]).contiguous()
    rows, columns = (F.pad(t, (0, text_tokens)) for t in (laid.rows, laid.columns))

    def transport(score: Tensor, b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        y = rows[q_at] + drift_y[h] - rows[k_at]
        x = columns[q_at] + drift_x[h] - columns[k_at]
        told = bias[b, h, (k_at - tokens).clamp(0)]
        return score + torch.where(k_at >= tokens, told, (y * y + x * x) * (-0.5 * inverse_h[h]))

    attend = _compiled() if compiled else flex_attention
    mask = _block_mask(grid, text_tokens, query.device)
    output: Tensor = attend(
        q.contiguous(), k.contiguous(), v.contiguous(), score_mod=transport, block_mask=mask, scale=1.0
    )
    return output.transpose(1, 2)[:, laid.inverse]


@functools.lru_cache(maxsize=32)
def flex_grid(grid: BlockGrid, device: torch.device) -> FlexGrid:
    """Puts the tokens of a field in the order of their attention blocks."""
    lead_y, lead_x = grid.lead
    row = (torch.arange(grid.height, device=device) + lead_y)[:, None].expand(-1, grid.width).flatten()
    column = (torch.arange(grid.width, device=device) + lead_x)[None].expand(grid.height, -1).flatten()
    block = (row // grid.block) * grid.blocks[1] + column // grid.block
    order = torch.argsort(block, stable=True)
    row, column = row[order], column[order]
    starts = [axis // grid.block * grid.block - grid.radius for axis in (row, column)]
    return FlexGrid(order, torch.argsort(order), row, column, starts[0], starts[1], grid.window)


@functools.lru_cache(maxsize=32)
def _block_mask(grid: BlockGrid, text_tokens: int, device: torch.device) -> BlockMask:
    """Which tiles of keys a tile of queries may see: the same for all layers of a parity, all steps and pictures."""
    laid, tokens = flex_grid(grid, device), grid.height * grid.width
    rows, columns = (F.pad(t, (0, text_tokens)) for t in (laid.rows, laid.columns))

    def visible(_b: Tensor, _h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        y, x = rows[k_at] - laid.first_row[q_at], columns[k_at] - laid.first_column[q_at]
        return (k_at >= tokens) | ((y >= 0) & (y < laid.window) & (x >= 0) & (x < laid.window))

    return create_block_mask(visible, None, None, tokens, tokens + text_tokens, device=str(device))


def _near(laid: FlexGrid) -> Tensor:
    """Bool [N, N] in block order: which keys are in a query's window."""
    y, x = laid.rows[None] - laid.first_row[:, None], laid.columns[None] - laid.first_column[:, None]
    return (y >= 0) & (y < laid.window) & (x >= 0) & (x < laid.window)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
