"""Names of a forward's arguments, and nested arguments as flat names and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from edit_compile.loading import load_inputs, save_inputs
from runtime.base.errors import InputError
from runtime.face.arguments import OTHERS, argument_names, flatten, named, unflatten


def closed(x: Any, t: Any = None, *, flag: bool = False) -> None: ...


def open_to_others(x: Any, *rest: Any, t: Any = None, **others: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "names"), [(closed, ("x", "t", "flag")), (open_to_others, ("x", "t", OTHERS))], ids=["closed", "open"]
)
def test_names_say_whether_there_may_be_others(forward: Callable[..., None], names: tuple[str, ...]) -> None:
    assert argument_names(forward) == names


def test_others_are_taken_by_name_where_the_forward_takes_them() -> None:
    assert named(("x", OTHERS), [1], {"guidance": 2}) == {"x": 1, "guidance": 2}
    with pytest.raises(InputError, match="no argument 'guidance'"):
        named(("x",), [1], {"guidance": 2})
    with pytest.raises(InputError, match="takes 1 arguments, got 2 by position"):
        named(("x", OTHERS), [1, 2], {})
    with pytest.raises(InputError, match="'x' is given twice"):
        named(("x", OTHERS), [1], {"x": 2})


NESTED = {
    "x": torch.ones(2),
    "contexts": {"main": torch.zeros(3), "scale": 0.5},
    "frames": [{"a": torch.ones(1)}, {"a": torch.zeros(1)}],
}


def test_flat_names_become_what_they_were_made_of() -> None:
    tensors, constants = flatten(NESTED)
    assert list(tensors) == ["x", "contexts.main", "frames.0.a", "frames.1.a"]
    assert _same(unflatten({**tensors, **constants}), NESTED)


def test_numbered_keys_that_do_not_count_up_stay_a_dict() -> None:
    assert unflatten({"x.1": 1, "y.0": 2, "y.1": 3}) == {"x": {"1": 1}, "y": [2, 3]}


def test_eleven_entries_keep_their_order() -> None:
    assert unflatten({f"x.{index}": index for index in reversed(range(11))}) == {"x": list(range(11))}


def test_nested_inputs_go_through_a_file(tmp_path: Path) -> None:
    given = {
        **NESTED,
        "shapes": [[1, 2]],
        "sizes": [(1, 16, 16), ()],
        "none": None,
        "empty": [{}, []],
        "pair": (1, None),
    }
    save_inputs(given, tmp_path / "inputs.safetensors")
    read = load_inputs(tmp_path / "inputs.safetensors")
    assert _same({name: read[name] for name in given}, given)


def _same(one: Any, other: Any) -> bool:
    return pytree.tree_structure(one) == pytree.tree_structure(other) and all(
        a is b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    )
