"""Passes that are recorded as CUDA graphs and replayed: the same training as without, where they can be."""

import pytest
import torch

from physformer_core.config import load_preset
from physformer_core.errors import ConfigError
from physformer_core.training.recorded import EAGER_PASSES, RecordedPasses, why_not_recorded
from physformer_core.training.trainer import Trainer

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")

PLAIN = {"dtype": torch.bfloat16, "parallel": "none", "compiled": False, "gradient_checkpointing": False}


def test_where_passes_are_recorded() -> None:
    gpu = torch.device("cuda")
    assert why_not_recorded(gpu, **PLAIN) is None
    assert "need CUDA" in str(why_not_recorded(torch.device("cpu"), **PLAIN))
    for key, value in (
        ("dtype", torch.float16),
        ("parallel", "ddp"),
        ("compiled", True),
        ("gradient_checkpointing", True),
    ):
        assert why_not_recorded(gpu, **(PLAIN | {key: value})) is not None


def test_what_cannot_be_recorded_is_refused(scene_set, tmp_path) -> None:
    config = load_preset("debug").override("training", cuda_graphs=True)
    with pytest.raises(ConfigError, match="CUDA graphs need CUDA"):
        Trainer(config, scene_set, tmp_path, device="cpu")
    assert not Trainer(load_preset("debug"), scene_set, tmp_path, device="cpu").recorded


@on_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_those_that_are_written(scene_set, tmp_path, accumulate) -> None:
    trained = {}
    for name, graphs in (("written", False), ("replayed", True)):
        config = load_preset("debug").override(
            "training",
            cuda_graphs=graphs,
            accumulate=accumulate,
            steps=40,
            batch_size=16,
            dtype="fp32",
            optimizer="adamw",
            log_every=1,
        )
        losses: list[dict[str, float]] = []
        trainer = Trainer(config, scene_set, tmp_path / name, device="cuda")
        trainer.on_report = lambda report, kept=losses: kept.append(report.losses)
        assert trainer.recorded is graphs
        trainer.run()
        if graphs:
            assert isinstance(trainer.gradients._run, RecordedPasses)
            assert trainer.gradients._run.shapes >= 2  # whole pictures and crops
            assert trainer.step > 2 * EAGER_PASSES
        trained[name] = (losses, {key: value.cpu() for key, value in trainer.model.state_dict().items()})
    for written, replayed in zip(trained["written"][0], trained["replayed"][0], strict=True):
        assert written.keys() == replayed.keys()
        for kind, loss in written.items():
            assert replayed[kind] == pytest.approx(loss, rel=1e-3)
    for key, value in trained["written"][1].items():
        assert torch.allclose(trained["replayed"][1][key], value, atol=2e-3), key
