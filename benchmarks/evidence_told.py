"""What the figures say, beside each other: what a tier is worth by the clock, and the README's table."""

from __future__ import annotations

from benchmarks.evidence_rows import (
    SAME_TIME,
    Row,
    as_fast,
    beside,
    caches,
    dense,
    fastest,
    in_short,
    machine,
    measured,
    named,
    plain,
    times,
)
from benchmarks.markdown import table


def by_clock(rivals: Row) -> str:
    """Each tier, and the best of the others that take no longer."""
    rows = []
    for one in named(rivals, "tier", "tier, inductor"):
        told = [beside(rivals, one, chosen) for chosen in (plain, caches)]
        rows.append((one["who"], one["settings"], times(one), measured(one, "decibels"), *map(in_short, told)))
    headings = "who", "tier", "times faster", "dB", "fewer steps, as fast", "other cache, as fast"
    return table(headings, rows)


def clock_told(rivals: Row) -> str:
    """By how much each tier, on the engine on which it is faster, is ahead of what is as fast, or behind."""
    told = []
    for name in dict.fromkeys(one["settings"] for one in named(rivals, "tier")):
        one = fastest(rivals, name)
        other = beside(rivals, one, lambda row: plain(row) or caches(row))
        where = f"- `{name}` ({one['who']}, {times(one)} times faster)"
        if other is None:
            told.append(f"{where}: nothing else is as fast.")
            continue
        ahead = one["decibels"] - other["decibels"]
        verdict = f"{ahead:.1f} dB ahead of" if ahead > 0 else f"**{-ahead:.1f} dB behind**"
        told.append(f"{where}: {verdict} {other['who']}, {other['settings']} ({times(other)} times faster).")
    return "\n".join(told)


def few_told(rivals: Row) -> str:
    """The distilled model beside plain steps in its time, by distance."""
    told = []
    for one in named(rivals, "elastic, distilled"):
        others = [o for o in rivals["results"] if plain(o) and as_fast(o, one)]
        best = min(others, key=lambda other: other["distance"], default=None)
        if best is not None:
            verdict = (
                "nearer to real images than"
                if one["distance"] < best["distance"]
                else "**no nearer** to real images than"
            )
            told.append(
                f"- distilled, {one['settings']}, {times(one)} times faster: {verdict} the best plain steps as fast: "
                f"distance {measured(one, 'distance')} beside {measured(best, 'distance')} of {best['who']}, "
                f"{best['settings']} ({times(best)} times faster); "
                f"{one['decibels']:.1f} dB beside {best['decibels']:.1f}."
            )
    return "\n".join(told)


def headline(rivals: Row) -> str:
    """The README's table: what one gets, for which model and steps, and beside what."""
    rows = []
    for name in ("third", "quarter"):
        one = fastest(rivals, name)
        other, cache = (beside(rivals, one, chosen) for chosen in (plain, caches))
        rows.append(
            (
                f"**{times(one)} times faster at {one['decibels']:.1f} dB** (distance {one['distance']:.1f}, dense "
                f"{dense(rivals)['distance']:.1f}): tier of {one['flops_share']:.0%} of the FLOPs",
                "the small FLUX of the example, 28 steps; 10 recorded generations, no training",
                f"as fast: {in_short(other)}; {in_short(cache)}",
            )
        )
    for one in named(rivals, "elastic, distilled")[:1]:
        others = [other for other in rivals["results"] if plain(other) and as_fast(other, one)]
        best = min(others, key=lambda other: other["distance"])
        rows.append(
            (
                f"**{times(one)} times faster at distance {one['distance']:.1f}** ({one['decibels']:.1f} dB): `distil`",
                f"the same, {one['settings']}; trained on recorded generations alone",
                f"as fast: distance {best['distance']:.1f} ({best['decibels']:.1f} dB) of {best['who']}, "
                f"{best['settings']} ({times(best)})",
            )
        )
    found = table(("what you get", "which model, in which steps", "beside"), rows)
    return "\n\n".join([found, _when_not(rivals), _by(rivals)])


def _when_not(rivals: Row) -> str:
    draft = fastest(rivals, "draft")
    other = beside(rivals, draft, lambda row: plain(row) or caches(row))
    behind = other is not None and other["decibels"] > draft["decibels"]
    last = f"The last tier is {'behind' if behind else 'ahead of'} {in_short(other)}: " if other else ""
    rows = [
        *_lossless(rivals),
        (
            "few steps already, without training",
            f"fewer steps, or a cache. {last}{times(draft)} times faster at {draft['decibels']:.1f} dB. "
            "Or train: `distil`",
        ),
        (
            "nothing recorded, nothing compiled",
            "diffusers' TaylorSeer of whole blocks: the best of the caches that need no preparation",
        ),
        (
            "a model or sampler that changes daily",
            "the same: tiers are found for one model, sampler and number of steps",
        ),
        ("figures on a GPU, or of FLUX at full size", "wait: none has been measured; see below what is unverified"),
    ]
    return table(("when not to use it", "use instead"), rows)


def _lossless(rivals: Row) -> list[tuple[str, str]]:
    return [
        ("no loss at all", f"torch.compile alone: {times(one)} times faster with the dense model's images")
        for one in named(rivals, "torch.compile, fewer steps")[:1]
    ]


def _by(rivals: Row) -> str:
    return f'{machine(rivals)}, {rivals["images"]} images a row; "as fast": no slower than {SAME_TIME:.0%} of it.'
