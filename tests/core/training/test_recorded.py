"""Passes that are recorded as CUDA graphs and replayed: the same training as without, where they can be."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from physformer_core.config import load_preset
from physformer_core.data.loader import Batch
from physformer_core.errors import ConfigError
from physformer_core.training import recorded
from physformer_core.training.objective import Draws, Losses
from physformer_core.training.recorded import EAGER_PASSES, RecordedPasses, why_not_recorded
from physformer_core.training.trainer import Trainer

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")

PLAIN = {"dtype": torch.bfloat16, "parallel": "none", "compiled": False, "gradient_checkpointing": False}


def test_where_passes_are_recorded() -> None:
    gpu = torch.device("cuda")
    assert why_not_recorded(gpu, **PLAIN) is None
    assert "need CUDA" in str(why_not_recorded(torch.device("cpu"), **PLAIN))
    for key, value in (
        ("dtype", torch.float16),
        ("parallel", "ddp"),
        ("compiled", True),
        ("gradient_checkpointing", True),
    ):
        assert why_not_recorded(gpu, **(PLAIN | {key: value})) is not None


def test_what_cannot_be_recorded_is_refused(scene_set, tmp_path) -> None:
    config = load_preset("debug").override("training", cuda_graphs=True)
    with pytest.raises(ConfigError, match="CUDA graphs need CUDA"):
        Trainer(config, scene_set, tmp_path, device="cpu")
    assert not Trainer(load_preset("debug"), scene_set, tmp_path, device="cpu").recorded


@on_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_those_that_are_written(scene_set, tmp_path, accumulate) -> None:
    trained = {}
    for name, graphs in (("written", False), ("replayed", True)):
        config = load_preset("debug").override(
            "training",
            cuda_graphs=graphs,
            accumulate=accumulate,
            steps=40,
            batch_size=16,
            dtype="fp32",
            optimizer="adamw",
            log_every=1,
        )
        losses: list[dict[str, float]] = []  # with the gradients' norm, which an optimizer may hide
        trainer = Trainer(config, scene_set, tmp_path / name, device="cuda")
        trainer.on_report = lambda report, kept=losses: kept.append(report.losses | {"norm": report.gradient_norm})
        assert trainer.recorded is graphs
        trainer.run()
        if graphs:
            assert trainer.gradients.recorded is not None
            assert trainer.gradients.recorded.shapes >= 2  # whole pictures and crops
            assert trainer.step > 2 * EAGER_PASSES
        trained[name] = (losses, {key: value.cpu() for key, value in trainer.model.state_dict().items()})
    for written, replayed in zip(trained["written"][0], trained["replayed"][0], strict=True):
        assert written.keys() == replayed.keys()
        for kind, loss in written.items():
            assert replayed[kind] == pytest.approx(loss, rel=1e-3)
    for key, value in trained["written"][1].items():
        assert torch.allclose(trained["replayed"][1][key], value, atol=2e-3), key


class FakeGraph:
    """A graph of CUDA for where there is none: it remembers the pass that it recorded, and replay runs it again."""

    recording: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.again = None

    def replay(self) -> None:
        assert self.again is not None
        self.again()


class FakeCapture:
    """`torch.cuda.graph`: what runs inside changes no gradients, as nothing runs while it is captured."""

    devices: ClassVar[list[object]] = []

    def __init__(self, graph, *, pool, stream, capture_error_mode) -> None:
        self.graph = graph
        self.devices.append(stream)

    def __enter__(self) -> None:
        FakeGraph.recording = self.graph

    def __exit__(self, *error: object) -> None:
        FakeGraph.recording = None


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch):
    """Makes recorded passes over a model of two weights, of which crops train one; time stands still."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(recorded.time, "perf_counter", lambda: 0.0)
    FakeCapture.devices.clear()
    model = nn.ParameterDict({"fine": nn.Parameter(torch.ones(3)), "base": nn.Parameter(torch.ones(3))})
    return RecordedPasses(model, torch.device("cuda:1")), model


