"""A program does not grow by a model that is another one by now, whatever of it has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import CompileError
from tests.models import PlainDiT, noise, randomised, tiny_plain
from tests.test_growth import agree, lazily, opened

pytestmark = pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")

Change = Callable[[Any], None]


class Tables(PlainDiT):
    """Holds tensors and numbers as modules may: as attributes, and in lists, tuples and dicts of them."""

    share = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.table = noise(32, seed=3)
        self.tables = {"deep": [noise(32, seed=4)], "pair": (noise(32, seed=5), 0.5)}
        self.clock.scale = 1.0
        self.mode: str | None = None
        self.act, self.steps = torch.tanh, np.ones(1, dtype=np.float32)
        self.aside = [nn.Linear(32, 32)]

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        t = self.act(t) * self.share * float(self.steps[0])
        vector = self.clock(t[:, None].expand(-1, self.dim)) * self.clock.scale + self.table
        other, share = self.tables["pair"]
        vector = self.aside[0](vector) + self.tables["deep"][0] + other * share + (1 if self.mode == "odd" else 0)
        x, words = self.embed(x), self.text(words)
        for layer in self.layers:
            x = layer(x, words, vector, mask)
        return self.head(x)


def written(model: Any) -> None:
    model.table.mul_(2)


def replaced(model: Any) -> None:
    model.table = 2 * model.table


def replaced_in_its_place(model: Any) -> None:
    """The memory of the old one may be given to the new one."""
    del model.table
    model.table = torch.randn(32)


def in_a_list(model: Any) -> None:
    model.tables["deep"][0] = noise(32, seed=9)


def in_a_tuple(model: Any) -> None:
    model.tables["pair"] = (model.tables["pair"][0] + 1, 0.5)


def number_in_a_tuple(model: Any) -> None:
    model.tables["pair"] = (model.tables["pair"][0], 0.25)


def number(model: Any) -> None:
    model.clock.scale = True


def text(model: Any) -> None:
    model.mode = "odd"


def of_the_class(model: Any) -> None:
    model.share = 3.0


def function(model: Any) -> None:
    model.act = torch.sin


def array(model: Any) -> None:
    model.steps = 2 * model.steps


def forward(model: Any) -> None:
    model.head.forward = lambda x: x[..., :4]


def module_in_a_list(model: Any) -> None:
    model.aside[0].weight.detach().mul_(2)


def hook_before(model: Any) -> None:
    model.head.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def hook_after(model: Any) -> None:
    model.layers[0].register_forward_hook(lambda _, args, output: 2 * output)


CHANGES: list[tuple[Change, str]] = [
    (written, "table"),
    (replaced, "table"),
    (replaced_in_its_place, "table"),
    (in_a_list, "tables.deep.0"),
    (in_a_tuple, "tables.pair.0"),
    (number_in_a_tuple, "tables.pair.1"),
    (number, "clock.scale"),
    (text, "mode"),
    (of_the_class, "share"),
    (function, "act"),
    (array, "steps"),
    (forward, "head.forward"),
    (module_in_a_list, "aside.0.weight"),
    (hook_before, "head._forward_pre_hooks"),
    (hook_after, "layers.0._forward_hooks"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES, ids=lambda one: getattr(one, "__name__", ""))
def test_changed_attributes_are_an_error_and_nothing_is_added(change: Change, name: str) -> None:
    model, inputs = randomised(Tables()), tiny_plain()[1]
    compiled = lazily(model, inputs=inputs)
    agree(compiled, model, tiny_plain(tokens=7)[1])
    program = compiled.program
    change(model)
    with pytest.raises(CompileError, match=rf"changed since it was compiled \(first: {name}\): compile it anew"):
        compiled(**tiny_plain(tokens=8)[1])
    assert compiled.program is program
    with pytest.warns(RuntimeWarning, match=rf"\(first: {name}\): what runs is the model as it was"):
        compiled(**inputs)


class Keeping(Tables):
    """Counts its calls, and keeps a table for every length that it saw, and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.kept: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        if x.shape[1] not in self.kept:
            self.kept[x.shape[1]] = torch.arange(x.shape[1])[:, None] / 10
        self.last = self.kept[x.shape[1]]
        return super().forward(x + self.last, t, words, mask)


def test_what_a_model_keeps_itself_is_no_change() -> None:
    model = randomised(Keeping())
    compiled = opened(model, 3)
    for tokens in (9, 7, 9):
        agree(compiled, model, tiny_plain(tokens=tokens)[1])
    with torch.no_grad():
        model(**tiny_plain(tokens=6)[1])
    agree(compiled, model, tiny_plain(tokens=6)[1])
    assert len(compiled.program.manifest.glues) == 3


@pytest.mark.filterwarnings("ignore:the routers of:UserWarning")
def test_hooks_of_this_package_are_no_change(tmp_path: Path) -> None:
    model, inputs = randomised(Tables()), tiny_plain()[1]
    elastic = edit_compile.elasticize(model, inputs)
    compiled = lazily(elastic, inputs=inputs)
    with edit_compile.record(model, tmp_path):
        agree(compiled, model, inputs)
    agree(compiled, model, tiny_plain(tokens=7)[1])


def test_what_is_set_to_what_it_was_is_no_change() -> None:
    model, inputs = randomised(Tables()), tiny_plain()[1]
    compiled = opened(model, 3)
    agree(compiled, model, inputs)
    model.clock.scale, model.mode = 1.0, None
    model.table = model.table
    model.train().eval()
    nn.Module.requires_grad_(model, False)
    agree(compiled, model, tiny_plain(tokens=7)[1])
