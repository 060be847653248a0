from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.base.errors import EditError, PolicyError
from runtime.bundle.spec import Glue, Plan, PlanInput, Variant
from runtime.calls.bound import BoundBlock
from runtime.calls.dispatch import Dispatch
from runtime.calls.rows import Scene
from runtime.engines.pytorch import TorchEngine
from runtime.face.transformer import CompiledTransformer
from runtime.requests.request import Branch
from runtime.requests.sighting import Sighting
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED, RequestTrace
from runtime.routing.policy import REUSE, SKIP, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.oracle import Oracle

KINDS = ("double", "single", "double")
STEPS = 28
POLICY = RoutingPolicy(threshold=0.35, margin=0.4, max_reuse=2)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("rows", [1, 4])
def test_every_row_is_what_algorithm_1_makes_of_it_alone(engine: str, rows: int) -> None:
    program = programs.make(KINDS, seed=3)
    compiled = CompiledTransformer(program, engine, POLICY)
    oracle = Oracle(
        KINDS, program.weights, program.routers, programs.WIDTHS, POLICY.threshold, POLICY.margin, POLICY.max_reuse
    )
    for step in range(STEPS):
        for number, context in enumerate(("cond", "uncond")):
            given = programs.inputs(rows, seed=2 * step + number, timestep=1 - step / STEPS)
            with compiled.request("one"), compiled.cache_context(context):
                sample = compiled(**given).sample
            expected = oracle(context, step, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
            torch.testing.assert_close(sample, expected, rtol=2e-5, atol=2e-5)
    trace = compiled.trace[0]
    columns = trace.arrays()
    names = {SKIPPED: "skip", REUSED: "reuse", COMPUTED: "compute"}
    log = [
        (trace.contexts[c], int(s), int(b), int(r), names[int(d)], float(w))
        for c, s, b, r, d, w in zip(
            *(columns[n] for n in ("context", "step", "block", "row", "done", "width")), strict=True
        )
    ]
    assert sorted(log) == sorted(oracle.log)
    np.testing.assert_allclose(sorted(columns["p"]), sorted(oracle.gates), atol=1e-5)
    seen = Counter(done for *_, done, _ in log)
    assert min(seen["skip"], seen["reuse"], seen["compute"]) > len(log) / 20  # the comparison means something
    assert {w for *_, w in log if w} == set(programs.WIDTHS)
    assert len(compiled.trace) == 1


GLUE = Glue("g", "glue/g.pt2", (), {}, (), (), 0, ())


def branch_of_one() -> Branch:
    return Branch("b", 0, Sighting(torch.zeros(1), None, {}, "b", {}), {})


class Fake:
    """A block of one state whose engine adds the width, and remembers what it was given."""

    def __init__(self, batch_dim: int = 0) -> None:
        shape = (None, 2) if batch_dim == 0 else (2, None)
        self.calls: list[tuple[float, torch.Tensor]] = []
        plan = Plan(
            "p",
            "Fake",
            (PlanInput("x", "float32", shape, batch_dim), PlanInput("shared", "float32", (3,), None)),
            (0,),
            None,
            (),
            (Variant(0.5, ()), Variant(1.0, ())),
        )
        self.ready = BoundBlock(plan, [self._engine(0.5), self._engine(1.0)])
        self.engine = TorchEngine("torch")

    def _engine(self, width: float):
        def run(inputs):
            self.calls.append((width, inputs[0].clone()))
            assert inputs[1].shape == (3,)
            return [inputs[0] + width]

        return run

    @property
    def forms(self):
        return [[self.ready]]

    def fitting(self, block, form, inputs, glue):
        return self.ready

    routers = None


def run(fake: Fake, decisions: list[list[float]], x: torch.Tensor, copies: bool = False) -> list[torch.Tensor]:
    """One guard per entry of `decisions`, each at its own step."""
    policy = ScheduledPolicy(np.array([[step] for step in decisions]))
    branch, record, shared = branch_of_one(), RequestTrace("r"), torch.zeros(3)
    glue = GLUE if not copies else replace(GLUE, file=None)
    results = []
    for step in range(len(decisions)):
        dispatch = Dispatch(fake, [Scene(branch, step, record, (1.0 - step / 10,), policy)], torch.zeros(1), glue)
        results.append(dispatch(0, [x + 10 * step, shared])[0])
    return results


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_rows_that_need_the_same_share_one_engine_call(batch_dim: int) -> None:
    fake = Fake(batch_dim)
    x = torch.arange(10.0).reshape(5, 2)
    x = x if batch_dim == 0 else x.t().contiguous()
    (got,) = run(fake, [[1.0, 0.5, SKIP, 0.5, 1.0]], x)
    added = torch.tensor([1.0, 0.5, 0.0, 0.5, 1.0])
    torch.testing.assert_close(got, x + (added[:, None] if batch_dim == 0 else added))
    assert [width for width, _ in fake.calls] == [0.5, 1.0]
    torch.testing.assert_close(fake.calls[0][1], x.index_select(batch_dim, torch.tensor([1, 3])))
    torch.testing.assert_close(fake.calls[1][1], x.index_select(batch_dim, torch.tensor([0, 4])))


def test_nothing_is_gathered_where_all_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(BoundBlock, "take", lambda *_: pytest.fail("gathered"))
    x = torch.zeros(2, 2)
    _, reused, skipped = run(fake, [[1.0, 1.0], [REUSE, REUSE], [SKIP, SKIP]], x)
    assert [width for width, _ in fake.calls] == [1.0]
    torch.testing.assert_close(reused, x + 11)
    torch.testing.assert_close(skipped, x + 20)


def test_residuals_belong_to_rows() -> None:
    fake = Fake()
    x = torch.zeros(3, 2)
    results = run(fake, [[1.0, 0.5, SKIP], [REUSE, REUSE, REUSE], [SKIP, REUSE, REUSE]], x)
    torch.testing.assert_close(results[1][:, 0], torch.tensor([11.0, 10.5, 11.0]))  # empty bank: full width
    torch.testing.assert_close(results[2][:, 0], torch.tensor([20.0, 20.5, 21.0]))


def test_skipped_states_are_copied_only_where_asked() -> None:
    x = torch.zeros(1, 2)
    scene = Scene(branch_of_one(), 0, RequestTrace("r"), (0.0,), ScheduledPolicy(np.zeros((1, 1))))
    kept = Dispatch(Fake(), [scene], torch.zeros(1), GLUE)
    assert kept(0, [x, torch.zeros(3)])[0] is x
    (copied,) = run(Fake(), [[SKIP]], x, copies=True)
    assert copied.data_ptr() != x.data_ptr()


def test_a_width_not_compiled_runs_at_the_next_wider() -> None:
    fake = Fake()
    run(fake, [[0.25], [0.75]], torch.zeros(1, 2))
    assert [width for width, _ in fake.calls] == [0.5, 1.0]


class Reckless:
    """Reuses whatever the bank holds."""

    keeps, watches = 1, None
    routed = False

    def decide(self, step, block, gate, width, held, change):
        return [REUSE] * len(held)


def test_reusing_what_is_not_there_is_an_error() -> None:
    x = torch.zeros(2, 2)
    scene = Scene(branch_of_one(), 0, RequestTrace("r"), (0.0,), Reckless())
    dispatch = Dispatch(Fake(), [scene], torch.zeros(1), GLUE)
    with pytest.raises(PolicyError, match="none"):
        dispatch(0, [x, torch.zeros(3)])


def test_a_policy_that_never_reuses_leaves_no_residuals() -> None:
    fake, branch = Fake(), branch_of_one()
    x = torch.zeros(2, 2)
    keeping, dropping = ScheduledPolicy(np.array([[REUSE]])), ScheduledPolicy(np.array([[1.0]]))
    for policy in (keeping, dropping):
        Dispatch(fake, [Scene(branch, 0, RequestTrace("r"), (0.0,), policy)], torch.zeros(1), GLUE)(
            0, [x, torch.zeros(3)]
        )
    assert branch.bank(0, [x], (0,)).held == [-1, -1]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (RoutingPolicy(), False),
        (RoutingPolicy(threshold=0.5, margin=0.5), True),
        (ScheduledPolicy(np.array([[REUSE]])), True),
        (ScheduledPolicy(np.array([[REUSE]]), routed=False), True),
        (ScheduledPolicy(np.array([[1.0]])), False),
    ],
)
def test_without_routers_residuals_are_kept_only_where_they_can_be_reused(policy, kept: bool) -> None:
    branch, x = branch_of_one(), torch.zeros(2, 2)
    Dispatch(Fake(), [Scene(branch, 0, RequestTrace("r"), (0.0,), policy)], torch.zeros(1), GLUE)(
        0, [x, torch.zeros(3)]
    )
    assert (branch.bank(0, [x], (0,)).nbytes > 0) == kept


