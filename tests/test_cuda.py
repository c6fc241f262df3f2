"""The package on a GPU, held against the CPU in float64; everything here is skipped where there is none.

    HESSIAN_CALLBACK_TEST_DEVICE=cpu pytest tests/test_cuda.py

runs on the CPU what makes sense there, so that mistakes in the tests themselves show without a GPU.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

from hessian_callback import Density, HessianOperator, OutlierRatio, Spectrum, Subspace, top_eigenvalues
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.linalg.krylov_basis import row_products
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.linalg.random_vectors import gaussian_slice, rademacher_slice
from hessian_callback.linalg.tall_matrices import inner_products, orthonormal_columns
from hessian_callback.measurement.solvers import Lanczos, PublishedProtocol
from hessian_callback.operators.cuda_graphs import RecordedProduct, recorded, waits_counted
from hessian_callback.operators.memory import free_memory
from tests.helpers.cases import CASES, Case, classify, dense_hessian, rotated
from tests.helpers.lightning import EarlyStopping, ModelCheckpoint
from tests.helpers.model_zoo import KINDS, Trained
from tests.helpers.observed import same
from tests.helpers.toy_runs import loader as plain_loader
from tests.helpers.toy_runs import measure, seeded, trainer

DEVICE = torch.device(os.environ.get("HESSIAN_CALLBACK_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:.* samples are few"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="the CPU has no such thing")

ENGINES: dict[str, dict[str, Any]] = {
    "kept": {"hvp": "double_backward"},
    "rebuilt": {"hvp": "double_backward", "memory_budget": 0},
    "linearized": {"hvp": "linearize"},
    "auto": {"hvp": "auto"},
}
BOTH = [torch.float64, torch.float32]


@pytest.fixture(scope="module", autouse=True)
def _workspace() -> Iterator[None]:
    """What cuBLAS wants to hear before it promises the same bits twice; read when it is used first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield


@pytest.fixture
def deterministic() -> Iterator[None]:
    # What has no deterministic algorithm warns, and is judged by its results.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cast(case: Case, dtype: torch.dtype, device: torch.device | str = DEVICE) -> Case:
    """The same numbers in another dtype, on another device."""
    moved = tree_map(
        lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None) if torch.is_tensor(leaf) else leaf,
        case.batches,
    )
    return Case(copy.deepcopy(case.model).to(device, dtype), case.loss_fn, moved, case.weights)


def in_single(case: Case) -> Case:
    """A case whose numbers float32 holds without rounding, in float64 on the CPU."""
    return cast(cast(case, torch.float32, "cpu"), torch.float64, "cpu")


def operator_of(case: Case, **options: Any) -> HessianOperator:
    return HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, **options)


def dense(operator: HessianOperator) -> Tensor:
    """The whole matrix, in float64 on the CPU."""
    identity = torch.eye(operator.num_parameters, dtype=operator.dtype)
    columns = [operator.matvec(row) for row in identity]
    assert {column.device.type for column in columns} == {DEVICE.type}
    return torch.stack(columns, dim=1).cpu().double()


def assert_close_in_norm(found: Tensor, truth: Tensor, tolerance: float) -> None:
    error = float((found.cpu().double() - truth.cpu().double()).norm())
    assert error <= tolerance * float(truth.norm()), f"{error / float(truth.norm()):.2e} > {tolerance:.2e}"


# -- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_the_dense_hessian(name: str, engine: str, dtype: torch.dtype) -> None:
    case = in_single(CASES[name]())
    operator = operator_of(cast(case, dtype), **ENGINES[engine])
    assert_close_in_norm(dense(operator), dense_hessian(case), operator.relative_error)


