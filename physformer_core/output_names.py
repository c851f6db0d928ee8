"""What pictures are called: a file, a folder, or a pattern with fields in braces."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import string
import unicodedata
from pathlib import Path

from physformer_core.errors import OutputError
from physformer_core.files import output_error

DEFAULT_OUTPUT = "outputs/"
FIELDS = ("prompt", "seed", "index", "number", "width", "height")

_SUFFIX = ".png"
_MAX_SLUG_BYTES = 100
_MAX_NAME_BYTES = 230  # file systems allow 255; `_1`, `_level0` and the temporary name come on top


class OutputNames:
    """Names for the pictures of one command.

    Args:
        output: `NAME.png`, a folder (ends with a slash, exists as one, or has no suffix), or a pattern: a file's name
            with any of `FIELDS` in braces, for example `{prompt}/{seed}-{index:03d}.png`.
        several: Whether a seed has several pictures, so that names in a folder need the index too.

    Raises:
        OutputError: The suffix is not .png, or the pattern has an unknown field.
    """

    def __init__(self, output: str = DEFAULT_OUTPUT, *, several: bool = False) -> None:
        self.output = output
        self.is_folder = output.endswith(("/", os.sep)) or os.path.isdir(output) or not Path(output).suffix
        default = "{prompt}-{seed}-{index}.png" if several else "{prompt}-{seed}.png"
        self._pattern = str(Path(_escaped(output)) / default) if self.is_folder else output
        if self.is_folder and "{" in output:
            raise OutputError(
                f"the pattern {output!r} names no file", hint=f"end it with a name, for example {output}{{seed}}.png"
            )
        _check_pattern(self._pattern)
        # Where names on the lines of a prompt file start from: the part of the path without fields.
        fixed = output if self.is_folder else output.partition("{")[0]
        self.base = Path(output) if self.is_folder else Path(fixed[: fixed.rfind("/") + 1] or ".")

    def name(
        self,
        *,
        prompt: str,
        seed: int,
        index: int,
        number: int,
        width: int,
        height: int,
        override: str | None = None,
    ) -> Path:
        """The wished name of a picture; the real one may get `_1`, `_2`, ... behind it.

        Args:
            prompt, seed, index, width, height: Of the picture; `index` counts the pictures of a seed from 0.
            number: Counts the pictures of the command, from 1.
            override: A name or pattern of its own, relative to the folder of the others.

        Raises:
            OutputError: `override` is malformed, or the name is too long.
        """
        pattern = self._pattern
        if override is not None:
            _check_pattern(override)
            pattern = str(Path(_escaped(str(self.base))) / override)
        values = {"prompt": slug(prompt), "seed": seed, "index": index, "number": number}
        try:
            path = Path(pattern.format(**values, width=width, height=height))
        except (ValueError, OverflowError, LookupError, AttributeError) as error:  # a field within a format
            raise OutputError(f"the output pattern {pattern!r} is malformed: {error}", hint=_PATTERN_HINT) from error
        if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
            raise OutputError(f"the file name {path.name[:60]}... is too long", hint=f"at most {_MAX_NAME_BYTES} bytes")
        return path


def slug(prompt: str) -> str:
    """A prompt as a part of a file name: letters and digits, dashes between, at most 100 bytes."""
    text = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower()).strip("-")
    return text.encode()[:_MAX_SLUG_BYTES].decode(errors="ignore").strip("-") or "picture"


def check_picture(what: str, option: str, path: Path) -> None:
    """Refuses a picture's name that is not a PNG file's.

    Raises:
        OutputError: ``what`` would not be one; ``option`` names it.
    """
    if path.suffix.lower() != ".png":
        name = path.with_suffix(".png") if path.name else path / "picture.png"
        raise OutputError(f"{what} is a PNG file, not {str(path.name or path)!r}", hint=f"{option} {name}")


def check_folder(folder: Path, *, needed_bytes: int = 0, create: bool = True) -> None:
    """Finds out before the work whether a folder can be written and has room.

    Args:
        folder: Made if it is not there.
        needed_bytes: Space that must be free.
        create: False only looks: nothing is made or written (for a dry run).

    Raises:
        OutputError: It cannot be made or written, or the disk is too full.
    """
    existing = folder.absolute()
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            # Rights alone do not tell: a file system may be read-only or full.
            probe = folder / f".{secrets.token_hex(6)}.tmp"
            try:
                probe.write_bytes(b"physformer")
            finally:
                probe.unlink(missing_ok=True)
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
        if shutil.disk_usage(existing).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(existing))
    except OSError as error:
        raise output_error(folder, error) from error


_PATTERN_HINT = "fields are " + ", ".join(f"{{{name}}}" for name in FIELDS) + "; write {{ for a brace"


def _check_pattern(pattern: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise OutputError(f"the output pattern {pattern!r} is malformed: {error}", hint=_PATTERN_HINT) from error
    for field in fields:
        if field not in FIELDS:  # attributes and items too: only the bare names
            raise OutputError(f"the output pattern {pattern!r} has an unknown field {{{field}}}", hint=_PATTERN_HINT)
    if Path(pattern).suffix.lower() != _SUFFIX:
        raise OutputError(
            f"cannot write {pattern}: pictures are PNG files",
            hint="end the name with .png, or with a slash if it is a folder",
        )


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
