"""`physformer train` as one of the processes that ``torchrun`` starts: one voice, one error, one end for all."""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import typer

from physformer_cli import console

if TYPE_CHECKING:
    from physformer_core.training.distributed import Ranks

_P = ParamSpec("_P")
_current: contextvars.ContextVar[Ranks | None] = contextvars.ContextVar("ranks", default=None)


def as_one_run(command: Callable[_P, None]) -> Callable[_P, None]:
    """Makes a command join the other processes of its run, if it was started as one of several.

    The first rank alone speaks. A rank that fails says why, and the others end without a word.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        # Looked at here too: torch is not imported to learn that there is nobody else.
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            command(*args, **kwargs)
            return
        from physformer_core.training.distributed import PeerFailed, joined

        try:
            with joined() as ranks:
                token = _current.set(ranks)
                if not ranks.is_main:
                    console.mute()
                try:
                    command(*args, **kwargs)
                finally:
                    _current.reset(token)
        except PeerFailed:
            raise typer.Exit(1) from None

    return run


def ranks() -> Ranks | None:
    """This process among the others of the run; None if it was not started as one of several."""
    return _current.get()


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    here = _current.get()
    return here is None or here.is_main


def resume_after_restart(resume: str | None) -> str | None:
    """What ``--resume`` means: processes that ``torchrun --max-restarts`` has started again always go on."""
    if _current.get() is None:
        return resume
    from physformer_core.training.distributed import restarts

    if restarts() == 0:
        return resume
    console.say(f"started again by torchrun (restart {restarts()})")
    return "auto"
