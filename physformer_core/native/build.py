"""Kernels in C: compiled once on the machine that runs them, and kept in the cache folder.

A compiler that is there anyway (cc, gcc, or what CC names) with OpenMP is enough; without one everything runs in
torch, which `physformer doctor` says. The library's name holds a hash of the source, the flags, the compiler and the
processor, so that a folder that several machines share serves each of them, and nothing stale is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from physformer_core.errors import OutputError
from physformer_core.files import atomic_write, cache_folder, output_error

_FOLDER = Path(__file__).parent
SOURCES = ("attention.c", "convolutions.c", "matrices.c", "pictures.c", "prompts.c", "tokens.c", "vectors.h")

SWITCH = "PHYSFORMER_NATIVE"
"""Environment variable that leaves the kernels out where it is 0."""

# Fused multiply-adds, but no reordering of sums: the same source gives the same bytes with any number of threads.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")

_COMPILE_SECONDS = 120

_F, _P, _I, _L = ctypes.c_float, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

_ARGUMENTS = {
    "tokens_in_a_part": (),
    "norm_modulate": (*(_P,) * 4, _L, _L, _I, _F, _I),
    "norm_modulate_back": (*(_P,) * 6, _L, _L, _I, _F, _I),
    "renormalized_update": (*(_P,) * 4, _L, _L, _I, _F, _F, _I),
    "renormalized_update_back": (*(_P,) * 7, _L, _L, _I, _F, _F, _I),
    "norm_rotate": (*(_P,) * 5, _L, _L, _I, _I, _I, _F, _I),
    "norm_rotate_back": (*(_P,) * 7, _L, _L, _I, _I, _I, _F, _I),
    "gated_linear": (_P, _P, _L, _I, _I),
    "gated_linear_back": (_P, _P, _P, _L, _I, _I),
    "modulated_silu": (*(_P,) * 4, _L, _L, _I, _I),
    "modulated_silu_back": (*(_P,) * 7, _L, _L, _I, _I),
    "images_in_a_part": (),
    "activated_convolution": (*(_P,) * 7, _L, *(_I,) * 5),
    "activated_convolution_back": (*(_P,) * 12, _L, *(_I,) * 5),
    "halving_convolution": (*(_P,) * 4, _L, *(_I,) * 5),
    "halving_convolution_back": (*(_P,) * 7, _L, *(_I,) * 5),
    "area_average": (_P, _L, _I, _I, *(_I, _P, _P, _P, _I) * 2, _P),
    "window_attention": (*(_P,) * 10, _L, *(_I,) * 11),
    "window_attention_back": (*(_P,) * 18, _L, *(_I,) * 11),
    "window_scratch": (_I,) * 5,
    "text_attention": (*(_P,) * 4, _L, _I, _I, _F, _I),
    "text_attention_back": (*(_P,) * 6, _L, _I, _I, _F, _I),
    "text_keys": (*(_P,) * 5, _L, *(_I,) * 5, _F, _F, _I),
    "text_keys_back": (*(_P,) * 7, _L, *(_I,) * 5, _F, _I),
    "text_values": (*(_P,) * 3, _L, *(_I,) * 5),
    "orthogonalize": (*(_P,) * 3, _L, _I, _I, _I, _F, _F, _F, _I),
    "orthogonalize_scratch": (_I, _I),
    "muon_step": (*(_P,) * 4, _L, _I, _I, _I, *(_F,) * 6, _I),
}
_RESULTS = {
    "window_scratch": _L,
    "orthogonalize_scratch": _L,
    "tokens_in_a_part": _I,
    "images_in_a_part": _I,
    "area_average": _I,
}


class Unavailable(Exception):
    """Why there are no kernels, in a few words."""


def switched_off() -> bool:
    """Whether the user wants none."""
    return os.environ.get(SWITCH, "1").lower() in ("0", "false", "off", "no")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels, compiled now if they were not yet.

    Raises:
        Unavailable: They are switched off, or cannot be compiled, kept or loaded.
    """
    if switched_off():
        raise Unavailable(f"{SWITCH}={os.environ[SWITCH]} leaves them out")
    try:
        path = _compiled()
        library = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, _RESULTS.get(name)
    except OutputError as error:
        raise Unavailable(f"they cannot be kept: {error.message}") from error
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # no home folder, a broken CC, no sources ...
        raise Unavailable(str(error)) from error
    return library


def _compiled() -> Path:
    """The library's path, in a folder that nobody else can write."""
    compiler = _compiler()
    flags = ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native", *_FLAGS]
    version = _run([*compiler, "--version"]).splitlines()[:1]
    sources = [(_FOLDER / name).read_text(encoding="utf-8") for name in SOURCES]
    parts = [*sources, *flags, *compiler, *version, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder() / "native"
    path = folder / f"kernels-{key}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    if not path.is_file():
        with atomic_write(path) as temporary:
            _compile([*compiler, *flags], temporary)
            temporary.chmod(0o700)  # many a umask lets one's group write
    for one in (folder, path):
        facts = one.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise Unavailable(f"{one} is another user's, or others may write it: what is there is not loaded")
    return path


def _compile(command: list[str], target: Path) -> None:
    """Every source by a compiler of its own, all at once, and then together."""
    units = [name for name in SOURCES if name.endswith(".c")]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor(len(units)) as pool:
        objects = [str(Path(folder, name).with_suffix(".o")) for name in units]
        commands = (
            [*command, "-c", str(_FOLDER / name), "-o", made] for name, made in zip(units, objects, strict=True)
        )
        list(pool.map(_run, commands))
        _run([*command, "-shared", *objects, "-o", str(target), "-lm"])


def _compiler() -> list[str]:
    if sys.platform == "win32":
        raise Unavailable("they are not made for Windows")
    asked = os.environ.get("CC")
    if asked:
        return shlex.split(asked)
    for name in ("cc", "gcc"):
        if (found := shutil.which(name)) is not None:
            return [found]
    raise Unavailable("there is no C compiler, for example: apt install gcc")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_COMPILE_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C compiler does not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Unavailable(f"{command[0]} cannot compile them: {errors[0].strip()}")
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))
