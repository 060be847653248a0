"""torch.export without what it prints: its graph so far where the code stops it, symbols whose source it lost, and what
it says of its own code, which nobody here can change.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention import flex_attention

from passes.blocks.composites import without_composites

_talkative = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class StoppedError(Exception):
    """A RuntimeError, its cause, in code that was being exported."""


@contextmanager
def stopping_quietly() -> Iterator[None]:
    """Inside the ``with`` block what stops an export is a StoppedError, for which torch prints no graph."""
    try:
        yield
    except RuntimeError as error:
        raise StoppedError(str(error)) from error


def exported(module: nn.Module, example: Sequence[Tensor], free: Sequence[Any]) -> ExportedProgram:
    """`module` as a graph of plain operators, at the shapes of `example`, with the dimensions in `free` as symbols."""
    _talkative.addFilter(_is_told)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            with _empty_mask_made(example[0].device if example else None):
                program = torch.export.export(module, tuple(example), dynamic_shapes=(tuple(free),), strict=False)
            return without_composites(program)
    finally:
        _talkative.removeFilter(_is_told)


@contextmanager
def _empty_mask_made(device: torch.device | None) -> Iterator[None]:
    """Inside the ``with`` block flex attention that is given no mask has one that was made before it.

    It would make the same one each time, by vmap, of which torch.export leaves what no graph can hold.
    """
    make = flex_attention._create_empty_block_mask
    mask = make(*2 * [torch.empty(1, device=device)])
    flex_attention._create_empty_block_mask = lambda query, key: mask
    try:
        yield
    finally:
        flex_attention._create_empty_block_mask = make


def why(error: Exception) -> str:
    """What stopped an export, in a line."""
    cause = error.__cause__ if isinstance(error, StoppedError) else error
    return next(iter(str(error).strip().splitlines()), type(cause).__name__)


def _is_told(record: logging.LogRecord) -> bool:
    return "Unable to find user code" not in record.msg
