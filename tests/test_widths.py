"""Each width of a block equals the block whose hidden channels beyond the width are masked (equation 13)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.graphs.graph import BlockGraph, MlpSite, PlanGraph
from passes.mlp.sites import find_sites
from passes.mlp.weights import at_widths, site_rows
from tests import mlps
from tests.blocks import exported, masked, random_tensors, run_variant, written
from tests.sessions import open_session

aten = torch.ops.aten
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def plan_of(block: BlockGraph, widths=WIDTHS, alignment: int = 1) -> tuple[PlanGraph, tuple[MlpSite, ...]]:
    sites, _ = find_sites(block)
    return at_widths(block, sites, widths, alignment)[0], sites


def distance(plan: PlanGraph, sites: tuple[MlpSite, ...], alignment: int = 1, seed: int = 0) -> float:
    """Largest difference of any width from its masked reference, relative to the reference's magnitude."""
    weights, inputs = random_tensors(plan.block, seed)
    worst = 0.0
    with torch.no_grad():
        for index, width in enumerate(plan.widths):
            narrow = run_variant(plan, index, weights, inputs)
            reference = plan.block.module(*masked(sites, weights, width, alignment), *inputs)
            for one, other in zip(narrow, reference, strict=True):
                assert one.shape == other.shape
                worst = max(worst, float((one - other).abs().max() / other.abs().max()))
    return worst


@pytest.mark.parametrize("name", sorted(mlps.ALL))
def test_widths_equal_the_masked_block(name: str) -> None:
    plan, sites = plan_of(mlps.ALL[name](12))
    assert sites
    assert distance(plan, sites) < 2e-6


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(mlps.ALL)),
    st.integers(2, 37),
    st.floats(0.001, 0.999),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 2**16),
)
def test_any_width_of_any_size(name: str, hidden: int, width: float, alignment: int, seed: int) -> None:
    plan, sites = plan_of(mlps.ALL[name](hidden), (width, 1.0), alignment)
    assert sites
    assert distance(plan, sites, alignment, seed) < 5e-6


@given(st.integers(1, 20000), st.floats(1e-3, 1), st.sampled_from([1, 8, 64]))
def test_rows_are_the_smallest_aligned_number_that_reaches_the_width(hidden: int, width: float, alignment: int) -> None:
    rows = site_rows(hidden, width, alignment)
    assert 1 <= rows <= hidden
    assert rows >= width * hidden - 1e-6
    assert rows == hidden or (rows % alignment == 0 and rows - alignment < width * hidden)


def test_rows_do_not_suffer_from_binary_fractions() -> None:
    assert site_rows(30, 0.1) == 3
    assert site_rows(10, 0.25) == 3
    assert site_rows(12288, 0.75, 64) == 9216


class TestPieces:
    def test_every_width_is_a_prefix_of_the_same_memory(self) -> None:
        plan, _ = plan_of(mlps.fused(12))
        rows = {piece.name: piece.rows for piece in plan.pieces}
        assert rows["w1_piece0"] == (24, 24, 24, 24)
        assert rows["w1_piece1"] == rows["w1_piece2"] == rows["b1_piece2"] == (3, 6, 9, 12)
        assert rows["w2"] == (11, 14, 17, 20)

    def test_pieces_hold_every_number_once(self) -> None:
        for make in mlps.ALL.values():
            plan, _ = plan_of(make(12))
            weights, _ = random_tensors(plan.block)
            for name, weight in weights.items():
                cut = [piece.cut(weight) for piece in plan.pieces if piece.source == name]
                assert sorted(torch.cat([c.flatten() for c in cut]).tolist()) == sorted(weight.flatten().tolist())

    def test_consumers_are_stored_input_channels_first(self) -> None:
        plan, _ = plan_of(mlps.gelu(12))
        piece = next(piece for piece in plan.pieces if piece.source == "w2")
        weight = torch.randn(8, 12)
        assert piece.cut(weight).shape == (12, 8)
        assert torch.equal(piece.cut(weight)[:6], weight[:, :6].T)

    def test_whole_weights_are_not_copied(self) -> None:
        plan, _ = plan_of(mlps.gelu(12))
        weight = torch.randn(12, 8)
        piece = next(piece for piece in plan.pieces if piece.source == "w1")
        assert piece.cut(weight).data_ptr() == weight.data_ptr()

    def test_a_scalar_weight_is_one_row(self) -> None:
        block = written(lambda s, x: aten.mul.Tensor(x, s), {"s": ()}, mlps.STATE)
        plan, _ = at_widths(block, (), (1.0,))
        assert plan.pieces[0].rows == (1,)
        assert plan.pieces[0].cut(torch.tensor(2.0)).shape == (1,)
        x = torch.randn(3, 5, 8)
        assert torch.equal(plan.variants[0](torch.tensor([2.0]), x)[0], 2 * x)


