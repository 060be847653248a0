"""Whether two calls have the same conditioning: all their tensors but the latents and the timestep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Conditioning:
    """The conditioning of a branch, as its last call had it.

    Pipelines pass the very same tensors in every step of a generation, which is told without looking at their values;
    only where a tensor is another object are values compared (which synchronises with the device). A tensor that was
    written into since is another. Of a branch that the caller has `named`, what changes in every step (the residuals of
    a ControlNet) is no conditioning; of others it might as well be another branch's.
    """

    def __init__(self, given: Mapping[str, Tensor], named: bool = False) -> None:
        self._given = {name: _Remembered(tensor) for name, tensor in given.items()}
        self._named = named
        self._changed: set[str] = set()
        self._moving: set[str] = set()
        self._kept: set[str] = set()  # what was the very same tensor in the last two calls
        self.restless = False
        """Whether it changed in the last two calls."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held; the caller may hold them, too."""
        return sum(one.nbytes for one in self._given.values())

    def same_objects(self, given: Mapping[str, Tensor]) -> bool:
        """Whether all of it is the very same tensors."""
        names = self._names(given)
        return names is not None and all(self._given[name].is_object(given[name]) for name in names)

    def same_values(self, given: Mapping[str, Tensor]) -> bool:
        """Whether all of it has the same values."""
        names = self._names(given)
        return names is not None and all(self._given[name].equals(given[name]) for name in names)

    def has_any_object(self, given: Mapping[str, Tensor]) -> bool:
        """Whether any of it is the very same tensor."""
        return any(self._is_object(name, given) for name in given)

    def made_anew(self, given: Mapping[str, Tensor]) -> bool:
        """Whether a tensor that was kept is another object now, though all have the same values."""
        return any(not self._is_object(name, given) for name in self._kept) and self.same_values(given)

    def renewed(self, given: Mapping[str, Tensor]) -> bool:
        """Whether `given` is of another generation: other values, or made anew."""
        return self.made_anew(given) or not self.same_values(given)

    def observe(self, given: Mapping[str, Tensor]) -> bool:
        """Take in the next call of the branch; whether its conditioning is another."""
        if given.keys() != self._given.keys():
            self._changed, self._moving, different = set(), set(), set(given)
        else:
            different = {name for name in given if not self._given[name].equals(given[name])}
        self._kept = {name for name in given if self._is_object(name, given)}
        self.restless = bool(different & self._changed)
        stays = self._moving - different  # what no longer changes is conditioning again
        self._moving = (self._moving | (different & self._changed)) - stays if self._named else set()
        self._changed = different
        for name, tensor in given.items():
            if name not in self._given or not self._given[name].is_object(tensor):
                self._given[name] = _Remembered(tensor)
        return bool((different - self._moving) | stays)

    def _is_object(self, name: str, given: Mapping[str, Tensor]) -> bool:
        return name in self._given and name in given and self._given[name].is_object(given[name])

    def _names(self, given: Mapping[str, Tensor]) -> tuple[str, ...] | None:
        """What is compared; None where other arguments are given."""
        if given.keys() != self._given.keys():
            return None
        return tuple(name for name in given if name not in self._moving)


class _Remembered:
    """A tensor as it was when it was given. Of a view into more (rows of a batch) its own numbers alone are held.

    Such a view is the very same as long as what it looks into is held by others.
    """

    def __init__(self, tensor: Tensor) -> None:
        # An inference tensor does not tell when it is written into: it is copied, and never known as an object.
        storage, inference = tensor.untyped_storage(), tensor.is_inference()
        self._copied = inference or storage.nbytes() > tensor.nbytes
        self._tensor = tensor.detach().clone() if self._copied else tensor.detach()
        self._version = None if inference else tensor._version
        self._place = _place(tensor)
        self._into = StorageWeakRef(storage)
        self.nbytes = tensor.nbytes

    def is_object(self, tensor: Tensor) -> bool:
        return (
            self._version is not None
            and not tensor.is_inference()
            and tensor._version == self._version
            and self._unwritten
            and _place(tensor) == self._place
            and not self._into.expired()
        )

    def equals(self, tensor: Tensor) -> bool:
        if self.is_object(tensor):
            return True
        own = self._tensor.to(tensor.device)
        return self._unwritten and tensor.shape == own.shape and tensor.dtype == own.dtype and torch.equal(tensor, own)

    @property
    def _unwritten(self) -> bool:
        return self._copied or self._tensor._version == self._version


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where its numbers lie, and how they are read: a complex tensor and its conjugate are in one place."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
