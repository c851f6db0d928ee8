"""Every example runs, as its user would run it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, cwd: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr


def test_five_lines(tmp_path: Path) -> None:
    run("five_lines.py", "out.png", cwd=tmp_path)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (256, 256)
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 60  # not a blank field


def test_contact_sheet(tmp_path: Path, tiny_checkpoint: Path) -> None:
    arguments = ["sheet.png", "--checkpoint", str(tiny_checkpoint), "--size", "64x64", "--seeds", "2"]
    run("contact_sheet.py", *arguments, cwd=tmp_path)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 7 * 64 and sheet.width > 2 * 64


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the judge has to be fitted first where it never was
def test_which_level(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "which_level.py"), "--num", "2"]
    command += ["--concepts", "cat,dog", "--size", "64x64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1750, check=True)
    assert [line.split("top-1")[0].strip() for line in done.stdout.splitlines()] == [
        "drawn from level 0", "drawn from level 1",
    ]  # fmt: skip


def blind_test(*arguments: str, folder: Path, said: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / "blind_test.py"), *arguments]
    done = subprocess.run(command, cwd=folder, input=said, capture_output=True, text=True, timeout=1750, check=True)
    return done.stdout


def test_sheets_of_the_blind_test_tell_nothing(tmp_path: Path) -> None:
    blind_test("draw", "blind", "--num", "1", "--relations", "2", "--size", "64x64", folder=tmp_path)
    written = sorted(path.name for path in (tmp_path / "blind").iterdir())
    assert written == ["000.png", "001.png", "002.png", "answers.txt", "asked.json", "sheet-00.png"]
    assert (tmp_path / "blind" / "answers.txt").read_text() == "0: \n1: \n2: \n"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the judge has to be fitted first where it never was
def test_answers_of_the_blind_test_are_counted(tmp_path: Path) -> None:
    blind_test("draw", "blind", "--num", "1", "--relations", "2", folder=tmp_path)
    (tmp_path / "blind" / "answers.txt").write_text("0: something\n1: \n2: a dog\n")
    told = blind_test("score", "blind", folder=tmp_path, said="y\nn\n").splitlines()
    assert "single subjects: 100% of 1 told" in told[-2] and "pairs, cages: 0% of 2 told" in told[-1]


@pytest.mark.slow
def test_the_whole_way_goes_on_where_it_was(tmp_path: Path) -> None:
    script, told = EXAMPLES / "train_nano.sh", {"PRESET": "debug", "SCENES": "60", "BATCH": "4", "PROMPTS": "0"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def trained(**more: str) -> str:
        environment = os.environ | told | {"PATH": path, **more}
        done = subprocess.run(
            ["bash", str(script), "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stderr

    trained(STEPS="3")
    weights = tmp_path / "out" / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    first = weights.read_bytes()
    assert "nothing to do" in trained(STEPS="3") and weights.read_bytes() == first
    assert "going on from" in trained(STEPS="5", DEVICE="cpu") and weights.read_bytes() != first
    steps = sorted(path.name for path in (tmp_path / "out" / "run" / "checkpoints").iterdir())
    assert steps[-1] == "step-00000005"


def test_slurm_script(tmp_path: Path) -> None:
    """The script as far as it runs without Slurm, whose commands, and torchrun, just say what they are given."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{tmp_path}:$PATH"\n')
    for name, lines in {
        "scontrol": "printf 'one\\ntwo\\n'",
        "srun": 'exec "$@"',
        "torchrun": "printf '%s\\n' \"$@\"",
        "physformer": "exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    script = EXAMPLES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(
        ["bash", str(script), "--preset", "xl"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[:4] == ["--nnodes", "2", "--nproc-per-node", "4"] and "one:23456" in words
    assert words[words.index(str(tmp_path / "physformer")) + 1] == "train" and words[-2:] == ["--preset", "xl"]
    assert "auto" in words


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "form", ["text-files", "metadata-jsonl", "metadata-csv", "classes", "webdataset", "parquet", "repository"]
)
def test_solar_cells(tmp_path: Path, form: str) -> None:
    run("solar_cells.py", "cells", "--limit", "30", "--forms", form, cwd=tmp_path)
    manifest = json.loads((tmp_path / "cells" / "raw" / form / "manifest.json").read_text("utf-8"))
    assert manifest["count"] == (27 if form == "repository" else 30) and not manifest["refused"]
    assert "NC-SA" in manifest["license"]
    assert (tmp_path / "cells" / "reports" / form / "index.html").exists()


def test_ablation(tmp_path: Path, scene_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after its first run, it makes only the one that is missing."""
    size = "--hidden 64 --layers 1 --batch 2 --crop 32 --rounds 1 --timed-steps 1 --validation-batches 1"
    arguments = [str(scene_set), "out", *size.split(), "--minutes", "0.001", "--seeds", "3"]
    arguments += ["--variants", "plain", "leapfrog"]
    run("ablation.py", *arguments, cwd=tmp_path)
    results = tmp_path / "out" / "results.json"
    state = json.loads(results.read_text(encoding="utf-8"))
    assert [run["variant"] for run in state["runs"]] == ["plain", "leapfrog"]
    seconds = [run["steps"] * state["step_seconds"][run["variant"]] for run in state["runs"]]
    assert all(abs(s - 0.06) <= 2 * max(state["step_seconds"].values()) for s in seconds)
    state["runs"][0]["losses"]["all"] = 123.0
    del state["runs"][1]
    results.write_text(json.dumps(state), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ablation.py", *arguments])
    runpy.run_path(str(EXAMPLES / "ablation.py"), run_name="__main__")  # here, torch has been imported
    table = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8")
    assert table.count("\n") == 4 and "| 123.0000 | +0.0 % |" in table and "| leapfrog |" in table
    with Image.open(tmp_path / "out" / "ablation.png") as plot:
        assert plot.width == 1600


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in source] == []
