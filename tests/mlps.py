"""MLPs written in ATen operators: what passes.mlp.sites must find and passes.mlp.weights must narrow.

Each takes the hidden size H and gives a block whose state is x (3, 5, 8).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from passes.graphs.graph import BlockGraph
from tests.blocks import written

aten = torch.ops.aten
STATE = {"x": (3, 5, 8)}


def gelu(h: int) -> BlockGraph:
    def block(w1, b1, w2, b2, x):
        return x + aten.linear.default(aten.gelu.default(aten.linear.default(x, w1, b1)), w2, b2)

    return written(block, {"w1": (h, 8), "b1": (h,), "w2": (8, h), "b2": (8,)}, STATE)


def geglu_packed(h: int) -> BlockGraph:
    def block(w1, b1, w2, b2, x):
        value, gate = _halves(aten.linear.default(x, w1, b1), h)
        return x + aten.linear.default(value * aten.gelu.default(gate), w2, b2)

    return written(block, {"w1": (2 * h, 8), "b1": (2 * h,), "w2": (8, h), "b2": (8,)}, STATE)


def swiglu_packed_by_slices(h: int) -> BlockGraph:
    def block(w1, w2, x):
        both = aten.linear.default(x, w1)
        gate, value = aten.slice.Tensor(both, 2, 0, h), aten.slice.Tensor(both, -1, h, 2**63 - 1)
        return x + aten.linear.default(aten.silu.default(gate) * value, w2)

    return written(block, {"w1": (2 * h, 8), "w2": (8, h)}, STATE)


def swiglu_unpacked(h: int) -> BlockGraph:
    def block(w1, w2, w3, x):
        hidden = aten.silu.default(aten.linear.default(x, w1)) * aten.linear.default(x, w3)
        return x + aten.linear.default(aten.dropout.default(hidden, 0.1, False), w2)

    return written(block, {"w1": (h, 8), "w2": (8, h), "w3": (h, 8)}, STATE)


def glu(h: int) -> BlockGraph:
    def block(w1, w2, x):
        return x + aten.linear.default(aten.glu.default(aten.linear.default(x, w1), -1), w2)

    return written(block, {"w1": (2 * h, 8), "w2": (8, h)}, STATE)


def quick_gelu(h: int) -> BlockGraph:
    def block(w1, w2, x):
        hidden = aten.linear.default(x, w1)
        return x + aten.linear.default(hidden * aten.sigmoid.default(hidden * 1.702), w2)

    return written(block, {"w1": (h, 8), "w2": (8, h)}, STATE)


def after_attention(h: int) -> BlockGraph:
    """cat(attention, hidden) into one projection."""

    def block(wq, w1, w2, x):
        joined = aten.cat.default(
            [_attention(aten.linear.default(x, wq)), aten.gelu.default(aten.linear.default(x, w1))], 2
        )
        return x + aten.linear.default(joined, w2)

    return written(block, {"wq": (24, 8), "w1": (h, 8), "w2": (8, 8 + h)}, STATE)


def before_attention(h: int) -> BlockGraph:
    """cat(hidden, attention): the hidden channels do not come last, so the consumer is cut in two."""

    def block(wq, w1, w2, b2, x):
        joined = aten.cat.default(
            [aten.gelu.default(aten.linear.default(x, w1)), _attention(aten.linear.default(x, wq))], 2
        )
        return x + aten.linear.default(joined, w2, b2)

    return written(block, {"wq": (24, 8), "w1": (h, 8), "w2": (8, 8 + h), "b2": (8,)}, STATE)


def fused(h: int) -> BlockGraph:
    """One linear makes q, k, v and both halves of a gate; one takes attention and hidden channels."""

    def block(w1, b1, w2, x):
        parts = aten.split_with_sizes.default(aten.linear.default(x, w1, b1), [24, 2 * h], -1)
        gate, value = _halves(parts[1], h)
        hidden = aten.silu.default(gate) * value
        return x + aten.linear.default(aten.cat.default([_attention(parts[0]), hidden], -1), w2)

    return written(block, {"w1": (24 + 2 * h, 8), "b1": (24 + 2 * h,), "w2": (8, 8 + h)}, STATE)


def shared(h: int) -> BlockGraph:
    """One MLP for two streams."""

    def block(w1, b1, w2, x, y):
        out = [s + aten.linear.default(aten.gelu.default(aten.linear.default(s, w1, b1)), w2) for s in (x, y)]
        return tuple(out)

    return written(block, {"w1": (h, 8), "b1": (h,), "w2": (8, h)}, {**STATE, "y": (3, 4, 8)}, (0, 1))


def two_into_one(h: int) -> BlockGraph:
    """Two MLPs whose hidden channels meet in one down-projection, in swapped order, with another consumer."""

    def block(w1, v1, w2, w3, x):
        one, two = aten.gelu.default(aten.linear.default(x, w1)), aten.relu.default(aten.linear.default(x, v1))
        return x + aten.linear.default(aten.cat.default([two, one], -1), w2) + aten.linear.default(two, w3)

    return written(block, {"w1": (h, 8), "v1": (h + 1, 8), "w2": (8, 2 * h + 1), "w3": (8, h + 1)}, STATE)


def convolutional(h: int) -> BlockGraph:
    """1x1, depthwise 3x3 and gate over pixels."""

    def block(w1, b1, w2, b2, w3, x):
        pixels = aten.permute.default(aten.view.default(x, [3, 2, 4, 8]), [0, 3, 1, 2])
        both = aten.silu.default(aten.conv2d.default(pixels, w1, b1))
        both = aten.conv2d.default(both, w2, b2, [1, 1], [1, 1], [1, 1], 2 * h)
        value, gate = _halves(both, h, 1)
        out = aten.conv2d.default(value * aten.silu.default(gate), w3)
        return x + aten.reshape.default(aten.permute.default(out, [0, 2, 3, 1]), [3, 8, 8])

    shapes = {"w1": (2 * h, 8, 1, 1), "b1": (2 * h,), "w2": (2 * h, 1, 3, 3), "b2": (2 * h,), "w3": (8, h, 1, 1)}
    return written(block, shapes, {"x": (3, 8, 8)})


def reshaped(h: int) -> BlockGraph:
    """Tokens folded into the batch and back, with the hidden size as a literal, and a learned scale."""

    def block(w1, scale, w2, x):
        hidden = aten.gelu.default(aten.linear.default(aten.view.default(x, [15, 8]), w1))
        hidden = aten.view.default(hidden, [3, 5, h]) * aten.expand.default(scale, [3, 5, h])
        turned = aten.unsqueeze.default(aten.transpose.int(hidden, 0, 1), 2)
        out = aten.squeeze.dim(aten.linear.default(turned, w2), 2)
        return x + aten.transpose.int(out, 0, 1)

    return written(block, {"w1": (h, 8), "scale": (h,), "w2": (8, h)}, STATE)


def tabled(h: int) -> BlockGraph:
    """A learned table (tokens, hidden) added to the hidden tensor."""

    def block(w1, table, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1) + table)
        return x + aten.linear.default(hidden, w2)

    return written(block, {"w1": (h, 8), "table": (5, h), "w2": (8, h)}, STATE)


ALL: dict[str, Callable[[int], BlockGraph]] = {
    make.__name__: make
    for make in (
        gelu,
        geglu_packed,
        swiglu_packed_by_slices,
        swiglu_unpacked,
        glu,
        quick_gelu,
        after_attention,
        before_attention,
        fused,
        shared,
        two_into_one,
        convolutional,
        reshaped,
        tabled,
    )
}


def _halves(both, h: int, axis: int = -1):
    parts = aten.split.Tensor(both, h, axis)
    return parts[0], parts[1]


def _attention(qkv):
    parts = aten.split.Tensor(qkv, 8, -1)
    heads = [aten.transpose.int(aten.view.default(parts[i], [3, 5, 2, 4]), 1, 2) for i in range(3)]
    out = aten.scaled_dot_product_attention.default(*heads)
    return aten.view.default(aten.clone.default(aten.transpose.int(out, 1, 2)), [3, 5, 8])
