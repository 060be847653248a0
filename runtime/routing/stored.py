"""Policies as plain data in a manifest, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.base.errors import BundleError, EditError, PolicyError
from runtime.bundle.spec import Manifest
from runtime.bundle.tiers import StoredBranches, StoredPolicy, StoredReuse, StoredRouting, StoredSchedule, Tier
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import Decider, RoutingPolicy
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy

Tiers = Mapping[str, Tier[Decider]]


def tiers_of(manifest: Manifest, folder: Path | None) -> dict[str, Tier[Decider]]:
    """The tiers of the manifest of the bundle `folder`, in its order.

    Raises BundleError, naming the file, the tier and the field, for a policy that makes no sense.
    """
    found: dict[str, Tier[Decider]] = {}
    for name, tier in manifest.tiers.items():
        try:
            found[name] = _with_policy(tier, policy_of(tier.policy))
        except PolicyError as error:
            place = "the manifest" if folder is None else folder / "manifest.json"
            raise BundleError(
                f"{place} is damaged (tier {name!r}: {error}): copy or compile the bundle again"
            ) from error
    return found


def stored_tiers(tiers: Tiers) -> dict[str, Tier[StoredPolicy]]:
    """`tiers` as a manifest holds them; EditError, naming the tier, for a policy that none can hold."""
    found: dict[str, Tier[StoredPolicy]] = {}
    for name, tier in tiers.items():
        try:
            found[name] = _with_policy(tier, stored_policy(tier.policy))
        except EditError as error:
            raise EditError(f"tier {name!r} cannot be saved: {error}") from error
    return found


def stored_policy(policy: Decider) -> StoredPolicy:
    """`policy` as plain data; EditError where it is of a class of somebody's own, which only its code can tell."""
    if type(policy) is RoutingPolicy:
        return StoredRouting(float(policy.threshold), float(policy.margin), policy.max_reuse, policy.warmup_steps)
    if type(policy) is ScheduledPolicy:
        return StoredSchedule(_tuples(policy.table.tolist()), bool(policy.routed), policy.beyond)
    if type(policy) is ReusePolicy:
        return StoredReuse(
            policy.max_reuse,
            None if policy.change is None else float(policy.change),
            policy.watches,
            policy.warmup_steps,
            int(policy.order),
            None if policy.otherwise is None else stored_policy(policy.otherwise),  # type: ignore[arg-type]
        )
    if type(policy) is BranchedPolicy:
        branches = {name: stored_policy(own) for name, own in policy.branches.items()}
        return StoredBranches(branches, stored_policy(policy.otherwise))  # type: ignore[arg-type]
    raise EditError(
        f"{type(policy).__name__} decides in Python of its own, and a bundle holds data alone: "
        "RoutingPolicy, ScheduledPolicy, ReusePolicy and BranchedPolicy of them can be saved"
    )


def policy_of(stored: StoredPolicy) -> Decider:
    """The policy that `stored` describes; PolicyError, naming the field, where its values make no sense."""
    if isinstance(stored, StoredRouting):
        return RoutingPolicy(stored.threshold, stored.margin, stored.max_reuse, stored.warmup_steps)
    if isinstance(stored, StoredSchedule):
        try:
            return ScheduledPolicy(stored.table, stored.routed, stored.beyond)  # type: ignore[arg-type]
        except PolicyError as error:
            raise PolicyError(f"table: {error}") from error
    if isinstance(stored, StoredBranches):
        branches = {name: policy_of(own) for name, own in stored.branches.items()}
        return BranchedPolicy(branches, policy_of(stored.otherwise))
    try:
        otherwise = None if stored.otherwise is None else policy_of(stored.otherwise)
    except PolicyError as error:
        raise PolicyError(f"otherwise: {error}") from error
    return ReusePolicy(stored.max_reuse, stored.change, stored.watches, stored.warmup_steps, stored.order, otherwise)


def _with_policy(tier: Tier[Any], policy: Any) -> Tier[Any]:
    return replace(tier, policy=policy)


def _tuples(entries: Any) -> Any:
    return tuple(map(_tuples, entries)) if isinstance(entries, list) else entries
