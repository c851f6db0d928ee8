"""The keys that `physformer.toml` may set: one table per command, each key the name of a command-line option.

A key set in the file is the default of that option; the option itself wins. Commands read them with
`Project.settings(table)`; a key that no command reads does not belong here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping

from physformer_core.errors import ConfigError

SettingValue = str | int | float | bool | list[int]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a table.

    Args:
        kind: The type of its value; an integer is taken where a float is asked for.
        example: The value shown, commented out, by the file that `physformer init` writes.
        help: What it does, in a few words.
        choices: The values allowed, for strings; empty for any.
        path: It is a path, relative to the folder of `physformer.toml`.
        several: A list of such values is taken as well.
    """

    kind: type[str] | type[int] | type[float] | type[bool]
    example: SettingValue
    help: str
    choices: tuple[str, ...] = ()
    path: bool = False
    several: bool = False


_DTYPES = ("auto", "fp32", "bf16", "fp16")

SETTINGS: dict[str, dict[str, Setting]] = {
    "generate": {
        "checkpoint": Setting(
            str, "runs/nano", "folder of a checkpoint or a run; the shipped one if not set", path=True
        ),
        "res": Setting(str, "720p", "360p 480p 720p 1080p 1440p 4k 8k or WIDTHxHEIGHT"),
        "aspect": Setting(str, "16:9", "width:height"),
        "width": Setting(int, 1280, "pixels"),
        "height": Setting(int, 720, "pixels"),
        "steps": Setting(int, [5, 1], "steps of the solver for each level, or for the coarsest", several=True),
        "guidance": Setting(float, 2.0, "how strongly to follow the prompt"),
        "detail": Setting(float, 1.05, "how much detail finer levels add"),
        "solver": Setting(str, "heun", "the solver of the flow"),
        "negative_prompt": Setting(str, "blurry", "what to keep out of the picture"),
        "num_images": Setting(int, 1, "pictures per prompt"),
        "seed": Setting(int, 7, "the first picture's seed"),
        "output": Setting(str, "outputs/", "a file, a folder or a pattern", path=True),
        "device": Setting(str, "cpu", "cpu, cuda, cuda:1, mps"),
        "dtype": Setting(str, "fp32", "number format: auto, fp32, bf16, fp16", choices=_DTYPES),
        "compile": Setting(bool, False, "compile the network first; pays off for many pictures"),
    },
    "data": {
        "workers": Setting(int, 4, "processes that draw and cut pictures"),
        "seed": Setting(int, 0, "the seed of composed scenes"),
    },
    "train": {
        "preset": Setting(str, "nano", "the configuration that the keys below change"),
        "data_dir": Setting(str, "data/nano", "a set made by data preprocess", path=True),
        "output": Setting(str, "runs/nano", "the run's folder", path=True),
        "steps": Setting(int, 20_000, "steps of the optimizer"),
        "batch_size": Setting(int, 96, "examples per step, over all processes"),
        "accumulate": Setting(int, 1, "parts that a batch is computed in, to save memory"),
        "gradient_checkpointing": Setting(bool, False, "compute blocks twice, to save memory"),
        "parallel": Setting(str, "auto", "under torchrun: auto, ddp, fsdp", choices=("auto", "ddp", "fsdp")),
        "lr": Setting(float, 6e-4, "peak learning rate of AdamW"),
        "muon_lr": Setting(float, 1e-3, "peak learning rate of Muon"),
        "crop_fraction": Setting(float, 0.25, "share of steps on crops of finer levels"),
        "checkpoint_every": Setting(int, 500, "steps between checkpoints"),
        "sample_every": Setting(int, 500, "steps between sample grids; 0 draws none"),
        "tensorboard": Setting(bool, True, "also write event files for TensorBoard"),
        "wandb": Setting(str, "offline", "also write a run of Weights & Biases", choices=("offline", "online")),
        "wandb_project": Setting(str, "physformer", "its project"),
        "seed": Setting(int, 0, "the seed of weights, noise and the order of the data"),
        "device": Setting(str, "cuda", "cpu, cuda, mps"),
        "dtype": Setting(str, "bf16", "number format of the arithmetic", choices=_DTYPES),
        "compile": Setting(bool, True, "compile the network first"),
        "cuda_graphs": Setting(bool, False, "record steps on a GPU and replay them"),
    },
}


