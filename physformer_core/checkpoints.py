"""Finding a checkpoint and loading it for inference.

A checkpoint is a folder in diffusers' layout: `model_index.json` and `transformer/` with a `config.json` and weights in
safetensors. A training checkpoint (`step-00001000/`) is one, and of a run's folder the newest is taken. Weights in
pickle form are refused, never read: reading them could run any code.

The model is built here, not by `DiffusionPipeline.from_pretrained`: on the meta device, so that no weight is drawn at
random first, and with one message for everything that may be wrong with the files. Nothing heavy is imported before
`load_pipeline`, so that a wrong path is told at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physformer_core.errors import CheckpointError, ConfigError, DeviceError, PhysFormerError
from physformer_core.files import sha256_file
from physformer_core.lora import ScaledAdapter, merge_adapters
from physformer_core.run_folder import CHECKPOINTS, name_of_folder, steps_in

if TYPE_CHECKING:
    import torch

    from physformer_core.config import FlowConfig
    from physformer_core.model.transformer import PhysFormerTransformer2DModel
    from physformer_core.pipeline import PhysFormerPipeline

SHIPPED_NAME = "nano"
PIPELINE_CLASS = "PhysFormerPipeline"
TRANSFORMER_CLASS = "PhysFormerTransformer2DModel"

_INDEX = "model_index.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_QUANTIZED, _QUANTIZATION = "quantized.safetensors", "quantization.json"  # see physformer_core.quantization.storage
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LAYOUT_HINT = f"a checkpoint is a folder with {_INDEX} and transformer/, a step-NNNNNNNN folder, or a run's folder"
_MAX_HEADER_BYTES = 100 << 20
_RECOMPILE_LIMIT = 64  # every level has a size of its own, and dynamo gives up after 8 by default


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found and whose descriptions have been read; its weights have not.

    Args:
        folder: The folder with `model_index.json`.
        name: What it is called in metadata.
        pipeline: The content of `model_index.json`.
        transformer: The content of `transformer/config.json`.
        weights: The safetensors files, in order.
        quantization: The content of `transformer/quantization.json`, or None for ordinary weights.
    """

    folder: Path
    name: str
    pipeline: dict[str, Any]
    transformer: dict[str, Any]
    weights: tuple[Path, ...]
    quantization: dict[str, Any] | None = None

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights: that of the file, or of the hashes of several, one a line."""
        hashes = [sha256_file(path) for path in self.weights]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def flow(self) -> FlowConfig:
        """How it draws.

        Raises:
            CheckpointError: This version does not know such a flow.
        """
        from physformer_core.config import FlowConfig

        given = self.pipeline["flow"]
        unknown = sorted(set(given) - {field.name for field in dataclasses.fields(FlowConfig)})
        wrong = ", ".join(unknown)
        if not wrong:
            try:
                return FlowConfig(**given)
            except (TypeError, PhysFormerError) as error:
                wrong = _first_line(error)
        raise CheckpointError(
            f"{self.folder / _INDEX} has a flow that this version does not know: {wrong}",
            hint="it may come from a later version: pip install --upgrade physformer",
        )

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that the network was trained on."""
        return int(self.pipeline["prompt_tokens"])

    @property
    def text_encoder_name(self) -> str:
        """For `physformer_core.text`."""
        return str(self.pipeline["text_encoder_name"])

    @property
    def codec_name(self) -> str:
        """For `physformer_core.codec`."""
        return str(self.pipeline["codec_name"])


def shipped_checkpoint() -> Path:
    """The folder of the checkpoint that is part of this package.

    Raises:
        CheckpointError: The package holds none.
    """
    folder = Path(str(resources.files("physformer_core") / "weights" / SHIPPED_NAME))
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            "this installation of physformer holds no trained weights",
            hint="reinstall the package, or name a checkpoint of your own: --checkpoint FOLDER",
        )
    return folder


