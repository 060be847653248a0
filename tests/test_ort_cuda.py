"""The onnxruntime-cuda engine with the CPU provider in the GPU's place, and what it says where something is missing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor

from runtime import engines
from runtime.base.errors import EditError, EngineError
from runtime.bundle.program import Program
from runtime.engines import ort, ort_library
from runtime.engines.ort import OnnxRuntimeEngine
from runtime.face.transformer import CompiledTransformer
from tests import ort_stand_in, programs
from tests.ort_stand_in import Session
from tests.test_engine_plans import inputs, weights

ENGINE = "onnxruntime-cuda"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnnxRuntimeEngine]:
    for name, value in ort_stand_in.replacements().items():
        monkeypatch.setattr(ort, name, value)
    monkeypatch.setattr(ort_library, "_arenas", set())
    files = programs.plan_files()  # made before torch believes in a GPU
    assert files
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    made = engines.make(ENGINE)
    assert isinstance(made, OnnxRuntimeEngine)
    assert made.provider.device == torch.device("cuda", 0)
    made.provider.device = torch.device("cpu")
    ort_stand_in.clear()
    yield made
    ort_stand_in.clear()


@pytest.mark.parametrize("variant", range(4))
def test_a_plan_is_its_module_with_any_number_of_rows(engine: OnnxRuntimeEngine, variant: int) -> None:
    own = weights(programs.DOUBLE.variants[variant].rows[0])
    bound = engine.load(programs.DOUBLE, variant, programs.plan_files()).bind(own)
    for rows in (1, 3, 1):
        given = inputs(rows)
        given[0] = given[0].transpose(1, 2).contiguous().transpose(1, 2)
        for got, want in zip(bound(given), programs.Double()(*own, *given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sessions_are_for_fixed_shapes_and_serve_all_blocks(engine: OnnxRuntimeEngine) -> None:
    kernel = engine.load(programs.DOUBLE, 3, programs.plan_files())
    bound = [kernel.bind(weights(programs.H)) for _ in range(2)]
    for rows in (1, 2, 1):
        for one in bound:
            one(inputs(rows))
    opened = [strict for strict, _ in Session.opened]
    assert opened == ["", "1", "1"]  # one to learn the names of sizes, then one per number of rows
    found = [given.shape for given in kernel.session(tuple(tuple(t.shape) for t in inputs(2))).session.get_inputs()]
    assert all(isinstance(size, int) for shape in found for size in shape)


def test_plans_that_tell_their_shapes_are_opened_as_they_are_loaded(engine: OnnxRuntimeEngine) -> None:
    shapes = tuple(given.shape for given in programs.DOUBLE.inputs)
    engine.load(replace(programs.DOUBLE, buckets=(shapes,)), 0, programs.plan_files())
    assert [strict for strict, _ in Session.opened] == ["", "1"]


def test_it_works_on_our_stream_in_step_with_torchs(engine: OnnxRuntimeEngine) -> None:
    bound = engine.load(programs.SINGLE, 3, programs.plan_files()).bind(weights(programs.H)[::2])
    bound([inputs(2)[0]])
    assert Session.events == ["torch's stream waited for", "run", "torch's stream waits"]
    assert {options["user_compute_stream"] for _, options in Session.opened} == {"77"}
    assert {options["use_tf32"] for _, options in Session.opened} == {"0"}


def test_results_are_new_each_time(engine: OnnxRuntimeEngine) -> None:
    bound = engine.load(programs.DOUBLE, 3, programs.plan_files()).bind(weights(programs.H))
    first = bound(inputs(2))
    kept = [state.clone() for state in first]
    bound([tensor * 2 for tensor in inputs(2)])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_what_is_elsewhere_is_refused(engine: OnnxRuntimeEngine) -> None:
    kernel = engine.load(programs.SINGLE, 3, programs.plan_files())
    own = weights(programs.H)[::2]
    with pytest.raises(EngineError, match="up of plan single at width 1 is on meta"):
        kernel.bind([w.to("meta") for w in own])
    with pytest.raises(EngineError, match="not contiguous"):
        kernel.bind([w.t().contiguous().t() for w in own])
    with pytest.raises(EngineError, match=r"does not take torch\.complex64, as up"):
        kernel.bind([w.to(torch.complex64) for w in own])
    with pytest.raises(EngineError, match="hidden of plan single at width 1 is on meta"):
        kernel.bind(own)([inputs(1)[0].to("meta")])


def test_sizes_that_contradict_each_other_are_named(engine: OnnxRuntimeEngine) -> None:
    bound = engine.load(programs.DOUBLE, 3, programs.plan_files()).bind(weights(programs.H))
    hidden, text, time, table = inputs(2)
    with pytest.raises(EngineError, match=r"text of plan double at width 1 is \(1, 3, 8\)"):
        bound([hidden, text[:1], time, table])


def test_what_has_no_kernel_on_the_gpu_is_named(engine: OnnxRuntimeEngine) -> None:
    Session.stray = "Gelu"
    kernel = engine.load(programs.DOUBLE, 0, programs.plan_files())
    with pytest.raises(
        EngineError, match=r"plan double at width 0\.25 .* Gelu in it would run on the CPU; use engine='torch'"
    ):
        kernel.bind(weights(4))(inputs(1))


def test_a_plan_that_does_not_load_is_named(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match="plan double at width 1"):
        engine.load(programs.DOUBLE, 3, dict.fromkeys(programs.plan_files(), b"rubbish"))


def test_a_session_on_the_cpu_is_refused(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="cannot load its CUDA provider"):
        engine.load(programs.DOUBLE, 3, programs.plan_files())


@pytest.mark.parametrize(
    "name", ["dit", pytest.param("flux", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow)]
)
def test_fixed_shapes_leave_no_arithmetic_on_sizes(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name).program
    for plan in program.manifest.plans:
        data = engines.plan_bytes(plan, 0, "onnx", program.files, "")
        assert "Shape" in _kinds(data, None)
        assert not _kinds(data, 3) & {"Shape", "Size", "NonZero"}


def _kinds(data: bytes, rows: int | None) -> set[str]:
    """Kinds of nodes when a session divides the graph among its providers, with any sizes or with these rows."""
    ort = ort_library.open_library()
    options = ort_library.session_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # the others come after
    made = onnx.load_from_string(data)
    for given in made.graph.input if rows else ():
        for size in given.type.tensor_type.shape.dim:
            if size.dim_param:
                options.add_free_dimension_override_by_name(size.dim_param, rows)
    kinds: set[str] = set()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for part in session.get_provider_graph_assignment_info():
        kinds |= {node.op_type for node in part.get_nodes()}
    return kinds


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (set(), r"onnxruntime-gpu is not installed: pip install '\.\[gpu\]'"),
        ({"onnxruntime"}, "onnxruntime is installed, which does not run on a GPU: pip uninstall onnxruntime"),
        ({"onnxruntime", "onnxruntime-gpu"}, "both installed"),
        ({"onnxruntime-gpu"}, "was built without CUDA"),
    ],
)
def test_what_is_installed_is_checked(installed: set[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in installed:
            return "1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ort_library.metadata, "version", version)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=message):
        engines.make(ENGINE)


def test_the_build_for_gpus_runs_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_library, "_installed", lambda name: name == "onnxruntime-gpu")
    assert engines.make("onnxruntime").name == "onnxruntime"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "open_library", ort_stand_in.library)
    assert not torch.cuda.is_available()
    with pytest.raises(EngineError, match="torch sees none here"):
        engines.make(ENGINE)
    with pytest.raises(EngineError, match="'onnxruntime-cuda' runs on a GPU"):
        engines.placed(ENGINE, programs.make())


def test_weights_and_routers_go_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = programs.make()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self.to("meta"))
    program = engines.placed(ENGINE, made)
    assert all(tensor.is_meta for tensor in (*program.weights.values(), *program.routers.values()))


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (None, "libonnxruntime_providers_cuda.so: cannot open shared object"),
        (b"no library" * 1000, "invalid ELF header"),
    ],
)
def test_the_linkers_own_reason_is_told(library: bytes | None, reason: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "capi").mkdir()
    if library is not None:
        (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(library)

    def register(*_: object) -> None:
        raise RuntimeError("CUDA Provider not available, can't get interface for it")

    tried: list[str] = []
    ort = SimpleNamespace(
        **vars(ort_stand_in.library(ort_library.GPU_BUILD))
        | {
            "__file__": str(tmp_path / "__init__.py"),
            "cuda_version": "13.0",
            "create_and_register_allocator_v2": register,
            "preload_dlls": lambda: tried.append("preload"),
        }
    )
    monkeypatch.setattr(ort_library, "_arenas", set())
    with pytest.raises(EngineError, match=rf"{reason}.*built for CUDA 13\.0 and cuDNN 9, torch .* for CUDA none"):
        ort_library.share_arena(ort, 0)
    assert tried == ["preload"]
    assert not ort_library._arenas


def test_an_arena_that_is_refused_is_told_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = ort_stand_in.library(ort_library.GPU_BUILD)
    ort.preload_dlls = lambda: None

    def register(*_: object) -> None:
        raise RuntimeError("an allocator exists")

    ort.create_and_register_allocator_v2 = register
    monkeypatch.setattr(ort_library, "_arenas", set())
    with pytest.warns(UserWarning, match="does not take our arena for GPU 0: an allocator exists"):
        ort_library.share_arena(ort, 0)


@pytest.mark.skipif(not ort_library._installed("onnxruntime-gpu"), reason="onnxruntime-gpu is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_onnxruntime_gpu_without_its_libraries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(EngineError, match=r"\.so\.\d+: cannot open shared object file"):
        engines.make(ENGINE)


def test_it_is_not_moved() -> None:
    compiled = CompiledTransformer(programs.make(("single",)), "torch")
    compiled._session.engine = ENGINE
    with pytest.raises(EditError, match="'onnxruntime-cuda' runs where it was loaded"):
        compiled._apply(lambda tensor: SimpleNamespace(is_meta=False, device="cuda:0", dtype=tensor.dtype))
