"""What `physformer train` shows while it runs: a live panel in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from physformer_cli import console

if TYPE_CHECKING:
    from rich.console import Group
    from rich.progress import Progress

    from physformer_core.training.sinks import Sink
    from physformer_core.training.trainer import StepReport, Trainer

_SHOWN_NAMES = {"validation_base": "val base", "validation_crop": "val crop"}
_KINDS = {"base": "whole pictures", "crop": "crops"}
_SPARKS = "▁▂▃▄▅▆▇█"
_HISTORY = 48


@dataclasses.dataclass(frozen=True)
class Watch:
    """Where figures go besides the log and the terminal.

    Args:
        tensorboard: Whether event files are written.
        wandb: ``offline``, ``online`` or None.
        project: Project at Weights & Biases, if not ``physformer``.
    """

    tensorboard: bool
    wandb: str | None
    project: str | None

    def check(self) -> None:
        """Refuses what is unknown, contradictory or not installed, before anything is written.

        Raises:
            ConfigError: With what to do.
        """
        from physformer_core.errors import ConfigError
        from physformer_core.training.sinks import require_tensorboard, require_wandb

        if self.wandb not in (None, "offline", "online"):
            raise ConfigError(f"unknown --wandb '{self.wandb}'", hint="offline or online")
        if self.project is not None and self.wandb is None:
            raise ConfigError("--wandb-project has no effect without --wandb", hint="--wandb offline, for example")
        if self.tensorboard:
            require_tensorboard()
        if self.wandb is not None:
            require_wandb(self.wandb)

    @contextlib.contextmanager
    def sinks(self, trainer: Trainer, folder: Path, *, resumed: bool) -> Iterator[list[Sink]]:
        """The sinks of a run, closed when the block ends, however it ends."""
        import tomli_w

        from physformer_core.training.sinks import TensorBoardSink, WandbSink

        config = trainer.config.to_dict()
        with contextlib.ExitStack() as stack:
            opened: list[Sink] = []
            if self.tensorboard:
                opened.append(TensorBoardSink(folder, first_step=trainer.step, text=tomli_w.dumps(config)))
                stack.callback(opened[-1].close)
            if self.wandb is not None:
                project = self.project or "physformer"
                opened.append(WandbSink(folder, mode=self.wandb, project=project, config=config, resumed=resumed))
                stack.callback(opened[-1].close)
            yield opened


class TrainView:
    """What is known about a run, as lines.

    Args:
        trainer: The run.
        task: Its progress bar, or the lines that stand for it.
        panel: Whether the figures are shown in a panel below the bar, and not in its description.
    """

    def __init__(self, trainer: Trainer, task: console.ProgressTask, *, panel: bool) -> None:
        self.losses: dict[str, float] = {}
        self._trainer, self._task, self._panel = trainer, task, panel
        self._report: StepReport | None = None
        self._validated: int | None = None
        self._samples: Path | None = None
        self._history: deque[float] = deque(maxlen=_HISTORY)

    def step(self, step: int) -> None:
        """A step is done."""
        self._task.update(step)

    def report(self, report: StepReport) -> None:
        """Figures have come."""
        self.losses.update(report.losses)
        self._report = report
        if any(name.startswith("validation_") for name in report.losses):
            self._validated = report.step
        if (loss := report.losses.get("base", report.losses.get("crop"))) is not None:
            self._history.append(loss)
        if self._panel:
            self._task.describe("training")
            return
        shown = [f"{_SHOWN_NAMES.get(kind, kind)} {value:.4f}" for kind, value in self.losses.items()]
        shown.append(f"{report.examples_per_second:.3g} examples/s")
        if report.matrix_share is not None:
            shown.append(f"{report.matrix_share:.0%} of the matrix peak")
        if report.skipped:
            shown.append(f"{report.skipped} skipped")
        self._task.describe(", ".join(shown))

    def samples(self, step: int, picture: Path) -> None:
        """A sample grid has been drawn."""
        self._samples = picture
        if not self._panel:
            console.say(f"drew {picture}")

    def close(self) -> None:
        """Nothing is held back."""

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, those that are known."""
        report = self._report
        if report is None:
            return []
        rows = [("loss", _kinds({k: v for k, v in self.losses.items() if not k.startswith("validation_")}))]
        if self._validated is not None:
            held_out = {k.removeprefix("validation_"): v for k, v in self.losses.items() if k.startswith("validation_")}
            rows.append(("held out", f"{_kinds(held_out)}   (step {self._validated})"))
        if len(self._history) > 1:
            rows.append(("lately", sparkline(self._history)))
        speed = [f"{report.examples_per_second:.3g} examples/s"]
        if report.matrix_share is not None and self._trainer.matrix_peak is not None:
            peak = _operations(self._trainer.matrix_peak)
            speed.append(f"{report.matrix_share:.0%} of the matrix peak ({peak})")
        speed.append(f"{report.wait_fraction:.1%} waiting for data")
        rows.append(("speed", ", ".join(speed)))
        rows.append(("memory", f"{console.human_size(report.memory_bytes)} at most"))
        facts = report.statistics
        if "velocity_norm" in facts:
            rows.append(
                ("velocity", f"{facts['velocity_norm']:.3f} predicted, {facts['velocity_target_norm']:.3f} in the data")
            )
            rows.append(("field", f"mean {facts['field_mean']:+.3f}, deviation {facts['field_std']:.3f}"))
        gradient = "not finite" if report.gradient_norm is None else f"{report.gradient_norm:.3g}"
        skipped = f", {report.skipped} steps skipped" if report.skipped else ""
        rows.append(("gradient", f"{gradient}, learning rate {report.learning_rate:.2e}{skipped}"))
        if self._samples is not None:
            rows.append(("samples", str(self._samples)))
        return rows


@contextlib.contextmanager
def train_view(trainer: Trainer) -> Iterator[TrainView]:
    """Shows a run until the block ends, and hangs what it shows onto the trainer's callbacks."""
    total = trainer.config.training.steps
    waiting = "compiling, first step" if trainer.compiled else "first step"
    if not console.stderr().is_terminal:
        task = console.ProgressTask(waiting, total, "steps", None, trainer.step)
        yield TrainView(trainer, task, panel=False)
        return

    from rich.live import Live

    bars = console.progress_bars()
    view = TrainView(trainer, console.ProgressTask(waiting, total, "steps", bars, trainer.step), panel=True)
    with Live(console=console.stderr(), refresh_per_second=4, get_renderable=lambda: _panel(view, bars)):
        yield view


def sparkline(values: deque[float]) -> str:
    """The last values, above 0, as bars of eight heights on a logarithmic axis, the smallest as the lowest."""
    logarithms = [math.log(max(value, 1e-12)) for value in values]
    low, span = min(logarithms), (max(logarithms) - min(logarithms)) or 1.0
    return "".join(_SPARKS[min(7, int(8 * (value - low) / span))] for value in logarithms)


def _panel(view: TrainView, bars: Progress) -> Group:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in view.rows():
        table.add_row(name, Text(value))
    return Group(bars, Padding(table, (0, 0, 0, 2)))


def _kinds(losses: dict[str, float]) -> str:
    return "   ".join(f"{_KINDS.get(kind, kind)} {value:.4f}" for kind, value in losses.items())


def _operations(per_second: float) -> str:
    for unit in ("M", "G", "T"):
        per_second /= 1000 if unit != "M" else 1e6
        if per_second < 999.5:
            return f"{per_second:.3g} {unit}FLOP/s"
    return f"{per_second / 1000:.3g} PFLOP/s"
