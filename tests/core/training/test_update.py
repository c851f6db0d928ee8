"""Updates that are started before it is known whether they are wanted: the same weights, and nothing from bad steps."""

import pytest
import torch

from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream
from physformer_core.training.trainer import Trainer, TrainingDiverged
from physformer_core.training.update import MAX_BAD_STEPS, Updates

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Muon iterates in float32 wherever this runs: bfloat16 makes a hundredth of a step of a gradient's last bits."""
    monkeypatch.setattr("physformer_core.training.trainer.muon_dtype", lambda device: torch.float32)


def make(scene_set, folder, *, ahead, bad=(), device="cpu", **training):
    config = load_preset("debug").override(
        "training", steps=8, batch_size=4, checkpoint_every=100, optimizer="muon", dtype="fp32", **training
    )
    trainer = Trainer(config, scene_set, folder, device=device)
    trainer.updates = Updates(trainer.optimizer, trainer.ema, trainer.ranks, ahead=ahead, on_spoilt=trainer._give_up)
    objective = trainer.objective

    def spoiled(model, batch, draws):
        losses = objective(model, batch, draws)
        if batch.step in bad:
            losses.mean = losses.mean * float("nan")
        return losses

    spoiled.draw = objective.draw
    trainer.objective = spoiled
    trainer.validate = dict
    return trainer


def everything(trainer):
    state = {name: param.detach() for name, param in trainer.model.named_parameters()}
    state |= {f"average {name}": value for name, value in trainer.ema.shadow.items()}
    return state | trainer.optimizer.state_tensors()


@pytest.mark.parametrize("bad", [(), (0,), (2, 3, 7)])
def test_the_same_with_and_without(scene_set, tmp_path, bad):
    ended = []
    for ahead in (False, True):
        trainer = make(scene_set, tmp_path / str(ahead), ahead=ahead, bad=bad)
        trainer.run()
        assert trainer.updates.skipped == len(bad)
        ended.append(everything(trainer))
    waited, ahead = ended
    assert waited.keys() == ahead.keys()
    for name, value in waited.items():
        torch.testing.assert_close(ahead[name], value, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_step_changes_nothing(scene_set, tmp_path, ahead):
    trainer = make(scene_set, tmp_path, ahead=ahead, bad=(4,))
    seen = []
    trainer.on_step = lambda done: seen.append({name: value.clone() for name, value in everything(trainer).items()})
    trainer.run()
    before, after, later = seen[3], seen[4], seen[5]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)


def test_the_step_that_ends_a_run_is_named_when_its_answer_comes_late(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, ahead=True, bad=range(3, 100))
    trainer.config = trainer.config.override("training", steps=40)
    with pytest.raises(TrainingDiverged, match=f"up to step {2 + MAX_BAD_STEPS} ") as caught:
        trainer.run()
    train = trainer.config.training
    stream = BatchStream(
        trainer.shards,
        seed=train.seed,
        batch_size=4,
        crop_fraction=train.crop_fraction,
        crop_size=train.crop_size,
    )
    batch = stream.batch(2 + MAX_BAD_STEPS)
    assert all(trainer.shards.example_key(batch.kind, one) in caught.value.message for one in batch.indices.tolist())


def test_a_checkpoint_counts_the_last_step(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, ahead=True, bad=(0,))
    trainer.on_step = lambda done: trainer.request_stop()
    trainer.run()
    assert trainer.updates.skipped == 1


@on_cuda
@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_a_gpu_gives_what_waiting_gives(scene_set, tmp_path, cuda_graphs):
    bad = () if cuda_graphs == "on" else (2, 6)  # a recording would repeat what the step that it is made of does
    ended = []
    for ahead in (False, True):
        folder = tmp_path / str(ahead)
        trainer = make(scene_set, folder, ahead=ahead, bad=bad, device="cuda", cuda_graphs=cuda_graphs)
        trainer.run()
        assert trainer.updates.skipped == len(bad)
        ended.append(everything(trainer))
    for name, value in ended[0].items():
        torch.testing.assert_close(ended[1][name], value, rtol=1e-3, atol=1e-5, msg=name)
