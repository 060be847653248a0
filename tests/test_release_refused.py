"""The authors' checkpoint: what does not fit is named, and the model left alone; memory that runs out is named too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

import edit_compile
from edit_compile import ElasticError
from edit_compile.elastic.release import POLICY
from edit_compile.elastic.tensor_file import TensorFile
from passes.program.check import check_equal
from tests.released import BLOCKS, DIM, HIDDEN, Weights, checkpoint, qwen, router_weights, written


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("release"))


def of_other_channels(weights: Weights, dim: int, time_dim: int) -> None:
    """Make the routers, consistently, those of a model with `dim` channels and a time embedding of `time_dim`."""
    for index in range(BLOCKS):
        modulation = {"img_mod.1.weight": torch.ones(3 * dim, time_dim), "img_mod.1.bias": torch.ones(3 * dim)}
        for name, value in (modulation | {"out.0.weight": torch.ones(HIDDEN, dim)}).items():
            weights[f"gate_mlps.{index}.{name}"] = value


REFUSED: dict[str, tuple[Callable[[Weights], object], str]] = {
    "a model tensor lacks": (lambda w: w.pop("img_in.bias"), r"lacks img_in\.bias"),
    "a model tensor is unknown": (lambda w: w.update(extra=torch.ones(1)), "unknown extra"),
    "a model tensor is of another shape": (
        lambda w: w.update({"img_in.bias": torch.ones(5)}),
        r"img_in\.bias \[5\] instead of \[48\]",
    ),
    "no routers": (lambda w: [w.pop(key) for key in list(w) if key.startswith("gate_mlps")], "holds no routers"),
    "a router lacks": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("gate_mlps.0")],
        r"lacks gate_mlps\.0, but has gate_mlps\.1",
    ),
    "a router's tensor lacks": (lambda w: w.pop("gate_mlps.0.out.0.weight"), r"lacks gate_mlps\.0\.out\.0\.weight"),
    "a router's tensor is unknown": (
        lambda w: w.update({"gate_mlps.1.norm.weight": torch.ones(DIM)}),
        r"unknown gate_mlps\.1\.norm\.weight",
    ),
    "a router's tensor is of another shape": (
        lambda w: w.update({"gate_mlps.1.width_head.bias": torch.ones(3)}),
        r"gate_mlps\.1\.width_head\.bias \[3\] instead of \[4\]",
    ),
    "routers read tokens of other channels": (lambda w: of_other_channels(w, 64, DIM), "tokens of 64 channels"),
    "routers read another time embedding": (lambda w: of_other_channels(w, DIM, 40), "time embedding of 40"),
    "routers of more blocks": (lambda w: w.update(router_weights(BLOCKS)), "routers of 3 blocks, .* has 2"),
    "routers of fewer blocks": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("gate_mlps.1")],
        "routers of 1 blocks, .* has 2",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_file_that_does_not_fit_is_refused_and_the_model_left_alone(case: str, tmp_path: Path) -> None:
    harm, message = REFUSED[case]
    weights, model = checkpoint(), qwen()[0]
    harm(weights)
    save_file(weights, tmp_path / "model.safetensors")
    before, shown = {key: value.clone() for key, value in model.state_dict().items()}, repr(model)
    with pytest.raises(ElasticError, match=message):
        edit_compile.load_elastic(tmp_path / "model.safetensors", model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert repr(model) == shown


def test_a_model_without_such_mlps_is_left_alone(file: Path) -> None:
    model = qwen()[0]
    for block in model.transformer_blocks:
        block.img_mlp.net[0].proj = block.txt_mlp.net[0].proj = None
    own = {key: value for key, value in checkpoint().items() if ".net.0.proj" not in key}
    save_file(own, file.with_name("no_mlps.safetensors"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ElasticError, match="has no MLP whose activation"):
        edit_compile.load_elastic(file.with_name("no_mlps.safetensors"), model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_memory_is_refused(file: Path) -> None:
    with pytest.raises(ElasticError, match=r"on the meta device \(.*\): make it with memory"):
        edit_compile.load_elastic(file, model=qwen()[0].to("meta"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 12 bytes\nmore"), None])
def test_running_out_of_memory_names_the_file_and_the_tensor(
    file: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = TensorFile.read

    def short_of_memory(self: TensorFile, key: str) -> Tensor:
        if error is not None and key == "proj_out.weight":
            raise error
        return read(self, key)

    monkeypatch.setattr(TensorFile, "read", short_of_memory)
    model = qwen()[0]
    if error is None:
        edit_compile.load_elastic(file, model=model)
    else:
        said = "allocate memory: 12 bytes$" if str(error) else "MemoryError"
        with pytest.raises(ElasticError, match=rf"model\.safetensors: proj_out\.weight .* was not loaded.*{said}"):
            edit_compile.load_elastic(file, model=model)


@torch.no_grad()
def test_as_the_documentation_loads_it(file: Path) -> None:
    """In bfloat16 from the start, without ever holding the model in float32."""
    base, inputs = qwen()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = type(base).from_config(dict(base.config))
    finally:
        torch.set_default_dtype(torch.float32)
    half = pytree.tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, inputs)
    elastic = edit_compile.load_elastic(file, model=model)
    expected = edit_compile.load_elastic(file, model=qwen()[0].bfloat16())(**half).sample
    assert elastic.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(elastic(**half).sample, expected)
    compiled = edit_compile.compile(elastic, engine="torch")
    check_equal(compiled(**half), expected, "compiled, in bfloat16")
    assert compiled.policy == POLICY


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    for name in ("model.safetensors", "absent.safetensors"):
        with pytest.raises(ElasticError, match=f"{name} cannot be read"):
            edit_compile.load_elastic(tmp_path / name, model=qwen()[0])
    with pytest.raises(ElasticError, match="pass load_elastic"):
        edit_compile.load_elastic(tmp_path / "model.safetensors")
