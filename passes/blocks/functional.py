"""An exported program as a plain graph: functional operators, and placeholders with readable names.

Removed: runtime assertions (what they assert was seen to hold in every recorded run) and what only
they used; slices of everything; squeezes of nothing. Rewritten: ``view(x, s) = reshape(x, s)``, which asks nothing of
strides. Refused: a program that writes to an input or a buffer, and one that calls a graph within the
graph.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

CONSTANT = "constant."
_ASSERTIONS = ("aten._assert", "aten.sym_constrain_range")
_SQUEEZES = (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class PlainError(Exception):
    """The program cannot be a plain function of tensors; the message says why."""


def plain(program: ExportedProgram, prefix: str, names: Iterable[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of `program`, with its weights by placeholder name.

    Weights come first; a qualified name loses `prefix`, a tensor that is neither parameter nor buffer
    gets ``constant.`` before its name and its value in ``meta["constants"]`` of the module. `names`
    are the names wanted for the inputs, in order. Weights that nothing uses are left out.

    Raises PlainError.
    """
    for output in program.graph_signature.output_specs:
        if output.kind != OutputKind.USER_OUTPUT:
            raise PlainError(f"it writes to {output.target} ({output.kind.name.lower()})")
    _clean(program.graph)
    qualified = _qualified(program, prefix)
    module, weights = _renamed(program.graph, qualified, names)
    held = {**program.state_dict, **program.constants}
    constants = {f"{CONSTANT}{name.removeprefix(prefix)}": value for name, value in held.items()}
    module.meta["constants"] = {name: constants[name] for name in weights.values() if name in constants}
    return module, weights


def identifier(text: str) -> str:
    """`text` with every run of other characters as one underscore, never starting with a digit."""
    name = re.sub(r"\W+", "_", text).strip("_")
    return f"x_{name}" if not name or name[0].isdigit() else name


def _clean(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith(_ASSERTIONS):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.slice.Tensor and tuple(node.args[2:]) == (0, sys.maxsize):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _SQUEEZES and node.meta["val"].dim() == node.args[0].meta["val"].dim():
            node.replace_all_uses_with(node.args[0])  # nothing to squeeze, but ONNX would insist
            graph.erase_node(node)
        elif node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default
        elif node.op in ("get_attr", "call_module", "call_method"):
            raise PlainError(f"its graph holds {node.op} {node.target}")
    graph.eliminate_dead_code()


def _qualified(program: ExportedProgram, prefix: str) -> dict[str, str]:
    """Qualified name of each placeholder that is a weight."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = str(spec.target)
            found[spec.arg.name] = name.removeprefix(prefix) if name.startswith(prefix) else f"{CONSTANT}{name}"
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            found[spec.arg.name] = f"{CONSTANT}{str(spec.target).removeprefix(prefix)}"
        elif spec.kind != InputKind.USER_INPUT:
            raise PlainError(f"it takes {spec.arg.name}, a {spec.kind.name.lower()}")
    return found


def _renamed(
    graph: fx.Graph, qualified: Mapping[str, str], names: Iterable[str]
) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy of `graph` with readable placeholders, and the qualified names of those that are weights."""
    wanted = iter(names)
    copy = fx.Graph()
    weights: dict[str, str] = {}
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            twins[node] = copy.node_copy(node, twins.__getitem__)
        elif node.name not in qualified:
            twins[node] = _placeholder(copy, node, next(wanted))
        elif node.users:
            twin = _placeholder(copy, node, qualified[node.name])
            twins[node] = twin
            weights[twin.name] = qualified[node.name]
    copy.lint()
    return fx.GraphModule(torch.nn.Module(), copy), weights


def _placeholder(graph: fx.Graph, original: fx.Node, name: str) -> fx.Node:
    node = graph.placeholder(identifier(name))
    node.target = node.name
    node.meta = dict(original.meta)
    return node
