"""Keep what a training made: python -m examples.fashion_mnist.publish dense runs/dense (or: elastic runs/elastic).

Writes the averaged weights of the run's newest checkpoint, or the elastic model that was distilled in it, to weights/
in half precision, and every `--every`-th line of its metrics to logs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from edit_compile.elastic.storage import load_elastic
from edit_compile.files import save_tensors_atomically, write_file_atomically
from edit_compile.training.checkpoint import list_checkpoints, load_checkpoint
from examples.fashion_mnist.model import WEIGHTS

LOGS = WEIGHTS.parent / "logs"


def publish(kind: str, run: Path, every: int) -> None:
    """Write the weights and the thinned log of `run`, a training's output folder; `kind` is "dense" or "elastic"."""
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no checkpoint: is this the --output of a training?")
    if kind == "dense":
        averaged = load_checkpoint(found[-1]).ema
        save_tensors_atomically(WEIGHTS / "dense.safetensors", {n: t.half() for n, t in averaged.items()})
    else:
        load_elastic(run / "elastic").save_pretrained(WEIGHTS / "elastic", dtype=torch.float16)
    LOGS.mkdir(exist_ok=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for number, line in enumerate(lines, 1) if number % every == 0 or number == len(lines)]
    write_file_atomically(LOGS / f"{kind}.jsonl", "".join(line + "\n" for line in kept))
    print(f"published {found[-1]}: {len(kept)} of {len(lines)} log lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("dense", "elastic"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, default=5)
    arguments = parser.parse_args()
    publish(arguments.kind, arguments.run, arguments.every)


if __name__ == "__main__":
    main()
