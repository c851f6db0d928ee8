"""`physformer init`, `runs list|show|replay` and `info`, through the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from physformer_cli.replay import compare, replay_arguments, replay_run
from physformer_core.errors import ConfigError, OutputError
from physformer_core.project import Project, Replay, RunOutput, RunRecord, append_run

# A command with the manners of the real ones, small enough to run often. It stands in the command line of every
# process that this file starts, by way of the `sitecustomize` module below.
COMMAND = """
import os, sys, typer
from pathlib import Path
from physformer_cli import main

def draw(prompt: str, output: str = typer.Option("", "--output", "-o"), seed: int = typer.Option(-1, "--seed"),
         fault: str = typer.Option("", "--fault"), read: bool = typer.Option(False, "--read")):
    from physformer_core.files import atomic_write, next_free_name
    from physformer_core.project import recorded_run
    with recorded_run("generate") as run:
        steps = run.settings.get("steps", 1)
        given = sys.stdin.read() if read else ""
        if read:
            run.read_stdin(given)
        if seed < 0:
            seed = int.from_bytes(os.urandom(4), "big")
            run.pin("--seed", str(seed))
        folder = output == "" or output.endswith("/")
        run.replay_with("--output", "-o", output=output or "drawn/", folder=folder)
        print("data on standard output")
        for number in range(2):
            wished = Path(output or "drawn/") / f"{number}.txt" if folder else Path(output)
            name = next_free_name(wished)
            with atomic_write(name) as temporary:
                extra = os.environ.get("DRIFT", "")
                temporary.write_text(f"{prompt} {seed} {number} {steps} {given} {extra} {Path.cwd().name}")
            run.add_output(name)
        run.seeds = [seed]
        run.config = {"prompt": prompt, "steps": steps}
        if os.environ.get("FAULT"):
            raise RuntimeError("boom")

class Module:
    register = staticmethod(lambda app: app.command("generate")(draw))

Module.register(main.app)
main.run()
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("PHYSFORMER_PROJECT", raising=False)
    (tmp_path / "command.py").write_text(COMMAND)


@pytest.fixture
def launcher(tmp_path):
    return [sys.executable, str(tmp_path / "command.py")]


def call(launcher, *arguments, **options):
    options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, check=False, **options)


def physformer(*arguments):
    return call(["physformer"], *arguments)


def record(**values) -> RunRecord:
    return RunRecord(
        **{"id": "20260101-000000-aaaaaa", "time": "t", "command": "generate", "argv": ["generate"]} | values
    )


def replayed(launcher, tmp_path, run_id="last"):
    project = Project.load("physformer.toml")
    folder = tmp_path / "again"
    folder.mkdir()
    return replay_run(project, project.find_run(run_id), folder, launcher=launcher)


def test_init(tmp_path):
    ending = physformer("init", "new/folder")
    assert ending.returncode == 0 and ending.stdout == "" and "created new/folder/physformer.toml" in ending.stderr
    Project.load("new/folder/physformer.toml")
    ending = physformer("init", "new/folder")
    assert ending.returncode == 1 and "exists already" in ending.stderr


def test_without_a_project():
    for arguments in (["list"], ["show", "last"], ["replay", "last"]):
        ending = physformer("runs", *arguments)
        assert ending.returncode == 1 and "hint: physformer init" in ending.stderr
    assert not Path("physformer.toml").exists()


def test_a_malformed_file_is_told_with_line_and_column():
    Path("physformer.toml").write_text("[generate]\nsteps = = 3\n")
    ending = physformer("runs", "list")
    assert ending.returncode == 1 and "line 2, column 9" in ending.stderr and "Traceback" not in ending.stderr


