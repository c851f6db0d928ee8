"""`physformer quantize` and `info` on folders: what is written, said, refused and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from physformer_core.checkpoints import find_checkpoint
from physformer_core.project import Project

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

FAST = ("--size", 64, "--steps", 2, "--compare", 0)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory) -> Path:
    import torch

    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PhysFormerTransformer2DModel(
            hidden_size=64, num_layers=1, num_heads=2, text_hidden_size=64, num_text_layers=1, bottleneck=32
        )
    folder = tmp_path_factory.mktemp("cli-quantize") / "original"
    PhysFormerPipeline(transformer).save_pretrained(folder)
    return folder


def test_quantize_then_info_and_generate(physformer, checkpoint_folder: Path) -> None:
    Path("prompts.txt").write_text("a cat\n")
    code, out, err = physformer("quantize", checkpoint_folder, "-o", "q", *FAST, "--prompts", "prompts.txt", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert "comparison" not in result and result["kept"]
    assert all(0 <= layer["error"] <= layer["uncalibrated"] for layer in result["layers"])
    record = Project.load("physformer.toml").runs[-1]
    assert record.command == "quantize" and record.checkpoint_sha256 == find_checkpoint(checkpoint_folder).sha256
    names = {"config.json", "model_index.json", "quantization.json", "quantized.safetensors"}
    assert {Path(output.path).name for output in record.outputs} == names and record.config["bits"] == 8

    code, out, _ = physformer("info", "q", "--json")
    told = json.loads(out)[0]
    assert (
        code == 0 and told["quantization"]["bits"] == 8 and told["quantization"]["calibration"]["prompts"] == ["a cat"]
    )
    assert told["stored"]["I8"] > 1e4 and told["sha256"] == find_checkpoint("q").sha256
    code, out, _ = physformer("info", checkpoint_folder)
    assert code == 0 and "hidden_size" in out and "quantization" not in out

    code, out, err = physformer(
        "generate", "a dog", "--checkpoint", "q", "-W", 64, "-H", 64, "--steps", 2, "-o", "dog.png", "--quiet"
    )
    assert code == 0, err
    code, out, _ = physformer("info", "dog.png", "--json")
    assert json.loads(out)[0]["checkpoint_sha256"] == find_checkpoint("q").sha256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no folder"),
        (("-o", "q", "--sensitivity"), "--output has no effect"),
        (("-o", "q", "--group", 16), "--group has no effect"),
        (("-o", "q", "--bits", 3), "3 bits"),
        (("-o", "q", "--bits", 4, "--method", "dynamic"), "4 bits with 8-bit activations"),
        (("-o", "q", "--method", "magic"), "unknown method"),
        (("-o", "q", "--compare", 0, "--accuracy", 5), "--accuracy has no effect"),
        (("-o", "q", "--compare", 0, "--dtype", "bf16"), "--dtype has no effect"),
        (("-o", "q", "--dtype", "fp16"), "leaves the range of fp16"),
        (("-o", "q", "--prompts", "p.jsonl"), "p.jsonl, line 1: seed has no effect here"),
        (("-o", "."), "exists already"),
    ],
)
def test_what_is_refused(physformer, checkpoint_folder: Path, options: tuple[object, ...], words: str) -> None:
    Path("p.jsonl").write_text('{"prompt": "a cat", "seed": 3}\n')
    code, out, err = physformer("quantize", checkpoint_folder, *options)
    assert code == 1 and out == "" and not Path("q").exists() and words in err and "hint:" in err


def test_a_model_that_is_too_small_is_refused_and_nothing_written(physformer, tiny_checkpoint: Path) -> None:
    keep = [word for pattern in ("text_*", "blocks.*", "condition_embed.*", "final_*") for word in ("--keep", pattern)]
    code, _, err = physformer("quantize", tiny_checkpoint, "-o", "q", *FAST, *keep)
    assert code == 1 and "would bring nothing" in err
    assert not Path("q").exists() and Project.load("physformer.toml").runs[-1].status == "failed"
