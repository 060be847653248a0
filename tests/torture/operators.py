"""Whether operators that a graph may call only compute: python -m tests.torture.operators.

Every operator of this torch that `runtime.bundle.operators` admits is called with small tensors and numbers made from
its schema, in a child process: it must leave its arguments, the seed, and the settings of torch as they were, and give
the same twice. What does not run with such arguments is counted apart. Status 1 where one does more.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from runtime.bundle.operators import WRITTEN, find, refusal

SETS = 4
"""Kinds of tensors that each operator is called with."""


def admitted() -> Iterator[str]:
    """Names, as graphs have them, of all operators that a graph may call with some arguments."""
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space in ("aten", "prims"):
            target = f"torch.ops.{space}.{name}.{schema.overload_name or 'default'}"
            called = find(target)
            if called is not None and called not in WRITTEN and refusal(called) is None:
                yield target


def arguments(schema: Any, number: int) -> dict[str, Any]:
    """Arguments for a schema: small tensors of one of SETS kinds, and small numbers."""
    return {value.name: _argument(value, number) for value in schema.arguments if not value.has_default_value()}


def _argument(value: Any, number: int) -> Any:
    kind = str(value.type)
    draw = torch.Generator().manual_seed(number)
    shape = ((3, 3), (2, 3, 4), (1, 2, 4, 4), (3,))[number]
    tensor = torch.rand(shape, generator=draw)
    if any(word in value.name for word in ("index", "indices", "target")):
        tensor = torch.zeros(shape, dtype=torch.int64)
    made = {
        "Tensor": tensor,
        "Optional[Tensor]": tensor,
        "List[Tensor]": [tensor, tensor.clone()],
        "List[Optional[Tensor]]": [torch.zeros(shape, dtype=torch.int64)],
        "int": 7 if value.name == "dtype" else 1,
        "List[int]": [1, 1],
        "Optional[List[int]]": [1, 1],
        "number": 1,
        "float": 0.5,
        "bool": False,
        "str": "mean",
        "List[bool]": [True, True, True],
        "Device": torch.device("cpu"),
    }
    return made.get(kind)


def does_more(target: str) -> str | None:
    """What an operator does beside computing, None where nothing; "" where it does not run with what it is given."""
    called: Any = find(target)
    ran = False
    for number in range(SETS):
        given = arguments(called._schema, number)
        if refusal(called, (), given) is not None:
            continue
        before, seed = _copied(given), torch.get_rng_state()
        settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
        results = []
        for _ in range(2):
            try:
                results.append(called(**given))
            except Exception:
                break
        if not torch.equal(torch.get_rng_state(), seed):
            return "draws random numbers"
        if (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) != settings:
            return "changes settings"
        if not _same(before, given):
            return "writes into its arguments"
        if len(results) == 2:
            ran = True
            if not _same(results[0], results[1]):
                return "gives another result each time"
    return None if ran else ""


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)


def _same(one: Any, other: Any) -> bool:
    mine, theirs = torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)
    return len(mine) == len(theirs) and all(_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other) or one != one
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def tried(targets: list[str]) -> dict[str, str]:
    """What became of each operator: "pure", "not run", or what it does more. One that ends its process is a crash."""
    found: dict[str, str] = {}
    while len(found) < len(targets):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for target in targets[len(found) :]:
                signal.setitimer(signal.ITIMER_PROF, 10)  # of work, however long this process is stopped
                more = does_more(target)
                os.write(writer, f"{'pure' if more is None else more or 'not run'}\n".encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            for line in pipe:
                found[targets[len(found)]] = line.strip()
        _, status = os.waitpid(child, 0)
        if status:
            found[targets[len(found)]] = f"ends its process (status {status})"
    return found


def main() -> int:
    """Try all that are admitted, and print what became of them."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = tried(list(admitted()))
    more = {target: what for target, what in found.items() if what not in ("pure", "not run")}
    for target, what in sorted(more.items()):
        print(f"{target} {what}")
    print(", ".join(f"{what} {count}" for what, count in sorted(Counter(found.values()).items())))
    return int(bool(more))


if __name__ == "__main__":
    raise SystemExit(main())
