"""`flux-mid`: FLUX at a third of its width and a fifth of its depth, on this machine.

python -m benchmarks.flux_mid            all figures, minutes
python -m benchmarks.flux_mid --small    the same code on a toy, seconds
python -m benchmarks.flux_mid --runs bfloat16:torch float32:torch:low_rank    dtype:engine[:modulation of the routers]

Random weights; decisions at random at FLUX's budget (half of the blocks, mean width .6), the routers run all the same.
Writes benchmarks/results/flux_mid.json, from which the README's table is made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

import edit_compile
from benchmarks.memory import measure_memory
from edit_compile.benchmarking import benchmark
from edit_compile.compiler import compile as compile_model
from edit_compile.elastic import ElasticTransformer
from edit_compile.machine import describe_machine, summary
from edit_compile.timing import Spread, interleaved
from runtime import pt2
from runtime.guard import answering
from runtime.loading import load
from runtime.policy import SKIP, ScheduledPolicy
from runtime.transformer import CompiledTransformer

RESULTS = Path(__file__).parent / "results"
GATE, WIDTH = 0.5, 0.6
console = Console()


@dataclass(frozen=True)
class Shape:
    """Size of the model and of one call. `steps` of a request, `repeats` timed requests."""

    name: str
    double: int
    single: int
    heads: int
    head_dim: int
    side: int
    text: int
    steps: int
    repeats: int

    def model(self, dtype: torch.dtype) -> FluxTransformer2DModel:
        """Random weights, in eval mode."""
        torch.manual_seed(0)
        half = (self.head_dim - 16) // 2
        return (
            FluxTransformer2DModel(
                in_channels=64,
                num_layers=self.double,
                num_single_layers=self.single,
                attention_head_dim=self.head_dim,
                num_attention_heads=self.heads,
                joint_attention_dim=4096 if self.heads > 2 else 64,
                pooled_projection_dim=768 if self.heads > 2 else 32,
                guidance_embeds=True,
                axes_dims_rope=(16, half, half),
            )
            .to(dtype)
            .eval()
        )

    def inputs(self, model: FluxTransformer2DModel) -> dict[str, Any]:
        """Keyword arguments of one call, one image."""
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=generator)
        rows = torch.arange(self.side).repeat_interleave(self.side)
        columns = torch.arange(self.side).repeat(self.side)
        tensors = {
            "hidden_states": draw(1, self.side**2, model.config.in_channels),
            "encoder_hidden_states": draw(1, self.text, model.config.joint_attention_dim),
            "pooled_projections": draw(1, model.config.pooled_projection_dim),
            "timestep": torch.ones(1),
            "guidance": torch.full((1,), 3.5),
        }
        ids = {
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).float(),
            "txt_ids": torch.zeros(self.text, 3),
        }
        return {name: tensor.to(model.dtype) for name, tensor in tensors.items()} | ids | {"return_dict": False}


MID = Shape("flux-mid", double=4, single=8, heads=8, head_dim=128, side=32, text=128, steps=6, repeats=4)
SMALL = Shape("flux-small", double=1, single=2, heads=2, head_dim=32, side=4, text=8, steps=3, repeats=2)


def run(
    shape: Shape, dtype: torch.dtype, engine: str, modulation: str, compare_inductor: bool, folder: Path
) -> dict[str, Any]:
    """P1 to P6 of one dtype and engine."""
    model = shape.model(dtype)
    inputs = shape.inputs(model)
    bundle = folder / f"{shape.name}-{engine}.edit"
    elastic = edit_compile.elasticize(model, inputs, config=edit_compile.RouterConfig(modulation=modulation))
    compile_seconds = _compile(elastic, inputs, engine, bundle)
    compiled, load_seconds = _load(bundle, engine)
    blocks = len(compiled.program.manifest.blocks)
    compiled.policy = ScheduledPolicy.at_budget(shape.steps, blocks, GATE, WIDTH)
    comparison = benchmark(model, compiled, inputs, shape.steps, shape.repeats)
    console.print(comparison)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "engine": engine,
        "modulation": modulation,
        "comparison": json.loads(comparison.to_json()),
        "widths": width_costs(model, compiled, inputs, shape.repeats),
        "dispatch": asdict(dispatch_cost(compiled, inputs, shape.repeats)),
        "memory": measure_memory(bundle, engine, comparison.dense_bytes),
        "builds": {"compile_seconds": compile_seconds, "load_seconds": load_seconds} | _plans(compiled),
        "inductor": against_inductor(model, compiled, inputs, shape) if compare_inductor else None,
    }


def width_costs(
    model: torch.nn.Module, compiled: CompiledTransformer, inputs: dict[str, Any], repeats: int
) -> list[dict[str, float]]:
    """Steps with all blocks at one width and no routers: ms, FLOPs / dense, and the share of what those allow."""
    blocks = len(compiled.program.manifest.blocks)
    policies = {
        width: ScheduledPolicy(np.full((1, blocks), width), routed=False) for width in compiled.program.manifest.widths
    }
    left = {}

    def step(width: float) -> None:
        compiled.policy = policies[width]
        compiled._reset_stateful_cache()
        compiled.reset_counters()
        compiled(**inputs)
        left[width] = compiled.counters.flops / compiled.counters.dense_flops

    calls: dict[Any, list[Any]] = {width: [partial(step, width)] for width in policies}
    calls["eager"] = [partial(model, **inputs)]
    with torch.no_grad():
        seconds = interleaved(calls, repeats)
    median = {name: Spread.of(values).median for name, values in seconds.items()}
    return [
        {
            "width": width,
            "ms": median[width] * 1e3,
            "flops_left": left[width],
            "efficiency": median["eager"] / median[width] * left[width],
        }
        for width in policies
    ]


@dataclass(frozen=True)
class DispatchCost:
    """P3: what a guard costs when its block is skipped, in microseconds.

    `routed_us` with the router, `unrouted_us` without (the guard alone), `glue_ms` the glue with guards that answer at
    once. Each round's glue is taken from the same round's steps, so that a machine that drifts does not show.
    """

    routed_us: float
    unrouted_us: float
    glue_ms: float


def dispatch_cost(compiled: CompiledTransformer, inputs: dict[str, Any], repeats: int) -> DispatchCost:
    """Times steps in which every block is skipped, with and without routers, and the glue alone, interleaved."""
    guards = len(compiled.program.manifest.blocks)
    table = np.full((1, guards), SKIP)
    policies = {"routed": ScheduledPolicy(table), "unrouted": ScheduledPolicy(table, routed=False)}

    def skipping(policy: ScheduledPolicy) -> None:
        compiled.policy = policy
        compiled._reset_stateful_cache()
        compiled(**inputs)

    calls = {name: [partial(skipping, policy)] for name, policy in policies.items()}
    calls["glue"] = [partial(_glue_alone(compiled), inputs)]
    with torch.no_grad():
        seconds = interleaved(calls, 25 * repeats, warmup=3)
    per_guard = {name: Spread.of(seconds[name] - seconds["glue"]).median / guards * 1e6 for name in policies}
    return DispatchCost(per_guard["routed"], per_guard["unrouted"], Spread.of(seconds["glue"]).median * 1e3)


def against_inductor(
    model: torch.nn.Module, compiled: CompiledTransformer, inputs: dict[str, Any], shape: Shape
) -> dict[str, float]:
    """P6: milliseconds of a dense step, compiled here and by torch.compile."""
    inductor = torch.compile(model, dynamic=False)
    compiled.policy = ScheduledPolicy(np.ones((1, len(compiled.program.manifest.blocks))), routed=False)

    def dense() -> None:
        compiled._reset_stateful_cache()
        compiled(**inputs)

    with torch.no_grad():
        runs = {"edit_compile": [dense], "torch.compile": [partial(inductor, **inputs)]}
        seconds = interleaved(runs, 2 * shape.repeats, warmup=2)
    median = {f"{name}_ms": Spread.of(values).median * 1e3 for name, values in seconds.items()}
    return median | {"ratio": median["edit_compile_ms"] / median["torch.compile_ms"]}


def _compile(elastic: ElasticTransformer, inputs: dict[str, Any], engine: str, bundle: Path) -> float:
    started = time.perf_counter()
    compile_model(elastic, inputs=inputs, engine=engine, output=bundle)
    return time.perf_counter() - started


def _load(bundle: Path, engine: str) -> tuple[CompiledTransformer, dict[str, float]]:
    """The transformer, and the seconds of loading it for the first and for the second time."""
    seconds = []
    for _ in ("cold", "warm"):
        started = time.perf_counter()
        compiled = load(bundle, engine=engine)
        seconds.append(time.perf_counter() - started)
    return compiled, {"cold": seconds[0], "warm": seconds[1]}


def _plans(compiled: CompiledTransformer) -> dict[str, int]:
    manifest = compiled.program.manifest
    return {"blocks": len(manifest.blocks), "engines": sum(len(plan.variants) for plan in manifest.plans)}


def _glue_alone(compiled: CompiledTransformer) -> Any:
    """A call of the glue whose guards hand their states back at once."""
    program = compiled.program
    (glue,) = program.manifest.glues
    plans = {plan.id: plan for plan in program.manifest.plans}
    states = [plans[block.plan].states for block in program.manifest.blocks]
    graph = pt2.load(program.files[glue.file])
    weights = [program.weights[key] for key in glue.weights]

    def call(kwargs: dict[str, Any]) -> None:
        with answering(lambda block, inputs: [inputs[index] for index in states[block]]):
            graph(*weights, *(kwargs[given.name] for given in glue.inputs))

    return call


def table_of(results: dict[str, Any]) -> Table:
    """All runs, a column each."""
    runs = results["runs"]
    table = Table("", *map(_heading, runs), title=results["shape"]["name"])
    for name, cell in ROWS.items():
        table.add_row(name, *(cell(run) for run in runs))
    table.caption = summary(results["machine"])
    return table


def _heading(run: dict[str, Any]) -> str:
    told = "" if run["modulation"] == "full" else f", {run['modulation']} routers"
    return f"{run['dtype']}, {run['engine']}{told}"


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.4g} ({spread['low']:.4g} to {spread['high']:.4g})"


ROWS: dict[str, Any] = {
    "eager, ms per step": lambda run: _spread(run["comparison"]["eager_ms"]),
    "compiled, ms per step": lambda run: _spread(run["comparison"]["compiled_ms"]),
    "P1 times faster": lambda run: _spread(run["comparison"]["ratio"]),
    "what the FLOPs left allow": lambda run: f"{run['comparison']['flop_limit']:.3g}",
    "P2 share of that": lambda run: f"{run['comparison']['efficiency']:.0%}",
    "P2 of all blocks at one width, without routers": lambda run: ", ".join(
        f"{cost['efficiency']:.0%} at {cost['width']:g}" for cost in run["widths"]
    ),
    "P3 microseconds per skipped guard": lambda run: (
        f"{run['dispatch']['unrouted_us']:.0f} ({run['dispatch']['routed_us']:.0f} with its router)"
    ),
    "P4 resident weights / dense": lambda run: f"{run['comparison']['memory']:.3f}",
    "P4 resident memory of a fresh process / dense weights": lambda run: f"{run['memory']['ratio']:.2f}",
    "P5 engines": lambda run: f"{run['builds']['engines']} for {run['builds']['blocks']} blocks",
    "P5 seconds to compile; load cold, warm": lambda run: (
        f"{run['builds']['compile_seconds']:.0f}; {run['builds']['load_seconds']['cold']:.2f}, "
        f"{run['builds']['load_seconds']['warm']:.2f}"
    ),
    "P6 dense compiled / torch.compile": lambda run: f"{run['inductor']['ratio']:.2f}" if run["inductor"] else "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy model: shows that the code runs, nothing more")
    parser.add_argument("--inductor", action="store_true", help="P6: also compare with torch.compile (minutes)")
    parser.add_argument("--runs", nargs="+", default=["float32:onnxruntime", "float32:torch", "float32:torch:low_rank"])
    parser.add_argument("--steps", type=int, help="steps of a request")
    parser.add_argument("--repeats", type=int, help="timed requests")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    shape = SMALL if given.small else MID
    shape = replace(shape, steps=given.steps or shape.steps, repeats=given.repeats or shape.repeats)
    results: dict[str, Any] = {"shape": asdict(shape), "machine": describe_machine(), "runs": []}
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"{shape.name.replace('-', '_')}.json"
    for wanted in given.runs:
        dtype, engine, modulation = (*wanted.split(":"), "full")[:3]
        with tempfile.TemporaryDirectory() as folder:
            results["runs"].append(run(shape, getattr(torch, dtype), engine, modulation, given.inductor, Path(folder)))
        path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table_of(results))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
