"""What a picture knows about its making, in the text chunks of its PNG file.

Two chunks are written: `parameters`, the form that AUTOMATIC1111's web UI made common and many viewers read, and
`physformer`, versioned JSON that holds everything. Reading needs no imaging library and checks every chunk's CRC.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physformer_core.errors import DataError
from physformer_core.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "physformer-png/1"
CHUNK = "physformer"
PARAMETERS_CHUNK = "parameters"

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT_BYTES = 16 << 20  # a compressed chunk may claim anything
_MAX_SETTINGS = 8192  # characters of the line of settings that other programs write
_MAX_CHUNK_BYTES = (1 << 31) - 1


@dataclasses.dataclass
class PictureMetadata:
    """How a picture was made.

    Args:
        prompt: The prompt.
        seed: The seed of its noise.
        width: Pixels.
        height: Pixels.
        steps: Steps of the solver at the coarsest level.
        guidance: Guidance scale.
        solver: The solver's name.
        negative_prompt: The negative prompt, "" for none.
        image_index: Which picture of its seed it is, from 0.
        checkpoint: The checkpoint's name.
        checkpoint_sha256: The hash of its weights.
        version: The version of this package that made it.
        run: The id of the run record.
        extra: Anything else, in JSON's types: dtype, device, guidance interval, steps per level, ...
    """

    prompt: str
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    negative_prompt: str = ""
    image_index: int = 0
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    version: str | None = __version__
    run: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values with the format's name first; keys without a value are left out."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, {})}
        return {"format": FORMAT, **values}

    def to_json(self) -> str:
        """The text of the `physformer` chunk. The same values give the same bytes."""
        return json.dumps(self.as_dict(), ensure_ascii=False, sort_keys=True)

    def to_parameters(self) -> str:
        """The text of the `parameters` chunk: prompt, negative prompt, and a line of `Name: value` pairs."""
        pairs: list[tuple[str, object]] = [
            ("Steps", self.steps),
            ("Sampler", self.solver),
            ("CFG scale", self.guidance),
            ("Seed", self.seed),
            ("Size", f"{self.width}x{self.height}" if self.width and self.height else None),
            ("Model hash", self.checkpoint_sha256[:10] if self.checkpoint_sha256 else None),
            ("Model", self.checkpoint),
            ("Lora hashes", _lora_hashes(self.extra.get("loras"))),
            ("Version", f"physformer {self.version}" if self.version else None),
        ]
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs if value is not None))
        return "\n".join(lines)


def save_png(path: str | Path, image: Image, metadata: PictureMetadata) -> None:
    """Writes a picture with its metadata. Give `path` from `files.atomic_write`.

    Args:
        path: The file, written whatever its suffix.
        image: A `PIL.Image.Image`.
        metadata: What goes into the text chunks.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    # A1111's readers expect Latin-1 `tEXt` where it suffices; PIL falls back to UTF-8 `iTXt` by itself.
    chunks.add_text(PARAMETERS_CHUNK, _sayable(metadata.to_parameters()))
    chunks.add_itxt(CHUNK, _sayable(metadata.to_json()))
    image.save(path, format="PNG", pnginfo=chunks)


def read_metadata(path: str | Path) -> PictureMetadata:
    """Reads how a picture was made, from the `physformer` chunk, else from a `parameters` chunk of another program.

    Raises:
        DataError: The file cannot be read, is no PNG, is damaged or cut short, has no such chunk, or one of a later
            version.
    """
    path = Path(path)
    chunks = read_text_chunks(path)
    if CHUNK in chunks:
        return _from_json(chunks[CHUNK], path)
    if PARAMETERS_CHUNK in chunks:
        return _from_parameters(chunks[PARAMETERS_CHUNK])
    raise DataError(
        f"{path} holds no generation metadata",
        hint="only pictures that physformer wrote, or that have a `parameters` text chunk, tell how they were made; "
        "editing and messaging programs often remove it",
    )


