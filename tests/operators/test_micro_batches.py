"""Too little memory: batches give way to smaller ones, on all ranks, and the Hessian stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator
from hessian_callback.operators.memory import is_out_of_memory
from hessian_callback.operators.micro_batches import MicroBatches
from hessian_callback.operators.products import DoubleBackward
from tests.helpers.cases import CASES, classify
from tests.helpers.ranks import run_ranks

ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "main": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    "python": MemoryError,
}


class Tight:
    """A loss for whose batches there is room up to a size, from the n-th evaluation on."""

    def __init__(self, room: int, *, loss: Any = classify, after: int = 0, error: str = "device") -> None:
        self.room, self.loss, self.after, self.error = room, loss, after, ERRORS[error]
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls > self.after and len(batch[0]) > self.room:
            raise self.error()
        return self.loss(model, batch)


def batches(*sizes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 5, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def ignoring(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100)


VECTOR = torch.linspace(-1, 1, 57, dtype=torch.float64)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("after", [0, 3, 7], ids=["at once", "preparing", "in a product"])
@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_batches_are_halved_until_they_fit(hvp: str, after: int, error: str) -> None:
    model = CASES["mlp"]().model
    expected = HessianOperator(model, classify, batches(7, 3), hvp=hvp).matvec(VECTOR)
    loss_fn = Tight(2, after=after, error=error)
    operator = HessianOperator(model, loss_fn, batches(7, 3), hvp=hvp, memory_budget=0)
    for _ in range(3):
        rtol = 1e-10 if operator.exact else 1e-4
        torch.testing.assert_close(operator.matvec(VECTOR), expected, rtol=rtol, atol=1e-9 if operator.exact else 1e-5)
    assert operator.num_halvings == 2
    assert [len(batch[0]) for batch in operator.batches] == [2, 2, 2, 1, 2, 1]
    assert sum(operator.weights) == pytest.approx(1)


def test_less_is_kept_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget beyond what there is: halves of all batches together hold as much as the batches did."""
    model = CASES["mlp"]().model
    expected = HessianOperator(model, classify, batches(64, 64, 64, 64)).matvec(VECTOR)
    with HessianOperator(model, classify, batches(64), memory_budget=0) as operator:
        room = 3 * operator.bytes_per_graph
    build = DoubleBackward.__init__

    def built(self: DoubleBackward, loss: Any, parts: Any, weights: Any, *, num_cached: int) -> None:
        if num_cached * DoubleBackward.graph_size(loss, max(parts, key=lambda part: len(part[0]))) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        build(self, loss, parts, weights, num_cached=num_cached)

    monkeypatch.setattr(DoubleBackward, "__init__", built)
    operator = HessianOperator(model, classify, batches(64, 64, 64, 64), memory_budget=10**15)
    torch.testing.assert_close(operator.matvec(VECTOR), expected, rtol=1e-10, atol=1e-10)
    assert operator.num_halvings == 1
    assert operator.num_cached_graphs > 0


def test_tokens_weigh_the_parts(monkeypatch: Any) -> None:
    """A mean over the tokens that count, of which the halves hold different numbers, and some none."""
    model = CASES["mlp"]().model
    (whole,) = batches(8)
    whole[1][:4] = torch.tensor([-100, -100, 2, -100])
    whole[1][4:6] = -100

    expected = HessianOperator(model, ignoring, [whole]).matvec(VECTOR)
    # The whole fits while the loss is looked at, so that means are compared.
    counted = HessianOperator(
        model, Tight(2, loss=ignoring, after=2), [whole], batch_weight=lambda batch: float((batch[1] != -100).sum())
    )
    torch.testing.assert_close(counted.matvec(VECTOR), expected, rtol=1e-10, atol=1e-12)
    assert len(counted.batches) == 2, "two parts out of four hold no token"
    with pytest.raises(ValueError, match=r"not the mean of its parts'.*Pass batch_weight=.*smaller batches"):
        HessianOperator(model, Tight(4, loss=ignoring, after=2), [whole], weights=[3.0])


def test_an_error_says_what_would_fit() -> None:
    model = CASES["mlp"]().model
    with pytest.raises(
        MemoryError, match=r"no batch holds more than one sample.*Choose fewer parameters \(parameters="
    ):
        HessianOperator(model, Tight(0), batches(4))
    operator = HessianOperator(model, Tight(0, after=3), batches(1), memory_budget=0)
    with pytest.raises(MemoryError, match=r"about [\d.]+ kB are needed.* are free.*hvp='finite_difference'"):
        operator.matvec(VECTOR)
    # A batch without a common dimension stays whole.
    odd = (torch.zeros(4, 5, dtype=torch.float64), torch.zeros(2))
    with pytest.raises(
        MemoryError, match=r"no leading dimension to cut it along \(use a loader with smaller batches\)"
    ):
        HessianOperator(model, Tight(1), [odd], weights=[1.0])


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = CASES["mlp"]().model
    assert not is_out_of_memory(ValueError("out of memory"))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        HessianOperator(model, loss_fn, batches(4))


