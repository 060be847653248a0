"""Measure the trained models with the judge: python -m examples.fashion_mnist.evaluate --models dense elastic.

Writes weights/quality.json: accuracy of the asked class and Frechet distance of features to the test set, and for the
elastic model how its gates and widths were decided. Models that are not named keep what the file says of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.files import write_file_atomically
from examples.fashion_mnist.data import CLASSES, load_split
from examples.fashion_mnist.judge import Judge, frechet_distance, judged, load_judge
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.sample import GUIDANCE, STEPS, sample


@dataclass(frozen=True)
class Quality:
    """`accuracy`: share of images that the judge takes for the asked class. `distance`: Frechet, to the test set."""

    images: int
    accuracy: float
    distance: float


@dataclass(frozen=True)
class Decisions:
    """Decisions of the routers over all images, steps and both guidance branches.

    `gate_rate` and `mean_width` (of the blocks that ran) are shares. Per block: rate, mean width, and the standard
    deviations of the gate's rate over timesteps (`deviation_over_steps`, of the mean over rows) and of the gate over
    rows at equal timestep and branch (`deviation_over_rows`, root mean square over steps).
    """

    gate_rate: float
    mean_width: float
    blocks: list[dict[str, float]]
    rate_per_step: list[float]


class Recorder(nn.Module):
    """Calls an elastic model and keeps its gates and widths, each call (B, n)."""

    def __init__(self, elastic: ElasticTransformer) -> None:
        super().__init__()
        self.elastic = elastic
        self.gates: list[Tensor] = []
        self.widths: list[Tensor] = []

    def forward(self, **kwargs: Any) -> Any:
        output = self.elastic(**kwargs)
        routing = self.elastic.routing
        assert routing is not None
        self.gates.append(routing.gate)
        self.widths.append(routing.width)
        return output

    def decisions(self, branches: int, steps: int = STEPS) -> Decisions:
        """Summary of whole samplings, `branches` calls per step."""
        order = torch.arange(len(self.gates))
        gates, widths = torch.stack(self.gates), torch.stack(self.widths)
        count = gates.sum((0, 1)).clamp(min=1)
        per_block = {
            "gate_rate": gates.mean((0, 1)),
            "mean_width": (gates * widths).sum((0, 1)) / count,
            "deviation_over_steps": gates.mean(1).std(0, correction=0),
            "deviation_over_rows": gates.var(1, correction=0).mean(0).sqrt(),
        }
        step_of = order // branches % steps
        return Decisions(
            gate_rate=float(gates.mean()),
            mean_width=float((gates * widths).sum() / gates.sum().clamp(min=1)),
            blocks=[{name: round(float(v[i]), 4) for name, v in per_block.items()} for i in range(gates.shape[2])],
            rate_per_step=[round(float(gates[step_of == step].mean()), 4) for step in range(steps)],
        )


def quality(
    model: Any, judge: Judge, images: int, guidance: float, batch: int = 100, seed: int = 0, steps: int = STEPS
) -> Quality:
    """Sample `images` images, classes in turn, `batch` at a time, and judge them."""
    labels = torch.arange(images) % len(CLASSES)
    chunks = [
        sample(model, part, guidance=guidance, seed=seed + i, steps=steps) for i, part in enumerate(labels.split(batch))
    ]
    predicted, features = judged(judge, torch.cat(chunks))
    accuracy = (predicted == labels).float().mean().item()
    distance = frechet_distance(features, test_features(judge))
    return Quality(images, round(accuracy, 4), round(distance, 3))


def test_features(judge: Judge) -> Tensor:
    """The judge's features (10,000, 64) of the real test images."""
    images, _ = load_split("test")
    return judged(judge, images.float() / 127.5 - 1)[1]


def floor_distance(judge: Judge, images: int) -> float:
    """Frechet distance of as many real training images to the test set: what a perfect model would reach."""
    training, _ = load_split("train")
    chosen = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:images]]
    return frechet_distance(judged(judge, chosen.float() / 127.5 - 1)[1], test_features(judge))


def update(path: Path, entries: dict[str, Any]) -> None:
    """Put `entries` into the JSON object in `path`, which may not exist yet; the others stay."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    write_file_atomically(path, json.dumps(before | entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dense", "elastic"], help="dense, elastic, or checkpoints")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS])
    parser.add_argument(
        "--token-stride", type=int, nargs="+", default=[None], help="have routers read every so many tokens"
    )
    parser.add_argument("--judge", type=Path, default=WEIGHTS / "judge.safetensors")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "quality.json")
    arguments = parser.parse_args()
    judge = load_judge(arguments.judge)
    floor = {"images": arguments.images, "distance": round(floor_distance(judge, arguments.images), 3)}
    update(arguments.output, {"torch": torch.__version__, "real_images": floor})
    for name in arguments.models:
        for guidance, steps, stride in itertools.product(arguments.guidance, arguments.steps, arguments.token_stride):
            model = load_model(name)
            for router in model.routers if stride and isinstance(model, ElasticTransformer) else ():
                router.config = replace(router.config, token_stride=stride)
            called = Recorder(model) if isinstance(model, ElasticTransformer) else model
            entry: dict[str, Any] = asdict(quality(called, judge, arguments.images, guidance, steps=steps))
            entry |= {"guidance": guidance, "steps": steps}
            if isinstance(called, Recorder):
                entry["decisions"] = asdict(called.decisions(1 if guidance == 1 else 2, steps))
            key = f"{name}, {steps} steps" + (f", guidance {guidance:g}" if len(arguments.guidance) > 1 else "")
            key += f", every {stride} tokens" if stride else ""
            print(key, json.dumps({k: v for k, v in entry.items() if k != "decisions"}), flush=True)
            if "decisions" in entry:
                print(json.dumps(entry["decisions"]), flush=True)
            update(arguments.output, {key: entry})


if __name__ == "__main__":
    main()
