"""Calls are of one form only where their constants are of one type and value: equal numbers are not enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile.calls.argument_tree import flat_arguments
from passes.glue.calling import _kind
from runtime.base.errors import InputError, ShapeError
from tests import forged
from tests.unprepared import Block, Net, close, inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")


class Mode(StrEnum):
    A = "a"


class Size(IntEnum):
    SMALL = 1


class Other(Enum):
    A = "a"


class Share(float):
    pass


def by_bool(value: Any) -> float:
    return 2.0 if value is True else 3.0


def by_division(value: Any) -> float:
    return 1.0 // 0.3 if isinstance(value, float) else 5.0 // value


def by_sign(value: Any) -> float:
    return math.copysign(2.0, value)


def by_class(value: Any) -> float:
    return 2.0 + 3.0 * isinstance(value, Mode | Size | Share) + 5.0 * isinstance(value, np.generic)


def by_nan(value: Any) -> float:
    return 2.0 if value is not None and math.isnan(value) else 3.0


def by_holder(value: Any) -> float:
    return {tuple: 2.0, list: 3.0, dict: 4.0, type(None): 5.0}[type(value)]


def by_item(value: Any) -> float:
    return {tuple: 2.0, list: 3.0, dict: 4.0, type(None): 5.0}[type(next(iter(value.values()), ()))]


def by_none(value: Any) -> float:
    return 2.0 if value.get("scale", 1.0) is None else 3.0


class Telling(Net):
    """Scales what it gives by what a Python function tells of an argument."""

    def __init__(self, tell: Callable[[Any], float]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, x: Tensor, t: Tensor, value: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t) * self.tell(value)


PAIRS: list[tuple[Callable[[Any], float], Any, Any]] = [
    (by_bool, True, 1),
    (by_bool, 1, True),
    (by_bool, 1.0, True),
    (by_division, 1, 1.0),
    (by_division, 1.0, 1),
    (by_sign, 0.0, -0.0),
    (by_sign, -0.0, 0.0),
    (by_class, Mode.A, "a"),
    (by_class, "a", Mode.A),
    (by_class, 1, Size.SMALL),
    (by_class, Size.SMALL, 1),
    (by_class, 0.5, Share(0.5)),
    (by_class, 0.5, np.float64(0.5)),
    (by_class, np.float32(0.5), 0.5),
    (by_class, np.float32(0.5), np.float64(0.5)),
    (by_nan, math.nan, None),
    (by_nan, math.inf, math.nan),
    (by_holder, (1, 2), [1, 2]),
    (by_holder, [1, 2], {"0": 1, "1": 2}),
    (by_holder, [], ()),
    (by_holder, {}, None),
    (by_holder, None, []),
    (by_item, {"a": [(1, 2)]}, {"a": ([1, 2],)}),
    (by_item, {"a": []}, {"a": {}}),
    (by_none, {"scale": None}, {}),
]


@torch.no_grad()
@pytest.mark.parametrize(("tell", "one", "other"), PAIRS, ids=lambda one: getattr(one, "__name__", repr(one)))
def test_equal_constants_of_another_kind_are_another_form(
    tell: Callable[[Any], float], one: Any, other: Any, tmp_path: Path
) -> None:
    model = Telling(tell).eval()
    compiled = edit_compile.compile(model, inputs=inputs() | {"value": one}, engine="torch")
    compiled.save(tmp_path / "one.edit")
    for value in (one, other, one, other):
        close(compiled(**inputs(), value=value), model(**inputs(), value=value))
    assert len(compiled.program.manifest.glues) == 2
    loaded = edit_compile.load(tmp_path / "one.edit", engine="torch")
    for again in (one, one):
        close(loaded(**inputs(), value=again), model(**inputs(), value=one))
    with pytest.raises(ShapeError, match=r"fixed when compiling: value.*: compiled with.*, called with"):
        loaded(**inputs(), value=other)


class Defaulting(Net):
    """With an argument whose default is not None, and any others."""

    def forward(self, x: Tensor, t: Tensor, share: float | None = 0.5, mask: Any = None, **others: Any) -> Tensor:  # type: ignore[override]
        scale = 2.0 if share is None else share
        return super().forward(x, t) * scale * (3.0 if others.get("power", 1) is None else 1.0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["share", "power"])
def test_none_is_another_form_where_leaving_it_out_says_something_else(name: str, tmp_path: Path) -> None:
    model = Defaulting().eval()
    for given, other in (({}, {name: None}), ({name: None}, {})):
        compiled = edit_compile.compile(model, inputs=inputs() | given, engine="torch", output=tmp_path / "x")
        loaded = edit_compile.load(tmp_path / "x", engine="torch")
        for one in (compiled, loaded):
            close(one(**inputs(), **given, mask=None), model(**inputs(), **given))
        with pytest.raises(ShapeError, match=f"fixed when compiling: {name}"):
            loaded(**inputs(), **other)
        close(compiled(**inputs(), **other), model(**inputs(), **other))
        assert len(compiled.program.manifest.glues) == 2


def by_module(value: Any) -> float:
    return 2.0 if type(value).__module__ == "one" else 3.0


def twins(kind: type[Enum]) -> tuple[Enum, Enum]:
    """The member A of two enumerations of one name, in the modules "one" and "two"."""
    one, two = (kind("Mode", {"A": 1 if kind is IntEnum else "a"}, module=module) for module in ("one", "two"))
    return one.A, two.A  # type: ignore[attr-defined]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Enum, IntEnum, StrEnum])
def test_members_of_enumerations_of_one_name_in_two_modules_are_two_forms(kind: type[Enum], tmp_path: Path) -> None:
    one, two = twins(kind)
    model = Telling(by_module).eval()
    compiled = edit_compile.compile(model, inputs=inputs() | {"value": one}, engine="torch", output=tmp_path / "x")
    for value in (one, two, one, two):
        close(compiled(**inputs(), value=value), model(**inputs(), value=value))
    assert len(compiled.program.manifest.glues) == 2
    loaded = edit_compile.load(tmp_path / "x", engine="torch")
    close(loaded(**inputs(), value=one), model(**inputs(), value=one))
    with pytest.raises(ShapeError, match=r"compiled with '<one:Mode.A>', called with '<two:Mode.A>'"):
        loaded(**inputs(), value=two)


@torch.no_grad()
@pytest.mark.parametrize("value", [Mode.A, Size.SMALL, Other.A, Share(0.5)])
def test_a_manifest_from_before_classes_had_modules_is_called_as_it_was(value: Any, tmp_path: Path) -> None:
    model = Telling(by_class).eval()
    edit_compile.compile(model, inputs=inputs() | {"value": value}, engine="torch", output=tmp_path / "x")

    def as_before(manifest: Any) -> None:
        (glue,) = manifest["glues"]
        assert __name__ in glue["constants"]["value"]
        glue["constants"]["value"] = glue["constants"]["value"].replace(f"{__name__}:", "")

    forged.put_manifest(tmp_path / "x", as_before)
    loaded = edit_compile.load(tmp_path / "x", engine="torch")
    close(loaded(**inputs(), value=value), model(**inputs(), value=value))
    with pytest.raises(ShapeError, match="fixed when compiling"):
        loaded(**inputs(), value="a" if value != "a" else "b")


@torch.no_grad()
def test_a_manifest_from_before_holders_were_told_is_called_as_it_was(tmp_path: Path) -> None:
    model, value = Telling(by_item).eval(), {"a": [(1, 2)]}
    edit_compile.compile(model, inputs=inputs() | {"value": value}, engine="torch", output=tmp_path / "x")

    def as_before(manifest: Any) -> None:
        (glue,) = manifest["glues"]
        told = glue["constants"]
        assert told == {
            "value": "<dict>",
            "value.a": "<list>",
            "value.a.0": "<tuple>",
            "value.a.0.0": 1,
            "value.a.0.1": 2,
        }
        glue["constants"] = {name: one for name, one in told.items() if type(one) is int}
        del manifest["telling_none"]

    forged.put_manifest(tmp_path / "x", as_before)
    loaded = edit_compile.load(tmp_path / "x", engine="torch")
    close(loaded(**inputs(), value=value), model(**inputs(), value=value))
    with pytest.raises(ShapeError, match="fixed when compiling"):
        loaded(**inputs(), value={"a": [(1, 2)], "b": []})


@torch.no_grad()
@pytest.mark.parametrize(
    "value",
    [[1, (2.0, "a")], {"a": {}}, 1, True, 1.0, -0.0, math.nan, math.inf, 2**70, "a", Mode.A, Other.A, np.float32(2)],
)
def test_the_same_constant_is_one_form_also_in_a_bundle(value: Any, tmp_path: Path) -> None:
    model = Telling(lambda value: 2.0).eval()
    compiled = edit_compile.compile(model, inputs=inputs() | {"value": value}, engine="torch", output=tmp_path / "x")
    loaded = edit_compile.load(tmp_path / "x", engine="torch")
    again = float("nan") if value != value else copy.deepcopy(value)
    for one in (compiled, loaded):
        close(one(**inputs(), value=again), model(**inputs(), value=value))
        assert len(one.program.manifest.glues) == 1


@torch.no_grad()
def test_the_timestep_may_be_a_number_of_numpy() -> None:
    class Timed(Net):
        def forward(self, x: Tensor, t: Any) -> Tensor:
            return super().forward(x, torch.full((len(x),), float(t)))

    model, given = Timed().eval(), inputs()["x"]
    compiled = edit_compile.compile(model, inputs={"x": given, "t": np.float32(0.5)}, engine="torch")
    close(compiled(given, np.float32(0.5)), model(given, np.float32(0.5)))


class Inside(Net):
    """Gives its blocks a plain value that its own Python makes of a mask's numbers."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, value: Any = None) -> Tensor:
            return super().forward(x, c, x * by_bool(value))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        value = True if float(mask.sum()) > 3 else 1
        for block in self.blocks:
            y = block(y, c, value)
        return self.head(y)


