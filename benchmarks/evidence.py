"""Sections of docs/evidence.md and of the README, from benchmarks/results/{rivals,paper}.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
from edit_compile.measuring.machine import summary

Row = Mapping[str, Any]
SAME_TIME = 0.98
"""A rival is as fast where its times faster are at least this part of what it is beside."""
OURS = ("tier", "tier, inductor", "elastic, distilled", "elastic, distilled, and reuse")
RULES = ("reuse at intervals", "blocks pruned")
"""Policies of this project that nothing was tuned for: beside tiers, not among rivals of other projects."""
QUALITY = ("dB", "distance", "accuracy")


def by_share(rivals: Row) -> str:
    """All finalists, best first at each share of the FLOPs."""
    headings = "FLOPs at most", "who", "settings", "FLOPs", "times faster", *QUALITY
    rows = [(f"{one['at']:.0%}", *_cells(one)) for one in rivals["results"] if not one["same_as"]]
    return table(headings, rows)


def by_clock(rivals: Row) -> str:
    """Each tier, and the best of the others that take no longer."""
    rows = []
    for one in _named(rivals, "tier", "tier, inductor"):
        beside = [
            max(found, key=lambda other: other["decibels"])
            for chosen in (_plain, _caches)
            if (found := [o for o in rivals["results"] if chosen(o) and _as_fast(o, one)])
        ]
        told = [
            f"{other['who']}, {other['settings']}: {_measured(other, 'decibels')}, {_times(other)}" for other in beside
        ]
        rows.append(
            (one["who"], one["settings"], _times(one), _measured(one, "decibels"), *told, *["none"] * (2 - len(told)))
        )
    headings = (
        "who",
        "tier",
        "times faster",
        "dB",
        "fewer steps as fast: dB, times faster",
        "cache as fast: dB, times faster",
    )
    return table(headings, rows)


def engines(rivals: Row) -> str:
    """The same images in other time."""
    by_name = {f"{one['who']}: {one['settings']}": one for one in rivals["results"]}
    rows = []
    for one in rivals["results"]:
        if one["same_as"]:
            twin = by_name[one["same_as"]]
            rows.append((one["same_as"], _times(twin), one["who"], _times(one), f"{one['apart']:.0f}"))
    return table(("who", "times faster", "the same by", "times faster", "dB apart, at least"), rows)


def few_steps(rivals: Row) -> str:
    """What samples in at most 8 steps, or does at most 15% of the work: by FLOPs."""
    chosen = [one for one in rivals["results"] if one["flops_share"] <= 0.16 and not one["same_as"]]
    chosen += [one for one in rivals["results"] if one["who"] in OURS[2:] and one["flops_share"] > 0.16]
    rows = sorted({tuple(_cells(one)): one["flops_share"] for one in chosen}.items(), key=lambda pair: -pair[1])
    return table(("who", "settings", "FLOPs", "times faster", *QUALITY), [cells for cells, _ in rows])


def predicted(rivals: Row) -> str:
    """What tuning predicted of each tier, beside what the final's images gave."""
    rows = [
        (
            one["tier"],
            _with_interval(one["predicted"], one["interval"]),
            f"{one['found']:.1f}",
            f"{one['within']:.0%} of those of {one['grouped']} generations",
        )
        for one in rivals["held_out"]
    ]
    return table(("tier", "predicted dB of a generation", "found", "means in the interval"), rows)


def static(paper: Row) -> str:
    """Decisions for each image beside schedules of as much compute."""
    rows = [_paper_cells(one) for one in paper["results"] if not one["settings"].startswith("margin")]
    found = table(("decisions", "FLOPs", *QUALITY), rows)
    return "\n\n".join([found, _differences(paper, lambda one: one["of"] == "adaptive")])


def borderline(paper: Row) -> str:
    """Reuse of what nearly stayed closed beside leaving it out."""
    rows = [_paper_cells(one) for one in paper["results"] if one["settings"].startswith(("margin", "adaptive"))]
    found = table(("blocks in the margin", "FLOPs", *QUALITY), rows)
    return "\n\n".join([found, _differences(paper, lambda one: one["of"].startswith("margin"))])


