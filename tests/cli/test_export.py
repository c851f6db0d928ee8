"""`physformer export`, as a person calls it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from physformer_core.checkpoints import find_checkpoint
from physformer_core.project import Project

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_the_mean_of_a_checkpoint_and_itself_is_itself(physformer, tiny_checkpoint, tmp_path):
    code, _, err = physformer(
        "export", tiny_checkpoint, "--mean-with", tiny_checkpoint, "--mean-with", tiny_checkpoint,
        "--output", tmp_path / "mean", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0, err
    mean, own = load_file(tmp_path / "mean" / WEIGHTS), load_file(tiny_checkpoint / WEIGHTS)
    for name, values in own.items():
        torch.testing.assert_close(mean[name], values)
    record = Project.load("physformer.toml").runs[-1]
    assert record.config["mean_with"] == [find_checkpoint(tiny_checkpoint).sha256] * 2
    code, out, err = physformer("runs", "replay", "last")
    assert code == 0 and out.startswith("agrees: "), err


def test_what_has_no_mean_is_told_in_a_line(physformer, tiny_checkpoint, tmp_path):
    code, _, err = physformer("export", tiny_checkpoint, "--mean-with", tmp_path / "none", "-o", tmp_path / "mean")
    assert code == 1 and err.strip().splitlines()[-2].startswith("error: ") and not (tmp_path / "mean").exists()
