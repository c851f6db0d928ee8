"""Where the runs of a scaling study come from: folders of finished runs, a CSV file, or training them here."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from physformer_core.checkpoints import find_checkpoint
from physformer_core.config import RunConfig, load_preset
from physformer_core.errors import CheckpointError, ConfigError, DataError
from physformer_core.evaluation.scaling import ScalingPoint
from physformer_core.flow.pyramid import BASE_AREA
from physformer_core.model.flops import training_flops
from physformer_core.model.transformer import PhysFormerTransformer2DModel
from physformer_core.training.curves import read_records
from physformer_core.training.trainer import Trainer

PROMPT_TOKENS = 16
"""Tokens of a prompt in the count of operations: captions have about so many, and they weigh little."""

HEAD_DIM = 32
COLUMNS = ("parameters", "examples", "loss")


@dataclass(frozen=True)
class FamilyMember:
    """One run to train.

    Args:
        width, layers: Of the network; heads are 32 wide, a width must be a multiple.
        examples: Training examples; whole batches are trained.
    """

    width: int
    layers: int
    examples: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.width}x{self.layers}-{self.examples}"


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Widths and layers from ``64x2,96x3``.

    Raises:
        ConfigError: It is malformed, or a width is no multiple of 32.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise ConfigError(f"'{part.strip()}' is no size", hint="WIDTHxLAYERS, for example 64x2,96x3,128x4")
        width, layers = map(int, numbers)
        if width % HEAD_DIM or not width or not layers:
            raise ConfigError(
                f"a width of {width} is not possible", hint=f"a multiple of {HEAD_DIM}, and a layer or more"
            )
        sizes.append((width, layers))
    return sizes


def family(sizes: Sequence[tuple[int, int]], examples: Sequence[int]) -> list[FamilyMember]:
    """Every size with every amount of data, the cheapest first."""
    members = [FamilyMember(width, layers, count) for width, layers in sizes for count in examples]
    return sorted(members, key=lambda one: one.width**2 * one.layers * one.examples)


def member_config(member: FamilyMember, *, preset: str, batch_size: int, seed: int) -> RunConfig:
    """The configuration of a member: the preset with another network and budget, on whole pictures only.

    Raises:
        ConfigError: There is less than a batch of examples.
    """
    steps = member.examples // batch_size
    if steps < 1:
        raise ConfigError(
            f"{member.examples} examples are less than a batch of {batch_size}", hint="lower --batch-size"
        )
    config = load_preset(preset).of_one_network()
    model = {
        "hidden_size": member.width,
        "num_layers": member.layers,
        "num_heads": member.width // HEAD_DIM,
        "text_hidden_size": member.width,
        "bottleneck": min(member.width, 128),
    }
    training = {
        "steps": steps,
        "batch_size": batch_size,
        "crop_fraction": 0.0,
        "compile": False,
        "seed": seed,
        "sample_every": 0,
        "checkpoint_every": steps,
        "keep_last": 1,
        "validate_every": steps,
        "log_every": max(1, steps // 20),
    }
    return config.override("model", **model).override("training", **training)


def train_family(
    members: Sequence[FamilyMember],
    data_dir: Path,
    output_dir: Path,
    *,
    preset: str = "nano",
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    on_example: Callable[[int], None] | None = None,
) -> list[Path]:
    """Trains what is not finished yet, each member into a folder of its own; a stopped study goes on where it was.

    Args:
        members: From `family`.
        data_dir: A preprocessed set.
        output_dir: Where the runs go.
        preset: Whose flow and optimiser are used.
        batch_size: Examples per step, the same for all.
        seed: Of weights, data order, times and noise.
        device: Device name.
        on_example: Told how many examples are done, over all runs.

    Returns:
        The runs' folders.

    Raises:
        ConfigError, DataError: See `member_config` and `Trainer`.
    """
    folders, done = [], 0
    for member in members:
        folder = output_dir / member.name
        config = member_config(member, preset=preset, batch_size=batch_size, seed=seed)
        if not _finished(folder, config):

            def report(step: int, before: int = done) -> None:
                if on_example is not None:
                    on_example(before + step * batch_size)

            trainer = Trainer(config, data_dir, folder, device=device, on_step=report)
            trainer.start_afresh()
            trainer.run()
        done += config.training.steps * batch_size
        if on_example is not None:
            on_example(done)
        folders.append(folder)
    return folders


def read_run(folder: Path, loss: str = "base") -> ScalingPoint:
    """A finished run of `physformer train`.

    Args:
        folder: Of the run.
        loss: ``base`` (whole pictures) or ``crop``.

    Raises:
        DataError: It is not finished, or never measured this loss on held-out examples.
        CheckpointError: It has no checkpoint.
    """
    records = read_records(folder / "log.jsonl")
    found = find_checkpoint(folder)
    try:
        state = json.loads((found.folder / "state.json").read_text(encoding="utf-8"))
        steps, done = int(state["config"]["training"]["steps"]), int(state["step"])
        batch_size = int(state["config"]["training"]["batch_size"])
        area = int(state["config"]["flow"].get("base_area", BASE_AREA))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{found.folder} has no state.json of a training run", hint="name the folders of runs, or a CSV file"
        ) from error
    if done < steps:
        raise DataError(
            f"{folder} stopped at step {done} of {steps}: its learning rate had not come down",
            hint="finish it with physformer train --resume auto, or leave it out",
        )
    key = f"validation_{loss}"
    values = [record["losses"][key] for record in records if key in record["losses"]]
    if not values:
        raise DataError(f"{folder} never measured the loss '{loss}' on held-out examples", hint="--loss base or crop")
    known = {key: value for key, value in found.transformer.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = PhysFormerTransformer2DModel(**known)
    side = max(1, round(math.sqrt(area) / model.network(base=loss == "base").sizes.patch_size))
    examples = done * batch_size
    flops = training_flops(model, side, side, PROMPT_TOKENS, base=loss == "base") * examples
    return ScalingPoint(folder.name, sum(p.numel() for p in model.parameters()), examples, flops, float(values[-1]))


def read_table(path: Path) -> list[ScalingPoint]:
    """Runs from a CSV file with the columns parameters, examples, loss and, if there are any, flops and name.

    Without ``flops`` they are 6 times parameters times examples, as if an example were one token.

    Raises:
        DataError: It cannot be read, or lacks a column or a number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read {path}: {error}", hint=f"a CSV file with the columns {', '.join(COLUMNS)}"
        ) from error
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]}", hint=f"the columns are {', '.join(COLUMNS)}[, flops, name]"
        )
    points = []
    for number, row in enumerate(rows, start=2):
        try:
            parameters, examples, loss = (float(row[name]) for name in COLUMNS)
            flops = float(row["flops"]) if row.get("flops") else 6 * parameters * examples
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error}", hint="every value must be a number") from error
        points.append(ScalingPoint(row.get("name") or f"line {number}", parameters, examples, flops, loss))
    return points


def _finished(folder: Path, config: RunConfig) -> bool:
    """Whether a folder holds this very run, whole.

    Raises:
        ConfigError: It holds another one.
    """
    if not (folder / "log.jsonl").is_file():
        return False
    try:
        state = json.loads((find_checkpoint(folder).folder / "state.json").read_text(encoding="utf-8"))
    except CheckpointError:
        return False  # stopped before its only checkpoint
    # Read as it is today: a run from before there was a key has its default.
    if RunConfig.from_dict(state["config"], str(folder)) != config:
        raise ConfigError(
            f"{folder} holds a run with other settings", hint="name another --output, or delete the folder"
        )
    return int(state["step"]) == config.training.steps
