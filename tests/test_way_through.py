"""From a saved pipeline and a file of prompts to a bundle whose tiers switch, by the commands and as a user would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import edit_compile
from edit_compile import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED
from tests.pipelines import flux_pipeline, flux_transformer, sd3_pipeline, sd3_transformer
from tests.pipelines_of_words import qwen_pipeline, wan_pipeline
from tests.test_cli import run

PROMPTS = ("a red cat", "the blue dog", "a house hill", "the red dog")
STEPS = 4
SMALL = {"height": 32, "width": 32}
VIDEO = {"height": 32, "width": 80}

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


@dataclass(frozen=True)
class Way:
    """A pipeline, the size of its images, other arguments of its call, and the names of its transformers."""

    make: Callable[[], Any]
    size: dict[str, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("transformer",)


WAYS = {
    "flux": Way(lambda: flux_pipeline(flux_transformer()), SMALL),
    "flux_guided": Way(  # guidance by a second call
        lambda: flux_pipeline(flux_transformer()), SMALL, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}
    ),
    "sd3": Way(lambda: sd3_pipeline(sd3_transformer()), SMALL, {"guidance_scale": 4.0}),  # guidance in one batch
    "qwen": Way(  # branches of two lengths
        qwen_pipeline, {"height": 64, "width": 80}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}
    ),
    "wan": Way(wan_pipeline, VIDEO, {"num_frames": 9, "max_sequence_length": 7}),  # UniPC
    "wan_two_transformers": Way(
        lambda: wan_pipeline(second=True),
        VIDEO,
        {"num_frames": 9, "max_sequence_length": 7},
        ("transformer", "transformer_2"),
    ),
}
QUICK = ("qwen",)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in WAYS]
)
def test_from_prompts_to_tiers(name: str, tmp_path: Path) -> None:
    way, saved, calls = WAYS[name], tmp_path / "pipe", tmp_path / "calls"
    way.make().save_pretrained(saved)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    size = [text for key, value in way.size.items() for text in (f"--{key}", value)]
    more = [text for key, value in way.arguments.items() for text in ("--argument", f"{key}={value}")]
    run("record", saved, "--prompts", tmp_path / "prompts.txt", "--output", calls, "--steps", STEPS, *size, *more)
    bundles = []
    for part in way.parts:
        recorded = calls if len(way.parts) == 1 else calls / part
        bundle, tuned = tmp_path / f"{part}.edit", tmp_path / f"{part}-tuned.edit"
        run("compile", saved / part, "--calls", recorded, "--engine", "torch", "--widths", 1, "--output", bundle)
        asked = ["--budget", "full=1", "--budget", "fast=.6", "--engine", "torch"]
        said = run("tune", bundle, "--calls", recorded, *asked, "--output", tuned, "--plot", tmp_path / f"{part}.png")
        assert "beside fewer sampling steps" in said and (tmp_path / f"{part}.png").stat().st_size
        bundles.append(tuned)
    _check_that_tiers_switch(way, DiffusionPipeline.from_pretrained(saved), bundles)


def _check_that_tiers_switch(way: Way, pipe: Any, bundles: list[Path]) -> None:
    pipe.set_progress_bar_config(disable=True)
    eager = _generated(pipe, way)
    loaded = [edit_compile.load(bundle, engine="torch") for bundle in bundles]
    for part, compiled in zip(way.parts, loaded, strict=True):
        assert list(compiled.tiers) == ["full", "fast"]
        setattr(pipe, part, compiled)
    dense = _generated(pipe, way)
    torch.testing.assert_close(dense, eager, rtol=1e-3, atol=1e-3)
    assert not any(_reused(compiled) for compiled in loaded)
    for tier, reuses in (("full", False), ("fast", True), ("full", False)):
        for compiled in loaded:
            compiled.tier = tier
        assert torch.equal(_generated(pipe, way), dense) != reuses
        assert all(_reused(compiled) == reuses for compiled in loaded)
    for compiled in loaded:
        compiled.tier = "fast"
    fast = _generated(pipe, way)
    with _at_tier(loaded, "full"):
        assert torch.equal(_generated(pipe, way), dense)
    assert torch.equal(_generated(pipe, way), fast)
    for compiled in loaded:
        compiled.tier = None
    assert torch.equal(_generated(pipe, way), dense)


def _generated(pipe: Any, way: Way) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {**way.size, **way.arguments, "prompt": PROMPTS[0], "num_inference_steps": STEPS}
    latents: Tensor = pipe(**given, output_type="latent", return_dict=False, generator=generator)[0]
    return latents


def _at_tier(loaded: list[CompiledTransformer], tier: str) -> Any:
    """A request of the first at that tier, and, of two, the second's inside."""
    stack = ExitStack()
    for compiled in loaded:
        stack.enter_context(compiled.request(tier=tier))
    return stack


