"""`physformer doctor`: what this machine and this installation can do, and what is missing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from physformer_cli import console

EPILOG = """Examples:

    physformer doctor

    physformer doctor --quick --json
"""


def register(parent: typer.Typer) -> None:
    """Adds the command to the app."""
    parent.command("doctor", epilog=EPILOG)(doctor)


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Measure no speeds: a busy machine is left in peace.")] = False,
    json_output: console.JsonOption = False,
    no_record: console.NoRecordOption = False,
) -> None:
    """Say what is here: device, versions, kernels, speeds, caches, weights, and what is missing.

    Ends with exit code 1 if something that drawing needs is missing or damaged.
    """
    from physformer_core.project import recorded_run

    with recorded_run("doctor", record=not no_record, notify=console.say) as run:
        from physformer_core.diagnosis import diagnose

        report = diagnose(device, measure=not quick)
        run.device = report["device"]["name"]
        run.config = {key: value for key, value in report.items() if key != "caches"}
        if json_output:
            console.print_json(report)
        else:
            for number, (title, rows) in enumerate(_sections(report)):
                typer.echo(("\n" if number else "") + title)
                width = max(len(name) for name, _ in rows)
                for name, value in rows:
                    typer.echo(f"  {name:<{width}}  {value}")
        if report["faults"]:
            for fault in report["faults"]:
                console.error(fault["message"], fault["hint"])
            run.fail(report["faults"][0]["message"])
            raise typer.Exit(1)


def _sections(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    machine, kernels = report["machine"], report["kernels"]
    device = report["device"]
    sections = [
        (
            "machine",
            [
                ("device", f"{device['name']} ({device['description']})"),
                ("cores, threads", f"{machine['cores']}, {machine['threads']}"),
                ("memory", console.human_size(machine["memory_bytes"])),
                ("instructions", ", ".join(machine["instructions"]) or "none that matter"),
                ("dtype that auto takes", device["dtype"]),
            ],
        ),
        ("versions", list(report["versions"].items())),
        (
            "kernels",
            [
                ("attention backend", f"{kernels['attention']} ({kernels['attention_why']})"),
                *((name, "yes" if there else f"no: {why}") for name, (there, why) in kernels["backends"].items()),
                ("fused attention (SDPA)", ", ".join(kernels["sdpa"])),
                ("torch.compile", kernels["compile"]),
            ],
        ),
    ]
    if report["speeds"]:
        sections.append(
            (
                "measured just now",
                [
                    *(
                        (f"matrix product, {name}", f"{value:.0f} GFLOP/s")
                        for name, value in report["speeds"]["gflops"].items()
                    ),
                    ("copying memory", f"{report['speeds']['gigabytes']:.1f} GB/s, read and written"),
                ],
            )
        )
    sections.append(
        (
            "weights",
            [
                (one["name"], f"{one['state']}{': ' + one['detail'] if one['detail'] else ''}")
                for one in report["weights"]
            ],
        )
    )
    sections.append(
        (
            "caches",
            [(one["path"], console.human_size(one["bytes"]) if one["exists"] else "empty") for one in report["caches"]],
        )
    )
    sections.append(
        (
            "optional packages",
            [(one["name"], f"{one['version'] or 'missing'}: {one['purpose']}"
              + ("" if one["version"] else f"; {one['install']}")) for one in report["optional"]],
        )
    )  # fmt: skip
    return sections
