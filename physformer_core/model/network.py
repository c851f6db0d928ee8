"""What predicts a field at some levels: embeddings, blocks, final layer and, at level 0, the refiner.

Reads downward: embeddings, final layer, sizes, network. A model has one such network for all levels, or a second one
for level 0, where a picture has few tokens and what it shows is decided: so that most of the weights can be where they
cost least. Denoisers of their own for parts of the way are those of eDiff-I (Balaji et al. 2022,
https://arxiv.org/abs/2211.01324); here they are split by level, not by time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physformer_core.errors import ConfigError
from physformer_core.model.attention import (
    FLAT_SIGMA,
    AttentionPlan,
    Backend,
    PhysFormerAttention,
    TextKeyValue,
    plan_attention,
)
from physformer_core.model.blocks import PhysFormerBlock
from physformer_core.model.geometry import GEOMETRY_DIM, BlockGrid, place_coordinates, rotary_angles
from physformer_core.model.refiner import PhysFormerRefiner
from physformer_core.model.reversible import run_reversibly
from physformer_core.model.text_rows import TextRows
from physformer_core.model.updates import ResidualForm, residual_form


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


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of a network; names as in `PhysFormerTransformer2DModel`.

    Args:
        prefix: Of the names in messages: ``base_`` for the network of level 0.

    Raises:
        ConfigError: They make no network.
    """

    in_channels: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: float
    bottleneck: int
    pooled_dim: int
    text_hidden_size: int
    max_levels: int
    num_classes: int
    block_size: int
    radius: int
    max_drift: float
    max_sigma: float
    drift: bool
    residual: str
    refiner_channels: int
    prefix: str = ""

    def __post_init__(self) -> None:
        head_dim, remainder = divmod(self.hidden_size, self.num_heads) if self.num_heads > 0 else (0, 1)
        if remainder or head_dim - GEOMETRY_DIM < 8:
            raise ConfigError(
                f"{self.prefix}hidden_size {self.hidden_size} over {self.num_heads} heads leaves no room for content "
                "beside geometry",
                hint=f"it must be a multiple of {self.prefix}num_heads and at least {GEOMETRY_DIM + 8} per head",
            )
        if self.block_size % 2 or self.radius < 1 or self.block_size + 2 * self.radius > 32:
            raise ConfigError("block_size must be even, radius at least 1, and block_size + 2 radius at most 32")
        if self.max_drift <= 1 or not 0.3 < self.max_sigma <= FLAT_SIGMA:
            # Drifts start one token long; a wider kernel would let keys that are meant to be far away shine through.
            raise ConfigError(
                f"max_drift {self.max_drift} or max_sigma {self.max_sigma} is out of range",
                hint=f"max_drift must be above 1, max_sigma above 0.3 and at most {FLAT_SIGMA:g}",
            )
        if self.refiner_channels < 0 or (self.refiner_channels and self.patch_size % 2):
            raise ConfigError(
                f"refiner_channels {self.refiner_channels} with patches of {self.patch_size} cannot be",
                hint="0 for none; the refiner halves patches, so their side must be even",
            )


def _run_block(
    block: PhysFormerBlock, text: TextKeyValue, plan: AttentionPlan, temb: Tensor, *streams: Tensor
) -> tuple[Tensor, ...]:
    return block(streams, temb, text, plan)


