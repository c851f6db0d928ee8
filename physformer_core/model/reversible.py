"""Training a leapfrog with memory that does not grow with depth (Gomez et al. 2017, https://arxiv.org/abs/1707.04585).

A block does ``q' = update(q, attend(p)); p' = update(p, feed(q'))``. Where the update has an inverse, (q, p) is had
back from (q', p') by running the two sublayers again in the opposite order: so only the last block's result is kept,
and each block's input is recomputed while its gradient is. It costs what gradient checkpointing costs, one more
forward pass, and keeps one state where checkpointing keeps one a block.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physformer_core.model.attention import AttentionPlan, TextKeyValue

if TYPE_CHECKING:
    from physformer_core.model.blocks import PhysFormerBlock


def run_reversibly(
    blocks: Sequence[PhysFormerBlock],
    streams: tuple[Tensor, ...],
    temb: Tensor,
    texts: Sequence[TextKeyValue],
    plans: Sequence[AttentionPlan],
) -> tuple[Tensor, ...]:
    """Runs blocks one after the other, keeping nothing but the result for the backward pass.

    The gradient is that of keeping everything but for the rounding of the recomputed states, which under autocast is
    that of the lower precision.

    Args:
        blocks: Of one form, with two streams and ``always_invertible``.
        streams: q and p, each [B, N, dim] in float32.
        temb: [B, dim].
        texts: Keys and values of the prompt for each block.
        plans: The attention plan of each block.

    Returns:
        q and p after the last block.
    """
    inputs = [tensor for text in texts for tensor in (text.key, text.value)]
    weights = [weight for block in blocks for weight in block.parameters()]
    return _Reversible.apply(blocks, plans, *streams, temb, *inputs, *weights)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[PhysFormerBlock],
        plans: Sequence[AttentionPlan],
        q: Tensor,
        p: Tensor,
        temb: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = q.device.type
        ctx.blocks, ctx.plans, ctx.autocast = blocks, plans, None
        if torch.amp.is_autocast_available(device):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            ctx.autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}
        for index, block in enumerate(blocks):
            text = TextKeyValue(inputs[2 * index], inputs[2 * index + 1])
            q, p = block((q, p), temb, text, plans[index])
        ctx.save_for_backward(q, p, temb, *inputs[: 2 * len(blocks)])
        return q, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_p: Tensor) -> tuple[Tensor | None, ...]:
        q, p, temb, *inputs = ctx.saved_tensors
        of_temb: Tensor | None = None
        of_inputs: list[Tensor | None] = []
        of_weights: list[Tensor | None] = []
        for index in reversed(range(len(ctx.blocks))):
            block, plan = ctx.blocks[index], ctx.plans[index]
            leaves = [tensor.detach().requires_grad_() for tensor in (temb, *inputs[2 * index : 2 * index + 2])]
            attend = functools.partial(block.attend, text=TextKeyValue(leaves[1], leaves[2]), plan=plan)
            leaves += [weight for weight in block.parameters() if weight.requires_grad]
            with contextlib.nullcontext() if ctx.autocast is None else torch.autocast(**ctx.autocast):
                p, grad_p, more_q, first = _half_step_back(block, block.feed, p, grad_p, q, leaves)
                grad_q = grad_q + more_q
                q, grad_q, more_p, second = _half_step_back(block, attend, q, grad_q, p, leaves)
                grad_p = grad_p + more_p
            own_temb, *own_inputs = map(_sum, first[:3], second[:3])
            own_weights = map(_sum, first[3:], second[3:])
            of_temb = _sum(of_temb, own_temb)
            of_inputs = own_inputs + of_inputs
            of_weights = [next(own_weights) if w.requires_grad else None for w in block.parameters()] + of_weights
        return None, None, grad_q, grad_p, of_temb, *of_inputs, *of_weights


def _half_step_back(
    block: PhysFormerBlock,
    sublayer: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]],
    changed: Tensor,
    grad_changed: Tensor,
    read: Tensor,
    leaves: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Takes ``changed = update(before, sublayer(read))`` back.

    Returns:
        ``before``, its gradient, the part of ``read``'s gradient that comes this way, and those of ``leaves``, of
        which the first is the vector that modulates.
    """
    assert block.form.inverse is not None
    read = read.detach().requires_grad_()
    with torch.enable_grad():
        output, gate = sublayer(read, block.modulate(leaves[0]))
        # Detached, for the last block's result is this function's own: its graph would lead back here without end.
        before = block.form.inverse(changed.detach(), (gate * output).detach()).requires_grad_()
        after = block.update(before, output, gate)
    wanted = [before, read, *leaves]
    grad_before, grad_read, *rest = torch.autograd.grad(after, wanted, grad_changed, allow_unused=True)
    return before.detach(), grad_before, grad_read, tuple(rest)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of gradients, of which None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
