"""`physformer doctor`: what it says, what it calls a fault, and that it repairs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from physformer_core import diagnosis
from physformer_core.checkpoints import find_checkpoint
from physformer_core.diagnosis import OptionalPackage, diagnose, speeds
from physformer_core.model.native.ops import why_not as native_why_not

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_a_sound_installation(physformer) -> None:
    code, out, err = physformer("doctor", "--quick", "--device", "cpu", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["versions"]["torch"] == torch.__version__ and report["speeds"] == {} and report["faults"] == []
    assert [one["state"] for one in report["weights"]] == ["verified", "verified"]
    assert find_checkpoint(None).sha256[:12] in report["weights"][0]["detail"]
    native, why = report["kernels"]["backends"]["native (in C, CPU, float32)"]
    assert (native, why) == (native_why_not() is None, native_why_not())
    assert report["kernels"]["attention"] == ("native" if native else "halo")
    assert not report["kernels"]["backends"]["flex (fused, CUDA)"][0]
    assert {one["name"] for one in report["optional"]} >= {"torchao", "peft"}


@pytest.mark.usefixtures("without_native")
def test_without_kernels_in_c_it_says_why(physformer) -> None:
    code, out, _ = physformer("doctor", "--quick", "--device", "cpu")
    assert code == 0 and "halo" in out and "left out by a test" in " ".join(out.split())


def test_what_is_missing_is_said_with_the_way_to_get_it(physformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "OPTIONAL", (OptionalPackage("no-such-package", "magic", "spells"),))
    code, out, _ = physformer("doctor", "--quick", "--no-record")
    assert code == 0 and 'missing: magic; pip install "physformer[spells]"' in out
    assert not Path("physformer.toml").exists()


def test_a_damaged_part_is_a_fault(physformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("physformer_core.checkpoints.SHIPPED_NAME", "nothing")
    code, out, err = physformer("doctor", "--quick", "--json")
    assert code == 1 and json.loads(out)["faults"] and "no trained weights" in err and "hint: reinstall" in err


def test_speeds_are_measured() -> None:
    found = speeds(torch.device("cpu"))
    assert found["gflops"]["fp32"] > 0.01 and found["gigabytes"] > 0.01


def test_cache_sizes_count_files_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "physformer"
    folder.mkdir()
    (folder / "a").write_bytes(b"12345")
    (folder / "b").symlink_to(folder / "a")
    assert diagnose("cpu", measure=False)["caches"][0]["bytes"] == 5
