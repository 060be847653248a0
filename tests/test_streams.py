"""Which states an MLP writes to, and which MLPs are left when only some states may be narrowed."""

from __future__ import annotations

import pytest
import torch

from passes.graphs.graph import BlockGraph
from passes.mlp.sites import find_sites
from passes.mlp.written_states import StreamError, check_names, choose_sites, written_states
from tests.blocks import written

aten = torch.ops.aten
WEIGHTS = {"w1": (12, 8), "w2": (8, 12), "v1": (16, 8), "v2": (8, 16)}
INPUTS = {"image": (3, 5, 8), "text": (3, 4, 8)}


def mlp(x, up, down):
    return aten.linear.default(aten.gelu.default(aten.linear.default(x, up)), down)


def apart() -> BlockGraph:
    """An MLP of 12 channels for each image token, one of 16 for each text token; text comes out first."""

    def block(w1, w2, v1, v2, image, text):
        return text + mlp(text, v1, v2), image + mlp(image, w1, w2)

    return written(block, WEIGHTS, INPUTS, states=(1, 0))


def read_on() -> BlockGraph:
    """As `apart`, but the image goes on to read the text."""

    def block(w1, w2, v1, v2, image, text):
        text = text + mlp(text, v1, v2)
        image = image + mlp(image, w1, w2)
        return text, image + aten.scaled_dot_product_attention.default(image, text, text)

    return written(block, WEIGHTS, INPUTS, states=(1, 0))


def sites(block: BlockGraph) -> dict[int, tuple[str, ...]]:
    """What each MLP writes to, by its hidden channels."""
    return {site.hidden: written_states(block, site) for site in find_sites(block)[0]}


def narrowed(block: BlockGraph, *names: str) -> list[int]:
    """Hidden channels of the MLPs that are left."""
    return [site.hidden for site in choose_sites(block, find_sites(block)[0], names)[0]]


def test_an_mlp_writes_to_the_state_it_is_added_to() -> None:
    assert sites(apart()) == {16: ("text",), 12: ("image",)}


def test_an_mlp_that_others_read_writes_to_these_too() -> None:
    assert sites(read_on()) == {16: ("text", "image"), 12: ("image",)}


def test_an_mlp_over_joined_streams_writes_to_both() -> None:
    def block(w1, w2, image, text):
        joined = aten.cat.default([text, image], 1)
        after = joined + mlp(joined, w1, w2)
        return aten.slice.Tensor(after, 1, 0, 4), aten.slice.Tensor(after, 1, 4, 9)

    joint = written(block, {"w1": (12, 8), "w2": (8, 12)}, INPUTS, states=(1, 0))
    assert sites(joint) == {12: ("text", "image")}
    assert narrowed(joint, "image") == []
    assert narrowed(joint, "image", "text") == [12]


def test_only_mlps_of_the_named_states_are_left() -> None:
    assert narrowed(apart(), "image") == [12]
    assert narrowed(apart(), "text") == [16]
    assert sorted(narrowed(apart(), "text", "image")) == [12, 16]
    assert narrowed(read_on(), "text") == []
    found = find_sites(apart())[0]
    assert choose_sites(apart(), found, None)[0] == found


def test_what_is_left_in_full_is_reported_with_its_reason() -> None:
    _, report = choose_sites(read_on(), find_sites(read_on())[0], ["text"])
    reasons = {refusal.where: refusal.reason for refusal in report.refused}
    assert reasons["v2"] == "is kept in full: it writes to text, image"


def test_a_name_that_no_block_has_is_refused() -> None:
    check_names([apart()], ["text"])
    check_names([apart()], None)
    with pytest.raises(StreamError, match=r"'sound'.*there are text, image"):
        check_names([apart()], ["text", "sound"])
