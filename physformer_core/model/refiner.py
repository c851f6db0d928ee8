"""PhysFormerRefiner: what tokens say of level 0, redrawn pixel by pixel.

A token speaks for a whole patch. At the finer levels that is enough, as the coarser picture shows through; at level 0
there is none, and neighbouring patches agree only as well as the tokens do: edges break at the seams, and what is
smaller than a patch is blurred. A small U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) reads the
patches, the noisy field and the tokens, and corrects the sample. Level 0 has some 32x32 pixels whatever the picture's
size, so a picture's time hardly changes; the reach is local, so the costs are linear in the area like all others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physformer_core.model.native import convolutions
from physformer_core.model.native import ops as native


def activated(field: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """``silu(field * (1 + scale) + shift)`` of [B, C, H, W] and [B, C], or silu alone."""
    modulation = () if scale is None or shift is None else (scale, shift)
    if field.is_contiguous(memory_format=torch.channels_last) and native.takes(field, *modulation):
        return native.modulated_silu(field, *modulation)
    if scale is None or shift is None:
        return F.silu(field)
    return F.silu(field * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


class PhysFormerRefinerBlock(nn.Module):
    """Two convolutions of 3x3 upon the field, modulated by the condition; nothing at initialisation.

    Args:
        channels: Of the field.
        dim: Width of the condition.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, field: Tensor, temb: Tensor) -> Tensor:
        """[B, channels, H, W] and the condition [B, dim] -> [B, channels, H, W]."""
        shift, scale = self.modulation(temb).chunk(2, dim=1)
        if (weights := self._plain_weights(field)) is not None and native.takes(field, scale, shift, *weights):
            weight, bias, weight2, bias2 = weights
            return convolutions.modulated_convolutions(field, scale, shift, (weight, weight2), (bias, bias2))
        inner = self.conv1(activated(field, scale, shift))
        return field + self.conv2(activated(inner))

    def _plain_weights(self, field: Tensor) -> tuple[Tensor, ...] | None:
        """Weight and bias of both convolutions, where no adapter is around them and a kernel in C can take them."""
        convs = self.conv1, self.conv2
        if any(type(conv) is not nn.Conv2d for conv in convs):
            return None
        weights = tuple(one for conv in convs for one in (conv.weight, conv.bias) if one is not None)
        return weights if len(weights) == 4 and convolutions.convolves(field, *weights[::2]) else None


class PhysFormerRefiner(nn.Module):
    """A correction of the sample at level 0, from pixels and tokens; zero at initialisation.

    Args:
        in_channels: Channels of the field.
        dim: Width of tokens and condition.
        patch_size: Side of a patch, even.
        channels: Width at full resolution; twice that at half.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.half_patch = patch_size // 2
        self.enter = nn.Conv2d(2 * in_channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.tokens = nn.Linear(dim, 2 * channels * self.half_patch**2)
        self.inner = PhysFormerRefinerBlock(2 * channels, dim)
        self.up = nn.Conv2d(2 * channels, 4 * channels, 1)
        self.outer = PhysFormerRefinerBlock(channels, dim)
        self.leave = nn.Conv2d(channels, in_channels, 3, padding=1)

    def zero_at_first(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """Layers that begin as zero: then it corrects nothing, and neither do its blocks."""
        inner, outer = self.inner, self.outer
        return inner.modulation, inner.conv2, outer.modulation, outer.conv2, self.leave

    def doubled(self, half: Tensor) -> Tensor:
        """``pixel_shuffle(up(half), 2)``, but the channels of a pixel lie together in `up`'s output: copying them
        together takes a third of the time on CPUs, and a quarter backward."""
        if type(self.up) is not nn.Conv2d or self.up.bias is None:  # somebody put an adapter around it
            return F.pixel_shuffle(self.up(half), 2)
        weight, bias = (t.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for t in (self.up.weight, self.up.bias))
        pixels = F.conv2d(half, weight, bias).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
        return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def halved(self, fine: Tensor) -> Tensor:
        """``down(activated(fine))``."""
        down = self.down
        if type(down) is not nn.Conv2d or down.bias is None or not convolutions.halves(fine, down.weight):
            return down(activated(fine))
        if not native.takes(fine, down.weight, down.bias):
            return down(activated(fine))
        return convolutions.halving_convolution(fine, down.weight, down.bias)

    def forward(self, sample: Tensor, noisy: Tensor, tokens: Tensor, temb: Tensor) -> Tensor:
        """The corrected sample [B, C, H, W] in float32.

        Args:
            sample: [B, C, H, W], what the final layer made of the tokens.
            noisy: [B, C, H, W], the field that the network was given.
            tokens: [B, H/p, W/p, dim].
            temb: [B, dim], the condition.
        """
        dtype = self.enter.weight.dtype
        seen = torch.cat([sample, noisy.to(sample.dtype)], dim=1).to(dtype)
        # Channels last: convolutions of few channels take two thirds of the time on CPUs.
        fine = self.enter(seen.contiguous(memory_format=torch.channels_last))
        told = F.pixel_shuffle(self.tokens(tokens.to(dtype)).permute(0, 3, 1, 2), self.half_patch)
        half = self.inner(self.halved(fine) + told, temb)
        fine = self.outer(fine + self.doubled(activated(half)), temb)
        return sample + self.leave(activated(fine)).float()
