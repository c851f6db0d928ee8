"""Data sets of the Hugging Face Hub by name, or a local folder of the same layout, through `datasets`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from physformer_core.data.sources.base import Candidate, Origin, Part, Reader, StreamedPart, cut
from physformer_core.data.sources.files import fingerprint
from physformer_core.data.sources.rows import Columns, choose_columns
from physformer_core.errors import ConfigError, DataError, PhysFormerError
from physformer_core.project import PROJECT_FILE

_ROW_NAMES = ("__url__", "__key__")
_NETWORK_HINT = (
    "check the network (HF_ENDPOINT names a mirror, HF_TOKEN opens gated sets) and run the same command again: "
    "what is fetched is kept"
)


def open_huggingface(
    location: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    data_files: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
    image_column: str | None = None,
    caption_column: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    license: str | None = None,
) -> HuggingFaceReader:
    """Opens a data set of the Hub.

    Args:
        location: Its name, "owner/name", or a local folder with the files of one.
        split: Which split; also a part of one as `datasets` writes it, `train[:10%]`, without streaming.
        config_name: Which of its configurations.
        data_files: Pattern of the files to take from it, as `data_512_2M/*.tar`.
        revision: Branch, tag or commit; the newest commit by default.
        streaming: Read examples as they arrive. Otherwise everything is downloaded first, to the cache of `datasets`.
        image_column, caption_column, label_column: As for `open_tables`.
        limit: Look at so many examples at most; with streaming no more than these are downloaded.
        license: Licence of the pictures; that of the data set's card by default.

    Raises:
        ConfigError: A column is not there.
        DataError: There is no such data set, configuration, split or file, or the network fails.
    """
    local = Path(location).is_dir()
    if local and revision is not None:
        raise ConfigError("a folder has no revisions", hint="leave --revision out")
    fingerprint, card_license = _folder_state(Path(location)) if local else _hub_state(location, revision)
    with _translated(location):
        import datasets

        found = datasets.load_dataset(
            location,
            name=config_name,
            data_files=data_files,
            split=split,
            streaming=streaming,
            revision=None if local else fingerprint,
        )
        features = found.features
        # The bytes as they are: verification decodes them, and a broken one must not end the stream.
        for name, feature in (features or {}).items():
            if isinstance(feature, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
        first = next(iter(found), None)
    if first is None:
        raise DataError(f"{location} has no examples in the split {split!r}")
    columns = choose_columns(
        first, image=image_column, captions=caption_column, label=label_column, where=f"{location}, split {split!r}"
    )
    label_feature = (features or {}).get(columns.label) if columns.label is not None else None
    origin = Origin(
        name="huggingface",
        location=location,
        fingerprint=fingerprint,
        options={
            "split": split,
            "config_name": config_name,
            "data_files": data_files,
            "image_column": columns.image,
            "caption_column": list(columns.captions),
            "label_column": columns.label,
            "limit": limit,
        },
        license=license or card_license,
        classes=tuple(getattr(label_feature, "names", None) or ()),
    )
    return HuggingFaceReader(origin, found, columns, limit)


class HuggingFaceReader(Reader):
    """A stream, or a table on this disk. This process reads it."""

    def __init__(self, origin: Origin, dataset: Any, columns: Columns, limit: int | None) -> None:
        self.origin = origin
        self._dataset = dataset
        self._columns = columns
        self._limit = limit

    def count(self) -> int | None:
        if not hasattr(self._dataset, "__len__"):
            # Known all the same where the card says it.
            infos = getattr(self._dataset.info, "splits", None) or {}
            split = infos.get(self.origin.options["split"])
            known = split.num_examples if split is not None and split.num_examples else None
        else:
            known = len(self._dataset)
        if self._limit is None:
            return known
        # A stream of unknown length is most likely longer than what was asked of it.
        return self._limit if known is None else min(known, self._limit)

    def parts(self, first: int, position: dict[str, Any] | None) -> Iterator[Part]:
        row = position["row"] if position is not None else 0
        streamed = not hasattr(self._dataset, "__len__")
        with _translated(self.origin.location):
            if streamed and position is not None:
                self._dataset.load_state_dict(position["stream"])
        for candidates in cut(self._candidates(row, streamed), lambda one: len(one.image or b"")):
            row += len(candidates)
            after: dict[str, Any] = {"row": row}
            if streamed:
                after["stream"] = self._dataset.state_dict()
            yield StreamedPart(tuple(candidates), after)

    def _candidates(self, start: int, streamed: bool) -> Iterator[Candidate]:
        with _translated(self.origin.location):
            rows = iter(self._dataset) if streamed else iter(self._dataset.skip(start))
        number = start
        while self._limit is None or number < self._limit:
            with _translated(self.origin.location):
                row = next(rows, None)
            if row is None:
                return
            split = self.origin.options["split"]
            yield self._columns.candidate(row, f"{split}-{number:09d}", _where(row, number))
            number += 1


def _where(row: Mapping[str, Any], number: int) -> str:
    """Where a row comes from, for people."""
    named = [
        os.path.basename(str(row[name])) if name == "__url__" else str(row[name]) for name in _ROW_NAMES if name in row
    ]
    return ": ".join(named) if named else f"row {number}"


def _folder_state(folder: Path) -> tuple[str, str | None]:
    """(hash of names and sizes, licence) of a local repository."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    inside = ((path.relative_to(folder), path.stat().st_size) for path in paths)
    state = fingerprint(
        (name.as_posix(), size)
        for name, size in inside
        if not any(part.startswith(".") for part in name.parts) and name.name != PROJECT_FILE
    )
    card = folder / "README.md"
    if not card.is_file():
        return state, None
    from huggingface_hub import DatasetCard

    try:
        licenses = DatasetCard.load(card).data.license
    except ValueError as error:
        raise DataError(f"cannot read the card {card}: {error}", hint="correct the YAML at its beginning") from error
    return state, _license_text(licenses)


