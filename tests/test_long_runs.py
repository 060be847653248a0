"""A part of tests/torture/long_runs.py: requests of many kinds and threads, and nothing that grows."""

from __future__ import annotations

import warnings

import pytest

from runtime.engines import ort
from runtime.face.transformer import CompiledTransformer
from tests import programs
from tests.torture.long_runs import POLICY, grown, growth, in_threads, steps


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_steps_of_changing_shapes_and_threads_that_end_nothing_leave_nothing(engine: str) -> None:
    model = CompiledTransformer(programs.make(), engine, POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = growth(lambda: (steps(model, 200), in_threads(model, 64, 64)), lambda: steps(model, 600, seed=1))
        assert not grown(*held), held
        held = growth(lambda: None, lambda: in_threads(model, 128, 64))
        assert not grown(*held), held


def test_bindings_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "_KEPT", 1)
    model = CompiledTransformer(programs.make(("single",)), "onnxruntime", POLICY)
    in_threads(model, 32, 16)
    bound = [bound for forms in model._session.blocks.forms for ready in forms for bound in ready.bound]
    assert max(len(free) for one in bound for free in one._free.values()) == 1
