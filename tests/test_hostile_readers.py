"""What reads the files of a bundle gives one kind of error for whatever is in them."""

from __future__ import annotations

import copy
import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.export import Dim

import edit_compile
from edit_compile import ScheduledPolicy
from runtime.base.errors import BundleError
from runtime.bundle import archive as pt2
from runtime.bundle import files as bundle
from runtime.bundle.graph_reader import _DTYPES, read_graph
from runtime.bundle.onnx_reader import _TYPES, read_onnx
from runtime.bundle.operators import ARITHMETIC, find, refusal
from tests import forged, programs
from tests.models import tiny_plain

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner), max_leaves=20
)
SMALL = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    with zipfile.ZipFile(BytesIO(programs.plan_files()["plans/double-w100.pt2"])) as archive:
        name = next(one for one in archive.namelist() if one.endswith("models/model.json"))
        return json.loads(archive.read(name))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "model.edit"
    bundle.save(programs.make(("single",)), path)
    return path


def places(value: Any) -> list[tuple[Any, Any]]:
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


@SMALL
@given(st.data(), JSON)
def test_a_graph_of_any_json_is_read_or_refused(graph: dict[str, Any], data: st.DataObject, other: Any) -> None:
    changed = copy.deepcopy(graph)
    holder, key = data.draw(st.sampled_from(places(changed["graph_module"]["graph"])))
    holder[key] = other
    for program in (changed, other):
        try:
            read_graph(program, "plans/x.pt2", None)
        except BundleError as error:
            assert "plans/x.pt2" in str(error)


@SMALL
@given(st.data(), JSON)
def test_a_manifest_of_any_json_is_read_or_refused(saved: Path, data: st.DataObject, other: Any) -> None:
    whole = (saved / "manifest.json").read_bytes()
    changed = json.loads(whole)
    holder, key = data.draw(st.sampled_from(places(changed)))
    holder[key] = other
    try:
        (saved / "manifest.json").write_text(json.dumps(changed))
        forged.seal(saved)
        bundle.load(saved)
    except BundleError as error:
        assert str(saved) in str(error) or "manifest.json" in str(error)
    finally:
        (saved / "manifest.json").write_bytes(whole)
        forged.seal(saved)


@SMALL
@given(st.binary(max_size=300), st.integers(min_value=0), st.integers(min_value=0, max_value=40))
def test_an_onnx_file_of_any_bytes_is_read_or_refused(put: bytes, at: int, gone: int) -> None:
    whole = programs.plan_files()["plans/double-w100.onnx"]
    at %= len(whole)
    for data in (put, whole[:at] + put + whole[at + gone :]):
        try:
            read_onnx(data, "plans/x.onnx")
        except BundleError as error:
            assert "plans/x.onnx" in str(error)


@pytest.mark.parametrize(
    ("target", "args", "told"),
    [
        ("aten.relu_.default", (), "writes into its arguments"),
        ("aten.add.out", (), "writes into its arguments"),
        ("aten.randn.default", (), "random"),
        ("aten.native_dropout.default", (None, 0.0, True), "random"),
        ("aten.dropout.default", (None, 0.5, False), None),
        ("aten.scaled_dot_product_attention.default", (None, None, None), None),
        ("aten.scaled_dot_product_attention.default", (None, None, None, None, 0.1), "random"),
        ("aten.batch_norm.default", ("x", None, None, "mean", "var", False), None),
        ("aten.batch_norm.default", ("x", None, None, "mean", "var", True), "running statistics"),
        ("aten.native_batch_norm.default", ("x", None, None, "mean", "var", True), "running statistics"),
        ("aten.instance_norm.default", ("x", None, None, None, None, True), None),
        ("aten.from_file.default", (), "memory"),
        ("aten.manual_seed.default", (), "for what it does"),
        ("aten._print.default", (), "for what it does"),
        ("aten.mul.int", (), "for what it does"),
        ("aten._assert_scalar.default", (), None),
        ("aten.zeros.default", ([1 << 16, 1 << 16],), "more than"),
        ("aten.zeros.default", ([1 << 12, 1 << 12],), None),
        ("aten.arange.default", (1e12,), "more than"),
        ("aten.slice.Tensor", (None, 0, 0, (1 << 63) - 1), None),
        ("aten.view.default", (None, [-1, 1 << 40]), "more than"),
    ],
)
def test_operators_that_do_more_than_compute_are_known(target: str, args: Any, told: str | None) -> None:
    called = find(f"torch.ops.{target}")
    why = "is not there" if called is None else refusal(called, args)
    assert why is None if told is None else told in (why or "")


def test_what_would_not_load_is_not_written() -> None:
    class Seeds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    exported = torch.export.export(Seeds(), (torch.ones(2, 2),), dynamic_shapes=({0: Dim.AUTO},)).run_decompositions({})
    with pytest.raises(BundleError, match=r"randn_like.*random"):
        pt2.dump(exported)


