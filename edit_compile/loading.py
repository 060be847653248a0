"""What the command line is given as text: models, classes in Python files, inputs, settings."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edit_compile.files import save_tensors_atomically
from runtime.bundle.folder import separate
from runtime.face.arguments import flatten, unflatten

T = TypeVar("T")


class UserError(Exception):
    """Something asked for on the command line is not there or makes no sense; the message is one sentence."""


def load_model(where: str, dtype: torch.dtype | None = None, bare: bool = False, hollow: bool = False) -> nn.Module:
    """An elastic folder, a saved diffusers transformer or pipeline, or ``path/to/file.py:name`` (a class or function).

    In eval mode, and as `dtype` where given. `bare`: a diffusers folder that holds a config and no weights gives the
    model on the meta device. `hollow`: a diffusers folder, or the config.json in it, does so even where it holds
    weights, and a class or function is called with that device. Raises UserError where it is none of them.
    """
    if ".py:" in where:
        with torch.device("meta") if hollow else nullcontext():
            model = _called(where)
        return model.to(dtype) if dtype else model
    folder = Path(where).parent if hollow and Path(where).name == "config.json" else Path(where)
    if (folder / "elastic.json").is_file():
        from edit_compile.elastic.storage import load_elastic

        model = load_elastic(folder)
        return model.to(dtype) if dtype else model
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").is_file():
            empty = hollow or (bare and not any(candidate.glob("*.safetensors")))
            return _diffusers_model(candidate, empty, dtype)
    raise UserError(
        f"{where} is neither an elastic model, nor a saved diffusers transformer or pipeline, nor path/to/file.py:name"
    )


def load_object(where: str) -> Any:
    """The attribute named by ``path/to/file.py:name``; the file's folder is importable from it."""
    file, _, name = where.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"{file or where} is not a file; give path/to/file.py:name")
    module = _imported(path)
    if not hasattr(module, name):
        raise UserError(f"{file} defines no {name}")
    return getattr(module, name)


def load_inputs(path: Path) -> dict[str, Any]:
    """Keyword arguments of a forward: the file's tensors, and its metadata's values as JSON (see `save_inputs`).

    A dotted name is a place in a dict or list: ``context.main`` is ``context["main"]``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        constants = {name: json.loads(value) for name, value in metadata.items() if name != "format"}
    except ValueError as error:
        raise UserError(f"{path}: its metadata holds something that is not JSON ({error})") from error
    return unflatten({**tensors, **constants})


def save_inputs(inputs: Mapping[str, Any], path: Path) -> None:
    """Write keyword arguments as one safetensors file: tensors as such, everything else as JSON in its metadata.

    What holds tensors or tuples, which JSON lacks, is written leaf by leaf, under dotted names.
    """
    leaves: dict[str, Any] = {}
    for name, value in inputs.items():
        nested = any(isinstance(part, Tensor | tuple) for part in _parts(value))
        leaves |= {name: value} if not nested else {k: v for part in flatten({name: value}) for k, v in part.items()}
    tensors = separate({name: value for name, value in leaves.items() if isinstance(value, Tensor)})
    constants = {name: json.dumps(value) for name, value in leaves.items() if not isinstance(value, Tensor)}
    save_tensors_atomically(path, tensors, constants)


def _parts(value: object) -> Iterator[object]:
    """`value` and all that it holds."""
    yield value
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for each in held:
        yield from _parts(each)


def parse_overrides(kind: type[T], overrides: Sequence[str], **given: Any) -> T:
    """The dataclass `kind` from "name=value" texts (JSON where it is JSON, else text) and the fields `given`."""
    fields: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    for override in overrides:
        name, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override!r} is not of the form name=value")
        fields[name] = json_or_text(value)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(f"no setting is called {unknown[0]}; there are {', '.join(known)}")
    try:
        return msgspec.convert(fields, kind, dec_hook=lambda wanted, value: wanted(value))
    except msgspec.ValidationError as error:
        raise UserError(f"the settings do not fit: {error}") from error


def parse_numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers separated by commas") from None


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A floating-point dtype of torch by name; None for None."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"{name!r} is no floating-point type; try float32 or bfloat16")
    return dtype


def json_or_text(value: str) -> Any:
    """`value` as JSON where it is JSON, else as it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _called(where: str) -> nn.Module:
    model = load_object(where)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{where} gave a {type(model).__name__}, not a torch module")
    return model.eval()


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_given_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path[:0] = [folder for folder in (str(path.parent), str(Path.cwd())) if folder not in sys.path]
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{path} cannot be imported: {error}") from error
    return module


def _diffusers_model(folder: Path, empty: bool, dtype: torch.dtype | None) -> nn.Module:
    import diffusers

    name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise UserError(f"{folder / 'config.json'} names the class {name!r}, which is not a diffusers model")
    if empty:
        with torch.device("meta"):
            skeleton: nn.Module = found.from_config(found.load_config(folder))
        return (skeleton.to(dtype) if dtype else skeleton).eval()
    # by the library, as its pipelines do: some models keep parts of theirs in float32
    model: nn.Module = found.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)
    return model.eval()
