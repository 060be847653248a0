"""Where tensors lie when weights and inputs are on a GPU, shown without one.

Torch's fake tensors have a device and no numbers; an operator that mixes devices raises, as it does on a GPU. What
reads numbers on the host (the timestep, a guard's logits, whether inputs are finite) has none to read, and is given
some. Indexing by brackets, which asks a torch without CUDA for the device, is written out in operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from edit_compile import elasticize
from runtime.base import guard, transfer
from runtime.bundle import archive as pt2
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from runtime.requests.bank import Residuals
from runtime.routing.policy import REUSE, SKIP
from runtime.routing.schedule import ScheduledPolicy
from tests import programs
from tests.conftest import compiled_case
from tests.models import tiny_flux

CUDA = torch.device("cuda", 0)
ROWS_APART = np.array(
    [[[1.0, 0.25, SKIP], [0.5, 0.5, 1.0]], [[REUSE, SKIP, 0.75], [SKIP, REUSE, REUSE]], [[REUSE] * 3, [0.5] * 3]]
)
ROWS_ALIKE = ROWS_APART[:, :, :1]


@pytest.fixture(scope="module", params=["by hand", pytest.param("flux", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest) -> tuple[Program, Mapping[str, object]]:
    """A program of a double and a single block with routers, and its inputs."""
    if request.param == "by hand":
        return programs.make(("double", "single")), programs.inputs()
    model, inputs = tiny_flux(double=1, single=1)
    program = compiled_case(elasticize(model, inputs), inputs).program
    files = {name: program.files[name] for name in program.files if name.endswith(".pt2")}  # made here, of real tensors
    return replace(program, files=files), inputs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within a mode of fake tensors: what makes one on the GPU like a real one."""
    monkeypatch.setattr(torch, "isfinite", lambda number: True)
    monkeypatch.setattr(FakeTensor, "__getitem__", indexed, raising=False)
    monkeypatch.setattr(pt2, "load", with_guards_answered(pt2.load))
    transfer.row_index.cache_clear()
    with FakeTensorMode():
        yield lambda like: torch.empty(like.shape, dtype=like.dtype, device=CUDA)
    transfer.row_index.cache_clear()


