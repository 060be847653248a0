from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.base.errors import BundleError
from runtime.bundle import files as bundle
from runtime.bundle import limits
from runtime.bundle.program import Program
from runtime.face.transformer import CompiledTransformer
from tests import forged, programs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.edit"
    bundle.save(programs.make(("single",)), path)
    return path


def edit_manifest(folder: Path, **changes: object) -> None:
    forged.put_manifest(folder, lambda manifest: manifest.update(changes))


def files_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "manifest.json").read_text())["files"]


def test_what_was_saved_is_what_is_read(tmp_path: Path) -> None:
    program = programs.make()
    bundle.save(program, tmp_path / "model.edit")
    read = bundle.load(tmp_path / "model.edit")
    assert replace(read.manifest, files={}) == program.manifest
    assert dict(read.files) == dict(program.files)
    for mine, theirs in ((program.weights, read.weights), (program.routers, read.routers)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    given = programs.inputs(2)
    torch.testing.assert_close(
        CompiledTransformer(read, "torch")(**given).sample, CompiledTransformer(program, "torch")(**given).sample
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model.edit"]


def test_a_program_without_routers(tmp_path: Path) -> None:
    bundle.save(programs.make(("single",), routers=False), tmp_path / "x")
    assert not (tmp_path / "x" / "routers.safetensors").exists()
    read = bundle.load(tmp_path / "x")
    assert not read.routers
    assert read.manifest.router is None


def test_weights_that_share_memory_are_saved_in_full(tmp_path: Path) -> None:
    program = programs.make(("single",))
    base = torch.arange(2 * programs.H * programs.D, dtype=torch.float32).reshape(-1, programs.D)
    weights = dict(program.weights) | {"blocks.0.up": base[: programs.H], "blocks.0.down": base[programs.H :]}
    bundle.save(replace(program, weights=weights), tmp_path / "x")
    read = bundle.load(tmp_path / "x").weights
    assert torch.equal(read["blocks.0.up"], base[: programs.H])
    assert torch.equal(read["blocks.0.down"], base[programs.H :])
    assert (tmp_path / "x" / "weights.safetensors").stat().st_size < 2 * sum(w.nbytes for w in weights.values())


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "routers.safetensors", "glue/a.pt2"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=Path(name).name):
        bundle.load(saved)


@pytest.mark.parametrize("name", ["weights.safetensors", "routers.safetensors", "plans/single-w050.onnx", "glue/a.pt2"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "append"])
def test_an_altered_file_is_named(saved: Path, name: str, harm: str) -> None:
    data = bytearray((saved / name).read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data[:-7] if harm == "truncate" else data + b"x" if harm == "append" else data)
    with pytest.raises(BundleError, match=Path(name).name):
        bundle.load(saved)


def test_truncated_weights_are_noticed_without_verification_too(saved: Path) -> None:
    data = (saved / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(data[:-7])
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        bundle.load(saved, verify=False)


@pytest.mark.parametrize(
    "harm", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"schema": 1}', b'{"schema": 1, "model": 5}']
)
def test_a_damaged_manifest_is_one_error(saved: Path, harm: bytes) -> None:
    (saved / "manifest.json").write_bytes(harm)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.load(saved)


def test_another_schema_version_says_what_to_do(saved: Path) -> None:
    edit_manifest(saved, schema=99, surprise=1)
    with pytest.raises(BundleError, match=r"99.*compile the model again"):
        bundle.load(saved)


def test_unknown_fields_are_refused_wherever_they_are(saved: Path) -> None:
    edit_manifest(saved, surprise=1)
    with pytest.raises(BundleError, match="surprise"):
        bundle.load(saved)
    bundle.save(programs.make(("single",)), saved)
    plans = json.loads((saved / "manifest.json").read_text())["plans"]
    plans[0]["variants"][1]["depth"] = 3
    edit_manifest(saved, plans=plans)
    with pytest.raises(BundleError, match=r"plans\.0\.variants\.1\.depth"):
        bundle.load(saved)


def test_the_models_own_config_may_hold_anything(tmp_path: Path) -> None:
    program = programs.make(("single",))
    config: dict[str, object] = {"axes": [16, 56], "nested": {"a": None}, "name": "ü"}
    bundle.save(replace(program, manifest=replace(program.manifest, config=config)), tmp_path / "x")
    assert bundle.load(tmp_path / "x").manifest.config == config


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "c:\\x", "", "glue\\a"])
def test_names_that_leave_the_folder_are_refused(saved: Path, name: str) -> None:
    (saved.parent / "outside").write_text("secret")
    edit_manifest(saved, files=files_of(saved) | {name: "0"})
    with pytest.raises(BundleError, match="leaves its folder"):
        bundle.load(saved)
    program = programs.make(("single",))
    with pytest.raises(BundleError, match="leaves its folder"):
        bundle.save(replace(program, files=dict(program.files) | {name: b"x"}), saved.parent / "new")
    assert not (saved.parent / "new").exists()


