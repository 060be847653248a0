"""How far numbers may be off."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from passes.graphs.numbers import TOLERANCE, distance, largest


def test_the_distance_is_relative_to_the_largest_of_the_reference() -> None:
    reference = torch.tensor([1.0, -4.0, 2.0])
    assert distance(reference + torch.tensor([0.0, 0.0, 0.2]), reference) == pytest.approx(0.05)
    assert distance(torch.zeros(2), torch.zeros(2)) == 0.0
    assert distance(torch.ones(2), torch.zeros(2)) == math.inf or distance(torch.ones(2), torch.zeros(2)) > 1e30


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_what_is_no_float_is_equal_or_not(dtype: torch.dtype) -> None:
    reference = torch.tensor([0, 1, 1], dtype=dtype)
    assert distance(reference.clone(), reference) == 0.0
    assert distance(reference.flip(0), reference) == math.inf


@pytest.mark.parametrize("values", permutations((0.1, math.nan, 0.3)))
def test_the_largest_is_nan_wherever_one_is(values: tuple[float, ...]) -> None:
    assert math.isnan(largest(values))


def test_what_is_compared_after_more_work_may_be_off_by_more() -> None:
    for dtype, allowed in TOLERANCE["graph"].items():
        assert allowed <= TOLERANCE["model"][dtype]
