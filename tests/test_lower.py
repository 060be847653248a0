"""Files of plans and glue: made on demand, without weights, with the numbers of the graphs they come from."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from torch import Tensor, nn

from edit_compile.compiling.compiler import Tracer
from passes.graphs.cost import variant_cost, weight_stand_ins
from passes.lowering import lower
from passes.lowering.lower import Files, lower_plan
from passes.pipeline import run_passes
from passes.program.compilation import Compilation, Planned
from runtime.bundle import archive as pt2
from runtime.face.transformer import CompiledTransformer
from tests.models import noise, randomised, tiny_dit
from tests.sessions import open_session


def planned_at(*widths: float, **options: int) -> tuple[Planned, ...]:
    """The plans of a tiny model at these widths."""
    return run_passes(Compilation(*tiny_dit(**options), widths=widths), until="plans").planned


def test_files_are_made_once_and_only_when_asked_for() -> None:
    made: list[str] = []
    files = Files({name: lambda name=name: made.append(name) or name.encode() for name in ("a", "b")})
    assert list(files) == ["a", "b"]
    assert made == []
    assert files["b"] == files["b"] == b"b"
    assert made == ["b"]


def test_a_variant_has_one_form_per_engine_without_weights_and_with_equal_numbers() -> None:
    (planned,) = planned_at(0.5, 1.0)
    files = Files(lower_plan(planned.graph, planned.plan))
    stem = f"plans/{planned.plan.id}-w050"
    weights = [torch.randn(w.shape) * 0.1 for w in weight_stand_ins(planned.graph, 0)]
    inputs = [
        value[:1] if spec.batch_dim == 0 else value
        for spec, value in zip(planned.plan.inputs, planned.examples[0], strict=True)
    ]
    expected = planned.graph.variants[0](*weights, *inputs)
    for output, reference in zip(pt2.load(files[f"{stem}.pt2"])(*weights, *inputs), expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
    model = onnx.load_from_string(files[f"{stem}.onnx"])
    assert max(math.prod(i.dims) for i in model.graph.initializer) < min(w.numel() for w in weights if w.ndim == 2)
    session = open_session(files[f"{stem}.onnx"])
    names = [*planned.plan.weights, *(spec.name for spec in planned.plan.inputs)]
    assert [node.name for node in session.get_inputs()] == names
    outputs = session.run(None, dict(zip(names, (v.numpy() for v in (*weights, *inputs)), strict=True)))
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), reference, rtol=1e-4, atol=1e-4)


def test_costs_fall_with_the_width_by_what_the_mlp_loses() -> None:
    (planned,) = planned_at(0.5, 1.0)
    (half, half_bytes, half_own), (full, full_bytes, full_own) = (
        variant_cost(planned.graph, index, planned.plan, planned.examples[0]) for index in (0, 1)
    )
    tokens, dim = planned.examples[0][0].shape[1:]
    hidden = planned.group.sites[0].hidden
    assert full - half == 2 * 2 * tokens * dim * hidden // 2
    assert full_bytes - half_bytes == 4 * (2 * dim * hidden // 2 + hidden // 2)
    assert full_own == half_own >= 2 * 4 * tokens * dim


def test_models_of_one_make_are_lowered_once() -> None:
    files = []
    for seed in (0, 1):
        (planned,) = planned_at(0.5, 1.0, seed=seed)
        made = Files(lower_plan(planned.graph, planned.plan))
        files.append({name: made[name] for name in made if name.endswith(".pt2")})
    first, second = files
    assert first.keys() == second.keys()
    assert all(first[name] is second[name] for name in first)
    (other,) = planned_at(0.5, 1.0, side=4)
    assert not set(lower_plan(other.graph, other.plan)) & set(first)


class Rolled(nn.Module):
    """A block that rolls its channels by a number that it reads from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        n = places.sum().item()
        torch._check(n >= 0)
        torch._check(n <= x.shape[1])
        return x + self.down(nn.functional.gelu(self.up(torch.cat([x[:, n:], x[:, :n]], 1))))


class Rolling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Rolled()])

    def forward(self, x: Tensor, timestep: Tensor, places: Tensor) -> Tensor:
        return self.layers[0](x + timestep[:, None, None].cos(), places)


@pytest.mark.parametrize("engines", [("onnxruntime",), ("torch", "onnxruntime")])
def test_what_one_width_leaves_behind_does_not_reach_the_next(engines: tuple[str, ...]) -> None:
    places = torch.tensor([1, 2]) if len(engines) > 1 else torch.tensor([1, 1])
    inputs = {"x": noise(3, 7, 8), "timestep": torch.tensor([0.8, 0.3, 0.1]), "places": places}
    lower._lowered.clear()
    tracer = Tracer(randomised(Rolling()), (0.25, 0.5, 1.0), None)
    program = tracer.trace(inputs)
    for engine in engines:
        tracer.prove(CompiledTransformer(program, engine, host=tracer.host), inputs)
