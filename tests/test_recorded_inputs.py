"""Recorded calls in the place of inputs: what is compiled for, and what commands run with."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import CompiledTransformer, Recording, RoutingPolicy, ScheduledPolicy
from edit_compile.calls.forms import one_of_each_form
from runtime.base.errors import InputError
from tests import programs
from tests.models import PlainDiT, noise, randomised, tiny_plain
from tests.test_cli import DENSE, run

NOISE = "inputs are random: decisions mean nothing"


def called_in_several_forms(model: PlainDiT, inputs: dict[str, Tensor], folder: Path) -> Recording:
    """Twice alike, with one more sample, and with a mask."""
    more = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in inputs.items()}
    words = inputs["words"]
    masked = {**inputs, "mask": torch.ones(words.shape[:2], dtype=torch.bool)}
    with edit_compile.record(model, folder) as recorder, torch.no_grad():
        for calls in ((inputs, inputs), (more,), (masked,)):
            with recorder.generation():
                for call in calls:
                    model(**call)
    return Recording(folder)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainDiT, Recording]:
    _, inputs = tiny_plain()
    model = randomised(PlainDiT())
    inputs = {name: tensor for name, tensor in inputs.items() if name != "mask"}
    return model, called_in_several_forms(model, inputs, tmp_path_factory.mktemp("calls"))


def test_a_form_is_told_by_shapes_dtypes_and_constants_not_by_values() -> None:
    one = {"x": noise(1, 4), "n": 1, "absent": None}
    alike = {"x": noise(1, 4, seed=2), "n": 1}
    others = [{**one, "n": 2}, {**one, "n": True}, {**one, "x": one["x"].double()}, {**one, "x": noise(2, 4)}, {"n": 1}]
    found = one_of_each_form([one, alike, *others, *others])
    assert found[0]["x"] is one["x"]
    assert len(found) == 1 + len(others)


def test_who_has_recorded_is_not_told_to_record(recorded: tuple[PlainDiT, Recording]) -> None:
    _, recording = recorded
    elastic = edit_compile.elasticize(randomised(PlainDiT()), inputs=recording)
    for made, known in ((randomised(PlainDiT()), "has no routers"), (elastic, "never trained")):
        for given, told in ((recording, False), (recording.inputs()[0], True)):
            with pytest.warns(UserWarning, match=known) as said:
                edit_compile.compile(made, [0.25, 0.5, 0.75, 1.0], inputs=given, engine="torch")
            assert ("record some generations" in str(said[0].message)) == told
            assert "edit_compile.tune" in str(said[0].message)


@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_what_is_compiled_takes_every_form_that_was_recorded(recorded: tuple[PlainDiT, Recording]) -> None:
    model, recording = recorded
    forms = recording.inputs()
    assert len(forms) == 3
    compiled = edit_compile.compile(model, [1.0], inputs=recording, engine="torch")
    assert len(compiled.program.manifest.glues) == 2  # the third differs in its batch alone
    for form in forms:
        with torch.no_grad():
            torch.testing.assert_close(compiled(**form), model(**form), rtol=1e-4, atol=1e-4)
    assert len(compiled.program.manifest.glues) == 2
    assert edit_compile.elasticize(randomised(PlainDiT()), inputs=recording).layout is not None
    assert "PlainDiT" in str(edit_compile.compile(model, inputs=recording, dry_run=True))


def test_calls_of_another_class_are_refused(recorded: tuple[PlainDiT, Recording]) -> None:
    class Other(PlainDiT):
        """By another name."""

    with pytest.raises(InputError, match="calls of PlainDiT, the model is a Other: record its own"):
        edit_compile.compile(Other(), inputs=recorded[1])


def test_compile_takes_calls_and_their_dtype(tmp_path: Path) -> None:
    source = "from tests.models import PlainDiT, randomised\n\n\ndef make():\n    return randomised(PlainDiT())\n"
    (tmp_path / "plain.py").write_text(source)
    _, inputs = tiny_plain()
    model = randomised(PlainDiT()).double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with edit_compile.record(model, tmp_path / "calls"), torch.no_grad():
        model(**wide)
    given = [
        "compile",
        f"{tmp_path / 'plain.py'}:make",
        "--calls",
        tmp_path / "calls",
        "--engine",
        "torch",
        "--widths",
        1,
    ]
    with pytest.warns(UserWarning, match=r"no routers.*itself: let edit_compile\.tune"):
        run(*given, "--output", tmp_path / "bundle")
    assert edit_compile.load(tmp_path / "bundle", engine="torch").dtype == torch.float64
    refused = run(*given, "--output", tmp_path / "x", "--dtype", "bfloat16", code=2)
    assert "was recorded in float64: record with --dtype bfloat16" in refused
    both = run(*given, "--output", tmp_path / "x", "--inputs", tmp_path / "plain.py", code=2)
    assert "--calls FOLDER of recorded calls, or --inputs FILE" in both


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with routers, and beside it two generations of it, of three steps with two branches each."""
    compiled = CompiledTransformer(programs.make(), "torch")
    compiled.save(tmp_path / "model.edit")
    (tmp_path / "dense.py").write_text(DENSE)
    with edit_compile.record(compiled, tmp_path / "calls") as recorder:
        for seed in range(2):
            given = programs.inputs(1, seed)
            with recorder.generation():
                for moment in (0.9, 0.6, 0.2):
                    for branch in ("cond", "uncond"):
                        with compiled.cache_context(branch):
                            compiled(**{**given, "timestep": torch.full((1,), moment)})
    return tmp_path / "model.edit"


