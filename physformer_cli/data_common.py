"""Options and steps that the commands of `physformer data` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from physformer_cli import console

WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes. They do not change the result.", show_default="one per processor"),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="What is to be trained, or its file: whole pictures have its sizes.",
        show_default="nano",
    ),
]
BucketsOption = Annotated[
    str | None,
    typer.Option(
        help="WIDTHxHEIGHT,... of level-0 pictures, in elements of the field.",
        show_default="the preset's: 32x32 and six with that shorter side, up to 72x32",
    ),
]


def worker_count(given: int | None, settings: dict[str, Any]) -> int:
    from physformer_core.errors import ConfigError

    if given is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = int(settings.get("workers", available))
    if given < 1:
        raise ConfigError(f"workers must be at least 1, not {given}", hint="physformer.toml, [data]")
    return given


def numbers(option: str, text: str, kind: Callable[[str], Any], *, hint: str | None = None) -> list[Any]:
    from physformer_core.errors import ConfigError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} takes numbers with commas between them, not {text!r}", hint=hint) from None


def sizes_of_whole_pictures(preset: str | None, buckets: str | None) -> tuple[tuple[int, int], ...]:
    """(height, width) of the whole pictures that are asked for, those of the preset nano if nothing is."""
    from physformer_core.config import load_preset
    from physformer_core.errors import ConfigError

    if buckets is None:
        return load_preset(preset or "nano").pyramid().training_sizes()
    if preset is not None:
        raise ConfigError("--preset has no effect beside --buckets", hint="both say which sizes whole pictures have")
    return _buckets(buckets)


_BUCKETS_HINT = "for example --buckets 64x64,96x48"


def _buckets(text: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of each WIDTHxHEIGHT."""
    sides = [numbers("--buckets", part.replace("x", ","), int, hint=_BUCKETS_HINT) for part in text.split(",")]
    if any(len(pair) != 2 for pair in sides):
        from physformer_core.errors import ConfigError

        raise ConfigError(f"--buckets takes WIDTHxHEIGHT with commas between them, not {text!r}", hint=_BUCKETS_HINT)
    return tuple((height, width) for width, height in sides)


class _Show(Protocol):
    def __call__(self, stage: str, done: int, total: int | None) -> None: ...


def progress_of(add: Callable[..., console.ProgressTask], stages: dict[str, tuple[str, str]]) -> _Show:
    """Progress by stage: a bar appears when its stage begins, and does not count what an earlier run did as speed."""
    tasks: dict[str, console.ProgressTask] = {}

    def show(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            description, unit = stages[stage]
            tasks[stage] = add(description, total, unit=unit, done=done if total is None or done < total else 0)
        tasks[stage].update(done, total)

    return show


def manifest_hash(folder: Path) -> str | None:
    from physformer_core.files import sha256_file

    path = folder / "manifest.json"
    return sha256_file(path) if path.is_file() else None
