"""Distinct captions -> captions.arrow: each encoded once, in parts that survive an interruption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from physformer_core.data.scan import PART_ROWS, Scan
from physformer_core.data.workers import Progress, one_thread, run_tasks
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file

if TYPE_CHECKING:
    from physformer_core.text import TextEncoder

CAPTION_SCHEMA = pa.schema(
    [("text", pa.string()), ("length", pa.int16()), ("tokens", pa.binary()), ("pooled", pa.binary())]
)

_RECORD_BATCH_ROWS = 1024
# Measured with MiniLM on one core, fp32, sorted by length: 300 captions/s in batches of 32, 320 in batches of 128.
_ENCODE_BATCH = 128


@dataclass(frozen=True)
class _Part:
    path: Path
    number: int
    scan: Scan
    encoder: str
    device: str

    @property
    def count(self) -> int:
        return min(PART_ROWS, self.scan.captions - self.number * PART_ROWS)


def write_captions(
    path: Path,
    scan: Scan,
    encoder: str,
    *,
    parts: Path,
    workers: int,
    progress: Progress | None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Encodes captions and writes them to one Arrow file: text, length, tokens and pooled (float16 bytes).

    Args:
        path: The file to write.
        scan: The captions, in the order of their tokens (a batch is padded to its longest).
        encoder: Text encoder, as for `text.load_text_encoder`.
        parts: Folder for finished parts. Those already there must belong to the same captions and encoder, and are
            used. The caller removes them.
        workers: Processes; on another device than the CPU one is enough, and more would each fill its memory.
        progress: Is told how many captions are done, as the stage "captions".
        device: Where the encoder runs.

    Returns:
        The file's entry for a manifest: name, count, hidden_size, pooled_size, bytes, sha256.

    Raises:
        DataError: There are no captions.
    """
    if not scan.captions:
        raise DataError("the raw set has no usable caption", hint="raise max_tokens, or look at the captions")
    tasks = [
        _Part(parts / f"captions-{number:05d}.arrow", number, scan, encoder, device)
        for number in range(-(-scan.captions // PART_ROWS))
    ]
    missing = [task for task in tasks if not task.path.is_file()]
    done = scan.captions - sum(task.count for task in missing)
    try:
        processes = workers if device == "cpu" else 1
        run_tasks(_encode_part, missing, processes, progress, "captions", done, scan.captions)
    finally:
        _encoder.cache_clear()

    with atomic_write(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, CAPTION_SCHEMA) as writer:
            for task in tasks:
                with pa.memory_map(str(task.path)) as mapped:
                    reader = pa.ipc.open_file(mapped)
                    for index in range(reader.num_record_batches):
                        writer.write_batch(reader.get_batch(index))
    with pa.memory_map(str(path)) as mapped:
        first = pa.ipc.open_file(mapped).get_batch(0)
        length, tokens, pooled = (first.column(name)[0].as_py() for name in ("length", "tokens", "pooled"))
    return {
        "name": path.name,
        "count": scan.captions,
        "hidden_size": len(tokens) // 2 // length,
        "pooled_size": len(pooled) // 2,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def _encode_part(task: _Part, tick: Callable[[int], None]) -> None:
    with one_thread():
        _write_part(task, _encoder(task.encoder, task.device), tick)


def _write_part(task: _Part, encoder: TextEncoder, tick: Callable[[int], None]) -> None:
    all_texts, all_lengths = task.scan.part(task.number)
    with atomic_write(task.path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, CAPTION_SCHEMA) as writer:
            for start in range(0, len(all_texts), _RECORD_BATCH_ROWS):
                stop = min(start + _RECORD_BATCH_ROWS, len(all_texts))
                tokens: list[bytes] = []
                pooled: list[bytes] = []
                for first in range(start, stop, _ENCODE_BATCH):
                    texts = all_texts[first : min(first + _ENCODE_BATCH, stop)]
                    embeddings = encoder.encode(texts)
                    tokens_btd = embeddings.tokens_btd.numpy().astype(np.float16)
                    pooled_bp = embeddings.pooled_bp.numpy().astype(np.float16)
                    for row, length in enumerate(all_lengths[first : first + len(texts)]):
                        tokens.append(tokens_btd[row, :length].tobytes())
                        pooled.append(pooled_bp[row].tobytes())
                    tick(len(texts))
                columns = [all_texts[start:stop], all_lengths[start:stop], tokens, pooled]
                writer.write_batch(
                    pa.record_batch(
                        [pa.array(column, field.type) for column, field in zip(columns, CAPTION_SCHEMA, strict=True)],
                        schema=CAPTION_SCHEMA,
                    )
                )


@functools.lru_cache(maxsize=1)
def _encoder(spec: str, device: str) -> TextEncoder:
    """The text encoder, loaded once per process."""
    from physformer_core.text import load_text_encoder

    return load_text_encoder(spec, device)
