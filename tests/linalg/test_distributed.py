"""Real process groups: the same Hessian for any W, the number of collectives, and errors on all ranks together."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import signal
import subprocess
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.linalg import distributed
from hessian_callback.linalg.distributed import Partition, PeerError, RankLostError, Ranks, _cause
from tests.helpers.cases import assign_to_ranks
from tests.helpers.ranks import DiagonalOperator, run_ranks

# -- partitions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_slices_cover_the_vector_once(size: int, world_size: int) -> None:
    vector = torch.arange(1.0, size + 1)
    partitions = [Partition(size, world_size, rank) for rank in range(world_size)]
    pieces = [partition.cut(vector) for partition in partitions]
    assert len({len(piece) for piece in pieces}) == 1
    assert torch.equal(torch.cat(pieces)[:size], vector)
    assert torch.cat(pieces)[size:].eq(0).all()
    assert sum(partition.length for partition in partitions) == size


def test_a_single_process_fails_with_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), Ranks().propagate_errors("dividing"):
        _ = 1 / 0


# -- tables and flags ------------------------------------------------------------------------------


def gathered(rank: int) -> tuple[Any, ...]:
    ranks = Ranks(dist.group.WORLD)
    values = [float(rank), -0.5 * rank, float("nan") if rank == 1 else float("inf"), 1e-300 * (rank + 1)]
    return (
        ranks.gather(values),
        ranks.gather(torch.tensor(values[:1])),
        ranks.gather([]),
        [ranks.failed_ranks(rank in failing) for failing in ([], [1], [0, 2])],
        [ranks.any(rank in flagged) for flagged in ([], [0], [2], [0, 1, 2])],
    )


def test_every_rank_gathers_the_same_table_and_flags() -> None:
    nan, inf = float("nan"), float("inf")
    expected = [[0.0, 0.0, inf, 1e-300], [1.0, -0.5, nan, 2e-300], [2.0, -1.0, inf, 3e-300]]
    for outcome in run_ranks(gathered, 3):
        table, column, empty, failed, flags = outcome.value
        torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
        assert (column.tolist(), column.dtype) == ([[0.0], [1.0], [2.0]], torch.float64)
        assert empty.shape == (3, 0)
        assert failed == [[], [1], [0, 2]]
        assert flags == [False, True, True, True]


def test_a_single_process_gathers_one_row() -> None:
    assert Ranks().gather([1.0, 2.0]).tolist() == [[1.0, 2.0]]
    assert Ranks().failed_ranks(False) == []
    assert (Ranks().any(False), Ranks().any(True)) == (False, True)


class Interrupted(Exception):
    """Ends a computation on all ranks."""


def signalled(rank: int) -> int:
    """Return the product at which a rank leaves a computation; the ranks receive SIGTERM at different products."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    operator, products = DiagonalOperator(300), 0

    def progress(_: Any) -> None:
        nonlocal products
        products += 1
        if products == 4 + 5 * rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if operator.ranks.any(bool(received)):
            raise Interrupted

    with pytest.raises(Interrupted):
        top_eigenvalues(operator, 8, progress=progress)
    return products


def test_ranks_that_are_signalled_at_different_products_leave_at_the_same() -> None:
    assert [outcome.value for outcome in run_ranks(signalled, 3)] == [4, 4, 4]


# -- the same Hessian for any W --------------------------------------------------------------------


def spectrum_on(rank: int, case_name: str, dtype: torch.dtype, holders: int, hvp: str) -> tuple[Tensor, Tensor, Tensor]:
    case, batches, weights = assign_to_ranks(case_name, dtype, rank, dist.get_world_size(), holders)
    operator = HessianOperator(
        case.model, case.loss_fn, batches, weights=weights, process_group=dist.group.WORLD, hvp=hvp
    )
    spectrum = top_eigenvalues(operator, 8, rtol=1e-4)
    vector = torch.linspace(-1, 1, operator.num_parameters, dtype=dtype)
    return spectrum.eigenvalues, spectrum.error_bounds, operator.matvec(vector)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case_name", ["mlp", "attention"])
