"""TensorRT and TensorRT-RTX: which is installed, in what version, and the GPUs that it builds for.

Their API is the same. What differs is where they build:

    tensorrt        on the GPU that runs the engine, and for no other; timings are cached
    tensorrt-rtx    for a compute capability, on any machine, with or without a GPU; a timing cache would make it look
                    for one, and has no effect
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.base.errors import EngineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_WANTED = {
    "tensorrt": (
        "TensorRT 11",
        11,
        "on the machine with the GPU, `pip install 'tensorrt>=11'` fetches it from NVIDIA, or use NVIDIA's container "
        "image; RTX GPUs can be built for anywhere, with --engine tensorrt-rtx",
    ),
    "tensorrt-rtx": ("TensorRT-RTX", 1, "pip install '.[tensorrt-rtx]'"),
}
"""What to call it, the oldest version that will do, and how to get it."""


@dataclass(frozen=True)
class Library:
    """One of the two; `api` is its module."""

    name: str
    version: str
    api: Any

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not here."""
        return self.name == "tensorrt-rtx"


@dataclass(frozen=True)
class Target:
    """A GPU to build for: its own name ("NVIDIA H20"), or, ahead of time, "sm_120"; `capability` is "12.0"."""

    name: str
    capability: str


def open_library(name: str) -> Library:
    """The library called `name` in `MODULES`; EngineError, saying how to get it, where it is missing or too old."""
    title, oldest, how = _WANTED[name]
    try:
        api = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise EngineError(f"{title} is not installed here ({error}): {how}") from error
    version = str(getattr(api, "__version__", "0"))
    if int(re.match(r"\d*", version)[0] or 0) < oldest:  # type: ignore[index]
        raise EngineError(f"{MODULES[name]} {version} is installed, {title} is needed: {how}")
    return Library(name, version, api)


def targets(library: Library, asked: Sequence[str] = ()) -> tuple[Target, ...]:
    """What to build for: what is `asked` for ("sm_120", "12.0", or the GPU's name), else the GPU of this machine.

    EngineError where the library cannot build for it here.
    """
    here = gpu_here()
    if library.ahead_of_time:
        if here is None and not asked:
            known = " --target ".join(_known(library))
            raise EngineError(f"torch sees no GPU here, so say which to build for: --target {known}")
        names = asked or [here.capability]  # type: ignore[union-attr]
        return tuple(dict.fromkeys(_by_capability(library, name) for name in names))
    if here is None:
        raise EngineError(
            f"{library.name} {library.version} builds on the GPU that runs the engines, and torch sees none here: copy "
            "the bundle to that machine and build there; RTX GPUs can be built for anywhere, with --engine tensorrt-rtx"
        )
    for name in asked:
        if name != here.name and _digits(name) != here.capability.replace(".", ""):
            raise EngineError(
                f"{library.name} {library.version} builds for the GPU that is here, {here.name} (compute capability "
                f"{here.capability}), and not for {name}: build on that machine"
            )
    return (here,)


def gpu_here() -> Target | None:
    """The current GPU of torch, None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Target(properties.name, f"{properties.major}.{properties.minor}")


def _by_capability(library: Library, name: str) -> Target:
    digits, known = _digits(name), _known(library)
    if f"sm_{digits}" in known:
        return Target(f"sm_{digits}", f"{digits[:-1]}.{digits[-1]}")
    if digits == "90":
        raise EngineError(
            f"{library.name} {library.version} does not build for sm_90 (H20, H100, H200): build with TensorRT 11 and "
            "--engine tensorrt on that machine itself"
        )
    raise EngineError(f"{library.name} {library.version} does not build for {name!r}; it does for {', '.join(known)}")


def _known(library: Library) -> list[str]:
    members = library.api.ComputeCapability.__members__
    return [f"sm_{name[2:]}" for name in members if re.fullmatch(r"SM\d+", name)]


def _digits(name: str) -> str:
    """ "120" of "sm_120", "SM120" or "12.0"; anything else is left as it is."""
    found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", name.strip().lower())
    return found[1] + found[2] if found else name
