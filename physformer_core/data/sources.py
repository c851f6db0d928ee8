"""Where raw sets come from: the sources that `physformer data fetch NAME` knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from physformer_core.data.scenes.fetch import fetch_scenes
from physformer_core.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Source:
    """A place that captioned pictures come from.

    Args:
        name: What it is called on the command line.
        summary: What it holds, in a few words.
        fetch: Writes the raw set, or what of it is missing, and returns its manifest: `fetch(output_dir, *, count,
            seed, progress, workers, **options)`. It calls `progress(done, total)` before it does anything, and never
            when all is there already.
        unit: What is counted.
        options: Names of the keyword options that `fetch` takes besides the common ones.
    """

    name: str
    summary: str
    fetch: Callable[..., dict[str, Any]]
    unit: str
    options: tuple[str, ...] = ()


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "scenes",
            "captioned scenes composed of Twemoji's vector art",
            fetch_scenes,
            "scenes",
            ("aspect",),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What `fetch` did.

    Args:
        manifest: The raw set's manifest.
        fresh: False if all was there already and nothing was done.
    """

    manifest: dict[str, Any]
    fresh: bool


def find_source(name: str) -> Source:
    """The source of that name.

    Raises:
        DataError: There is none.
    """
    if name not in SOURCES:
        known = "; ".join(f"{source.name} ({source.summary})" for source in SOURCES.values())
        raise DataError(f"unknown source {name!r}", hint=f"known ones: {known}")
    return SOURCES[name]


def fetch(
    name: str,
    output_dir: str | Path,
    *,
    count: int,
    seed: int,
    workers: int = 1,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fetched:
    """Writes a raw set from a source by name; what was interrupted goes on where it stopped.

    Args:
        name: One of `SOURCES`.
        output_dir: Folder of the set; made if missing.
        count: Examples wanted.
        seed: Seed of what is drawn or chosen.
        workers: Processes. They do not change the result.
        options: Options of this source alone; those that are None are left out.
        progress: Called with (examples done, examples in all).

    Raises:
        ConfigError: The source does not take an option.
        DataError: The source is unknown, a number is out of range, or the folder holds another set.
        OutputError: The folder cannot be written.
    """
    source = find_source(name)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in given:
        if key not in source.options:
            raise ConfigError(
                f"source {name!r} takes no option {key!r}",
                hint="it takes " + ", ".join(source.options) if source.options else "it takes none of its own",
            )
    worked = False

    def note(done: int, total: int) -> None:
        nonlocal worked
        worked = True
        if progress is not None:
            progress(done, total)

    manifest = source.fetch(output_dir, count=count, seed=seed, progress=note, workers=workers, **given)
    return Fetched(manifest, worked)
