"""A compiled FLUX through 28 steps of routed decisions, row by row against Algorithm 1 around the eager model."""

from __future__ import annotations

import pytest
import torch

from edit_compile import CompiledTransformer, RoutingPolicy
from runtime.trace import COMPUTED, REUSED, SKIPPED
from tests.conftest import WIDTHS, Compiled
from tests.flux_oracle import FluxOracle
from tests.models import noise, tiny_flux

STEPS = 28


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("batch", [1, 4])
def test_generation_with_guidance_follows_algorithm_1(flux: Compiled, engine: str, batch: int) -> None:
    policy = RoutingPolicy(threshold=0.4, margin=0.25, max_reuse=2)
    compiled = CompiledTransformer(flux.program, engine=engine, policy=policy)
    oracle = FluxOracle(flux.model.model, flux.program.routers, WIDTHS, 0.4, 0.25, 2)
    _, inputs = tiny_flux(batch=batch)
    texts = {"cond": inputs["encoder_hidden_states"], "uncond": noise(*inputs["encoder_hidden_states"].shape, seed=9)}
    x = y = inputs["hidden_states"]
    for step in range(STEPS):
        now = torch.full((batch,), 1 - step / STEPS)
        velocity = {}
        for context, text in texts.items():
            given = {**inputs, "timestep": now, "encoder_hidden_states": text}
            with compiled.cache_context(context):
                ours = compiled(**{**given, "hidden_states": x})[0]
            velocity[context] = (ours, oracle(context, {**given, "hidden_states": y}))
        ours, theirs = (velocity["uncond"][k] + 2 * (velocity["cond"][k] - velocity["uncond"][k]) for k in (0, 1))
        x, y = x - ours / STEPS, y - theirs / STEPS
        assert (x - y).abs().max() <= 1e-4 * y.abs().max(), f"step {step}"
    _check_decisions(compiled, oracle)


def _check_decisions(compiled: CompiledTransformer, oracle: FluxOracle) -> None:
    """The trace says what the oracle did, and all of skip, reuse and every width occurred."""
    columns = compiled.trace[-1].arrays()
    names = {SKIPPED: "skip", REUSED: "reuse", COMPUTED: "compute"}
    contexts = compiled.trace[-1].contexts
    ours = sorted(
        (contexts[c], int(r), int(b), names[int(d)], float(w))
        for c, r, b, d, w in zip(*(columns[n] for n in ("context", "row", "block", "done", "width")), strict=True)
    )
    assert ours == sorted(oracle.log)
    assert {entry[3] for entry in oracle.log} == {"skip", "reuse", "compute"}
    assert {entry[4] for entry in oracle.log} >= set(WIDTHS[:2])
