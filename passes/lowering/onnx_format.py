"""A plan's graph, exported and without weights, as ONNX.

torch.onnx translates. What is done around it spares time alone: three quarters of a call go into work
that finds nothing to do.

    it retraces the graph to decompose what it cannot translate    a graph without such operators is left as it is
    it parses its some five hundred translations at every call     they are parsed once
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from onnxscript import FLOAT, opset18
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from passes.lowering.lower import LowerError

OPSET = 20
_op: Any = opset18

_exporting = threading.Lock()


def to_onnx(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], what: str) -> bytes:
    """An exported program without weights as ONNX, opset 20.

    Raises:
        LowerError: torch.onnx has no translation for one of its operators.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with _exporting, _parsed_once(), _decomposed_at_need(program), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table={torch.ops.aten.rms_norm.default: _rms_norm},
                verbose=False,
            )
    except Exception as error:
        raise LowerError(f"{what} has no ONNX form: {error}") from error
    finally:
        _settle(program)
    assert model is not None
    return model.model_proto.SerializeToString()


def _settle(program: ExportedProgram) -> None:
    """Drop the unnamed sizes that translating left with the shapes of `program`, which other programs share."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            value.fake_mode.shape_env.pending_fresh_unbacked_symbols.clear()
            return


def _rms_norm(value: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight, in single precision at least; ONNX has no such operator before opset 23.

    Without `eps` it is that of single precision, as in torch; that of double is small enough for torch.onnx to drop it.
    """
    wide = value if value.dtype.bitwidth > 16 else _op.Cast(value, to=FLOAT.dtype)
    if eps is None and value.dtype.bitwidth > 32:
        raise ValueError("rms_norm in double precision without its epsilon")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    mean = _op.ReduceMean(_op.Mul(wide, wide), list(range(-len(shape), 0)), keepdims=1)
    small = _op.CastLike(_op.Constant(value_float=eps), wide)
    normed = _op.CastLike(_op.Div(wide, _op.Sqrt(_op.Add(mean, small))), value)
    return normed if weight is None else _op.Mul(normed, weight)


@contextmanager
def _decomposed_at_need(program: ExportedProgram) -> Iterator[None]:
    """Inside the ``with`` block `program` decomposes to itself where it holds none of the operators in question."""
    retrace = program.run_decompositions

    def run_decompositions(table: Mapping[Any, Callable[..., Any]] | None = None, **options: Any) -> ExportedProgram:
        used = {node.target for node in program.graph.nodes if node.op == "call_function"}
        return program if table is not None and used.isdisjoint(table) else retrace(table, **options)

    vars(program)["run_decompositions"] = run_decompositions
    try:
        yield
    finally:
        del vars(program)["run_decompositions"]


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the ``with`` block torch.onnx finds the translations that an earlier call has parsed."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis as source

    parse = source.get_torchlib_ops
    source.get_torchlib_ops = _once(parse)
    try:
        yield
    finally:
        source.get_torchlib_ops = parse


@functools.cache
def _once(parse: Callable[[], Any]) -> Callable[[], Any]:
    return functools.cache(parse)