class FieldNetwork:
    """A mix-in for modules that predict a field: the model itself, and `PhysFormerBaseNetwork` in it."""

    sizes: NetworkSizes
    form: ResidualForm
    patch_embed: PhysFormerPatchEmbed
    condition_embed: PhysFormerConditionEmbed
    blocks: nn.ModuleList
    final_layer: PhysFormerFinalLayer
    refiner: PhysFormerRefiner | None
    attention_backend: Backend
    gradient_checkpointing: bool

    def build_embeddings(self, sizes: NetworkSizes) -> None:
        """Makes what comes before the blocks; for ``__init__``, after that of `nn.Module`."""
        self.sizes = sizes
        self.form = residual_form(sizes.residual)
        dim = sizes.hidden_size
        self.patch_embed = PhysFormerPatchEmbed(sizes.in_channels, sizes.patch_size, dim, sizes.bottleneck)
        self.condition_embed = PhysFormerConditionEmbed(dim, sizes.pooled_dim, sizes.max_levels, sizes.num_classes)
        self.attention_backend = "auto"
        self.gradient_checkpointing = False

    def build_blocks(self) -> None:
        """Makes the blocks and what comes after them."""
        sizes, dim = self.sizes, self.sizes.hidden_size
        self.blocks = nn.ModuleList(
            PhysFormerBlock(
                dim,
                sizes.num_heads,
                sizes.mlp_ratio,
                sizes.text_hidden_size,
                sizes.max_drift,
                sizes.max_sigma,
                sizes.drift,
                self.form,
            )
            for _ in range(sizes.num_layers)
        )
        self.final_layer = PhysFormerFinalLayer(dim, sizes.patch_size, sizes.in_channels)
        self.refiner = None
        if sizes.refiner_channels:
            self.refiner = PhysFormerRefiner(sizes.in_channels, dim, sizes.patch_size, sizes.refiner_channels)

    def zero_at_first(self) -> list[nn.Linear | nn.Conv2d]:
        """Layers that begin as zero (AdaLN-Zero): then every block is the identity, and the output is zero."""
        modulations = [block.modulation for block in self.field_blocks()]
        of_refiner = () if self.refiner is None else self.refiner.zero_at_first()
        return [self.final_layer.modulation, self.final_layer.proj_out, *modulations, *of_refiner]

    def field_blocks(self) -> list[PhysFormerBlock]:
        """The blocks, in order."""
        return cast(list[PhysFormerBlock], list(self.blocks))

    def attentions(self) -> list[PhysFormerAttention]:
        """Every block's attention, in order."""
        return [block.attn for block in self.field_blocks()]

    def encode_text(self, text_states: Tensor, mask: Tensor, rows: TextRows | None = None) -> list[TextKeyValue]:
        """Every block's keys and values of a prompt; see `PhysFormerAttention.encode_text`."""
        return [attention.encode_text(text_states, mask, rows) for attention in self.attentions()]

    def plan(self, height: int, width: int, origin: tuple[int, int], like: Tensor) -> list[AttentionPlan]:
        """Attention plans of even and odd blocks: the same, but for the grid's shift of half a block."""
        sizes, dtype = self.sizes, self.patch_embed.proj1.weight.dtype
        angles = rotary_angles(height, width, origin, self.attentions()[0].rotary_dim, like.device).flatten(0, 1)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        grid = BlockGrid(height=height, width=width, block=sizes.block_size, radius=sizes.radius, origin=origin)
        grids = (grid, replace(grid, shift=sizes.block_size // 2))
        return [plan_attention(grid, self.attention_backend, cos, sin, dtype) for grid in grids]

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        texts: list[TextKeyValue],
        pooled: Tensor,
        level: Tensor,
        coarse: Tensor | None,
        place: Tensor,
        class_labels: Tensor | None,
        token_origin: tuple[int, int],
    ) -> Tensor:
        """The change from the coarse field to the sharp one, [B, C, H, W] in float32.

        Args:
            hidden_states: [B, C, H, W] noisy field.
            timestep: [B].
            texts: Keys and values of the prompt for each block.
            pooled: [B, pooled_dim].
            level: Long [B].
            coarse: [B, C, H, W] upsampled coarser level, or None at level 0.
            place: [B, 4] box of the field in the whole picture.
            class_labels: Long [B] or None.
            token_origin: Absolute (row, column) of the field's first token.

        Raises:
            ValueError: The field is not whole patches.
        """
        _, _, height, width = hidden_states.shape
        patch = self.sizes.patch_size
        if height % patch or width % patch:
            raise ValueError(f"a field of {height}x{width} is not whole patches of {patch}")
        dtype = self.patch_embed.proj1.weight.dtype
        seen = torch.zeros_like(hidden_states) if coarse is None else coarse
        temb = self.condition_embed(timestep, level, pooled, class_labels)
        # The residual stream stays float32 whatever the weights are: norms are conserved to its precision.
        tokens = self.patch_embed(hidden_states.to(dtype), seen.to(dtype), place).float().flatten(1, 2)
        streams = (tokens,) * self.form.streams
        if len(streams) == 2 and torch.is_grad_enabled():
            # Not one tensor twice, for which compiled blocks would need graphs of their own.
            streams = (tokens, tokens.clone())
        plans = self.plan(height // patch, width // patch, token_origin, tokens)
        of_blocks = [plans[index % 2] for index in range(len(self.blocks))]
        blocks = self.field_blocks()
        save_memory = torch.is_grad_enabled() and self.gradient_checkpointing
        if save_memory and self.form.always_invertible:
            streams = run_reversibly(blocks, streams, temb, texts, of_blocks)
        else:
            for block, text, plan in zip(blocks, texts, of_blocks, strict=True):
                if save_memory:
                    # Tensors one by one: of those inside a tuple, hooks that offload what autograd saves hear nothing.
                    run = functools.partial(_run_block, block, text, plan)
                    streams = self._gradient_checkpointing_func(run, temb, *streams)  # type: ignore[attr-defined]
                else:
                    streams = block(streams, temb, text, plan)
        tokens = (streams[0] + streams[1]) / 2 if len(streams) == 2 else streams[0]
        tokens = tokens.unflatten(1, (height // patch, width // patch))
        sample = self.final_layer(tokens, temb)
        if coarse is None and self.refiner is not None:
            sample = self.refiner(sample, hidden_states, tokens, temb)
        return sample


class PhysFormerBaseNetwork(FieldNetwork, nn.Module):
    """The network of level 0, where a model has one for it alone."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.build_embeddings(sizes)
        self.build_blocks()
