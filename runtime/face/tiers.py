"""What decides for a compiled transformer: a policy that was set, a tier that was chosen, or the bundle's policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from runtime.base.errors import BundleError, EditError, PolicyError
from runtime.bundle.program import Program
from runtime.bundle.tiers import Tier
from runtime.requests import scope
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import Decider, RoutingPolicy
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy
from runtime.routing.stored import stored_tiers, tiers_of


class WithTiers:
    """The policy and the tiers of a compiled transformer; all may be changed between calls, nothing is rebuilt."""

    _policy: Decider | None
    _tier: str | None
    _tiers: dict[str, Tier[Decider]]

    @property
    def program(self) -> Program:
        """What runs."""
        raise NotImplementedError

    @property
    def policy(self) -> Decider:
        """What decides for each block: that of the tier, or, without one, the policy set or the program's own (None).

        To set it ends the tier.
        """
        tier, own = self._tier, self._policy
        if tier is not None:
            return self._tiers[tier].policy
        return own or RoutingPolicy.stored(self.program.manifest.policy)

    @policy.setter
    def policy(self, policy: Decider | None) -> None:
        self._policy, self._tier = policy, None

    @property
    def tier(self) -> str | None:
        """Name of the tier that decides, None where none was chosen. It may be set in the middle of a generation.

        None goes back to the policy from before. EditError for a name that is not among `tiers`.
        """
        return self._tier

    @tier.setter
    def tier(self, name: str | None) -> None:
        if name is not None:
            self._known(name)
        self._tier = name

    @property
    def tiers(self) -> Mapping[str, Tier[Decider]]:
        """The tiers there are, by name, in the order in which they were added; read-only, as they are now."""
        return MappingProxyType(self._tiers)

    def add_tier(self, name: str, policy: Decider | Tier[Decider], **known: Any) -> None:
        """Have `policy` under the name `name`, in place of a tier of that name; `save` keeps it.

        `known` are the other fields of `Tier`: quality_db, quality_interval, times_faster, flops_share, steps, machine.
        A `Tier` may be given whole. Raises PolicyError for a field that makes no sense, or a schedule of other blocks.
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise PolicyError(f"a tier's name is a text that can be shown, not {name!r}")
        try:
            tier = replace(policy, **known) if isinstance(policy, Tier) else Tier(policy, **known)
            if not (tier.machine or "").isprintable():
                raise PolicyError(f"machine is a text that can be shown, not {tier.machine!r}")
            _check(tier.policy, len(self.program.manifest.blocks))
        except PolicyError as error:
            raise PolicyError(f"tier {name!r}: {error}") from error
        self._tiers = {**self._tiers, name: tier}  # another thread may be reading the old one

    def decided_by(self, policy: Decider) -> Any:
        """Context manager: `policy` decides for the calls of this transformer made inside, whatever is chosen."""
        return scope.decided_by(self, policy)

    def _at(self, tier: str | Sequence[str | None] | None, names: Sequence[str]) -> Any:
        """Context manager: calls inside are those of requests `names` at `tier`, one for all or one for each.

        None: nothing is said of it here. EditError for tiers that are not there, or not as many as names.
        """
        if tier is None:
            return nullcontext()
        if isinstance(tier, str):
            return scope.decided_by(self, self._known(tier).policy)
        if len(tier) != len(names):
            raise EditError(
                f"tier has {len(tier)} entries for {len(names)} requests: give one for all, or one for each"
            )
        pairs = zip(names, tier, strict=True)
        policies = {name: None if one is None else self._known(one).policy for name, one in pairs}
        return scope.each_decided_by(self, policies)

    def _deciders(self) -> tuple[Decider, ...]:
        """What decides for a call made here and now, in each of its requests."""
        names = scope.current_requests() or (None,)
        return tuple(scope.current_decider(self, name) or self.policy for name in names)

    def _known(self, name: str) -> Tier[Decider]:
        if name not in self._tiers:
            there = ", ".join(map(repr, self._tiers)) or "none: compiled.add_tier(name, policy) adds one"
            raise EditError(f"no tier is called {name!r}; there are {there}")
        return self._tiers[name]

    def _begin_tiers(self, program: Program, policy: Decider | None, tier: str | None) -> None:
        """Have the tiers of `program`; BundleError for one that cannot be read, or is of another model, EditError where
        `tier` is not there."""
        if policy is not None and tier is not None:
            raise EditError(f"a policy and the tier {tier!r}: give one of them, as either says what decides")
        self._policy, self._tiers = policy, tiers_of(program.manifest, program.folder)
        for name, known in self._tiers.items():
            try:
                _check(known.policy, len(program.manifest.blocks))
            except PolicyError as error:
                place = "the manifest" if program.folder is None else program.folder / "manifest.json"
                raise BundleError(f"{place} does not hold together: tier {name!r}: {error}; compile again") from error
        self.tier = tier

    def _stored(self, program: Program) -> Program:
        """`program` with the policy set, where its manifest can hold it, and the tiers."""
        manifest = replace(program.manifest, tiers=stored_tiers(self._tiers))
        if isinstance(self._policy, RoutingPolicy):
            manifest = replace(manifest, policy=self._policy.to_spec())
        return replace(program, manifest=manifest)


def _check(policy: object, blocks: int) -> None:
    """PolicyError for what is no policy, or a schedule of other than `blocks` blocks (0: not known yet)."""
    if not callable(getattr(policy, "decide", None)):
        raise PolicyError(f"{policy!r} is no policy")
    if isinstance(policy, ReusePolicy) and policy.otherwise is not None:
        _check(policy.otherwise, blocks)
    if isinstance(policy, BranchedPolicy):
        for own in policy.policies:
            _check(own, blocks)
    if isinstance(policy, ScheduledPolicy) and blocks and policy.table.shape[1] != blocks:
        raise PolicyError(f"the schedule is for {policy.table.shape[1]} blocks, the model has {blocks}")
