"""Tests of a user's loss: copies of batches, explained errors, refused collectives, and how it reduces a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import all_reduce
from torch.nn import functional

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.errors import (
    LossError,
    NotReadyError,
    SampleError,
    UserCodeError,
    may_pass,
    one_line,
    sample_errors,
)
from hessian_callback.measurement.loss import CheckedLoss, loss_reduction, mean_loss, refuse_collectives
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.hessian import HessianOperator
from tests.helpers.ranks import run_ranks

# -- the batch ---------------------------------------------------------------------------------------


def popping(model: Any, batch: Any) -> torch.Tensor:
    labels = batch.pop("y")
    batch["seen"] = True
    return (model(batch.pop("x")) - labels).square().mean()


def normalising(model: Any, batch: Any) -> torch.Tensor:
    batch["x"].sub_(1).div_(2)
    batch["y"] = batch["y"] * 2
    return (model(batch["x"]) - batch["y"]).square().mean()


@pytest.mark.parametrize("change", [popping, normalising])
@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "finite_difference"])
def test_the_hessian_of_a_loss_that_changes_its_batch(change: Any, hvp: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    batch = {"x": x.clone(), "y": x[:, :1].clone()}
    used = (x - 1) / 2 if change is normalising else x
    inputs = torch.cat([used, torch.ones(8, 1, dtype=torch.float64)], dim=1)
    exact = 2 / 8 * inputs.T @ inputs
    with HessianOperator(model, CheckedLoss(change, "change"), [batch], hvp=hvp) as operator:
        dense = torch.stack([operator.matvec(row) for row in torch.eye(4, dtype=torch.float64)])
    tolerance = 1e-5 if hvp == "finite_difference" else 1e-12
    assert torch.allclose(dense, exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(batch["x"], x)
    assert list(batch) == ["x", "y"]


class Handle:
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a handle")


def test_objects_that_cannot_be_copied_are_named_once() -> None:
    loss = CheckedLoss(lambda model, batch: batch["x"].sum(), "loss")
    batch = {"x": torch.ones(1), "handle": Handle()}
    with pytest.warns(
        UserWarning, match=r"can't be copied \(Handle\).*change that the loss makes to them stays"
    ) as all_:
        assert [float(loss(None, batch)) for _ in range(3)] == [1, 1, 1]
    assert len(all_) == 1


# -- errors ------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


ERRORS = [
    TypeError("list indices"),
    ValueError("too many values"),
    KeyError("labels"),
    AttributeError("no attribute x"),
    IndexError("out of range"),
    AssertionError("a"),
    RuntimeError("size mismatch"),
    NotImplementedError("forward"),
    StopIteration(),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_of_the_loss_is_explained_once(error: Exception) -> None:
    inner = CheckedLoss(failing(error), "Net.training_step", origin="the validation loader", remedy="Pass loss_fn.")
    outer = CheckedLoss(lambda model, batch: inner(model, batch), "outer")
    with pytest.raises(LossError) as caught:
        outer(nn.Linear(1, 1).eval(), torch.ones(1))
    assert isinstance(caught.value, UserCodeError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is error
    text = str(caught.value)
    assert text.startswith(
        f"Net.training_step raised {one_line(error)}, on a batch of the validation loader in eval mode"
    )
    assert text.endswith("Pass loss_fn.")
    with pytest.raises(LossError, match="in train mode"):
        inner(nn.Linear(1, 1), torch.ones(1))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError("disk"),
        ConnectionResetError(),
        KeyboardInterrupt(),
        SystemExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_may_pass_are_left_as_they_are(error: BaseException) -> None:
    assert may_pass(error)
    for call in (lambda: CheckedLoss(failing(error), "loss")(None, None), lambda: failing_in_samples(error)):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error


def failing_in_samples(error: BaseException) -> None:
    with sample_errors("loading"):
        raise error


def test_errors_of_data_are_explained_once() -> None:
    with pytest.raises(SampleError, match=r"loading raised KeyError: 'x'\. Samples are loaded") as caught:
        failing_in_samples(KeyError("x"))
    with pytest.raises(SampleError) as again:
        failing_in_samples(caught.value)
    assert again.value is caught.value


def test_a_missing_second_derivative_keeps_its_explanation() -> None:
    message = "derivative for aten::foo_backward is not implemented"
    with pytest.raises(DoubleBackwardError, match="aten::foo_backward has no double backward"):
        CheckedLoss(failing(RuntimeError(message)), "loss")(None, None)


class Later(nn.Module):
    def start(self) -> None:
        self.outputs: list[float] = []

    def step(self, batch: Any) -> torch.Tensor:
        self.outputs.append(1.0)
        return batch.sum()


def test_an_attribute_that_a_hook_sets_later() -> None:
    model = Later()
    loss = CheckedLoss(lambda model, batch: model.step(batch), "Later.step")
    with pytest.raises(NotReadyError, match=r"does not have.*'outputs'.*set it in __init__ or setup\(\)") as caught:
        loss(model, torch.ones(1))
    assert may_pass(caught.value)
    model.start()
    assert loss(model, torch.ones(1)) == 1
    # A name that the class does not mention is a mistake for good, and so is an attribute of something else.
    for wrong in (lambda model, batch: model.outptus, lambda model, batch: batch.outputs):
        with pytest.raises(LossError, match="AttributeError"):
            CheckedLoss(wrong, "loss_fn")(Later(), torch.ones(1))


def test_a_batch_without_a_loss_names_the_weight() -> None:
    loss = CheckedLoss(lambda model, batch: None, "step", remedy="Pass loss_fn.")
    with pytest.raises(LossError, match=r"returned None.*Training skips.*weight 0 with batch_weight.*Pass loss_fn"):
        loss(None, None)
    with pytest.raises(LossError, match=r"returned None"):
        CheckedLoss(lambda model, batch: {"loss": None}, "step")(None, None)


# -- collectives -------------------------------------------------------------------------------------


class Gathers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


COLLECTIVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "all_reduce": lambda x: dist.all_reduce(x.detach()),
    "imported by name": lambda x: all_reduce(x.detach()),
    "custom function": Gathers.apply,
    "torch.distributed.nn": lambda x: torch.distributed.nn.functional.all_gather(x),
    "functional": lambda x: torch.distributed._functional_collectives.all_reduce(x, "sum", [0, 1]).sum(),
    "objects": lambda x: dist.all_gather_object([None, None], {"a": 1}),
    "barrier": lambda x: dist.barrier(),
    "broadcast": lambda x: dist.broadcast(x.detach(), 0),
    "send": lambda x: dist.send(x.detach(), 1 - dist.get_rank()),
    "group": lambda x: dist.group.WORLD.allreduce([x.detach()]).wait(),
    "asynchronous": lambda x: dist.all_reduce(x.detach(), async_op=True),
}


def _refused(rank: int) -> Any:
    model = nn.Linear(2, 1)
    messages = []
    for collective in COLLECTIVES.values():

        def loss(model: Any, batch: Any, collective: Any = collective) -> torch.Tensor:
            collective(model(batch))
            return model(batch).mean()

        # Ranks hold different numbers of batches, so what is not refused hangs.
        batches = [torch.ones(3, 2)] * (1 + rank)
        try:
            HessianOperator(model, CheckedLoss(loss, "loss"), batches, process_group=dist.group.WORLD)
        except LossError as error:
            messages.append(str(error))
    total = torch.ones(1)
    dist.all_reduce(total)  # allowed again
    return messages, float(total)


def _of_another_thread(rank: int) -> Any:
    total = torch.ones(1)
    thread = threading.Thread(target=dist.all_reduce, args=(total,))
    with refuse_collectives():
        thread.start()
        thread.join()
    return float(total)


def test_collectives_in_a_loss_are_refused_on_all_ranks_at_once() -> None:
    for outcome in run_ranks(_refused, 2):
        messages, total = outcome.value
        assert len(messages) == len(COLLECTIVES)
        assert all("communicates with other ranks" in text and "Pass loss_fn=..." in text for text in messages)
        assert total == 2


def test_collectives_of_other_threads_go_on() -> None:
    assert [outcome.value for outcome in run_ranks(_of_another_thread, 2)] == [2, 2]


def test_nothing_is_refused_without_other_ranks() -> None:
    with refuse_collectives():
        assert torch.ones(2).sum() == 2


# -- means and reductions ----------------------------------------------------------------------------


def test_mean_over_ragged_batches() -> None:
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    assert mean_loss(lambda _, batch: batch.mean(), None, batches, [2, 1], Ranks()) == 3.0


@given(st.integers(2, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_how_a_loss_reduces_a_batch(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    batch = (logits, torch.randint(0, 3, (size,), generator=generator))
    for reduction in ("mean", "sum"):
        loss = lambda _, b, r=reduction: functional.cross_entropy(b[0], b[1], reduction=r)  # noqa: E731
        assert loss_reduction(loss, None, batch) == reduction


def test_class_weights_and_contrasts_are_neither_mean_nor_sum() -> None:
    x = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.0, 0.3], [0.1, 2.0]])
    batch = (x, torch.tensor([0, 0, 0, 1]))
    weighted = lambda _, b: functional.cross_entropy(b[0], b[1], weight=torch.tensor([1.0, 5.0]))  # noqa: E731
    contrast = lambda _, b: functional.cross_entropy(b[0] @ b[0].T, torch.arange(len(b[0])))  # noqa: E731
    assert loss_reduction(weighted, None, batch) == "other"
    assert loss_reduction(contrast, None, batch) == "other"
    # With the right weights the first one is a mean.
    weigh = lambda b: float(torch.tensor([1.0, 5.0])[b[1]].sum())  # noqa: E731
    assert loss_reduction(weighted, None, batch, batch_weight=weigh) == "mean"


def test_what_has_no_halves_or_no_value_is_left_open() -> None:
    for batch in (torch.ones(1), (torch.ones(2), torch.ones(3)), torch.zeros(4), torch.full((4,), float("nan"))):
        assert loss_reduction(lambda _, b: b[0].sum() if isinstance(b, tuple) else b.mean(), None, batch) is None
