"""Memory that training takes on each device, by shapes: no weights are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.elastic.layout import ElasticError
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from edit_compile.training.activations import Activations, measure
from edit_compile.training.lora import adapted_linears
from edit_compile.training.sharding import units

FLOAT32 = 4
UNCOUNTED = (
    "what operations need while they run, and what the allocator loses between blocks of memory",
    "the CUDA context, buffers of NCCL, and DDP's buckets (up to the gradients once more)",
    "the loss, the batch, text encoders and VAE, if they are on the same device",
    "activations of LoRA (the layers' inputs are counted, rank-sized tensors are not)",
)
"""What no figure here holds."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `gathered` is the largest unit of FSDP twice, as the next is fetched while one runs."""

    trained: str
    parameters: int
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    checkpointed: int

    def total(self, checkpointing: bool) -> int:
        """All of it, with or without every block checkpointed."""
        fixed = self.weights + self.gathered + self.gradients + self.optimizer + self.average
        return fixed + (self.checkpointed if checkpointing else self.activations)


@dataclass(frozen=True)
class Estimate:
    """Memory for training routers alone, LoRA with routers, and all parameters, on one of `processes` devices."""

    model: str
    processes: int
    whole: tuple[Memory, ...]
    sharded: tuple[Memory, ...]

    def __rich__(self) -> Table:
        names = [row.trained for row in self.whole]
        table = Table("GB on each device", *names, title=self.model, caption="Not counted: " + "; ".join(UNCOUNTED))
        table.add_row("parameters trained", *(f"{row.parameters:,}" for row in self.whole), end_section=True)
        _add(table, "", self.whole)
        if self.sharded:
            _add(table, f", shared by {self.processes}", self.sharded)
        return table


def _add(table: Table, which: str, rows: Sequence[Memory]) -> None:
    lines: dict[str, list[int]] = {
        f"weights{which}": [row.weights for row in rows],
        "gathered for a while": [row.gathered for row in rows],
        "gradients": [row.gradients for row in rows],
        "AdamW": [row.optimizer for row in rows],
        "average": [row.average for row in rows],
        "activations": [row.activations for row in rows],
        "with checkpointing": [row.checkpointed for row in rows],
        "total": [row.total(checkpointing=False) for row in rows],
        "total with checkpointing": [row.total(checkpointing=True) for row in rows],
    }
    for name, values in lines.items():
        table.add_row(name, *(f"{value / 1e9:.2f}" for value in values), end_section=name == "total with checkpointing")


def estimate(
    elastic: ElasticTransformer,
    inputs: Mapping[str, Any],
    rank: int = 16,
    processes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    ema: bool = True,
) -> Estimate:
    """What training `elastic` takes when it is called with `inputs` (one micro batch), one device of `processes`.

    The model computes in `dtype`, in which frozen weights are also kept; what is trained is in float32, and so are its
    gradients, average and both states of AdamW. Under autocast a trained weight has a copy in `dtype` too, kept like
    an activation. Routers are float32. LoRA of `rank` is on every linear of the blocks. Activations are measured by
    running the model on the meta device, with its own weights frozen where routers alone are trained.

    Args:
        elastic: has its routers; may be on the meta device. It is changed: moved there, as `dtype`.
        inputs: keyword arguments of its forward, of which shapes and dtypes count.
    """
    assert elastic.layout is not None
    elastic.router_dtype = elastic.router_dtype or torch.float32
    elastic.to("meta", dtype).train()
    blocks = [elastic.model.get_submodule(block.name) for block in elastic.layout.blocks]
    kept = []
    for frozen in (True, False):
        elastic.model.requires_grad_(not frozen)
        kept.append(measure(elastic, blocks, lambda: elastic(**_on_meta(inputs, dtype))))
    rows = [tuple(_rows(elastic, blocks, kept, rank, dtype, ema, count)) for count in (1, processes)]
    return Estimate(type(elastic.model).__name__, processes, rows[0], rows[1] if processes > 1 else ())


def estimate_model(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, **settings: Any) -> Estimate:
    """`estimate` of a model that may be elastic already; its blocks are found without weights."""
    hollow = _on_meta(inputs, dtype)
    if not isinstance(model, ElasticTransformer):
        model = elasticize(nn.Module.to(model, "meta", dtype), hollow, router_dtype=torch.float32)
    elif model.layout is None:
        raise ElasticError("the elastic model has no routers yet: give elasticize(model, inputs=...) its inputs")
    return estimate(model, hollow, dtype=dtype, **settings)


def _rows(
    elastic: ElasticTransformer,
    blocks: list[nn.Module],
    kept: list[Activations],
    rank: int,
    dtype: torch.dtype,
    ema: bool,
    processes: int,
) -> Iterator[Memory]:
    base, routers = (sum(p.numel() for p in module.parameters()) for module in (elastic.model, elastic.routers))
    lora = sum(lora_parameters(block, rank) for block in blocks)
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units(elastic))
    small, full = dtype.itemsize, dtype.itemsize if dtype != torch.float32 else 0
    for name, extra, all_trained, activations in (
        ("routers", 0, False, kept[0]),
        (f"and LoRA ({rank})", lora, False, kept[1]),
        ("all", 0, True, kept[1]),
    ):
        trained = routers + extra + (base if all_trained else 0)
        weights = (base * FLOAT32 if all_trained else base * small) + (routers + extra) * FLOAT32
        copies = base * full if all_trained else 0  # autocast keeps them from forward to backward
        yield Memory(
            trained=name,
            parameters=trained,
            weights=-(-weights // processes),
            gathered=2 * largest * (FLOAT32 if all_trained else small) if processes > 1 else 0,
            gradients=-(-trained * FLOAT32 // processes),
            optimizer=-(-2 * trained * FLOAT32 // processes),
            average=-(-trained * FLOAT32 // processes) if ema else 0,
            activations=activations.plain + copies,
            checkpointed=activations.checkpointed + (largest * full if all_trained else 0),
        )


def lora_parameters(block: nn.Module, rank: int) -> int:
    """Parameters of LoRA of `rank` on every linear inside `block`."""
    return sum(rank * (linear.in_features + linear.out_features) for linear in adapted_linears(block).values())


def _on_meta(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs without numbers, tensors of floats as `dtype`."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to("meta", dtype if tensor.is_floating_point() else None)

    return pytree.tree_map_only(Tensor, moved, dict(inputs))
