"""The choice of parameters: patterns, dtypes, and what they mean for the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator
from hessian_callback.operators.parameters import common_type, matching, select_parameters
from tests.helpers.cases import dense

REALISTIC = [
    f"transformer.h.{i}.{part}.{kind}"
    for i in range(96)
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.dense_4h_to_h.lora_A.default")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"h\.95\.", 12),
        (r"^transformer\.h\.\d+\.(?:attn|mlp)\.", 96 * 10),
        (r"^(\w+\.)+weight$", 96 * 6),
        (r".*\..*\..*\..*weight", 96 * 6),
        (r"(?i)LORA_[AB](\.\w+)*\.weight$", 96),
        (r"h\.(9[0-5]|[0-8]\d)\.mlp", 6 * 86),
    ],
)
def test_patterns_on_realistic_names(pattern: str, found: int) -> None:
    assert len(matching("parameters", pattern, REALISTIC)) == found


# -- dtypes ----------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A Fourier layer with complex weights, as in neural operators."""

    def __init__(self, channels: int = 2, modes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(channels, channels, modes, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        modes = self.weight.shape[-1]
        transformed = torch.fft.rfft(x)
        out = torch.zeros_like(transformed)
        out[..., :modes] = torch.einsum("bim,iom->bom", transformed[..., :modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


def fourier(dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 1), Spectral(), nn.GELU(), nn.Conv1d(2, 1, 1))
    if dtype == torch.float64:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                wide = torch.complex128 if parameter.is_complex() else torch.float64
                setattr(module, name, nn.Parameter(parameter.detach().to(wide)))
    x = torch.randn(8, 1, 12, dtype=dtype)
    return model, lambda m, b: F.mse_loss(m(b), b.cumsum(-1)), x


@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_complex_parameters_count_as_real_and_imaginary_parts(hvp: str) -> None:
    """Against the Hessian of a function of real numbers only, by ``torch.autograd.functional``."""
    model, loss_fn, x = fourier(torch.float64)
    parameters = list(model.parameters())
    flat = torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in parameters]).detach()

    def value(point: Tensor) -> Tensor:
        named, first = {}, 0
        for name, parameter in model.named_parameters():
            size = parameter.numel() * (2 if parameter.is_complex() else 1)
            piece, first = point[first : first + size], first + size
            if parameter.is_complex():
                named[name] = torch.view_as_complex(piece.view(*parameter.shape, 2))
            else:
                named[name] = piece.view(parameter.shape)
        return F.mse_loss(torch.func.functional_call(model, named, (x,)), x.cumsum(-1))

    truth = torch.autograd.functional.hessian(value, flat)
    operator = HessianOperator(model, loss_fn, [x], hvp=hvp)
    assert operator.num_parameters == len(flat)
    tolerance = 1e-10 if operator.exact else 1e-5
    torch.testing.assert_close(dense(operator), truth, rtol=tolerance, atol=tolerance)


def test_complex_numbers_are_not_traced() -> None:
    """PyTorch 2.13 ends the process by a segmentation fault in the forward derivative of such a layer."""
    model, loss_fn, x = fourier(torch.float32)
    for parameters in (None, "^0"):
        with pytest.raises(RuntimeError, match=r"complex numbers: use hvp='double_backward'"):
            HessianOperator(model, loss_fn, [x], hvp="linearize", parameters=parameters)


class Mixed(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale.float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
def test_the_remedy_for_mixed_dtypes_works(dtype: torch.dtype) -> None:
    model = Mixed(dtype)
    with pytest.raises(ValueError, match=r"\(scale\).*Leave some out with parameters='(.*)', or pass a copy") as caught:
        common_type(select_parameters(model))
    expression = str(caught.value).split("parameters='")[1].split("'")[0].replace("\\\\", "\\")
    operator = HessianOperator(
        model, lambda m, x: m(x).abs().square().mean(), [torch.ones(4, 3)], parameters=expression
    )
    assert operator.parameter_names == ["layer.weight", "layer.bias"]


# -- embeddings ------------------------------------------------------------------------------------


def test_sparse_embeddings_have_the_hessian_of_dense_ones() -> None:
    torch.manual_seed(0)
    tokens, labels = torch.randint(9, (8, 3)), torch.randint(3, (8,))
    sparse = nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    plain = nn.Sequential(nn.Embedding(9, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    plain.load_state_dict(sparse.state_dict())

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    one, other = (dense(HessianOperator(model, loss_fn, [(tokens, labels)])) for model in (sparse, plain))
    assert torch.equal(one, other)
    assert sparse[0].sparse
