"""What the nodes of a graph give, told anew after the graph or its inputs have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def tell_shapes(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Set ``meta["val"]`` of every node, in place, where the placeholders are `inputs` (fake tensors, symbols)."""
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with torch.no_grad(), enable_python_dispatcher():  # some operators know symbols in Python alone
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
