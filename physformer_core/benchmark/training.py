"""Our training step beside a plain trainer's over diffusers' dense transformer, step about, on the same batches.

The peer is what a tutorial would write: PixArtTransformer2DModel of our width and as many blocks as bring it nearest
to our number of parameters, eager, AdamW, gradient clipping, a flow-matching loss, autocast where ours has it. It is
handed its batches ready made, and keeps no average of its weights; ours is the product's own `Trainer`, with its input
pipeline, compiling, Muon and average. So what differs speaks for the peer, but for compiling and the network itself.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from physformer_core.benchmark.machine import MachinePeak, machine_facts, wait_for
from physformer_core.benchmark.networks import evaluate_peer, peer_network
from physformer_core.benchmark.report import FORMAT, peak_facts
from physformer_core.benchmark.shared_memory import SharedMemory, held_bytes
from physformer_core.config import RunConfig
from physformer_core.data.loader import Batch
from physformer_core.errors import ConfigError
from physformer_core.hardware import DTYPES
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.batches import run_batches
from physformer_core.training.initial import model_arguments
from physformer_core.training.trainer import StepReport, Trainer
from physformer_core.training.watching import WorkMeter, batch_shape

SCENES = 256
"""Scenes that are composed when no data are given: more than a batch, few enough to take seconds."""

_BLOCK = 4
"""Steps of one before it is the other's turn."""


