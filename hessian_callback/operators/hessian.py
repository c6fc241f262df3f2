"""The Hessian of a loss over fixed batches, as a linear operator that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessian_callback.linalg.distributed import PeerError, Ranks
from hessian_callback.operators.batches import leading_dimension
from hessian_callback.operators.displaced_loss import DisplacedLoss
from hessian_callback.operators.engine_selection import EngineSelection, TracingStatistics, largest_over_ranks
from hessian_callback.operators.fully_shard import ShardedFiniteDifference, is_sharded, reshard, unsharded
from hessian_callback.operators.functional_loss import FunctionalLoss
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.memory_plan import MemoryPlan
from hessian_callback.operators.micro_batches import MicroBatches
from hessian_callback.operators.padding import padding_rows
from hessian_callback.operators.parameters import ParameterFilter, common_type, select_parameters
from hessian_callback.operators.products import DoubleBackward, FiniteDifference, Linearize, ProductEngine
from hessian_callback.operators.reference_products import ReferenceProducts

__all__ = ["HessianOperator"]

_ENGINES = ("auto", DoubleBackward.name, Linearize.name, FiniteDifference.name)


class HessianOperator:
    r"""The Hessian of a weighted mean loss, :math:`H = \sum_i w_i \nabla^2_\theta L_i(\theta) / \sum_i w_i`.

    :math:`L_i` is the mean loss of batch i and :math:`\theta` the chosen parameters, flattened and joined in the
    order of ``parameter_names``; a complex parameter counts as its real and imaginary parts. With several ranks the
    sums run over the batches of all of them, and every method below is a collective that all ranks must call.

    The gradient graphs of as many batches as ``memory_budget`` allows are built once and kept. Those of the others
    are rebuilt in every product. So parameters, buffers and batches must not change while the operator is in use.
    Autograd records only operations that depend on the chosen parameters.

    A batch whose graph alone exceeds the budget is cut into micro-batches along its leading dimension. If memory
    runs out, on any rank and in any product, all ranks halve their batches and continue. A product along a random
    direction must agree before and after, so a loss that is no mean over samples is not cut.

    A loss that draws random numbers from Python's, NumPy's or PyTorch's global generators is measured with fixed
    draws: the generators are in the same state in every evaluation of a batch, and get their former state back.
    The draws depend on the rank and on the number of the batch or part. See ``draws``.

    If the model is under ``fully_shard`` (FSDP2), every rank holds the whole parameters until the operator is closed.
    ``hvp="finite_difference"`` leaves them sharded. Close the operator, or use it in a ``with`` block.

    Args:
        model: the module that holds the parameters; called by ``loss_fn`` only. Eval mode is usual: in train mode
            dropout draws and batch normalisation changes buffers.
        loss_fn: ``(model, batch) -> scalar``, the mean loss over the batch.
        batches: this rank's batches, on the model's device. May be empty on some ranks, not on all.
        weights: one positive number per batch; usually its number of samples.
        batch_weight: ``batch -> float``, the number of terms in the mean loss of a batch, for example counted tokens;
            default: the leading dimension that its tensors share. Batches of weight 0 are left out. If ``weights`` are
            given as well, it is used for the parts of batches only. If no comparison of a batch with its parts fits
            the memory, batches are cut only with this argument.
        parameters: which parameters: a regular expression (``re.search`` on the name) or ``(name, parameter) ->
            bool``; ``None`` for all. Frozen ones are never chosen; tied ones count once, under any of their names.
        process_group: the ranks that share the batches; in a single process leave it out. Pass
            ``torch.distributed.group.WORLD`` for all ranks, or a group of one for a Hessian of this rank alone.
        hvp: ``"double_backward"``, ``"linearize"`` or ``"finite_difference"``; ``"auto"`` begins with double
            backward and changes to linearize if that, measured on this model, saves time: see
            `expect_products`. All but differences are exact. On a GPU, small networks' products are recorded as CUDA
            graphs.
        memory_budget: bytes that gradient graphs may take on this rank between products; ``None``: a quarter of the
            free memory. With 0 none are kept and no batch is cut. A product itself takes up to four times the largest
            batch's graph, for as long as it is computed.
        tracing_statistics: times of earlier traces of this model for ``"auto"``; updated.
        restore_state: called after every evaluation of the loss, to put back what it changes (queues, counters,
            hidden states). The evaluation must then be a function of parameters and batch.

    Attributes:
        ranks: the processes that share the operator.
        partition: how vectors are cut over them.
        dtype: the real dtype of the parameters and of vectors.
        device: the device of both.
        num_parameters: P.
        parameter_names: names of the chosen parameters, in the order of the flat vector.
        draws: whether the loss draws from a global random generator on any rank, so that its draws are fixed.

    Raises:
        ValueError: if no parameter matches; if the loss is not a differentiable scalar, or changes from one
            evaluation to the next; if weights don't fit; if ``torch.distributed`` runs several ranks and no
            ``process_group`` was given.
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
        tracing_statistics: TracingStatistics | None = None,
        restore_state: Callable[[], None] | None = None,
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
        self._hvp = hvp
        self._engine: ProductEngine | None = None
        self._unsharded = ExitStack()
        sharded = is_sharded(model)
        if sharded and hvp == FiniteDifference.name:
            reshard(model)
        elif sharded:
            self._unsharded.enter_context(unsharded(model))
        try:
            chosen = select_parameters(model, parameters)
            self.parameter_names = list(chosen)
            self.dtype, self.device = common_type(chosen)
            self._loss = BatchLoss(
                model, loss_fn, list(chosen.values()), restore_state=restore_state, rank=self.ranks.rank
            )
            self.num_parameters = sum(self._loss.sizes)
            self.partition = self.ranks.partition(self.num_parameters)
            parts = self._weighed(list(batches), weights, batch_weight)
            self._selection = EngineSelection(
                self._loss,
                self.ranks,
                tracing_statistics or TracingStatistics(),
                automatic=hvp == "auto",
                recording=hvp in ("auto", DoubleBackward.name),
            )
            self._plan = MemoryPlan(
                self._loss, parts, self.ranks, budget=memory_budget, exact=hvp != FiniteDifference.name
            )
            self._padding: list[slice] = []
            if sharded and hvp == FiniteDifference.name:
                self._padding = padding_rows(model, chosen)
                self._prepare_sharded(parts)
            else:
                self._prepare()
            self.draws = bool(self.ranks.failed_ranks(self._loss.draws))
        except BaseException:
            self._unsharded.close()
            raise

    def _weighed(
        self,
        batches: list[Any],
        weights: Sequence[float] | None,
        batch_weight: Callable[[Any], float] | None,
    ) -> MicroBatches:
        """Return this rank's batches with weights that sum to 1 over all ranks."""
        with self.ranks.propagate_errors("weighing the batches"):
            batches, own = _weigh(batches, weights, batch_weight, alone=self.ranks.world_size == 1)
        total = float(self.ranks.all_reduce(self._control_tensor([sum(own)])))
        if total == 0:
            raise ValueError("no batches, so no Hessian: pass at least one batch on at least one rank")
        return MicroBatches(batches, [weight / total for weight in own], batch_weight)

    # -- properties ----------------------------------------------------------------------------

    @property
    def batches(self) -> list[Any]:
        """This rank's batches as they are evaluated: those given, or parts of them."""
        return list(self._plan.parts.batches)

    @property
    def weights(self) -> list[float]:
        """The weight of each of them; those of all ranks sum to 1."""
        return list(self._plan.parts.weights)

    @property
    def engine(self) -> str:
        """The name of the product engine in use."""
        return self._running.name

    @property
    def engine_reason(self) -> str:
        """Why this engine is in use, in a few words."""
        return self._selection.reason

    @property
    def exact(self) -> bool:
        """Whether products are exact up to rounding."""
        return self._running.exact

    @property
    def num_cached_graphs(self) -> int:
        """Batches whose gradient graph is kept on this rank."""
        return self._engine.num_cached if isinstance(self._engine, DoubleBackward) else 0

    @property
    def bytes_per_graph(self) -> int:
        """The size of the largest batch's graph in bytes; 0 if it is not known."""
        return self._plan.bytes_per_graph

    @property
    def num_halvings(self) -> int:
        """How many times the batches were halved because memory had run out."""
        return self._plan.num_halvings

    @property
    def relative_error(self) -> float:
        """A-priori error of a product relative to the largest eigenvalue.

        For exact products it is an estimate of rounding, which cancellation in the loss can exceed. The error of
        finite differences depends on third derivatives and on kinks. Compare with `precise_products` to measure either.
        """
        eps = torch.finfo(self.dtype).eps
        return float(64 * eps if self.exact else eps**0.5)

    @property
    def mean_loss(self) -> float:
        """The weighted mean loss over all ranks' batches; a collective."""
        own = self._control_tensor([0.0 if self._plan.mean is None else self._plan.mean])
        return float(self.ranks.all_reduce(own))

    @property
    def loss(self) -> BatchLoss:
        """The loss of one batch, as products differentiate it."""
        return self._loss

    # -- products ------------------------------------------------------------------------------

    def matvec(self, vector: Tensor) -> Tensor:
        """Multiply, ``(P,) -> (P,)``: the same vector on all ranks, and the same result."""
        if vector.shape != (self.num_parameters,):
            raise ValueError(f"expected a vector of shape ({self.num_parameters},), got {tuple(vector.shape)}")
        piece = self._sum(vector.to(self.device, self.dtype))
        return self.ranks.all_gather(piece, self.partition)

    def matvec_slice(self, vector: Tensor) -> Tensor:
        """Multiply with vectors that are cut over the ranks, ``(slice_length,) -> (slice_length,)``.

        One all-gather and one reduce-scatter. If the product fails on any rank, it raises on all of them.
        """
        return self._sum(self.ranks.all_gather(vector, self.partition))

    def seconds_per_product(self) -> float:
        """Return the time of a product, the second of two: seconds on the slowest rank. A collective."""
        vector = torch.ones(self.partition.slice_length, dtype=self.dtype, device=self.device)
        self.matvec_slice(vector)
        began = self._selection.now()
        self.matvec_slice(vector)
        return largest_over_ranks(self.ranks, self._selection.now() - began)[0]

    def expect_products(self, count: int) -> None:
        """Set the number of products to come, from which ``hvp="auto"`` decides about a change-over.

        After `TIMED_PRODUCTS` products all ranks decide together, in one short exchange, whether one batch is
        worth tracing, and, if so, in another whether the products left are worth tracing the rest. Without a
        call ``"auto"`` stays with double backward. Both engines are exact, so eigenvalues agree to rounding.

        Args:
            count: products expected from now on, the same on all ranks.
        """
        self._selection.products_left = count

    def precise_products(self, vectors: Tensor) -> Tensor | None:
        """Multiply in float64, with float64 values of the parameters, buffers and batches.

        If products are finite differences, the result is a difference in float64 with a much shorter step. The float64
        tensors are released before the method returns. Costs a gradient a batch and a product a vector. A collective.

        Args:
            vectors: this rank's slices of vectors, ``(slice_length, m)``.

        Returns:
            This rank's slices of the products, ``(slice_length, m)``. ``None``, on all ranks together, if the
            parameters are float64 already; the float64 tensors don't fit the free memory; parameters are sharded; the
            loss draws random numbers, which differ between precisions; or it does not run in float64 throughout.

        Example:
            >>> model = nn.Linear(2, 1, bias=False)
            >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
            >>> operator = HessianOperator(model, lambda m, x: m(x).square().mean(), [X])
            >>> operator.precise_products(torch.eye(2))
            tensor([[1., 0.],
                    [0., 4.]], dtype=torch.float64)
        """
        if vectors.dim() != 2 or vectors.shape[0] != self.partition.slice_length or vectors.shape[1] == 0:
            raise ValueError(
                f"expected vectors of shape ({self.partition.slice_length}, m), got {tuple(vectors.shape)}"
            )
        if self.dtype == torch.float64 or self.draws:
            return None
        reference = self.reference()
        if reference is None:
            return None
        wholes = [self.ranks.all_gather(column.contiguous(), self.partition) for column in vectors.unbind(1)]
        products = self._precise(reference, wholes)
        return None if products is None else torch.stack(products, dim=1)

    def _precise(self, reference: ReferenceProducts, vectors: list[Tensor]) -> list[Tensor] | None:
        if self.exact:
            return reference.products(vectors)
        differences = [reference.difference(vector.double()) for vector in vectors]
        return None if any(one is None for one in differences) else [one for one in differences if one is not None]

    def reference(self, *, float64: bool = True) -> ReferenceProducts | None:
        """Return products and differences of gradients that do not depend on the engine. A collective.

        Args:
            float64: whether to compute in float64, or in the precision of the parameters.

        Returns:
            ``None``, on all ranks together, if parameters are sharded, or if float64 does not fit the free memory.
        """
        function: FunctionalLoss | DisplacedLoss | None = None
        if float64 and not isinstance(self._engine, ShardedFiniteDifference):
            sharing = self.ranks.world_size if self.device.type == "cpu" else 1
            function = FunctionalLoss.of(self._loss, bytes_per_graph=self.bytes_per_graph, sharing=sharing)
        elif not is_sharded(self._loss.model):
            function = DisplacedLoss(self._loss)
        if self.ranks.failed_ranks(function is None) or function is None:
            return None
        return ReferenceProducts(function, self._plan.parts, self.ranks, self.partition)

    # -- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the gradient graphs, and shard parameters again. The operator can't be used afterwards."""
        self._running.close()
        self._unsharded.close()

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _running(self) -> ProductEngine:
        assert self._engine is not None, "the constructor ends with an engine or an error"
        return self._engine

    def _sum(self, vector: Tensor) -> Tensor:
        """Multiply with a whole vector, and sum over the ranks; prepare again if memory has run out."""
        if self._selection.due:
            engine = self._running
            assert isinstance(engine, DoubleBackward)
            self._engine = self._selection.choose(engine, self._plan)
            if self._engine is None:
                self._prepare()
        timing = self._selection.timing
        self._selection.products_left -= 1
        while True:
            error: Exception | None = None
            product: Tensor | None = None
            try:
                began = self._selection.now() if timing else 0.0
                product = self._running.product(self._without_padding(vector))
                if timing:
                    self._selection.record(began)
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
        """Build an engine on all ranks, for the batches as they are or for as small parts as necessary."""
        while True:
            try:
                with self.ranks.propagate_errors("preparing the Hessian-vector products"):
                    self._engine = self._new_engine()
                return
            except Exception as exception:
                error = exception
            self._make_room(error)

    def _prepare_sharded(self, parts: MicroBatches) -> None:
        engine = ShardedFiniteDifference(self._loss, parts.batches, parts.weights, self.ranks)
        self._engine = engine
        values = self._loss.check(engine.batches)
        # Every rank evaluates all losses over all ranks' samples.
        weighted = sum(weight * value for weight, value in zip(engine.weights, values, strict=True))
        self._plan.mean = weighted / self.ranks.world_size

    def _make_room(self, error: Exception) -> None:
        if isinstance(self._engine, ShardedFiniteDifference):
            raise error
        self._plan.make_room(error, self._release)

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _new_engine(self) -> ProductEngine:
        loss, plan, hvp = self._loss, self._plan, self._hvp
        num_cached = 0
        if plan.parts.batches:
            plan.check()
            if hvp in ("auto", DoubleBackward.name):
                num_cached = plan.graphs_to_keep()
        batches, weights = plan.parts.batches, plan.parts.weights
        if hvp == FiniteDifference.name:
            return FiniteDifference(loss, batches, weights)
        if hvp == Linearize.name:
            return Linearize(loss, batches, weights)
        return DoubleBackward(loss, batches, weights, num_cached=num_cached)

    def _control_tensor(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.ranks.control_device)


def _weigh(
    batches: list[Any],
    weights: Sequence[float] | None,
    batch_weight: Callable[[Any], float] | None,
    *,
    alone: bool,
) -> tuple[list[Any], list[float]]:
    """Return the batches that count, and the weight of each."""
    if weights is not None:
        result = [float(weight) for weight in weights]
        if len(result) != len(batches):
            raise ValueError(f"there are {len(batches)} batches but {len(result)} weights; pass one per batch")
    elif batch_weight is not None:
        counted = [(batch, weight) for batch in batches if (weight := float(batch_weight(batch))) != 0]
        batches, result = [batch for batch, _ in counted], [weight for _, weight in counted]
    elif alone and len(batches) == 1:
        result = [1.0]  # A single batch weighs the same whatever its size.
    else:
        result = [leading_dimension(batch) for batch in batches]
    for index, weight in enumerate(result):
        if not 0 < weight < float("inf"):
            raise ValueError(f"batch {index} has weight {weight}; weights must be positive and finite")
    return batches, result
