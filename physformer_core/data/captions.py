"""Distinct captions -> captions.arrow: each encoded once, in parts that survive an interruption."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from physformer_core.data.workers import Progress, run_tasks
from physformer_core.errors import DataError
from physformer_core.files import atomic_write, sha256_file

if TYPE_CHECKING:
    from physformer_core.text import TextEncoder

CAPTION_SCHEMA = pa.schema(
    [("text", pa.string()), ("length", pa.int16()), ("tokens", pa.binary()), ("pooled", pa.binary())]
)

_PART_ROWS = 4096
_RECORD_BATCH_ROWS = 1024
# Measured with MiniLM on one core, fp32, sorted by length: 300 captions/s in batches of 32, 320 in batches of 128.
_ENCODE_BATCH = 128


@dataclass(frozen=True)
class _Part:
    path: Path
    texts: list[str]
    lengths: list[int]
    encoder: str


def write_captions(
    path: Path,
    texts: Sequence[str],
    lengths: np.ndarray,
    encoder: str,
    *,
    parts: Path,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Encodes captions and writes them to one Arrow file: text, length, tokens and pooled (float16 bytes).

    Args:
        path: The file to write.
        texts: Distinct captions, sorted by length (a batch is padded to its longest).
        lengths: Their tokens.
        encoder: Text encoder, as for `text.load_text_encoder`.
        parts: Folder for finished parts. Those already there must belong to the same captions and encoder, and are
            used. The caller removes them.
        workers: Processes.
        progress: Is told how many captions are done, as the stage "captions".

    Returns:
        The file's entry for a manifest: name, count, hidden_size, pooled_size, bytes, sha256.

    Raises:
        DataError: There are no captions.
    """
    if not texts:
        raise DataError("the raw set has no usable caption", hint="raise max_tokens, or look at the captions")
    tasks = [
        _Part(
            parts / f"captions-{start // _PART_ROWS:05d}.arrow",
            list(texts[start : start + _PART_ROWS]),
            lengths[start : start + _PART_ROWS].tolist(),
            encoder,
        )
        for start in range(0, len(texts), _PART_ROWS)
    ]
    missing = [task for task in tasks if not task.path.is_file()]
    done = len(texts) - sum(len(task.texts) for task in missing)
    try:
        run_tasks(_encode_part, missing, workers, progress, "captions", done, len(texts))
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
        "count": len(texts),
        "hidden_size": len(tokens) // 2 // length,
        "pooled_size": len(pooled) // 2,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def _encode_part(task: _Part, tick: Callable[[int], None]) -> None:
    with _one_thread():
        _write_part(task, _encoder(task.encoder), tick)


def _write_part(task: _Part, encoder: TextEncoder, tick: Callable[[int], None]) -> None:
    with atomic_write(task.path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, CAPTION_SCHEMA) as writer:
            for start in range(0, len(task.texts), _RECORD_BATCH_ROWS):
                stop = min(start + _RECORD_BATCH_ROWS, len(task.texts))
                tokens: list[bytes] = []
                pooled: list[bytes] = []
                for first in range(start, stop, _ENCODE_BATCH):
                    texts = task.texts[first : min(first + _ENCODE_BATCH, stop)]
                    embeddings = encoder.encode(texts)
                    tokens_btd = embeddings.tokens_btd.numpy().astype(np.float16)
                    pooled_bp = embeddings.pooled_bp.numpy().astype(np.float16)
                    for row, length in enumerate(task.lengths[first : first + len(texts)]):
                        tokens.append(tokens_btd[row, :length].tobytes())
                        pooled.append(pooled_bp[row].tobytes())
                    tick(len(texts))
                columns = [task.texts[start:stop], task.lengths[start:stop], tokens, pooled]
                writer.write_batch(
                    pa.record_batch(
                        [pa.array(column, field.type) for column, field in zip(columns, CAPTION_SCHEMA, strict=True)],
                        schema=CAPTION_SCHEMA,
                    )
                )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, hence the last bit of an embedding, may depend on the number of threads: so always one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _encoder(spec: str) -> TextEncoder:
    """The text encoder, loaded once per process."""
    from physformer_core.text import load_text_encoder

    return load_text_encoder(spec)
