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
@pytest.mark.parametrize(("make", "names"), [(Lengths, "ab"), (Hosted, "ab"), (Lengths, "a")])
def test_offsets_that_part_no_samples(make: type[Lengths], names: str) -> None:
    compiled = guarded(make(), of(make, 9), of(make, 9, 9))
    assert (compiled.program.manifest.glues[0].file is None) == (make is Hosted)
    compiled.policy = ReusePolicy(3)
    call(compiled, names, 0)
    with pytest.raises(InputError, match="does not part the samples"):
        call(compiled, names, 1, shift=3)
    compiled.reset_counters()
    call(compiled, names, 1)
    assert (compiled.counters.computed, compiled.counters.reused) == (
        0,
        len(names) * len(compiled.program.manifest.blocks),
    )
    assert [trace.arrays()["step"].max() for trace in compiled.trace if trace.request in names] == [1] * len(names)
