"""The `physformer` command: registers the subcommands and turns errors into messages and exit codes.

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
from typing import Annotated

import typer

from physformer_cli import console
from physformer_core.chatter import hush
from physformer_core.errors import PhysFormerError
from physformer_core.version import __version__

# In the order of the help page. Each has `register(app)`, and imports nothing heavier than typer at its top: the core
# is imported inside the functions, so that every help page is there at once.
COMMAND_MODULES = (
    "physformer_cli.generate",
    "physformer_cli.data",
    "physformer_cli.train",
    "physformer_cli.evaluate",
    "physformer_cli.bench",
    "physformer_cli.export",
    "physformer_cli.quantize",
    "physformer_cli.doctor",
    "physformer_cli.info",
    "physformer_cli.runs",
)

DEBUG_VARIABLE = "PHYSFORMER_DEBUG"
REPORT_HINT = (
    f"this is a fault of physformer: please report it with the output of the same command under {DEBUG_VARIABLE}=1, "
    "which shows the traceback"
)


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); unwinds like Ctrl-C, so that no half file stays behind."""


app = typer.Typer(
    name="physformer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
for _module in COMMAND_MODULES:
    importlib.import_module(_module).register(app)
