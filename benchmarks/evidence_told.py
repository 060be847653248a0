"""What the figures say, beside each other: what a tier is worth by the clock, and the README's table."""

from __future__ import annotations

from benchmarks.evidence_rows import (
    OURS,
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


def front(rivals: Row) -> list[Row]:
    """Rows that no other is both faster and nearer than, from the slowest on; the eager dense model aside."""
    rows = sorted((one for one in rivals["results"] if one["who"] != "dense"), key=lambda one: -one["times_faster"])
    found: list[Row] = []
    for one in rows:
        if not found or one["decibels"] > max(other["decibels"] for other in found):
            found.append(one)
    return found[::-1]


def front_told(rivals: Row) -> str:
    """The front as a table, what is of this project in bold."""
    rows = []
    for one in front(rivals):
        who = f"**{one['who']}**" if one["who"] in OURS else one["who"]
        rows.append((times(one), who, one["settings"], measured(one, "decibels"), measured(one, "distance")))
    return table(("times faster", "who", "settings", "dB", "distance"), rows)


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
    rows += [_distilled(rivals, one) for one in named(rivals, "elastic, distilled")[:1]]
    found = table(("what you get", "which model, in which steps", "beside"), rows)
    return "\n\n".join([found, _when_not(rivals), _by(rivals)])


def _distilled(rivals: Row, one: Row) -> tuple[str, str, str]:
    """By FLOPs, and by the clock, whichever way that comes out."""
    steps = [other for other in rivals["results"] if plain(other)]
    nearest = min(steps, key=lambda other: abs(other["flops_share"] - one["flops_share"]))
    fast = min((other for other in steps if as_fast(other, one)), key=lambda other: other["distance"])
    gain = "ahead of them, too" if one["distance"] < fast["distance"] else "**no gain**"
    cached = min((o for o in rivals["results"] if caches(o) and as_fast(o, one)), key=lambda o: o["distance"])
    verdict = "behind" if one["distance"] < cached["distance"] else "**nearer to real images, untrained**"
    return (
        f"**{one['flops_share']:.0%} of the FLOPs at distance {one['distance']:.1f}** ({one['decibels']:.1f} dB), "
        f"{times(one)} times faster: `distil`",
        f"the same, {one['settings']}; trained on recorded generations alone",
        f"{nearest['settings']} of {nearest['flops_share']:.0%}: distance {nearest['distance']:.1f}. "
        f"By the clock {gain}: distance {fast['distance']:.1f} of {fast['who']}, {fast['settings']} ({times(fast)}). "
        f"As fast, {verdict}: {in_short(cached)}",
    )


def _when_not(rivals: Row) -> str:
    rows = [
        *_lossless(rivals),
        *_cached(rivals),
        *_beyond(rivals),
        (
            "a model or sampler that changes daily",
            "a cache: tiers are found for one model, sampler and number of steps",
        ),
        ("figures on a GPU, or of FLUX at full size", "wait: none has been measured; see below what is unverified"),
    ]
    return table(("when not to use it", "use instead"), rows)


def _cached(rivals: Row) -> list[tuple[str, str]]:
    """The caches on the front, which need neither a recording nor tuning."""
    return [
        (
            f"{times(one)} times faster is enough, with nothing recorded",
            f"{one['who']}, {one['settings']}: {_near(one)}",
        )
        for one in front(rivals)
        if caches(one)
    ][-1:]


def _beyond(rivals: Row) -> list[tuple[str, str]]:
    """What is on the front beyond the fastest tier that is."""
    tiers = [one for one in front(rivals) if one["who"].startswith("tier")]
    faster = [one for one in front(rivals) if tiers and one["times_faster"] > tiers[-1]["times_faster"] and plain(one)]
    return [
        (
            f"more than {times(tiers[-1])} times faster, without training",
            f"{one['who']}, {one['settings']}: {times(one)} times faster, {_near(one)}",
        )
        for one in faster[:1]
    ]


def _near(one: Row) -> str:
    return f"{one['decibels']:.1f} dB, distance {one['distance']:.1f}"


def _lossless(rivals: Row) -> list[tuple[str, str]]:
    return [
        ("no loss at all is allowed", f"torch.compile alone: {times(one)} times faster with the dense model's images")
        for one in named(rivals, "torch.compile, fewer steps")[:1]
    ]


def _by(rivals: Row) -> str:
    return f'{machine(rivals)}, {rivals["images"]} images a row; "as fast": no slower than {SAME_TIME:.0%} of it.'
