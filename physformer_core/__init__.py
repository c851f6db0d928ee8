"""The library under the `physformer` command: model, flow, data, training, measurement.

>>> from physformer_core import PhysFormerPipeline, shipped_checkpoint
>>> pipeline = PhysFormerPipeline.from_pretrained(shipped_checkpoint())
>>> pipeline("a bird in a cage", height=720, width=1280, seeds=7).images[0].save("bird.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from physformer_core.version import __version__

if TYPE_CHECKING:
    from physformer_core.checkpoints import shipped_checkpoint
    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

_HOMES = {
    "PhysFormerPipeline": "physformer_core.pipeline",
    "PhysFormerTransformer2DModel": "physformer_core.model.transformer",
    "shipped_checkpoint": "physformer_core.checkpoints",
}

__all__ = ["PhysFormerPipeline", "PhysFormerTransformer2DModel", "__version__", "shipped_checkpoint"]


def __getattr__(name: str) -> Any:
    """Loads the heavy names when they are first asked for: the command's help pages need none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'physformer_core' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
