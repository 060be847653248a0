"""The README's first lines of code, run on a pipeline of toys: they make it faster, and it still draws."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import edit_compile
from benchmarks.readme import README
from tests.pipelines import flux_pipeline, flux_transformer

PROMPTS = ("a red cat", "the blue dog", "a house hill", "the red dog")


def code(number: int) -> str:
    """A block of Python in the README."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[number]


@pytest.fixture
def pipe() -> Any:
    """Draws in 12 steps, small."""
    made = flux_pipeline(flux_transformer())
    made.set_progress_bar_config(disable=True)

    class Small(type(made)):  # type: ignore[misc]
        def __call__(self, prompt: str) -> Any:
            generator = torch.Generator().manual_seed(len(prompt))
            return super().__call__(
                prompt, num_inference_steps=12, height=32, width=32, generator=generator, output_type="latent"
            )

    made.__class__ = Small
    return made


def test_the_first_lines_make_a_pipeline_faster(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"edit_compile": edit_compile, "pipe": pipe, "prompts": PROMPTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code(0), given)
    compiled = given["compiled"]
    assert pipe.transformer is compiled and compiled.tier == "fast"
    compiled.reset_counters()
    assert pipe(PROMPTS[0]).images.isfinite().all()
    assert compiled.counters.reused and compiled.counters.flops < 0.4 * compiled.counters.dense_flops
