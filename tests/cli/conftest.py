"""Commands run in this process, each test in an empty folder of its own."""

import sys

import pytest

from physformer_cli import console, main


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
