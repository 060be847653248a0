"""Load a server on this machine, and try what has to hold of it: python -m examples.serve.load demo/served.edit

Requests arrive whether or not earlier ones are answered, at rates that are shares of what one image at a time would
need. Everything runs on this machine, the clients too, for at most five minutes; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine
from examples.serve.client import Answer, metrics, request, served, until_idle
from examples.serve.jobs import Ask
from examples.serve.trials import a_replica_is_killed, a_storm_of_cancelling, apart, asks, the_end, together

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "serve.json"
TIERS: tuple[str | None, ...] = (None, "half", "quarter", "draft")
LOADS = (0.5, 1.0, 2.0)
"""Rates, as shares of what the replicas do when each takes one image at a time."""
REPLICAS, MAX_BATCH, MAX_WAITING = 2, 8, 16
PATIENCE = 20.0
"""Seconds after which a request is given up."""
IMAGES = 20
COMPARED = 6
"""Images of each rate that are drawn alone, too."""


async def seconds_alone(client: httpx.AsyncClient) -> float:
    """Of one image, with nothing else to do: the mean of all tiers, each the median of three."""
    found = []
    for tier in TIERS:
        taken = [(await request(client, Ask(1, seed, tier))).seconds for seed in range(4)]
        found.append(statistics.median(taken[1:]))
    return statistics.fmean(found)


async def arrivals(client: httpx.AsyncClient, asked: Sequence[Ask], rate: float, seed: int) -> list[Answer]:
    """Ask at random moments, `rate` a second on average; all answers."""
    draw, under_way = random.Random(seed), []
    due = time.monotonic()
    for ask in asked:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        under_way.append(asyncio.create_task(request(client, ask, PATIENCE)))
    return await asyncio.gather(*under_way)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of latencies; how many there are."""
    found = {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 95, 99)} if seconds else {}
    return {"count": len(seconds), **found}


async def loaded(
    client: httpx.AsyncClient, load: float, rate: float, seconds: float, seed: int
) -> tuple[dict[str, Any], list[Answer]]:
    """The figures of one rate, and its images."""
    await until_idle(client)
    before, began = await metrics(client), time.monotonic()
    answers = await arrivals(client, asks(max(8, round(rate * seconds)), TIERS, seed), rate, seed)
    await until_idle(client)
    spent, after = time.monotonic() - began, await metrics(client)
    done = [answer for answer in answers if answer.status == 200]
    steps, rows = (
        after[f"edit_compile_batch_size_{of}"] - before[f"edit_compile_batch_size_{of}"] for of in ("count", "sum")
    )
    figures = {
        "load": load,
        "rate": rate,
        "seconds": spent,
        "asked": len(answers),
        "done": len(done),
        "refused": sum(answer.status == 503 for answer in answers),
        "timed_out": sum(answer.status == 504 for answer in answers),
        "errors": sum(answer.status not in (200, 503, 504) for answer in answers),
        "images_per_second": len(done) / spent,
        "batch": rows / max(steps, 1),
        "latency": {
            tier or "dense": percentiles([answer.seconds for answer in done if answer.ask.tier == tier])
            for tier in TIERS
        },
        "latency_of_all": percentiles([answer.seconds for answer in done]),
    }
    return figures, done


async def tried(client: httpx.AsyncClient, compiled: edit_compile.CompiledTransformer, seed: int) -> dict[str, Any]:
    """What holds, as figures: images, a storm of cancelling, a killed replica."""
    same = await together(client, asks(IMAGES, TIERS, seed))
    stayed, ended = await a_storm_of_cancelling(client, asks(2 * IMAGES, ("quarter", "draft"), seed + 1), seed)
    first, after_all = await a_replica_is_killed(client, asks(16, TIERS, seed + 2))
    images = [answer for answer in (*same, *stayed, *after_all) if answer.status == 200]
    return {
        "images": {"asked": IMAGES, "done": sum(answer.status == 200 for answer in same)},
        "cancelled": {"stayed": len(stayed), "done": sum(a.status == 200 for a in stayed), "ended": ended},
        "killed": {
            "asked": sum(first.values()),
            "at_first": {str(status): count for status, count in sorted(first.items())},
            "done_at_first": first[200],
            "done_when_asked_again": sum(answer.status == 200 for answer in after_all),
        },
        "compared": len(images),
        "apart": apart(compiled, images),
    }


async def measured(bundle: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Everything that the record has but where it was taken."""
    compiled = edit_compile.load(bundle, engine="torch")
    options = {"replicas": REPLICAS, "max_waiting": MAX_WAITING}
    runs: list[dict[str, Any]] = []
    alone, trials = 0.0, {}
    for max_batch in (1, MAX_BATCH):
        with served(bundle, max_batch=max_batch, **options) as server:
            async with server.client() as client:
                alone = alone or await seconds_alone(client)
                for number, load in enumerate(LOADS):
                    rate = load * REPLICAS / alone
                    figures, done = await loaded(client, load, rate, seconds, seed + number)
                    sys.stderr.write(f"{max_batch} jobs a batch, load {load:g}: {figures['images_per_second']:.2f}/s\n")
                    runs.append({"max_batch": max_batch, **figures, "apart": apart(compiled, done[:COMPARED])})
                if max_batch > 1:
                    trials = await tried(client, compiled, seed + 10)
                    answers, late = await the_end(server, client, asks(12, TIERS, seed + 20))
                    finished = sum(answer.status == 200 for answer in answers)
                    trials["end"] = {"under_way": len(answers), "done": finished, "then_asked": dict(late)}
    return {"seconds_alone": alone, **options, "max_batch": MAX_BATCH, "runs": runs, "trials": trials}


def versions() -> Mapping[str, str]:
    """Of what serves and asks."""
    return {name: metadata.version(name) for name in ("ray", "fastapi", "uvicorn", "httpx")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=8.0, help="in which requests of one rate arrive")
    parser.add_argument("--at-most", type=float, default=300.0, help="seconds after which all of it is given up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine, began, busy = describe_machine(), time.monotonic(), os.getloadavg()[0]
    found = asyncio.run(asyncio.wait_for(measured(given.bundle, given.seconds, given.seed), given.at_most))
    taken = {"machine": {**machine, **versions()}, "commit": commit(), "seed": given.seed, "engine": "torch"}
    taken["load_average"] = busy
    taken["minutes"] = (time.monotonic() - began) / 60
    write_file_atomically(given.output, json.dumps({**taken, **found}, indent=1) + "\n")
    sys.stdout.write(f"{given.output}: written\n")


if __name__ == "__main__":
    main()
