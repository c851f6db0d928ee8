"""Commands run in this process, each test in an empty folder of its own."""

import sys
from collections import namedtuple
from pathlib import Path

import pytest

import physformer_core.pipeline
from physformer_cli import console, main
from physformer_core.text import load_text_encoder


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PHYSFORMER_PROJECT", raising=False)
    console.stderr.cache_clear()  # pytest has replaced sys.stderr since
    yield
    console.stderr.cache_clear()


@pytest.fixture
def physformer(monkeypatch, capfd):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["physformer", *arguments])
        code = main.main(arguments)
        return code, *capfd.readouterr()

    return call


# `physformer generate`


@pytest.fixture(scope="session")
def encoder():
    return load_text_encoder("minilm")


@pytest.fixture
def drawing_in_an_empty_folder(tmp_path, monkeypatch, encoder):
    """As `in_an_empty_folder`, one below, and with the text encoder loaded once: half a second each."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("PHYSFORMER_PROJECT", raising=False)
    monkeypatch.delenv("PHYSFORMER_DEBUG", raising=False)
    monkeypatch.setattr(physformer_core.pipeline, "load_text_encoder", lambda *_: encoder)
    console.stderr.cache_clear()


Ending = namedtuple("Ending", "code out err files")


@pytest.fixture
def generate(tiny_checkpoint, drawing_in_an_empty_folder, capfd):
    """Draws small pictures here; gives the exit code, what was printed, and the files that were named."""

    def run(*arguments, size=("-W", "96", "-H", "64", "--steps", "2"), checkpoint=tiny_checkpoint) -> Ending:
        capfd.readouterr()
        chosen = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        code = main.main(["generate", *arguments, *size, *chosen])
        out, err = capfd.readouterr()
        assert "Traceback" not in err and "unexpected" not in err, err
        return Ending(code, out, err, [Path(line) for line in out.splitlines() if line.endswith(".png")])

    return run
