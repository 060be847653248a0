from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from edit_compile.bundles.beside_bundle import inputs_for, model_like
from edit_compile.cli import app
from edit_compile.loading import UserError, load_inputs, load_object, parse_dtype, parse_numbers, save_inputs
from runtime.face.transformer import CompiledTransformer
from tests import programs

DENSE = "from tests.test_benchmark import Dense\n\n\ndef other():\n    return Dense(seed=1)\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "model.edit"
    CompiledTransformer(programs.make(), "torch").save(path)
    (tmp_path / "dense.py").write_text(DENSE)
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def test_help_names_every_command() -> None:
    text = run("--help")
    for command in ("train", "distil", "record", "compile", "tune", "build", "inspect", "verify", "bench", "plot"):
        assert command in text


def test_inspect_prints_what_a_bundle_is(bundle: Path) -> None:
    assert "standalone" in run("inspect", bundle)


def test_build_prints_one_line_per_plan_and_width(bundle: Path) -> None:
    text = run("build", bundle, "--engine", "torch")
    assert text.count("double") == text.count("single") == len(programs.WIDTHS)


def test_verify_ends_with_1_where_the_numbers_differ(bundle: Path) -> None:
    where = bundle.parent / "dense.py"
    assert "passed" in run("verify", bundle, "--model", f"{where}:Dense", "--engine", "torch")
    assert "FAILED" in run("verify", bundle, "--model", f"{where}:other", "--engine", "torch", code=1)


def test_model_and_inputs_go_where_the_bundle_runs(bundle: Path) -> None:
    compiled = SimpleNamespace(device=torch.device("meta"), program=programs.make())
    assert all(tensor.is_meta for tensor in inputs_for(compiled, None).values())
    model = model_like(compiled, f"{bundle.parent / 'dense.py'}:Dense")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_bench_writes_figures_and_bars(bundle: Path, tmp_path: Path) -> None:
    model = f"{bundle.parent / 'dense.py'}:Dense"
    files = tmp_path / "figures.json", tmp_path / "bars.png"
    arguments = ["--engine", "torch", "--steps", 2, "--repeats", 1, "--schedule", ".5,.5", "--json", files[0]]
    assert "times faster" in run("bench", bundle, "--model", model, *arguments, "--plot", files[1])
    assert json.loads(files[0].read_text())["steps"] == 2
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_plot_draws_a_bundle_and_a_written_trace(bundle: Path, tmp_path: Path) -> None:
    run("plot", bundle, "--engine", "torch", "--steps", 2, "--output", tmp_path / "a.png")
    model = CompiledTransformer(programs.make(), "torch")
    model(**programs.inputs())
    (tmp_path / "trace.json").write_text(model.trace.to_json())
    run("plot", tmp_path / "trace.json", "--output", tmp_path / "b.png")
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "b.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere"], "there is no"),
        (["compile", "nowhere", "--inputs", "i.safetensors", "--output", "o"], "i.safetensors"),
        (["compile", "nowhere", "--output", "o"], "--calls FOLDER"),
        (["compile", "nowhere", "--calls", "here", "--output", "o"], "here is not a folder"),
        (["compile", "nowhere", "--inputs", "i.safetensors"], "--output"),
        (["train", "nothing.py:Task", "steps=1"], "nothing.py"),
        (["plot", "pyproject.toml"], "not a trace"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    text = run(*arguments, code=2)
    assert said in text
    assert text.startswith("error: ")
    assert len(text.strip().splitlines()) == 1


def test_a_schedule_of_one_share_is_refused(bundle: Path) -> None:
    model = f"{bundle.parent / 'dense.py'}:Dense"
    assert "two shares" in run("bench", bundle, "--model", model, "--engine", "torch", "--schedule", ".5", code=2)


def test_an_unknown_engine_is_refused(bundle: Path) -> None:
    assert "no engine 'abacus'" in run("build", bundle, "--engine", "abacus", code=2)


def test_train_runs_a_task_with_settings(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import torch\n\n\nclass Task:\n"
        "    def model(self):\n        return torch.nn.Linear(2, 1)\n\n"
        "    def dataset(self):\n        return [torch.ones(2)] * 4\n\n"
        "    def loss(self, model, batch):\n        return {'loss': model(batch).square().mean()}\n"
    )
    settings = ("steps=2", "batch_size=2", "cpu=true", "checkpoint_every=2")
    assert "step-00000002" in run("train", f"{task}:Task", *settings, "--output", tmp_path / "run").replace("\n", "")
    assert "no setting is called stops" in run("train", f"{task}:Task", "stops=2", code=2)


def test_inputs_go_through_a_file_with_their_constants(tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    x = torch.arange(3)
    given = {"x": x, "view_of_x": x[None], "shapes": [[1, 2]], "scale": 1.5, "name": "a", "flag": False}
    save_inputs(given, path)
    beside = tmp_path / "beside"
    beside.touch()
    assert path.stat().st_mode == beside.stat().st_mode
    read = load_inputs(path)
    for name in ("x", "view_of_x"):
        assert torch.equal(read.pop(name), given.pop(name))
    assert read == given


def test_what_cannot_be_read_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.py").write_text("import nowhere_at_all\n")
    for attempt in (
        lambda: load_inputs(tmp_path / "a.safetensors"),
        lambda: load_object(f"{tmp_path / 'a.py'}:A"),
        lambda: load_object("just_a_name"),
        lambda: parse_numbers("1,two"),
        lambda: parse_dtype("int8"),
    ):
        with pytest.raises(UserError):
            attempt()
