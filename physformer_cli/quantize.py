"""`physformer quantize`: a checkpoint with fewer bits per weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from physformer_cli import console
from physformer_cli.evaluate_common import load_features, load_judge
from physformer_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from physformer_core.checkpoints import Checkpoint
    from physformer_core.quantization.convert import Quantized, QuantizeSettings
    from physformer_core.quantization.measure import Comparison

EPILOG = """Examples:

    physformer quantize runs/nano --output nano-int8

    physformer quantize runs/nano --bits 4 --group 64 --output nano-int4 --accuracy 100

    physformer quantize runs/nano --method dynamic --keep 'blocks.*.modulation' --output nano-dynamic

    physformer quantize runs/nano --bits 4 --sensitivity
"""

METHODS = {"weight": "float", "dynamic": "int8"}


def register(parent: typer.Typer) -> None:
    """Adds the command to the app."""
    parent.command("quantize", epilog=EPILOG, no_args_is_help=True)(quantize)


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make.")] = None,
    bits: Annotated[int, typer.Option(help="Bits per weight: 8 or 4.")] = 8,
    method: Annotated[
        str,
        typer.Option(help="weight: round weights alone. dynamic (8 bits): also activations, token by token."),
    ] = "weight",
    group: Annotated[
        int | None, typer.Option(min=8, help="Weights that share a scale with 4 bits; 32 if not given.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers to leave as they are instead of those that docs/quantization.md lists; none: no layer.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Search scales on activations of real pictures. Errors are measured on them either way.",
        ),
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to draw to calibrate; eight prompts if not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the calibration.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of the calibration's pictures.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps at their coarsest level.")] = 8,
    compare: Annotated[
        int | None,
        typer.Option(min=0, help="Pictures (256x256) to draw with both, for the table; 4 if not given, 0: no table."),
    ] = None,
    accuracy: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also measure prompt accuracy with N prompts; takes a while.")
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Quantize each kind of layer alone and say what it costs; write nothing."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="What both compute in for the table: auto (if not given), fp32, bf16, or fp16 with 4 bits."),
    ] = None,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Write a checkpoint with 8 or 4 bits per weight, which the other commands load like any other.

    The file becomes smaller. Drawing on a CPU does NOT become faster for small models, and weight-only methods are
    slower: the table that is printed says by how much here.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method '{method}'", hint="one of " + ", ".join(METHODS))
    useless: list[tuple[str, bool, str]] = [
        ("--group", group is not None and bits == 8, "8 bits: every row has one scale"),
        ("--output", output is not None and sensitivity, "--sensitivity, which writes nothing"),
        ("--keep", bool(keep) and sensitivity, "--sensitivity, which tries every kind"),
        ("--compare", compare is not None and sensitivity, "--sensitivity"),
        ("--accuracy", accuracy is not None and (sensitivity or compare == 0), "no table"),
        ("--dtype", dtype is not None and (sensitivity or compare == 0), "no table"),
    ]
    for option, refused, why in useless:
        if refused:
            raise ConfigError(f"{option} has no effect with {why}", hint="leave it out")
    if output is None and not sensitivity:
        raise ConfigError("no folder to write to was named", hint="--output FOLDER, or --sensitivity to only measure")
    from physformer_core.checkpoints import find_checkpoint
    from physformer_core.project import recorded_run

    with recorded_run("quantize", record=not no_record, notify=console.say) as run:
        found = find_checkpoint(checkpoint)
        run.checkpoint_sha256, run.seeds = found.sha256, [seed]
        import torch

        from physformer_core.hardware import resolve_device, resolve_dtype
        from physformer_core.quantization.convert import (
            QuantizeSettings,
            check_output,
            refuse_quantized,
            write_quantized,
        )
        from physformer_core.quantization.convert import quantize as make
        from physformer_core.quantization.storage import check_dtype

        where = resolve_device(device)
        run.device = str(where)
        settings = QuantizeSettings(
            bits=bits,  # type: ignore[arg-type]
            activations=METHODS[method],  # type: ignore[arg-type]
            group=group or 32,
            keep=None if not keep else () if keep == ["none"] else tuple(keep),
            calibrate=calibrate,
            prompts=_prompts(prompts),
            seed=seed,
            size=size,
            steps=steps,
        )
        run.config = {**vars(settings), "sensitivity": sensitivity}
        refuse_quantized(found)
        if sensitivity:
            _show_sensitivity(found, settings, where, json_output)
            return
        assert output is not None
        check_output(output)
        compute = resolve_dtype(dtype or "auto", torch.device(where))
        check_dtype(bits, compute)
        with console.progress() as add:
            task = add("calibrating", len(settings.prompts or ()) or 8, unit="pictures")
            made = make(found, settings, device=where, on_picture=task.update)
        weights = write_quantized(found, made, output)
        run.replay_with("--output", "-o", output=output, folder=True)
        run.add_output(output)
        console.say(f"wrote {output} ({console.human_size(weights.stat().st_size)} of weights)")
        comparison = None
        if compare != 0:
            comparison = _compare(found, find_checkpoint(output), compare or 4, accuracy or 0, compute, where)
        _show(made, comparison, json_output)


def _prompts(file: Path | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    from physformer_core.prompts import read_plain_prompts

    return tuple(read_plain_prompts(file))


def _compare(
    original: Checkpoint, quantized: Checkpoint, count: int, accuracy: int, dtype: torch.dtype, device: torch.device
) -> Comparison:
    from physformer_core.quantization.measure import compare_checkpoints

    with console.progress() as add:
        judge = None
        if accuracy:
            from physformer_core.evaluation.prompt_accuracy import Judge

            extractor = load_features("efficientnet", None, device)
            judge = Judge(extractor, load_judge(extractor, add))
        task = add("comparing", 3 * count, unit="pictures")
        return compare_checkpoints(
            original,
            quantized,
            count=count,
            accuracy=accuracy,
            judge=judge,
            dtype=dtype,
            device=device,
            on_picture=task.update,
        )


def _show(made: Quantized, comparison: Comparison | None, json_output: bool) -> None:
    from physformer_core.quantization.convert import worst_kinds

    kinds = worst_kinds(made.layers)
    if json_output:
        layers = [vars(layer) for layer in made.layers]
        result: dict[str, Any] = {"format": "physformer-quantize/1", "layers": layers, "kept": made.kept}
        if comparison is not None:
            result["comparison"] = comparison.as_dict()
        console.print_json(result)
        return
    rows = [
        (kind, str(count), f"{weights:,}", _percent(error), _percent(largest), _percent(plain))
        for kind, count, weights, error, largest, plain in sorted(kinds, key=lambda row: -row[3])
    ]
    console.print_table(("LAYERS", "NUMBER", "WEIGHTS", "ERROR OF OUTPUT", "LARGEST", "UNCALIBRATED"), rows)
    if made.kept:
        typer.echo("kept as they are: " + ", ".join(made.kept))
    if comparison is not None:
        typer.echo()
        console.print_table(("", "ORIGINAL", "QUANTIZED"), _comparison_rows(comparison))
        slower = comparison.quantized.seconds / comparison.original.seconds
        if slower > 1:
            console.warn(f"drawing takes {slower:.2f} times as long here: what is gained is the size of the weights")


def _comparison_rows(found: Comparison) -> list[Sequence[str]]:
    one, other = found.original, found.quantized
    rows: list[Sequence[str]] = [
        ("weights on the disk", console.human_size(one.file_bytes), console.human_size(other.file_bytes)),
        (f"weights in memory ({found.dtype})", *(console.human_size(v.weight_bytes) for v in (one, other))),
        ("peak memory of a process that draws", *(console.human_size(v.peak_bytes) for v in (one, other))),
        (
            f"time per picture ({found.size}x{found.size}, {found.device})",
            *(f"{v.seconds:.2f} s" for v in (one, other)),
        ),
        ("difference of pictures (0 to 255)", f"{found.seeds_difference:.2f} (other seed)", f"{found.difference:.3f}"),
        ("PSNR between pictures", "", f"{found.psnr:.1f} dB"),
    ]
    if one.prompt_accuracy is not None and other.prompt_accuracy is not None:
        shown = [
            f"{_percent(top1)} ({_percent(low)} to {_percent(high)}) / {_percent(top5)}"
            for top1, low, high, top5 in (one.prompt_accuracy, other.prompt_accuracy)
        ]
        rows.append(("prompt accuracy, top-1 / top-5", *shown))
    return rows


def _show_sensitivity(found: Checkpoint, settings: QuantizeSettings, device: torch.device, json_output: bool) -> None:
    from physformer_core.quantization.measure import measure_sensitivity

    with console.progress() as add:
        task = add("quantizing one kind of layer at a time", None, unit="kinds")
        kinds = measure_sensitivity(found, settings, device=device, on_kind=task.update)
    if json_output:
        console.print_json([vars(kind) for kind in kinds])
        return
    rows = [
        (kind.kind, f"{kind.weights:,}", f"{255 * kind.error:.3f}", f"{255 * kind.per_million:.3g}") for kind in kinds
    ]
    console.print_table(("LAYERS", "WEIGHTS", "RMS CHANGE OF PICTURES", "PER MILLION WEIGHTS"), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 0.1 else f"{100 * share:.0f}%"
