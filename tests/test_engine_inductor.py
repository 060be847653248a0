"""The inductor engine: the numbers of the torch engine, compiled once per shapes, and never op by op in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from runtime import engines
from runtime.base.errors import EngineError
from runtime.calls.bound import BoundBlocks
from runtime.engines import pytorch
from runtime.face.transformer import CompiledTransformer
from tests import programs
from tests.conftest import Compiled
from tests.test_engine_plans import weights


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that torch.compile is given, run as it is: what is compiled is tested by the slow test."""
    found: list[Any] = []
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, _: found.append(name) or graph)
    return found


@pytest.fixture
def bind() -> Callable[[], engines.Bound]:
    kernel = engines.make("inductor").load(programs.SINGLE, 3, programs.plan_files())
    return lambda: kernel.bind(weights(programs.H)[::2])


def hidden(rows: int = 2, seed: int = 0, tokens: int = programs.IMAGE) -> Tensor:
    return torch.randn(rows, tokens, programs.D, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor) -> Tensor:
    (state,) = programs.Single()(*weights(programs.H)[::2], x)
    return state


def test_it_is_compiled_by_inductor(bind: Callable[[], engines.Bound]) -> None:
    (state,) = bind()([hidden()])
    torch.testing.assert_close(state, expected(hidden()), rtol=1e-5, atol=1e-5)


def test_blocks_share_what_was_compiled_for_a_row_or_for_any_more(
    bind: Callable[[], engines.Bound], compilations: list[Any]
) -> None:
    for one in (bind(), bind()):
        for rows in (1, 3, 1, 2, 7):
            torch.testing.assert_close(one([hidden(rows)])[0], expected(hidden(rows)))
    assert compilations == ["inductor"] * 2


def test_many_shapes_are_each_compiled(bind: Callable[[], engines.Bound], compilations: list[Any]) -> None:
    limit = torch._dynamo.config.recompile_limit
    one = bind()
    for tokens in range(1, limit + 4):
        one([hidden(tokens=tokens)])
    assert len(compilations) == limit + 3


def test_strides_are_not_compiled_for(bind: Callable[[], engines.Bound], compilations: list[Any]) -> None:
    one, x = bind(), hidden(1)
    odd = x.as_strided(x.shape, (7, *x.stride()[1:]))
    assert odd.is_contiguous()
    assert odd.stride() != x.stride()
    for given in (x, odd, x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([x, x], -1)[..., 0]):
        torch.testing.assert_close(one([given])[0], expected(x))
    with torch.enable_grad():
        one([x.clone().requires_grad_()])
    assert len(compilations) == 1


def test_threads_compile_a_shape_once(bind: Callable[[], engines.Bound], compilations: list[Any]) -> None:
    one, states = bind(), {}
    threads = [threading.Thread(target=lambda n=n: states.update({n: one([hidden(2, n)])[0]})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    for n in range(4):
        torch.testing.assert_close(states[n], expected(hidden(2, n)))


@pytest.fixture
def eager_stance() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_what_runs_op_by_op_is_refused(bind: Callable[[], engines.Bound], eager_stance: None) -> None:
    with pytest.raises(EngineError, match="plan single at width 1 on cpu as it is: it is switched off"):
        bind()([hidden()])


def test_torch_raises_beyond_its_limit_of_compilations(
    bind: Callable[[], engines.Bound], compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "_plain", lambda tensor: tensor)  # so that strides are compiled for after all
    one = bind()
    one([hidden()])
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="fullgraph=True"):
        one([hidden().transpose(1, 2).contiguous().transpose(1, 2)])


def test_without_a_compiler_it_says_what_is_missing(bind: Callable[[], engines.Bound]) -> None:
    none = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    told = r"plan single at width 1 on cpu: .*No working C\+\+ compiler.*engine='torch'"
    with inductor_config.patch(none), pytest.raises(EngineError, match=told):
        bind()([hidden(5)])


def test_it_follows_its_weights() -> None:
    model = CompiledTransformer(programs.make(("single",)), "inductor")
    model._session.move(lambda tensor: tensor.to("meta"))
    assert model.device == torch.device("meta")


@pytest.mark.slow
def test_flux_is_what_the_torch_engine_makes_of_it_at_every_width(flux: Compiled) -> None:
    compiled, eager = BoundBlocks(flux.program, "inductor"), BoundBlocks(flux.program, "torch")
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for one, other in zip((f[0] for f in compiled.forms), (f[0] for f in eager.forms), strict=True):
        shapes = [tuple(3 if size is None else size for size in given.shape) for given in one.plan.inputs]
        given = [torch.randn(shape, generator=draw) for shape in shapes]
        for variant, bound in enumerate(one.bound):
            for got, want in zip(bound(given), other.bound[variant](given), strict=True):
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
            seen.add((one.plan.kind, one.plan.variants[variant].width))
    assert len(seen) == 8
