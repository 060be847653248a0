"""`edit-compile record`: a generation for each line of a file, going on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edit_compile import Recording
from edit_compile.calls.record_prompts import Settings, options_for
from edit_compile.cli import app
from edit_compile.loading import UserError
from tests.pipelines import flux_pipeline, flux_transformer

OPTIONS = ("--steps", 2, "--guidance", 2.5, "--height", 32, "--width", 32)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["record", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    flux_pipeline(flux_transformer()).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\n  the blue dog\n")
    return path


def test_it_goes_on_where_it_stopped(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    given = (pipeline, "--prompts", prompts, "--output", calls, *OPTIONS)
    assert "recorded 2 generations" in run(*given)
    first, second = Recording(calls)
    assert len(first.calls) == len(second.calls) == 2
    assert first.result.shape == (1, 64, 16)
    assert not torch.equal(first.calls[0].arguments["hidden_states"], second.calls[0].arguments["hidden_states"])
    assert "recorded 0 generations" in run(*given)

    prompts.write_text("a red cat\nthe blue dog\na house\n")
    assert "recorded 1 generations" in run(*given)
    assert "other prompts" in run(pipeline, "--prompts", _file(tmp_path, "a hill"), *given[3:], code=2)
    assert "with steps 2, not 3: give another folder" in run(*given, "--steps", 3, code=2)
    (calls / "settings.json").unlink()
    assert "not how they were made" in run(*given, code=2)
    again = (*given[:3], "--output", tmp_path / "again", *OPTIONS)
    run(*again)
    for one, other in zip(Recording(calls), Recording(tmp_path / "again"), strict=True):
        assert torch.equal(one.result, other.result)


def test_what_cannot_be_done_is_said_in_one_line(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    rest = ("--prompts", prompts, "--output", tmp_path / "calls")
    assert "neither the folder of a saved pipeline nor a name on the hub" in run("./nowhere/at/all", *rest, code=2)
    assert "no model_index.json" in run(tmp_path, *rest, code=2)
    assert "holds no prompts" in run(pipeline, "--prompts", _file(tmp_path, "\n"), *rest[2:], code=2)
    assert "No such file" in run(pipeline, "--prompts", tmp_path / "missing.txt", *rest[2:], code=2)
    assert "'nonsense' is no floating-point type" in run(pipeline, *rest, "--dtype", "nonsense", code=2)
    assert "say name=value" in run(pipeline, *rest, "--argument", "guidance", code=2)
    assert "takes no 'loudness'" in run(pipeline, *rest, "--argument", "loudness=3", code=2)
    said = run(pipeline, *rest, "--steps", 2, "--argument", "num_inference_steps=3", code=2)
    assert "said by an option of its own" in said
    assert "more than limit=10" in run(pipeline, *rest, *OPTIONS, "--limit", 10, code=2)


def test_other_arguments_of_the_pipelines_call(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    given = (pipeline, "--prompts", prompts, "--output", tmp_path / "calls", *OPTIONS)
    more = ("--argument", "true_cfg_scale=3", "--argument", "negative_prompt=a dog")
    run(*given, *more)
    assert [call.context for call in Recording(tmp_path / "calls")[0].calls] == ["cond", "uncond"] * 2
    assert "recorded 0 generations" in run(*given, *more)
    assert "was recorded with arguments" in run(*given, *more[:2], code=2)


class Wordless:
    """A pipeline that takes no prompt."""

    def __call__(self, class_labels: list[int], generator: object) -> None: ...


class Plain(Wordless):
    """Takes a prompt, and nothing of what can be asked for beside it."""

    def __call__(self, prompt: str, generator: object) -> None: ...


def test_options_that_the_pipelines_call_does_not_take() -> None:
    with pytest.raises(UserError, match="--prompts is not for Wordless: its call takes no 'prompt'"):
        options_for(Wordless(), Settings("", ("a",)))
    with pytest.raises(UserError, match="--guidance is not for Plain: its call takes no 'guidance_scale'"):
        options_for(Plain(), Settings("", ("a",), guidance=1.0))
    assert options_for(Plain(), Settings("", ("a",))) == {}


def _file(folder: Path, text: str) -> Path:
    path = folder / "other.txt"
    path.write_text(text)
    return path
