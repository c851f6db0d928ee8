"""The command itself: help without heavy imports, errors as one line and a hint, exit codes."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.main import get_command

from physformer_cli import console, main
from physformer_core.errors import SizeError
from physformer_core.version import __version__

HEAVY = ("torch", "numpy", "transformers", "datasets", "diffusers", "PIL", "scipy", "pyarrow")

# Every page there is, found by walking the commands, so that a new command is held to the rule at once.
HELP_PAGES = """
import contextlib, io, sys
from typer.main import get_command
from physformer_cli.main import app

def pages(command, words):
    yield words
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from pages(command.get_command(None, name), [*words, name])

root = get_command(app)
count = 0
for words in list(pages(root, [])):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            root(args=[*words, "--help"], prog_name="physformer")
        except SystemExit as ending:
            assert ending.code == 0, words
    assert "Usage" in text.getvalue(), words
    if words and "Commands" not in text.getvalue():
        assert "Examples" in text.getvalue(), f"{words} has no examples"
    count += 1
assert count > 4
loaded = sorted(name for name in sys.argv[1].split(",") if name in sys.modules)
assert not loaded, f"--help imports {loaded}"
"""


@pytest.fixture
def app(monkeypatch):
    """A copy of the application to which a test can add commands that go wrong."""
    scratch = typer.Typer(pretty_exceptions_enable=False)
    scratch.callback()(main._root)
    monkeypatch.setattr(main, "app", scratch)
    monkeypatch.delenv("PHYSFORMER_DEBUG", raising=False)
    cached = console.stderr
    cached.cache_clear()  # pytest has replaced sys.stderr since
    yield scratch
    cached.cache_clear()


def physformer(*arguments, **options):
    return subprocess.run(["physformer", *arguments], capture_output=True, text=True, check=False, **options)


def test_no_help_page_imports_anything_heavy():
    ending = subprocess.run([sys.executable, "-c", HELP_PAGES, ",".join(HEAVY)], capture_output=True, text=True)
    assert ending.returncode == 0, ending.stderr


def test_the_list_of_commands_says_what_they_say_of_themselves():
    root = get_command(main.app)
    for name, entry in main.COMMANDS.items():
        said = root.get_command(None, name).help
        assert " ".join(said.split("\n\n")[0].split()) == entry.summary
    assert set(root.commands) == set(main.COMMANDS)


def test_only_the_command_that_was_named_is_built():
    root = get_command(main.app)
    assert root.get_command(None, "info").name == "info" and list(root.commands) == ["info"]
    assert root.get_command(None, "nonsense") is None and set(root.commands) == set(main.COMMANDS)


def test_a_misspelt_command_is_guessed():
    ending = physformer("genrate")
    assert ending.returncode == 2 and "Did you mean 'generate'?" in ending.stderr


def test_the_console_script():
    ending = physformer("--version")
    assert (ending.returncode, ending.stdout, ending.stderr) == (0, f"physformer {__version__}\n", "")
    again = subprocess.run([sys.executable, "-m", "physformer_cli", "--version"], capture_output=True, text=True)
    assert again.stdout == ending.stdout


def test_usage_errors_exit_2():
    for arguments in (["nonsense"], ["--nonsense"], ["info"], ["runs", "list", "--limit", "x"]):
        ending = physformer(*arguments)
        assert ending.returncode == 2 and ending.stdout == "" and "Traceback" not in ending.stderr


def test_an_error_is_one_line_and_a_hint(tmp_path):
    ending = physformer("info", str(tmp_path / "none.png"))
    assert ending.returncode == 1 and ending.stdout == ""
    assert ending.stderr == f"error: cannot read {tmp_path}/none.png: No such file or directory\n"
    (tmp_path / "a.png").write_text("text")
    ending = physformer("info", str(tmp_path / "a.png"))
    assert ending.stderr.splitlines() == [
        f"error: {tmp_path}/a.png is not a PNG file",
        "hint: metadata is kept in PNG files only",
    ]


def test_debug_shows_the_traceback(tmp_path):
    ending = physformer("info", "none.png", cwd=tmp_path, env={**os.environ, "PHYSFORMER_DEBUG": "1"})
    assert ending.returncode == 1 and "Traceback" in ending.stderr and "error: cannot read" in ending.stderr


def test_a_long_message_stays_one_line(app, capfd):
    @app.command()
    def go():
        raise SizeError("[bold]x[/bold] " + "long " * 100, hint="do [this]")

    assert main.main(["go"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: [bold]x[/bold] long") and lines[1] == "hint: do [this]"


def test_an_unexpected_error_says_where_to_report(app, capfd):
    @app.command()
    def go():
        raise RuntimeError("boom\nmore")

    assert main.main(["go"]) == 1
    err = capfd.readouterr().err
    assert (
        err.startswith("error: unexpected RuntimeError: boom\nhint: ")
        and "report" in err
        and "PHYSFORMER_DEBUG=1" in err
    )
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (KeyboardInterrupt(), 130),
        (typer.Exit(3), 3),
        (BrokenPipeError(), 0),
        (OSError(errno.EPIPE, "Broken pipe"), 0),
    ],
)
def test_other_endings(app, capfd, monkeypatch, fault, code):
    @app.command()
    def go():
        raise fault

    monkeypatch.setattr(main, "_silence_stdout", lambda: 0)
    assert main.main(["go"]) == code
    assert capfd.readouterr().err.strip() == ""


SLEEPER = """
import sys, time, typer
from physformer_cli import main
from physformer_core.files import atomic_write
from physformer_core.project import recorded_run

