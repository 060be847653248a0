"""What onnxruntime does with a hostile plan as it opens it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.base.errors import BundleError, EngineError
from runtime.bundle import limits
from runtime.bundle.onnx_reader import read_onnx
from runtime.bundle.spec import plan_file
from runtime.engines import make
from runtime.engines.ort_library import open_library, session_options
from tests import programs


def test_a_plan_in_onnxruntimes_own_format_is_not_opened(tmp_path: Path) -> None:
    """One file may be of both formats: our reader would look at the ONNX, and onnxruntime run the other."""
    program = programs.make(("single",))
    plan = program.manifest.plans[0]
    name = plan_file(plan, 0, "onnx")
    engine = make("onnxruntime", program)  # first: it makes the pool of threads that all sessions share
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.optimized_model_filepath = str(tmp_path / "plan.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(program.files[name], options, providers=["CPUExecutionProvider"])
    own = (tmp_path / "plan.ort").read_bytes()
    assert own[4:8] == b"ORTM"
    engine.load(plan, 0, program.files)
    with pytest.raises(EngineError, match="does not run plan"):
        engine.load(plan, 0, {**program.files, name: own})


def test_large_tensors_are_not_computed_while_a_session_is_opened(tmp_path: Path) -> None:
    """A few nodes that double a constant make one of any size, of which no size is written down."""
    doublings = 25  # 128 MiB
    nodes = [helper.make_node("Concat", [f"c{k}", f"c{k}"], [f"c{k + 1}"], axis=0) for k in range(doublings)]
    nodes += [
        helper.make_node("ReduceSum", [f"c{doublings}"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    start = numpy_helper.from_array(np.ones(1, np.float32), "c0")
    graph = helper.make_graph(nodes, "g", [given], [made], [start])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = session_options(open_library())
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert (tmp_path / "opened.onnx").stat().st_size < 100 << 20
    left = [node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node]
    assert "Concat" in left and left.count("Concat") < doublings, "small constants are computed"


INNERMOST = helper.make_graph([helper.make_node("Neg", ["x"], ["w"])], "innermost", [], [onnx.ValueInfoProto(name="w")])


def within(kind: str, *nodes: onnx.NodeProto) -> bytes:
    """A model of one operator `kind` with a graph of `nodes` within it, for each of its branches."""
    names = {"If": ("then_branch", "else_branch")}.get(kind, ("body",))
    given, made = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]), onnx.ValueInfoProto(name="z")
    branch = helper.make_graph(nodes, "within", [], [made])
    first = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "huge")
    outer = helper.make_node(kind, ["x"], ["y"], **dict.fromkeys(names, branch))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_model(helper.make_graph([outer], "g", [given], [output], [first])).SerializeToString()


def test_graphs_within_a_graph_that_end_are_read() -> None:
    for kind in ("If", "SequenceMap"):
        graph = read_onnx(within(kind, helper.make_node("Neg", ["x"], ["z"])), "plan")
        assert (list(graph.inputs), list(graph.outputs)) == (["x"], ["y"])


@pytest.mark.parametrize(
    ("kind", "inner", "why"),
    [
        ("Loop", helper.make_node("Neg", ["x"], ["z"]), "a graph within its graph"),
        ("Scan", helper.make_node("Neg", ["x"], ["z"]), "a graph within its graph"),
        ("If", helper.make_node("RandomNormal", [], ["z"], shape=[4]), "draws random numbers"),
        ("If", helper.make_node("Strange", ["x"], ["z"], domain="com.example"), "domain"),
        ("SequenceMap", helper.make_node("ConstantOfShape", ["huge"], ["z"]), "ConstantOfShape of more than"),
        ("SequenceMap", helper.make_node("SequenceMap", ["x"], ["z"], body=INNERMOST), "a graph within its graph"),
    ],
)
def test_graphs_within_a_graph_are_held_to_its_rules(kind: str, inner: onnx.NodeProto, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        read_onnx(within(kind, inner), "plan")


def test_nodes_of_graphs_within_a_graph_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODES", 6)
    nodes = [helper.make_node("Neg", ["x"], [f"z{number}"]) for number in range(3)]
    with pytest.raises(BundleError, match="more than 6 nodes"):
        read_onnx(within("If", *nodes), "plan")