class Peeks(torch.nn.Module):
    """A block that reads memory by strides."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        after = self.block(x, *rest)
        return after + torch.as_strided(after, after.shape, after.stride()) * 0


class Narrow(torch.nn.Module):
    """A block that holds a scale in eight bits."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("scale", torch.full((32,), 0.5).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return x + (self.block(x, *rest) - x) * self.scale.to(x.dtype)


def test_weights_of_eight_bits_are_read(tmp_path: Path) -> None:
    model, inputs = tiny_plain()
    model.layers[0] = Narrow(model.layers[0])
    full = ScheduledPolicy(np.ones((1, 3)), routed=False)
    edit_compile.compile(model.eval(), inputs=inputs, engine="torch", policy=full, output=tmp_path / "model.edit")
    loaded = edit_compile.load(tmp_path / "model.edit", engine="torch")
    assert torch.float8_e4m3fn in {weight.dtype for weight in loaded.program.weights.values()}
    torch.testing.assert_close(loaded(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)


def test_the_numbers_of_dtypes_are_those_of_the_formats() -> None:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE as exported

    assert {number: exported[number] for number in _DTYPES} == _DTYPES
    for number, name in _TYPES.items():
        told = onnx.TensorProto.DataType.Name(number).lower().replace("_", "")
        assert told in {name.replace("_", ""), name.replace("float32", "float").replace("float64", "double")}


def test_a_block_whose_graph_would_be_refused_is_left_alone_with_the_reason() -> None:
    model, inputs = tiny_plain()
    model.layers[1] = Peeks(model.layers[1])
    found = edit_compile.compile(model.eval(), inputs=inputs, dry_run=True)
    assert "as_strided.default may read memory that is not its input's, which no bundle may hold" in str(found)


class Squares(torch.nn.Module):
    """`inner`, and the squares of what it adds, as complex numbers: exports hold torch's private _conj."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        added = self.inner(x, *rest) - x
        z = torch.view_as_complex(added.unflatten(-1, (-1, 2)).contiguous())
        return x + added + torch.view_as_real(z * z.conj()).flatten(-2)


@pytest.mark.parametrize("place", ["layers.1", "head"])
def test_conjugates_are_refused_neither_in_a_block_nor_in_the_glue(place: str, tmp_path: Path) -> None:
    model, inputs = tiny_plain()
    if place == "head":
        model.head = torch.nn.Sequential(Squares(torch.nn.Linear(32, 32)), model.head)
    else:
        model.layers[1] = Squares(model.layers[1])
    full = ScheduledPolicy(np.ones((1, 3)), routed=False)
    edit_compile.compile(model.eval(), inputs=inputs, engine="torch", policy=full, output=tmp_path / "model.edit")
    loaded = edit_compile.load(tmp_path / "model.edit", engine="torch")
    assert len(loaded.program.manifest.blocks) == 3
    torch.testing.assert_close(loaded(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)


class Rotated(torch.nn.Module):
    """`inner`, turned by a table of complex numbers in double precision, which no file of weights can hold."""

    def __init__(self, inner: torch.nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("table", torch.polar(*torch.rand(2, channels // 2, dtype=torch.float64)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        z = torch.view_as_complex(made.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * self.table).flatten(-2).to(made.dtype)


def test_complex_weights_of_the_glue_are_written_in_any_precision(tmp_path: Path) -> None:
    model, inputs = tiny_plain()
    model.embed = Rotated(model.embed, 32)
    full = ScheduledPolicy(np.ones((1, 3)), routed=False)
    edit_compile.compile(model.eval(), inputs=inputs, engine="torch", policy=full, output=tmp_path / "model.edit")
    loaded = edit_compile.load(tmp_path / "model.edit", engine="torch")
    torch.testing.assert_close(loaded(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)


def test_memory_that_was_not_written_reads_as_zeros() -> None:
    class Fresh(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.empty_like(x)

    graph = pt2.load(pt2.dump(torch.export.export(Fresh(), (torch.ones(64, 64),)).run_decompositions({})))
    torch.full((64, 64), 7.0)  # leaves its memory to the next
    assert torch.equal(graph(torch.ones(64, 64))[0], torch.ones(64, 64))


def test_a_program_that_would_not_load_leaves_what_was_there(saved: Path) -> None:
    program = programs.make(("single",))
    files = {**program.files, "plans/single-w050.pt2": b"x"}
    with pytest.raises(BundleError, match=r"plans/single-w050\.pt2"):
        bundle.save(type(program)(program.manifest, program.weights, program.routers, files), saved)
    bundle.load(saved)


def test_arithmetic_on_sizes_is_pure() -> None:
    assert all(refusal(called) is None for called in ARITHMETIC.values())
