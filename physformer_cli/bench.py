"""`physformer bench`: what an evaluation costs, and how the cost grows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from physformer_cli import console
from physformer_core.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure time and memory, and how they grow with the picture.")

MODEL_EPILOG = """Examples:

    physformer bench model

    physformer bench model --tokens 1024,4096,16384 --backend dense --json
"""


def register(parent: typer.Typer) -> None:
    """Adds the command to the app."""
    parent.add_typer(app, name="bench")


@app.command("model", epilog=MODEL_EPILOG)
def model(
    preset: Annotated[str, typer.Option(help="Whose model is measured (with random weights).")] = "nano",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1024,8192,32768,129600",
    backend: Annotated[str, typer.Option(help="Attention backend: auto, halo, dense or reference.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed evaluations of each size, after a warm-up.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    json_output: console.JsonOption = False,
) -> None:
    """Time and peak memory of one network evaluation over picture sizes, with the exponents of their growth.

    Every size runs in a fresh process. An exponent of 1 is linear: twice the pixels, twice the cost.
    """
    sizes = _parse_tokens(tokens)
    from physformer_core.benchmark import EvaluationCase, field_shape, fit_power_law, machine, measure_all

    shapes = [field_shape(count) for count in sizes]
    cases = [
        EvaluationCase(preset=preset, backend=backend, height=h, width=w, dtype=dtype, device=device, repeats=repeats)
        for h, w in shapes
    ]
    with console.progress() as add:
        task = add("measuring", total=len(cases), unit="sizes")
        results = measure_all(cases, lambda _: task.advance())
    report: dict[str, Any] = {
        "preset": preset,
        "backend": backend,
        "machine": machine(),
        "sizes": [{**vars(result), "height": h, "width": w} for result, (h, w) in zip(results, shapes, strict=True)],
    }
    if len(results) > 1:
        counts = [result.tokens for result in results]
        for name, values in (
            ("time", [result.seconds for result in results]),
            ("memory", [float(max(result.peak_bytes, 1)) for result in results]),
        ):
            report[name] = vars(fit_power_law(counts, values))
    if json_output:
        console.print_json(report)
        return
    rows = [
        [
            f"{result.tokens:,}",
            f"{h}x{w}",
            f"{result.seconds:.3f} s",
            f"{result.spread:.3f} s",
            console.human_size(result.peak_bytes),
        ]
        for result, (h, w) in zip(results, shapes, strict=True)
    ]
    console.print_table(["tokens", "rows x columns", "median time", "spread", "peak memory"], rows)
    for name in ("time", "memory"):
        if name in report:
            fit = report[name]
            typer.echo(f"{name} grows as tokens^{fit['exponent']:.2f} (95 %: +-{fit['half_width']:.2f})")


def _parse_tokens(text: str) -> list[int]:
    """Rising token counts from a comma list."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--tokens '{text}' is not a list of whole numbers", hint="e.g. --tokens 1024,4096") from None
    if min(sizes) < 64:
        raise ConfigError(f"--tokens {min(sizes)} is too small to measure", hint="64 tokens or more")
    return sizes
