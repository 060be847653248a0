"""Every name and keyword of TensorRT that our source uses, against TensorRT 11's own bindings and TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import runtime.engines
from runtime.engines.tensorrt import build as tensorrt_build
from tests.tensorrt_api import Api, describe, stand_ins
from tests.tensorrt_uses import uses_of

SOURCES = sorted(Path(runtime.engines.__file__).parent.glob("tensorrt/*.py"))
AHEAD_OF_TIME = (
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
)
"""What TensorRT-RTX alone has; used where `Library.ahead_of_time`."""


@pytest.fixture(scope="session")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Api:
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt_cu13_bindings is not installed (see the Makefile)")
    try:
        libraries = stand_ins(tmp_path_factory.mktemp("entries"))
    except OSError as error:
        pytest.skip(f"TensorRT's bindings need stand-ins for its libraries, which take a C compiler: {error}")
    return describe("tensorrt_bindings", *libraries)


@pytest.fixture(scope="session")
def rtx() -> Api:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx_cu13 is not installed (see the Makefile)")
    return describe("tensorrt_rtx")


def test_tensorrt_11_has_what_we_use(eleven: Api) -> None:
    assert eleven.version.startswith("11.")
    uses = uses_of(eleven, *SOURCES)
    told = [one for one in uses.wrong if not any(one.endswith(_absent(name)) for name in AHEAD_OF_TIME)]
    assert not told
    assert len(uses.found) > 60
    for name in ("OnnxParser.parse", "IConstantLayer.get_output", "ITensor.is_network_input", "ParserError.desc"):
        assert name in uses.found, f"{name} is no longer followed: the types before it are lost"
    for name in ("ICudaEngine.device_memory_size_v2", "IExecutionContext.execute_async_v3", "ITimingCache.serialize"):
        assert name in uses.found, f"{name} is no longer followed: the types before it are lost"


def test_tensorrt_rtx_has_what_we_use(rtx: Api) -> None:
    uses = uses_of(rtx, *SOURCES)
    assert not uses.wrong
    assert uses.found.issuperset(AHEAD_OF_TIME)


def test_both_know_the_types_of_weights(eleven: Api, rtx: Api) -> None:
    for api in (eleven, rtx):
        assert api.classes["DataType"].keys() >= set(tensorrt_build._TYPES.values())


def test_every_name_misspelt_is_noticed(eleven: Api) -> None:
    sources = [path.read_text() for path in SOURCES]
    before = uses_of(eleven, *sources)
    own = {"name", "__init__", "__members__", "log"}  # names of other things too, or of every class
    names = {use.rpartition(".")[2] for use in before.found} - own
    for name in sorted(names - {one.rpartition(".")[2] for one in AHEAD_OF_TIME}):
        changed = [text.replace(f".{name}", f".{name}x").replace(f"def {name}(", f"def {name}x(") for text in sources]
        assert set(uses_of(eleven, *changed).wrong) - set(before.wrong), f"{name} misspelt goes unnoticed"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ignore_mismatch=False", "ignore_mismatches=False"),
        ("min=one.least", "minimum=one.least"),
        (", max=one.most", ""),
        ("parser.parse(onnx)", "parser.parse(onnx, None, 3)"),
        ("trt.Builder(logger)", "trt.Builder()"),
        ("def step_complete(self, phase_name: str, step: int)", "def step_complete(self, step: int)"),
        ("own.data_ptr(), own.numel())", "own.data_ptr())"),
    ],
)
def test_wrong_arguments_are_noticed(eleven: Api, right: str, wrong: str) -> None:
    source = Path(tensorrt_build.__file__).read_text()
    assert right in source
    before = uses_of(eleven, source).wrong
    assert set(uses_of(eleven, source.replace(right, wrong)).wrong) - set(before)


def _absent(name: str) -> str:
    owner, _, member = name.rpartition(".")
    return f"{owner} has no {member}" if owner else f"there is no {name}"
