"""The recording of one forward: the glue, and in each guard's place routers, decisions and switches.

A guard's states after it start as a copy of those before it, which is all that a skip needs. Then every row of the
batch has a switch of its own: reuse adds the residual, compute runs the block on the row at one of its widths and keeps
what that added. The buffers belong to one branch of one request at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from runtime.base.errors import RecordError
from runtime.base.guard import answering
from runtime.base.rows import one_row
from runtime.calls.bound import BoundBlock, BoundBlocks
from runtime.device.policy import PolicyNumbers
from runtime.device.recorder import Recorder, Work
from runtime.routing.policy import EMPTY, Decider

OWN = 5
"""Numbers of a branch of its own (see ``decide.cu``)."""


class Step:
    """One forward with the shapes of `inputs`, recorded at once. Raises whatever keeps it from being recorded.

    A replay leaves what it decided in one tensor, `whole` (float64), so that one copy brings it to the host: the
    branch's own numbers (see ``decide.cu``), then what `views` shows. `names` are those of the inputs, `guarded`
    the blocks that the glue asks for, in order, `rows` the rows of the batch.

    Args:
        recorder: what records it.
        blocks: the program's blocks; `routed` says whether their routers run.
        glue: the glue's graph, from `inputs` to the outputs.
        inputs: example arguments by name, in the glue's order, of the shapes, dtypes and device of all calls.
        timestep: example timestep, of one element per row or one for all.
    """

    def __init__(
        self,
        recorder: Recorder,
        blocks: BoundBlocks,
        glue: Callable[..., Sequence[Tensor]],
        inputs: Mapping[str, Tensor],
        timestep: Tensor,
        routed: bool,
    ) -> None:
        self._recorder, self._glue = recorder, glue
        self.blocks = [blocks.named(block, 0) for block in range(len(blocks))]
        self._routers = blocks.routers if routed else None
        self.router_dtype = torch.float64 if blocks.routers is None else blocks.routers.dtype
        self.names = tuple(inputs)
        self._inputs = [given.clone() for given in inputs.values()]
        device = self._inputs[0].device
        self._timestep = timestep.to(device, copy=True)
        self.time = self._timestep.reshape(-1).double()
        self._deltas, self._outputs = self._probe(blocks)
        self.rows = rows = self._rows()
        self.guarded = tuple(self._deltas)
        count, choices = len(self.blocks), self._choices()
        self.policy = PolicyNumbers(self.blocks, rows, device)
        self.held = torch.full((count, rows), EMPTY, dtype=torch.int32, device=device)
        self.own = torch.zeros(OWN, dtype=torch.int32, device=device)
        self.whole = torch.zeros(OWN + len(inputs) + count * rows * (choices + 1), dtype=torch.float64, device=device)
        self._finite, self._logits, self._decisions = self.views(self.whole)
        self._variants = [self._variant_indices(block, device) for block in self.blocks]
        self._embedding: Tensor | None = None
        self._replay: Work = recorder.record(self._work)
        self._embedding = None
        self.reset()

    def empty(self) -> None:
        """Forget all residuals."""
        self.held.fill_(EMPTY)

    def reset(self) -> None:
        """Forget everything, for another request."""
        self.empty()
        self.own.zero_()

    def run(
        self, inputs: Sequence[Tensor], timestep: Tensor, policy: Decider, begin: Callable[[], None]
    ) -> list[Tensor]:
        """The outputs for `inputs`, newly allocated. `begin` brings the request's clock to this call."""
        self.policy.set(policy, self._routers is not None)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._timestep.copy_(timestep)
        self.time.copy_(timestep.reshape(-1))
        begin()
        return [output.clone() for output in self._replay()]

    def views(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each input is finite (inputs,), the logits (blocks, rows, 1 + |S|), the cases (blocks, rows).

        Without routers there are no logits: (blocks, rows, 0).
        """
        count, choices = len(self.blocks), self._choices()
        cells = count * self.rows
        finite, logits, cases = whole[OWN:].split([len(self.names), cells * choices, cells])
        return finite, logits.view(count, self.rows, choices), cases.view(count, self.rows)

    def _probe(self, blocks: BoundBlocks) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """A residual's buffers for every guard that the glue comes to, and those of its outputs.

        The blocks get bindings of their own: an engine's context serves one recording, or calls, not both.
        """
        deltas: dict[int, list[Tensor]] = {}

        def answer(block: int, inputs: Sequence[Tensor], form: int) -> list[Tensor]:
            self.blocks[block] = blocks.bound_again(block, form)
            states = [inputs[index] for index in self.blocks[block].states]
            deltas[block] = [torch.zeros_like(state) for state in states]
            return states

        with answering(answer, _on_the_host):
            outputs = self._glue(*self._inputs)
        return deltas, [torch.zeros_like(output) for output in outputs]

    def _rows(self) -> int:
        counts = {delta[0].shape[self.blocks[block].state_dims[0]] for block, delta in self._deltas.items()}
        if len(counts) != 1:
            raise RecordError(f"blocks see batches of {sorted(counts)} rows, a recorded step needs one number")
        return counts.pop()

    def _choices(self) -> int:
        return 0 if self._routers is None else 1 + len(self._routers.config.widths)

    def _variant_indices(self, block: BoundBlock, device: torch.device) -> Tensor | None:
        """The variant run for each width that a router may choose."""
        if self._routers is None:
            return None
        indices = [block.variant_for(width) for width in self._routers.config.widths]
        return torch.tensor(indices, dtype=torch.int32, device=device)

    def _work(self) -> list[Tensor]:
        self._embedding = None
        self.whole[:OWN].copy_(self.own)
        for flag, given in zip(self._finite, self._inputs, strict=True):
            flag.copy_(torch.isfinite(given).all())
        with answering(self._answer):
            for own, output in zip(self._outputs, self._glue(*self._inputs), strict=True):
                own.copy_(output)
        return self._outputs

    def _answer(self, block: int, inputs: Sequence[Tensor], form: int) -> list[Tensor]:
        ready = self.blocks[block]
        states = [inputs[index] for index in ready.states]
        if self._routers is not None:
            time = self._sinusoid() if ready.time is None else inputs[ready.time]
            self._logits[block].copy_(self._routers(block, ready.rows_first(states), time))
        after = [state.clone() for state in states]
        for row in range(self.rows):
            self._guard(block, ready, row, inputs, after)
        return after

    def _sinusoid(self) -> Tensor:
        if self._embedding is None:
            assert self._routers is not None
            self._embedding = self._routers.embed(self._timestep, self.rows)
        return self._embedding

    def _guard(self, block: int, ready: BoundBlock, row: int, inputs: Sequence[Tensor], after: list[Tensor]) -> None:
        """Decide for one row and do it."""
        condition = self._recorder.condition()
        policy, variants = self.policy, self._variants[block]
        self._recorder.launch(
            "decide",
            condition,
            None if variants is None else self._logits[block, row],
            0 if variants is None else len(variants),
            variants,
            len(ready.bound) - 1,
            policy.bounds,
            policy.limits,
            policy.table,
            len(policy.table),
            self.held.numel(),
            block * self.rows + row,
            self.own,
            self.held,
            self._decisions[block, row],
        )
        given = one_row(inputs, ready.batch_dims, row)
        before = [given[index] for index in ready.states]
        mine = one_row(after, ready.state_dims, row)
        deltas = one_row(self._deltas[block], ready.state_dims, row)

        def reuse() -> None:
            for old, delta, new in zip(before, deltas, mine, strict=True):
                torch.add(old, delta, out=new)

        def compute(variant: int) -> None:
            for old, delta, new, done in zip(before, deltas, mine, ready.bound[variant](given), strict=True):
                torch.sub(done, old, out=delta)
                new.copy_(done)

        bodies: list[Callable[[], None]] = [reuse, *(partial(compute, variant) for variant in range(len(ready.bound)))]
        self._recorder.switch(condition, bodies)


def _on_the_host(right: Tensor, told: str) -> None:
    raise RecordError("values of the inputs (offsets in the tokens of a batch) have to be checked, which the host does")
