"""What `physformer eval fid` and `physformer eval prompts` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.evaluation.scores import DistanceScore


_COLUMNS = ("NUMBER", "TOP-1", "95 %", "TOP-5", "CEILING 1 / 5", "FLOOR 1 / 5")


def print_distances(score: DistanceScore, json_output: bool) -> None:
    for warning in score.warnings:
        console.warn(warning)
    if json_output:
        console.print_json(score.as_dict())
        return
    rows = [(score.name, f"{score.frechet:.4f}")]
    if score.kid is not None:
        rows.append(("KID x 1000", f"{1000 * score.kid:.4f} (subsets: +-{1000 * (score.kid_std or 0):.4f})"))
    if score.precision is not None and score.recall is not None:
        rows += [("precision", f"{score.precision:.4f}"), ("recall", f"{score.recall:.4f}")]
    if score.clip is not None:
        error = "" if score.clip_error is None else f" (standard error {score.clip_error:.3f})"
        rows.append((f"CLIP score ({score.recipe['clip_score']['model']})", f"{score.clip:.3f}{error}"))
    rows += [(side, f"{score.recipe[side]['count']} pictures") for side in ("reference", "generated")]
    console.print_table(("MEASURE", "VALUE"), rows)
    extractor = score.recipe["extractor"]
    console.say(
        f"features: {extractor['model']} ({extractor['sha256'][:12]}), {extractor['input']}; --json: the recipe"
    )


def print_prompts(result: Mapping[str, Any]) -> None:
    if "single" in result:
        single = result["single"]
        rows = [
            ("all", *_cells(single), _floor(single)),
            *((kind if kind != "plain" else "plain colour", *_cells(one), "") for kind, one in single["kinds"].items()),
            *((one["category"], *_cells(one), "") for one in single["categories"]),
        ]
        console.print_table(("SUBJECTS", *_COLUMNS), rows)
    if "phrased" in result:
        if "single" in result:
            typer.echo()
        phrased = result["phrased"]
        console.print_table(("SUBJECTS", *_COLUMNS), [("in everyday words", *_cells(phrased), _floor(phrased))])
    if "relations" in result:
        pairs = result["relations"]
        if "single" in result or "phrased" in result:
            typer.echo()
        rows = [
            ("all", *_cells(pairs), _floor(pairs)),
            *((one["relation"], *_cells(one), "") for one in pairs["relations"]),
        ]
        console.print_table(("RELATIONS", *_COLUMNS), rows)
        typer.echo(
            f"subject seen {_percent(pairs['subject_top5'])}, other thing {_percent(pairs['other_top5'])} (top-5); "
            f"the opposite relation would also fit {_percent(pairs['opposite']['drawn'])} of them, "
            f"{_percent(pairs['opposite']['ceiling'])} of real scenes"
        )
    if spectra := result.get("spectra"):
        _print_spectra(spectra)


def _print_spectra(spectra: Mapping[str, Any]) -> None:
    if all(one["share"] is not None for one in spectra["octaves"]):
        bands = ", ".join(f"{one['share']:.2f} ({_fraction(one)})" for one in spectra["octaves"])
        typer.echo(f"edges, their power beside that of real scenes by cycles a pixel: {bands}")
    for one in spectra["seams"]:
        expected = "" if one["real"] is None else f", real scenes {one['real']:.2f}"
        typer.echo(f"seams every {one['period']} pixels: {one['drawn']:.2f} of what is beside them{expected}")


def _fraction(band: Mapping[str, float]) -> str:
    return f"1/{1 / band['from']:.0f} to 1/{1 / band['to']:.0f}"


def _floor(one: Mapping[str, Any]) -> str:
    return f"{_percent(one['floor']['top1'])} / {_percent(one['floor']['top5'])}"


def _cells(one: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    top1, ceiling = one["top1"], one["ceiling"]
    return (
        str(top1["count"]),
        _percent(top1["value"]),
        f"{100 * top1['low']:.0f}-{_percent(top1['high'])}",
        _percent(one["top5"]["value"]),
        f"{_percent(ceiling['top1'])} / {_percent(ceiling['top5'])}",
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
