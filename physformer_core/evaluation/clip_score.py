"""CLIP score: how well pictures fit their captions (Hessel et al. 2021, https://arxiv.org/abs/2104.08718).

    score = mean over pictures of 100 max(cos(picture, caption), 0)

with CLIP's two projections, on the scale that torchmetrics and most papers print; Hessel et al. multiply by 2.5 instead
of 100. A score belongs to one CLIP and is compared only within it. CLIP was trained on photographs and their captions:
it says little about counts, places and relations of things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from physformer_core.errors import CheckpointError, DataError
from physformer_core.evaluation.features import RESIZE, load_frozen, resize_square


@dataclass(frozen=True)
class ClipScore:
    """A score with what it takes to get it again.

    Args:
        mean: 0 to 100.
        standard_error: Of the mean, over pictures; None for a single one.
        recipe: CLIP and its hash, filter, number and hash of the captions, how many were cut off.
    """

    mean: float
    standard_error: float | None
    recipe: dict[str, Any]


class ClipScorer:
    """A CLIP with both its halves, by folder or hub name; adds up scores of pictures that pass by.

    Args:
        model: A folder or a Hugging Face name.
        device: Where it runs.
        batch_size: Pictures at once.

    Raises:
        CheckpointError: It cannot be had, lacks weights or its tokenizer.
        ConfigError: It is a model of another kind.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu", *, batch_size: int = 32) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model, self.device, self.batch_size = model, torch.device(device), batch_size
        loaded = load_frozen(CLIPModel, ("clip",), "clip", model, self.device)
        # Without its files transformers makes an empty tokenizer, to which every caption is the same.
        whole = any((loaded.folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        try:
            if not whole:
                raise ValueError("neither tokenizer.json nor vocab.json")
            self._tokenizer = AutoTokenizer.from_pretrained(loaded.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{model} has no tokenizer that can be read", hint="copy the model with all its files"
            ) from error
        self.fingerprint = loaded.fingerprint
        self._network, self._normalise = loaded.network, loaded.normalise
        self._side = int(loaded.network.config.vision_config.image_size)
        self._most_tokens = int(loaded.network.config.text_config.max_position_embeddings)
        self._scores: list[float] = []
        self._captions = hashlib.sha256()
        self._cut = 0

    def watch(self, pairs: Iterable[tuple[np.ndarray, str]]) -> Iterator[np.ndarray]:
        """Passes pictures on as they come, and scores them by batches on the way.

        Args:
            pairs: RGB pictures, uint8 [height, width, 3], with their captions.
        """
        waiting: list[tuple[np.ndarray, str]] = []
        for picture, caption in pairs:
            waiting.append((picture, caption))
            if len(waiting) == self.batch_size:
                self._take(waiting)
                waiting = []
            yield picture
        if waiting:
            self._take(waiting)

    def result(self) -> ClipScore:
        """The score of everything that has passed by.

        Raises:
            DataError: Nothing has.
        """
        if not self._scores:
            raise DataError("there are no pictures to compare with their captions")
        count = len(self._scores)
        return ClipScore(
            mean=float(np.mean(self._scores)),
            standard_error=float(np.std(self._scores, ddof=1) / np.sqrt(count)) if count > 1 else None,
            recipe={
                "model": self.model,
                "sha256": self.fingerprint,
                "input": f"{self._side}x{self._side}",
                "resize": RESIZE,
                "scale": "100 max(cos, 0)",
                "count": count,
                "captions_sha256": self._captions.hexdigest(),
                "captions_cut_off": self._cut,
            },
        )

    def scores(self, pictures: list[np.ndarray], captions: list[str]) -> np.ndarray:
        """Scores of pictures with a caption each: float64 [pictures], 0 to 100.

        Raises:
            CheckpointError: The network gives values that are not finite.
        """
        squares_bhwc = np.stack([resize_square(picture, self._side) for picture in pictures])
        pixels_bchw = torch.from_numpy(squares_bhwc).permute(0, 3, 1, 2).contiguous().to(self.device)
        tokens = self._tokenizer(
            captions, padding=True, truncation=True, max_length=self._most_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            output = self._network(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
                pixel_values=self._normalise(pixels_bchw),
            )
            cosines = (_unit(output.image_embeds) * _unit(output.text_embeds)).sum(-1).cpu().numpy()
        if not np.isfinite(cosines).all():
            raise CheckpointError(f"{self.model} gives values that are not finite", hint="its weights are damaged")
        found: np.ndarray = 100 * cosines.clip(0)
        return found

    def _take(self, pairs: list[tuple[np.ndarray, str]]) -> None:
        pictures, captions = [picture for picture, _ in pairs], [caption for _, caption in pairs]
        self._scores += self.scores(pictures, captions).tolist()
        for caption in captions:
            self._captions.update(caption.encode() + b"\n")
        whole = self._tokenizer(captions, padding=False, truncation=False)["input_ids"]
        self._cut += sum(len(ids) > self._most_tokens for ids in whole)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=-1)
