"""compile and load: parity with eager and Algorithm 1, tracing at the first call, ahead of time, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import edit_compile
from edit_compile import (
    CompiledTransformer,
    CompileError,
    EditError,
    InputError,
    RoutingPolicy,
    ScheduledPolicy,
    ShapeError,
)
from edit_compile.compiling.compiler import check_widths
from edit_compile.compiling.tracer import Tracer
from runtime.engines.tensorrt.jobs import jobs, make
from runtime.engines.tensorrt.library import open_library, targets
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from tests.conftest import WIDTHS, Compiled
from tests.flux_oracle import FluxOracle
from tests.models import noise, tiny_flux, tiny_sd3

STEPS = 28


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def always_open(compiled: CompiledTransformer, steps: int = 1) -> CompiledTransformer:
    blocks = len(compiled.program.manifest.blocks)
    compiled.policy = ScheduledPolicy([[1.0] * blocks] * steps)
    return compiled


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("case", ["flux", "dit", "sd3"])
def test_open_gates_give_the_dense_model(request: pytest.FixtureRequest, case: str, engine: str) -> None:
    compiled_case: Compiled = request.getfixturevalue(case)
    compiled = always_open(CompiledTransformer(compiled_case.program, engine=engine))
    dense = getattr(compiled_case.model, "model", compiled_case.model)
    with torch.no_grad():
        expected = dense(**compiled_case.inputs).sample
    assert distance(compiled(**compiled_case.inputs).sample, expected) <= 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes_need_no_new_glue(flux: Compiled, batch: int) -> None:
    compiled = always_open(CompiledTransformer(flux.program, engine="torch"))
    _, inputs = tiny_flux(batch=batch)
    with torch.no_grad():
        expected = flux.model.model(**inputs).sample
    assert distance(compiled(**inputs).sample, expected) <= 1e-4


def test_eager_elastic_and_compiled_elastic_agree_without_reuse(flux: Compiled) -> None:
    compiled = CompiledTransformer(flux.program, engine="torch", policy=RoutingPolicy(margin=0.0))
    with torch.no_grad():
        expected = flux.model.eval()(**flux.inputs).sample
    assert distance(compiled(**flux.inputs).sample, expected) <= 1e-4


def test_compile_with_nothing_else_traces_at_the_first_call_and_for_new_shapes(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=1)
    with pytest.warns(UserWarning, match="no routers"):
        compiled = edit_compile.compile(model, widths=[0.5, 1], engine="torch")
    assert compiled.config.in_channels == model.config.in_channels
    assert (compiled.dtype, compiled.device) == (torch.float32, torch.device("cpu"))
    with pytest.raises(EditError, match="nothing to save yet"):
        compiled.save(tmp_path / "early.edit")
    plans = []
    for side in (4, 6, 5):
        _, inputs = tiny_flux(side=side)
        with torch.no_grad():
            expected = model(**inputs, return_dict=False)[0]
        assert distance(compiled(**inputs, return_dict=False)[0], expected) <= 1e-4
        plans.append(len(compiled.program.manifest.plans))
    assert len(compiled.program.manifest.glues) == 3
    assert plans == [2, 4, 4]  # those of the first size, and others for any size


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = tiny_sd3()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    Tracer(model, (0.5, 1.0), None).trace(inputs)
    assert model.training
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ahead_of_time_bundle_runs_in_a_process_without_the_compiler(flux: Compiled, tmp_path: Path) -> None:
    bundle = tmp_path / "flux.edit"
    compiled = CompiledTransformer(flux.program, engine="torch")
    compiled.save(bundle)
    expected = compiled(**flux.inputs).sample
    torch.save({"inputs": dict(flux.inputs), "expected": expected}, tmp_path / "call.pt")
    script = f"""
import sys, torch, edit_compile
call = torch.load({str(tmp_path / "call.pt")!r}, weights_only=True)
for engine in ("onnxruntime", "torch"):
    compiled = edit_compile.load({str(bundle)!r}, engine=engine)
    out = compiled(**call["inputs"]).sample
    assert (out - call["expected"]).abs().max() <= 1e-4 * call["expected"].abs().max()
