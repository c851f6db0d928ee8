"""The example workflows are YAML of the form that GitHub reads, and the commands in them are ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from physformer_cli import main

WORKFLOWS = sorted((Path(__file__).parent.parent / "examples" / "github-actions").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_valid(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"]
    assert True in workflow or "on" in workflow  # YAML 1.1 reads the key `on` as a truth value
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_in_workflows_parse(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    scripts = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    lines = "\n".join(scripts).replace("\\\n", " ").splitlines()
    commands = [found[1] for line in lines if (found := re.search(r"(?:^|/)physformer (.*)", line.strip()))]
    assert commands
    for text in commands:
        words = shlex.split(text.split(">")[0])
        command, rest = typer.main.get_command(main.app), words
        while hasattr(command, "commands"):
            command, rest = command.get_command(None, rest[0]), rest[1:]
        command.make_context(words[0], list(rest), resilient_parsing=False)
