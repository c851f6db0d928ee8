"""The batches of a run: which pictures, captions and windows each of its steps sees."""

from __future__ import annotations

from typing import Any

from physformer_core.config import TrainConfig
from physformer_core.data.loader import BatchStream, ShardSet


def run_batches(shards: ShardSet, train: TrainConfig, **others: Any) -> BatchStream:
    """The batches of a run so configured, by step.

    Args:
        shards: The set.
        train: Says seed, size and kinds.
        others: Of `BatchStream`, in their place or besides: ``split``, ``rank`` and so on.

    Raises:
        ConfigError, DataError: As `BatchStream`.
    """
    said = {
        "seed": train.seed,
        "batch_size": train.batch_size,
        "crop_fraction": train.crop_fraction,
        "crop_size": train.crop_size,
    }
    return BatchStream(shards, **(said | others))
