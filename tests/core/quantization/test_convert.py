"""Quantized checkpoints: smaller, near in what they draw, loaded like any other; refused where they bring nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from physformer_core.checkpoints import find_checkpoint, load_pipeline
from physformer_core.config import load_preset
from physformer_core.errors import CheckpointError, ConfigError, OutputError
from physformer_core.lora import Adapter, ScaledAdapter
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.quantization.calibration import ActivationSample, output_error, quantize_weight
from physformer_core.quantization.convert import (
    QuantizeSettings,
    layer_kind,
    linear_layers,
    quantize,
    write_quantized,
)
from physformer_core.quantization.measure import compare_checkpoints, measure_sensitivity
from physformer_core.quantization.storage import LayerScheme
from physformer_core.training.adapter import adapted_model

SMALL: dict[str, Any] = {"size": 64, "steps": 2, "prompts": ("a cat", "a red car")}


@pytest.fixture(scope="module")
def made(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantizes the checkpoint, each way once."""
    folders: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in folders:
            found = find_checkpoint(checkpoint_folder)
            folders[key] = tmp_path_factory.mktemp("quantized") / "out"
            write_quantized(found, quantize(found, QuantizeSettings(**SMALL, **settings)), folders[key])
        return folders[key]

    return make


def picture(folder: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    pipeline = load_pipeline(folder, dtype=dtype)
    return pipeline("a dog", height=64, width=64, seeds=3, num_inference_steps=2, output_type="np").images[0]


@pytest.mark.parametrize(
    ("settings", "share", "tolerance"),
    [({"bits": 8}, 0.45, 0.02), ({"bits": 8, "activations": "int8"}, 0.45, 0.05), ({"bits": 4}, 0.4, 0.15)],
)
def test_the_file_is_smaller_and_the_picture_near(
    made: Callable[..., Path], checkpoint_folder: Path, settings: dict[str, Any], share: float, tolerance: float
) -> None:
    folder = made(**settings)
    original, quantized = find_checkpoint(checkpoint_folder), find_checkpoint(folder)
    sizes = [checkpoint.weights[0].stat().st_size for checkpoint in (original, quantized)]
    assert sizes[1] < share * sizes[0]
    assert quantized.quantization is not None and quantized.sha256 != original.sha256
    difference = np.abs(picture(folder) - picture(checkpoint_folder)).mean()
    assert 0 < difference < tolerance


def test_half_precision_keeps_what_needs_float32(made: Callable[..., Path]) -> None:
    transformer = load_pipeline(made(bits=8), dtype=torch.bfloat16).transformer
    assert transformer.blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].attn.drift_logit.dtype == torch.float32
    assert np.isfinite(picture(made(bits=8), torch.bfloat16)).all()


def test_equal_commands_make_equal_bytes(made: Callable[..., Path], checkpoint_folder: Path, tmp_path: Path) -> None:
    first, found = made(bits=8), find_checkpoint(checkpoint_folder)
    write_quantized(found, quantize(found, QuantizeSettings(**SMALL, bits=8)), tmp_path / "again")
    for file in ("transformer/quantized.safetensors", "transformer/quantization.json", "model_index.json"):
        assert (first / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_layers_that_are_kept_are_as_they_were(made: Callable[..., Path], checkpoint_folder: Path) -> None:
    folder = made(bits=8, keep=("blocks.*.attn.to_q", "text_*"))
    stored = load_file(folder / "transformer" / "quantized.safetensors")
    original = load_file(find_checkpoint(checkpoint_folder).weights[0])
    told = json.loads((folder / "transformer" / "quantization.json").read_text())
    assert {"blocks.0.attn.to_q", "blocks.1.attn.to_q", "text_embed"} <= set(told["kept"])
    assert torch.equal(stored["blocks.1.attn.to_q.weight"], original["blocks.1.attn.to_q.weight"])
    assert "blocks.1.attn.to_k.weight" not in stored and "blocks.1.attn.to_k" in told["layers"]


def test_the_default_keeps_what_measured_worst(made: Callable[..., Path]) -> None:
    kept = json.loads((made(bits=4) / "transformer" / "quantization.json").read_text())["kept"]
    assert {"final_layer.proj_out", "patch_embed.proj2", "condition_embed.pooled2"} <= set(kept)


def test_the_search_pays_on_the_activations_it_saw() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, bias=False)
    loud = torch.ones(128)
    loud[::16] = 0.01  # large weights that meet small inputs are worth clipping
    with torch.no_grad():
        layer.weight[:, ::16] *= 8
    rows = torch.randn(256, 128) * loud
    scheme = LayerScheme(4, 32)
    plain = output_error(layer, quantize_weight(layer.weight, scheme), rows)
    searched = output_error(layer, quantize_weight(layer.weight, scheme, rows.square().mean(0)), rows)
    assert searched < 0.7 * plain