def written(model):
    """A pass: the loss is the sum of the pixels times the weights that a kind of batch trains."""

    def run(objective, batch, draws) -> Losses:
        def once() -> Losses:
            weight = model["base"] if batch.kind == "base" else model["fine"]
            loss = (batch.pixels_bchw.mean((0, 1, 2)) * draws.time_b.mean() * weight).sum()
            loss.backward()
            return Losses(loss.detach(), draws.time_b * 2, draws.time_b, {"size": loss.detach() * 3})

        graph = FakeGraph.recording
        if graph is None:
            return once()
        kept = Losses(torch.zeros(()), torch.zeros_like(draws.time_b), draws.time_b, {"size": torch.zeros(())})

        def again() -> None:
            new = once()
            kept.mean.copy_(new.mean)
            kept.per_example.copy_(new.per_example)
            kept.statistics["size"].copy_(new.statistics["size"])

        graph.again = again
        return kept

    return run


def batch_of(kind: str, value: float, count: int = 2) -> tuple[Batch, Draws]:
    rows = torch.zeros(count, dtype=torch.long)
    fields = dict.fromkeys(("level_b", "class_label_b", "indices", "caption_rows"), rows)
    text = {"prompt_embeds_btd": torch.zeros(count, 8, 4), "prompt_mask_bt": torch.ones(count, 8, dtype=torch.bool)}
    field = torch.full((count, 1, 1, 3), value)
    coarse = field if kind == "crop" else None
    batch = Batch(
        pixels_bchw=field, coarse_bchw=coarse, place_b4=torch.zeros(count, 4), pooled_bp=torch.zeros(count, 4),
        kind=kind, step=0, first=0, total=count, **fields, **text,
    )  # fmt: skip
    return batch, Draws(torch.full((count,), 0.5), torch.zeros_like(field), rows.bool(), coarse)


def test_the_third_pass_of_a_shape_is_replayed_with_its_own_numbers(passes) -> None:
    many, model = passes
    run, losses = written(model), []
    for value in (1.0, 2.0, 3.0, 4.0):
        losses.append(many.run(run, None, *batch_of("base", value)))
        assert model["fine"].grad is None, "what a kind does not train has no gradient"
        assert torch.allclose(model["base"].grad, torch.full((3,), value / 2))
        model["base"].grad = None  # as an optimizer leaves it
    assert many.shapes == 1 and many.settled
    assert [loss.mean.item() for loss in losses] == [1.5, 3.0, 4.5, 6.0], "losses do not change with later replays"
    assert losses[3].statistics["size"] == 18 and losses[2].statistics["size"] == 13.5
    assert FakeCapture.devices == [torch.device("cuda:1")], "recorded on a stream of the model's device"


def test_parts_of_a_batch_add_up_however_each_ran(passes) -> None:
    many, model = passes
    run = written(model)
    for value in (1.0, 1.0, 1.0):
        many.run(run, None, *batch_of("crop", value))
        model["fine"].grad = None
    many.run(run, None, *batch_of("crop", 1.0, count=3))  # another shape: as it is written
    assert not many.settled
    for value in (2.0, 4.0):  # replayed, upon it
        many.run(run, None, *batch_of("crop", value))
        assert many.settled
    many.run(run, None, *batch_of("crop", 8.0, count=3))  # as it is written, upon the replays'
    assert torch.allclose(model["fine"].grad, torch.full((3,), (1 + 2 + 4 + 8) / 2)) and model["base"].grad is None


def test_no_more_shapes_than_are_allowed(passes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST_SHAPES", 1)
    many, model = passes
    for count in (2, 3):
        for _ in range(4):
            many.run(written(model), None, *batch_of("base", 1.0, count=count))
    assert many.shapes == 1 and many.settled


@pytest.mark.parametrize("always", [False, True])
def test_where_the_gpu_takes_the_time_nothing_is_recorded_but_on_demand(
    passes, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    _, model = passes
    many = RecordedPasses(model, torch.device("cuda"), always=always)
    clock = [0.0]
    monkeypatch.setattr(recorded.time, "perf_counter", lambda: clock[0])
    # Waiting before a pass takes nothing, after it a second: the pass itself was started in a tenth of one.
    waits = iter([0.0, 1.0] * 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.__setitem__(0, clock[0] + next(waits)))

    def run(objective, batch, draws) -> Losses:
        clock[0] += 0.1
        return written(model)(objective, batch, draws)

    for _ in range(4):
        many.run(run, None, *batch_of("base", 1.0))
    assert many.shapes == (1 if always else 0) and many.settled
