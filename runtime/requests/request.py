"""One request: where it is, its branches of guidance, and the residuals that each of them holds.

A request is one generation at a time. Its calls come in branches: the cache contexts of the caller or, where it names
none, the conditionings that it calls with. `runtime.requests.rule` says what a call is to its request.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Sequence

from torch import Tensor

from runtime.requests.bank import Residuals
from runtime.requests.conditioning import Conditioning
from runtime.requests.evidence import Chain, continues
from runtime.requests.rule import Arrival, Place, Verdict, advance, goes_further
from runtime.requests.sighting import Shape, Sighting
from runtime.requests.trace import RequestTrace, Trace

UNNAMED = 8
"""Branches without a context that a request holds; the one called longest ago makes room."""
IN_DOUBT = (
    "the latents of a call do not continue those of the call before it, so its blocks reuse no residuals: where that "
    "is the sampler's noise, make the calls of one image inside `with compiled.request(name):` (docs/requests.md)"
)


class Branch:
    """One branch of guidance in a request: the residuals of every block. `tick` is that of its last call."""

    def __init__(self, name: str, number: int, call: Sighting, banks: dict[int, Residuals]) -> None:
        self.name, self.number, self.context, self.constants = name, number, call.context, call.constants
        self.tick = -1
        self.conditioning = Conditioning(call.conditioning)
        self.banks = banks

    def bank(self, block: int, states: Sequence[Tensor], dims: Sequence[int]) -> Residuals:
        """The bank of `block` for `states`, empty where it was for others or is asked for the first time."""
        found = self.banks.get(block)
        if found is None or not found.fits(states):
            found = self.banks[block] = Residuals(states, dims)
        return found

    def clear(self) -> None:
        """Empty all banks, keeping their buffers."""
        for bank in self.banks.values():
            bank.clear()


class Request:
    """The state of one request between its calls; `trusted` where it has a name."""

    def __init__(self, name: str, traces: Trace, trusted: bool = False) -> None:
        self.name, self.trusted = name, trusted
        self.busy = threading.Lock()
        self.place: Place | None = None
        self.trace: RequestTrace | None = None
        self._traces = traces
        self._branches: list[Branch] = []
        self._chain: Chain | None = None
        self._new = True  # what the last call was
        self._spare: list[dict[int, Residuals]] = []  # banks of earlier generations, for their buffers
        self._tick = 0  # of steps; never set back
        self._numbers = itertools.count()  # of branches
        self.lost = False
        """Whether it has a place, but nothing to tell its next call by."""
        self.elsewhere: object | None = None
        """What has its state while decisions are not taken on the host (`runtime.device.state`)."""
        self.stays = False
        """Whether decisions are to be taken on the host until it ends."""

    @property
    def step(self) -> int:
        """The step of the last call, from 0."""
        return 0 if self.place is None else self.place.step

    @property
    def nbytes(self) -> int:
        """Bytes of residuals, and of what is remembered of latents and conditioning."""
        banks = [*self._spare, *(branch.banks for branch in self._branches)]
        residuals = sum(bank.nbytes for each in banks for bank in each.values())
        watched = [one for each in banks for bank in each.values() for row in bank.signals for one in row or ()]
        residuals += sum({one.data_ptr(): one.nbytes for one in watched}.values())  # blocks may share them
        conditioning = sum(branch.conditioning.nbytes for branch in self._branches)
        return residuals + conditioning + (0 if self._chain is None else self._chain.nbytes)

    def look(self, call: Sighting) -> Sighting:
        """`call` beside those before it; one transfer to the host, which brings its timesteps too."""
        return call.beside(self.chain(call.shape))

    def enter(self, call: Sighting) -> Branch:
        """The branch of a call, with the residuals that it may reuse."""
        branch = self._branch_of(call)
        before = self.place
        self.place, verdict = advance(before, self._arrival(call, branch))
        if verdict is Verdict.NEW:
            self._begin()
            branch = None
        elif verdict is Verdict.IN_DOUBT:
            warnings.warn(IN_DOUBT, RuntimeWarning, stacklevel=2)
            self._clear()
        if verdict is Verdict.NEW or before is None or self.place.calls != before.calls:
            self._tick += 1
        if branch is None:
            branch = self._new_branch(call)
        elif branch.conditioning.observe(call.conditioning) and not self.trusted:
            branch.clear()
        branch.tick = self._tick
        self.lost = False
        self.trace = self.trace or self._traces.begin(self.name)
        self._new = verdict is Verdict.NEW
        return branch

    def note(self, call: Sighting, output: Tensor, new: Tensor | None = None) -> None:
        """Remember the latents of `call`, the last one, and what the model gave for them.

        `new` () bool: whether a generation began with it; None where it was entered.
        """
        if call.latents is None or call.shape is None or output.dim() != call.latents.dim():
            return
        chain = self.chain(call.shape)
        if chain is not None and call.sample is not None:
            chain.note(call.sample, output)
            return
        self._chain = Chain(call.latents, output, self._new if new is None else new)

    def chain(self, shape: Shape | None) -> Chain | None:
        """The last calls, where their latents had the shape `shape`."""
        return self._chain if self._chain is not None and self._chain.shape == shape else None

    def resized(self, call: Sighting) -> bool:
        """Whether the latents of `call` have another shape than those of the last one."""
        return self._chain is not None and call.shape is not None and self.chain(call.shape) is None

    def branch_at_once(self, call: Sighting) -> Branch | None:
        """The branch of a call whose timestep and latents the host has not seen; None where they are needed."""
        if call.context is not None:
            return self.branch(call)
        own = self._unnamed(call)
        same = [branch for branch in own if branch.conditioning.same_objects(call.conditioning)]
        return same[0] if same else None if own else self._new_branch(call)

    def branch(self, call: Sighting) -> Branch:
        """The branch of a call that was looked at, whatever the call is to the request."""
        return self._branch_of(call) or self._new_branch(call)

    def compare(self, branch: Branch, call: Sighting) -> tuple[bool, bool]:
        """Whether the conditioning of a call is that of another generation, and whether it changed within this one."""
        renewed = branch.tick < 0 or branch.conditioning.renewed(call.conditioning)
        branch.tick = max(branch.tick, 0)
        return renewed, branch.conditioning.observe(call.conditioning) and not self.trusted

    @property
    def seen(self) -> frozenset[int]:
        """Numbers of the branches that have been called in the current step."""
        return frozenset(branch.number for branch in self._branches if branch.tick == self._tick)

    def go_elsewhere(self, state: object) -> None:
        """Let `state` have what comes, from this place on; residuals stay behind."""
        self._clear()
        self.elsewhere, self.lost = state, self.place is not None and self._chain is None

    def catch_up(self, place: Place | None, seen: set[int]) -> None:
        """Be at `place`, in whose step the branches numbered `seen` have been called."""
        self.place = place
        self._tick += 1
        for branch in self._branches:
            branch.tick = self._tick if branch.number in seen else -1

    def come_back(self) -> None:
        """Take decisions on the host again, until the request ends, without residuals."""
        self.elsewhere, self.stays = None, True
        self.lost = self.place is not None and self._chain is None
        self._clear()

    def lose(self) -> None:
        """Give up residuals and what is remembered of latents, but not the place."""
        self._branches.clear()
        self._spare.clear()
        self._chain = None
        self.lost = self.place is not None or self.elsewhere is not None

    def forget(self) -> None:
        """Take back what was traced."""
        if self.trace is not None:
            self._traces.discard(self.trace)

    def _clear(self) -> None:
        for branch in self._branches:
            branch.clear()

    def _begin(self) -> None:
        self._clear()
        self._spare.extend(branch.banks for branch in self._branches)
        self._branches.clear()
        self._chain = None
        self.trace = None

    def _arrival(self, call: Sighting, branch: Branch | None) -> Arrival:
        on, renewed = None, False
        seen = branch is not None and branch.tick == self._tick
        if call.gram is not None:
            on = continues(call.gram, call.eps, near=False)
        elif self.resized(call):
            on = False  # another size is another image
        if not on and self.place is not None and not self.lost:
            renewed = branch is None or branch.conditioning.renewed(call.conditioning)
            if call.gram is not None and not renewed and goes_further(self.place, call.times, seen):
                on = continues(call.gram, call.eps, near=True)
        return Arrival(call.times, seen, on, call.first, renewed, trusted=self.trusted or self.lost)

    def _branch_of(self, call: Sighting) -> Branch | None:
        """The branch that the call belongs to, None for one not seen before."""
        if call.context is not None:
            return next((branch for branch in self._branches if branch.context == call.context), None)
        own = self._unnamed(call)
        here = self.place is not None and call.times == self.place.times and not call.moved
        for branch in own:
            if branch.conditioning.same_objects(call.conditioning):
                return branch
        for branch in own:
            # Equal conditioning in other objects, a second time at one step: another branch with the same prompt.
            if not (here and branch.tick == self._tick) and branch.conditioning.same_values(call.conditioning):
                return branch
        last = [branch for branch in own if branch.tick == self._tick]
        return last[0] if len(last) == 1 and not here else None

    def _unnamed(self, call: Sighting) -> list[Branch]:
        """The branches without a context whose calls had the constants of this one."""
        return [b for b in self._branches if b.context is None and b.constants == call.constants]

    def _new_branch(self, call: Sighting) -> Branch:
        unnamed = [branch for branch in self._branches if branch.context is None]
        if call.context is None and len(unnamed) >= UNNAMED:
            oldest = min(unnamed, key=lambda branch: branch.tick)
            oldest.clear()
            self._spare.append(oldest.banks)
            self._branches.remove(oldest)
        taken = {branch.name for branch in self._branches}
        name = call.context or next(f"branch {n}" for n in range(UNNAMED + 1) if f"branch {n}" not in taken)
        branch = Branch(name, next(self._numbers), call, self._spare.pop() if self._spare else {})
        self._branches.append(branch)
        return branch
