"""A seeded part of the campaigns of tests/torture: each hostile bundle gives what it gave, or is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torture import bundles
from tests.torture.aimed import ATTACKS
from tests.torture.harness import GOOD

SEEDS = range(100_000, 100_060)
"""Others than those of `python -m tests.torture.bundles`."""


@pytest.fixture(scope="module")
def one() -> Iterator[bundles.Original]:
    with bundles.original() as made:
        yield made


@pytest.mark.parametrize("name", ATTACKS)
def test_an_aimed_attack_is_refused_by_name(one: bundles.Original, name: str) -> None:
    found = bundles.aimed(one, name, "torch")
    assert found.kind == ATTACKS[name].outcome, found


@pytest.mark.parametrize("name", ["values in another file", "a random operator", "a tensor of 4 TiB in ONNX"])
def test_onnxruntime_is_given_none_of_it_either(one: bundles.Original, name: str) -> None:
    found = bundles.aimed(one, name, "onnxruntime")
    assert found.kind == ATTACKS[name].outcome, found


def test_a_mutated_bundle_gives_what_it_gave_or_is_refused_by_name(one: bundles.Original) -> None:
    cases = [(seed, *bundles.case(one, seed)) for seed in SEEDS]
    assert [case for case in cases if case[2].kind not in GOOD] == []
    assert {"same", "refused"} <= {case[2].kind for case in cases}
