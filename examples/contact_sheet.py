"""Draws the prompts of the README at several seeds, in seed order, none picked, onto one sheet.

python examples/contact_sheet.py docs/images/contact-sheet.png --size 448x256 --seeds 3
"""

import argparse
from pathlib import Path

from physformer_core.batching import parse_steps
from physformer_core.checkpoints import load_pipeline
from physformer_core.data.contact_sheet import Exhibit, draw_sheet, write_sheet
from physformer_core.data.scenes import FAMILIAR_PROMPTS
from physformer_core.flow import DEFAULT_GUIDANCE
from physformer_core.hardware import resolve_device, resolve_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the shipped one if not given")
    parser.add_argument("--size", default="448x256", help="WIDTHxHEIGHT")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... for each prompt")
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--steps", type=parse_steps, help="N, or N,N,... for levels 0, 1, ...")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))

    device = resolve_device("auto")
    pipeline = load_pipeline(options.checkpoint, device=device, dtype=resolve_dtype("auto", device))
    exhibits = []
    for prompt in FAMILIAR_PROMPTS:
        for seed in range(options.seeds):
            drawn = pipeline(
                prompt,
                height=height,
                width=width,
                seeds=seed,
                guidance=options.guidance,
                num_inference_steps=options.steps,
            )
            exhibits.append(Exhibit(drawn.images[0], prompt, f"seed {seed}"))
    write_sheet(draw_sheet(exhibits, columns=options.seeds, size=max(width, height)), options.output)


if __name__ == "__main__":
    main()