def _hub_state(name: str, revision: str | None) -> tuple[str, str | None]:
    """(commit, licence) of a data set on the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _translated(name):
        validate_repo_id(name)
        info = HfApi().dataset_info(name, revision=revision, timeout=20)
    card = info.card_data
    return str(info.sha), _license_text(card.license if card is not None else None)


def _license_text(licenses: Any) -> str | None:
    if isinstance(licenses, list):
        return ", ".join(map(str, licenses)) or None
    return str(licenses) if licenses else None


@contextlib.contextmanager
def _translated(location: str) -> Iterator[None]:
    """Turns what `datasets` and the Hub's client raise into one line and what to do."""
    import datasets
    from huggingface_hub import errors

    # The base class of the HTTP client's errors, whichever client this version of the Hub's library is built on.
    client: list[type[Exception]] = [base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    unreachable: tuple[type[Exception], ...] = (
        *(base for base in client if base is not OSError),
        errors.HfHubHTTPError,
        ConnectionError,
        TimeoutError,
    )
    try:
        yield
    except PhysFormerError:
        raise
    except errors.HFValidationError as error:
        raise DataError(
            f"{location!r} is neither a folder nor a name of the Hub", hint="names have the form owner/name"
        ) from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{location} is gated", hint="accept its terms on its page on the Hub, and set HF_TOKEN to your token"
        ) from error
    except (errors.RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"there is no data set {location!r} on the Hub, or it is private",
            hint="check the name; set HF_TOKEN to your token if it is private",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{location} has no such revision", hint="check --revision") from error
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError) as error:
        raise DataError(
            f"{location} has no such data files: {_said(error)}", hint="check --data-files, or leave it out"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise DataError(
            f"{location} is not on this machine, and the Hub is not asked in offline mode",
            hint="unset HF_HUB_OFFLINE, or give a local folder with its files",
        ) from error
    except unreachable as error:
        raise DataError(f"cannot reach the Hub for {location}: {_said(error)}", hint=_NETWORK_HINT) from error
    except (ValueError, OSError, EOFError, datasets.exceptions.DatasetsError) as error:
        # An unknown configuration or split says which ones there are; a broken file says which it is.
        raise DataError(
            f"cannot read {location}: {_said(error)}", hint="check --split, --config-name and --data-files"
        ) from error


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