def test_bench_and_plot_take_the_steps_that_were_recorded(bundle: Path, tmp_path: Path) -> None:
    model, calls = f"{bundle.parent / 'dense.py'}:Dense", ["--engine", "torch", "--calls", bundle.parent / "calls"]
    said = run("bench", bundle, "--model", model, *calls, "--repeats", 1, "--json", tmp_path / "figures.json")
    assert NOISE not in said and json.loads((tmp_path / "figures.json").read_text())["steps"] == 3
    assert NOISE not in run("plot", bundle, *calls, "--output", tmp_path / "a.png")
    assert NOISE in run("plot", bundle, "--engine", "torch", "--steps", 2, "--output", tmp_path / "a.png")
    assert NOISE in run("bench", bundle, "--model", model, "--engine", "torch", "--steps", 2, "--repeats", 1)
    assert "the steps are those recorded" in run("plot", bundle, *calls, "--steps", 2, code=2)


def test_verify_takes_every_recorded_form(bundle: Path, tmp_path: Path) -> None:
    compiled, folder = edit_compile.load(bundle, engine="torch"), bundle.parent / "calls"
    model = ["--engine", "torch", "--model", f"{bundle.parent / 'dense.py'}:Dense"]
    assert NOISE not in run("verify", bundle, *model, "--calls", folder)
    assert NOISE in run("verify", bundle, *model)
    with edit_compile.record(compiled, folder):
        compiled(**programs.inputs(2))
    said = run("verify", bundle, *model, "--calls", folder)
    assert "form 1" in said and "form 2" in said
    given = ["--calls", folder, "--inputs", folder / "recording.json"]
    assert "give one of them" in run("verify", bundle, *model, *given, code=2)


def test_calls_of_another_model_are_refused_by_commands(bundle: Path, recorded: tuple[PlainDiT, Recording]) -> None:
    model = f"{bundle.parent / 'dense.py'}:Dense"
    for command in (["verify"], ["bench", "--repeats", 1], ["plot"]):
        given = [*command, bundle, "--engine", "torch", "--calls", recorded[1].folder]
        said = run(*given, *(["--model", model] if command[0] != "plot" else []), code=2)
        assert "holds calls of PlainDiT, the bundle is of a" in said.replace("\n", " ")


def test_routers_that_were_never_trained_are_said() -> None:
    model, inputs = tiny_plain()
    elastic = edit_compile.elasticize(model, inputs)
    with pytest.warns(UserWarning, match=r"never trained, so every block will be computed in full: train them") as said:
        edit_compile.compile(elastic)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="never trained"):
        edit_compile.compile(edit_compile.elasticize(tiny_plain()[0]))  # whose routers are yet to be made
    with pytest.warns(UserWarning, match="no routers") as said:
        edit_compile.compile(tiny_plain()[0])
    assert len(said) == 1


def test_routers_that_a_step_of_training_moved_are_not() -> None:
    model, inputs = tiny_plain()
    elastic = edit_compile.elasticize(model, inputs)
    optimiser = torch.optim.Adam(elastic.routers.parameters(), lr=1e-4)
    elastic.train()(**inputs).square().mean().backward()
    optimiser.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        edit_compile.compile(elastic)


def test_a_schedule_decides_without_routers_so_nothing_is_said() -> None:
    model, inputs = tiny_plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        edit_compile.compile(model, policy=ScheduledPolicy([[1.0, 1.0, 1.0]]))
        edit_compile.compile(edit_compile.elasticize(model, inputs), policy=ScheduledPolicy([[1.0, 1.0, 1.0]]))
    with pytest.warns(UserWarning, match="never trained"):
        edit_compile.compile(edit_compile.elasticize(tiny_plain()[0]), policy=RoutingPolicy())
