"""A server on this machine, and requests to it, for the load test."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from examples.serve.jobs import Ask

ROOT = Path(__file__).parents[2]
PORTS = range(18_000, 19_000)
"""Below those that systems give to whoever asks for any: Ray's processes do, while the server starts."""
STARTS = 180.0
"""Seconds in which a server has to be ready, and in which it has to be gone."""


@dataclass(frozen=True)
class Answer:
    """What came of a request: the `status` (0: the connection broke, or was given up), and what an image took."""

    ask: Ask
    status: int
    seconds: float
    told: dict[str, Any]

    @property
    def image(self) -> Tensor:
        """(28, 28) float32."""
        return torch.tensor(self.told["image"])


@dataclass(frozen=True)
class Server:
    """Where it answers, and its process."""

    url: str
    process: subprocess.Popen[str]

    def client(self) -> httpx.AsyncClient:
        """With as many connections as are asked for."""
        return httpx.AsyncClient(base_url=self.url, limits=httpx.Limits(max_connections=None), timeout=2 * STARTS)

    def terminate(self) -> None:
        """Have it finish what it has, and end; returns when it says that it takes no more."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        self.process.stdout.readline()


@contextmanager
def served(bundle: Path, **options: int | str) -> Iterator[Server]:
    """`examples.serve.server` with `options`, in a process of its own; RuntimeError where it is not ready in time."""
    port = next(port for port in random.sample(PORTS, len(PORTS)) if _is_free(port))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "examples.serve.server", str(bundle), f"--port={port}", *words]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready"):
                log.seek(0)
                raise RuntimeError(f"the server did not start:\n{log.read()[-4000:]}")
            yield Server(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=STARTS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


async def request(client: httpx.AsyncClient, ask: Ask, timeout_s: float = STARTS) -> Answer:
    """Ask for an image, and wait."""
    began = time.monotonic()
    body = {name: value for name, value in asdict(ask).items() if value is not None}
    try:
        found = await client.post("/images", json={**body, "format": "json", "timeout_s": timeout_s})
    except httpx.TransportError as error:
        return Answer(ask, 0, time.monotonic() - began, {"error": repr(error)})
    told = found.json() if found.headers.get("content-type") == "application/json" else {"error": found.text}
    return Answer(
        ask, found.status_code, time.monotonic() - began, told | {"retry_after": found.headers.get("Retry-After")}
    )


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Each metric's value, by its name with labels."""
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*|[^#]\S*\{.*\}) (\S+)$", text, re.M)}


async def until_idle(client: httpx.AsyncClient, seconds: float = 60.0) -> None:
    """Return when no job is left; TimeoutError."""
    async with asyncio.timeout(seconds):
        while (await metrics(client)).get("edit_compile_jobs", 0):
            await asyncio.sleep(0.1)


async def until_taken(client: httpx.AsyncClient, jobs: int, seconds: float = 60.0) -> None:
    """Return when so many jobs are under way or wait; TimeoutError."""
    async with asyncio.timeout(seconds):
        while (await metrics(client)).get("edit_compile_jobs", 0) < jobs:
            await asyncio.sleep(0.05)


def kill(process: int) -> None:
    """End a replica at once, as a machine that fails does."""
    os.kill(process, signal.SIGKILL)


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
