"""What onnxruntime does with a hostile plan as it opens it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.base.errors import EngineError
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
