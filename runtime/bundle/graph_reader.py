"""From the JSON form of a torch.export graph to a callable, admitting tensor operators only."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from runtime.base.errors import BundleError
from runtime.bundle import limits
from runtime.bundle.operators import ARITHMETIC, WRITTEN, find, refusal

MAJOR = 8
"""Major version of torch.export's schema that is understood."""

_FIRST = "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool bfloat16"
_LATER = "uint16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu uint32 uint64"
_DTYPES: dict[int, torch.dtype] = {
    number: getattr(torch, name)
    for start, names in ((1, _FIRST), (28, _LATER))
    for number, name in enumerate(names.split(), start)
}
"""By the numbers of torch.export's schema."""
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
_SHOWN = 200
_BITS = 64
"""Of a size, or a number that a tensor holds; one that was a float has 16 times as many at most."""


@dataclass(frozen=True)
class Given:
    """What a file says of a tensor: its dtype, and its sizes, None where they may differ between calls."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """A graph as a function, and what its file says of its inputs and outputs."""

    module: fx.GraphModule
    inputs: tuple[Given, ...]
    outputs: tuple[Given, ...]


def read_graph(program: Mapping[str, Any], name: str, device: torch.device | None) -> Graph:
    """The graph of a parsed ``model.json``; see `runtime.bundle.archive.read`."""
    try:
        major = program["schema_version"]["major"]
        if major != MAJOR:
            raise BundleError(f"{name} has torch.export schema {major}, this edit_compile reads {MAJOR}: compile again")
        return _Reader(name, device).read(program["graph_module"]["graph"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, SyntaxError) as error:
        raise BundleError(f"{name} is not a graph ({_short(error)}): copy or compile the bundle again") from error


def _given(graph: Mapping[str, Any], argument: Mapping[str, Any]) -> Given:
    told = graph["tensor_values"][argument["as_tensor"]["name"]]
    sizes = (size.get("as_int") for size in told["sizes"])
    return Given(str(_DTYPES[told["dtype"]])[6:], tuple(size if type(size) is int else None for size in sizes))


def _short(value: object) -> str:
    """`value` as it is shown in a message."""
    told = repr(value)
    return told if len(told) <= _SHOWN else f"{told[:_SHOWN]}…"


class _Reader:
    def __init__(self, name: str, device: torch.device | None) -> None:
        self._name = name
        self._device = device
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}
        self._bits: dict[fx.Node, int] = {}
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

    def read(self, graph: Mapping[str, Any]) -> Graph:
        if len(graph["nodes"]) > limits.NODES:
            raise BundleError(f"{self._name} has {len(graph['nodes'])} nodes, more than {limits.NODES}: refused")
        for index, given in enumerate(graph["inputs"]):
            # names of the file's own would end up in the source that fx generates
            self._nodes[given["as_tensor"]["name"]] = self._graph.placeholder(f"input_{index}")
        for node in graph["nodes"]:
            self._read_node(node)
        self._graph.output(tuple(self._argument(output) for output in graph["outputs"]))
        self._graph.lint()
        sides = ([_given(graph, one) for one in graph[side]] for side in ("inputs", "outputs"))
        return Graph(fx.GraphModule(nn.Module(), self._graph), *map(tuple, sides))

    def _read_node(self, node: Mapping[str, Any]) -> None:
        args, kwargs = [], {}
        for given in node["inputs"]:
            value = self._argument(given["arg"])
            if given.get("kind") == _KEYWORD:
                kwargs[self._keyword(given["name"])] = value
            else:
                args.append(value)
        made = self._call(node["target"], args, kwargs)
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
            raise BundleError(f"{self._name} gives {_short(value)} as {kind}: refused")
        if type(value) is int and not -limits.INTEGER <= value + 1 <= limits.INTEGER + 1:
            raise BundleError(f"{self._name} has an integer of more than 64 bits: refused")
        return value

    def _keyword(self, name: str) -> str:
        if not name.isidentifier():
            raise BundleError(f"{self._name} names an argument {name!r}: refused")
        return name

    def _call(self, target: str, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        called = find(target)
        if called is None:
            lacks = f"which torch {torch.__version__} does not have: compile again"
            known = target.startswith(("torch.ops.aten.", "torch.ops.prims.")) and target.count(".") == 4
            told = lacks if known else "which is not a tensor operator: refused"
            raise BundleError(f"{self._name} calls {target}, {told}")
        why = refusal(called, args, kwargs)
        if why is not None:
            raise BundleError(f"{self._name} calls {target}, which {why}: refused")
        if called in WRITTEN:
            called = WRITTEN[called]
            names = {value.name for value in called._schema.arguments}
            kwargs = {name: value for name, value in kwargs.items() if name in names}
        node = self._graph.call_function(called, tuple(args), kwargs)
        if target in ARITHMETIC:
            self._bits[node] = self._bits_of(target.rpartition(".")[2], args)
            if self._bits[node] > limits.INTEGER_BITS:
                raise BundleError(f"{self._name} computes integers of more than {limits.INTEGER_BITS} bits: refused")
        return node

    def _bits_of(self, name: str, args: Sequence[Any]) -> int:
        """Bits of the largest integer that arithmetic may give."""
        bits = [self._widest(value) for value in args]
        by = args[1] if len(args) > 1 else None
        if name in ("pow", "lshift"):
            if type(by) is float and name == "pow":
                return _BITS
            if type(by) is not int or not -limits.EXPONENT <= by <= limits.EXPONENT:
                raise BundleError(f"{self._name} has the power or shift {by!r} of a size: refused")
            return bits[0] * max(abs(by), 1) if name == "pow" else bits[0] + abs(by)
        if name == "truediv":
            return _BITS
        return sum(bits) if name == "mul" else max(bits, default=0) + 1

    def _widest(self, value: Any) -> int:
        return value.bit_length() if type(value) is int else self._bits.get(value, _BITS)
