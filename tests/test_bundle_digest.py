"""The digest of a bundle: what it covers, and what a load that asks for one refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import edit_compile
from edit_compile import BundleError, RoutingPolicy
from runtime.bundle import files as bundle
from tests import forged, programs
from tests.test_cli import run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.edit"
    bundle.save(programs.make(("single",)), path)
    return path


def test_it_is_the_sha256_of_the_manifest(saved: Path) -> None:
    data = (saved / "manifest.json").read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert edit_compile.bundle_digest(saved) == digest
    assert edit_compile.load(saved, engine="torch", digest=digest).program.digest == digest
    assert (saved / "manifest.sha256").read_text() == f"{digest[7:]}  manifest.json\n"
    assert digest in run("inspect", saved)


def test_another_bundle_is_refused(saved: Path, tmp_path: Path) -> None:
    digest = edit_compile.bundle_digest(saved)
    bundle.save(programs.make(("single",), seed=1), saved)
    with pytest.raises(BundleError, match=rf"has the digest sha256:.*, not {digest}"):
        edit_compile.load(saved, engine="torch", digest=digest)
    edit_compile.load(saved, engine="torch", digest=edit_compile.bundle_digest(saved))


@pytest.mark.parametrize("digest", ["", "sha256:", "md5:00", "0" * 64, "sha256:" + "A" * 64])
def test_what_is_no_digest_is_called_so(saved: Path, digest: str) -> None:
    with pytest.raises(BundleError, match="has the form sha256:"):
        edit_compile.load(saved, digest=digest)


def test_a_change_of_the_manifest_is_noticed_without_a_digest(saved: Path) -> None:
    place = saved / "manifest.json"
    place.write_text(place.read_text().replace('"margin": 0.1', '"margin": 0.2'))
    with pytest.raises(BundleError, match=r"manifest\.json is not what was written"):
        bundle.load(saved)
    forged.seal(saved)
    bundle.load(saved)


def test_a_bundle_from_before_there_were_digests_loads_with_a_warning(saved: Path) -> None:
    (saved / "manifest.sha256").unlink()
    with pytest.warns(RuntimeWarning, match=r"no manifest\.sha256"):
        edit_compile.load(saved, engine="torch")


def test_the_same_program_has_the_same_digest_and_a_tier_makes_another(saved: Path, tmp_path: Path) -> None:
    bundle.save(programs.make(("single",)), tmp_path / "twin.edit")
    assert edit_compile.bundle_digest(tmp_path / "twin.edit") == edit_compile.bundle_digest(saved)
    compiled = edit_compile.load(saved, engine="torch")
    compiled.add_tier("fast", RoutingPolicy(threshold=0.7))
    compiled.save(tmp_path / "twin.edit")
    assert edit_compile.bundle_digest(tmp_path / "twin.edit") != edit_compile.bundle_digest(saved)


def test_engines_have_a_digest_of_their_own(saved: Path) -> None:
    own = edit_compile.bundle_digest(saved)
    with pytest.raises(BundleError, match="holds no engines"):
        edit_compile.bundle_digest(saved, engines=True)
    place = saved / "engines" / "somewhere" / "single-w100.engine"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"native code")
    built = edit_compile.bundle_digest(saved, engines=True)
    assert edit_compile.bundle_digest(saved) == own != built
    assert built in run("inspect", saved)
    for digest in (own, built):
        edit_compile.load(saved, engine="torch", digest=digest)
    with pytest.raises(BundleError, match="which its digest does not cover"):
        edit_compile.load(saved, engine="tensorrt", digest=own)
    place.write_bytes(b"other code")
    with pytest.raises(BundleError, match="it is another bundle"):
        edit_compile.load(saved, engine="torch", digest=built)


def test_names_are_shown_as_they_are(saved: Path) -> None:
    forged.put_manifest(saved, lambda manifest: manifest["plans"][0].update(kind="[/x]"))
    forged.put_manifest(saved, lambda manifest: manifest.update(model="[red]"))
    text = run("inspect", saved)
    assert "[/x]" in text and "[red]" in text


def test_a_failure_inside_a_graph_names_its_file(saved: Path) -> None:
    from tests.torture.mutations import with_graph

    def narrow(graph: dict) -> None:
        nodes = graph["graph_module"]["graph"]["nodes"]
        node = next(node for node in nodes if node["target"].startswith("torch.ops.aten.relu"))
        node["target"] = "torch.ops.aten.squeeze.dim"
        node["inputs"].append({"name": "dim", "arg": {"as_int": 40}, "kind": 1})

    for name in sorted((saved / "plans").glob("*.pt2")):
        with_graph(saved, f"plans/{name.name}", narrow)
    compiled = edit_compile.load(saved, engine="torch")
    with pytest.raises(edit_compile.EngineError, match=r"model\.edit/plans/single-w\d+\.pt2 fails in this call"):
        compiled(**programs.inputs())
