"""The demo's measurements, run in a process that only reads the bundles: latency, work and quality of each variant."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import edit_compile
from edit_compile.measuring.machine import describe_machine
from edit_compile.measuring.plot import latency_bars, router_heat_map, save
from edit_compile.measuring.timing import Call, Spread, interleaved
from examples.fashion_mnist.data import CLASSES
from examples.fashion_mnist.demo_reference import Reference, load_reference
from examples.fashion_mnist.demo_tiers import measure_tiers
from examples.fashion_mnist.judge import Judge, judged, load_judge
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.sample import FEW_STEPS, sample, save_grid
from runtime.face.load import load
from runtime.face.transformer import CompiledTransformer

BATCH = 50
SHOWN = 30
BASE = "dense, eager"
ELASTIC, FROZEN = "elastic, compiled", "elastic, frozen"
VARIANTS = {"dense, compiled": "dense.edit", ELASTIC: "elastic.edit"}


@dataclass(frozen=True)
class Row:
    """One variant: ms of a step of all ten classes with both guidance branches, `ratio` to the dense eager model.

    `flops_left` is a share of the dense FLOPs. `accuracy` is the share of images that the judge takes for the asked
    class, `distance` Frechet to the test set.
    """

    name: str
    ms: Spread
    ratio: Spread
    flops_left: float
    accuracy: float
    distance: float
    grid: str


class Recorder(nn.Module):
    """Calls a model and keeps the keyword arguments of every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[dict[str, Any]] = []

    def forward(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return self.model(**kwargs)


def time_variants(models: Mapping[str, nn.Module], repeats: int) -> dict[str, tuple[Spread, Spread]]:
    """(ms per step, ratio to `BASE`) of each model on the steps of one sampling, interleaved."""
    recorder = Recorder(models[BASE])
    sample(recorder, torch.arange(len(CLASSES)), steps=FEW_STEPS)
    steps = list(zip(recorder.calls[::2], recorder.calls[1::2], strict=True))
    runs: dict[str, list[Call]] = {
        name: [partial(_one_step, model, cond, uncond) for cond, uncond in steps] for name, model in models.items()
    }
    compiled = next(model for model in models.values() if isinstance(model, CompiledTransformer))
    with torch.no_grad(), compiled.request():  # by name, as the latents are those of the dense model's sampling
        seconds = interleaved(runs, repeats, before_run=partial(_begin, models))
    base = seconds[BASE].sum(1)
    return {name: (Spread.of(taken * 1e3), Spread.of(base / taken.sum(1))) for name, taken in seconds.items()}


def draw(model: Callable[..., Any], images: int, on_step: Callable[[int, float], None]) -> Tensor:
    """Images (N, 28, 28), classes in turn; equal noise for every model."""
    labels = torch.arange(images) % len(CLASSES)
    batches = enumerate(labels.split(BATCH))
    return torch.cat([sample(model, part, steps=FEW_STEPS, seed=i, on_step=on_step) for i, part in batches])


def frozen(elastic: CompiledTransformer) -> CompiledTransformer:
    """`elastic` with what its routers decide most often for other images in their place."""
    for seed in range(4):
        with elastic.request():
            sample(elastic, torch.arange(len(CLASSES)), steps=FEW_STEPS, seed=9000 + seed)
    elastic.policy = edit_compile.freeze(elastic).policy
    elastic.trace.clear()
    return elastic


def judge_images(images: Tensor, judge: Judge, reference: Reference) -> tuple[float, float]:
    """(accuracy, Frechet distance) of images whose classes come in turn."""
    predicted, features = judged(judge, images)
    asked = torch.arange(len(images)) % len(CLASSES)
    return (predicted == asked).float().mean().item(), reference.distance(features)


def flops_left(model: nn.Module) -> float:
    """Share of the dense FLOPs that the last round has done; 1 for an eager model."""
    if not isinstance(model, CompiledTransformer):
        return 1.0
    return model.counters.flops / max(model.counters.dense_flops, 1)


def measure(folder: Path, engine: str | None, images: int, repeats: int, progress: Progress) -> dict[str, Any]:
    """All figures; writes the pictures beside the bundles in `folder`."""
    judge, reference = load_judge(WEIGHTS / "judge.safetensors"), load_reference()
    models: dict[str, nn.Module] = {BASE: load_model("dense")}
    for name, file in VARIANTS.items():
        models[name] = load(folder / file, engine=engine)
    models[FROZEN] = frozen(load(folder / VARIANTS[ELASTIC], engine=engine))
    timing = progress.add_task("timing ten classes at a time", total=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = time_variants(models, repeats)
    left = {name: flops_left(model) for name, model in models.items()}
    progress.update(timing, total=1, completed=1)
    rows, drawn = [], {}
    for name, model in models.items():
        task = progress.add_task(f"drawing {images} images: {name}", total=FEW_STEPS * -(-images // BATCH))
        drawn[name] = draw(model, images, lambda *_, task=task: progress.advance(task))
        grid = f"{name.replace(', ', '-').replace(' ', '-')}.png"
        save_grid(drawn[name][:SHOWN], folder / grid)
        rows.append(Row(name, *times[name], left[name], *judge_images(drawn[name], judge, reference), grid))
    timing = progress.add_task("tiers, and rivals in their time", total=None)
    dense = models["dense, compiled"]
    assert isinstance(dense, CompiledTransformer)
    with warnings.catch_warnings(record=True) as caught_of_tiers:
        warnings.simplefilter("always")
        tiers = measure_tiers(models[BASE], dense, folder, repeats)
    progress.update(timing, total=1, completed=1)
    elastic = models[ELASTIC]
    assert isinstance(elastic, CompiledTransformer)
    save(router_heat_map(elastic.trace[-1], "cond"), folder / "router.png")
    save(latency_bars({row.name: row.ms for row in rows}), folder / "latency.png")
    return {
        "engine": elastic.engine,
        "images": images,
        "steps": FEW_STEPS,
        "repeats": repeats,
        "largest_difference": float((drawn[BASE] - drawn["dense, compiled"]).abs().max()),
        "real": {"accuracy": reference.accuracy, "distance": reference.floors.get(images)},
        "rows": [asdict(row) for row in rows],
        "tiers": [asdict(row) for row in tiers],
        "waits": waits_told([*caught, *caught_of_tiers]),
        "machine": describe_machine(),
    }


def waits_told(caught: Sequence[warnings.WarningMessage]) -> str:
    """The worst of what was warned of times; all warnings are given out."""
    waits = [str(one.message) for one in caught if "waited for a core" in str(one.message)]
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return max(waits, key=lambda told: int((re.search(r"(\d+)%", told) or ["", "0"])[1]), default="")


def _one_step(model: Any, cond: Mapping[str, Any], uncond: Mapping[str, Any]) -> None:
    for name, kwargs in (("cond", cond), ("uncond", uncond)):
        with model.cache_context(name):
            model(**kwargs)


def _begin(models: Mapping[str, nn.Module]) -> None:
    for model in models.values():
        if isinstance(model, CompiledTransformer):
            model._reset_stateful_cache()
            model.reset_counters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", help="default: the fastest here")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)  # blocks this small gain nothing from more, and threads that wait for each other tell lies
    with Progress() as progress:
        found = measure(given.folder, given.engine, given.images, given.repeats, progress)
    (given.folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