@pytest.mark.parametrize("name", CASES)
def test_the_dense_hessian_by_differences(name: str) -> None:
    case = in_single(CASES[name]())
    operator = operator_of(cast(case, torch.float64), hvp="finite_difference")
    assert_close_in_norm(dense(operator), dense_hessian(case), 1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_auto_changes_over_and_stays_right(name: str) -> None:
    case = in_single(CASES[name]())
    operator = operator_of(cast(case, torch.float64))
    operator.expect_products(10**6)
    assert_close_in_norm(dense(operator), dense_hessian(case), operator.relative_error)
    assert operator.engine_reason != "no change-over was considered"


# Without those that ask a trainer, and those whose norms and losses are float32 in any case.
LAYERS = [name for name in KINDS if "asks the trainer" not in name and "Hugging Face" not in name]


def in_double(name: str) -> Case:
    """A model of the zoo with its loss and a batch, in float64 on the CPU."""
    kind = KINDS[name]
    model = seeded(kind.build).double().eval()
    model.log = model.log_dict = lambda *_, **__: None
    batches = tree_map(
        lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf,
        [next(iter(kind.loaders()[1]))],
    )
    return Case(model, resolve_loss(model), batches, [1.0])


@pytest.mark.parametrize("name", LAYERS)
def test_products_of_models_as_people_train_them(name: str) -> None:
    """Against the CPU's, which other tests hold against differences; recurrent layers among them."""
    case = in_double(name)
    here = operator_of(cast(case, torch.float64))
    vector = torch.randn(here.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flags = settings()
    assert_close_in_norm(here.matvec(vector), operator_of(case).matvec(vector), 1e-10)
    assert settings() == flags


@pytest.mark.parametrize("name", [name for name in KINDS if "padding_idx" in name])
def test_auto_goes_on_where_recurrent_layers_cannot_be_traced(name: str) -> None:
    model = seeded(KINDS[name].build).double().eval()
    case = cast(Case(model, resolve_loss(model), [next(iter(KINDS[name].loaders()[1]))], [1.0]), torch.float64)
    operator = operator_of(case)
    vector = torch.randn(operator.num_parameters, dtype=torch.float64)
    first = operator.matvec(vector)
    operator.expect_products(10**6)
    for _ in range(6):
        torch.testing.assert_close(operator.matvec(vector), first, rtol=1e-9, atol=1e-11)
    assert operator.engine_reason != "no change-over was considered"


@pytest.mark.parametrize("name", CASES)
def test_the_same_product_twice(name: str, deterministic: None) -> None:
    operator = operator_of(cast(CASES[name](), torch.float32))
    vector = torch.randn(operator.num_parameters, device=DEVICE)
    assert torch.equal(operator.matvec(vector), operator.matvec(vector))


@pytest.mark.parametrize("name", CASES)
def test_the_same_product_twice_without_being_asked_to(name: str) -> None:
    """Atomic additions may come in any order, but no error may be larger than what is reckoned with."""
    operator = operator_of(cast(CASES[name](), torch.float32))
    vector = torch.randn(operator.num_parameters, device=DEVICE)
    assert_close_in_norm(operator.matvec(vector), operator.matvec(vector), operator.relative_error)


@gpu_only
@pytest.mark.parametrize("engine", ["kept", "rebuilt", "linearized", "differences"])
@pytest.mark.parametrize("name", CASES)
def test_a_product_does_not_wait_for_the_gpu(name: str, engine: str) -> None:
    options = ENGINES.get(engine, {"hvp": "finite_difference"})
    operator = operator_of(cast(CASES[name](), torch.float32), **options)
    vector = torch.randn(operator.num_parameters, device=DEVICE)
    operator.matvec(vector)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator.matvec(vector)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_a_lanczos_step_waits_once() -> None:
    eigenvalues = 0.9 ** torch.arange(4096, dtype=torch.float64, device=DEVICE)
    operator = MatvecOperator(lambda vector: eigenvalues * vector, 4096, device=DEVICE)
    top_eigenvalues(operator, 3)
    with waits_counted() as waits:
        spectrum = top_eigenvalues(operator, 40, rtol=1e-6)
    # One a step; beginnings of chains, and the end, wait some more.
    assert spectrum.num_matvecs <= len(waits) <= 2 * spectrum.num_matvecs + 40, (len(waits), spectrum.num_matvecs)


# -- recorded products --------------------------------------------------------------------------------------------


@gpu_only
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_a_small_traced_product_is_recorded(name: str) -> None:
    case = in_single(CASES[name]())
    operator = operator_of(cast(case, torch.float32), hvp="linearize")
    assert operator._engine._recorded is not None  # type: ignore[union-attr]
    vectors = torch.randn(3, operator.num_parameters, device=DEVICE)
    products = torch.stack([operator.matvec(vector) for vector in vectors])  # each result is the caller's
    truth = dense_hessian(case) @ vectors.cpu().double().T
    assert_close_in_norm(products.T, truth, operator.relative_error)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_close_in_norm(operator.matvec(vectors[0]), truth[:, 0], operator.relative_error)


def recorded_operator(case: Case, **options: Any) -> HessianOperator:
    operator = operator_of(case, **options)
    operator.expect_products(100)
    for _ in range(6):
        operator.matvec(ones(operator))
    return operator


@gpu_only
@pytest.mark.parametrize("hvp", ["auto", "double_backward"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_double_backward_of_a_small_network_is_recorded(name: str, hvp: str) -> None:
    case = in_single(CASES[name]())
    here = cast(case, torch.float32)
    # As DistributedDataParallel does; they belong to the default stream.
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in here.model.parameters()]  # type: ignore[union-attr]
    operator = recorded_operator(here, hvp=hvp)
    assert "recorded as a CUDA graph" in operator.engine_reason, operator.engine_reason
    assert operator.num_cached_graphs == len(case.batches)
    assert_close_in_norm(dense(operator), dense_hessian(case), operator.relative_error)
    assert all(p.requires_grad for p in here.model.parameters())
    assert len(accumulators) > 1
    operator.close()


@gpu_only
@pytest.mark.parametrize("name", ["checkpointing (use_reentrant=False)", "LSTM, padding_idx"])
def test_whatever_is_recorded_is_right(name: str) -> None:
    case = in_double(name)
    operator = recorded_operator(cast(case, torch.float64))
    vector = torch.randn(operator.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close_in_norm(operator.matvec(vector), operator_of(case).matvec(vector), 1e-10)


@gpu_only
@pytest.mark.parametrize("hvp", ["linearize", "double_backward"])
def test_a_long_product_is_not_recorded(hvp: str) -> None:
    operator = recorded_operator(wide("mlp", 2**18), hvp=hvp)
    assert operator._engine._recorded is None  # type: ignore[union-attr]


@gpu_only
def test_a_recording_leaves_the_generators_alone() -> None:
    case = cast(CASES["mlp"](), torch.float32)
    before = generators()
    for hvp in ("linearize", "double_backward"):
        recorded_operator(case, hvp=hvp)
    assert same(generators(), before)
    drawn = torch.rand(5, device=DEVICE)
    torch.cuda.set_rng_state_all(before[3])
    assert torch.equal(torch.rand(5, device=DEVICE), drawn)


@gpu_only
@pytest.mark.parametrize("found", [True, False], ids=["found beforehand", "not found"])
def test_a_recording_that_fails_does_no_damage(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(vector: Tensor) -> Tensor:
        return vector * float(vector.sum())

    vector = torch.ones(8, device=DEVICE)
    settled()
    torch.empty(2**20, device=DEVICE)
    settled()
    before = torch.cuda.memory_reserved()
    if not found:
        monkeypatch.setattr("hessian_callback.operators.cuda_graphs.waits_counted", partial(nullcontext, []))
    with pytest.raises(RuntimeError, match="waits for the GPU" if found else ""):
        RecordedProduct(waits, vector)
    assert recorded(waits, vector) is None
    settled()
    assert torch.cuda.memory_reserved() <= before + 2**26  # The workspace of the stream of recordings.
    before = torch.cuda.memory_reserved()
    block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    assert torch.cuda.memory_reserved() >= before + 2**28
    del block
    settled()
    assert torch.cuda.memory_reserved() == before
    assert torch.equal(vector + 1, torch.full((8,), 2.0, device=DEVICE))
    torch.cuda.manual_seed(0)
    first = torch.rand(8, device=DEVICE)
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(8, device=DEVICE), first)
    assert torch.cuda.get_sync_debug_mode() == 0


# -- full float32, whatever the run has chosen ---------------------------------------------------------------


def settings() -> list[Any]:
    """What decides on TF32 and on cuDNN; the older names raise where a run has mixed them with the newer."""
    readers: list[Any] = [
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: torch.backends.cudnn.rnn.fp32_precision,
        lambda: torch.backends.cudnn.enabled,
        lambda: torch.backends.cudnn.benchmark,
        lambda: torch.backends.cudnn.deterministic,
    ]

    def tried(read: Any) -> Any:
        try:
            return read()
        except (RuntimeError, AttributeError) as error:
            return type(error).__name__

    return [tried(read) for read in readers]


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Lightning advises every user of such a GPU to allow TF32, ten bits of mantissa, in products of matrices."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True  # as is the default
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="older than these settings")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_settings_operator_by_operator_are_no_obstacle(precision: str) -> None:
    """PyTorch refuses to read the older settings where convolutions and recurrent layers have different ones."""
    model = seeded(KINDS["LSTM, padding_idx"].build).eval()
    batches = [next(iter(KINDS["LSTM, padding_idx"].loaders()[1]))]
    case = cast(Case(model, resolve_loss(model), batches, [1.0]), torch.float32)
    vector = torch.ones(sum(p.numel() for p in model.parameters()))
    expected = operator_of(case).matvec(vector)
    layers = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    kept = [layer.fp32_precision for layer in layers]
    try:
        layers[0].fp32_precision = precision
        layers[1].fp32_precision = "tf32" if precision == "ieee" else "ieee"
        before = settings()
        assert_close_in_norm(operator_of(case).matvec(vector), expected, 1e-4)
        assert settings() == before
    finally:
        for layer, value in zip(layers, kept, strict=True):
            layer.fp32_precision = value


def smooth(kind: str) -> Case:
    """Layers large enough for tensor cores, without kinks that a rounding error could cross."""
    torch.manual_seed(0)
    if kind == "matrices":
        model: nn.Module = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh())
        x = torch.randn(256, 128)
    else:
        model = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.Tanh(), nn.Flatten(2)
        )
        x = torch.randn(32, 16, 16, 16)
        model.append(_MeanOfLast())
    labels = torch.randint(64, (len(x),))
    return cast(Case(model, classify, [(x, labels)], [1.0]), torch.float64, "cpu")


class _MeanOfLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.mean(-1)


@pytest.mark.parametrize("engine", ["kept", "rebuilt", "linearized"])
@pytest.mark.parametrize("kind", ["matrices", "convolutions"])
def test_products_carry_full_float32_accuracy(kind: str, engine: str) -> None:
    case = smooth(kind)
    single, double = cast(case, torch.float32), cast(case, torch.float64)
    tolerance = 512 * torch.finfo(torch.float32).eps  # a sixth of what TF32 leaves of one product of matrices
    with tensor_cores():
        if ON_GPU:
            with torch.no_grad():
                rough, exact = (one.model[0](one.batches[0][0]).double() for one in (single, double))
            if float((rough - exact).norm()) < tolerance * float(exact.norm()):
                pytest.skip("this GPU's libraries do not choose TF32 here, so nothing is shown")
        reference = operator_of(double, hvp="double_backward")
        vector = torch.randn(reference.num_parameters, generator=torch.Generator().manual_seed(0))
        before = settings()
        product = operator_of(single, **ENGINES[engine]).matvec(vector)
        assert settings() == before, "the run's own choice was changed"
        assert_close_in_norm(product, reference.matvec(vector.double()), tolerance)


def test_a_traced_product_agrees_although_tensor_cores_are_allowed() -> None:
    """Two engines compared in TF32 would differ by more than is taken for rounding."""
    with tensor_cores():
        operator = operator_of(cast(smooth("convolutions"), torch.float32))
        operator.expect_products(10**6)
        vector = torch.randn(operator.num_parameters, device=DEVICE)
        for _ in range(6):
            operator.matvec(vector)
        assert "differs from double backward" not in operator.engine_reason


def test_the_solver_in_full_float32() -> None:
    eigenvalues = torch.arange(1, 2001, dtype=torch.float64) ** -1.0
    on_device = eigenvalues.to(DEVICE, torch.float32)
    operator = MatvecOperator(lambda v: on_device * v, 2000, dtype=torch.float32, device=DEVICE)
    with tensor_cores():
        spectrum = top_eigenvalues(operator, 10, rtol=1e-3, return_eigenvectors=True)
        gram = inner_products(spectrum.eigenvectors, spectrum.eigenvectors, Ranks())
        basis = orthonormal_columns(torch.randn(5000, 6, device=DEVICE), Partition(5000, 1, 0), Ranks())
    assert bool(((spectrum.eigenvalues - eigenvalues[:10]).abs() <= spectrum.error_bounds).all())
    eps = torch.finfo(torch.float32).eps
    assert float((gram - torch.eye(10, dtype=torch.float64)).abs().max()) < 64 * eps
    assert float((basis.double().T @ basis.double() - torch.eye(6, device=DEVICE)).abs().max()) < 64 * eps


@pytest.mark.parametrize("length", [10**5, 2**24 if ON_GPU else 10**6, 3 * 10**7 if ON_GPU else 10**6])
def test_long_inner_products_keep_their_digits(length: int) -> None:
    """Of terms that all have one sign; the solver reckons with 24 eps for its own arithmetic."""
    eps = torch.finfo(torch.float32).eps
    rows = torch.rand(3, length, device=DEVICE)
    truth = rows.double() @ rows[0].double()
    assert float(((row_products(rows, rows[0]) - truth) / truth).abs().max()) <= 24 * eps
    columns = rows.T.contiguous()
    found = inner_products(columns, columns[:, :1].contiguous(), Ranks())[:, 0]
    assert float(((found - truth.cpu()) / truth.cpu()).abs().max()) <= 24 * eps
    one = row_products(rows[:1], rows[0])
    assert float((one / truth[0] - 1).abs()) <= 24 * eps


# -- eigenvalues ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [gaussian_slice, rademacher_slice])
def test_a_seed_means_the_same_vector_on_every_device(draw: Any) -> None:
    partition = Partition(100_000, 1, 0)
    for dtype in BOTH:
        here = draw(partition, seed=3, draw=2, dtype=dtype, device=DEVICE)
        assert here.device.type == DEVICE.type
        assert torch.equal(here.cpu(), draw(partition, seed=3, draw=2, dtype=dtype))


@pytest.mark.parametrize("basis", ["device", "cpu"])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_against_the_dense_hessian(name: str, dtype: torch.dtype, basis: str) -> None:
    case = in_single(CASES[name]())
    hessian = dense_hessian(case)
    truth = torch.linalg.eigvalsh(hessian).flip(0)[:4]
    operator = operator_of(cast(case, dtype))
    spectrum = top_eigenvalues(
        operator,
        4,
        rtol=1e-4,
        max_matvecs=200,
        return_eigenvectors=True,
        basis_device=None if basis == "device" else "cpu",
    )
    assert spectrum.eigenvalues.device.type == "cpu"
    assert spectrum.all_converged
    assert bool(((spectrum.eigenvalues - truth).abs() <= spectrum.error_bounds).all())
    vectors = spectrum.eigenvectors
    assert vectors is not None
    assert vectors.device.type == DEVICE.type
    vectors = vectors.cpu().double()
    residuals = (hessian @ vectors - vectors * spectrum.eigenvalues).norm(dim=0)
    # A residual is of first order where the bound is of second.
    scale = float(truth[0])
    assert float(residuals.max()) <= math.sqrt(scale * float(spectrum.error_bounds.max())) + 1e-3 * scale
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=100 * eps)


