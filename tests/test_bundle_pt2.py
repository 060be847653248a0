from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from runtime.base.errors import BundleError
from runtime.bundle import archive as pt2


class Ordinary(torch.nn.Module):
    """Sizes, dtypes, lists, several outputs, constants of every kind."""

    def forward(self, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, tokens, _ = x.shape
        low, high = torch.nn.functional.linear(x, weight).chunk(2, dim=-1)
        pairs = torch.stack([low, high.to(torch.float64).float()], dim=-1).reshape(rows, tokens * 2, -1)
        places = torch.arange(tokens, device=x.device).float()[:, None] * (tokens // 2)
        mask = torch.full((tokens, tokens), float("-inf"), device=x.device).triu(1)
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        values, _ = x.max(dim=1)
        return pairs.clamp(min=0.5), x + places, attended, values


def exported(module: torch.nn.Module, *args: torch.Tensor, free: tuple = ()) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, dynamic_shapes=free or None).run_decompositions({})


@pytest.fixture(scope="module")
def archive() -> bytes:
    free = (None, {0: Dim.AUTO, 1: Dim.AUTO})
    return pt2.dump(exported(Ordinary(), torch.randn(6, 4), torch.randn(2, 6, 4), free=free))


def test_a_graph_comes_back_as_it_was(archive: bytes) -> None:
    graph = pt2.load(archive)
    for rows, tokens in ((2, 6), (1, 6), (3, 10)):
        weight, x = torch.randn(6, 4), torch.randn(rows, tokens, 4)
        for got, want in zip(graph(weight, x), Ordinary()(weight, x), strict=True):
            torch.testing.assert_close(got, want)


def test_other_tools_can_read_it_too(archive: bytes) -> None:
    weight, x = torch.randn(6, 4), torch.randn(2, 6, 4)
    theirs = torch.export.load(io.BytesIO(archive)).graph_module
    torch.testing.assert_close(theirs(weight, x)[0], pt2.load(archive)(weight, x)[0])


def test_tensors_made_inside_follow_the_device(archive: bytes) -> None:
    graph = pt2.load(archive, device=torch.device("meta"))
    outputs = graph(torch.empty(6, 4, device="meta"), torch.empty(2, 6, 4, device="meta"))
    assert {output.device.type for output in outputs} == {"meta"}


def test_an_archive_tells_nothing_of_where_it_was_made(archive: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        for name in members.namelist():
            data = members.read(name)
            assert b"stack_trace" not in data
            assert str(Path(__file__).parent.parent).encode() not in data
            assert b".py" not in data
            assert not (name.endswith(".pt") and data)


class Holds(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


def test_only_graphs_without_tensors_or_side_effects_are_dumped() -> None:
    with pytest.raises(ValueError, match="p_weight"):
        pt2.dump(exported(Holds(), torch.ones(2)))
    with pytest.raises(ValueError, match="writes"):
        pt2.dump(exported(Writes(), torch.ones(2)))


def altered(
    archive: bytes, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None
) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
        for name, data in (extra or {}).items():
            target.writestr(name, data)
    return result.getvalue()


def with_graph(archive: bytes, change: Callable[[dict], None]) -> bytes:
    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        graph = json.loads(data)
        change(graph)
        return json.dumps(graph).encode()

    return altered(archive, edit)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "member",
    [
        "archive/data/constants/opaque_obj_0",
        "archive/data/constants/tensor_0",
        "archive/data/constants/model.pt",
        "archive/data/weights/weight_0",
        "archive/data/aotinductor/model/run.so",
        "archive/extra/notes.txt",
        "archive/models/other.json",
        "../archive/models/model.json",
    ],
)
def test_anything_beside_the_graph_is_refused(archive: bytes, member: str, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "harmed"))
    with pytest.raises(BundleError, match=r"glue/a\.pt2 holds"):
        pt2.load(altered(archive, lambda _, data: data, {member: bomb}), "glue/a.pt2")
    assert not (tmp_path / "harmed").exists()


def test_sample_inputs_are_refused(archive: bytes, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "harmed"))
    with pytest.raises(BundleError, match="sample_inputs"):
        pt2.load(altered(archive, lambda name, data: bomb if "sample_inputs" in name else data))
    assert not (tmp_path / "harmed").exists()


