"""Recording a transformer's calls: what is recorded, where generations end, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn

import edit_compile
from edit_compile import CallsError, CompiledTransformer, Generation, Recording
from tests import programs
from tests.models import noise, tiny_flux, tiny_plain
from tests.pipelines import flux_pipeline, flux_transformer
from tests.test_pipelines import generate

GUIDED = {"negative_prompt": "dog", "true_cfg_scale": 3.0}


class Size(NamedTuple):
    height: int
    width: int


class Denoiser(nn.Module):
    """The smallest thing to record: takes whatever is given beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.resets = 0

    def forward(self, x: Tensor, t: Any = None, *, fail: bool = False, **others: Any) -> Tensor:
        if fail:
            raise ArithmeticError("told to fail")
        return self.linear(x)

    def _reset_stateful_cache(self) -> None:
        self.resets += 1


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().requires_grad_(False)


def read(folder: Path) -> list[Generation]:
    return list(Recording(folder))


def marks(folder: Path) -> list[list[Any]]:
    """The argument t of every call of every generation, which tells them apart."""
    return [[call.arguments["t"] for call in generation.calls] for generation in Recording(folder)]


def plain() -> tuple[nn.Module, Mapping[str, Any]]:
    return tiny_plain()


def elastic() -> tuple[nn.Module, Mapping[str, Any]]:
    model, inputs = tiny_flux(double=1, single=1)
    return edit_compile.elasticize(model).eval(), inputs


def compiled() -> tuple[nn.Module, Mapping[str, Any]]:
    return CompiledTransformer(programs.make(), "torch"), programs.inputs()


@torch.no_grad()
@pytest.mark.parametrize("made", [plain, elastic, compiled])
def test_outputs_are_unchanged_and_recorded_arguments_give_them_again(made: Any, tmp_path: Path) -> None:
    model, inputs = made()
    names = list(inputs)
    one, other = dict(inputs), {name: inputs[name] for name in names[1:]}
    expected = first_of(model(**one))
    if isinstance(model, CompiledTransformer):
        model.reset()
    with edit_compile.record(model, tmp_path):
        assert torch.equal(first_of(model(**one)), expected)
        model(inputs[names[0]].clone(), **other, **({} if made is plain else {"return_dict": False}))
    if isinstance(model, CompiledTransformer):
        model.reset()
    (generation,) = read(tmp_path)
    assert len(generation.calls) == 2
    for call in generation.calls:
        assert call.arguments.keys() == inputs.keys()
        assert torch.equal(first_of(model(**call.arguments)), call.outputs[0])
        assert torch.equal(call.outputs[0], expected)


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_nothing_is_left_on_what_was_recorded(tmp_path: Path) -> None:
    pipe = flux_pipeline(flux_transformer())
    before = type(pipe), type(pipe.scheduler), set(vars(pipe.transformer))
    with pytest.raises(KeyError), edit_compile.record(pipe, tmp_path):
        raise KeyError
    assert (type(pipe), type(pipe.scheduler), set(vars(pipe.transformer))) == before
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_a_pipelines_images_are_its_generations(tmp_path: Path) -> None:
    pipe = flux_pipeline(flux_transformer())
    expected = generate(pipe, 0, **GUIDED), generate(pipe, 1)
    with edit_compile.record(pipe, tmp_path) as recorder:
        assert torch.equal(generate(pipe, 0, **GUIDED), expected[0])
        with pytest.raises(ZeroDivisionError):
            generate(pipe, 5, callback_on_step_end=lambda *_: 1 / 0)
        assert torch.equal(generate(pipe, 1), expected[1])
        assert recorder.count == 2
    guided, other = read(tmp_path)
    assert [call.context for call in guided.calls] == ["cond", "uncond"] * 3
    assert [call.context for call in other.calls] == ["cond"] * 3
    assert torch.equal(guided.result, expected[0])
    assert torch.equal(other.result, expected[1])
    with torch.no_grad():
        for call in (*guided.calls, *other.calls):
            assert torch.equal(pipe.transformer(**call.arguments).sample, call.outputs[0])


