"""Where tokens are, and what distance does to attention.

Everything here is a function of positions alone: the advection-diffusion kernel written as reserved query/key
dimensions, rotary angles, and the grid of attention blocks.

Coordinates are in tokens. Inside one attention window they are relative to the window's centre and therefore
half-integers, for which ``|x|^2 / 2`` is an integer plus 1/4: that integer stays below 256 in windows of up to
32 x 32 tokens, so a bfloat16 key carries it without rounding. The real-valued side of the product (the query's
departure point, scaled by 1/sigma^2) is carried as a high and a low part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GEOMETRY_DIM = 8
"""Reserved query/key dimensions: y (high, low), x (high, low), squared distance (high, low), constant (high, low)."""

FAR = 8192.0
"""Squared half-distance given to keys that are outside the picture or masked: their softmax weight is exactly 0."""

MAX_WINDOW = 32
"""Largest window side (tokens) whose squared coordinates a bfloat16 key holds exactly."""


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """How a field of tokens is cut into attention blocks, each reading itself and a halo around it.

    Args:
        height, width: Size of the field in tokens.
        block: Side of a query block in tokens (even).
        radius: Tokens that a block sees beyond its own edge on every side.
        shift: Offset of the grid in tokens; layers alternate between 0 and ``block // 2`` so that no cut-off
            lies in the same place twice.
        origin: Absolute (row, column) of the field's first token. Grid lines are anchored in absolute
            coordinates, so a tile is cut exactly like the whole it came from.
    """

    height: int
    width: int
    block: int
    radius: int
    shift: int = 0
    origin: tuple[int, int] = (0, 0)

    @property
    def lead(self) -> tuple[int, int]:
        """Rows and columns of padding before the first token."""
        return ((self.origin[0] + self.shift) % self.block, (self.origin[1] + self.shift) % self.block)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of block rows and block columns."""
        lead_y, lead_x = self.lead
        return (-(-(lead_y + self.height) // self.block), -(-(lead_x + self.width) // self.block))

    @property
    def window(self) -> int:
        """Side of the window of keys that one block reads."""
        return self.block + 2 * self.radius

    def window_work(self, text_tokens: int) -> tuple[int, int]:
        """Keys that all windows hold together, and pairs of a query and a key it reads, where windows end at the edges
        of the field and ``text_tokens`` keys are read by all."""

        def axis(length: int, lead: int, count: int) -> tuple[int, int]:
            keys = pairs = 0
            for start in range(-lead, count * self.block - lead, self.block):
                queries = min(start + self.block, length) - max(start, 0)
                seen = min(start + self.block + self.radius, length) - max(start - self.radius, 0)
                keys, pairs = keys + seen, pairs + queries * seen
            return keys, pairs

        axes = [axis(*of) for of in zip((self.height, self.width), self.lead, self.blocks, strict=True)]
        (keys_y, pairs_y), (keys_x, pairs_x) = axes
        keys = keys_y * keys_x + self.blocks[0] * self.blocks[1] * text_tokens
        return keys, pairs_y * pairs_x + self.height * self.width * text_tokens

    def covers_everything(self) -> bool:
        """Whether every block's window holds the whole field, so that no cut-off exists."""

        def axis(length: int, lead: int, count: int) -> bool:
            last_block_start = (count - 1) * self.block
            return lead + length <= self.block + self.radius and lead >= last_block_start - self.radius

        return all(map(axis, (self.height, self.width), self.lead, self.blocks))


def window_coordinates(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Half-integer coordinates of a ``height`` x ``width`` window about its centre.

    Returns:
        Float tensor [height, width, 2] of (y, x). For odd sizes the centre is moved by half a token so that
        coordinates stay half-integers.
    """
    y = torch.arange(height, device=device, dtype=torch.float32) - (height // 2) + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32) - (width // 2) + 0.5
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def split_high_low(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Two numbers of ``dtype`` whose sum is ``value`` to twice that type's precision (float32 needs no low part)."""
    if dtype == torch.float32:
        return [value, torch.zeros_like(value)]
    high = value.to(dtype).float()
    return [high.to(dtype), (value - high).to(dtype)]


def query_geometry(coordinates_nc: Tensor, drift_hc: Tensor, sigma_h: Tensor, dtype: torch.dtype) -> Tensor:
    """The query's half of ``-|x_q + d - x_k|^2 / (2 sigma^2)``.

    Args:
        coordinates_nc: [N, 2] window-centred coordinates of the queries.
        drift_hc: [heads, 2] drift per head, in tokens.
        sigma_h: [heads] width of the kernel, in tokens.
        dtype: The dtype attention runs in.

    Returns:
        [heads, N, GEOMETRY_DIM], to be laid beside the content dimensions of q.
    """
    inverse_h = 1.0 / sigma_h.float().square()
    departure_hnc = coordinates_nc[None].float() + drift_hc.float()[:, None]
    scaled_hnc = departure_hnc * inverse_h[:, None, None]
    constant_hn = -inverse_h[:, None] * (departure_hnc.square().sum(-1) / 2 + 0.25)
    inverse_hn = inverse_h[:, None].expand_as(constant_hn)
    parts = [scaled_hnc[..., 0], scaled_hnc[..., 1], inverse_hn, constant_hn]
    return torch.stack([half for part in parts for half in split_high_low(part, dtype)], dim=-1).to(dtype)


def key_geometry(coordinates_nc: Tensor, dtype: torch.dtype, valid_n: Tensor | None = None) -> Tensor:
    """The key's half of the kernel, shared by all heads.

    Args:
        coordinates_nc: [..., 2] window-centred half-integer coordinates.
        dtype: The dtype attention runs in.
        valid_n: Optional bool [...]; False puts the key infinitely far away.

    Returns:
        [..., GEOMETRY_DIM].
    """
    coordinates_nc = coordinates_nc.float()
    y, x = coordinates_nc.unbind(-1)
    square = (y * y + x * x - 0.5) / 2  # an integer: the missing 1/4 is carried by the query
    one = torch.ones_like(square)
    features = torch.stack([y, y, x, x, -square, -square, one, one], dim=-1)
    if valid_n is not None:
        features = torch.where(valid_n[..., None], features, far_key(features.device))
    return features.to(dtype)


def far_key(device: torch.device) -> Tensor:
    """Key geometry [GEOMETRY_DIM] of a place nobody can read from."""
    far = torch.zeros(GEOMETRY_DIM, device=device)  # made there: a copy from the CPU could not be in a CUDA graph
    far[4:5].fill_(-FAR)
    return far


def kernel_logits(query_nc: Tensor, key_mc: Tensor, drift_hc: Tensor, sigma_h: Tensor) -> Tensor:
    """``-|x_q + d - x_k|^2 / (2 sigma^2)`` written out: [heads, N, M]. The reference for the bilinear form."""
    departure = query_nc[None, :, None].float() + drift_hc.float()[:, None, None]
    square = (departure - key_mc[None, None].float()).square().sum(-1)
    return -square / (2 * sigma_h.float().square()[:, None, None])


def same_window(grid: BlockGrid, device: torch.device | None = None) -> Tensor:
    """Which tokens lie in which token's window.

    Returns:
        Bool [height * width, height * width]; entry (q, k) says that k is within the window of q's block.
    """

    def axis(length: int, lead: int) -> Tensor:
        position = torch.arange(length, device=device) + lead
        start = position // grid.block * grid.block - grid.radius
        return (position[None] >= start[:, None]) & (position[None] < start[:, None] + grid.window)

    rows = axis(grid.height, grid.lead[0])
    columns = axis(grid.width, grid.lead[1])
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.reshape(grid.height * grid.width, grid.height * grid.width)


def rotary_angles(height: int, width: int, origin: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Angles of the axial rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, per axis).

    Wavelengths run from 4 to 64 tokens: the range of one window. Positions are absolute, so that a tile rotates
    exactly like the whole.

    Args:
        height, width: Field size in tokens.
        origin: Absolute (row, column) of the first token.
        dim: Rotated dimensions per head, a multiple of 4; the first half turns with y, the second with x.
        device: Where the angles are wanted.

    Returns:
        Float32 [height, width, dim // 2].
    """
    pairs = dim // 4
    exponent = torch.arange(pairs, device=device, dtype=torch.float32) / max(pairs - 1, 1)
    frequency = (math.pi / 2) * torch.pow(torch.full((), 1 / 16, device=device), exponent)
    y = (torch.arange(height, device=device, dtype=torch.float32) + origin[0])[:, None] * frequency
    x = (torch.arange(width, device=device, dtype=torch.float32) + origin[1])[:, None] * frequency
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1)


def rotate_pairs(content: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the two halves of the last dimension against each other by the given angles (broadcast over heads)."""
    first, second = content.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def place_coordinates(height: int, width: int, place_b4: Tensor) -> Tensor:
    """Each token's place in the whole picture.

    Args:
        height, width: Field size in tokens.
        place_b4: [B, 4] box (top, left, bottom, right) of the field within the picture, whose extent is [0, 1].

    Returns:
        Float32 [B, height, width, 2] of (y, x) in [-1, 1]; padding beyond the picture lies outside that range.
    """
    top, left, bottom, right = place_b4.float().unbind(-1)
    row = (torch.arange(height, device=place_b4.device, dtype=torch.float32) + 0.5) / height
    column = (torch.arange(width, device=place_b4.device, dtype=torch.float32) + 0.5) / width
    y = top[:, None] + (bottom - top)[:, None] * row
    x = left[:, None] + (right - left)[:, None] * column
    grid = torch.stack([y[:, :, None].expand(-1, -1, width), x[:, None].expand(-1, height, -1)], dim=-1)
    return 2 * grid - 1