def test_list_and_show():
    physformer("init")
    assert physformer("runs", "list").stdout == ""
    for number, status in enumerate(("ok", "failed", "interrupted")):
        argv = ["generate", "a [bold]bird\n" + "long " * 50, "--seed", str(number)]
        append_run("physformer.toml", record(id=f"20260101-000000-aaaaa{number}", status=status, argv=argv))
    append_run("physformer.toml", record(id="20260101-000001-bbbbbb", command="data fetch", argv=["data", "fetch"]))
    lines = physformer("runs", "list").stdout.splitlines()
    assert lines[0].split() == ["ID", "STATUS", "TOOK", "OUTPUTS", "COMMAND"] and len(lines) == 5
    assert "a [bold]bird long" in lines[1] and "interrupted" in lines[3] and "physformer data fetch" in lines[4]
    assert len(physformer("runs", "list", "--command", "data").stdout.splitlines()) == 2
    found = json.loads(physformer("runs", "list", "--json", "--status", "ok", "-n", "1").stdout)
    assert [one["id"] for one in found] == ["20260101-000001-bbbbbb"]
    assert physformer("runs", "list", "--status", "okay").returncode == 1

    shown = physformer("runs", "show", "aaaaa1").stdout
    assert 'status = "failed"' in shown and shown.startswith("# physformer generate")
    assert json.loads(physformer("runs", "show", "aaaaa1", "--json").stdout)["status"] == "failed"
    ending = physformer("runs", "show", "zzz")
    assert ending.returncode == 1 and "no run 'zzz'" in ending.stderr


@pytest.mark.parametrize("output", [[], ["-o", "out/"], ["--output=deep/a.txt"], ["-oa.txt"], ["--output", "a.txt"]])
def test_a_replay_agrees_and_touches_nothing(launcher, tmp_path, output):
    assert call(launcher, "generate", "a bird", *output).returncode == 0
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    compared = replayed(launcher, tmp_path)
    assert len(compared) == 2 and all(one.agrees for one in compared)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_replay_imports_nothing_of_the_users(tmp_path):
    Path("secrets.py").write_text("raise SystemExit('the user's own')")
    ending = physformer("data", "fetch", "scenes", "--count", "3", "--seed", "1", "--output", "s")
    assert ending.returncode == 0, ending.stderr
    ending = physformer("runs", "replay", "last")
    assert ending.returncode == 0 and "agrees: 2 of 2" in ending.stdout, ending.stderr


def test_a_replay_has_the_settings_of_then_and_the_same_input(launcher, tmp_path):
    Path("physformer.toml").write_text("[generate]\nsteps = 5\n")
    assert call(launcher, "generate", "a bird", "--read", input="from stdin é").returncode == 0
    text = Path("physformer.toml").read_text()
    Path("physformer.toml").write_text(text.replace("steps = 5", "steps = 6", 1))
    assert all(one.agrees for one in replayed(launcher, tmp_path))


def test_a_replay_runs_in_the_folder_of_then(launcher, tmp_path, monkeypatch):
    assert call(["physformer"], "init").returncode == 0
    Path("sub").mkdir()
    assert call(launcher, "generate", "a", cwd="sub").returncode == 0
    assert all(one.agrees for one in replayed(launcher, tmp_path))
    os.rename("sub", "gone")
    with pytest.raises(ConfigError, match="is gone"):
        project = Project.load("physformer.toml")
        replay_run(project, project.runs[0], tmp_path / "again", launcher=launcher)


def test_a_replay_that_differs_is_told(launcher, tmp_path, monkeypatch):
    call(launcher, "generate", "a")
    monkeypatch.setenv("DRIFT", "other")
    compared = replayed(launcher, tmp_path)
    assert [one.agrees for one in compared] == [False, False]


