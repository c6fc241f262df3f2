"""Where a run's samples come from: its loaders, the way its loops use them, and its transfer hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from hessian_callback._options import MAX_SEED, check_callable, check_choice, check_int, optional
from hessian_callback.callbacks.full_precision import batch_in_full_precision, has_half_precision
from hessian_callback.callbacks.lightning_packages import (
    CONFIGURATION_ERRORS,
    LightningModule,
    MisconfigurationException,
    RunningStage,
    Trainer,
    TrainerFn,
)
from hessian_callback.callbacks.state_guard import stage_set_to
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.batch_copies import copy_batch
from hessian_callback.measurement.errors import UserCodeError, may_pass, one_line
from hessian_callback.measurement.loaders import (
    Combination,
    combination_of,
    iterates_in_its_own_way,
    stateful_parts,
)
from hessian_callback.measurement.samples import SampleSet, collect, seed_global_generators
from hessian_callback.measurement.state_guard import Snapshot

__all__ = [
    "SampleSource",
    "batch_on_device",
    "find_loader",
    "has_loader",
    "missing_loader",
    "warn_of_imbalance",
]

_IMBALANCE_WORTH_A_WARNING = 0.2


class SampleSource:
    """The samples of a run: found, chosen and loaded once, and moved to the device for each measurement.

    Args:
        dataloader: ``"val"``, ``"train"``, or a loader as for `samples.collect`.
        num_samples: samples over all ranks.
        batch_size: samples in a batch, instead of the loader's own number.
        batch_weight: ``callable(batch)``, the weight of a batch in the mean; default: its leading dimension.
        seed: chooses the samples and fixes their augmentation.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = SampleSource(DataLoader(range(8)), num_samples=4)
        >>> source.description, source.on_training_data
        ('the loader passed as dataloader=', False)
    """

    def __init__(
        self,
        dataloader: str | Iterable[Any] = "val",
        *,
        num_samples: int = 1024,
        batch_size: int | None = None,
        batch_weight: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(dataloader, str):
            check_choice("dataloader", dataloader, ("val", "train"))
        self.dataloader = dataloader
        self.num_samples = check_int("num_samples", num_samples, at_least=1)
        self.batch_size = optional(check_int, "batch_size", batch_size, at_least=1)
        self.batch_weight = optional(check_callable, "batch_weight", batch_weight)
        self.seed = check_int("seed", seed, at_least=0, at_most=MAX_SEED)
        self._samples: SampleSet | None = None

    @property
    def on_training_data(self) -> bool:
        """Whether the samples come from the run's training loader."""
        return isinstance(self.dataloader, str) and self.dataloader == "train"

    @property
    def stage(self) -> RunningStage:
        """The stage in which the run's own loops would use the batches."""
        return RunningStage.TRAINING if self.on_training_data else RunningStage.VALIDATING

    @property
    def description(self) -> str:
        """The loader in words, for messages."""
        if not isinstance(self.dataloader, str):
            return "the loader passed as dataloader="
        return "the training loader" if self.on_training_data else "the validation loader"

    def check(self, trainer: Trainer) -> None:
        """Check that the run has such a loader, without asking for it.

        Raises:
            MisconfigurationException: if it has none.
        """
        if isinstance(self.dataloader, str) and not has_loader(trainer, self.dataloader):
            raise MisconfigurationException(missing_loader(self.dataloader))

    def collect(self, trainer: Trainer, snapshot: Snapshot, ranks: Ranks) -> SampleSet:
        """Return this rank's samples, collected at the first call and kept until `clear`.

        All ranks must call, inside `preserve_training_state`.

        Args:
            trainer: the trainer, at any time after its data sources are known.
            snapshot: remembers the loader's parts that reading changes.
            ranks: the processes that share the samples.

        Raises:
            MisconfigurationException: if there is no such loader.
            SampleError: see `samples.collect`.
            PeerError: if collecting failed on another rank.
        """
        if self._samples is None:
            with ranks.propagate_errors("finding the loader of the samples"):
                combination = run_loaders(trainer, self.dataloader)
                samplers = [getattr(loader, "sampler", None) for loader in combination.loaders]
                for part in stateful_parts(combination):
                    snapshot.remember(
                        part,
                        # The tensors of data sets are samples. Those of samplers are their order.
                        copy_tensors=any(part is sampler for sampler in samplers),
                        restore=iterates_in_its_own_way(part),
                        restore_libraries=True,
                    )
                shared = _is_read_by_the_run(trainer, self.dataloader, combination)
            self._samples = collect(
                combination,
                num_samples=self.num_samples,
                seed=self.seed,
                batch_size=self.batch_size,
                batch_weight=self.batch_weight,
                ranks=ranks,
                first_only=isinstance(self.dataloader, str) and self.dataloader == "val",
                shared=shared,
            )
            # If warnings are errors, they must not be raised on one rank alone.
            with ranks.propagate_errors("checking the shares of the samples"):
                if ranks.rank == 0:
                    warn_of_imbalance(self._samples)
        return self._samples

    def batches_on_device(self, trainer: Trainer, pl_module: LightningModule, sample_set: SampleSet) -> list[Any]:
        """Return copies of the batches as the module's steps would get them; see `batch_on_device`.

        Raises:
            UserCodeError: if a transfer hook of the module or the data module fails.
        """
        return [
            batch_on_device(trainer, pl_module, batch, seed=self.seed, key=key, stage=self.stage)
            for batch, key in zip(sample_set.batches, sample_set.keys, strict=True)
        ]

    def clear(self) -> None:
        """Discard the samples; the next `collect` loads them again."""
        self._samples = None


