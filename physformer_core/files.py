"""Files that are either whole or not there: atomic writes, names that never overwrite, and hashes."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

from physformer_core.errors import DataError, OutputError

# Names that `next_free_name` took with an empty file and that nothing has been written to yet.
_unfilled_claims: set[Path] = set()


def cache_folder() -> Path:
    """Where derived data is kept between commands: XDG_CACHE_HOME/physformer, else ~/.cache/physformer."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "physformer"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it becomes `path`, on any exception it is removed.

    The temporary name keeps the suffix, so that writers that choose a format by the suffix work. Missing parent
    folders are made. The content is synced before the rename and the folder after it, so that after a power cut
    there is the old file or the new one, never a part. An existing `path` is replaced: take a name from
    `next_free_name` first where nothing may be overwritten.

    Args:
        path: The file to write.

    Yields:
        The path to write to. The caller opens and closes it.

    Raises:
        OutputError: The folder cannot be written, the disk is full, or `path` is a folder.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
        # Fail before the caller computes anything: reserve the temporary name now.
        temporary = final.with_name(f".{final.stem[:100]}.{secrets.token_hex(6)}.tmp{final.suffix}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        _drop_claim(final)
        raise output_error(final, error) from error

    try:
        try:
            yield temporary
        except OSError as error:
            if not _concerns_output(error, temporary):
                raise
            raise output_error(final, error) from error
        try:
            _sync(temporary)
            os.replace(temporary, final)
            _unfilled_claims.discard(final.absolute())
            _sync_folder(final.parent)
        except OSError as error:
            raise output_error(final, error) from error
    except BaseException:  # KeyboardInterrupt too: no half file stays behind
        temporary.unlink(missing_ok=True)
        _drop_claim(final)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`; on success it becomes `path`, on any exception it is removed.

    All files in it are synced before the rename, and the parent folder after it, as by `atomic_write`. Its name begins
    with a dot and the name of `path`, by which what a killed process leaves can be told and swept away.

    Args:
        path: A folder that does not exist, or no longer does when the caller is done.

    Yields:
        The folder to write into.

    Raises:
        OutputError: It cannot be written, or the disk is full, also where a library tells of that in words alone
            ("... (os error 28)", as safetensors does).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        temporary.mkdir()
    except OSError as error:
        raise output_error(path, error) from error
    try:
        try:
            yield temporary
        except Exception as error:
            told = error if isinstance(error, OSError) else _system_error(error)
            if told is None or (told.filename is not None and not _concerns_output(told, temporary)):
                raise
            raise output_error(path, told) from error
        try:
            for file in [inner for inner in temporary.rglob("*") if inner.is_file()]:
                # safetensors writes for the owner alone; who may read the folder may read what is in it.
                file.chmod(temporary.stat().st_mode & 0o666)
                _sync(file)
            temporary.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise output_error(path, error) from error
    except BaseException:  # KeyboardInterrupt too: no half folder stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _system_error(error: Exception) -> OSError | None:
    """The system's error that another one's words end in."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing into the same folder meanwhile.

    A folder that is not there is made, and removed again if nothing came into it.
    The lock is the kernel's: of a process that was killed nothing stays but an empty file.

    Raises:
        OutputError: One is writing it, or it cannot be written.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock", timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(f"{folder} is being written by another process", hint="wait until it is done") from error
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        yield
    finally:
        # While it is held, so that nobody has just taken what goes.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
            if made:
                folder.rmdir()
        lock.release()


def next_free_name(path: str | Path, *, claim: bool = True, taken: Container[Path] = ()) -> Path:
    """Returns `path`, or the first of `stem_1.suffix`, `stem_2.suffix`, ... that does not exist.

    The name is claimed by creating an empty file exclusively, so that processes side by side get different names;
    write it with `atomic_write`. A claim that nothing was written to is removed by a failing `atomic_write` and at
    the end of the process; take the name when the content is ready, so that a killed process leaves none.

    Args:
        path: The wished name. Missing parent folders are made when claiming.
        claim: False only looks (for a dry run).
        taken: Names that count as existing.

    Raises:
        OutputError: The folder cannot be made or written.
    """
    wished = Path(path)
    number = 0
    while True:
        candidate = wished if number == 0 else wished.with_name(f"{wished.stem}_{number}{wished.suffix}")
        number += 1
        if candidate in taken or os.path.lexists(candidate):
            continue
        if not claim:
            return candidate
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError as error:
            if error.filename is not None and Path(error.filename) != candidate:
                raise output_error(candidate, error) from error  # a parent is a file
            continue
        except OSError as error:
            raise output_error(candidate, error) from error
        _unfilled_claims.add(candidate.absolute())
        return candidate


def sha256_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def output_error(path: Path, error: OSError) -> OutputError:
    """Turns the operating system's refusal to write `path` into a message with a hint."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no space left on the disk while writing {path}",
            hint="free some space, or choose a folder on another disk; nothing half-written was left behind",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"cannot write {path}: {os.strerror(error.errno).lower()}",
            hint=f"choose a folder that you may write to, or change the rights of {path.parent}",
        )
    if error.errno == errno.EISDIR:
        return OutputError(f"cannot write {path}: it is a folder", hint="give the name of a file")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(f"cannot write {path}: a part of its path is a file, not a folder", hint="check the path")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def _concerns_output(error: OSError, temporary: Path) -> bool:
    """Whether an OSError raised while writing is about the output, not about some other file the writer read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return error.filename is not None and Path(os.fsdecode(error.filename)).absolute().is_relative_to(
        temporary.absolute()
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder, and a folder may be writable but not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


def _drop_claim(path: Path) -> None:
    """Removes the empty file by which this process claimed `path`, if it still is empty."""
    path = path.absolute()
    if path not in _unfilled_claims:
        return
    _unfilled_claims.discard(path)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == 0:
            path.unlink()


@atexit.register
def _drop_all_claims() -> None:
    for path in list(_unfilled_claims):
        _drop_claim(path)