@pytest.mark.slow
def test_a_budget_decides_the_size_of_the_parts() -> None:
    model = CASES["mlp"]().model
    whole = HessianOperator(model, classify, batches(512))
    assert len(whole.batches) == 1
    budget = whole.bytes_per_graph // 3
    cut = HessianOperator(model, classify, batches(512), memory_budget=budget)
    assert len(cut.batches) == 8
    assert 2 * cut.bytes_per_graph <= budget
    assert cut.num_halvings == 0, "memory did not run out"
    torch.testing.assert_close(cut.matvec(VECTOR), whole.matvec(VECTOR), rtol=1e-10, atol=1e-12)
    # Further cutting ends where only what is as large as the parameters is left.
    least = HessianOperator(model, classify, batches(512), memory_budget=1)
    assert 8 < len(least.batches) < 512


def test_a_loss_that_is_no_mean_is_left_whole() -> None:
    model = CASES["mlp"]().model

    def contrastive(model: nn.Module, batch: Any) -> Tensor:
        return torch.cdist(model(batch[0]), model(batch[0]) + 1).mean()

    whole = HessianOperator(model, contrastive, batches(64))
    small = HessianOperator(model, contrastive, batches(64), memory_budget=whole.bytes_per_graph // 3)
    assert len(small.batches) == 1
    assert torch.equal(small.matvec(VECTOR), whole.matvec(VECTOR))


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """Samples are compared with each other, as in contrastive learning."""
    features = model(batch[0])
    return F.cross_entropy(features @ features.T, torch.arange(len(features)))


def summed(model: nn.Module, batch: Any) -> Tensor:
    return len(batch[0]) * classify(model, batch)


@pytest.mark.parametrize("loss", [contrastive, summed])
@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_a_loss_that_is_no_mean_is_refused_if_the_whole_never_fitted(hvp: str, loss: Any) -> None:
    """The halves are then compared with quarters."""
    model = CASES["mlp"]().model
    with pytest.raises(ValueError, match=r"not the mean of its parts'.*Pass batch_weight="):
        HessianOperator(model, Tight(4, loss=loss), batches(8), hvp=hvp, memory_budget=0)


def test_parts_that_cannot_be_compared_need_a_batch_weight() -> None:
    model = CASES["mlp"]().model
    with pytest.raises(ValueError, match=r"cannot be compared with anything that fits the memory.*batch_weight="):
        HessianOperator(model, Tight(1), batches(4), memory_budget=0)
    expected = HessianOperator(model, classify, batches(4)).matvec(VECTOR)
    operator = HessianOperator(
        model, Tight(1), batches(4), memory_budget=0, batch_weight=lambda batch: float(len(batch[0]))
    )
    torch.testing.assert_close(operator.matvec(VECTOR), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("short", ["budget", "memory"])
def test_a_head_of_zeros_hides_nothing(short: str) -> None:
    """All values of the loss and of its parts agree; their products differ."""
    model = CASES["mlp"]().model
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)

    def normalised(model: nn.Module, batch: Any) -> Tensor:
        hidden = model[:2](batch[0])
        return F.cross_entropy(model[2](hidden - hidden.mean(0)), batch[1])

    whole = HessianOperator(model, normalised, batches(64))
    if short == "budget":
        operator = HessianOperator(model, normalised, batches(64), memory_budget=whole.bytes_per_graph // 3)
        assert len(operator.batches) == 1
        assert torch.equal(operator.matvec(VECTOR), whole.matvec(VECTOR))
    else:
        with pytest.raises(ValueError, match="not the mean of its parts'"):
            HessianOperator(model, Tight(32, loss=normalised, after=2), batches(64), memory_budget=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_few_labels_that_do_not_count_leave_the_batch_whole(dtype: torch.dtype) -> None:
    """The products of whole and halves differ by half a per cent, far more than error bounds allow."""
    model = CASES["mlp"]().model.to(dtype)
    torch.manual_seed(0)
    whole = (torch.randn(512, 5, dtype=dtype), torch.randint(3, (512,)))
    whole[1][:4] = -100
    operator = HessianOperator(model, ignoring, [whole])
    budget = operator.bytes_per_graph // 3
    assert len(HessianOperator(model, ignoring, [whole], memory_budget=budget).batches) == 1
    with pytest.raises(ValueError, match=r"not the mean of its parts'"):
        HessianOperator(model, Tight(256, loss=ignoring, after=2), [whole], memory_budget=0)

    def counted(batch: Any) -> float:
        return float((batch[1] != -100).sum())

    cut = HessianOperator(model, ignoring, [whole], memory_budget=budget, batch_weight=counted)
    assert len(cut.batches) > 1
    torch.testing.assert_close(cut.matvec(VECTOR.to(dtype)), operator.matvec(VECTOR.to(dtype)))


def test_statistics_of_the_batch_leave_it_whole_without_float64() -> None:
    """A loss that casts to float32 by a name that cannot be followed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    scripted = torch.jit.script(cast)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(scripted(model(batch[0])), batch[1])

    inputs = torch.randn(2048, 5)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    operator = HessianOperator(model.train(), loss_fn, [(inputs, labels)])
    assert operator.precise_products(torch.ones(operator.num_parameters, 1)) is None
    cut = HessianOperator(model, loss_fn, [(inputs, labels)], memory_budget=operator.bytes_per_graph // 3)
    assert len(cut.batches) == 1


def cast(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def graph_loss(model: nn.Module, batch: Any) -> Tensor:
    """The first entry is a square matrix between the nodes, so half of its rows are no batch."""
    adjacency, features, labels = batch
    return F.cross_entropy(adjacency @ model(adjacency @ features), labels)


@pytest.mark.parametrize("short", ["budget", "memory"])
def test_a_batch_whose_parts_cannot_be_evaluated_stays_whole(short: str) -> None:
    model = CASES["mlp"]().model
    torch.manual_seed(0)
    nodes = torch.randn(64, 5, dtype=torch.float64)
    batch = ((torch.rand(64, 64) < 0.3).double(), nodes, torch.randint(3, (64,)))
    whole = HessianOperator(model, graph_loss, [batch])
    if short == "budget":
        operator = HessianOperator(model, graph_loss, [batch], memory_budget=whole.bytes_per_graph // 3)
        assert torch.equal(operator.matvec(VECTOR), whole.matvec(VECTOR))
    else:
        with pytest.raises(ValueError, match=r"cannot be cut.*shapes.*Pass batch_weight="):
            HessianOperator(model, Tight(32, loss=graph_loss, after=2), [batch], memory_budget=0)


def test_a_part_without_any_label_leaves_the_batch_whole() -> None:
    model = CASES["mlp"]().model
    (whole,) = batches(64)
    whole[1][:32] = -100

    operator = HessianOperator(model, ignoring, [whole])
    cut = HessianOperator(model, ignoring, [whole], memory_budget=operator.bytes_per_graph // 3)
    assert len(cut.batches) == 1
    assert torch.equal(cut.matvec(VECTOR), operator.matvec(VECTOR))
    with pytest.raises(ValueError, match=r"cannot be cut.*labels are all ignored.*Pass batch_weight="):
        HessianOperator(model, Tight(32, loss=ignoring, after=2), [whole], memory_budget=0)


def test_a_batch_without_any_label_weighs_nothing() -> None:
    model = CASES["mlp"]().model
    some, none = batches(4, 3)
    none[1][:] = -100

    operator = HessianOperator(
        model, ignoring, [none, some], batch_weight=lambda batch: float((batch[1] != -100).sum())
    )
    assert operator.weights == [1.0]
    torch.testing.assert_close(operator.matvec(VECTOR), HessianOperator(model, ignoring, [some]).matvec(VECTOR))


def test_halves_draw_other_numbers_so_a_drawing_loss_is_cut_only_with_a_batch_weight() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    whole = HessianOperator(model, classify, batches(512))
    budget = whole.bytes_per_graph // 3
    assert len(HessianOperator(model, classify, batches(512), memory_budget=budget).batches) == 1
    cut = HessianOperator(model, classify, batches(512), memory_budget=budget, batch_weight=lambda b: float(len(b[0])))
    assert len(cut.batches) > 1


def test_halving_is_of_the_largest_first() -> None:
    parts = MicroBatches([torch.zeros(9), torch.zeros(2)], [0.9, 0.1]).halved()
    assert [len(batch) for batch in parts.batches] == [5, 4, 2]
    assert parts.weights == pytest.approx([0.5, 0.4, 0.1])


def on_two_ranks(rank: int, short: int, after: int) -> tuple[Tensor, int]:
    model = CASES["mlp"]().model
    loss_fn: Any = Tight(2, after=after) if rank == short else classify
    operator = HessianOperator(
        model, loss_fn, batches(7, 3)[rank : rank + 1], process_group=dist.group.WORLD, memory_budget=0
    )
    return operator.matvec(VECTOR), operator.num_halvings


@pytest.mark.parametrize("after", [0, 3], ids=["preparing", "in a product"])
def test_all_ranks_halve_together(after: int) -> None:
    expected = HessianOperator(CASES["mlp"]().model, classify, batches(7, 3)).matvec(VECTOR)
    for outcome in run_ranks(on_two_ranks, 2, 0, after):
        product, halvings = outcome.value
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
        assert halvings == 2


def test_when_nothing_fits_on_one_rank_the_other_is_told() -> None:
    outcomes = run_ranks(on_none, 2, expect_errors=True)
    assert [outcome.error for outcome in outcomes] == ["PeerError", "MemoryError"]
    assert "rank 1 failed while cutting batches, because memory is short" in outcomes[0].message


def on_none(rank: int) -> None:
    loss_fn: Any = Tight(0) if rank else classify
    HessianOperator(CASES["mlp"]().model, loss_fn, batches(7, 3)[rank : rank + 1], process_group=dist.group.WORLD)
