"""From the JSON form of a torch.export graph to a callable, admitting tensor operators only."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from runtime.base import guard as _guard  # noqa: F401  registers the operator that glue graphs call
from runtime.base.errors import BundleError

MAJOR = 8
"""Major version of torch.export's schema that is understood."""

_NAMESPACES = ("aten", "prims", "edit_compile")
_REFUSED = ("from_file", "set_", "set_data", "resize_", "_resize_output_", "record_stream")
_OPERATORS = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift"
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in ("trunc", "ceil", "floor", "sqrt")},
}
_SYMBOLIC = ("sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt")
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_STRIDED = 7
_KEYWORD = 2
_ALONE = ("none", "complex", "scalar_type", "memory_format", "device", "layout")
"""Kinds of which there are no lists."""
_SCALARS: dict[str, type] = {"int": int, "bool": bool, "string": str}


def read_graph(program: Mapping[str, Any], name: str, device: torch.device | None) -> fx.GraphModule:
    """The graph module of a parsed ``model.json``; see `runtime.bundle.archive.load`."""
    try:
        major = program["schema_version"]["major"]
        if major != MAJOR:
            raise BundleError(f"{name} has torch.export schema {major}, this edit_compile reads {MAJOR}: compile again")
        return _Reader(name, device).read(program["graph_module"]["graph"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise BundleError(f"{name} is not a graph ({error!r}): copy or compile the bundle again") from error


class _Reader:
    def __init__(self, name: str, device: torch.device | None) -> None:
        self._name = name
        self._device = device
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}
        scalars = {kind: functools.partial(self._scalar, kind) for kind in ("float", *_SCALARS)}
        self._kinds: dict[str, Callable[[Any], Any]] = {
            **scalars,
            **dict.fromkeys(("sym_int", "sym_float", "sym_bool"), self._symbolic),
            "none": lambda value: None,
            "tensor": lambda value: self._nodes[value["name"]],
            "optional_tensor": self._argument,
            "complex": lambda value: complex(float(value["real"]), float(value["imag"])),
            "scalar_type": _DTYPES.__getitem__,
            "memory_format": _MEMORY_FORMATS.__getitem__,
            "device": lambda value: self._device or torch.device(value["type"], value["index"]),
            "layout": self._strided,
        }

    def read(self, graph: Mapping[str, Any]) -> fx.GraphModule:
        for index, given in enumerate(graph["inputs"]):
            # names of the file's own would end up in the source that fx generates
            self._nodes[given["as_tensor"]["name"]] = self._graph.placeholder(f"input_{index}")
        for node in graph["nodes"]:
            self._read_node(node)
        self._graph.output(tuple(self._argument(output) for output in graph["outputs"]))
        self._graph.lint()
        return fx.GraphModule(nn.Module(), self._graph)

    def _read_node(self, node: Mapping[str, Any]) -> None:
        args, kwargs = [], {}
        for given in node["inputs"]:
            value = self._argument(given["arg"])
            if given.get("kind") == _KEYWORD:
                kwargs[self._keyword(given["name"])] = value
            else:
                args.append(value)
        made = self._graph.call_function(self._operator(node["target"]), tuple(args), kwargs)
        outputs = node["outputs"]
        if len(outputs) == 1 and "as_tensors" not in outputs[0]:
            self._name_output(outputs[0], made)
            return
        parts = [{"as_tensor": one} for one in outputs[0]["as_tensors"]] if len(outputs) == 1 else outputs
        for index, part in enumerate(parts):
            if "as_none" not in part:
                self._name_output(part, self._graph.call_function(operator.getitem, (made, index)))

    def _name_output(self, output: Mapping[str, Any], node: fx.Node) -> None:
        ((kind, value),) = output.items()
        if kind != "as_none":
            self._nodes[value["name"] if kind == "as_tensor" else value["as_name"]] = node

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        known = kind.removeprefix("as_")
        if known in self._kinds:
            return self._kinds[known](value)
        if known[-1:] == "s" and known[:-1] in self._kinds and known[:-1] not in _ALONE:
            return [self._kinds[known[:-1]](one) for one in value]
        raise self._refused(kind)

    def _strided(self, value: object) -> torch.layout:
        if value != _STRIDED:
            raise self._refused("as_layout")
        return torch.strided

    def _refused(self, kind: str) -> BundleError:
        return BundleError(f"{self._name} holds an argument of the kind {kind!r}, which no plain graph has: refused")

    def _symbolic(self, value: Mapping[str, Any]) -> Any:
        ((kind, inner),) = value.items()
        return self._nodes[inner] if kind == "as_name" else self._scalar(kind[3:], inner)

    def _scalar(self, kind: str, value: object) -> object:
        if kind == "float":
            return float(value)  # type: ignore[arg-type]
        if type(value) is not _SCALARS[kind]:
            raise BundleError(f"{self._name} gives {value!r} as {kind}: refused")
        return value

    def _keyword(self, name: str) -> str:
        if not name.isidentifier():
            raise BundleError(f"{self._name} names an argument {name!r}: refused")
        return name

    def _operator(self, target: str) -> Callable[..., Any]:
        if target in _ARITHMETIC:
            return _ARITHMETIC[target]
        parts: Sequence[str] = target.split(".")
        if parts[0] == "torch" and len(parts) == 2 and parts[1] in _SYMBOLIC:
            symbolic: Callable[..., Any] = getattr(torch, parts[1])
            return symbolic
        if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in _NAMESPACES and parts[3] not in _REFUSED:
            overload = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
            if isinstance(overload, torch._ops.OpOverload):
                return overload
            raise BundleError(
                f"{self._name} calls {target}, which torch {torch.__version__} does not have: compile again"
            )
        raise BundleError(f"{self._name} calls {target}, which is not a tensor operator: refused")
