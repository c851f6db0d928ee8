"""The kernels in C on tensors, with their gradients: float32 on a CPU. Each names what it is equal to in torch."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from physformer_core.model.geometry import FAR, GEOMETRY_DIM, BlockGrid
from physformer_core.native.build import Unavailable, load_library


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot run in this process, in a few words, or None if they can. The first call may compile them,
    which takes some seconds."""
    from physformer_core.model.native.probe import first_wrong

    try:
        load_library()
    except Unavailable as reason:
        return str(reason)
    wrong = first_wrong()
    return None if wrong is None else f"compiled, {wrong} fails its own test on this processor"


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors can be worked on here and now: float32 on a CPU, with memory of their own (not fake, not
    parts of ranks), not while a graph is made, and with kernels that can run."""
    if graph_is_made():
        return False
    return all(map(_is_plain, tensors)) and why_not() is None


def graph_is_made() -> bool:
    """Whether torch is compiling or exporting: then there is nothing yet that a kernel could work on."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor) in (Tensor, torch.nn.Parameter)
    return kind and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def checked(tensor: Tensor, *shape: int) -> Tensor:
    """The tensor, laid out as C reads it; sides of 1 become as long as they are wanted.

    Raises:
        ValueError: It has another shape, or is not what `takes` takes.
    """
    if not _is_plain(tensor):
        raise ValueError(f"kernels in C want float32 on a CPU, not {tensor.dtype} on {tensor.device}")
    if tensor.ndim != len(shape) or any(one not in (1, side) for one, side in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {shape} is wanted")
    return tensor.expand(shape).contiguous()


def _checked_starts(starts: Tensor, rows: int, longest: int | None = None) -> Tensor:
    """Where prompts begin among ``rows`` tokens, if that can be, and none is longer than ``longest``."""
    lengths = starts.diff()
    whole = starts.ndim == 1 and len(starts) > 1 and int(starts[0]) == 0 and int(starts[-1]) == rows
    if starts.dtype != torch.int32 or not whole or int(lengths.min()) < 0:
        raise ValueError(f"{starts.dtype} {starts.tolist()} does not divide {rows} rows among prompts")
    if longest is not None and int(lengths.max()) > longest:
        raise ValueError(f"a prompt of {int(lengths.max())} tokens where {longest} are the most")
    return starts.contiguous()


def norm_modulate(hidden_states: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """``rms_norm(h) * (1 + scale) + shift``.

    Args:
        hidden_states: [B, N, dim].
        scale, shift: [B, 1, dim].
        epsilon: Added to the mean square.
    """
    batch, tokens, dim = hidden_states.shape
    h = checked(hidden_states, batch, tokens, dim)
    return _NormModulate.apply(h, checked(scale, batch, 1, dim), checked(shift, batch, 1, dim), epsilon)


def renormalized_update(hidden_states: Tensor, output: Tensor, gate: Tensor, tiny: float, opposed: float) -> Tensor:
    """`model.updates.renormalized_update` of h and ``gate * output``.

    Args:
        hidden_states, output: [B, N, dim].
        gate: [B, 1, dim].
        tiny: Energy below which a token stays.
        opposed: Share of its energy below which what the sum has left points nowhere, so that it stays.
    """
    batch, tokens, dim = hidden_states.shape
    h, output = (checked(t, batch, tokens, dim) for t in (hidden_states, output))
    return _RenormalizedUpdate.apply(h, output, checked(gate, batch, 1, dim), tiny, opposed)


def norm_rotate(content: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """Norms each head and turns its first dimensions: ``rotate_pairs(rms_norm(content) * gain, cos, sin)``.

    Args:
        content: [B, N, heads, dim].
        gain: [dim].
        cos, sin: [1, N, 1, turning / 2], without gradients.
        epsilon: Added to the mean square.
    """
    batch, tokens, heads, dim = content.shape
    if 2 * cos.shape[-1] > dim:
        raise ValueError(f"{cos.shape[-1]} pairs cannot turn in {dim} dimensions")
    content, gain = checked(content, batch, tokens, heads, dim), checked(gain, dim)
    cos, sin = (checked(t, 1, tokens, 1, cos.shape[-1]) for t in (cos, sin))
    return _NormRotate.apply(content, gain, cos, sin, epsilon)


def rms_norm(content: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """``rms_norm(content) * gain`` over the last dimension of [B, ..., dim]."""
    rows = content.flatten(1, -2).unsqueeze(2)
    nothing = rows.new_empty(1, rows.shape[1], 1, 0)
    return norm_rotate(rows, gain, nothing, nothing, epsilon).view(content.shape)


def gated_linear(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., 2 * hidden] -> [..., hidden]."""
    return _GatedLinear.apply(checked(gate_up, *gate_up.shape))


def modulated_silu(field: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """``silu(field * (1 + scale) + shift)``, or of the field as it is where neither is given.

    Args:
        field: [B, C, H, W]; it is copied unless its channels lie together in memory.
        scale, shift: [B, C], both or neither.

    Returns:
        [B, C, H, W], whose channels lie together in memory.
    """
    batch, channels, height, width = field.shape
    pixels = checked(field.permute(0, 2, 3, 1), batch, height, width, channels)
    if scale is None or shift is None:
        return _ModulatedSilu.apply(pixels, None, None).permute(0, 3, 1, 2)
    scale, shift = (checked(t.unsqueeze(1), batch, 1, channels) for t in (scale, shift))
    return _ModulatedSilu.apply(pixels, scale, shift).permute(0, 3, 1, 2)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    drift_hc: Tensor,
    sigma_h: Tensor,
    grid: BlockGrid,
) -> Tensor:
    """Blocks of queries against their windows and the text, of which nothing is copied and no logits are kept.

    Of a text key's geometry only the third pair's first number is read, the altitude, and only that has a gradient.

    Args:
        query, key: [B, N, heads, d_c] content in row order, the query already divided by sqrt(d_c).
        value: [B, N, heads, head_dim].
        text_key: [B, heads, T, head_dim] as `TextKeyValue` has it, or None.
        text_value: [B, heads, T, head_dim], or None.
        drift_hc: [heads, 2] in tokens.
        sigma_h: [heads] in tokens.
        grid: How the field is cut.

    Returns:
        [B, N, heads, head_dim], what `model.attention.reference_attention` returns.
    """
    if has_torch_function((query,)):  # so that what counts operations hears of it
        arguments = (query, key, value, text_key, text_value, drift_hc, sigma_h, grid)
        return handle_torch_function(window_attention, (query,), *arguments)
    batch, tokens, heads, content = query.shape
    dim = content + GEOMETRY_DIM
    if tokens != grid.height * grid.width or content < GEOMETRY_DIM:
        raise ValueError(f"{tokens} tokens of {content} dimensions on a grid of {grid.height} by {grid.width}")
    text = 0 if text_key is None else text_key.shape[2]
    if text_key is None or text_value is None:
        text_key = text_value = value.new_empty(batch, heads, 0, dim)
    query, key = (checked(t, batch, tokens, heads, content) for t in (query, key))
    text_key, text_value = (checked(t, batch, heads, text, dim) for t in (text_key, text_value))
    kernel = checked(drift_hc, heads, 2), checked(sigma_h, heads)
    value = checked(value, batch, tokens, heads, dim)
    return _WindowAttention.apply(query, key, value, text_key, text_value, *kernel, grid)


def text_attention(qkv: Tensor, starts: Tensor) -> Tensor:
    """Self-attention of prompts without padding: every token of a prompt reads all of them.

    Args:
        qkv: [R, 3, heads, dim], queries, keys and values of all prompts' tokens.
        starts: int32 [B + 1], where each prompt's tokens begin, and R.

    Returns:
        [R, heads * dim].
    """
    starts = _checked_starts(starts, qkv.shape[0])
    return _TextAttention.apply(checked(qkv, *qkv.shape), starts).flatten(1)


def text_keys(
    content: Tensor, gain: Tensor, altitude_h: Tensor, starts: Tensor, longest: int, turning: int, epsilon: float
) -> Tensor:
    """The keys of `model.attention.TextKeyValue`, of prompts without padding: with normed content after ``turning``
    dimensions of zero, and before the geometry. Of every prompt its tokens come first, and padding, infinitely far
    away, after them.

    Args:
        content: [R, heads, still].
        gain: [still].
        altitude_h: [heads].
        starts: As in `text_attention`.
        longest: T, tokens of the longest prompt.
        turning: Dimensions in which the field's keys turn with their position.
        epsilon: Added to the mean square.

    Returns:
        [B, heads, T, turning + still + GEOMETRY_DIM].
    """
    rows, heads, still = content.shape
    content, gain, starts = (
        checked(content, rows, heads, still),
        checked(gain, still),
        _checked_starts(starts, rows, longest),
    )
    return _TextKeys.apply(content, gain, checked(altitude_h, heads), starts, longest, turning, epsilon)


def text_values(value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """The values of `model.attention.TextKeyValue`: [R, heads, dim] -> [B, heads, T, dim], zero where there is padding;
    ``starts`` and ``longest`` as in `text_keys`."""
    starts = _checked_starts(starts, value.shape[0], longest)
    return _TextValues.apply(checked(value, *value.shape), starts, longest)


def orthogonalize(matrices: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """`training.optimizer.orthogonalize`, by way of the matrices' products with themselves; without gradients.

    All products but the last are symmetric, and half of each is made.

    Args:
        matrices: [K, m, n].
        steps: Iterations, at least one.
        coefficients: a, b and c of ``X <- (a + b X X^T + c (X X^T)^2) X``.
    """
    count, rows, columns = matrices.shape
    if steps < 1:
        raise ValueError(f"{steps} steps, and one is the least")
    matrices, out = checked(matrices.detach(), count, rows, columns), matrices.new_empty(matrices.shape)
    threads = min(thread_count(), count)
    scratch = matrices.new_empty(threads * load_library().orthogonalize_scratch(rows, columns))
    pointers = addresses(matrices, out, scratch)
    load_library().orthogonalize(*pointers, count, rows, columns, steps, *coefficients, threads)
    return out


def muon_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    steps: int,
    coefficients: tuple[float, float, float],
    momentum: float,
    *,
    keep: float,
    rate: float,
) -> None:
    """A step of `training.optimizer.Muon` for weights of one shape, in place, each by one thread.

    Args:
        weights, gradients, momenta: [m, ...], read as m x n matrices, in memory in that order.
        steps, coefficients: As in `orthogonalize`.
        momentum: What the momenta keep of themselves.
        keep: What the weights are multiplied by.
        rate: What the orthogonal matrices are multiplied by before they are added.
    """
    shape = weights[0].shape
    rows, columns = shape[0], shape[1:].numel()
    for tensor in (*weights, *gradients, *momenta):
        if not _is_plain(tensor) or not tensor.is_contiguous() or tensor.shape != shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} that cannot be taken as {tuple(shape)}")
    if steps < 1 or not len(weights) == len(gradients) == len(momenta):
        raise ValueError(f"{steps} steps for {len(weights)}, {len(gradients)} and {len(momenta)} tensors")
    threads = min(thread_count(), len(weights))
    scratch = momenta[0].new_empty(threads * load_library().orthogonalize_scratch(rows, columns))
    several = ctypes.c_void_p * len(weights)
    lists = [several(*addresses(*tensors)) for tensors in (weights, gradients, momenta)]
    sizes = len(weights), rows, columns, steps
    load_library().muon_step(*lists, *addresses(scratch), *sizes, *coefficients, 1 - momentum, keep, rate, threads)
    torch.autograd.graph.increment_version([*weights, *momenta])


def attention_flops(pairs: int, heads: int, head_dim: int) -> int:
    """Operations of `window_attention` for so many pairs of a query and a key: logits of content and four numbers of
    geometry, and values."""
    return 2 * pairs * heads * (head_dim - GEOMETRY_DIM + 4 + head_dim)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses, good for as long as somebody else holds the tensors; 0 of what there is not."""
    assert all(t is None or t.is_contiguous() for t in tensors)
    return [0 if t is None else t.data_ptr() for t in tensors]


def thread_count() -> int:
    return torch.get_num_threads()


def _parts(tokens: int) -> int:
    return -(-tokens // load_library().tokens_in_a_part())


def _added_up(parts: Tensor) -> Tensor:
    """Sums of every part of a picture's tokens [B, parts, dim] -> [B, 1, dim]. Small pictures are one part, and a step
    has dozens of such sums."""
    return parts if parts.shape[1] == 1 else parts.sum(1, keepdim=True)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        out = torch.empty_like(h)
        load_library().norm_modulate(*addresses(h, scale, shift, out), *h.shape, epsilon, thread_count())
        ctx.save_for_backward(h, scale)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, scale = ctx.saved_tensors
        grad, of_h = grad.contiguous(), torch.empty_like(h)
        of_scale, of_shift = (h.new_empty(h.shape[0], _parts(h.shape[1]), h.shape[2]) for _ in range(2))
        pointers = addresses(grad, h, scale, of_h, of_scale, of_shift)
        load_library().norm_modulate_back(*pointers, *h.shape, ctx.epsilon, thread_count())
        return of_h, _added_up(of_scale), _added_up(of_shift), None


class _RenormalizedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, output: Tensor, gate: Tensor, tiny: float, opposed: float) -> Tensor:
        out = torch.empty_like(h)
        load_library().renormalized_update(*addresses(h, output, gate, out), *h.shape, tiny, opposed, thread_count())
        ctx.save_for_backward(h, output, gate)
        ctx.limits = tiny, opposed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, output, gate = ctx.saved_tensors
        grad, of_h, of_output = grad.contiguous(), torch.empty_like(h), torch.empty_like(h)
        of_gate = h.new_empty(h.shape[0], _parts(h.shape[1]), h.shape[2])
        pointers = addresses(grad, h, output, gate, of_h, of_output, of_gate)
        load_library().renormalized_update_back(*pointers, *h.shape, *ctx.limits, thread_count())
        return of_h, of_output, _added_up(of_gate), None, None


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, content: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
        out = torch.empty_like(content)
        pointers = addresses(content, gain, cos, sin, out)
        load_library().norm_rotate(*pointers, *content.shape, 2 * cos.shape[-1], epsilon, thread_count())
        ctx.save_for_backward(content, gain, cos, sin)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        content, gain, cos, sin = ctx.saved_tensors
        grad, of_content = grad.contiguous(), torch.empty_like(content)
        of_gain = gain.new_empty(_parts(content.shape[0] * content.shape[1]), gain.shape[0])
        pointers = addresses(grad, content, gain, cos, sin, of_content, of_gain)
        load_library().norm_rotate_back(*pointers, *content.shape, 2 * cos.shape[-1], ctx.epsilon, thread_count())
        return of_content, of_gain.sum(0), None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        hidden = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], hidden)
        load_library().gated_linear(*addresses(gate_up, out), out.numel() // hidden, hidden, thread_count())
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        grad, of_gate_up, hidden = grad.contiguous(), torch.empty_like(gate_up), gate_up.shape[-1] // 2
        pointers = addresses(grad, gate_up, of_gate_up)
        load_library().gated_linear_back(*pointers, grad.numel() // hidden, hidden, thread_count())
        return of_gate_up


class _ModulatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        batch, height, width, channels = pixels.shape
        out, ctx.sizes = torch.empty_like(pixels), (batch, height * width, channels)
        load_library().modulated_silu(*addresses(pixels, scale, shift, out), *ctx.sizes, thread_count())
        ctx.save_for_backward(pixels, scale, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pixels, scale, shift = ctx.saved_tensors
        batch, count, channels = ctx.sizes
        grad, of_pixels, of_scale, of_shift = grad.contiguous(), torch.empty_like(pixels), None, None
        if scale is not None:
            of_scale, of_shift = (pixels.new_empty(batch, _parts(count), channels) for _ in range(2))
        pointers = addresses(grad, pixels, scale, shift, of_pixels, of_scale, of_shift)
        load_library().modulated_silu_back(*pointers, *ctx.sizes, thread_count())
        return of_pixels, *(None if t is None else _added_up(t) for t in (of_scale, of_shift))


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, grid = arguments
        value = tensors[2]
        out, norm = torch.empty_like(value), value.new_empty(value.shape[:-1])
        sizes, scratch = _sizes(tensors, grid)
        load_library().window_attention(*addresses(*tensors, out, norm, scratch), *sizes)
        ctx.save_for_backward(*tensors, out, norm)
        ctx.grid = grid
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, out, norm = ctx.saved_tensors
        query, key, value, text_key, text_value, drift_hc, sigma_h = tensors
        # Of drift and width every picture's own: a head of a picture is one thread's.
        grads = [torch.empty_like(query), *map(torch.zeros_like, (key, value, text_key, text_value))]
        grads += [t.new_zeros(query.shape[0], *t.shape) for t in (drift_hc, sigma_h)]
        sizes, scratch = _sizes(tensors, ctx.grid)
        grad = grad.contiguous()  # a name of its own, so that it lives as long as the call
        pointers = addresses(grad, *tensors, out, norm, *grads, scratch)
        load_library().window_attention_back(*pointers, *sizes)
        return *grads[:5], grads[5].sum(0), grads[6].sum(0), None


class _TextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, starts: Tensor) -> Tensor:
        rows, _, heads, dim = qkv.shape
        out, norm = qkv.new_empty(rows, heads, dim), qkv.new_empty(rows, heads)
        ctx.sizes = starts.numel() - 1, heads, dim, dim**-0.5, thread_count()
        load_library().text_attention(*addresses(qkv, starts, out, norm), *ctx.sizes)
        ctx.save_for_backward(qkv, starts, out, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        grad, of_qkv = grad.contiguous(), torch.zeros_like(saved[0])
        load_library().text_attention_back(*addresses(grad, *saved, of_qkv), *ctx.sizes)
        return of_qkv, None


class _TextKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        content: Tensor,
        gain: Tensor,
        altitude_h: Tensor,
        starts: Tensor,
        longest: int,
        turning: int,
        epsilon: float,
    ) -> Tensor:
        _, heads, still = content.shape
        ctx.sizes = starts.numel() - 1, heads, longest, turning, still, GEOMETRY_DIM
        ctx.epsilon = epsilon
        key = content.new_empty(*ctx.sizes[:3], turning + still + GEOMETRY_DIM)
        pointers = addresses(content, gain, altitude_h, starts, key)
        load_library().text_keys(*pointers, *ctx.sizes, epsilon, -FAR, thread_count())
        ctx.save_for_backward(content, gain, starts)
        return key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        content, gain, starts = ctx.saved_tensors
        (batch, heads), still = ctx.sizes[:2], gain.shape[0]
        grad, of_content = grad.contiguous(), torch.empty_like(content)
        of_gain, of_altitude = content.new_empty(batch, still), content.new_empty(batch, heads)
        pointers = addresses(grad, content, gain, starts, of_content, of_gain, of_altitude)
        load_library().text_keys_back(*pointers, *ctx.sizes, ctx.epsilon, thread_count())
        return of_content, of_gain.sum(0), of_altitude.sum(0), None, None, None, None


class _TextValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        ctx.rows, heads, dim = value.shape
        spread = value.new_empty(starts.numel() - 1, heads, longest, dim)
        load_library().text_values(*addresses(value, starts, spread), *spread.shape, 0, thread_count())
        ctx.save_for_backward(starts)
        return spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (starts,) = ctx.saved_tensors
        grad = grad.contiguous()
        of_value = grad.new_empty(ctx.rows, grad.shape[1], grad.shape[3])
        load_library().text_values(*addresses(of_value, starts, grad), *grad.shape, 1, thread_count())
        return of_value, None, None


def _sizes(tensors: list[Tensor], grid: BlockGrid) -> tuple[tuple[int, ...], Tensor]:
    """The numbers that both directions of attention end with, and memory for their threads."""
    (batch, _, heads, content), dim, text = tensors[0].shape, tensors[2].shape[-1], tensors[3].shape[2]
    threads, shape = thread_count(), (content, dim, text, grid.block, grid.radius)
    scratch = torch.empty(threads * load_library().window_scratch(*shape), dtype=torch.uint8)
    return (batch, grid.height, grid.width, heads, *shape, *grid.lead, threads), scratch
