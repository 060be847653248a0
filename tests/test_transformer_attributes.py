"""What pipelines ask of a transformer beside calling it by keyword."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edit_compile.compiling.compiler import Tracer
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from tests import programs
from tests.test_transformer_lazy import lazy


class Model(nn.Module):
    """Has plain attributes, a part without weights, and one with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.max_seq, self.name, self.angles, self._secret = 48, "model", (4, 4), 5
        self.rope, self.head = nn.Identity(), nn.Linear(2, 2)

    def forward(
        self, hidden_states: object, encoder_hidden_states: object, timestep: object, return_dict: bool = True
    ) -> None:
        raise AssertionError("the compiled program runs in its place")

    def fuse_qkv_projections(self) -> None:
        raise AssertionError("this would change other weights than those that run")


def program() -> Program:
    made = programs.make(("double",))
    return replace(made, manifest=replace(made.manifest, attributes={"max_seq": 48}))


def test_plain_attributes_and_the_configuration_are_read_and_kept_in_a_bundle(tmp_path: Path) -> None:
    bundle.save(program(), tmp_path / "it.edit")
    for found in (program(), bundle.load(tmp_path / "it.edit")):
        model = CompiledTransformer(found, "torch")
        assert model.max_seq == 48
        assert model.in_channels == programs.C
        with pytest.raises(AttributeError, match="'no_such'"):
            _ = model.no_such


def test_the_compiler_notes_a_models_own_plain_attributes() -> None:
    noted = Tracer(Model(), (1.0,), None).untraced().manifest.attributes
    assert noted == {"max_seq": 48, "name": "model"}


def test_only_parts_without_weights_are_handed_through() -> None:
    eager = Model()
    model = CompiledTransformer(program(), "torch", eager=eager)
    assert model.rope is eager.rope
    for name in ("head", "fuse_qkv_projections", "_secret"):
        with pytest.raises(AttributeError, match=name):
            getattr(model, name)
    assert not hasattr(CompiledTransformer(program(), "torch"), "rope")


def test_the_first_call_may_be_by_position() -> None:
    given = programs.inputs(1)
    model, tracer = lazy()
    output = model(*given.values(), return_dict=False)
    torch.testing.assert_close(output, CompiledTransformer(tracer.whole, "torch")(**given, return_dict=False))
    assert tracer.calls[0].keys() == {*given, "return_dict"}


def test_a_cache_context_may_tell_of_progress() -> None:
    model = CompiledTransformer(program(), "torch")
    with model.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=3):
        model(**programs.inputs(1))
    assert model.trace[-1].contexts == ["cond"]
