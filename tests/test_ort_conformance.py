"""Every name of onnxruntime that our source uses, against the library that is installed: misspelt, each is noticed.

Names in the module are looked up; methods are called, on the CPU provider in the GPU's place. Entries of sessions, runs
and providers are ignored by onnxruntime where it does not know them: they are looked for in its files.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx.parser
import onnxruntime
import pytest
import torch

from runtime.engines import ort, ort_library
from tests import ort_stand_in, programs
from tests.test_engine_plans import inputs, weights

MODULES = (ort_library, ort)
SOURCES = {module.__name__: Path(module.__file__).read_text() for module in MODULES}
PACKAGE = Path(onnxruntime.__file__).parent
INSTANCES = (
    onnxruntime.SessionOptions,
    onnxruntime.RunOptions,
    onnxruntime.InferenceSession,
    onnxruntime.IOBinding,
    onnxruntime.OrtEpAssignedSubgraph,
    onnxruntime.OrtEpAssignedNode,
    onnxruntime.NodeArg,
)
ONLY_IN_GPU_BUILDS = ("use_tf32", "user_compute_stream")


def chains(source: str) -> set[str]:
    """Dotted names in the module, as in "OrtMemType.DEFAULT"; instances of its classes are not followed."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            match = re.fullmatch(r"(?:\w+\.)*?(?:ort|_ort|onnxruntime)((?:\.\w+)+)", text)
            if match:
                found.add(match[1][1:])
    return found


def absent(source: str) -> set[str]:
    """Those that the module has not."""
    return {name for name in chains(source) if not _has(onnxruntime, name.split("."))}


def entries(source: str) -> set[str]:
    """Keys in the forms that onnxruntime's entries and its providers' options have."""
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    options = re.findall(r'^ {12}"(\w+)": ', source, re.M)
    return {t for t in texts if isinstance(t, str) and re.fullmatch(r"session\.\w+|disable_\w+", t)} | set(options)


def unknown(source: str) -> set[str]:
    """Those that are nowhere in onnxruntime's files."""
    return {key for key in entries(source) if not _in_files(key)}


def scenario(sources: dict[str, str]) -> None:
    """Both engines made of `sources` run a plan; the one for GPUs once more where it may not run all of it."""
    made: dict[str, ModuleType] = {}
    for name, source in sources.items():
        made[name] = _module(name, source, made)
    library = made[ort_library.__name__]
    library._library = None  # type: ignore[attr-defined]
    files, given, own = programs.plan_files(), inputs(2), weights(programs.H)
    cuda = made[ort.__name__]
    cuda.OnnxRuntimeEngine("onnxruntime").load(programs.DOUBLE, 3, files).bind(own)(given)
    vars(cuda).update(ort_stand_in.replacements())
    cuda.torch = _torch_with_a_gpu()  # type: ignore[attr-defined]
    engine: Any = cuda.OnnxRuntimeEngine("onnxruntime-cuda")
    engine.provider.device = torch.device("cpu")
    engine.load(programs.DOUBLE, 3, files).bind(own)(given)
    ort_stand_in.Session.stray = "Gelu"
    try:
        with pytest.raises(cuda.EngineError, match="Gelu in it would run on the CPU;"):
            engine.load(programs.DOUBLE, 3, files).bind(own)(given)
    finally:
        ort_stand_in.clear()


def test_the_module_has_what_we_use() -> None:
    for name, source in SOURCES.items():
        assert not absent(source), name
    found = set().union(*map(chains, SOURCES.values()))
    expected = {"OrtAllocatorType.ORT_ARENA_ALLOCATOR", "OrtArenaCfg", "RunOptions", "create_and_register_allocator_v2"}
    assert expected <= found


def test_entries_and_options_are_known() -> None:
    for name, source in SOURCES.items():
        assert not unknown(source), name
    found = set().union(*map(entries, SOURCES.values()))
    assert {"session.disable_cpu_ep_fallback", "disable_synchronize_execution_providers", "device_id"} <= found
    assert found.issuperset(ONLY_IN_GPU_BUILDS)
    assert ort_library.CUDA in onnxruntime.get_all_providers()


def test_methods_take_what_we_give() -> None:
    scenario(SOURCES)


def test_types_have_the_numbers_that_onnx_gives_them() -> None:
    for dtype, number in ort.ELEMENTS.items():
        name = {"float32": "FLOAT", "float64": "DOUBLE"}.get(str(dtype)[6:], str(dtype)[6:].upper())
        assert number == onnx.TensorProto.DataType.Value(name)


def test_bfloat16_is_bound_by_its_number() -> None:
    text = '<ir_version: 8, opset_import: ["" : 20]> g (bfloat16[n] hidden) => (float[n] state_0) '
    data = onnx.parser.parse_model(text + "{ state_0 = Cast<to = 1>(hidden) }").SerializeToString()
    options = ort_library.session_options(ort_library.open_library())
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    state = torch.zeros(2)
    binding = session.io_binding()
    given = torch.tensor([1.5, -2.0]).bfloat16()
    ort.bind(binding.bind_input, {"hidden": given})
    ort.bind(binding.bind_output, {"state_0": state})
    session.run_with_iobinding(binding)
    assert state.tolist() == [1.5, -2.0]


def test_every_name_misspelt_is_noticed() -> None:
    members = {name for owner in INSTANCES for name in dir(owner) if not name.startswith("__")}
    used = {
        node.attr
        for source in SOURCES.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in members
    }
    assert {"add_free_dimension_override_by_name", "bind_input", "io_binding", "get_nodes", "op_type"} <= used
    used -= {"name", "shape", "session"}  # of other things too
    unnoticed = []
    for name in sorted(
        used | {part for source in SOURCES.values() for one in chains(source) for part in one.split(".")}
    ):
        changed = {key: re.sub(rf"\.{name}\b", f".{name}x", source) for key, source in SOURCES.items()}
        if not any(map(absent, changed.values())) and _runs(changed):
            unnoticed.append(name)
    assert not unnoticed


def test_every_entry_misspelt_is_noticed() -> None:
    for source in SOURCES.values():
        for key in entries(source):
            assert unknown(source.replace(f'"{key}"', f'"{key}x"')) == {f"{key}x"}


def _runs(sources: dict[str, str]) -> bool:
    try:
        scenario(sources)
    except (Exception, pytest.fail.Exception):
        return False
    return True


def _module(name: str, source: str, others: dict[str, ModuleType]) -> ModuleType:
    """A module of `source` that imports `others` in place of the modules of their names."""
    made = ModuleType(name)
    with pytest.MonkeyPatch.context() as patch:
        for other, module in others.items():
            patch.setitem(sys.modules, other, module)
        exec(compile(source, name, "exec"), vars(made))
    return made


def _torch_with_a_gpu() -> ModuleType:
    made = ModuleType("torch")
    made.__dict__.update(vars(torch))
    made.cuda = ModuleType("cuda")  # type: ignore[attr-defined]
    made.cuda.__dict__.update(is_available=lambda: True, current_device=lambda: 0)
    return made


@functools.cache
def _files() -> bytes:
    """The library itself, that of its CUDA provider where it has one, and the tools that come with it."""
    found = [*PACKAGE.glob("capi/*.so*"), *PACKAGE.glob("transformers/**/*.py")]
    return b"".join(path.read_bytes() for path in found)


def _in_files(key: str) -> bool:
    """Whether it stands there as a whole text, of C or of Python."""
    return f"{key}\0".encode() in _files() or f'"{key}"'.encode() in _files()


def _has(owner: Any, path: list[str]) -> bool:
    for name in path:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
