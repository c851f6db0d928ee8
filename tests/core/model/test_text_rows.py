"""Prompts without their padding: the same prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from physformer_core.config import load_preset
from physformer_core.model.native import ops as native
from physformer_core.model.text_rows import TextRows
from physformer_core.model.transformer import PhysFormerTransformer2DModel

MASK = torch.arange(7) < torch.tensor([[7], [2], [4], [1]])


def test_rows_are_where_they_were() -> None:
    rows = TextRows.of(MASK)
    assert rows is not None
    padded = torch.randn(4, 7, 3, 2)
    packed = rows.pack(padded)
    assert packed.shape == (1, 14, 3, 2) and torch.equal(packed[0], padded[MASK])
    assert torch.equal(rows.spread(packed), padded * MASK[..., None, None])


def test_it_is_for_training_on_a_cpu() -> None:
    assert TextRows.of(torch.ones(2, 5, dtype=torch.bool)) is None  # there is no padding
    assert TextRows.of(MASK.to("meta")) is None
    with torch.no_grad():
        assert TextRows.of(MASK) is None


@pytest.mark.parametrize("kernels", [True, False], ids=["in C, if that can run", "in torch"])
@pytest.mark.parametrize("sizes", [{}, {"base_num_layers": 1, "base_hidden_size": 32, "base_num_heads": 2}])
def test_prompts_and_gradients_are_those_with_padding(
    sizes: dict[str, int], kernels: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not kernels:
        request.getfixturevalue("without_native")
    torch.manual_seed(0)
    sizes = sizes and {**sizes, "base_patch_size": 4}
    arguments: dict[str, Any] = load_preset("debug").model | {"text_dim": 12, "pooled_dim": 10, **sizes}
    model = PhysFormerTransformer2DModel(**arguments)
    for network in model.networks():
        for layer in network.zero_at_first():
            torch.nn.init.normal_(layer.weight, std=0.1)
    embeds, pooled, field = torch.randn(4, 7, 12) * MASK[..., None], torch.randn(4, 10), torch.randn(4, 3, 32, 40)
    drop = torch.tensor([False, False, True, False])

    def result() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        prompt = model.encode_prompt(embeds, MASK, pooled, drop, base=True)
        (output,) = model(field, torch.full((4,), 0.3), prompt, torch.zeros(4, dtype=torch.long), return_dict=False)
        output.square().mean().backward()
        return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packed, of_packed = result()
    monkeypatch.setattr(TextRows, "of", lambda mask: None)
    padded, of_padded = result()
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert of_packed.keys() == of_padded.keys() and of_padded["text_embed.weight"].abs().max() > 1e-6
    for name, grad in of_padded.items():
        torch.testing.assert_close(of_packed[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.mark.skipif(native.why_not() is not None, reason="the kernels in C cannot run here")
def test_kernels_in_c_read_no_padding() -> None:
    from physformer_core.model.attention import PhysFormerAttention
    from physformer_core.model.geometry import BlockGrid

    torch.manual_seed(0)
    attention = PhysFormerAttention(64, 2, 12, 2.0, 3.0)
    query, key = torch.randn(2, 4, 15, 2, 24).unbind()
    value = torch.randn(4, 15, 2, 32)
    text = attention.encode_text(torch.randn(4, 7, 12), MASK)
    grid = BlockGrid(height=3, width=5, block=8, radius=4)

    def attended(text_value: Tensor) -> Tensor:
        sides = (text.key.detach(), text_value, attention.drift().detach(), attention.sigma().detach())
        return native.window_attention(query, key, value, *sides, grid)

    clean = text.value.detach().contiguous()
    spoilt = clean.masked_fill(~MASK[:, None, :, None], torch.nan)
    assert torch.equal(attended(spoilt), attended(clean)) and attended(clean).isfinite().all()
