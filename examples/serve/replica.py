"""All there is of Ray Serve: a replica that loads a bundle, and answers from its batcher.

Annotations are not postponed here: Ray moves the methods, and FastAPI would not find what their names mean.
"""

import torch
from fastapi import FastAPI, Response
from ray import serve

import edit_compile
from examples.serve.answers import Body, draw, health
from examples.serve.batcher import Batcher
from examples.serve.ending import Ending
from examples.serve.metrics import Metrics
from examples.serve.sampling import EulerSampler

app = FastAPI(title="edit_compile: images of the Fashion-MNIST example")


@serve.deployment
@serve.ingress(app)
class Replica:
    """One process: a bundle, and a thread that draws. Ray restarts it where `check_health` raises."""

    def __init__(
        self, bundle: str, engine: str | None, max_batch: int, max_waiting: int, threads: int, shared: str
    ) -> None:
        torch.set_num_threads(threads)
        sampler = EulerSampler(edit_compile.load(bundle, engine=engine))
        self._metrics = Metrics()
        self._batcher = Batcher(
            sampler, max_batch=max_batch, max_waiting=max_waiting, watch=self._metrics, ending=Ending(shared).begun
        )

    @app.post("/images")
    async def images(self, body: Body) -> Response:
        """Draw one image."""
        return await draw(self._batcher, self._metrics, body)

    @app.get("/health")
    async def health(self) -> Response:
        """Of one of the replicas."""
        return health(self._batcher)

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """Of all replicas on this machine."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def check_health(self) -> None:
        """By Ray, every few seconds; raises where no job can get on."""
        self._batcher.check()

    def __del__(self) -> None:  # by Ray, when no request is left
        batcher = self.__dict__.get("_batcher")
        if batcher is not None:
            batcher.close()
