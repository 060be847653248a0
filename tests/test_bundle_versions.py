"""Bundles that earlier versions wrote: they load, decide and compute as they did (CONTRIBUTING.md says what to do)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import edit_compile
from edit_compile import BundleError, bundle_digest
from runtime.bundle.spec import SCHEMA
from tests import forged
from tests.data.make import ROOT, manifest_format, version
from tests.data.record import BUNDLES, COLUMNS, FORMAT, given_by, index, recorded

BEFORE_DIGESTS = "before-0.1.0"
"""Written by commit a9e617b, the first of schema 2: no manifest.sha256, and none of the fields that came later."""
KEPT = [(folder.name, name) for folder in sorted(BUNDLES.iterdir()) for name in index(folder)]
WHAT_TO_DO = (
    'the form of a manifest is another than that of {}: follow "Changing the bundle\'s format" in CONTRIBUTING.md, '
    "raise the version in pyproject.toml, and run python -m tests.data.make"
)


def kept_on() -> list[tuple[str, str, str]]:
    return [(v, name, engine) for v, name in KEPT for engine in index(BUNDLES / v)[name].engines]


@pytest.mark.parametrize(("of", "name", "engine"), kept_on())
def test_a_bundle_of_another_version_decides_and_computes_as_it_did(of: str, name: str, engine: str) -> None:
    record = index(BUNDLES / of)[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no manifest.sha256")
        model = edit_compile.load(BUNDLES / of / name, engine=engine, digest=record.digest)
    inputs, gave = recorded(BUNDLES / of, name)
    gives = given_by(model, record, inputs)
    assert gives.keys() == gave.keys()
    for key, value in gave.items():
        exact = key.rpartition(".")[2] in COLUMNS
        torch.testing.assert_close(gives[key], value, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4, msg=key)


def test_what_is_recorded_holds_every_kind_of_decision() -> None:
    """So that a reader that lost one of them would be found out."""
    _, gave = recorded(BUNDLES / version(), "routed")
    assert set(torch.cat([gave["policy.done"], gave["nested.done"]]).tolist()) == {0.0, 1.0, 2.0}
    assert set(gave["schedule.width"].tolist()) == {0.0, 0.5, 1.0}
    outputs = [gave[f"{tier}.output.3"] for tier in ("policy", "schedule", "nested")]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize(("of", "name"), KEPT)
def test_a_bundle_of_another_version_is_the_one_that_was_kept(of: str, name: str, tmp_path: Path) -> None:
    assert bundle_digest(BUNDLES / of / name) == index(BUNDLES / of)[name].digest
    shutil.copytree(BUNDLES / of / name, tmp_path / "x")
    forged.put_manifest(tmp_path / "x", lambda manifest: manifest.update(model="Another"))
    with pytest.raises(BundleError, match="it is another bundle"):
        edit_compile.load(tmp_path / "x", engine="torch", digest=index(BUNDLES / of)[name].digest)


@pytest.mark.filterwarnings("ignore:.*has no manifest.sha256")
def test_a_bundle_from_before_digests_gets_one_when_it_is_saved_anew(tmp_path: Path) -> None:
    place, record = BUNDLES / BEFORE_DIGESTS / "routed", index(BUNDLES / BEFORE_DIGESTS)["routed"]
    with pytest.warns(RuntimeWarning, match=r"no manifest\.sha256.*save it anew"):
        model = edit_compile.load(place, engine="torch")
    digest = model.save(tmp_path / "x")
    inputs, gave = recorded(BUNDLES / BEFORE_DIGESTS, "routed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = edit_compile.load(tmp_path / "x", engine="torch", digest=digest)
    torch.testing.assert_close(given_by(again, record, inputs)["policy.output.3"], gave["policy.output.3"])


def test_the_format_is_what_this_version_keeps_bundles_of() -> None:
    folder = BUNDLES / version()
    assert folder.exists(), f"no bundles of version {version()} are kept: run python -m tests.data.make"
    assert manifest_format() == json.loads((folder / FORMAT).read_text()), WHAT_TO_DO.format(version())
    schemas = {json.loads((folder / name / "manifest.json").read_text())["schema"] for name in index(folder)}
    assert schemas == {SCHEMA}, WHAT_TO_DO.format(version())


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_another_schema_is_refused_with_what_to_do(schema: int, tmp_path: Path) -> None:
    shutil.copytree(BUNDLES / version() / "onnx", tmp_path / "x")
    forged.put_manifest(tmp_path / "x", lambda manifest: manifest.update(schema=schema))
    with pytest.raises(BundleError, match=rf"schema version {schema}, this edit_compile reads {SCHEMA}: take the one"):
        edit_compile.load(tmp_path / "x", engine="torch")


def test_bundles_are_made_the_same_each_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.data.make import make; make(Path(sys.argv[1]), ('onnx',))"
    for number in range(2):
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / str(number))]
        (tmp_path / str(number)).mkdir()
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    first, second = (index(tmp_path / str(number))["onnx"].digest for number in range(2))
    assert first == second


def test_bundles_of_a_release_stay_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLES.rglob("*") if path.is_file()) < 600 << 10
