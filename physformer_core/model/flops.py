"""Floating-point operations of the network, counted from its layers and held to torch's own counter by a test.

Only matrix products count, a multiplication and an addition each: [m, k] x [k, n] is 2 m k n. Norms, activations,
rotations and softmax are linear in the tokens with small constants; torch's counter leaves them out too. Letters:
N tokens of a picture, T tokens of its prompt, D the width of a picture's tokens, E that of the text stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from physformer_core.model.attention import plan_attention
from physformer_core.model.geometry import BlockGrid
from physformer_core.model.native import ops as native
from physformer_core.model.network import FieldNetwork
from physformer_core.model.transformer import PhysFormerTransformer2DModel

_PER_PROMPT_TOKEN = ("text_embed", "text_blocks.", "add_k_proj", "add_v_proj")
_PER_PICTURE = ("condition_embed.", "modulation")
_OF_DATA = ("patch_embed.proj1", "patch_embed.place", "condition_embed.time1")
"""Layers whose input is data: nothing flows back through them into it."""
_REFINER, _BASE = "refiner.", "base."


def prompt_flops(model: PhysFormerTransformer2DModel, tokens: int, *, base: bool | None = None) -> int:
    """Operations of `encode_prompt` for one prompt of ``tokens`` tokens: spent once, whatever the steps and levels.

    Args:
        model: On any device, meta included.
        tokens: Of the prompt.
        base: As in `encode_prompt`.
    """
    # Every linear layer of the text stream, and each block's projections of text to keys and values, on T tokens.
    linear = sum(
        2 * _size(layer) * tokens
        for name, layer in _linears(model)
        if _is(name, _PER_PROMPT_TOKEN) and not _left_out(model, name, base)
    )
    # Self-attention of a text block: T x T logits over E, and as much again to gather the values.
    width = model.config.text_hidden_size
    return linear + len(model.text_blocks) * 2 * (2 * tokens * tokens * width)


def picture_flops(
    model: PhysFormerTransformer2DModel, height: int, width: int, prompt_tokens: int, *, base: bool = False
) -> int:
    """Operations of one evaluation of the network for one picture.

    Args:
        model: On any device, meta included.
        height, width: Size of the field in tokens.
        prompt_tokens: Tokens that the attention reads besides the picture's own.
        base: Whether it is level 0, which the refiner works on where there is one, and which may have a network of its
            own.
    """
    network = model.network(base=base)
    linear = refiner_flops(network, height, width) if base else 0
    for name, layer in _linears(network):
        if _is(name, _PER_PROMPT_TOKEN) or name.startswith((_REFINER, _BASE)):
            continue
        rows = 1 if _is(name, _PER_PICTURE) else height * width
        linear += 2 * _size(layer) * rows
    return linear + sum(
        _attention_flops(model, network, height, width, prompt_tokens, index) for index in range(len(network.blocks))
    )


def refiner_flops(network: FieldNetwork, height: int, width: int) -> int:
    """Operations of the refiner on a field of height x width tokens; 0 where there is none.

    A convolution costs 2 C k^2 C' for each element it gives, of which the convolutions at full resolution give p^2 a
    token, the others (``down``, ``inner``, ``up``) a quarter of that.
    """
    if network.refiner is None:
        return 0
    tokens = height * width
    linear = sum(
        2 * _size(layer) * (1 if _is(name, _PER_PICTURE) else tokens) for name, layer in _linears(network.refiner)
    )
    return linear + _convolution_flops(network, tokens)


def _convolution_flops(network: FieldNetwork, tokens: int) -> int:
    assert network.refiner is not None
    flops = 0
    for name, layer in network.refiner.named_modules():
        if isinstance(layer, nn.Conv2d):
            pixels = tokens * network.sizes.patch_size**2 // (4 if name.startswith(("down", "inner", "up")) else 1)
            flops += 2 * layer.weight.numel() * pixels
    return flops


def training_flops(
    model: PhysFormerTransformer2DModel, height: int, width: int, prompt_tokens: int, *, base: bool = False
) -> int:
    """Operations of forward and backward for one example.

    Going back, each product is done twice more: once for the gradient of the weight (or the keys), once for that of
    the input (or the queries); of layers on data only the first, of frozen layers only the second. Fused attention
    recomputes its logits on top: that is not counted, as it is no work of the model's.
    """
    network = model.network(base=base)
    forward = picture_flops(model, height, width, prompt_tokens, base=base)
    forward += prompt_flops(model, prompt_tokens, base=base)
    unneeded = 0
    for name, layer in _linears(model):
        if (_REFINER in name and not base) or _left_out(model, name, base):
            continue
        rows = prompt_tokens if _is(name, _PER_PROMPT_TOKEN) else 1 if _is(name, _PER_PICTURE) else height * width
        unneeded += 2 * _size(layer) * rows * (_is(name, _OF_DATA) + (not layer.weight.requires_grad))
    if base and network.refiner is not None and not network.refiner.leave.weight.requires_grad:
        kernels = sum(one.weight.requires_grad for one in network.refiner.modules() if isinstance(one, nn.Conv2d))
        assert not kernels, "the refiner's convolutions are trained together or not at all"
        unneeded += _convolution_flops(network, height * width)
    return 3 * forward - unneeded


def _left_out(model: PhysFormerTransformer2DModel, name: str, base: bool | None) -> bool:
    """Whether a layer belongs to a network that does not see the level: of the text stream all levels have need."""
    if model.base is None or base is None or name.startswith(("text_embed", "text_blocks.")):
        return False
    return name.startswith(_BASE) != base


def _attention_flops(
    model: PhysFormerTransformer2DModel,
    network: FieldNetwork,
    height: int,
    width: int,
    prompt_tokens: int,
    index: int,
) -> int:
    """Logits and gathering of one block: 2 D operations for each query and key, twice.

    Dense: N queries see N + T keys. Halo: each block of b x b queries sees its window of (b + 2 r)^2 keys and the T of
    the text; blocks at the border are computed whole, so this is linear in N but for the border. Native: windows end at
    the border, and of the reserved dimensions half are enough.
    """
    sizes = network.sizes
    grid = BlockGrid(height=height, width=width, block=sizes.block_size, radius=sizes.radius)
    if index % 2:
        grid = replace(grid, shift=sizes.block_size // 2)
    none = torch.empty(0, device=model.device)
    backend = network.attention_backend
    if backend == "auto":
        backend = plan_attention(grid, backend, none, none, model.dtype).backend
    if backend == "native":
        _, pairs = grid.window_work(prompt_tokens)
        return native.attention_flops(pairs, sizes.num_heads, sizes.hidden_size // sizes.num_heads)
    if backend in ("halo", "flex"):
        blocks_y, blocks_x = grid.blocks
        pairs = blocks_y * blocks_x * grid.block**2 * (grid.window**2 + prompt_tokens)
    else:
        pairs = height * width * (height * width + prompt_tokens)
    return 2 * (2 * pairs * sizes.hidden_size)


def _linears(network: nn.Module | FieldNetwork) -> Iterator[tuple[str, nn.Linear]]:
    assert isinstance(network, nn.Module)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _size(layer: nn.Linear) -> int:
    return layer.in_features * layer.out_features


def _is(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)
