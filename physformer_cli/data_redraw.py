"""`physformer data redraw`: the coarse fields of a set as a checkpoint draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from physformer_cli import console


def redraw(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of a preprocessed set.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Whose level 0 to take.", show_default="the one that ships"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Leave SET as it is, and redraw a copy of it here.", show_default="in its place"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or mps.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of the noise.")] = 0,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Show level 1 in training what it will see in drawing: a level 0 that a checkpoint drew.

    Level 1 of a picture starts from a drawn level 0, which is wrong in its small parts; in training it starts from a
    real one. This stores beside a set's crops of level 1 what the checkpoint makes of level 0 there, from half-way
    noise, and `train` reads that from then on. Worth it for a last training of the finer levels, when level 0 is
    trained and stays as it is: `train --init-from CHECKPOINT --freeze text_,null_,base. --crop-fraction 1`.

    [bold]Examples[/bold]

      physformer data redraw data/nano

      physformer data redraw data/nano --checkpoint runs/mine --device cuda
    """
    from physformer_core.checkpoints import find_checkpoint, load_pipeline
    from physformer_core.data.shard_set import ShardSet
    from physformer_core.files import sha256_file
    from physformer_core.hardware import resolve_device
    from physformer_core.project import recorded_run
    from physformer_core.training.redraw import redraw as run_redrawing

    with recorded_run("data redraw", record=not no_record, notify=console.say) as run:
        found = find_checkpoint(checkpoint)
        run.seeds = [seed]
        run.config = {"set": folder, "checkpoint": found.folder, "output": output, "device": device}
        run.checkpoint_sha256 = found.sha256
        run.data_sha256 = sha256_file(ShardSet(folder, redrawn=False).folder / "manifest.json")
        target = folder if output is None else output
        run.replay_with("--output", "-o", output=target, folder=True)
        pipeline = load_pipeline(found, device=resolve_device(device))
        with console.progress() as add:
            task = add("redrawing level 0", None, unit="crops")
            told = run_redrawing(
                folder, pipeline, checkpoint_sha256=found.sha256, seed=seed, output=output, progress=task.update
            )
        for name in [*(entry["name"] for entry in told["files"]), "manifest.json"]:
            run.add_output(target / name)
        manifest_sha256 = sha256_file(target / "manifest.json")
    if as_json:
        told = {key: told[key] for key in ("key", "checkpoint", "seed", "count", "fresh")}
        console.print_json({"output": str(target), "manifest_sha256": manifest_sha256, **told})
    elif told["fresh"]:
        console.say(f"redrew level 0 of {told['count']} crops of {target}")
    else:
        console.say(f"nothing to do: {target} was redrawn by this checkpoint")
