"""Finds the level at which subjects are lost: prompt accuracy with coarse levels taken from real scenes.

python examples/which_level.py --num 72 --concepts everyday
python examples/which_level.py --num 72 --relations --size 640x360

Each row draws the same prompts, the first as usual, the others with their coarsest levels averaged from the very scene
that the prompt describes. Where accuracy jumps, the level that was still drawn before is what loses the subject.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from physformer_core.checkpoints import load_pipeline
from physformer_core.data.scenes import render_svg
from physformer_core.evaluation.classifier import load_classifier
from physformer_core.evaluation.features import load_extractor
from physformer_core.evaluation.prompt_accuracy import Judge
from physformer_core.evaluation.prompt_cases import chosen_concepts, relation_cases, single_cases
from physformer_core.flow.pyramid import LevelSize
from physformer_core.hardware import resolve_device, resolve_dtype
from physformer_core.resolution import resolve_size

BATCH = 12


def averaged(pictures_bchw: torch.Tensor, size: LevelSize) -> torch.Tensor:
    """What pictures [B, 3, H, W] are at a level, their edges repeated where it is padded to whole patches."""
    own = F.interpolate(pictures_bchw, (size.height, size.width), mode="area")
    beyond = (0, size.padded_width - size.width, 0, size.padded_height - size.height)
    return F.pad(own, beyond, mode="replicate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the shipped one if not given")
    parser.add_argument("--num", type=int, default=72)
    parser.add_argument("--concepts", default="everyday", help="of prompts of one subject")
    parser.add_argument("--relations", action="store_true", help="prompts of two things instead")
    parser.add_argument("--size", default="256x256", help="of the pictures, WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and their scenes")
    options = parser.parse_args()
    width, height = resolve_size(res=options.size)

    device = resolve_device("auto")
    pipeline = load_pipeline(options.checkpoint, device=device, dtype=resolve_dtype("auto", device))
    extractor = load_extractor("efficientnet", None, device)
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("scenes for the judge, once", total=None)

        def tell(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        judge = Judge(extractor, load_classifier(extractor, progress=tell))
    if options.relations:
        cases = relation_cases(options.num, options.seed, aspect=width / height)
    else:
        concepts = chosen_concepts(options.concepts)
        cases = single_cases(options.num, options.seed, aspect=width / height, concepts=concepts)
    scenes = [np.asarray(render_svg(case.scene.svg, width, height)) for case in cases]
    sizes = pipeline.level_sizes(height, width)
    for levels in range(len(sizes)):
        ranks = []
        for first in range(0, len(cases), BATCH):
            some = cases[first : first + BATCH]
            real = np.stack(scenes[first : first + BATCH]).transpose(0, 3, 1, 2)
            real_bchw = torch.from_numpy(real).float() / 127.5 - 1
            given = {size.level: averaged(real_bchw, size) for size in sizes[:levels]}
            drawn = pipeline(
                [case.prompt for case in some],
                height=height,
                width=width,
                seeds=list(range(first, first + len(some))),
                given_levels=given,
            )
            ranks += [judge.judge(case, np.asarray(image)).rank for case, image in zip(some, drawn.images, strict=True)]
        shown = " ".join(f"top-{most} {np.mean(np.array(ranks) < most):5.1%}" for most in (1, 5))
        print(f"{'drawn from level ' + str(levels):24}{shown}", flush=True)


if __name__ == "__main__":
    main()
