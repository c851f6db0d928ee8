"""What `physformer train --dry-run` prints: the resolved configuration, and what the run will cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.config import RunConfig
    from physformer_core.data.loader import ShardSet

TYPICAL_SHARE = 0.4
"""Share of the matrix peak that is assumed of training; what a run reaches stands in its log, as ``matrix_share``."""


def print_plan(config: RunConfig, data: Path, folder: Path, device: str, *, as_json: bool) -> None:
    """The configuration, as TOML that --config takes, with what it costs in comments."""
    import tomli_w

    from physformer_core.data.loader import ShardSet
    from physformer_core.hardware import matrix_peak, resolve_device, resolve_dtype
    from physformer_core.training.estimate import estimate_run

    chosen = resolve_device(device)
    kind = resolve_dtype(config.training.dtype, chosen)
    dtype = str(kind).removeprefix("torch.")
    shards: ShardSet = ShardSet(data)
    estimate = estimate_run(config, shards)
    peak = matrix_peak(chosen, kind)
    if as_json:
        console.print_json(
            {
                "config": config.to_dict(),
                "data_dir": str(data),
                "output": str(folder),
                "device": str(chosen),
                "dtype": dtype,
                **vars(estimate),
                "matrix_peak": peak,
                "seconds_at_peak": estimate.seconds(peak),
                "seconds_typical": estimate.seconds(peak, TYPICAL_SHARE),
            }
        )
        return
    epochs = ", ".join(f"{kind} {steps:.0f}" for kind, steps in estimate.steps_per_epoch.items())
    memory = console.human_size(estimate.state_bytes), console.human_size(estimate.activation_bytes)
    figures = {
        "data": f"{data}: {shards.count('base')} pictures, {shards.count('crop')} crops",
        "output": f"{folder}",
        "device": f"{chosen}, {dtype}",
        "parameters": human_number(estimate.parameters)
        + (f", of which {human_number(estimate.trainable)} are trained" if config.training.lora_rank else ""),
        "per step": f"{human_number(estimate.flops_per_step)} floating-point operations",
        "in all": f"{human_number(estimate.flops_per_step * config.training.steps)} of them, "
        f"{human_number(config.training.steps * config.training.batch_size)} examples",
        "memory": f"{memory[0]} for weights and optimizer, at most {memory[1]} for activations"
        + (f" of one of {config.training.accumulate} parts" if config.training.accumulate > 1 else ""),
        "time": f"{console.human_time(estimate.seconds(peak, TYPICAL_SHARE))} on one such device at "
        f"{TYPICAL_SHARE:.0%} of its matrix peak, which is {human_number(peak)} operations a second now; at least "
        f"{console.human_time(estimate.seconds(peak))}",
        "steps per epoch": epochs,
    }
    width = max(map(len, figures))
    lines = [f"# {name:<{width}}  {value}" for name, value in figures.items()]
    typer.echo("\n".join(lines) + "\n\n" + tomli_w.dumps(config.to_dict()), nl=False)


def human_number(count: float) -> str:
    for unit in ("", " thousand", " million", " billion", " trillion", " quadrillion"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} quintillion"
