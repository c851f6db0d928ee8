"""PhysFormerTransformer2DModel: a local, energy-preserving flow-matching transformer.

Text stream, null prompt and the choice of the network that draws a level are here; the network itself is in
`physformer_core.model.network`, what it is stacked of in `blocks` and `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from physformer_core.model.attention import Backend, GainNorm, TextKeyValue, check_backend
from physformer_core.model.blocks import PhysFormerTextBlock
from physformer_core.model.network import FieldNetwork, NetworkSizes, PhysFormerBaseNetwork
from physformer_core.model.text_rows import TextRows


@dataclass
class PhysFormerTransformer2DOutput(BaseOutput):
    """Output of `PhysFormerTransformer2DModel`.

    Args:
        sample: [B, C, H, W], the predicted change from the coarse field to the sharp one (from zero at level 0).
    """

    sample: Tensor


@dataclass
class EncodedPrompt:
    """A prompt as the transformer reads it: computed once, used at every step, level and tile.

    Args:
        key_values: For finer levels, one `TextKeyValue` per block; None if it was encoded for level 0 alone.
        base_key_values: The same for level 0; None if it was encoded for finer levels alone.
        pooled: [B, pooled_dim] with nulls already in place.
    """

    key_values: list[TextKeyValue] | None
    base_key_values: list[TextKeyValue] | None
    pooled: Tensor

    def of(self, *, base: bool) -> list[TextKeyValue]:
        """What the network of level 0 (``base``) or of finer levels reads."""
        pairs = self.base_key_values if base else self.key_values
        assert pairs is not None, "the prompt was encoded for other levels"
        return pairs

    def repeat(self, index: Tensor) -> EncodedPrompt:
        """The prompts at ``index`` [B'], e.g. one prompt for several pictures."""

        def taken(pairs: list[TextKeyValue] | None) -> list[TextKeyValue] | None:
            return None if pairs is None else [TextKeyValue(pair.key[index], pair.value[index]) for pair in pairs]

        fine = taken(self.key_values)
        base = fine if self.base_key_values is self.key_values else taken(self.base_key_values)
        return EncodedPrompt(fine, base, self.pooled[index])


class PhysFormerTransformer2DModel(  # type: ignore[misc]
    FieldNetwork, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin
):
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
        base_num_layers: Blocks of a network of its own for level 0; 0 for one network at all levels.
        base_hidden_size, base_num_heads, base_patch_size: Its other sizes; without one they have no meaning and must be
            0.
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
        base_num_layers: int = 0,
        base_hidden_size: int = 0,
        base_num_heads: int = 0,
        base_patch_size: int = 0,
    ) -> None:
        super().__init__()
        sizes = NetworkSizes(
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            bottleneck=bottleneck,
            pooled_dim=pooled_dim,
            text_hidden_size=text_hidden_size,
            max_levels=max_levels,
            num_classes=num_classes,
            block_size=block_size,
            radius=radius,
            max_drift=max_drift,
            max_sigma=max_sigma,
            drift=drift,
            residual=residual,
            refiner_channels=0 if base_num_layers else refiner_channels,
        )
        of_base = (base_hidden_size, base_num_heads, base_patch_size)
        if min(base_num_layers, *of_base) < 0 or (any(of_base) if not base_num_layers else not all(of_base)):
            raise ConfigError(
                f"a network of {base_num_layers} layers for level 0, of width {base_hidden_size} with {base_num_heads} "
                f"heads and patches of {base_patch_size}, cannot be",
                hint="give all of base_num_layers, base_hidden_size, base_num_heads and base_patch_size, or none",
            )
        self.build_embeddings(sizes)
        self.text_embed = nn.Linear(text_dim, text_hidden_size)
        self.text_blocks = nn.ModuleList(
            PhysFormerTextBlock(text_hidden_size, max(1, text_hidden_size // 32), mlp_ratio)
            for _ in range(num_text_layers)
        )
        self.text_norm = GainNorm(text_hidden_size)
        self.build_blocks()
        self.null_prompt = nn.Parameter(torch.randn(null_tokens, text_dim))
        self.null_pooled = nn.Parameter(torch.randn(pooled_dim))
        self.base: PhysFormerBaseNetwork | None = None
        if base_num_layers:
            of_level_0 = replace(
                sizes,
                prefix="base_",
                num_layers=base_num_layers,
                hidden_size=base_hidden_size,
                num_heads=base_num_heads,
                patch_size=base_patch_size,
                refiner_channels=refiner_channels,
            )
            self.base = PhysFormerBaseNetwork(of_level_0)
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
        for network in self.networks():
            for zero in network.zero_at_first():
                nn.init.zeros_(zero.weight)

    def networks(self) -> list[FieldNetwork]:
        """The networks that predict fields: this one, and that of level 0 where there is one."""
        return [self] if self.base is None else [self, self.base]

    def network(self, *, base: bool) -> FieldNetwork:
        """The network that predicts level 0 (``base``), or the finer levels."""
        return self.base if base and self.base is not None else self

    def set_attention_backend(self, backend: Backend) -> None:
        """Runs every block's attention with ``auto``, ``reference``, ``dense``, ``halo``, ``native`` or, on CUDA,
        ``flex``.

        Raises:
            ConfigError: For any other name, and for ``flex`` once the network runs where it cannot.
        """
        check_backend(backend)
        for network in self.networks():
            network.attention_backend = backend

    def encode_prompt(
        self,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        pooled: Tensor,
        drop: Tensor | None = None,
        *,
        base: bool | None = None,
    ) -> EncodedPrompt:
        """Runs the text stream and every block's text projections.

        Args:
            prompt_embeds: [B, T, text_dim].
            prompt_mask: Bool [B, T].
            pooled: [B, pooled_dim].
            drop: Optional bool [B]; True replaces a prompt by the learned null prompt.
            base: What it is encoded for, where level 0 has a network of its own: level 0 alone, finer levels alone
                (False), or all of them (None).
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
        rows = TextRows.of(prompt_mask)
        if rows is not None:
            prompt_embeds = rows.pack(prompt_embeds)
        text_states = self.text_embed(prompt_embeds.to(self.text_embed.weight.dtype))
        for block in self.text_blocks:
            text_states = block(text_states, prompt_mask, rows)
        text_states = self.text_norm(text_states)
        if self.base is None:
            pairs = self.encode_text(text_states, prompt_mask, rows)
            return EncodedPrompt(pairs, pairs, pooled)
        of_fine = None if base is True else self.encode_text(text_states, prompt_mask, rows)
        of_base = None if base is False else self.base.encode_text(text_states, prompt_mask, rows)
        return EncodedPrompt(of_fine, of_base, pooled)

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
        if place is None:
            whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=hidden_states.device)
            place = whole.expand(hidden_states.shape[0], 4)
        base = coarse_hidden_states is None
        sample = self.network(base=base).predict(
            hidden_states,
            timestep,
            encoded_prompt.of(base=base),
            encoded_prompt.pooled,
            level,
            coarse_hidden_states,
            place,
            class_labels,
            token_origin,
        )
        return PhysFormerTransformer2DOutput(sample=sample) if return_dict else (sample,)