heavy = {{"diffusers", "onnx", "onnxscript", "transformers", "passes", "edit_compile.compiling.compiler", "accelerate"}}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout


def test_a_loaded_bundle_names_the_shapes_it_was_compiled_for(flux: Compiled) -> None:
    compiled = CompiledTransformer(flux.program, engine="torch")
    _, larger = tiny_flux(side=6)
    with pytest.raises(ShapeError, match=r"hidden_states \(\*, 16, 8\)"):
        compiled(**larger)


def test_bad_arguments_are_named(flux: Compiled) -> None:
    compiled = CompiledTransformer(flux.program, engine="torch")
    missing = {name: value for name, value in flux.inputs.items() if name != "encoder_hidden_states"}
    with pytest.raises(InputError, match="encoder_hidden_states"):
        compiled(**missing)
    with pytest.raises(InputError, match="colour"):
        compiled(**flux.inputs, colour="red")
    with pytest.raises(InputError, match=r"hidden_states.*NaN"):
        compiled(**{**flux.inputs, "hidden_states": torch.full_like(flux.inputs["hidden_states"], torch.nan)})
    with pytest.raises(InputError, match="LoRA"):
        compiled(**flux.inputs, joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(InputError, match="IP-Adapter"):
        compiled(**flux.inputs, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})


@pytest.mark.parametrize(
    ("widths", "said"),
    [([0.5], "lack 1"), ([0, 1], "0.0 is outside"), ([0.5, 1.5, 1], "1.5"), ([1, 1], "twice"), ([], "lack")],
)
def test_widths_that_make_no_sense(widths: list[float], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        check_widths(widths)


def test_a_model_without_blocks_is_refused_with_reasons(tmp_path: Path) -> None:
    class Decoy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(8, 3)])

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.heads[0](hidden_states + timestep[:, None, None])

    inputs = {"hidden_states": torch.randn(2, 5, 8), "timestep": torch.rand(2)}
    with pytest.raises(CompileError, match=r"heads\.0: returns no tensor"):
        edit_compile.compile(Decoy(), inputs=inputs, output=tmp_path / "none.edit")
    assert not list(tmp_path.iterdir())


def test_output_and_dry_run_need_inputs(tmp_path: Path) -> None:
    model, _ = tiny_flux(double=1, single=0)
    for wanted in ({"output": tmp_path / "x.edit"}, {"dry_run": True}):
        with pytest.raises(CompileError, match="needs inputs"):
            edit_compile.compile(model, **wanted)


def test_dry_run_reports_plans_and_refusals() -> None:
    model, inputs = tiny_flux()
    elastic = edit_compile.elasticize(model, inputs)
    report = edit_compile.compile(elastic, inputs=inputs, dry_run=True)
    assert report.blocks == 4
    assert len({row.plan for row in report.plans}) == 2
    assert len(report.plans) == 8
    full, quarter = (next(r for r in report.plans if r.width == w) for w in (1.0, 0.25))
    assert quarter.flops < full.flops
    assert full.hidden == (512, 512)
    assert report.router_parameters > 0
    refused = {refusal.where for _, refusal in report.refused}
    assert "transformer_blocks.0.norm1.linear.weight" in refused
    told = " ".join(str(report).split())
    assert f"{len(refused)} weights belong to no MLP that can be narrowed" in told
    assert "4 blocks are guarded" in told and "left alone" not in told


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("batch", [1, 4])
def test_generation_with_guidance_follows_algorithm_1(flux: Compiled, engine: str, batch: int) -> None:
    policy = RoutingPolicy(threshold=0.4, margin=0.25, max_reuse=2)
    compiled = CompiledTransformer(flux.program, engine=engine, policy=policy)
    oracle = FluxOracle(flux.model.model, flux.program.routers, WIDTHS, 0.4, 0.25, 2)
    _, inputs = tiny_flux(batch=batch)
    texts = {"cond": inputs["encoder_hidden_states"], "uncond": noise(*inputs["encoder_hidden_states"].shape, seed=9)}
    x = y = inputs["hidden_states"]
    for step in range(STEPS):
        now = torch.full((batch,), 1 - step / STEPS)
        velocity = {}
        for context, text in texts.items():
            given = {**inputs, "timestep": now, "encoder_hidden_states": text}
            with compiled.cache_context(context):
                ours = compiled(**{**given, "hidden_states": x})[0]
            velocity[context] = (ours, oracle(context, {**given, "hidden_states": y}))
        ours, theirs = (velocity["uncond"][k] + 2 * (velocity["cond"][k] - velocity["uncond"][k]) for k in (0, 1))
        x, y = x - ours / STEPS, y - theirs / STEPS
        assert (x - y).abs().max() <= 1e-4 * y.abs().max(), f"step {step}"
    _check_decisions(compiled, oracle)