class TestVariants:
    def test_all_share_the_placeholders_of_pieces_then_inputs(self) -> None:
        plan, _ = plan_of(mlps.fused(12))
        expected = [*(piece.name for piece in plan.pieces), *plan.block.inputs]
        for index, variant in enumerate(plan.variants):
            nodes = [node for node in variant.graph.nodes if node.op == "placeholder"]
            assert [node.target for node in nodes] == expected
            sizes = [node.meta["val"].shape[0] for node in nodes][: len(plan.pieces)]
            assert sizes == [piece.rows[index] for piece in plan.pieces]

    def test_a_packed_gate_is_never_joined(self) -> None:
        for make in (mlps.geglu_packed, mlps.swiglu_packed_by_slices, mlps.convolutional):
            plan, _ = plan_of(make(12))
            targets = {str(node.target) for node in plan.variants[0].graph.nodes}
            assert not any("cat" in target or "slice" in target or "split" in target for target in targets)

    def test_the_gelu_graph(self) -> None:
        plan, _ = plan_of(mlps.gelu(12))
        calls = [node.target for node in plan.variants[0].graph.nodes if node.op == "call_function"]
        linear = aten.linear.default
        assert calls == [linear, aten.gelu.default, aten.transpose.int, linear, aten.add.Tensor]

    def test_a_block_without_sites_has_its_full_variant_only(self) -> None:
        block = written(lambda w, x: x + aten.linear.default(x, w), {"w": (8, 8)}, mlps.STATE)
        plan, sites = plan_of(block)
        assert plan.widths == (1.0,)
        assert sites == ()
        assert distance(plan, sites) == 0

    @pytest.mark.parametrize("widths", [(), (0.5,), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0), (0.5, 1.5)])
    def test_widths_must_ascend_to_one(self, widths: tuple[float, ...]) -> None:
        block = mlps.gelu(12)
        with pytest.raises(ValueError, match="ascend"):
            at_widths(block, find_sites(block)[0], widths)

    def test_sites_of_another_block_are_refused(self) -> None:
        with pytest.raises(ValueError, match="would drop"):
            at_widths(mlps.fused(12), find_sites(mlps.geglu_packed(12))[0], WIDTHS)

    def test_the_report_counts_channels(self) -> None:
        block = mlps.two_into_one(12)
        _, report = at_widths(block, find_sites(block)[0], (0.5, 1.0))
        assert report.done[0] == "width 0.5: 7 of 13, 6 of 12 hidden channels"


STREAMS = (torch.randn(3, 7, 32), torch.randn(3, 5, 32), torch.randn(3, 32))


class Fused(nn.Module):
    """A FLUX.2 single block, whose attention and MLP share one projection in and one out."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Flux2SingleTransformerBlock(dim=32, num_attention_heads=2, attention_head_dim=16)

    def forward(self, x, modulation):
        return self.block(x, None, modulation)


class Dit(nn.Module):
    """A DiT block, whose class labels come as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(32, 2, 16, norm_type="ada_norm_zero", num_embeds_ada_norm=10)

    def forward(self, x, labels):
        return self.block(x, timestep=labels, class_labels=labels)


def attention_sizes() -> dict[str, int]:
    return {"dim": 32, "num_attention_heads": 2, "attention_head_dim": 16}


REAL = {
    "flux double": (lambda: FluxTransformerBlock(**attention_sizes()), STREAMS, (1, 0), 2),
    "flux single": (lambda: FluxSingleTransformerBlock(**attention_sizes()), STREAMS, (1, 0), 1),
    "sd3 dual": (
        lambda: JointTransformerBlock(**attention_sizes(), use_dual_attention=True, qk_norm="rms_norm"),
        STREAMS,
        (1, 0),
        2,
    ),
    "flux2 single": (Fused, (STREAMS[0], torch.randn(3, 96)), (0,), 1),
    "dit": (Dit, (STREAMS[0], torch.tensor([1, 2, 3])), (0,), 1),
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_diffusers_blocks(name: str) -> None:
    make, args, states, count = REAL[name]
    torch.manual_seed(0)
    module = make()
    block = exported(module, args, states)
    plan, sites = plan_of(block)
    assert len(sites) == count
    assert all(site.hidden >= 64 for site in sites)
    tensors = dict(module.state_dict())
    weights = {placeholder: tensors[target] for placeholder, target in block.weights.items()}
    for index, width in enumerate(WIDTHS):
        hooks = mask_by_hooks(module, sites, width)
        with torch.no_grad():
            expected = module.eval()(*args)
            states_out = run_variant(plan, index, weights, args)
        for hook in hooks:
            hook.remove()
        expected = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(states_out, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def mask_by_hooks(module: nn.Module, sites: tuple[MlpSite, ...], width: float):
    """Zero the down-projections' inputs beyond the width, on the eager module."""
    hooks = []
    for site in sites:
        for slot in site.contractions:
            keep = torch.ones(module.state_dict()[site.weight_names[slot.weight]].shape[1])
            keep[slot.start + site_rows(site.hidden, width) : slot.start + slot.size] = 0
            owner = module.get_submodule(site.weight_names[slot.weight].rpartition(".")[0])
            hooks.append(owner.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))
    return hooks


def test_a_variant_exports_to_torch_and_onnx_with_any_batch() -> None:
    block = exported(FluxSingleTransformerBlock(**attention_sizes()), STREAMS, (1, 0))
    plan, sites = plan_of(block, (0.5, 1.0))
    weights, inputs = random_tensors(block)
    pieces = [piece.cut(weights[piece.source])[: piece.rows[0]] for piece in plan.pieces]
    free = (*(None for _ in pieces), *({0: torch.export.Dim.AUTO} for _ in inputs))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            plan.variants[0], (*pieces, *inputs), dynamic_shapes=free, strict=False
        ).run_decompositions({})
        onnx = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    session = open_session(onnx.model_proto.SerializeToString())
    for batch in (1, 2, 4):
        calls = [torch.randn(batch, *x.shape[1:]) for x in inputs]
        with torch.no_grad():
            expected = block.module(*masked(sites, weights, 0.5), *calls)
            again = program.module()(*pieces, *calls)
        names = [entry.name for entry in session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, (*pieces, *calls), strict=True)}
        for reference, torch_state, ort_state in zip(expected, again, session.run(None, feeds), strict=True):
            torch.testing.assert_close(torch_state, reference, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ort_state, reference.numpy(), rtol=1e-4, atol=1e-4)
