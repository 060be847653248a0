"""Rewrite the figures of the READMEs from benchmarks/results/*.json: python -m benchmarks.readme."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import evidence, evidence_told, example_tables, matrix, pareto, serving
from benchmarks.gpu_table import markdown
from benchmarks.markdown import table
from edit_compile.measuring.machine import summary

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
EXAMPLE = ROOT / "examples" / "fashion_mnist" / "README.md"
EVIDENCE = ROOT / "docs" / "evidence.md"
SERVING = ROOT / "docs" / "serving.md"
PICTURE = ROOT / "docs" / "pareto.svg"
DEPLOY = ROOT / "docs" / "deploy.md"
PAGES = (README, EXAMPLE, EVIDENCE, DEPLOY, SERVING)
HEADINGS = (
    "run",
    "eager, ms per step",
    "compiled",
    "times faster",
    "FLOPs would allow",
    "weights, four widths / dense",
)
NOT_MEASURED = "Not measured yet: `make bench` fills this in."
NO_MATRIX = "Not run yet: `make matrix` fills this in."
NO_GPU = (
    "There are no figures from a GPU yet: `python -m benchmarks.gpu` takes them on one ([docs/gpu.md](docs/gpu.md))."
)


def figures(results: Mapping[str, Any]) -> str:
    """One result file as a Markdown table with the machine named below it."""
    shape = results["shape"]
    found = table(HEADINGS, [_cells(shape["name"], run) for run in results["runs"]])
    taken = (
        f"{summary(results['machine'])}; {shape['steps']} steps, batch 1, {shape['side'] ** 2} image and "
        f"{shape['text']} text tokens; decisions drawn at random at FLUX's budget, routers run. "
        f"Medians; in brackets the middle half of {shape['repeats']} requests. Weights are for all four widths."
    )
    return f"{found}\n\n{taken}"


def tables_of(folder: Path) -> list[str]:
    """What there is of figures in `folder`, and which are missing."""
    mid, gpu = folder / "flux_mid.json", folder / "gpu.json"
    return [
        figures(json.loads(mid.read_text())) if mid.exists() else NOT_MEASURED,
        markdown(json.loads(gpu.read_text())) if gpu.exists() else NO_GPU,
    ]


def marks(name: str) -> tuple[str, str]:
    """What stands before and after figures called `name`."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def with_figures(text: str, tables: list[str], name: str = "figures") -> str:
    """`text` with everything between the two marks replaced by `tables`; ValueError where a mark is missing."""
    opening, closing = marks(name)
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"the text lacks {opening} or {closing}")
    return "\n".join([f"{before}{opening}", "\n\n".join(tables), f"{closing}{after}"])


def written(path: Path, folder: Path) -> str:
    """The text of one of `PAGES`, with figures from the results in `folder`."""
    text = path.read_text()
    if path == EXAMPLE:
        text = with_figures(text, [example_tables.time_parts(_read(folder, "example_time"))], "time parts")
        return with_figures(text, [example_tables.partial_steps(_read(folder, "partial_steps"))], "partial steps")
    if path == DEPLOY:
        there = (folder / "matrix.json").exists()
        return with_figures(text, [matrix.markdown(_read(folder, "matrix")) if there else NO_MATRIX], "matrix")
    if path == SERVING:
        for name, told in serving.sections(_read(folder, "serve")).items():
            text = with_figures(text, [told], name)
        return text
    rivals = _read(folder, "rivals")
    if path == EVIDENCE:
        paper, starts = (_read(folder, n) if (folder / f"{n}.json").exists() else None for n in ("paper", "starts"))
        for name, told in evidence.sections(rivals, _read(folder, "tuned"), paper, starts).items():
            text = with_figures(text, [told], name)
        return text
    text = with_figures(text, tables_of(folder))
    text = with_figures(text, [evidence_told.headline(rivals)], "headline")
    return with_figures(text, [example_tables.tuned(_read(folder, "tuned"))], "tuned")


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def routers_of(run: Mapping[str, Any]) -> str:
    """What is not as the paper has it in a run's routers."""
    told = "" if run["modulation"] == "full" else f", {run['modulation'].replace('_', '-')} routers"
    stride = run.get("token_stride", 1)
    return told if stride == 1 else f"{told}, routers read every {stride} tokens"


def _cells(name: str, run: Mapping[str, Any]) -> tuple[str, ...]:
    found = run["comparison"]
    ratio = found["ratio"]
    return (
        f"{name}, {run['dtype']}, {run['engine']}{routers_of(run)}",
        f"{found['eager_ms']['median']:.0f}",
        f"{found['compiled_ms']['median']:.0f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"{found['flop_limit']:.2f}",
        f"{found['memory']:.2f}",
    )


def main() -> None:
    for path in PAGES:
        path.write_text(written(path, RESULTS))
        sys.stdout.write(f"{path}: written from what {RESULTS} holds\n")
    pareto.write(_read(RESULTS, "rivals"), PICTURE)


if __name__ == "__main__":
    main()
