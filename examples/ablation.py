"""Compares variants of the network at equal training time, on one core, and writes a table and a plot.

    python examples/ablation.py DATA OUT --minutes 2 --seeds 0 1

DATA is a set from `physformer data preprocess`. First every variant's step is timed, a few steps of one after a few of
another, in processor seconds, and by the fastest round: so that neither other work on the machine nor its mood decides.
Then each variant trains for as many steps as fit into the same time, with each seed, and its averaged weights are
scored on the same held-out examples with the same noise. Runs of one seed see the same batches in the same order.

What is finished is kept in OUT/results.json: the same command goes on where it was interrupted. `--tabulate` writes the
table and the plot from what there is; `--time-only` stops after timing (with `--compile`, as training compiles).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from physformer_core.config import RunConfig, load_preset
from physformer_core.data.loader import BatchStream
from physformer_core.files import atomic_write
from physformer_core.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"residual": "plain"},
    "rotation": {"residual": "rotation"},
    "renormalized": {"residual": "renormalized"},
    "head_rotation": {"residual": "head_rotation"},
    "leapfrog": {"residual": "leapfrog"},
    "leapfrog_renormalized": {"residual": "leapfrog_renormalized"},
    "rotation, no drift": {"residual": "rotation", "drift": False},
}
"""What each variant changes in the network. The first is what the others are compared with."""

REFERENCE = next(iter(VARIANTS))
VALIDATION_SEED = 1_000
"""The same held-out examples and noise for every run, whatever its seed."""


def configure(variant: str, options: argparse.Namespace, *, steps: int, seed: int) -> RunConfig:
    """The configuration of one run."""
    config = load_preset("nano").override(
        "model",
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=max(1, options.hidden // 32),
        text_hidden_size=options.hidden,
        **VARIANTS[variant],
    )
    return config.override(
        "training",
        steps=steps,
        batch_size=options.batch,
        crop_size=options.crop,
        compile=options.compile,
        checkpoint_every=steps,
        validate_every=steps,
        validation_batches=1,
        log_every=max(1, steps // 20),
        seed=seed,
    )


def time_steps(options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of a step of each variant.

    The steps are the first ones of a run, the same batches for all. Of each, the fastest of all rounds counts; the
    first of each round, which warms up, does not. Compiled, shapes would be compiled anew in each round: there the
    first batch is repeated.
    """
    best: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for variant in options.variants:
            moments: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                config = configure(variant, options, steps=options.timed_steps + 2, seed=0)
                config = config.override("training", repeat_batch=options.compile)
                trainer = Trainer(config, options.data, Path(folder), device="cpu")
                trainer.on_step = lambda _, moments=moments: moments.append(time.process_time())
                trainer.run()
            # Before the last moment comes validation.
            taken = [after - before for before, after in itertools.pairwise(moments[:-1])]
            if options.compile:  # one batch again and again: all but the steps that compile are equal
                taken = [min(taken)]
            best[variant] = list(map(min, taken, best.get(variant, taken)))
            print(f"round {number + 1}, {variant}: {1000 * statistics.mean(taken):.0f} ms a step", flush=True)
    return {variant: statistics.mean(taken) for variant, taken in best.items()}