def test_activations_are_those_of_real_pictures(checkpoint_folder: Path) -> None:
    pipeline = load_pipeline(checkpoint_folder)
    layers = linear_layers(pipeline.transformer)
    samples = []
    for seed in (0, 0, 1):
        sample = ActivationSample(seed)
        with sample.recording(layers):
            pipeline("a cat", height=64, width=64, num_inference_steps=2, output_type="pt")
        samples.append(sample)
    assert samples[0].rows.keys() == layers.keys()
    first, again, other = (sample.of("blocks.0.attn.to_q") for sample in samples)
    assert first.shape[1] == 96 and torch.equal(first, again) and not torch.equal(first, other)
    assert not pipeline.transformer.blocks[0].attn.to_q._forward_pre_hooks


def test_kinds_of_layers() -> None:
    assert layer_kind("blocks.3.attn.to_out.0") == "blocks.*.attn.to_out.*"
    assert layer_kind("patch_embed.proj1") == "patch_embed.proj1"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "3 bits"),
        ({"bits": 4, "activations": "int8"}, "not supported"),
        ({"activations": "int4"}, "unknown activations"),
        ({"group": 4}, "too small"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        QuantizeSettings(**settings)
    assert caught.value.hint


def test_what_brings_nothing_is_refused(
    tiny_checkpoint: Path, made: Callable[..., Path], checkpoint_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(find_checkpoint(made(bits=8)), QuantizeSettings(**SMALL))
    found = find_checkpoint(checkpoint_folder)
    with pytest.raises(ConfigError, match="would bring nothing"):
        quantize(found, QuantizeSettings(**SMALL, keep=("blocks.*", "text_*", "condition_embed.*")))
    with pytest.raises(ConfigError, match="names no layer"):
        quantize(found, QuantizeSettings(**SMALL, keep=("nothing.*",)))
    with pytest.raises(OutputError, match="exists already"):
        write_quantized(found, quantize(found, QuantizeSettings(**SMALL)), tiny_checkpoint)


def test_nothing_is_added_to_quantized_weights(made: Callable[..., Path], checkpoint_folder: Path) -> None:
    pytest.importorskip("peft")
    adapter = ScaledAdapter(cast(Adapter, None), 1.0)  # refused before it is looked at
    with pytest.raises(ConfigError, match="is quantized: an adapter cannot be added"):
        load_pipeline(made(bits=8), adapters=[adapter])
    with pytest.raises(ConfigError, match="is quantized: an adapter cannot be added"):
        adapted_model(load_preset("debug").override("training", lora_rank=2), find_checkpoint(made(bits=8)))


def test_a_loader_that_knows_nothing_of_it_does_not_draw_noise(made: Callable[..., Path]) -> None:
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        PhysFormerPipeline.from_pretrained(made(bits=8))


def test_damage_is_told(made: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(made(bits=8), tmp_path / "copy")
    path = copy / "transformer" / "quantization.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "physformer-quantized/9"}))
    with pytest.raises(CheckpointError, match="quantized/9"):
        load_pipeline(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"quantization\.json"):
        find_checkpoint(copy)


@pytest.mark.slow  # two processes of their own
def test_comparison(made: Callable[..., Path], checkpoint_folder: Path) -> None:
    original, quantized = find_checkpoint(checkpoint_folder), find_checkpoint(made(bits=8))
    found = compare_checkpoints(original, quantized, count=1, size=64)
    assert 0 < found.difference < found.seeds_difference and found.psnr > 20
    assert found.quantized.weight_bytes < 0.5 * found.original.weight_bytes
    assert found.quantized.peak_bytes > 1e8 and found.original.seconds > 0


def test_sensitivity_tries_every_kind_and_leaves_the_network_as_it_was(checkpoint_folder: Path) -> None:
    original = find_checkpoint(checkpoint_folder)
    kinds = measure_sensitivity(original, QuantizeSettings(**SMALL, bits=4), pictures=1)
    assert {kind.kind for kind in kinds} == {layer_kind(n) for n in linear_layers(load_pipeline(original).transformer)}
    assert [kind.per_million for kind in kinds] == sorted((kind.per_million for kind in kinds), reverse=True)
    # One kind alone moves the picture less than all together.
    assert all(0 < kind.error < 0.1 for kind in kinds)
