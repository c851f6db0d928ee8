"""The fused backend, run without its compiler on the CPU, against attention written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from physformer_core.errors import ConfigError
from physformer_core.model.attention import TextKeyValue as Text
from physformer_core.model.attention import Transport, plan_attention, reference_attention
from physformer_core.model.flex import flex_attend, flex_grid, why_no_flex
from physformer_core.model.geometry import FAR, GEOMETRY_DIM, BlockGrid

HEADS, CONTENT = 2, 8
GRIDS = [
    BlockGrid(height=3, width=2, block=8, radius=4, shift=4),
    BlockGrid(height=9, width=17, block=8, radius=4),
    BlockGrid(height=11, width=13, block=4, radius=3, shift=2, origin=(5, 2)),
]


def field(grid: BlockGrid, text_tokens: int, hidden: int = 0) -> tuple[Tensor, Tensor, Tensor, Text | None, Transport]:
    generator = torch.Generator().manual_seed(grid.width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (2, grid.height * grid.width, HEADS)
    query, key, value = normal(*shape, CONTENT), normal(*shape, CONTENT), normal(*shape, CONTENT + GEOMETRY_DIM)
    transport = Transport(4 * torch.rand(HEADS, 2, generator=generator) - 2, torch.tensor([0.8, 2.7]))
    if not text_tokens:
        return query, key, value, None, transport
    altitude = normal(HEADS)[None, :, None].expand(2, -1, text_tokens).clone()
    altitude[1, :, text_tokens - hidden :] = -FAR  # one prompt of the batch is shorter
    geometry = F.pad(torch.stack([altitude, altitude], dim=-1), (4, 2))
    text_key = torch.cat([normal(2, HEADS, text_tokens, CONTENT), geometry], dim=-1)
    text = Text(text_key, normal(2, HEADS, text_tokens, CONTENT + GEOMETRY_DIM))
    return query, key, value, text, transport


@pytest.mark.parametrize("text_tokens", [0, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.height}x{g.width}")
def test_it_equals_the_reference(grid: BlockGrid, text_tokens: int) -> None:
    query, key, value, text, transport = field(grid, text_tokens, hidden=2)
    nothing = torch.zeros(1)
    plan = plan_attention(grid, "reference", nothing, nothing, torch.float32)
    wanted = reference_attention(query, key, value, text, transport, plan)
    text_key, text_value = (None, None) if text is None else (text.key, text.value)
    found = flex_attend(
        query, key, value, text_key, text_value, transport.drift_hc, transport.sigma_h, grid, compiled=False
    )
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5


def test_tokens_of_a_block_stand_together() -> None:
    grid = BlockGrid(height=11, width=13, block=4, radius=3, shift=2, origin=(5, 2))
    laid = flex_grid(grid, torch.device("cpu"))
    blocks = torch.stack([laid.rows // 4, laid.columns // 4], dim=1)
    changes = (blocks[1:] != blocks[:-1]).any(1).sum()
    assert int(changes) + 1 == len(blocks.unique(dim=0))
    assert torch.equal(laid.order[laid.inverse], torch.arange(11 * 13))


@pytest.mark.usefixtures("without_native")
def test_it_is_refused_where_it_cannot_run_and_auto_passes_it_by() -> None:
    grid, nothing = BlockGrid(height=100, width=100, block=8, radius=4), torch.zeros(1)
    assert "CUDA" in (why_no_flex(torch.device("cpu")) or "")
    with torch.no_grad():
        assert plan_attention(grid, "auto", nothing, nothing, torch.float32).backend == "halo"
    with pytest.raises(ConfigError, match="need CUDA") as caught:
        plan_attention(grid, "flex", nothing, nothing, torch.float32)
    assert caught.value.hint


@pytest.mark.skipif(why_no_flex(torch.device("cuda")) is not None, reason="needs a CUDA device and triton")
def test_the_compiled_kernel_passes_its_own_test() -> None:
    from physformer_core.model.flex import flex_verified

    assert flex_verified(torch.device("cuda", 0))
