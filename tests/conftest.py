"""What several test rooms share: a checkpoint that is small, random, and draws pictures that are not empty."""

from pathlib import Path

import pytest


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
    PhysFormerPipeline(transformer).save_pretrained(folder)
    return folder
