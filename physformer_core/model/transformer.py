"""PhysFormerTransformer2DModel: a local, energy-preserving flow-matching transformer.

Reads downward: feed-forward, text stream, block, embeddings, final layer, model.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from physformer_core.errors import ConfigError
from physformer_core.model.attention import (
    BACKENDS,
    FLAT_SIGMA,
    NORM_EPSILON,
    AttentionPlan,
    Backend,
    GainNorm,
    PhysFormerAttention,
    TextKeyValue,
    plan_attention,
)
from physformer_core.model.geometry import (
    GEOMETRY_DIM,
    BlockGrid,
    place_coordinates,
    rotary_angles,
)
from physformer_core.model.native import ops as native
from physformer_core.model.refiner import PhysFormerRefiner
from physformer_core.model.reversible import run_reversibly
from physformer_core.model.updates import OPPOSED, TINY, ResidualForm, renormalized_update, residual_form

FEED_FORWARD_CHUNK = 2048
"""Tokens that pass through a feed-forward at once without gradients, so that its hidden layer stays in cache."""

# A compiled graph holds every chunk: more of them would be compiled for minutes.
_COMPILED_CHUNKS = 8


@dataclass
class PhysFormerTransformer2DOutput(BaseOutput):
    """Output of `PhysFormerTransformer2DModel`.

    Args:
        sample: [B, C, H, W], the predicted change from the coarse field to the sharp one (from zero at level 0).
    """

    sample: Tensor


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

    def forward(self, text_states: Tensor, mask: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; ``mask`` is bool [B, T]."""
        q, k, v = self.to_qkv(self.norm1(text_states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        text_states = text_states + self.to_out(attended.transpose(1, 2).flatten(2))
        return text_states + self.feed_forward(self.norm2(text_states))


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
        """RMS norm and modulation, in the dtype of the weights."""
        if native.takes(hidden_states):
            normed = native.norm_modulate(hidden_states, scale, shift, NORM_EPSILON)
        else:
            normed = F.rms_norm(hidden_states, (hidden_states.shape[-1],), None, NORM_EPSILON)
            normed = normed * (1 + scale) + shift
        return normed.to(self.feed_forward.down.weight.dtype)

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
        if self.form.update is renormalized_update and native.takes(hidden_states, output):
            return native.renormalized_update(hidden_states, output, gate, TINY, OPPOSED)
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


class PhysFormerPatchEmbed(nn.Module):
    """Patches of the noisy and the coarse field through a low-rank bottleneck (JiT, Li & He 2025,
    https://arxiv.org/abs/2511.13720), plus each token's place in the whole picture."""

    def __init__(
        self, in_channels: int, patch_size: int, dim: int, bottleneck: int, place_frequencies: int = 4
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj1 = nn.Linear(2 * in_channels * patch_size**2, bottleneck, bias=False)
        self.proj2 = nn.Linear(bottleneck, dim)
        self.place_frequencies = place_frequencies
        self.place = nn.Linear(4 * place_frequencies, dim, bias=False)

    def patchify(self, field: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H/p, W/p, C*p*p]."""
        p = self.patch_size
        field = field.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return field.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def forward(self, hidden_states: Tensor, coarse: Tensor, place_b4: Tensor) -> Tensor:
        """Returns tokens [B, Hy, Wx, dim]."""
        patches = torch.cat([self.patchify(hidden_states), self.patchify(coarse)], dim=-1)
        tokens = self.proj2(self.proj1(patches))
        frequencies = math.pi / 2 * 2.0 ** torch.arange(self.place_frequencies, device=tokens.device)
        angle = place_coordinates(tokens.shape[1], tokens.shape[2], place_b4)[..., None] * frequencies
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(3)
        return tokens + self.place(features.to(tokens.dtype))


class PhysFormerConditionEmbed(nn.Module):
    """Flow time, level, pooled text and, where there are classes, the class: one vector per picture."""

    def __init__(self, dim: int, pooled_dim: int, max_levels: int, num_classes: int, time_dim: int = 256) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.max_levels = max_levels
        self.time1, self.time2 = nn.Linear(time_dim, dim), nn.Linear(dim, dim)
        self.pooled1, self.pooled2 = nn.Linear(pooled_dim, dim), nn.Linear(dim, dim)
        self.level = nn.Embedding(max_levels, dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, timestep: Tensor, level: Tensor, pooled: Tensor, class_labels: Tensor | None) -> Tensor:
        """Returns [B, dim], already through the activation that modulation layers expect."""
        half = self.time_dim // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
        angle = 1000 * timestep.float()[:, None] * frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.time1.weight.dtype)
        temb = self.time2(F.silu(self.time1(features))) + self.level(level.clamp(max=self.max_levels - 1))
        temb = temb + self.pooled2(F.silu(self.pooled1(pooled.to(self.pooled1.weight.dtype))))
        if self.label is not None:
            labels = class_labels if class_labels is not None else torch.full_like(level, self.label.num_embeddings - 1)
            temb = temb + self.label(labels)
        return F.silu(temb)


class PhysFormerFinalLayer(nn.Module):
    """Norm, modulation and projection to patches; zero at initialisation."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Tokens [B, Hy, Wx, dim] -> field [B, C, Hy*p, Wx*p] in float32."""
        shift, scale = self.modulation(temb)[:, None, None].float().chunk(2, dim=-1)
        normed = F.rms_norm(hidden_states, (hidden_states.shape[-1],), None, 1e-6) * (1 + scale) + shift
        patches = self.proj_out(normed.to(self.proj_out.weight.dtype)).float()
        p = self.patch_size
        patches = patches.unflatten(-1, (self.out_channels, p, p)).permute(0, 3, 1, 4, 2, 5)
        return patches.flatten(4, 5).flatten(2, 3)


@dataclass
class EncodedPrompt:
    """A prompt as the transformer reads it: computed once, used at every step, level and tile.

    Args:
        key_values: One `TextKeyValue` per block.
        pooled: [B, pooled_dim] with nulls already in place.
    """

    key_values: list[TextKeyValue]
    pooled: Tensor

    def repeat(self, index: Tensor) -> EncodedPrompt:
        """The prompts at ``index`` [B'], e.g. one prompt for several pictures."""
        pairs = [TextKeyValue(pair.key[index], pair.value[index]) for pair in self.key_values]
        return EncodedPrompt(pairs, self.pooled[index])


def _run_block(
    block: PhysFormerBlock, text: TextKeyValue, plan: AttentionPlan, temb: Tensor, *streams: Tensor
) -> tuple[Tensor, ...]:
    return block(streams, temb, text, plan)


class PhysFormerTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):  # type: ignore[misc]
    """A flow-matching transformer over a field of patches, local in space, conserving each token's norm.

    Args:
        in_channels: Channels of the field (3 for pixels).
        patch_size: Side of a patch.
        hidden_size: Width of the tokens.
        num_layers, num_heads, mlp_ratio: Depth, heads and width of the feed-forward.
        bottleneck: Rank of the patch embedding.
        text_dim, pooled_dim: Width of prompt embeddings and pooled projections.
        text_hidden_size, num_text_layers: Width and depth of the text stream.
        max_levels: Rows of the level embedding; levels beyond share the last one.
        num_classes: Classes besides text (0: none). The class after the last is the learned null class.
        null_tokens: Learned tokens that stand for "no prompt".
        block_size, radius: Attention block and halo in tokens.
        max_drift, max_sigma: Bounds in tokens.
        drift: Whether heads drift.
        residual: How sublayers change tokens, and what that conserves: a name in `updates.RESIDUALS`.
        refiner_channels: Width of the `PhysFormerRefiner` of level 0; 0 for none.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PhysFormerBlock", "PhysFormerTextBlock"]
    _repeated_blocks = ["PhysFormerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "condition_embed", "final_layer", "norm", "drift", "sigma"]
    _keep_in_fp32_modules = ["drift_logit", "sigma_logit", "text_altitude"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 8,
        hidden_size: int = 256,
        num_layers: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 2.75,
        bottleneck: int = 128,
        text_dim: int = 384,
        pooled_dim: int = 384,
        text_hidden_size: int = 256,
        num_text_layers: int = 2,
        max_levels: int = 6,
        num_classes: int = 0,
        null_tokens: int = 4,
        block_size: int = 8,
        radius: int = 4,
        max_drift: float = 2.0,
        max_sigma: float = 3.0,
        drift: bool = True,
        residual: str = "leapfrog_renormalized",
        refiner_channels: int = 0,
    ) -> None:
        super().__init__()
        head_dim, remainder = divmod(hidden_size, num_heads)
        if remainder or head_dim - GEOMETRY_DIM < 8:
            raise ConfigError(
                f"hidden_size {hidden_size} over {num_heads} heads leaves no room for content beside geometry",
                hint=f"hidden_size must be a multiple of num_heads and at least {GEOMETRY_DIM + 8} per head",
            )
        if block_size % 2 or radius < 1 or block_size + 2 * radius > 32:
            raise ConfigError("block_size must be even, radius at least 1, and block_size + 2 radius at most 32")
        if max_drift <= 1 or not 0.3 < max_sigma <= FLAT_SIGMA:
            # Drifts start one token long; a wider kernel would let keys that are meant to be far away shine through.
            raise ConfigError(
                f"max_drift {max_drift} or max_sigma {max_sigma} is out of range",
                hint=f"max_drift must be above 1, max_sigma above 0.3 and at most {FLAT_SIGMA:g}",
            )
        if refiner_channels < 0 or (refiner_channels and patch_size % 2):
            raise ConfigError(
                f"refiner_channels {refiner_channels} with patches of {patch_size} cannot be",
                hint="0 for none; the refiner halves patches, so their side must be even",
            )
        self.form = residual_form(residual)
        self.patch_embed = PhysFormerPatchEmbed(in_channels, patch_size, hidden_size, bottleneck)
        self.condition_embed = PhysFormerConditionEmbed(hidden_size, pooled_dim, max_levels, num_classes)
        self.text_embed = nn.Linear(text_dim, text_hidden_size)
        self.text_blocks = nn.ModuleList(
            PhysFormerTextBlock(text_hidden_size, max(1, text_hidden_size // 32), mlp_ratio)
            for _ in range(num_text_layers)
        )
        self.text_norm = GainNorm(text_hidden_size)
        self.blocks = nn.ModuleList(
            PhysFormerBlock(hidden_size, num_heads, mlp_ratio, text_hidden_size, max_drift, max_sigma, drift, self.form)
            for _ in range(num_layers)
        )
        self.final_layer = PhysFormerFinalLayer(hidden_size, patch_size, in_channels)
        self.refiner = (
            PhysFormerRefiner(in_channels, hidden_size, patch_size, refiner_channels) if refiner_channels else None
        )
        self.null_prompt = nn.Parameter(torch.randn(null_tokens, text_dim))
        self.null_pooled = nn.Parameter(torch.randn(pooled_dim))
        self.attention_backend: Backend = "auto"
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Truncated normal of fan-in scale for matrices; zero for modulation and output (AdaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5, a=-1.0, b=1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # Unit size: levels ask for different outputs of one network and must be told apart from the start.
                nn.init.normal_(module.weight)
        modulations = [module.modulation for module in self.modules() if isinstance(module, PhysFormerBlock)]
        of_refiner: tuple[nn.Linear | nn.Conv2d, ...] = () if self.refiner is None else self.refiner.zero_at_first()
        for zero in (self.final_layer.modulation, self.final_layer.proj_out, *modulations, *of_refiner):
            nn.init.zeros_(zero.weight)

    def attentions(self) -> list[PhysFormerAttention]:
        """Every block's attention, in order."""
        return [block.attn for block in self.blocks if isinstance(block, PhysFormerBlock)]

    def set_attention_backend(self, backend: Backend) -> None:
        """Runs every block's attention with ``auto``, ``reference``, ``dense``, ``halo``, ``native`` or, on CUDA,
        ``flex``.

        Raises:
            ConfigError: For any other name, and for ``flex`` once the network runs where it cannot.
        """
        if backend not in ("auto", *BACKENDS):
            raise ConfigError(f"unknown attention backend '{backend}'", hint="one of auto, " + ", ".join(BACKENDS))
        self.attention_backend = backend

    def encode_prompt(
        self, prompt_embeds: Tensor, prompt_mask: Tensor, pooled: Tensor, drop: Tensor | None = None
    ) -> EncodedPrompt:
        """Runs the text stream and every block's text projections.

        Args:
            prompt_embeds: [B, T, text_dim].
            prompt_mask: Bool [B, T].
            pooled: [B, pooled_dim].
            drop: Optional bool [B]; True replaces a prompt by the learned null prompt.
        """
        if drop is not None:
            missing = max(0, self.null_prompt.shape[0] - prompt_embeds.shape[1])
            prompt_embeds = F.pad(prompt_embeds, (0, 0, 0, missing))
            prompt_mask = F.pad(prompt_mask, (0, missing))
            extra = prompt_embeds.shape[1] - self.null_prompt.shape[0]
            null = F.pad(self.null_prompt.to(prompt_embeds.dtype), (0, 0, 0, extra))
            null_mask = torch.arange(prompt_embeds.shape[1], device=drop.device) < self.null_prompt.shape[0]
            prompt_embeds = torch.where(drop[:, None, None], null, prompt_embeds)
            prompt_mask = torch.where(drop[:, None], null_mask, prompt_mask)
            pooled = torch.where(drop[:, None], self.null_pooled.to(pooled.dtype), pooled)
        text_states = self.text_embed(prompt_embeds.to(self.text_embed.weight.dtype))
        for block in self.text_blocks:
            text_states = block(text_states, prompt_mask)
        text_states = self.text_norm(text_states)
        return EncodedPrompt([attn.encode_text(text_states, prompt_mask) for attn in self.attentions()], pooled)

    def plan(self, height: int, width: int, origin: tuple[int, int], like: Tensor) -> list[AttentionPlan]:
        """Attention plans of even and odd blocks: the same, but for the grid's shift of half a block."""
        config, dtype = self.config, self.patch_embed.proj1.weight.dtype
        angles = rotary_angles(height, width, origin, self.attentions()[0].rotary_dim, like.device).flatten(0, 1)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        grid = BlockGrid(height=height, width=width, block=config.block_size, radius=config.radius, origin=origin)
        grids = (grid, replace(grid, shift=config.block_size // 2))
        return [plan_attention(grid, self.attention_backend, cos, sin, dtype) for grid in grids]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoded_prompt: EncodedPrompt,
        level: Tensor,
        coarse_hidden_states: Tensor | None = None,
        place: Tensor | None = None,
        class_labels: Tensor | None = None,
        token_origin: tuple[int, int] = (0, 0),
        return_dict: bool = True,
    ) -> PhysFormerTransformer2DOutput | tuple[Tensor]:
        """Predicts the sharp field, as its difference to the coarse one.

        Args:
            hidden_states: [B, C, H, W] noisy field; H and W multiples of the patch size.
            timestep: [B] flow time in [0, 1]; 1 is data.
            encoded_prompt: From `encode_prompt`.
            level: Long [B].
            coarse_hidden_states: [B, C, H, W] upsampled coarser level, or None at level 0.
            place: [B, 4] box of the field in the whole picture (top, left, bottom, right); the whole if None.
            class_labels: Optional long [B].
            token_origin: Absolute (row, column) of the field's first token, for tiles.
            return_dict: Whether to wrap the result.
        """
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"a field of {height}x{width} is not whole patches of {patch}")
        dtype = self.patch_embed.proj1.weight.dtype
        is_base = coarse_hidden_states is None
        if coarse_hidden_states is None:
            coarse_hidden_states = torch.zeros_like(hidden_states)
        if place is None:
            place = torch.tensor([0.0, 0.0, 1.0, 1.0], device=hidden_states.device).expand(batch, 4)
        temb = self.condition_embed(timestep, level, encoded_prompt.pooled, class_labels)
        # The residual stream stays float32 whatever the weights are: norms are conserved to its precision.
        tokens = self.patch_embed(hidden_states.to(dtype), coarse_hidden_states.to(dtype), place).float().flatten(1, 2)
        streams = (tokens,) * self.form.streams
        plans = self.plan(height // patch, width // patch, token_origin, tokens)
        of_blocks = [plans[index % 2] for index in range(len(self.blocks))]
        blocks = cast(list[PhysFormerBlock], list(self.blocks))
        save_memory = torch.is_grad_enabled() and self.gradient_checkpointing
        if save_memory and self.form.always_invertible:
            streams = run_reversibly(blocks, streams, temb, encoded_prompt.key_values, of_blocks)
        else:
            for block, text, plan in zip(blocks, encoded_prompt.key_values, of_blocks, strict=True):
                if save_memory:
                    # Tensors one by one: of those inside a tuple, hooks that offload what autograd saves hear nothing.
                    run = functools.partial(_run_block, block, text, plan)
                    streams = self._gradient_checkpointing_func(run, temb, *streams)
                else:
                    streams = block(streams, temb, text, plan)
        tokens = (streams[0] + streams[1]) / 2 if len(streams) == 2 else streams[0]
        tokens = tokens.unflatten(1, (height // patch, width // patch))
        sample = self.final_layer(tokens, temb)
        if is_base and self.refiner is not None:
            sample = self.refiner(sample, hidden_states, tokens, temb)
        return PhysFormerTransformer2DOutput(sample=sample) if return_dict else (sample,)