def test_the_same_hessian_for_any_number_of_ranks(case_name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    results = {
        (world_size, holders): [
            outcome.value
            for outcome in run_ranks(spectrum_on, world_size, case_name, dtype, holders, "double_backward")
        ]
        for world_size, holders in [(1, 1), (2, 2), (3, 3), (3, 2)]  # the last: a rank without a batch
    }
    alone = results[1, 1][0]
    for outcomes in results.values():
        for eigenvalues, bounds, product in outcomes:
            assert torch.equal(eigenvalues, outcomes[0][0])
            assert torch.equal(bounds, outcomes[0][1])
            assert torch.equal(product, outcomes[0][2])
        torch.testing.assert_close(outcomes[0][0], alone[0], rtol=tolerance, atol=0)
        torch.testing.assert_close(outcomes[0][2], alone[2], rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("hvp", ["linearize", "finite_difference"])
def test_other_engines_on_two_ranks(hvp: str) -> None:
    alone, together = (run_ranks(spectrum_on, w, "mlp", torch.float64, w, hvp)[0].value[0] for w in (1, 2))
    torch.testing.assert_close(together, alone, rtol=1e-10 if hvp == "linearize" else 1e-6, atol=0)


# -- number of collectives ---------------------------------------------------------------------------------


def count_collectives(rank: int) -> tuple[Counter[str], Counter[str], int, int, int]:
    calls: Counter[str] = Counter()
    volume: Counter[str] = Counter()

    def counted(name: str) -> None:
        home = distributed if hasattr(distributed, name) else dist
        original = getattr(home, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            sizes = [t.numel() * t.element_size() for t in (tensor, *args) if isinstance(t, Tensor)]
            volume[name] += max(sizes)
            return original(tensor, *args, **kwargs)

        setattr(home, name, call)

    case, batches, weights = assign_to_ranks("mlp", torch.float32, rank, 2, 2)
    operator = HessianOperator(case.model, case.loss_fn, batches, weights=weights, process_group=dist.group.WORLD)
    for name in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        counted(name)
    operator.matvec_slice(torch.ones(operator.partition.slice_length))
    one_product = calls.copy()
    one_product_volume = volume.copy()
    calls.clear()
    volume.clear()
    spectrum = top_eigenvalues(operator, 8)
    return calls, volume + Counter(), spectrum.num_matvecs, one_product, one_product_volume  # type: ignore[return-value]


def test_one_reduce_scatter_and_one_all_gather_a_product() -> None:
    for outcome in run_ranks(count_collectives, 2):
        calls, volume, num_matvecs, one_product, one_product_volume = outcome.value
        assert one_product == {"reduce_scatter": 1, "all_gather": 1}
        slice_length = -(-57 // 2)
        assert one_product_volume["all_gather"] == 4 * 2 * slice_length
        assert one_product_volume["reduce_scatter"] == 4 * 2 * (slice_length + 2)  # a flag slot per rank
        # Measuring the error of a product takes two more, and as many in float64.
        assert calls["reduce_scatter"] == num_matvecs + 4
        assert calls["all_gather"] <= num_matvecs + 4
        # Three short ones a step; a chain's beginning needs five more, each test of the basis one.
        assert calls["all_reduce"] <= 3 * num_matvecs + 2 * 5 + 20
        assert volume["all_reduce"] <= 8 * calls["all_reduce"] * (num_matvecs + 1)


def resident_growth(rank: int, size: int) -> int:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # The allocator keeps more or less of the memory of freed vectors, unless each is a mapping of its own.
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 2**18)
    operator = DiagonalOperator(size)
    top_eigenvalues(operator, 1, max_matvecs=5)
    before = resident()
    largest = before

    def watch(progress: Any) -> None:
        nonlocal largest
        largest = max(largest, resident())

    top_eigenvalues(operator, 50, max_matvecs=100, progress=watch)
    return largest - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads the resident set as Linux with glibc has it")
def test_the_krylov_basis_is_cut_over_the_ranks() -> None:
    size, basis = 300_000, 300_000 * 100 * 4
    alone = run_ranks(resident_growth, 1, size)[0].value
    halves = [outcome.value for outcome in run_ranks(resident_growth, 2, size)]
    assert 0.9 * basis < alone < 1.2 * basis
    for half in halves:
        assert 0.45 * basis < half < 0.6 * basis


# -- errors on all ranks together ------------------------------------------------------------------------------


def failing_product(rank: int, failing: int, fault: str) -> None:
    case, batches, weights = assign_to_ranks("mlp", torch.float64, rank, dist.get_world_size(), dist.get_world_size())
    calls = 0

    def loss_fn(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = case.loss_fn(model, batch)
        if rank == failing and calls > 40:
            if fault == "raise":
                raise OSError("no reading on this rank")
            if fault == "nan":
                return loss * float("nan")
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    operator = HessianOperator(
        case.model, loss_fn, batches, weights=weights, process_group=dist.group.WORLD, memory_budget=0
    )
    top_eigenvalues(operator, 8)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_raises_in_a_product_fails_all(world_size: int) -> None:
    outcomes = run_ranks(failing_product, world_size, 1, "raise", expect_errors=True)
    for rank, outcome in enumerate(outcomes):
        if rank == 1:
            assert (outcome.error, outcome.message) == ("OSError", "no reading on this rank")
        else:
            assert outcome.error == "PeerError"
            assert "rank 1 failed while computing a Hessian-vector product" in outcome.message


def test_nan_on_one_rank_fails_all() -> None:
    for outcome in run_ranks(failing_product, 2, 1, "nan", expect_errors=True):
        assert outcome.error == "ArithmeticError"
        assert "check the loss" in outcome.message


def test_the_survivors_of_a_killed_rank_end_soon_and_name_the_cause() -> None:
    survivor, killed = run_ranks(failing_product, 2, 1, "kill", expect_errors=True)
    assert (killed.error, killed.exitcode) == ("Killed", -signal.SIGKILL)
    assert survivor.error == "RankLostError"
    assert "another rank's process has ended" in survivor.message
    assert survivor.seconds < 60  # of the group's 240; products included; ten of them are what a survivor may wait


def failing_preparation(rank: int, fault: str) -> None:
    case, batches, weights = assign_to_ranks("mlp", torch.float64, rank, 2, 2)
    if fault == "weights" and rank == 0:
        weights = weights[1:]

    def loss_fn(model: Any, batch: Any) -> Tensor:
        if fault == "loss" and rank == 0:
            raise KeyError("label")
        return case.loss_fn(model, batch)

    HessianOperator(case.model, loss_fn, batches, weights=weights, process_group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("fault", "error", "stage"),
    [("weights", "ValueError", "weighing the batches"), ("loss", "KeyError", "preparing the Hessian-vector products")],
)
def test_a_rank_that_fails_before_the_first_product_fails_all(fault: str, error: str, stage: str) -> None:
    failing, other = run_ranks(failing_preparation, 2, fault, expect_errors=True)
    assert failing.error == error
    assert other.error == "PeerError"
    assert f"rank 0 failed while {stage}" in other.message


def no_group(rank: int) -> str:
    case, batches, weights = assign_to_ranks("mlp", torch.float64, rank, 2, 2)
    with pytest.raises(ValueError, match="2 ranks") as caught:
        HessianOperator(case.model, case.loss_fn, batches, weights=weights)
    return str(caught.value)


def test_the_group_must_be_passed_if_there_are_several_ranks() -> None:
    for outcome in run_ranks(no_group, 2):
        assert "torch.distributed.group.WORLD" in outcome.value
        assert "a group of one" in outcome.value


def group_of_one(rank: int) -> Tensor:
    groups = [dist.new_group([member]) for member in range(2)]
    case, batches, weights = assign_to_ranks("mlp", torch.float64, rank, 2, 2)
    operator = HessianOperator(case.model, case.loss_fn, batches, weights=weights, process_group=groups[rank])
    return top_eigenvalues(operator, 3).eigenvalues


def test_a_group_of_one_is_a_hessian_of_its_own() -> None:
    first, second = (outcome.value for outcome in run_ranks(group_of_one, 2))
    assert not torch.allclose(first, second)


def test_the_error_of_a_peer_names_all_failed_ranks() -> None:
    assert "ranks 1, 3 failed while testing" in str(PeerError("testing", [1, 3]))


# -- lost ranks ------------------------------------------------------------------------------------


def stopped_rank(rank: int) -> str:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    ranks = Ranks(group)
    ranks.all_reduce(torch.ones(1))
    if rank == 1:
        # SIGSTOP, as a scheduler sends it; another process continues this one after the group's timeout.
        subprocess.Popen(["/bin/sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return ""
    with pytest.raises(RankLostError) as caught:
        ranks.all_reduce(torch.ones(1))
    return str(caught.value)


def test_a_stopped_rank_is_not_reported_as_ended() -> None:
    message = run_ranks(stopped_rank, 2)[0].value
    assert "did not take part in it before the process group's timeout. Its process may be stopped" in message
    assert "has ended" not in message


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:9", "process has ended"),
        ("writev: Broken pipe", "process has ended"),
        ("NCCL communicator was aborted on rank 1", "process has ended"),
        ("Timed out waiting 2000ms for recv operation to complete", "may be stopped"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", "may be stopped"),
        ("op.preamble.length <= op.nbytes. 16 vs 8", "with different data"),
    ],
)
def test_the_cause_follows_from_the_backend_s_message(message: str, cause: str) -> None:
    found = [name for name in ("process has ended", "may be stopped", "with different data") if name in _cause(message)]
    assert found == [cause]
