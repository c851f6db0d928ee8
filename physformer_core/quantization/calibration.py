"""Scales from real activations.

The network draws pictures while a sample of what every `Linear` reads is kept. A scale is then chosen to lose least of
the layer's *output*, not of its weights: with a_k the mean square of input k, the scale s of a group of weights w is
the candidate with the smallest

    sum_k a_k (w_k - s round(w_k / s))^2,    s = c max|w| / largest integer,    c = 1, 0.95, ... 0.5

A smaller s rounds most weights more finely and clips the few largest, which pays where those meet small inputs
(clipping search as in AWQ, Lin et al. 2023, https://arxiv.org/abs/2306.00978, with its diagonal measure of importance).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physformer_core.errors import ConfigError
from physformer_core.quantization.storage import LayerScheme, QuantizedWeight

CALIBRATION_PROMPTS = (
    "a bird in a cage",
    "a red car on a city street",
    "two cats on a sofa at night",
    "a lighthouse by the sea at sunset",
    "a green apple on a plain yellow background",
    "a dog next to a tree in the snow",
    "a castle on a mountain",
    "a blue fish under the water",
)
"""Drawn for their activations. None of them is used to measure pictures or prompts."""

CLIP_CANDIDATES = tuple(1 - 0.05 * step for step in range(11))
ROWS_PER_CALL = 16
ROWS_PER_LAYER = 512


@dataclass
class ActivationSample:
    """A random sample of the inputs of layers, gathered while the network runs.

    Args:
        seed: Decides which rows are kept.
    """

    seed: int
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
        """Keeps some rows of every call of these layers inside the block."""
        generator = torch.Generator().manual_seed(self.seed)

        def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                flat = inputs[0].detach().flatten(0, -2)
                chosen = torch.randperm(len(flat), generator=generator)[:ROWS_PER_CALL]
                self.rows.setdefault(name, []).append(flat[chosen.to(flat.device)].float().cpu())

            return keep

        handles = [layer.register_forward_pre_hook(keeper(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, name: str) -> Tensor:
        """The rows kept of a layer: float32 [n, in], spread evenly over its calls.

        Raises:
            ConfigError: The layer was never called.
        """
        if name not in self.rows:
            raise ConfigError(
                f"the layer {name} was not used by the calibration's pictures",
                hint=f"keep it as it is: --keep {name}",
            )
        rows = torch.cat(self.rows[name])
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), ROWS_PER_LAYER)).round().long()
        return rows[chosen]


def quantize_weight(weight: Tensor, scheme: LayerScheme, importance: Tensor | None = None) -> QuantizedWeight:
    """Rounds a weight to integers.

    Args:
        weight: [out, in].
        scheme: How; a group must divide ``in``.
        importance: [in], mean square of every input; None takes the largest weight for the range, without search.

    Returns:
        Integers and scales on the weight's device.
    """
    grouped = weight.detach().float().unflatten(1, (-1, scheme.group or weight.shape[1]))
    importance = None if importance is None else importance.to(weight.device).view(1, grouped.shape[1], -1)
    largest = grouped.abs().amax(-1, keepdim=True)
    best_loss = best_scale = None
    for clip in CLIP_CANDIDATES if importance is not None else CLIP_CANDIDATES[:1]:
        # Rounded as it will be stored, so that the integers are made for the very scale that reads them.
        scale = (largest * clip / scheme.largest).clamp_min(torch.finfo(torch.float32).tiny).to(scheme.scale_dtype)
        if importance is None:
            best_scale = scale
            break
        error = grouped - _rounded(grouped, scale, scheme) * scale.float()
        loss = (importance * error.square()).sum(-1, keepdim=True)
        if best_loss is None or best_scale is None:
            best_loss, best_scale = loss, scale
        else:
            best_scale = torch.where(loss < best_loss, scale, best_scale)
            best_loss = torch.minimum(loss, best_loss)
    assert best_scale is not None
    values = _rounded(grouped, best_scale, scheme).to(torch.int8).flatten(1)
    return QuantizedWeight(values, best_scale.squeeze(-1), scheme)


def output_error(layer: nn.Linear, quantized: QuantizedWeight, rows: Tensor) -> float:
    """How far the layer's output is off: rms of the difference by rms of the output without bias.

    Args:
        layer: The layer as it was.
        quantized: Its new weight, run as torchao runs it, activations and all.
        rows: [n, in] real inputs.
    """
    with torch.no_grad():
        weight = layer.weight.detach().float()
        rows = rows.to(weight.device)
        wanted = F.linear(rows, weight)
        found = F.linear(rows, quantized.tensor(torch.float32))
        return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def group_size(columns: int, wished: int) -> int:
    """The largest group that divides a row of ``columns`` weights and is not above the wish; at least 8, or 0."""
    sizes = [size for size in range(8, min(wished, columns) + 1) if columns % size == 0]
    return max(sizes, default=0)


def calibration_prompts(given: Sequence[str] | None) -> tuple[str, ...]:
    """The prompts to calibrate with: those given, or `CALIBRATION_PROMPTS`."""
    return tuple(given) if given else CALIBRATION_PROMPTS


def _rounded(grouped: Tensor, scale: Tensor, scheme: LayerScheme) -> Tensor:
    return (grouped / scale.float()).round().clamp(-scheme.largest, scheme.largest)
