"""Sample grids: the averaged weights' pictures of fixed prompts, drawn without a trace in the run."""

import contextlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from physformer_core.checkpoints import load_pipeline
from physformer_core.config import load_preset
from physformer_core.data.loader import BatchStream
from physformer_core.errors import PromptError
from physformer_core.training.samples import SampleGrid
from physformer_core.training.trainer import Trainer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make(data, folder, **training) -> Trainer:
    return Trainer(load_preset("debug").override("training", **training), data, folder, device="cpu")


def test_a_run_with_samples_ends_with_the_same_bits(scene_set, tmp_path):
    drawn = []
    plain = make(scene_set, tmp_path / "plain", steps=4, sample_every=0)
    sampled = make(scene_set, tmp_path / "sampled", steps=4, sample_every=1)
    sampled.on_samples = lambda step, path: drawn.append((step, path.name))
    assert plain.run() and sampled.run()
    assert plain.samples is None and drawn == [(step, f"step-{step:08d}.png") for step in range(1, 5)]
    for name in (WEIGHTS, "state.safetensors"):
        one, other = (load_file(t.checkpoint_dir / "step-00000004" / name) for t in (plain, sampled))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert Image.open(sampled.output_dir / "samples" / "step-00000004.png").width > 2 * 64


def test_drawing_leaves_random_state_and_weights_alone(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path)
    trainer.ema.shadow["patch_embed.proj1.weight"] += 1
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = trainer.samples.draw(trainer.ema, contextlib.nullcontext())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    torch.randn(5)
    again = trainer.samples.draw(trainer.ema, contextlib.nullcontext())
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
    assert first[0].size == (64, 64) and len(first) == 2


def test_the_grid_shows_what_the_checkpoint_draws(scene_set, tmp_path, tiny_checkpoint):
    """The same pictures come from the shared command's pipeline, with the same prompts and seeds."""
    trainer = make(scene_set, tmp_path, sample_prompts="a red bird\n\na dog on a hill\n", sample_count=3)
    assert trainer.samples.prompts == ["a red bird", "a dog on a hill", "a red bird"]
    # Weights that draw something: a fresh network's pictures are grey whatever the prompt.
    for name, value in load_pipeline(tiny_checkpoint).transformer.named_parameters():
        if value.shape == trainer.ema.shadow[name].shape:
            trainer.ema.shadow[name].copy_(value)
    for value in trainer.ema.shadow.values():
        if not value.any():
            torch.nn.init.normal_(value, std=0.2)
    pictures = trainer.samples.draw(trainer.ema, contextlib.nullcontext())
    assert pictures[0].tobytes() != pictures[2].tobytes(), "another seed"
    path = trainer.save()
    pipeline = load_pipeline(path)
    expected = pipeline(trainer.samples.prompts, height=64, width=64, seeds=[0, 1, 2]).images
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]


def test_prompts_come_from_held_out_captions(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, sample_count=5)
    shards = trainer.shards
    held_out = {shards.caption(int(row)) for group in shards.groups("base", "validation") for row in group.caption_rows}
    assert len(trainer.samples.prompts) == 5 and set(trainer.samples.prompts) <= held_out
    assert make(scene_set, tmp_path, sample_count=5, seed=9).samples.prompts == trainer.samples.prompts


def test_a_repeated_batch_is_what_is_sampled(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, repeat_batch=True, sample_count=4)
    batch = BatchStream(trainer.shards, seed=0, batch_size=4, crop_fraction=0.5).batch(0)
    assert trainer.samples.prompts == [trainer.shards.caption(int(row)) for row in batch.caption_rows]


def test_a_prompt_that_is_too_long_is_told_before_training(scene_set, tmp_path):
    trainer = make(scene_set, tmp_path, sample_every=0)
    train = load_preset("debug").override("training", sample_prompts="a bird " * 200).training
    with pytest.raises(PromptError, match="the sample prompt has"):
        SampleGrid(trainer.pipeline, trainer.shards, train, tmp_path)
