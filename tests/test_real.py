"""Complex arithmetic becomes arithmetic of pairs that gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from passes.blocks.complex_to_real import complex_to_real
from passes.blocks.export import export_block, validate
from passes.blocks.functional import plain
from passes.observe.discover import discover
from passes.observe.residuals import find_states
from tests.models import noise, randomised


class Rotary(nn.Module):
    """Rotates pairs of channels by `function(x, table)`."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        result = self.function(*inputs)
        return result if isinstance(result, tuple) else (result,)


def trace(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """A plain graph of `function` for any size of dimension 0 of its first input."""
    dims = (({0: torch.export.Dim.AUTO}, *({} for _ in inputs[1:])),)
    program = torch.export.export(Rotary(function), inputs, dynamic_shapes=dims, strict=False).run_decompositions({})
    return plain(program, "", [f"input_{index}" for index in range(len(inputs))])[0]


def pairs(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def agrees(
    function: Callable[..., object], *inputs: Tensor, others: tuple[Tensor, ...] | None = None
) -> fx.GraphModule:
    """The rewritten graph holds no complex value and gives what `function` gives, on `others` too."""
    module, report = complex_to_real(trace(function, *inputs))
    assert report.refused == ()
    assert holds_no_complex(module)
    for values in (inputs, others or inputs):
        expected = function(*values)
        for result, wanted in zip(
            module(*map(pairs, values)), expected if isinstance(expected, tuple) else (expected,), strict=True
        ):
            assert result.dtype == wanted.dtype
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)
    return module


def holds_no_complex(module: fx.GraphModule) -> bool:
    module.graph.lint()
    leaves = torch.utils._pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return not any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(3).type_as(x)


@cache
def rotary() -> fx.GraphModule:
    return complex_to_real(trace(rotate, noise(2, 6, 3, 8), table(6)))[0]


def table(tokens: int, channels: int = 4, dtype: torch.dtype = torch.complex64) -> Tensor:
    angles = noise(tokens, channels, seed=4)
    return torch.polar(torch.ones_like(angles), angles).to(dtype)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_rotary_positions(batch: int, seed: int) -> None:
    x = noise(batch, 6, 3, 8, seed=seed)
    (result,) = rotary()(x, pairs(table(6)))
    torch.testing.assert_close(result, rotate(x, table(6)), rtol=1e-5, atol=1e-6)
    assert holds_no_complex(rotary())


def test_report_names_the_inputs_that_became_real() -> None:
    _, report = complex_to_real(trace(rotate, noise(2, 6, 3, 8), table(6)))
    assert report.done == ("input input_1 becomes float32 with a trailing dimension of 2",)


def test_a_graph_of_reals_is_left_alone() -> None:
    module = trace(lambda x: x.sin() * 2, noise(2, 3))
    same, report = complex_to_real(module)
    assert same is module
    assert report.done == report.refused == ()


def test_double_precision_and_casts() -> None:
    def function(x: Tensor, table: Tensor) -> Tensor:
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real((z * table).to(torch.complex64)).flatten(-2)

    agrees(function, noise(2, 3, 8), table(3, 4, torch.complex128))


FUNCTIONS = {
    "polar": lambda x, z: torch.view_as_real(torch.polar(x[..., 0], x[..., 1]) * z),
    "complex": lambda x, z: torch.view_as_real(torch.complex(x[..., 0], x[..., 1]) * z),
    "conjugate": lambda x, z: torch.view_as_real((torch.view_as_complex(x) * z.conj()).resolve_conj()),
    "parts": lambda x, z: ((torch.view_as_complex(x) * z).real, (torch.view_as_complex(x) * z).imag),
    "sums": lambda x, z: torch.view_as_real(torch.view_as_complex(x) + z - (-z)),
    "real factor": lambda x, z: torch.view_as_real(x[..., 0] * torch.view_as_complex(x) * 2.5),
    "broadcast": lambda x, z: torch.view_as_real(z[0] * torch.view_as_complex(x)),
    "transpose": lambda x, z: torch.view_as_real(torch.view_as_complex(x).transpose(-1, -2) * z.permute(0, 2, 1)),
    "slices": lambda x, z: torch.view_as_real(torch.view_as_complex(x)[..., 1:3] * z[..., -3:-1]),
    "select": lambda x, z: torch.view_as_real(torch.view_as_complex(x)[..., -1] * z.select(-1, 0)),
    "join": lambda x, z: torch.view_as_real(torch.cat([torch.view_as_complex(x), z.expand(x.shape[0], -1, -1)], -1)),
    "split": lambda x, z: torch.view_as_real(torch.view_as_complex(x).chunk(2, -1)[1] * z.split([2, 2], dim=-1)[0]),
    "shape": lambda x, z: torch.view_as_real(torch.view_as_complex(x).reshape(x.shape[0], -1) * z.flatten(1)),
    "unsqueeze": lambda x, z: torch.view_as_real(torch.view_as_complex(x).unsqueeze(-1) * z.unsqueeze(-1)).squeeze(-2),
    "gather": lambda x, z: torch.view_as_real(
        torch.view_as_complex(x)[:, torch.arange(2)] * z.index_select(1, torch.arange(1, 3))
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rules(name: str) -> None:
    z = torch.view_as_complex(noise(1, 3, 4, 2, seed=7)).clone()
    agrees(FUNCTIONS[name], noise(2, 3, 4, 2), z, others=(noise(5, 3, 4, 2, seed=8), z))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.view_as_real(torch.view_as_complex(x).exp()), "aten.exp"),
        (lambda x: torch.view_as_complex(x).abs(), "aten.abs"),
        (lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), "complex number"),
        (lambda x: torch.view_as_real(torch.view_as_complex(x) + x[..., 0]), "complex and a real"),
        (lambda x: torch.view_as_complex(x), "output"),
    ],
)
def test_unknown_operators_are_refused(function: Callable[..., object], reason: str) -> None:
    module = trace(function, noise(2, 3, 2))
    same, report = complex_to_real(module)
    assert same is module
    assert reason in report.refused[0].reason


def test_a_block_with_complex_positions() -> None:
    model = randomised(
        QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        )
    )
    inputs = {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, 5, 24, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    found, _ = discover(model, inputs)
    first, second = found.blocks
    assert first.time is not None
    graph, _ = export_block(first, find_states(first)[0], found.runs)
    module, report = complex_to_real(graph.module)
    assert len(report.done) == 2 and report.refused == ()
    assert holds_no_complex(module)
    validate(replace(graph, module=module), first)
    validate(replace(graph, module=module), second)
