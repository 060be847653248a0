"""`edit-compile record`: a pipeline is run once for every line of a file, and its transformer's calls are recorded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import track

from edit_compile.calls.recorded_model import PARTS
from edit_compile.calls.recorder import record
from edit_compile.files import write_file_atomically
from edit_compile.loading import UserError, json_or_text, parse_dtype

SETTINGS = "settings.json"

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder's generations were made with; number i has the seed `seed` + i. None: the pipeline's own."""

    pipeline: str
    prompts: tuple[str, ...]
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    dtype: str | None = None
    arguments: dict[str, Any] = {}


def read_prompts(path: Path) -> tuple[str, ...]:
    """Lines of the file that are not blank; UserError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one on each line")
    return prompts


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of the pipeline's call from "name=value" texts, JSON where it is JSON; UserError for another form."""
    found: dict[str, Any] = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or not name.isidentifier() or name in found:
            raise UserError(f"--argument {one}: say name=value, once for each name")
        found[name] = json_or_text(value)
    return found


def record_prompts(settings: Settings, folder: Path, limit: int, console: Console) -> int:
    """Record one generation for each prompt into `folder`; returns how many were made.

    Of a pipeline with two transformers each has a folder of its own in `folder`, by its name, and `limit` is for each.

    Raises UserError where the folder was recorded with other settings, or the pipeline does not take one of them;
    CallsError as `edit_compile.record`.
    """
    pipe = load_pipeline(settings.pipeline, parse_dtype(settings.dtype))
    options = options_for(pipe, settings)
    with ExitStack() as stack:
        recorders = {
            part: stack.enter_context(record(pipe, place, limit=limit, part=part))
            for part, place in _places(pipe, folder).items()
        }
        done = _done(folder, {part: recorder.count for part, recorder in recorders.items()})
        if done:
            _check_same(folder / SETTINGS, settings, done)
        write_file_atomically(folder / SETTINGS, msgspec.json.encode(settings).decode())
        numbers = range(done, len(settings.prompts))
        for number in track(numbers, "recording", console=console, disable=not numbers):
            generator = torch.Generator().manual_seed(settings.seed + number)
            pipe(prompt=settings.prompts[number], generator=generator, **options)
            for part, recorder in recorders.items():
                if recorder.count != number + 1:
                    raise UserError(
                        f"{type(pipe).__name__} made an image without calling its {part}: nothing of it to record"
                    )
    return len(numbers)


def _places(pipe: Any, folder: Path) -> dict[str, Path]:
    """The folder of each transformer of the pipeline."""
    there = [part for part in PARTS if getattr(pipe, part, None) is not None]
    return {PARTS[0]: folder} if len(there) < 2 else {part: folder / part for part in there}


def _done(folder: Path, counts: Mapping[str, int]) -> int:
    """How many generations there are; UserError where a run was killed between those of two transformers."""
    if len(set(counts.values())) > 1:
        told = " and ".join(f"{count} of {part}" for part, count in counts.items())
        raise UserError(f"{folder} holds {told}, not as many of each: give another folder")
    return next(iter(counts.values()))


def load_pipeline(where: str, dtype: torch.dtype | None) -> Any:
    """The diffusers pipeline in the folder `where`, or of that name on the hub; on the GPU where there is one."""
    from diffusers import DiffusionPipeline

    folder = Path(where)
    if not folder.is_dir() and not _HUB_NAME.match(where):
        raise UserError(f"{where} is neither the folder of a saved pipeline nor a name on the hub (owner/name)")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{where} is not a saved diffusers pipeline: it has no model_index.json")
    pipe = DiffusionPipeline.from_pretrained(where, dtype=dtype or torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def options_for(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, those that were asked for; UserError for one that it does not take."""
    taken = inspect.signature(pipe.__call__).parameters
    asked = {
        "num_inference_steps": ("--steps", settings.steps),
        "guidance_scale": ("--guidance", settings.guidance),
        "height": ("--height", settings.height),
        "width": ("--width", settings.width),
    }
    for name, option in (("prompt", "--prompts"), ("generator", "--seed")):
        _check_taken(pipe, taken, name, option)
    options: dict[str, Any] = {}
    for name, (option, value) in asked.items():
        if value is not None:
            _check_taken(pipe, taken, name, option)
            options[name] = value
    for name, value in settings.arguments.items():
        _check_taken(pipe, taken, name, f"--argument {name}")
        if name in ("prompt", "generator", *options):
            raise UserError(f"--argument {name}={value}: that is said by an option of its own")
        options[name] = value
    if "output_type" in taken:
        options["output_type"] = "latent"  # nobody looks at the images: they need not be decoded
    return options


def _check_taken(pipe: Any, taken: Mapping[str, object], name: str, option: str) -> None:
    if name not in taken:
        raise UserError(f"{option} is not for {type(pipe).__name__}: its call takes no {name!r}")


def _check_same(path: Path, settings: Settings, done: int) -> None:
    """UserError unless the `done` generations beside `path` are those that `settings` begin with."""
    try:
        before = msgspec.json.decode(path.read_bytes(), type=Settings)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{path.parent} holds generations, and not how they were made ({error}): give another folder"
        ) from error
    for name in Settings.__struct_fields__:
        old, new = getattr(before, name), getattr(settings, name)
        if name == "prompts" and old[:done] != new[:done]:
            raise UserError(
                f"{path.parent} was recorded with other prompts: give another folder, or add prompts at the end"
            )
        if name != "prompts" and old != new:
            raise UserError(f"{path.parent} was recorded with {name} {old}, not {new}: give another folder")
