"""The checkpoint that the paper's authors released: one safetensors file with a DiT and its routers.

    <key of the model's own state dict>         the DiT
    gate_mlps.<i>.img_mod.1.{weight,bias}       [3D, E]: delta, gamma and an unused part, of silu(time embedding)
    gate_mlps.<i>.out.0.{weight,bias}           W  [H_r, D], then relu
    gate_mlps.<i>.out.2.{weight,bias}           gate head [1, H_r]
    gate_mlps.<i>.width_head.{weight,bias}      width head [4, H_r], widths 1/4, 1/2, 3/4, 1

Routers are numbered as the blocks are run. In terms of `RouterConfig` they are the paper's form with relu and a silu in
front of the modulation; the unused third of it is dropped, and its halves change places (ours begins with gamma). All
MLPs of that model have x sigmoid(1.702 x) as activation, and those of the image stream alone are narrowed. Residuals
are reused from step 15 on, where p lies at most 0.015 above the threshold, ten times in a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.elastic.activation import Mlp, mlps, set_activation
from edit_compile.elastic.layout import ElasticError, find_layout
from edit_compile.elastic.tensor_file import Shape, TensorFile, opened, shapes_of
from edit_compile.elastic.transformer import ElasticTransformer
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy

POLICY = RoutingPolicy(threshold=0.5, margin=0.015, max_reuse=10, warmup_steps=15)
ACTIVATION = "quick_gelu"
NARROW = ("hidden_states",)

_ROUTER = re.compile(r"^gate_mlps\.(0|[1-9]\d*)\.(.+)$")
_PARTS = {"out.0": "hidden", "out.2": "gate", "width_head": "width"}
_MODULATION = "img_mod.1"


@dataclass(frozen=True)
class _Sizes:
    """D, E and H_r of the routers."""

    dim: int
    time_dim: int
    hidden: int

    def shapes(self, widths: int) -> dict[str, Shape]:
        """What a router's tensors look like, by their names behind the router's number."""
        rows = {
            _MODULATION: (3 * self.dim, self.time_dim),
            "out.0": (self.hidden, self.dim),
            "out.2": (1, self.hidden),
            "width_head": (widths, self.hidden),
        }
        weights = {f"{name}.weight": shape for name, shape in rows.items()}
        return weights | {f"{name}.bias": shape[:1] for name, shape in rows.items()}


def load_release(
    path: str | Path, model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> ElasticTransformer:
    """Read the released checkpoint into `model` and put its routers on it, in eval mode.

    Args:
        path: the safetensors file.
        model: a DiT of the checkpoint's sizes; its parameters are overwritten (in their own dtype) and the activation
            of its MLPs is exchanged. It is left as it was where the file does not fit, which is checked first.
        inputs: keyword arguments of its forward, to find the blocks with; without them, they are found at the first
            call, and the routers are put on then.

    Raises:
        ElasticError: the file cannot be read, lacks a tensor, holds one that is unknown, or one of another shape; it
            has routers for other blocks than the model's; or memory ran out, which the message tells apart.
    """
    path = Path(path)
    with opened(path) as file:
        own = {key: shape for key, shape in file.shapes.items() if not _ROUTER.match(key)}
        sizes = _check_routers(file)
        targets = model.state_dict()
        file.compare(shapes_of(targets, type(model).__name__), type(model).__name__, own)
        _check_blocks(path, sizes, model)
        routers = [_router(file, index, size) for index, size in enumerate(sizes)]
        config = RouterConfig(hidden=sizes[0].hidden, activation="relu", time_activation="silu")
        elastic = ElasticTransformer(model, config, narrow=NARROW)
        elastic.activation, elastic.policy = ACTIVATION, POLICY
        elastic.give_routers(routers)
        set_activation(model, ACTIVATION)
        file.copy_into(targets)
    if inputs is not None:
        elastic.attach(find_layout(model, inputs, config.time_dim, narrow=NARROW))
    return elastic.eval()


def _check_blocks(path: Path, routers: Sequence[_Sizes], model: nn.Module) -> None:
    """ElasticError where the model's blocks, by their MLPs, are not those that the routers are of.

    Whether each of them is one that can be routed is known only once the model is called.
    """
    blocks: dict[str, list[Mlp]] = {}
    for mlp in mlps(model, ACTIVATION):
        blocks.setdefault(_block_of(model, mlp), []).append(mlp)
    if len(blocks) != len(routers):
        raise ElasticError(f"{path} has routers of {len(routers)} blocks, {type(model).__name__} has {len(blocks)}")
    for index, (sizes, (name, own)) in enumerate(zip(routers, blocks.items(), strict=True)):
        widths = {layer.in_features for layer in model.get_submodule(name).modules() if isinstance(layer, nn.Linear)}
        if sizes.dim not in {mlp.proj.in_features for mlp in own} or sizes.time_dim not in widths:
            raise ElasticError(
                f"{path}: gate_mlps.{index} reads tokens of {sizes.dim} channels and a time embedding of "
                f"{sizes.time_dim}, and {name} of {type(model).__name__} has no such"
            )


def _block_of(model: nn.Module, mlp: Mlp) -> str:
    """The entry of the model's outermost ModuleList that holds the MLP; the model itself where there is none."""
    parts = mlp.name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return ""


def _check_routers(file: TensorFile) -> list[_Sizes]:
    """The sizes of every router; ElasticError where they are not numbered 0 .. n - 1, whole and of one H_r."""
    numbered: dict[int, dict[str, Shape]] = {}
    for key, shape in file.shapes.items():
        if found := _ROUTER.match(key):
            numbered.setdefault(int(found[1]), {})[found[2]] = shape
    if not numbered:
        raise ElasticError(f"{file.path} holds no routers (no tensor is named gate_mlps.<block>...)")
    absent = next((index for index in range(len(numbered)) if index not in numbered), None)
    if absent is not None:
        raise ElasticError(f"{file.path} lacks gate_mlps.{absent}, but has gate_mlps.{max(numbered)}")
    routers = []
    for index in range(len(numbered)):
        first, modulation = (numbered[index].get(f"{name}.weight", ()) for name in ("out.0", _MODULATION))
        sizes = _Sizes(first[-1], modulation[-1], numbered[0]["out.0.weight"][0]) if first and modulation else None
        expected = (sizes or _Sizes(0, 0, 0)).shapes(len(RouterConfig().widths))
        given = {f"gate_mlps.{index}.{name}": shape for name, shape in numbered[index].items()}
        file.compare({f"gate_mlps.{index}.{name}": shape for name, shape in expected.items()}, "a router", given)
        assert sizes is not None
        routers.append(sizes)
    return routers


def _router(file: TensorFile, index: int, sizes: _Sizes) -> dict[str, Tensor]:
    """One router's parameters under the names of `runtime.routing.router.Router`."""
    tensors = {}
    for kind in ("weight", "bias"):
        delta, gamma, _ = file.read(f"gate_mlps.{index}.{_MODULATION}.{kind}").split(sizes.dim)
        tensors[f"modulation.{kind}"] = torch.cat([gamma, delta])
        for theirs, ours in _PARTS.items():
            tensors[f"{ours}.{kind}"] = file.read(f"gate_mlps.{index}.{theirs}.{kind}")
    return tensors
