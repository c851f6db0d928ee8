"""From requests to PNG files that know how they were made, and from such a file back to its request."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from physformer_core.batching import PictureRequest, parse_steps
from physformer_core.errors import DataError, DeviceError, PhysFormerError
from physformer_core.files import atomic_write, next_free_name, output_error
from physformer_core.metadata import PictureMetadata, save_png
from physformer_core.prompts import MAX_SEED
from physformer_core.resolution import resolve_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from physformer_core.pipeline import PhysFormerPipeline, StepEvent

PREVIEW_KEY = "preview_of_level"
LORAS_KEY = "loras"
_MAX_REDRAWN_BATCH = 1024


def kernels_of(device: str, dtype: str) -> str:
    """What computes between a network's products there, ``c`` or ``torch``: their pictures differ in the last bits."""
    from physformer_core.hardware import resolve_dtype
    from physformer_core.model.attention import why_no_native

    where = torch.device(device)
    return "torch" if why_no_native(where, resolve_dtype(dtype, where)) else "c"


@dataclass(frozen=True)
class Circumstances:
    """What the pictures of one command share; part of their metadata.

    Args:
        checkpoint, checkpoint_sha256: The checkpoint's name and hash.
        dtype: The number format's name: fp32, bf16, fp16.
        device: The device.
        compiled: Whether the network is compiled.
        loras: Adapters added to the weights, as `ScaledAdapter.as_dict` tells of them.
    """

    checkpoint: str
    checkpoint_sha256: str
    dtype: str
    device: str
    compiled: bool = False
    loras: tuple[dict[str, Any], ...] = ()

    def metadata(
        self, batch: Sequence[PictureRequest], position: int, steps: Sequence[int], level: int | None = None
    ) -> PictureMetadata:
        """How the picture at `position` of a batch is made. Holds no time and no id: the same picture, the same bytes.

        Args:
            batch: The pictures drawn together. They are kept, because the last bit of a pixel may depend on them.
            position: Which of them.
            steps: Steps of every level.
            level: The level that a preview shows.
        """
        request = batch[position]
        extra: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "steps_per_level": list(steps),
            "guidance_interval": list(request.guidance_interval),
            "detail": request.detail,
            "torch": str(torch.__version__),
            "kernels": kernels_of(self.device, self.dtype),
        }
        if self.compiled:
            extra["compile"] = True
        if self.loras:
            extra[LORAS_KEY] = [dict(one) for one in self.loras]
        if len(batch) > 1:
            neighbours = [
                {"seed": one.seed, "index": one.index}
                | ({"prompt": one.prompt} if one.prompt != request.prompt else {})
                for one in batch
            ]
            extra["batch"] = {"position": position, "pictures": neighbours}
        if level is not None:
            extra[PREVIEW_KEY] = level
        return PictureMetadata(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or "",
            seed=request.seed,
            image_index=request.index,
            width=request.width,
            height=request.height,
            steps=steps[0],
            guidance=request.guidance,
            solver=request.solver,
            checkpoint=self.checkpoint,
            checkpoint_sha256=self.checkpoint_sha256,
            extra=extra,
        )


def draw_batch(
    pipeline: PhysFormerPipeline,
    batch: Sequence[PictureRequest],
    *,
    on_step: Callable[[StepEvent], None] | None = None,
    on_level: Callable[[StepEvent], None] | None = None,
) -> list[Image]:
    """Draws pictures of the same size and settings together.

    Args:
        pipeline: The loaded pipeline.
        batch: The pictures; all but their prompts, seeds and indices must be the same.
        on_step, on_level: Told after each step and level.

    Raises:
        DeviceError: The memory does not suffice.
    """
    first = batch[0]
    try:
        output = pipeline(
            [one.prompt for one in batch],
            height=first.height,
            width=first.width,
            seeds=[one.seed for one in batch],
            indices=[one.index for one in batch],
            negative_prompt=first.negative_prompt,
            num_inference_steps=first.steps,
            guidance=first.settings(),
            solver=first.solver,
            callback_on_step_end=on_step,
            callback_on_level_end=on_level,
        )
    except RuntimeError as error:
        # CUDA has a class for it; the CPU's allocator only says so.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DeviceError(
            f"not enough memory for {len(batch)} pictures of {first.width}x{first.height} at once",
            hint="draw fewer at once (--batch-size 1), or smaller ones",
        ) from error
    assert not isinstance(output, tuple) and isinstance(output.images, list)
    return output.images


