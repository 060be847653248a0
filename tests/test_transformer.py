from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.base.errors import EditError, InputError, PolicyError, ShapeError
from runtime.base.guard import guard
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.bundle.spec import Glue
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import REUSE, RoutingPolicy, ScheduledPolicy
from tests import programs


def compiled(kinds: tuple[str, ...] = ("double", "single"), **kwargs) -> CompiledTransformer:
    return CompiledTransformer(programs.make(kinds), "torch", **kwargs)


def with_glues(program: Program, *glues: Glue) -> Program:
    return replace(program, manifest=replace(program.manifest, glues=glues))


def test_it_is_called_like_the_model() -> None:
    model, given = compiled(), programs.inputs(2)
    output = model(**given)
    assert output.sample is output[0] is output["sample"]
    assert len(output) == 1
    again = compiled()
    (by_tuple,) = again(**given, return_dict=False)
    torch.testing.assert_close(by_tuple, output.sample)
    (by_position,) = compiled()(*given.values(), return_dict=False)
    torch.testing.assert_close(by_position, output.sample)
    with pytest.raises(AttributeError, match="latents"):
        _ = output.latents


def test_it_shows_what_pipelines_read() -> None:
    model = compiled()
    assert isinstance(model, nn.Module)
    assert not model.training
    assert model.config.in_channels == model.config["in_channels"] == programs.C
    assert model.config.get("no_such") is None
    assert not hasattr(model.config, "no_such")
    with pytest.raises(TypeError, match="cannot be changed"):
        model.config["in_channels"] = 5
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")


def test_no_gradients_are_recorded() -> None:
    given = programs.inputs(1)
    given["hidden_states"].requires_grad_()
    assert not compiled()(**given).sample.requires_grad


def test_moving_it_where_it_is_changes_nothing() -> None:
    model = compiled()
    loaded = model._loaded
    assert model.to("cpu") is model.to(torch.float32) is model.float() is model
    assert model._loaded is loaded


def test_moves_that_cannot_be_made_are_refused() -> None:
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        with pytest.raises(EditError, match="then compile"):
            move(compiled())
    with pytest.raises(EditError, match="'onnxruntime' runs where it was loaded"):
        CompiledTransformer(programs.make(("single",)), "onnxruntime").to("meta")


def test_the_torch_engine_moves_its_weights() -> None:
    model = compiled().to("meta")
    assert model.device == torch.device("meta")
    assert {w.device.type for w in model.program.weights.values()} == {"meta"}
    with pytest.raises(InputError, match="is on cpu"):
        model(**programs.inputs(1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"no_such": 1}, InputError, "no argument 'no_such'"),
        ({"timestep": None}, InputError, "missing input 'timestep'"),
        ({"scale": 2.0}, ShapeError, r"scale: compiled with None, called with 2\.0"),
        ({"scale": torch.ones(1)}, InputError, "'scale' was not given when compiling"),
        ({"scale": object()}, InputError, "'scale' is a object"),
        ({"hidden_states": torch.zeros(1, 7, programs.C)}, ShapeError, r"hidden_states \(\*, 5, 4\)"),
        ({"hidden_states": torch.zeros(1, 5)}, ShapeError, "not compiled for"),
        ({"timestep": torch.ones(1, dtype=torch.float64)}, InputError, "float64, compiled for float32"),
        ({"timestep": torch.ones(1, device="meta")}, InputError, "is on meta"),
        ({"hidden_states": torch.full((1, 5, 4), float("nan"))}, InputError, "hidden_states holds NaN"),
        ({"encoder_hidden_states": torch.full((1, 3, 8), float("-inf"))}, InputError, "encoder_hidden_states holds"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, InputError, "LoRA"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": []}}, InputError, "IP-Adapter"),
    ],
)
def test_unusable_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled()(**{**programs.inputs(1), **change})


def test_nothing_in_an_argument_is_no_argument() -> None:
    given = programs.inputs(1)
    for harmless in ({}, None):
        compiled()(**given, joint_attention_kwargs=harmless, scale=None)


def test_large_finite_values_are_finite() -> None:
    program = programs.make(("single",), routers=False)
    given = programs.inputs(1)
    given["encoder_hidden_states"] = torch.full((1, programs.TEXT, programs.D), 3e38)
    given["encoder_hidden_states"][:, 1:] *= -1
    CompiledTransformer(program, "torch")(**given)


def test_too_many_positions_and_doubled_arguments() -> None:
    given = programs.inputs(1)
    with pytest.raises(InputError, match="by position"):
        compiled()(*range(9))
    with pytest.raises(InputError, match="twice"):
        compiled()(*given.values(), timestep=given["timestep"])


def test_constants_have_to_be_those_compiled() -> None:
    program = programs.make(("single",))
    fixed = replace(program.manifest.glues[0], constants={"scale": 2.0, "joint_attention_kwargs": None})
    model = CompiledTransformer(with_glues(program, fixed), "torch")
    model(**programs.inputs(1), scale=2.0)
    with pytest.raises(ShapeError, match=r"scale: compiled with 2\.0, called with 3\.0"):
        model(**programs.inputs(1), scale=3.0)
    with pytest.raises(ShapeError, match=r"scale: compiled with 2\.0, called with None"):
        model(**programs.inputs(1))


