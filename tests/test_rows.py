"""Models whose tokens are rows (N, D): of all samples together, or of one sample without a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.graphs.batch_layout import Packing, Samples
from passes.observe.discover import DiscoveryError, discover
from runtime.face.transformer import CompiledTransformer
from tests.catalogue import follow_decisions, train_routers
from tests.models import noise, randomised
from tests.tracing import Watched
from tests.zoo import Case

DIM, HIDDEN = 8, 24


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Block(nn.Module):
    """Two streams of one sample, words (N, DIM) and pixels (M, DIM), the pixels looking at both."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pixels = Mlp(), Mlp()

    def forward(self, words: Tensor, pixels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([words, pixels])
        heads = ((pixels + table) @ seen.T).softmax(-1)
        return words + self.words(words.cumsum(0)), pixels + self.pixels(heads @ seen)


class OneSample(nn.Module):
    """Takes one sample: words (N, DIM), pixels (M, DIM), a timestep for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, words: Tensor, pixels: Tensor, timestep: Tensor) -> Tensor:
        table = torch.arange(len(pixels) * DIM).view(-1, DIM).cos()
        pixels = pixels + timestep[:, None].cos()
        for layer in self.layers:
            words, pixels = layer(words, pixels, table)
        return torch.cat([words, pixels])


def one_sample(words: int = 4, pixels: int = 6) -> dict[str, Tensor]:
    return {"words": noise(words, DIM), "pixels": noise(pixels, DIM, seed=2), "timestep": torch.full((pixels,), 0.7)}


class Rows(nn.Module):
    """Takes a batch, but its blocks see the rows (B L, DIM) of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        rows = (x + timestep[:, None, None].cos()).flatten(0, 1)
        for layer in self.layers:
            rows = layer(rows)
        return rows.view_as(x)


def batched() -> dict[str, Tensor]:
    return {"x": noise(2, 5, DIM), "timestep": torch.tensor([0.8, 0.3])}


@pytest.mark.parametrize(
    ("model", "inputs", "samples"),
    [(OneSample(), one_sample(), Samples((), None)), (Rows(), batched(), Samples(("x",), 0))],
    ids=["one sample", "rows of all samples"],
)
def test_rows_are_tokens_of_samples(model: nn.Module, inputs: Mapping[str, Any], samples: Samples) -> None:
    case = Case(randomised(model), dict(inputs))
    tracer = Watched(case.model, (0.25, 0.5, 1.0), None)
    program = tracer.trace(case.inputs)
    assert tracer.analysis is not None
    discovery = tracer.analysis.discovery
    assert len(discovery.blocks) == 2 and discovery.samples == samples
    (adapter,) = {site.adapter.inputs[0] for site in discovery.blocks if site.adapter}
    assert adapter == Packing(folded=True)
    assert all(glue.file is not None for glue in program.manifest.glues)
    for engine in ("torch", "onnxruntime"):
        compiled = CompiledTransformer(program, engine, host=tracer.host)
        tracer.prove(compiled, case.inputs)
        follow_decisions(compiled, tracer.analysis, case)
    train_routers(case, tracer.analysis)


def test_one_sample_at_two_sizes() -> None:
    tracer = Watched(randomised(OneSample()), (0.5, 1.0), None)
    both = [one_sample(), one_sample(words=3, pixels=9)]
    compiled = CompiledTransformer(tracer.trace(both), "torch")
    tracer.prove(compiled, both)
    assert len(tracer.analysis.groups) == 1 if tracer.analysis else False


def test_vectors_beside_tokens_are_no_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.layers = nn.ModuleList([Residual()]), nn.ModuleList([Residual()])

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            vector = self.time[0](timestep[:, None].cos().expand(-1, DIM))
            return self.layers[0](x + vector[:, None])

    found, report = discover(randomised(Tokens()), batched())
    assert [site.name for site in found.blocks] == ["layers.0"]
    assert ("time.0", "returns no tensor of tokens shaped like an input") in [
        (r.where, r.reason) for r in report.refused
    ]


def test_one_vector_per_sample_is_no_token() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Residual()])

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.layers[0](x.mean(1) + timestep[:, None].cos())

    found, report = discover(randomised(Vectors()), batched())
    assert found.blocks == ()
    assert report.refused[0].reason == "returns no tokens that carry the batch"


class Joined(Mlp):
    """Every row looks at all rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward((x @ x.T).softmax(-1) @ x)


def test_a_batch_whose_rows_mix_is_not_taken_for_one_sample() -> None:
    model = Rows()
    model.layers = nn.ModuleList([Joined()])
    with pytest.raises(DiscoveryError, match=r"rows of one sample changed at layers\.0"):
        discover(randomised(model), batched())


def test_what_an_object_may_hide_is_not_taken_for_one_sample() -> None:
    class Cached(Rows):
        def forward(self, x: Tensor, timestep: Tensor, cache: object) -> Tensor:
            return super().forward(x * cache.value, timestep)  # type: ignore[attr-defined]

    class Cache:
        value = torch.linspace(1, 2, 2)[:, None, None]

    with pytest.raises(DiscoveryError, match="cache holds a Cache, which cannot be doubled"):
        discover(randomised(Cached()), batched() | {"cache": Cache()})


def test_samples_at_timesteps_of_their_own_are_not_taken_for_one() -> None:
    class Lengths(nn.Module):
        """Two samples of 3 and 4 rows in one sequence."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Joined()])

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            steps = timestep.repeat_interleave(torch.tensor([3, 4]))[:, None]
            return torch.cat([self.layers[0](x + steps.cos())])

    with pytest.raises(DiscoveryError, match="could not be doubled"):
        discover(randomised(Lengths()), {"x": noise(7, DIM), "timestep": torch.tensor([0.8, 0.3])})


def test_a_vector_beside_the_rows_of_one_sample_is_no_token() -> None:
    class Conditioned(OneSample):
        def __init__(self) -> None:
            super().__init__()
            self.cond = nn.ModuleList([Residual()])

        def forward(self, words: Tensor, pixels: Tensor, timestep: Tensor) -> Tensor:
            vector = self.cond[0](timestep[:1, None].cos().expand(1, DIM))
            return super().forward(words + vector, pixels + vector, timestep)

    found, report = discover(randomised(Conditioned()), one_sample())
    assert [site.name for site in found.blocks] == ["layers.0", "layers.1"]
    assert [refusal.where for refusal in report.refused] == ["cond.0"]
    assert "taken as one sample" in report.done[0]


def test_a_batch_of_tokens_that_cannot_be_doubled_is_not_taken_for_one_sample() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Residual()])

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.layers[0](x + timestep[:, None, None].cos() - x.mean(0))

    with pytest.raises(DiscoveryError, match="rows of one sample changed at"):
        discover(randomised(Mixing()), batched())
