"""physformer.toml: read with care, appended to without loss."""

import datetime
import hashlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from physformer_core import project as project_module
from physformer_core.errors import ConfigError, OutputError, PromptError
from physformer_core.project import (
    Project,
    RunRecord,
    append_run,
    config_sha256,
    create_project,
    find_project,
    new_run_id,
    package_versions,
    read_settings,
    recorded_run,
)
from physformer_core.settings import SETTINGS, template


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PHYSFORMER_PROJECT", raising=False)


def quiet(_line: str) -> None:
    pass


def record(**values) -> RunRecord:
    return RunRecord(
        **{"id": "20260101-000000-aaaaaa", "time": "t", "command": "generate", "argv": ["generate"]} | values
    )


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generate]\nsteps = = 3\n", r"not valid TOML: .*line 2, column 9"),
        ("[generate\n", r"line 1, column 10"),
        ("[generate]\nsteps = 3\nsteps = 4\n", r"not valid TOML: .*line 3"),
        ("\n[generat]\n", r"line 2: unknown table \[generat\]; did you mean 'generate'"),
        ("[generate]\n# x\nstepps = 3\n", r"line 3: unknown key 'stepps' in \[generate\]; did you mean 'steps'"),
        ('[generate]\nsteps = "3"\n', r"line 2: steps must be a whole number or a list of such, not '3'"),
        ("[generate]\nsteps = true\n", r"line 2: steps must be a whole number or a list of such, not True"),
        ("[generate]\nsteps = [3, true]\n", r"line 2: steps must be a whole number or a list of such, not \[3, True"),
        ("[generate]\nsteps = []\n", r"line 2: steps must be a whole number or a list of such, not \[\]"),
        ("[generate]\nseed = [3]\n", r"line 2: seed must be a whole number, not \[3\]"),
        ("[generate]\nguidance = true\n", r"guidance must be a number"),
        ('[generate]\ncompile = "yes"\n', r"compile must be true or false"),
        ('[generate]\ndtype = "float8"\n', r"line 2: dtype = 'float8' is not known"),
        ("generate = 3\n", r"line 1: generate must be a table"),
        ("generate.stepps = 3\n", r"line 1: unknown key 'stepps'"),
        ("runs = 3\n", r"line 1: runs must be \[\[runs\]\] tables"),
        ("[[runs]]\nid = 1\n", r"not a run record"),
        ('[[runs]]\nid = 1\ntime = "t"\ncommand = "c"\nargv = []\n', r"damaged"),
        ('[[runs]]\nid = "1"\ntime = "t"\ncommand = "c"\nargv = []\nstatus = "?"\n', r"damaged"),
    ],
)
def test_a_malformed_file_is_told_with_its_place(text, words):
    Path("physformer.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        Project.load("physformer.toml")
    assert caught.value.hint


def test_unreadable_files():
    with pytest.raises(ConfigError, match="cannot read"):
        Project.load("none.toml")
    Path("a.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Project.load("a.toml")


def test_settings_come_with_their_types_and_absolute_paths(tmp_path, monkeypatch):
    Path("physformer.toml").write_text(
        '\ufeff[generate]\nsteps = [3, 1]\nguidance = 2\noutput = "out/"\ncheckpoint = "a/../b"\n'
        '[train]\noutput = "~/runs/"\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    expected = {"steps": [3, 1], "guidance": 2, "output": f"{tmp_path}/out/", "checkpoint": f"{tmp_path}/b"}
    assert read_settings("generate") == expected
    assert read_settings("train") == {"output": "/home/somebody/runs/"} and read_settings("data") == {}


def test_the_template_is_valid_and_so_is_every_key_uncommented():
    assert tomllib.loads(template()) == {name: {} for name in SETTINGS}
    lines = [line.removeprefix("# ") if " = " in line else line for line in template().splitlines()]
    Path("physformer.toml").write_text("\n".join(lines))
    loaded = Project.load("physformer.toml")
    assert {name: set(table) for name, table in loaded.tables.items()} == {n: set(t) for n, t in SETTINGS.items()}


def test_find(tmp_path, monkeypatch):
    assert find_project() is None and read_settings("generate") == {}
    create_project("physformer.toml")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir("a/b")
    assert find_project() == tmp_path / "physformer.toml"
    monkeypatch.setenv("PHYSFORMER_PROJECT", str(tmp_path / "a"))
    assert find_project() == tmp_path / "a" / "physformer.toml"
    monkeypatch.setenv("PHYSFORMER_PROJECT", str(tmp_path / "my.toml"))
    assert find_project() == tmp_path / "my.toml"


def test_create_never_overwrites():
    create_project("physformer.toml")
    with pytest.raises(OutputError, match="exists already"):
        create_project("physformer.toml")


def test_find_run():
    for name in ("20260101-000000-aaaaaa", "20260101-000000-bbbbbb"):
        append_run("physformer.toml", record(id=name))
    loaded = Project.load("physformer.toml")
    assert loaded.find_run("last").id.endswith("bbbbbb")
    assert loaded.find_run("aaaaaa") == loaded.find_run("20260101-000000-a") == loaded.runs[0]
    with pytest.raises(ConfigError, match="2 runs match"):
        loaded.find_run("2026")
    with pytest.raises(ConfigError, match="no run 'x'"):
        loaded.find_run("x")


# --- appending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "# mine \t\n[generate]\r\nsteps=3 # three", "[generate]\nsteps = 3\n\n\n"])
def test_what_the_user_wrote_stays_byte_for_byte(before):
    path = Path("physformer.toml")
    path.write_bytes(before.encode())
    path.chmod(0o640)
    for _ in range(3):
        append_run(path, record())
    assert path.read_bytes().startswith(before.encode())
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(Project.load(path).runs) == 3


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    create_project("real/p.toml")
    Path("physformer.toml").symlink_to("real/p.toml")
    append_run("physformer.toml", record())
    assert Path("physformer.toml").is_symlink() and len(Project.load("real/p.toml").runs) == 1


def test_paths_of_a_linked_file(tmp_path):
    """Records start from where the file is, as they are one list; settings from where they are read."""
    (tmp_path / "below").mkdir()
    create_project("p.toml")
    Path("p.toml").write_text('[train]\noutput = "runs"\n')
    Path("below/physformer.toml").symlink_to("../p.toml")
    os.chdir("below")
    with recorded_run("train", argv=[], notify=quiet):
        pass
    project = Project.load("physformer.toml")
    assert project.record_folder / project.runs[-1].directory == (tmp_path / "below").resolve()
    assert project.settings("train")["output"] == str(Path.cwd() / "runs")


TEXT = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.dictionaries(TEXT, VALUES, max_size=4), st.lists(TEXT, max_size=4), TEXT)
def test_any_record_is_read_back(config, argv, error):
    written = record(config=config, argv=argv, error=error, settings={"generate": {"steps": 3}})
    text = written.to_toml()
    text.encode()
    again = RunRecord.from_table(tomllib.loads("[generate]\n" + text + text)["runs"][1], source="f")
    assert again.as_dict() == written.as_dict()
    assert config_sha256(again.config) == config_sha256(config)


APPENDER = """
import sys
from physformer_core.project import recorded_run
for number in range(5):
    with recorded_run("generate", argv=["generate", sys.argv[1], str(number)]) as run:
        run.config = {"who": sys.argv[1], "number": number}
"""


def test_sixteen_processes_at_once_lose_nothing():
    user = "# kept\n[generate]\nsteps = 3 # kept too"
    Path("physformer.toml").write_text(user)
    running = [subprocess.Popen([sys.executable, "-c", APPENDER, str(who)]) for who in range(16)]
    assert [process.wait() for process in running] == [0] * 16
    loaded = Project.load("physformer.toml")
    assert sorted((run.config["who"], run.config["number"]) for run in loaded.runs) == sorted(
        (str(who), number) for who in range(16) for number in range(5)
    )
    assert len({run.id for run in loaded.runs}) == 80
    assert Path("physformer.toml").read_text().startswith(user)


def test_sixteen_processes_without_a_file_make_one_together():
    running = [subprocess.Popen([sys.executable, "-c", APPENDER, str(who)]) for who in range(16)]
    assert [process.wait() for process in running] == [0] * 16
    assert len(Project.load("physformer.toml").runs) == 80


def test_a_killed_process_leaves_a_whole_file():
    create_project("physformer.toml")
    endless = "import sys\n" + APPENDER.replace("range(5)", "range(10**9)")
    running = [subprocess.Popen([sys.executable, "-c", endless, "x"]) for _ in range(3)]
    deadline = time.monotonic() + 60
    while not Project.load("physformer.toml").runs and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in running:
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    count = len(Project.load("physformer.toml").runs)
    assert count > 0
    append_run("physformer.toml", record())  # the lock died with its holder
    assert len(Project.load("physformer.toml").runs) == count + 1


def test_a_full_disk_keeps_the_old_file(monkeypatch):
    append_run("physformer.toml", record())
    before = Path("physformer.toml").read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        append_run("physformer.toml", record())
    assert Path("physformer.toml").read_bytes() == before


# --- recorded_run ----------------------------------------------------------------------------------------------------


def test_everything_is_recorded(tmp_path, monkeypatch):
    Path("physformer.toml").write_text("[generate]\nsteps = 3\n")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir("sub")
    argv = ["generate", "a bird", "--seed", "7"]
    with recorded_run("generate", argv=argv, notify=quiet) as run:
        assert run.settings == {"steps": 3}
        run.config = {"steps": 3, "nothing": None, "output": Path("a.png"), "sizes": (1, 2)}
        run.seeds = [7, 2**64 - 1]
        run.checkpoint_sha256, run.data_sha256, run.device = "c" * 64, "d" * 64, "cpu"
        Path("a.png").write_bytes(b"picture")
        run.add_output("a.png")
        run.replay_with("--output", "-o", output="a.png", folder=False)
        run.pin("--seed", "7")
        run.read_stdin("a bird\n")
    (found,) = Project.load(tmp_path / "physformer.toml").runs
    assert found.id == run.id and found.argv == argv and found.status == "ok" and found.error is None
    assert found.config == {"steps": 3, "output": "a.png", "sizes": [1, 2]}
    assert found.config_sha256 == config_sha256(found.config) != ""
    assert found.seeds == [7, 2**64 - 1] and found.settings == {"generate": {"steps": 3}}
    assert (found.checkpoint_sha256, found.data_sha256, found.device) == ("c" * 64, "d" * 64, "cpu")
    assert found.directory == "sub" and found.command_line == "physformer generate 'a bird' --seed 7"
    assert [(one.path, one.sha256) for one in found.outputs] == [("sub/a.png", hashlib.sha256(b"picture").hexdigest())]
    assert found.replay.output_option == ("--output", "-o") and found.replay.stdin == "a bird\n"
    assert found.replay.pinned == ["--seed", "7"] and found.versions == package_versions()
    assert datetime.datetime.fromisoformat(found.time).tzinfo == datetime.UTC and found.duration >= 0


def test_a_folder_of_outputs(tmp_path):
    with recorded_run("data fetch", argv=[], notify=quiet) as run:
        (tmp_path / "out" / "deep").mkdir(parents=True)
        for name in ("b", "a", "deep/c"):
            (tmp_path / "out" / name).write_text(name)
        run.add_output("out")
    assert [one.path for one in Project.load("physformer.toml").runs[0].outputs] == ["out/a", "out/b", "out/deep/c"]


class ExitLike(RuntimeError):
    def __init__(self, code: int) -> None:
        super().__init__()
        self.exit_code = code


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(130), "interrupted", None),
        (SystemExit(0), "ok", None),
        (ExitLike(0), "ok", None),
        (ExitLike(3), "failed", "exit code 3"),
        (PromptError("empty prompt", hint="h"), "failed", "empty prompt"),
        (RuntimeError("one\ntwo"), "failed", "RuntimeError: one"),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_it_is_recorded_however_it_ends(fault, status, error):
    with pytest.raises(type(fault)), recorded_run("generate", argv=[], notify=quiet) as run:
        run.config = {"steps": 1}
        raise fault
    (found,) = Project.load("physformer.toml").runs
    assert (found.status, found.error, found.config) == (status, error, {"steps": 1})


def test_a_run_that_went_on_after_bad_lines_is_failed():
    with recorded_run("generate", argv=[], notify=quiet) as run:
        run.fail("2 of 5 lines were bad")
    (found,) = Project.load("physformer.toml").runs
    assert (found.status, found.error) == ("failed", "2 of 5 lines were bad")


def test_a_missing_file_is_made_and_said(tmp_path):
    said = []
    for _ in range(2):
        with recorded_run("generate", argv=[], notify=said.append):
            assert Path("physformer.toml").exists()  # before the work, not after it
    assert said == [f"created {tmp_path}/physformer.toml to record runs in"]
    assert Path("physformer.toml").read_text().startswith(template())


def test_no_record_needs_no_file(tmp_path):
    with recorded_run("generate", argv=[], record=False) as run:
        run.config = {"steps": 1}
    assert list(tmp_path.iterdir()) == []


def test_no_record_still_reads_settings():
    Path("physformer.toml").write_text("[generate]\nsteps = 3\n")
    with recorded_run("generate", argv=[], record=False) as run:
        assert run.settings == {"steps": 3}
    assert Project.load("physformer.toml").runs == ()


def test_a_malformed_file_stops_before_the_work():
    Path("physformer.toml").write_text("[generate\n")
    with pytest.raises(ConfigError, match="line 1"), recorded_run("generate", argv=[], notify=quiet):
        pytest.fail("the block must not run")


def test_a_folder_that_cannot_be_written_stops_before_the_work(monkeypatch):
    real = os.open

    def refuse(path, *arguments, **options):
        if "physformer" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="cannot record this run") as caught:
        with recorded_run("generate", argv=[], notify=quiet):
            pytest.fail("the block must not run")
    assert "--no-record" in caught.value.hint and "PHYSFORMER_PROJECT" in caught.value.hint


