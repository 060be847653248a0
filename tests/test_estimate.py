"""The estimate of training memory against counts, and against what small models really keep."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from edit_compile.cli import app
from edit_compile.elastic.transformer import elasticize
from edit_compile.loading import save_inputs
from edit_compile.training.estimate import Estimate, estimate_model, lora_parameters
from runtime.bundle.spec import RouterConfig
from tests.models import tiny_flux

peft = pytest.importorskip("peft")


def given() -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny_flux(side=12, text=30)
    return model, {**inputs, "return_dict": False}


@pytest.fixture(scope="module")
def found() -> Estimate:
    model, inputs = given()
    elastic = elasticize(model, inputs, config=RouterConfig(hidden=16))
    return estimate_model(elastic, inputs, torch.float32, rank=4, processes=4)


def kept(elastic: Any, inputs: dict[str, Any]) -> int:
    """Bytes that a real forward keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in (*elastic.parameters(), *elastic.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = elastic(**inputs)
        del output
    return sum(storage.nbytes() for storage in seen.values())


def test_parameters_are_counted(found: Estimate) -> None:
    model, inputs = given()
    elastic = elasticize(model, inputs, config=RouterConfig(hidden=16))
    routers, every = (sum(p.numel() for p in m.parameters()) for m in (elastic.routers, elastic))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = "|".join(re.escape(name) for name in linears if "transformer_blocks" in name)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=inside), model)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert [row.parameters for row in found.whole] == [routers, routers + lora, every]
    all_of_it = found.whole[2]
    assert all_of_it.weights == all_of_it.gradients == all_of_it.average == 4 * every
    assert all_of_it.optimizer == 8 * every
    assert found.whole[0].weights == 4 * every


def test_activations_are_what_a_forward_keeps(found: Estimate) -> None:
    model, inputs = given()
    elastic = elasticize(model, inputs, config=RouterConfig(hidden=16)).train()
    assert found.whole[2].activations == pytest.approx(kept(elastic, inputs), rel=0.05)
    elastic.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    left = kept(elastic, inputs)
    one_block = (found.whole[2].activations - left) / 4
    assert found.whole[2].checkpointed == pytest.approx(left + one_block, rel=0.25)
    assert found.whole[2].checkpointed < found.whole[2].activations / 2
    elastic.disable_gradient_checkpointing()
    model.requires_grad_(False)
    assert found.whole[0].activations == pytest.approx(kept(elastic, inputs), rel=0.05)


def test_what_is_split_is_a_part_of_the_whole(found: Estimate) -> None:
    for whole, split in zip(found.whole, found.sharded, strict=True):
        assert split.optimizer == pytest.approx(whole.optimizer / 4, abs=4)
        assert split.weights == pytest.approx(whole.weights / 4, abs=4)
        assert split.activations == whole.activations
        assert split.gathered > whole.gathered == 0


def test_the_command_needs_no_weights(tmp_path: Path) -> None:
    model, inputs = given()
    model.save_config(tmp_path)
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    command = ["train", str(tmp_path / "config.json"), "--estimate", "--rank", "4"]
    result = CliRunner().invoke(app, [*command, "--inputs", str(tmp_path / "inputs.safetensors")])
    assert result.exit_code == 0, result.output
    assert "and LoRA (4)" in result.output and "Not counted" in result.output
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "needs --inputs" in refused.output


def test_lora_is_on_every_linear_of_a_block() -> None:
    model, _ = given()
    block = model.single_transformer_blocks[0]
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert lora_parameters(block, 2) == sum(2 * (m.in_features + m.out_features) for m in linears)
