"""The Hessian of a loss over fixed batches, as a linear operator that all ranks share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessian_callback.batches import leading_dimension
from hessian_callback.derivatives import DoubleBackwardError
from hessian_callback.memory import free_memory
from hessian_callback.parallel import PeerError, Ranks
from hessian_callback.products import BatchLoss, DoubleBackward, FiniteDifference, Linearize, ProductEngine
from hessian_callback.sharding import ShardedFiniteDifference, is_sharded, reshard, unsharded

__all__ = ["HessianOperator", "select_parameters"]

ParameterFilter = str | Callable[[str, nn.Parameter], bool]

# Share of the free memory that cached graphs may take when no budget is given. The rest is for the training
# run's own peak, which may come later than the measurement.
_BUDGET_SHARE = 0.25
# A graph's tensors live beside temporaries of about their size while it is built.
_BUILD_FACTOR = 2.0


class HessianOperator:
    r"""The Hessian of a weighted mean loss, :math:`H = \sum_i w_i \nabla^2_\theta L_i(\theta) / \sum_i w_i`.

    :math:`L_i` is the mean loss of batch i and :math:`\theta` the chosen parameters, flattened and joined in the
    order of ``parameter_names``. With several ranks the sums run over the batches of all of them, and every
    method below is a collective that all ranks must call.

    What does not depend on the direction is done once, when the operator is made: the gradient graphs of as many
    batches as ``memory_budget`` allows are kept, those of the others are rebuilt in every product. So parameters,
    buffers and batches must stay as they are while the operator is in use.

    Of a model under ``fully_shard`` (FSDP2) every rank holds the whole parameters until the operator is closed,
    except with ``hvp="finite_difference"``, which leaves them sharded. Close it, or use it in a ``with`` block.

    Args:
        model: the module that holds the parameters; called by ``loss_fn`` only. Put it in eval mode: in train mode
            dropout makes the loss random and batch normalisation changes buffers.
        loss_fn: ``(model, batch) -> scalar``, the mean loss over the batch.
        batches: this rank's batches, on the model's device. May be empty on some ranks, not on all.
        weights: one positive number per batch; usually its number of samples.
        batch_weight: ``batch -> float``, instead of ``weights``. Without either, a batch weighs as much as the
            leading dimension that its tensors share.
        parameters: which parameters: a regular expression (``re.search`` on the name) or ``(name, parameter) ->
            bool``; ``None`` for all. Frozen ones are never chosen; tied ones count once, under any of their names.
        process_group: the ranks that share the batches; in a single process leave it out. Pass
            ``torch.distributed.group.WORLD`` for all ranks, or a group of one for a Hessian of this rank alone.
        hvp: ``"double_backward"``, ``"linearize"`` or ``"finite_difference"``; ``"auto"`` is exact.
        memory_budget: bytes that kept graphs may take on this rank; ``None``: a quarter of what is free.

    Attributes:
        num_parameters: P.
        parameter_names: names of the chosen parameters, in the order of the flat vector.
        engine: the name of the product engine in use.
        num_cached_graphs: batches whose gradient graph is kept on this rank.
        bytes_per_graph: the size of the largest batch's graph, in bytes; 0 where none is kept.

    Raises:
        ValueError: if no parameter matches; if the loss is not a differentiable scalar; if weights don't fit;
            if ``torch.distributed`` runs several ranks and no ``process_group`` was given.
        ArithmeticError: if the loss is NaN or infinite.
        DoubleBackwardError: if an operation cannot be differentiated twice.
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
        self._loss = BatchLoss(model, loss_fn, list(chosen.values()))
        self._padding = _padding_rows(model, chosen)
        with self.ranks.together("weighing the batches"):
            own_weights = _weigh(batches, weights, batch_weight, alone=self.ranks.world_size == 1)
        total = float(self.ranks.all_reduce(self._control_tensor([sum(own_weights)])))
        if total == 0:
            raise ValueError("no batches, so no Hessian: pass at least one batch on at least one rank")
        own_weights = [weight / total for weight in own_weights]
        self._engine: ProductEngine
        if sharded and hvp == FiniteDifference.name:
            self._engine = ShardedFiniteDifference(self._loss, batches, own_weights, self.ranks)
            self._check_loss(self._engine.batches)
            return
        with self.ranks.together("preparing the Hessian-vector products"):
            self._engine = self._prepare(hvp, batches, own_weights, memory_budget)

    @property
    def engine(self) -> str:
        """The name of the product engine in use."""
        return self._engine.name

    @property
    def exact(self) -> bool:
        """Whether products are exact up to rounding."""
        return self._engine.exact

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
        self._engine.close()
        self._held.close()

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------

    def _sum(self, vector: Tensor) -> Tensor:
        error: Exception | None = None
        product: Tensor | None = None
        try:
            product = self._engine.product(self._without_padding(vector))
        except Exception as exception:
            if self.ranks.world_size == 1:
                raise
            error = exception
        try:
            return self.ranks.reduce_scatter(
                product,
                self.partition,
                dtype=self.dtype,
                device=self.device,
                stage="computing a Hessian-vector product",
            )
        except PeerError:
            if error is not None:
                raise error from None
            raise

    def _without_padding(self, vector: Tensor) -> Tensor:
        if self._padding:
            vector = vector.clone()
            for row in self._padding:
                vector[row] = 0
        return vector

    def _prepare(self, hvp: str, batches: list[Any], weights: list[float], memory_budget: int | None) -> ProductEngine:
        if batches:
            self._check_loss(batches)
        if hvp == "finite_difference":
            return FiniteDifference(self._loss, batches, weights)
        if hvp == "linearize":
            linearized = Linearize(self._loss, batches, weights)
            self._compare(linearized, batches, weights)
            return linearized
        if not batches:
            return DoubleBackward(self._loss, [], [])
        # The size of the first graph stands for the others, which hold at most as many samples.
        self.bytes_per_graph = DoubleBackward.graph_size(self._loss, batches[0])
        budget = memory_budget
        if budget is None:
            free = free_memory(self.device)
            # Ranks on one machine share the main memory.
            sharing = self.ranks.world_size if self.device.type == "cpu" else 1
            budget = 0 if free is None else int(_BUDGET_SHARE * free / sharing)
        spare = budget - _BUILD_FACTOR * self.bytes_per_graph
        num_cached = max(0, min(len(batches), int(spare // max(self.bytes_per_graph, 1)) + 1)) if spare >= 0 else 0
        return DoubleBackward(self._loss, batches, weights, num_cached=num_cached)

    def _compare(self, engine: ProductEngine, batches: list[Any], weights: list[float]) -> None:
        """Hold an engine against double backward: some forward derivatives of PyTorch are wrong."""
        vector = torch.linspace(-1, 1, self.num_parameters, dtype=self.dtype, device=self.device)
        expected = DoubleBackward(self._loss, batches, weights, num_cached=0).product(vector)
        engine.product(-vector)  # A traced function that keeps state would now give something else.
        error = float((engine.product(vector) - expected).norm())
        if not error <= 1e4 * torch.finfo(self.dtype).eps * float(expected.norm()):
            raise DoubleBackwardError(
                f"hvp={engine.name!r} gave a product that differs from double backward by {error:.1e} in norm "
                f"{float(expected.norm()):.1e}: an operation of the model has a wrong or missing forward derivative. "
                "Use hvp='double_backward'"
            )

    def _check_loss(self, batches: list[Any]) -> None:
        """Evaluate every batch once, and the first one twice."""
        values = []
        with self._loss.differentiable():
            for index, batch in enumerate([*batches, batches[0]]):
                value = float(self._loss.value(batch).detach())
                if value != value or abs(value) == float("inf"):
                    raise ArithmeticError(
                        f"the loss of batch {index % len(batches)} is {value}: no Hessian exists there. Check the "
                        "batch for invalid inputs and whether training has diverged"
                    )
                values.append(value)
        first, again = values[0], values[-1]
        if abs(first - again) > 1e4 * torch.finfo(self.dtype).eps * max(abs(first), abs(again)):
            raise ValueError(
                f"the loss is random: the same batch gave {first:.9g} and then {again:.9g}. Put the model in eval "
                "mode, and remove sampling or augmentation from the loss, or fix its seed inside loss_fn"
            )

    def _control_tensor(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.ranks.control_device)


_ENGINES = ("auto", DoubleBackward.name, Linearize.name, FiniteDifference.name)


def select_parameters(model: nn.Module, parameters: ParameterFilter | None = None) -> dict[str, nn.Parameter]:
    r"""Return the trainable parameters that a filter chooses, by name, each tensor once.

    Args:
        model: the module.
        parameters: a regular expression (``re.search``), ``(name, parameter) -> bool``, or ``None`` for all.

    Raises:
        ValueError: if none is chosen, or the expression is not valid.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), r"^1\."))
        ['1.weight', '1.bias']
    """
    wanted: Callable[[str, nn.Parameter], bool]
    if isinstance(parameters, str):
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise ValueError(f"parameters={parameters!r} is not a valid regular expression: {error}") from error

        def wanted(name: str, parameter: nn.Parameter) -> bool:
            return pattern.search(name) is not None

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
    if weights is not None and batch_weight is not None:
        raise ValueError("pass weights or batch_weight, not both")
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