@torch.no_grad()
def test_equal_constants_of_another_kind_are_another_way_to_call_a_block() -> None:
    model = Inside().eval()
    few, many = ({**inputs(), "mask": torch.full((2,), size)} for size in (1.0, 2.0))
    compiled = edit_compile.compile(model, inputs=few, engine="torch")
    assert compiled.program.manifest.glues[0].file is None, "not hosted: the test tells nothing"
    for given in (few, many, few, many):
        close(compiled(**given), model(**given))


def test_what_a_block_is_called_with_is_told_by_type_and_value() -> None:
    values = [1, True, 1.0, 0.0, -0.0, math.nan, "1", Mode.A, "a", np.float64(1), None]
    for at, one in enumerate(values):
        for place, other in enumerate(values):
            assert (_kind(one) == _kind(other)) == (at == place)
    assert _kind(float("nan")) == _kind(math.nan)


def test_recordings_hold_values_of_enumerations_and_numpy() -> None:
    given = {"mode": Mode.A, "size": Size.SMALL, "scale": np.float32(0.5), "deep": [Size.SMALL, None]}
    found = flat_arguments(given).constants
    assert found == {"mode": "a", "size": 1, "scale": 0.5, "deep.0": 1, "deep.1": None}
    assert [type(value) for value in found.values()] == [str, int, float, int, type(None)]


