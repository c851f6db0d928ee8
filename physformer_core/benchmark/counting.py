"""Operations and bytes of whatever runs inside a block of code, counted call by call.

Counted are matrix products, convolutions and attention, which are nearly all of a transformer's work. Letters: a
product of [m, k] and [k, n].

* **Operations**: a multiplication and an addition each: 2 m k n; a convolution 2 x outputs x (kernel area x input
  channels / groups); attention of Lq queries and Lk keys per head 2 Lq Lk (D + Dv). Norms, activations, rotations and
  softmax are left out: they are linear in the tokens with small constants, and torch's own counter leaves them out too.
* **Bytes**: every operand and every result of those once, m k + k n + m n elements; of attention q, k, v and the
  output, not the logits, which fused kernels keep on the chip. Windows that overlap count as often as they are read.
  It is what has to move between memory and arithmetic if nothing is kept between two products: passes of elementwise
  work come on top, caches take away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from physformer_core.model.native import ops as native

_PRODUCTS: set[Any] = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
_SUMS_OF_PRODUCTS: set[Any] = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}
_CONVOLUTIONS: set[Any] = {F.conv1d, F.conv2d, F.conv3d}


class CostCounter(TorchFunctionMode):
    """Adds up `flops` and `bytes` of the calls within its block.

    >>> with CostCounter() as cost:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> cost.flops, cost.bytes
    (48, 104)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._product(args[0], args[1], result, inner=args[1].shape[-1])
        elif func in _PRODUCTS:
            self._product(args[0], args[1], result, inner=args[0].shape[-1])
        elif func in _SUMS_OF_PRODUCTS:
            self._product(args[1], args[2], result, inner=args[1].shape[-1])
        elif func in _CONVOLUTIONS:
            self._product(args[0], args[1], result, inner=args[1][0].numel())
        elif func is F.scaled_dot_product_attention:
            query, key, value = (args[i] if i < len(args) else (kwargs or {})[n] for i, n in enumerate(_QKV))
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
            self.bytes += sum(_size(tensor) for tensor in (query, key, value, result))
        elif func is native.window_attention:
            query, text_key, grid = args[0], args[3], args[7]
            batch, _, heads, content = query.shape
            keys, pairs = grid.window_work(0 if text_key is None else text_key.shape[2])
            self.flops += native.attention_flops(batch * pairs, heads, result.shape[-1])
            self.bytes += _size(query) + _size(result)
            self.bytes += batch * keys * heads * (content + result.shape[-1]) * query.element_size()
        return result

    def _product(self, one: Tensor, other: Tensor, result: Tensor, *, inner: int) -> None:
        self.flops += 2 * result.numel() * inner
        self.bytes += _size(one) + _size(other) + _size(result)


_QKV = ("query", "key", "value")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
