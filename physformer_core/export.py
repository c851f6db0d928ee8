"""Turns a training checkpoint into a folder to share: averaged weights alone, in the dtype wanted.

The folder loads with `PhysFormerPipeline.from_pretrained`. Exported ``for_diffusers`` it loads with a plain
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` instead: diffusers finds pipelines that are not its
own only through code in the folder, and then insists on being told to trust it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from physformer_core.checkpoints import Checkpoint, load_pipeline
from physformer_core.errors import CheckpointError, OutputError
from physformer_core.files import atomic_folder

MODULE = "pipeline_physformer"
MODULE_SOURCE = '''"""Lets plain diffusers find the pipeline: it is the one of the installed physformer package."""

from physformer_core.pipeline import PhysFormerPipeline

__all__ = ["PhysFormerPipeline"]
'''


def export_checkpoint(
    checkpoint: Checkpoint,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    for_diffusers: bool = False,
    mean_with: Sequence[Checkpoint] = (),
) -> Path:
    """Writes ``checkpoint`` to ``output_dir``, whole or not at all.

    Args:
        checkpoint: From `find_checkpoint`; all but the weights is its.
        output_dir: A folder that does not exist yet.
        dtype: Of the weights; the few that must stay float32 do.
        for_diffusers: Whether plain diffusers shall find the pipeline.
        mean_with: Other checkpoints of the same network: the weights are the mean of all. Between a network and what
            it became by training on, the mean often knows what both know (Wortsman et al. 2022,
            https://arxiv.org/abs/2109.01903); networks trained apart have none that means anything.

    Returns:
        The weights' file.

    Raises:
        OutputError: The folder exists or cannot be written.
        CheckpointError: A checkpoint cannot be read, or they are not of the same network.
    """
    if output_dir.exists():
        raise OutputError(f"{output_dir} exists already", hint="name a new folder, or delete that one first")
    pipeline = load_pipeline(checkpoint, device="cpu", dtype=dtype)
    if mean_with:
        mean = _mean_weights([checkpoint, *mean_with])
        for name, values in pipeline.transformer.state_dict().items():
            values.copy_(mean[name])
    with atomic_folder(output_dir) as folder:
        pipeline.save_pretrained(folder)
        index_path = folder / "model_index.json"
        index = json.loads(index_path.read_text(encoding="utf-8"))
        if for_diffusers:
            index["_class_name"] = [MODULE, "PhysFormerPipeline"]
            (folder / f"{MODULE}.py").write_text(MODULE_SOURCE, encoding="utf-8")
        # Where it was loaded from is the exporter's business, and would make equal exports differ.
        index.pop("_name_or_path", None)
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return output_dir / "transformer" / "diffusion_pytorch_model.safetensors"


def _mean_weights(checkpoints: Sequence[Checkpoint]) -> dict[str, torch.Tensor]:
    """The mean of weights, name by name, in float32."""
    first = checkpoints[0]
    for other in checkpoints:
        if other.quantization is not None:
            raise CheckpointError(f"{other.name} is quantized", hint="take the mean of what it was made from")
        for what, mine, its in (
            ("network", _network(first), _network(other)),
            ("text encoder", first.text_encoder_name, other.text_encoder_name),
            ("codec", first.codec_name, other.codec_name),
        ):
            if mine != its:
                raise CheckpointError(
                    f"{other.name} has another {what} than {first.name}",
                    hint="only weights of one network, trained on from common ones, have a mean",
                )
    mean: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        weights = load_pipeline(checkpoint, device="cpu", dtype=torch.float32).transformer.state_dict()
        for name, values in weights.items():
            share = values / len(checkpoints)
            mean[name] = mean[name].add_(share) if name in mean else share
    return mean


def _network(checkpoint: Checkpoint) -> dict[str, object]:
    """What decides shapes and arithmetic, without what diffusers notes about itself."""
    return {key: value for key, value in checkpoint.transformer.items() if not key.startswith("_")}