@pytest.mark.parametrize("basis", [None, "cpu"])
def test_multiple_eigenvalues_are_not_missed(basis: str | None) -> None:
    """Copies come by probes and further chains, which leave the straight path of the solver."""
    eigenvalues = torch.cat([torch.tensor([4.0, 4.0, 4.0, 3.0, 3.0, 2.0]), torch.linspace(-1, 1, 194)]).double()
    matrix = rotated(eigenvalues).to(DEVICE)
    operator = MatvecOperator(matrix.mv, 200, device=DEVICE)
    # The default of 60 products ends before all copies are proven.
    spectrum = top_eigenvalues(operator, 6, rtol=1e-6, basis_device=basis, max_matvecs=200)
    assert spectrum.stopped == "converged"
    torch.testing.assert_close(spectrum.eigenvalues, eigenvalues[:6], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_the_same_eigenvalues_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    case = in_single(CASES[name]())
    one, other = (top_eigenvalues(operator_of(cast(case, dtype, device)), 5, seed=7) for device in (DEVICE, "cpu"))
    assert_compatible(one, other)
    assert abs(one.num_matvecs - other.num_matvecs) <= 5


def assert_compatible(one: Spectrum, other: Spectrum) -> None:
    difference = (one.eigenvalues - other.eigenvalues).abs()
    assert bool((difference <= one.error_bounds + other.error_bounds).all()), difference


# -- memory --------------------------------------------------------------------------------------------------


def wide(kind: str, rows: int, *, num_batches: int = 1, device: torch.device = DEVICE) -> Case:
    """Few parameters and large activations."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(32, 512), nn.Tanh(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 5))
        shape: tuple[int, ...] = (32,)
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.Flatten()
        ).append(nn.Linear(32 * 16 * 16, 5))
        shape = (3, 16, 16)
    batches = [
        (
            torch.randn(rows, *shape, generator=generator).to(device),
            torch.randint(5, (rows,), generator=generator).to(device),
        )
        for _ in range(num_batches)
    ]
    return Case(model.to(device), classify, batches, [float(rows)] * num_batches)


def settled() -> int:
    """Bytes in tensors, when what waits to be collected has been."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def ones(operator: HessianOperator) -> Tensor:
    return torch.linspace(-1, 1, operator.num_parameters, dtype=operator.dtype, device=operator.device)


@gpu_only
@pytest.mark.parametrize("basis", [None, "cpu"])
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_given_back(engine: str, basis: str | None) -> None:
    case = wide("mlp", 4096)

    def use() -> None:
        with operator_of(case, **ENGINES[engine]) as operator:
            top_eigenvalues(operator, 3, rtol=0.1, basis_device=basis)

    use()  # Libraries keep workspaces from their first use on.
    before = settled()
    use()
    assert settled() == before


@gpu_only
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_budget_holds(kind: str) -> None:
    case = wide(kind, 4096, num_batches=6)
    # Workspaces are made beforehand.
    with operator_of(case, memory_budget=0) as operator:
        operator.matvec(ones(operator))
        size = operator.bytes_per_graph
    budget = 4 * size
    before = settled()
    torch.cuda.reset_peak_memory_stats()
    with operator_of(case, memory_budget=budget) as operator:
        num_kept = operator.num_cached_graphs
        kept = torch.cuda.memory_allocated() - before
        assert num_kept == 3, f"{num_kept} graphs are kept, in {kept} bytes; {size} were expected of each"
        assert 0.5 * 3 * size <= kept <= budget, f"3 graphs take {kept} bytes; {size} were expected of each"
        operator.matvec(ones(operator))
    beside = torch.cuda.max_memory_allocated() - before - kept
    # A product takes up to four times a batch's graph for its temporaries; cuDNN's workspaces vary.
    assert beside <= 4.5 * size, f"{beside} bytes beside {kept} kept; {size} were expected of each graph"


@contextmanager
def only(num_bytes: float) -> Iterator[None]:
    """Let the allocator have so many bytes beside what is in use."""
    settled()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(task: Any) -> int:
    """The bytes that a task needs beside what is in use."""
    before = settled()
    torch.cuda.reset_peak_memory_stats()
    task()
    return torch.cuda.max_memory_allocated() - before


@gpu_only
@pytest.mark.parametrize(
    ("hvp", "when"),
    [
        ("double_backward", "preparing"),
        ("double_backward", "in a product"),
        ("finite_difference", "in a product"),
        ("linearize", "preparing"),
    ],
)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_when_memory_runs_out_batches_are_halved(kind: str, hvp: str, when: str) -> None:
    case = wide(kind, 2**15 if kind == "mlp" else 2**12)
    with operator_of(case, memory_budget=0) as operator:
        vector = ones(operator)
        truth = operator.matvec(vector)
        # Room for one graph, which is kept; or none, and every product builds it.
        options: dict[str, Any] = {"hvp": hvp, "memory_budget": 2 * operator.bytes_per_graph}
    if when == "in a product":
        options["memory_budget"] = 0
    before = settled()
    torch.cuda.reset_peak_memory_stats()
    with operator_of(case, **options) as operator:
        kept = torch.cuda.memory_allocated() - before
        operator.matvec(vector)
    peak = torch.cuda.max_memory_allocated() - before
    room = kept + 0.4 * (peak - kept)  # Parts as a whole keep as much as what they are parts of.
    if when == "preparing":
        with only(room), operator_of(case, **options) as operator:
            product, halvings = operator.matvec(vector), operator.num_halvings
    else:
        with operator_of(case, **options) as operator, only(room):
            product, halvings = operator.matvec(vector), operator.num_halvings
    # cuDNN has algorithms for little memory as well.
    assert halvings >= 1 or kind == "cnn"
    assert_close_in_norm(product, truth, 1e-4 if operator.exact else 1e-2)


@gpu_only
def test_a_budget_beyond_what_there_is() -> None:
    """What is kept must become less as well when memory runs out, or no part is ever small enough."""
    case = wide("mlp", 2**14, num_batches=4)
    with operator_of(case) as operator:
        vector = ones(operator)
        truth, size = operator.matvec(vector), operator.bytes_per_graph
    settled()
    with only(3 * size), operator_of(case, memory_budget=10**15) as operator:
        assert_close_in_norm(operator.matvec(vector), truth, 1e-4)
        assert operator.num_halvings <= 4


@gpu_only
def test_a_run_goes_on_when_memory_runs_out(tmp_path: Any, capsys: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2**15, 32, generator=generator), torch.randint(5, (2**15,), generator=generator)
    train = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=64)

    def fitted() -> Any:
        callback = measure(
            dataloader=DataLoader(TensorDataset(x, y), batch_size=2**15),
            num_samples=2**15,
            memory_budget=0,
            verbose=True,
            on_error="raise",
            rtol=1e-3,
        )
        model = seeded(lambda: Trained(wide("mlp", 1, device=torch.device("cpu")).model, classify))
        trainer(tmp_path, callback, max_epochs=1, accelerator="gpu", devices=1).fit(model, train)
        return callback.history

    fitted()
    ample: list[Any] = []
    peak = peak_of(lambda: ample.extend(fitted()))
    capsys.readouterr()
    with only(0.5 * peak):
        tight = fitted()
    assert "out of memory, so batches were halved" in capsys.readouterr().out
    for one, other in zip(tight, ample, strict=True):
        assert_compatible(one.spectrum, other.spectrum)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


