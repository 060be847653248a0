"""Tables of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.evidence_rows import OURS, Row, accuracy, cells, machine, measured, named, times, with_interval
from benchmarks.markdown import table

QUALITY = ("dB", "distance", "accuracy")
FIGURES = ("flops_share", "decibels", "distance", "accuracy")
VERSIONS = ("python", "torch", "diffusers", "cache-dit", "numpy", "onnxruntime")


def by_share(rivals: Row) -> str:
    """All finalists, best first at each share of the FLOPs."""
    headings = "FLOPs at most", "who", "settings", "FLOPs", "times faster", *QUALITY
    rows = [(f"{one['at']:.0%}", *cells(one)) for one in rivals["results"] if not one["same_as"]]
    return table(headings, rows)


def engines(rivals: Row) -> str:
    """The same images in other time."""
    by_name = {f"{one['who']}: {one['settings']}": one for one in rivals["results"]}
    rows = []
    for one in rivals["results"]:
        if one["same_as"]:
            twin = by_name[one["same_as"]]
            rows.append((one["same_as"], times(twin), one["who"], times(one), f"{one['apart']:.0f}"))
    if not rows:
        return "Not run yet: `make evidence`."
    return table(("who", "times faster", "the same by", "times faster", "dB apart, at least"), rows)


def step_costs(rivals: Row, tuned: Row) -> str:
    """What a computed and a reused step take, by least squares over the tiers' times, beside the whole model's."""
    counts = {one["tier"]: one["decisions"].count(1.0) for one in tuned["tiers"]}
    steps, rows = tuned["steps"], []
    for who, whole in (("tier", "fewer steps, compiled"), ("tier, inductor", "torch.compile, fewer steps")):
        tiers = named(rivals, who)
        if len(tiers) > 1:
            done = [counts[one["settings"]] for one in tiers]
            taken = [steps / one["times_faster"] for one in tiers]
            found, *_ = np.linalg.lstsq(np.array([[n, steps - n] for n in done]), np.array(taken), rcond=None)
            plain = " ".join(f"{1 / one['times_faster']:.0%} ({whole})" for one in named(rivals, whole)[:1])
            rows.append((who, f"{found[0]:.0%}", f"{found[1]:.0%}", plain))
    return table(("engine", "a computed step", "a reused step", "a step of the dense model, by"), rows)


def trials(rivals: Row) -> str:
    """The best of every rival in the trials, at each share."""
    whos = dict.fromkeys(one["who"] for one in rivals["trials"])
    found = {(one["who"], one["at"]): one for one in rivals["trials"]}
    rows = [(who, *(_tried(found.get((who, at))) for at in rivals["shares"])) for who in whos]
    return table(("who", *(f"at most {at:.0%}" for at in rivals["shares"])), rows)


def _tried(one: Row | None) -> str:
    return "-" if one is None else f"{one['decibels']:.1f}"


def few_steps(rivals: Row) -> str:
    """What samples in at most 8 steps, or does at most 15% of the work: by FLOPs."""
    chosen = [one for one in rivals["results"] if one["flops_share"] <= 0.16 and not one["same_as"]]
    chosen += [one for one in rivals["results"] if one["who"] in OURS[2:] and one["flops_share"] > 0.16]
    rows = sorted({tuple(cells(one)): one["flops_share"] for one in chosen}.items(), key=lambda pair: -pair[1])
    return table(("who", "settings", "FLOPs", "times faster", *QUALITY), [cells for cells, _ in rows])


def predicted(rivals: Row) -> str:
    """What tuning predicted of each tier, beside what the final's images gave."""
    rows = [
        (
            one["tier"],
            with_interval(one["predicted"], one["interval"]),
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


def starts(found: Row) -> str:
    """Trainings that differ in how routers begin: means over seeds, each seed's, and differences."""
    rows = []
    for start, trained in found["starts"].items():
        means = [np.mean([one[name] for one in trained]) for name in FIGURES]
        share, near, far, right = means
        each = ", ".join(f"{one['distance']:.1f}" for one in trained)
        rows.append((start, f"{share:.1%}", f"{near:.1f}", f"{far:.1f} ({each})", f"{right:.1%}"))
    whole = table(("routers begin", "FLOPs", "dB", "distance, mean (each seed)", "accuracy"), rows)
    forms = ("+.1%", "+.2f", "+.2f", "+.1%")
    differences = [
        (
            f"{one['of']} less {one['less']}",
            *(measured(one, name, form) for name, form in zip(FIGURES, forms, strict=True)),
        )
        for one in found["differences"]
    ]
    told = f"{machine(found)}; {found['images']} images of each of {found['training_seeds']} trainings of "
    told += (
        f"{found['train_steps']} steps from {found['recorded']} recorded images, at a budget of {found['budget']:.0%}"
    )
    compared = table(("difference, seed by seed (95%, Student)", "FLOPs", *QUALITY), differences)
    return "\n\n".join([whole, compared, f"{told}; at {found['commit']}."])


def taken(rivals: Row, paper: Row | None) -> str:
    """By which runs."""
    drawn = ", ".join(dict.fromkeys(one["commit"] for one in rivals["results"]))
    told = [
        f"- Rivals: {machine(rivals)}; {rivals['images']} images a row, in batches of {rivals['rows']}, seeds "
        f"{rivals['seeds']}; {rivals['tried']} settings tried; drawn at {drawn}, timed at {rivals['commit']}, "
        f"the least of {rivals['repeats']} rounds, by {rivals['seconds']}. The elastic model's routers take "
        f"{rivals['routers_share']:.1%} of the FLOPs of a "
        "dense call, and are counted among its own.",
    ]
    if paper is not None:
        told.append(
            f"- The paper's claims: {machine(paper)}; {paper['images']} images a row, {paper['steps']} steps, seeds "
            f"{paper['seeds']}; most frequent decisions of {paper['calibration']} other images; at {paper['commit']}."
        )
    versions = ", ".join(f"{name} {rivals['machine'][name]}" for name in VERSIONS if name in rivals["machine"])
    return "\n".join([*told, f"- Versions: {versions}."])


def _paper_cells(one: Row) -> tuple[str, ...]:
    quality = measured(one, "decibels"), measured(one, "distance"), accuracy(one)
    return one["settings"], f"{one['flops_share']:.1%}", *quality


def _differences(paper: Row, chosen: Callable[[Row], bool]) -> str:
    rows = [
        (f"{one['of']} less {one['less']}", measured(one, "decibels", "+.2f"), measured(one, "distance", "+.2f"))
        for one in paper["differences"]
        if chosen(one)
    ]
    return table(("difference, image by image (95%)", "dB: higher is better", "distance: lower is better"), rows)


def _rho(one: Row) -> str:
    return "-" if one["rho"] is None else with_interval(one["rho"], one["interval"], "+.2f")
