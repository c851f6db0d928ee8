"""Where a training run keeps its checkpoints: ``RUN/checkpoints/step-NNNNNNNN``."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"

_STEP = re.compile(r"step-(\d{8})")


def step_folder(step: int) -> str:
    """Name of the folder of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def step_of_folder(folder: Path) -> int | None:
    """The step that a folder's name tells; None of any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps_in(folder: Path, *, holding: str) -> list[Path]:
    """Checkpoints in a folder that hold a file or folder of this name, oldest first.

    A checkpoint is renamed into place when it is whole, so all of them are whole.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if step_of_folder(path) is not None and (path / holding).exists())


def name_of_folder(folder: Path) -> str:
    """RUN/step-NNNNNNNN of a run's checkpoint, else the folder's own name."""
    folder = folder.absolute()
    if step_of_folder(folder) is None:
        return folder.name
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
    return f"{run.name}/{folder.name}"
