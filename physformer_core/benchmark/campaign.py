"""A whole measurement as a command asks for it: sizes, batches and dtypes of one kind, and its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physformer_core.benchmark.cases import OURS, QUADRATIC, Case, why_not
from physformer_core.benchmark.fit import field_shape
from physformer_core.benchmark.machine import MachinePeak, available_memory
from physformer_core.benchmark.measure import BatchLimit, Measurement, find_batch_size, measure_sizes
from physformer_core.benchmark.report import build_report
from physformer_core.errors import ConfigError
from physformer_core.hardware import DTYPES, resolve_device, resolve_dtype
from physformer_core.model.attention import check_backend
from physformer_core.resolution import resolve_size

QUADRATIC_LIMIT = 33_000
"""Tokens beyond which a quadratic contender is extrapolated: a minute and more for one run on two cores."""

MEMORY_SHARE = 0.8
"""Share of the memory at hand that a batch may fill if no limit is given."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What to measure.

    Args:
        what: ``attention``, ``model`` or ``generate``.
        sizes: (height, width) in tokens, or in pixels for ``generate``.
        peers: Contenders besides ours.
        preset, checkpoint, backend, device: See `Case`.
        batches: Pictures at once.
        dtypes: Names; ``auto`` is what the product would take.
        repeats: Timed rounds.
        quadratic_limit: See `measure_sizes`.
    """

    what: str
    sizes: tuple[tuple[int, int], ...]
    peers: tuple[str, ...] = ()
    preset: str = "nano"
    checkpoint: Path | None = None
    backend: str = "auto"
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("auto",)
    device: str = "auto"
    repeats: int = 3
    quadratic_limit: int = QUADRATIC_LIMIT

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError("there is no size to measure", hint="e.g. --res 512x512,720p")
        if min(self.batches, default=0) < 1:
            raise ConfigError(f"batches must be at least 1, not {self.batches}", hint="e.g. --batch 1,4")
        if not self.dtypes:
            raise ConfigError("there is no dtype to measure", hint="e.g. --dtype fp32,bf16")
        check_backend(self.backend)
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, not {self.repeats}")

    def template(self) -> Case:
        """Our case at the first size, batch and dtype."""
        device = resolve_device(self.device)
        return Case(
            what=self.what,
            contender=OURS,
            height=self.sizes[0][0],
            width=self.sizes[0][1],
            preset=self.preset,
            checkpoint=self.checkpoint,
            backend=self.backend,
            batch=self.batches[0],
            dtype=_dtype_name(self.dtypes[0], self.device),
            device=str(device),
        )

    def runs(self) -> int:
        """Runs at most, for a progress bar."""
        grid = len(self.batches) * len(self.dtypes) * (self.repeats + 1)
        return grid * sum(
            name not in QUADRATIC or height * width <= self.quadratic_limit
            for height, width in self.sizes
            for name in (OURS, *self.peers)
        )


def run_campaign(campaign: Campaign, *, on_run: Callable[[Case], None] | None = None) -> dict[str, Any]:
    """Measures everything and returns the report; see `build_report`.

    Raises:
        ConfigError, DeviceError, CheckpointError: Something that was asked for does not exist here.
    """
    device = resolve_device(campaign.device)
    not_run = {name: why_not(campaign.what, name, device) for name in campaign.peers}
    contenders = [OURS, *(name for name, reason in not_run.items() if reason is None)]
    peaks: dict[str, MachinePeak] = {}
    results: list[Measurement] = []
    for asked in campaign.dtypes:
        name = _dtype_name(asked, campaign.device)
        peak = peaks[name] = MachinePeak(device, DTYPES[name])
        peak.observe()
        for batch in campaign.batches:
            results += measure_sizes(
                sorted(campaign.sizes, key=lambda size: size[0] * size[1]),
                contenders,
                dataclasses.replace(campaign.template(), batch=batch, dtype=name),
                repeats=campaign.repeats,
                quadratic_limit=campaign.quadratic_limit,
                peak=peak,
                on_run=on_run,
            )
    reasons = {name: reason for name, reason in not_run.items() if reason is not None}
    return build_report(campaign.what, results, peaks, not_run=reasons)


def largest_batch(
    campaign: Campaign, *, limit_bytes: int | None = None, on_try: Callable[[int], None] | None = None
) -> BatchLimit:
    """The largest batch of the campaign's first size and dtype that fits; see `find_batch_size`.

    Args:
        campaign: What to run.
        limit_bytes: Memory beyond the model; `MEMORY_SHARE` of what is free if None.
        on_try: Called with each batch before it is tried.

    Raises:
        ConfigError: No limit is given and the system does not say how much is free.
    """
    if limit_bytes is None:
        free = available_memory(resolve_device(campaign.device))
        if free is None:
            raise ConfigError("this system does not say how much memory is free", hint="--memory 8, in GB")
        limit_bytes = round(MEMORY_SHARE * free)
    return find_batch_size(campaign.template(), limit_bytes=limit_bytes, on_try=on_try)


def sizes_from(*, res: Sequence[str] = (), tokens: Sequence[int] = (), patch: int = 1) -> tuple[tuple[int, int], ...]:
    """(height, width) of named resolutions in patches, or of fields of about so many tokens.

    Args:
        res: As `resolve_size` reads them: ``720p``, ``512x512``.
        tokens: Numbers of tokens, 16:9.
        patch: Side of a patch in pixels; 1 gives pixels.

    Raises:
        ConfigError, SizeError: Both are given, or one cannot be.
    """
    if res and tokens:
        raise ConfigError("--res and --tokens say the size twice", hint="give one of them")
    if tokens:
        if min(tokens) < 64:
            raise ConfigError(f"--tokens {min(tokens)} is too small to measure", hint="64 tokens or more")
        return tuple(field_shape(count) for count in tokens)
    pixels = [resolve_size(res=name) for name in res]
    return tuple((-(-height // patch), -(-width // patch)) for width, height in pixels)


def patch_size(preset: str, checkpoint: Path | None) -> int:
    """Side of a patch in pixels of a preset's or a checkpoint's network."""
    from physformer_core.benchmark.cases import model_config

    case = Case(what="model", contender=OURS, height=1, width=1, preset=preset, checkpoint=checkpoint)
    return int(model_config(case)["patch_size"])


def _dtype_name(asked: str, device: str) -> str:
    dtype = resolve_dtype(asked, resolve_device(device))
    return next(name for name, kind in DTYPES.items() if kind == dtype)
