"""Which of a block's states an MLP can change, and so which MLPs are narrowed where only some states may be.

A site's hidden channels act on the block through its down-projections W2 alone, so that narrowing it can
change an output only if the graph leads from a W2 to it:

    written(site) = {state k : output k is reachable from the placeholder of a down-projection of the site}
    narrowed      = {site : written(site) is a subset of the named states}

Behind the last attention of a block that is the stream the MLP is added to. An MLP whose result other
streams go on to read, or one that serves joined streams, writes to all of these. A site that is left out
runs in full at every width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from passes.graphs.graph import BlockGraph, MlpSite, Refusal, Report
from runtime.base.errors import EditError

NAME = "streams"


class StreamError(EditError, ValueError):
    """States are named whose MLPs are to be narrowed, and no block has such a state; the message lists them."""


def state_names(graph: BlockGraph) -> tuple[str, ...]:
    """The block's states by the names of their inputs, in output order."""
    return tuple(graph.inputs[index] for index in graph.states)


def written_states(graph: BlockGraph, site: MlpSite) -> tuple[str, ...]:
    """Names of the states that the MLP can change, in output order."""
    weights = {slot.weight for slot in site.contractions}
    reached: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.target in weights or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    outputs = next(iter(graph.module.graph.find_nodes(op="output"))).args[0]
    return tuple(name for name, output in zip(state_names(graph), outputs, strict=True) if output in reached)


def choose_sites(
    graph: BlockGraph, sites: Sequence[MlpSite], narrow: Sequence[str] | None
) -> tuple[tuple[MlpSite, ...], Report]:
    """Those of `sites` that change no state but those named in `narrow`; all of them where it is None."""
    if narrow is None:
        return tuple(sites), Report(NAME)
    kept: list[MlpSite] = []
    refused: list[Refusal] = []
    for site in sites:
        written = written_states(graph, site)
        if set(written) <= set(narrow):
            kept.append(site)
        else:
            end = site.weight_names[site.contractions[0].weight]
            refused.append(Refusal(end, f"is kept in full: it writes to {', '.join(written)}"))
    return tuple(kept), Report(NAME, tuple(_line(graph, site) for site in kept), tuple(refused))


def check_names(graphs: Iterable[BlockGraph], narrow: Sequence[str] | None) -> None:
    """StreamError where a name in `narrow` is that of no state of `graphs`."""
    known = dict.fromkeys(name for graph in graphs for name in state_names(graph))
    strange = [name for name in narrow or () if name not in known]
    if strange and known:
        raise StreamError(f"no block has a state {strange[0]!r} whose MLPs to narrow; there are {', '.join(known)}")


def _line(graph: BlockGraph, site: MlpSite) -> str:
    return f"{site.weight_names[site.contractions[0].weight]} writes to {', '.join(written_states(graph, site))}"