def test_a_router_that_overflows_is_an_error_not_a_skip() -> None:
    program = programs.make(KINDS)
    routers = dict(program.routers) | {"1.gate.bias": torch.tensor([float("nan")])}
    model = CompiledTransformer(replace(program, routers=routers), "torch", POLICY)
    with pytest.raises(EditError, match=r"blocks\.1.*overflow"):
        model(**programs.inputs(1))


def test_a_block_without_a_router_among_others_is_named() -> None:
    program = programs.make(KINDS)
    routers = {key: tensor for key, tensor in program.routers.items() if not key.startswith("1.")}
    with pytest.raises(EditError, match=r"blocks\.1 has no router"):
        CompiledTransformer(replace(program, routers=routers), "torch")


def test_one_transfer_to_the_host_per_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CompiledTransformer(programs.make(KINDS), "torch", POLICY)
    counts: Counter[str] = Counter()
    for name in ("tolist", "item", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original):
            counts[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    compiled(**programs.inputs(4))
    one = sum(counts.values())
    counts.clear()
    longer = CompiledTransformer(programs.make(KINDS * 2), "torch", POLICY)
    longer(**programs.inputs(4))
    assert sum(counts.values()) - one == len(KINDS)


def test_counters_hold_the_work_done() -> None:
    program = programs.make(("single", "single"))
    table = np.array([[0.5, SKIP], [REUSE, 1.0]])
    compiled = CompiledTransformer(program, "torch", ScheduledPolicy(table))
    for step in range(2):
        compiled(**programs.inputs(3, timestep=1 - 0.1 * step))
    done = compiled.counters
    assert (done.calls, done.guards, done.engine_calls) == (2, 4, 2)
    assert (done.skipped, done.reused, done.computed) == (3, 3, 6)
    assert done.flops == 3 * (500 + 1000) + 2 * 3 * 10
    assert done.bytes == 50 + 100 + 3 * (10 + 20)  # weights once per engine call
    assert done.dense_flops == 3 * 4 * 1000 + 2 * 3 * 10
    assert done.per_step()["guards"] == 2
    compiled.reset_counters()
    assert compiled.counters.calls == 0
