"""The folder of a recording: its numbers, its limit, and what is said of damaged files."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import edit_compile
from edit_compile import CallsError, Recording
from tests.models import noise


class Echo(nn.Module):
    """Takes anything by name; returns an output that tells nothing."""

    def forward(self, **others: Any) -> Tensor:
        return torch.zeros(1)


class Other(Echo):
    """Another model's class."""


def write(folder: Path, numbers: range, limit: int = 1 << 20, model: nn.Module | None = None) -> None:
    """Generations of about 1300 bytes, which hold their number."""
    model = model or Echo()
    with edit_compile.record(model, folder, limit=limit) as recorder:
        for number in numbers:
            with recorder.generation():
                model(number=number, weight=torch.full((128,), float(number)))


def numbers_in(folder: Path) -> list[int]:
    return [generation.calls[0].arguments["number"] for generation in Recording(folder)]


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.floats(-9, 9, width=32), max_size=4).map(lambda values: torch.tensor(values)),
    st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(lambda values: torch.tensor(values)),
)
KEYS = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), max_size=4)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(KEYS, st.sampled_from("0123")), inner, max_size=4),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(max_examples=60, deadline=None)
@given(trees=st.lists(st.dictionaries(st.sampled_from(["x", "y", "self_"]), TREES, max_size=3), min_size=1, max_size=3))
def test_arguments_come_back_as_they_were(
    trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, model = tmp_path_factory.mktemp("calls"), Echo()
    with edit_compile.record(model, folder):
        for tree in trees:
            model(**tree)
    (generation,) = Recording(folder)
    assert same([call.arguments for call in generation.calls], trees)


def test_generations_are_counted_and_read_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    recording = Recording(tmp_path)
    assert (len(recording), recording.model) == (3, "Echo")
    assert recording[-1].calls[0].arguments["number"] == 2
    with pytest.raises(IndexError):
        recording[3]
    (tmp_path / "generation-00001.safetensors").write_bytes(b"")
    assert next(iter(recording)).calls[0].arguments["number"] == 0


@pytest.mark.parametrize("parts", [(20,), (7, 13), (1, 1, 18)])
def test_what_is_kept_within_the_limit_spreads_over_the_run(parts: tuple[int, ...], tmp_path: Path) -> None:
    limit, begin = 8_000, 0
    for part in parts:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            write(tmp_path, range(begin, begin + part), limit)
        begin += part
        told = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
        assert len(told) == (1 if begin > 7 else 0)
        assert all("limit=8000 bytes" in text for text in told)
    assert numbers_in(tmp_path) == [0, 4, 8, 12, 16]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= limit


def test_a_generation_larger_than_the_limit(tmp_path: Path) -> None:
    with pytest.raises(CallsError, match=r"one generation takes .* more than limit=500"):
        write(tmp_path, range(2), limit=500)
    with pytest.raises(CallsError, match="more than 0"):
        write(tmp_path, range(2), limit=0)
    assert not list(tmp_path.iterdir())
    write(tmp_path, range(3))
    with pytest.raises(CallsError, match="more than limit=500"):
        write(tmp_path, range(3, 4), limit=500)
    assert numbers_in(tmp_path) == [0, 1, 2]


def test_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    remains = tmp_path / ".generation-00002.safetensors.77.tmp"
    remains.write_bytes(b"killed")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, range(2, 4))
    (tmp_path / "recording.json").unlink()
    write(tmp_path, range(4, 5))
    assert numbers_in(tmp_path) == list(range(5))
    assert not remains.exists()
    assert (tmp_path / "notes.txt").exists()


