"""What is kept: of its arguments by a model, of a model by a tracer, and of the model's own settings by a program."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import RoutingPolicy
from edit_compile.compiling.compiler import Tracer
from passes.graphs.graph import Call
from passes.observe.discover import DiscoveryError
from tests.models import PlainDiT, noise, randomised, tiny_flux
from tests.test_growth import agree, eager, lazily, of_skipping, opened

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


class Prompted(PlainDiT):
    """Keeps the embedding of its first prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = words.mean((0, 1), keepdim=True)
        return super().forward(x, t, words + self.cache)


class Tabled(Prompted):
    """Keeps tables by how many tokens there are."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        size = x.shape[1]
        if size not in self.tables:
            self.tables[size] = torch.arange(size, dtype=x.dtype)[:, None] * 0.01
        return PlainDiT.forward(self, x + self.tables[size], t, words)


def test_a_model_that_keeps_its_first_prompt_is_refused_and_left_as_it_was() -> None:
    said = r"Prompted keeps what it makes of 'words' in its \.cache at the first call"
    for make in (lambda m, i: edit_compile.elasticize(m, i), lambda m, i: lazily(m, inputs=i)):
        model, inputs = randomised(Prompted()), of_skipping()[1]
        with pytest.raises(DiscoveryError, match=said):
            make(model, inputs)
        assert model.cache is None


def test_tables_that_depend_on_shapes_alone_are_accepted() -> None:
    model, inputs = randomised(Tabled()), of_skipping()[1]
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    agree(compiled, model, {**inputs, "x": noise(2, 7, 4)})


def test_an_argument_without_effect_in_a_model_that_was_warm_is_warned_of() -> None:
    class Warm(Prompted):
        def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = words
            return PlainDiT.forward(self, x, t, self.cache[:1].expand(len(x), -1, -1))

    model, inputs = randomised(Warm()), of_skipping()[1]
    eager(model, inputs)
    with pytest.warns(UserWarning, match="what is given as words has no effect"):
        lazily(model, inputs=inputs)


def recorded() -> list[Call]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Call and one.leaves]


def test_nothing_that_was_recorded_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.observe import discover

    seen: list[weakref.ref[Tensor]] = []
    others = recorded()  # those of other tests, whose fixtures hold them: kept here, so that identity tells

    def recording(*args: Any) -> Any:
        calls, output = record(*args)
        for call in calls.values():
            seen.extend(weakref.ref(leaf) for leaf in (*call.leaves, *call.outputs) if isinstance(leaf, Tensor))
        return calls, output

    record = discover.record
    monkeypatch.setattr(discover, "record", recording)
    model, inputs = tiny_flux(double=1, single=1)
    compiled = lazily(edit_compile.elasticize(model, inputs), inputs=inputs, output=tmp_path / "x.edit")
    compiled(**tiny_flux(text=5)[1])
    gc.collect()
    mine = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    alive = [tensor for ref in seen if (tensor := ref()) is not None and id(tensor) not in mine]
    assert seen and not alive
    assert not [one for one in recorded() if not any(one is other for other in others)]
    assert compiled._tracer.reports


def test_a_dry_run_changes_nothing() -> None:
    model, inputs = tiny_flux(double=1, single=0)
    elastic = edit_compile.elasticize(model)
    report = edit_compile.compile(elastic, inputs=inputs, dry_run=True)
    assert report.router_parameters > 0 and report.router_flops > 0
    assert elastic.layout is None and not elastic.routers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.device("meta"):
        bare = type(model).from_config(model.config)
    tracer = Tracer(bare, (0.5, 1.0), None)
    assert tracer.dry_run(inputs).unchecked
    assert tracer.model is bare


def test_the_models_own_policy_goes_into_the_manifest() -> None:
    model, inputs = tiny_flux(double=1, single=0)
    elastic = edit_compile.elasticize(model, inputs)
    elastic.policy = RoutingPolicy(margin=0.015, max_reuse=10, warmup_steps=15)
    compiled = lazily(elastic, inputs=inputs)
    compiled.policy = None
    assert compiled.policy == elastic.policy
    given = RoutingPolicy(margin=0.2)
    assert RoutingPolicy.stored(lazily(elastic, inputs=inputs, policy=given).program.manifest.policy) == given