@gpu_only
def test_free_memory_counts_what_the_allocator_holds_unused() -> None:
    settled()
    before = free_memory(DEVICE)
    block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    held = free_memory(DEVICE)
    del block
    assert before is not None
    assert held is not None
    after = free_memory(DEVICE)  # The block is the allocator's now.
    assert after is not None
    assert before - held >= 2**28 - 2**22
    assert abs(after - before) <= 2**25


# -- training ------------------------------------------------------------------------------------------------

ACCELERATOR = {"accelerator": "gpu" if ON_GPU else "cpu", "devices": 1}


def generators() -> tuple[Any, ...]:
    on_gpu = torch.cuda.get_rng_state_all() if ON_GPU else []
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), on_gpu


def trained(name: str, tmp_path: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    kind = KINDS[name]
    model = seeded(kind.build)
    run = trainer(tmp_path, *callbacks, **{**kind.options, **ACCELERATOR, **options})
    run.fit(model, *kind.loaders())
    if callbacks and callbacks[0].history[-1].logged:
        value = run.callback_metrics["hessian/slope"]
        assert float(value) == pytest.approx(callbacks[0].history[-1].slope)
    return {
        "weights and buffers": copy.deepcopy(model.state_dict()),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        **dict(zip(("generator of Python", "of numpy", "of torch", "of the GPU"), generators(), strict=True)),
        "settings": settings(),
        "logged": {k: v for k, v in run.callback_metrics.items() if not k.startswith("hessian/")},
    }


PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("BatchNorm, dropout, metrics, lists", precision) for precision in PRECISIONS),
        ("attention (SDPA), tied embedding", "32-true"),
        ("attention (SDPA), tied embedding", "bf16-mixed"),
        ("LSTM, padding_idx", "32-true"),
        ("GRU, padding_idx", "32-true"),
        ("compiled network", "32-true"),
        ("Hugging Face GPT-2", "bf16-true"),
    ],
)
def test_training_is_the_same_bit_for_bit(name: str, precision: str, tmp_path: Any, deterministic: None) -> None:
    if not ON_GPU and precision == "16-mixed":
        pytest.skip("a GradScaler is the GPU's")
    if "Hugging Face" in name:
        pytest.importorskip("transformers")
    callback = measure(on_error="raise", **KINDS[name].choice)
    # The first run of a process may differ from all later ones, whatever the callback does: what a library makes at
    # its first use may draw from the generators. cuDNN's dropout state of recurrent layers is suspected of it.
    first = trained(name, tmp_path, precision=precision)
    with_callback = trained(name, tmp_path, callback, precision=precision)
    without = trained(name, tmp_path, precision=precision)
    differing = [part for part in without if not same(with_callback[part], without[part])]
    if differing and not same(trained(name, tmp_path, precision=precision), without):
        pytest.skip("this training does not give the same bits twice by itself")
    also = [part for part in without if not same(first[part], without[part])]
    assert not differing, f"these differ: {differing}; between the first and the last plain run: {also}"
    assert [m.when for m in callback.history] == ["fit_start", "epoch", "epoch"]
    expected = {"64-true": "float64", "bf16-true": "float32 (a copy of bfloat16)"}.get(precision, "float32")
    assert {m.precision for m in callback.history} == {expected}
    assert all(m.spectrum.eigenvalues[0] > 0 for m in callback.history)


