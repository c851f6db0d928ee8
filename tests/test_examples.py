"""Every example runs, as its user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in source] == []
