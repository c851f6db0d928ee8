"""Configurations of models, flows and training: TOML presets, overridden key by key, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from physformer_core.errors import ConfigError
from physformer_core.flow.path import FlowPath, TimeDensity
from physformer_core.flow.pyramid import BASE_AREA, Pyramid


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path, levels and training times.

    Args:
        path, prediction, end_margin: See `FlowPath`.
        start_noise, coarse_noise, base_area, base_widening: See `Pyramid`.
        base_mean, base_std, fine_mean, fine_std: Logit-normal training times at level 0 and above.
        shifted_levels: Levels 1 to this one are drawn from predictions that are averaged over four places of the patch
            grid (`flow.shifted`); in training it changes nothing.
        settling: Predictions, each under noise of its own, that level 0 is the mean of in the end (`flow.settling`); of
            0 it stays what the solver arrives at. In training it changes nothing.
        base_shift, fine_shift: Resolution shift of these times towards noise: see `TimeDensity`. For fields of more
            pixels than a density was found for, the square root of the ratio (Esser et al. 2024).
    """

    path: str = "linear"
    prediction: str = "sample"
    end_margin: float = 0.05
    start_noise: float = 0.25
    coarse_noise: float = 0.05
    base_area: int = BASE_AREA
    base_widening: float = 0.0
    base_mean: float = -0.6
    base_std: float = 0.9
    fine_mean: float = -0.5
    fine_std: float = 1.0
    base_shift: float = 1.0
    fine_shift: float = 1.0
    shifted_levels: int = 0
    settling: int = 0

    def flow_path(self) -> FlowPath:
        return FlowPath(name=self.path, prediction=self.prediction, end_margin=self.end_margin)  # type: ignore[arg-type]

    def pyramid(self, patch_size: int, base_patch_size: int = 0) -> Pyramid:
        """Levels, of a network with patches of these sizes; see `Pyramid`."""
        return Pyramid(
            start_noise=self.start_noise,
            coarse_noise=self.coarse_noise,
            base_area=self.base_area,
            base_widening=self.base_widening,
            patch_size=patch_size,
            base_patch_size=base_patch_size,
        )

    def is_shifted(self, level: int) -> bool:
        """Whether a level is drawn from averaged predictions."""
        return 0 < level <= self.shifted_levels

    def densities(self) -> tuple[TimeDensity, TimeDensity]:
        """Training times at level 0 and at finer levels."""
        return (
            TimeDensity(mean=self.base_mean, std=self.base_std, shift=self.base_shift),
            TimeDensity(mean=self.fine_mean, std=self.fine_std, shift=self.fine_shift),
        )

    def __post_init__(self) -> None:
        self.flow_path()
        if self.path == "quadratic" and self.prediction == "velocity":
            raise ConfigError(
                "the velocity of path 'quadratic' says nothing of the picture where it starts",
                hint="prediction = 'sample', or another path",
            )
        self.pyramid(8)
        self.densities()
        for name in ("shifted_levels", "settling"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")


_SWITCHES = ("compile", "cuda_graphs")
"""Keys of `TrainConfig` that are on, off, or auto."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains.

    Args:
        steps: Optimizer steps.
        batch_size: Examples per step, over all processes and parts.
        accumulate: Parts that each process computes its share of a batch in, one after another: less memory, the same
            step.
        gradient_checkpointing: Whether blocks are computed once more in the backward pass instead of kept: less memory,
            about a third more time, the same step.
        parallel: What several processes do: ``ddp`` (each holds everything), ``fsdp`` (each holds a part of weights,
            gradients and optimizer state), or ``auto``: ddp where there are several.
        crop_fraction: Share of steps on crops of finer levels; the others are whole level-0 pictures.
        crop_size: Side of a training crop in elements of the field; the smallest crops of a set with the default
            buckets have 64.
        optimizer: ``muon`` or ``adamw``.
        lr, muon_lr: Peak learning rates of AdamW and of Muon.
        weight_decay, beta1, beta2: Of AdamW.
        grad_clip: Largest gradient norm.
        warmup_fraction: Share of steps of linear warm-up from a tenth of the peak; then a cosine to a tenth.
        prompt_dropout: Share of prompts replaced by the learned null prompt.
        fine_huber: Size of finer levels' errors, in the level's velocities, from which on they count in proportion and
            no more as their squares, so that edges are sharper (0: all as squares): see `FlowObjective`.
        coarse_blur: Largest standard deviation of the blur of what crops start from, from level 2 on, in elements of
            the level below (0: none).
        ema_decay: Of the averaged weights.
        dtype: Arithmetic: ``auto`` is bfloat16 on GPUs that have it, float32 elsewhere; ``fp16`` scales the loss.
            Weights are float32.
        compile: Whether blocks are compiled: ``on``, ``off``, or ``auto``: where that makes steps faster, which is
            not where kernels in C (float32 on a CPU) or in Triton (CUDA) run. In a file also false, which is off, and
            true, which is auto.
        cuda_graphs: Whether forward and backward passes are recorded as CUDA graphs and replayed, so that a GPU does
            not wait for Python between a small network's operations: ``on``, ``off``, or ``auto``: where it can be and
            it is Python that takes the time. In a file also true, which is on, and false.
        checkpoint_every, keep_last, keep_every: Steps between checkpoints; how many of the last, and every
            how many-th step, are kept (0: only the last).
        validate_every, validation_batches: Steps between validations and batches in one.
        log_every: Steps between log records.
        sample_every: Steps between sample grids, drawn with the averaged weights (0: none).
        sample_count, sample_size: Pictures of a grid, and their side in pixels.
        sample_prompts: What they show, a prompt a line; captions of held-out pictures if empty.
        repeat_batch: Train on the first batch again and again: a check that a model can learn at all.
        pass_below: The run passes if its loss ends below this share of what it began with (0: no such check).
        freeze: Beginnings of names of weights that stay as they are, by commas: ``text_,null_,base.`` trains what finer
            levels have of their own (empty: all are trained).
        lora_rank, lora_alpha: Train an adapter of this rank beside frozen weights (0: the whole network); it acts
            with alpha / rank (0: as rank).
        seed: Of weights, data order, times and noise.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    gradient_checkpointing: bool = False
    parallel: str = "auto"
    crop_fraction: float = 0.25
    crop_size: int = 48
    optimizer: str = "muon"
    lr: float = 6e-4
    muon_lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0
    warmup_fraction: float = 0.05
    prompt_dropout: float = 0.1
    fine_huber: float = 0.0
    coarse_blur: float = 0.0
    ema_decay: float = 0.999
    dtype: str = "auto"
    compile: str = "auto"
    cuda_graphs: str = "auto"
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    validate_every: int = 500
    validation_batches: int = 4
    log_every: int = 20
    sample_every: int = 500
    sample_count: int = 8
    sample_size: int = 128
    sample_prompts: str = ""
    repeat_batch: bool = False
    pass_below: float = 0.0
    freeze: str = ""
    lora_rank: int = 0
    lora_alpha: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "checkpoint_every",
            "keep_last",
            "validate_every",
            "validation_batches",
            "log_every",
            "sample_count",
            "sample_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("crop_fraction", "prompt_dropout", "warmup_fraction", "pass_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be within 0 and 1, not {getattr(self, name)}")
        if not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be within 0 and 1, not {self.ema_decay}")
        for name in ("lr", "muon_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "keep_every", "seed", "sample_every", "lora_rank"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2^63, not {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be within 0 and 1, not {getattr(self, name)}")
        for name in ("fine_huber", "coarse_blur", "lora_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"of checkpoints every {self.checkpoint_every} steps those of every {self.keep_every} cannot be kept",
                hint="keep_every is a multiple of checkpoint_every",
            )
        if self.sample_prompts and not self.sample_every:
            raise ConfigError("sample_prompts have no effect without samples", hint="--sample-every 500, for example")
        if self.lora_alpha and not self.lora_rank:
            raise ConfigError("lora_alpha has no effect without lora_rank", hint="--lora-rank 8, for example")
        if self.freeze and self.lora_rank:
            raise ConfigError("freeze has no effect with lora_rank, which freezes all but the adapter")
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"unknown optimizer '{self.optimizer}'", hint="muon or adamw")
        if self.dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f"unknown dtype '{self.dtype}'", hint="auto, fp32, bf16 or fp16")
        for name in _SWITCHES:
            if getattr(self, name) not in ("auto", "on", "off"):
                raise ConfigError(f"{name} cannot be '{getattr(self, name)}'", hint="auto, on or off")
        if self.parallel not in ("auto", "ddp", "fsdp"):
            raise ConfigError(f"unknown way to be parallel '{self.parallel}'", hint="auto, ddp or fsdp")
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be computed in {self.accumulate} parts",
                hint="accumulate is at most batch_size",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run, apart from its data.

    Args:
        model: Arguments of `PhysFormerTransformer2DModel`.
        flow: Path, levels, times.
        training: Optimisation.
    """

    model: dict[str, Any]
    flow: FlowConfig
    training: TrainConfig

    def __post_init__(self) -> None:
        patch, size = self.pyramid().patch_size, self.training.crop_size
        if self.training.crop_fraction and (size < patch or size % patch):
            raise ConfigError(f"crops of {size} elements are not whole patches of {patch}", hint="change crop_size")

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values, for manifests."""
        return {
            "model": dict(self.model),
            "flow": dataclasses.asdict(self.flow),
            "training": dataclasses.asdict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> RunConfig:
        """Builds and checks a configuration.

        Raises:
            ConfigError: For unknown tables or keys, wrong types, or values out of range; names ``source``.
        """
        unknown = set(values) - {"model", "flow", "training"}
        if unknown:
            raise ConfigError(f"{source}: unknown table [{sorted(unknown)[0]}]", hint="[model], [flow] or [training]")
        if no_table := next((name for name, table in values.items() if not isinstance(table, Mapping)), None):
            raise ConfigError(f"{source}: {no_table} must be a table", hint=f"[{no_table}], and below it its keys")
        model = dict(values.get("model", {}))
        _check_keys(model, model_defaults(), f"{source}: [model]")
        flow = dict(values.get("flow", {}))
        training = dict(values.get("training", {}))
        for key in _SWITCHES:
            if isinstance(training.get(key), bool):
                # true was once the default of compile
                training[key] = "off" if not training[key] else "auto" if key == "compile" else "on"
        _check_keys(flow, _defaults(FlowConfig), f"{source}: [flow]")
        _check_keys(training, _defaults(TrainConfig), f"{source}: [training]")
        return cls(model=model, flow=FlowConfig(**flow), training=TrainConfig(**training))

    def pyramid(self) -> Pyramid:
        """Levels of its pictures."""
        defaults = model_defaults()
        patches = (self.model.get(name, defaults[name]) for name in ("patch_size", "base_patch_size"))
        return self.flow.pyramid(*patches)

    def override(self, table: str, **values: Any) -> RunConfig:
        """A copy with some keys of one table replaced; None leaves a key as it is, `_SWITCHES` may be bools."""
        merged = self.to_dict()
        merged[table].update({key: value for key, value in values.items() if value is not None})
        for key in _SWITCHES if table == "training" else ():
            if isinstance(values.get(key), bool):
                merged[table][key] = "on" if values[key] else "off"
        return RunConfig.from_dict(merged, "options")

    def of_one_network(self) -> RunConfig:
        """The same with one network for all levels: what is compared with other networks, or grown in size."""
        own = {key: 0 for key in self.model if key.startswith("base_")}
        return self.override("model", **own) if own else self


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("physformer_core") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> RunConfig:
    """Reads a preset by name, or a TOML file of the same form by path.

    Raises:
        ConfigError: If there is none, or it does not parse or check.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no configuration file '{name}'", hint="or a preset: " + ", ".join(preset_names()))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read '{name}': {error}") from error
    else:
        if name not in preset_names():
            raise ConfigError(f"unknown preset '{name}'", hint="one of " + ", ".join(preset_names()))
        text = (resources.files("physformer_core") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
    return RunConfig.from_dict(values, name)


def model_defaults() -> dict[str, Any]:
    """What `[model]` has where a key is left out."""
    from physformer_core.model.transformer import PhysFormerTransformer2DModel

    signature = inspect.signature(PhysFormerTransformer2DModel.__init__)
    return {name: parameter.default for name, parameter in signature.parameters.items() if name != "self"}


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _check_keys(values: Mapping[str, Any], allowed: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            raise ConfigError(f"{where}: unknown key '{key}'", hint=f"did you mean '{near[0]}'?" if near else None)
        kind = type(allowed[key])
        is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not is_number and type(value) is not kind:
            raise ConfigError(f"{where}: '{key}' must be {kind.__name__}, not {value!r}")