def test_a_bare_module_in_a_pipeline_is_told_of_each_image(tmp_path: Path) -> None:
    pipe = flux_pipeline(flux_transformer())
    with edit_compile.record(pipe.transformer, tmp_path):
        generate(pipe, 0)
        generate(pipe, 1, **GUIDED)
    assert [len(generation.calls) for generation in Recording(tmp_path)] == [3, 6]
    assert [generation.result for generation in Recording(tmp_path)] == [None, None]


def test_a_copy_of_the_scheduler_steps_for_itself(tmp_path: Path) -> None:
    """As pipelines do that denoise sound beside images."""

    class Pipe:
        def __init__(self, model: nn.Module) -> None:
            self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()

        def __call__(self, x: Tensor) -> Tensor:
            self.scheduler.set_timesteps(2)
            beside = copy.deepcopy(self.scheduler)
            for t in self.scheduler.timesteps:
                velocity = self.transformer(x, t)
                beside.step(velocity, t, x + 1)
                x = self.scheduler.step(velocity, t, x).prev_sample
            return x

    torch.manual_seed(0)
    pipe = Pipe(Denoiser().requires_grad_(False))
    expected = pipe(torch.ones(1, 3))
    with edit_compile.record(pipe, tmp_path):
        assert torch.equal(pipe(torch.ones(1, 3)), expected)
    (generation,) = read(tmp_path)
    assert torch.equal(generation.result, expected)


def test_equal_tensors_are_stored_once(model: nn.Module, tmp_path: Path) -> None:
    words = noise(4, 5)
    with edit_compile.record(model, tmp_path):
        for t in range(3):
            model(noise(2, 3, seed=t), t, words=words if t else words.clone(), same=words)
    with safe_open(tmp_path / "generation-00000.safetensors", "pt") as file:
        assert sum("words" in key for key in file.keys()) == 1  # noqa: SIM118
        assert len(file.keys()) == 3 + 3 + 2
    (generation,) = read(tmp_path)
    one, other = generation.calls[0].arguments, generation.calls[2].arguments
    assert one["words"] is other["words"]
    assert torch.equal(one["words"], words)


def test_zeros_of_both_signs_and_of_other_shapes_are_not_equal(model: nn.Module, tmp_path: Path) -> None:
    given = [torch.zeros(3), -torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, dtype=torch.float64), torch.zeros(0, 3)]
    with edit_compile.record(model, tmp_path):
        for y in given:
            model(noise(3), y=y)
    (generation,) = read(tmp_path)
    found = [call.arguments["y"] for call in generation.calls]
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in given]
    assert torch.equal(found[1].signbit(), given[1].signbit())


def test_tensors_are_recorded_as_they_were_when_called(model: nn.Module, tmp_path: Path) -> None:
    x, kept = noise(2, 3), []
    with edit_compile.record(model, tmp_path):
        for _ in range(3):
            kept.append((x.clone(), model(x).clone()))
            output = model(x)
            x.sub_(output, alpha=0.1)
            output.zero_()
    (generation,) = read(tmp_path)
    for call, (given, output) in zip(generation.calls[::2], kept, strict=True):
        assert torch.equal(call.arguments["x"], given)
        assert torch.equal(call.outputs[0], output)


def test_views_and_other_dtypes_come_back_as_they_were(model: nn.Module, tmp_path: Path) -> None:
    given = {
        "row": noise(4, 6)[1],
        "turned": noise(4, 6).T,
        "wide": noise(3).expand(5, 3),
        "half": noise(3).bfloat16(),
        "narrow": noise(3).to(torch.float8_e4m3fn),
        "mask": noise(3) > 0,
        "scalar": torch.tensor(7),
        "complex": torch.complex(noise(3), noise(3)).conj(),
    }
    with edit_compile.record(model, tmp_path), torch.inference_mode():
        model(noise(3), **given)
    found = read(tmp_path)[0].calls[0].arguments
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert (
            torch.equal(found[name].float(), tensor.float()) if name == "narrow" else torch.equal(found[name], tensor)
        )


def test_loops_of_ones_own(model: Denoiser, tmp_path: Path) -> None:
    x = noise(2, 3)
    with edit_compile.record(model, tmp_path) as recorder:
        model(x, "warm up")
        with recorder.generation():
            model(x, "a")
            with recorder.generation():
                model(x, "a")
            model._reset_stateful_cache()  # inside a generation that is told, this says nothing
            model(x, "a")
            recorder.result(x + 1)
        model(x, "b")
        model._reset_stateful_cache()
        model._reset_stateful_cache()
        model(x, "c")
        model(x, "c")
    assert marks(tmp_path) == [["warm up"], ["a"] * 3, ["b"], ["c"] * 2]
    assert model.resets == 3
    assert torch.equal(read(tmp_path)[1].result, x + 1)