def find_checkpoint(path: str | Path | None = None) -> Checkpoint:
    """Finds a checkpoint and checks everything about it but its weights.

    Args:
        path: A pipeline's folder, a training checkpoint, or a run's folder; the shipped checkpoint if None.

    Raises:
        CheckpointError: There is none, or it is damaged, incomplete or another program's.
    """
    folder = shipped_checkpoint() if path is None else _pipeline_folder(Path(path))
    index = _read_json(folder / _INDEX)
    kind = index.get("_class_name")
    # An export that plain diffusers can load names the module beside the class.
    if (kind[-1] if isinstance(kind, list) and kind else kind) != PIPELINE_CLASS:
        raise _foreign(folder, kind)
    config = _read_json(folder / "transformer" / "config.json")
    if config.get("_class_name") != TRANSFORMER_CLASS:
        raise _foreign(folder / "transformer", config.get("_class_name"))
    defaults: dict[str, Any] = {"text_encoder_name": "minilm", "codec_name": "pixels", "flow": {}, "prompt_tokens": 32}
    pipeline = {**defaults, **{key: value for key, value in index.items() if value is not None}}
    for key, default in defaults.items():
        if type(pipeline[key]) is not type(default):
            raise CheckpointError(
                f"{folder / _INDEX} is damaged: {key} is {pipeline[key]!r}", hint="export or copy the checkpoint again"
            )
    quantized = folder / "transformer" / _QUANTIZED
    if quantized.is_file():
        description = _read_json(folder / "transformer" / _QUANTIZATION)
        return Checkpoint(folder, name_of_folder(folder), pipeline, config, (quantized,), description)
    return Checkpoint(folder, name_of_folder(folder), pipeline, config, _weight_files(folder / "transformer"))


