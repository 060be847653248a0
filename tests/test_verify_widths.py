"""Acceptance of a bundle without its model: every plan at every width, on the engine and on torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from typer.testing import CliRunner

from edit_compile.bundles.verify import Check
from edit_compile.bundles.verify_widths import guard_inputs, verify_widths
from edit_compile.cli import app
from runtime.base.errors import EditError, EngineError, InputError
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from tests import programs

HALF = "plans/single-w050.onnx"


def checks(program: Program, engine: str = "onnxruntime", rows: int = 2) -> dict[str, Check]:
    found = verify_widths(CompiledTransformer(program, engine), programs.inputs(rows), 1e-4)
    return {check.name: check for check in found}


def swapped(program: Program, name: str, data: bytes) -> Program:
    return replace(program, files={**program.files, name: data})


def another_activation(data: bytes) -> bytes:
    """The same shapes, another function: what a plan of the same make but of another model would be."""
    model = onnx.load_from_string(data)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Softplus"
    return model.SerializeToString()


def test_every_plan_is_compared_at_every_width() -> None:
    found = checks(programs.make())
    assert set(found) == {
        f"{kind} at width {w:g}" for kind in ("Double double", "Single single") for w in programs.WIDTHS
    }
    assert all(check.passed and check.scale > 0 for check in found.values())


@pytest.mark.parametrize(
    "other",
    [lambda files: another_activation(files[HALF]), lambda files: files["plans/single-w075.onnx"]],
    ids=["of another model", "of another width"],
)
def test_one_plan_swapped_at_one_width_fails_there_and_nowhere_else(other: Callable[..., bytes]) -> None:
    program = programs.make()
    found = checks(swapped(program, HALF, other(program.files)))
    assert [name for name, check in found.items() if not check.passed] == ["Single single at width 0.5"]


def test_a_small_change_of_a_large_state_does_not_hide() -> None:
    program = programs.make(("single",))
    small = {name: w / 100 if name.startswith("blocks") else w for name, w in program.weights.items()}
    weights = {**small, "glue.into": program.weights["glue.into"] * 100}
    found = checks(swapped(replace(program, weights=weights), HALF, another_activation(program.files[HALF])))
    assert not found["Single single at width 0.5"].passed
    assert found["Single single at width 1"].passed


def test_nan_fails() -> None:
    program = programs.make()
    weights = {**program.weights, "blocks.1.up": torch.full_like(program.weights["blocks.1.up"], float("nan"))}
    assert not any(c.passed for name, c in checks(replace(program, weights=weights)).items() if "Single" in name)


def test_blocks_are_skipped_when_their_inputs_are_taken() -> None:
    seen = guard_inputs(programs.make(), programs.inputs(), torch.device("cpu"))
    assert set(seen) == {0, 1, 2}
    given = programs.inputs() | {"guidance": None}  # as pipelines give what they have not
    assert guard_inputs(programs.make(), given, torch.device("cpu")).keys() == seen.keys()
    assert torch.equal(seen[0][1][0], seen[2][1][0])


def test_what_cannot_be_compared_is_refused() -> None:
    program = programs.make()
    with pytest.raises(EngineError, match=r"name another .*--model"):
        list(verify_widths(CompiledTransformer(program, "torch"), programs.inputs()))
    with pytest.raises(InputError):
        list(verify_widths(CompiledTransformer(program), {}))
    hosted = tuple(replace(glue, file=None, weights=()) for glue in program.manifest.glues)
    with pytest.raises(EditError, match="hosted"):
        guard_inputs(
            replace(program, manifest=replace(program.manifest, glues=hosted)), programs.inputs(), torch.device("cpu")
        )
    files = {name: data for name, data in program.files.items() if not name.endswith(".pt2") or "glue" in name}
    with pytest.raises(EngineError, match="engine 'torch' needs plans/"):
        checks(replace(program, files=files))


def test_the_command_ends_with_1_where_a_width_differs(tmp_path: Path) -> None:
    program = programs.make()
    for name, data, code, said in (
        ("good", program.files[HALF], 0, "passed"),
        ("bad", another_activation(program.files[HALF]), 1, "FAILED"),
    ):
        path = tmp_path / f"{name}.edit"
        CompiledTransformer(swapped(program, HALF, data), "onnxruntime").save(path)
        result = CliRunner().invoke(app, ["verify", str(path), "--tolerance", "1e-4"])
        assert result.exit_code == code, result.output
        assert said in result.output


@pytest.mark.parametrize(("dtype", "engine"), [(torch.float32, "onnxruntime"), (torch.bfloat16, "inductor")])
def test_the_command_takes_an_engine_that_runs_the_bundles_precision(
    dtype: torch.dtype, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs.make(("single",))
    told = str(dtype).removeprefix("torch.")
    CompiledTransformer(replace(program, manifest=replace(program.manifest, dtype=told)), "torch").save(tmp_path / "x")
    taken = []
    monkeypatch.setattr(
        "edit_compile.bundles.verify_widths.verify_widths", lambda one, *_: taken.append(one.engine) or []
    )
    CliRunner().invoke(app, ["verify", str(tmp_path / "x")])
    assert taken == [engine]
