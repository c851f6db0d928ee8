"""From what a user says about size (`720p`, `9:16`, `1000x333`) to width and height in pixels."""

from __future__ import annotations

import difflib
import re

from physformer_core.errors import SizeError

# The short side in pixels. `720p` names the number of lines of a landscape picture, which is its short side, so a
# portrait 720p is 720 wide, and a square one is 720x720.
SHORT_SIDES: dict[str, int] = {
    "360p": 360,
    "480p": 480,
    "720p": 720,
    "1080p": 1080,
    "1440p": 1440,
    "4k": 2160,
    "8k": 4320,
}
NAMED_ASPECT = (16.0, 9.0)
DEFAULT_SIZE = (512, 512)
MIN_SIDE = 8
MAX_SIDE = 16384

_ALIASES = {"2160p": "4k", "uhd": "4k", "4320p": "8k"}
_SIZE = re.compile(r"(-?\d{1,9})\s*[x×]\s*(-?\d{1,9})", re.ASCII)
_ASPECT = re.compile(r"(\d{1,6}(?:\.\d{1,9})?)\s*:\s*(\d{1,6}(?:\.\d{1,9})?)", re.ASCII)


def resolve_size(
    *,
    width: int | None = None,
    height: int | None = None,
    res: str | None = None,
    aspect: str | None = None,
    default: tuple[int, int] = DEFAULT_SIZE,
) -> tuple[int, int]:
    """Returns (width, height) in pixels from the options that were given.

    * nothing: `default`.
    * `res` as a name: its short side, and the long side from `aspect`, 16:9 if not given. The aspect changes the long
      side only: 720p is 1280x720, with 1:1 it is 720x720, with 9:16 it is 720x1280, with 21:9 it is 1680x720. A
      computed side is rounded to the nearest even number (480p is 854x480), as video does.
    * `res` as `WxH`: exactly that; `aspect` would have no effect and is refused.
    * `width` and `height`: exactly that; any numbers, not only even ones or multiples.
    * one of them: the other follows from `aspect`, or from the shape of `default`.
    * `aspect` alone: the short side of `default`.

    Args:
        width: Pixels, 8 to 16384.
        height: Pixels, 8 to 16384.
        res: One of `SHORT_SIDES` (any case), or `WxH`.
        aspect: `W:H`, for example `16:9` or `2.39:1`.
        default: (width, height) where nothing else says.

    Raises:
        SizeError: A name is unknown, a side out of range, or two options contradict each other.
    """
    if res is not None:
        if width is not None or height is not None:
            raise SizeError(
                "--res and --width/--height say the size twice",
                hint="give either --res, or --width and --height",
            )
        exact = parse_exact(res)
        if exact is not None:
            if aspect is not None:
                raise SizeError(
                    f"--aspect {aspect} has no effect beside --res {res}",
                    hint="leave --aspect out, or name the resolution, for example --res 720p",
                )
            return _checked(*exact, said=f"--res {res}")
        short = _short_side(res)
        ratio = parse_aspect(aspect) if aspect is not None else NAMED_ASPECT[0] / NAMED_ASPECT[1]
        said = f"--res {res}" + (f" --aspect {aspect}" if aspect is not None else "")
        return _checked(*_from_short_side(short, ratio), said=said)

    if width is not None and height is not None:
        if aspect is not None:
            raise SizeError(
                f"--aspect {aspect} has no effect beside --width and --height",
                hint="leave one of the three out",
            )
        return _checked(width, height, said=f"--width {width} --height {height}")

    if width is None and height is None:
        if aspect is None:
            return _checked(*default, said="the default size")
        return _checked(*_from_short_side(min(default), parse_aspect(aspect)), said=f"--aspect {aspect}")

    ratio = parse_aspect(aspect) if aspect is not None else default[0] / default[1]
    beside = f" --aspect {aspect}" if aspect is not None else ""
    if width is not None:
        _checked(width, MAX_SIDE, said=f"--width {width}")
        return _checked(width, _even(width / ratio), said=f"--width {width}{beside}")
    assert height is not None
    _checked(MAX_SIDE, height, said=f"--height {height}")
    return _checked(_even(height * ratio), height, said=f"--height {height}{beside}")


def parse_aspect(aspect: str) -> float:
    """Returns width / height from `W:H`, for example 16:9 or 2.39:1.

    Raises:
        SizeError: The text is not two positive numbers with a colon between them.
    """
    match = _ASPECT.fullmatch(aspect.strip())
    if match is None or float(match[1]) == 0 or float(match[2]) == 0:
        raise SizeError(
            f"{aspect!r} is not an aspect ratio",
            hint="give width:height with positive numbers, for example 16:9, 1:1, 9:16 or 2.39:1",
        )
    return float(match[1]) / float(match[2])


def parse_exact(res: str) -> tuple[int, int] | None:
    """Width and height of a resolution that names both; None of one that is a name."""
    match = _SIZE.fullmatch(res.strip().lower())
    return (int(match[1]), int(match[2])) if match else None


def _short_side(res: str) -> int:
    name = res.strip().lower()
    name = _ALIASES.get(name, name)
    if name in SHORT_SIDES:
        return SHORT_SIDES[name]
    # A bare number or a missing p is the likeliest slip: offer 720p for 720, and the nearest name otherwise.
    close = f"{name}p" if f"{name}p" in SHORT_SIDES else next(iter(difflib.get_close_matches(name, SHORT_SIDES)), None)
    choices = ", ".join(SHORT_SIDES)
    raise SizeError(
        f"unknown resolution {res!r}" + (f"; did you mean {close}?" if close else ""),
        hint=f"one of {choices}, or WIDTHxHEIGHT, for example 1000x333",
    )


def _from_short_side(short: int, ratio: float) -> tuple[int, int]:
    return (_even(short * ratio), short) if ratio >= 1 else (short, _even(short / ratio))


def _even(side: float) -> int:
    return 2 * round(side / 2)


def _checked(width: int, height: int, *, said: str) -> tuple[int, int]:
    for name, side in (("width", width), ("height", height)):
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise SizeError(
                f"{said}: a {name} of {side} pixels is out of range",
                hint=f"each side must have {MIN_SIDE} to {MAX_SIDE} pixels",
            )
    return width, height
