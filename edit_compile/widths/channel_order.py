"""Widths without training: an MLP's hidden channels, permuted so that the leading ones are those that matter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from edit_compile.calls.generations import CallsError, Generation, Recording
from edit_compile.calls.repeated_calls import arguments_for, check_model, chosen_calls, made_again
from edit_compile.elastic.centring import centred_linears, exchange, with_centred
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.widths.channel_statistics import Moments, means, watched
from edit_compile.widths.hidden_channels import HiddenChannels, hidden_channels
from edit_compile.widths.ordered_mlp import OrderedMlp, OrderError, ordered_mlp
from passes.graphs.record import undisturbed
from passes.graphs.weightless import weightless
from passes.pipeline import analyse
from passes.program.check import CheckError, check_equal
from runtime.face.transformer import CompiledTransformer


def order_channels(
    model: nn.Module,
    recording: Recording | Sequence[Generation],
    *,
    centre: bool = False,
    calls: int | None = None,
    timestep: str | None = None,
) -> tuple[OrderedMlp, ...]:
    """Permute the hidden channels of all MLPs of `model` by falling importance; what the model computes stays.

    Each width then computes with the channels that matter most. A channel's importance is the variance of what enters
    the second linear, over all tokens, samples and recorded calls, times the squared norm of its column there (FLAP, An
    et al. 2023), in float64. Channels that the passes find tied (a gate's halves, biases, filters) move together.

    Args:
        model: a transformer of plain modules, in any dtype, or an elastic one, whose routers and masks stay; changed in
            place. Order before training routers: a trained elastic model has been given the order that it has.
        recording: calls of it or of a model of its class (see `record`): a Recording, or some of its generations. They
            are made again with all blocks at full width.
        centre: also subtract the channels' means before the second linears, whose biases take them: then what a width
            leaves out keeps its mean (see `centring`). Linears become modules that hold them, so names in
            a state dict gain ".linear" there, and calls of the model an elementwise operation. Convolutions stay, and
            linears that are centred already.
        calls: calls to take of each generation, spread evenly over it; all where it is not given.
        timestep: name of the forward's timestep argument, where it cannot be told.

    Returns:
        What became of each MLP, in order of execution. Those that no call reached (an expert), or whose weights
        something else uses too, stay as they are.

    Raises:
        CallsError (an EditError): `recording` is another model's, or of other shapes, or has fewer than two calls.
        OrderError (an EditError): `model` is no such model, has no MLP that could be narrowed, its weights or channels
            are NaN or infinite, or it computes something else when ordered, which is then undone.
        DiscoveryError: no block is found in `model`, as in `elasticize`.
    """
    base = _base(model, calls)
    check_model(base, recording)
    elastic = model if isinstance(model, ElasticTransformer) else None
    with undisturbed(base), elastic.detached() if elastic is not None else nullcontext():
        first = next(chosen_calls(base, recording, calls), None)
        if first is None:
            raise CallsError("recording: there is no call in it")
        expected = tuple(made_again(base, first[1], first[0]))
        named = timestep or (elastic.timestep if elastic is not None else None)
        stated = elastic.stated if elastic is not None else ()
        mlps = hidden_channels(base, analyse(base, arguments_for(base, first[1]), named, stated=stated))
        if not mlps:
            raise OrderError(f"{type(base).__name__} has no MLP whose hidden channels could be ordered")
        moments = _measured(base, recording, calls, mlps)
        ordered = tuple(ordered_mlp(mlp, own) for mlp, own in zip(mlps, moments, strict=True))
        orders = [own.order for own in ordered]
        _take(mlps, orders)
        made = centred_linears(base, means(mlps, moments, orders)) if centre else {}
        exchange(base, made)
        try:
            check_equal(tuple(made_again(base, first[1], first[0])), expected, "the ordered model")
        except (CheckError, CallsError) as error:
            exchange(base, {new: old for old, new in made.items()})
            _take(mlps, [order.argsort() for order in orders])
            raise OrderError(f"{error}: something else reads its hidden channels; it is as it was") from error
        if elastic is not None and elastic.layout is not None:
            new = set(made.values())
            elastic.layout = with_centred(elastic.layout, {n for n, module in base.named_modules() if module in new})
    return ordered


def _take(mlps: Sequence[HiddenChannels], orders: Sequence[Tensor]) -> None:
    for mlp, order in zip(mlps, orders, strict=True):
        mlp.take(order)


def _base(model: nn.Module, calls: int | None) -> nn.Module:
    """The model whose weights are ordered; OrderError where there is none, or no such number of calls."""
    if calls is not None and calls < 1:
        raise OrderError(f"calls={calls}: take at least one call of each generation, or leave it out")
    if isinstance(model, CompiledTransformer):
        raise OrderError("model is compiled, its weights are a copy: order the channels of the model it is made of")
    base = model.model if isinstance(model, ElasticTransformer) else model
    if weightless(base) or not any(True for _ in base.parameters()):
        raise OrderError(f"model ({type(base).__name__}) has no weights here: load them first")
    for name, parameter in base.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OrderError(f"model: the parameter {name} holds NaN or infinity")
    return base


def _measured(
    base: nn.Module, recording: Recording | Sequence[Generation], calls: int | None, mlps: Sequence[HiddenChannels]
) -> list[list[Moments]]:
    """The moments of each MLP's contractions."""
    count = 0
    with watched(mlps) as moments:
        for said, call in chosen_calls(base, recording, calls):
            made_again(base, call, said)
            count += 1
    if count < 2:
        raise CallsError(f"recording: {count} call says too little of which channels matter: take two or more")
    return moments
