"""What several test rooms share: a checkpoint that is small, random, and draws pictures that are not empty."""

import os
from pathlib import Path

import pytest

# Sums depend on the number of threads, and tests compare bits between this process and others. Before torch loads.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    # Kernels in Triton are interpreted then, in numpy. Before anything loads triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler: everything runs in torch, which counters and profilers see into."""
    from physformer_core.model.native import ops

    monkeypatch.setattr(ops, "why_not", lambda: "left out by a test")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A pipeline's folder with a tiny untrained network. Its prompts are encoded by the real MiniLM."""
    import torch

    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PhysFormerTransformer2DModel(
            hidden_size=32, num_layers=1, num_heads=2, text_hidden_size=32, num_text_layers=1, bottleneck=16
        )
        for parameter in transformer.parameters():
            if not parameter.any():  # gates and the last layer start at zero: every picture would be grey
                torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    # Shapes as the default buckets of sets have them.
    PhysFormerPipeline(transformer, flow={"base_widening": 1.0}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene_raw(tmp_path_factory) -> Path:
    """A raw set of 60 scenes. Not to be changed."""
    from physformer_core.data.scenes import fetch_scenes

    folder = tmp_path_factory.mktemp("scenes") / "raw"
    fetch_scenes(folder, count=60, seed=1)
    return folder


@pytest.fixture(scope="session")
def scene_set(scene_raw, tmp_path_factory) -> Path:
    """The scenes, preprocessed, a fifth of them held out. Not to be changed."""
    from physformer_core.data.preprocess import PreprocessConfig, preprocess

    folder = tmp_path_factory.mktemp("sets") / "scenes"
    preprocess(scene_raw, folder, config=PreprocessConfig(validation_fraction=0.2))
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A random CLIP of both halves with a tokenizer, as it would be downloaded; 8 tokens, pictures of 28 pixels."""
    import json

    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(folder)
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**half, **ends, "vocab_size": len(words), "max_position_embeddings": 8},
        vision_config={**half, "image_size": 28, "patch_size": 14},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    statistics = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder
