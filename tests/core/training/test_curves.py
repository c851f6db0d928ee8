"""Loss curves from a run's log."""

import json

import numpy as np
import pytest

from physformer_core.errors import DataError
from physformer_core.training.curves import draw_curves, read_curves


def write(path, steps, **extra):
    with path.open("a") as file:
        for step in steps:
            losses = {"crop" if step % 40 == 0 else "base": 1 / step, **extra}
            file.write(json.dumps({"step": step, "losses": losses}) + "\n")


def test_curves_of_a_run_that_was_killed_and_resumed(tmp_path):
    log = tmp_path / "log.jsonl"
    write(log, range(20, 201, 20))
    write(log, range(140, 301, 20), validation_base=0.5)
    log.write_text(log.read_text() + '{"step": 320, "los')
    curves = {(curve.kind, curve.validation): curve for curve in read_curves(log)}
    assert curves.keys() == {("base", False), ("base", True), ("crop", False)}
    base = curves["base", False]
    assert base.steps.tolist() == list(range(20, 301, 40)) and base.losses.tolist() == [1 / s for s in base.steps]
    assert curves["base", True].steps.tolist() == list(range(140, 301, 20))


def test_what_is_no_log(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(DataError, match="cannot read"):
        read_curves(log)
    log.write_text("")
    with pytest.raises(DataError, match="no losses yet"):
        read_curves(log)
    log.write_text('nonsense\n{"step": 1, "losses": {}}\n')
    with pytest.raises(DataError, match="line 1"):
        read_curves(log)


@pytest.mark.parametrize("steps", [range(20, 21), range(20, 2001, 20)])
def test_the_picture(tmp_path, steps):
    log = tmp_path / "log.jsonl"
    write(log, steps, validation_crop=0.3)
    picture = draw_curves(read_curves(log), title="runs/nano")
    pixels = np.asarray(picture).astype(int)
    assert picture.size == (1100, 640)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).sum()
    orange = (pixels[..., 0] - pixels[..., 2] > 60).sum()
    assert blue > 50 and orange > 50
