"""Real photographs in every form that `physformer data fetch` reads: fetched, preprocessed and inspected.

    pip install elpv-dataset==1.0.0.post1        # 2,624 photographs of solar cells, 91 MB, CC-BY-NC-SA 4.0
    python examples/solar_cells.py cells/

The photographs (electroluminescence, grey, 300x300) come from the package, captions and classes from its table of
labels. The script writes one source per form into cells/sources, and runs fetch, preprocess and inspect on each.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CELLS = {"mono": "monocrystalline", "poly": "polycrystalline"}
CONDITIONS = {"0.0": "intact", "0.3333333333333333": "possibly damaged", "0.6666666666666666": "probably damaged",
              "1.0": "damaged"}  # fmt: skip
LICENSE = "CC-BY-NC-SA-4.0"
SHARD = 500


@dataclass(frozen=True)
class Photograph:
    """A photograph, its name, two captions and its class."""

    name: str
    image: bytes
    captions: tuple[str, str]
    label: int

    @property
    def class_name(self) -> str:
        return sorted(CELLS.values())[self.label]


def photographs(limit: int | None) -> list[Photograph]:
    """What the package holds, or the first of it."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        sys.exit("the photographs are not installed: pip install elpv-dataset==1.0.0.post1")
    data = Path(package.origin).parent / "data"
    found = []
    for line in (data / "labels.csv").read_text("utf-8").splitlines()[:limit]:
        path, probability, kind = line.split()
        condition = CONDITIONS[f"{float(probability)}"]
        captions = (
            f"a photograph of a {condition} {CELLS[kind]} solar cell",
            f"{CELLS[kind]} silicon, {condition}",
        )
        label = sorted(CELLS.values()).index(CELLS[kind])
        found.append(Photograph(Path(path).stem, (data / path).read_bytes(), captions, label))
    return found


def write_text_files(folder: Path, shown: list[Photograph]) -> None:
    for one in shown:
        (folder / f"{one.name}.png").write_bytes(one.image)
        (folder / f"{one.name}.txt").write_text("\n".join(one.captions), "utf-8")


def write_jsonl(folder: Path, shown: list[Photograph]) -> None:
    lines = []
    for one in shown:
        (folder / f"{one.name}.png").write_bytes(one.image)
        lines.append(json.dumps({"file_name": f"{one.name}.png", "text": list(one.captions), "cell": one.label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_csv(folder: Path, shown: list[Photograph]) -> None:
    rows = ["file_name,text"]
    for one in shown:
        (folder / f"{one.name}.png").write_bytes(one.image)
        rows += [f'{one.name}.png,"{caption}"' for caption in one.captions]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", "utf-8")


def write_classes(folder: Path, shown: list[Photograph]) -> None:
    for one in shown:
        (folder / one.class_name).mkdir(exist_ok=True)
        (folder / one.class_name / f"{one.name}.png").write_bytes(one.image)


def write_tars(folder: Path, shown: list[Photograph]) -> None:
    for first in range(0, len(shown), SHARD):
        with tarfile.open(folder / f"cells-{first // SHARD:03d}.tar", "w") as archive:
            for one in shown[first : first + SHARD]:
                words, label = json.dumps({"captions": one.captions}).encode(), str(one.label).encode()
                for ending, content in (("png", one.image), ("json", words), ("cls", label)):
                    entry = tarfile.TarInfo(f"{one.name}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def _table(shown: list[Photograph]) -> pa.Table:
    return pa.table(
        {
            "image": [{"bytes": one.image, "path": f"{one.name}.png"} for one in shown],
            "captions": [list(one.captions) for one in shown],
            "label": [one.label for one in shown],
        }
    )


def write_parquet(folder: Path, shown: list[Photograph]) -> None:
    for first in range(0, len(shown), SHARD):
        pq.write_table(_table(shown[first : first + SHARD]), folder / f"cells-{first // SHARD:03d}.parquet")


def write_repository(folder: Path, shown: list[Photograph]) -> None:
    """As a data set lies on the Hub: a card with the licence, and a Parquet file for each split."""
    (folder / "data").mkdir()
    (folder / "README.md").write_text(f"---\nlicense: {LICENSE.lower()}\n---\n# Solar cells\n", "utf-8")
    held_out = len(shown) // 10
    pq.write_table(_table(shown[held_out:]), folder / "data" / "train-00000-of-00001.parquet")
    pq.write_table(_table(shown[:held_out]), folder / "data" / "test-00000-of-00001.parquet")


# Form: how it is written, and how it is fetched.
FORMS: dict[str, tuple[Callable[[Path, list[Photograph]], None], list[str]]] = {
    "text-files": (write_text_files, ["folder", "{}"]),
    "metadata-jsonl": (write_jsonl, ["folder", "{}", "--label-column", "cell"]),
    "metadata-csv": (write_csv, ["folder", "{}"]),
    "classes": (write_classes, ["folder", "{}"]),
    "webdataset": (write_tars, ["webdataset", "{}/*.tar"]),
    "parquet": (write_parquet, ["parquet", "{}"]),
    "repository": (write_repository, ["huggingface", "{}", "--split", "train"]),
}


def physformer(*arguments: str) -> dict:
    """Runs a command, and returns what it prints with --json."""
    command = [sys.executable, "-m", "physformer_cli", *arguments, "--json", "--no-record"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--limit", type=int, help="take so many photographs only")
    parser.add_argument("--forms", default=",".join(FORMS), help="which, with commas between them")
    options = parser.parse_args()
    shown = photographs(options.limit)
    print(f"{len(shown)} photographs")
    for form in options.forms.split(","):
        write, fetch = FORMS[form]
        source, raw, made = (str(options.folder / kind / form) for kind in ("sources", "raw", "sets"))
        if not Path(source).exists():
            Path(source).mkdir(parents=True)
            write(Path(source), shown)
        started = time.perf_counter()
        place = [part.format(source) for part in fetch]
        fetched = physformer("data", "fetch", *place, "--output", raw, "--license", LICENSE)
        after_fetch = time.perf_counter()
        done = physformer("data", "preprocess", raw, "--output", made, "--levels", "1,2")
        after_preprocess = time.perf_counter()
        found = physformer("data", "inspect", raw, "--output", str(options.folder / "reports" / form))
        print(
            f"{form}: {fetched['count']} fetched in {after_fetch - started:.1f} s, "
            f"{done['train_base'] + done['validation_base']} pictures and "
            f"{done['train_crop'] + done['validation_crop']} crops in {after_preprocess - after_fetch:.1f} s, "
            f"{found['captions']} captions, {len(found['classes'])} classes, {done['cut_area']:.1%} cut off, "
            f"{found['near_duplicates_count']} look like another"
        )


if __name__ == "__main__":
    main()
