"""`flux-mid`: FLUX at a third of its width and a fifth of its depth, on this machine.

python -m benchmarks.flux_mid            all figures, minutes
python -m benchmarks.flux_mid --small    the same code on a toy, seconds
python -m benchmarks.flux_mid --runs bfloat16 float32:torch float32::low_rank float32::full:4
    dtype[:engine[:modulation of the routers[:their token stride]]]; the engine chosen by itself where none is named

Random weights; decisions at random at FLUX's budget (half of the blocks, mean width .6), the routers run all the same.
Writes benchmarks/results/flux_mid.json, from which the README's table is made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

import edit_compile
from benchmarks.configurations import FLUX_MID, Place
from benchmarks.measures import against_inductor, dispatch_cost, plan_counts, width_costs
from benchmarks.memory import measure_memory, tensor_bytes
from benchmarks.readme import routers_of
from edit_compile.compiling.compiler import compile as compile_model
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.measuring.benchmarking import benchmark
from edit_compile.measuring.machine import describe_machine, summary
from runtime.bundle.spec import RouterConfig
from runtime.face.load import load
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy

RESULTS = Path(__file__).parent / "results"
GATE, WIDTH = 0.5, 0.6
RUNS = ["float32", "bfloat16", "float32::full:4", "bfloat16::full:4", "float32:torch", "float32:onnxruntime"]
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
        shape = replace(FLUX_MID, config=dict(model.config), side=self.side, text=self.text)
        return shape.inputs(Place(torch.device("cpu"), model.dtype)) | {"return_dict": False}


MID = Shape("flux-mid", double=4, single=8, heads=8, head_dim=128, side=32, text=128, steps=6, repeats=4)
SMALL = Shape("flux-small", double=1, single=2, heads=2, head_dim=32, side=4, text=8, steps=3, repeats=2)


def run(
    shape: Shape, dtype: torch.dtype, engine: str | None, routers: RouterConfig, compare_inductor: bool, folder: Path
) -> dict[str, Any]:
    """P1 to P6 of one dtype and engine, the one chosen where None."""
    model = shape.model(dtype)
    inputs = shape.inputs(model)
    bundle = folder / f"{shape.name}.edit"
    elastic = edit_compile.elasticize(model, inputs, config=routers)
    compile_seconds, held = _compile(elastic, inputs, engine, bundle)
    compiled, load_seconds = _load(bundle, engine)
    choice = compiled.engine_choice
    blocks = len(compiled.program.manifest.blocks)
    compiled.policy = ScheduledPolicy.at_budget(shape.steps, blocks, GATE, WIDTH)
    comparison = benchmark(model, compiled, inputs, shape.steps, shape.repeats)
    console.print(comparison)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "engine": compiled.engine,
        "chosen_by": None if choice is None else {"why": choice.why, "milliseconds": choice.milliseconds},
        "modulation": routers.modulation,
        "token_stride": routers.token_stride,
        "comparison": json.loads(comparison.to_json()),
        "widths": width_costs(model, compiled, inputs, shape.repeats),
        "dispatch": asdict(dispatch_cost(compiled, inputs, shape.repeats)),
        "memory": measure_memory(bundle, compiled.engine, comparison.dense_bytes)
        | {"held_after_compile": held / comparison.dense_bytes},
        "builds": {"compile_seconds": compile_seconds, "load_seconds": load_seconds} | plan_counts(compiled),
        "inductor": _inductor(model, compiled, inputs, shape) if compare_inductor else None,
    }


def _inductor(
    model: torch.nn.Module, compiled: CompiledTransformer, inputs: dict[str, Any], shape: Shape
) -> dict[str, float]:
    return against_inductor(torch.compile(model, dynamic=False), compiled, inputs, shape.repeats)


def _compile(
    elastic: ElasticTransformer, inputs: dict[str, Any], engine: str | None, bundle: Path
) -> tuple[float, int]:
    """Seconds of it, and bytes of the tensors that it leaves behind: the compiled weights, and what else is held."""
    before, started = tensor_bytes(), time.perf_counter()
    compiled = compile_model(elastic, inputs=inputs, engine=engine, output=bundle)
    seconds = time.perf_counter() - started
    held = tensor_bytes() - before
    del compiled
    return seconds, held


def _held(run: dict[str, Any]) -> str:
    """Of runs recorded before it was measured, nothing."""
    held = run["memory"].get("held_after_compile")
    return "" if held is None else f"{held:.3f}"


def _load(bundle: Path, engine: str | None) -> tuple[CompiledTransformer, dict[str, float]]:
    """The transformer, and the seconds of loading it for the first and for the second time."""
    seconds = []
    for _ in ("cold", "warm"):
        started = time.perf_counter()
        compiled = load(bundle, engine=engine)
        seconds.append(time.perf_counter() - started)
    return compiled, {"cold": seconds[0], "warm": seconds[1]}


def table_of(results: dict[str, Any]) -> Table:
    """All runs, a column each."""
    runs = results["runs"]
    table = Table("", *map(_heading, runs), title=results["shape"]["name"])
    for name, cell in ROWS.items():
        table.add_row(name, *(cell(run) for run in runs))
    table.caption = summary(results["machine"])
    return table


def _heading(run: dict[str, Any]) -> str:
    return f"{run['dtype']}, {run['engine']}{routers_of(run)}"


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
    "P4 tensors that compile leaves behind / dense weights": _held,
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
    parser.add_argument("--runs", nargs="+", default=RUNS)
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
        dtype, engine, modulation, stride = (*wanted.split(":"), "", "", "")[:4]
        routers = RouterConfig(modulation=modulation or "full", token_stride=int(stride or 1))
        with tempfile.TemporaryDirectory() as folder:
            made = run(shape, getattr(torch, dtype), engine or None, routers, given.inductor, Path(folder))
        results["runs"].append(made)
        path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table_of(results))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
