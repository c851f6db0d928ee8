"""Where a run's figures go besides its log: TensorBoard and Weights & Biases, each only if it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from physformer_core.errors import ConfigError, OutputError
from physformer_core.files import atomic_write
from physformer_core.training.trainer import StepReport

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb.json"


class Sink(Protocol):
    """Takes a run's reports and sample grids."""

    def report(self, report: StepReport) -> None:
        """One log interval's figures."""

    def samples(self, step: int, picture: Path) -> None:
        """A sample grid that was written."""

    def close(self) -> None:
        """Writes what is still held back. Nothing comes after it."""


def scalars(report: StepReport) -> dict[str, float]:
    """A report as named numbers; names are grouped by what stands before the slash."""
    values: dict[str, float] = {}
    for name, value in report.losses.items():
        kind, validation = name.removeprefix("validation_"), name.startswith("validation_")
        values[f"loss/{kind}{'_validation' if validation else ''}"] = value
    values |= {f"loss_by_level/{name}": value for name, value in report.level_losses.items()}
    values |= {f"loss_by_time/{name.replace(' ', '_')}": value for name, value in report.time_losses.items()}
    values |= {f"statistics/{name}": value for name, value in report.statistics.items()}
    values |= {
        "speed/examples_per_second": report.examples_per_second,
        "speed/wait_fraction": report.wait_fraction,
        "training/learning_rate": report.learning_rate,
        "training/skipped": float(report.skipped),
        "machine/memory_bytes": float(report.memory_bytes),
    }
    if report.gradient_norm is not None:
        values["training/gradient_norm"] = report.gradient_norm
    if report.matrix_share is not None:
        values["speed/matrix_share"] = report.matrix_share
    return {name: value for name, value in values.items() if math.isfinite(value)}


def require_tensorboard() -> None:
    """Raises ConfigError if TensorBoard, which an extra brings, is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard", hint='pip install "physformer[tensorboard]"'
        ) from error


def require_wandb(mode: str) -> None:
    """Raises ConfigError if Weights & Biases, which an extra brings, is not installed, or has no key to go online."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--wandb needs the package wandb", hint='pip install "physformer[wandb]"') from error
    if mode == "online" and not wandb.api.api_key:
        raise ConfigError(
            "--wandb online needs a key, and there is none here",
            hint="wandb login, or set WANDB_API_KEY; --wandb offline needs none",
        )


class TensorBoardSink:
    """Writes event files into ``RUN/tensorboard``.

    Args:
        run_dir: The run's folder.
        first_step: The step that the run goes on from: what an earlier process wrote after it is hidden.
        text: The resolved configuration, shown beside the curves.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, run_dir: Path, *, first_step: int, text: str) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=first_step + 1)
        if first_step == 0:
            self._writer.add_text("configuration", f"```toml\n{text}\n```", 0)

    def report(self, report: StepReport) -> None:
        """Adds its numbers, and makes them visible."""
        for name, value in scalars(report).items():
            self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    def samples(self, step: int, picture: Path) -> None:
        """Adds the picture."""
        with Image.open(picture) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbSink:
    """Writes a run of Weights & Biases; offline it stays in ``RUN/wandb`` until `wandb sync` sends it.

    A resumed run goes on under the id that it had, which is kept in ``RUN/wandb.json``.

    Args:
        run_dir: The run's folder.
        mode: ``offline`` or ``online``.
        project: Its project there.
        config: The resolved configuration.
        resumed: Whether the run goes on from a checkpoint of its own.

    Raises:
        ConfigError: The package is not installed, or there is no key to log in with.
        OutputError: The service could not be reached.
    """

    def __init__(self, run_dir: Path, *, mode: str, project: str, config: dict[str, Any], resumed: bool) -> None:
        require_wandb(mode)
        import wandb

        self._wandb = wandb
        id_file = run_dir / WANDB_FILE
        identity = _read_id(id_file) if resumed else None
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.absolute().name,
                dir=str(run_dir),
                mode=mode,  # type: ignore[arg-type]  # checked above
                config=config,
                id=identity,
                resume="allow" if identity and mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_save_requirements=False),
            )
        except wandb.errors.Error as error:
            raise OutputError(
                f"Weights & Biases could not be started: {str(error).strip().splitlines()[0]}",
                hint="--wandb offline needs no network; wandb sync sends the run later",
            ) from error
        with atomic_write(id_file) as temporary:
            temporary.write_text(json.dumps({"id": self._run.id, "project": project}) + "\n", encoding="utf-8")

    def report(self, report: StepReport) -> None:
        """Logs its numbers at its step."""
        self._run.log(scalars(report), step=report.step)

    def samples(self, step: int, picture: Path) -> None:
        """Logs the picture at its step."""
        with Image.open(picture) as image:
            self._run.log({"samples": self._wandb.Image(image.convert("RGB"))}, step=step)

    def close(self) -> None:
        """Ends the run and waits until all is written, or sent."""
        self._run.finish()
        # finish returns a moment before its service has written the end of the run's file; teardown waits for that.
        self._wandb.teardown()


def feed(
    sinks: list[Sink],
) -> tuple[Callable[[StepReport], None], Callable[[int, Path], None]]:
    """The two callbacks of a trainer that hand everything to every sink."""

    def on_report(report: StepReport) -> None:
        for sink in sinks:
            sink.report(report)

    def on_samples(step: int, picture: Path) -> None:
        for sink in sinks:
            sink.samples(step, picture)

    return on_report, on_samples


def _read_id(path: Path) -> str | None:
    """The id that an earlier process of this run was given, if there was one."""
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged: it holds no id", hint="remove it; the run then starts a new one there"
        ) from error
