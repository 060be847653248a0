"""What was decided, per request, step, block and row; and the work that was done."""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bundle.spec import Cost, Plan
from runtime.routing.policy import EXTRAPOLATE, SKIP

SKIPPED, REUSED, COMPUTED = 0, 1, 2
"""Values of `done`: what was done with a row of a block."""
MISSING = -1
"""Value of `done` in a grid where a block was not called."""

_COLUMNS = {"context": "H", "step": "H", "block": "H", "row": "H", "p": "f", "width": "f", "done": "B"}


class RequestTrace:
    """The decisions of one request, in the order taken.

    One entry per (cache context, step, block, row): `p` is the router's gate, `width` the MLP
    width computed at (0 where nothing was computed), `done` one of SKIPPED, REUSED, COMPUTED. `extrapolated`: whether
    some of what was reused was moved on by the timestep, which `done` does not tell.
    """

    def __init__(self, request: str) -> None:
        self.request = request
        self.contexts: list[str] = []
        self.extrapolated = False
        self._columns: dict[str, array[Any]] = {name: array(kind) for name, kind in _COLUMNS.items()}

    def __len__(self) -> int:
        return len(self._columns["p"])

    def context(self, name: str) -> int:
        """The number under which the cache context `name` appears in the columns."""
        if name not in self.contexts:
            self.contexts.append(name)
        return self.contexts.index(name)

    def add(self, context: int, step: int, block: int, gate: Sequence[float], decisions: Sequence[float]) -> None:
        """Append one guard's decisions, a row each."""
        columns = self._columns
        rows = len(decisions)
        self.extrapolated |= EXTRAPOLATE in decisions
        columns["context"].extend((context,) * rows)
        columns["step"].extend((step,) * rows)
        columns["block"].extend((block,) * rows)
        columns["row"].extend(range(rows))
        columns["p"].extend(gate)
        columns["width"].extend(d if d > 0.0 else 0.0 for d in decisions)
        columns["done"].extend(SKIPPED if d == SKIP else REUSED if d < SKIP else COMPUTED for d in decisions)

    def shorten(self, length: int) -> None:
        """Forget all entries but the first `length`."""
        for column in self._columns.values():
            del column[length:]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The columns context, step, block, row, p, width, done as arrays (copies) of one length."""
        return {name: np.array(column) for name, column in self._columns.items()}

    def grid(self, context: str | None = None) -> dict[str, npt.NDArray[np.generic]]:
        """p, width and done as (steps, blocks, rows) arrays of one context (the first by default).

        Where a block was not called p and width are NaN and done is MISSING.
        """
        columns = self.arrays()
        chosen = columns["context"] == (0 if context is None else self.contexts.index(context))
        where = tuple(columns[name][chosen].astype(np.intp) for name in ("step", "block", "row"))
        shape = tuple(int(index.max()) + 1 if index.size else 0 for index in where)
        grids: dict[str, npt.NDArray[np.generic]] = {}
        for name, kind, fill in (("p", np.float32, np.nan), ("width", np.float32, np.nan), ("done", np.int8, MISSING)):
            grid = np.full(shape, fill, dtype=kind)
            grid[where] = columns[name][chosen]
            grids[name] = grid
        return grids


class Trace:
    """The last requests' decisions, the newest last; `keep` bounds how many are held."""

    def __init__(self, keep: int = 16) -> None:
        self._requests: deque[RequestTrace] = deque(maxlen=keep)

    def __iter__(self) -> Iterator[RequestTrace]:
        return iter(tuple(self._requests))

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> RequestTrace:
        return self._requests[index]

    def begin(self, request: str) -> RequestTrace:
        """A new request's record, kept from now on."""
        record = RequestTrace(request)
        self._requests.append(record)
        return record

    def discard(self, record: RequestTrace) -> None:
        """Forget `record`."""
        if record in self._requests:
            self._requests.remove(record)

    def clear(self) -> None:
        """Forget all requests."""
        self._requests.clear()

    def to_json(self) -> str:
        """All columns of all requests as JSON: a list of {request, contexts, columns...}."""
        return json.dumps(
            [
                {"request": record.request, "contexts": record.contexts}
                | {name: column.tolist() for name, column in record.arrays().items()}
                for record in self
            ]
        )


@dataclass(frozen=True)
class Counters:
    """Work done since the counters were reset.

    `calls` counts forward calls, `guards` blocks asked for, `engine_calls` runs of a plan; `skipped`,
    `reused` and `computed` count rows of blocks. From the program's costs: `flops` is the work done
    (glue and blocks), `bytes` what the engine calls of the blocks had to move (each reads its weights
    once; the glue is not counted), `dense_flops` what every block at full width would have been.
    """

    calls: int = 0
    guards: int = 0
    engine_calls: int = 0
    skipped: int = 0
    reused: int = 0
    computed: int = 0
    flops: int = 0
    bytes: int = 0
    dense_flops: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def per_step(self) -> dict[str, float]:
        """Each count divided by the number of forward calls."""
        return {name: value / max(self.calls, 1) for name, value in asdict(self).items()}


Costs = Mapping[tuple[str, int], Cost]
"""What a row costs, by plan and variant; nothing for plans that a glue knows no costs of."""


def work(answered: Iterable[tuple[Plan, Sequence[float]]], costs: Costs, together: bool = True) -> Counters:
    """The work of one forward call, its glue aside, from its guards: each one's plan, and what was done with its rows.

    `together`: rows at one width share an engine call, unless the plan takes a row at a time.
    """
    totals: dict[str, int] = dict.fromkeys((field.name for field in fields(Counters)), 0)
    totals["calls"] = 1
    for plan, done in answered:
        totals["guards"] += 1
        dense = costs.get((plan.id, len(plan.variants) - 1))
        totals["dense_flops"] += len(done) * dense.flops if dense is not None else 0
        for decision in set(done):
            rows = list(done).count(decision)
            if decision <= SKIP:
                totals["skipped" if decision == SKIP else "reused"] += rows
                continue
            calls = 1 if together and not plan.single_row else rows
            totals["computed"] += rows
            totals["engine_calls"] += calls
            cost = costs.get((plan.id, plan.variant_at(decision)))
            if cost is not None:
                totals["flops"] += rows * cost.flops
                totals["bytes"] += calls * cost.weight_bytes + rows * cost.row_bytes
    return Counters(**totals)