@pytest.mark.parametrize("value", [Other.A, torch.float32, torch.device("cpu")])
def test_recordings_refuse_what_they_could_not_give_back(value: object) -> None:
    with pytest.raises(InputError, match=r"argument 'value' is a .*: a recording holds plain data"):
        flat_arguments({"value": value})


class Pair(NamedTuple):
    one: float
    two: float


class Items(list[float]):
    pass


class Looking(Net):
    """Looks at a number, so that its own Python runs around its blocks."""

    def forward(self, x: Tensor, t: Tensor, pair: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t) * pair[1] * (2 if float(x.sum()) > 1e6 else 1)


@torch.no_grad()
@pytest.mark.parametrize("pair", [Pair(2.0, 3.0), Items([2.0, 3.0])])
def test_requests_share_a_call_that_is_given_a_named_tuple_or_a_list_of_a_class(pair: Any) -> None:
    model = Looking().eval()
    compiled = edit_compile.compile(model, inputs=inputs() | {"pair": pair}, engine="torch")
    assert compiled.program.manifest.glues[0].file is None
    with compiled.request(["a", "b"]):
        close(compiled(**inputs(), pair=pair), model(**inputs(), pair=pair))


@torch.no_grad()
def test_a_list_of_a_class_is_the_form_of_a_list_as_it_is_recorded(tmp_path: Path) -> None:
    model = Telling(lambda value: 2.0 if isinstance(value, list) else 3.0).eval()
    with edit_compile.record(model, tmp_path / "calls") as recorder, recorder.generation():
        model(**inputs(), value=Items([1.0, 2.0]))
    calls = edit_compile.Recording(tmp_path / "calls")
    edit_compile.compile(model, inputs=calls, engine="torch", output=tmp_path / "x")
    loaded = edit_compile.load(tmp_path / "x", engine="torch")
    close(loaded(**inputs(), value=Items([1.0, 2.0])), model(**inputs(), value=Items([1.0, 2.0])))
    with pytest.raises(ShapeError, match="compiled with a list, called with a tuple"):
        loaded(**inputs(), value=(1.0, 2.0))
