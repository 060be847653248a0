"""The catalogue: no class of diffusers is forgotten, and every one compiles and agrees with eager."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import pytest
from diffusers.models import transformers

import edit_compile
from benchmarks.models import DOCUMENT, flops_left, kind_of
from passes.observe.discover import DiscoveryError
from runtime.base.errors import EngineError
from tests.catalogue import ENGINES, check
from tests.zoo import CASES, LEFT_OUT
from tests.zoo.video_2 import animate2_bare

QUICK = ("WanTransformer3DModel", "PriorTransformer")
TORCH_ONLY = ("SanaWMTransformer3DModel",)
"""Classes that compute in bfloat16 inside, whatever their dtype."""


def all_classes() -> set[str]:
    """Model classes defined in diffusers.models.transformers."""
    found = set()
    for entry in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{entry.name}")
        for name, value in vars(module).items():
            if (
                inspect.isclass(value)
                and issubclass(value, diffusers.ModelMixin)
                and value.__module__ == module.__name__
            ):
                found.add(name)
    return found


def test_every_class_of_diffusers_has_a_case_or_a_reason() -> None:
    assert all_classes() == set(CASES) | set(LEFT_OUT)
    assert not set(CASES) & set(LEFT_OUT)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH_ONLY)
def test_a_class_with_bfloat16_inside_is_refused_by_onnxruntime(name: str) -> None:
    with pytest.raises(EngineError, match="Could not find an implementation for Mul"):
        check(name, ("onnxruntime",))


@pytest.mark.slow
def test_a_cache_whose_tensors_cannot_be_seen_is_refused() -> None:
    bare = animate2_bare()
    with pytest.raises(
        DiscoveryError, match=r"kv_cache holds a WanAnimate2KVCache.*give its tensors as a list or dict"
    ):
        edit_compile.compile(bare.model, inputs=bare.inputs, dry_run=True)


def test_the_page_of_models_has_a_row_for_every_case() -> None:
    page = DOCUMENT.read_text()
    assert [name for name in sorted(CASES) if f"| {name} |" not in page] == []


@pytest.mark.parametrize("name", QUICK)
def test_a_class_compiles_and_agrees_with_eager(name: str) -> None:
    checked = check(name, ("torch",))
    assert all(group.sites for group in checked.analysis.groups)
    assert 0.2 < flops_left(checked.manifest) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_class_compiles_for_both_engines(name: str) -> None:
    checked = check(name, ("torch",) if name in TORCH_ONLY else ENGINES)
    assert checked.manifest.blocks
    assert all(kind_of(site) for group in checked.analysis.groups for site in group.sites)
