"""The layers that a network is stacked of: feed-forward, text block, block.

Reads downward: feed-forward, text stream, block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physformer_core.model.attention import NORM_EPSILON, AttentionPlan, GainNorm, PhysFormerAttention, TextKeyValue
from physformer_core.model.fused import ops as fused
from physformer_core.model.native import ops as native
from physformer_core.model.text_rows import TextRows
from physformer_core.model.updates import OPPOSED, TINY, ResidualForm, renormalized_update

FEED_FORWARD_CHUNK = 2048
"""Tokens that pass through a feed-forward at once without gradients, so that its hidden layer stays in cache."""

# A compiled graph holds every chunk: more of them would be compiled for minutes.
_COMPILED_CHUNKS = 8


class PhysFormerFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) with a hidden layer of ``dim * ratio``, rounded to 32."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = round(dim * ratio / 32) * 32
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up = self.gate_up(hidden_states)
        if native.takes(gate_up):
            return self.down(native.gated_linear(gate_up))
        if fused.takes(gate_up):
            return self.down(fused.gated_linear(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PhysFormerTextBlock(nn.Module):
    """One layer of the text stream: self-attention over the prompt and a feed-forward, pre-norm.

    It sees neither the picture nor the flow time, so its output is computed once per prompt.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = num_heads
        self.norm1 = GainNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = GainNorm(dim)
        self.feed_forward = PhysFormerFeedForward(dim, mlp_ratio)

    def forward(self, text_states: Tensor, mask: Tensor, rows: TextRows | None = None) -> Tensor:
        """[B, T, dim] -> [B, T, dim], or [1, R, dim] of ``rows``; ``mask`` is bool [B, T]."""
        text_states = text_states + self.to_out(self.attended(self.to_qkv(self.norm1(text_states)), mask, rows))
        return text_states + self.feed_forward(self.norm2(text_states))

    def attended(self, qkv: Tensor, mask: Tensor, rows: TextRows | None) -> Tensor:
        """What every token reads: [B, T, 3 dim] -> [B, T, dim], or [1, R, 3 dim] -> [1, R, dim]."""
        if rows is not None and native.takes(qkv):
            return native.text_attention(qkv[0].unflatten(-1, (3, self.heads, -1)), rows.starts)[None]
        if rows is not None:
            qkv = rows.spread(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
        return attended if rows is None else rows.pack(attended)


class PhysFormerBlock(nn.Module):
    """Local attention and feed-forward, each modulated (AdaLN-Zero, Peebles & Xie 2022,
    https://arxiv.org/abs/2212.09748) and each applied as an update that conserves what its form promises.

    Args:
        dim, num_heads, mlp_ratio, text_dim: Sizes.
        max_drift, max_sigma, drift: See `PhysFormerAttention`.
        form: How the output of a sublayer changes the tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        text_dim: int,
        max_drift: float,
        max_sigma: float,
        drift: bool,
        form: ResidualForm,
    ) -> None:
        super().__init__()
        self.form = form
        self.attn = PhysFormerAttention(dim, num_heads, text_dim, max_drift, max_sigma, drift)
        self.feed_forward = PhysFormerFeedForward(dim, mlp_ratio)
        self.modulation = nn.Linear(dim, 6 * dim)

    def normed(self, hidden_states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """RMS norm and modulation, in the dtype that products are computed in."""
        dtype = self.feed_forward.down.weight.dtype
        if fused.takes(hidden_states, scale):
            if torch.is_autocast_enabled("cuda"):
                dtype = torch.get_autocast_dtype("cuda")  # what the products would cast it to, each for itself
            return fused.norm_modulate(hidden_states, scale, shift, NORM_EPSILON, dtype)
        if native.takes(hidden_states):
            normed = native.norm_modulate(hidden_states, scale, shift, NORM_EPSILON)
        else:
            normed = F.rms_norm(hidden_states, (hidden_states.shape[-1],), None, NORM_EPSILON)
            normed = normed * (1 + scale) + shift
        return normed.to(dtype)

    def modulate(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the feed-forward: each [B, 1, dim] in float32."""
        return self.modulation(temb)[:, None].float().chunk(6, dim=-1)

    def attend(
        self, hidden_states: Tensor, modulation: tuple[Tensor, ...], text: TextKeyValue | None, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """The output of attention on tokens [B, N, dim], and its gate."""
        shift, scale, gate = modulation[:3]
        return self.attn(self.normed(hidden_states, scale, shift), text, plan), gate

    def feed(self, hidden_states: Tensor, modulation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The output of the feed-forward on tokens [B, N, dim], and its gate."""
        shift, scale, gate = modulation[3:]
        return self.feed_forward(self.normed(hidden_states, scale, shift)), gate

    def update(self, hidden_states: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        """Applies a sublayer's output to float32 tokens [B, N, dim] through its gate [B, 1, dim]."""
        if self.form.update is renormalized_update:
            for kernels in (native, fused):
                if kernels.takes(hidden_states, output):
                    return kernels.renormalized_update(hidden_states, output, gate, TINY, OPPOSED)
        return self.form.apply(hidden_states, gate * output, self.attn.heads)

    def forward(
        self,
        streams: tuple[Tensor, ...],
        temb: Tensor,
        text: TextKeyValue | None,
        plan: AttentionPlan,
    ) -> tuple[Tensor, ...]:
        """One stream of tokens or two, as the form has: each [B, N, dim] in float32, in row order -> as many."""
        modulation = self.modulate(temb)
        # With two streams q and p, each sublayer reads one and changes the other; with one, they are the same.
        q, p = streams[0], streams[-1]
        q = self.update(q, *self.attend(p, modulation, text, plan))
        changed = p if self.form.streams == 2 else q
        if torch.is_grad_enabled() or q.shape[1] <= FEED_FORWARD_CHUNK:
            p = self.update(changed, *self.feed(q, modulation))
        else:
            size = max(FEED_FORWARD_CHUNK, -(-q.shape[1] // _COMPILED_CHUNKS) if torch.compiler.is_compiling() else 0)
            chunks = zip(changed.split(size, dim=1), q.split(size, dim=1), strict=True)
            p = torch.cat([self.update(part, *self.feed(read, modulation)) for part, read in chunks], dim=1)
        return (q, p) if self.form.streams == 2 else (p,)
