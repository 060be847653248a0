"""MLP sites: what must be found, what must not, and the reasons given."""

from __future__ import annotations

import pytest
import torch

from passes.graphs.graph import BlockGraph, Slot
from passes.mlp.sites import find_sites
from tests import mlps
from tests.blocks import hiddens, written

aten = torch.ops.aten
STATE = mlps.STATE
TWO = {"w1": (12, 8), "w2": (8, 12)}


def mlp(x, w1, w2, act=aten.gelu.default):
    return aten.linear.default(act(aten.linear.default(x, w1)), w2)


def reason(block: BlockGraph, weight: str = "w2") -> str:
    """Why the contraction of `weight` is no site; fails where there is a site."""
    sites, report = find_sites(block)
    assert not sites
    return next(refusal.reason for refusal in report.refused if refusal.where == weight)


@pytest.mark.parametrize("name", sorted(set(mlps.ALL) - {"two_into_one"}))
def test_one_site_of_the_right_size(name: str) -> None:
    assert hiddens(mlps.ALL[name](12)) == [12]


def test_slots_of_a_packed_gate() -> None:
    site = find_sites(mlps.geglu_packed(12))[0][0]
    assert set(site.slots) == {
        Slot("w1", 0, 0, 12),
        Slot("w1", 0, 12, 12),
        Slot("b1", 0, 0, 12),
        Slot("b1", 0, 12, 12),
        Slot("w2", 1, 0, 12),
    }
    assert site.contractions == (Slot("w2", 1, 0, 12),)
    assert dict(site.weight_names) == {"w1": "w1", "b1": "b1", "w2": "w2"}


def test_slots_beside_attention_are_only_the_hidden_ones() -> None:
    block = mlps.fused(12)
    (site,), report = find_sites(block)
    assert {(slot.weight, slot.start) for slot in site.slots} == {
        ("w1", 24),
        ("w1", 36),
        ("b1", 24),
        ("b1", 36),
        ("w2", 8),
    }
    assert any(r.where == "w2" and "scaled_dot_product_attention" in r.reason for r in report.refused)


def test_two_mlps_in_one_projection_stay_two() -> None:
    one, two = find_sites(mlps.two_into_one(12))[0]
    assert (one.hidden, two.hidden) == (13, 12)
    assert {(slot.weight, slot.start) for slot in one.contractions} == {("w2", 0), ("w3", 0)}
    assert [(slot.weight, slot.start) for slot in two.contractions] == [("w2", 13)]


def test_shared_weights_make_one_site() -> None:
    (site,), _ = find_sites(mlps.shared(12))
    assert len(site.slots) == 3


def test_no_site_without_tokens() -> None:
    def block(w1, w2, x, time):
        return x + aten.unsqueeze.default(mlp(time, w1, w2), 1)

    assert "carry no tokens" in reason(written(block, TWO, {**STATE, "time": (3, 8)}))


def test_no_site_without_tokens_even_with_a_token_axis_of_one() -> None:
    def block(w1, w2, x, time):
        return x + mlp(aten.unsqueeze.default(time, 1), w1, w2)

    assert "carry no tokens" in reason(written(block, TWO, {**STATE, "time": (3, 8)}))


def test_no_site_in_a_modulation() -> None:
    def block(w, x, time):
        parts = aten.split.Tensor(aten.linear.default(aten.silu.default(time), w), 8, -1)
        return x * aten.unsqueeze.default(parts[0], 1) + aten.unsqueeze.default(parts[1], 1)

    assert "input time" in reason(written(block, {"w": (16, 8)}, {**STATE, "time": (3, 8)}), "w")


def test_no_site_through_attention_even_with_an_activation() -> None:
    def block(wv, w2, x):
        value = aten.silu.default(aten.linear.default(x, wv))
        return x + aten.linear.default(aten.scaled_dot_product_attention.default(x, x, value), w2)

    block_graph = written(block, {"wv": (12, 8), "w2": (8, 12)}, STATE)
    assert "scaled_dot_product_attention" in reason(block_graph)


