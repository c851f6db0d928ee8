"""Which pictures are drawn together, what they cost, and how many fit into memory.

Pictures of the same size and the same settings go through the network as one batch, in the order they were asked for.
How many is decided by the memory that the machine has, not by what happens to be free, so that the same command makes
the same batches: a batch changes the order of some sums, and with it the last bit of a few pixels.

    bytes per token   = 32 C p^2 + 48 D      C channels, patches of p x p, tokens of D float32 values
    bytes per picture = tokens of its finest level * bytes per token
    batch             = memory / 4 / bytes per picture, at least 1, at most 64
    on a CPU          = also at most 8, and at most 16,384 tokens of the finest level together

Measured on 3,600 and 14,400 tokens with D = 192 and 384 in float32: eight fields and twelve token tensors are alive at
once, and less than 80 MB for the chunks of attention on top, whatever the size. On a CPU a batch of 8 takes half the
time of 8 pictures alone at 64x64, 0.7 of it at 256x256, 0.9 at 512x512, and as long at 1280x720: what fills the cache
by itself gains nothing from company, and pictures that are finished one by one are kept when the command is stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from physformer_core.checkpoints import Checkpoint
from physformer_core.codec import load_codec
from physformer_core.errors import ConfigError, DeviceError
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE
from physformer_core.flow.guidance import Guidance
from physformer_core.flow.pyramid import LevelSize, Pyramid
from physformer_core.flow.settling import SETTLING_TIME
from physformer_core.flow.shifted import SHIFTED_EVALUATIONS
from physformer_core.flow.solver import SolverSettings, steps_per_level
from physformer_core.prompts import MAX_SEED, MAX_STEPS

MAX_BATCH = 64
MAX_CPU_BATCH = 8
MAX_CPU_BATCH_TOKENS = 16_384
MAX_PICTURES = 100_000
"""Pictures of one command at most: a slip of the keyboard should not fill the memory with plans."""

_CHUNK_BYTES = 80 * 2**20
_ADAPTIVE_EVALUATIONS = 3  # a step of the adaptive solver, in network evaluations, for the time left


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw.

    Args:
        prompt: The prompt.
        seed, index: Decide its noise: `index` is which picture of its seed it is, from 0.
        width, height: Pixels.
        steps: See `physformer_core.flow.solver.steps_per_level`.
        guidance: Scale of the guidance.
        guidance_interval: Flow times within which it acts.
        detail: Factor of the detail that finer levels add; see `Guidance`.
        solver: One of `physformer_core.flow.solver.SOLVERS`.
        negative_prompt: What guidance pushes away from; None is the null prompt.
    """

    prompt: str
    seed: int
    index: int
    width: int
    height: int
    steps: int | tuple[int, ...] | None = None
    guidance: float = DEFAULT_GUIDANCE
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    detail: float = DEFAULT_DETAIL
    solver: str = "euler"
    negative_prompt: str | None = None

    def settings(self) -> Guidance:
        """Its guidance, checked.

        Raises:
            ConfigError: A value is out of range.
        """
        SolverSettings(name=self.solver)
        return Guidance(scale=self.guidance, interval=self.guidance_interval, detail=self.detail)


@dataclass(frozen=True)
class LevelWork:
    """What one level of one picture costs.

    Args:
        size: Its size.
        tokens: Tokens of its field.
        evaluations: Network evaluations of each step.
    """

    size: LevelSize
    tokens: int
    evaluations: tuple[int, ...]

    @property
    def work(self) -> int:
        """Tokens times evaluations, which time grows with linearly."""
        return self.tokens * sum(self.evaluations)