def complexity(paper: Row) -> str:
    """What goes with the work that is spent on an image."""
    found = paper["correlations"]
    rows = []
    for name in ("edges", "packed bytes"):
        one = found[name]
        steps = ", ".join("-" if rho is None else f"{rho:+.2f}" for rho in one["by step"])
        rows.append((name, _rho(one["of all steps"]), _rho(one["within classes"]), steps))
    headings = "measure of the image", "rank correlation with its FLOPs (95%)", "within classes", "by step"
    told = f"Of {found['images']} images; their FLOPs differ by {found['spread']:.1%} (standard deviation / mean)."
    return f"{table(headings, rows)}\n\n{told}"


def taken(rivals: Row, paper: Row | None) -> str:
    """By which runs."""
    drawn = ", ".join(dict.fromkeys(one["commit"] for one in rivals["results"]))
    told = [
        f"- Rivals: {_machine(rivals)}; {rivals['images']} images a row, in batches of {rivals['rows']}, seeds "
        f"{rivals['seeds']}; {rivals['tried']} settings tried; drawn at {drawn}, timed at {rivals['commit']}, "
        f"{rivals['repeats']} rounds. The elastic model's routers take {rivals['routers_share']:.1%} of the FLOPs of a "
        "dense call, and are counted among its own.",
    ]
    if rivals["waits"]:
        told.append(f"- Of the times: {rivals['waits']}")
    if paper is not None:
        told.append(
            f"- The paper's claims: {_machine(paper)}; {paper['images']} images a row, {paper['steps']} steps, seeds "
            f"{paper['seeds']}; most frequent decisions of {paper['calibration']} other images; at {paper['commit']}."
        )
    versions = ", ".join(f"{name} {rivals['machine'][name]}" for name in VERSIONS if name in rivals["machine"])
    return "\n".join([*told, f"- Versions: {versions}."])


VERSIONS = ("python", "torch", "diffusers", "cache-dit", "numpy", "onnxruntime")


def _machine(results: Row) -> str:
    return f"{summary(results['machine'])}, {results['machine']['threads']} thread"


def _named(results: Row, *whos: str) -> list[Row]:
    return [one for one in results["results"] if one["who"] in whos]


def _plain(one: Row) -> bool:
    return "fewer steps" in one["who"]


def _caches(one: Row) -> bool:
    return one["who"] != "dense" and one["who"] not in (*OURS, *RULES) and not _plain(one)


def _as_fast(other: Row, one: Row) -> bool:
    return bool(other["times_faster"] >= one["times_faster"] * SAME_TIME)


def _paper_cells(one: Row) -> tuple[str, ...]:
    quality = _measured(one, "decibels"), _measured(one, "distance"), _share(one)
    return one["settings"], f"{one['flops_share']:.1%}", *quality


def _differences(paper: Row, chosen: Callable[[Row], bool]) -> str:
    rows = [
        (f"{one['of']} less {one['less']}", _measured(one, "decibels", "+.2f"), _measured(one, "distance", "+.2f"))
        for one in paper["differences"]
        if chosen(one)
    ]
    return table(("difference, image by image (95%)", "dB: higher is better", "distance: lower is better"), rows)


def _cells(one: Row) -> tuple[str, ...]:
    nearness = "-" if one["who"] == "dense" else _measured(one, "decibels")
    share = f"{one['flops_share']:.0%}"
    return one["who"], one["settings"], share, _times(one), nearness, _measured(one, "distance"), _share(one)


def _times(one: Row) -> str:
    return f"{one['times_faster']:.2f}"


def _share(one: Row) -> str:
    low, high = one["accuracy_interval"]
    return f"{one['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _measured(one: Row, name: str, form: str = ".1f") -> str:
    return _with_interval(one[name], one[f"{name}_interval"], form)


def _with_interval(value: float, interval: Sequence[float], form: str = ".1f") -> str:
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def _rho(one: Row) -> str:
    return "-" if one["rho"] is None else _with_interval(one["rho"], one["interval"], "+.2f")


def sections(rivals: Row, paper: Row | None) -> Iterable[tuple[str, str]]:
    """(name of the marks, what stands between them) in docs/evidence.md."""
    yield from (("by clock", by_clock(rivals)), ("by share", by_share(rivals)), ("engines", engines(rivals)))
    yield from (("few steps", few_steps(rivals)), ("predicted", predicted(rivals)), ("taken", taken(rivals, paper)))
    if paper is not None:
        yield from (("static", static(paper)), ("borderline", borderline(paper)), ("complexity", complexity(paper)))
