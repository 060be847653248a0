"""The activation of a model's MLPs, exchanged in the model itself."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional as F

from edit_compile.elastic.activation import set_activation
from edit_compile.elastic.layout import ElasticError


class Two(nn.Module):
    """Two MLPs of the form that diffusers gives them."""

    def __init__(self, kind: str = "gelu-approximate") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = FeedForward(8, activation_fn=kind), FeedForward(8, activation_fn=kind)


@torch.no_grad()
def test_the_function_changes_and_nothing_else() -> None:
    model, x = Two(), torch.randn(3, 5, 8)
    names, up, down = model.state_dict().keys(), model.text.net[0].proj, model.text.net[2]
    assert set_activation(model, "quick_gelu") == 2
    assert model.state_dict().keys() == names
    assert model.text.net[0].proj is up
    hidden = up(x)
    torch.testing.assert_close(model.text(x), down(hidden / (1 + torch.exp(-1.702 * hidden))))
    assert set_activation(model, "silu") == 2
    torch.testing.assert_close(model.text(x), down(F.silu(hidden)))


def test_the_quick_one_is_that_of_diffusers() -> None:
    model, other, x = Two(), Two("geglu-approximate"), torch.randn(3, 5, 8)
    set_activation(model, "quick_gelu")
    torch.testing.assert_close(model.image(x), other.image(x))


def test_blocks_with_different_activations_look_different() -> None:
    one, other = Two(), Two()
    set_activation(one, "quick_gelu")
    set_activation(other, "silu")
    assert one.image.net[0].extra_repr() != other.image.net[0].extra_repr()


@pytest.mark.parametrize("name", ["no_such", "_canonical_mask"])
def test_an_unknown_activation_is_refused(name: str) -> None:
    with pytest.raises(ElasticError, match=name):
        set_activation(Two(), name)


@pytest.mark.parametrize("kind", ["geglu", "swiglu"])
def test_gated_mlps_have_no_activation_to_exchange(kind: str) -> None:
    with pytest.raises(ElasticError, match="Two has no MLP"):
        set_activation(Two(kind), "quick_gelu")
