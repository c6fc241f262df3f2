"""The Hessian of a loss over fixed batches, as a linear operator that all ranks share."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessian_callback.linalg.distributed import PeerError, RankLostError, Ranks
from hessian_callback.operators.batches import leading_dimension
from hessian_callback.operators.derivatives import check_parameters_visible
from hessian_callback.operators.engine_selection import (
    TIMED_PRODUCTS,
    Timing,
    TracingStatistics,
    tracing_pays,
    trial_pays,
)
from hessian_callback.operators.fully_shard import ShardedFiniteDifference, is_sharded, reshard, unsharded
from hessian_callback.operators.memory import free_memory, is_out_of_memory, readable_size
from hessian_callback.operators.micro_batches import MicroBatches
from hessian_callback.operators.names import matching
from hessian_callback.operators.products import (
    BatchLoss,
    DoubleBackward,
    FiniteDifference,
    Linearize,
    ProductEngine,
    check_agreement,
    trial_directions,
)
from hessian_callback.operators.tracing import TracedProduct, signature

__all__ = ["HessianOperator", "select_parameters"]

ParameterFilter = str | Callable[[str, nn.Parameter], bool]

# Share of the free memory that cached graphs may take when no budget is given. The rest is for the training
# run's own peak, which may come later than the measurement.
_BUDGET_SHARE = 0.25
# A graph's tensors live beside temporaries of about their size while it is built.
_BUILD_FACTOR = 2.0
# Cutting batches further gains nothing once a graph holds mostly what is as large as the parameters.
_WORTH_CUTTING = 0.75


class HessianOperator:
    r"""The Hessian of a weighted mean loss, :math:`H = \sum_i w_i \nabla^2_\theta L_i(\theta) / \sum_i w_i`.

    :math:`L_i` is the mean loss of batch i and :math:`\theta` the chosen parameters, flattened and joined in the
    order of ``parameter_names``. With several ranks the sums run over the batches of all of them, and every
    method below is a collective that all ranks must call.

    What does not depend on the direction is done once, when the operator is made: the gradient graphs of as many
    batches as ``memory_budget`` allows are kept, those of the others are rebuilt in every product. So parameters,
    buffers and batches must stay as they are while the operator is in use.

    A batch whose graph alone exceeds the budget is cut into micro-batches along its leading dimension. When memory
    runs out all the same, on any rank and in any product, all ranks halve theirs and go on. Each part then weighs
    what it holds of its batch, and the mean of the parts is compared with that of the whole.

    Of a model under ``fully_shard`` (FSDP2) every rank holds the whole parameters until the operator is closed,
    except with ``hvp="finite_difference"``, which leaves them sharded. Close it, or use it in a ``with`` block.

    Args:
        model: the module that holds the parameters; called by ``loss_fn`` only. Put it in eval mode: in train mode
            dropout makes the loss random and batch normalisation changes buffers.
        loss_fn: ``(model, batch) -> scalar``, the mean loss over the batch.
        batches: this rank's batches, on the model's device. May be empty on some ranks, not on all.
        weights: one positive number per batch; usually its number of samples.
        batch_weight: ``batch -> float``, what the mean loss of a batch averages over, for example counted tokens;
            default: the leading dimension that its tensors share. Where ``weights`` are given as well, it serves for
            the parts of batches only.
        parameters: which parameters: a regular expression (``re.search`` on the name) or ``(name, parameter) ->
            bool``; ``None`` for all. Frozen ones are never chosen; tied ones count once, under any of their names.
        process_group: the ranks that share the batches; in a single process leave it out. Pass
            ``torch.distributed.group.WORLD`` for all ranks, or a group of one for a Hessian of this rank alone.
        hvp: ``"double_backward"``, ``"linearize"`` or ``"finite_difference"``; ``"auto"`` begins with double
            backward and changes over to linearize where that, measured on this model, saves time: see
            `expect_products`. All but differences are exact.
        memory_budget: bytes that gradient graphs may take on this rank; ``None``: a quarter of what is free. With 0
            none are kept and no batch is cut.
        experience: what earlier operators of this model have learnt for ``"auto"``; added to.

    Attributes:
        num_parameters: P.
        parameter_names: names of the chosen parameters, in the order of the flat vector.
        engine: the name of the product engine in use.
        engine_reason: why it is, in a few words.
        mean_loss: the weighted mean loss over all ranks' batches, as it was evaluated while preparing.
        num_cached_graphs: batches whose gradient graph is kept on this rank.
        bytes_per_graph: the size of the largest batch's graph, in bytes; 0 where it is not known.
        num_halvings: how many times the batches were halved because memory had run out.

    Raises:
        ValueError: if no parameter matches; if the loss is not a differentiable scalar; if weights don't fit;
            if ``torch.distributed`` runs several ranks and no ``process_group`` was given.
        ArithmeticError: if the loss is NaN or infinite.
        DoubleBackwardError: if an operation cannot be differentiated twice.
        MemoryError: if not even the smallest parts of the batches fit.
        PeerError: if another rank failed.

    Example:
        The loss :math:`\frac{1}{N} \|X \theta - y\|^2` has the Hessian :math:`\frac{2}{N} X^T X`.

        >>> model = nn.Linear(2, 1, bias=False).double()
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> operator = HessianOperator(model, lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1]), [(X, y)])
        >>> operator.matvec(torch.tensor([1.0, 1.0], dtype=torch.float64))
        tensor([1., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
        batch_weight: Callable[[Any], float] | None = None,
        parameters: ParameterFilter | None = None,
        process_group: dist.ProcessGroup | None = None,
        hvp: str = "auto",
        memory_budget: int | None = None,
        experience: TracingStatistics | None = None,
    ) -> None:
        if process_group is None and Ranks.default().world_size > 1:
            raise ValueError(
                f"torch.distributed runs {dist.get_world_size()} ranks, so say whose batches these are: pass "
                "process_group=torch.distributed.group.WORLD to sum over all ranks (all of them must then call), "
                "or a group of one, torch.distributed.new_group([rank]), for this rank's own Hessian"
            )
        if hvp not in _ENGINES:
            raise ValueError(f"hvp must be one of {', '.join(map(repr, _ENGINES))}, got {hvp!r}")
        self.ranks = Ranks(process_group)
        self.engine_reason = "asked for by name" if hvp != "auto" else "no change-over was considered"
        self._experience = experience if experience is not None else TracingStatistics()
        self._products_left = 0
        self._seconds: list[float] = []
        self._considered = hvp != "auto"
        self._held = ExitStack()
        sharded = is_sharded(model)
        if sharded and hvp == FiniteDifference.name:
            reshard(model)
        elif sharded:
            self._held.enter_context(unsharded(model))
        try:
            self._build(model, loss_fn, list(batches), weights, batch_weight, parameters, hvp, memory_budget, sharded)
        except BaseException:
            self._held.close()
            raise

    def _build(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: list[Any],
        weights: Sequence[float] | None,
        batch_weight: Callable[[Any], float] | None,
        parameters: ParameterFilter | None,
        hvp: str,
        memory_budget: int | None,
        sharded: bool,
    ) -> None:
        chosen = select_parameters(model, parameters)
        self.parameter_names = list(chosen)
        self.num_parameters = sum(parameter.numel() for parameter in chosen.values())
        self.partition = self.ranks.partition(self.num_parameters)
        self.dtype, self.device = _common_type(chosen)
        self.bytes_per_graph = 0
        self.num_halvings = 0
        self._hvp, self._memory_budget = hvp, memory_budget
        self._mean: float | None = None
        self._budget = 0
        self._ceiling: int | None = None  # what the budget has come down to, because memory ran out
        self._loss = BatchLoss(model, loss_fn, list(chosen.values()))
        self._padding = _padding_rows(model, chosen)
        with self.ranks.propagate_errors("weighing the batches"):
            own_weights = _weigh(batches, weights, batch_weight, alone=self.ranks.world_size == 1)
        total = float(self.ranks.all_reduce(self._control_tensor([sum(own_weights)])))
        if total == 0:
            raise ValueError("no batches, so no Hessian: pass at least one batch on at least one rank")
        self._parts = MicroBatches(batches, [weight / total for weight in own_weights], batch_weight)
        self._engine: ProductEngine | None = None
        if sharded and hvp == FiniteDifference.name:
            sharing = ShardedFiniteDifference(self._loss, batches, self._parts.weights, self.ranks)
            self._engine = sharing
            self._mean = self._check_loss(MicroBatches(sharing.batches, sharing.weights)) / self.ranks.world_size
            return
        self._prepare()

    @property
    def batches(self) -> list[Any]:
        """This rank's batches as they are evaluated: those given, or parts of them."""
        return list(self._parts.batches)

    @property
    def weights(self) -> list[float]:
        """The weight of each of them; those of all ranks add up to 1."""
        return list(self._parts.weights)

    @property
    def engine(self) -> str:
        """The name of the product engine in use."""
        return self._running.name

    @property
    def exact(self) -> bool:
        """Whether products are exact up to rounding."""
        return self._running.exact

    @property
    def num_cached_graphs(self) -> int:
        """Batches whose gradient graph is kept on this rank."""
        return self._engine.num_cached if isinstance(self._engine, DoubleBackward) else 0

    @property
    def relative_error(self) -> float:
        """A-priori error of a product relative to the largest eigenvalue.

        Finite differences have an error that depends on third derivatives, which nobody knows beforehand; the
        solver measures their asymmetry and adds it.
        """
        eps = torch.finfo(self.dtype).eps
        return float(64 * eps if self.exact else eps**0.5)

    @property
    def mean_loss(self) -> float:
        """The weighted mean loss over all ranks' batches; a collective."""
        own = self._control_tensor([0.0 if self._mean is None else self._mean])
        return float(self.ranks.all_reduce(own))

    def seconds_per_product(self) -> float:
        """Time a product, the second of two: seconds on the slowest rank. A collective."""
        vector = torch.ones(self.partition.slice_length, dtype=self.dtype, device=self.device)
        self.matvec_slice(vector)
        began = self._now()
        self.matvec_slice(vector)
        return self._largest(self._now() - began)[0]

    def expect_products(self, count: int) -> None:
        """Say how many products are going to be formed, so that ``hvp="auto"`` can weigh a change-over.

        After `TIMED_PRODUCTS` products all ranks decide together, in one short exchange, whether one batch is
        worth tracing, and, if so, in another whether the products left are worth tracing the rest. Never told,
        ``"auto"`` stays with double backward. Both engines are exact, so eigenvalues agree to rounding.

        Args:
            count: products expected from now on, the same on all ranks.
        """
        self._products_left = count

    def matvec(self, vector: Tensor) -> Tensor:
        """Multiply, ``(P,) -> (P,)``: the same vector on all ranks, and the same result."""
        if vector.shape != (self.num_parameters,):
            raise ValueError(f"expected a vector of shape ({self.num_parameters},), got {tuple(vector.shape)}")
        piece = self._sum(vector.to(self.device, self.dtype))
        return self.ranks.all_gather(piece, self.partition)

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply with vectors that are cut over the ranks, ``(slice_length,) -> (slice_length,)``.

        One all-gather and one reduce-scatter. When the product fails on any rank, it raises on all of them.
        """
        return self._sum(self.ranks.all_gather(vector, self.partition))

    def close(self) -> None:
        """Let go of the gradient graphs, and shard again what was sharded. The operator can't be used afterwards."""
        self._running.close()
        self._held.close()

    @property
    def _running(self) -> ProductEngine:
        assert self._engine is not None, "the constructor leaves with an engine or an error"
        return self._engine

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------

    def _sum(self, vector: Tensor) -> Tensor:
        timed = not self._considered and self._products_left > 0
        if timed and len(self._seconds) >= TIMED_PRODUCTS:
            self._consider_tracing()
            timed = False
        self._products_left -= 1
        while True:
            error: Exception | None = None
            product: Tensor | None = None
            try:
                began = self._now() if timed else 0.0
                product = self._running.product(self._without_padding(vector))
                if timed:
                    self._seconds.append(self._now() - began)
            except Exception as exception:
                error = exception
            try:
                return self.ranks.reduce_scatter(
                    product,
                    self.partition,
                    dtype=self.dtype,
                    device=self.device,
                    stage="computing a Hessian-vector product",
                )
            except PeerError as peer:
                error = error or peer
            self._make_room(error)
            self._prepare()

    def _without_padding(self, vector: Tensor) -> Tensor:
        if self._padding:
            vector = vector.clone()
            for row in self._padding:
                vector[row] = 0
        return vector

    def _prepare(self) -> None:
        """Get an engine ready, on all ranks, for the batches as they are or for as small parts as it takes."""
        while True:
            try:
                with self.ranks.propagate_errors("preparing the Hessian-vector products"):
                    self._engine = self._new_engine()
                return
            except Exception as exception:
                error = exception
            self._make_room(error)

    def _make_room(self, error: Exception) -> None:
        """Halve the batches on all ranks if memory is what a rank ran short of; raise the error if not."""
        if isinstance(error, RankLostError) or isinstance(self._engine, ShardedFiniteDifference):
            raise error
        short = is_out_of_memory(error)
        if self.ranks.failed_ranks(not short and not isinstance(error, PeerError)) or not self.ranks.failed_ranks(
            short
        ):
            raise error
        said = str(error)
        error.__traceback__ = None  # Its frames hold the tensors that there was no room beside.
        if self._engine is not None:
            self._engine.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Were only batches smaller, as many bytes as before would be kept of them.
        kept_at_most = min(self._budget, len(self._parts.batches) * self.bytes_per_graph)
        if kept_at_most > 0:
            self._ceiling = kept_at_most // 2
        with self.ranks.propagate_errors("cutting batches, because memory is short"):
            try:
                self._parts = self._parts.halved()
            except ValueError as reason:
                if short:  # Otherwise the other ranks' batches can still be cut.
                    raise MemoryError(self._nothing_fits(str(reason), said)) from error
        self.num_halvings += 1

    def _nothing_fits(self, reason: str, said: str) -> str:
        free = free_memory(self.device)
        have = "" if free is None else f", {readable_size(free)} are free"
        need = (
            f"about {readable_size(_BUILD_FACTOR * self.bytes_per_graph)} are needed" if self.bytes_per_graph else said
        )
        return (
            f"out of memory for a Hessian-vector product, and {reason}: {need}{have}. Choose fewer parameters "
            "(parameters=...), shorter or smaller inputs, or hvp='finite_difference', which needs about as much as a "
            "training step"
        )

    def _new_engine(self) -> ProductEngine:
        hvp, parts = self._hvp, self._parts
        if not parts.batches:
            return (
                DoubleBackward(self._loss, [], []) if hvp in ("auto", DoubleBackward.name) else self._other_engine(hvp)
            )
        self._mean = self._check_loss(parts)
        if hvp not in ("auto", DoubleBackward.name):
            return self._other_engine(hvp)
        # The size of the largest graph stands for the others.
        self.bytes_per_graph = DoubleBackward.graph_size(self._loss, parts.largest)
        budget = self._memory_budget
        if budget is None:
            free = free_memory(self.device)
            # Ranks on one machine share the main memory.
            sharing = self.ranks.world_size if self.device.type == "cpu" else 1
            budget = 0 if free is None else int(_BUDGET_SHARE * free / sharing)
        if self._ceiling is not None:
            budget = min(budget, self._ceiling)
        self._budget = budget
        self._cut_to(budget)
        parts = self._parts
        spare = budget - _BUILD_FACTOR * self.bytes_per_graph
        count = len(parts.batches)
        num_cached = max(0, min(count, int(spare // max(self.bytes_per_graph, 1)) + 1)) if spare >= 0 else 0
        return DoubleBackward(self._loss, parts.batches, parts.weights, num_cached=num_cached)

    def _cut_to(self, budget: int) -> None:
        """Halve the batches until a graph can be built within the budget, as far as that can be done and helps."""
        while 0 < budget < _BUILD_FACTOR * self.bytes_per_graph:
            try:
                smaller = self._parts.halved()
                self._check_loss(smaller)
            except ValueError:
                return  # One whole batch is then built at a time.
            size = DoubleBackward.graph_size(self._loss, smaller.largest)
            if size > _WORTH_CUTTING * self.bytes_per_graph:
                return
            self._parts, self.bytes_per_graph = smaller, size

    def _other_engine(self, hvp: str) -> ProductEngine:
        batches, weights = self._parts.batches, self._parts.weights
        if hvp == FiniteDifference.name:
            return FiniteDifference(self._loss, batches, weights)
        return Linearize(self._loss, batches, weights)

    # -- choosing an engine --------------------------------------------------------------------

    def _consider_tracing(self) -> None:
        """Change over to `Linearize`, on all ranks or on none, if that is measured to save time."""
        self._considered = True
        left, known = self._products_left, self._experience
        engine = self._running
        assert isinstance(engine, DoubleBackward)
        own = statistics.median(self._seconds[1:])
        product, trace, steady = self._largest(own, known.expected_trace_seconds(self._num_nodes()), self._shapes())
        # A trace for each further shape; for each batch its constants and a product by either engine.
        rest = max(0.0, steady - 1) * trace + 3 * product
        if not trial_pays(Timing(product, trace, rest), left, known):
            self.engine_reason = known.failure or "too few products are left to pay for tracing"
            return
        trial = self._trial(engine)
        # One number says for each rank what went wrong, if something did.
        out_of_room = trial is not None and trial.num_bytes > self._budget
        failed = trial is not None and trial.failure is not None
        seconds = (0.0, 0.0, 0.0) if trial is None else (trial.trace_seconds, trial.ratio * own, trial.ratio)
        trace, changed, ratio, any_failed, any_out = self._largest(*seconds, float(failed), float(out_of_room))
        if any_failed:
            known.failure = (trial.failure if trial is not None else None) or "another rank cannot trace the loss"
        elif any_out:
            known.failure = "the constants of a trace exceed the memory budget"
        if known.failure is not None:
            self.engine_reason = known.failure
            return
        known.trace_seconds, known.ratio = trace, changed / product
        if not tracing_pays(Timing(product, 0.0, max(0.0, steady - 1) * trace + 3 * product), left, known.ratio):
            self.engine_reason = f"a traced product takes {ratio:.2f} of its time, not enough for the products left"
            return
        self._change_over(engine, trial)

    def _trial(self, engine: DoubleBackward) -> _Trial | None:
        """Trace one batch and time its product against double backward; ``None`` on a rank without batches."""
        if not engine.batches:
            return None
        batch = self._parts.largest
        index = next(n for n, other in enumerate(engine.batches) if other is batch)
        directions = trial_directions(self._loss)
        try:
            with self._loss.differentiable():
                began = self._now()
                traced, shared = Linearize.trace(self._loss, batch)
                seconds = self._now() - began
                constants = traced.constants(batch)
                check_agreement(Linearize.name, traced.product(constants, directions), engine, index)
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(2):
                    began = self._now()
                    traced.product(constants, directions)
                    between = self._now()
                    engine.part(index, directions)
                    times[0].append(between - began)
                    times[1].append(self._now() - between)
            size = traced.size(batch, constants) * len(engine.batches)
            first = (signature(batch), traced) if shared else None
            return _Trial(seconds, min(times[0]) / min(times[1]), size, first)
        except Exception as error:
            return _Trial(failure=f"tracing failed ({type(error).__name__}: {_beginning(error)})")

    def _change_over(self, engine: DoubleBackward, trial: _Trial | None) -> None:
        """Replace double backward batch by batch; where that fails on any rank, all go back to it."""
        error: Exception | None = None
        changed: ProductEngine = engine
        if engine.batches:
            try:
                changed = Linearize(
                    self._loss,
                    engine.batches,
                    engine.weights,
                    reference=engine,
                    first=None if trial is None else trial.first,
                )
            except Exception as exception:
                exception.__traceback__ = None  # Its frames hold what was traced so far.
                error = exception
        else:
            changed = Linearize(self._loss, [], [])
        if self.ranks.failed_ranks(error is not None):
            why = "on another rank" if error is None else f"{type(error).__name__}: {_beginning(error)}"
            self._experience.failure = self.engine_reason = f"tracing failed ({why})"
            del changed
            engine.close()
            self._prepare()
            return
        self._engine = changed
        ratio = self._experience.ratio
        assert ratio is not None
        self.engine_reason = f"measured to take {ratio:.2f} of double backward's time"

    def _num_nodes(self) -> int:
        return self._running.num_nodes if isinstance(self._running, DoubleBackward) else 0

    def _shapes(self) -> float:
        """How many traces the batches need; those that share none need one each."""
        keys = [signature(batch) for batch in self._parts.batches]
        return float(len({key for key in keys if key is not None}) + sum(key is None for key in keys))

    def _largest(self, *values: float) -> list[float]:
        """Return the largest of the ranks' values, each; one exchange."""
        largest: list[float] = self.ranks.gather(values).amax(dim=0).tolist()
        return largest

    def _now(self) -> float:
        if self.device.type == "cuda":  # Only while engines are compared: what was queued must be done.
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check_loss(self, parts: MicroBatches) -> float:
        """Evaluate every batch once, and the first one twice; return their weighted sum.

        If whole batches were evaluated before these parts of them, their sums must agree.
        """
        batches = parts.batches
        values = []
        with self._loss.differentiable():
            for index, batch in enumerate([*batches, batches[0]]):
                loss = self._loss.value(batch)
                if index == 0:
                    check_parameters_visible(loss)
                value = float(loss.detach())
                if value != value or abs(value) == float("inf"):
                    raise ArithmeticError(
                        f"the loss of batch {index % len(batches)} is {value}: no Hessian exists there. Check the "
                        "batch for invalid inputs and whether training has diverged"
                    )
                values.append(value)
                del loss  # with its graph, before the next
        tolerance = 1e4 * torch.finfo(self.dtype).eps
        first, again = values[0], values[-1]
        if abs(first - again) > tolerance * max(abs(first), abs(again)):
            raise ValueError(
                f"the loss is random: the same batch gave {first:.9g} and then {again:.9g}. Put the model in eval "
                "mode, and remove sampling or augmentation from the loss, or fix its seed inside loss_fn"
            )
        terms = [weight * value for value, weight in zip(values, parts.weights, strict=False)]
        scale = sum(map(abs, terms))
        if self._mean is not None and abs(sum(terms) - self._mean) > tolerance * scale:
            raise ValueError(
                "memory is short, but batches cannot be cut: the loss of a batch is not the mean of its parts' "
                f"(with its weight, {self._mean:.9g} and {sum(terms):.9g}). Pass "
                "batch_weight=..., what the mean loss averages over, or a loader with smaller batches"
            )
        return sum(terms)

    def _control_tensor(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.ranks.control_device)


@dataclass(frozen=True)
class _Trial:
    """What tracing one batch has shown on this rank."""

    trace_seconds: float = 0.0
    ratio: float = 0.0
    num_bytes: int = 0  # of the constants of all batches
    first: tuple[Hashable, TracedProduct] | None = None
    failure: str | None = None


def _beginning(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else text[:97] + "..."


_ENGINES = ("auto", DoubleBackward.name, Linearize.name, FiniteDifference.name)


def select_parameters(model: nn.Module, parameters: ParameterFilter | None = None) -> dict[str, nn.Parameter]:
    r"""Return the trainable parameters that a filter chooses, by name, each tensor once.

    Args:
        model: the module.
        parameters: a regular expression (``re.search``), ``(name, parameter) -> bool``, or ``None`` for all.

    Raises:
        ValueError: if none is chosen, or the expression is not valid or takes too long.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), r"^1\."))
        ['1.weight', '1.bias']
    """
    wanted: Callable[[str, nn.Parameter], bool]
    if isinstance(parameters, str):
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        matched = set(matching("parameters", parameters, every))

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return name in matched

    else:
        wanted = parameters if parameters is not None else lambda name, parameter: True
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    # A tied parameter has several names, and the user may mean any of them.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) not in seen and wanted(name, parameter):
            seen.add(id(parameter))
            chosen[name] = parameter
    if not chosen:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not names:
            raise ValueError("the model has no parameter that requires grad, so no Hessian; unfreeze some")
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"parameters={parameters!r} chooses no trainable parameter; there are: {shown}")
    return chosen


def _padding_rows(model: nn.Module, chosen: dict[str, nn.Parameter]) -> list[slice]:
    """Where the flat vector holds the padding row of an embedding: a constant to backward, but not to a difference.

    Not those of a weight that is tied to another module, which may use and train that row.
    """
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    paddings = {
        id(module.weight): module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    rows, first = [], 0
    for parameter in chosen.values():
        padding = paddings.get(id(parameter))
        if padding is not None and users[id(parameter)] == 1:
            width = parameter.shape[1]
            rows.append(slice(first + padding * width, first + (padding + 1) * width))
        first += parameter.numel()
    return rows


def _weigh(
    batches: list[Any],
    weights: Sequence[float] | None,
    batch_weight: Callable[[Any], float] | None,
    *,
    alone: bool,
) -> list[float]:
    if weights is not None:
        result = [float(weight) for weight in weights]
        if len(result) != len(batches):
            raise ValueError(f"there are {len(batches)} batches but {len(result)} weights; pass one per batch")
    elif batch_weight is not None:
        result = [float(batch_weight(batch)) for batch in batches]
    elif alone and len(batches) == 1:
        result = [1.0]  # A single batch weighs the same whatever its size.
    else:
        result = [leading_dimension(batch) for batch in batches]
    for index, weight in enumerate(result):
        if not 0 < weight < float("inf"):
            raise ValueError(f"batch {index} has weight {weight}; weights must be positive and finite")
    return result


def _common_type(parameters: dict[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the chosen parameters lie on several devices ({', '.join(sorted(map(str, devices)))}); "
            "choose those of one device with parameters="
        )
    if not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
        raise ValueError(
            f"the chosen parameters have dtype {', '.join(sorted(str(dtype) for dtype in dtypes))}; the Hessian needs "
            "all of them in float32 or all in float64. Pass a copy of the model, copy.deepcopy(model).float()"
        )
    return dtypes.pop(), devices.pop()
