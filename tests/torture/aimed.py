"""Aimed attacks on a bundle, each with what has to become of it: refused by name, or another that a pin tells apart."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file

from tests import forged
from tests.torture.mutations import with_graph

GLUE, PLAN, ONNX = "glue/a.pt2", "plans/single-w100.pt2", "plans/single-w100.onnx"


@dataclass(frozen=True)
class Attack:
    """What is changed in a bundle's folder, and the outcome that is right (`harness.Outcome.kind`)."""

    change: Callable[[Path], object]
    outcome: str = "refused"


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def call(target: str, *args: Any, output: str | None = "forged", **kwargs: Any) -> dict[str, Any]:
    """A node of a graph's JSON."""
    inputs = [{"name": "", "arg": arg, "kind": 1} for arg in args]
    inputs += [{"name": name, "arg": arg, "kind": 2} for name, arg in kwargs.items()]
    outputs = [] if output is None else [tensor(output)]
    return {"target": f"torch.ops.{target}", "inputs": inputs, "outputs": outputs, "metadata": {}}


def calls(*nodes: dict[str, Any], name: str = PLAN) -> Attack:
    """Nodes before all others, where "@" stands for the last input of the graph, and "#" for its first, a weight."""

    def change(folder: Path) -> None:
        def put(graph: Any) -> None:
            inner = graph["graph_module"]["graph"]
            first, last = (inner["inputs"][at]["as_tensor"]["name"] for at in (0, -1))
            text = json.dumps(list(nodes)).replace('"@"', json.dumps(last)).replace('"#"', json.dumps(first))
            inner["nodes"] = json.loads(text) + inner["nodes"]

        with_graph(folder, name, put)

    return Attack(change)


def arithmetic(*steps: tuple[str, Any]) -> Attack:
    """Steps ``(operator, other argument)`` on the size of an input, each on what the last gave ("@": itself)."""
    nodes = [call("aten.sym_size.int", tensor("@"), {"as_int": 0})]
    nodes[0]["outputs"] = [{"as_sym_int": {"as_name": "n0"}}]
    for number, (name, other) in enumerate(steps):
        own = {"as_sym_int": {"as_name": f"n{number}"}}
        node = call("x", own, own if other == "@" else {"as_sym_int": {"as_int": other}})
        node |= {"target": f"_operator.{name}", "outputs": [{"as_sym_int": {"as_name": f"n{number + 1}"}}]}
        nodes.append(node)
    return calls(*nodes)


def manifest(change: Callable[[Any], object], outcome: str = "refused") -> Attack:
    """A change of the parsed manifest."""
    return Attack(lambda folder: forged.put_manifest(folder, change), outcome)


def member(name: str, data: bytes, how: int = zipfile.ZIP_STORED) -> Attack:
    """One more member in a graph's archive, or another in the place of one."""

    def change(folder: Path) -> None:
        made = io.BytesIO()
        with zipfile.ZipFile(folder / PLAN) as source, zipfile.ZipFile(made, "w") as target:
            root = source.namelist()[0].partition("/")[0]
            for one in source.namelist():
                if one != f"{root}/{name}":
                    target.writestr(one, source.read(one))
            target.writestr(f"{root}/{name}", data, how)
        forged.put_file(folder, PLAN, made.getvalue())

    return Attack(change)


def model(change: Callable[[Any], object]) -> Attack:
    """A change of a plan's ONNX model."""

    def attack(folder: Path) -> None:
        made = onnx.load_from_string((folder / ONNX).read_bytes())
        change(made)
        forged.put_file(folder, ONNX, made.SerializeToString())

    return Attack(attack)


def node(kind: str, inputs: list[str] = ["hidden"], **known: Any) -> Attack:  # noqa: B006
    """One more node in a plan's ONNX model."""
    return model(lambda made: made.graph.node.append(onnx.helper.make_node(kind, inputs, ["forged"], **known)))


