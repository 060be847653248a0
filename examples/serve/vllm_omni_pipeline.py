"""A bundle in the place of a pipeline's transformer in vLLM-Omni, for any pipeline of diffusers.

    vllm serve MODEL --omni --model-class-name DiffusersAdapterPipeline --custom-pipeline-args \\
        '{"pipeline_class": "examples.serve.vllm_omni_pipeline.CompiledPipeline", "bundle": "flux.edit"}'

Beside "bundle" an "engine" may be named. A request says its tier as `extra_args={"tier": "fast"}`; without one, the
bundle's own policy decides. Read against vLLM-Omni 0.30.0, whose engine has not run it: docs/serving.md says what was
tried. `--model-class-name` keeps that engine from treating images of diffusers, which are ready, as tensors that a
pipeline of its own has drawn.
"""

from __future__ import annotations

from typing import Any

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

import edit_compile


class CompiledPipeline(DiffusersAdapterPipeline):  # type: ignore[misc]
    """Their adapter for pipelines of diffusers, with a compiled transformer; one request a call, as they have it."""

    supports_request_batch = False

    def load_weights(self, weights: Any = None) -> None:
        """Load the pipeline, and the bundle that `custom_pipeline_args` names.

        `weights` is what vLLM-Omni gives pipelines that load none themselves; there are none in it. ValueError where
        no bundle is named, or the pipeline has no transformer.
        """
        given = self.od_config.custom_pipeline_args or {}
        if "bundle" not in given:
            raise ValueError("custom_pipeline_args has no 'bundle': name the folder that compiled.save wrote")
        self.device = self.device or get_local_device()
        super().load_weights()
        if getattr(self._pipeline, "transformer", None) is None:
            raise ValueError(f"{type(self._pipeline).__name__} has no transformer that a bundle could stand for")
        self._pipeline.transformer = None  # its weights go before those of the bundle come
        compiled = edit_compile.load(given["bundle"], engine=given.get("engine"))
        if compiled.device != self.device:
            compiled = compiled.to(self.device)
        self._pipeline.transformer = compiled

    def forward(self, req: DiffusionRequestBatch) -> DiffusionOutput:
        """Draw one request: residuals are its own, and go with it, also where it ends by an error.

        ValueError for a tier that the bundle does not have, before anything is drawn.
        """
        compiled = self._pipeline.transformer
        tier = (req.sampling_params.extra_args or {}).get("tier")
        if tier is not None and tier not in compiled.tiers:
            raise ValueError(
                f"extra_args: no tier is called {tier!r}, there are {', '.join(map(repr, compiled.tiers))}"
            )
        with compiled.request(tier=tier):
            return super().forward(req)
