"""What a figure was taken on: a latency without its machine means nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from runtime.base.machine import cores, cpu_model

LIBRARIES = (
    "edit-compile",
    "torch",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx_cu13",
    "triton",
    "diffusers",
    "transformers",
    "onnx",
)


ROOT = Path(__file__).parents[2]


def commit(*files: str) -> str:
    """The commit of the checkout that this is run from; "" where it is none.

    "+" follows where something differs from it: of what git calls `files`, of code and weights where none are named.
    """

    def git(*asked: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *asked], capture_output=True, text=True, cwd=ROOT, check=False)

    found = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    differs = found and git("diff", "--quiet", "HEAD", "--", *(files or ("*.py", "*.safetensors"))).returncode
    return f"{found}+" if differs else found


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, threads in use, and the versions of what ran.

    Where there is a GPU, also its name, memory, compute capability and driver, and the CUDA that torch was built for.
    """
    described = {
        "cpu": cpu_model(),
        "cores": str(cores()),
        "memory": _memory(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described |= _gpu()
    return described | library_versions()


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that matter to a figure."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(machine: dict[str, str]) -> str:
    """One line: the GPU or the processor with its cores, and torch's version."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}, torch {machine['torch']}"


def _gpu() -> dict[str, str]:
    """The current GPU; unverified, since no GPU has been here."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
    }


def _driver(place: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel module, else what nvidia-smi says of it."""
    try:
        told = place.read_text()
    except OSError:
        told = _nvidia_smi()
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return found[0] if found else "unknown"


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"