def external(made: Any) -> None:
    table = onnx.helper.make_tensor("table", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    table.ClearField("float_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "secret", "offset": "0", "length": "16"}.items():
        table.external_data.add(key=key, value=value)
    made.graph.initializer.append(table)
    made.graph.node.append(onnx.helper.make_node("Identity", ["table"], ["forged"]))


def loops(made: Any) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    made.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["forged"], body=body))


def sized(made: Any) -> None:
    made.graph.initializer.append(onnx.helper.make_tensor("huge", onnx.TensorProto.INT64, [2], [1 << 20, 1 << 20]))
    made.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["huge"], ["forged"]))


def functions(made: Any) -> None:
    made.functions.append(onnx.helper.make_function("", "Relu", ["x"], ["y"], [], made.opset_import))


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    """A change of a file of tensors."""

    def attack(folder: Path) -> None:
        made = {key: one.clone() for key, one in load_file(folder / name).items()}
        change(made)
        save_file(made, folder / "made")
        data = (folder / "made").read_bytes()
        (folder / "made").unlink()
        forged.put_file(folder, name, data)

    return Attack(attack)


def data(name: str, change: Callable[[bytes], bytes]) -> Attack:
    """Other bytes in a file."""
    return Attack(lambda folder: forged.put_file(folder, name, change((folder / name).read_bytes())))


