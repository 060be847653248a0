"""Tiers in a manifest: read back equal, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edit_compile
from edit_compile import BranchedPolicy, ReusePolicy, RoutingPolicy, ScheduledPolicy, Tier
from runtime.base.errors import BundleError, EditError, PolicyError
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP
from tests import forged, programs

BLOCKS = 2
counts = st.integers(0, 200)
shares = st.floats(0, 1)
routing = st.builds(RoutingPolicy, shares, shares, counts, counts)
entries = st.sampled_from([SKIP, REUSE, EXTRAPOLATE]) | st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduledPolicy:
    shape = (draw(st.integers(1, 4)), BLOCKS, *draw(st.sampled_from([(), (1,), (3,)])))
    table = draw(st.lists(entries, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    beyond = draw(st.sampled_from(["refuse", "compute"]))
    return ScheduledPolicy(np.reshape(table, shape), draw(st.booleans()), beyond)


@st.composite
def reuses(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> ReusePolicy:
    watches = draw(st.sampled_from([None, "input", "first block"]))
    change = None if watches is None else draw(st.floats(0, 1e9))
    return ReusePolicy(draw(counts), change, watches, draw(counts), draw(st.sampled_from([0, 1])), draw(inner))


plain = routing | schedules()
policies = plain | reuses(st.none() | plain) | reuses(reuses(plain).filter(lambda one: one.watches is None))
shown_names = st.text().filter(str.isprintable)
policies |= st.builds(BranchedPolicy, st.dictionaries(shown_names, policies, max_size=3), policies)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def shown(**sizes: int) -> st.SearchStrategy[str]:
    return st.text(**sizes).filter(str.isprintable)


@st.composite
def tiers(draw: st.DrawFn) -> Tier:
    quality = sorted(draw(st.lists(numbers, min_size=3, max_size=3)))
    between = draw(st.none() | st.just((quality[0], quality[2])))
    return Tier(
        draw(policies), draw(st.none() | st.just(quality[1])), between, draw(st.none() | st.floats(1e-3, 1e3)),
        draw(st.none() | shares), draw(st.none() | st.integers(1, 1000)), draw(st.none() | shown()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles") / "model.edit"


def model(**kwargs: Any) -> CompiledTransformer:
    return CompiledTransformer(programs.make(("double", "single")), "torch", **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(given=st.dictionaries(shown(min_size=1), tiers(), max_size=4))
def test_tiers_are_read_back_equal_and_in_order(place: Path, given: dict[str, Tier]) -> None:
    written = model()
    for name, tier in given.items():
        written.add_tier(name, tier)
    written.save(place)
    read = edit_compile.load(place, engine="torch").tiers
    assert list(read.items()) == list(given.items())
    assert [type(tier.policy) for tier in read.values()] == [type(tier.policy) for tier in given.values()]


def test_what_a_terminal_would_obey_is_no_name() -> None:
    with pytest.raises(edit_compile.EditError, match="a text that can be shown"):
        model().add_tier("fast\x1b[2J", RoutingPolicy())
    with pytest.raises(edit_compile.EditError, match="machine is a text that can be shown"):
        model().add_tier("fast", RoutingPolicy(), machine="a\rb")


@pytest.mark.parametrize("depth", [17, 600, 5000])
def test_policies_that_lie_too_deep_in_each_other_are_refused_when_loaded(tmp_path: Path, depth: int) -> None:
    model = CompiledTransformer(programs.make(("double",) * BLOCKS), "torch")
    model.add_tier("deep", ReusePolicy(1, otherwise=RoutingPolicy()))
    model.save(tmp_path / "x.edit")
    text = (tmp_path / "x.edit" / "manifest.json").read_text()
    manifest = json.loads(text)
    inner = json.dumps(manifest["tiers"]["deep"]["policy"]["otherwise"])
    manifest["tiers"]["deep"]["policy"]["otherwise"] = "here"
    outer = json.dumps(manifest["tiers"]["deep"]["policy"])
    begin, end = outer.split('"here"')
    whole = json.dumps(manifest).replace('"here"', begin * depth + inner + end * depth)
    forged.put_file(tmp_path / "x.edit", "manifest.json", whole.encode())
    with pytest.raises(BundleError, match=r"more than 16 deep|recursion"):
        edit_compile.load(tmp_path / "x.edit", engine="torch")


def test_a_branch_that_a_terminal_would_obey_is_refused_when_loaded(tmp_path: Path) -> None:
    model = CompiledTransformer(programs.make(("double",) * BLOCKS), "torch")
    model.add_tier("branched", BranchedPolicy({"cond": RoutingPolicy()}, RoutingPolicy()))
    model.save(tmp_path / "x.edit")

    def obeyed(manifest: Any) -> None:
        branches = manifest["tiers"]["branched"]["policy"]["branches"]
        branches["\x1b[2J"] = branches.pop("cond")

    forged.put_manifest(tmp_path / "x.edit", obeyed)
    with pytest.raises(BundleError, match=r"tier .branched.: branches: .*no branch.s name"):
        edit_compile.load(tmp_path / "x.edit", engine="torch")


def test_schedules_that_differ_are_not_equal() -> None:
    one = ScheduledPolicy(np.ones((2, 2)))
    assert one == ScheduledPolicy(np.ones((2, 2)))
    assert hash(one) == hash(ScheduledPolicy(np.ones((2, 2))))
    for other in (np.ones((2, 3)), np.ones((2, 2, 1)), np.eye(2)):
        assert one != ScheduledPolicy(other)
    assert one != ScheduledPolicy(np.ones((2, 2)), routed=False)
    assert one != ScheduledPolicy(np.ones((2, 2)), beyond="compute")


def test_a_bundle_from_before_there_were_tiers_has_none(tmp_path: Path) -> None:
    model().save(tmp_path / "old.edit")
    forged.put_manifest(tmp_path / "old.edit", lambda manifest: manifest.pop("tiers"))
    assert dict(edit_compile.load(tmp_path / "old.edit", engine="torch").tiers) == {}


class Mine(RoutingPolicy):
    """A user's own."""


