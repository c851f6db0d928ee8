"""What lies between matrix products, in Triton (Tillet et al. 2019, https://doi.org/10.1145/3315508.3329973).

Each goes over memory once, forward and backward, where PyTorch's operations go over it four to ten times; norms over a
head's few dimensions, for which PyTorch starts a block of threads each, cost a tenth. They compute in float32 whatever
they read and write, and are the same for any number of tokens: nothing is compiled anew for another size.

A *tile* is some rows (tokens) of one picture, so that what a picture's condition multiplies is loaded once. Gradients
of conditions are sums over tokens: every program writes the sum of its rows to a place of its own, and these are added
up afterwards, so that results do not depend on which program ends first.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_modulate(
    h_at, scale_at, shift_at, out_at, tokens, epsilon, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr
):
    """out = h / rms(h) * (1 + scale) + shift. One program: ROWS tokens of picture ``program_id(0)``."""
    picture, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    kept = (token[:, None] < tokens) & (column[None, :] < D)
    place = (picture * tokens + token)[:, None] * D + column[None, :]
    h = tl.load(h_at + place, mask=kept, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + picture * D + column, mask=column < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_at + picture * D + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(h * h, 1) / D + epsilon)
    out = h * inverse[:, None] * (1 + scale)[None, :] + shift[None, :]
    tl.store(out_at + place, out.to(out_at.dtype.element_ty), mask=kept)


@triton.jit
def norm_modulate_back(
    grad_at, h_at, scale_at, of_h_at, of_scale_at, of_shift_at, tokens, epsilon,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of a picture, and their sums of gradients of scale and shift."""
    picture, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    scale = tl.load(scale_at + picture * D + column, mask=column < D, other=0.0).to(tl.float32)
    of_scale = tl.zeros([COLS], tl.float32)
    of_shift = tl.zeros([COLS], tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        kept = (token[:, None] < tokens) & (column[None, :] < D)
        place = (picture * tokens + token)[:, None] * D + column[None, :]
        h = tl.load(h_at + place, mask=kept, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + place, mask=kept, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(h * h, 1) / D + epsilon)[:, None]
        normed = h * inverse
        of_scale += tl.sum(grad * normed, 0)
        of_shift += tl.sum(grad, 0)
        of_normed = grad * (1 + scale)[None, :]
        along = tl.sum(of_normed * normed, 1) / D
        tl.store(of_h_at + place, inverse * (of_normed - along[:, None] * normed), mask=kept)
    sums = (picture * tl.num_programs(1) + tl.program_id(1)) * D + column
    tl.store(of_scale_at + sums, of_scale, mask=column < D)
    tl.store(of_shift_at + sums, of_shift, mask=column < D)


@triton.jit
def _renormalized(h, update, tiny, opposed):
    """The parts of |h| (h + f) / |h + f|: what is scaled, by how much, both energies, and whether the token stays."""
    total = h + update
    square, square_total = tl.sum(h * h, 1), tl.sum(total * total, 1)
    still = (square_total <= opposed * square) | (square < tiny)
    square = tl.maximum(square, tiny)
    square_total = tl.where(still, square, square_total)
    total = tl.where(still[:, None], h, total)
    # Roots and quotients are approximate here, and a closed gate must leave every bit.
    factor = tl.where(tl.max(tl.abs(update), 1) > 0, tl.sqrt(square / square_total), 1.0)
    return total, factor, square, square_total, still


@triton.jit
def renormalized_update(
    h_at, output_at, gate_at, out_at, tokens, tiny, opposed,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = |h| (h + gate * output) / |h + gate * output|; see `model.updates.renormalized_update`."""
    picture, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    kept = (token[:, None] < tokens) & (column[None, :] < D)
    place = (picture * tokens + token)[:, None] * D + column[None, :]
    h = tl.load(h_at + place, mask=kept, other=0.0)
    output = tl.load(output_at + place, mask=kept, other=0.0).to(tl.float32)
    gate = tl.load(gate_at + picture * D + column, mask=column < D, other=0.0).to(tl.float32)
    total, factor, _, _, _ = _renormalized(h, gate[None, :] * output, tiny, opposed)
    tl.store(out_at + place, factor[:, None] * total, mask=kept)


@triton.jit
def renormalized_update_back(
    grad_at, h_at, output_at, gate_at, of_h_at, of_output_at, of_gate_at, tokens, tiny, opposed,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of a picture, and their sum of gradients of the gate; see `model.updates`."""
    picture, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    gate = tl.load(gate_at + picture * D + column, mask=column < D, other=0.0).to(tl.float32)
    of_gate = tl.zeros([COLS], tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        kept = (token[:, None] < tokens) & (column[None, :] < D)
        place = (picture * tokens + token)[:, None] * D + column[None, :]
        h = tl.load(h_at + place, mask=kept, other=0.0)
        output = tl.load(output_at + place, mask=kept, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + place, mask=kept, other=0.0)
        total, factor, square, square_total, still = _renormalized(h, gate[None, :] * output, tiny, opposed)
        along = factor * tl.sum(grad * total, 1)
        into_f = factor[:, None] * grad - (along / square_total)[:, None] * total
        into_h = into_f + (along / square)[:, None] * h
        # A token that stays does not follow f, and follows itself.
        into_f = tl.where(still[:, None], 0.0, into_f)
        into_h = tl.where(still[:, None], grad, into_h)
        of_gate += tl.sum(into_f * output, 0)
        of_output = into_f * gate[None, :]
        tl.store(of_h_at + place, into_h, mask=kept)
        tl.store(of_output_at + place, of_output.to(of_output_at.dtype.element_ty), mask=kept)
    sums = (picture * tl.num_programs(1) + tl.program_id(1)) * D + column
    tl.store(of_gate_at + sums, of_gate, mask=column < D)


@triton.jit
def _partner(column, turning):
    """The column that each one turns with, and the sign of the sine: halves of the first ``turning`` columns; those
    behind them have no partner but themselves."""
    half = turning // 2
    partner = tl.where(column < half, column + half, tl.where(column < turning, column - half, column))
    sign = tl.where(column < half, -1.0, tl.where(column < turning, 1.0, 0.0))
    return partner, sign


@triton.jit
def _angles(cos_at, sin_at, token, column, kept, turning):
    half = turning // 2
    place = token[:, None] * half + tl.where(column < half, column, column - half)[None, :]
    turns = kept & (column < turning)[None, :]
    return tl.load(cos_at + place, mask=turns, other=1.0), tl.load(sin_at + place, mask=turns, other=0.0)


@triton.jit
def norm_rotate(
    x_at, gain_at, cos_at, sin_at, out_at, rows, tokens, heads, turning, epsilon,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = rotate(x / rms(x) * gain). A row is one head of one token; one program: ROWS rows."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    kept = (row[:, None] < rows) & (column[None, :] < D)
    place = row[:, None] * D + column[None, :]
    x = tl.load(x_at + place, mask=kept, other=0.0).to(tl.float32)
    gain = tl.load(gain_at + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
    partner, sign = _partner(column, turning)
    other = tl.load(x_at + row[:, None] * D + partner[None, :], mask=kept, other=0.0).to(tl.float32)
    gain_of_other = tl.load(gain_at + partner, mask=column < D, other=0.0).to(tl.float32)
    cos, sin = _angles(cos_at, sin_at, (row // heads) % tokens, column, kept, turning)
    out = inverse * (x * gain[None, :] * cos + sign[None, :] * sin * other * gain_of_other[None, :])
    tl.store(out_at + place, out.to(out_at.dtype.element_ty), mask=kept)


@triton.jit
def norm_rotate_back(
    grad_at, x_at, gain_at, cos_at, sin_at, of_x_at, of_gain_at, rows, tokens, heads, turning, epsilon,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: TILES tiles of ROWS rows, and their sum of gradients of the gain."""
    column = tl.arange(0, COLS)
    gain = tl.load(gain_at + column, mask=column < D, other=0.0).to(tl.float32)
    partner, sign = _partner(column, turning)
    of_gain = tl.zeros([COLS], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        kept = (row[:, None] < rows) & (column[None, :] < D)
        place = row[:, None] * D + column[None, :]
        x = tl.load(x_at + place, mask=kept, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + place, mask=kept, other=0.0).to(tl.float32)
        of_other = tl.load(grad_at + row[:, None] * D + partner[None, :], mask=kept, other=0.0).to(tl.float32)
        cos, sin = _angles(cos_at, sin_at, (row // heads) % tokens, column, kept, turning)
        of_normed = grad * cos - sign[None, :] * sin * of_other  # turned back
        normed = x * tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
        of_gain += tl.sum(of_normed * normed, 0)
        of_normed = of_normed * gain[None, :]
        along = tl.sum(of_normed * normed, 1) / D
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
        of_x = inverse * (of_normed - along[:, None] * normed)
        tl.store(of_x_at + place, of_x.to(of_x_at.dtype.element_ty), mask=kept)
    tl.store(of_gain_at + tl.program_id(0) * D + column, of_gain, mask=column < D)


@triton.jit
def gated_linear(gate_up_at, out_at, count, hidden, BLOCK: tl.constexpr):
    """out = silu(gate) * up, element by element of [rows, hidden]."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = element < count
    place = element // hidden * (2 * hidden) + element % hidden
    gate = tl.load(gate_up_at + place, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(gate_up_at + place + hidden, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_at + element, (gate * tl.sigmoid(gate) * up).to(out_at.dtype.element_ty), mask=kept)


@triton.jit
def gated_linear_back(grad_at, gate_up_at, of_gate_up_at, count, hidden, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = element < count
    place = element // hidden * (2 * hidden) + element % hidden
    gate = tl.load(gate_up_at + place, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(gate_up_at + place + hidden, mask=kept, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + element, mask=kept, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = grad * up * share * (1 + gate * (1 - share))
    kind = of_gate_up_at.dtype.element_ty
    tl.store(of_gate_up_at + place, of_gate.to(kind), mask=kept)
    tl.store(of_gate_up_at + place + hidden, (grad * gate * share).to(kind), mask=kept)
