"""What can be looked at between two passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from edit_compile.cli import app
from edit_compile.loading import save_inputs
from tests.models import tiny_flux
from tests.test_pass_list import ORDER, compiled, given
from tests.test_pass_list import model as model  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


def test_graphs_are_dumped_before_and_after_each_pass(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "07-older.txt").write_text("after older: 0.100 s\n")
    compiled(model, dump=tmp_path)
    texts = [f"{number:02d}-{name}.txt" for number, name in enumerate(["start", *ORDER])]
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == texts
    assert sorted(path.name for path in tmp_path.glob("*.diff")) == ["05-real.diff", "06-heads.diff"]
    exported, real, heads = (next(tmp_path.glob(f"*-{name}.txt")).read_text() for name in ("export", "real", "heads"))
    assert "aten.view_as_complex" in exported and "aten.view_as_complex" not in real
    assert "unsqueeze.default" in heads
    diff = (tmp_path / "05-real.diff").read_text()
    assert diff.startswith("--- layers.0 before real\n+++ layers.0 after real\n")
    assert any(line.startswith("-") and "aten.view_as_complex" in line for line in diff.splitlines())
    assert "2 blocks\n  0 layers.0: Block\n  1 layers.1: Block" in heads
    assert "layers.0, layers.1; output continues input: {0: 0}; states x" in heads
    assert heads.startswith("after heads: 0.")
    widths = (tmp_path / "11-widths.txt").read_text()
    assert "# layers.0 at width 0.5" in widths and "# glue 0" in (tmp_path / "13-guards.txt").read_text()


def test_a_refusal_is_in_the_dump_and_other_forms_have_folders(model: nn.Module, tmp_path: Path) -> None:
    made = compiled(model, dump=tmp_path)
    made(**given(tokens=7))
    assert (tmp_path / "run-2" / "00-start.txt").is_file()
    assert "  mlp: layers.0.up.weight: " in (tmp_path / "run-2" / "08-mlp.txt").read_text()


def test_the_environment_names_a_folder_too(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDIT_COMPILE_DUMP", str(tmp_path / "graphs"))
    compiled(model, dry_run=True)
    assert (tmp_path / "graphs" / "00-start.txt").is_file()


def test_the_command_line_dumps(tmp_path: Path) -> None:
    flux, inputs = tiny_flux(double=1, single=1)
    flux.save_config(tmp_path / "flux")
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    arguments = ["compile", str(tmp_path / "flux"), "--inputs", str(tmp_path / "inputs.safetensors"), "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--dump", str(tmp_path / "graphs")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "graphs" / "10-layout.txt").is_file()
