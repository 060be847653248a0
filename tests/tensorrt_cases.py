"""Programs and bundles to build TensorRT engines of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import onnx.parser
import torch

from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.bundle.spec import Plan
from tests import programs

ONNX_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float"}


@lru_cache
def plan_files(precision: str) -> Mapping[str, bytes]:
    """The hand-made plans' ONNX in `precision`, at every width."""
    files = {}
    for width in programs.WIDTHS:
        rows = int(width * programs.H)
        for name, form in (("double", programs.DOUBLE_ONNX), ("single", programs.SINGLE_ONNX)):
            text = form.replace("half = Constant", "wide = Constant").replace(
                "halved =", "half = CastLike (wide, hidden)\n  halved ="
            )
            for symbol, size in (("h,", f"{rows},"), ("[h]", f"[{rows}]"), ("D]", f"{programs.D}]")):
                text = text.replace(symbol, size)
            text = text.replace("[E,", f"[{programs.E},").replace(",E]", f",{programs.E}]")
            text = text.replace("float[", f"{ONNX_TYPES[precision]}[")
            files[f"plans/{name}-w{round(100 * width):03d}.onnx"] = onnx.parser.parse_model(text).SerializeToString()
    return files


def program(precision: str = "float16", kinds: tuple[str, ...] = ("double", "single")) -> Program:
    """A program whose plans are in `precision`; made for being built, it does not run."""
    made = programs.make(kinds)
    dtype = getattr(torch, precision)
    return replace(
        made,
        manifest=replace(
            made.manifest, dtype=precision, plans=tuple(_typed(plan, precision) for plan in made.manifest.plans)
        ),
        weights={
            name: weight if name.startswith("glue.") else weight.to(dtype) for name, weight in made.weights.items()
        },
        files={
            name: plan_files(precision).get(name, data)
            for name, data in made.files.items()
            if precision == "float32" or not name.startswith("plans/") or name.endswith(".onnx")
        },
    )


def saved(folder: Path, precision: str = "float16", kinds: tuple[str, ...] = ("double", "single")) -> Path:
    """The bundle of `program` in `folder`."""
    path = folder / "model.edit"
    bundle.save(program(precision, kinds), path)
    return path


def _typed(plan: Plan, precision: str) -> Plan:
    return replace(plan, inputs=tuple(replace(given, dtype=precision) for given in plan.inputs))
