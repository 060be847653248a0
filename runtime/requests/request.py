"""One request: where it is, its branches of guidance, and the residuals that each of them holds.

A request is one generation at a time. Its calls come in branches: the cache contexts of the caller or, where it names
none, the conditionings that it calls with. `runtime.requests.rule` says what a call is to its request.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.requests.bank import Residuals
from runtime.requests.conditioning import Conditioning
from runtime.requests.evidence import Chain, continues
from runtime.requests.rule import Arrival, Place, Verdict, advance, grounds
from runtime.requests.sighting import Shape, Sighting
from runtime.requests.trace import RequestTrace, Trace

UNNAMED = 8
"""Branches without a context that a request holds; the one called longest ago makes room."""
IN_DOUBT = (
    "the latents of a call do not continue those of the call before it, so its blocks reuse no residuals: where that "
    "is the sampler's noise, make the calls of one image inside `with compiled.request(name):`; where several images, "
    "tiles or frames are made side by side, give each a name of its own (docs/requests.md)"
)
RESTLESS = (
    "the conditioning of a branch of guidance changes in every step, so its blocks reuse no residuals: where that is "
    "meant (a ControlNet), name the branch by `with compiled.cache_context(name):` (docs/requests.md)"
)


@dataclass(frozen=True)
class Told:
    """What a call's conditioning tells of its generation.

    It is `renewed` where it is of another one, `fresh` where no tensor was given before, and made `anew` where a tensor
    was the very same in the last calls of the branch, and now is another of the same values.
    """

    renewed: bool
    fresh: bool
    anew: bool


class Branch:
    """One branch of guidance in a request: the residuals of every block. `tick` is that of its last call."""

    def __init__(self, name: str, number: int, call: Sighting, banks: dict[int, Residuals]) -> None:
        self.name, self.number, self.context, self.constants = name, number, call.context, call.constants
        self.tick, self.called = -1, False
        self.conditioning = Conditioning(call.conditioning, named=call.context is not None)
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
        self._restless = False  # whether that was said
        self.elsewhere: object | None = None
        """What has its state while decisions are not taken on the host (`runtime.device.state`)."""
        self.stays = False
        """Whether decisions are to be taken on the host until it ends."""

    @property
    def step(self) -> int:
        """The step of the last call, from 0."""
        return 0 if self.place is None else self.place.step

    @property
    def traced(self) -> RequestTrace:
        """What its generation's decisions are written to, once it was entered."""
        assert self.trace is not None
        return self.trace

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
        self.place, verdict = advance(before, self._arrival(before, call, branch))
        if verdict is Verdict.IN_DOUBT or (self.place.broke and self.place.doubts):
            warnings.warn(IN_DOUBT, RuntimeWarning, stacklevel=2)
        if verdict is Verdict.NEW:
            self._begin()
            branch = None
        elif verdict is Verdict.IN_DOUBT:
            self._clear()
        if verdict is not Verdict.GOES_ON or before is None or self.place.calls != before.calls:
            self._tick += 1
        if branch is None:
            branch = self._new_branch(call)
        elif self._observe(branch, call):
            branch.clear()
        branch.tick, branch.called = self._tick, True
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

    def compare(self, branch: Branch, call: Sighting) -> tuple[Told, bool]:
        """What a call's conditioning tells, and whether it changed within the generation."""
        if not branch.called:
            branch.called = True
            return self._told(None, call, besides=branch), False
        return self._told(branch, call), self._observe(branch, call)

    @property
    def seen(self) -> frozenset[int]:
        """Numbers of the branches that have been called in the current step."""
        return frozenset(branch.number for branch in self._branches if branch.tick == self._tick)

    def go_elsewhere(self, state: object) -> None:
        """Let `state` have what comes, from this place on; residuals stay behind."""
        self._clear()
        self.elsewhere = state

    def catch_up(self, place: Place | None, seen: set[int]) -> None:
        """Be at `place`, in whose step the branches numbered `seen` have been called."""
        self.place = place
        self._tick += 1
        for branch in self._branches:
            branch.tick = self._tick if branch.number in seen else -1

    def come_back(self) -> None:
        """Take decisions on the host again, until the request ends, without residuals."""
        self.elsewhere, self.stays = None, True
        self._clear()

    def lose(self) -> None:
        """Give up residuals but not the place; a request with a name needs nothing else to go on by."""
        self._spare.clear()
        for branch in self._branches:
            branch.banks.clear()
        if self.trusted:
            self._branches.clear()
            self._chain = None

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
        self.trace, self._restless = None, False

    def _arrival(self, before: Place | None, call: Sighting, branch: Branch | None) -> Arrival:
        told, seen, on = self._told(branch, call), branch is not None and branch.tick == self._tick, None
        if call.gram is not None and before is not None:
            on = continues(call.gram, call.eps, grounds(before, call.times, seen, told.renewed, told.fresh))
        elif self.resized(call):
            on = False  # another size is another image
        if told.anew and not self.trusted:
            on = False
        return Arrival(call.times, seen, on, call.first, told.renewed, call.astray, self.trusted)

    def _told(self, branch: Branch | None, call: Sighting, besides: Branch | None = None) -> Told:
        """What the conditioning of a call tells; `branch` is None where it is a new one's, which may be `besides`."""
        given = call.conditioning
        fresh = bool(given) and not any(
            each.conditioning.has_any_object(given) for each in self._branches if each is not besides
        )
        if branch is None:
            return Told(renewed=True, fresh=fresh, anew=False)
        own = branch.conditioning
        return Told(own.renewed(call.conditioning), fresh, own.made_anew(call.conditioning))

    def _observe(self, branch: Branch, call: Sighting) -> bool:
        """Have `branch` take in the conditioning of a call; whether it changed, unless all of it goes by name."""
        changed = branch.conditioning.observe(call.conditioning) and not (self.trusted and call.context is not None)
        if changed and branch.conditioning.restless and not self._restless:
            self._restless = True
            warnings.warn(RESTLESS, RuntimeWarning, stacklevel=2)
        return changed

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
