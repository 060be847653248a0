"""Distillation: Algorithm 1 in rollouts of recorded generations, and what is learned from them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import edit_compile
from edit_compile import CallsError, Generation, RecordedCall, Recording, RoutingPolicy, Sampler
from edit_compile.cli import app
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from edit_compile.training.distil import distil
from edit_compile.training.distil_task import Distillation, DistilTask
from edit_compile.training.flops import block_shares, flops_share
from edit_compile.training.losses import Budget
from edit_compile.training.rollout import Window, roll_out
from edit_compile.training.train import TrainConfig, TrainingError
from runtime.bundle.spec import RouterConfig
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from tests.generations import one_thread
from tests.models import noise, tiny_flux
from tests.test_elastic import undecided

CONFIG = RouterConfig(hidden=16)
STEPS = 4


def model_and_inputs(rows: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_flux(batch=rows, double=1, single=2)
    return model, {**inputs, "return_dict": False}


def sampled(model: Any, inputs: dict[str, Any], seed: int, steps: int = STEPS) -> Tensor:
    """Euler steps with two branches, as pipelines call them."""
    x = noise(*inputs["hidden_states"].shape, seed=seed)
    times = torch.linspace(1, 0, steps + 1)
    for now, after in itertools.pairwise(times):
        given = {**inputs, "hidden_states": x, "timestep": now.expand(len(x))}
        with model.cache_context("cond"):
            cond = model(**given)[0]
        with model.cache_context("uncond"):
            uncond = model(**{**given, "encoder_hidden_states": 0 * inputs["encoder_hidden_states"]})[0]
        x = x + (after - now) * (uncond + 2.0 * (cond - uncond))
    return x


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("calls")
    model, inputs = model_and_inputs()
    with one_thread():
        with torch.no_grad(), edit_compile.record(model, folder) as recorder:
            for seed in range(3):
                with recorder.generation():
                    recorder.result(sampled(model, inputs, seed))
        yield Recording(folder)


@functools.cache
def _analysed() -> ElasticTransformer:
    model, inputs = model_and_inputs()
    torch.manual_seed(0)
    return elasticize(model, inputs, config=CONFIG).eval()


def elastic_model() -> ElasticTransformer:
    return copy.deepcopy(_analysed())


def window(generation: Generation, start: int = 0, length: int = STEPS) -> Window:
    return Window(generation, Sampler.fit(generation), start, length)


def config(folder: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "steps": 60,
        "batch_size": 1,
        "lr": 2e-2,
        "warmup_steps": 0,
        "decay_steps": 20,
        "cpu": True,
    }
    return TrainConfig(output=folder, ema_decay=0.9, **(given | changes))


POLICIES = [RoutingPolicy(margin=0.2, max_reuse=2), RoutingPolicy(margin=0.3, max_reuse=1, warmup_steps=2)]


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_rollout_does_what_the_compiled_model_does(recording: Recording, policy: RoutingPolicy) -> None:
    elastic, generation = undecided(elastic_model(), seed=8), recording[1]
    compiled = edit_compile.compile(elastic, inputs=generation.calls[0].arguments, engine="torch", policy=policy)
    rolled = roll_out(elastic, window(generation), policy)
    replayed = edit_compile.replay(compiled, generation, Sampler.fit(generation))
    share, done = [], set[int]()
    for branch, context in enumerate(("cond", "uncond")):
        grid = compiled.trace[-1].grid(context)
        routing = rolled.routing[branch::2]
        gates = torch.stack([one.gate for one in routing]).transpose(1, 2)
        widths = torch.stack([one.width for one in routing]).transpose(1, 2)
        assert torch.equal(gates > 0, torch.from_numpy(grid["done"] == COMPUTED))
        assert torch.equal(widths[gates > 0], torch.from_numpy(grid["width"])[gates > 0])
        share.append((grid["done"] == REUSED).mean())
        done |= set(grid["done"].flatten().tolist())
    assert done == {COMPUTED, REUSED, SKIPPED}
    assert float(torch.stack(rolled.reused).mean()) == pytest.approx(sum(share) / 2)
    assert replayed.result is not None and generation.result is not None
    before = generation.calls[-1].arguments["hidden_states"]
    off, step = ((one - generation.result).flatten(1).square().sum(1) for one in (replayed.result, before))
    assert float(rolled.errors[-1]) == pytest.approx(float((off / step).mean()), rel=1e-4)


def test_the_dense_model_goes_where_it_went(recording: Recording) -> None:
    elastic = elastic_model()
    rolled = roll_out(elastic, window(recording[2], start=1, length=2), RoutingPolicy())
    assert [float(error.detach()) for error in rolled.errors] == pytest.approx([0, 0], abs=1e-9)
    shares = block_shares(elastic, recording[0].calls[0].arguments)
    assert flops_share(rolled.routing[0], shares).item() == pytest.approx(1)


@torch.no_grad()
def test_long_steps_are_those_of_a_sampler_with_fewer(recording: Recording) -> None:
    model, inputs = model_and_inputs()
    generation = recording[1]
    rolled = roll_out(elastic_model(), replace(window(generation, length=2), stride=2), RoutingPolicy())
    result, middle = generation.result, generation.calls[4].arguments["hidden_states"]
    assert result is not None
    off, step = ((one - result).flatten(1).square().sum(1) for one in (sampled(model, inputs, 1, steps=2), middle))
    assert float(rolled.errors[-1]) == pytest.approx(float((off / step).mean()), rel=1e-4)


def test_a_window_begins_with_an_empty_bank_and_recorded_latents(recording: Recording) -> None:
    elastic = undecided(elastic_model(), seed=3)
    rolled = roll_out(elastic, window(recording[0], start=2, length=1), POLICIES[0])
    assert float(torch.stack(rolled.reused).max()) == 0
    with torch.no_grad():
        given = elastic(**recording[0].calls[4].arguments)[0]
    assert elastic.routing is not None and torch.equal(elastic.routing.gate, rolled.routing[0].gate.detach())
    assert given.isfinite().all()


SLOW = [pytest.param(what, marks=pytest.mark.slow) for what in ("lora", "all")]


@pytest.mark.parametrize("what", ["routers", *SLOW])
def test_distilled_models_keep_the_budget_and_change_what_they_may(
    recording: Recording, tmp_path: Path, what: Any
) -> None:
    elastic = elastic_model()
    before = copy.deepcopy(elastic.state_dict())
    wanted = {name: parameter.requires_grad for name, parameter in elastic.named_parameters()}
    rates = {"lr": 3e-3, "lr_multipliers": (("routers.", 10.0),)} if what == "all" else {}
    distil(elastic, recording, 0.6, config(tmp_path / "run", **rates), train=what, settings=Distillation(rank=2))
    after = elastic.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(name.startswith("routers.") for name in changed)
    assert any(name.startswith("model.") for name in changed) == (what != "routers")
    assert {name: p.requires_grad for name, p in elastic.named_parameters()} == wanted
    shares = block_shares(elastic, recording[0].calls[0].arguments)
    with torch.no_grad():
        rolled = [roll_out(elastic, window(one), elastic.policy or RoutingPolicy()) for one in recording]
    share = torch.stack([flops_share(routing, shares) for one in rolled for routing in one.routing]).mean()
    assert float(share) == pytest.approx(0.6, abs=0.08)
    assert elastic.policy == RoutingPolicy(max_reuse=1) and not elastic.training


@pytest.mark.slow
def test_training_pays(recording: Recording, tmp_path: Path) -> None:
    """All weights, against the routers alone, at the same budget."""
    errors = {}
    for what in ("routers", "all"):
        elastic = elastic_model()
        policy = RoutingPolicy(margin=0.0, max_reuse=0)
        given = config(tmp_path / what, steps=120, lr=3e-3, lr_multipliers=(("routers.", 10.0),))
        distil(elastic, recording, 0.7, given, train=what, policy=policy)  # type: ignore[arg-type]
        with torch.no_grad():
            errors[what] = float(
                torch.stack([roll_out(elastic, window(one), policy).errors[-1] for one in recording]).mean()
            )
    assert errors["all"] < errors["routers"] / 2


def test_a_run_that_was_stopped_goes_on(recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part, rest = elastic_model(), elastic_model(), elastic_model()
    given = config(tmp_path / "whole", steps=6, checkpoint_every=2)
    distil(whole, recording, 0.6, given)
    begun = DistilTask.begin_step

    def killed(self: DistilTask, step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        begun(self, step, steps)

    again = replace(given, output=tmp_path / "again")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DistilTask, "begin_step", killed)
        distil(part, recording, 0.6, again)
    distil(rest, recording, 0.6, again)
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 1.5}, "between 0 and 1"),
        ({"budget": 1e-4}, "not in blocks"),
        ({"train": "heads"}, "train='heads'"),
        ({"settings": Distillation(rollout=9)}, "rollout=9"),
        ({"settings": Distillation(stride=3)}, "stride=3"),
        ({"config": None}, "config=None: a TrainConfig"),
        ({"config": {"steps": 3}}, "config={'steps': 3}: a TrainConfig"),
        ({"config": replace(TrainConfig(Path("x"), 1, 1), shard=True)}, "one process"),
    ],
)
def test_what_cannot_be_is_refused(recording: Recording, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        distil(elastic_model(), recording, **{"budget": 0.5, "config": config(tmp_path)} | changes)
    assert not list(tmp_path.iterdir())


def test_calls_of_another_model_are_refused(recording: Recording, tmp_path: Path) -> None:
    other = replace(recording[0], calls=tuple(replace(c, arguments={"x": torch.zeros(1)}) for c in recording[0].calls))
    with pytest.raises(CallsError):
        distil(elastic_model(), [other, other], 0.5, config(tmp_path))
    short = replace(recording[0], calls=recording[0].calls[:4], result=None)
    with pytest.raises(CallsError, match=r"calls\[1\] has 1 steps"):
        distil(elastic_model(), [recording[0], short], 0.5, config(tmp_path))
    with pytest.raises(CallsError, match="no generation"):
        distil(elastic_model(), [], 0.5, config(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_folder_of_another_run_is_refused(recording: Recording, tmp_path: Path) -> None:
    given = config(tmp_path, steps=2)
    distil(elastic_model(), recording, 0.6, given)
    for changes in ({"budget": 0.5}, {"train": "all"}, {"calls": [recording[1], recording[2]]}):
        with pytest.raises(TrainingError, match="something else"):
            distil(elastic_model(), **{"calls": recording, "budget": 0.6, "config": given} | changes)


@pytest.mark.slow
def test_half_precision_is_trained_by_float32_routers_alone(recording: Recording, tmp_path: Path) -> None:
    inputs = _halved(recording[0].calls[0]).arguments
    halves = [replace(one, calls=tuple(_halved(call) for call in one.calls)) for one in recording]
    with pytest.raises(ValueError, match="half precision"):
        distil(
            elasticize(model_and_inputs()[0].to(torch.bfloat16), inputs),
            halves,
            0.6,
            config(tmp_path),
        )
    for what in ("routers", "lora"):
        elastic = elasticize(model_and_inputs()[0].to(torch.bfloat16), inputs, router_dtype=torch.float32)
        distil(elastic, halves, 0.6, config(tmp_path / what, steps=2), train=what)
        assert {p.dtype for p in elastic.routers.parameters()} == {torch.float32}
        assert {p.dtype for p in elastic.model.parameters()} == {torch.bfloat16}


def _halved(call: RecordedCall) -> RecordedCall:
    arguments = pytree.tree_map_only(Tensor, lambda t: t.to(torch.bfloat16), call.arguments)
    return replace(call, arguments=arguments, outputs=tuple(t.to(torch.bfloat16) for t in call.outputs))


@pytest.mark.slow
def test_the_papers_budgets_count_too(recording: Recording, tmp_path: Path) -> None:
    elastic = elastic_model()
    policy = RoutingPolicy(margin=0.0, max_reuse=0)
    distil(
        elastic,
        recording,
        Budget(gate=0.67, width=0.6),
        config(tmp_path),
        policy=policy,
        settings=Distillation(weight=50),
    )
    with torch.no_grad():
        rolled = [roll_out(elastic, window(one), policy) for one in recording]
    gates = torch.cat([routing.gate for one in rolled for routing in one.routing])
    widths = torch.cat([routing.width for one in rolled for routing in one.routing])
    assert float(gates.mean()) == pytest.approx(0.67, abs=0.12)
    assert float((gates * widths).sum() / gates.sum()) == pytest.approx(0.6, abs=0.12)


def test_the_command_goes_from_a_saved_model_to_an_elastic_folder(recording: Recording, tmp_path: Path) -> None:
    model, _ = model_and_inputs()
    model.save_pretrained(tmp_path / "dense")
    arguments = ["distil", str(tmp_path / "dense"), "--calls", str(recording.folder), "--budget", ".6"]
    arguments += ["--output", str(tmp_path / "elastic"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "steps=3", "rollout=1", "cpu=true"])
    assert result.exit_code == 0, result.output
    elastic = edit_compile.load_elastic(tmp_path / "elastic")
    drawn = elasticize(model, recording).routers.state_dict()
    assert not torch.equal(elastic.routers.state_dict()["0.hidden.weight"], drawn["0.hidden.weight"])
    assert elastic.router_dtype == torch.float32 and elastic.policy == RoutingPolicy(max_reuse=0)
    compiled = edit_compile.compile(elastic, inputs=recording, engine="torch")
    given = recording[0].calls[0].arguments
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], elastic(**given)[0], atol=1e-4, rtol=1e-4)
    wrongs = ((["--train", "heads"], "train='heads'"), (["--budget", "1,2,3"], "gate,width"), (["x=1"], "no setting"))
    for wrong, said in wrongs:
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert refused.exit_code == 2
        assert said in " ".join(refused.output.split())
