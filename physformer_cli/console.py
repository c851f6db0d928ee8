"""What the commands say: messages and progress on standard error, data on standard output.

Rich is imported when something is printed, so that a `--help` does not pay for it. Colours follow the terminal and
`NO_COLOR`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_INTERVAL_SECONDS = 10.0
_LEAST_ROOM = 8  # characters of a table's last column, below which it is not worth cutting

# Options that several commands share.
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
NoRecordOption = Annotated[
    bool, typer.Option("--no-record", help="Do not record this run in physformer.toml (and create none).")
]


@functools.cache
def stderr() -> Console:
    """The console for everything that is not data."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


_muted = False


def mute() -> None:
    """Says nothing but errors from now on: another process speaks for this one too."""
    global _muted
    _muted = stderr().quiet = True


def say(message: str) -> None:
    """Prints a line for the user on standard error."""
    stderr().print(message, markup=False)


def warn(message: str) -> None:
    """Prints a warning on standard error."""
    _labelled("warning:", "yellow", message)


def error(message: str, hint: str | None = None) -> None:
    """Prints `error: MESSAGE` and, if there is one, `hint: HINT` on standard error."""
    stderr().quiet = False
    _labelled("error:", "bold red", message)
    if hint:
        _labelled("hint:", "cyan", hint)


def print_json(value: Any) -> None:
    """Prints JSON on standard output; characters that the output's encoding lacks are escaped, and numbers that JSON
    has not are null."""
    if _muted:
        return
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=not utf8, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def print_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Mapping[str, str] | None = None
) -> None:
    """Prints a table on standard output: whole into a pipe; fitted to a terminal by cutting the last column, or, where
    that would leave nothing of it, wrapped as the terminal does.

    Args:
        names: The columns' headings.
        rows: The cells.
        styles: Rich styles for cells that have exactly this text.
    """
    lines = [names, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    if not sys.stdout.isatty():
        for line in lines:
            cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        return

    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    room = console.width - sum(width + 2 for width in widths[:-1])
    for number, line in enumerate(lines):
        text = Text(style="bold" if number == 0 else "")
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            if column == len(names) - 1:
                width = len(cell)
                if len(cell) > room >= _LEAST_ROOM:
                    cell = cell[: room - 1] + "…"
            style = (styles or {}).get(line[column], "") if number else ""
            text.append(cell, style).append(" " * (width - len(cell) + 2))
        text.rstrip()
        console.print(text, soft_wrap=True)


def human_size(count: float) -> str:
    """Bytes as a short text: 999 B, 1.5 KB, 37 MB (powers of 1000)."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} TB"


def human_time(seconds: float) -> str:
    """Seconds as a short text: 0.42 s, 12.3 s, 3 min 05 s, 2 h 07 min, 12 days."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < 100 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / (24 * 60):,.0f} days"


class ProgressTask:
    """One bar, or one series of lines where there is no terminal.

    Args:
        description: What is being done, in a word or two.
        total: How many units there are; None while unknown.
        unit: What is counted, for the rate: "steps".
        bars: Rich's display, or None for plain lines.
        done: How many units an earlier run did: they do not count for the rate.
    """

    def __init__(self, description: str, total: int | None, unit: str, bars: Progress | None, done: int = 0) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._done = self._before = done
        self._started = self._printed = time.monotonic()
        self._bars = bars
        self._task: TaskID | None = None
        if bars is not None:
            self._task = bars.add_task(description, total=total, unit=unit, completed=done)

    def update(self, done: int, total: int | None = None) -> None:
        """Sets how many units are done, and how many there are if that has become known."""
        changed, self._done = done != self._done, done
        self._total = total if total is not None else self._total
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=self._total)
            return
        now = time.monotonic()
        finished = changed and self._total is not None and done >= self._total
        if finished or now - self._printed >= _PLAIN_INTERVAL_SECONDS:
            self._printed = now
            say(self._line(now))

    def advance(self, count: int = 1) -> None:
        """Notes `count` more units done."""
        self.update(self._done + count)

    def describe(self, description: str) -> None:
        """Changes what the bar says is being done."""
        self._description = description
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=description)

    def _line(self, now: float) -> str:
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        parts = [f"{self._description}: {self._done}" + (f"/{self._total}" if self._total is not None else "")]
        parts.append(f"{rate:.3g} {self._unit}/s")
        if self._total is not None and self._done < self._total and rate > 0:
            parts.append(f"{human_time((self._total - self._done) / rate)} left")
        return ", ".join(parts)


@contextlib.contextmanager
def progress() -> Iterator[Callable[..., ProgressTask]]:
    """Shows progress bars with rate and time left, or a line every ten seconds where there is no terminal.

    Yields:
        `add(description, total=None, unit="steps", done=0) -> ProgressTask`. A task's `update` takes (done, total) and
        can be handed to the core as a progress callback as it is.
    """
    if not stderr().is_terminal:
        yield lambda description, total=None, unit="steps", done=0: ProgressTask(description, total, unit, None, done)
        return

    bars = progress_bars()
    with bars:
        yield lambda description, total=None, unit="steps", done=0: ProgressTask(description, total, unit, bars, done)


def progress_bars() -> Progress:
    """Bars with rate and time left, for a display of one's own; `ProgressTask` fills them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Task as RichTask
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(compact=True),
        console=stderr(),
    )


def _labelled(label: str, style: str, message: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble((label, style), " ", message))
