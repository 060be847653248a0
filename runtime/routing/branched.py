"""A policy for each branch of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.base.errors import PolicyError
from runtime.routing.policy import Decider


@dataclass(frozen=True)
class BranchedPolicy:
    """Decides by the policy of the branch of guidance that is called; `otherwise` decides for branches without one.

    Args:
        branches: policies by the branch's name: its cache context ("cond", "uncond", ...), or "branch 0", "branch 1",
            ... in the order of calls where there is none.
        otherwise: the policy of all others.

    Raises PolicyError where one of them is branched itself, and for a branch whose name is no text that can be shown.
    """

    branches: Mapping[str, Decider]
    otherwise: Decider

    def __post_init__(self) -> None:
        if any(isinstance(policy, BranchedPolicy) for policy in self.policies):
            raise PolicyError("a branch's policy is branched itself: give one that decides for the branch")
        if others := [name for name in self.branches if not (isinstance(name, str) and name.isprintable())]:
            raise PolicyError(
                f"branches: {others[0]!r} is no branch's name: a text that can be shown, as 'cond' or 'branch 0'"
            )

    @property
    def policies(self) -> tuple[Decider, ...]:
        """Those of all branches."""
        return (*self.branches.values(), self.otherwise)

    def of(self, branch: str) -> Decider:
        """The policy of the branch called `branch`."""
        return self.branches.get(branch, self.otherwise)

    @property
    def keeps(self) -> int:
        """As many residuals as a branch needs at most."""
        return max(policy.keeps for policy in self.policies)

    @property
    def watches(self) -> None:
        """Nothing of its own."""

    @property
    def routed(self) -> bool:
        """Whether the routers are run in some branch."""
        return any(policy.routed for policy in self.policies)

    def decide(self, step: int, block: int, gate: Sequence[float], *_: Sequence[float]) -> list[float]:
        """PolicyError: only `of` a branch can it be told."""
        raise PolicyError("a BranchedPolicy stands by itself: put it around other policies, not into one")


def of_branch(policy: Decider, branch: str) -> Decider:
    """What decides for the branch called `branch`."""
    return policy.of(branch) if isinstance(policy, BranchedPolicy) else policy
