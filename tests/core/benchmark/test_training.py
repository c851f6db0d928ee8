"""A few real steps of both trainers: what is counted and reported, never how fast they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from physformer_core.benchmark.networks import peer_network
from physformer_core.benchmark.training import PlainTrainer, compose_data, measure_training, peer_layers
from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream, ShardSet
from physformer_core.errors import ConfigError
from physformer_core.model.transformer import PhysFormerTransformer2DModel


def test_peer_has_as_many_parameters_as_ours() -> None:
    with torch.device("meta"):
        ours = PhysFormerTransformer2DModel(**load_preset("nano").of_one_network().model)
        parameters = sum(p.numel() for p in ours.parameters())
        layers = peer_layers(dict(ours.config), parameters)
        peer = sum(p.numel() for p in peer_network("dense", dict(ours.config), layers).parameters())
    assert peer == pytest.approx(parameters, rel=0.06)


def test_the_plain_trainer_learns(scene_set: Path) -> None:
    torch.manual_seed(0)
    shards = ShardSet(scene_set)
    config = dict(PhysFormerTransformer2DModel(**load_preset("debug").model).config)
    trainer = PlainTrainer(peer_network("dense", config), torch.device("cpu"), torch.float32, lr=2e-3)
    batch = BatchStream(shards, seed=0, batch_size=4, crop_fraction=0.0).batch(0)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)  # the same times and noise: only the weights change
        losses.append(trainer.step(batch).item())
    assert losses[-1] < 0.9 * losses[0]


def test_both_do_their_steps(scene_set: Path) -> None:
    config = load_preset("debug").override("training", batch_size=4, compile=False, crop_fraction=0.5)
    seen: list[int] = []
    report = measure_training(config, scene_set, preset="debug", steps=3, warmup=2, device="cpu", on_step=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    ours, peer = report["ours"], report["peer"]
    assert report["ratio"] == pytest.approx(peer["seconds"] / ours["seconds"])
    assert ours["images_per_second"] == pytest.approx(4 / ours["seconds"])
    assert 0 <= ours["wait_share"] < 1 and ours["matrix_share"] > 0 and ours["flops"] > 0
    assert ours["seconds"] == pytest.approx((2 * ours["seconds_by_kind"]["base"] + ours["seconds_by_kind"]["crop"]) / 3)
    kinds = {kind: peer["seconds_by_kind"][kind] / ours["seconds_by_kind"][kind] for kind in ("base", "crop")}
    assert report["ratio_by_kind"] == pytest.approx(kinds)
    areas = [group.size[0] * group.size[1] // 64 for group in ShardSet(scene_set).groups("base", "train")]
    assert min(areas) <= report["tokens"]["base"]["picture"] <= max(areas)
    assert ours["peak_bytes"] is None and peer["peak_bytes"] is None  # one process, one heap
    assert report["recorded"] is False
    assert report["tokens"]["crop"]["picture"] == (config.training.crop_size // 8) ** 2
    assert report["dtype"] == "fp32" and not report["compiled"] and report["what"] == "train"


@pytest.mark.parametrize(("area", "side", "crop"), [(4096, 64, 48), (1024, 32, 256)])
def test_composed_data_begin_where_the_preset_does(tmp_path: Path, area: int, side: int, crop: int) -> None:
    config = load_preset("debug").override("flow", base_area=area).override("training", crop_size=crop)
    shards = ShardSet(compose_data(tmp_path, config))
    assert [group.size for group in shards.groups("base", "train")] == [(side, side)]
    smallest = min(min(group.size) for group in shards.groups("crop", "train"))
    assert smallest >= config.training.crop_size


def test_no_steps_are_refused(scene_set: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        measure_training(load_preset("debug"), scene_set, preset="debug", steps=0, warmup=1)