@pytest.mark.parametrize("policy", [Mine(), ReusePolicy(1, otherwise=Mine())])
def test_a_policy_of_ones_own_is_refused_when_saving(tmp_path: Path, policy: Any) -> None:
    written = model()
    written.add_tier("theirs", RoutingPolicy())
    written.add_tier("mine", policy)
    with pytest.raises(EditError, match="tier 'mine' cannot be saved: Mine decides in Python of its own"):
        written.save(tmp_path / "model.edit")
    assert not (tmp_path / "model.edit").exists()


SCHEDULE = {"kind": "schedule", "table": [[1, 0.5]], "routed": True, "beyond": "compute"}
ROUTING = {"kind": "routing", "threshold": 0.5, "margin": 0.1, "max_reuse": 1, "warmup_steps": 0}
REUSES = {
    "kind": "reuse", "max_reuse": 1, "change": None, "watches": None, "warmup_steps": 1, "order": 0, "otherwise": None
}  # fmt: skip
WRONG = [
    ({"policy": {**ROUTING, "threshold": 1.5}}, "threshold is a probability"),
    ({"policy": {**ROUTING, "threshold": "half"}}, "policy.threshold"),
    ({"policy": {**ROUTING, "max_reuse": -1}}, "max_reuse is a whole number"),
    ({"policy": {**ROUTING, "kind": "oracle"}}, "policy.kind"),
    ({"policy": {**REUSES, "order": 2}}, "order is 0 or 1"),
    ({"policy": {**REUSES, "watches": "output"}}, "policy.watches"),
    ({"policy": {**REUSES, "otherwise": {**ROUTING, "margin": 7}}}, "otherwise: margin is a probability"),
    ({"policy": {**SCHEDULE, "table": [[2.0, 1.0]]}}, "table: a schedule holds"),
    ({"policy": {**SCHEDULE, "table": [[1.0], [1.0, 1.0]]}}, "table: a schedule has the shape"),
    ({"policy": {**SCHEDULE, "table": [["1"]]}}, "policy.table"),
    ({"policy": {**SCHEDULE, "beyond": "guess"}}, "policy.beyond"),
    ({"policy": None}, "policy"),
    ({}, "policy"),
    ({"policy": ROUTING, "steps": 0}, "steps is a whole number"),
    ({"policy": ROUTING, "times_faster": 0}, "times_faster is above 0"),
    ({"policy": ROUTING, "quality_db": 3, "quality_interval": [4, 5]}, "quality_interval holds the quality"),
]


@pytest.mark.parametrize(("tier", "told"), WRONG, ids=[told for _, told in WRONG])
def test_a_damaged_tier_is_named_with_its_file_and_field(tmp_path: Path, tier: Any, told: str) -> None:
    path = tmp_path / "model.edit"
    written = model()
    written.add_tier("fine", RoutingPolicy())
    written.save(path)
    forged.put_manifest(path, lambda manifest: manifest["tiers"].update({"odd one": tier}))
    with pytest.raises(BundleError, match=f"manifest.json.*tier 'odd one'.*{told}"):
        edit_compile.load(path, engine="torch")


def test_a_field_that_no_tier_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.edit"
    model().save(path)
    odd = {"policy": {**ROUTING, "mood": 1}}
    forged.put_manifest(path, lambda manifest: manifest["tiers"].update({"odd one": odd}))
    with pytest.raises(BundleError, match=r"unknown field tiers\.odd one\.policy\.mood"):
        edit_compile.load(path, engine="torch")


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"quality_db": "good"}, "quality_db is a finite number"),
        ({"quality_db": float("inf")}, "quality_db is a finite number"),
        ({"quality_interval": (2, 1)}, "quality_interval ascends"),
        ({"quality_interval": 3}, "quality_interval is"),
        ({"times_faster": -1}, "times_faster"),
        ({"flops_share": 1.5}, "flops_share"),
        ({"steps": 2.0}, "steps"),
        ({"machine": 20}, "machine"),
    ],
)
def test_senseless_figures_are_refused_by_name(known: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=f"tier 'odd': {told}"):
        model().add_tier("odd", RoutingPolicy(), **known)
