"""This project and others that compute Hessian-vector products or eigenvalues, each asked for the same.

A contestant for products is made from a case and maps ``(P,)`` to ``(P,)`` in torch. One for eigenvalues is called with
a case and k, and begins with nothing: what it builds or traces belongs to its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from hessian_callback import HessianOperator, top_eigenvalues

# Enough for the gradient graphs of every case.
MEMORY = 4 << 30

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """What a contestant found.

    Attributes:
        values: eigenvalues, in whatever order; fewer than k if it gave up.
        products: Hessian-vector products spent.
        note: what is to be said about it.
        preparing: seconds before the first product.
        multiplying: seconds in products.
    """

    values: list[float]
    products: int
    note: str = ""
    preparing: float = 0.0
    multiplying: float = 0.0


# What the others want: a model and a criterion apart, one prediction a row.


class Rows(nn.Module):
    """A model of sequences whose predictions become rows, as a criterion of two arguments wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.model(inputs)
        return outputs.flatten(0, 1) if outputs.ndim == 3 else outputs


def apart(case: Case) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Model, criterion and batches of a case. All of ours end in the same criterion."""
    return Rows(case.model), nn.CrossEntropyLoss(), [(inputs, targets.flatten()) for inputs, targets in case.batches]


# Products.


def gradient(case: Case) -> Product:
    """The gradient, which ignores the vector: the unit of the products' times."""
    parameters = list(case.model.parameters())

    def evaluate(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for batch in case.batches:
            pieces = torch.autograd.grad(case.loss_fn(case.model, batch), parameters)
            total += torch.cat([piece.flatten() for piece in pieces])
        return total / len(case.batches)

    return evaluate


def own(case: Case, hvp: str = "auto", memory: int = MEMORY) -> Product:
    """This project's operator."""
    return HessianOperator(case.model, case.loss_fn, case.batches, hvp=hvp, memory_budget=memory).matvec


def curvlinops(case: Case) -> Product:
    """Forward over reverse, traced in every product."""
    operator = _curvlinops(case)
    return lambda vector: operator @ vector


def _curvlinops(case: Case) -> Any:
    from curvlinops import HessianLinearOperator

    model, criterion, batches = apart(case)
    return HessianLinearOperator(model, criterion, list(model.parameters()), batches, check_deterministic=False)


def eigenthings(case: Case) -> Product:
    """Double backward, recomputed in every product."""
    return _eigenthings(case).matvec


def _eigenthings(case: Case) -> Any:
    from hessian_eigenthings.operators import HessianOperator as Other

    return Other(case.model, case.batches, case.loss_fn)


def expect(operator: HessianOperator, k: int) -> None:
    """Tell an operator that chooses its engine what is coming: some three products an eigenvalue."""
    operator.expect_products(3 * k + 15)


OWN_PRODUCTS: dict[str, Callable[[Case], Product]] = {
    "double backward, graphs kept": lambda case: own(case, "double_backward"),
    "double backward, rebuilt": lambda case: own(case, "double_backward", 0),
    "linearize": lambda case: own(case, "linearize"),
}
PEER_PRODUCTS: dict[str, Callable[[Case], Product]] = {
    "curvlinops": curvlinops,
    "eigenthings": eigenthings,
}


# Eigenvalues.


def own_top(case: Case, k: int, *, hvp: str = "auto", rtol: float = 1e-2, max_hvps: int | None = None) -> Found:
    """This project: an operator is made, used and closed."""
    began = time.perf_counter()
    with HessianOperator(case.model, case.loss_fn, case.batches, hvp=hvp, memory_budget=MEMORY) as operator:
        preparing = time.perf_counter() - began
        multiply = operator.matvec_slice
        seconds = [0.0]

        def matvec_slice(vector: Tensor) -> Tensor:
            started = time.perf_counter()
            product = multiply(vector)
            seconds[0] += time.perf_counter() - started
            return product

        operator.matvec_slice = matvec_slice  # type: ignore[method-assign]
        expect(operator, k)
        spectrum = top_eigenvalues(operator, k, rtol=rtol, max_matvecs=max_hvps)
        note = operator.engine if spectrum.all_converged else f"{operator.engine}, stopped: {spectrum.stopped}"
    return Found(spectrum.eigenvalues.tolist(), spectrum.num_matvecs, note, preparing, seconds[0])


def scipy_top(case: Case, k: int, *, ncv: int, tol: float, product: Callable[[Case], Any] = _curvlinops) -> Found:
    """ARPACK over another project's products."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    inner = product(case).to_scipy()
    products = 0

    def matvec(vector: Any) -> Any:
        nonlocal products
        products += 1
        return inner.matvec(vector)

    outer = LinearOperator(inner.shape, matvec=matvec, dtype=inner.dtype)
    start = np.random.default_rng(0).standard_normal(inner.shape[0]).astype(inner.dtype)
    values = eigsh(outer, k, which="LA", ncv=ncv, tol=tol, v0=start, return_eigenvectors=False)
    return Found(values.tolist(), products, f"ncv {ncv}, tol {tol:g}")


def eigenthings_top(case: Case, k: int, *, steps: int | None) -> Found:
    """Lanczos with as many steps as it takes, every one reorthogonalised; without ``steps``, by its defaults."""
    from hessian_eigenthings.algorithms.lanczos import lanczos

    operator = _eigenthings(case)
    if steps is None:
        result = lanczos(operator, k=k, which="LA", seed=0)
        claimed = f"claims {int(result.converged.sum())} of {k} converged"
    else:
        result = lanczos(operator, k=k, which="LA", max_iter=steps, reorthogonalize=True, seed=0)
        claimed = f"{steps} steps by hand"
    return Found(result.eigenvalues.tolist(), int(result.iterations), claimed)


# What is right.


def error(values: list[float], reference: list[float]) -> float:
    """Largest relative error of the k values, in the order of their size; infinite if there are fewer."""
    if len(values) < len(reference) or not np.isfinite(values).all():
        return float("inf")
    found = np.sort(values)[::-1][: len(reference)]
    return float(np.max(np.abs(found - reference) / np.abs(reference)))


def num_missing(values: list[float], reference: list[float], tolerance: float) -> int:
    """How many of the reference's values nobody stands for, if every value found stands for one at the most."""
    left = sorted(values, reverse=True)
    missing = 0
    for wanted in reference:
        near = [value for value in left if abs(value - wanted) <= tolerance * abs(wanted)]
        if near:
            left.remove(min(near, key=lambda value: abs(value - wanted)))
        else:
            missing += 1
    return missing
