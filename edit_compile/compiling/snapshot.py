"""Whether a model's weights are still those that were compiled, without a copy of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Mark = tuple[object, ...]


@dataclass(frozen=True)
class Snapshot:
    """Where each parameter and buffer is, of what dtype, and how often it was written to.

    What goes around torch's counting, as writing to ``parameter.data`` does, is not seen.
    """

    marks: Mapping[str, Mark]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """As they are now."""
        return Snapshot(_marks(model))

    def changed(self, model: nn.Module) -> str | None:
        """Name of the first that is not as it was."""
        now = _marks(model)
        return next((name for name, mark in self.marks.items() if now.get(name) != mark), None)

    def without_changes(self, model: nn.Module) -> Snapshot:
        """Without those that have changed: the model has written to them itself, when we ran it."""
        now = _marks(model)
        return Snapshot({name: mark for name, mark in self.marks.items() if now.get(name) == mark})


def _marks(model: nn.Module) -> dict[str, Mark]:
    return {name: _mark(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _mark(tensor: Tensor) -> Mark:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # without memory, as on the meta device
        place = 0
    return version, place, tensor.dtype, tensor.device, tuple(tensor.shape)
