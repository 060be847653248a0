"""The rule by which a call goes on with a generation or begins a new one; `decide.cu` has the same for the device.

    nothing came before, or the first call comes again                      new
    the latents continue those of the last call, and the timestep goes on
    or stays                                                                goes on
    else, in a named request, where the timestep goes on and rows are in
    their places                                                            goes on
    else, in a named request, unless the timestep turns back: several
    images are made side by side, or rows changed places                    in doubt
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

DOUBTS = 2
"""Timesteps that a generation has to go on for, once it began at one at which another was."""


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
    came than those of that call. It is `split` once latents of several images came at one timestep. While there are
    `doubts`, it may be one of several generations made side by side.
    """

    step: int
    calls: int
    times: tuple[float, ...]
    begun: tuple[float, ...]
    direction: int = 0
    broke: bool = False
    left: bool = False
    split: bool = False
    doubts: int = 0


@dataclass(frozen=True)
class Grounds:
    """On what grounds latents may be said to continue those before.

    `near`: it is enough that they are near. `strict`: they have to be just what a sampler makes of outputs.
    `repeated`: at this timestep the branch was called before, so that they have to depend on what it gave then.
    """

    near: bool
    strict: bool
    repeated: bool


@dataclass(frozen=True)
class Arrival:
    """What is known of a call.

    `seen`: its branch has been called in this step already. `continues`: its latents continue those of the last call;
    None where there is nothing to compare them with. `first`: they are those of the generation's first call, None as
    before. `renewed`: its conditioning is that of another generation. `astray`: latents of a row are nearer to another
    row's than to its own. `trusted`: its request has a name.
    """

    times: tuple[float, ...]
    seen: bool
    continues: bool | None
    first: bool | None = None
    renewed: bool = False
    astray: bool = False
    trusted: bool = False


def grounds(place: Place, times: tuple[float, ...], seen: bool, renewed: bool, fresh: bool) -> Grounds:
    """What a call has to show whose conditioning is `renewed`, or at least all in tensors not seen before (`fresh`)."""
    move = _move(place.times, times)
    strict = fresh or place.split or place.doubts > 0
    further = not turns_back(place, times) and (not seen or bool(move))
    return Grounds(near=further and not renewed and not strict, strict=strict, repeated=seen and move == 0)


def advance(place: Place | None, call: Arrival) -> tuple[Place, Verdict]:
    """Where the request is with `call`, and what the call is to it."""
    move = None if place is None else _move(place.times, call.times)
    new = Place(0, 0, call.times, call.times, doubts=DOUBTS if move == 0 else 0)
    if place is None or (call.first and (place.left or (call.seen and call.times == place.begun))):
        return new, Verdict.NEW
    turned, on = turns_back(place, call.times), _next(place, call, move)
    # The first latents of a generation are a sum of its later ones and of outputs, and so, nearly, are those of a twin:
    # where the timestep turns back, it is the twin. After a break, the last move was from one generation to another.
    twin = turned and move is not None and not place.broke
    unknown = call.continues is None and ((move == 0 and not call.seen) or (call.trusted and not turned))
    if call.trusted and not turned and (place.split or (move == 0 and call.seen and call.continues is False)):
        step, calls = (on.step, on.calls) if move else (place.step, place.calls)  # several images are at one step
        return replace(on, step=step, calls=calls, split=True), Verdict.IN_DOUBT
    if (call.continues and not twin) or unknown:
        return on, Verdict.GOES_ON
    if call.trusted and not turned:
        return on, Verdict.IN_DOUBT if call.seen and call.astray else Verdict.GOES_ON
    if turned or move == 0 or call.renewed:
        return new, Verdict.NEW
    if call.continues is not None and not place.broke:
        return replace(new, calls=on.calls, direction=on.direction, broke=True, doubts=place.doubts), Verdict.NEW
    return replace(on, step=on.calls, broke=True), Verdict.IN_DOUBT


def turns_back(place: Place, times: tuple[float, ...]) -> bool:
    """Whether timesteps go the other way than before, or rows move apart."""
    move = _move(place.times, times)
    return move is None or move * place.direction < 0


def _next(place: Place, call: Arrival, move: int | None) -> Place:
    """Where the request is if `call` goes on, by a step unless it is another branch's at the same timestep."""
    steps = 0 if move == 0 and not call.seen else 1
    return replace(
        place,
        step=place.step + steps,
        calls=place.calls + steps,
        times=call.times,
        direction=move or (0 if move is None else place.direction),
        broke=False,
        left=place.left or call.first is False,
        doubts=max(place.doubts - 1, 0) if move else place.doubts,
    )


def _move(before: tuple[float, ...], after: tuple[float, ...]) -> int | None:
    """1 where timesteps rise, -1 where they fall, 0 where they stay; None where rows move apart."""
    rows = max(len(before), len(after))
    before, after = (times * rows if len(times) == 1 else times for times in (before, after))  # one is for all rows
    if len(before) != len(after):
        return None
    moves = {(b > a) - (b < a) for a, b in zip(before, after, strict=True)} - {0}
    return None if len(moves) > 1 else next(iter(moves), 0)
