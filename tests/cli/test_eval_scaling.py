"""`physformer eval scaling` on a table: what it prints, draws, records and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from physformer_core.project import Project

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def table(rows: int = 9) -> Path:
    lines = ["name,parameters,examples,loss"]
    for number in range(rows):
        n, d = 10.0 ** (5 + number // 3), 10.0 ** (4 + number % 3)
        lines.append(f"run{number},{n},{d},{0.1 + 20 * n**-0.4 + 5 * d**-0.3}")
    path = Path("runs.csv")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_is_fitted_drawn_and_recorded(physformer) -> None:
    code, out, err = physformer(
        "eval", "scaling", table(), "--budget", 1e15, "--plot", "s.png", "--samples", 20, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["law"]["size_exponent"] == pytest.approx(0.4, abs=0.02)
    assert report["predictions"][0]["flops"] == 1e15 and report["predictions"][0]["extrapolated"]
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    record = Project.load("physformer.toml").runs[-1]
    assert record.command == "eval scaling" and [output.path for output in record.outputs] == ["s.png"]
    code, out, _ = physformer("eval", "scaling", table(), "--samples", 20)
    assert code == 0 and "BEST PARAMETERS" in out and "size exponent" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", 1), "either finished runs or a set"),
        (("runs.csv", "--train", "set"), "either finished runs or a set"),
        (("--train", "set"), "no folder for the runs"),
        (("runs.csv", "--sizes", "32x2"), "--sizes has no effect"),
        (("runs.csv", "--loss", "crop"), "--loss has no effect"),
        (("--train", "set", "-o", "runs", "--examples", "many"), "not a list"),
        (("--train", "set", "-o", "runs", "--examples", "2000,4000"), "2 amounts of data are too few"),
        (("--train", "set", "-o", "runs", "--loss", "crop"), "--loss has no effect"),
        (("runs.csv", "--device", "cpu"), "--device has no effect"),
        (("runs.csv", "--budget", 0), "--budget 0 is no number of operations"),
        (("runs.csv", "--budget", "nan"), "--budget nan is no number of operations"),
        (("runs.csv", "--loss", "typo"), "unknown loss 'typo'"),
        (("--train", "set", "-o", "runs", "--sizes", "33x2"), "33 is not possible"),
        (("nowhere",), "cannot read"),
    ],
)
def test_what_is_refused(physformer, options: tuple[object, ...], words: str) -> None:
    table()
    code, _, err = physformer("eval", "scaling", *options)
    assert code == 1 and words in err and "hint:" in err
    assert not Path("runs").exists()


def test_without_a_best_size_the_rest_is_told(physformer) -> None:
    """Of models that do not gain from their size; the table is as a spreadsheet writes it."""
    lines = ["\ufeffname, parameters, examples, loss"]
    lines += [f"{n:g}/{d:g}, {n}, {d}, {0.1 + 5 * d**-0.3}" for n in (1e5, 1e6, 1e7) for d in (1e4, 1e5, 1e6)]
    Path("flat.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, err = physformer("eval", "scaling", "flat.csv", "--samples", 20, "--plot", "f.png")
    assert code == 0 and "data exponent" in out and "BEST PARAMETERS" not in out, err
    assert "there is no best size" in err and "wrote f.png" in err and Path("f.png").exists()
    code, _, err = physformer("eval", "scaling", "flat.csv", "--samples", 20, "--budget", 1e15)
    assert code == 1 and "there is no best size" in err


def test_a_small_table_is_refused(physformer) -> None:
    code, _, err = physformer("eval", "scaling", table(rows=4))
    assert code == 1 and "too few" in err
