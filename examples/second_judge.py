"""A second opinion on prompt accuracy: a classifier fitted to windows of real scenes, beside that of `eval prompts`.

python examples/second_judge.py --num 100 --relations 100

`eval prompts` asks for the nearest of 323 clean renders, which is strict: a thing that is small, cut by its window or
beside another is far from all of them. Here a softmax regression on the same features learns from scenes what things
look like there, as they are and blurred or noisy. It sees no drawn picture. Prompts, windows, relations, ceiling and
floor are those of `eval prompts`, whose judge is shown beside it on the same pictures; cages are left out. To fit takes
some three minutes on two cores.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from physformer_core.batching import PictureRequest
from physformer_core.checkpoints import find_checkpoint, load_pipeline
from physformer_core.data.scenes import compose_scene, load_concepts, render_svg
from physformer_core.data.scenes.composer import RELATIONS, Scene
from physformer_core.evaluation.features import FeatureExtractor, load_extractor
from physformer_core.evaluation.gallery import Gallery, load_gallery, unit
from physformer_core.evaluation.pictures import draw_requests
from physformer_core.evaluation.prompt_accuracy import Judge, judge_all, relation_report, single_report
from physformer_core.evaluation.prompt_cases import relation_cases, single_cases
from physformer_core.hardware import resolve_device, resolve_dtype

SEED = 71_000_011  # beside the gallery's; no training set should use it
SIDE = 256
WINDOWS = (0.5, 0.58, 0.67)  # sides, in shares of the picture: a thing of two fills 0.44
SCALE, WEIGHT_DECAY = 10.0, 1e-4


@dataclass(frozen=True)
class Fitted(Gallery):
    """Scores of concepts by a linear classifier instead of cosines."""

    bias_c: np.ndarray

    def scores(self, features_nd: np.ndarray) -> np.ndarray:
        """Logits [n, concepts]."""
        logits: np.ndarray = SCALE * unit(features_nd) @ self.vectors_cd.T + self.bias_c
        return logits


def windows_of(scene: Scene, rows: dict[str, int], random: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """What to learn from a scene: the whole of it if it shows one thing, else a window around each, off its centre."""
    picture = render_svg(scene.svg, SIDE, SIDE)
    if len(scene.subjects) == 1:
        return [(picture, rows[scene.subjects[0].concept])]
    found = []
    for subject in scene.subjects:
        side = round(SIDE * random.choice(WINDOWS))
        top, left, bottom, right = (SIDE * edge for edge in subject.box)
        centred = np.array([top + bottom - side, left + right - side]) / 2
        moved = centred + random.uniform(-0.06, 0.06, 2) * SIDE
        y, x = moved.clip(0, SIDE - side).astype(int)
        found.append((picture[y : y + side, x : x + side], rows[subject.concept]))
    return found


def worse(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same, blurred a little and noisy."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(random.uniform(0.5, 1.5)))
    noisy = np.asarray(blurred, np.float32) + random.normal(0, random.uniform(0, 6), picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def fit(extractor: FeatureExtractor, views: int) -> Fitted:
    """The classifier, from so many scenes of every concept: alternately alone and in a place, then in pairs."""
    concepts, random = load_concepts(), np.random.default_rng(SEED)
    rows = {concept.name: row for row, concept in enumerate(concepts)}
    pairs = [relation for relation in RELATIONS if relation != "in"]
    features, labels = [], []
    for row, concept in enumerate(concepts):
        alone = [{"kind": "single"}, {"kind": "setting"}] * 2
        beside = [{"relation": pairs[(4 * row + number) % len(pairs)]} for number in range(4)]
        scenes = [
            compose_scene(SEED, 8 * row + number, aspect=1.0, concept=concept.name, **kind)
            for number, kind in enumerate([*alone, *beside][:views])
        ]
        seen = [window for scene in scenes for window in windows_of(scene, rows, random)]
        features.append(extractor.extract([one for picture, _ in seen for one in (picture, worse(picture, random))]))
        labels += [label for _, label in seen for _ in range(2)]
        print(f"\rfitting: {row + 1}/{len(concepts)} concepts", end="" if row + 1 < len(concepts) else "\n", flush=True)
    inputs_nd = SCALE * torch.from_numpy(unit(np.concatenate(features)))
    targets_n = torch.tensor(labels)
    weights_cd = torch.zeros(len(concepts), extractor.width, requires_grad=True)
    bias_c = torch.zeros(len(concepts), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_cd, bias_c], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs_nd, weights_cd, bias_c), targets_n)
        value = value + WEIGHT_DECAY * weights_cd.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Fitted(concepts, weights_cd.detach().numpy(), "fitted", bias_c.detach().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the shipped one if not given")
    parser.add_argument("--num", type=int, default=100, help="prompts of one thing")
    parser.add_argument("--relations", type=int, default=100, help="prompts of two things, of which those in a cage go")
    parser.add_argument("--views", type=int, default=8, help="scenes of each concept to learn from, up to 8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    device = resolve_device("auto")
    checkpoint = find_checkpoint(options.checkpoint)
    pipeline = load_pipeline(checkpoint, device=device, dtype=resolve_dtype("auto", device))
    two = [case for case in relation_cases(options.relations, options.seed, aspect=1.0) if case.other is not None]
    cases = [*single_cases(options.num, options.seed, aspect=1.0), *two]
    requests = [
        PictureRequest(prompt=case.prompt, seed=options.seed, index=index, width=SIDE, height=SIDE)
        for index, case in enumerate(cases)
    ]
    extractor = load_extractor("efficientnet", None, device)
    judges = {"nearest render": load_gallery(extractor), "fitted": fit(extractor, options.views)}
    pictures = []
    for picture in draw_requests(checkpoint, pipeline, requests):
        pictures.append(picture)
        print(f"\rdrawn: {len(pictures)}/{len(cases)}", end="", flush=True)
    print()
    for judge, gallery in judges.items():
        judged = judge_all(cases, iter(pictures), Judge(extractor, gallery))
        reports = {
            "one thing": single_report(judged[: options.num], gallery.concepts) if options.num else None,
            "two things, in their places": relation_report(judged[options.num :]) if two else None,
        }
        for name, report in reports.items():
            if report is not None:
                shares = ", ".join(
                    f"top-{most} {report[f'top{most}']['value']:.1%} (ceiling {report['ceiling'][f'top{most}']:.1%}, "
                    f"floor {report['floor'][f'top{most}'] or 0:.1%})"
                    for most in (1, 5)
                )
                print(f"{judge}: {name} ({report['count']}): {shares}", flush=True)


if __name__ == "__main__":
    main()