def _reused(compiled: CompiledTransformer) -> bool:
    """Whether whole steps of the last request were reused; all others were computed."""
    last = compiled.trace[-1]
    done = np.concatenate([last.grid(context)["done"] for context in last.contexts])
    assert np.isin(done, (REUSED, COMPUTED)).all() and (done == done[:, :1, :1]).all()
    return bool((done == REUSED).any())


@pytest.mark.slow
def test_the_tiers_are_there_where_no_model_is(tmp_path: Path) -> None:
    """A process that serves imports neither the compiler nor diffusers."""
    way, saved, calls = WAYS["flux"], tmp_path / "pipe", tmp_path / "calls"
    pipe = way.make()
    pipe.save_pretrained(saved)
    with edit_compile.record(pipe, calls):
        for seed in range(4):
            pipe(PROMPTS[seed], **way.size, num_inference_steps=STEPS, output_type="latent")
    recording = edit_compile.Recording(calls)
    compiled = edit_compile.compile(pipe.transformer, [1.0], inputs=recording, engine="torch")
    edit_compile.tune(compiled, recording, budget={"fast": 0.6}, repeats=1).add_to(compiled)
    compiled.save(tmp_path / "flux.edit")
    script = (
        "import sys, edit_compile; m = edit_compile.load(sys.argv[1], engine='torch', tier='fast');"
        "print(m.tier, list(m.tiers), 'diffusers' in sys.modules, 'edit_compile.compiling.compiler' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "flux.edit")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "fast ['fast'] False False"


def test_a_loop_that_is_no_pipeline_says_where_generations_begin(tmp_path: Path) -> None:
    """Hunyuan3D-2, whose authors' own loop calls it by position."""
    from tests.test_hunyuan3d import tiny

    case = tiny()

    def generated(model: Any, seed: int) -> Tensor:
        x = torch.randn(case.inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
        for step in range(STEPS):
            t = torch.full((len(x),), 1 - step / STEPS)
            with torch.no_grad():
                x = x - model(x, t, case.inputs["contexts"], guidance=case.inputs["guidance"]) / STEPS
        return x

    with edit_compile.record(case.model, tmp_path / "calls") as recorder:
        for seed in range(4):
            with recorder.generation():
                recorder.result(generated(case.model, seed))
    recording = edit_compile.Recording(tmp_path / "calls")
    compiled = edit_compile.compile(case.model, [1.0], inputs=recording, engine="torch")
    tuned = edit_compile.tune(compiled, recording, budget={"full": 1.0, "fast": 0.6}, repeats=1)
    tuned.add_to(compiled)
    compiled.save(tmp_path / "hunyuan3d.edit")
    loaded = edit_compile.load(tmp_path / "hunyuan3d.edit", engine="torch")
    results = []
    for loaded.tier in (None, "full", "fast", "full"):
        with loaded.request():
            results.append(generated(loaded, 0))
        assert _reused(loaded) == (loaded.tier == "fast")
    dense, full, fast, again = results
    torch.testing.assert_close(dense, generated(case.model, 0), rtol=1e-4, atol=1e-4)
    assert torch.equal(full, dense) and torch.equal(again, dense) and not torch.equal(fast, dense)
    with loaded.request(tier="fast"):
        assert torch.equal(generated(loaded, 0), fast)
