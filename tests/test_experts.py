"""Blocks that route tokens to experts compile as the sum over all of them, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.blocks.experts import dense_experts, find_experts
from passes.blocks.export import ExportError, export_block
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from runtime.face.transformer import CompiledTransformer
from tests.catalogue import check, follow_decisions, train_routers
from tests.models import noise, randomised
from tests.tracing import Watched
from tests.zoo import Case

DIM, HIDDEN, PICKED = 8, 20, 2
Weigh = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


class Wider(Mlp):
    """Another class that computes the same."""


class Gate(nn.Module):
    """The PICKED best of `experts` for each token, and their shares."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.scores = nn.Linear(DIM, experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        shares, picked = self.scores(x).softmax(-1).topk(PICKED, dim=-1)
        return picked.flatten(0, -2), shares.flatten(0, -2), None


class Mixture(nn.Module):
    """Sends each token to its experts by counts read on the host; `weigh` changes the shares behind the gate's back."""

    def __init__(self, weigh: Weigh = lambda shares: shares, kinds: tuple[type[nn.Module], ...] = (Mlp,) * 4) -> None:
        super().__init__()
        self.weigh = weigh
        self.gate, self.shared = Gate(len(kinds)), Mlp()
        self.experts = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        picked, shares, _ = self.gate(x)
        tokens, shares = x.flatten(0, -2), self.weigh(shares)
        total = torch.zeros_like(tokens)
        for number, count in enumerate(picked.flatten().bincount(minlength=len(self.experts)).numpy()):
            if count:
                token, place = (picked == number).nonzero(as_tuple=True)
                total.index_add_(0, token, shares[token, place, None] * self.experts[number](tokens[token]))
        return total.view_as(x) + self.shared(x)


class Block(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(DIM), mixture

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return x + self.mixture(self.norm(x) + vector[:, None])


class Model(nn.Module):
    def __init__(self, *mixtures: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Block, mixtures))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, timestep[:, None].cos().expand(-1, DIM))
        return x


def case(*mixtures: nn.Module) -> Case:
    return Case(randomised(Model(*mixtures)), {"x": noise(2, 5, DIM), "timestep": torch.tensor([0.8, 0.3])})


def exported(mixture: nn.Module) -> tuple[str, ...]:
    """The names that the block's graph says hold experts."""
    given = case(mixture)
    discovery, _ = discover(given.model, given.inputs)
    (site,) = discovery.blocks
    return export_block(site, find_states(site)[0], discovery.runs)[0].experts


@torch.no_grad()
def test_the_sum_over_all_is_the_mixture() -> None:
    mixture = randomised(Mixture())
    x = noise(3, 7, DIM)
    routed = mixture(x)
    with dense_experts({"": mixture}):
        torch.testing.assert_close(mixture(x), routed, rtol=0, atol=1e-5)
    assert "forward" not in vars(mixture)
    assert torch.equal(mixture(x), routed)


def test_every_expert_is_narrowed_and_trained() -> None:
    given = case(Mixture(), Mixture())
    tracer = Watched(given.model, (0.25, 0.5, 1.0), None)
    program = tracer.trace(given.inputs)
    assert tracer.analysis is not None
    (group,) = tracer.analysis.groups
    assert group.graph.experts == ("mixture",)
    assert len(group.sites) == 5  # four experts and the shared one
    compiled = CompiledTransformer(program, "torch", host=tracer.host)
    tracer.prove(compiled, given.inputs)
    follow_decisions(compiled, tracer.analysis, given)
    train_routers(given, tracer.analysis)


def test_a_mixture_that_exports_as_it_is_keeps_its_own_code() -> None:
    class Everyone(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return sum((expert(x) for expert in self.experts), self.shared(x))

    assert exported(Everyone()) == ()


def test_a_mixture_that_weighs_otherwise_is_refused() -> None:
    with pytest.raises(ExportError, match=r"nor is there a graph with all experts of mixture on every token.*off by"):
        exported(Mixture(weigh=lambda shares: shares / shares.sum(-1, keepdim=True)))


def test_children_that_are_no_gate_change_nothing() -> None:
    class NoGate(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(DIM, DIM)
            self.shared = nn.Linear(DIM, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[int(x.sum().numpy() > 0)](x)

    with pytest.raises(ExportError, match=r"torch\.export cannot follow its code"):
        exported(NoGate())


def test_a_mixture_beside_something_like_one_is_found() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.branches = nn.Linear(DIM, 3), nn.ModuleList([nn.Linear(3, DIM), nn.Linear(3, DIM)])

        def forward(self, x: Tensor) -> Tensor:
            return sum(branch(self.into(x)) for branch in self.branches)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture, self.branches = Mixture(), Branches()

        def forward(self, x: Tensor) -> Tensor:
            return self.mixture(x) + self.branches(x)

    assert "mixture.mixture" in exported(Both())


def test_a_mixture_with_parameters_of_its_own_is_none() -> None:
    mixture = Mixture()
    mixture.gain = nn.Parameter(torch.ones(1))
    assert not find_experts(nn.ModuleDict({"inner": mixture}))


@torch.no_grad()
def test_an_expert_that_overflows_where_it_is_not_picked_does_no_harm() -> None:
    mixture = randomised(Mixture())
    mixture.gate.scores.bias[3] = -1e9
    mixture.experts[3].down.bias.fill_(torch.inf)
    x = noise(2, 5, DIM)
    with dense_experts({"": mixture}):
        torch.testing.assert_close(mixture(x), Mixture.forward(mixture, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "children",
    [
        {"gate": Gate(2), "experts": nn.ModuleList([Mlp()])},
        {"gate": Gate(2), "experts": nn.ModuleList([Mlp(), Wider()])},
        {"experts": nn.ModuleList([Mlp(), Mlp()])},
        {"gate": Gate(2), "experts": nn.ModuleList([Mlp(), Mlp()]), "others": nn.ModuleList([Mlp(), Mlp()])},
    ],
    ids=["one expert", "two classes", "no other child", "two lists"],
)
def test_what_does_not_look_like_a_mixture_is_not_found(children: dict[str, nn.Module]) -> None:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    assert not find_experts(nn.ModuleDict({"inner": module}))


@pytest.mark.slow
def test_hidream_compiles_on_both_engines() -> None:
    checked = check("HiDreamImageTransformer2DModel")
    assert [len(group.sites) for group in checked.analysis.groups] == [5, 4]
