"""What a run's log says besides the loss: operations, share of the machine's matrix peak, memory, sizes of things."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from physformer_core.data.loader import Batch
from physformer_core.model.flops import training_flops
from physformer_core.model.native import ops as native
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.optimizer import NEWTON_SCHULZ_STEPS, iterates_on_gram, muon_dtype, split_parameters


class WorkMeter:
    """Counts the matrix operations of training steps, and says what share of the machine's peak they are.

    Args:
        model: The network that is trained.
        optimizer: ``muon`` or ``adamw``.
        peak: Operations per second of the machine, from `physformer_core.hardware.matrix_peak`.
    """

    def __init__(self, model: PhysFormerTransformer2DModel, optimizer: str, peak: float) -> None:
        self.peak = peak
        self._model = model
        matrices = split_parameters(model)[0].values() if optimizer == "muon" else ()
        self._update = sum(newton_schulz_flops(matrix, muon_dtype(matrix.device)) for matrix in matrices)
        self._of_shape = functools.cache(functools.partial(_picture_flops, model))

    def step(self, batch: Batch) -> int:
        """Operations of a step: a batch's forward and backward pass, and the optimizer."""
        return batch.pixels_bchw.shape[0] * self._of_shape(*batch_shape(self._model, batch), batch.kind) + self._update


def batch_flops(model: PhysFormerTransformer2DModel, batch: Batch) -> int:
    """Operations of forward and backward on one batch."""
    return batch.pixels_bchw.shape[0] * _picture_flops(model, *batch_shape(model, batch), batch.kind)


def newton_schulz_flops(matrix: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Orthogonalising an m x n matrix, m <= n, or a kernel as one.

    As it is written: per iteration X X^T, its square, and that times X. On X X^T: that once; per iteration its square,
    a product of polynomials (not the first time) and two with X X^T (not the last time); one with X. In C those that
    are symmetric, which is all but the last, are made by half; an estimate, whose network is on no device, is torch's.
    """
    m, n = sorted((matrix.shape[0], math.prod(matrix.shape[1:])))  # of shapes alone: a rank may hold only some rows
    if dtype == torch.float32 and matrix.device.type == "cpu" and native.why_not() is None:
        return 3 * m * m * n + (4 * NEWTON_SCHULZ_STEPS - 3) * m**3
    if iterates_on_gram(m, n, dtype):
        return 2 * 2 * m * m * n + (4 * NEWTON_SCHULZ_STEPS - 3) * 2 * m**3
    return NEWTON_SCHULZ_STEPS * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


def batch_shape(model: PhysFormerTransformer2DModel, batch: Batch) -> tuple[int, int, int]:
    """Height and width in tokens, and tokens of a prompt in the mean: padding is no work of the model's."""
    _, _, height, width = batch.pixels_bchw.shape
    patch = model.network(base=batch.kind == "base").sizes.patch_size
    tokens = round(batch.prompt_mask_bt.sum().item() / len(batch.prompt_mask_bt))
    return height // patch, width // patch, tokens


def _picture_flops(model: torch.nn.Module, height: int, width: int, tokens: int, kind: str) -> int:
    assert isinstance(model, PhysFormerTransformer2DModel)
    return training_flops(model, height, width, tokens, base=kind == "base")
