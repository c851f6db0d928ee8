"""`physformer data show` and `physformer data inspect`: what is in a set, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from physformer_cli import console
from physformer_cli.data_common import (
    BucketsOption,
    PresetOption,
    WorkersOption,
    manifest_hash,
    progress_of,
    sizes_of_whole_pictures,
    worker_count,
)


def show(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of a raw or a preprocessed set.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path("sheet.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures, spread over the set.")] = 64,
    kind: Annotated[
        str | None,
        typer.Option(help='Of a preprocessed set: "base" (whole pictures) or "crop".', show_default="half of each"),
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 8,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Longer side of a picture in pixels.")] = 160,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Draw a contact sheet of a set, with captions: look at your data.

    [bold]Examples[/bold]

      physformer data show data/scenes --output scenes.png

      physformer data show data/nano --kind crop --count 24 --columns 6 -o crops.png
    """
    from physformer_core.data import contact_sheet
    from physformer_core.data.set_folder import RAW_FORMAT
    from physformer_core.errors import ConfigError
    from physformer_core.files import next_free_name
    from physformer_core.output_names import check_picture
    from physformer_core.project import recorded_run

    if kind not in (None, "base", "crop"):
        raise ConfigError(f"unknown kind {kind!r}", hint="base or crop")
    check_picture("a sheet", "--output", output)
    with recorded_run("data show", record=not no_record, notify=console.say) as run:
        if kind is not None and contact_sheet.set_format(folder) == RAW_FORMAT:
            raise ConfigError("--kind is for preprocessed sets", hint="a raw set has whole pictures only")
        run.config = {"set": folder, "output": output, "count": count, "kind": kind, "columns": columns, "size": size}
        run.data_sha256 = manifest_hash(folder)
        run.replay_with("--output", "-o", output=output, folder=False)
        contact_sheet.sheet_size(count, columns=columns, size=size)
        shown = contact_sheet.exhibits(folder, count, kind=kind, size=size)
        sheet = contact_sheet.draw_sheet(shown, columns=columns, size=size)
        name = next_free_name(output)
        contact_sheet.write_sheet(sheet, name)
        run.add_output(name)
    if as_json:
        console.print_json({"output": str(name), "count": len(shown), "width": sheet.width, "height": sheet.height})
    else:
        console.say(f"wrote {name}: {len(shown)} pictures")


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="RAW", help="Folder of a raw set, made by data fetch.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the page and the contact sheet.", show_default="RAW-inspection"),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures on the contact sheet.")] = 64,
    preset: PresetOption = None,
    buckets: BucketsOption = None,
    workers: WorkersOption = None,
    as_json: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Say what is in a raw set: sizes, buckets, captions, and pictures that look the same.

    Writes an HTML page with a contact sheet beside it. Pictures that look the same have perceptual hashes that differ
    in at most 3 of 64 bits.

    [bold]Examples[/bold]

      physformer data inspect data/photos

      physformer data inspect data/photos --output report --count 120 --json
    """
    from physformer_core.data import contact_sheet, inspection
    from physformer_core.project import recorded_run

    sizes = sizes_of_whole_pictures(preset, buckets)
    with recorded_run("data inspect", record=not no_record, notify=console.say) as run:
        workers = worker_count(workers, run.settings)
        target = output if output is not None else _beside(folder, "-inspection")
        contact_sheet.sheet_size(count, columns=8)  # told before the set is gone through
        run.config = {"set": folder, "output": target, "count": count, "buckets": sizes, "workers": workers}
        run.data_sha256 = manifest_hash(folder)
        run.replay_with("--output", "-o", output=target, folder=True)
        with console.progress() as add:
            show = progress_of(add, {"": ("inspecting", "pictures")})
            found = inspection.inspect_raw_set(
                folder, buckets=sizes, workers=workers, progress=lambda done, total: show("", done, total)
            )
        sheet = contact_sheet.draw_sheet(contact_sheet.exhibits(folder, count), columns=8)
        contact_sheet.write_sheet(sheet, target / "sheet.png")
        inspection.write_page(found, target / "index.html", sheet="sheet.png")
        run.add_output(target / "sheet.png")
        run.add_output(target / "index.html")
    if as_json:
        console.print_json({"output": str(target), **found.as_dict()})
        return
    few, median, high, most = found.words
    lines = [
        ("examples", f"{found.count}"),
        ("captions", f"{found.captions}, of {few} to {most} words (median {median}, 95 % up to {high})"),
        ("without caption", f"{found.without_caption}"),
        ("repeated captions", f"{found.repeated_captions_count}"),
        ("look the same", f"{found.near_duplicates_count}"),
        ("undecodable", f"{found.undecodable}"),
        ("shorter side", f"{found.sides[0]} to {found.sides[2]} pixels (median {found.sides[1]})"),
        *((f"bucket {name}", f"{many}, {cut:.1%} of the area cut off") for name, many, cut in found.buckets),
        ("all buckets", f"{found.cut_area:.1%} of the area cut off"),
        *((f"refused: {reason}", str(many)) for reason, many in found.refused.items()),
        *((f"noted: {note}", str(many)) for note, many in found.notes.items()),
    ]
    console.print_table(("what", "how many"), lines)
    console.say(f"wrote {target / 'index.html'}")


def _beside(folder: Path, ending: str) -> Path:
    """A name for what belongs to a folder, in the folder that holds it."""
    whole = folder.resolve() if folder.name in ("", "..") else folder
    return whole.with_name(f"{whole.name}{ending}")
