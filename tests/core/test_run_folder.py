"""Names of checkpoints in a run's folder."""

from pathlib import Path

from physformer_core.run_folder import name_of_folder, step_folder, step_of_folder, steps_in


def test_names_and_steps_are_inverse():
    assert step_folder(1150) == "step-00001150" and step_of_folder(Path("a") / step_folder(1150)) == 1150
    for other in ("step-1150", "step-000011500", ".step-00001150.removed", "checkpoints"):
        assert step_of_folder(Path(other)) is None


def test_only_what_holds_something_is_a_checkpoint(tmp_path):
    for step in (30, 4, 200):
        (tmp_path / step_folder(step)).mkdir()
    for name in ("step-00000030", "step-00000004"):
        (tmp_path / name / "state.json").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").touch()
    assert [path.name for path in steps_in(tmp_path, holding="state.json")] == ["step-00000004", "step-00000030"]
    assert steps_in(tmp_path / "missing", holding="state.json") == []


def test_a_checkpoint_is_called_by_its_run():
    assert name_of_folder(Path("/runs/birds/checkpoints/step-00000030")) == "birds/step-00000030"
    assert name_of_folder(Path("/runs/birds/step-00000030")) == "birds/step-00000030"
    assert name_of_folder(Path("/runs/birds")) == "birds"
