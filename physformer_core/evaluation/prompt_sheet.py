"""A contact sheet of judged prompts: each picture with its prompt, framed green where right, orange, or red."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps

from physformer_core.data.contact_sheet import Exhibit, draw_sheet
from physformer_core.data.scenes import Concept
from physformer_core.evaluation.prompt_accuracy import JudgedPrompt

RIGHT, NEAR, WRONG = (46, 160, 67), (219, 143, 0), (207, 34, 46)
_FRAME = 4
_SIZE = 160


def prompt_sheet(judged: Sequence[JudgedPrompt], concepts: Sequence[Concept], *, columns: int = 8) -> Image.Image:
    """Lays out all pictures in the order of their prompts: none is picked, none left out.

    Raises:
        OutputError: The sheet would be larger than PNG readers take.
    """
    return draw_sheet([_exhibit(one, concepts) for one in judged], columns=columns, size=_SIZE)


def _exhibit(one: JudgedPrompt, concepts: Sequence[Concept]) -> Exhibit:
    rank = one.drawn.rank
    inner = one.thumbnail.copy()
    inner.thumbnail((_SIZE - 2 * _FRAME, _SIZE - 2 * _FRAME), Image.Resampling.LANCZOS)
    if rank == 0:
        colour, note = RIGHT, f"right: {one.drawn.guess}"
    elif rank < 5:
        colour, note = NEAR, f"top 5; taken for: {one.drawn.guess}"
    else:
        colour, note = WRONG, f"wrong: {one.drawn.guess}"
    return Exhibit(ImageOps.expand(inner, _FRAME, colour), one.case.prompt, note)
