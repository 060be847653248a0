"""Parameters split over the processes of a run (FSDP2), and tensors gathered from and spread over them.

Torch's `fully_shard` is called here, not through accelerate: that ignores its FSDP plugin on CPUs, and with mixed
precision it would run routers in half precision, as it has one policy for all modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, processes: int) -> None:
    """Split the parameters of `module` over `processes`: each block, and each router, is gathered when it runs.

    Blocks are the entries of the outermost ModuleLists that have parameters; what is left is one more unit. The
    module is changed in place, its parameters are new ones: make the optimiser afterwards.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for unit in units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost ModuleLists of `module` that have parameters."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (entry for entry in child if next(entry.parameters(), None) is not None)
        else:
            yield from units(child)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process has a part perhaps: every process must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process has whole, on the device of `like` and split as that is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