def test_a_generation_with_an_exception_is_dropped(model: nn.Module, tmp_path: Path) -> None:
    x = noise(2, 3)

    def failing(mark: str) -> None:
        with pytest.raises(ArithmeticError):
            model(x, mark, fail=True)

    with pytest.raises(KeyboardInterrupt), edit_compile.record(model, tmp_path) as recorder:
        model(x, "dropped")
        failing("dropped")
        model(x, "a")
        with recorder.generation():
            failing("dropped")
            model(x, "dropped")
        with pytest.raises(ArithmeticError), recorder.generation():
            model(x, "dropped")
            raise ArithmeticError
        with recorder.generation():
            model(x, "b")
        model(x, "dropped")
        raise KeyboardInterrupt
    assert marks(tmp_path) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"x": torch.full((3,), torch.nan)}, r"calls\[1\]: argument 'x' holds NaN"),
        ({"y": torch.tensor([torch.inf])}, "argument 'y' holds NaN or infinity"),
        ({"y": [{"z": torch.tensor([torch.nan])}]}, "argument 'y.0.z' holds NaN"),
        ({"y": float("nan")}, "argument 'y' is nan"),
        ({"y": 2**70}, "more than 64 bits"),
        ({"y": object()}, "argument 'y' is a object: neither a tensor nor plain data"),
        ({"y": {"a.b": 1}}, "without a dot"),
        ({"y": {1: 1}}, "without a dot"),
        ({"y": Size(2, 3)}, "argument 'y' is a Size: pass a plain tuple"),
        ({"y": noise(3).to_sparse()}, "argument 'y' is on the meta device, sparse or quantised"),
    ],
)
def test_what_cannot_be_recorded_is_told_at_the_end(
    arguments: dict[str, Any], told: str, model: nn.Module, tmp_path: Path
) -> None:
    given = {"x": noise(3)} | arguments
    with edit_compile.record(model, tmp_path) as recorder:
        with recorder.generation():
            model(noise(3))
        with pytest.raises(CallsError, match=f"generation 1 is not recorded: .*{told}"), recorder.generation():
            model(noise(3), 1)
            assert model(**given).shape == (3,)
        model(noise(3), 2)
    assert len(read(tmp_path)) == 2


def test_an_output_that_is_not_finite_or_no_tensor(model: Denoiser, tmp_path: Path) -> None:
    with torch.no_grad():
        model.linear.bias.fill_(torch.inf)
    with pytest.raises(CallsError, match=r"calls\[0\]: output 0 holds NaN"), edit_compile.record(model, tmp_path):
        model(noise(3))
    silent = Silent()
    with pytest.raises(CallsError, match="output is a NoneType"), edit_compile.record(silent, tmp_path / "b"):
        silent()
    with pytest.raises(CallsError, match="belongs after"), edit_compile.record(model, tmp_path / "c") as recorder:
        recorder.result(noise(3))


class Silent(nn.Module):
    """Returns nothing."""

    def forward(self) -> None: ...


def test_what_is_no_module_and_has_none(tmp_path: Path) -> None:
    with pytest.raises(CallsError, match="say which one to record"):
        edit_compile.record(SimpleNamespace(transformer=Silent(), transformer_2=Silent()), tmp_path).__enter__()
    with pytest.raises(CallsError, match="has no transformer that could be recorded"):
        edit_compile.record(SimpleNamespace(unet=Silent()), tmp_path).__enter__()


def test_contexts_of_models_that_have_them(tmp_path: Path) -> None:
    for number, (model, inputs) in enumerate((tiny_flux(), compiled())):
        with torch.no_grad(), edit_compile.record(model, tmp_path / str(number)):
            with model.cache_context("cond"):
                model(**inputs)
                with model.cache_context(name="uncond"):
                    model(**inputs)
            model(**inputs)
        (generation,) = read(tmp_path / str(number))
        assert [call.context for call in generation.calls] == ["cond", "uncond", None]
