"""What decides the bytes of a preprocessed set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from physformer_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What decides the bytes of a preprocessed set, together with the raw set and the text encoder's weights.

    Attributes:
        buckets: (height, width) of level-0 pictures in elements of the field (pixels, unless there is a codec),
            even and whole patches of the network's level 0, of about the areas at which pictures are begun
            (`Pyramid.area_of_base`): with the presets all have one shorter side.
        base_views: Level-0 pictures per example. The first shows as much as the bucket's aspect allows, further ones
            up to 15 % less, at a random place.
        min_kept_area: Pictures of which no bucket shows at least this fraction are refused.
        crops_per_example: Crops of finer levels per example; 1.5 gives one or two.
        levels: Levels that crops are taken from; level l has 2^l times a bucket's resolution.
        level_weights: How often each of them, relative to the others.
        crop_size: Side of a crop in elements of the field, a multiple of 8.
        crop_candidates: Windows drawn for each crop.
        variance_fraction: How often the one with the largest pixel variance is kept, instead of the first.
        validation_fraction: Fraction of examples set aside, by a hash of their keys.
        encoder: Text encoder, as for `text.load_text_encoder`.
        max_tokens: Captions with more tokens are left out.
        codec: "pixels", or an autoencoder, as for `codec.load_codec`, whose latents are stored in place of pixels.
        seed: Seed of all that is drawn.
    """

    buckets: tuple[tuple[int, int], ...] = ((32, 32), (32, 40), (40, 32), (32, 56), (56, 32), (32, 72), (72, 32))
    base_views: int = 1
    min_kept_area: float = 0.5
    crops_per_example: float = 1.0
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    level_weights: tuple[float, ...] = (0.35, 0.25, 0.2, 0.12, 0.08)
    crop_size: int = 96
    crop_candidates: int = 3
    variance_fraction: float = 2 / 3
    validation_fraction: float = 0.01
    encoder: str = "minilm"
    max_tokens: int = 32
    codec: str = "pixels"
    seed: int = 0

    def __post_init__(self) -> None:
        # TOML and JSON have lists where this has tuples.
        object.__setattr__(self, "buckets", tuple(tuple(bucket) for bucket in self.buckets))
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "level_weights", tuple(self.level_weights))
        if not self.buckets or any(len(b) != 2 or any(side < 8 or side % 2 for side in b) for b in self.buckets):
            raise ConfigError(f"buckets must be (height, width) pairs of even sides from 8 on, not {self.buckets}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ConfigError("a bucket is named twice")
        if len(set(self.levels)) != len(self.levels) or any(not 1 <= level <= 8 for level in self.levels):
            raise ConfigError(f"levels must be different whole numbers from 1 to 8, not {self.levels}")
        if len(self.levels) != len(self.level_weights):
            raise ConfigError(f"{len(self.levels)} levels need as many weights, not {len(self.level_weights)}")
        if any(weight <= 0 for weight in self.level_weights):
            raise ConfigError(f"level_weights must be positive, not {self.level_weights}")
        if self.crops_per_example > 0 and not self.levels:
            raise ConfigError("crops need levels", hint="for example --levels 1,2, or --crops-per-example 0 for none")
        if self.crop_size < 16 or self.crop_size % 8:
            raise ConfigError(f"crop_size must be a multiple of 8, at least 16, not {self.crop_size}")
        for name, low, high in (
            ("base_views", 1, 100),
            ("min_kept_area", 0, 1),
            ("crops_per_example", 0, 100),
            ("crop_candidates", 1, 16),
            ("variance_fraction", 0, 1),
            ("validation_fraction", 0, 0.9),
            ("max_tokens", 3, 32767),
            ("seed", 0, 2**63 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessConfig:
        """Builds it from a table of a configuration file.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown preprocessing option {unknown[0]!r}", hint=f"known ones: {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"a preprocessing option has a value of the wrong type: {error}") from error
