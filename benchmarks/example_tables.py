"""Tables of the Fashion-MNIST example, from results/{tuned,partial_steps,example_time}.json, for the READMEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
from edit_compile.measuring.machine import summary


def tuned(results: Mapping[str, Any]) -> str:
    """What `examples.fashion_mnist.tune` found: a line for each tier."""
    headings = (
        "steps computed",
        "FLOPs",
        "times faster",
        "PSNR to the dense model's images, dB (95%)",
        "as many sampling steps instead, dB",
    )
    rows = [
        (
            str(one["steps_computed"]),
            f"{one['flops_share']:.0%}",
            f"{one['times_faster']:.2f}",
            _with_interval(one["decibels"], one["interval"]),
            f"{one['fewer_steps_decibels']:.1f}",
        )
        for one in results["tiers"]
    ]
    held = results["generations"] - 3
    taken = f"{_taken(results)}, engine {results['engine']}; {held} generations of {results['rows']} images, held out."
    return f"{table(headings, rows)}\n\n{taken}"


def partial_steps(results: Mapping[str, Any]) -> str:
    """What `examples.fashion_mnist.partial_steps` found."""
    rows = [(one["what"], f"{one['flops_share']:.1%}", f"{one['decibels']:.1f}") for one in results["rows"]]
    found = table(("what is computed in part", "FLOPs", "dB, held out"), rows)
    return f"{found}\n\n{_taken(results)}; {results['held_out']} generations of 8 images, held out."


def time_parts(results: Mapping[str, Any]) -> str:
    """What `examples.fashion_mnist.parts_of_time` found: a line for each engine."""
    parts = list(results["engines"][0]["ms"])
    rows = [
        (
            one["engine"],
            _spread(one["times_faster"], ".2f"),
            _spread(one["times_faster_frozen"], ".2f"),
            *(f"{one['ms'][part]['median']:.1f}" for part in parts),
        )
        for one in results["engines"]
    ]
    left = results["engines"][0]["block_flops_left"]
    told = f"Medians of ms; {left:.0%} of the blocks' FLOPs are left. {_taken(results)}; at {results['commit']}."
    return f"{table(('engine', 'dense / elastic', 'dense / frozen', *parts), rows)}\n\n{told}"


def _spread(one: Mapping[str, float], form: str) -> str:
    return f"{one['median']:{form}} ({one['low']:{form}} to {one['high']:{form}})"


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"


def _taken(results: Mapping[str, Any]) -> str:
    return f"{summary(results['machine'])}, {results['machine']['threads']} thread"
