"""The engines for CPUs on the hand-made plans: same numbers, no copies of weights, errors that say what to do."""

from __future__ import annotations

import threading
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import EngineError
from runtime.bundle.spec import PlanInput
from runtime.calls.bound import BoundBlocks
from runtime.engines import ort_library
from runtime.face.transformer import CompiledTransformer
from tests import programs

INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # it compiles for minutes
ENGINES = ("torch", "onnxruntime", INDUCTOR)


def weights(rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    full = [torch.randn(*s, generator=draw) for s in ((programs.H, programs.D), (programs.H,))]
    full += [torch.randn(*s, generator=draw) for s in ((programs.H, programs.D), (programs.E, programs.D))]
    return [w if index == 3 else w[:rows] for index, w in enumerate(full)]


def inputs(rows: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(rows, programs.IMAGE, programs.D), (rows, programs.TEXT, programs.D), (rows, programs.E)]
    return [torch.randn(*s, generator=draw) for s in shapes] + [torch.randn(programs.IMAGE, programs.D)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("rows", [1, 3])
def test_a_plan_is_its_module(engine: str, variant: int, rows: int) -> None:
    own = weights(programs.DOUBLE.variants[variant].rows[0])
    bound = engines.make(engine).load(programs.DOUBLE, variant, programs.plan_files()).bind(own)
    given = inputs(rows)
    for got, want in zip(bound(given), programs.Double()(*own, *given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_strided_and_expanded_inputs_are_read_right(engine: str) -> None:
    own = weights(programs.H)
    bound = engines.make(engine).load(programs.DOUBLE, 3, programs.plan_files()).bind(own)
    hidden, text, time, table = inputs(2)
    strided = [hidden.transpose(1, 2).contiguous().transpose(1, 2), text.flip(0).flip(0), time[:1].expand(2, -1)]
    strided += [torch.stack([table, table], -1)[..., 0]]
    assert not strided[0].is_contiguous()
    expected = programs.Double()(*own, hidden, text, time[:1].expand(2, -1), table)
    for got, want in zip(bound(strided), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_are_new_each_time(engine: str) -> None:
    bound = engines.make(engine).load(programs.DOUBLE, 3, programs.plan_files()).bind(weights(programs.H))
    first = bound(inputs(2))
    kept = [state.clone() for state in first]
    bound([tensor * 2 for tensor in inputs(2)])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bound_block_serves_many_threads(engine: str) -> None:
    bound = engines.make(engine).load(programs.DOUBLE, 3, programs.plan_files()).bind(weights(programs.H))
    given = [[tensor * (n + 1) for tensor in inputs(2)] for n in range(4)]
    expected = [bound(one) for one in given]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(30):
            if not all(torch.equal(a, b) for a, b in zip(bound(given[n]), expected[n], strict=True)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("engine", ENGINES)
def test_widths_are_views_of_one_copy(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound_weights: list[Tensor] = []
    made = engines.make(engine)
    kernel = type(made.load(programs.DOUBLE, 0, programs.plan_files()))
    original = kernel.bind
    monkeypatch.setattr(kernel, "bind", lambda self, given, block: bound_weights.extend(given) or original(self, given))
    program = programs.make()
    BoundBlocks(program, engine)
    stored = {w.data_ptr(): w for w in program.weights.values()}
    assert len(bound_weights) == 4 * (4 + 2 + 4)
    assert all(w.data_ptr() in stored and w.is_contiguous() for w in bound_weights)


def test_changing_a_weight_in_place_reaches_onnxruntime() -> None:
    own = weights(programs.H)
    bound = engines.make("onnxruntime").load(programs.DOUBLE, 3, programs.plan_files()).bind(own)
    bound(inputs(1))
    own[0].zero_()
    expected = programs.Double()(*own, *inputs(1))[0]
    table = inputs(1)[3]
    given = [*inputs(1)[:3], table]
    torch.testing.assert_close(bound(given)[0], programs.Double()(*own, *given)[0], rtol=1e-5, atol=1e-5)
    assert expected.shape == bound(given)[0].shape


def test_one_thread_pool_and_arena_for_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen = []
    session = onnxruntime.InferenceSession

    def opened(data, options, **kwargs):
        seen.append(options)
        return session(data, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    BoundBlocks(programs.make(), "onnxruntime")
    assert len(seen) == 8
    for options in seen:
        assert not options.use_per_session_threads
        assert options.get_session_config_entry("session.use_env_allocators") == "1"


def test_bfloat16_on_onnxruntime_names_the_engine_to_use() -> None:
    halved = replace(programs.SINGLE, inputs=(PlanInput("hidden", "bfloat16", (None, 5, 8), 0),))
    with pytest.raises(EngineError, match="engine 'torch' or 'inductor'"):
        engines.make("onnxruntime").load(halved, 0, programs.plan_files())
    kernel = engines.make("onnxruntime").load(programs.SINGLE, 3, programs.plan_files())
    with pytest.raises(EngineError, match="engine 'torch' or 'inductor'"):
        kernel.bind([torch.zeros(programs.H, programs.D, dtype=torch.bfloat16)] * 2)


def test_bfloat16_runs_on_torch() -> None:
    kernel = engines.make("torch").load(programs.SINGLE, 3, programs.plan_files())
    own = [torch.randn(programs.H, programs.D).bfloat16() for _ in range(2)]
    hidden = torch.randn(2, programs.IMAGE, programs.D).bfloat16()
    (got,) = kernel.bind(own)([hidden])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, programs.Single()(*own, hidden)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_without_a_file_for_the_engine_is_named(engine: str) -> None:
    other = "pt2" if engine == "onnxruntime" else "onnx"
    files = {name: data for name, data in programs.plan_files().items() if name.endswith(other)}
    with pytest.raises(EngineError, match=rf"plans/double-w025\.\w+; the program holds \['{other}'\]"):
        engines.make(engine).load(programs.DOUBLE, 0, files)


def test_a_plan_that_does_not_load_is_named() -> None:
    files = dict.fromkeys(programs.plan_files(), b"rubbish")
    with pytest.raises(EngineError, match="double"):
        engines.make("onnxruntime").load(programs.DOUBLE, 0, files)


@pytest.mark.parametrize("name", ["openvino", "torch-packed"])
def test_no_such_engine(name: str) -> None:
    with pytest.raises(EngineError, match="onnxruntime, torch"):
        CompiledTransformer(programs.make(), name)


def test_an_engine_of_bundles_needs_one() -> None:
    with pytest.raises(EngineError, match="edit-compile build"):
        engines.make("tensorrt-rtx")


@pytest.mark.parametrize(
    ("installed", "message"),
    [({"onnxruntime", "onnxruntime-gpu"}, "both installed"), (set(), "not installed")],
)
def test_what_is_installed_is_checked(installed: set[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in installed:
            return "1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ort_library, "_library", None)
    monkeypatch.setattr(ort_library.metadata, "version", version)
    with pytest.raises(EngineError, match=message):
        engines.make("onnxruntime")
