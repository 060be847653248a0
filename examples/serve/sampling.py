"""Many images, each at its own step and tier, advanced by one call of the transformer per branch of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit_compile import CompiledTransformer
from examples.fashion_mnist.call import CHANNELS, TOKENS, inputs
from examples.fashion_mnist.data import CLASSES, NO_CLASS, from_patches
from examples.serve.flops import Share
from examples.serve.jobs import Ask, Refused
from runtime.face.session import KEPT
from runtime.requests.trace import RequestTrace

STEPS = 28
GUIDANCE = 2.5
MOST_STEPS = 200


@dataclass(frozen=True)
class Drawing:
    """An image under way: latents `x` (1, tokens, channels) float32 before step `step`, at `times[step]`."""

    name: str
    label: int
    tier: str | None
    x: Tensor
    times: Tensor
    step: int = 0
    trace: RequestTrace | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == len(self.times) - 1


class EulerSampler:
    """The sampler of `examples.fashion_mnist.sample`, for images that are at different steps."""

    most_together = KEPT  # of more that begin at once, not all are traced, and what they took would not be known

    def __init__(self, compiled: CompiledTransformer) -> None:
        self._compiled = compiled
        self._share = Share(compiled.program.manifest)

    def check(self, ask: Ask) -> Ask:
        """`ask` with its number of steps; Refused where it cannot be met."""
        tiers = self._compiled.tiers
        if ask.tier is not None and ask.tier not in tiers:
            raise Refused(f"no tier is called {ask.tier!r}: there are {', '.join(map(repr, tiers))}, or none for dense")
        if not 0 <= ask.label < len(CLASSES):
            raise Refused(f"label is {ask.label}: there are 0 to {len(CLASSES) - 1}")
        if not 0 <= ask.seed < 2**63:
            raise Refused(f"seed is {ask.seed}: a whole number from 0, below 2**63")
        made_for = None if ask.tier is None else tiers[ask.tier].steps
        steps = ask.steps if ask.steps is not None else made_for or STEPS
        if made_for not in (None, steps):
            raise Refused(f"the tier {ask.tier!r} was made for {made_for} steps, not {steps}")
        if not 1 <= steps <= MOST_STEPS:
            raise Refused(f"steps is {steps}: at least 1, at most {MOST_STEPS}")
        return replace(ask, steps=steps)

    def begin(self, name: str, ask: Ask) -> Drawing:
        """The noise of a checked `ask`; `name` is its request's, and no other's."""
        assert ask.steps is not None
        x = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(ask.seed))
        return Drawing(name, ask.label, ask.tier, x, torch.linspace(1, 0, ask.steps + 1))

    @torch.no_grad()
    def advance(self, drawings: Sequence[Drawing]) -> list[Drawing]:
        """Each by a step of its own. An exception leaves them all without residuals: begin them anew."""
        with_class = self._velocities("cond", drawings, [drawing.label for drawing in drawings])
        without = self._velocities("uncond", drawings, [NO_CLASS] * len(drawings))
        velocities = without + GUIDANCE * (with_class - without)
        traces = {trace.request: trace for trace in self._compiled.trace}
        return [
            replace(
                drawing,
                x=drawing.x + (drawing.times[drawing.step + 1] - drawing.times[drawing.step]) * velocity,
                step=drawing.step + 1,
                trace=drawing.trace or traces.get(drawing.name),
            )
            for drawing, velocity in zip(drawings, velocities.split(1), strict=True)
        ]

    def image(self, drawing: Drawing) -> Tensor:
        """(28, 28) float32 in [-1, 1]."""
        return from_patches(drawing.x).clamp(-1, 1)[0]

    def flops_share(self, drawing: Drawing) -> float:
        """What was done for `drawing`, as a share of the dense model's FLOPs."""
        assert drawing.trace is not None
        return self._share.of(drawing.trace)

    def end(self, name: str) -> None:
        """Forget what is kept for the request `name`."""
        with self._compiled.request(name):
            self._compiled.reset()

    def _velocities(self, branch: str, drawings: Sequence[Drawing], labels: list[int]) -> Tensor:
        """What the model gives for each drawing as one of the class of `labels`, (drawings, tokens, channels)."""
        x = torch.cat([drawing.x for drawing in drawings])
        t = torch.stack([drawing.times[drawing.step] for drawing in drawings])
        names, tiers = [drawing.name for drawing in drawings], [drawing.tier for drawing in drawings]
        with self._compiled.request(names, tier=tiers), self._compiled.cache_context(branch):
            return self._compiled(**inputs(x, t, torch.tensor(labels)))[0]
