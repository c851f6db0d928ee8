"""Positions, the transport kernel in reserved dimensions, grids and rotary angles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from physformer_core.model.geometry import (
    FAR,
    GEOMETRY_DIM,
    BlockGrid,
    key_geometry,
    place_coordinates,
    query_geometry,
    rotary_angles,
    rotate_pairs,
    same_window,
    split_high_low,
    window_coordinates,
)

DRIFTS = [(0.0, 0.0), (2.0, -2.0), (-1.9, 0.37), (0.123, 1.777), (-2.0, -2.0), (1.0, 0.0)]
SIGMAS = [0.3, 0.45, 0.9, 1.51, 2.2, 3.0]


def kernel(query_yx: torch.Tensor, key_yx: torch.Tensor, drift: tuple[float, float], sigma: float) -> torch.Tensor:
    """The design's formula in float64: [N, M]."""
    upstream = query_yx.double() + torch.tensor(drift, dtype=torch.float64)
    return -(upstream[:, None] - key_yx.double()[None]).square().sum(-1) / (2 * sigma**2)


def bilinear(
    query_yx: torch.Tensor, key_yx: torch.Tensor, drifts: torch.Tensor, sigmas: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The product of the reserved dimensions, summed exactly: fused kernels add such products up in float32."""
    query = query_geometry(query_yx, drifts, sigmas, dtype)
    key = key_geometry(key_yx, dtype)
    assert query.dtype == key.dtype == dtype and query.shape[-1] == key.shape[-1] == GEOMETRY_DIM
    return query.double() @ key.double().T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
def test_kernel_is_right_for_all_pairs_of_a_window(dtype: torch.dtype, tolerance: float) -> None:
    window = window_coordinates(16, 16)
    queries, keys = window[4:12, 4:12].reshape(-1, 2), window.reshape(-1, 2)
    pairs = [(d, s) for d in DRIFTS for s in SIGMAS]
    drifts, sigmas = torch.tensor([d for d, _ in pairs]), torch.tensor([s for _, s in pairs])
    logits = bilinear(queries, keys, drifts, sigmas, dtype)
    for got, (drift, sigma) in zip(logits, pairs, strict=True):
        # The learned values are float32: the formula is taken at what they really are.
        exact = kernel(queries, keys, tuple(torch.tensor(drift).tolist()), torch.tensor(sigma).item())
        assert (got - exact).abs().max() < tolerance, (drift, sigma)


@settings(deadline=None, max_examples=25)
@given(
    dy=st.floats(-2, 2, width=32), dx=st.floats(-2, 2, width=32), sigma=st.floats(0.5, 12, width=32),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_kernel_is_right_in_half_precision_in_the_largest_window(
    dy: float, dx: float, sigma: float, half: torch.dtype
) -> None:
    window = window_coordinates(32, 32)
    queries, keys = window[8:24, 8:24].reshape(-1, 2), window.reshape(-1, 2)
    got = bilinear(queries, keys, torch.tensor([[dy, dx]]), torch.tensor([sigma]), half)[0]
    assert (got - kernel(queries, keys, (dy, dx), sigma)).abs().max() < 0.02


def test_coordinates_are_half_integers_about_the_centre() -> None:
    for height, width in [(16, 16), (5, 8), (1, 1), (7, 3)]:
        yx = window_coordinates(height, width)
        assert yx.shape == (height, width, 2)
        assert torch.equal((yx - 0.5).round(), yx - 0.5)
        assert yx.mean((0, 1)).abs().max() <= 0.5
    assert torch.equal(window_coordinates(4, 4)[:, 0, 0], torch.tensor([-1.5, -0.5, 0.5, 1.5]))


def test_far_keys_have_no_weight_whatever_the_width() -> None:
    yx = window_coordinates(16, 16).reshape(-1, 2)
    valid = torch.arange(256) < 200
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        key = key_geometry(yx, dtype, valid)
        assert torch.isfinite(key).all()
        for sigma in (0.3, 3.0):
            query = query_geometry(yx, torch.tensor([[2.0, 2.0]]), torch.tensor([sigma]), dtype)
            weights = (query.float() @ key.float().T).softmax(-1)
            assert torch.equal(weights[..., ~valid], torch.zeros_like(weights[..., ~valid]))
    assert torch.finfo(torch.float16).max > FAR


def test_high_and_low_part_carry_twice_the_precision() -> None:
    value = torch.linspace(-400, 400, 1001)
    for dtype, relative in ((torch.bfloat16, 2.0**-16), (torch.float16, 2.0**-20), (torch.float32, 0.0)):
        high, low = split_high_low(value, dtype)
        assert high.dtype == low.dtype == dtype
        assert ((high.double() + low.double() - value).abs() <= relative * value.abs() + 1e-7 * bool(relative)).all()


def window_of(position: int, block: int, radius: int, shift: int) -> range:
    """Absolute positions that the token at an absolute position reads, along one axis."""
    start = (position + shift) // block * block - shift
    return range(start - radius, start + block + radius)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 21), width=st.integers(1, 21), block=st.sampled_from([2, 4, 8]), radius=st.integers(1, 5),
    shift=st.integers(0, 7), y=st.integers(0, 19), x=st.integers(0, 19),
)  # fmt: skip
@example(height=10, width=1, block=8, radius=4, shift=0, y=0, x=0)  # the first block sees all, the last does not
@example(height=13, width=1, block=8, radius=4, shift=4, y=0, x=0)  # the last block sees all, the first does not
@example(height=12, width=12, block=8, radius=4, shift=4, y=0, x=0)  # both do
def test_windows_and_their_cover(height: int, width: int, block: int, radius: int, shift: int, y: int, x: int) -> None:
    grid = BlockGrid(height=height, width=width, block=block, radius=radius, shift=shift, origin=(y, x))
    rows = torch.tensor(
        [[k + y in window_of(q + y, block, radius, shift) for k in range(height)] for q in range(height)]
    )
    columns = torch.tensor(
        [[k + x in window_of(q + x, block, radius, shift) for k in range(width)] for q in range(width)]
    )
    expected = rows[:, None, :, None] & columns[None, :, None, :]
    assert torch.equal(same_window(grid), expected.reshape(height * width, height * width))
    assert grid.covers_everything() == bool(expected.all())
    (lead_y, lead_x), (blocks_y, blocks_x) = grid.lead, grid.blocks
    assert 0 <= lead_y < block and 0 <= lead_x < block
    # No block is all padding: none would then be without a key.
    assert (blocks_y - 1) * block < lead_y + height <= blocks_y * block
    assert (blocks_x - 1) * block < lead_x + width <= blocks_x * block


def test_rotary_angles_of_a_tile_are_those_of_the_whole() -> None:
    whole = rotary_angles(20, 30, (0, 0), 12, torch.device("cpu"))
    tile = rotary_angles(7, 11, (5, 13), 12, torch.device("cpu"))
    assert torch.equal(tile, whole[5:12, 13:24])
    assert torch.equal(tile.cos(), whole.cos()[5:12, 13:24])
    # The first half turns with y, the second with x, by wavelengths from 4 to 64 tokens.
    assert torch.allclose(whole[1, 0], torch.tensor([math.pi / 2, math.pi / 8, math.pi / 32, 0, 0, 0]))
    assert torch.allclose(whole[0, 1], torch.tensor([0, 0, 0, math.pi / 2, math.pi / 8, math.pi / 32]))


def test_rotary_products_depend_on_the_difference_of_places_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(12), torch.randn(12)
    angles = rotary_angles(12, 12, (0, 0), 12, torch.device("cpu"))

    def product(q: tuple[int, int], k: tuple[int, int]) -> torch.Tensor:
        turned = [rotate_pairs(t, angles[p].cos(), angles[p].sin()) for t, p in ((query, q), (key, k))]
        return turned[0] @ turned[1]

    assert torch.allclose(product((1, 2), (4, 3)), product((7, 9), (10, 10)), atol=1e-4)
    assert not torch.allclose(product((1, 2), (4, 3)), product((1, 2), (3, 4)), atol=1e-2)


def test_places_of_a_crop_are_those_in_the_whole() -> None:
    whole = place_coordinates(10, 20, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    crop = place_coordinates(4, 5, torch.tensor([[0.3, 0.25, 0.7, 0.5]]))
    assert torch.allclose(crop[0], whole[0, 3:7, 5:10], atol=1e-6)
    assert torch.allclose(whole[0, 0, 0], torch.tensor([-0.9, -0.95])) and whole.abs().max() < 1
    assert place_coordinates(8, 8, torch.tensor([[0.0, 0.0, 1.5, 1.0]]))[..., 0].max() > 1  # padding lies outside
