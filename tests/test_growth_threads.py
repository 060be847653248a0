"""What other threads notice while one of them traces: nothing."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import randomised, tiny_plain
from tests.test_growth import Telling, eager, opened, told

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


@pytest.mark.parametrize("plainly", [False, True])
def test_a_call_beside_a_trace_in_another_thread_is_as_if_alone(plainly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace swaps the model's weights: nobody looks at them, or runs the model's own Python, until it is over."""
    model = randomised(Telling(plainly))
    compiled = opened(model, 3)
    expected = [compiled(**told(4)).clone(), compiled(**told(3)).clone()]
    tracing, over = threading.Event(), threading.Event()
    run = compiled._tracer._run

    def slowly(*args: Any, **kwargs: Any) -> Any:
        bias, model.head.bias = model.head.bias, nn.Parameter(torch.full_like(model.head.bias, 9.0))
        tracing.set()
        time.sleep(0.3)
        model.head.bias = bias
        over.set()
        return run(*args, **kwargs)

    monkeypatch.setattr(compiled._tracer, "_run", slowly)
    other = threading.Thread(target=lambda: compiled(**{**told(4), "mask": told(4)["mask"].int()}))
    other.start()
    assert tracing.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled.reset()
        got = [compiled(**told(4)), compiled(**told(3))]
    other.join()
    assert over.is_set()
    for one, alone in zip(got, expected, strict=True):
        assert torch.equal(one, alone)


def test_hooks_of_a_trace_see_their_own_thread_alone() -> None:
    from passes.graphs.record import record

    model, inputs = tiny_plain()

    class Meanwhile(nn.Module):
        """Another thread runs the same blocks while a trace does."""

        def forward(self, **kwargs: Any) -> Tensor:
            other = threading.Thread(target=lambda: eager(model, tiny_plain(tokens=4)[1]))
            other.start()
            other.join()
            return model(**kwargs)

    with torch.no_grad():
        calls, _ = record(Meanwhile(), inputs, dict(model.layers.named_children()))
    assert calls.keys() == {"0", "1", "2"}
    assert all(call.leaves[0].shape[1] == 9 for call in calls.values())
