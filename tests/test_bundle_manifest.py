"""A manifest whose parts do not fit each other is refused when the bundle is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.base.errors import BundleError
from runtime.bundle import files as bundle
from tests import forged, programs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "model.edit"
    bundle.save(programs.make(("double", "single")), path)
    return path


def put(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return change


CHANGES = [
    (put("blocks", 1, "plan", to="triple"), r"blocks\.1.*triple"),
    (put("blocks", 1, "weights", 0, to="nowhere"), r"nowhere.*blocks\.1"),
    (put("blocks", 1, "weights", to=["blocks.1.up"]), r"blocks\.1 has 1 weights"),
    (put("blocks", 0, "weights", 0, to="blocks.0.mix"), r"blocks\.0\.mix.*too few rows"),
    (put("glues", 0, "file", to="glue/b.pt2"), r"glue a.*glue/b\.pt2"),
    (put("glues", 0, "weights", 0, to="nowhere"), "nowhere.*glue a"),
    (put("glues", 0, "inputs", 0, "dtype", to="float33"), "hidden_states.*float33"),
    (put("glues", 0, "costs", 0, "plan", to="triple"), "cost of plan 'triple'"),
    (put("plans", 0, "states", 1, to=9), "plan double has no input 9"),
    (put("plans", 0, "states", to=[]), "plan double has no states"),
    (put("plans", 0, "time", to=-1), "plan double has no input -1"),
    (put("plans", 0, "inputs", 0, "batch_dim", to=3), "hidden.*no dimension 3"),
    (put("plans", 0, "inputs", 0, "dtype", to="load"), "'load'"),
    (put("plans", 1, "buckets", to=[[[None, 6, 8]]]), "plan single was compiled for the shapes"),
    (put("plans", 1, "buckets", to=[[[None, None, 8]]]), "which its inputs do not have"),
    (put("plans", 1, "buckets", to=[[]]), "which its inputs do not have"),
    (put("plans", 0, "variants", 0, "rows", to=[4]), "4 weights"),
    (put("plans", 0, "variants", to=[]), "widths of plan double"),
    (put("plans", 0, "variants", 0, "width", to=0.8), "widths of plan double"),
    (put("dtype", to="float33"), "the model.*float33"),
    (put("widths", to=[0.5, 0.25, 1.0]), "widths of the manifest"),
    (put("router", "activation", to="dropout"), "dropout"),
    (put("router", "time_activation", to="dropout"), "time_activation 'dropout'"),
    (put("router", "modulation", to="none at all"), "none at all"),
    (put("router", "widths", to=[0.25, 0.5]), "widths of the router"),
    (put("router", "token_stride", to=0), "token_stride 0"),
    (put("router", to=None), "no router is described, or none"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told for _, told in CHANGES])
def test_what_does_not_fit_is_named(saved: Path, change: Callable[[Any], None], told: str) -> None:
    whole = (saved / "manifest.json").read_text()
    forged.put_manifest(saved, change)
    try:
        with pytest.raises(BundleError, match=told):
            bundle.load(saved)
    finally:
        (saved / "manifest.json").write_text(whole)
        forged.seal(saved)
    bundle.load(saved)


def test_a_router_written_before_time_had_an_activation_has_none(saved: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model.edit"
    shutil.copytree(saved, copied)
    forged.put_manifest(copied, lambda manifest: manifest["router"].pop("time_activation"))
    router = bundle.load(copied).manifest.router
    assert router is not None
    assert router.time_activation is None