@pytest.mark.parametrize("affine", [False, True])
def test_no_site_with_a_norm_over_hidden_channels(affine: bool) -> None:
    def block(w1, w2, scale, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(aten.layer_norm.default(hidden, [12], scale if affine else None), w2)

    assert "layer_norm" in reason(written(block, {**TWO, "scale": (12,)}, STATE))


def test_no_site_when_a_norm_over_hidden_channels_branches_off() -> None:
    def block(w1, w2, w3, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(hidden, w2) + aten.linear.default(aten.rms_norm.default(hidden, [12]), w3)

    assert "normalised" in reason(written(block, {**TWO, "w3": (8, 12)}, STATE))


@pytest.mark.parametrize("op", [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default])
def test_no_site_with_a_reduction_over_hidden_channels(op) -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(hidden / op(hidden, [-1], True), w2)

    assert "reduced over" in reason(written(block, TWO, STATE))


def test_reduction_over_tokens_is_harmless() -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(hidden - aten.mean.dim(hidden, [1], True), w2)

    assert hiddens(written(block, TWO, STATE)) == [12]


def test_no_site_with_a_softmax_over_hidden_channels() -> None:
    def block(w1, w2, x):
        return x + aten.linear.default(aten.softmax.int(aten.gelu.default(aten.linear.default(x, w1)), -1), w2)

    assert "softmax" in reason(written(block, TWO, STATE))


def test_no_site_when_the_hidden_tensor_is_an_output() -> None:
    def block(w1, w2, x, y):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(hidden, w2), hidden

    assert "output of the block" in reason(written(block, TWO, {**STATE, "y": (3, 5, 12)}, (0, 1)))


def test_no_site_when_hidden_channels_meet_a_state() -> None:
    def block(w1, w2, x, y):
        hidden = aten.gelu.default(aten.linear.default(x, w1)) + y
        return x + aten.linear.default(hidden, w2), y

    assert "input y" in reason(written(block, TWO, {**STATE, "y": (3, 5, 12)}, (0, 1)))


def test_no_site_with_weights_used_elsewhere() -> None:
    def block(w1, w2, x):
        return x + mlp(x, w1, w2) + aten.sum.default(w1)

    assert "sum" in reason(written(block, TWO, STATE))


def test_no_site_with_hidden_weights_tied_to_the_state() -> None:
    def tied(w, x):
        return x + aten.linear.default(aten.gelu.default(aten.linear.default(x, w)), w)

    assert "input x" in reason(written(tied, {"w": (8, 8)}, STATE), "w")


def test_no_site_with_a_product_of_two_activations() -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        mixed = aten.matmul.default(hidden, aten.matmul.default(aten.transpose.int(hidden, 1, 2), hidden))
        return x + aten.linear.default(mixed, w2)

    assert "matmul" in reason(written(block, TWO, STATE))


def test_no_site_when_a_view_splits_hidden_channels() -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        heads = aten.view.default(aten.view.default(hidden, [3, 5, 3, 4]) * 2.0, [3, 5, 12])
        return x + aten.linear.default(heads, w2)

    assert "view" in reason(written(block, TWO, STATE))


def test_no_site_without_an_activation() -> None:
    def block(w1, w2, x):
        return x + aten.linear.default(aten.linear.default(x, w1), w2)

    assert "no activation" in reason(written(block, TWO, STATE))


def test_no_site_with_an_operator_without_a_rule() -> None:
    def block(w1, w2, x):
        return x + aten.linear.default(aten.flip.default(aten.gelu.default(aten.linear.default(x, w1)), [-1]), w2)

    assert "flip" in reason(written(block, TWO, STATE))


def test_no_site_with_a_stepped_slice() -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(aten.slice.Tensor(hidden, 2, 0, 12, 2), w2)

    assert "slice" in reason(written(block, {"w1": (12, 8), "w2": (8, 6)}, STATE))


def test_no_site_when_neighbours_are_tied_to_each_other() -> None:
    def block(w1, w2, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(aten.slice.Tensor(hidden, 2, 0, 11) * aten.slice.Tensor(hidden, 2, 1, 12), w2)

    assert "tied to each other" in reason(written(block, {"w1": (12, 8), "w2": (8, 11)}, STATE))


def test_a_linear_is_not_narrowed_along_both_dimensions() -> None:
    def block(w1, w2, w3, x):
        hidden = aten.gelu.default(aten.linear.default(x, w1))
        return x + aten.linear.default(aten.gelu.default(aten.linear.default(hidden, w2)), w3)

    sites, report = find_sites(written(block, {"w1": (12, 8), "w2": (16, 12), "w3": (8, 16)}, STATE))
    assert [site.hidden for site in sites] == [12]
    assert [r.where for r in report.refused if "two dimensions" in r.reason] == ["w3"]


def test_a_grouped_convolution_is_no_place_to_narrow() -> None:
    def block(w1, w2, w3, x):
        pixels = aten.gelu.default(aten.conv2d.default(x, w1))
        return x + aten.conv2d.default(aten.conv2d.default(pixels, w2, None, [1, 1], [0, 0], [1, 1], 4), w3)

    shapes = {"w1": (12, 8, 1, 1), "w2": (12, 3, 1, 1), "w3": (8, 12, 1, 1)}
    assert "conv2d" in reason(written(block, shapes, {"x": (3, 8, 4, 4)}), "w3")


def test_the_report_names_what_was_found() -> None:
    _, report = find_sites(mlps.gelu(12))
    assert report.done == ("12 hidden channels from w1, b1 to w2",)
    assert [refusal.where for refusal in report.refused] == ["w1"]
