"""How quantized weights lie on the disk and in memory.

A quantized checkpoint has, in `transformer/` beside the usual `config.json`,

* `quantized.safetensors`: for a quantized layer `NAME.weight.values` (int8 [out, in], or for 4 bits uint8 [out, in/2]
  with two values a byte, the first in the low half) and `NAME.weight.scale` (float32 [out, 1], or for 4 bits bfloat16
  [out, in/group]); every other tensor as it was;
* `quantization.json`: the settings, where the calibration's activations came from, and each layer's error.

The file's name is not the one that diffusers looks for: a loader that knows nothing of this form says that there are
no weights, instead of filling a network with random ones.

In memory a weight becomes a tensor of torchao, which has the dtype that the network computes in and runs its own
kernels. torchao has no packed 4-bit kernel for CPUs, so there 4 bits take a byte each once loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from physformer_core.errors import CheckpointError, ConfigError

FORMAT = "physformer-quantized/1"
DESCRIPTION_NAME = "quantization.json"
WEIGHTS_NAME = "quantized.safetensors"
VALUES, SCALE = "weight.values", "weight.scale"

Bits = Literal[8, 4]


@dataclass(frozen=True)
class LayerScheme:
    """How one weight [out, in] is quantized.

    Args:
        bits: 8 (-127 to 127) or 4 (-7 to 7).
        group: Weights of a row that share a scale; 0 for the whole row, as 8 bits always have it.
        int8_activations: Whether the layer's input is rounded to 8 bits per token when it runs (8 bits only).
    """

    bits: Bits
    group: int = 0
    int8_activations: bool = False

    @property
    def largest(self) -> int:
        """The largest integer. The smallest is its negative, so that zero is exact and the range symmetric."""
        return 127 if self.bits == 8 else 7

    @property
    def scale_dtype(self) -> torch.dtype:
        """bfloat16 costs half a bit per weight in groups of 32, and has float32's range: scales may be tiny."""
        return torch.float32 if self.bits == 8 else torch.bfloat16


def check_dtype(bits: int, dtype: torch.dtype) -> None:
    """Refuses what weights of so many bits cannot be computed in.

    Raises:
        ConfigError: They cannot.
    """
    if bits == 8 and dtype == torch.float16:
        raise ConfigError(
            "weights of 8 bits are scaled after the product, which leaves the range of fp16",
            hint="--dtype fp32 or bf16",
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and scales of one layer.

    Args:
        values: int8 [out, in].
        scale: [out, groups], in the scheme's dtype.
        scheme: How they are to be read.
    """

    values: Tensor
    scale: Tensor
    scheme: LayerScheme

    def stored(self) -> dict[str, Tensor]:
        """What goes to the disk."""
        values = self.values if self.scheme.bits == 8 else pack_nibbles(self.values)
        return {VALUES: values.contiguous(), SCALE: self.scale.contiguous()}

    def dequantized(self) -> Tensor:
        """The weight that the integers stand for, float32 [out, in]."""
        grouped = self.values.float().unflatten(1, (self.scale.shape[1], -1))
        return (grouped * self.scale.float()[..., None]).flatten(1)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The weight as torchao computes with it.

        Args:
            dtype: What the network computes in.

        Raises:
            ConfigError: torchao is missing or has another layout, or it is a number format that they do not fit.
        """
        columns = self.values.shape[1]
        check_dtype(self.scheme.bits, dtype)
        if self.scheme.bits == 4:
            intx = torchao_module("quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor")
            made: Tensor = intx.IntxUnpackedToInt8Tensor(
                self.values,
                self.scale.to(dtype),
                torch.zeros_like(self.scale, dtype=torch.int8),
                getattr(torch, "int4"),  # noqa: B009 - torch's stubs lack it
                (1, columns // self.scale.shape[1]),
                dtype,
                None,
            )
            return made
        int8 = torchao_module("quantization.quantize_.workflows.int8.int8_tensor")
        activations = None
        if self.scheme.int8_activations:
            torchao = torchao_module("quantization")
            activations = int8.QuantizeTensorToInt8Kwargs(
                granularity=torchao.PerRow(), mapping_type=torchao.MappingType.SYMMETRIC
            )
        made = int8.Int8Tensor(self.values, self.scale, [1, columns], dtype, act_quant_kwargs=activations)
        return made


def pack_nibbles(values: Tensor) -> Tensor:
    """Two integers from -8 to 7 a byte: int8 [out, in] -> uint8 [out, in/2]; ``in`` must be even."""
    shifted = (values + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves.to(torch.int8) - 8


def restore(tensors: dict[str, Tensor], description: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Turns what was read from the disk into a state dict.

    Args:
        tensors: The content of `quantized.safetensors`; emptied of what is used.
        description: The content of `quantization.json`, checked by `check_description`.
        dtype: What the network computes in.

    Raises:
        CheckpointError: A layer's tensors are missing or do not fit each other.
        ConfigError: torchao is missing.
    """
    activations = description["activations"] == "int8"
    restored: dict[str, Tensor] = {}
    for name in description["layers"]:
        try:
            values, scale = tensors.pop(f"{name}.{VALUES}"), tensors.pop(f"{name}.{SCALE}")
        except KeyError as error:
            raise _damaged(f"{error.args[0]} is missing") from None
        bits: Bits = 4 if values.dtype == torch.uint8 else 8
        if values.ndim != 2 or values.dtype not in (torch.uint8, torch.int8) or bits != description["bits"]:
            raise _damaged(f"{name} is no weight of {description['bits']} bits")
        if bits == 4:
            values = unpack_nibbles(values)
        groups = scale.shape[1] if scale.ndim == 2 else 0
        if scale.shape[:1] != values.shape[:1] or not groups or values.shape[1] % groups or (bits == 8 and groups != 1):
            raise _damaged(f"{name} has scales of shape {list(scale.shape)}")
        if not scale.isfinite().all():
            raise _damaged(f"{name} has scales that are not finite")
        scheme = LayerScheme(bits, values.shape[1] // groups if bits == 4 else 0, activations)
        restored[f"{name}.weight"] = QuantizedWeight(values, scale, scheme).tensor(dtype)
    return restored | tensors


def check_description(description: Mapping[str, Any]) -> None:
    """Refuses a description that this version does not know.

    Raises:
        CheckpointError: It is another version's, or damaged.
    """
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"the quantized weights are of format {description.get('format')!r}; this version reads {FORMAT}",
            hint="it may come from a later version: pip install --upgrade physformer",
        )
    whole = (
        description.get("bits") in (8, 4)
        and description.get("activations") in ("float", "int8")
        and isinstance(description.get("layers"), dict)
    )
    if not whole:
        raise _damaged(f"{DESCRIPTION_NAME} lacks bits, activations or layers")


def torchao_module(name: str) -> Any:
    """A module of torchao.

    Args:
        name: Below ``torchao``, for example ``quantization``.

    Raises:
        ConfigError: torchao is not installed, or a version with another inside.
    """
    try:
        with _quiet_import():
            return importlib.import_module(f"torchao.{name}")
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            raise ConfigError(
                "quantized weights need the package torchao", hint='pip install "physformer[quantize]"'
            ) from error
        raise ConfigError(
            f"the installed torchao has no {error.name}", hint='pip install --upgrade "physformer[quantize]"'
        ) from error


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao tells of every CUDA library that a CPU build of torch cannot load; none is used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"the quantized weights are damaged: {what}", hint="copy or quantize the checkpoint again")
