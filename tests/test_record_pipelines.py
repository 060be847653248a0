"""Recording inside diffusers' pipelines: they make what they make without, and their calls can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import edit_compile
from edit_compile import CallsError, Recording, Sampler, quality, replay
from tests.pipelines_zoo import PIPELINES, STEPS

WITHOUT_RESULT = ("wan_two_transformers", "z_image")
"""Recorded by module, which knows no scheduler; and latents that reach the transformer in another shape, one by one."""


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_does_not_notice(name: str, tmp_path: Path) -> None:
    made = PIPELINES[name]()
    pipe, model = made.pipeline, made.pipeline.transformer
    if getattr(pipe, "transformer_2", None) is not None:
        with pytest.raises(CallsError, match="has two transformers"):
            edit_compile.record(pipe, tmp_path).__enter__()
        pipe = model
    expected = [made.generate(seed) for seed in (0, 1)]
    with edit_compile.record(pipe, tmp_path):
        for seed in (0, 1):
            assert torch.equal(made.generate(seed), expected[seed])
    recording = Recording(tmp_path)
    assert len(recording) == 2
    for generation, latents in zip(recording, expected, strict=True):
        if name in WITHOUT_RESULT:
            assert generation.result is None
        else:
            assert torch.equal(generation.result, latents)
        for call in generation.calls:
            with torch.no_grad():
                output = model(**call.arguments, return_dict=False)
            found = pytree.tree_leaves(output)
            assert len(found) == len(call.outputs)
            assert all(map(torch.equal, found, call.outputs))


def test_both_transformers_of_a_pipeline_are_recorded_in_one_run(tmp_path: Path) -> None:
    """Each with what the scheduler made of its own last call."""
    made = PIPELINES["wan_two_transformers"]()
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        edit_compile.record(made.pipeline, first, part="transformer"),
        edit_compile.record(made.pipeline, second, part="transformer_2"),
    ):
        latents = made.generate(0)
    (early,), (late,) = Recording(first), Recording(second)
    assert torch.equal(late.result, latents)
    assert torch.equal(early.result, late.calls[0].arguments["hidden_states"])
    assert len(early.calls) + len(late.calls) == 2 * STEPS
    longer, model = max(
        (early, made.pipeline.transformer), (late, made.pipeline.transformer_2), key=lambda pair: len(pair[0].calls)
    )
    assert quality(replay(model, longer, Sampler.fit(longer)), longer) == float("inf")
    with pytest.raises(CallsError, match="has no unet that could be recorded"):
        edit_compile.record(made.pipeline, tmp_path / "x", part="unet").__enter__()
    with pytest.raises(CallsError, match="part='transformer' is for pipelines"):
        edit_compile.record(made.pipeline.transformer, tmp_path / "x", part="transformer").__enter__()
