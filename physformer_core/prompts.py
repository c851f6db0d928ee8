"""Prompt files: a prompt a line, or a JSON object a line with a size, a seed and more of its own.

Bad lines do not stop the good ones: they are collected with their numbers for the caller to report.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from physformer_core.errors import PhysFormerError, PromptError
from physformer_core.flow import MAX_DETAIL
from physformer_core.resolution import DEFAULT_SIZE, resolve_size

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 1000.0


@dataclasses.dataclass(frozen=True)
class PromptRequest:
    """One line of a prompt file. What is None was not said and comes from the command line.

    Args:
        prompt: The prompt, not blank.
        line: Its line in the file, from 1.
        seed: 0 to 2^64 - 1.
        width: Pixels.
        height: Pixels.
        res: A resolution's name or WxH.
        aspect: W:H.
        steps: 1 to 1000, or several such numbers, one per level.
        guidance: 0 to 1000.
        detail: 0 to 2.
        negative_prompt: What to keep out.
        output: The file to write.
    """

    prompt: str
    line: int
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    res: str | None = None
    aspect: str | None = None
    steps: int | tuple[int, ...] | None = None
    guidance: float | None = None
    detail: float | None = None
    negative_prompt: str | None = None
    output: str | None = None

    def size(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        res: str | None = None,
        aspect: str | None = None,
        default: tuple[int, int] = DEFAULT_SIZE,
    ) -> tuple[int, int]:
        """Returns (width, height): this line's own options over those of the command line.

        A size on the line (`width`, `height` or `res`) replaces the command line's size and aspect altogether; an
        `aspect` alone changes the shape of what the command line or `default` says and keeps its short side.

        Raises:
            SizeError: The options contradict each other or are out of range.
        """
        if self.width is not None or self.height is not None or self.res is not None:
            return resolve_size(width=self.width, height=self.height, res=self.res, aspect=self.aspect, default=default)
        if self.aspect is not None:
            if width is not None and height is not None:
                return resolve_size(aspect=self.aspect, default=(width, height))
            return resolve_size(width=width, height=height, res=res, aspect=self.aspect, default=default)
        return resolve_size(width=width, height=height, res=res, aspect=aspect, default=default)


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """A prompt file that has been read.

    Args:
        source: What it is called in messages.
        text: The whole text, for the run record where it came from standard input.
        requests: The good lines, in order.
        errors: The bad ones, in order. If there are any, the command's exit code is 1 though the good ones ran.
    """

    source: str
    text: str
    requests: tuple[PromptRequest, ...]
    errors: tuple[BadLine, ...]


def read_prompt_file(path: str | Path) -> PromptFile:
    """Reads a prompt file.

    `.jsonl` holds a JSON object a line; any other suffix a prompt a line, where blank lines and lines that begin with
    `#` are skipped. `-` is standard input, and holds JSON lines if its first character that is not blank is `{`.

    Raises:
        PromptError: The file cannot be read, or has neither a good line nor a bad one.
    """
    try:
        if str(path) == "-":
            source, data = "standard input", sys.stdin.buffer.read()
        else:
            source, data = str(path), Path(path).read_bytes()
    except OSError as error:
        raise PromptError(
            f"cannot read the prompt file {path}: {error.strerror or error}",
            hint="give a .txt file with a prompt a line, a .jsonl file, or - for standard input",
        ) from error
    if str(path) == "-":
        as_json = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    else:
        as_json = Path(path).suffix.lower() in (".jsonl", ".ndjson")
    return parse_prompts(data, source=source, as_json=as_json)


def read_plain_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, for what draws all of them alike.

    Raises:
        PromptError: As `read_prompt_file`; or a line is bad, or says more than its prompt.
    """
    file = read_prompt_file(path)
    if file.errors:
        raise PromptError(f"{path}, {file.errors[0]}", hint="mend or remove the line")
    for request in file.requests:
        said = [key for key, value in vars(request).items() if key not in ("prompt", "line") and value is not None]
        if said:
            raise PromptError(
                f"{path}, line {request.line}: {said[0]} has no effect here",
                hint="leave it out, or write a prompt a line",
            )
    return [request.prompt for request in file.requests]


