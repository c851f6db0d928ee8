"""Asks a person what drawn pictures show, and compares the answers with the prompts and with the judge's.

python examples/blind_test.py draw blind --num 64 --relations 40 --seed 31
python examples/blind_test.py score blind

`draw` writes numbered sheets without prompts and answers.txt, a line for each picture: name there what you see. `score`
then shows every answer beside its prompt, asks whether it is right, and says how often that was so and how often the
judge of `physformer eval prompts` agrees.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from physformer_core.checkpoints import load_pipeline
from physformer_core.data.contact_sheet import Exhibit, draw_sheet, write_sheet
from physformer_core.evaluation.classifier import load_classifier
from physformer_core.evaluation.features import load_extractor
from physformer_core.evaluation.prompt_accuracy import Judge, Share
from physformer_core.evaluation.prompt_cases import PromptCase, relation_cases, single_cases
from physformer_core.hardware import resolve_device, resolve_dtype

BATCH, ON_A_SHEET, COLUMNS = 12, 20, 5


def cases_of(asked: dict[str, int | str]) -> list[PromptCase]:
    """Single subjects, then pairs."""
    width, height = map(int, str(asked["size"]).split("x"))
    numbers, seed, aspect = (int(asked["num"]), int(asked["relations"])), int(asked["seed"]), width / height
    return single_cases(numbers[0], seed, aspect=aspect) + relation_cases(numbers[1], seed, aspect=aspect)


def draw(folder: Path, checkpoint: Path | None, asked: dict[str, int | str]) -> None:
    folder.mkdir(parents=True)
    width, height = map(int, str(asked["size"]).split("x"))
    device = resolve_device("auto")
    pipeline = load_pipeline(checkpoint, device=device, dtype=resolve_dtype("auto", device))
    cases = cases_of(asked)
    with Progress(console=Console(stderr=True)) as bars:
        for first in bars.track(range(0, len(cases), BATCH), description="drawing"):
            some = cases[first : first + BATCH]
            numbers = list(range(first, first + len(some)))
            drawn = pipeline([case.prompt for case in some], height=height, width=width, seeds=numbers)
            for number, image in zip(numbers, drawn.images, strict=True):
                image.save(folder / f"{number:03d}.png")
    for first in range(0, len(cases), ON_A_SHEET):
        numbers = list(range(first, min(first + ON_A_SHEET, len(cases))))
        shown = [Exhibit(Image.open(folder / f"{number:03d}.png"), str(number), "") for number in numbers]
        sheet = draw_sheet(shown, columns=COLUMNS, size=max(width, height))
        write_sheet(sheet, folder / f"sheet-{first // ON_A_SHEET:02d}.png")
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "answers.txt").write_text("".join(f"{number}: \n" for number in range(len(cases))))
    print(f"look at {folder}/sheet-*.png, and write what you see into {folder}/answers.txt")


def score(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    cases = cases_of(asked)
    answers = [line.split(":", 1)[1].strip() for line in (folder / "answers.txt").read_text().splitlines()]
    right = []
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        question = f"{number}: {answer} | asked for: {case.prompt} | right? [y/n] "
        reply = Console(stderr=True).input(question, markup=False) if answer else "n"
        right.append(reply.strip().lower().startswith("y"))
    extractor = load_extractor("efficientnet", None, resolve_device("auto"))
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("scenes for the judge, once", total=None)
        judge = Judge(
            extractor,
            load_classifier(extractor, progress=lambda done, total: bars.update(task, completed=done, total=total)),
        )
    pictures = [np.asarray(Image.open(folder / f"{number:03d}.png")) for number in range(len(cases))]
    judged = [judge.judge(case, picture).rank < 1 for case, picture in zip(cases, pictures, strict=True)]
    for name, mine in (("single subjects", slice(0, asked["num"])), ("pairs, cages", slice(asked["num"], None))):
        seen, found = np.array(right[mine]), np.array(judged[mine])
        if not len(seen):
            continue
        person = Share.of(seen)
        print(
            f"{name}: {person.value:.0%} of {person.count} told ({person.low:.0%} to {person.high:.0%}), "
            f"{np.mean(found):.0%} by the judge; both agree on {np.mean(seen == found):.0%}: it missed "
            f"{np.sum(seen & ~found)} that were told, and found {np.sum(~seen & found)} that were not"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "score"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the shipped one if not given")
    parser.add_argument("--num", type=int, default=64, help="single subjects")
    parser.add_argument("--relations", type=int, default=40, help="pairs, and things in cages")
    parser.add_argument("--size", default="256x256", help="WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    options = parser.parse_args()
    if options.what == "score":
        score(options.folder)
        return
    if options.folder.exists():
        parser.error(f"{options.folder} is there already: answers in it would be lost")
    asked = {name: getattr(options, name) for name in ("num", "relations", "size", "seed")}
    draw(options.folder, options.checkpoint, asked)


if __name__ == "__main__":
    main()
