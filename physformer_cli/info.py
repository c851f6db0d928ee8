"""`physformer info`: how a picture was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from physformer_cli import console


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(info)


def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="PNG files.", show_default=False)],
    as_json: console.JsonOption = False,
) -> None:
    """Print how pictures were made: prompt, seed, size, steps, checkpoint.

    Reads what physformer writes into its PNG files, or the `parameters` of other programs.

    [bold]Examples[/bold]

      physformer info bird.png

      physformer info --json outputs/*.png
    """
    from physformer_core.metadata import PictureMetadata, read_metadata

    def shown(metadata: PictureMetadata) -> dict[str, object]:
        values = metadata.as_dict()
        return {**{key: value for key, value in values.items() if key != "extra"}, **values.get("extra", {})}

    if as_json:
        console.print_json([{"file": str(file), **read_metadata(file).as_dict()} for file in files])
        return
    for number, file in enumerate(files):
        values = shown(read_metadata(file))
        width = max(len(name) for name in values)
        lines = [f"{name:<{width}}  {value}" for name, value in values.items()]
        typer.echo(("\n" if number else "") + "\n".join([str(file), *(f"  {line}" for line in lines)]))
