"""Operators around functions: products that are no dense vectors of the right kind are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback.linalg.linear_operator import MatvecOperator


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda v: v[:2], r"must have shape \(3,\), torch\.float64 on cpu, got \(2,\)"),
        (lambda v: v[:, None], r"got \(3, 1\)"),
        (lambda v: v.float(), r"got \(3,\), torch\.float32 on cpu"),
        (lambda v: v.to_sparse(), r"must be a dense tensor, got torch\.sparse_coo"),
        (lambda v: v.numpy(), "must be a dense tensor, got ndarray"),
    ],
)
def test_a_product_of_another_kind(product: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatvecOperator(product, 3).matvec_slice(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_the_size_is_a_positive_integer(size: Any) -> None:
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        MatvecOperator(lambda v: v, size)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_the_dtype_is_real_and_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="real floating-point"):
        MatvecOperator(lambda v: v, 3, dtype=dtype)


def test_a_sparse_matrix_is_wrapped_by_its_product() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).to_sparse()
    product: Tensor = MatvecOperator(matrix.mv, 3).matvec_slice(torch.ones(3, dtype=torch.float64))
    assert product.tolist() == [3, 2, 1]
