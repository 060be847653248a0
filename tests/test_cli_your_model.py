"""A transformer that no library knows, from its file to a bundle and its figures, all on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edit_compile.cli import app
from edit_compile.loading import save_inputs
from tests.models import noise

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.query, self.keys = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.up, self.down = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, dim)

    def forward(self, tokens, memory, vector):
        key, value = self.keys(memory).chunk(2, -1)
        tokens = tokens + F.scaled_dot_product_attention(self.query(self.norm(tokens)), key, value)
        gate, hidden = self.up(self.norm(tokens)).chunk(2, -1)
        return tokens + self.modulation(vector)[:, None] * self.down(F.silu(gate) * hidden)


class Sketch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.words = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(6, 16)
        self.stack = nn.ModuleList(Layer(16) for _ in range(2))

    def forward(self, latent, noise_level, prompt, **options):
        vector = (noise_level[:, None] * torch.arange(1, 17)).cos()
        tokens, memory = self.enter(latent), self.words(prompt["long"] + options["bias"])
        for layer in self.stack:
            tokens = layer(tokens, memory, vector)
        return self.leave(tokens)


def sketch_of_another_seed():
    model = Sketch()
    nn.init.ones_(model.leave.weight)
    return model
"""


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's file and inputs, compiled to ``sketch.edit``."""
    place = tmp_path_factory.mktemp("yours")
    (place / "sketch.py").write_text(SOURCE)
    inputs = {
        "latent": noise(2, 5, 4),
        "noise_level": torch.tensor([0.9, 0.3]),
        "prompt": {"long": noise(2, 3, 6, seed=2)},
        "bias": 0.5,
    }
    save_inputs(inputs, place / "inputs.safetensors")
    arguments = ["--inputs", place / "inputs.safetensors", "--timestep", "noise_level", "--engine", "torch"]
    with pytest.warns(UserWarning, match="no routers"):
        run(
            "compile",
            f"{place / 'sketch.py'}:Sketch",
            *arguments,
            "--widths",
            ".5,1",
            "--output",
            place / "sketch.edit",
        )
    return place


def test_the_timestep_is_asked_for_where_no_name_tells(folder: Path) -> None:
    arguments = ["--inputs", folder / "inputs.safetensors", "--dry-run"]
    assert "say which one is with timestep=" in run("compile", f"{folder / 'sketch.py'}:Sketch", *arguments, code=2)


def test_inspect_says_what_was_found(folder: Path) -> None:
    said = run("inspect", folder / "sketch.edit")
    for word in ("standalone", "Sketch", "Layer", "prompt.long"):
        assert word in said


@pytest.mark.parametrize("given", [True, False])
def test_verify_compares_with_the_file(folder: Path, given: bool) -> None:
    inputs = ["--inputs", folder / "inputs.safetensors"] if given else []  # else noise in the bundle's own shapes
    arguments = [folder / "sketch.edit", "--engine", "torch", *inputs, "--model"]
    assert "passed" in run("verify", *arguments, f"{folder / 'sketch.py'}:Sketch")
    assert "FAILED" in run("verify", *arguments, f"{folder / 'sketch.py'}:sketch_of_another_seed", code=1)


def test_bench_times_it(folder: Path) -> None:
    arguments = ["--engine", "torch", "--steps", 2, "--repeats", 1, "--schedule", ".5,.5"]
    assert "times faster" in run(
        "bench", folder / "sketch.edit", "--model", f"{folder / 'sketch.py'}:Sketch", *arguments
    )


def test_compile_says_what_it_replaces(folder: Path, tmp_path: Path) -> None:
    given = ["--inputs", folder / "inputs.safetensors", "--timestep", "noise_level", "--engine", "torch", "--widths", 1]
    compiling, output = ["compile", f"{folder / 'sketch.py'}:Sketch", *given], tmp_path / "sketch.edit"
    with pytest.warns(UserWarning, match="no routers"):
        assert "replaces" not in run(*compiling, "--output", output)
        first = (output / "manifest.json").stat().st_ino
        assert "replaces" not in run(*compiling, "--output", output, "--dry-run")
        assert (output / "manifest.json").stat().st_ino == first
        said = run(*compiling, "--output", output).replace("\n", "")
    assert said.startswith(f"replaces the bundle {output}") and said.endswith(f"wrote {output}")
