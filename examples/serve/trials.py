"""What has to hold of a server, tried out on one: images, a killed replica, storms of cancelling, the end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import httpx
import torch

from edit_compile import CompiledTransformer
from examples.fashion_mnist.sample import sample
from examples.serve.client import Answer, Server, kill, metrics, request, until_idle, until_taken
from examples.serve.jobs import Ask
from examples.serve.sampling import STEPS


def asks(count: int, tiers: Sequence[str | None], seed: int) -> list[Ask]:
    """Requests of mixed tiers, each with a seed of its own, in their tiers' number of steps."""
    draw = random.Random(seed)
    return [Ask(draw.randrange(10), seed * 100_000 + number, draw.choice(tiers)) for number in range(count)]


def apart(compiled: CompiledTransformer, answers: Sequence[Answer]) -> float:
    """The largest difference of a pixel to the image drawn alone by the example's own sampler; pixels span 2."""
    worst = 0.0
    for answer in answers:
        ask = answer.ask
        steps = ask.steps or (compiled.tiers[ask.tier].steps if ask.tier else None) or STEPS
        with compiled.request(tier=ask.tier):
            alone = sample(compiled, torch.tensor([ask.label]), steps=steps, seed=ask.seed)[0]
        worst = max(worst, float((alone - answer.image).abs().max()))
    return worst


async def together(client: httpx.AsyncClient, asked: Sequence[Ask]) -> list[Answer]:
    """All at once."""
    return await asyncio.gather(*(request(client, ask) for ask in asked))


async def a_replica_is_killed(client: httpx.AsyncClient, asked: Sequence[Ask]) -> tuple[Counter[int], list[Answer]]:
    """Kill one in the middle of `asked`; statuses at first, and all answers after those that broke were asked again."""
    under_way = [asyncio.create_task(request(client, ask)) for ask in asked]
    await asyncio.sleep(0.5)
    kill((await client.get("/health")).json()["replica"])
    answers = await asyncio.gather(*under_way)
    first = Counter(answer.status for answer in answers)
    for _ in range(20):
        broken = [answer.ask for answer in answers if answer.status != 200]
        if not broken:
            break
        await asyncio.sleep(0.5)
        answers = [answer for answer in answers if answer.status == 200] + await together(client, broken)
    return first, answers


async def a_storm_of_cancelling(
    client: httpx.AsyncClient, asked: Sequence[Ask], seed: int
) -> tuple[list[Answer], dict[str, float]]:
    """Every second client goes away, at a random moment; answers of the others, and how jobs ended by the metrics."""
    draw = random.Random(seed)
    before = await metrics(client)

    async def gone(ask: Ask) -> None:
        try:
            async with asyncio.timeout(draw.uniform(0.01, 1.0)):
                await request(client, ask)
        except TimeoutError:
            return

    stay = [asyncio.create_task(request(client, ask)) for ask in asked[::2]]
    leave = [asyncio.create_task(gone(ask)) for ask in asked[1::2]]
    answers = await asyncio.gather(*stay)
    await asyncio.gather(*leave)
    await until_idle(client)
    after = await metrics(client)
    return answers, outcomes(before, after)


async def the_end(server: Server, client: httpx.AsyncClient, asked: Sequence[Ask]) -> tuple[list[Answer], Counter[int]]:
    """Terminate while `asked` are under way; their answers, and the statuses of what is asked from then on."""
    under_way = [asyncio.create_task(request(client, ask)) for ask in asked]
    await until_taken(client, len(asked))
    await asyncio.to_thread(server.terminate)
    late: Counter[int] = Counter()
    while not all(task.done() for task in under_way):
        late[(await request(client, Ask(0, steps=1))).status] += 1
        await asyncio.sleep(0.1)
    return await asyncio.gather(*under_way), late


def outcomes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How many jobs ended how, between two looks at the metrics."""
    found: Counter[str] = Counter()
    for name, value in after.items():
        if name.startswith("edit_compile_requests_total"):
            outcome = name.partition('outcome="')[2].partition('"')[0]
            found[outcome] += int(value - before.get(name, 0))
    return dict(+found)
