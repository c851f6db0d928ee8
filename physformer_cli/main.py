"""The `physformer` command: finds the subcommands and turns errors into messages and exit codes.

Exit codes: 0 all is well, 1 the user's or the data's fault (one line and a hint), 2 usage, 3 a threshold was missed,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, Literal, NamedTuple

import typer

from physformer_cli import console
from physformer_core.chatter import hush
from physformer_core.errors import PhysFormerError
from physformer_core.version import __version__


class Entry(NamedTuple):
    """Where a command is, and its line in the list of commands."""

    module: str
    summary: str


# In the order of the help page. The modules have `register(app)`, and import nothing heavier than typer at their top;
# the core they import inside their functions.
COMMANDS = {
    "generate": Entry("generate", "Draw pictures from prompts."),
    "train": Entry("train", "Train a network on a preprocessed set."),
    "export": Entry(
        "export", "Write a trained checkpoint's averaged weights as a folder that generate and diffusers read."
    ),
    "quantize": Entry(
        "quantize", "Write a checkpoint with 8 or 4 bits per weight, which the other commands load like any other."
    ),
    "doctor": Entry(
        "doctor", "Say what is here: device, versions, kernels, speeds, caches, weights, and what is missing."
    ),
    "info": Entry(
        "info", "Print how pictures were made: prompt, seed, size, steps, checkpoint; or what a checkpoint is."
    ),
    "init": Entry(
        "runs", "Create a commented physformer.toml: defaults for options, and the place where runs are recorded."
    ),
    "data": Entry("data", "Fetch pictures with captions, preprocess them, look at them."),
    "eval": Entry("evaluate", "Measure what a model draws: prompt accuracy, FID, what a codec loses."),
    "bench": Entry(
        "bench", "Measure time, memory, operations and their growth, beside other transformers in the same run."
    ),
    "runs": Entry("runs", "List recorded runs, show one, plot one, or run it again."),
}

MARKUP: Literal["rich"] = "rich"
DEBUG_VARIABLE = "PHYSFORMER_DEBUG"
REPORT_HINT = (
    f"this is a fault of physformer: please report it with the output of the same command under {DEBUG_VARIABLE}=1, "
    "which shows the traceback"
)


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); unwinds like Ctrl-C, so that no half file stays behind."""


class CommandsOnDemand(typer.core.TyperGroup):
    """Builds the command that was named and no other, and none for the list of them.

    Importing all and turning their options into parameters takes longer than showing a page of help.
    """

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Of a name that does not exist, all: it may be a misspelling of one.
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands and cmd_name not in self.commands:
                scratch = typer.Typer(rich_markup_mode=MARKUP)
                importlib.import_module(f"physformer_cli.{COMMANDS[name].module}").register(scratch)
                self.commands.update(typer.main.get_group(scratch).commands)
        return self.commands.get(cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        built = self.commands
        listed = {name: typer.core.TyperCommand(name, help=entry.summary) for name, entry in COMMANDS.items()}
        self.commands = listed | dict(built)
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands = built


app = typer.Typer(
    name="physformer",
    cls=CommandsOnDemand,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"physformer {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: physformer init, then physformer COMMAND --help for examples.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, measure and run text-to-image models whose cost grows linearly with the number of pixels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: What follows `physformer`; the process's own if not given.
    """
    terminated = False

    def on_terminate(_signal: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise Terminated

    previous = signal.signal(signal.SIGTERM, on_terminate)
    try:
        command = typer.main.get_command(app)
        code = _exit_code(command, arguments)
        code = _flush(code)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 143 if terminated else code


def run() -> None:
    """The entry point of the console script."""
    sys.exit(main())


def _exit_code(command: object, arguments: Sequence[str] | None) -> int:
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        assert callable(command)
        command(args=None if arguments is None else list(arguments), prog_name="physformer")
    except SystemExit as ending:
        if isinstance(ending.__context__, OSError) and ending.__context__.errno == errno.EPIPE:
            return _silence_stdout()  # typer makes an error of a reader that has seen enough
        if isinstance(ending.code, int) or ending.code is None:
            return ending.code or 0
        console.error(str(ending.code))
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _silence_stdout()
    except PhysFormerError as error:
        if debug:
            traceback.print_exc()
        console.error(error.message, error.hint)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return _unexpected(error, debug)
        if debug:
            traceback.print_exc()
        # Files are written through `atomic_write`, which has told it already: this is redirected standard output.
        console.error("no space left on the disk", "free some space, or send the output elsewhere")
        _silence_stdout()
        return 1
    except Exception as error:  # noqa: BLE001 - the last stop: told in one line, never hidden
        return _unexpected(error, debug)
    return 0


def _unexpected(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first = next(iter(str(error).splitlines()), "")
    console.error(f"unexpected {type(error).__name__}" + (f": {first}" if first else ""), REPORT_HINT)
    return 1


def _flush(code: int) -> int:
    """Flushes standard output here: at the interpreter's end a closed pipe could only be complained about."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _silence_stdout()
    except OSError as error:  # the output is redirected to a full disk
        console.error(f"cannot write standard output: {error.strerror or error}")
        _silence_stdout()
        return 1
    return code


def _silence_stdout() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


hush()