def preview_images(pipeline: PhysFormerPipeline, event: StepEvent) -> list[Image]:
    """The pictures of a batch as they are at the end of a level, in that level's size."""
    factor = pipeline.codec.factor
    images = pipeline.postprocess(event.field, event.size.height * factor, event.size.width * factor)
    assert isinstance(images, list)
    return images


def write_picture(wished: Path, image: Image, metadata: PictureMetadata, *, claimed: bool = False) -> tuple[Path, str]:
    """Writes a picture whole or not at all, under a name that was free.

    Args:
        wished: The name; `_1`, `_2`, ... is added if it is taken.
        image: The picture.
        metadata: What the file tells about it.
        claimed: `wished` comes from `next_free_name` already.

    Returns:
        The file's name and its SHA-256.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    # Encoded in memory first: then whatever goes wrong while writing is about the disk.
    encoded = io.BytesIO()
    save_png(encoded, image, metadata)  # type: ignore[arg-type]  # PIL takes a stream as well
    data = encoded.getvalue()
    path = wished if claimed else next_free_name(wished)
    with atomic_write(path) as temporary:
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise output_error(path, error) from error
    return path, hashlib.sha256(data).hexdigest()


def preview_name(picture: Path, level: int) -> Path:
    """The name of a level's preview, beside the picture: NAME_level0.png."""
    return picture.with_name(f"{picture.stem}_level{level}{picture.suffix}")


def requests_from_metadata(metadata: PictureMetadata, source: str) -> tuple[list[PictureRequest], int]:
    """The batch that a picture was drawn in, and its place in it.

    Args:
        metadata: From `read_metadata`. It comes from a file that anybody may have written, and is checked.
        source: The file's name, for messages.

    Raises:
        DataError: It does not say enough to make the picture again, or what it says cannot be.
    """
    extra = metadata.extra
    if PREVIEW_KEY in extra:
        raise DataError(
            f"{source} is a preview of level {extra[PREVIEW_KEY]}", hint="give the finished picture beside it"
        )
    needed = (metadata.seed, metadata.width, metadata.height, metadata.guidance, metadata.solver)
    if None in needed or not metadata.checkpoint_sha256 or "steps_per_level" not in extra:
        raise DataError(
            f"{source} does not say enough to make it again",
            hint="only pictures written by physformer generate can be; `physformer info` shows what this one says",
        )
    try:
        steps = parse_steps(",".join(str(count) for count in extra["steps_per_level"]))
        low, high = extra.get("guidance_interval", (0.0, 1.0))
        detail = float(extra.get("detail", 1.0))  # pictures from before there was a choice
        resolve_size(width=metadata.width, height=metadata.height)
        batch = extra.get(
            "batch", {"position": 0, "pictures": [{"seed": metadata.seed, "index": metadata.image_index}]}
        )
        position, pictures = batch["position"], batch["pictures"]
        if len(pictures) > _MAX_REDRAWN_BATCH:
            raise ValueError(f"{len(pictures)} pictures in one batch")
        if not (metadata.width and metadata.height and metadata.solver and metadata.guidance is not None):
            raise ValueError("its size, solver or guidance is empty")
        requests = [
            PictureRequest(
                prompt=str(one.get("prompt", metadata.prompt)),
                seed=_whole(one["seed"], MAX_SEED),
                index=_whole(one["index"], 2**31),
                width=metadata.width,
                height=metadata.height,
                steps=steps if isinstance(steps, tuple) else (steps,),
                guidance=float(metadata.guidance),
                guidance_interval=(float(low), float(high)),
                detail=detail,
                solver=metadata.solver,
                negative_prompt=metadata.negative_prompt or None,
            )
            for one in pictures
        ]
        own = requests[_whole(position, len(requests) - 1)]
        own.settings()
        if (own.prompt, own.seed, own.index) != (metadata.prompt, metadata.seed, metadata.image_index):
            raise ValueError("its batch does not hold it")
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, PhysFormerError) as error:
        reason = error.message if isinstance(error, PhysFormerError) else str(error)
        raise DataError(
            f"{source} has metadata that cannot be followed: {reason}", hint="`physformer info` shows it"
        ) from error
    return requests, position


def _whole(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from 0 to {most}")
    return value
