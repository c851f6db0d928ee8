"""`physformer export`: a checkpoint to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from physformer_cli import console

EPILOG = """Examples:

    physformer export runs/nano --output nano-fp16

    physformer export runs/nano/checkpoints/step-00003600 --output nano-fp32 --dtype fp32

    physformer export runs/mine --mean-with runs/nano --output between
"""


def register(parent: typer.Typer) -> None:
    """Adds the command to the app."""
    parent.command("export", epilog=EPILOG)(export)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="Weights as fp32, bf16 or fp16.")] = "fp16",
    for_diffusers: Annotated[
        bool, typer.Option("--for-diffusers", help="Let plain diffusers load it, with trust_remote_code=True.")
    ] = False,
    mean_with: Annotated[
        list[Path] | None,
        typer.Option(
            "--mean-with",
            help="Another checkpoint of the same network: write the mean of the weights. Between what training began "
            "with and what it made, it often has the strengths of both. May be given several times.",
        ),
    ] = None,
    no_record: console.NoRecordOption = False,
) -> None:
    """Write a trained checkpoint's averaged weights as a folder that generate and diffusers read."""
    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.project import recorded_run

    with recorded_run("export", record=not no_record, notify=console.say) as run:
        found = find_checkpoint(checkpoint)
        others = [find_checkpoint(other) for other in mean_with or ()]
        run.config = {"dtype": dtype, "for_diffusers": for_diffusers, "mean_with": [other.sha256 for other in others]}
        run.checkpoint_sha256 = found.sha256
        import torch

        from physformer_core.export import export_checkpoint
        from physformer_core.hardware import resolve_dtype

        weights = export_checkpoint(
            found,
            output,
            dtype=resolve_dtype(dtype, torch.device("cpu")),
            for_diffusers=for_diffusers,
            mean_with=others,
        )
        run.replay_with("--output", "-o", output=output, folder=True)
        run.add_output(output)
        console.say(f"wrote {output} ({console.human_size(weights.stat().st_size)} of weights)")
