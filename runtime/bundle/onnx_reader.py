"""What an ONNX file takes, gives and calls, read from its bytes (protobuf) without onnx.

A plan holds tensors and operators of ONNX itself. Refused are tensors in other files, operators of other domains,
functions, training, loops (which need not end), and operators that draw random numbers. Of graphs within graphs only
those are read that run once, or once for each entry of a sequence; they are held to the same rules.
"""

from __future__ import annotations

import math
import struct
from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field

from runtime.base.errors import BundleError
from runtime.bundle import limits
from runtime.bundle.graph_reader import Given

_NAMES = (
    "float32 uint8 int8 uint16 int16 int32 int64 string bool float16 float64 uint32 uint64 complex64 complex128 "
    "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
)
_TYPES = dict(enumerate(_NAMES.split(), 1))
_INT64 = 7
_DOMAINS = ("", "ai.onnx")
_RANDOM = ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"]
_SUBGRAPHS = (6, 11)
"""Fields of an attribute that hold graphs."""
_ENDING = ("If", "SequenceMap")
"""Operators with graphs within them that end, whatever those say."""
_SHORT = 256
"""Bytes of a tensor that may tell sizes; longer ones are tables."""
_SIZED = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Range": 1, "Pad": 1, "OneHot": 1, "Resize": 3}
"""Operators that make a tensor of sizes that they are given, and which of their inputs tells these."""

Numbers = MutableMapping[str, tuple[int, ...]]
"""Integers that a graph writes down, by name; those of graphs around it are seen, and never written over."""


@dataclass(frozen=True)
class OnnxGraph:
    """What goes into a graph and comes out, by name, and its integers that are written down."""

    inputs: dict[str, Given] = field(default_factory=dict)
    outputs: dict[str, Given] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)


def read_onnx(data: bytes, name: str) -> OnnxGraph:
    """What the file `name` of these bytes is; BundleError where it is damaged, or holds what no plan has."""
    try:
        return _Reader(name).model(data)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise BundleError(f"{name} is damaged ({error!r}): copy or compile the bundle again") from error


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes = 0
        self._mapped = (
            False  # within a graph that runs for each entry of a sequence: another would run for each of each
        )

    def model(self, data: bytes) -> OnnxGraph:
        graphs = []
        for number, value in _fields(data):
            if number == 7:
                graphs.append(_bytes(value))
            elif number in (20, 25):
                raise self._refused("functions or training")
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        return self._graph(graphs[0])

    def _graph(self, data: bytes, outer: Numbers | None = None) -> OnnxGraph:
        """A graph; one within another sees its integers, `outer`, and has no inputs or outputs that plans know."""
        graph, nodes = OnnxGraph(numbers={} if outer is None else ChainMap({}, outer)), []
        for number, value in _fields(data):
            if number == 1:
                nodes.append(_bytes(value))
            elif number == 5:
                self._tensor(_bytes(value), graph.numbers)
            elif number == 15:
                raise self._refused("a sparse tensor")
            elif number in (11, 12) and outer is None:
                told, given = _value_info(_bytes(value))
                (graph.inputs if number == 11 else graph.outputs)[told] = given
        self._nodes += len(nodes)
        if self._nodes > limits.NODES:
            raise self._refused(f"more than {limits.NODES} nodes")
        for node in nodes:
            self._node(node, graph.numbers)
        return graph

    def _node(self, data: bytes, numbers: Numbers) -> None:
        kind, domain, inputs, outputs, attributes = "", "", [], [], []
        for number, value in _fields(data):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number == 4:
                kind = _text(value)
            elif number == 7:
                domain = _text(value)
            elif number == 5:
                attributes.append(_bytes(value))
        if domain not in _DOMAINS:
            raise self._refused(f"the operator {kind} of the domain {domain!r}")
        if kind in _RANDOM or (kind == "Dropout" and len(inputs) > 2):
            raise self._refused(f"{kind}, which draws random numbers")
        found: Numbers = {}
        for attribute in attributes:
            self._attribute(attribute, found, kind, numbers)
        if kind == "Constant" and outputs and found:
            numbers[outputs[0]] = next(iter(found.values()))
        at = _SIZED.get(kind, len(inputs))
        sizes = numbers.get(inputs[at], ()) if at < len(inputs) else ()
        if math.prod(max(abs(size), 1) for size in sizes) > limits.MADE:
            raise self._refused(f"{kind} of more than {limits.MADE} elements")

    def _attribute(self, data: bytes, found: Numbers, kind: str, numbers: Numbers) -> None:
        """Put the integers of an attribute of a node of that `kind`, which sees `numbers`, into `found`."""
        integers = []
        for number, value in _fields(data):
            if number in _SUBGRAPHS and (kind not in _ENDING or (self._mapped and kind == "SequenceMap")):
                raise self._refused(f"a graph within its graph ({kind})")
            if number in _SUBGRAPHS:
                before, self._mapped = self._mapped, self._mapped or kind == "SequenceMap"
                self._graph(_bytes(value), numbers)
                self._mapped = before
            elif number in (5, 10):
                self._tensor(_bytes(value), found)
            elif number in (22, 23):
                raise self._refused("a sparse tensor")
            elif number == 3 and isinstance(value, int):
                integers.append(_signed(value))
            elif number == 8:
                integers += [_signed(value)] if isinstance(value, int) else list(_varints(value))
        if integers:
            found["ints"] = tuple(integers)

    def _tensor(self, data: bytes, numbers: Numbers) -> None:
        """Put the integers of a tensor among `numbers`; BundleError where its values are in another file."""
        name, kind, raw, integers = "", 0, b"", []
        for number, value in _fields(data):
            if number == 13 or (number == 14 and value != 0):
                raise self._refused("a tensor whose values are in another file")
            if number == 2 and isinstance(value, int):
                kind = value
            elif number == 7:
                integers += [_signed(value)] if isinstance(value, int) else list(_varints(value))
            elif number == 8:
                name = _text(value)
            elif number == 9:
                raw = _bytes(value)
        if kind == _INT64 and len(raw) <= _SHORT:
            numbers[name] = tuple(integers) or struct.unpack(f"<{len(raw) // 8}q", raw)

    def _refused(self, what: str) -> BundleError:
        return BundleError(f"{self._name} holds {what}, which no plan has: refused")


def _value_info(data: bytes) -> tuple[str, Given]:
    fields = dict(_fields(data))
    tensor = dict(_fields(_bytes(dict(_fields(_bytes(fields[2])))[1])))
    shape = []
    for number, value in _fields(_bytes(tensor.get(2, b""))):
        if number == 1:
            size = dict(_fields(_bytes(value))).get(1)
            shape.append(size if isinstance(size, int) else None)
    kind = tensor[1]
    return _text(fields[1]), Given(_TYPES[kind] if isinstance(kind, int) else "", tuple(shape))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if tag >> 32:
            raise ValueError("a field number of more than 29 bits")
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield _signed(value)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in the place of a message")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()
