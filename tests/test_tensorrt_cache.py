"""Engines in a bundle: used where they are what is asked for, refused with both versions named where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import runtime.engines.tensorrt.run as engine_module
from runtime.base.errors import EngineError
from runtime.bundle import files as bundle
from runtime.engines.tensorrt import library as tensorrt_library
from runtime.engines.tensorrt.cache import Key, built, read, read_timings, write, write_timings
from runtime.engines.tensorrt.jobs import jobs, profiles_of
from runtime.engines.tensorrt.library import Library, Target
from runtime.face import load as loading
from tests import programs, tensorrt_cases

KEY = Key("tensorrt", "11.4.0", "NVIDIA H20", "9.0", "bfloat16", "single", 0.5, "graph", "shared")
PROFILES = profiles_of(programs.SINGLE)
PLACE = "engines/tensorrt-11.4.0-NVIDIA_H20-bfloat16/single-w050.engine"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    write(tmp_path, KEY, PROFILES, b"an engine", 1.5)
    return tmp_path


def test_what_was_written_is_read(kept: Path) -> None:
    data, record = read(kept, KEY)
    assert data == b"an engine"
    assert (record.key, record.profiles, record.bytes, record.seconds) == (KEY, PROFILES, 9, 1.5)
    assert sorted(p.name for p in (kept / PLACE).parent.iterdir()) == ["single-w050.engine", "single-w050.json"]
    assert list(built(kept)) == [record]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "11.5.0"}, r"tensorrt 11\.5\.0 .*holds engines of tensorrt 11\.4\.0 for NVIDIA H20"),
        ({"target": "NVIDIA L40S", "capability": "8.9"}, "for NVIDIA L40S .*holds engines of .* for NVIDIA H20"),
        ({"precision": "float16"}, "in float16.*holds engines of .* in bfloat16"),
        ({"library": "tensorrt-rtx"}, "tensorrt-rtx 11.4.0 for .*holds engines of tensorrt 11.4.0"),
        (
            {"weights": "packed", "block": "blocks.0", "constants": "c"},
            "with packed weights.*holds engines of .*shared weights.*--weights packed",
        ),
        ({"plan": "double"}, "holds no engine of plan double at width 0.5, tensorrt 11.4.0 .*weights: build"),
        ({"graph": "other"}, "graph was 'graph', is 'other'"),
        ({"capability": "10.0"}, "capability was '9.0', is '10.0'"),
    ],
)
def test_an_engine_from_or_for_something_else_is_not_used(kept: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(EngineError, match=f"(?s){said}") as raised:
        read(kept, replace(KEY, **change))
    assert f"edit-compile build {kept} --engine" in str(raised.value)


def test_packed_engines_are_bound_to_their_weights(tmp_path: Path) -> None:
    packed = replace(KEY, weights="packed", block="blocks.0", constants="sha256 of the weights")
    write(tmp_path, packed, PROFILES, b"an engine", 1.0)
    assert packed.place.endswith("single-w050-blocks.0.engine")
    with pytest.raises(EngineError, match="constants was"):
        read(tmp_path, replace(packed, constants="of others"))
    with pytest.raises(EngineError, match=r"at width 0\.5 of block blocks\.1"):
        read(tmp_path, replace(packed, block="blocks.1"))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("engine", b"an_engine", "sha256 differs"),
        ("engine", b"an engin", "another size"),
        ("json", b"{", "no record of its own"),
        ("json", b'{"key": 3}', "no record of its own"),
        ("json", b"\xff", "no record of its own"),
        ("json", None, "no record of its own"),
        ("engine", None, "holds no engine of plan single"),
    ],
)
def test_a_damaged_engine_is_not_used(kept: Path, name: str, data: bytes | None, said: str) -> None:
    place = (kept / PLACE).with_suffix(f".{name}")
    if data is None:
        place.unlink()
    else:
        place.write_bytes(data)
    with pytest.raises(EngineError, match=said):
        read(kept, KEY)


def test_a_link_that_leaves_the_bundle_is_refused(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.engine"
    (kept / PLACE).rename(outside)
    (kept / PLACE).symlink_to(outside)
    with pytest.raises(EngineError, match="leaves the bundle"):
        read(kept, KEY)


def test_no_name_leaves_the_bundle(tmp_path: Path) -> None:
    strange = replace(KEY, plan="../../x", target="a/../b", block="..\\c")
    write(tmp_path / "bundle", strange, PROFILES, b"an engine", 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
    assert read(tmp_path / "bundle", strange)[0] == b"an engine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "engines").symlink_to(tmp_path)
    with pytest.raises(EngineError, match="leaves the bundle"):
        write(tmp_path / "other", KEY, PROFILES, b"an engine", 1.0)


def test_a_write_that_is_interrupted_leaves_no_engine(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(kept, KEY, PROFILES, b"a newer one", 1.0)
    with pytest.raises(EngineError, match="another size"):
        read(kept, KEY)
    assert len(list((kept / PLACE).parent.iterdir())) == 2


def test_timings_are_kept_beside_the_engines(kept: Path) -> None:
    assert read_timings(kept, KEY) == b""
    write_timings(kept, KEY, b"")
    assert read_timings(kept, KEY) == b""
    write_timings(kept, KEY, b"measured")
    assert read_timings(kept, replace(KEY, plan="double")) == b"measured"
    assert read_timings(kept, replace(KEY, version="12")) == b""


def test_a_bundle_with_engines_is_read_as_before(tmp_path: Path) -> None:
    path = tensorrt_cases.saved(tmp_path, "float32")
    write(path, KEY, PROFILES, b"an engine", 1.0)
    program = bundle.load(path)
    assert program.folder == path
    assert not any(name.startswith("engines/") for name in program.files)
    bundle.save(program, path)
    assert not (path / "engines").exists()


def test_the_key_follows_graph_width_and_weights(tmp_path: Path) -> None:
    library, target = Library("tensorrt", "11.4.0", None), Target("NVIDIA H20", "9.0")
    program = bundle.load(tensorrt_cases.saved(tmp_path, "bfloat16"))
    for weights, count in (("shared", 8), ("packed", 8)):
        keys = [job.key for job in jobs(program, library, (target,), weights)]
        assert len({key.place for key in keys}) == len({key.graph for key in keys}) == count
        assert {(key.precision, key.weights, key.target) for key in keys} == {("bfloat16", weights, "NVIDIA H20")}
        assert all(bool(key.constants) == (weights == "packed") for key in keys)


def test_engines_of_another_gpu_are_refused_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tensorrt_cases.saved(tmp_path, "float32")
    write(path, replace(KEY, precision="float32"), PROFILES, b"an engine", 1.0)
    api = SimpleNamespace(
        Runtime=lambda logger: None,
        ILogger=type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)}),
    )
    monkeypatch.setattr(engine_module, "open_library", lambda name: Library(name, "11.4.0", api))
    for module in (engine_module, tensorrt_library):
        monkeypatch.setattr(module, "gpu_here", lambda: Target("NVIDIA H100", "9.0"))
    program = bundle.load(path)
    loaded = engine_module.TensorRTEngine("tensorrt", program)
    with pytest.raises(EngineError, match=r"for NVIDIA H100 .*holds engines of tensorrt 11\.4\.0 for NVIDIA H20"):
        loaded.load(programs.SINGLE, 1, program.files)


def test_a_cpu_runs_a_bundle_with_engines_only_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "model.edit"
    bundle.save(programs.make(), path)
    assert loading.load(path).engine == "onnxruntime"
    write(path, replace(KEY, library="tensorrt-rtx", target="sm_120"), PROFILES, b"an engine", 1.0)
    with pytest.raises(EngineError, match=r"engine 'tensorrt-rtx' runs on a GPU.*'onnxruntime'"):
        loading.load(path)
    given = programs.inputs(2)
    assert loading.load(path, engine="onnxruntime")(**given).sample.isfinite().all()


def test_the_engine_for_the_gpu_here_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, target, capability in (("tensorrt-rtx", "sm_120", "12.0"), ("tensorrt", "NVIDIA H20", "9.0")):
        key = replace(KEY, library=library, target=target, capability=capability, weights="packed", block="b")
        write(tmp_path, key, PROFILES, b"an engine", 1.0)
    monkeypatch.setattr(loading, "gpu_here", lambda: Target("NVIDIA RTX 5090", "12.0"))
    assert loading.built_engine(tmp_path) == "tensorrt-rtx-packed"
    monkeypatch.setattr(loading, "gpu_here", lambda: Target("NVIDIA H20", "9.0"))
    assert loading.built_engine(tmp_path) == "tensorrt-packed"
