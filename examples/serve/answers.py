"""From a request's body to a job, and from what became of it to an answer over HTTP."""

from __future__ import annotations

import asyncio
import io
import math
import os
from typing import Literal

from fastapi import Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from examples.serve.batcher import Batcher
from examples.serve.jobs import Ask, Draining, Drawn, Job, Refused, Stopped, TimedOut, Unavailable
from examples.serve.metrics import Metrics

TIMEOUT = 60.0
"""Seconds that a request has that names none."""


class Body(BaseModel):
    """What is posted; see `Ask`. `timeout_s`: seconds after which it is given up. `format`: "json" has the numbers."""

    model_config = ConfigDict(extra="forbid")

    label: int
    seed: int = 0
    tier: str | None = None
    steps: int | None = None
    timeout_s: float = Field(TIMEOUT, gt=0, le=600)
    format: Literal["png", "json"] = "png"


async def draw(batcher: Batcher, metrics: Metrics, body: Body) -> Response:
    """200 with the image; 422 for what cannot be had, 503 where nothing is taken, 504 where it took too long, 500.

    Where the client goes away this is cancelled, and the job with it.
    """
    try:
        job = batcher.submit(Ask(body.label, body.seed, body.tier, body.steps), body.timeout_s)
    except Refused as error:
        metrics.turned_away(body.tier, "refused")
        return _error(422, error)
    except Unavailable as error:
        metrics.turned_away(body.tier, "draining" if isinstance(error, Draining) else "queue full")
        return _error(503, error, error.retry_after)
    return await _outcome(job, body)


async def _outcome(job: Job, body: Body) -> Response:
    try:
        drawn = await asyncio.wrap_future(job.future)
    except TimedOut as error:
        return _error(504, error)
    except Stopped as error:
        return _error(503, error, 1)
    except Exception as error:
        return _error(500, error)
    return _image(drawn, body.format)


def _image(drawn: Drawn, form: str) -> Response:
    told = {
        "tier": drawn.tier or "dense",
        "steps": drawn.steps,
        "queue_seconds": round(drawn.queue_seconds, 6),
        "compute_seconds": round(drawn.compute_seconds, 6),
        "flops_share": round(drawn.flops_share, 6),
        "restarts": drawn.restarts,
        "replica": os.getpid(),
    }
    headers = {f"X-{name.replace('_', '-').title()}": str(value) for name, value in told.items()}
    if form == "json":
        return JSONResponse({**told, "image": drawn.image.tolist()}, headers=headers)
    file = io.BytesIO()
    Image.fromarray(((drawn.image + 1) * 127.5).round().byte().numpy()).save(file, "png")
    return Response(file.getvalue(), media_type="image/png", headers=headers)


def health(batcher: Batcher) -> Response:
    """200 with what the replica has to do, 503 where its batcher does not get on."""
    try:
        batcher.check()
    except RuntimeError as error:
        return _error(503, error)
    running, waiting = batcher.load
    return JSONResponse({"replica": os.getpid(), "running": running, "waiting": waiting})


def _error(status: int, error: Exception, retry_after: float | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    told = str(error) if status != 500 else f"{type(error).__name__}: {error}"
    return JSONResponse({"error": told}, status, headers)
