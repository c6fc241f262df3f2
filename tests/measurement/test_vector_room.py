"""Krylov vectors against the free memory: they fit, fewer are used, or the measurement is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hessian_callback import Lanczos, PublishedProtocol, measure
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.linalg.krylov_basis import KrylovBasis
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.measurement import vector_room as module
from hessian_callback.measurement.vector_room import NotEnoughMemoryError, vector_room
from tests.helpers.forks import run_code
from tests.helpers.problems import batches, cross_entropy, network
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
DIAGONAL = torch.arange(1, 1001, dtype=torch.float64) ** -0.5
VECTOR = 8 * 1000


def operator() -> MatvecOperator:
    return MatvecOperator(lambda v: DIAGONAL * v, 1000)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    def to(vectors: float | None) -> None:
        # Four whole vectors and a tenth are reserves.
        num_bytes = None if vectors is None else int(VECTOR * (vectors + 4) / 0.9) + 1
        monkeypatch.setattr(module, "free_memory", lambda device: num_bytes)
        monkeypatch.setattr(module, "main_memory_limits", lambda: {"the container": num_bytes, "the system": 10**12})

    return to


def test_room_is_what_is_left_beside_kept_and_whole_vectors(free: Any) -> None:
    free(100)
    assert vector_room(operator(), CPU) == 100
    assert vector_room(operator(), CPU, kept=10) == 90
    free(0)
    assert vector_room(operator(), CPU, kept=10) == 0
    free(None)
    assert vector_room(operator(), CPU) is None


def largest_basis(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of stored vectors each time that one is appended."""
    sizes: list[int] = []
    append = KrylovBasis.append

    def counted(self: KrylovBasis, vector: torch.Tensor) -> None:
        append(self, vector)
        sizes.append(sum(len(block) for block in self._blocks))

    monkeypatch.setattr(KrylovBasis, "append", counted)
    return sizes


def test_the_run_restarts_if_fewer_vectors_fit(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = largest_basis(monkeypatch)
    for solver, number in [(Lanczos(), 40), (Lanczos(basis_budget=35 * VECTOR), 35)]:
        sizes.clear()
        free(40)
        spectrum = solver.solve(operator(), 20)
        assert spectrum.stopped == "converged"
        assert spectrum.num_restarts > 1
        assert max(sizes) <= number
        assert ((spectrum.eigenvalues - DIAGONAL[:20]).abs() <= spectrum.error_bounds).all()
    free(None)
    assert Lanczos().solve(operator(), 20).num_restarts == 0


def test_a_run_that_restarts_until_its_products_are_spent_names_the_budget(free: Any) -> None:
    free(40)
    solver = Lanczos(rtol=1e-6, max_hvps=60)
    spectrum = solver.solve(operator(), 20)
    assert (spectrum.stopped, spectrum.num_matvecs) == ("max_matvecs", 60)
    assert ((spectrum.eigenvalues - DIAGONAL[:20]).abs() <= spectrum.error_bounds).all()
    _, reason = solver.fit(spectrum, 20)
    assert reason is not None
    assert "max_hvps=60 products were spent; allow more, or a larger rtol, or a larger basis_budget" in reason


def test_a_budget_that_is_too_small_is_refused(free: Any) -> None:
    free(100)
    with pytest.raises(
        NotEnoughMemoryError, match="and 31 fit basis_budget=248000; allow at least 256000, or choose fewer parameters"
    ):
        Lanczos(basis_budget=31 * VECTOR).solve(operator(), 20)


@pytest.mark.parametrize("solver", [Lanczos(), PublishedProtocol(steps=32)], ids=["Lanczos", "published"])
def test_a_basis_that_cannot_fit_is_refused_before_the_first_product(solver: Any, free: Any) -> None:
    products = []
    one = MatvecOperator(lambda v: products.append(1) or DIAGONAL * v, 1000)  # type: ignore[func-returns-value]
    free(31)
    with pytest.raises(
        NotEnoughMemoryError,
        match=r"^32 vectors of 1,000 parameters take 256 kB on each rank, and 31 fit \(311 kB are free within the "
        r"limit of the container\); choose fewer parameters",
    ):
        solver.solve(one, 20)
    assert products == []
    free(32)
    assert len(solver.solve(one, 20).eigenvalues) == 20


def test_the_measurement_is_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match="and 0 fit"):
        measure(network(), cross_entropy, batches(), num_eigenvalues=3)


def on_rank(rank: int) -> tuple[int, str]:
    """Measure while rank 1 alone is short of memory."""
    module.free_memory = lambda device: 1000 if rank == 1 else 10**9  # type: ignore[assignment]
    ranks = Ranks(dist.group.WORLD)
    with pytest.raises(NotEnoughMemoryError) as raised:
        measure(network(), cross_entropy, batches()[rank::2], num_eigenvalues=3, process_group=ranks.group)
    return ranks.num_on_host(), str(raised.value)


def test_all_ranks_refuse_together() -> None:
    for outcome in run_ranks(on_rank, 2):
        host, message = outcome.value
        assert host == 2
        assert "and 0 fit" in message


DRILL = """
import resource, sys, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from hessian_callback import PowerLawHessianCallback
from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(1000, 4000), nn.Linear(4000, 2)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.head(self.wide(batch[0]).tanh()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

warnings.simplefilter("ignore")
data = DataLoader(TensorDataset(torch.randn(16, 1000), torch.randint(2, (16,))), batch_size=8)
common = dict(num_eigenvalues=50, num_samples=16, dataloader="train", figures=False, verbose=False)
whole = PowerLawHessianCallback(**common)
head = PowerLawHessianCallback(parameters="^head", prefix="head", **common)
trainer = Trainer(max_epochs=1, callbacks=[whole, head], logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20, resource.RLIM_INFINITY))
trainer.fit(Net(), data)
print(trainer.global_step, len(whole.history), whole.history[0].reason)
print(head.history[0].spectrum is not None)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a Linux file")
def test_training_survives_a_real_limit(tmp_path: Path) -> None:
    done = run_code(DRILL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("2 2 "), done.stdout
    assert "NotEnoughMemoryError" in first or "vectors of 4,012,002 parameters take" in first
    assert "within the limit of the process (RLIMIT_AS)" in first
    assert second == "True"
