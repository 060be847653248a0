"""Graphs as bytes: `torch.export` archives that hold a graph and nothing else.

`torch.export.save` writes a zip of one JSON graph, configs of weights and constants, and pickled
sample inputs. Ours have no sample inputs, no weights and no constants, so that nothing in them is
ever unpickled; `load` checks this before reading.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from runtime.errors import BundleError

_MEMBERS = re.compile(
    r"[^/]+/(models/model\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json)"
)
_EMPTY = re.compile(r"[^/]+/data/sample_inputs/model\.pt")


def dump(exported: torch.export.ExportedProgram) -> bytes:
    """`exported`, whose placeholders must all be user inputs, as an archive.

    ValueError when it holds parameters, buffers or constants: make them inputs first.
    """
    lifted = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind != InputKind.USER_INPUT]
    if lifted:
        raise ValueError(f"an archive holds no tensors; make these inputs of the graph: {lifted}")
    for node in exported.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack"):
            node.meta.pop(key, None)
    exported._example_inputs = None
    archive = io.BytesIO()
    torch.export.save(exported, archive)
    return archive.getvalue()


def load(data: bytes) -> Callable[..., tuple[Any, ...]]:
    """The graph of an archive as a function of its inputs; BundleError if it holds anything else."""
    _check(data)
    return torch.export.load(io.BytesIO(data)).graph_module


def _check(data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: info.file_size for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise BundleError(f"not a torch.export archive ({error}): compile again") from error
    for name, size in members.items():
        if not _MEMBERS.fullmatch(name) and not (_EMPTY.fullmatch(name) and size == 0):
            raise BundleError(f"the archive holds {name}, which is not part of a graph: refused")
