"""Models whose blocks see shapes that no argument shows, and models that give a list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edit_compile
from runtime.base.errors import InnerShapeError
from runtime.face.transformer import CompiledTransformer
from tests.models import PlainDiT, noise, randomised

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* has no routers:UserWarning")]


class Trimmed(PlainDiT):
    """Cuts its text to the longest prompt of the batch, so that a mask's values decide on shapes."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        return super().forward(x, t, words[:, :longest], mask[:, :longest])


class Listing(PlainDiT):
    """Takes and gives one tensor per sample, in a tuple or as an output with names."""

    def forward(self, x: list[Tensor], t: Tensor, words: Tensor, return_dict: bool = True) -> object:
        samples = list(super().forward(torch.stack(x), t, words).unbind())
        return {"sample": samples} if return_dict else (samples,)


def called(words: int) -> dict[str, Tensor]:
    mask = torch.arange(5)[None] < words
    return {"x": noise(1, 9, 4), "t": torch.tensor([0.9]), "words": noise(1, 5, 12, seed=2), "mask": mask}


@torch.no_grad()
def test_a_call_whose_values_give_blocks_other_shapes_is_traced_anew() -> None:
    model = randomised(Trimmed())
    compiled = edit_compile.compile(model, (1.0,), engine="torch")
    compiled(**called(5))
    fixed = CompiledTransformer(compiled.program, "torch", host=compiled._host)
    for words in (5, 3, 4):
        torch.testing.assert_close(compiled(**called(words)), model(**called(words)), rtol=1e-4, atol=1e-4)
    assert len(compiled.program.manifest.glues) == 2
    with pytest.raises(InnerShapeError, match="compile with inputs of both kinds"):
        fixed(**called(3))


@torch.no_grad()
def test_a_list_of_samples_comes_back_as_a_list() -> None:
    model = randomised(Listing())
    inputs = {"x": [noise(9, 4), noise(9, 4, seed=3)], "t": torch.tensor([0.9, 0.3]), "words": noise(2, 5, 12)}
    compiled = edit_compile.compile(model, (1.0,), inputs=inputs, engine="torch")
    assert compiled.program.manifest.glues[0].file
    (expected,) = model(**inputs, return_dict=False)
    for found in (compiled(**inputs).sample, compiled(*inputs.values(), return_dict=False)[0]):
        assert isinstance(found, list)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
