"""A network with layers large enough to be worth rounding."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder; gates and the last layer are open, so that pictures are not grey."""
    import torch

    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PhysFormerTransformer2DModel(
            hidden_size=96, num_layers=2, num_heads=2, text_hidden_size=64, num_text_layers=1, bottleneck=64
        )
        for parameter in transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("quantization") / "original"
    PhysFormerPipeline(transformer).save_pretrained(folder)
    return folder
