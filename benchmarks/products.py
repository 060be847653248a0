"""What it costs that an MLP's second weight is kept row by row: python -m benchmarks.products [--output FOLDER]

x W for 1152 tokens, 4096 to 1024 channels, by torch: W row by row ([H, D], as bundles keep it), W laid out anew before
the product (`runtime.engines.products`), and W column by column, as a linear keeps it. Writes results/products.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.measuring.timing import Spread, interleaved
from runtime.engines.products import Relaid

TOKENS, HIDDEN, DIM = 1152, 4096, 1024
DTYPES = ("float32", "bfloat16", "float16")
RESULTS = Path(__file__).parent / "results"


def measure(dtype: torch.dtype, repeats: int) -> dict[str, Spread]:
    """Milliseconds of each way."""
    x, w = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(HIDDEN, DIM).to(dtype)
    linear = w.t().contiguous()

    def relaid() -> None:
        with Relaid():
            x @ w

    calls = {
        "row by row": [lambda: x @ w],
        "laid out anew": [relaid],
        "column by column": [lambda: torch.nn.functional.linear(x, linear)],
    }
    with torch.no_grad():
        return {name: Spread.of(values * 1e3) for name, values in interleaved(calls, repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rows = {name: measure(getattr(torch, name), given.repeats) for name in DTYPES}
    machine = describe_machine()
    table = Table("ms of a product", *next(iter(rows.values())), title=f"{TOKENS} x {HIDDEN} x {DIM}")
    for name, found in rows.items():
        table.add_row(name, *map(str, found.values()))
    table.caption = summary(machine)
    Console().print(table)
    told = {dtype: {name: asdict(spread) for name, spread in found.items()} for dtype, found in rows.items()}
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "products.json").write_text(json.dumps({"machine": machine, "ms": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
