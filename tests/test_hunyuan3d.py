"""Hunyuan3D-2's transformer as its authors ship it, which diffusers does not know.

From the package hy3dgen, whose dependencies are left out: its one file is imported alone (the Makefile has the line).
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
import torch

import edit_compile
from edit_compile import RoutingPolicy
from edit_compile.elastic.transformer import ElasticTransformer
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from tests.catalogue import WIDTHS, follow_decisions, train_routers
from tests.models import noise, randomised
from tests.tracing import Watched
from tests.zoo import Case

FILE = "hy3dgen/shapegen/models/denoisers/hunyuan3ddit.py"


def authors_module() -> ModuleType:
    """The file of the denoiser, without the packages around it; skips the tests where it is not installed."""
    pytest.importorskip("einops", reason="Hunyuan3D-2 needs einops: pip install edit-compile[hunyuan3d]")
    try:
        path = Path(str(distribution("hy3dgen").locate_file(FILE)))
    except PackageNotFoundError:
        pytest.skip("the authors' code is not here: pip install --no-deps hy3dgen==2.0.2")
    spec = importlib.util.spec_from_file_location("hunyuan3ddit", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["hunyuan3ddit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny() -> Case:
    """The distilled form, which is told the strength of the guidance by a keyword that its forward does not name."""
    model = authors_module().Hunyuan3DDiT(
        in_channels=8,
        context_in_dim=12,
        hidden_size=32,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16],
        guidance_embed=True,
    )
    inputs = {
        "x": noise(2, 9, 8),
        "t": torch.tensor([0.9, 0.4]),
        "contexts": {"main": noise(2, 5, 12, seed=2)},
        "guidance": torch.full((2,), 5.0),
    }
    return Case(randomised(model), inputs)


@dataclass(frozen=True)
class Made:
    case: Case
    elastic: ElasticTransformer
    tracer: Watched
    program: Program


@pytest.fixture(scope="module")
def made() -> Made:
    case = tiny()
    elastic = edit_compile.elasticize(case.model)
    tracer = Watched(elastic, WIDTHS, None)
    return Made(case, elastic, tracer, tracer.trace(case.inputs))


def test_all_blocks_and_their_mlps_are_found(made: Made) -> None:
    manifest, analysis = made.program.manifest, made.tracer.analysis
    assert [glue.file for glue in manifest.glues] == ["glue/0.pt2"]
    assert manifest.timestep == "t"
    names = [f"{kind}_blocks.{index}" for kind in ("double", "single") for index in range(2)]
    assert [block.name for block in manifest.blocks] == names
    assert [len(group.sites) for group in analysis.groups] == [2, 1]
    assert all(site.time is not None for site in analysis.discovery.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_every_width_and_a_decision_sequence_agree_with_eager(made: Made, engine: str) -> None:
    compiled = CompiledTransformer(made.program, engine)
    made.tracer.prove(compiled, made.case.inputs)
    follow_decisions(compiled, made.tracer.analysis, made.case)


def test_its_routers_train(made: Made) -> None:
    train_routers(made.case, made.tracer.analysis)


def test_the_authors_pipeline_calls_it_by_position_and_keyword(made: Made) -> None:
    """As their flow-matching pipeline does; open gates and full widths change nothing."""
    policy = RoutingPolicy.preset("hunyuan3d")
    compiled = CompiledTransformer(made.program, "torch", policy)
    x, t, contexts, guidance = made.case.inputs.values()
    with torch.no_grad():
        expected = made.case.model(x, t, contexts, guidance=guidance)
        torch.testing.assert_close(made.elastic(x, t, contexts, guidance=guidance), expected)
    for _ in range(3):
        given = compiled(x, t, contexts, guidance=guidance)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert compiled.policy == policy


@pytest.mark.slow
def test_a_bundle_runs_without_the_authors_code(made: Made, tmp_path: Path) -> None:
    policy = RoutingPolicy.preset("hunyuan3d")
    CompiledTransformer(made.program, "onnxruntime", policy).save(tmp_path / "hunyuan3d.edit")
    for engine in ("torch", "onnxruntime"):
        loaded = edit_compile.load(tmp_path / "hunyuan3d.edit", engine=engine)
        assert loaded.policy == policy
        with torch.no_grad():
            expected = made.case.model(**made.case.inputs)
        torch.testing.assert_close(loaded(**made.case.inputs), expected, rtol=1e-4, atol=1e-4)
