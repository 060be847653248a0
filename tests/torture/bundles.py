"""Hostile bundles: every one gives what it gave, or is refused by name; python -m tests.torture.bundles [--count 1000].

Each case is a seeded change of a small bundle (or one of the aimed ones), loaded and run in a child process with limits
of time and memory. Status 1 where one is not as promised; `--seed` and `--only` run it again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle.files import bundle_digest
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import RoutingPolicy
from tests import programs
from tests.torture.aimed import ATTACKS
from tests.torture.harness import GOOD, Outcome, outputs, tried
from tests.torture.mutations import mutate

ENGINES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Original:
    """The bundle that is attacked, what it gives on each engine, and its digest."""

    folder: Path
    expected: dict[str, str]
    digest: str


@contextmanager
def original() -> Iterator[Original]:
    """A small bundle with a tier, in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "original.edit"
        made = CompiledTransformer(programs.make(("double", "single")), "torch")
        made.add_tier("fast", RoutingPolicy(threshold=0.7))
        made.save(folder)
        # in children: onnxruntime's threads would not survive a fork
        expected = {engine: _expected(folder, engine) for engine in ENGINES}
        yield Original(folder, expected, bundle_digest(folder))


def _expected(folder: Path, engine: str) -> str:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(outputs, (folder, engine))


def case(one: Original, seed: int) -> tuple[str, Outcome]:
    """What the change of this seed was, and what became of it."""
    folder = one.folder.with_name(f"mutated-{seed}.edit")
    shutil.copytree(one.folder, folder)
    try:
        done = mutate(folder, seed)
        engine = ENGINES[seed % len(ENGINES)]
        return f"{engine}: {done}", tried(folder, engine, one.expected[engine], one.digest)
    finally:
        shutil.rmtree(folder)


def aimed(one: Original, name: str, engine: str) -> Outcome:
    """What became of an aimed attack."""
    folder = one.folder.with_name("aimed.edit")
    shutil.copytree(one.folder, folder)
    try:
        ATTACKS[name].change(folder)
        found = tried(folder, engine, one.expected[engine], one.digest)
        wanted = ATTACKS[name].outcome
        return (
            found
            if found.kind == wanted or found.kind not in GOOD
            else Outcome("silent", f"{found.kind}, not {wanted}")
        )
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run the campaign and print what became of the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--only", action="store_true", help="one case alone, told in full")
    asked = parser.parse_args()
    kinds: Counter[str] = Counter()
    bad, slowest = [], 0.0
    with original() as one:
        if not asked.only:
            for name in ATTACKS:
                for engine in ENGINES:
                    found = aimed(one, name, engine)
                    kinds[f"aimed: {found.kind}"] += 1
                    bad += [(f"{name} on {engine}", found)] if found.kind not in GOOD else []
        for seed in range(asked.seed, asked.seed + (1 if asked.only else asked.count)):
            told, found = case(one, seed)
            kinds[found.kind] += 1
            slowest = max(slowest, found.seconds)
            if found.kind not in GOOD or asked.only:
                bad.append((f"seed {seed}, {told}", found))
    for told, found in bad:
        print(f"{found.kind}: {told}\n    {found.told}")
    print(f"{sum(kinds.values())} cases: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    print(f"slowest {slowest:.1f} s")
    return int(any(found.kind not in GOOD for _, found in bad))


if __name__ == "__main__":
    raise SystemExit(main())