def test_links_that_leave_the_folder_are_refused(saved: Path) -> None:
    outside = saved.parent / "outside"
    shutil.move(saved / "glue" / "a.pt2", outside)
    (saved / "glue" / "a.pt2").symlink_to(outside)
    with pytest.raises(BundleError, match="link"):
        bundle.load(saved)


def test_graphs_that_fill_the_memory_together_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links within the folder make many large files of one that takes no place on the disk."""
    monkeypatch.setattr(limits, "GRAPHS_BYTES", 4 << 20)
    forged.put_file(saved, "glue/x0", bytes(1 << 20))
    bundle.load(saved)
    digest = json.loads((saved / "manifest.json").read_text())["files"]["glue/x0"]
    names = [f"glue/x{number}" for number in range(1, 9)]
    for name in names:
        (saved / name).symlink_to("x0")
    forged.put_manifest(saved, lambda manifest: manifest["files"].update(dict.fromkeys(names, digest)))
    with pytest.raises(BundleError, match=r"model\.edit holds graphs of more than 4194304 bytes"):
        bundle.load(saved)


@pytest.mark.parametrize(
    ("limit", "what"),
    [("MANIFEST_BYTES", "manifest.json"), ("GRAPH_BYTES", "glue/a.pt2"), ("GRAPHS_BYTES", "together")],
)
def test_what_a_reader_would_refuse_for_its_size_is_not_written(
    limit: str, what: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs.make(("single",), seed=1)
    before = bundle.load(saved).digest
    sizes = {"MANIFEST_BYTES": 1000, "GRAPH_BYTES": len(program.files["glue/a.pt2"]) - 1}
    monkeypatch.setattr(limits, limit, sizes.get(limit, sum(map(len, program.files.values())) - 1))
    for place in (saved, tmp_path / "new"):
        with pytest.raises(BundleError, match=rf"{what}.* at most \d+ \({limit} in runtime/bundle/limits\.py\)"):
            bundle.save(program, place)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model.edit"] and bundle.load(saved).digest == before
    bundle.save(program, tmp_path / "new")


def test_files_that_the_manifest_does_not_name_are_not_read(saved: Path) -> None:
    (saved / "engines").mkdir()
    (saved / "engines" / "cached.bin").write_bytes(b"anything")
    assert "engines/cached.bin" not in bundle.load(saved).files


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_what_is_not_a_bundle_is_called_so(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match="there is no" if what == "nothing" else "not a bundle"):
        bundle.load(path)


class FailsAtLast(dict):
    """Files of which the last cannot be had, as when an export fails."""

    def items(self):
        yield from super().items()
        raise RuntimeError("no ONNX form")


def test_a_failed_save_leaves_nothing_and_harms_nothing(saved: Path) -> None:
    program = programs.make(("single",))
    broken = replace(program, files=FailsAtLast(program.files))
    before = sorted(p.name for p in saved.parent.iterdir())
    for target in (saved, saved.parent / "new"):
        with pytest.raises(RuntimeError):
            bundle.save(broken, target)
        assert sorted(p.name for p in saved.parent.iterdir()) == before
    bundle.load(saved)


def test_an_earlier_bundle_is_replaced_and_other_things_are_not(saved: Path, tmp_path: Path) -> None:
    (saved / "leftover").write_text("x")
    bundle.save(programs.make(("single",), seed=1), saved)
    assert not (saved / "leftover").exists()
    assert torch.equal(bundle.load(saved).weights["glue.into"], programs.make(("single",), seed=1).weights["glue.into"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(BundleError, match="is not a bundle"):
            bundle.save(programs.make(("single",)), target)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_weights_in_use_survive_their_bundle_being_replaced(saved: Path) -> None:
    held = bundle.load(saved).weights["glue.into"]
    expected = held.clone()
    bundle.save(programs.make(("single",), seed=1), saved)
    assert torch.equal(held, expected)


def test_the_manifest_is_readable_json(saved: Path) -> None:
    text = (saved / "manifest.json").read_text()
    assert text.count("\n") > 20
    assert msgspec.json.decode(text)["model"] == "Synthetic"


def test_a_block_whose_weights_are_missing_is_named() -> None:
    program = programs.make(("single",))
    weights = {key: w for key, w in program.weights.items() if key != "blocks.0.up"}
    with pytest.raises(BundleError, match=r"blocks\.0\.up"):
        CompiledTransformer(Program(program.manifest, weights, program.routers, program.files), "torch")
