"""Every transformer of diffusers whose glue stands alone: random decisions taken in a recorded step (minutes)."""

from __future__ import annotations

import pytest

from runtime.face.transformer import CompiledTransformer
from tests.catalogue import WIDTHS, follow_decisions
from tests.emulator import Emulator
from tests.tracing import Watched
from tests.zoo import CASES

FAST = ("DiTTransformer2DModel", "FluxTransformer2DModel")
READ_ON_THE_HOST = ("HiDreamImageTransformer2DModel", "MochiTransformer3DModel", "RFD4ProteinaTransformer")
"""Sizes or counts that depend on what tensors hold: decisions are taken on the host, and that is said."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES],
)
def test_recorded_steps_follow_decisions(name: str, recorder: Emulator) -> None:
    case = CASES[name]()
    tracer = Watched(case.model, WIDTHS, case.timestep)
    program = tracer.trace(case.inputs)
    if any(glue.file is None for glue in program.manifest.glues):
        pytest.skip("its glue is the model's own Python")
    compiled = CompiledTransformer(program, "torch", dispatch="device")
    assert tracer.analysis is not None
    follow_decisions(compiled, tracer.analysis, case)
    if name in READ_ON_THE_HOST:
        assert compiled.dispatch_note is not None and "waits for the device" in compiled.dispatch_note
        return
    assert compiled.dispatch_note is None
    assert recorder.replays == 4