def parse_prompts(data: bytes, *, source: str, as_json: bool) -> PromptFile:
    """Reads prompts from bytes; see `read_prompt_file`.

    Args:
        data: UTF-8. A line that is not, is a bad line.
        source: What it is called in messages.
        as_json: Whether each line is a JSON object.

    Raises:
        PromptError: There is no prompt at all.
    """
    requests: list[PromptRequest] = []
    errors: list[BadLine] = []
    # Only line feeds end a line: str.splitlines would also cut at characters that a JSON string may hold.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
            if not line or (line.startswith("#") and not as_json):
                continue
            requests.append(_parse_object(line, number) if as_json else _parse_plain(line, number))
        except UnicodeDecodeError:
            errors.append(BadLine(number, "not UTF-8 text"))
        except PhysFormerError as error:
            errors.append(BadLine(number, error.message))
    if not requests and not errors:
        raise PromptError(f"{source} holds no prompts", hint="write a prompt a line")
    return PromptFile(source, data.decode("utf-8", "replace"), tuple(requests), tuple(errors))


def _parse_plain(line: str, number: int) -> PromptRequest:
    if "\0" in line:
        raise PromptError("holds a NUL character; this is not a text file")
    return PromptRequest(line, number)


def _parse_object(line: str, number: int) -> PromptRequest:
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise PromptError("not valid JSON: nested too deeply") from error
    except ValueError as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise PromptError(f"not valid JSON{place}: {what}") from error
    if not isinstance(values, dict):
        raise PromptError('not a JSON object; write {"prompt": "..."}')
    for key, value in values.items():
        if key not in _CHECKS:
            close = difflib.get_close_matches(key, _CHECKS, n=1)
            raise PromptError(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if value is not None:
            allowed, wanted = _CHECKS[key]
            if not allowed(value):
                shown = json.dumps(value, ensure_ascii=isinstance(value, str) and not is_sayable(value))
                raise PromptError(f"{key} must be {wanted}, not {shown[:80]}")
    if values.get("prompt") is None:
        raise PromptError("has no prompt")
    if isinstance(values.get("steps"), list):
        values["steps"] = tuple(values["steps"])
    request = PromptRequest(line=number, **values)
    request.size()  # contradictions and ranges are this line's fault, told with its number
    return request


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_sayable(text: str) -> bool:
    """Whether UTF-8 can say it: not half a surrogate pair, which JSON and the bytes of a shell's argument may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value and is_sayable(value)


def _number(high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= high


def _steps(value: Any) -> bool:
    one = _whole(1, MAX_STEPS)
    return all(map(one, value)) and bool(value) if isinstance(value, list) else one(value)


_BIG = 10**9  # sizes out of range are told by `resolve_size`, which knows the limits
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_filled, "text that is not blank"),
    "seed": (_whole(0, MAX_SEED), "a whole number from 0 to 2^64-1"),
    "width": (_whole(-_BIG, _BIG), "a whole number"),
    "height": (_whole(-_BIG, _BIG), "a whole number"),
    "res": (_filled, 'text such as "720p"'),
    "aspect": (_filled, 'text such as "16:9"'),
    "steps": (_steps, f"a whole number from 1 to {MAX_STEPS}, or a list of such, one per level"),
    "guidance": (_number(MAX_GUIDANCE), f"a number from 0 to {MAX_GUIDANCE:g}"),
    "detail": (_number(MAX_DETAIL), f"a number from 0 to {MAX_DETAIL:g}"),
    "negative_prompt": (lambda value: isinstance(value, str), "text"),
    "output": (_filled, "the name of a file"),
}
