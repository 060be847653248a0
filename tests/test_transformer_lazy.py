"""A compiled transformer that is traced as it is called."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from runtime.base.errors import EditError
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED
from runtime.routing.policy import REUSE
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.test_transformer import in_threads, with_glues


class Tracer:
    """Makes the program of hand grow by a glue for each other scale."""

    def __init__(self, kinds: tuple[str, ...] = ("single",)) -> None:
        self.whole = programs.make(kinds)
        self.calls: list[dict[str, object]] = []
        self.moves = 0

    def untraced(self) -> Program:
        manifest = replace(self.whole.manifest, plans=(), blocks=(), glues=())
        return Program(manifest, {}, {}, {})

    def changed(self) -> str | None:
        return None

    def apply(self, fn) -> None:
        self.moves += 1

    def __call__(self, given, program):
        self.calls.append(dict(given))
        time.sleep(0.05)
        (glue,) = self.whole.manifest.glues
        glues = (
            *program.manifest.glues,
            replace(glue, id=f"{len(self.calls)}", constants={"scale": given["scale"]} if "scale" in given else {}),
        )
        return with_glues(self.whole, *glues)


def lazy(**options) -> tuple[CompiledTransformer, Tracer]:
    tracer = Tracer()
    return CompiledTransformer(tracer.untraced(), "torch", tracer=tracer, **options), tracer


def test_a_lazy_transformer_traces_at_its_first_call() -> None:
    eager = nn.Linear(1, 1)
    model, tracer = lazy(eager=eager)
    assert model.config["in_channels"] == programs.C
    assert [id(p) for p in model.parameters()] == [id(p) for p in eager.parameters()]
    with pytest.raises(EditError, match="once"):
        model.save("nowhere")
    model.to("cpu")
    assert tracer.moves == 1  # nothing is compiled yet: the model itself is moved
    model(**programs.inputs(1))
    model(**programs.inputs(3, timestep=0.5))
    assert len(tracer.calls) == 1
    model(**programs.inputs(1), scale=2.0)
    assert [call.get("scale") for call in tracer.calls] == [None, 2.0]
    assert model.state_dict().keys() >= {"blocks.0.up", "glue.into"}


def test_threads_that_need_the_same_trace_make_it_once() -> None:
    model, tracer = lazy()
    in_threads([lambda: model(**programs.inputs(1))] * 3)
    assert len(tracer.calls) == 1


def test_tracing_in_one_thread_disturbs_no_request_of_another() -> None:
    model, tracer = lazy(policy=ScheduledPolicy(np.full((9, 1), REUSE)))
    first, second = threading.Event(), threading.Event()

    def waiting() -> None:
        model(**programs.inputs(1))
        first.set()
        assert second.wait(20)
        model(**programs.inputs(1, timestep=0.5))

    def tracing() -> None:
        assert first.wait(20)
        model(**programs.inputs(1), scale=3.0)
        second.set()

    with model.request("named"):
        model(**programs.inputs(1))
    in_threads([waiting, tracing])
    with model.request("named"):
        model(**programs.inputs(1, timestep=0.5))
    assert len(tracer.calls) == 2
    done = sorted((record.arrays()["done"].tolist() for record in model.trace), key=len)
    assert done == [[COMPUTED], [COMPUTED, REUSED], [COMPUTED, REUSED]]


def test_tracing_disturbs_no_request() -> None:
    model, tracer = lazy(policy=ScheduledPolicy(np.full((9, 1), REUSE)))
    for timestep, scale in ((1.0, None), (0.8, None), (0.8, 2.0), (0.6, None), (0.6, 2.0)):
        model(**programs.inputs(1, timestep=timestep), scale=scale)
    assert len(tracer.calls) == 2
    columns = model.trace[0].arrays()  # calls with other constants are another branch
    assert columns["step"].tolist() == [0, 1, 1, 2, 2]
    assert columns["done"].tolist() == [COMPUTED, REUSED, COMPUTED, REUSED, REUSED]