def run_loaders(trainer: Trainer, dataloader: str | Iterable[Any]) -> Combination:
    """Return the loaders that ``dataloader`` names, combined as the run's loop combines them.

    The limits of an epoch (``limit_train_batches``, ``overfit_batches``) count for the training loader, and those of
    ``overfit_batches`` for the validation loader as well. A smaller ``limit_val_batches`` does not.

    Args:
        trainer: the trainer, at any time after its data sources are known.
        dataloader: ``"val"``, ``"train"``, or a loader.

    Raises:
        MisconfigurationException: if there is no such loader.
    """
    if not isinstance(dataloader, str):
        return replace(combination_of(dataloader), limits=None)
    mode = "max_size_cycle" if dataloader == "train" else "sequential"
    combination = combination_of(find_loader(trainer, dataloader), mode)
    overfit = trainer.state.fn == TrainerFn.FITTING and trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        limits = tuple(float(_batches_of(loader, overfit)) for loader in combination.loaders)
        return replace(combination, limits=limits, in_order=True)
    return combination if dataloader == "train" else replace(combination, limits=None)


def _batches_of(loader: Any, overfit: float) -> float:
    """Return how many batches ``overfit_batches`` leaves of a loader: a number, or a fraction of all."""
    return overfit if isinstance(overfit, int) else int(overfit * len(loader))


def _is_read_by_the_run(trainer: Trainer, dataloader: str | Iterable[Any], combination: Combination) -> bool:
    """Whether the run reads from the loaders as well, or from a data set that they share with its own."""
    if isinstance(dataloader, str):
        return True
    parts = {id(part) for loader in combination.loaders for part in (loader, getattr(loader, "dataset", loader))}
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop)
    own = [combination_of(loop._combined_loader).loaders for loop in loops if loop._combined_loader is not None]
    return any(
        not parts.isdisjoint((id(loader), id(getattr(loader, "dataset", loader)))) for some in own for loader in some
    )


def find_loader(trainer: Trainer, dataloader: str | Iterable[Any]) -> Any:
    """Return the loader, or the structure of loaders, that ``dataloader`` names.

    Args:
        trainer: the trainer, at any time after its data sources are known.
        dataloader: ``"val"``, ``"train"``, or a loader, which is returned as it is.

    Raises:
        MisconfigurationException: if there is no such loader.
    """
    if not isinstance(dataloader, str):
        return dataloader
    loop = _loop(trainer, dataloader)
    # The loop's combined loader has the mode, which `trainer.val_dataloaders` has lost. A new loader might shuffle or
    # split in another way.
    if loop._combined_loader is not None:
        return loop._combined_loader
    if loop._data_source.is_defined():
        # If nothing is behind it, Lightning's own hooks return None.
        loader = loop._data_source.dataloader()
        if loader is not None:
            return loader
    raise MisconfigurationException(missing_loader(dataloader))


def has_loader(trainer: Trainer, dataloader: str) -> bool:
    """Whether a loader of this kind is defined, without asking for it."""
    loop = _loop(trainer, dataloader)
    return loop._combined_loader is not None or bool(loop._data_source.is_defined())


def _loop(trainer: Trainer, dataloader: str) -> Any:
    if dataloader == "train":
        return trainer.fit_loop
    if trainer.state.fn == TrainerFn.VALIDATING:
        return trainer.validate_loop
    return trainer.fit_loop.epoch_loop.val_loop


def missing_loader(dataloader: str) -> str:
    """Return the message for a loader that is not there, remedies included."""
    other = "train" if dataloader == "val" else "val"
    kind = "validation" if dataloader == "val" else "training"
    return (
        f"dataloader={dataloader!r}, but the run has no {kind} loader to take the samples from. "
        f"Define {dataloader}_dataloader(), use dataloader={other!r}, or pass one: dataloader=my_loader"
    )


def batch_on_device(
    trainer: Trainer, pl_module: LightningModule, batch: Any, *, seed: int, key: int, stage: RunningStage
) -> Any:
    """Return a copy of a batch as the module's steps would get it.

    Precision conversion and the module's or data module's transfer hooks run as in Lightning's own loops. The random
    generators are seeded from ``seed`` and ``key``, and ``trainer.training`` or ``trainer.validating`` is as in
    ``stage``. A module in half precision is examined in float32, so its inputs are left or made float32.

    Raises:
        UserCodeError: if a transfer hook fails.
    """
    seed_global_generators(seed, 1, key)
    batch = copy_batch(batch)
    try:
        with stage_set_to(trainer, stage):
            half = has_half_precision(pl_module)
            if not half:
                batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            return batch_in_full_precision(batch) if half else batch
    except Exception as error:
        if may_pass(error) or isinstance(error, CONFIGURATION_ERRORS):
            raise
        raise UserCodeError(
            f"moving a batch of the samples to the device raised {one_line(error)}. If a transfer hook "
            "(on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer) can't take such a batch, "
            "pass dataloader='train', or dataloader=my_loader with batches of the structure that it takes"
        ) from error


def warn_of_imbalance(samples: SampleSet) -> None:
    """Warn if ranks would wait for each other for more than a fifth of the time."""
    if samples.imbalance > _IMBALANCE_WORTH_A_WARNING:
        shares = ", ".join(f"{share:g}" for share in samples.shares)
        warnings.warn(
            f"the ranks' shares of the samples differ by {samples.imbalance:.0%} from their mean "
            f"({shares}), and the lighter ones wait; choose num_samples so that the number of batches is a "
            f"multiple of {len(samples.shares)}, or a loader with smaller batches",
            stacklevel=2,
        )
