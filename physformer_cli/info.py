"""`physformer info`: how a picture was made, or what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from physformer_cli import console


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(info)


def info(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="PNG files, or checkpoints' folders.", show_default=False)
    ],
    as_json: console.JsonOption = False,
) -> None:
    """Print how pictures were made: prompt, seed, size, steps, checkpoint; or what a checkpoint is.

    Reads what physformer writes into its PNG files, or the `parameters` of other programs. Of a checkpoint: parameters,
    dtypes, hash, sizes, and how it was quantized.

    [bold]Examples[/bold]

      physformer info bird.png

      physformer info --json outputs/*.png

      physformer info runs/nano
    """
    from physformer_core.checkpoints import describe_checkpoint, find_checkpoint
    from physformer_core.metadata import read_metadata

    def told(file: Path) -> dict[str, object]:
        return describe_checkpoint(find_checkpoint(file)) if file.is_dir() else read_metadata(file).as_dict()

    if as_json:
        console.print_json([{"file": str(file), **told(file)} for file in files])
        return
    for number, file in enumerate(files):
        values = told(file)
        for table in ("extra", "model", "quantization"):  # their own lines
            inner = values.pop(table, None)
            if isinstance(inner, dict):
                values |= {f"quantization: {key}" if table == "quantization" else key: inner[key] for key in inner}
        width = max(len(name) for name in values)
        lines = [f"{name:<{width}}  {value}" for name, value in values.items()]
        typer.echo(("\n" if number else "") + "\n".join([str(file), *(f"  {line}" for line in lines)]))