def check_tables(tables: Mapping[str, object], *, source: str, text: str = "") -> None:
    """Refuses tables and keys that are unknown or have values of the wrong type.

    Args:
        tables: The parsed file, without its `runs`.
        source: What the file is called in messages.
        text: Its text, to say on which line.

    Raises:
        ConfigError: With the line, and the nearest known name where there is one.
    """
    for table_name, table in tables.items():
        line = line_of(text, table_name, None)
        if table_name not in SETTINGS:
            raise ConfigError(
                f"{_place(source, line)}: unknown table [{table_name}]" + _nearest(table_name, SETTINGS),
                hint="the tables are " + ", ".join(f"[{name}]" for name in SETTINGS),
            )
        if not isinstance(table, dict):
            raise ConfigError(
                f"{_place(source, line)}: {table_name} must be a table", hint=f"write [{table_name}] on its own line"
            )
        for key, value in table.items():
            place = _place(source, line_of(text, table_name, key))
            if key not in SETTINGS[table_name]:
                raise ConfigError(
                    f"{place}: unknown key {key!r} in [{table_name}]" + _nearest(key, SETTINGS[table_name]),
                    hint=f"[{table_name}] knows " + ", ".join(SETTINGS[table_name]),
                )
            _check_value(SETTINGS[table_name][key], key, value, place)


def template() -> str:
    """The text of a fresh `physformer.toml`: every key there is, commented out, with what it does."""
    lines = [
        "# PhysFormer's settings for this folder and every folder below it.",
        "# A key set here is the default of the command-line option of the same name; the option wins.",
        "# Every run is recorded at the end of this file as a [[runs]] table; `physformer runs list` shows them.",
    ]
    for table_name, table in SETTINGS.items():
        lines += ["", f"[{table_name}]"]
        for key, setting in table.items():
            shown = f"# {key} = {_toml_scalar(setting.example)}"
            lines.append(f"{shown:<42} # {setting.help}")
    return "\n".join(lines) + "\n"


def line_of(text: str, table: str, key: str | None) -> int | None:
    """The line, from 1, on which a table (key None) or a key of it stands, or None if it is written in another way."""
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]", line)
        if header is not None:
            inside = header[1].strip("\"'") == table
            if inside and key is None:
                return number
            continue
        name = re.match(r"\s*([\"']?)([^\"'=#]+?)\1\s*=", line)
        if name is None:
            continue
        if key is None and not inside and name[2] == table:
            return number
        if (inside and name[2] == key) or name[2] == f"{table}.{key}":
            return number
    return None


def _check_value(setting: Setting, key: str, value: object, place: str) -> None:
    allowed = (int, float) if setting.kind is float else (setting.kind,)
    several = setting.several and isinstance(value, list) and bool(value)
    # bool is a subclass of int: `steps = true` must not pass as 1.
    if not all(
        isinstance(one, allowed) and (setting.kind is bool or not isinstance(one, bool))
        for one in (value if several else [value])  # type: ignore[attr-defined]
    ):
        kind = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[setting.kind]
        kind += " or a list of such" if setting.several else ""
        raise ConfigError(
            f"{place}: {key} must be {kind}, not {value!r}",
            hint=f"for example: {key} = {_toml_scalar(setting.example)}",
        )
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{place}: {key} = {value!r} is not known", hint="one of " + ", ".join(setting.choices))


def _toml_scalar(value: SettingValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _place(source: str, line: int | None) -> str:
    return f"{source}, line {line}" if line is not None else source