def train(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one run and scores it."""
    folder = options.output / "runs" / f"{variant.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    trainer = Trainer(configure(variant, options, steps=steps, seed=seed), options.data, folder, device="cpu")
    trainer.start_afresh()
    began = time.process_time()
    trainer.run()
    spent = time.process_time() - began
    return {"variant": variant, "seed": seed, "steps": steps, "seconds": spent, "losses": score(trainer, options)}


@torch.no_grad()
def score(trainer: Trainer, options: argparse.Namespace) -> dict[str, float]:
    """Validation loss of the averaged weights by level, of all finer levels ("crop"), and of all as trained on."""
    found: dict[str, list[float]] = defaultdict(list)
    trainer.ema.swap_in(trainer.model)
    for kind, fraction in (("base", 0.0), ("crop", 1.0)):
        stream = BatchStream(
            trainer.shards,
            seed=VALIDATION_SEED,
            batch_size=options.batch,
            crop_fraction=fraction,
            crop_size=options.crop,
            split="validation",
        )
        for index in range(options.validation_batches):
            batch = stream.batch(index)
            draws = trainer.objective.draw(batch, torch.Generator().manual_seed(VALIDATION_SEED + index))
            losses = trainer.objective(trainer.model, batch, draws).per_example.tolist()
            for level, loss in zip(batch.level_b.tolist(), losses, strict=True):
                found[f"level {level}"].append(loss)
                found[kind].append(loss)
    trainer.ema.swap_out(trainer.model)
    means = {name: statistics.mean(values) for name, values in sorted(found.items())}
    share = trainer.config.training.crop_fraction
    return means | {"all": (1 - share) * means["base"] + share * means["crop"]}


def write_table(state: dict[str, Any], path: Path) -> None:
    """Loss of each variant (mean over seeds), and its difference to the reference, seed by seed."""
    runs = state["runs"]
    levels = sorted({name for run in runs for name in run["losses"] if name.startswith("level")})
    lines = [
        f"| variant | ms a step | steps | all | against {REFERENCE}, by seed | {' | '.join(levels)} |",
        "|---" * (5 + len(levels)) + "|",
    ]
    reference = {run["seed"]: run["losses"]["all"] for run in runs if run["variant"] == REFERENCE}
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        if not own:
            continue
        ratios = [
            f"{100 * (run['losses']['all'] / reference[run['seed']] - 1):+.1f} %"
            for run in own
            if run["seed"] in reference
        ]
        cells = [
            variant,
            f"{1000 * state['step_seconds'][variant]:.0f}",
            str(own[0]["steps"]),
            f"{statistics.mean(run['losses']['all'] for run in own):.4f}",
            ", ".join(ratios),
            *(f"{statistics.mean(run['losses'][level] for run in own):.4f}" for level in levels),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_plot(state: dict[str, Any], path: Path) -> None:
    """A row for each variant: a dot for each seed at its loss, a bar at their mean."""
    runs = state["runs"]
    names = [variant for variant in VARIANTS if any(run["variant"] == variant for run in runs)]
    losses = [run["losses"]["all"] for run in runs]
    margin = 0.1 * (max(losses) - min(losses)) or 0.01
    low, high = min(losses) - margin, max(losses) + margin
    left, right, top, row = 440, 1540, 110, 72
    height = top + row * len(names) + 80
    picture = Image.new("RGB", (1600, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(28)

    def across(loss: float) -> float:
        return left + (right - left) * (loss - low) / (high - low)

    title = f"validation loss after {state['settings']['minutes']:g} processor minutes, by seed"
    draw.text((20, 24), title, "black", ImageFont.load_default(34))
    for tick in (low + (high - low) * part / 5 for part in range(6)):
        draw.line([(across(tick), top), (across(tick), height - 70)], "#dddddd", 2)
        draw.text((across(tick), height - 56), f"{tick:.4f}", "#444444", font, anchor="ma")
    for index, name in enumerate(names):
        y = top + row * (index + 0.5)
        own = [run for run in runs if run["variant"] == name]
        mean = across(statistics.mean(run["losses"]["all"] for run in own))
        draw.text((left - 24, y), name, "black", font, anchor="rm")
        draw.line([(mean, y - 24), (mean, y + 24)], "#1f5cad", 6)
        for run in own:
            x = across(run["losses"]["all"])
            draw.ellipse([x - 9, y - 9, x + 9, y + 9], "#d06214")
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def save(state: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0, help="processor minutes that each run trains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crop", type=int, default=64, help="side of training crops in pixels")
    parser.add_argument("--compile", action="store_true", help="compile blocks; compiling is not counted as time")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing")
    parser.add_argument("--timed-steps", type=int, default=8, help="steps of each variant timed in a round")
    parser.add_argument("--validation-batches", type=int, default=6)
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--tabulate", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    results = options.output / "results.json"
    settings = {
        name: getattr(options, name)
        for name in ("minutes", "hidden", "layers", "batch", "crop", "compile", "timed_steps", "validation_batches")
    }
    state: dict[str, Any] = {"settings": settings, "step_seconds": {}, "runs": []}
    if results.exists():
        state = json.loads(results.read_text(encoding="utf-8"))
        if state["settings"] != settings:
            raise SystemExit(f"{results} was made with other settings: {state['settings']}. Name another folder.")
    if not options.tabulate:
        if set(options.variants) - set(state["step_seconds"]):
            if state["runs"]:
                raise SystemExit(f"{results} has runs, but no timing of all these variants. Name another folder.")
            state["step_seconds"] = time_steps(options)
            save(state, results)
        for seed in () if options.time_only else options.seeds:
            for variant in options.variants:
                if any((run["variant"], run["seed"]) == (variant, seed) for run in state["runs"]):
                    continue
                steps = max(2, round(60 * options.minutes / state["step_seconds"][variant]))
                print(f"{variant}, seed {seed}: {steps} steps ...", flush=True)
                run = train(variant, seed, steps, options)
                print(f"  {run['seconds']:.0f} s, loss {run['losses']['all']:.4f}", flush=True)
                state["runs"].append(run)
                save(state, results)
    for variant, seconds in state["step_seconds"].items():
        print(f"{variant}: {1000 * seconds:.0f} ms a step")
    if state["runs"]:
        write_table(state, options.output / "ablation.md")
        draw_plot(state, options.output / "ablation.png")
        print((options.output / "ablation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