def test_a_replay_that_fails_is_told(launcher, tmp_path, monkeypatch):
    call(launcher, "generate", "a")
    monkeypatch.setenv("FAULT", "1")
    with pytest.raises(OutputError, match="exit code 1"):
        replayed(launcher, tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "cannot be replayed"),
        ({"replay": Replay(("--output",), "x"), "status": "failed"}, "it failed"),
        ({"replay": Replay(("--output",), "x"), "status": "interrupted"}, "it was interrupted"),
        ({"replay": Replay(("--output",), "x")}, "it wrote nothing"),
    ],
)
def test_what_cannot_be_replayed(values, words):
    append_run("physformer.toml", record(**values))
    ending = physformer("runs", "replay", "last")
    assert ending.returncode == 1 and words in ending.stderr


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("drift", ["", "x"])
def test_the_replay_command(launcher, tmp_path, monkeypatch, drift, as_json):
    call(launcher, "generate", "a")
    monkeypatch.setenv("DRIFT", drift)
    # The command under test starts `python -m physformer_cli`; here that must know the command above.
    package = tmp_path / "path" / "physformer_cli"
    package.mkdir(parents=True)
    code = (
        "import sys\n"
        "from physformer_cli import replay, main\n"
        f"replay.replay_run.__kwdefaults__['launcher'] = {launcher!r}\n"
        "main.run()\n"
    )
    ending = call([sys.executable, "-c", code], "runs", "replay", "last", "--keep", "kept", *["--json"] * as_json)
    assert ending.returncode == (3 if drift else 0), ending.stderr
    assert "replaying: physformer generate a" in ending.stderr
    if as_json:
        found = json.loads(ending.stdout)
        assert found["agrees"] is (not drift) and len(found["outputs"]) == 2
    elif drift:
        assert ending.stdout.splitlines()[-1] == "does not agree: 0 of 2 outputs have the same bytes"
        assert ending.stdout.startswith("differs  drawn/0.txt")
    else:
        assert ending.stdout == "agrees: 2 of 2 outputs have the same bytes\n"
    assert sorted(path.name for path in Path("kept").rglob("*.txt")) == ["0.txt", "1.txt"]
    again = call([sys.executable, "-c", code], "runs", "replay", "last", "--keep", "kept")
    assert again.returncode == 1 and "not empty" in again.stderr


def test_other_versions_are_warned_of():
    append_run("physformer.toml", record(versions={"torch": "0.1"}))
    assert "warning: the run had torch 0.1, this is" in physformer("runs", "replay", "last").stderr


def test_a_missing_output_does_not_agree():
    before = record(outputs=[RunOutput("a", "1"), RunOutput("b", "2")])
    after = record(outputs=[RunOutput("x", "1")])
    assert [one.agrees for one in compare(before, after)] == [True, False]
    assert [(one.path, one.agrees) for one in compare(after, before)] == [("x", True), ("b", False)]


def test_arguments_of_a_replay(tmp_path):
    argv = ["generate", "-o", "a.png", "--seed", "1", "--output=b.png", "--outputs", "x", "--", "-o", "bird"]
    argv[1:1] = ["--from", "x", "--from=y"]
    replay = Replay(("--output", "-o"), "deep/b.png", pinned=["--device", "cpu"], dropped=["--from"])
    run = record(argv=argv, replay=replay)
    assert replay_arguments(run, tmp_path) == [
        *["generate", "--seed", "1", "--outputs", "x", "--output", f"{tmp_path}/b.png", "--device", "cpu"],
        *["--", "-o", "bird"],
    ]
    run.replay.output, run.replay.output_is_folder = ".", True
    assert replay_arguments(run, tmp_path)[6] == f"{tmp_path}/"


def test_info(tmp_path):
    from PIL import Image

    from physformer_core.metadata import PictureMetadata, save_png

    metadata = PictureMetadata(prompt="a bird", seed=7, width=4, height=2, steps=3, extra={"dtype": "float32"})
    for name in ("a.png", "b.png"):
        save_png(name, Image.new("RGB", (4, 2)), metadata)
    shown = physformer("info", "a.png").stdout.splitlines()
    assert shown[0] == "a.png" and [line.split() for line in shown if "seed" in line] == [["seed", "7"]]
    assert any(line.split() == ["dtype", "float32"] for line in shown)
    found = json.loads(physformer("info", "--json", "a.png", "b.png").stdout)
    assert [one["file"] for one in found] == ["a.png", "b.png"] and found[1]["prompt"] == "a bird"
    assert found[0]["extra"] == {"dtype": "float32"}
