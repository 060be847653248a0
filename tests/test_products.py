"""Half precision on CPUs without instructions for it: the same products, on a weight that lies another way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.engines import products


class Strides(TorchDispatchMode):
    """Notes whether the right-hand side of each product lies row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.by_row: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in products._RIGHT:
            self.by_row.append(args[products._RIGHT[func]].is_contiguous())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_same_and_weights_lie_column_by_column(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 5, 8).to(dtype), torch.randn(8, 6).to(dtype), torch.randn(6).to(dtype)

    def both(weight: Tensor) -> list[Tensor]:
        flat = x.reshape(-1, 8)
        return [x @ weight, torch.addmm(bias, flat, weight), torch.nn.functional.linear(x, weight.t(), bias)]

    with Strides() as plain:
        expected = both(w)
    with Strides() as seen, products.Relaid():
        found = both(w)
    assert plain.by_row[:2] == [True, True]
    assert seen.by_row == [False] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert both(w[:8])[0].shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("device", "dtype", "supported", "relaid"),
    [
        ("cpu", torch.bfloat16, False, True),
        ("cpu", torch.bfloat16, True, False),
        ("cpu", torch.float16, False, True),
        ("cpu", torch.float32, False, False),
        ("meta", torch.bfloat16, False, False),
    ],
)
def test_only_where_it_is_slow(
    device: str, dtype: torch.dtype, supported: bool, relaid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported)
    found = products.quickened(torch.empty(1, dtype=dtype, device=device))
    assert isinstance(found, products.Relaid) == relaid


def test_without_weights_there_is_nothing_to_do() -> None:
    assert isinstance(products.quickened(None), nullcontext)
