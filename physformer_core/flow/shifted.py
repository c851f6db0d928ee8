"""Predictions averaged over places of the patch grid.

A network that cuts its field into patches predicts other pixels if the cuts lie elsewhere, though the field is the
same: what it is not sure of differs, and what it knows stays. The mean of several places is nearer to the truth than
any one of them, as in translation-invariant denoising by cycle spinning (Coifman & Donoho 1995,
https://doi.org/10.1007/978-1-4612-2544-7_9), and shows no grid.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch.nn.functional as F
from torch import Tensor

SHIFTED_EVALUATIONS = 4
"""Evaluations of the network in the place of one."""


def predict_shifted(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    field_bchw: Tensor,
    coarse_bchw: Tensor,
    place_b4: Tensor,
    patch: int,
) -> Tensor:
    """The mean of a prediction and of three with the patch grid half a patch further up, left, and both.

    Args:
        predict: From field, coarse field and place to a prediction [B, C, H, W].
        field_bchw, coarse_bchw: Whole patches; what a shifted grid reaches beyond the edge is mirrored.
        place_b4: Box of the field in the picture (top, left, bottom, right).
        patch: Side of a patch. With patches of one element there is nothing to shift.
    """
    mean = predict(field_bchw, coarse_bchw, place_b4)
    half = patch // 2
    if not half:
        return mean
    height, width = field_bchw.shape[-2:]
    top, left, bottom, right = place_b4.unbind(1)
    for down, across in product((0, 1), repeat=2):
        if not (down or across):
            continue
        above, before = half * down, half * across
        below, after = (patch - half) * down, (patch - half) * across
        wider = (before, after, above, below)
        place = place_b4.clone()
        place[:, 0] -= above * (bottom - top) / height
        place[:, 1] -= before * (right - left) / width
        place[:, 2] += below * (bottom - top) / height
        place[:, 3] += after * (right - left) / width
        field, coarse = (F.pad(one, wider, mode="reflect") for one in (field_bchw, coarse_bchw))
        shifted = predict(field, coarse, place)
        mean = mean + shifted[..., above : above + height, before : before + width]
    return mean / SHIFTED_EVALUATIONS
