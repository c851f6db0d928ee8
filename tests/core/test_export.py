"""Exported folders: smaller, equal in what they draw, loadable by our pipeline and by plain diffusers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from physformer_core import PhysFormerPipeline, PhysFormerTransformer2DModel
from physformer_core.checkpoints import find_checkpoint
from physformer_core.errors import CheckpointError, OutputError
from physformer_core.export import export_checkpoint

SIZE = {"height": 64, "width": 64, "seeds": 3, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = PhysFormerTransformer2DModel(
        hidden_size=32, num_layers=1, num_heads=2, text_hidden_size=32, num_text_layers=1, bottleneck=16
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
    PhysFormerPipeline(model, flow={"start_noise": 0.3}).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_half_precision_halves_the_file_and_keeps_the_picture(checkpoint: Path, tmp_path: Path) -> None:
    found = find_checkpoint(checkpoint)
    weights = export_checkpoint(found, tmp_path / "fp16", dtype=torch.float16)
    assert weights.stat().st_size < 0.6 * found.weights[0].stat().st_size
    kinds = {name: tensor.dtype for name, tensor in load_file(weights).items()}
    assert kinds["blocks.0.attn.to_q.weight"] == torch.float16
    assert kinds["blocks.0.attn.drift_logit"] == torch.float32

    first, second = (
        PhysFormerPipeline.from_pretrained(folder, dtype=torch.float32) for folder in (checkpoint, tmp_path / "fp16")
    )
    assert second.config.flow == {"start_noise": 0.3}
    difference = np.abs(first("a cat", **SIZE).images - second("a cat", **SIZE).images).max()
    assert difference < 0.02


def test_plain_diffusers_finds_the_pipeline(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(find_checkpoint(checkpoint), tmp_path / "out", dtype=torch.float32, for_diffusers=True)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(pipeline) is PhysFormerPipeline


def test_equal_exports_have_equal_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_checkpoint(find_checkpoint(checkpoint), tmp_path / name, dtype=torch.float16)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        export_checkpoint(find_checkpoint(checkpoint), tmp_path / "taken", dtype=torch.float16)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="no space left"):
        export_checkpoint(find_checkpoint(checkpoint), tmp_path / "new", dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before


def test_the_mean_of_weights(checkpoint: Path, tmp_path: Path) -> None:
    trained = PhysFormerPipeline.from_pretrained(checkpoint)
    for number in (1, 2):
        with torch.no_grad():
            for param in trained.transformer.parameters():
                param.add_(torch.randn_like(param), alpha=0.1)
        trained.save_pretrained(tmp_path / f"later{number}")
    first, *others = (find_checkpoint(folder) for folder in (checkpoint, tmp_path / "later1", tmp_path / "later2"))
    weights = export_checkpoint(first, tmp_path / "mean", dtype=torch.float32, mean_with=others)
    mean, parts = load_file(weights), [load_file(one.weights[0]) for one in (first, *others)]
    for name, values in mean.items():
        torch.testing.assert_close(values, torch.stack([part[name] for part in parts]).mean(0))
    assert not torch.equal(mean["blocks.0.attn.to_q.weight"], parts[0]["blocks.0.attn.to_q.weight"])
    assert find_checkpoint(tmp_path / "mean").pipeline["flow"] == {"start_noise": 0.3}
    half = export_checkpoint(first, tmp_path / "half", dtype=torch.float16, mean_with=others)
    kinds = {name: tensor.dtype for name, tensor in load_file(half).items()}
    assert kinds["blocks.0.attn.to_q.weight"] == torch.float16
    assert kinds["blocks.0.attn.drift_logit"] == torch.float32


def test_networks_that_differ_have_no_mean(checkpoint: Path, tmp_path: Path) -> None:
    wide = PhysFormerTransformer2DModel(
        hidden_size=32, num_layers=2, num_heads=2, text_hidden_size=32, num_text_layers=1, bottleneck=16
    )
    PhysFormerPipeline(wide).save_pretrained(tmp_path / "deeper")
    with pytest.raises(CheckpointError, match="deeper has another network than trained"):
        export_checkpoint(
            find_checkpoint(checkpoint),
            tmp_path / "out",
            dtype=torch.float32,
            mean_with=[find_checkpoint(tmp_path / "deeper")],
        )
    assert not (tmp_path / "out").exists()


def test_quantized_weights_have_no_mean(checkpoint: Path, tmp_path: Path) -> None:
    found = find_checkpoint(checkpoint)
    quantized = dataclasses.replace(found, quantization={"bits": 8})
    with pytest.raises(CheckpointError, match="trained is quantized"):
        export_checkpoint(found, tmp_path / "out", dtype=torch.float32, mean_with=[quantized])