@dataclass
class _Clock:
    """Seconds of every timed step by kind of batch, and what of them was waiting for data."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    waited: float = 0.0

    def add(self, kind: str, seconds: float) -> None:
        """Notes a step."""
        self.seconds.setdefault(kind, []).append(seconds)

    @property
    def total(self) -> float:
        """Of all steps."""
        return sum(map(sum, self.seconds.values()))

    @property
    def step(self) -> float:
        """Seconds of a mean step: of each kind the median, weighed by how many there were.

        Whole pictures and crops take different times, so that one median over both would be of neither; and a mean
        would count a shape that is compiled late as training.
        """
        count = sum(map(len, self.seconds.values()))
        return sum(len(times) * statistics.median(times) for times in self.seconds.values()) / count

    @property
    def by_kind(self) -> dict[str, float]:
        """Median seconds of each kind."""
        return {kind: statistics.median(times) for kind, times in sorted(self.seconds.items())}


def compose_data(folder: Path, config: RunConfig) -> Path:
    """A small preprocessed set of scenes below ``folder``, for when there is no other.

    Whole pictures are squares of the area that the configuration begins at: one size, so that there are few shapes to
    compile. Sets with other shapes besides have more to compile, and with `base_widening` more tokens in those. Crops
    are of levels that are as large as the configuration's.
    """
    from physformer_core.data.preprocess import preprocess
    from physformer_core.data.preprocess_config import PreprocessConfig
    from physformer_core.data.scenes import fetch_scenes

    side = config.pyramid().training_sizes()[0][0]
    crop = config.training.crop_size
    levels = tuple(level for level in range(1, 9) if side << level >= crop)[:5]
    fetch_scenes(folder / "raw", count=SCENES, seed=0)
    made = PreprocessConfig(
        buckets=((side, side),),
        levels=levels,
        level_weights=PreprocessConfig.level_weights[: len(levels)],
        crop_size=max(crop, PreprocessConfig.crop_size),
    )
    preprocess(folder / "raw", folder / "set", config=made)
    return folder / "set"


def peer_layers(config: dict[str, Any], parameters: int) -> int:
    """Blocks of the dense peer that bring it nearest to so many parameters.

    Args:
        config: Arguments of our network, text width included.
        parameters: Of our network.
    """
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in peer_network("dense", config, layers).parameters()) for layers in (1, 2))
    return max(1, 1 + round((parameters - one) / (two - one)))


class PlainTrainer:
    """An eager trainer over diffusers' dense transformer.

    Args:
        network: From `peer_network`.
        device: Where.
        dtype: Of autocast; float32 for none.
        lr: Of AdamW.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype, lr: float) -> None:
        self.network = network.to(device).train()
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr)

    def step(self, batch: Batch) -> torch.Tensor:
        """One step on a batch on the device; returns the loss."""
        sharp, count = batch.pixels_bchw, batch.pixels_bchw.shape[0]
        time_b = torch.rand(count, device=self.device)
        noise, share = torch.randn_like(sharp), time_b[:, None, None, None]
        coarse = torch.zeros_like(sharp)
        if batch.kind == "crop":
            coarse = F.interpolate(F.avg_pool2d(sharp, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        both = torch.cat([share * sharp + (1 - share) * noise, coarse], dim=1)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            velocity = evaluate_peer("dense", self.network, both, 1000 * time_b, batch.prompt_embeds_btd)
        loss = F.mse_loss(velocity.float(), sharp - noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure_training(
    config: RunConfig,
    data_dir: Path,
    *,
    preset: str,
    steps: int,
    warmup: int,
    device: str = "auto",
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains both by turns and reports what their steps took.

    Args:
        config: What ours trains; ``steps`` and everything that writes are replaced, and level 0 has no network of its
            own, as the peer has none.
        data_dir: A preprocessed set.
        preset: Its name, for the report.
        steps: Timed steps of each.
        warmup: Steps of each before those: compiling, and filling caches.
        device: Device name.
        on_step: Called with the number of steps done, after each of ours.

    Returns:
        The report of ``bench train``. ``ratio`` is images a second of ours over the peer's, ``ratio_by_kind`` the same
        for each kind of batch; ``tokens`` says of each how many both were given (`batch_tokens`), ``left_out``
        how many of our steps came before their shape was recorded. On CUDA ``peak_bytes`` is the most of its memory
        that each had, weights and optimizer included; elsewhere it is None.

    Raises:
        ConfigError: Fewer than one step is to be timed, or no step of a kind was as all later ones will be.
        DataError, DeviceError: As the run itself would.
    """
    if steps < 1 or warmup < 1:
        raise ConfigError("steps and warm-up steps must be at least 1")
    total = steps + warmup
    quiet = {"validate_every": total + 1, "checkpoint_every": total + 1, "sample_every": 0, "log_every": 1}
    config = config.of_one_network().override("training", steps=total + 1, **quiet)
    with tempfile.TemporaryDirectory(prefix="physformer-bench-") as folder:
        trainer = Trainer(config, data_dir, Path(folder), device=device)
        turns = _Turns(trainer, steps=steps, warmup=warmup, on_step=on_step)
        trainer.on_step, trainer.on_report = turns.after_step, turns.after_report
        trainer.run()
    return turns.report(preset)


class _Turns:
    """Told by our trainer of every step, lets the peer do as many whenever a block is done."""

    def __init__(
        self, trainer: Trainer, *, steps: int, warmup: int, on_step: Callable[[int], None] | None = None
    ) -> None:
        self._trainer, self._steps, self._warmup, self._on_step = trainer, steps, warmup, on_step
        train = trainer.config.training
        self._stream = run_batches(trainer.shards, train)
        arguments = dict(trainer.model.config) | model_arguments(trainer.config, trainer.shards)
        self._parameters = sum(p.numel() for p in trainer.model.parameters())
        self._peer_layers = peer_layers(arguments, self._parameters)
        network = peer_network("dense", arguments, self._peer_layers)
        self._peer_parameters = sum(p.numel() for p in network.parameters())
        self._peer = PlainTrainer(network, trainer.device, trainer.dtype, train.lr)
        self._memory = SharedMemory(trainer.device, lambda: held_bytes(self._peer.network, self._peer.optimizer))
        self._peak = MachinePeak(trainer.device, trainer.dtype)
        self._peak.observe()
        self._meter = WorkMeter(trainer.model, train.optimizer, self._peak.flops)
        self._ours, self._theirs = _Clock(), _Clock()
        self._flops: list[int] = []
        self._tokens: dict[str, list[dict[str, int]]] = {}
        self._peer_done = 0
        self._left_out, self._elapsed = 0, 0.0
        self._memory.begin()
        self._resumed = time.perf_counter()

    def after_report(self, report: StepReport) -> None:
        """Notes what the trainer waited for data; its interval may contain the peer's turn, the product does not."""
        if report.step > self._warmup:
            elapsed = self._trainer.config.training.batch_size / report.examples_per_second
            self._ours.waited += report.wait_fraction * elapsed

    def after_step(self, done: int) -> None:
        """Takes our time, and gives the peer its turn."""
        wait_for(self._trainer.device)
        took = time.perf_counter() - self._resumed
        if done > self._warmup:
            batch = self._stream.batch(done - 1)
            self._elapsed += took
            recorded = self._trainer.gradients.recorded
            if recorded is None or recorded.settled:
                self._ours.add(batch.kind, took)
            else:  # a shape's first passes, and its recording, come once
                self._left_out += 1
            self._flops.append(self._meter.step(batch))
            self._tokens.setdefault(batch.kind, []).append(batch_tokens(self._trainer.model, batch))
        if self._on_step is not None:
            self._on_step(done)
        if done == self._warmup + self._steps:
            self._trainer.request_stop()
        if done % _BLOCK == 0 or done == self._warmup or done == self._warmup + self._steps:
            self._memory.end(guest=False)
            self._memory.begin()
            while self._peer_done < done:
                self._peer_step()
            self._memory.end(guest=True)
            self._peak.observe(0.05)
            self._memory.begin()
        self._resumed = time.perf_counter()

    def _peer_step(self) -> None:
        batch = self._stream.batch(self._peer_done).to(self._trainer.device)
        started = time.perf_counter()
        self._peer.step(batch)
        wait_for(self._trainer.device)
        self._peer_done += 1
        if self._peer_done > self._warmup:
            self._theirs.add(batch.kind, time.perf_counter() - started)

    def report(self, preset: str) -> dict[str, Any]:
        """See `measure_training`."""
        trainer, batch = self._trainer, self._trainer.config.training.batch_size
        dtype = next(name for name, kind in DTYPES.items() if kind == trainer.dtype)
        if missing := self._theirs.by_kind.keys() - self._ours.by_kind.keys():
            kinds = " and ".join("whole pictures" if kind == "base" else "crops" for kind in sorted(missing))
            raise ConfigError(f"no step on {kinds} was timed: all came before they were recorded", hint="--warmup 40")
        ours, theirs = self._ours.step, self._theirs.step
        flops = statistics.mean(self._flops)
        return {
            "format": FORMAT,
            "what": "train",
            "machine": machine_facts(trainer.device) | peak_facts({dtype: self._peak}),
            "preset": preset,
            "batch": batch,
            "steps": self._steps,
            "dtype": dtype,
            "compiled": trainer.compiled,
            "recorded": trainer.recorded,
            "left_out": self._left_out,
            "tokens": {
                kind: {name: statistics.mean(one[name] for one in seen) for name in seen[0]}
                for kind, seen in sorted(self._tokens.items())
            },
            "peer_layers": self._peer_layers,
            "ours": {
                "parameters": self._parameters,
                "seconds": ours,
                "seconds_by_kind": self._ours.by_kind,
                "images_per_second": batch / ours,
                "wait_share": self._ours.waited / self._elapsed,
                "flops": flops,
                "matrix_share": flops / ours / self._peak.flops,
                "peak_bytes": self._memory.ours(),
            },
            "peer": {
                "parameters": self._peer_parameters,
                "seconds": theirs,
                "seconds_by_kind": self._theirs.by_kind,
                "images_per_second": batch / theirs,
                "peak_bytes": self._memory.guests(),
            },
            "ratio": theirs / ours,
            "ratio_by_kind": {
                kind: self._theirs.by_kind[kind] / seconds for kind, seconds in self._ours.by_kind.items()
            },
        }


def batch_tokens(model: PhysFormerTransformer2DModel, batch: Batch) -> dict[str, int]:
    """Tokens of a ``picture``, of a ``prompt`` in the mean, and of one that is ``padded`` to the batch's longest."""
    height, width, prompt = batch_shape(model, batch)
    return {"picture": height * width, "prompt": prompt, "padded": batch.prompt_embeds_btd.shape[1]}