@pytest.mark.parametrize("method", ["load_lora_adapter", "add_adapter", "set_adapters", "fuse_lora"])
def test_lora_is_refused(method: str) -> None:
    with pytest.raises(EditError, match="LoRA"):
        getattr(compiled(), method)({})


def test_ip_adapter_is_refused() -> None:
    with pytest.raises(EditError, match="IP-Adapter"):
        compiled()._load_ip_adapter_weights([{}])


def test_the_policy_changes_between_calls() -> None:
    model = compiled(policy=ScheduledPolicy(np.zeros((1, 2))))
    given = programs.inputs(1)
    skipped = model(**given).sample
    weights = programs.make(("double", "single")).weights
    torch.testing.assert_close(skipped, given["hidden_states"] @ weights["glue.into"] @ weights["glue.out"])
    model.policy = ScheduledPolicy(np.ones((1, 2)))
    model._reset_stateful_cache()
    assert not torch.allclose(model(**given).sample, skipped)
    model.policy = None
    assert model.policy == RoutingPolicy()


def test_saving_keeps_the_policy(tmp_path) -> None:
    model = compiled(policy=RoutingPolicy(0.3, 0.2, 1))
    model.save(tmp_path / "x")
    again = CompiledTransformer(bundle.load(tmp_path / "x"), "onnxruntime")
    assert again.policy == RoutingPolicy(0.3, 0.2, 1)
    torch.testing.assert_close(again(**programs.inputs(2)).sample, model(**programs.inputs(2)).sample)


class Tracer:
    """Hands out the program, once per call for which nothing was compiled."""

    def __init__(self, kinds: tuple[str, ...] = ("single",)) -> None:
        self.program = programs.make(kinds)
        self.calls: list[dict[str, object]] = []

    def __call__(self, kwargs, program=None):
        self.calls.append(dict(kwargs))
        time.sleep(0.05)
        glues = [replace(g, constants={"scale": kwargs.get("scale")}) for g in self.program.manifest.glues]
        self.program = with_glues(self.program, *glues)
        return self.program


def test_a_lazy_transformer_traces_at_its_first_call() -> None:
    tracer, eager = Tracer(), nn.Linear(1, 1)
    eager.config, eager.dtype, eager.device = {"in_channels": 4}, torch.float32, torch.device("cpu")
    model = CompiledTransformer(None, "torch", tracer=tracer, eager=eager)
    assert model.program is None
    assert model.config == {"in_channels": 4}
    assert not list(model.parameters())
    with pytest.raises(EditError, match="once"):
        model.save("nowhere")
    model(**programs.inputs(1))
    model(**programs.inputs(3, timestep=0.5))
    assert len(tracer.calls) == 1
    model(**programs.inputs(1), scale=2.0)
    assert [call.get("scale") for call in tracer.calls] == [None, 2.0]
    with pytest.raises(EditError, match="tracer"):
        CompiledTransformer(None, "torch")


def test_threads_that_need_the_same_trace_make_it_once() -> None:
    tracer = Tracer()
    model = CompiledTransformer(None, "torch", tracer=tracer)
    in_threads([lambda: model(**programs.inputs(1))] * 3)
    assert len(tracer.calls) == 1


def in_threads(works: list[Callable[[], object]]) -> list[object]:
    """Results of all works, run at once; the first error is raised."""
    results: list[object] = [None] * len(works)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_a_hosted_glue_runs_the_models_own_forward() -> None:
    program = programs.make(("single",))
    hosted = replace(program.manifest.glues[0], file=None)
    seen: list[Tensor] = []

    def host(hidden_states, encoder_hidden_states, timestep, return_dict=True):
        hidden = hidden_states @ program.weights["glue.into"]
        before = hidden.clone()
        (after,) = guard([hidden], [0], 0)
        after += 1.0
        seen.append((hidden - before).abs().max())
        return ((after - 1.0) @ program.weights["glue.out"],)

    for table in ([[0.0]], [[1.0]]):
        policy = ScheduledPolicy(np.array(table))
        plain = CompiledTransformer(program, "torch", policy)
        model = CompiledTransformer(with_glues(program, hosted), "torch", policy, host=host)
        given = programs.inputs(2)
        torch.testing.assert_close(model(**given, return_dict=False)[0], plain(**given).sample)
    assert max(seen) == 0  # writing into the states of a skipped block does not reach its inputs
    with pytest.raises(EditError, match="hosted"):
        CompiledTransformer(with_glues(program, hosted), "torch")(**programs.inputs(1))


def test_a_schedule_that_is_too_short_says_so() -> None:
    model = compiled(policy=ScheduledPolicy(np.array([[1.0, REUSE]])))
    model(**programs.inputs(1))
    with pytest.raises(PolicyError, match="1 steps"):
        model(**programs.inputs(1, timestep=0.5))
