"""Doing a recorded run again, elsewhere, and comparing what comes out byte for byte (by SHA-256)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from physformer_core.errors import ConfigError, OutputError, PhysFormerError
from physformer_core.project import PROJECT_FILE, PROJECT_VARIABLE, Project, RunRecord

_LAUNCHER = (sys.executable, "-P", "-m", "physformer_cli")  # without the user's folder among what is imported from


@dataclasses.dataclass(frozen=True)
class ComparedOutput:
    """One output of a run and of its replay.

    Args:
        path: As the run recorded it; for a file that only the replay wrote, that file.
        recorded: The SHA-256 in the record, or None.
        replayed: The SHA-256 of the replay, or None.
    """

    path: str
    recorded: str | None
    replayed: str | None

    @property
    def agrees(self) -> bool:
        """Whether both have the same bytes."""
        return self.recorded is not None and self.recorded == self.replayed


def replay_run(
    project: Project, record: RunRecord, folder: Path, *, launcher: Sequence[str] = _LAUNCHER
) -> list[ComparedOutput]:
    """Runs a recorded command again, with its output sent to `folder`, and compares the outputs in their order.

    The command runs in the folder that it ran in, with the settings that `physformer.toml` had then, in a project of
    its own (`folder`/physformer.toml), so that the user's file and outputs stay untouched. Its messages go to
    standard error; what it prints on standard output is dropped.

    Args:
        project: Where the record comes from.
        record: The run.
        folder: An existing empty folder.
        launcher: What starts the command line.

    Returns:
        One entry per output.

    Raises:
        ConfigError: The run cannot be replayed: it did not end well, has no outputs, or its folder is gone.
        OutputError: The replayed command failed.
    """
    directory = project.record_folder / record.directory
    if not record.replay.output_option:
        raise ConfigError(f"{record.command!r} cannot be replayed", hint="it does not say where its output goes")
    if record.status != "ok" or not record.outputs:
        why = f"it {record.status}" if record.status != "ok" else "it wrote nothing"
        raise ConfigError(
            f"run {record.id} cannot be replayed: {why.replace('it interrupted', 'it was interrupted')}",
            hint=f"run it anew: {record.command_line}",
        )
    if not directory.is_dir():
        raise ConfigError(
            f"run {record.id} cannot be replayed: its folder {directory} is gone",
            hint="its prompt files and data are looked for there",
        )

    replay_project = folder / PROJECT_FILE
    if record.settings:
        import tomli_w

        replay_project.write_text(tomli_w.dumps(record.settings), encoding="utf-8")
    else:
        replay_project.touch()
    ending = subprocess.run(
        [*launcher, *replay_arguments(record, folder / "outputs")],
        cwd=directory,
        env={**os.environ, PROJECT_VARIABLE: str(replay_project)},
        input=(record.replay.stdin or "").encode(),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if ending.returncode in (130, 143, -2, -15):
        raise KeyboardInterrupt
    if ending.returncode != 0:
        raise OutputError(
            f"the replayed command failed with exit code {ending.returncode}", hint="its own message stands above"
        )
    runs = Project.load(replay_project).runs
    if not runs:
        raise PhysFormerError(f"the replayed command {record.command!r} recorded nothing")
    return compare(record, runs[-1])


def replay_arguments(record: RunRecord, folder: Path) -> list[str]:
    """The recorded arguments with the output sent to `folder`, and the pinned ones added.

    Args:
        record: The run; `record.replay.output_option` has the option's spellings.
        folder: Where the output goes; made here. A folder of the output's name is the command's to make.
    """
    spellings = record.replay.output_option
    left_out = (*spellings, *record.replay.dropped)
    arguments: list[str] = []
    rest: list[str] = []
    given = iter(record.argv)
    for argument in given:
        if argument == "--":
            rest = ["--", *given]
        elif argument in left_out:
            next(given, None)
        elif any(
            argument.startswith(f"{spelling}=" if spelling.startswith("--") else spelling) for spelling in left_out
        ):
            continue
        else:
            arguments.append(argument)
    target = folder / Path(record.replay.output).name
    folder.mkdir(parents=True, exist_ok=True)
    value = f"{target}{os.sep}" if record.replay.output_is_folder else str(target)
    return [*arguments, spellings[0], value, *record.replay.pinned, *rest]


def compare(record: RunRecord, again: RunRecord) -> list[ComparedOutput]:
    """Pairs the outputs of a run and its replay in the order they were written."""
    compared: list[ComparedOutput] = []
    for index in range(max(len(record.outputs), len(again.outputs))):
        before = record.outputs[index] if index < len(record.outputs) else None
        after = again.outputs[index] if index < len(again.outputs) else None
        path = before.path if before is not None else after.path if after is not None else ""
        compared.append(ComparedOutput(path, before.sha256 if before else None, after.sha256 if after else None))
    return compared
