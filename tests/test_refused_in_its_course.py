"""A call that is refused for what shows only in its course changes no request in it, whether alone or with others."""

from __future__ import annotations

import pytest
import torch

from edit_compile import CompiledTransformer, ReusePolicy
from runtime.base.errors import InputError
from tests.test_unprepared_offsets import TOKENS, Hosted, Lengths, of
from tests.unprepared import UNTRAINED, guarded

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]


def call(compiled: CompiledTransformer, names: str, step: int, shift: int = 0) -> None:
    given = of(Lengths, *[TOKENS] * len(names), shift=shift)
    with compiled.request(list(names)):
        compiled(**{**given, "t": torch.full_like(given["t"], 1 - step / 8)})


@torch.no_grad()
@pytest.mark.parametrize("make", [Lengths, Hosted])
def test_offsets_that_part_no_samples(make: type[Lengths]) -> None:
    compiled = guarded(make(), of(make, 9), of(make, 9, 9))
    assert (compiled.program.manifest.glues[0].file is None) == (make is Hosted)
    compiled.policy = ReusePolicy(3)
    call(compiled, "ab", 0)
    with pytest.raises(InputError, match="does not part the samples"):
        call(compiled, "ab", 1, shift=3)
    compiled.reset_counters()
    call(compiled, "ab", 1)
    assert (compiled.counters.computed, compiled.counters.reused) == (0, 2 * len(compiled.program.manifest.blocks))
    assert [trace.arrays()["step"].max() for trace in compiled.trace if trace.request in "ab"] == [1, 1]


@torch.no_grad()
def test_offsets_of_a_request_alone() -> None:
    compiled = guarded(Lengths(), of(Lengths, 9), of(Lengths, 9, 9))
    compiled.policy = ReusePolicy(3)
    call(compiled, "a", 0)
    with pytest.raises(InputError, match="does not part the samples"):
        call(compiled, "a", 1, shift=3)
    compiled.reset_counters()
    call(compiled, "a", 1)
    assert compiled.counters.computed == 0