def test_a_file_that_cannot_be_written_stops_before_the_work(monkeypatch):
    create_project("physformer.toml")
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path).endswith(".toml") is False and real(path, mode)
    )  # who runs tests as root may write everything
    with pytest.raises(OutputError, match=r"cannot record this run: .*physformer\.toml is not writable"):
        with recorded_run("generate", argv=[], notify=quiet):
            pytest.fail("the block must not run")


def test_the_first_fault_is_the_one_reported(monkeypatch):
    said = []
    create_project("physformer.toml")

    def refuse(*_):
        raise OutputError("no space")

    monkeypatch.setattr(project_module, "append_run", refuse)
    with pytest.raises(PromptError), recorded_run("generate", argv=[], notify=said.append):
        raise PromptError("empty prompt")
    assert said == ["this run could not be recorded: no space"]
    with pytest.raises(OutputError), recorded_run("generate", argv=[], notify=said.append):
        pass


def test_ids_sort_by_time_and_differ():
    early = datetime.datetime(2026, 1, 31, 14, 25, 3, tzinfo=datetime.UTC)
    ids = [new_run_id(early) for _ in range(1000)]
    assert len(set(ids)) == 1000 and all(name.startswith("20260131-142503-") for name in ids)
    assert max(ids) < new_run_id(early + datetime.timedelta(seconds=1))


def test_undecodable_arguments_are_recorded():
    with pytest.raises(PromptError), recorded_run("generate", argv=["generate", "b\udcffrd"], notify=quiet) as run:
        run.config = {"prompt": "b\udcffrd"}
        raise PromptError("no b\ud800rd")
    (found,) = Project.load("physformer.toml").runs
    assert (found.argv[1], found.config["prompt"], found.error) == ("b?rd", "b?rd", "no b?rd")
