"""Generations of many kinds, as pipelines and loops of one's own make them, drawn from a seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Loop
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import RoutingPolicy

SAMPLERS = ("euler", "heun", "multistep", "image to image", "rounded")
GUIDANCE = ("none", "contexts", "unnamed", "batched", "three at once", "interval", "switched off")
PROMPTS = {"cond": 0, "uncond": 5, "third": 6}
ENDINGS = ("reset", "open", "cancelled", "failed")
CHANNELS, PROMPT, POOLED = 8, 24, 20

_local = threading.local()


class Flaky(RoutingPolicy):
    """Algorithm 1, which fails inside a model's call where its thread asks for it."""

    def decide(self, step, block, gate, width, held, change):
        if getattr(_local, "fails", False):
            raise RuntimeError("an engine failed")
        return super().decide(step, block, gate, width, held, change)


POLICY = Flaky(threshold=0.12, margin=0.3, max_reuse=2, warmup_steps=2)


@dataclass(frozen=True)
class Generation:
    """What one image is made of.

    `start` is the first timestep of image to image. With `beside`, an image stands beside the latents, as in FLUX
    Kontext; with `turned`, guidance calls its branches in the other order. `stop` is the step at which it ends early,
    with `between` after the first of its calls; `name` is that of its request.
    """

    sampler: str = "euler"
    guidance: str = "none"
    steps: int = 4
    batch: int = 1
    side: int = 4
    text: int = 6
    prompt: int = 0
    noise: int = 0
    start: float = 0.6
    beside: bool = False
    turned: bool = False
    anew: bool = False
    ending: str = "reset"
    stop: int = 0
    between: bool = False
    name: str | None = None


class Stopped(Exception):
    """The caller has cancelled."""


def draw(seed: int, count: int) -> list[Generation]:
    """`count` generations in the order of one thread: each may share prompt, noise and size with the one before.

    Not drawn: a name that two generations share without a reset, since what is called under one name is trusted.
    """
    chance, made = random.Random(seed), [Generation()]
    for number in range(count):
        last = made[-1]
        steps = chance.randint(2, 8)
        same = chance.random() < 0.5
        side, text, batch = (
            (last.side, last.text, last.batch)
            if same
            else (chance.choice((3, 4)), chance.choice((4, 6)), chance.randint(1, 3))
        )
        made.append(
            Generation(
                sampler=chance.choice(SAMPLERS),
                guidance=chance.choice(GUIDANCE),
                steps=steps,
                batch=batch,
                side=side,
                text=text,
                prompt=last.prompt if chance.random() < 0.5 else chance.randrange(10**6),
                noise=last.noise if chance.random() < 0.3 else chance.randrange(10**6),
                start=chance.choice((0.06, 0.3, 0.6)),
                beside=chance.random() < 0.3,
                turned=chance.random() < 0.3,
                anew=chance.random() < 0.3,
                ending=chance.choice(ENDINGS),
                stop=chance.randrange(steps),
                between=chance.random() < 0.3,
                name=f"{seed}/{number}" if chance.random() < 0.2 else None,
            )
        )
    return made[1:]


def make(model: CompiledTransformer, generation: Generation) -> list[Tensor]:
    """What the model gave, call by call, until the generation ended or was ended."""
    outputs: list[Tensor] = []
    scope: AbstractContextManager[object] = model.request(generation.name) if generation.name else nullcontext()
    with scope:
        try:
            for _ in steps(model, generation, outputs):
                pass
        except (Stopped, RuntimeError):
            return outputs
        finally:
            _local.fails = False
        if generation.ending == "reset":
            model.reset()
    return outputs


def steps(model: Any, generation: Generation, outputs: list[Tensor]) -> Loop[None, None, Tensor]:
    """One step of the sampler after another; what the model gives goes to `outputs`. Returns the last latents."""
    guided = _Guided(model, generation, outputs)
    moments = _moments(generation)
    x, before = _start(generation, moments[0]), None
    for number, (now, then) in enumerate(zip(moments, (*moments[1:], 0.0), strict=True)):
        guided.step = number
        if number == generation.stop and generation.ending == "failed":
            _local.fails = True
        v = guided(x, now)
        if generation.sampler == "heun" and then > 0:
            v = (v + guided(x + (then - now) * v, then)) / 2
        slope = v if generation.sampler != "multistep" or before is None else 1.5 * v - 0.5 * before
        x, before = x + (then - now) * slope, v
        if number == generation.stop and generation.ending == "cancelled":
            raise Stopped
        yield
    return x