def test_metrics_lie_where_the_module_does_and_stop_the_run(tmp_path: Any) -> None:
    class Look(EarlyStopping):
        def on_train_epoch_end(self, trainer: Any, *rest: Any) -> None:
            seen.append(trainer.callback_metrics["hessian/slope"])
            super().on_train_epoch_end(trainer, *rest)

    seen: list[Tensor] = []
    callback = measure(on_error="raise")
    # No slope falls by a hundred, so the second epoch is one too many.
    stopper = Look(
        "hessian/slope", mode="min", min_delta=100.0, patience=1, strict=False, check_on_train_epoch_end=True
    )
    run = trainer(tmp_path, callback, stopper, max_epochs=5, **ACCELERATOR)
    run.fit(seeded(), plain_loader(), plain_loader(seed=1))
    assert run.current_epoch == 2
    assert {value.device.type for value in seen} == {DEVICE.type}
    assert [float(value) for value in seen] == pytest.approx([m.slope for m in callback.history[1:]])
    assert float(stopper.best_score) == pytest.approx(callback.history[1].slope)


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Any, deterministic: None) -> None:
    def checkpoints(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1, monitor="hessian/slope")

    def fit(callback: Any, saver: ModelCheckpoint, seed: int, **options: Any) -> Any:
        model = seeded(seed=seed, dropout=0)
        run = trainer(tmp_path, callback, saver, max_epochs=3, enable_checkpointing=True, **ACCELERATOR)
        run.fit(model, plain_loader(), plain_loader(seed=1), **options)
        return model

    whole, resumed = measure(on_error="raise"), measure(on_error="raise")
    model = fit(whole, checkpoints("whole"), 1)
    other = fit(resumed, checkpoints("resumed"), 99, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert [(m.when, m.epoch) for m in resumed.history] == [(m.when, m.epoch) for m in whole.history]
    for one, two in zip(resumed.history, whole.history, strict=True):
        assert torch.equal(one.spectrum.eigenvalues, two.spectrum.eigenvalues), one.step
    assert same(other.state_dict(), model.state_dict())


EXTRAS = [
    *("trace", "frobenius", Density(num_hvps=80), Subspace(dimension=2), "norms", "numerical_interval", "split_half"),
    OutlierRatio(num_classes=2),
]


def test_all_comparisons_agree_with_the_cpus(tmp_path: Any) -> None:
    def history(**options: Any) -> Any:
        callback = measure(
            extras=EXTRAS,
            groups={"head": r"^net\.4", "first": r"^net\.0"},
            rtol=1e-3,
            num_samples=48,
            allow_fewer=True,
            figures=True,
            on_error="raise",
        )
        run = trainer(tmp_path, callback, max_epochs=1, logger=True, precision="64-true", **options)
        run.fit(seeded(dropout=0), plain_loader(), plain_loader(seed=1))
        return callback.history

    here, there = history(**ACCELERATOR), history(accelerator="cpu", devices=1)
    for one, other in zip(here, there, strict=True):
        assert one.not_compared == other.not_compared
        assert one.comparisons.keys() == other.comparisons.keys()
        assert_compatible(one.spectrum, other.spectrum)
        for key, value in one.comparisons.items():
            assert value == pytest.approx(other.comparisons[key], rel=1e-2, abs=1e-3), key
        assert one.density is not None
        assert one.groups.keys() == {"head", "first"}
        for group, block in one.groups.items():
            assert_compatible(block.spectrum, other.groups[group].spectrum)
    assert "subspace_angle" in here[-1].comparisons
    assert here[0].loss == pytest.approx(there[0].loss)


@pytest.mark.parametrize("solver", [Lanczos(stop_on="slope", memory_budget=10**6), PublishedProtocol()], ids=str)
def test_each_protocol(solver: Any, tmp_path: Any) -> None:
    callback = measure(solver=solver, on_error="raise")
    run = trainer(tmp_path, callback, max_epochs=1, **ACCELERATOR)
    run.fit(seeded(), plain_loader(), plain_loader(seed=1))
    assert all(m.spectrum is not None for m in callback.history)


def test_validate_measures_inside_inference_mode(tmp_path: Any) -> None:
    callback = measure(on_error="raise")
    run = trainer(tmp_path, callback, **ACCELERATOR)
    metrics = run.validate(seeded(), plain_loader(seed=1), verbose=False)[0]
    assert metrics["hessian/slope"] == pytest.approx(callback.history[0].slope)


# -- torch.distributed ---------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Any) -> Iterator[Any]:
    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_gives_the_same(group: Any, deterministic: None) -> None:
    case = cast(CASES["mlp"](), torch.float32)
    alone, grouped = operator_of(case), operator_of(case, process_group=group)
    vector = ones(alone)
    assert torch.equal(alone.matvec(vector), grouped.matvec(vector))
    assert grouped.mean_loss == alone.mean_loss
    one, other = top_eigenvalues(alone, 4), top_eigenvalues(grouped, 4)
    assert torch.equal(one.eigenvalues, other.eigenvalues)
    assert torch.equal(one.error_bounds, other.error_bounds)
    assert grouped.ranks.control_device.type == DEVICE.type


def test_the_collectives_take_tensors_of_the_device(group: Any) -> None:
    """A single rank calls none of them by itself."""
    from hessian_callback.linalg.distributed import all_gather, reduce_scatter

    vector = torch.randn(1000, device=DEVICE)
    for collective in (all_gather, reduce_scatter):
        result = torch.empty_like(vector)
        collective(result, vector, group=group)
        assert torch.equal(result, vector)
    control = torch.tensor([1.0, 2.0], dtype=torch.float64, device=Ranks(group).control_device)
    dist.all_reduce(control, group=group)
    dist.broadcast(control, src=0, group=group)
    assert control.tolist() == [1.0, 2.0]