def load_pipeline(
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    adapters: Sequence[ScaledAdapter] = (),
) -> PhysFormerPipeline:
    """Loads a checkpoint for inference. On a CPU the process keeps its memory from then on (`keep_freed_memory`).

    Args:
        checkpoint: See `find_checkpoint`, or what that returned.
        device: Where the network runs.
        dtype: What it computes in, whatever the weights are stored in; float32 if None. The few parameters that need
            float32 keep it.
        compile: Compile the network's blocks with `torch.compile`; each size is compiled when it first appears.
        adapters: Low-rank adapters to add to the weights, before these are cast to `dtype`.

    Raises:
        CheckpointError: It is missing, damaged, cut short, incomplete or another program's; or an adapter is.
        ConfigError: Adapters are given and PEFT is not installed.
        DeviceError: `compile` was asked for and there is no compiler.
    """
    import torch

    found = checkpoint if isinstance(checkpoint, Checkpoint) else find_checkpoint(checkpoint)
    if adapters:
        refuse_adapters(found)
    with paused_collector():
        from physformer_core.hardware import keep_freed_memory
        from physformer_core.pipeline import PhysFormerPipeline

    device = torch.device(device)
    keep_freed_memory(device)
    found.flow()
    transformer = _load_transformer(found, torch.float32 if adapters else dtype or torch.float32)
    if adapters:
        merge_adapters(transformer, adapters, name=found.name)
        _cast(transformer, dtype or torch.float32)
    transformer.to(device)  # type: ignore[arg-type]  # diffusers wraps it, and hides its signature
    if compile:
        _compile(transformer, device)
    return PhysFormerPipeline(
        transformer,
        text_encoder_name=found.text_encoder_name,
        codec_name=found.codec_name,
        flow=found.pipeline["flow"],
        prompt_tokens=found.prompt_tokens,
    )


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """Raises if nothing can be added to a checkpoint's weights.

    Raises:
        ConfigError: They are quantized.
    """
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"{checkpoint.name} is quantized: an adapter cannot be added to its weights",
            hint="name the checkpoint that it was made of",
        )


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, from its descriptions and the headers of its files; no weight is read but for the hash.

    Raises:
        CheckpointError: A file is damaged.
    """
    kinds: dict[str, int] = {}
    for path in checkpoint.weights:
        for tensor in _tensor_header(path).values():
            kinds[tensor["dtype"]] = kinds.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    told: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "sha256": checkpoint.sha256,
        "bytes": sum(path.stat().st_size for path in checkpoint.weights),
        "stored": {kind: kinds[kind] for kind in sorted(kinds)},
        "text_encoder": checkpoint.text_encoder_name,
        "codec": checkpoint.codec_name,
        "prompt_tokens": checkpoint.prompt_tokens,
        "flow": checkpoint.pipeline["flow"],
        "model": {key: value for key, value in sorted(checkpoint.transformer.items()) if not key.startswith("_")},
    }
    if checkpoint.quantization is not None:
        kept = ("bits", "activations", "group", "made_from", "calibration", "kept")
        told["quantization"] = {key: checkpoint.quantization.get(key) for key in kept}
        told["quantization"]["layers"] = len(checkpoint.quantization.get("layers") or ())
    return told


def _tensor_header(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < _MAX_HEADER_BYTES:
                raise ValueError("its header has no length")
            header = json.loads(file.read(length))
        return {
            name: tensor for name, tensor in header.items() if name != "__metadata__" and tensor["shape"] is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {_first_line(error)}",
            hint="the file is damaged; copy the checkpoint again",
        ) from error


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Pauses the garbage collector, for imports: a fifth of the time that torch and diffusers take is spent in it.

    What is alive at the end is kept out of later collections: imported modules stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _pipeline_folder(path: Path) -> Path:
    """The folder with `model_index.json` that a path means."""
    if path.is_file():
        raise CheckpointError(f"{path} is a file, not a checkpoint", hint=_LAYOUT_HINT)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}", hint=_LAYOUT_HINT)
    if (path / _INDEX).is_file():
        return path
    for parent in (path / CHECKPOINTS, path):
        if steps := steps_in(parent, holding=_INDEX):
            return steps[-1]
    if (path / "config.json").is_file() and (path.parent / _INDEX).is_file():
        raise CheckpointError(f"{path} is a part of a checkpoint", hint=f"name the whole: {path.parent}")
    raise CheckpointError(f"{path} holds no checkpoint: it has no {_INDEX}", hint=_LAYOUT_HINT)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,)
    if (folder / f"{_WEIGHTS}.index.json").is_file():
        parts = _read_json(folder / f"{_WEIGHTS}.index.json").get("weight_map")
        names = sorted(set(parts.values())) if isinstance(parts, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / _WEIGHTS}.index.json is damaged", hint="copy the checkpoint again")
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks {name}", hint="copy the checkpoint again")
        return tuple(folder / name for name in names)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]}, in pickle form, which could run any code when read",
            hint="get or export them as safetensors; physformer never reads pickles",
        )
    raise CheckpointError(f"{folder} has no weights", hint=f"expected {_WEIGHTS}; copy the checkpoint again")


def _load_transformer(checkpoint: Checkpoint, dtype: torch.dtype) -> PhysFormerTransformer2DModel:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from physformer_core.model.transformer import PhysFormerTransformer2DModel

    where = checkpoint.folder / "transformer"
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in checkpoint.weights:
            tensors |= load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {_first_line(error)}",
            hint="the file is damaged or cut short; copy or train the checkpoint again",
        ) from error
    # Unknown keys of the configuration would be passed over with a log line; they mean a model that this is not.
    known = {key for key in checkpoint.transformer if not key.startswith("_")}
    try:
        with torch.device("meta"):
            model = PhysFormerTransformer2DModel(**{key: checkpoint.transformer[key] for key in known})
    except (TypeError, ValueError, ArithmeticError, RuntimeError, PhysFormerError) as error:
        raise CheckpointError(
            f"{where / 'config.json'} describes no model of this version: {_first_line(error)}",
            hint="it may come from a later version: pip install --upgrade physformer",
        ) from error

    if checkpoint.quantization is not None:
        from physformer_core.quantization.storage import check_description, restore

        check_description(checkpoint.quantization)
        tensors = restore(tensors, checkpoint.quantization, dtype)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = (
        [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
        or [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
        or [
            f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if tensors[name].shape != shape
        ]
        or [
            f"{name} has values that are not finite"
            for name, tensor in tensors.items()
            if type(tensor) is torch.Tensor and not tensor.isfinite().all()  # integers always are
        ]
    )
    if wrong:
        raise CheckpointError(
            f"the weights of {where} do not fit its config.json: {min(wrong)}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
            hint="weights and configuration are of different models, or damaged; copy the checkpoint again",
        )
    model.load_state_dict(tensors, assign=True)
    _cast(model, dtype)
    return model.eval().requires_grad_(False)


def _cast(model: PhysFormerTransformer2DModel, dtype: torch.dtype) -> None:
    """Casts the weights but for the few that stay float32; diffusers' own `to` would cast those as well."""
    import torch

    exact = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)


def _compile(transformer: PhysFormerTransformer2DModel, device: torch.device) -> None:
    import torch._dynamo

    from physformer_core.hardware import why_no_compiler

    if (missing := why_no_compiler(device)) is not None:
        raise DeviceError(f"--compile cannot be done here: {missing}", hint="or leave --compile out")
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    transformer.compile_repeated_blocks(dynamic=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise CheckpointError(f"cannot read {path}: {reason}", hint=_LAYOUT_HINT) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object", hint="copy the checkpoint again")
    return value


def _foreign(folder: Path, kind: object) -> CheckpointError:
    what = f"a {kind}" if isinstance(kind, str) else "of an unknown kind"
    return CheckpointError(f"{folder} is {what}, not a model of physformer", hint=_LAYOUT_HINT)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