class Planner:
    """Works out sizes, costs and batches for a checkpoint; reads no weights.

    Args:
        checkpoint: The checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        network = checkpoint.transformer
        self.patch = int(network.get("patch_size", 8))
        self.base_patch = int(network.get("base_patch_size", 0)) or self.patch
        self.channels = int(network.get("in_channels", 3))
        self.hidden_size = int(network.get("hidden_size", 256))
        self.base_hidden_size = int(network.get("base_hidden_size", 0)) or self.hidden_size
        self.factor = load_codec(checkpoint.codec_name).factor
        self.flow = checkpoint.flow()
        self.pyramid: Pyramid = self.flow.pyramid(self.patch, self.base_patch)

    def sizes(self, width: int, height: int) -> list[LevelSize]:
        """Sizes of the levels, in elements of the field."""
        return self.pyramid.level_sizes(-(-height // self.factor), -(-width // self.factor))

    def levels(self, request: PictureRequest) -> list[LevelWork]:
        """What a picture's levels cost, coarsest first.

        Raises:
            ConfigError: Its steps are below 1.
        """
        sizes = self.sizes(request.width, request.height)
        guidance = request.settings()
        path, result = self.flow.flow_path(), []
        for size, steps in zip(sizes, steps_per_level(request.steps, len(sizes)), strict=True):
            times = SolverSettings(name=request.solver, steps=steps).times()
            each = SHIFTED_EVALUATIONS if self.flow.is_shifted(size.level) and self.patch > 1 else 1
            moments = (path.at_straight_time(time)[0] for time in times)
            costs = [each * (1 + (guidance.at(moment, size.level) != 1)) for moment in moments]
            if request.solver == "heun":  # two evaluations a step, one at the last
                evaluations = [a + b for a, b in itertools.pairwise(costs[:-1])] + [costs[-2]]
            elif request.solver == "adaptive":
                evaluations = [_ADAPTIVE_EVALUATIONS * cost for cost in costs[:-1]]
            else:
                evaluations = costs[:-1]
            if size.level == 0 and self.flow.settling:
                evaluations[-1] += self.flow.settling * (1 + (guidance.at(SETTLING_TIME) != 1))
            result.append(LevelWork(size, self._tokens(size), tuple(evaluations)))
        return result

    def _tokens(self, size: LevelSize) -> int:
        return size.padded_height * size.padded_width // (self.patch if size.level else self.base_patch) ** 2

    def picture_bytes(self, width: int, height: int) -> int:
        """Memory that one picture takes in a batch, without what the batch shares; see the formula above."""
        base_token = 32 * self.channels * self.base_patch**2 + 48 * self.base_hidden_size
        token = 32 * self.channels * self.patch**2 + 48 * self.hidden_size
        return max(self._tokens(size) * (token if size.level else base_token) for size in self.sizes(width, height))

    def picture_tokens(self, width: int, height: int) -> int:
        """Tokens of a picture's largest level: the finest, if level 0 has not smaller patches."""
        return max(self._tokens(size) for size in self.sizes(width, height))

    def batch_limit(self, request: PictureRequest, device: torch.device, wanted: int | None = None) -> int:
        """How many pictures like this one are drawn together.

        Args:
            request: The picture.
            device: Where.
            wanted: What the user asked for, if anything; memory is then the user's business.

        Raises:
            DeviceError: Not even one fits into the machine.
        """
        one = self.picture_bytes(request.width, request.height)
        total = total_memory(device)
        if one + _CHUNK_BYTES > total:
            raise DeviceError(
                f"a picture of {request.width}x{request.height} needs about {one / 1e9:.0f} GB of memory, "
                f"and {device} has {total / 1e9:.0f} GB",
                hint="draw a smaller one",
            )
        if request.solver == "adaptive":  # its steps follow the worst picture of a batch
            return 1
        if wanted is not None:
            return wanted
        most = min(MAX_BATCH, total // 4 // one)
        if device.type == "cpu":
            most = min(most, MAX_CPU_BATCH, MAX_CPU_BATCH_TOKENS // self.picture_tokens(request.width, request.height))
        return max(1, most)

    def batches(self, requests: Sequence[PictureRequest], limit: Callable[[PictureRequest], int]) -> list[list[int]]:
        """Indices into `requests`, in batches of pictures that can be drawn together, first come first."""
        groups: dict[PictureRequest, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(dataclasses.replace(request, prompt="", seed=0, index=0), []).append(number)
        batches = []
        for key, numbers in groups.items():
            size = limit(key)
            batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return batches


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, or that this process may use of it (control groups on Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(limit)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Seeds from `7`, `1,5,9` and `1-4`, in the order given.

    Raises:
        ConfigError: A text is neither, or a seed is out of range.
    """
    seeds: list[int] = []
    for text in texts:
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,20})(?:\s*-\s*(\d{1,20}))?\s*", part, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last <= MAX_SEED:
                raise ConfigError(
                    f"{text!r} is not a seed", hint="a whole number from 0 to 2^64-1, several (1,5,9) or a range (1-4)"
                )
            if len(seeds) + last - first >= MAX_PICTURES:
                raise ConfigError(f"{text!r} is too many seeds", hint=f"at most {MAX_PICTURES} pictures in one command")
            seeds += range(first, last + 1)
    return seeds


def parse_steps(text: str) -> int | tuple[int, ...]:
    """Steps from `20` (of the coarsest level) or `20,4,4,2` (one per level).

    Raises:
        ConfigError: A part is not a number from 1 to `MAX_STEPS`.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) and 1 <= int(part) <= MAX_STEPS for part in parts):
        raise ConfigError(
            f"{text!r} is not a number of steps",
            hint=f"1 to {MAX_STEPS} at the coarsest level, for example 20, or one per level, for example 20,4,4,2",
        )
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))


def check_step_levels(requests: Iterable[PictureRequest], levels: int) -> None:
    """Refuses steps of more levels than any picture has: they would be left out without a word.

    Args:
        requests: All that are drawn together; smaller pictures take the first of the steps.
        levels: The most that one of them has.

    Raises:
        ConfigError: There are steps of more.
    """
    steps = max((one.steps for one in requests if isinstance(one.steps, tuple)), key=len, default=())
    if len(steps) > levels:
        raise ConfigError(
            f"steps {','.join(map(str, steps))} are of {len(steps)} levels, and these pictures have {levels}",
            hint=f"{','.join(map(str, steps[:levels]))} is what they can take",
        )


def parse_interval(text: str) -> tuple[float, float]:
    """Flow times from `0.1,0.9`.

    Raises:
        ConfigError: They are not two rising numbers within 0 and 1.
    """
    try:
        low, high = (float(part) for part in text.split(","))
        Guidance(interval=(low, high))
    except (ValueError, ConfigError):
        raise ConfigError(
            f"{text!r} is not a guidance interval",
            hint="two rising flow times from 0 (noise) to 1: 0.1,0.9",
        ) from None
    return low, high
