from __future__ import annotations

import copy
import threading
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
from runtime.routing.policy import REUSE, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy
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
    blocks = model._session.blocks
    assert model.to("cpu") is model.to(torch.float32) is model.float() is model
    assert model._session.blocks is blocks


def test_another_dtype_is_taken_and_given_and_said() -> None:
    model, given = compiled(), programs.inputs(2)
    expected = model(**given).sample
    with pytest.warns(RuntimeWarning, match="keeps computing in float32"):
        model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    half = {name: tensor.bfloat16() for name, tensor in given.items()}
    output = model(**half).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    model.to("cpu")
    assert model.dtype == torch.bfloat16
    model.to(torch.float32)
    torch.testing.assert_close(model(**given).sample, expected)


def test_moves_that_cannot_be_made_are_refused() -> None:
    for model in (compiled(), CompiledTransformer(programs.make(("single",)), "onnxruntime")):
        with pytest.raises(EditError, match="meta device"):
            model.to("meta")
        assert model(**programs.inputs(1)).sample.shape == (1, programs.IMAGE, programs.C)


def test_the_torch_engine_moves_its_weights() -> None:
    model = compiled()
    model._session.move(lambda tensor: tensor.to("meta"))
    assert model.device == torch.device("meta")
    assert {w.device.type for w in model.program.weights.values()} == {"meta"}
    with pytest.raises(InputError, match="is on cpu"):
        model(**programs.inputs(1))


def test_its_weights_are_parameters_that_cannot_be_exchanged() -> None:
    model = compiled()
    tensors = dict(model.named_parameters())
    assert (
        tensors.keys()
        == model.state_dict().keys()
        == set(model.program.weights) | {f"routers.{key}" for key in model.program.routers}
    )
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert all(tensors[key].data_ptr() == weight.data_ptr() for key, weight in model.program.weights.items())
    with pytest.raises(EditError, match="then compile"):
        model.load_state_dict(model.state_dict())


def test_copies_share_weights_and_no_request() -> None:
    model = compiled(policy=ScheduledPolicy(np.full((9, 2), REUSE)))
    given = programs.inputs(1)
    expected = model(**given).sample
    for twin in (copy.copy(model), copy.deepcopy(model)):
        torch.testing.assert_close(twin(**given).sample, expected)
        assert twin.counters.computed == 2
        assert twin.program.weights["glue.into"] is model.program.weights["glue.into"]
    with pytest.raises(EditError, match=r"compiled\.save"):
        model.__reduce_ex__(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"no_such": 1}, InputError, "no argument 'no_such'"),
        ({"timestep": None}, InputError, "missing input 'timestep'"),
        ({"scale": 2.0}, ShapeError, r"scale: compiled without it, called with 2\.0"),
        ({"scale": torch.ones(1)}, InputError, "'scale' was not given when compiling"),
        ({"scale": object()}, InputError, "'scale' is a object"),
        ({"hidden_states": torch.zeros(1, 7, programs.C)}, ShapeError, r"hidden_states \(\*, 5, 4\)"),
        ({"hidden_states": torch.zeros(1, 5)}, ShapeError, "not compiled for"),
        ({"timestep": torch.full((1,), 0.1, dtype=torch.float64)}, InputError, "float64, compiled for float32"),
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


def test_none_for_an_argument_is_no_argument() -> None:
    compiled()(**programs.inputs(1), joint_attention_kwargs=None, scale=None)


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
    fixed = replace(program.manifest.glues[0], constants={"scale": 2.0})
    model = CompiledTransformer(with_glues(program, fixed), "torch")
    model(**programs.inputs(1), scale=2.0)
    with pytest.raises(ShapeError, match=r"scale: compiled with 2\.0, called with 3\.0"):
        model(**programs.inputs(1), scale=3.0)
    with pytest.raises(ShapeError, match=r"scale: compiled with 2\.0, called without it"):
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
