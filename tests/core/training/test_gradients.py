"""One step's gradients: clipped as torch clips them."""

import pytest
import torch

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream
from physformer_core.training.trainer import Trainer


def gradients(scene_set, folder, clip):
    """Norm, and gradients clipped to another one, of a first step."""
    config = load_preset("debug").override("training", dtype="fp32", grad_clip=clip)
    trainer = Trainer(config, scene_set, folder, device="cpu")
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.0).batch(0)
    draws = trainer.objective.draw(batch, torch.Generator().manual_seed(0))
    losses = trainer.gradients.compute(trainer.objective, batch, draws, trainer.optimizer)
    return float(losses.norm), [p.grad for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("share", [0.5, 1 + 1e-7, 2.0])
def test_clipped_as_by_torch(scene_set, tmp_path, share):
    norm, loose = gradients(scene_set, tmp_path, 1e9)
    told, clipped = gradients(scene_set, tmp_path, share * norm)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in loose]
    for param, grad in zip(params, loose, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, share * norm)
    assert told == norm and all(torch.equal(p.grad, grad) for p, grad in zip(params, clipped, strict=True))
    assert all(map(torch.equal, loose, clipped)) is (share == 2)  # torch divides by a little more than the norm
