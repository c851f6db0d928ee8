"""From prompt to picture: the whole pipeline, text encoder and levels included, PNG writing not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from physformer_core.benchmark.cases import Case, Subject, model_config
from physformer_core.benchmark.networks import cast_network
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.pipeline import PhysFormerPipeline

PROMPT = "a bird in a cage"


def picture_subject(case: Case, device: torch.device, dtype: torch.dtype) -> Subject:
    """Builds the pipeline of a case; its ``height`` and ``width`` are pixels. See `build`."""
    if case.checkpoint is not None:
        from physformer_core.checkpoints import load_pipeline

        pipeline = load_pipeline(case.checkpoint, device=device, dtype=dtype)
    else:
        model = PhysFormerTransformer2DModel(**model_config(case))
        cast_network(model, device, dtype)
        pipeline = PhysFormerPipeline(model)
    pipeline.transformer.set_attention_backend(case.backend)  # type: ignore[arg-type]

    def draw(batch: int, height: int, width: int) -> Callable[[], Any]:
        return lambda: pipeline([PROMPT] * batch, height=height, width=width, seeds=list(range(batch)))

    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    return Subject(run=draw(case.batch, case.height, case.width), warm_up=draw(1, 64, 64), parameters=parameters)
