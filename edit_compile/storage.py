"""An elastic model on disk: safetensors and JSON, no pickle.

model.safetensors      the base model, under its own names
config.json            its diffusers config, where it has one
routers.safetensors    "<block index>.<parameter name>"
elastic.json           schema, RouterConfig, Layout
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edit_compile.elastic import ElasticTransformer
from edit_compile.layout import ElasticError, Layout
from runtime.folder import separate, written_whole
from runtime.spec import RouterConfig

SCHEMA = 1


def save_elastic(elastic: ElasticTransformer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `elastic` to `folder`, all of it or nothing; floating-point tensors as `dtype` where given.

    Raises ElasticError where `folder` holds something else.
    """
    if elastic.layout is None:
        raise ElasticError("the elastic model has no routers yet: call it once before saving it")
    if folder.exists() and any(folder.iterdir()) and not (folder / "elastic.json").is_file():
        raise ElasticError(f"{folder} exists and is not an elastic model: choose another name, or remove it")
    description = {"schema": SCHEMA, "router": asdict(elastic.config), "layout": asdict(elastic.layout)}
    as_json: Any = getattr(elastic.model, "to_json_string", None)
    with written_whole(folder) as place:
        save_file(separate(_cast(elastic.model.state_dict(), dtype)), place / "model.safetensors")
        save_file(separate(_cast(elastic.routers.state_dict(), dtype)), place / "routers.safetensors")
        if as_json is not None:
            (place / "config.json").write_text(as_json())
        (place / "elastic.json").write_text(json.dumps(description, indent=1) + "\n")


def load_elastic(folder: str | Path, model: nn.Module | None = None) -> ElasticTransformer:
    """Read what `save_elastic` wrote, in eval mode.

    Args:
        folder: where it was saved.
        model: a base model to load the weights into; without it, one is built from config.json (diffusers models).

    Raises:
        ElasticError: a file is missing, of another schema, or does not fit the model.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "elastic.json").read_text())
    except (OSError, ValueError) as error:
        raise ElasticError(f"{folder / 'elastic.json'} cannot be read ({error}): is this an elastic model?") from error
    if description.get("schema") != SCHEMA:
        raise ElasticError(f"{folder} has schema {description.get('schema')!r}, this version reads schema {SCHEMA}")
    model = model if model is not None else _model_from_config(folder / "config.json")
    router = description["router"]
    elastic = ElasticTransformer(model, RouterConfig(**{**router, "widths": tuple(router["widths"])}))
    elastic.attach(Layout.from_json(description["layout"]))
    _load_into(model, folder / "model.safetensors")
    _load_into(elastic.routers, folder / "routers.safetensors")
    return elastic.eval()


def _cast(tensors: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}


def _load_into(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise ElasticError(f"{path} does not load into {type(module).__name__}: {error}") from error


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
