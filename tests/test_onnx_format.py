"""Graphs as ONNX: what is translated here, and that nothing of torch.onnx stays changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx._internal.exporter._registration import onnxscript_apis

from passes.lowering.onnx_format import LowerError, to_onnx
from tests.sessions import open_session


class Normed(nn.Module):
    def __init__(self, eps: float | None = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def exported(module: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_rms_norm_is_torchs_even_where_squares_leave_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    x = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    weight = torch.linspace(0.5, 2, 16).to(dtype)
    data = to_onnx(exported(Normed(), x, weight), ["x", "w"], ["y"], "a norm")
    (found,) = open_session(data).run(None, {"x": x.numpy(), "w": weight.numpy()})
    expected = F.rms_norm(x.float(), (16,), weight.float(), 1e-5)
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_without_an_epsilon_has_that_of_single_precision() -> None:
    x, weight = torch.full((2, 16), 1e-4), torch.ones(16)
    data = to_onnx(exported(Normed(None), x, weight), ["x", "w"], ["y"], "a norm")
    (found,) = open_session(data).run(None, {"x": x.numpy(), "w": weight.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), F.rms_norm(x, (16,), weight), rtol=1e-5, atol=0)
    with pytest.raises(LowerError, match="double precision without its epsilon"):
        to_onnx(exported(Normed(None), x.double(), weight.double()), ["x", "w"], ["y"], "a norm")


def test_what_torch_onnx_must_decompose_is_still_decomposed() -> None:
    class Celu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.glu(torch.aminmax(x, dim=1)[0], dim=-1)

    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    (found,) = open_session(to_onnx(exported(Celu(), x), ["x"], ["y"], "a graph")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Celu()(x))


def test_nothing_of_torch_onnx_stays_changed() -> None:
    parse = onnxscript_apis.get_torchlib_ops
    program = exported(Normed(), torch.ones(2, 4), torch.ones(4))
    to_onnx(program, ["x", "w"], ["y"], "a norm")
    assert onnxscript_apis.get_torchlib_ops is parse
    assert "run_decompositions" not in vars(program)


def test_what_has_no_translation_is_named() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(LowerError, match="plan x has no ONNX form"):
        to_onnx(exported(Strange(), torch.ones(3)), ["x"], ["y"], "plan x")