def place(name: str, put: Callable[[Path], object]) -> Attack:
    """Something else in the place of a file."""

    def attack(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return Attack(attack)


def swapped(folder: Path, one: str, other: str) -> None:
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    forged.put_file(folder, one, second)
    forged.put_file(folder, other, first)


def unsealed(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"threshold": 0.5', '"threshold": 0.6'))


def without_routers(made: Any) -> None:
    del made["files"]["routers.safetensors"]
    made["router"] = None


INT, FLOAT = {"as_int": 1}, {"as_float": 0.5}
X, W = tensor("@"), tensor("#")
HUGE = {"as_ints": [1 << 20, 1 << 20]}
TRUE = {"as_bool": True}
DEEP = b'"config": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b","
NONE = {"as_none": True}
WIDE = {"as_int": 1 << 40}
SCHEDULE = {"policy": {"kind": "schedule", "table": [[1.0]], "routed": False, "beyond": "compute"}}

ATTACKS: dict[str, Attack] = {
    "a seed set anew": calls(call("aten.manual_seed.default", INT, output=None)),
    "gradients switched on": calls(call("aten.set_grad_enabled.default", TRUE, output=None)),
    "an input written into": calls(call("aten.add_.Tensor", X, X), name=PLAN),
    "the caller's input written into": calls(call("aten.mul_.Scalar", X, FLOAT), name=GLUE),
    "a weight that drifts": calls(call("aten.mul_.Scalar", W, FLOAT)),
    "a weight written out": calls(call("aten.add.out", W, W, out=W)),
    "a copy into an input": calls(call("aten.copy_.default", X, X)),
    "random numbers": calls(call("aten.rand_like.default", X)),
    "random bits": calls(call("aten.bernoulli.p", X, FLOAT)),
    "dropout": calls(call("aten.dropout.default", X, FLOAT, TRUE)),
    "dropout by default": calls(call("aten.native_dropout.default", X, FLOAT, NONE)),
    "attention with dropout": calls(
        call("aten.scaled_dot_product_attention.default", X, X, X, NONE, FLOAT),
    ),
    "statistics written": calls(call("aten.batch_norm.default", X, NONE, NONE, W, W, TRUE, FLOAT, FLOAT, TRUE)),
    "statistics not declared as written": calls(
        call("aten.native_batch_norm.default", X, NONE, NONE, W, W, TRUE, FLOAT, FLOAT)
    ),
    "a file read": calls(call("aten.from_file.default", {"as_string": "/etc/passwd"}, TRUE, INT)),
    "a file written": calls(call("aten.save.default", X, {"as_string": "harm"}, output=None)),
    "text on the screen": calls(call("aten._print.default", {"as_string": "harm"}, output=None)),
    "a warning": calls(call("aten.warn.default", {"as_string": "harm"}, INT, output=None)),
    "another tensor's memory": calls(call("aten.set_.source_Tensor", W, X)),
    "an input resized": calls(call("aten.resize_.default", X, {"as_ints": [9]})),
    "memory beside an input": calls(call("aten.as_strided.default", X, {"as_ints": [9]}, {"as_ints": [1]}, INT)),
    "memory as it was": calls(call("aten.empty_strided.default", {"as_ints": [9]}, {"as_ints": [1]})),
    "a private operator": calls(call("aten._sparse_coo_tensor_unsafe.default", X, X, {"as_ints": [9]})),
    "a power of integers": arithmetic(("pow", 1 << 40)),
    "a power of a power": arithmetic(*[("pow", 60)] * 4),
    "a size squared again and again": arithmetic(*[("mul", "@")] * 30),
    "a shift": arithmetic(("lshift", 1 << 40)),
    "an integer of 80 bits": arithmetic(("mul", 1 << 80)),
    "a tensor of 4 TiB": calls(call("aten.full.default", HUGE, FLOAT)),
    "zeros of 4 TiB": calls(call("aten.zeros.default", HUGE)),
    "a range without end": calls(call("aten.arange.default", {"as_float": 1e15})),
    "a range of small steps": calls(call("aten.arange.start_step", {"as_int": 0}, INT, {"as_float": 1e-15})),
    "points without end": calls(call("aten.linspace.default", INT, INT, WIDE)),
    "repeated": calls(call("aten.repeat.default", X, {"as_ints": [1 << 40, 1, 1]})),
    "repeated in place": calls(call("aten.repeat_interleave.self_int", X, WIDE)),
    "padded": calls(call("aten.constant_pad_nd.default", X, {"as_ints": [0, 1 << 40]})),
    "a square without end": calls(call("aten.eye.default", WIDE)),
    "a block inside a block": calls(
        call("edit_compile.guard.default", {"as_tensors": [{"name": "@"}]}, {"as_ints": [0]}, {"as_int": 1})
    ),
    "a block that is not there": calls(
        call("edit_compile.guard.default", {"as_tensors": [{"name": "@"}]}, {"as_ints": [0]}, {"as_int": 99}), name=GLUE
    ),
    "50,000 nodes": calls(*[call("aten.relu.default", X)] * 50_000),
    "a list of 100,000 tensors": Attack(
        calls(call("aten.cat.default", {"as_tensors": [{"name": "@"}] * 100_000})).change, "same"
    ),
    "code as an operator": calls(call("x", X) | {"target": "os.system"}),
    "a zip bomb": member("models/model.json", b" " * (100 << 20), zipfile.ZIP_DEFLATED),
    "JSON of 100 MB": member("models/model.json", b" " * (100 << 20)),
    "deep JSON": member("models/model.json", b"[" * 1_000_000),
    "an integer of 5,000 digits": member("models/model.json", b'{"schema_version": ' + b"9" * 5000 + b"}"),
    "a pickle": member("data/weights/weight_0", b"\x80\x04."),
    "a library": member("data/aotinductor/model/run.so", b"\x7fELF"),
    "two graphs": member("models/model.json/../model.json", b"{}"),
    "values in another file": model(external),
    "a random operator": node("RandomNormalLike"),
    "random dropout": node("Dropout", ["hidden", "", "on"]),
    "an operator of another domain": node("FusedGelu", domain="com.microsoft"),
    "a loop": model(loops),
    "a tensor of 4 TiB in ONNX": model(sized),
    "an operator redefined": model(functions),
    "a sparse tensor": model(lambda made: made.graph.sparse_initializer.add()),
    "training": model(lambda made: made.training_info.add()),
    "an output too many": model(lambda made: made.graph.output.append(made.graph.input[2])),
    "ONNX cut short": data(ONNX, lambda old: old[:-40]),
    "ONNX twice": data(ONNX, lambda old: old + old),
    "plans swapped": Attack(partial(swapped, one=PLAN, other="plans/double-w100.pt2")),
    "ONNX swapped": Attack(partial(swapped, one=ONNX, other="plans/double-w100.onnx")),
    "a glue for a plan": Attack(partial(swapped, one=PLAN, other=GLUE)),
    "weights for routers": Attack(partial(swapped, one="weights.safetensors", other="routers.safetensors")),
    "a deep manifest": data("manifest.json", lambda old: old.replace(b'"config": {', DEEP)),
    "a manifest too deep to read": data("manifest.json", lambda _: b"[" * 1_000_000),
    "a manifest of infinities": data("manifest.json", lambda old: old.replace(b"0.5", b"1e999")),
    "blocks in another order": manifest(lambda made: made["blocks"].reverse()),
    "another timestep": manifest(lambda made: made.update(timestep="scale")),
    "the timestep is the latents": manifest(lambda made: made.update(timestep="hidden_states")),
    "routers dropped": manifest(lambda made: made["files"].pop("routers.safetensors")),
    "routers gone without a word": manifest(without_routers, "other"),
    "rows of another width": manifest(lambda made: made["plans"][1]["variants"][0].update(rows=[8, 8])),
    "rows that no weight has": manifest(lambda made: made["plans"][1]["variants"][3].update(rows=[1 << 40, 1 << 40])),
    "nothing to call": manifest(lambda made: made["glues"].clear()),
    "a name that moves the cursor": manifest(lambda made: made["plans"][0].update(kind="\x1b[2J")),
    "a tier on a strange machine": manifest(lambda made: made["tiers"]["fast"].update(machine="\x1b]0;x\x07")),
    "an id that leaves": manifest(lambda made: made["plans"][0].update(id="../../x")),
    "two plans of one name": manifest(lambda made: made["plans"].append(made["plans"][0])),
    "a policy without sense": manifest(lambda made: made["policy"].update(threshold=7)),
    "a tier for another model": manifest(lambda made: made["tiers"].update(odd=SCHEDULE)),
    "latents that are not there": manifest(lambda made: made["glues"][0].update(latents=[["x", 0]])),
    "an output that is not there": manifest(lambda made: made["glues"][0].update(latents=[["hidden_states", 9]])),
    "an output named twice": manifest(lambda made: made["glues"][0].update(outputs=["sample", "sample"])),
    "a router without a tensor": tensors("routers.safetensors", lambda made: made.pop("0.hidden.weight")),
    "a router of another size": tensors(
        "routers.safetensors", lambda made: made.update({"1.gate.bias": torch.zeros(3)})
    ),
    "a router of integers": tensors(
        "routers.safetensors", lambda made: made.update({"1.gate.bias": torch.zeros(1, dtype=torch.int64)})
    ),
    "a weight of another type": tensors(
        "weights.safetensors", lambda made: made.update({"blocks.1.up": made["blocks.1.up"].double()})
    ),
    "a weight of another size": tensors(
        "weights.safetensors", lambda made: made.update({"blocks.1.down": torch.zeros(16, 9)})
    ),
    "a weight gone": tensors("weights.safetensors", lambda made: made.pop("glue.out")),
    "a header without end": data("weights.safetensors", lambda old: b"\xff" * 7 + b"\x00" + old[8:]),
    "weights that overlap": data("weights.safetensors", lambda old: old.replace(b"offsets\":[0,", b"offsets\":[4,")),
    "a circle of links": place(PLAN, lambda path: path.symlink_to(path.name)),
    "a link outside": place(PLAN, lambda path: path.symlink_to("/etc/passwd")),
    "a pipe": place("weights.safetensors", os.mkfifo),
    "a pipe for a manifest": place("manifest.json", os.mkfifo),
    "a device for a manifest": place("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "a folder for a file": place(GLUE, Path.mkdir),
    "a name too long": manifest(lambda made: made["files"].update({"x" * 5000: "0"})),
    "a name with a zero": manifest(lambda made: made["files"].update({"x\0": "0"})),
    "a manifest changed, its hash not": Attack(unsealed),
}  # fmt: skip