class _Guided:
    """The model with guidance: a function of latents and timestep."""

    def __init__(self, model: Any, generation: Generation, outputs: list[Tensor]) -> None:
        self.model, self.generation, self.outputs = model, generation, outputs
        self.step = 0
        self._beside = _random(generation.prompt + 9)(generation.batch, generation.side, CHANNELS)
        self._kept: dict[object, dict[str, Tensor]] = {}

    def __call__(self, x: Tensor, moment: float) -> Tensor:
        generation, third = self.generation, self.generation.steps // 3
        kind = generation.guidance
        both = kind != "none" and (kind != "interval" or third <= self.step < max(2 * third, 1))
        order = ("cond", "uncond") if generation.turned else ("uncond", "cond")
        if kind == "three at once":
            order = ("third", *order)
        if kind in ("batched", "three at once", "switched off"):
            if kind == "switched off" and self.step >= generation.steps // 2:
                return self._call(x, moment, ("cond",))
            given = dict(
                zip(order, self._call(torch.cat([x] * len(order)), moment, order).chunk(len(order)), strict=True)
            )
        else:
            named = kind in ("contexts", "interval")
            order = order[::-1] if both else ("cond",)
            given = {prompt: self._call(x, moment, (prompt,), prompt if named else None) for prompt in order}
            if not both:
                return given["cond"]
        guided = given["uncond"] + 3.0 * (given["cond"] - given["uncond"])
        return guided + 1.5 * (given["cond"] - given["third"]) if "third" in given else guided

    def _call(self, x: Tensor, moment: float, prompts: Sequence[str], context: str | None = None) -> Tensor:
        conditioning = self._kept.setdefault(tuple(prompts), _conditioning(self.generation, prompts))
        if self.generation.anew:
            conditioning = {name: tensor.clone() for name, tensor in conditioning.items()}
        tokens = x.shape[1]
        if self.generation.beside:
            x = torch.cat([x, self._beside.repeat(len(prompts), 1, 1)], dim=1)
        with self.model.cache_context(context) if context else nullcontext():
            timestep = torch.full((len(x),), moment)
            output = self.model(hidden_states=x, timestep=timestep, **conditioning, return_dict=False)[0]
        self.outputs.append(output.clone())
        stops = self.generation.ending == "cancelled" and self.step == self.generation.stop
        if self.generation.between and stops:
            raise Stopped
        return output[:, :tokens]


def _conditioning(generation: Generation, prompts: Sequence[str]) -> dict[str, Tensor]:
    text, pooled = [], []
    for prompt in prompts:
        random_of = _random(generation.prompt + PROMPTS[prompt])
        text.append(random_of(generation.batch, generation.text, PROMPT))
        pooled.append(random_of(generation.batch, POOLED))
    side = torch.arange(generation.side)
    rows, columns = side.repeat_interleave(generation.side), side.repeat(generation.side)
    if generation.beside:  # as many more tokens as the image has in a row
        rows, columns = torch.cat([rows, side]), torch.cat([columns, side + generation.side])
    return {
        "encoder_hidden_states": torch.cat(text),
        "pooled_projections": torch.cat(pooled),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float(),
        "txt_ids": torch.zeros(generation.text, 3),
    }


def _moments(generation: Generation) -> list[float]:
    start = generation.start if generation.sampler == "image to image" else 1.0
    if generation.sampler == "rounded":  # many steps, of which bfloat16 keeps few apart
        fine = torch.linspace(1.0, 0.97, generation.steps)
        return [float(moment) for moment in fine.bfloat16()]
    return [start * (1 - step / generation.steps) for step in range(generation.steps)]


def _start(generation: Generation, moment: float) -> Tensor:
    shape = (generation.batch, generation.side**2, CHANNELS)
    noise = _random(generation.noise)(*shape)
    if generation.sampler != "image to image":
        return noise
    return (1 - moment) * _random(generation.prompt + 99)(*shape) + moment * noise


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: results are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
