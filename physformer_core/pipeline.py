"""PhysFormerPipeline: prompts -> pictures, grown level by level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from physformer_core.codec import Codec, load_codec
from physformer_core.config import FlowConfig
from physformer_core.errors import ConfigError, DeviceError, PromptError, SizeError
from physformer_core.flow import DEFAULT_GUIDANCE
from physformer_core.flow.guidance import Guidance
from physformer_core.flow.path import LAST_MOMENT
from physformer_core.flow.pyramid import LevelSize, Pyramid, picture_noise
from physformer_core.flow.settling import settled
from physformer_core.flow.shifted import predict_shifted
from physformer_core.flow.solver import SolverSettings, integrate, steps_per_level
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel
from physformer_core.text import TextEncoder, load_text_encoder, shortened


@dataclass(frozen=True)
class StepEvent:
    """Progress of a batch, after each step.

    Args:
        level, levels: Level in progress and their number.
        step, steps: Steps done at this level and their number.
        size: The level's size.
        field: The level's padded field [B, C, H, W] so far.
    """

    level: int
    levels: int
    step: int
    steps: int
    size: LevelSize
    field: Tensor


@dataclass
class PhysFormerPipelineOutput(BaseOutput):
    """Output of `PhysFormerPipeline`.

    Args:
        images: PIL pictures, or a float array [B, H, W, 3] in [0, 1], or a tensor [B, 3, H, W] in [-1, 1].
    """

    images: list[Image.Image] | np.ndarray | Tensor


class PhysFormerPipeline(DiffusionPipeline):
    """Text to image with a `PhysFormerTransformer2DModel`.

    Args:
        transformer: The network.
        text_encoder_name: For `load_text_encoder`; loaded when first needed.
        codec_name: For `load_codec`.
        flow: Keys of `FlowConfig` that the network was trained with.
        prompt_tokens: Longest prompt in tokens that the network was trained on; longer ones are refused.

    Example:
        >>> from physformer_core import PhysFormerPipeline, shipped_checkpoint
        >>> pipeline = PhysFormerPipeline.from_pretrained(shipped_checkpoint())
        >>> pipeline("a bird in a cage", height=720, width=1280, seeds=[7]).images[0].save("bird.png")
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["field"]

    def __init__(
        self,
        transformer: PhysFormerTransformer2DModel,
        text_encoder_name: str = "minilm",
        codec_name: str = "pixels",
        flow: dict[str, Any] | None = None,
        prompt_tokens: int = 32,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(
            text_encoder_name=text_encoder_name, codec_name=codec_name, flow=flow or {}, prompt_tokens=prompt_tokens
        )
        self.flow = FlowConfig(**(flow or {}))
        self._text_encoder: TextEncoder | None = None
        self._codec: Codec | None = None

    @property
    def prompt_encoder(self) -> TextEncoder:
        """The frozen text encoder, loaded on first use."""
        if self._text_encoder is None:
            self._text_encoder = load_text_encoder(self.config.text_encoder_name, self.device)
        return self._text_encoder

    @prompt_encoder.setter
    def prompt_encoder(self, encoder: TextEncoder) -> None:
        """Puts another encoder of the same make in its place, for example one that only knows stored prompts."""
        self._text_encoder = encoder

    @property
    def codec(self) -> Codec:
        """Field <-> picture, loaded on first use."""
        if self._codec is None:
            self._codec = load_codec(self.config.codec_name)
        return self._codec

    @property
    def pyramid(self) -> Pyramid:
        """Levels as the network was trained."""
        config = self.transformer.config
        return self.flow.pyramid(config.patch_size, config.base_patch_size)

    def level_sizes(self, height: int, width: int) -> list[LevelSize]:
        """Sizes of the levels of a picture of height x width pixels."""
        factor = self.codec.factor
        return self.pyramid.level_sizes(-(-height // factor), -(-width // factor))

    def patch_side(self, size: LevelSize) -> float:
        """Side of a level's patches in pixels of the finished picture."""
        return self.transformer.network(base=size.level == 0).sizes.patch_size * size.factor * self.codec.factor

    def check_inputs(
        self, prompt: list[str], negative_prompt: list[str] | None, height: int, width: int, seeds: Sequence[int]
    ) -> None:
        """Refuses what cannot be drawn.

        Raises:
            PromptError: For an empty prompt, or one longer than the network was trained on.
            SizeError: For sizes that are not positive.
        """
        if height < 1 or width < 1:
            raise SizeError(f"a picture of {width}x{height} pixels cannot be drawn", hint="e.g. width=1280, height=720")
        if not prompt:
            raise PromptError("there is no prompt", hint='say what to draw, e.g. "a bird in a cage"')
        if len(seeds) != len(prompt):
            raise PromptError(f"{len(prompt)} prompts but {len(seeds)} seeds", hint="give one seed per picture")
        for text in [*prompt, *(negative_prompt or [])]:
            if not text.strip():
                raise PromptError("the prompt is empty", hint='say what to draw, e.g. "a bird in a cage"')
            count = self.prompt_encoder.token_count(text)
            if count > self.config.prompt_tokens:
                raise PromptError(
                    f"the prompt has {count} tokens, the model takes {self.config.prompt_tokens}: {shortened(text)!r}",
                    hint="shorten it; nothing is cut silently",
                )

    def encode_prompt(self, prompt: Sequence[str | None]) -> EncodedPrompt:
        """Encodes prompts, each once and by itself, so that none depends on its neighbours; None is the null prompt.

        Returns:
            The prompts in order, on the transformer's device.
        """
        unique = list(dict.fromkeys(prompt))
        config, longest = self.transformer.config, self.config.prompt_tokens
        tokens = torch.zeros(len(unique), longest, config.text_dim)
        masks = torch.zeros(len(unique), longest, dtype=torch.bool)
        pooled = torch.zeros(len(unique), config.pooled_dim)
        for row, text in enumerate(unique):
            if text is not None:
                embedded = self.prompt_encoder.encode([text], max_length=longest)
                count = embedded.tokens_btd.shape[1]
                tokens[row, :count], masks[row, :count] = embedded.tokens_btd[0], embedded.mask_bt[0]
                pooled[row] = embedded.pooled_bp[0]
        drop = torch.tensor([text is None for text in unique])
        device = self.transformer.device
        width = max(int(masks.sum(1).max()), config.null_tokens)
        encoded = self.transformer.encode_prompt(
            tokens[:, :width].to(device), masks[:, :width].to(device), pooled.to(device), drop.to(device)
        )
        return encoded.repeat(torch.tensor([unique.index(text) for text in prompt], device=device))

    def prepare_noise(self, size: LevelSize, seeds: Sequence[int], indices: Sequence[int], purpose: str) -> Tensor:
        """Noise [B, C, H, W] of a level, drawn on the CPU per picture from (seed, index, level)."""
        shape = (self.codec.channels, size.padded_height, size.padded_width)
        pairs = zip(seeds, indices, strict=True)
        return torch.stack([picture_noise(shape, seed, index, size.level, purpose) for seed, index in pairs])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int = 512,
        width: int = 512,
        seeds: Sequence[int] | int = 0,
        indices: Sequence[int] | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance: Guidance | float = DEFAULT_GUIDANCE,
        solver: str = "euler",
        given_levels: Mapping[int, Tensor] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[StepEvent], None] | None = None,
        callback_on_level_end: Callable[[StepEvent], None] | None = None,
        return_dict: bool = True,
    ) -> PhysFormerPipelineOutput | tuple[Any]:
        """Draws one picture per prompt, together as one batch.

        Args:
            prompt: One prompt, or one per picture.
            height, width: Size in pixels; any, not only multiples.
            seeds: One seed for all, or one per picture.
            indices: Which picture of its seed each one is; 0 if not given.
            negative_prompt: What guidance pushes away from, instead of the null prompt.
            num_inference_steps: See `steps_per_level`.
            guidance: A `Guidance`, or its scale.
            solver: One of `physformer_core.flow.solver.SOLVERS`.
            given_levels: Fields [B, C, padded height, padded width] of levels that are taken instead of drawn; finer
                levels go on from them, coarser ones are not drawn: for upscaling, and to find the level that
                something is lost at.
            output_type: ``pil``, ``np`` or ``pt``.
            callback_on_step_end, callback_on_level_end: Told of progress.
            return_dict: Whether to wrap the result.

        Raises:
            PromptError, SizeError, ConfigError: See `check_inputs`, `steps_per_level`, `Guidance`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
        indices = [0] * len(prompts) if indices is None else list(indices)
        if not isinstance(guidance, Guidance):
            guidance = Guidance(scale=float(guidance))
        negative = None if negative_prompt is None else [negative_prompt]
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"unknown output_type '{output_type}'", hint="'pil', 'np' or 'pt'")
        self.check_inputs(prompts, negative, height, width, seeds)

        sizes = self.level_sizes(height, width)
        given = self._check_given(given_levels or {}, sizes, len(prompts))
        steps = steps_per_level(num_inference_steps, len(sizes))
        conditional = self.encode_prompt(prompts)
        unconditional = self.encode_prompt([negative_prompt] * len(prompts))
        field: Tensor | None = None
        for size, count in zip(sizes, steps, strict=True):
            if size.level in given:
                field = given[size.level]
            if size.level <= max(given, default=-1):
                continue
            settings = SolverSettings(name=solver, steps=count)
            field = self._run_level(
                size, len(sizes), field, seeds, indices, conditional, unconditional, guidance, settings,
                callback_on_step_end,
            )  # fmt: skip
            if callback_on_level_end is not None:
                callback_on_level_end(StepEvent(size.level, len(sizes), count, count, size, field))
        assert field is not None
        images = self.postprocess(field, height, width, output_type)
        return PhysFormerPipelineOutput(images=images) if return_dict else (images,)

    def _check_given(self, given: Mapping[int, Tensor], sizes: Sequence[LevelSize], batch: int) -> dict[int, Tensor]:
        for level, field in given.items():
            if not 0 <= level < len(sizes):
                raise SizeError(f"there is no level {level} to be given", hint=f"levels are 0 to {len(sizes) - 1}")
            wanted = (batch, self.codec.channels, sizes[level].padded_height, sizes[level].padded_width)
            if tuple(field.shape) != wanted:
                raise SizeError(f"level {level} was given as {tuple(field.shape)}, but is {wanted}")
        return {level: field.to(self.transformer.device, torch.float32) for level, field in given.items()}

    def _run_level(
        self,
        size: LevelSize,
        levels: int,
        previous: Tensor | None,
        seeds: Sequence[int],
        indices: Sequence[int],
        conditional: EncodedPrompt,
        unconditional: EncodedPrompt,
        guidance: Guidance,
        settings: SolverSettings,
        on_step: Callable[[StepEvent], None] | None,
    ) -> Tensor:
        """Flows one level from its start to its sharp field [B, C, padded_height, padded_width]."""
        pyramid, path, device = self.pyramid, self.flow.flow_path(), self.transformer.device
        batch = len(seeds)
        if settings.name == "adaptive" and batch > 1:
            # Its steps follow the worst picture of a batch: one by one, no picture depends on its company.
            alone = [
                self._run_level(
                    size, levels, None if previous is None else previous[k : k + 1], [seeds[k]], [indices[k]],
                    conditional.repeat(torch.tensor([k], device=device)),
                    unconditional.repeat(torch.tensor([k], device=device)), guidance, settings, on_step,
                )
                for k in range(batch)
            ]  # fmt: skip
            return torch.cat(alone)
        noise = self.prepare_noise(size, seeds, indices, "start").to(device)
        coarse = shown = None
        if previous is not None:
            coarse = pyramid.coarse_for(previous, size)
            extra = self.prepare_noise(size, seeds, indices, "coarse").to(device)
            shown = coarse + pyramid.coarse_noise * extra
        level = torch.full((batch,), size.level, device=device)
        place = torch.tensor(size.place, device=device).expand(batch, 4)

        def predict(z: Tensor, t: Tensor, prompt: EncodedPrompt) -> Tensor:
            def output_at(field: Tensor, seen: Tensor | None, box: Tensor) -> Tensor:
                return self.transformer(field, t, prompt, level, seen, box, return_dict=False)[0]  # type: ignore[no-any-return]

            if shown is not None and self.flow.is_shifted(size.level):
                output = predict_shifted(output_at, z, shown, place, self.transformer.config.patch_size)
            else:
                output = output_at(z, shown, place)
            return output if path.prediction == "velocity" else pyramid.sample(coarse, output)

        def guided(z: Tensor, time: float) -> Tensor:
            t = torch.full((batch,), time, device=device)
            prediction = predict(z, t, conditional)
            scale = guidance.at(time, size.level)
            if scale != 1:
                prediction = guidance.combine(prediction, predict(z, t, unconditional), scale)
            return prediction

        def sample(z: Tensor, time: float) -> Tensor:
            prediction = guided(z, time)
            if path.prediction == "velocity":
                # At the very start some paths' velocities say nothing of the sample.
                t = torch.full((batch,), max(time, LAST_MOMENT), device=device)
                prediction = path.sample_of_velocity(prediction, z, t)
            return guidance.sharpen(prediction, coarse)

        # A velocity of the straight path is what is wanted; turned into a sample and back it would only lose digits.
        as_it_is = path.prediction == "velocity" and path.name == "linear" and (coarse is None or guidance.detail == 1)
        velocity = guided if as_it_is else path.straight_velocity(sample)

        def report(index: int, time: float, z: Tensor) -> None:
            if on_step is not None:
                on_step(StepEvent(size.level, levels, index + 1, settings.steps, size, z))

        field = integrate(velocity, pyramid.start(coarse, noise), settings, report)
        if previous is None and self.flow.settling:
            draws = (f"settling {number}" for number in range(self.flow.settling))
            noises = [self.prepare_noise(size, seeds, indices, draw).to(device) for draw in draws]
            field = settled(sample, field, noises, path)
        return field

    def postprocess(self, field: Tensor, height: int, width: int, output_type: str = "pil") -> Any:
        """Decodes a padded field and cuts the picture out of it.

        Raises:
            DeviceError: It is not finite.
        """
        if not torch.isfinite(field).all():
            name = str(self.transformer.dtype).removeprefix("torch.")
            raise DeviceError(
                f"the picture's numbers left the range of {name}",
                hint="the weights are spoilt, as after a learning rate that was too high"
                if name == "float32"
                else "draw it with --dtype fp32 or bf16 (torch_dtype)",
            )
        pictures = self.codec.decode(field.float())[:, :, :height, :width]
        if output_type == "pt":
            return pictures
        array = (pictures.permute(0, 2, 3, 1) * 0.5 + 0.5).cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