def read_text_chunks(path: str | Path) -> dict[str, str]:
    """Returns the tEXt, zTXt and iTXt chunks of a PNG file, by keyword; the last of a keyword wins.

    Raises:
        DataError: The file cannot be read, is no PNG, or is damaged or cut short.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    try:
        with path.open("rb") as stream:
            signature = stream.read(len(_SIGNATURE))
            if signature != _SIGNATURE:
                what = "is empty" if not signature else "is not a PNG file"
                raise DataError(f"{path} {what}", hint="metadata is kept in PNG files only")
            while True:
                header = stream.read(8)
                if len(header) < 8:
                    raise _damaged(path, "cut short")
                length, kind = struct.unpack(">I4s", header)
                if length > _MAX_CHUNK_BYTES:
                    raise _damaged(path, "damaged (a chunk has an impossible length)")
                data = stream.read(length)
                crc = stream.read(4)
                if len(data) < length or len(crc) < 4:
                    raise _damaged(path, "cut short")
                if zlib.crc32(kind + data) != struct.unpack(">I", crc)[0]:
                    raise _damaged(path, "damaged (a checksum does not match)")
                if kind == b"IEND":
                    return texts
                if kind in (b"tEXt", b"zTXt", b"iTXt"):
                    try:
                        keyword, text = _decode_text(kind, data)
                    except (ValueError, IndexError, zlib.error) as error:
                        raise _damaged(path, f"damaged (a text chunk: {error})") from error
                    texts[keyword] = text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _decode_text(kind: bytes, data: bytes) -> tuple[str, str]:
    """Keyword and text of a chunk's data; PNG specification, section 11.3.3."""
    keyword, rest = data.split(b"\0", 1)
    if kind == b"tEXt":
        return keyword.decode("latin-1"), rest.decode("latin-1")
    if kind == b"zTXt":
        return keyword.decode("latin-1"), _inflate(rest[1:]).decode("latin-1")
    compressed = rest[0] == 1
    _language, _translated, text = rest[2:].split(b"\0", 2)
    return keyword.decode("latin-1"), (_inflate(text) if compressed else text).decode("utf-8")


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, _MAX_TEXT_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"more than {_MAX_TEXT_BYTES >> 20} MiB of text")
    return text


def _from_json(text: str, path: Path) -> PictureMetadata:
    try:
        values = json.loads(text)
        name = values["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "damaged (its physformer chunk is not valid)") from error
    if name != FORMAT:
        raise DataError(
            f"{path} has metadata of format {name!r}; this version reads {FORMAT}",
            hint="upgrade physformer: pip install --upgrade physformer",
        )
    known = {field.name for field in dataclasses.fields(PictureMetadata)}
    kept = {"version": None, **{key: value for key, value in values.items() if key in known}}
    checks: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("prompt", "negative_prompt"), str),
        **dict.fromkeys(("seed", "width", "height", "steps", "image_index"), int),
        **dict.fromkeys(("solver", "checkpoint", "checkpoint_sha256", "version", "run"), (str, type(None))),
        "guidance": (int, float),
        "extra": dict,
    }
    wrong = [key for key, value in kept.items() if not isinstance(value, checks[key])]
    if wrong or "prompt" not in kept:
        raise _damaged(path, f"damaged (its physformer chunk has a wrong {', '.join(wrong) or 'prompt'})")
    return PictureMetadata(**kept)


def _from_parameters(text: str) -> PictureMetadata:
    """Reads A1111's form. Names that are not ours go into `extra`."""
    *lines, last = text.strip().split("\n")
    pairs = {}
    if "Steps:" in last and len(last) <= _MAX_SETTINGS:  # over a long text the expression takes quadratic time
        found = re.finditer(r'([\w /-]+):\s*("(?:\\.|[^"])*"|[^,]*)', last)
        pairs = {match[1].strip(): _unquoted(match[2]) for match in found}
    if "Steps" not in pairs:  # no settings line: all of it is the prompt
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    if prompt.startswith("Negative prompt: "):
        prompt, negative = "", prompt.removeprefix("Negative prompt: ")
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", pairs.pop("Size", ""))
    return PictureMetadata(
        prompt=prompt,
        negative_prompt=negative,
        steps=_number(pairs.pop("Steps", None), int),
        solver=pairs.pop("Sampler", None),
        guidance=_number(pairs.pop("CFG scale", None), float),
        seed=_number(pairs.pop("Seed", None), int),
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
        checkpoint=pairs.pop("Model", None),
        version=None,
        extra=dict(pairs),
    )


def _lora_hashes(loras: object) -> str | None:
    """`name: hash, name: hash`, as readers of the web UI's files know it."""
    if not isinstance(loras, list) or not all(isinstance(one, dict) and "sha256" in one for one in loras):
        return None
    return ", ".join(f"{one.get('name')}: {str(one['sha256'])[:12]}" for one in loras) or None


def _number(text: str | None, kind: type) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:  # other programs write other things there
        return None


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquoted(text: str) -> str:
    text = text.strip()
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _sayable(text: str) -> str:
    """Replaces lone surrogates (from undecodable arguments), which UTF-8 cannot say."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _damaged(path: Path, how: str) -> DataError:
    return DataError(f"{path} is {how}", hint="copy or make the picture again")
