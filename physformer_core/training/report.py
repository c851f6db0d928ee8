"""What a run tells about itself: sums between two log records, the records, and the file they go to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from physformer_core.data.loader import Batch
from physformer_core.files import output_error
from physformer_core.hardware import peak_memory
from physformer_core.training.distributed import Ranks
from physformer_core.training.gradients import StepLosses
from physformer_core.training.optimizer import schedule

if TYPE_CHECKING:
    from physformer_core.training.trainer import Trainer

TIME_BUCKETS = 4
"""Parts of the flow time that losses are told by."""


@dataclass(frozen=True)
class StepReport:
    """What one log interval did.

    Args:
        step: Steps done.
        total: Steps of the run.
        losses: Mean normalised velocity loss per kind of batch ("base", "crop") over the interval; validation
            losses are named "validation_base" and "validation_crop".
        level_losses: Mean loss by level ("0", "1", ...) over the interval's finite ones.
        time_losses: The same by kind and quarter of the flow time ("base 0.00-0.25"; 1 is data).
        examples_per_second: Rate over the interval.
        wait_fraction: Share of the time spent waiting for data.
        learning_rate: AdamW's, at the last step.
        gradient_norm: Mean over the interval's finite ones, before clipping; None if none was.
        skipped: Steps skipped so far because loss or gradients were not finite.
        statistics: See `Losses.statistics`; means over the interval.
        memory_bytes: Peak memory of this process so far, as `peak_memory` counts it.
        matrix_share: Operations per second as a share of the machine's matrix peak; None if that was not measured.
    """

    step: int
    total: int
    losses: dict[str, float]
    level_losses: dict[str, float]
    time_losses: dict[str, float]
    examples_per_second: float
    wait_fraction: float
    learning_rate: float
    gradient_norm: float | None
    skipped: int
    statistics: dict[str, float]
    memory_bytes: int
    matrix_share: float | None


class RunLog:
    """Appends JSON lines; each is whole on the disk's cache before the next step begins."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise output_error(self._path, error) from error


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[RunLog]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(path)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield RunLog(path, file)
    finally:
        # Closing tries once more to write what could not be written, and would hide the first fault.
        with contextlib.suppress(OSError):
            file.close()


def _cut_half_line(path: Path) -> None:
    """Removes what a killed process wrote of its last line, before the next one is written onto it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


class Interval:
    """Sums between two log records. Losses stay tensors until then, so that no step waits for the device."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.elsewhere = 0.0
        self.examples = 0
        self.operations = 0
        self.statistics: dict[str, list[torch.Tensor]] = {}
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.norms: list[torch.Tensor] = []
        self.by_level: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.by_time: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, batch: Batch, losses: StepLosses) -> None:
        self.losses.setdefault(batch.kind, []).append(losses.mean)
        self.norms.append(losses.norm)
        self.examples += batch.total
        times = self.by_time.setdefault(batch.kind, [])
        times.append((losses.time.mul(TIME_BUCKETS).long().clamp_(0, TIME_BUCKETS - 1), losses.per_example))
        self.by_level.append((losses.level, losses.per_example))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of what is not training out of the rates."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.elsewhere += time.perf_counter() - began

    def note(self, statistics: dict[str, torch.Tensor]) -> None:
        """Adds `Losses.statistics`."""
        for name, value in statistics.items():
            self.statistics.setdefault(name, []).append(value)

    def report(self, trainer: Trainer, validation: dict[str, float]) -> StepReport:
        """What the interval did; all ranks must ask."""
        ranks = trainer.ranks
        means = {kind: float(ranks.sum(torch.stack(values).mean().cpu())) for kind, values in self.losses.items()}
        statistics = {
            name: float(ranks.sum(torch.stack(values).mean().cpu())) / ranks.world_size
            for name, values in self.statistics.items()
        }
        levels = _bucket_means(ranks, self.by_level, trainer.model.config.max_levels)
        width = 1 / TIME_BUCKETS
        times = {
            f"{kind} {index * width:.2f}-{(index + 1) * width:.2f}": loss
            for kind, entries in self.by_time.items()
            for index, loss in _bucket_means(ranks, entries, TIME_BUCKETS).items()
        }
        elapsed = time.perf_counter() - self.started - self.elsewhere
        norms = torch.stack(self.norms)
        finite = norms[torch.isfinite(norms)]
        train = trainer.config.training
        return StepReport(
            step=trainer.step,
            total=train.steps,
            losses={kind: value for kind, value in (means | validation).items() if math.isfinite(value)},
            level_losses={str(level): loss for level, loss in levels.items()},
            time_losses=times,
            examples_per_second=self.examples / elapsed,
            wait_fraction=self.waited / elapsed,
            learning_rate=train.lr * schedule(trainer.step - 1, train.steps, warmup_fraction=train.warmup_fraction),
            gradient_norm=float(finite.mean()) if len(finite) else None,
            skipped=trainer.updates.skipped,
            statistics={name: value for name, value in statistics.items() if math.isfinite(value)},
            memory_bytes=peak_memory(trainer.device, reserved=trainer.recorded),
            matrix_share=self.operations / elapsed / trainer.matrix_peak if trainer.matrix_peak else None,
        )


def _bucket_means(ranks: Ranks, entries: list[tuple[torch.Tensor, torch.Tensor]], buckets: int) -> dict[int, float]:
    """Mean loss by bucket over all ranks, of buckets and losses [B]; buckets without one are left out."""
    bucket = torch.cat([one for one, _ in entries]).cpu().clamp_(max=buckets - 1)
    loss = torch.cat([one for _, one in entries]).double().cpu()
    finite = torch.isfinite(loss)
    sums = torch.zeros(2, buckets, dtype=torch.float64)
    sums[0].index_add_(0, bucket[finite], loss[finite])
    sums[1].index_add_(0, bucket[finite], torch.ones_like(loss[finite]))
    total, count = ranks.sum(sums).tolist()
    return {index: total[index] / count[index] for index in range(buckets) if count[index]}
