"""A server of two replicas on Ray Serve, on this machine: images, a killed replica, cancelling, the end.

Skipped where Ray is not installed: `make serve` does that, then `make test-slow`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("httpx")

import edit_compile
from examples.serve.client import STARTS, Server, metrics, request, served, until_idle
from examples.serve.jobs import Ask
from examples.serve.trials import a_replica_is_killed, a_storm_of_cancelling, apart, asks, the_end, together
from tests.processes import alive, descendants
from tests.serve_model import small_compiled

pytestmark = pytest.mark.slow
TIERS = (None, "half", "every third")
CLOSE = 1e-4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "small.edit"
    small_compiled().save(path)
    return path


@pytest.fixture(scope="module")
def compiled(bundle: Path) -> edit_compile.CompiledTransformer:
    return edit_compile.load(bundle, engine="torch")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with served(bundle, replicas=2, max_batch=4, max_waiting=40) as found:
        yield found


def test_every_image_is_the_one_drawn_alone(server: Server, compiled: edit_compile.CompiledTransformer) -> None:
    async def drawn() -> None:
        async with server.client() as client:
            answers = await together(client, asks(24, TIERS, 1))
            assert [answer.status for answer in answers] == [200] * 24
            assert len({answer.told["replica"] for answer in answers}) == 2
            assert apart(compiled, answers) < CLOSE
            counted = await metrics(client)
            sizes = counted["edit_compile_batch_size_sum"] / counted["edit_compile_batch_size_count"]
            assert 1 < sizes <= 4

    asyncio.run(drawn())


def test_requests_that_cannot_be_met(server: Server) -> None:
    async def asked() -> None:
        async with server.client() as client:
            unknown = await request(client, Ask(0, tier="best"))
            assert unknown.status == 422 and "'half'" in unknown.told["error"]
            assert (await client.post("/images", json={"label": "x"})).status_code == 422
            assert (await request(client, Ask(0, steps=200), 0.01)).status == 504
            full = await together(client, [Ask(n % 10, steps=3) for n in range(120)])
            refused = [answer for answer in full if answer.status == 503]
            assert {answer.status for answer in full} == {200, 503}
            assert all(int(answer.told["retry_after"]) >= 1 for answer in refused)
            await until_idle(client)

    asyncio.run(asked())


def test_clients_that_go_away(server: Server, compiled: edit_compile.CompiledTransformer) -> None:
    async def storm() -> None:
        async with server.client() as client:
            answers, ended = await a_storm_of_cancelling(client, asks(40, TIERS, 2), 2)
            assert [answer.status for answer in answers] == [200] * 20
            assert apart(compiled, answers) < CLOSE
            assert ended.get("cancelled", 0) > 0 and sum(ended.values()) <= 40

    asyncio.run(storm())


def test_a_killed_replica_takes_only_its_own_requests(
    server: Server, compiled: edit_compile.CompiledTransformer
) -> None:
    async def killed() -> None:
        async with server.client() as client:
            first, answers = await a_replica_is_killed(client, [Ask(n % 10, n, steps=30) for n in range(16)])
            assert first[200] > 0 and sum(first.values()) == 16
            assert [answer.status for answer in answers] == [200] * 16
            assert apart(compiled, answers) < CLOSE

    asyncio.run(killed())


def test_the_end_refuses_at_once_finishes_what_there_is_and_leaves_nothing(server: Server) -> None:
    processes = descendants(server.process.pid)

    async def ending() -> None:
        async with server.client() as client:
            answers, late = await the_end(server, client, [Ask(n % 10, n, steps=100) for n in range(12)])
            assert [answer.status for answer in answers] == [200] * 12
            assert set(late) == {503}

    asyncio.run(ending())
    assert server.process.wait(STARTS) == 0
    assert len(processes) > 2 and gone(processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends(bundle: Path, number: signal.Signals) -> None:
    with served(bundle, replicas=1) as server:
        processes = descendants(server.process.pid)
        server.process.send_signal(number)
        assert server.process.wait(STARTS) == 0
    assert gone(processes)


def gone(processes: set[int]) -> bool:
    """Whether all of them end within ten seconds."""
    until = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(map(alive, processes))
