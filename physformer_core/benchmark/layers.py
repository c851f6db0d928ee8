"""One attention layer with its projections: ours beside dense, linear and neighbourhood attention of the same width.

All read N tokens of a field. Ours and the dense one read the prompt in the same softmax; the others see the field
alone, as a second layer reads the prompt in the networks they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physformer_core.benchmark.cases import OURS, TEXT_TOKENS, Case, Subject, model_config
from physformer_core.errors import ConfigError
from physformer_core.model.attention import PhysFormerAttention, plan_attention
from physformer_core.model.geometry import BlockGrid, rotary_angles

WARM_TOKENS = 16


class PlainAttention(nn.Module):
    """Projections around an attention of any kind, for peers.

    Args:
        dim, heads: Width and heads.
        mix: Maps query, key and value [B, N, heads, D] and the field's size to [B, N, heads, D].
    """

    def __init__(self, dim: int, heads: int, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.mix = heads, mix
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, size: tuple[int, int]) -> Tensor:
        query, key, value = self.to_qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.to_out(self.mix(query, key, value, size).flatten(2))


def layer_subject(case: Case, device: torch.device, dtype: torch.dtype) -> Subject:
    """Builds the layer of a case and the tokens it reads; see `build`."""
    config = model_config(case)
    if case.contender == OURS:
        return _ours(case, config, device, dtype)
    dim, heads = config["hidden_size"], config["num_heads"]
    window = config["block_size"] + 2 * config["radius"]
    if case.contender == "sana":
        layer, call = _linear_attention(dim, heads)
    else:
        mix = {"dense": lambda: _dense, "natten": lambda: _natten(window), "flex": lambda: _flex(window)}
        if case.contender not in mix:
            raise ConfigError(f"no attention '{case.contender}' is known")
        layer = PlainAttention(dim, heads, mix[case.contender]())
        call = layer
    layer = layer.to(device=device, dtype=dtype).eval()

    def run_on(batch: int, height: int, width: int) -> Callable[[], Any]:
        tokens = torch.randn(batch, height * width, dim, device=device).to(dtype)
        return lambda: call(tokens, (height, width))

    return Subject(
        run=run_on(case.batch, case.height, case.width),
        warm_up=run_on(1, WARM_TOKENS, WARM_TOKENS),
        parameters=sum(p.numel() for p in layer.parameters()),
    )


def _ours(case: Case, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Subject:
    layer = PhysFormerAttention(
        config["hidden_size"],
        config["num_heads"],
        config["text_hidden_size"],
        config["max_drift"],
        config["max_sigma"],
        config["drift"],
    )
    layer = layer.to(device=device, dtype=dtype).eval()

    def run_on(batch: int, height: int, width: int) -> Callable[[], Any]:
        tokens = torch.randn(batch, height * width, config["hidden_size"], device=device).to(dtype)
        angles = rotary_angles(height, width, (0, 0), layer.rotary_dim, device).flatten(0, 1)
        grid = BlockGrid(height=height, width=width, block=config["block_size"], radius=config["radius"])
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        plan = plan_attention(grid, case.backend, cos, sin, dtype)  # type: ignore[arg-type]
        with torch.inference_mode():
            text = layer.encode_text(
                torch.randn(batch, TEXT_TOKENS, config["text_hidden_size"], device=device).to(dtype),
                torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=device),
            )
        return lambda: layer(tokens, text, plan)

    return Subject(
        run=run_on(case.batch, case.height, case.width),
        warm_up=run_on(1, WARM_TOKENS, WARM_TOKENS),
        parameters=sum(p.numel() for p in layer.parameters()),
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, _size: tuple[int, int]) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _linear_attention(dim: int, heads: int) -> tuple[nn.Module, Callable[[Tensor, tuple[int, int]], Tensor]]:
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    layer = Attention(
        query_dim=dim, heads=heads, dim_head=dim // heads, bias=False, processor=SanaLinearAttnProcessor2_0()
    )
    return layer, lambda tokens, _size: layer(tokens)


def _natten(window: int) -> Callable[..., Tensor]:
    import natten

    # Its windows are centred on each token and have an odd side; ours are shared by a block and even.
    side = window + 1

    def mix(query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
        kernel = tuple(min(side, length - 1 + length % 2) for length in size)
        fields = (t.unflatten(1, size).contiguous() for t in (query, key, value))
        mixed: Tensor = natten.na2d(*fields, kernel_size=kernel)
        return mixed.flatten(1, 2)

    return mix


def _flex(window: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[tuple[int, int], Any] = {}
    reach = window // 2

    def mix(query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        if size not in masks:

            def near(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                rows, columns = q // width - k // width, q % width - k % width
                return (rows.abs() <= reach) & (columns.abs() <= reach)

            masks[size] = create_block_mask(near, None, None, height * width, height * width, device=query.device)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
        return compiled(q, k, v, block_mask=masks[size]).transpose(1, 2)

    return mix
