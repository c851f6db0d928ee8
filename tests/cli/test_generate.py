"""`physformer generate`: in this process where that will do, and a few times as the installed command."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from physformer_core.batching import PictureRequest, Planner, parse_interval, parse_seeds, parse_steps
from physformer_core.checkpoints import find_checkpoint, load_pipeline
from physformer_core.drawing import draw_batch
from physformer_core.errors import ConfigError, DeviceError, OutputError
from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE
from physformer_core.metadata import read_metadata
from physformer_core.output_names import OutputNames, slug
from physformer_core.project import Project

SIZE = ("-W", "96", "-H", "64", "--steps", "2")
LONG = "a bird " * 40

pytestmark = pytest.mark.usefixtures("drawing_in_an_empty_folder")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def last_run():
    return Project.load("physformer.toml").runs[-1]


def everything():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# What is drawn


def test_a_picture_and_what_it_tells(generate, tiny_checkpoint):
    ending = generate("a bird in a cage", "--seed", "7")
    assert ending.code == 0, ending.err
    (file,) = ending.files
    assert str(file) == "outputs/a-bird-in-a-cage-7.png" and Image.open(file).size == (96, 64)
    assert pixels(file).std() > 10  # the fixture does draw something
    told = read_metadata(file)
    assert (told.prompt, told.seed, told.image_index, told.width, told.height) == ("a bird in a cage", 7, 0, 96, 64)
    assert (told.steps, told.guidance, told.solver, told.run) == (2, DEFAULT_GUIDANCE, "euler", None)
    assert told.checkpoint == "tiny" and told.checkpoint_sha256 == find_checkpoint(tiny_checkpoint).sha256
    assert told.extra["dtype"] in ("fp32", "bf16") and told.extra["steps_per_level"] == [2, 1]
    assert told.extra["detail"] == DEFAULT_DETAIL
    assert (
        Image.open(file)
        .text["parameters"]
        .startswith(f"a bird in a cage\nSteps: 2, Sampler: euler, CFG scale: {DEFAULT_GUIDANCE}")
    )
    run = last_run()
    assert run.status == "ok" and run.seeds == [7] and run.checkpoint_sha256 == told.checkpoint_sha256
    assert [output.path for output in run.outputs] == [str(file)] and run.config["steps"] == "2"
    assert "1 picture in" in ending.err


def test_the_same_command_twice_gives_the_same_bytes_and_overwrites_nothing(generate):
    first = generate("a cat", "-n", "2", "--res", "150x130", size=("--steps", "2,1"))
    again = generate("a cat", "-n", "2", "--res", "150x130", size=("--steps", "2,1"))
    assert [file.name for file in first.files] == ["a-cat-0-0.png", "a-cat-0-1.png"]
    assert [file.name for file in again.files] == ["a-cat-0-0_1.png", "a-cat-0-1_1.png"]
    for one, other in zip(first.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first.files[0].read_bytes() != first.files[1].read_bytes()


def test_a_picture_in_a_batch_is_the_one_alone(generate):
    prompts = Path("prompts.txt")
    prompts.write_text("a cat\n# a comment\n\na red car on a city street at sunset\na dog\n")
    together = generate("--prompt-file", "prompts.txt", "-n", "2", "--res", "150x130", size=("--steps", "4,2"))
    alone = generate("--prompt-file", "prompts.txt", "-n", "2", "--res", "150x130", "--batch-size", "1",
                     size=("--steps", "4,2"))  # fmt: skip
    assert len(together.files) == len(alone.files) == 6
    assert len(read_metadata(together.files[0]).extra["batch"]["pictures"]) == 6
    assert "batch" not in read_metadata(alone.files[0]).extra
    for one, other in zip(together.files, alone.files, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 2
    assert abs(pixels(alone.files[0]) - pixels(alone.files[1])).max() > 20


def test_seeds_times_images(generate):
    ending = generate("a cat", "--seed", "3", "--seed", "5-6,9", "-n", "2", "-o", "{number}-{seed}-{index:02d}.png")
    names = [f"{number}-{seed}-{index:02d}.png" for number, (seed, index) in enumerate(
        ((seed, index) for seed in (3, 5, 6, 9) for index in (0, 1)), start=1)]  # fmt: skip
    assert [str(file) for file in ending.files] == names
    alone = generate("a cat", "--seed", "6", "-n", "2", "-o", "alone/")
    assert abs(pixels(alone.files[1]) - pixels("6-6-01.png")).max() <= 2
    assert last_run().seeds == [6]


def test_settings_beside_what_is_asked_of_the_size(generate):
    def size(settings, *options):
        Path("physformer.toml").write_text(f"[generate]\n{settings}\n")
        one = json.loads(generate("a cat", "--dry-run", "--json", *options, size=()).out)["pictures"][0]
        return one["width"], one["height"]

    assert size('aspect = "9:16"', "--res", "720p") == (720, 1280)
    assert size('aspect = "9:16"', "--res", "720p", "--aspect", "1:1") == (720, 720)
    assert size('aspect = "9:16"', "--res", "100x50") == (100, 50)
    assert size("width = 1000", "--height", "500") == (1000, 500)


def test_steps_of_the_project_file(generate):
    Path("physformer.toml").write_text("[generate]\nsteps = [3, 2, 2]\n")

    def steps(*options):
        ending = generate("a cat", "--dry-run", "--json", *options, size=("-W", "192", "-H", "128"))
        return [level["steps"] for level in json.loads(ending.out)["pictures"][0]["levels"]]

    assert steps() == [3, 2, 2] and steps("--steps", "5,4,1") == [5, 4, 1]


def test_detail(generate):
    Path("physformer.toml").write_text("[generate]\ndetail = 1.3\n")
    sharper, softer = generate("a cat", "-o", "13.png"), generate("a cat", "--detail", "1", "-o", "10.png")
    assert [read_metadata(one.files[0]).extra["detail"] for one in (sharper, softer)] == [1.3, 1.0]
    assert (pixels(sharper.files[0]) != pixels(softer.files[0])).any()


def test_preview(generate):
    ending = generate("a cat", "-n", "2", "--preview", "-o", "cat.png", "--res", "260x140", size=("--steps", "1"))
    assert ending.code == 0 and [str(file) for file in ending.files] == ["cat.png", "cat_1.png"]
    assert {"cat_level0.png", "cat_1_level0.png"} < set(everything())
    assert Image.open("cat_level0.png").size == (60, 32) and Image.open("cat_1_level2.png").size == (238, 128)
    assert len(last_run().outputs) == 8  # no preview of the last level, which is the picture
    assert read_metadata("cat_level0.png").extra["preview_of_level"] == 0
    plain = generate("a cat", "-n", "2", "-o", "plain.png", "--res", "260x140", size=("--steps", "1"))
    assert [file.read_bytes() for file in plain.files] == [file.read_bytes() for file in ending.files]


def test_settings_are_the_defaults_and_options_win(generate):
    Path("physformer.toml").write_text(
        '[generate]\nres = "360p"\nsteps = 3\nguidance = 2.5\nsolver = "heun"\nnegative_prompt = "a dog"\nseed = 5\n'
        'num_images = 2\noutput = "drawn/"\ndtype = "fp32"\n'
    )
    Path("below").mkdir()
    os.chdir("below")
    shown = json.loads(generate("a cat", "--dry-run", "--json", size=()).out)
    assert shown["dtype"] == "fp32" and len(shown["pictures"]) == 2
    one = shown["pictures"][1]
    assert Path(one["file"]) == Path.cwd().parent / "drawn" / "a-cat-5-1.png"
    assert (one["width"], one["height"], one["seed"], one["index"], one["guidance"]) == (640, 360, 5, 1, 2.5)
    assert (one["solver"], one["negative_prompt"], one["levels"][0]["steps"]) == ("heun", "a dog", 3)
    shown = json.loads(
        generate(
            "a cat",
            "-n",
            "1",
            "--aspect",
            "1:1",
            "-s",
            "0",
            "--guidance",
            "1",
            "--solver",
            "euler",
            "--steps",
            "2",
            "-o",
            "x.png",
            "--dry-run",
            "--json",
            size=(),
        ).out
    )
    (one,) = shown["pictures"]
    assert (one["file"], one["width"], one["height"], one["seed"], one["guidance"]) == ("x.png", 360, 360, 0, 1.0)
    assert one["negative_prompt"] is None  # it could have no effect


def test_json(generate):
    import hashlib

    ending = generate("a cat", "--json", "-o", "cat.png")
    shown = json.loads(ending.out)
    (one,) = shown["pictures"]
    assert one["file"] == "cat.png" and one["sha256"] == hashlib.sha256(Path("cat.png").read_bytes()).hexdigest()
    assert one["metadata"]["prompt"] == "a cat" and shown["bad_lines"] == [] and shown["run"] == last_run().id


def test_quiet_and_no_record(generate):
    ending = generate("a cat", "--quiet", "--no-record")
    assert (ending.code, ending.err) == (0, "") and everything() == ["outputs/a-cat-0.png"]


def test_a_dry_run_writes_nothing(generate):
    ending = generate("a cat", "-n", "3", "--dry-run", "-o", "new/folder/", "--res", "720p", size=())
    assert ending.code == 0 and everything() == [] and not Path("new").exists()
    assert ending.out.count("1280x720") == 3 and "5,1,1,1,1,1" in ending.out and "would draw 3 pictures" in ending.err


def test_a_dry_run_tells_the_names_that_are_free(generate):
    Path("x.png").touch()
    Path("p.txt").write_text("a cat\na cat")
    arguments = ("--prompt-file", "p.txt", "-o", "x.png")
    told = [one["file"] for one in json.loads(generate(*arguments, "--dry-run", "--json").out)["pictures"]]
    assert told == ["x_1.png", "x_2.png"]
    assert [str(file) for file in generate(*arguments).files] == told


# Prompt files


def test_a_prompt_file_with_bad_lines_draws_the_good_ones(generate):
    lines = ['{"prompt": "a cat", "seed": 3}', "{oops", '{"prompt": ""}', json.dumps({"prompt": LONG}),
             '{"prompt": "a dog", "width": 64, "height": 64, "steps": 1, "output": "dog.png"}',
             '{"prompt": "a cow", "output": "cow.jpg"}', '{"prompt": "a pig", "width": 0}']  # fmt: skip
    Path("p.jsonl").write_text("\n".join(lines))
    ending = generate("--prompt-file", "p.jsonl", "-o", "out/")
    assert ending.code == 1
    assert [str(file) for file in ending.files] == ["out/a-cat-3.png", "out/dog.png"]
    assert Image.open("out/dog.png").size == (64, 64)
    for number, word in ((2, "JSON"), (3, "prompt"), (4, "tokens"), (6, "PNG"), (7, "out of range")):
        assert any(f"line {number}: " in line and word in line for line in ending.err.splitlines()), ending.err
    run = last_run()
    assert run.status == "failed" and "5 bad lines" in run.error and len(run.outputs) == 2


def test_only_bad_lines(generate):
    Path("p.jsonl").write_text('{"prompt": 3}\n')
    ending = generate("--prompt-file", "p.jsonl", "--json")
    assert ending.code == 1 and json.loads(ending.out)["bad_lines"][0]["line"] == 1
    for content in ("", "\n# nothing\n"):
        Path("empty.txt").write_text(content)
        assert "holds no prompts" in generate("--prompt-file", "empty.txt").err
    assert "cannot read the prompt file" in generate("--prompt-file", "none.txt").err


def test_prompts_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a cat\nein Vögelchen\n".encode())))
    ending = generate("--prompt-file", "-", "-s", "1,2")
    assert [file.name for file in ending.files] == ["a-cat-1.png", "a-cat-2.png", "ein-vögelchen-1.png",
                                                    "ein-vögelchen-2.png"]  # fmt: skip
    assert last_run().replay.stdin == "a cat\nein Vögelchen\n"


# Bad input: one line and a hint, nothing drawn, exit code 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["", *SIZE], "the prompt is empty"),
        ([" \t", *SIZE], "the prompt is empty"),
        ([LONG, *SIZE], "tokens, and the model takes 32"),
        (["a cat", "--negative-prompt", LONG], "tokens"),
        (["a cat", "--res", "700p"], "unknown resolution"),
        (["a cat", "--res", "0x0"], "out of range"),
        (["a cat", "-W", "0", "-H", "64"], "out of range"),
        (["a cat", "-W", "-5", "-H", "64"], "out of range"),
        (["a cat", "-W", "1000000", "-H", "64"], "out of range"),
        (["a cat", "--aspect", "0:1"], "not an aspect ratio"),
        (["a cat", "--aspect", "1:1", "-W", "64", "-H", "64"], "no effect"),
        (["a cat", "--res", "720p", "-W", "64"], "twice"),
        (["a cat", "--steps", "-3"], "not a number of steps"),
        (["a cat", "--steps", "0"], "not a number of steps"),
        (["a cat", "--steps", "4,0"], "not a number of steps"),
        (["a cat", "--steps", "many"], "not a number of steps"),
        (["a cat", "--steps", "2,1,1", "--res", "32x32"], "are of 3 levels"),
        (["a cat", "--steps", "1000000000"], "not a number of steps"),
        (["a cat", "--guidance", "-1"], "guidance"),
        (["a cat", "--guidance", "nan"], "guidance"),
        (["a cat", "--guidance-interval", "0.9,0.1"], "not a guidance interval"),
        (["a cat", "--guidance-interval", "0.5"], "not a guidance interval"),
        (["a cat", "--guidance", "1", "--negative-prompt", "a dog"], "no effect"),
        (["a cat", "--guidance", "1", "--guidance-interval", "0,1"], "no effect"),
        (["a cat", "--solver", "magic"], "unknown solver"),
        (["a cat", "--solver", "adaptive", "--batch-size", "2"], "no effect"),
        (["a cat", "--seed", "-1"], "not a seed"),
        (["a cat", "--seed", "x"], "not a seed"),
        (["a cat", "--seed", "4-1"], "not a seed"),
        (["a cat", "--seed", "18446744073709551616"], "not a seed"),
        (["a cat", "--seed", "0-999999999"], "too many seeds"),
        (["a cat", "--num-images", "0"], "at least 1"),
        (["a cat", "--num-images", "1000000000"], "too many"),
        (["a cat", "--batch-size", "0"], "at least 1"),
        (["a cat", "--device", "abacus"], "unknown device"),
        (["a cat", "--device", "cuda:99"], "does not exist"),
        (["a cat", "--dtype", "fp7"], "unknown dtype"),
        (["a cat", "--preview", "--res", "32x32"], "no effect"),
        (["a cat", "--detail", "1.2", "--res", "32x32"], "no effect"),
        (["a cat", "--detail", "3"], "outside 0 to 2"),
        (["a cat", "-o", "cat.jpg"], "PNG"),
        (["a cat", "-o", "{nonsense}.png"], "unknown field"),
        (["a cat", "-o", "{seed.__class__}.png"], "unknown field"),
        (["a cat", "-o", "{seed:zz}.png"], "malformed"),
        (["a cat", "-o", "{.png"], "malformed"),
        (["a cat", "-o", "x" * 300 + ".png"], "too long"),
        (["a cat", "--prompt-file", "p.txt"], "both say"),
        (["--from", "x.png", "--num-images", "2"], "no effect"),
        (["--from", "x.png", "--seed", "2"], "no effect"),
        (["--from", "x.png", "--compile"], "no effect"),
        (["--from", "x.png", "-W", "64"], "no effect"),
    ],
)
def test_bad_input(generate, arguments, word):
    ending = generate(*arguments, size=())
    errors = [line for line in ending.err.splitlines() if line.startswith("error: ")]
    assert ending.code == 1 and len(errors) == 1 and word in errors[0], ending.err
    assert "hint: " in ending.err or word == "at least 1"
    assert [name for name in everything() if name.endswith(".png")] == []


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ("guidance = 1.0", ("--negative-prompt", "a dog")),
        ("guidance = 1.0", ("--guidance-interval", "0.1,0.9")),
        ('solver = "adaptive"', ("--batch-size", "2")),
    ],
)
def test_options_without_effect_beside_settings(generate, settings, arguments):
    Path("physformer.toml").write_text(f"[generate]\n{settings}\n")
    ending = generate("a cat", *arguments)
    assert ending.code == 1 and f"error: {arguments[0]}" in ending.err and "has no effect" in ending.err


def test_a_line_without_guidance_takes_no_negative_prompt(generate):
    lines = [{"prompt": "a cat", "guidance": 1}, {"prompt": "a dog", "guidance": 1, "negative_prompt": "a cat"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ending = generate("--prompt-file", "p.jsonl", "--negative-prompt", "a fish", "-o", "out/")
    assert ending.code == 1 and len(ending.files) == 1 and "negative_prompt has no effect" in ending.err
    assert read_metadata(ending.files[0]).negative_prompt == ""


@pytest.mark.parametrize("size", ["64x48", "64×48", "64 x 48"])
def test_an_exact_size_needs_no_aspect_of_the_settings(generate, size):
    Path("physformer.toml").write_text('[generate]\nres = "720p"\naspect = "16:9"\n')
    ending = generate("a cat", "--res", size, "--dry-run", "--json", size=())
    (one,) = json.loads(ending.out)["pictures"]
    assert (one["width"], one["height"]) == (64, 48)


def test_no_prompt_at_all_is_a_usage_error(generate):
    assert generate(size=()).code == 2


def test_the_checkpoint_is_missing_or_foreign(generate, tmp_path):
    ending = generate("a cat", checkpoint=tmp_path / "none")
    assert ending.code == 1 and "there is no checkpoint" in ending.err and "hint" in ending.err
    assert last_run().status == "failed"


def test_a_checkpoint_of_a_later_version(generate, tiny_checkpoint, tmp_path):
    later = shutil.copytree(tiny_checkpoint, tmp_path / "later")
    index = json.loads((later / "model_index.json").read_text())
    index["flow"] = {**index.get("flow", {}), "from_the_future": 1}
    (later / "model_index.json").write_text(json.dumps(index))
    ending = generate("a cat", "--dry-run", checkpoint=later)
    assert ending.code == 1 and "has a flow that this version does not know" in ending.err
    assert "it may come from a later version" in ending.err


def test_a_malformed_project_file(generate):
    Path("physformer.toml").write_text("[generate]\nsteps = = 3\n")
    ending = generate("a cat")
    assert ending.code == 1 and "line 2, column 9" in ending.err and everything() == ["physformer.toml"]


def test_too_large_for_the_machine(generate, monkeypatch):
    monkeypatch.setattr("physformer_core.batching.total_memory", lambda device: 2 * 10**9)
    ending = generate("a cat", "--res", "16384x16384", size=())
    assert ending.code == 1 and "needs about" in ending.err and "2 GB" in ending.err


# Where it goes


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_output_folder_that_cannot_be_written(generate, dry, monkeypatch):
    monkeypatch.setattr("physformer_core.checkpoints.load_pipeline", None)  # told before the network is loaded
    Path("file").write_text("")
    ending = generate("a cat", "-o", "file/cat.png", *dry)
    assert ending.code == 1 and "file" in ending.err and "hint" in ending.err
    if os.geteuid() != 0:  # root may write anywhere
        Path("locked").mkdir(mode=0o500)
        ending = generate("a cat", "-o", "locked/cat.png", *dry)
        assert ending.code == 1 and "permission denied" in ending.err
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    ending = generate("a cat", *dry)
    assert ending.code == 1 and "no space left" in ending.err


def test_a_disk_that_fills_up_while_writing(generate, monkeypatch):
    real = Path.write_bytes
    count = 0

    def fills_up(self, data):
        nonlocal count
        if self.suffix == ".png":
            count += 1
            if count == 2:
                real(self, data[:100])
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    ending = generate("a cat", "-n", "3", "-o", "out/")
    assert ending.code == 1 and "no space left on the disk" in ending.err and "hint" in ending.err
    assert [str(file) for file in ending.files] == ["out/a-cat-0-0.png"]
    assert [name for name in everything() if name.startswith("out")] == ["out/a-cat-0-0.png"]
    run = last_run()
    assert run.status == "failed" and [output.path for output in run.outputs] == ["out/a-cat-0-0.png"]


def test_names():
    def name(output, several=False, **values):
        given = {"prompt": "A Cat!", "seed": 7, "index": 2, "number": 3, "width": 8, "height": 9} | values
        return str(OutputNames(output, several=several).name(**given))

    assert name("out/") == "out/a-cat-7.png" and name("out", several=True) == "out/a-cat-7-2.png"
    assert name("x.png") == "x.png" and name("{width}x{height}/{prompt}.png") == "8x9/a-cat.png"
    assert name("{{{seed}}}.png") == "{7}.png"
    assert name("out/", override="own.png") == "out/own.png" and name("a/{seed}.png", override="b.png") == "a/b.png"
    assert name("out/", override="/abs/{index}.png") == "/abs/2.png"
    Path("v1.2").mkdir()
    assert name("v1.2") == "v1.2/a-cat-7.png"
    with pytest.raises(OutputError):
        name("new.2")
    with pytest.raises(OutputError):
        name("{seed}/")
    assert slug("../../etc/passwd") == "etc-passwd" and slug("!!!") == "picture" and slug("Ünïcode 鳥") == "ünïcode-鳥"
    assert len(slug("鳥" * 500).encode()) <= 100 and "\0" not in slug("a\0b") and slug("a\n/b") == "a-b"


# Batches and costs


def test_batches_hold_what_can_be_drawn_together(tiny_checkpoint, monkeypatch):
    import torch

    planner, cpu = Planner(find_checkpoint(tiny_checkpoint)), torch.device("cpu")
    small = PictureRequest("a", 0, 0, 64, 64)
    requests = [small, PictureRequest("b", 1, 0, 64, 96), PictureRequest("c", 2, 0, 64, 64), small]
    assert planner.batches(requests, lambda _: 2) == [[0, 2], [3], [1]]
    monkeypatch.setattr("physformer_core.batching.total_memory", lambda device: 16 * 2**30)
    assert planner.batch_limit(small, cpu) == 8 and planner.batch_limit(small, cpu, 100) == 100
    assert planner.batch_limit(PictureRequest("a", 0, 0, 512, 512), cpu) == 4
    assert planner.batch_limit(PictureRequest("a", 0, 0, 1280, 720), cpu) == 1
    assert planner.batch_limit(PictureRequest("a", 0, 0, 64, 64, solver="adaptive"), cpu, 4) == 1
    planner.patch, planner.base_patch, planner.pyramid = 16, 4, planner.flow.pyramid(16, 4)
    assert planner.picture_tokens(12, 20) == 15 and planner.batch_limit(PictureRequest("a", 0, 0, 12, 20), cpu) == 8
    planner.patch, planner.base_patch, planner.pyramid = 8, 8, planner.flow.pyramid(8, 8)
    gpu = torch.device("cuda")
    one = planner.picture_bytes(1280, 720)
    assert planner.batch_limit(small, gpu) == 64
    assert planner.batch_limit(PictureRequest("a", 0, 0, 1280, 720), gpu) == min(64, 4 * 2**30 // one)
    for solver in ("euler", "adaptive"):
        with pytest.raises(DeviceError):
            planner.batch_limit(PictureRequest("a", 0, 0, 16384, 16384, solver=solver), cpu)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_the_planned_work_is_the_work_done(tiny_checkpoint, solver, monkeypatch):
    planner, pipeline = Planner(find_checkpoint(tiny_checkpoint)), load_pipeline(tiny_checkpoint)
    request = PictureRequest("a cat", 0, 0, 300, 260, steps=(5, 2), guidance_interval=(0.3, 0.7), solver=solver)
    done = []
    pipeline.transformer.register_forward_pre_hook(lambda _, given: done.append(given[0].shape[2:].numel() // 64))
    draw_batch(pipeline, [request])
    levels = planner.levels(request)
    assert len(levels) == 4 and sum(level.work for level in levels) == sum(done)
    assert [done.count(level.tokens) for level in levels] == [sum(level.evaluations) for level in levels]


def test_averaged_predictions_are_counted(tiny_checkpoint, tmp_path):
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"flow": index["flow"] | {"shifted_levels": 2, "settling": 3}})
    )
    planner, pipeline = Planner(find_checkpoint(folder)), load_pipeline(folder)
    request = PictureRequest("a cat", 0, 0, 300, 260, steps=(3, 2), guidance_interval=(0.3, 0.7))
    done = []
    pipeline.transformer.register_forward_pre_hook(lambda _, given: done.append(int(given[3][0])))
    draw_batch(pipeline, [request])
    counts = [sum(level.evaluations) for level in planner.levels(request)]
    # Of three steps guidance is on at two, and where level 0 settles.
    assert [done.count(level) for level in range(4)] == counts == [3 + 2 + 3 * 2, 8, 8, 2]


def test_the_memory_error_is_told(tiny_checkpoint, monkeypatch):
    import torch

    pipeline = load_pipeline(tiny_checkpoint)

    def exhausted(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(pipeline), "__call__", exhausted)
    with pytest.raises(DeviceError) as caught:
        draw_batch(pipeline, [PictureRequest("a cat", 0, 0, 64, 64)])
    assert "--batch-size" in caught.value.hint


def test_parsing():
    assert parse_seeds(["7"]) == [7] and parse_seeds(["1-3, 9", "4"]) == [1, 2, 3, 9, 4]
    assert parse_steps("24") == 24 and parse_steps("20, 4,3") == (20, 4, 3)
    assert parse_interval("0.1,0.9") == (0.1, 0.9)
    for text in ("", "1,,2", "1.5", "-", "٣", "1-"):
        with pytest.raises(ConfigError):
            parse_seeds([text])


# As the installed command


def physformer(*arguments, **options):
    return subprocess.run(["physformer", *arguments], capture_output=True, text=True, check=False, **options)


def test_the_command_and_its_replay(tiny_checkpoint):
    arguments = ("generate", "a bird in a cage", *SIZE, "-n", "2", "--seed", "7", "--checkpoint", str(tiny_checkpoint))
    ending = physformer(*arguments)
    assert ending.returncode == 0 and "Traceback" not in ending.stderr, ending.stderr
    assert ending.stdout.splitlines() == ["outputs/a-bird-in-a-cage-7-0.png", "outputs/a-bird-in-a-cage-7-1.png"]
    ending = physformer("runs", "replay", "last")
    assert ending.returncode == 0 and "2 of 2 outputs have the same bytes" in ending.stdout, ending.stderr


def test_ctrl_c_in_the_middle(tiny_checkpoint):
    process = subprocess.Popen(
        ["physformer", "generate", "a cat", "-n", "5000", "--batch-size", "1", *SIZE, "--checkpoint",
         str(tiny_checkpoint), "-o", "out/"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not Path("out/a-cat-0-3.png").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    files = sorted(Path("out").iterdir())
    assert len(files) >= 3 and all(file.suffix == ".png" and not file.name.startswith(".") for file in files)
    for file in files:
        assert read_metadata(file).prompt == "a cat" and Image.open(file).load()  # whole, every checksum right
    run = last_run()
    assert run.status == "interrupted" and run.error is None
    assert {Path(output.path) for output in run.outputs} == set(files) == {Path(line) for line in out.splitlines()}
    assert "were finished and are kept" in err


def test_a_disk_that_is_full_for_the_installed_command(tiny_checkpoint):
    physformer("init")

    def limit():  # files of at most 12 KB: a stand-in for a full disk that needs no rights
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    ending = physformer("generate", "a cat", "-W", "128", "-H", "128", "--steps", "1", "-o", "cat.png",
                        "--checkpoint", str(tiny_checkpoint), preexec_fn=limit)  # fmt: skip
    assert ending.returncode == 1 and "error: cannot write cat.png" in ending.stderr, ending.stderr
    assert "Traceback" not in ending.stderr and ending.stdout == ""
    assert everything() == [".physformer.toml.lock", "physformer.toml"] and last_run().status == "failed"


def test_help_is_fast_and_shows_examples():
    ending = physformer("generate", "--help")
    assert ending.returncode == 0 and "--prompt-file" in ending.stdout and "--seed 7" in ending.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled(tiny_checkpoint):
    arguments = ("generate", "a cat", *SIZE, "--compile", "--checkpoint", str(tiny_checkpoint), "-o", "cat.png")
    assert physformer(*arguments).returncode == 0
    assert read_metadata("cat.png").extra["compile"] is True
    again = physformer("generate", "--from", "cat.png", "-o", "again.png", "--checkpoint", str(tiny_checkpoint))
    assert again.returncode == 0 and Path("again.png").read_bytes() == Path("cat.png").read_bytes(), again.stderr
