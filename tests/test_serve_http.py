"""Answers over HTTP, and what is counted, without Ray."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("PIL")

from fastapi import Response
from PIL import Image
from pydantic import ValidationError

from examples.serve.answers import Body, draw, health
from examples.serve.batcher import Batcher
from examples.serve.jobs import Ask
from examples.serve.metrics import Metrics
from tests.serve_stand_in import Count, Counting


class Drawing(Counting):
    """Gives pictures."""

    def image(self, drawing: Count) -> torch.Tensor:
        return torch.full((28, 28), drawing.ask.label / 10)


@pytest.fixture
def sampler() -> Drawing:
    return Drawing(gated=True)


@pytest.fixture(scope="module")
def counted() -> Metrics:
    return Metrics()


@pytest.fixture
def batcher(sampler: Drawing, counted: Metrics) -> Iterator[Batcher]:
    made = Batcher(sampler, max_batch=1, max_waiting=1, watch=counted)
    yield made
    sampler.open()
    made.close()


def answer(batcher: Batcher, counted: Metrics, **body: object) -> Response:
    return asyncio.run(draw(batcher, counted, Body(**body)))


def told(response: Response) -> str:
    return str(json.loads(bytes(response.body))["error"])


def test_an_image_comes_with_what_it_took(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    sampler.open()
    png = answer(batcher, counted, label=5, steps=2)
    assert png.status_code == 200 and png.media_type == "image/png"
    assert Image.open(io.BytesIO(bytes(png.body))).getpixel((3, 3)) == round((0.5 + 1) * 127.5)
    assert (png.headers["x-tier"], png.headers["x-steps"], png.headers["x-flops-share"]) == ("dense", "2", "1.0")
    assert float(png.headers["x-queue-seconds"]) >= 0 and float(png.headers["x-compute-seconds"]) >= 0
    numbers = json.loads(bytes(answer(batcher, counted, label=5, format="json").body))
    assert numbers["steps"] == 3 and torch.tensor(numbers["image"]).eq(0.5).all()
    text = counted.text().decode()
    assert 'edit_compile_requests_total{outcome="done",tier="dense"}' in text
    assert "edit_compile_batch_size_bucket" in text and 'edit_compile_latency_seconds_count{tier="dense"}' in text


def test_what_cannot_be_had_is_a_422_that_says_what_can(batcher: Batcher, counted: Metrics) -> None:
    refused = answer(batcher, counted, label=1, tier="best")
    assert refused.status_code == 422 and "'best'" in told(refused)
    assert b'edit_compile_requests_total{outcome="refused",tier=""}' in counted.text()


@pytest.mark.parametrize("body", [{}, {"label": "x"}, {"label": 1, "timeout_s": 0}, {"label": 1, "colour": "red"}])
def test_a_body_of_another_form_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Body(**body)


def test_a_full_queue_is_a_503_with_retry_after(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    batcher.submit(Ask(0))
    sampler.wait_for_call()
    batcher.submit(Ask(1))
    full = answer(batcher, counted, label=2)
    assert full.status_code == 503 and int(full.headers["Retry-After"]) >= 1
    assert b"edit_compile_queue_length 1.0" in counted.text()


def test_a_server_that_drains_answers_503(batcher: Batcher, counted: Metrics) -> None:
    assert batcher.drain(1)
    drained = answer(batcher, counted, label=2)
    assert drained.status_code == 503 and "shutting down" in told(drained)
    assert json.loads(bytes(health(batcher).body))["running"] == 0


def test_a_job_that_takes_too_long_is_a_504(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    batcher.submit(Ask(0))
    sampler.wait_for_call()

    async def late() -> Response:
        waiting = asyncio.create_task(draw(batcher, counted, Body(label=1, timeout_s=0.01)))
        await asyncio.sleep(0.05)
        sampler.open()
        return await waiting

    assert asyncio.run(late()).status_code == 504


def test_a_job_that_fails_is_a_500_with_its_reason(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    sampler.open()
    failed = answer(batcher, counted, label=1, tier="bad")
    assert failed.status_code == 500 and told(failed) == "ArithmeticError: one of these is bad"


def test_a_client_that_goes_away_takes_its_job_along(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    async def leave() -> None:
        waiting = asyncio.create_task(draw(batcher, counted, Body(label=1, steps=1000)))
        await asyncio.to_thread(sampler.wait_for_call)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    sampler.open()
    assert batcher.drain(30) and len(sampler.calls) <= 2 and len(sampler.ended) == 1
    assert b'edit_compile_requests_total{outcome="cancelled",tier="dense"}' in counted.text()


def test_a_stopped_server_answers_503(sampler: Drawing, batcher: Batcher, counted: Metrics) -> None:
    async def stopped() -> Response:
        waiting = asyncio.create_task(draw(batcher, counted, Body(label=1, steps=1000)))
        await asyncio.to_thread(sampler.wait_for_call)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        sampler.open()
        await closing
        return await waiting

    response = asyncio.run(stopped())
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
