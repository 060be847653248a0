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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edit_compile.activation import set_activation
from edit_compile.elastic import ElasticTransformer
from edit_compile.layout import ElasticError, find_layout
from runtime.bundle.spec import RouterConfig
from runtime.routing.policy import RoutingPolicy

POLICY = RoutingPolicy(threshold=0.5, margin=0.015, max_reuse=10, warmup_steps=15)
ACTIVATION = "quick_gelu"
NARROW = ("hidden_states",)

_ROUTER = re.compile(r"^gate_mlps\.(\d+)\.(.+)$")
_PARTS = {"out.0": "hidden", "out.2": "gate", "width_head": "width"}
_MODULATION = "img_mod.1"

Shape = tuple[int, ...]


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
            of its MLPs is exchanged. It is left as it was where the file does not fit.
        inputs: keyword arguments of its forward, to find the blocks with; without them, they are found at the first
            call, and the routers are put on then.

    Raises:
        ElasticError: the file cannot be read, lacks a tensor, holds one that is unknown, or one of another shape.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            own = {key: shape for key, shape in shapes.items() if not _ROUTER.match(key)}
            routers = _check_routers(path, {key: shape for key, shape in shapes.items() if key not in own})
            expected = model.state_dict()
            _compare(path, own, {key: tuple(value.shape) for key, value in expected.items()}, type(model).__name__)
            set_activation(model, ACTIVATION)
            with torch.no_grad():
                for key, value in expected.items():
                    value.copy_(file.get_tensor(key))
            config = RouterConfig(hidden=routers[0].hidden, activation="relu", time_activation="silu")
            elastic = ElasticTransformer(model, config, narrow=NARROW)
            elastic.activation, elastic.policy = ACTIVATION, POLICY
            elastic.give_routers([_router(file, index, sizes) for index, sizes in enumerate(routers)])
    except (SafetensorError, OSError) as error:
        raise ElasticError(f"{path} cannot be read ({error}): is this a safetensors file?") from error
    if inputs is not None:
        elastic.attach(find_layout(model, inputs, config.time_dim, narrow=NARROW))
    return elastic.eval()


def _check_routers(path: Path, shapes: Mapping[str, Shape]) -> list[_Sizes]:
    """The sizes of every router; ElasticError where they are not numbered 0 .. n - 1, whole and of one H_r."""
    numbered: dict[int, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        index, name = _ROUTER.match(key).groups()  # type: ignore[union-attr]
        numbered.setdefault(int(index), {})[name] = shape
    if not numbered:
        raise ElasticError(f"{path} holds no routers (no tensor is named gate_mlps.<block>...)")
    absent = set(range(max(numbered) + 1)) - numbered.keys()
    if absent:
        raise ElasticError(f"{path} lacks gate_mlps.{min(absent)}, but has gate_mlps.{max(numbered)}")
    routers = []
    for index in range(len(numbered)):
        first, modulation = (numbered[index].get(f"{name}.weight", ()) for name in ("out.0", _MODULATION))
        sizes = _Sizes(first[-1], modulation[-1], numbered[0]["out.0.weight"][0]) if first and modulation else None
        expected = (sizes or _Sizes(0, 0, 0)).shapes(len(RouterConfig().widths))
        given = {f"gate_mlps.{index}.{name}": shape for name, shape in numbered[index].items()}
        _compare(path, given, {f"gate_mlps.{index}.{name}": shape for name, shape in expected.items()}, "a router")
        assert sizes is not None
        routers.append(sizes)
    return routers


def _compare(path: Path, given: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """ElasticError naming the first keys that are missing, unknown, or of another shape than expected."""
    missing, unknown = (sorted(one.keys() - other.keys()) for one, other in ((expected, given), (given, expected)))
    wrong = [
        f"{key} {list(given[key])} instead of {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in given and given[key] != shape
    ]
    for said, keys in (("lacks", missing), ("holds the unknown", unknown), ("holds", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ElasticError(f"{path} does not fit {what}: it {said} {', '.join(keys[:3])}{more}")


def _router(file: Any, index: int, sizes: _Sizes) -> dict[str, Tensor]:
    """One router's parameters under the names of `runtime.routing.router.Router`."""
    tensors = {}
    for kind in ("weight", "bias"):
        delta, gamma, _ = file.get_tensor(f"gate_mlps.{index}.{_MODULATION}.{kind}").split(sizes.dim)
        tensors[f"modulation.{kind}"] = torch.cat([gamma, delta])
        for theirs, ours in _PARTS.items():
            tensors[f"{ours}.{kind}"] = file.get_tensor(f"gate_mlps.{index}.{theirs}.{kind}")
    return tensors
