"""What `physformer generate` is asked for: from options, settings and prompt files to pictures, batches and costs.

All of it is decided before the network is loaded, the cheapest checks first, so that a mistake is told in a moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from physformer_cli import console

if TYPE_CHECKING:
    import torch

    from physformer_core.batching import LevelWork, PictureRequest, Planner
    from physformer_core.checkpoints import Checkpoint
    from physformer_core.drawing import Circumstances
    from physformer_core.lora import ScaledAdapter
    from physformer_core.output_names import OutputNames
    from physformer_core.project import RunRecorder
    from physformer_core.prompts import BadLine, PromptFile


@dataclasses.dataclass
class Options:
    """The command's options as given; None where the user said nothing. `with_settings` fills them in."""

    prompt: str | None
    prompt_file: str | None
    source: Path | None
    negative_prompt: str | None
    seed: list[str] | None
    num_images: int | None
    width: int | None
    height: int | None
    res: str | None
    aspect: str | None
    steps: str | None
    guidance: float | None
    guidance_interval: str | None
    detail: float | None
    solver: str | None
    batch_size: int | None
    checkpoint: Path | None
    lora: list[str] | None
    dtype: str | None
    device: str | None
    compile: bool | None
    output: str | None
    preview: bool
    dry_run: bool
    as_json: bool
    quiet: bool


@dataclasses.dataclass
class Picture:
    """A picture to draw: the request, the name it should get, and the line of the prompt file it stands on."""

    request: PictureRequest
    wished: Path
    line: int | None = None


@dataclasses.dataclass
class Plan:
    """Everything that is decided before the network is loaded.

    Args:
        pictures: What to draw; with --from, the whole batch of the picture.
        batches: Indices into `pictures`.
        kept: Indices of the pictures to write; all, but for --from.
        levels: What each picture costs.
        bad_lines: Lines of the prompt file that cannot be drawn.
        checkpoint, adapters, device, dtype, circumstances: What draws them.
        steps: Each picture's steps per level.
    """

    pictures: list[Picture]
    batches: list[list[int]]
    kept: set[int]
    levels: list[list[LevelWork]]
    bad_lines: list[BadLine]
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    circumstances: Circumstances
    adapters: list[ScaledAdapter]

    def batch(self, numbers: Sequence[int]) -> list[PictureRequest]:
        return [self.pictures[number].request for number in numbers]

    def steps(self, number: int) -> list[int]:
        return [len(level.evaluations) for level in self.levels[number]]

    @property
    def work(self) -> int:
        return sum(level.work for levels in self.levels for level in levels)


