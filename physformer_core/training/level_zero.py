"""Whether a set's whole pictures are what pictures begin with when they are drawn."""

from __future__ import annotations

import dataclasses

from physformer_core.config import RunConfig
from physformer_core.data.shard_set import ShardSet
from physformer_core.errors import ConfigError


def check_level_zero(config: RunConfig, shards: ShardSet) -> None:
    """Refuses a set whose whole pictures have sizes that sampling, with this configuration, would not begin with.

    A run on crops alone trains on none of them, and may have any.

    Raises:
        ConfigError: With what would fit as its hint.
    """
    if config.training.crop_fraction == 1:
        return
    pyramid = config.pyramid()
    sizes = shards.sizes("base", "train")
    if (wrong := pyramid.why_not_begun(sizes)) is None:
        return
    # What would fit them all: the same size for other shapes, or else another size.
    area = max(round(h * w * pyramid.base_area / pyramid.area_of_base(h, w)) for h, w in sizes)
    fitting = [
        f"{name} = {value}"
        for name, value in (("base_widening", 0), ("base_widening", 1), ("base_area", area))
        if dataclasses.replace(pyramid, **{name: value}).why_not_begun(sizes) is None
    ]
    hint = "preprocess with this run's --preset, or other --buckets"
    if config.training.lora_rank:
        hint += ": how pictures begin is the adapted checkpoint's"
    elif fitting:
        hint = f"give `{fitting[0]}` under [flow], or {hint}"
    raise ConfigError(wrong, hint=hint)