def test_another_model_goes_into_another_folder(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    with pytest.raises(CallsError, match="holds generations of Echo, these are of Other: give another folder"):
        write(tmp_path, range(1), model=Other())


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path, range(1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CallsError, match="is not a folder"):
        Recording(tmp_path / "missing")
    with pytest.raises(CallsError, match="holds no generation"):
        Recording(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CallsError, match="cannot be written to"):
        write(tmp_path / "file", range(1))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def told(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Something that changes what a file says of its calls."""

    def damage(path: Path) -> None:
        header, data = header_of(path.read_bytes())
        contents = json.loads(header["__metadata__"]["edit_compile.calls"])
        change(contents)
        header["__metadata__"]["edit_compile.calls"] = json.dumps(contents)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_something_else(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"generation-00000.safetensors cannot be read .*delete this file"),
        (of_something_else, "is not a recorded generation"),
        (told(lambda contents: contents.update(format=7, more=1)), "is of format 7, this version reads 1"),
        (told(lambda contents: contents.update(format=2)), "is of format 2, this version reads 1"),
        (told(lambda contents: contents.pop("model")), "says something else than calls .*model"),
        (told(lambda contents: contents["calls"][0].update(outputs=3)), "says something else than calls"),
        (told(lambda contents: contents["calls"][0]["tensors"].update(y="gone")), "lacks the tensor 'gone'"),
        (told(lambda contents: contents["calls"][0]["tensors"].clear()), "holds the tensor 'arguments/weight/0'"),
        (told(lambda contents: contents["calls"][0]["constants"].update({"a.b": 1})), "a holds others"),
        (
            told(lambda contents: contents["calls"][0]["constants"].update({"number.b": 1})),
            "is a leaf and holds others",
        ),
        (
            told(lambda contents: contents["calls"][0].update(kinds={"a": "list"}, constants={"a.1": 1})),
            "a lacks an entry",
        ),
        (told(lambda contents: contents["calls"][0].update(kinds={"number": "tuple"})), "number is a leaf"),
        (told(lambda contents: contents["calls"][0]["constants"].update(weight=1)), "says twice what weight is"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path, range(2))
    damage(tmp_path / "generation-00000.safetensors")
    with pytest.raises(CallsError, match=message):
        Recording(tmp_path)[0]


@pytest.mark.parametrize("text", ["{", '{"count": "x"}', '{"count": -1, "stride": 0}'])
def test_a_damaged_state_is_named(text: str, tmp_path: Path) -> None:
    write(tmp_path, range(2))
    (tmp_path / "recording.json").write_text(text)
    with pytest.raises(CallsError, match=r"recording.json .*delete it"):
        write(tmp_path, range(2, 3))


def record_seeds(folder: Path, seeds: Sequence[int], prompt: str = "a") -> None:
    model = nn.Linear(3, 3)

    class Denoiser(nn.Module):
        def forward(self, x: Tensor, t: float, prompt: str) -> Tensor:
            return model(x)

    denoiser = Denoiser()
    with torch.no_grad(), edit_compile.record(denoiser, folder) as recorder:
        for seed in seeds:
            x = noise(2, 3, seed=seed)
            with recorder.generation():
                for t in (1.0, 0.5):
                    x = x - denoiser(x, t, prompt)


def test_a_generation_that_is_recorded_twice_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"generation 2 .* begins as generation 0 does") as told:
        record_seeds(tmp_path, [0, 1, 0, 1])
    assert len([one for one in told if "begins as" in str(one.message)]) == 1
    assert len(Recording(tmp_path)) == 4


def test_a_generation_of_an_earlier_run_that_is_recorded_again_is_told(tmp_path: Path) -> None:
    record_seeds(tmp_path, [0, 1])
    with pytest.warns(RuntimeWarning, match=r"generation 2 .* begins as generation 1 does"):
        record_seeds(tmp_path, [1])


def test_the_same_noise_for_another_prompt_is_another_generation(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        record_seeds(tmp_path, [0, 1])
        record_seeds(tmp_path, [0, 1], prompt="b")
        (tmp_path / "generation-00000.safetensors").write_bytes(b"damaged")
        record_seeds(tmp_path, [2])