@main.app.command()
def sleep():
    with recorded_run("generate"), atomic_write("a.png") as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
main.run()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_no_half_file_and_a_record(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, "sleep"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PHYSFORMER_PROJECT"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".physformer.toml.lock", "physformer.toml"]
    assert 'status = "interrupted"' in (tmp_path / "physformer.toml").read_text()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_to_a_full_disk(unbuffered):
    with open("/dev/full", "w") as full:
        ending = subprocess.run(
            ["physformer", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert ending.returncode == 1 and ending.stderr.startswith("error: ") and ending.stderr.count("\n") <= 2
    assert "o space left" in ending.stderr and "unexpected" not in ending.stderr


@pytest.mark.parametrize("length", [10, 10**7])  # found closed at the flush, and in the middle
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(length, unbuffered):
    code = (
        "import sys; from physformer_cli import main\n"
        "def spew():\n"
        "    sys.stdin.read()\n"
        f"    print('x' * {length})\n"
        "main.app.command()(spew); main.run()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "spew"], env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, **pipes
    )
    process.stdout.close()
    process.stdin.close()  # only now does it print
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_no_color_and_pipes_have_no_escapes(tmp_path):
    for extra in ({}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        ending = physformer("info", "none.png", cwd=tmp_path, env={**os.environ, **extra})
        assert "\x1b[31m" not in ending.stderr and "31m" not in ending.stderr


def test_human_numbers():
    assert [console.human_size(n) for n in (0, 999, 1500, 37_400_000, 2_500_000_000, 999_600)] == [
        "0 B",
        "999 B",
        "1.5 KB",
        "37 MB",
        "2.5 GB",
        "1.0 MB",
    ]
    assert [console.human_time(s) for s in (0.4, 12.34, 59.97, 185, 7620)] == [
        "0.40 s",
        "12.3 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]


def test_progress_without_a_terminal_is_lines(app, capfd):
    with console.progress() as add:
        task = add("draw", 4, unit="pictures")
        for done in range(1, 5):
            task.update(done, 4)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("draw: 4/4, ") and lines[0].endswith(" pictures/s")


def test_progress_on_a_terminal_is_bars(app, monkeypatch):
    import io

    from rich.console import Console

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "stderr", lambda: terminal)
    with console.progress() as add:
        task = add("draw [x]", 4)
        task.update(2)
        task.advance()
        task.describe("paint")
        task.advance()
    assert "paint" in terminal.file.getvalue() and "4/4" in terminal.file.getvalue()


def test_json_on_an_ascii_terminal_is_escaped(tmp_path):
    code = "from physformer_cli.console import print_json; print_json({'a': 'Vögel'})"
    ending = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert "V\\u00f6gel" in ending.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_that_does_not_fit_loses_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    console.print_table(("ID", "STATUS", "WHAT"), [("abcdef", "finished", "a whole sentence")])
    assert "a whole sentence" in sys.stdout.getvalue() and "finished" in sys.stdout.getvalue()


def test_a_table_on_a_terminal_fits_it(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.print_table(("ID", "STATUS", "WHAT"), [("abcdef", "ok", "[b]x[/b] " * 9)], styles={"ok": "green"})
    head, row = sys.stdout.getvalue().splitlines()
    assert "STATUS" in head and "abcdef" in row and "[b]x" in row and "\x1b[32mok" in row
    shown = re.sub(r"\x1b\[[0-9;]*m", "", row)
    assert len(shown) == 30 and shown.endswith("…")
