"""The model around its guards, as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from runtime.face.arguments import flatten


@dataclass(frozen=True)
class GlueGraph:
    """The model around its guards: ``module(*weights, *inputs) -> tuple(outputs)``.

    `weights` are the leading placeholders' tensors by qualified name in the model (constants that
    belong to no module under ``glue.<name of the glue>.<name>``); `inputs` are the keywords (dotted where the
    argument is a container) of the tensor arguments. `batch_dims` tells which
    inputs keep a free batch dimension; empty when the glue fits one batch size only. `outputs` names
    what the model gives, `sized_by` the inputs whose values set sizes at its guards (see runtime.bundle.spec.Glue),
    and `loose` where those are: (block, input, dimension).
    """

    module: fx.GraphModule
    weights: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    batch_dims: Mapping[str, int]
    outputs: tuple[str, ...]
    sized_by: tuple[str, ...] = ()
    loose: frozenset[tuple[int, int, int]] = frozenset()

    @property
    def unused(self) -> tuple[str, ...]:
        """Inputs that nothing is made of."""
        nodes = self.module.graph.find_nodes(op="placeholder")[len(self.weights) :]
        return tuple(name for name, node in zip(self.inputs, nodes, strict=True) if not node.users)


def tensor_arguments(kwargs: Mapping[str, object]) -> tuple[list[str], list[Tensor]]:
    """Names (``key`` or ``key.0.sub``) and values of the tensors among a forward's keyword arguments."""
    tensors, _ = flatten(kwargs)
    return list(tensors), list(tensors.values())
