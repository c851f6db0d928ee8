"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): read, checked, and merged into a network.

An adapter is one safetensors file in diffusers' form, so that `load_lora_adapter` of diffusers reads it as well: keys
begin with `transformer.`, and the LoRA configuration stands in the file's metadata as JSON. Beside it, under keys that
diffusers passes over, stands what the adapter was trained on.

Nothing heavy is imported before an adapter is merged, so that a wrong path is told at once.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.files import sha256_file
from physformer_core.run_folder import CHECKPOINTS, name_of_folder, step_of_folder, steps_in

if TYPE_CHECKING:
    from torch import Tensor

    from physformer_core.model.transformer import PhysFormerTransformer2DModel

ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
FACTS_PREFIX = "physformer."
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for it

TARGETS = r"(base\.)?blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(gate_up|down))"
"""What adapters are put beside: the attention's and the feed-forward's matrices of every block of the picture's stream.
The text stream stays as it is, so that a prompt is read the same with and without the adapter."""

MAX_SCALE = 100.0

_KEY = re.compile(r"transformer\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYOUT_HINT = (
    f"an adapter is a {ADAPTER_FILE}, its folder, or a step-NNNNNNNN folder or the whole folder of a run of "
    "physformer train --lora-rank"
)
# Of PEFT's configuration only what decides the weights' meaning: other versions know other keys.
_SAVED_KEYS = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora")


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been found and whose header has been read; its weights have not.

    Args:
        file: The safetensors file.
        name: What it is called in metadata.
        config: PEFT's `LoraConfig` as far as it was saved.
        facts: What it was trained on: ``base`` (a checkpoint's name) and ``base_sha256``; empty if unknown.
        shapes: [rows, columns] of the change of each module's weight, by module name.
        rank: The largest rank.
    """

    file: Path
    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    shapes: dict[str, tuple[int, int]]
    rank: int

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return sha256_file(self.file)

    def check(self, sizes: dict[str, tuple[int, int]], model: str) -> None:
        """Compares the adapter with a network's matrices.

        Args:
            sizes: [rows, columns] of every linear layer, by module name.
            model: What the network is called in messages.

        Raises:
            CheckpointError: It is another model's.
        """
        for module, shape in self.shapes.items():
            if sizes.get(module) != shape:
                found = sizes.get(module)
                why = f"that is {_size(found)}" if found else "there is none"
                trained = f" (it was trained on {self.facts['base']})" if self.facts.get("base") else ""
                raise CheckpointError(
                    f"the adapter {self.name} does not fit {model}: it changes {module}, {_size(shape)}, and {why}",
                    hint=f"name the model it was trained on: --checkpoint FOLDER{trained}",
                )


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter, and how strongly it acts: 1 as it was trained, 0 not at all."""

    adapter: Adapter
    scale: float

    def as_dict(self) -> dict[str, Any]:
        """What metadata tell about it."""
        return {"name": self.adapter.name, "sha256": self.adapter.sha256, "scale": self.scale}


def require_peft() -> None:
    """Raises ConfigError if PEFT, which an extra brings, is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError("LoRA adapters need the package peft", hint='pip install "physformer[lora]"') from error


def parse_adapter(text: str) -> ScaledAdapter:
    """Reads ``PATH`` or ``PATH:SCALE`` as `--lora` takes it.

    Raises:
        ConfigError: The scale is no number, or out of range.
        CheckpointError: See `find_adapter`.
    """
    path, colon, tail = text.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        if colon and Path(path).exists() and not Path(text).exists():
            raise ConfigError(f"{tail!r} is not a scale", hint=f"--lora {path}:0.8") from None
        path, scale = text, 1.0
    if not colon or not path:
        path, scale = text, 1.0
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise ConfigError(f"the scale of --lora {text} must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
    return ScaledAdapter(find_adapter(path), scale)


def find_adapter(path: str | Path) -> Adapter:
    """Finds an adapter and checks everything about it but its weights.

    Args:
        path: The safetensors file, its folder, a training checkpoint, or a run's folder (its newest checkpoint).

    Raises:
        CheckpointError: There is none, or it is damaged or another program's.
    """
    from safetensors import SafetensorError, safe_open

    file = _adapter_file(Path(path))
    try:
        with safe_open(file, framework="np") as opened:
            header = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
            sizes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot read the adapter {file}: {reason}", hint="it is damaged or cut short; copy or train it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the adapter {file} has damaged metadata", hint="copy or train it again")
    shapes, rank = _shapes(file, sizes)
    config = {key.removeprefix(PREFIX): value for key, value in header.items() if key.startswith(PREFIX)}
    facts = {key.removeprefix(FACTS_PREFIX): value for key, value in header.items() if key.startswith(FACTS_PREFIX)}
    return Adapter(file, _name(file), config, facts, shapes, rank)


def adapter_bytes(model: PhysFormerTransformer2DModel, facts: dict[str, Any], *, name: str = "default") -> bytes:
    """The file of an adapter that a network carries. The same weights give the same bytes.

    Args:
        model: The network, with an adapter of PEFT's.
        facts: What it was trained on, for `Adapter.facts`.
        name: The adapter's name in the network.
    """
    import torch
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name)
    config = model.peft_config[name].to_dict()
    header = {PREFIX + key: config[key] for key in _SAVED_KEYS} | {FACTS_PREFIX + k: v for k, v in facts.items()}
    # One key only: safetensors writes several in an order that changes from process to process.
    return save(
        {PREFIX + key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()},
        metadata={METADATA_KEY: json.dumps(header, sort_keys=True)},
    )


def merge_adapters(model: PhysFormerTransformer2DModel, adapters: Sequence[ScaledAdapter], *, name: str) -> None:
    """Adds adapters to a network's weights, which then are ordinary weights: a picture takes no longer with them.

    Args:
        model: In float32, on the CPU.
        adapters: In this order.
        name: What the network is called in messages.

    Raises:
        ConfigError: PEFT is not installed.
        CheckpointError: An adapter is another model's or cannot be read.
    """
    require_peft()
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    sizes = linear_sizes(model)
    for one in adapters:
        one.adapter.check(sizes, name)
    names = [f"lora_{number}" for number in range(len(adapters))]
    for number, one in zip(names, adapters, strict=True):
        adapter = one.adapter
        try:
            with warnings.catch_warnings():
                # That there are several is meant.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                model.load_lora_adapter(str(adapter.file.parent), weight_name=adapter.file.name, adapter_name=number)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot load the adapter {adapter.file}: {str(error).strip().splitlines()[0]}", hint=_LAYOUT_HINT
            ) from error
    if not names:
        return
    set_weights_and_activate_adapters(model, names, [one.scale for one in adapters])
    model.fuse_lora(adapter_names=names)
    model.unload_lora()


def linear_sizes(model: PhysFormerTransformer2DModel) -> dict[str, tuple[int, int]]:
    """[rows, columns] of the matrices of a network's linear layers, by module name."""
    from torch import nn

    return {
        module: (layer.out_features, layer.in_features)
        for module, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _adapter_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no safetensors file", hint="physformer never reads pickles")
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no adapter {path}", hint=_LAYOUT_HINT)
    for folder in (path, path / ADAPTER_FOLDER):
        if (folder / ADAPTER_FILE).is_file():
            return folder / ADAPTER_FILE
    of_adapter = f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"
    if steps := steps_in(path / CHECKPOINTS, holding=of_adapter):
        return steps[-1] / of_adapter
    raise CheckpointError(f"{path} holds no adapter: it has no {ADAPTER_FILE}", hint=_LAYOUT_HINT)


def _shapes(file: Path, sizes: dict[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, int]], int]:
    """Each module's change as [rows, columns], and the largest rank."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, size in sizes.items():
        match = _KEY.fullmatch(key)
        if match is None or len(size) != 2:
            raise CheckpointError(
                f"{file} is no adapter of physformer: it holds {key}", hint="its keys are transformer.*.lora_A.weight"
            )
        sides.setdefault(match["module"], {})[match["side"]] = size
    shapes = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise CheckpointError(
                f"the adapter {file} is damaged: the two halves of {module} are not of one rank",
                hint="copy or train it again",
            )
        shapes[module] = (pair["B"][0], pair["A"][1])
    if not shapes:
        raise CheckpointError(f"the adapter {file} is empty", hint="train it again")
    return shapes, max(pair["A"][0] for pair in sides.values())


def _name(file: Path) -> str:
    """RUN/step-NNNNNNNN for what training wrote, else the name of the folder or of the file."""
    file = file.absolute()
    if file.name != ADAPTER_FILE:
        return file.stem
    folder = file.parent
    is_trained = folder.name == ADAPTER_FOLDER and step_of_folder(folder.parent) is not None
    return name_of_folder(folder.parent if is_trained else folder)


def _size(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]}x{shape[1]}" if shape else "nothing"
