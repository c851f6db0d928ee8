"""Sample grids: the same prompts from the same noise, drawn with the averaged weights again and again as a run goes on.

Drawing leaves no trace in the run: it restores the weights and torch's random state, and its noise comes from each
picture's seed. The prompts are encoded once, so that no text encoder stays in memory beside the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from physformer_core.config import TrainConfig
from physformer_core.data.contact_sheet import Exhibit, draw_sheet, write_sheet
from physformer_core.data.loader import ShardSet
from physformer_core.errors import ConfigError, PromptError
from physformer_core.pipeline import PhysFormerPipeline
from physformer_core.text import PromptEmbeddings, TextEncoder, load_text_encoder, shortened
from physformer_core.training.batches import run_batches
from physformer_core.training.ema import WeightAverage

_COLUMNS = 4
_LEAST_SIDE = 128  # a caption below a smaller picture could not be read


class StoredTextEncoder(TextEncoder):
    """Prompts that were encoded before; it knows no others.

    Args:
        embeddings: By prompt.
        like: What the encoder that made them was called, and the sizes of what it makes.
    """

    def __init__(self, embeddings: dict[str, PromptEmbeddings], *, name: str, max_tokens: int) -> None:
        some = next(iter(embeddings.values()))
        self._embeddings = embeddings
        self.name, self.max_tokens, self.fingerprint = name, max_tokens, ""
        self.hidden_size, self.pooled_size = some.tokens_btd.shape[-1], some.pooled_bp.shape[-1]

    def encode(self, prompts: list[str], *, max_length: int | None = None) -> PromptEmbeddings:
        """The one prompt's embeddings."""
        (prompt,) = prompts
        return self._embeddings[prompt]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""
        return [int(self._embeddings[prompt].mask_bt.sum()) for prompt in prompts]


class SampleGrid:
    """Draws a run's sample grids.

    Args:
        pipeline: Holds the network that is trained.
        shards: The run's data, for prompts if the configuration names none.
        train: ``sample_count``, ``sample_size`` and ``sample_prompts``.
        folder: Where the grids go.

    Raises:
        PromptError: A prompt is too long for the network.
        ConfigError: There are more pictures than a grid holds.
    """

    def __init__(self, pipeline: PhysFormerPipeline, shards: ShardSet, train: TrainConfig, folder: Path) -> None:
        self.folder = folder
        self._size = train.sample_size
        wanted = [line.strip() for line in train.sample_prompts.splitlines() if line.strip()]
        if wanted:
            embeddings = _encoded(wanted, shards)
            self.prompts = [wanted[number % len(wanted)] for number in range(max(train.sample_count, len(wanted)))]
        else:
            rows = _first_batch(shards, train) if train.repeat_batch else _held_out(shards, train.sample_count)
            embeddings = _stored(shards, rows)
            known = list(embeddings)
            self.prompts = [known[number % len(known)] for number in range(train.sample_count)]
        if len(self.prompts) > 256:
            raise ConfigError(f"{len(self.prompts)} samples are too many for a grid", hint="at most 256")
        encoder = StoredTextEncoder(embeddings, name=shards.encoder["name"], max_tokens=shards.max_tokens)
        keys = ("text_encoder_name", "codec_name", "flow", "prompt_tokens")
        self._pipeline = PhysFormerPipeline(pipeline.transformer, **{key: pipeline.config[key] for key in keys})
        self._pipeline.prompt_encoder = encoder

    @torch.no_grad()
    def draw(self, ema: WeightAverage, autocast: contextlib.AbstractContextManager[object]) -> list[Image.Image]:
        """The pictures, in the order of `prompts`; picture k has seed k.

        Args:
            ema: The averaged weights, put in for the time being.
            autocast: What training computes its forward pass in.
        """
        model = self._pipeline.transformer
        device = torch.device(model.device)
        ema.swap_in(model)
        try:
            # Compiled blocks would be compiled anew for every size of a level.
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.compiler.set_stance("force_eager"),
                autocast,
            ):
                output = self._pipeline(
                    self.prompts, height=self._size, width=self._size, seeds=list(range(len(self.prompts)))
                )
        finally:
            ema.swap_out(model)
        assert not isinstance(output, tuple) and isinstance(output.images, list)
        return output.images

    def write(self, images: Sequence[Image.Image], step: int) -> Path:
        """Writes ``step-NNNNNNNN.png``: each picture with its prompt and its seed.

        Raises:
            OutputError: The disk is full, or the folder cannot be written.
        """
        size = max(self._size, _LEAST_SIDE)
        shown = [
            Exhibit(_enlarged(image, size), prompt, f"seed {seed}")
            for seed, (prompt, image) in enumerate(zip(self.prompts, images, strict=True))
        ]
        sheet = draw_sheet(shown, columns=_COLUMNS if len(shown) <= 2 * _COLUMNS else 2 * _COLUMNS, size=size)
        path = self.folder / f"step-{step:08d}.png"
        write_sheet(sheet, path)
        return path


def _encoded(prompts: list[str], shards: ShardSet) -> dict[str, PromptEmbeddings]:
    """Prompts through the text encoder of the data, which is forgotten afterwards."""
    encoder = load_text_encoder(shards.encoder["name"], torch.device("cpu"))
    longest = shards.max_tokens
    for prompt, count in zip(prompts, encoder.token_counts(prompts), strict=True):
        if count > longest:
            raise PromptError(
                f"the sample prompt has {count} tokens, the model takes {longest}: {shortened(prompt)!r}",
                hint="shorten it; nothing is cut silently",
            )
    return {prompt: encoder.encode([prompt], max_length=longest) for prompt in dict.fromkeys(prompts)}


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    """The picture, a small one by a whole factor, so that its pixels can be seen."""
    factor = max(1, side // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _first_batch(shards: ShardSet, train: TrainConfig) -> list[int]:
    """The caption rows of the batch that is repeated: what should be drawn when it is known by heart."""
    return [int(row) for row in run_batches(shards, train).batch(0).caption_rows[: train.sample_count]]


def _held_out(shards: ShardSet, count: int) -> list[int]:
    """Caption rows spread evenly over the held-out pictures (over all if none are)."""
    kind = "base" if shards.count("base") else "crop"
    split = "validation" if shards.count(kind, "validation") else "train"
    groups = shards.groups(kind, split)
    total = sum(group.count for group in groups)
    rows = []
    for index in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)).tolist():
        group = next(group for group in groups if index < group.first + group.count)
        rows.append(int(group.caption_rows[group.caption_starts[index - group.first]]))
    return rows


def _stored(shards: ShardSet, rows: list[int]) -> dict[str, PromptEmbeddings]:
    """Captions as the data hold them."""
    tokens_btd, mask_bt, pooled_bp = shards.embeddings(np.array(rows))
    found = {}
    for place, row in enumerate(rows):
        one, own = slice(place, place + 1), slice(0, int(mask_bt[place].sum()))
        found[shards.caption(row)] = PromptEmbeddings(tokens_btd[one, own], mask_bt[one, own], pooled_bp[one])
    return found
