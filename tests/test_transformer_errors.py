"""What errors, refused calls and new traces do to the requests in flight."""

from __future__ import annotations

import pytest
import torch

from runtime.base.errors import InputError
from runtime.requests.trace import COMPUTED, REUSED
from tests import programs
from tests.test_transformer import in_threads
from tests.test_transformer_requests import BLOCKS, call, compiled, done


def test_a_refused_call_does_no_harm_to_the_request_of_another_thread() -> None:
    model = compiled()
    ready = model._session.blocks.forms[0][0]
    original = ready.bound

    def interrupted(inputs):
        def refused() -> None:
            with pytest.raises(InputError), model.request("same"):
                model(**programs.inputs(1), no_such=1)

        in_threads([refused])
        return original[3](inputs)

    ready.bound = (*original[:3], interrupted)
    with model.request("same"):
        call(model, 1.0)
        call(model, 0.5)
    assert done(model) == [COMPUTED, REUSED]


def test_an_exception_leaves_nothing_behind() -> None:
    model = compiled()
    call(model, 1.0)
    ready = model._session.blocks.forms[1][0]
    original = ready.bound

    def broken(inputs):
        raise RuntimeError("out of memory")

    ready.bound = (broken,) * 4
    model._session.requests.existing()[0]._branches[0].clear()
    before = model.counters
    with pytest.raises(RuntimeError, match="out of memory"):
        call(model, 0.8)
    assert len(model.trace) == 0
    assert model.counters == before
    ready.bound = original
    expected = call(compiled(), 0.5)
    torch.testing.assert_close(call(model, 0.5), expected)
    assert done(model) == [COMPUTED]


def test_a_refused_call_leaves_the_request_as_it_was() -> None:
    model = compiled()
    call(model, 1.0)
    with pytest.raises(InputError):
        model(**{**programs.inputs(1), "hidden_states": torch.full((1, programs.IMAGE, programs.C), float("nan"))})
    call(model, 0.5)
    assert done(model) == [COMPUTED, REUSED]


def test_an_exception_in_one_request_leaves_the_others() -> None:
    model = compiled()
    with model.request("a"):
        call(model, 1.0)
    with pytest.raises(InputError), model.request("b"):
        model(**programs.inputs(1), no_such=1)
    with model.request("a"):
        call(model, 0.5)
    assert done(model, 0) == [COMPUTED, REUSED]


def test_the_trace_is_bounded_and_exports(tmp_path) -> None:
    import json

    model = compiled()
    for _ in range(20):
        call(model, 1.0, rows=2)
        model._reset_stateful_cache()
    assert len(model.trace) == 16
    grid = model.trace[-1].grid()
    assert grid["done"].shape == (1, BLOCKS, 2)
    assert (grid["width"] == 1.0).all()
    exported = json.loads(model.trace.to_json())
    assert len(exported) == 16
    assert exported[0]["done"] == [COMPUTED] * 4
    assert {"request", "contexts", "context", "step", "block", "row", "p", "width", "done"} == exported[0].keys()
    model.trace.clear()
    assert len(model.trace) == 0


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_inputs_of_different_batches_are_told_by_their_rows(engine: str) -> None:
    model = compiled(engine)
    given = programs.inputs(2)
    given["encoder_hidden_states"] = given["encoder_hidden_states"].repeat(2, 1, 1)[:3]
    with pytest.raises(InputError, match=r"different numbers of rows \(hidden_states 2, encoder_hidden_states 3"):
        model(**given)
    assert model(**programs.inputs(2)).sample.shape[0] == 2
