"""Where raw sets come from: the sources that `physformer data fetch SOURCE [LOCATION]` knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from physformer_core.data.scenes.fetch import fetch_scenes
from physformer_core.data.sources.folder import open_folder
from physformer_core.data.sources.huggingface import open_huggingface
from physformer_core.data.sources.tables import open_tables
from physformer_core.data.sources.webdataset import open_webdataset
from physformer_core.data.sources.writing import FetchProgress, write_raw_set
from physformer_core.errors import ConfigError, DataError

_COLUMNS = ("image_column", "caption_column", "label_column")


@dataclasses.dataclass(frozen=True)
class Source:
    """A place that captioned pictures come from.

    Args:
        name: What it is called on the command line.
        summary: What it holds, in a few words.
        unit: What is counted.
        options: Names of the options it takes.
        open: Opens pictures that exist: `open(location, **options) -> Reader`. None for a source that composes them.
        compose: Writes a raw set of pictures that it makes itself, or what of it is missing, and returns its manifest:
            `compose(output_dir, *, progress, workers, **options)`. It calls `progress(done, total)` before it does
            anything, and never when all is there already.
        location: What its location is, for messages; None if it has none.
        defaults: Values of options that must have one.
    """

    name: str
    summary: str
    unit: str
    options: tuple[str, ...]
    open: Callable[..., Any] | None = None
    compose: Callable[..., dict[str, Any]] | None = None
    location: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "scenes",
            "captioned scenes composed of Twemoji's vector art",
            "scenes",
            ("count", "seed", "aspect", "held_out_pairs", "pair_share", "variation"),
            compose=fetch_scenes,
            defaults={"count": 36_000, "seed": 0},
        ),
        Source(
            "folder",
            "pictures with text files, a metadata file, or in a sub-folder per class",
            "pictures",
            ("captions", "caption_column", "label_column", "limit", "license"),
            open=open_folder,
            location="a folder",
        ),
        Source(
            "huggingface",
            "a data set of the Hugging Face Hub by name",
            "examples",
            (
                "split",
                "config_name",
                "data_files",
                "revision",
                "streaming",
                *_COLUMNS,
                "limit",
                "license",
            ),
            open=open_huggingface,
            location="a name, owner/name, or a local folder of that layout",
        ),
        Source(
            "webdataset",
            "WebDataset tars",
            "examples",
            (*_COLUMNS, "limit", "license"),
            open=open_webdataset,
            location="a tar, a folder of tars, or a pattern",
        ),
        Source(
            "parquet",
            "Parquet or Arrow files with encoded pictures",
            "rows",
            (*_COLUMNS, "limit", "license"),
            open=open_tables,
            location="a file, a folder of files, or a pattern",
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
    location: str | None = None,
    workers: int = 1,
    options: Mapping[str, Any] | None = None,
    progress: FetchProgress | None = None,
) -> Fetched:
    """Writes a raw set from a source by name; what was interrupted goes on where it stopped.

    Args:
        name: One of `SOURCES`.
        output_dir: Folder of the set; made if missing.
        location: Where the source's pictures are: a folder, a pattern, a name.
        workers: Processes. They do not change the result.
        options: Options of this source; those that are None or empty are left out.
        progress: Called with (examples done, examples in all, None if nobody knows).

    Raises:
        ConfigError: The source does not take an option or a location, or lacks one.
        DataError: The source is unknown or cannot be read, a number is out of range, or the folder holds another set.
        OutputError: The folder cannot be written.
    """
    source = find_source(name)
    given = {key: value for key, value in (options or {}).items() if value is not None and value != []}
    for key in given:
        if key not in source.options:
            raise ConfigError(
                f"source {name!r} takes no option {_spelled(key)}",
                hint="it takes " + ", ".join(map(_spelled, source.options)),
            )
    if location is None and source.location is not None:
        raise ConfigError(f"source {name!r} needs a location: {source.location}", hint=f"fetch {name} LOCATION")
    if location is not None and source.location is None:
        raise ConfigError(f"source {name!r} takes no location", hint=f"leave {location!r} out")
    worked = False

    def note(done: int, total: int | None) -> None:
        nonlocal worked
        worked = True
        if progress is not None:
            progress(done, total)

    given = {**source.defaults, **given}
    if source.compose is not None:
        manifest = source.compose(output_dir, progress=note, workers=workers, **given)
    else:
        assert source.open is not None
        manifest = write_raw_set(source.open(location, **given), output_dir, workers=workers, progress=note)
    return Fetched(manifest, worked)


def _spelled(option: str) -> str:
    return "--" + option.replace("_", "-")
