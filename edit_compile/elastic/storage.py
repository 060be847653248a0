"""An elastic model on disk: safetensors and JSON, no pickle.

model.safetensors      the base model, under its own names
config.json            its diffusers config, where it has one
routers.safetensors    "<block index>.<parameter name>"
elastic.json           schema, RouterConfig, Layout, the elastic model's narrow, activation, policy and router_dtype,
                       and which linears are centred (see `edit_compile.elastic.centring`),
                       and what was stated of its blocks

Schema 1 had no narrow, activation and policy: it is read as if they were not set. Schemas 1 and 2 had no names of the
states in the layout: blocks must then be called as they were found. Up to schema 3 no linear is
centred, up to 4 routers have no dtype of their own, up to 6 nothing is stated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edit_compile.elastic.activation import mlps, set_activation
from edit_compile.elastic.centring import centred_names, centred_places
from edit_compile.elastic.layout import ElasticError, Layout
from edit_compile.elastic.release import load_release
from edit_compile.elastic.tensor_file import opened, shapes_of
from edit_compile.elastic.transformer import ElasticTransformer
from passes.observe.statement import Statements
from runtime.bundle.folder import separate, written_whole
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy
from runtime.routing.router import Router

SCHEMA = 7
_READ = (1, 2, 3, 4, 5, 6, SCHEMA)


def save_elastic(elastic: ElasticTransformer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `elastic` to `folder`, all of it or nothing; floating-point tensors as `dtype` where given.

    Routers with a dtype of their own keep it.

    Raises ElasticError where `folder` holds something else.
    """
    if elastic.layout is None:
        raise ElasticError("the elastic model has no routers yet: call it once before saving it")
    if folder.exists() and any(folder.iterdir()) and not (folder / "elastic.json").is_file():
        raise ElasticError(f"{folder} exists and is not an elastic model: choose another name, or remove it")
    description = {
        "schema": SCHEMA,
        "router": asdict(elastic.router_config),
        "layout": asdict(elastic.layout),
        "narrow": elastic.narrow,
        "activation": elastic.activation,
        "policy": asdict(elastic.policy) if elastic.policy is not None else None,
        "centred": centred_names(elastic.model),
        "router_dtype": None if elastic.router_dtype is None else str(elastic.router_dtype).removeprefix("torch."),
        "stated": [asdict(one) for one in elastic.stated],
    }
    as_json: Any = getattr(elastic.model, "to_json_string", None)
    with written_whole(folder) as place:
        save_file(separate(_cast(elastic.model.state_dict(), dtype)), place / "model.safetensors")
        save_file(
            separate(_cast(elastic.routers.state_dict(), elastic.router_dtype or dtype)), place / "routers.safetensors"
        )
        if as_json is not None:
            (place / "config.json").write_text(as_json())
        (place / "elastic.json").write_text(json.dumps(description, indent=1) + "\n")


def load_elastic(
    folder: str | Path,
    model: nn.Module | None = None,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> ElasticTransformer:
    """Read what `save_elastic` wrote, or the checkpoint that the paper's authors released, in eval mode.

    Args:
        folder: where it was saved; a file is read as a released checkpoint (see `edit_compile.elastic.release`).
        model: a base model to load the weights into; without it, one is built from config.json (diffusers models). A
            released checkpoint needs it.
        inputs: for a released checkpoint, keyword arguments of the model's forward to find its blocks with; without
            them they are found at the first call. A saved model knows its blocks.

    Raises:
        ElasticError: a file is missing, of another schema, or does not fit the model, which is then left as it was; or
            memory ran out, which the message tells apart.
    """
    folder = Path(folder)
    if folder.is_file() or folder.suffix == ".safetensors":
        if model is None:
            raise ElasticError(f"{folder} does not say what model it is of: pass load_elastic(path, model=...)")
        return load_release(folder, model, inputs)
    description = _read(folder)
    model = model if model is not None else _model_from_config(folder / "config.json")
    centred = [name for name in description.centred if name not in centred_names(model)]
    _check_modules(folder, description.layout, model, centred)
    if description.activation is not None:
        mlps(model, description.activation)
    with (
        opened(folder / "model.safetensors") as own,
        opened(folder / "routers.safetensors") as routers,
        centred_places(model, centred),
    ):
        targets = model.state_dict()
        own.compare(shapes_of(targets, type(model).__name__), type(model).__name__)
        with torch.device("meta"):
            like = [Router(description.router, block.dim, block.time_dim) for block in description.layout.blocks]
        shapes = {name: tuple(tensor.shape) for name, tensor in nn.ModuleList(like).state_dict().items()}
        routers.compare(shapes, "the routers that elastic.json describes")
        own_dtype = None if description.router_dtype is None else getattr(torch, description.router_dtype)
        elastic = ElasticTransformer(
            model, description.router, narrow=description.narrow, router_dtype=own_dtype, blocks=description.stated
        )
        elastic.activation, elastic.policy = description.activation, description.policy
        if elastic.activation is not None:
            set_activation(model, elastic.activation)
        elastic.attach(description.layout)
        own.copy_into(targets)
        routers.copy_into(elastic.routers.state_dict())
    return elastic.eval()


@dataclass(frozen=True)
class _Description:
    """What elastic.json says."""

    schema: int
    router: RouterConfig
    layout: Layout
    narrow: tuple[str, ...] | None = None
    activation: str | None = None
    policy: RoutingPolicy | None = None
    centred: tuple[str, ...] = ()
    router_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    stated: Statements = ()


def _read(folder: Path) -> _Description:
    path = folder / "elastic.json"
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ElasticError(f"{path} cannot be read ({error}): is this an elastic model?") from error
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema not in _READ:
        raise ElasticError(f"{folder} has schema {schema!r}, this version reads schemas {_READ}")
    try:
        return msgspec.convert(description, _Description)
    except msgspec.ValidationError as error:
        raise ElasticError(f"{path} does not hold together: {error}") from error


def _check_modules(folder: Path, layout: Layout, model: nn.Module, centred: Sequence[str]) -> None:
    """ElasticError where `model` lacks a module that the layout names, or a linear that is to be `centred`."""
    there = dict(model.named_modules())
    named = [name for b in layout.blocks for name in (b.name, *(f"{b.name}.{mask.module}" for mask in b.masks))]
    inside = {f"{name}.linear" for name in centred}
    missing = [name for name in named if name not in there and name not in inside]
    missing += [name for name in centred if not isinstance(there.get(name), nn.Linear)]
    if missing:
        raise ElasticError(f"{folder} is of another model: {type(model).__name__} has no module {missing[0]}")


def _cast(tensors: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}


def _model_from_config(path: Path) -> nn.Module:
    import diffusers

    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ElasticError(f"{path} cannot be read ({error}): pass load_elastic(folder, model=...)") from error
    name = config.get("_class_name", "")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ElasticError(f"{path}: the class {name!r} is no diffusers model: pass load_elastic(folder, model=...)")
    return found.from_config(config)