def test_sizes_are_not_evaluated_as_python(archive: bytes, tmp_path: Path) -> None:
    harm = f"__import__('pathlib').Path({str(tmp_path / 'harmed')!r}).touch()"

    def replace_expressions(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "expr_str":
                    value[key] = harm
                else:
                    replace_expressions(inner)
        elif isinstance(value, list):
            for inner in value:
                replace_expressions(inner)

    pt2.load(with_graph(archive, replace_expressions))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.mkldnn._linear_pointwise.default",
        "torch.ops.higher_order.cond",
        "torch.load",
        "torch.hub.load",
        "os.system",
        "_operator.attrgetter",
        "builtins.eval",
        "math.__loader__",
        "torch.ops.aten.__class__.__init__",
        "torch.ops.aten.linear",
        "torch.ops.aten.no_such_thing.default",
        "#extension:thing",
    ],
)
def test_only_tensor_operators_are_called(archive: bytes, target: str) -> None:
    def change(graph: dict) -> None:
        graph["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(BundleError, match=r"plan\.pt2"):
        pt2.load(with_graph(archive, change), "plan.pt2")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("as_graph", {"name": "g", "graph": {}}),
        ("as_custom_obj", {"name": "o", "class_fqn": "x"}),
        ("as_operator", "torch.load"),
        ("as_string_to_argument", {}),
        ("as_layout", 1),
    ],
)
def test_only_plain_arguments_are_taken(archive: bytes, kind: str, value: object) -> None:
    def change(graph: dict) -> None:
        graph["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {kind: value}

    with pytest.raises(BundleError, match=kind):
        pt2.load(with_graph(archive, change))


CODE = "x=__import__('pathlib').Path({!r}).touch(), y"


def test_input_names_cannot_become_code(archive: bytes, tmp_path: Path) -> None:
    def change(graph: dict) -> None:
        text = json.dumps(graph["graph_module"]["graph"])
        first = graph["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"]
        name = json.dumps(CODE.format(str(tmp_path / "harmed")))
        graph["graph_module"]["graph"] = json.loads(text.replace(f'"{first}"', name))

    graph = pt2.load(with_graph(archive, change))
    graph(torch.randn(6, 4), torch.randn(2, 6, 4))
    assert not (tmp_path / "harmed").exists()


def test_keyword_names_cannot_become_code(archive: bytes, tmp_path: Path) -> None:
    def change(graph: dict) -> None:
        given = graph["graph_module"]["graph"]["nodes"][0]["inputs"][0]
        given.update(kind=2, name=CODE.format(str(tmp_path / "harmed")))

    with pytest.raises(BundleError, match="names an argument"):
        pt2.load(with_graph(archive, change))


@pytest.mark.parametrize("kind", ["as_int", "as_bool", "as_string", "as_float", "as_ints"])
def test_values_cannot_become_code(archive: bytes, kind: str, tmp_path: Path) -> None:
    harm = {CODE.format(str(tmp_path / "harmed")): 1}  # fx writes the keys of a dict as they are

    def change(graph: dict) -> None:
        given = graph["graph_module"]["graph"]["nodes"][0]["inputs"][0]
        given["arg"] = {kind: [harm] if kind.endswith("s") else harm}

    with pytest.raises(BundleError):
        pt2.load(with_graph(archive, change))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("harm", ["empty", "cut", "text", "no graph", "not json", "list", "schema", "dangling"])
def test_damage_is_one_error_that_names_the_file(archive: bytes, harm: str) -> None:
    def drop(name: str, data: bytes) -> bytes | None:
        return None if name.endswith("model.json") else data

    damaged = {
        "empty": lambda: b"",
        "cut": lambda: archive[: len(archive) // 2],
        "text": lambda: b"not a zip",
        "no graph": lambda: altered(archive, drop),
        "not json": lambda: altered(archive, lambda n, d: b"{" if n.endswith("model.json") else d),
        "list": lambda: altered(archive, lambda n, d: b"[]" if n.endswith("model.json") else d),
        "schema": lambda: with_graph(archive, lambda g: g["schema_version"].update(major=99)),
        "dangling": lambda: with_graph(
            archive, lambda g: g["graph_module"]["graph"]["outputs"].append({"as_tensor": {"name": "gone"}})
        ),
    }[harm]()
    with pytest.raises(BundleError, match=r"plans/x\.pt2"):
        pt2.load(damaged, "plans/x.pt2")
