"""A drawn field, settled: the mean of what a network sees in it under several draws of noise.

What a solver arrives at still holds what one draw of noise led to: edges that fit two things at once, limbs too many.
Noised anew, only what the field shows clearly is left, and the network completes the rest. What it completes otherwise
each time is not what it is sure of, and is averaged away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from physformer_core.flow.path import FlowPath

SETTLING_TIME = 0.7
"""Flow time that the field is taken back to: later the noise changes nothing, earlier it hides what was drawn. Accuracy
was alike at 0.5 and 0.7 and less at 0.85 (docs/training-log.md)."""


def settled(
    sample: Callable[[Tensor, float], Tensor], field_bchw: Tensor, noises: Sequence[Tensor], path: FlowPath
) -> Tensor:
    """The mean of the samples predicted from a field under each of several noises.

    Args:
        sample: From noisy field and flow time to the predicted sample.
        field_bchw: What was drawn.
        noises: Standard normal, each of the field's shape; at least one.
        path: Between noise and field.
    """
    time_b = torch.full((field_bchw.shape[0],), SETTLING_TIME, device=field_bchw.device)
    mean = torch.zeros_like(field_bchw)
    for noise in noises:
        mean += sample(path.interpolate(noise, field_bchw, time_b), SETTLING_TIME)
    return mean / len(noises)
