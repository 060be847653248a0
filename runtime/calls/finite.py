"""What is not finite, found where it arises: the block, at full width or as it was decided, and the rows.

A step's outputs are looked at once, as its inputs are. Only where they are not finite is the step run again, and every
guard looked at: first with all blocks at full width, as the model itself computes them, then as it was decided.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.base.errors import NotFiniteError
from runtime.base.guard import answering
from runtime.bundle.spec import Glue
from runtime.calls.bound import BoundBlocks
from runtime.calls.dispatch import Dispatch
from runtime.calls.rows import Scene, nobodys
from runtime.requests.sighting import Sighting
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all floats among `tensors` are finite. Synchronises with the device, once where they are."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    sums = [tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None).abs() for tensor in floats]
    if not sums or bool(torch.isfinite(sum(sums))):  # type: ignore[arg-type]
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats)  # a sum may overflow on its own


@dataclass(frozen=True)
class Again:
    """A step that is run once more to see where numbers cease to be finite.

    `run` gives the tensors of the model's output, with guards answered by whoever does; `seen` is the call, and
    `scenes` those of its requests.
    """

    blocks: BoundBlocks
    glue: Glue
    scenes: Sequence[Scene]
    seen: Sighting
    timestep: Tensor
    run: Callable[[], Sequence[Tensor]]
    parts: Callable[[Sequence[Tensor]], Sequence[Sequence[Tensor]]]

    def explain(self, outputs: Sequence[Tensor]) -> list[Scene]:
        """Warn of those that are not finite at full width either, and give them; NotFiniteError where others are not.

        `outputs` are what the step gave; `parts` has those of each scene. The error ends all the requests.
        """
        origin, whole = self._full_width()
        if origin:
            warnings.warn(f"{self._step} gives NaN or infinity{origin}", RuntimeWarning, stacklevel=2)
            pairs = list(zip(self.scenes, self.parts(whole), self.parts(outputs), strict=True))
            own = [scene for scene, full, _ in pairs if not all_finite(full)]
            if not own or all(all_finite(given) for scene, _, given in pairs if scene not in own):
                return own or list(self.scenes)
        watched = _Watched(Dispatch(self.blocks, self.scenes, self.timestep, self.glue), self.blocks)
        with suppress(NotFiniteError):  # of a router behind what is looked for
            self._outputs(watched)
        told = watched.told or ", which its blocks do not show when they run again"
        raise NotFiniteError(
            f"{self._step} gives NaN or infinity{told}; "
            "every block at full width gives finite numbers: compile in bfloat16 or float32, or choose a policy that "
            "does without"
        )

    def at_full_width(self) -> str:
        """Where the step is not finite although every block is computed at full width, as words; "" where it is."""
        return self._full_width()[0]

    def _full_width(self) -> tuple[str, Sequence[Tensor]]:
        """The same, and the outputs."""
        full = nobodys(self.seen, len(self.blocks), 1.0)
        watched = _Watched(Dispatch(self.blocks, [full], self.timestep, self.glue), self.blocks)
        outputs = self._outputs(watched)
        if watched.told:
            return f"{watched.told}, as the model itself: look at its weights, the inputs, and the precision", outputs
        told = ", which comes from outside of its blocks: look at the model's other weights"
        return "" if all_finite(outputs) else told, outputs

    @property
    def _step(self) -> str:
        """Which it is, in words; of several requests with their names."""
        if len(self.scenes) == 1:
            return f"step {self.scenes[0].step}"
        return ", ".join(f"step {one.step} of request {one.trace.request!r}" for one in self.scenes)

    def _outputs(self, watched: _Watched) -> Sequence[Tensor]:
        with answering(watched):
            return self.run()


class _Watched:
    """Answers guards as `dispatch` does; `told` is which gave what is not finite for what is, "" while none has."""

    def __init__(self, dispatch: Dispatch, blocks: BoundBlocks) -> None:
        self._dispatch, self._blocks = dispatch, blocks
        self.told = ""

    def __call__(self, block: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        after = self._dispatch(block, inputs, form)
        if not self.told and not all_finite(after) and all_finite(inputs):
            ready = self._blocks.named(block, form)
            rows = _rows(after, ready.state_dims)
            done = [self._dispatch.answered[-1][1][row] for row in rows]
            ways = ", ".join(_WAYS.get(way, f"width {way:g}") for way in sorted(set(done)))
            self.told = f" from block {ready.name or block} on ({ways}; rows {', '.join(map(str, rows))})"
        return after


_WAYS = {SKIP: "skipped", REUSE: "its residual reused", EXTRAPOLATE: "its residual extrapolated"}


def _rows(states: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """Rows of which a state is not finite."""
    found: set[int] = set()
    for state, dim in zip(states, dims, strict=True):
        whole = torch.isfinite(state).movedim(dim, 0).flatten(1).all(1)
        found |= {row for row, finite in enumerate(whole.tolist()) if not finite}
    return sorted(found)
