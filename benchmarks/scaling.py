"""What grows with a model and a request, on this machine: python -m benchmarks.scaling [guards request blocks].

guards      cost of a skipped guard, by tokens of the image and by blocks, at flux-mid's width: it should not grow
request     a whole request of 28 steps at flux-mid, one image, four and sixteen (7 steps), in bfloat16
blocks      one double and one single block of FLUX.1-dev's own size at the four widths, in bfloat16

On the engine that is chosen where none is named. Writes benchmarks/results/scaling.json, parts that are not asked for
keep what it says.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import edit_compile
from benchmarks.configurations import FLUX, FLUX_MID, Configuration, Place
from benchmarks.flux_mid import GATE, RESULTS, WIDTH
from benchmarks.measures import dispatch_cost, width_costs
from edit_compile.measuring.benchmarking import benchmark
from edit_compile.measuring.machine import describe_machine
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy

console = Console()


def compiled(shape: Configuration, dtype: torch.dtype, rows: int = 1, **options: Any) -> tuple[Any, Any, Any]:
    """A model of `shape` with routers, the same compiled, and the inputs of a call of `rows` images."""
    place = Place(torch.device("cpu"), dtype)
    model, one = shape.model(place), shape.inputs(place)
    apart = ("img_ids", "txt_ids")
    inputs = {k: v if k in apart else v.expand(rows, *v.shape[1:]).clone() for k, v in one.items()}
    inputs |= {"return_dict": False}
    elastic = edit_compile.elasticize(model, inputs)
    return model, edit_compile.compile(elastic, inputs=inputs, **options), inputs


def cut(shape: Configuration, blocks: int) -> Configuration:
    """`shape` with so many blocks of each kind."""
    return replace(shape, config={**shape.config, **dict.fromkeys(shape.depth, blocks)})


def guards() -> list[dict[str, Any]]:
    """P3 by tokens and by blocks."""
    found = []
    for side, blocks in ((16, 2), (32, 2), (64, 2), (16, 6), (16, 12)):
        shape = cut(replace(FLUX_MID, side=side), blocks)
        _, one, inputs = compiled(shape, torch.bfloat16, engine="torch")
        tokens = side**2 + shape.text
        alone = copy.copy(one)  # with no model beside it, which is looked at as each generation begins
        found.append({"tokens": tokens, "blocks": 2 * blocks} | asdict(dispatch_cost(alone, inputs, 2)))
    return found


def request() -> list[dict[str, Any]]:
    """A request of 28 steps for one image and for four whose rows decide apart, and of 7 for sixteen."""
    found = []
    for rows, steps in ((1, 28), (4, 28), (16, 7)):
        model, one, inputs = compiled(replace(FLUX_MID, side=32), torch.bfloat16, rows)
        count = len(one.program.manifest.blocks)
        apart = [ScheduledPolicy.at_budget(steps, count, GATE, WIDTH, seed=row).table for row in range(rows)]
        one.policy = ScheduledPolicy(np.stack(apart, -1))
        comparison = benchmark(model, one, inputs, steps, 1)
        found.append({"images": rows, "engine": one.engine} | json.loads(comparison.to_json()))
    return found


def blocks() -> list[dict[str, Any]]:
    """The four widths of one double and one single block of FLUX.1-dev, by themselves."""
    found = []
    for kept in FLUX.depth:
        shape = replace(cut(FLUX, 0), side=32)
        shape = replace(shape, config={**shape.config, kept: 1})
        model, one, inputs = compiled(shape, torch.bfloat16)
        assert isinstance(one, CompiledTransformer)
        found += [
            {"block": one.program.manifest.plans[0].kind, "engine": one.engine} | cost
            for cost in width_costs(model, one, inputs, 3)
        ]
    return found


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {"guards": guards, "request": request, "blocks": blocks}
SHOWN = {
    "guards": ("tokens", "blocks", "unrouted_us", "routed_us"),
    "request": ("images", "engine", "ratio", "flop_limit", "efficiency"),
    "blocks": ("block", "width", "ms", "flops_left", "efficiency"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=" ".join(PARTS))
    path = RESULTS / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    warnings.filterwarnings("ignore", message="the routers of .* were never trained")
    for name in parser.parse_args().parts:
        rows = PARTS[name]()
        results[name] = {"machine": describe_machine(), "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
        table = Table(*SHOWN[name], title=name)
        for row in rows:
            table.add_row(*(_cell(row[key]) for key in SHOWN[name]))
        console.print(table)


def _cell(value: Any) -> str:
    value = value["median"] if isinstance(value, dict) else value
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
