"""Graphs as bytes: `torch.export` archives that hold a graph and nothing else.

The format is torch.export's own, so that any tool that knows it can read our files; but they are
not read by `torch.export.load`, which evaluates the text of symbolic sizes as Python (through
sympy) and unpickles sample inputs, and some kinds of constants. `load` reads the archive's JSON
graph itself and takes nothing but tensor operators and arithmetic on sizes, so a bundle from
anywhere can do no more than compute.
"""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from runtime.base.errors import BundleError
from runtime.bundle import limits
from runtime.bundle.graph_reader import Graph, read_graph
from runtime.bundle.operators import refused_in

_GRAPH = "models/model.json"
_MEMBERS = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
)
_EMPTY = "data/sample_inputs/model.pt"
_UNTOLD = ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack")
"""What nodes remember of the machine and source they were made from."""


def dump(exported: torch.export.ExportedProgram) -> bytes:
    """`exported`, whose placeholders must all be user inputs, as an archive without sample inputs.

    ValueError when it holds parameters, buffers or constants (make them inputs), or writes into
    one of its inputs; BundleError, naming the operator, for one that `load` would refuse. Where nodes
    come from (source lines, modules) is dropped from `exported`.
    """
    signature = exported.graph_signature
    lifted = [spec.arg.name for spec in signature.input_specs if spec.kind != InputKind.USER_INPUT]
    if lifted:
        raise ValueError(f"an archive holds no tensors; make these inputs of the graph: {lifted}")
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise ValueError("the graph writes into its inputs")
    refused = refused_in(exported.graph)
    if refused is not None:
        raise BundleError(f"{refused}: no bundle may hold it; take it out of the model's code")
    for node in exported.graph.nodes:
        for key in _UNTOLD:
            node.meta.pop(key, None)
    exported._example_inputs = None
    archive = io.BytesIO()
    with _untested():
        torch.export.save(exported, archive)
    return archive.getvalue()


_saving = threading.Lock()


@contextmanager
def _untested() -> Iterator[None]:
    """Inside the ``with`` block torch.export does not put what it saves in order to see that this can be done.

    It throws the result away, and takes two thirds of the time for it.
    """
    from torch._export.serde import serialize

    with _saving:
        test = getattr(serialize, "canonicalize", None)
        serialize.canonicalize = lambda *_: None  # type: ignore[assignment]
        try:
            yield
        finally:
            serialize.canonicalize = test  # type: ignore[assignment]


def load(data: bytes, name: str = "the archive", device: torch.device | None = None) -> Callable[..., tuple[Any, ...]]:
    """The graph of an archive as a function of its inputs, giving a flat tuple.

    Tensors that the graph makes itself are made on `device` where given. BundleError, naming the
    archive `name`, if it is damaged or holds anything but a graph of tensor operators.
    """
    return read(data, name, device).module


def read(data: bytes, name: str = "the archive", device: torch.device | None = None) -> Graph:
    """As `load`, with what the archive says of the graph's inputs and outputs."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parsed = json.loads(archive.read(_check_members(archive, name, len(data))))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError, zlib.error, OSError) as error:
        raise BundleError(f"{name} is damaged ({error}): copy or compile the bundle again") from error
    return read_graph(parsed, name, device)


def _check_members(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """The graph's member; BundleError for one that is not part of a plain graph, or larger than it can be.

    torch.export compresses nothing: a member that is compressed, or larger than the archive, is none of its.
    """
    found = []
    for info in archive.infolist():
        inner = info.filename.partition("/")[2]
        if inner == _GRAPH:
            found.append(info)
        elif not _MEMBERS.fullmatch(inner) and not (inner == _EMPTY and info.file_size == 0):
            raise BundleError(f"{name} holds {info.filename!r}, which is not part of a graph: refused")
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= size:
            raise BundleError(f"{name} holds {info.filename!r} compressed, or of a false size: refused")
    if len(found) != 1:
        raise BundleError(f"{name} holds {len(found)} graphs, not one: copy or compile the bundle again")
    if found[0].file_size > limits.JSON_BYTES:
        raise BundleError(f"{name} holds a graph of more than {limits.JSON_BYTES} bytes: refused")
    return found[0]
