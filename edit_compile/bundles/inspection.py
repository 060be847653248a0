"""What a bundle is, read from its manifest and the sizes of its files alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_compile.bundles.tier_table import tier_table
from runtime.bundle.files import bundle_digest
from runtime.bundle.spec import Glue, Manifest, Plan
from runtime.routing.stored import tiers_of


def describe(manifest: Manifest, folder: Path) -> RenderableType:
    """Tables for the terminal: the bundle and its digest, its tiers where it has any, its plans, and its shape buckets.

    BundleError for a tier that makes no sense.
    """
    tiers = tiers_of(manifest, folder)
    shown = [tier_table(tiers)] if tiers else []
    return Group(_overview(manifest, folder), _digests(folder), *shown, _plans(manifest, folder), _glues(manifest))


def kind_of(manifest: Manifest) -> str:
    """ "hosted" where a glue needs the model's own forward, else "standalone"."""
    hosted = any(glue.file is None for glue in manifest.glues)
    return "hosted (needs the model's own code)" if hosted else "standalone (needs no model code)"


def _overview(manifest: Manifest, folder: Path) -> Table:
    table = Table(title=str(folder), show_header=False)
    policy = manifest.policy
    router = manifest.router
    rows = {
        "model": f"{manifest.model}, {manifest.dtype}",
        "kind": kind_of(manifest),
        "blocks": f"{len(manifest.blocks)} blocks of {len(manifest.plans)} plans",
        "widths": ", ".join(f"{width:g}" for width in manifest.widths),
        "routers": f"hidden {router.hidden}, modulation {router.modulation}"
        if router
        else "none: tiers and schedules alone skip blocks",
        "policy": f"threshold {policy.threshold:g}, margin {policy.margin:g}, at most {policy.max_reuse} reuses, "
        f"{policy.warmup_steps} warm-up steps",
        "timestep": manifest.timestep,
        "size": ", ".join(f"{name} {_size(size)}" for name, size in _sizes(folder).items()),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
        "schema": str(manifest.schema),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _digests(folder: Path) -> Text:
    """A line each: in a cell of a table they would be broken."""
    lines = [f"digest {bundle_digest(folder)}"]
    if any((folder / "engines").rglob("*.engine")):
        lines += ["digest with engines", bundle_digest(folder, engines=True)]
    return Text("\n".join(lines))


def _plans(manifest: Manifest, folder: Path) -> Table:
    table = Table(title="plans")
    for heading in ("plan", "kind", "blocks", "states", "width", "weights read", "files"):
        table.add_column(heading)
    members = Counter(form.plan for block in manifest.blocks for form in block.forms)
    for plan in manifest.plans:
        states = ", ".join(plan.inputs[index].name for index in plan.states)
        for index, variant in enumerate(plan.variants):
            first = (plan.id[:12], plan.kind, str(members[plan.id]), states) if index == 0 else ("", "", "", "")
            files = plan_files(plan, variant.width, folder)
            read = f"{sum(variant.rows) / max(sum(plan.variants[-1].rows), 1):.0%} of rows"
            shown = ", ".join(f"{path.suffix[1:]} {_size(path.stat().st_size)}" for path in files)
            table.add_row(*first, f"{variant.width:g}", read, shown)
    return table


def plan_files(plan: Plan, width: float, folder: Path) -> list[Path]:
    """Files of the bundle `folder` that hold `plan` at `width`."""
    return sorted((folder / "plans").glob(f"{plan.id}-w{round(100 * width):03d}.*"))


def _glues(manifest: Manifest) -> Table:
    table = Table(title="shapes compiled")
    for heading in ("glue", "inputs", "constants", "FLOPs per row, all blocks at full width"):
        table.add_column(heading)
    for glue in manifest.glues:
        inputs = "\n".join(f"{given.name} {_shape(given.shape)} {given.dtype}" for given in glue.inputs)
        constants = ", ".join(f"{name}={value!r}" for name, value in glue.constants.items())
        table.add_row(glue.id[:12], inputs, constants, f"{dense_flops(manifest, glue):.3g}")
    return table


def dense_flops(manifest: Manifest, glue: Glue) -> float:
    """FLOPs of one row of the batch through `glue` with every block at full width."""
    full = {plan.id: plan.variant_at(1.0) for plan in manifest.plans}
    costs = {(cost.plan, cost.variant): cost.flops for cost in glue.costs}
    plans = [block.plan_among({cost.plan for cost in glue.costs}) for block in manifest.blocks]
    return float(glue.flops + sum(costs.get((plan, full[plan]), 0) for plan in plans if plan is not None))


def _shape(shape: tuple[int | None, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in shape) or "scalar"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes per top-level entry of the bundle, the largest first."""
    sizes = {
        entry.name: sum(path.stat().st_size for path in [entry, *entry.rglob("*")] if path.is_file())
        for entry in folder.iterdir()
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
