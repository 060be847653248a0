"""Tiers at the face: chosen for all calls, at load, or for one request."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edit_compile
from edit_compile import ReusePolicy, RoutingPolicy, ScheduledPolicy, Tier
from runtime.base.errors import EditError, PolicyError
from runtime.device.policy import why_not
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import SKIP
from tests import programs
from tests.test_transformer import in_threads

KINDS = ("double", "single")


def everywhere(width: float, steps: int = 2, **options: Any) -> ScheduledPolicy:
    return ScheduledPolicy(np.full((steps, len(KINDS)), width), routed=False, **options)


def tiered(**kwargs: Any) -> CompiledTransformer:
    model = CompiledTransformer(programs.make(KINDS), "torch", **kwargs)
    model.add_tier("full", everywhere(1.0, beyond="compute"))
    model.add_tier("quarter", everywhere(0.25, beyond="compute"), quality_db=30.0, steps=2)
    return model


def widths(model: CompiledTransformer, steps: int = 1) -> list[float]:
    """The width of block 0 in each of the `steps` of a new request."""
    with model.request():
        for step in range(steps):
            model(**programs.inputs(timestep=1.0 - step / 10))
    columns = model.trace[-1].arrays()
    return columns["width"][columns["block"] == 0].tolist()


def test_a_tier_decides_until_another_choice() -> None:
    half = everywhere(0.5)
    model = tiered(policy=half)
    assert (model.tier, widths(model)) == (None, [0.5])
    model.tier = "quarter"
    assert (model.tier, widths(model)) == ("quarter", [0.25])
    assert model.policy is model.tiers["quarter"].policy
    model.tier = None
    assert (model.policy, widths(model)) == (half, [0.5])
    model.tier = "full"
    model.policy = half
    assert (model.tier, widths(model)) == (None, [0.5])
    model.tier = "full"
    model.policy = None
    assert (model.tier, model.policy) == (None, RoutingPolicy.stored(model.program.manifest.policy))


def test_a_request_has_a_tier_of_its_own() -> None:
    model = tiered()
    model.tier = "full"
    given = programs.inputs()
    with model.request("a", tier="quarter"):
        model(**given)
        assert model.tier == "full"
    with model.request("b"):
        model(**given)
    with model.request(tier="quarter"):
        model(**given)
        with model.request("c"):
            model(**given)
    found = {request.request: set(request.arrays()["width"].tolist()) for request in model.trace}
    assert (found.pop("a"), found.pop("b"), found.pop("c")) == ({0.25}, {1.0}, {0.25})
    assert list(found.values()) == [{0.25}]


def test_a_tier_of_a_request_is_not_that_of_another_transformer_inside_it() -> None:
    one, other = tiered(), CompiledTransformer(programs.make(KINDS), "torch", everywhere(0.5))
    with one.request("a", tier="quarter"), other.request("a", tier=None):
        one(**programs.inputs())
        other(**programs.inputs())
    assert set(one.trace[-1].arrays()["width"]) == {0.25}
    assert set(other.trace[-1].arrays()["width"]) == {0.5}


def test_requests_in_threads_each_have_their_tier() -> None:
    model = tiered()
    names = ["quarter", "full"] * 4

    def run(number: int) -> set[float]:
        for step in range(2):
            with model.request(str(number), tier=names[number]):
                model(**programs.inputs(seed=number, timestep=1.0 - step / 10))
        (mine,) = (request for request in model.trace if request.request == str(number))
        return set(mine.arrays()["width"].tolist())

    found = in_threads([lambda number=number: run(number) for number in range(len(names))])
    assert found == [{0.25}, {1.0}] * 4


def test_a_bundle_keeps_its_tiers_and_its_own_policy(tmp_path: Path) -> None:
    path, own = tmp_path / "model.edit", RoutingPolicy(0.3, 0.2, 1)
    model = tiered(policy=own)
    model.tier = "quarter"
    model.save(path)
    loaded = edit_compile.load(path, engine="torch", tier="quarter")
    assert (loaded.tier, widths(loaded)) == ("quarter", [0.25])
    loaded.tier = None
    assert loaded.policy == own
    assert loaded.tiers == model.tiers
    assert edit_compile.load(path, engine="torch").tier is None
    loaded.save(path)
    assert edit_compile.load(path, engine="torch").tiers == model.tiers
    with pytest.raises(EditError, match="'draft'; there are 'full', 'quarter'"):
        edit_compile.load(path, engine="torch", tier="draft")
    with pytest.raises(EditError, match="give one of them"):
        edit_compile.load(path, engine="torch", policy=own, tier="full")


def test_an_unknown_tier_names_those_there_are() -> None:
    model = tiered()
    for attempt in (lambda: setattr(model, "tier", "draft"), lambda: model.request(tier="draft").__enter__()):
        with pytest.raises(EditError, match="'draft'; there are 'full', 'quarter'"):
            attempt()
    assert model.tier is None
    with pytest.raises(EditError, match="none: "):
        CompiledTransformer(programs.make(KINDS), "torch").tier = "draft"


def test_tiers_are_read_only_and_a_copy_has_its_own() -> None:
    model = tiered()
    model.tier = "quarter"
    with pytest.raises(TypeError):
        model.tiers["full"] = model.tiers["quarter"]  # type: ignore[index]
    twin = copy.copy(model)
    assert (twin.tier, twin.tiers) == ("quarter", model.tiers)
    twin.add_tier("half", everywhere(0.5))
    twin.tier = "half"
    assert (model.tier, list(model.tiers)) == ("quarter", ["full", "quarter"])


def test_a_tier_may_be_replaced_and_taken_over_whole() -> None:
    model = tiered()
    model.add_tier("quarter", everywhere(0.5), machine="H20")
    model.add_tier("again", model.tiers["quarter"], steps=2)
    assert model.tiers["again"] == Tier(everywhere(0.5), steps=2, machine="H20")
    assert list(model.tiers) == ["full", "quarter", "again"]


@pytest.mark.parametrize(
    ("name", "policy", "told"),
    [
        ("", RoutingPolicy(), "a tier's name"),
        ("a", "fast", "tier 'a': 'fast' is no policy"),
        ("a", ScheduledPolicy(np.ones((1, 3))), "tier 'a': the schedule is for 3 blocks, the model has 2"),
        ("a", ReusePolicy(1, otherwise=ScheduledPolicy(np.ones((1, 3)))), "for 3 blocks"),
    ],
)
def test_what_is_no_tier_is_refused(name: str, policy: Any, told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        tiered().add_tier(name, policy)


def test_a_generation_goes_on_beyond_its_tier_and_says_so_once() -> None:
    model = tiered()
    model.tier = "quarter"
    with pytest.warns(RuntimeWarning, match="made for 2 steps") as told:
        assert widths(model, 5) == [0.25, 0.25, 1.0, 1.0, 1.0]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert widths(model, 5) == [0.25, 0.25, 1.0, 1.0, 1.0]
        model.tier = "full"
        assert widths(model, 2) == [1.0, 1.0]


def test_beyond_a_schedule_all_rows_are_computed_and_a_block_too_many_is_refused() -> None:
    policy = ScheduledPolicy(np.full((1, 2, 3), SKIP), beyond="compute")
    with pytest.warns(RuntimeWarning, match="made for 1 steps"):
        assert policy.decide(1, 1, [0.1] * 2, [0.25] * 2, [0, 0]) == [1.0, 1.0]
    with pytest.raises(PolicyError, match="1 steps of 2 blocks"):
        policy.decide(1, 2, [0.1] * 3, [0.25] * 3, [0] * 3)
    with pytest.raises(PolicyError, match="asked for step 1"):
        ScheduledPolicy(policy.table).decide(1, 0, [0.1] * 3, [0.25] * 3, [0] * 3)
    with pytest.raises(PolicyError, match="beyond is"):
        ScheduledPolicy(policy.table, beyond="skip")  # type: ignore[arg-type]


def test_a_schedule_that_computes_beyond_itself_decides_on_the_host() -> None:
    assert "beyond its table" in str(why_not(everywhere(1.0, beyond="compute")))
    assert why_not(everywhere(1.0)) is None


def test_decided_by_leaves_the_tier_as_it_is() -> None:
    model = tiered()
    model.tier = "quarter"
    with model.decided_by(everywhere(0.5)):
        model(**programs.inputs())
    assert set(model.trace[-1].arrays()["width"]) == {0.5}
    assert (model.tier, widths(model)) == ("quarter", [0.25])