def check_combinations(options: Options) -> None:
    """Refuses options that say a thing twice or would have no effect.

    Raises:
        typer.BadParameter: Nothing is asked for.
        ConfigError: Options contradict each other.
        PromptError: The prompt is blank.
    """
    from physformer_core.errors import ConfigError, PromptError
    from physformer_core.prompts import is_sayable

    said = {"PROMPT": options.prompt, "--prompt-file": options.prompt_file, "--from": options.source}
    ways = [name for name, value in said.items() if value is not None]
    if not ways:
        raise typer.BadParameter("give a PROMPT, --prompt-file or --from")
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} both say what to draw", hint="give one of them")
    if options.prompt is not None and not options.prompt.strip():
        raise PromptError("the prompt is empty", hint='say what to draw, e.g. "a bird in a cage"')
    for name, text in (("the prompt", options.prompt), ("--negative-prompt", options.negative_prompt)):
        if text is not None and not is_sayable(text):
            raise PromptError(f"{name} {text!r} is not UTF-8", hint="set the terminal to UTF-8, or write it to a file")
    if options.source is not None:
        kept = {"source", "checkpoint", "lora", "device", "output", "preview", "dry_run", "as_json", "quiet"}
        for field in dataclasses.fields(options):
            if field.name not in kept and getattr(options, field.name) is not None:
                name = "--" + field.name.replace("_", "-")
                raise ConfigError(
                    f"{name} has no effect beside --from: the picture's metadata decides",
                    hint="physformer info shows what it says; give a PROMPT to draw something else",
                )
    for name, count in (("--num-images", options.num_images), ("--batch-size", options.batch_size)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")


def _check_effects(options: Options, common: PictureRequest) -> None:
    """Refuses options that would have no effect beside what is to be drawn with, options and settings together."""
    from physformer_core.errors import ConfigError
    from physformer_core.flow import DEFAULT_GUIDANCE

    if options.batch_size not in (None, 1) and common.solver == "adaptive":
        raise ConfigError(
            f"--batch-size {options.batch_size} has no effect with --solver adaptive",
            hint="its steps follow the picture, so pictures are drawn one by one",
        )
    if common.guidance == 1:
        for name, value in (
            ("--negative-prompt", options.negative_prompt),
            ("--guidance-interval", options.guidance_interval),
        ):
            if value:
                raise ConfigError(
                    f"{name} has no effect with --guidance 1, which is off", hint=f"{DEFAULT_GUIDANCE:g} is the default"
                )


def make_plan(options: Options, run: RunRecorder) -> Plan:
    """Decides everything that can be decided without the network, cheapest first, and notes it in the record."""
    from physformer_core.checkpoints import find_checkpoint, paused_collector
    from physformer_core.errors import ConfigError
    from physformer_core.output_names import DEFAULT_OUTPUT, OutputNames, check_folder

    settings = run.settings
    file = _read_prompts(options, run)
    output = options.output or settings.get("output") or DEFAULT_OUTPUT
    num_images = options.num_images or settings.get("num_images", 1)
    if num_images < 1:  # an option was checked already
        raise ConfigError(f"num_images in physformer.toml must be at least 1, not {num_images}")
    names = OutputNames(output, several=num_images > 1)
    run.replay_with("--output", "-o", output=output, folder=names.is_folder)
    checkpoint = find_checkpoint(options.checkpoint or settings.get("checkpoint"))
    adapters = _adapters(options, checkpoint)
    with paused_collector():
        import torch  # noqa: F401 - the slow part of what follows

        from physformer_core.batching import Planner
        from physformer_core.hardware import resolve_device, resolve_dtype

    bad_lines = list(file.errors) if file is not None else []
    if options.source is not None:
        pictures, kept, circumstances, adapters = _again(options, names, checkpoint, adapters)
        batches = [list(range(len(pictures)))]
        _check_tokens(pictures, checkpoint, [], fatal=True)
    else:
        from physformer_core.drawing import Circumstances

        pictures = _requests(options, settings, file, num_images, names, bad_lines)
        pictures = _check_tokens(pictures, checkpoint, bad_lines, fatal=file is None)
        bad_lines.sort(key=lambda bad: bad.line)
        kept = set(range(len(pictures)))
        device_name = options.device or settings.get("device", "auto")
        device = resolve_device(device_name)
        circumstances = Circumstances(
            checkpoint=checkpoint.name,
            checkpoint_sha256=checkpoint.sha256,
            dtype=_dtype_name(resolve_dtype(options.dtype or settings.get("dtype", "auto"), device)),
            device=str(device),
            compiled=bool(settings.get("compile", False) if options.compile is None else options.compile),
            loras=tuple(one.as_dict() for one in adapters),
        )
    device = resolve_device(circumstances.device)
    dtype = resolve_dtype(circumstances.dtype, device)
    planner = Planner(checkpoint)
    if options.source is None:
        wanted = options.batch_size
        requests = [picture.request for picture in pictures]
        batches = planner.batches(requests, lambda request: planner.batch_limit(request, device, wanted))
    _check_levels(options, planner, pictures)

    folders: dict[Path, int] = {}
    for number in kept:
        picture = pictures[number]
        raw = 3 * picture.request.width * picture.request.height
        folders[picture.wished.parent] = max(raw, folders.get(picture.wished.parent, 0))
    for folder, raw in folders.items():
        check_folder(folder, needed_bytes=raw, create=not options.dry_run)

    run.seeds = list(dict.fromkeys(pictures[number].request.seed for number in sorted(kept)))
    run.checkpoint_sha256 = checkpoint.sha256
    run.device = _device_name(device)
    run.config = {
        **{key: value for key, value in dataclasses.asdict(options).items() if value is not None},
        "output": output,
        "num_images": num_images,
        "checkpoint_folder": checkpoint.folder,
        **dataclasses.asdict(circumstances),
        "pictures": len(kept),
        "batches": [len(batch) for batch in batches],
    }
    with paused_collector():
        levels = [planner.levels(picture.request) for picture in pictures]
    return Plan(pictures, batches, kept, levels, bad_lines, checkpoint, device, dtype, circumstances, adapters)


def _adapters(options: Options, checkpoint: Checkpoint) -> list[ScaledAdapter]:
    """The adapters that --lora names; a warning for one that was trained beside other weights of the same shapes."""
    if not options.lora:
        return []
    from physformer_core.lora import parse_adapter, require_peft

    require_peft()
    adapters = [parse_adapter(text) for text in options.lora]
    for one in adapters:
        base, sha256 = one.adapter.facts.get("base"), one.adapter.facts.get("base_sha256")
        if sha256 is not None and sha256 != checkpoint.sha256:
            console.warn(
                f"the adapter {one.adapter.name} was trained on {base} ({sha256:.12}), this is {checkpoint.name} "
                f"({checkpoint.sha256:.12})"
            )
    return adapters


def _read_prompts(options: Options, run: RunRecorder) -> PromptFile | None:
    from physformer_core.prompts import read_prompt_file

    if options.prompt_file is None:
        return None
    file = read_prompt_file(options.prompt_file)
    if options.prompt_file == "-":
        run.read_stdin(file.text)
    return file


def _requests(
    options: Options,
    settings: dict[str, Any],
    file: PromptFile | None,
    num_images: int,
    names: OutputNames,
    bad_lines: list[BadLine],
) -> list[Picture]:
    """Every picture asked for: a prompt (or a line), times the seeds, times --num-images."""
    from physformer_core.batching import (
        MAX_PICTURES,
        PictureRequest,
        parse_interval,
        parse_seeds,
        parse_steps,
    )
    from physformer_core.errors import ConfigError, PhysFormerError
    from physformer_core.flow import DEFAULT_DETAIL, DEFAULT_GUIDANCE
    from physformer_core.prompts import BadLine, PromptRequest
    from physformer_core.resolution import DEFAULT_SIZE, resolve_size

    seeds = parse_seeds(options.seed or [str(settings.get("seed", 0))])
    sizes = {key: settings.get(key) for key in ("width", "height", "res", "aspect")}
    default_size = resolve_size(**sizes, default=DEFAULT_SIZE)
    asked = _with_settings_beside(
        {"width": options.width, "height": options.height, "res": options.res, "aspect": options.aspect}, sizes
    )
    command_size = resolve_size(**asked, default=default_size)  # type: ignore[arg-type]
    set_steps = settings.get("steps")
    if isinstance(set_steps, list):
        set_steps = ",".join(map(str, set_steps))
    steps_text = options.steps if options.steps is not None else set_steps
    steps = parse_steps(str(steps_text)) if steps_text is not None else None
    guidance = options.guidance if options.guidance is not None else settings.get("guidance", DEFAULT_GUIDANCE)
    interval = parse_interval(options.guidance_interval) if options.guidance_interval is not None else (0.0, 1.0)
    detail = options.detail if options.detail is not None else settings.get("detail", DEFAULT_DETAIL)
    solver = options.solver or settings.get("solver", "euler")
    negative = options.negative_prompt
    if negative is None and guidance != 1:
        negative = settings.get("negative_prompt")

    lines = list(file.requests) if file is not None else [PromptRequest(options.prompt or "", line=0)]
    count = sum(1 if line.seed is not None else len(seeds) for line in lines) * num_images
    if count > MAX_PICTURES:
        raise ConfigError(f"{count} pictures are too many for one command", hint=f"at most {MAX_PICTURES}")
    common = PictureRequest(
        prompt="",
        seed=0,
        index=0,
        width=command_size[0],
        height=command_size[1],
        steps=steps,
        guidance=float(guidance),
        guidance_interval=interval,
        detail=float(detail),
        solver=solver,
        negative_prompt=negative or None,
    )
    common.settings()  # an unknown solver or guidance out of range is told before anything is loaded
    _check_effects(options, common)
    pictures: list[Picture] = []
    for line in lines:
        try:
            width, height = line.size(**asked, default=default_size)  # type: ignore[arg-type]
            own = dataclasses.replace(
                common,
                prompt=line.prompt,
                width=width,
                height=height,
                steps=line.steps if line.steps is not None else steps,
                guidance=float(line.guidance if line.guidance is not None else guidance),
                detail=float(line.detail if line.detail is not None else detail),
                negative_prompt=(line.negative_prompt if line.negative_prompt is not None else negative) or None,
            )
            if own.guidance == 1:
                if line.negative_prompt:
                    raise ConfigError("negative_prompt has no effect with a guidance of 1, which is off")
                own = dataclasses.replace(own, negative_prompt=None)
            drawn = [
                dataclasses.replace(own, seed=seed, index=index)
                for seed in ([line.seed] if line.seed is not None else seeds)
                for index in range(num_images)
            ]
            for number, one in enumerate(drawn, start=len(pictures) + 1):
                wished = names.name(
                    prompt=one.prompt,
                    seed=one.seed,
                    index=one.index,
                    number=number,
                    width=width,
                    height=height,
                    override=line.output,
                )
                pictures.append(Picture(one, wished, line.line or None))
        except PhysFormerError as error:
            if file is None:
                raise
            bad_lines.append(BadLine(line.line, error.message))
    return pictures


def _again(
    options: Options, names: OutputNames, checkpoint: Checkpoint, given: list[ScaledAdapter]
) -> tuple[list[Picture], set[int], Circumstances, list[ScaledAdapter]]:
    """The batch of the picture that --from names, and what draws it."""
    from physformer_core.drawing import LORAS_KEY, Circumstances, kernels_of, requests_from_metadata
    from physformer_core.errors import CheckpointError, DeviceError
    from physformer_core.hardware import resolve_device
    from physformer_core.metadata import read_metadata
    from physformer_core.project import package_versions

    assert options.source is not None
    metadata = read_metadata(options.source)
    requests, position = requests_from_metadata(metadata, str(options.source))
    if metadata.checkpoint_sha256 != checkpoint.sha256:
        raise CheckpointError(
            f"{options.source} was made by checkpoint {metadata.checkpoint} ({metadata.checkpoint_sha256 or '':.12}), "
            f"not by {checkpoint.folder} ({checkpoint.sha256:.12})",
            hint="name the one that made it: --checkpoint FOLDER",
        )
    adapters = _adapters_again(metadata.extra.get(LORAS_KEY, []), given, options.source)
    versions = package_versions()
    for name, recorded in (("physformer", metadata.version), ("torch", metadata.extra.get("torch"))):
        present = versions.get(name, "")
        # torch's own version has a build behind a plus sign, which packages leave out or not.
        if str(recorded).partition("+")[0] != present.partition("+")[0]:
            console.warn(f"it was made with {name} {recorded}, this is {present}: the bytes may differ")
    device = str(metadata.extra.get("device", "auto"))
    try:
        resolve_device(device)
    except DeviceError:
        device = "auto"
    device = str(resolve_device(options.device or device))
    if device != metadata.extra.get("device"):
        console.warn(f"it was made on {metadata.extra.get('device')}, this is {device}: the bytes may differ")
    dtype = str(metadata.extra.get("dtype", "auto"))
    kernels, recorded = kernels_of(device, dtype), metadata.extra.get("kernels", "torch")
    if kernels != recorded and device == metadata.extra.get("device"):
        console.warn(f"it was made with kernels in {recorded}, here they are in {kernels}: the bytes may differ")
    circumstances = Circumstances(
        checkpoint=metadata.checkpoint or checkpoint.name,
        checkpoint_sha256=checkpoint.sha256,
        dtype=dtype,
        device=device,
        compiled=metadata.extra.get("compile") is True,
        loras=tuple(one.as_dict() for one in adapters),
    )
    pictures = [
        Picture(
            one,
            names.name(prompt=one.prompt, seed=one.seed, index=one.index, number=1, width=one.width, height=one.height),
        )
        for one in requests
    ]
    return pictures, {position}, circumstances, adapters


def _with_settings_beside(asked: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What was asked of the size, and what the settings say of the rest of it: the aspect of a named resolution, or the
    height to a width."""
    from physformer_core.resolution import parse_exact

    only = [key for key, value in asked.items() if value is not None]
    beside = {"width": "height", "height": "width"}
    if only == ["res"] and parse_exact(asked["res"]) is None:
        return asked | {"aspect": settings["aspect"]}
    if len(only) == 1 and only[0] in beside:
        return asked | {beside[only[0]]: settings[beside[only[0]]]}
    return asked


def _adapters_again(recorded: Any, given: list[ScaledAdapter], source: Path) -> list[ScaledAdapter]:
    """The adapters that a picture was made with, found among the given ones by their hash; scales are the picture's.

    Raises:
        CheckpointError: One is not given, or one is given that had no part in it.
    """
    from physformer_core.errors import CheckpointError, DataError
    from physformer_core.lora import ScaledAdapter

    by_hash = {one.adapter.sha256: one.adapter for one in given}
    found = []
    try:
        wanted = [(str(one["name"]), str(one["sha256"]), float(one["scale"])) for one in recorded]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(
            f"{source} has metadata that cannot be followed: its adapters are not named",
            hint="`physformer info` shows it",
        ) from error
    for name, sha256, scale in wanted:
        adapter = by_hash.get(sha256)
        if adapter is None:
            raise CheckpointError(
                f"{source} was made with the adapter {name} ({sha256:.12}) at {scale:g}", hint="name it: --lora PATH"
            )
        found.append(ScaledAdapter(adapter, scale))
    used = {one.adapter.sha256 for one in found}
    if extra := next((adapter for sha256, adapter in by_hash.items() if sha256 not in used), None):
        raise CheckpointError(
            f"{source} was made without the adapter {extra.name} ({extra.sha256:.12})", hint="leave that --lora out"
        )
    return found


def _check_tokens(
    pictures: list[Picture], checkpoint: Checkpoint, bad_lines: list[BadLine], *, fatal: bool
) -> list[Picture]:
    """The pictures whose prompts the network takes; by the tokenizer alone, which loads in a moment.

    Raises:
        PromptError: A prompt is too long or holds nothing, and `fatal` is set; else its line goes to `bad_lines`.
    """
    from physformer_core.errors import PromptError
    from physformer_core.prompts import BadLine
    from physformer_core.text import count_prompt_tokens, nothing_said, shortened, unknown_parts

    def texts(picture: Picture) -> list[str]:
        return [text for text in (picture.request.prompt, picture.request.negative_prompt) if text is not None]

    unique = list(dict.fromkeys(text for picture in pictures for text in texts(picture)))
    counts = dict(zip(unique, count_prompt_tokens(unique, checkpoint.text_encoder_name), strict=True)) if unique else {}
    limit = checkpoint.prompt_tokens
    good: list[Picture] = []
    told: set[int | None] = set()
    for picture in pictures:
        fault = None
        for text in texts(picture):
            if counts[text] == 0:
                fault = nothing_said(text)
            elif counts[text] > limit:
                fault = f"the prompt {shortened(text)!r} has {counts[text]} tokens, and the model takes {limit}"
        if fault is None:
            good.append(picture)
        elif fatal:
            raise PromptError(fault, hint="describe the picture in a sentence; nothing is cut silently")
        elif picture.line not in told:
            told.add(picture.line)
            bad_lines.append(BadLine(picture.line or 0, fault))
    drawn = dict.fromkeys(text for picture in good for text in texts(picture) if not text.isascii())
    if unknown := unknown_parts(list(drawn), checkpoint.text_encoder_name):
        console.warn(f"the text encoder does not know {' '.join(unknown[:8])}, so the picture will not show it")
    return good


def _check_levels(options: Options, planner: Planner, pictures: list[Picture]) -> None:
    """Refuses options about finer levels where there are none, and steps of more levels than any picture has."""
    from physformer_core.batching import check_step_levels
    from physformer_core.errors import ConfigError

    if not pictures:
        return
    levels = max(len(planner.sizes(one.request.width, one.request.height)) for one in pictures)
    said = [name for name, value in (("--preview", options.preview), ("--detail", options.detail is not None)) if value]
    if said and levels == 1:
        raise ConfigError(
            f"{said[0]} has no effect: pictures this small have one level, which is the picture",
            hint="leave it out, or draw larger ones",
        )
    if options.source is None:  # a picture that is made again has what it had
        check_step_levels([one.request for one in pictures], levels)


def _dtype_name(dtype: torch.dtype) -> str:
    from physformer_core.hardware import DTYPES

    return next(name for name, value in DTYPES.items() if value == dtype)


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
