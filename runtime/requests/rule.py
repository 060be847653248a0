"""The rule by which a call goes on with a generation or begins a new one; `decide.cu` has the same for the device.

    nothing came before, or the first call comes again                      new
    the latents continue those of the last call, and the timestep goes on
    or stays                                                                goes on
    else, in a named request, unless the timestep turns back                goes on
    else, if the timestep stays or turns back, or the conditioning is new   new
    else: the sampler adds noise, or it is another generation that starts   new the first time; where it happens again
    further down                                                            in the next step, in doubt

In doubt the generation goes on at its own step with empty banks: to compute again is always right. That the sampler
adds noise is only known once it has done so twice; the step that was counted as a first one is then counted again.
docs/requests.md says it for authors of sampling loops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum


class Verdict(IntEnum):
    """What a call is to its request."""

    GOES_ON = 0
    NEW = 1
    IN_DOUBT = 2


@dataclass(frozen=True)
class Place:
    """Where a request is.

    `step` counts its steps from 0. `calls` does too, but goes on where latents broke off for the first time (`broke`).
    `times` are the timesteps of its rows (one where all are equal), `direction` is 1 where they last rose and -1 where
    they fell, 0 where that is not known. `begun` are the timesteps of its first call; it has `left` once other latents
    came than those of that call.
    """

    step: int
    calls: int
    times: tuple[float, ...]
    begun: tuple[float, ...]
    direction: int = 0
    broke: bool = False
    left: bool = False


@dataclass(frozen=True)
class Arrival:
    """What is known of a call.

    `seen`: its branch has been called in this step already. `continues`: its latents continue those of the last call;
    None where there is nothing to compare them with. `first`: they are those of the generation's first call, None as
    before. `renewed`: its conditioning is that of another generation. `trusted`: its request has a name.
    """

    times: tuple[float, ...]
    seen: bool
    continues: bool | None
    first: bool | None = None
    renewed: bool = False
    trusted: bool = False


def advance(place: Place | None, call: Arrival) -> tuple[Place, Verdict]:
    """Where the request is with `call`, and what the call is to it."""
    if place is None or (call.first and (place.left or (call.seen and call.times == place.begun))):
        return Place(0, 0, call.times, call.times), Verdict.NEW
    move = _move(place.times, call.times)
    turned = turns_back(place, call.times)
    another_branch = move == 0 and not call.seen
    steps = 0 if another_branch else 1
    direction = move or (0 if move is None else place.direction)
    left = place.left or call.first is False
    on = Place(place.step + steps, place.calls + steps, call.times, place.begun, direction, left=left)
    # The first latents of a generation are a sum of its later ones and of outputs, and so, nearly, are those of a twin:
    # where the timestep turns back, it is the twin. After a break, the last move was from one generation to another.
    twin = turned and move is not None and not place.broke
    if (call.continues and not twin) or (call.continues is None and another_branch) or (call.trusted and not turned):
        return on, Verdict.GOES_ON
    if turned or move == 0 or call.renewed:
        return Place(0, 0, call.times, call.times), Verdict.NEW
    if call.continues is not None and not place.broke:
        return Place(0, on.calls, call.times, call.times, direction, broke=True), Verdict.NEW
    return replace(on, step=on.calls, broke=True), Verdict.IN_DOUBT


def goes_further(place: Place, times: tuple[float, ...], seen: bool) -> bool:
    """Whether timesteps go on, or stay for a branch that was not `seen` in this step.

    Only there is it evidence that latents are near: two images made of the same one are near, too.
    """
    return not turns_back(place, times) and (not seen or bool(_move(place.times, times)))


def turns_back(place: Place, times: tuple[float, ...]) -> bool:
    """Whether timesteps go the other way than before, or rows move apart."""
    move = _move(place.times, times)
    return move is None or move * place.direction < 0


def _move(before: tuple[float, ...], after: tuple[float, ...]) -> int | None:
    """1 where timesteps rise, -1 where they fall, 0 where they stay; None where rows move apart."""
    rows = max(len(before), len(after))
    before, after = (times * rows if len(times) == 1 else times for times in (before, after))  # one is for all rows
    if len(before) != len(after):
        return None
    moves = {(b > a) - (b < a) for a, b in zip(before, after, strict=True)} - {0}
    return None if len(moves) > 1 else next(iter(moves), 0)