def with_guards_answered(load: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    """`load` giving graphs whose guards are answered; of an operator, fake tensors ask for shapes alone."""

    def loaded(*args: object) -> GraphModule:
        made = load(*args)
        for node in made.graph.nodes:
            if node.target is guard.guard:
                node.target = guard._guard
        made.recompile()
        return made

    return loaded


def indexed(tensor: Tensor, key: object) -> Tensor:
    dim = 0
    for one in key if isinstance(key, tuple) else (key,):
        if isinstance(one, int):
            tensor = tensor.select(dim, one)
            continue
        if one is None:
            tensor = tensor.unsqueeze(dim)
        else:
            assert isinstance(one, slice)
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
        dim += 1
    return tensor


def on_gpu(program: Program, fake: Callable[[Tensor], Tensor]) -> Program:
    weights = {key: fake(tensor) for key, tensor in program.weights.items()}
    return replace(program, weights=weights, routers={key: fake(tensor) for key, tensor in program.routers.items()})


def arguments_on_gpu(inputs: Mapping[str, object], rows: int) -> dict[str, Tensor]:
    found = {}
    for name, value in inputs.items():
        assert isinstance(value, Tensor)
        shape = value.shape if name.endswith("_ids") else (rows, *value.shape[1:])
        found[name] = torch.empty(shape, dtype=value.dtype, device=CUDA)
    return found


def calls(program: Program, inputs: dict[str, Tensor], table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CompiledTransformer(program, "torch", ScheduledPolicy(table, routed=False))
    assert compiled.device == CUDA
    compiled.memory_limit = 1 << 30  # there is no GPU to ask how much it has
    for step in range(len(table)):
        rows = len(inputs["timestep"])

        def fetch(tensor: Tensor, step: int = step, rows: int = rows) -> list:
            return [1 - step / 10] * rows + [0.0] * (tensor.numel() - rows)  # timesteps; then, the latents are the same

        landing = SimpleNamespace(fetch=fetch)
        monkeypatch.setattr(transfer, "_landing", lambda tensor, landing=landing: landing)
        assert compiled(**inputs).sample.device == CUDA
    done = compiled.counters
    assert min(done.skipped, done.reused, done.computed) > 0
    assert done.calls == len(table)


@pytest.mark.parametrize(("rows", "table"), [(1, ROWS_ALIKE), (3, ROWS_ALIKE.repeat(3, 2)), (3, ROWS_APART)])
def test_whole_calls_stay_on_the_gpu(made, fake, rows: int, table: np.ndarray, monkeypatch) -> None:
    program, inputs = made
    calls(on_gpu(program, fake), arguments_on_gpu(inputs, rows), table, monkeypatch)


def test_a_move_with_a_dtype_moves_and_casts_nothing(made, fake) -> None:
    """As pipelines move their parts: ``pipeline.to("cuda", torch.float16)``."""
    program, _ = made
    compiled = CompiledTransformer(on_gpu(program, fake), "torch")
    with pytest.warns(RuntimeWarning, match="keeps computing in float32"):
        compiled.to("cpu", torch.float16)
    assert (compiled.device.type, compiled.dtype) == ("cpu", torch.float16)
    for before, after in ((program.weights, compiled.program.weights), (program.routers, compiled.program.routers)):
        assert {key: (t.dtype, "cpu") for key, t in before.items()} == {
            key: (t.dtype, t.device.type) for key, t in after.items()
        }


@pytest.mark.parametrize("rows", [1, 3])
def test_every_variant_and_router_stays_on_the_gpu(made, fake, rows: int) -> None:
    program, _ = made
    blocks = CompiledTransformer(on_gpu(program, fake), "torch")._session.blocks
    assert {block.plan.kind for (block,) in blocks.forms} == {plan.kind for plan in program.manifest.plans}
    for index, (block,) in enumerate(blocks.forms):
        shapes = [tuple(rows if size is None else size for size in given.shape) for given in block.plan.inputs]
        given = [torch.empty(shape, device=CUDA) for shape in shapes]
        states = [given[place] for place in block.states]
        assert len(block.bound) == 4
        for bound in block.bound:
            after = bound(given)
            assert [(s.device, s.shape, s.dtype) for s in after] == [(CUDA, s.shape, s.dtype) for s in states]
        sinusoid = blocks.routers.embed(torch.empty(rows, device=CUDA), rows)
        logits = blocks.routers(index, block.rows_first(states), sinusoid if block.time is None else given[block.time])
        assert (logits.device, logits.shape) == (CUDA, (rows, 5))


def test_routed_calls_read_the_timestep_and_the_logits_alone(made, fake, monkeypatch) -> None:
    program, inputs = made
    compiled = CompiledTransformer(on_gpu(program, fake), "torch")
    compiled.memory_limit = 1 << 30
    given = arguments_on_gpu(inputs, 3)
    read: list[torch.Size] = []

    def fetch(tensor: Tensor) -> list:
        assert tensor.device == CUDA
        read.append(tensor.shape)
        return [0.5] * 3 if tensor.ndim == 1 else [[0.0, 1.0, 0.0, 0.0, 0.0], [-9.0, 0, 0, 0, 0], [9.0, 0, 0, 0, 1.0]]

    monkeypatch.setattr(transfer, "_landing", lambda tensor: SimpleNamespace(fetch=fetch))
    assert compiled(**given).sample.device == CUDA
    assert read == [(3,), (3, 5), (3, 5)]


def test_banks_stay_on_the_gpu(fake) -> None:
    states = [torch.empty(3, 4, 2, device=CUDA), torch.empty(5, 3, device=CUDA)]
    rows = (0, 2)
    index = transfer.row_index(rows, CUDA)
    parts = [state.index_select(dim, index) for dim, state in enumerate(states)]
    for whole_first in (True, False):
        bank = Residuals(states, (0, 1))
        if whole_first:
            bank.keep(states, states)
        bank.keep(parts, parts, rows, index)
        bank.keep(states, states)
        for after in (*bank.reuse(states), *bank.reuse(parts, rows, index)):
            assert after.device == CUDA


def test_a_constant_on_the_cpu_is_caught(made, fake, monkeypatch) -> None:
    program, inputs = made
    moved = on_gpu(program, fake)
    given = arguments_on_gpu(inputs, 3)
    for keys in (program.manifest.glues[0].weights, program.manifest.blocks[0].weights):
        key = next(key for key in keys if program.weights[key].ndim > 1)
        planted = replace(moved, weights={**moved.weights, key: torch.empty(program.weights[key].shape)})
        with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
            calls(planted, given, ROWS_APART, monkeypatch)


class Numbered(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + torch.arange(4) * torch.ones(()),)


def test_what_a_graph_makes_itself_is_made_where_it_is_loaded_for() -> None:
    data = pt2.dump(torch.export.export(Numbered(), (torch.zeros(4),)).run_decompositions({}))
    with FakeTensorMode():
        x = torch.empty(4, device=CUDA)
        assert pt2.load(data, device=CUDA)(x)[0].device == CUDA
        with pytest.raises(RuntimeError, match="found at least two devices"):
            pt2.load(data)(x)
