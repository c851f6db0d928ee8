"""Turns a training checkpoint into a folder to share: averaged weights alone, in the dtype wanted.

The folder loads with `PhysFormerPipeline.from_pretrained`. Exported ``for_diffusers`` it loads with a plain
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` instead: diffusers finds pipelines that are not its
own only through code in the folder, and then insists on being told to trust it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from physformer_core.checkpoints import Checkpoint, load_pipeline
from physformer_core.errors import OutputError
from physformer_core.files import atomic_folder

MODULE = "pipeline_physformer"
MODULE_SOURCE = '''"""Lets plain diffusers find the pipeline: it is the one of the installed physformer package."""

from physformer_core.pipeline import PhysFormerPipeline

__all__ = ["PhysFormerPipeline"]
'''


def export_checkpoint(
    checkpoint: Checkpoint, output_dir: Path, *, dtype: torch.dtype, for_diffusers: bool = False
) -> Path:
    """Writes ``checkpoint`` to ``output_dir``, whole or not at all.

    Args:
        checkpoint: From `find_checkpoint`.
        output_dir: A folder that does not exist yet.
        dtype: Of the weights; the few that must stay float32 do.
        for_diffusers: Whether plain diffusers shall find the pipeline.

    Returns:
        The weights' file.

    Raises:
        OutputError: The folder exists or cannot be written.
        CheckpointError: The checkpoint cannot be read.
    """
    if output_dir.exists():
        raise OutputError(f"{output_dir} exists already", hint="name a new folder, or delete that one first")
    pipeline = load_pipeline(checkpoint, device="cpu", dtype=dtype)
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
