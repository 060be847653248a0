"""LoRA adapters on the linears of a model's blocks while it is trained, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from edit_compile.elastic.adapters import is_adapter
from edit_compile.elastic.layout import ElasticError
from edit_compile.elastic.transformer import ElasticTransformer

NAME = "edit_compile"


def adapted_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """What of a block has an adapter, by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def adapted(elastic: ElasticTransformer, rank: int) -> Iterator[None]:
    """Inside the ``with`` block all linears of the blocks have adapters, which want gradients; then they are merged.

    ElasticError where peft is not installed, or adapters are there already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as missing:
        raise ElasticError(f"adapters need {missing.name}: pip install peft") from None
    if any(is_adapter(module) for module in elastic.model.modules()):
        raise ElasticError("the model has adapters already: merge them (fuse_lora, unload_lora) before it is distilled")
    blocks = [block.name for block in elastic.layout.blocks] if elastic.layout else []
    targets = [f"{block}.{name}" for block in blocks for name in adapted_linears(elastic.model.get_submodule(block))]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), elastic.model, NAME)
    for name, parameter in elastic.model.named_parameters():
        if parameter.requires_grad and NAME in name:
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, module in list(elastic.model.named_modules()):
            if is_adapter(module):
                adapter: Any = module
                adapter.merge()
                elastic.model.set_submodule(name, adapter.get_base_layer())