def _check_decisions(compiled: CompiledTransformer, oracle: FluxOracle) -> None:
    """The trace says what the oracle did, and skip, reuse and at least three widths occurred."""
    columns = compiled.trace[-1].arrays()
    names = {SKIPPED: "skip", REUSED: "reuse", COMPUTED: "compute"}
    contexts = compiled.trace[-1].contexts
    ours = sorted(
        (contexts[c], int(r), int(b), names[int(d)], float(w))
        for c, r, b, d, w in zip(*(columns[n] for n in ("context", "row", "block", "done", "width")), strict=True)
    )
    assert ours == sorted(oracle.log)
    assert {entry[3] for entry in oracle.log} == {"skip", "reuse", "compute"}
    assert len({entry[4] for entry in oracle.log} - {0.0}) >= 3


def test_plans_tell_the_shapes_they_were_compiled_for(flux: Compiled) -> None:
    for plan in flux.program.manifest.plans:
        (bucket,) = plan.buckets
        for given, shape in zip(plan.inputs, bucket, strict=True):
            assert [dim for dim, size in enumerate(shape) if size is None] == ([] if given.batch_dim is None else [0])


def test_tensorrt_builds_every_plan_at_every_width(flux: Compiled) -> None:
    """Here, where the model's plans are lowered anyway; in the precisions of GPUs it is a slow test."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx_cu13 is not installed (see the Makefile)")
    library = open_library("tensorrt-rtx")
    built = [make(job, flux.program, library)[0] for job in jobs(flux.program, library, targets(library, ["sm_89"]))]
    assert len(built) == 8
    assert all(len(engine) > 100_000 for engine in built)


def test_what_cannot_work_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")

    def untraceable(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was called")

    model.forward = untraceable
    for match, wanted in (
        ("no engine 'onnx'; there are onnxruntime, torch", {"engine": "onnx"}),
        ("mine exists and is not a bundle", {"output": tmp_path / "mine"}),
        ("thesis.tex is not a folder", {"output": tmp_path / "mine" / "thesis.tex" / "deep" / "x.edit"}),
    ):
        with pytest.raises(EditError, match=match):
            edit_compile.compile(model, inputs=inputs, **wanted)


def test_things_given_to_the_wrong_function_are_told_apart(tmp_path: Path) -> None:
    model, inputs = tiny_flux(double=1, single=0)
    elastic = edit_compile.elasticize(model, inputs)
    with pytest.raises(ValueError, match="elastic already"):
        edit_compile.elasticize(elastic)
    with pytest.raises(CompileError, match="compiled already"):
        edit_compile.compile(edit_compile.compile(elastic))
    elastic.save_pretrained(tmp_path / "elastic")
    with pytest.raises(EditError, match=r"elastic is not a bundle but a saved model: `edit-compile compile`"):
        edit_compile.load(tmp_path / "elastic")
    with pytest.raises(EditError, match=r"there is no .*nowhere"):
        edit_compile.load(tmp_path / "nowhere")
