"""The callback's options, its refusals, its failures and its state."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import hessian_callback
from hessian_callback import Lanczos, OutlierRatio, PublishedProtocol
from hessian_callback.callbacks.moved_options import MOVED_OPTIONS
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.measurement.errors import SampleError
from hessian_callback.measurement.measurement import Measurement
from tests.helpers.lightning import Callback, EarlyStopping, MisconfigurationException, ModelCheckpoint
from tests.helpers.toy_runs import NUM_EIGENVALUES, data, loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")

BAD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("num_eigenvalues must be an integer of at least 3", {"num_eigenvalues": 2}),
    ("num_eigenvalues must be an integer", {"num_eigenvalues": 2.5}),
    ("num_samples must be an integer of at least 1", {"num_samples": 0}),
    ("batch_size must be None or an integer of at least 1", {"batch_size": 0}),
    ("dataloader must be 'val' or 'train'", {"dataloader": "test"}),
    ("every_n_epochs must be an integer of at least 1", {"every_n_epochs": 0}),
    ("every_n_epochs must be an integer of at least 1", {"every_n_epochs": 1.5}),
    ("every_n_train_steps must be None or an integer of at least 1", {"every_n_train_steps": 0}),
    ("not both", {"every_n_train_steps": 5, "at_steps": [1]}),
    ("at_steps must name at least one", {"at_steps": []}),
    ("at_steps", {"at_steps": [-1]}),
    ("at_end must be True or False, got 'no'", {"at_end": "no"}),
    ("max_overhead must be None or a finite number above 0 and (of )?at most 1", {"max_overhead": 1.5}),
    ("on_error must be 'warn' or 'raise'", {"on_error": "ignore"}),
    ("without slashes at its ends", {"prefix": "hessian/"}),
    ("seed must be an integer between 0 and", {"seed": -1}),
    ("seed must be an integer between 0 and", {"seed": 2**64}),
    ("not a valid regular expression", {"parameters": "layer("}),
    ("parameters must be None or callable", {"parameters": 3}),
    ("loss_fn must be None or callable", {"loss_fn": "cross_entropy"}),
    ("figures must be True or False", {"figures": 1}),
    ("extras must be a list", {"extras": "trace"}),
    ("extras contains 'hessian'; choose among trace", {"extras": ["hessian"]}),
    ("extras contains 'trace' twice", {"extras": ["trace", "trace"]}),
    ("is now extras=\\['split_half'\\]", {"extras": ["halves"]}),
    ("pass OutlierRatio", {"extras": ["outlier_ratio"]}),
    (
        "num_classes=10 must be below num_eigenvalues=10",
        {"extras": [OutlierRatio(num_classes=10)], "num_eigenvalues": 10},
    ),
    ("needs eigenvalues with error bounds", {"extras": ["subspace"], "solver": PublishedProtocol()}),
    ("allow about 40", {"num_eigenvalues": 10, "solver": Lanczos(max_hvps=10)}),
    ("fewer than num_eigenvalues=20", {"num_eigenvalues": 20, "solver": PublishedProtocol(steps=6)}),
]


@pytest.mark.parametrize(("message", "options"), BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_at_once(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        PowerLawHessianCallback(**options)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("rtol", r"solver=Lanczos\(rtol=...\)"),
        ("mode", r"solver=PublishedProtocol\(\)"),
        ("trace_hvps", r"extras=\[Trace\(num_hvps=...\)\]"),
        ("solver_checkpoint", r"solver=Lanczos\(checkpoint=...\)"),
    ],
)
def test_an_option_that_moved_names_its_new_place(name: str, place: str) -> None:
    with pytest.raises(TypeError, match=f"the option {name} is now {place}"):
        PowerLawHessianCallback(**{name: 3})


def test_every_moved_option_is_gone_and_its_new_place_exists() -> None:
    options = inspect.signature(PowerLawHessianCallback.__init__).parameters
    assert not MOVED_OPTIONS.keys() & options.keys()
    for place in MOVED_OPTIONS.values():
        for kind, option in re.findall(r"(\w+)\((\w+)=", place):
            assert option in inspect.signature(getattr(hessian_callback, kind)).parameters, place


# -- before training -----------------------------------------------------------------------------------------


def scalar_free(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def without_grad(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1]).detach()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0].cos()


def not_twice(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(OnceDifferentiable.apply(module(batch[0])), batch[1])


def random_loss(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1]) * (1 + torch.rand(()))


def changing_loss(module: Any, batch: Any, calls: Any = itertools.count(1)) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1]) * next(calls)


def test_a_loss_that_draws_is_measured_with_fixed_draws(tmp_path: Any) -> None:
    histories = []
    for _ in range(2):
        callback = measure(loss_fn=random_loss)
        trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
        histories.append(callback.history)
    for one, other in zip(*histories, strict=True):
        assert one.logged
        assert torch.equal(one.spectrum.eigenvalues, other.spectrum.eigenvalues)


def test_fixed_draws_are_announced_once(tmp_path: Any, capsys: Any) -> None:
    for loss_fn, times in ((random_loss, 1), (None, 0)):
        callback = measure(loss_fn=loss_fn, verbose=True)
        trainer(tmp_path, callback, max_epochs=2).fit(seeded(), loader(), loader(seed=1))
        output = capsys.readouterr()
        assert (output.out + output.err).count("hessian: the loss draws random numbers") == times


def no_tensor(module: Any, batch: Any) -> float:
    return 1.0


class Ragged(torch.utils.data.Dataset):
    """Batches of two tensors with different leading dimensions."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return data()[index]


def ragged_collate(samples: list[Any]) -> Any:
    xs, ys = zip(*samples, strict=True)
    return torch.stack(xs), torch.stack(ys), torch.zeros(len(xs) + 1)


def ragged_loss(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


RAGGED = DataLoader(Ragged(), batch_size=4, collate_fn=ragged_collate)

# What the message must say, the callback's options, the trainer's options, whether there is a validation loader.
REFUSED = {
    "no validation loader": (
        r"no validation loader.*Define val_dataloader\(\), use dataloader='train', or pass one",
        {},
        {},
        False,
    ),
    "too many eigenvalues": (
        r"num_eigenvalues=59, but the Hessian has only 58 rows.*at most 58",
        {"num_eigenvalues": 59, "max_hvps": None},
        {},
        True,
    ),
    "no parameter": (r"chooses no trainable parameter; there are: net\.0\.weight", {"parameters": "^head"}, {}, True),
    "loss not scalar": (r"must be a scalar.*return its mean over the batch", {"loss_fn": scalar_free}, {}, True),
    "loss without grad": (r"does not (depend|require)|grad", {"loss_fn": without_grad}, {}, True),
    "loss no tensor": (r"loss tensor is needed.*use dataloader='train'", {"loss_fn": no_tensor}, {}, True),
    "no double backward": (r"double backward|twice", {"loss_fn": not_twice}, {}, True),
    "changing loss": (
        r"the same batch gave.*changes some state that is not put back.*Pass loss_fn=",
        {"loss_fn": changing_loss},
        {},
        True,
    ),
    "ambiguous batch": (
        r"leading dimensions \[4, 5\]. Pass batch_weight=",
        {"dataloader": RAGGED, "loss_fn": ragged_loss},
        {},
        True,
    ),
    "negative weight": (r"finite number that is not negative", {"batch_weight": lambda batch: -1}, {}, True),
    "weight no number": (r"must return a number", {"batch_weight": lambda batch: "8x"}, {}, True),
    "no samples": (
        r"gives no sample; pass another one as dataloader=",
        {"dataloader": DataLoader(data(0), batch_size=4)},
        {},
        True,
    ),
    "an iterator": (
        r"is an iterator.*pass a DataLoader",
        {"dataloader": iter([(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])},
        {},
        True,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_training(case: str, tmp_path: Any) -> None:
    message, choice, options, with_validation = REFUSED[case]
    started = []

    class Started(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            started.append(True)

    run = trainer(tmp_path, measure(**choice), Started(), **options)
    with pytest.raises(Exception, match=rf"(?s){message}"):
        run.fit(seeded(), loader(), loader(seed=1) if with_validation else None)
    assert not started


def test_what_collecting_finds_is_refused_where_only_the_end_is_measured(tmp_path: Any) -> None:
    network = seeded()
    callback = measure(at_steps=[], at_end=True, batch_size=4, dataloader=DataLoader(Stream(), batch_size=8))
    with pytest.raises(SampleError, match="batch_size is given, but the batches come from a stream"):
        trainer(tmp_path, callback, max_epochs=1).fit(network, loader(), loader(seed=1))
    assert network.calls == 0


def test_samples_that_cannot_be_read_at_the_start_are_read_at_the_end(tmp_path: Any) -> None:
    class Away(torch.utils.data.Dataset):
        back = False

        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            if not self.back:
                raise OSError("the share is away")
            return data()[index]

    samples = Away()

    class Back(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            samples.back = True

    callback = measure(at_steps=[], at_end=True, dataloader=DataLoader(samples, batch_size=8))
    with pytest.warns(UserWarning, match=r"not be collected before training; the measurement tries again: .* away"):
        trainer(tmp_path, Back(), callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert [(entry.when, entry.fit is not None) for entry in callback.history] == [("epoch", True)]


def test_layers_without_double_backward_are_refused() -> None:
    from hessian_callback.callbacks.compatibility import check_precision

    check_precision("bf16-true")
    with pytest.raises(MisconfigurationException, match=r"use 'bf16-mixed' or 'bf16-true', or.*'32-true'"):
        check_precision("transformer-engine-float16")


def test_unsupported_strategies_are_refused_with_the_reason() -> None:
    from hessian_callback.callbacks.compatibility import check_strategy
    from tests.helpers.lightning import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

    check_strategy(SingleDeviceStrategy("cpu"))
    check_strategy(DDPStrategy())
    check_strategy(DDPStrategy(find_unused_parameters=True))

    class SomeXLAStrategy(DDPStrategy):
        pass

    class Mesh(ModelParallelStrategy):
        device_mesh: Any = None

        def __init__(self, size: int) -> None:
            self.device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: size)}

    check_strategy(Mesh(1))
    for strategy, reason in (
        (FSDPStrategy.__new__(FSDPStrategy), "no double backward"),
        (Mesh(2), "cuts layers over ranks"),
        (SomeXLAStrategy.__new__(SomeXLAStrategy), "XLA traces"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"{reason}.*Use a single device, strategy='ddp'"):
            check_strategy(strategy)


def test_two_callbacks_need_two_prefixes(tmp_path: Any) -> None:
    first, second = measure(), measure(prefix="train_hessian", dataloader="train")
    assert first.state_key != second.state_key
    run = trainer(tmp_path, first, second, max_epochs=1)
    run.fit(seeded(), loader(), loader(seed=1))
    assert {"hessian/slope", "train_hessian/slope"} <= run.callback_metrics.keys()

    # Lightning refuses equal state keys in the list by itself.
    with pytest.raises(Exception, match=r"state_key"):
        trainer(tmp_path, measure(), measure())
    # It does not look at what is added later.
    run = trainer(tmp_path, measure())
    run.callbacks.append(measure())
    with pytest.raises(MisconfigurationException, match=r"give one of them another prefix"):
        run.fit(seeded(), loader(), loader(seed=1))


def test_strict_monitors_are_warned_of(tmp_path: Any) -> None:
    callback = measure(every_n_epochs=2)
    stopper = EarlyStopping("hessian/slope", patience=7)
    checkpoint = ModelCheckpoint(tmp_path, monitor="hessian/fit_error")
    run = trainer(tmp_path, callback, stopper, checkpoint, enable_checkpointing=True, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(seeded(monitor="hessian/slope"), loader(), loader(seed=1))
    text = "\n".join(str(warning.message) for warning in caught)
    assert "Pass strict=False to let it wait for the first slope" in text
    assert "patience=7" in text
    assert "A second ModelCheckpoint without monitor" in text
    assert "Put 'strict': False into the scheduler's dictionary" in text


def test_no_warning_where_nothing_is_wrong(tmp_path: Any) -> None:
    stopper = EarlyStopping("hessian/slope", patience=7, strict=False)
    run = trainer(tmp_path, measure(num_samples=40), stopper, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(seeded(), loader(), loader(seed=1))
    ours = [str(w.message) for w in caught if "hessian_callback" in w.filename]
    assert all("took" in message for message in ours), ours


# -- failing while training ----------------------------------------------------------------------------------


def failing_at(measurements: set[int], kind: str) -> Any:
    """A loss that goes wrong in the measurements of these numbers, counted by the optimizer step."""

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
        if module.trainer.global_step not in measurements:
            return loss
        if kind == "raises":
            raise OSError("the disk is gone")
        return loss * {"nan": math.nan, "inf": math.inf}[kind]

    return loss_fn


REASONS = {"raises": "the disk is gone", "nan": "nan", "inf": "inf"}


@pytest.mark.parametrize("kind", REASONS)
def test_a_failed_measurement_is_noted_and_training_goes_on(kind: str, tmp_path: Any) -> None:
    seen: dict[int, float | None] = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            value = trainer.callback_metrics.get("hessian/slope")
            seen[trainer.current_epoch] = None if value is None else float(value)

    callback = measure(loss_fn=failing_at({0, 6, 18}, kind))
    with pytest.warns(UserWarning, match=rf"(?i)training continues without its slope.*{REASONS[kind]}"):
        trainer(tmp_path, callback, Look(), max_epochs=3).fit(seeded(), loader(), loader(seed=1))
    assert [m.logged for m in callback.history] == [False, False, True, False]
    assert [m.spectrum is None for m in callback.history] == [True, True, False, True]
    assert REASONS[kind] in str(callback.history[1].reason).lower()
    # No sentinel: nothing before the first slope, and the last good one after.
    assert seen[0] is None
    assert seen[1] == seen[2] == callback.history[2].slope


def test_raising_on_demand(tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({6}, "raises"), on_error="raise")
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, callback).fit(seeded(), loader(), loader(seed=1))
    assert len(callback.history) == 1


@pytest.mark.parametrize(
    ("bystander", "survives"),
    [
        (lambda folder: EarlyStopping("hessian/slope", strict=False), True),
        (lambda folder: EarlyStopping("hessian/slope", strict=True), False),
        (lambda folder: ModelCheckpoint(folder, monitor="hessian/slope"), False),
        (lambda folder: ModelCheckpoint(folder), True),
    ],
    ids=["EarlyStopping", "strict EarlyStopping", "monitoring ModelCheckpoint", "ModelCheckpoint"],
)
def test_a_failed_first_measurement_beside(bystander: Any, survives: bool, tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({0, 6}, "nan"))
    run = trainer(tmp_path, callback, bystander(tmp_path), enable_checkpointing=True, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if survives:
            run.fit(seeded(), loader(), loader(seed=1))
            assert [m.logged for m in callback.history] == [False, False, True, True]
        else:
            with pytest.raises(Exception, match="hessian/slope"):
                run.fit(seeded(), loader(), loader(seed=1))


@pytest.mark.parametrize("strict", [False, True])
def test_a_failed_first_measurement_beside_a_scheduler(strict: bool, tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({0, 6}, "nan"))
    model = seeded(monitor="hessian/slope", strict=strict)
    run = trainer(tmp_path, callback, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if strict:
            with pytest.raises(MisconfigurationException, match="hessian/slope"):
                run.fit(model, loader(), loader(seed=1))
        else:
            run.fit(model, loader(), loader(seed=1))
            assert model.scheduler.seen == pytest.approx([m.slope for m in callback.history[2:]])


def test_a_warning_for_each_reason_is_enough(tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({0, 6, 12, 18}, "raises"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, max_epochs=3).fit(seeded(), loader(), loader(seed=1))
    assert sum("training continues" in str(warning.message) for warning in caught) == 1


def test_a_figure_that_fails_keeps_the_slope(tmp_path: Any, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    import hessian_callback.plots.figures

    def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hessian_callback.plots.figures, "figure_image", broken)
    callback = measure(figures=True)
    with pytest.warns(UserWarning, match="no space left on device"):
        trainer(tmp_path, callback, logger=True, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert [m.logged for m in callback.history] == [True, True]


# -- one K ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow_fewer", [False, True])
def test_a_slope_of_fewer_eigenvalues_is_logged_only_on_demand(allow_fewer: bool, tmp_path: Any) -> None:
    # A softmax layer of three classes has 10 eigenvalues that are not zero.
    callback = measure(num_eigenvalues=14, max_hvps=80, parameters="^net.4", allow_fewer=allow_fewer)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(seeded(), loader(), loader(seed=1))
    last = callback.history[-1]
    assert 3 <= last.num_fitted < 14
    assert last.logged == allow_fewer
    assert ("hessian/slope" in run.callback_metrics) == allow_fewer
    assert float(run.callback_metrics["hessian/num_fitted"]) == last.num_fitted
    if not allow_fewer:
        assert "or pass solver=Lanczos(allow_fewer=True)" in str(last.reason)


def test_too_few_products_are_said_so(tmp_path: Any) -> None:
    callback = measure(num_eigenvalues=10, max_hvps=12, rtol=1e-4)
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert all("max_hvps=12 products were spent; allow more" in str(m.reason) for m in callback.history)


# -- time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.02, 0.999])
def test_the_share_of_time_is_kept(limit: float, tmp_path: Any, monkeypatch: Any) -> None:
    callback = measure(max_overhead=limit)
    run = trainer(tmp_path, callback, max_epochs=6)
    run.fit(seeded(), loader(), loader(seed=1))
    measured = [m.epoch for m in callback.history if m.when == "epoch"]
    # The first and the last in any case; a training this short has no room for others.
    assert measured == ([0, 5] if limit < 0.5 else [0, 1, 2, 3, 4, 5])
    assert 0 < float(run.callback_metrics["hessian/overhead"]) < 1


def test_the_end_is_measured_when_it_comes_unforeseen(tmp_path: Any) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 9

    callback = measure(max_overhead=0.01, every_n_train_steps=2)
    trainer(tmp_path, callback, Stop(), max_epochs=6, min_epochs=0).fit(seeded(), loader(), loader(seed=1))
    places = [(m.when, m.step) for m in callback.history]
    assert places[:2] == [("fit_start", 0), ("step", 2)]
    assert places[-1][1] == 9 or places[-1][1] == 12


def test_a_measurement_longer_than_an_epoch_is_warned_of(tmp_path: Any) -> None:
    run = trainer(tmp_path, measure(memory_budget=0), max_epochs=2)
    with pytest.warns(UserWarning, match=r"more than a training epoch.*measure less often \(every_n_epochs"):
        run.fit(seeded(), loader(num=8), loader(seed=1))


# -- state ---------------------------------------------------------------------------------------------------


def test_state_goes_through_a_weights_only_checkpoint(tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({6}, "raises"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callback).fit(seeded(), loader(), loader(seed=1))
    assert [m.logged for m in callback.history] == [True, False, True]
    torch.save({"callbacks": {callback.state_key: callback.state_dict()}}, tmp_path / "state.ckpt")
    loaded = torch.load(tmp_path / "state.ckpt", weights_only=True)
    other = measure()
    other.load_state_dict(loaded["callbacks"][other.state_key])
    assert other.history == callback.history
    assert [m.fit for m in other.history] == [m.fit for m in callback.history]
    assert (tmp_path / "state.ckpt").stat().st_size < 30_000


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="resume with the release that wrote it"):
        measure().load_state_dict({"version": 99, "history": []})
    with pytest.raises(ValueError, match="the state of a measurement lacks"):
        Measurement.from_state({"when": "never"})


def test_memory_is_let_go(tmp_path: Any) -> None:
    callback = measure()
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert callback.source._samples is None
    assert all(m.spectrum.eigenvectors is None for m in callback.history)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([data()[i] for i in range(20)])


@pytest.mark.parametrize(
    ("choice", "num_samples"),
    [
        ({"dataloader": "train"}, 32),
        ({"dataloader": loader(num=30, seed=3), "num_samples": 1000}, 30),
        ({"dataloader": DataLoader(Stream(), batch_size=6), "num_samples": 15}, 18),
        ({"dataloader": [(torch.randn(7, 5), torch.zeros(7, dtype=torch.long))], "num_samples": 7}, 7),
    ],
    ids=["train", "a loader", "a stream", "a list"],
)
def test_where_the_samples_come_from(choice: dict[str, Any], num_samples: int, tmp_path: Any) -> None:
    callback = measure(**choice)
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(shuffle=True))
    assert {m.num_samples for m in callback.history} == {num_samples}
    assert all(m.spectrum is not None for m in callback.history)


def test_the_history_tells_what_was_measured(tmp_path: Any) -> None:
    callback = measure()
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    first, last = callback.history
    assert (first.num_parameters, first.num_samples, first.world_size) == (58, 32, 1)
    assert first.num_fitted == NUM_EIGENVALUES
    assert first.engine == "double_backward"
    assert last.loss is not None
    assert 0 < last.loss < 3
    assert last.slope == last.fit.slope
    assert "epoch 0, step 6: slope" in last.summary()


def test_a_run_after_one_that_ended_with_an_error_starts_afresh(tmp_path: Any) -> None:
    callback = measure(loss_fn=failing_at({6}, "raises"), on_error="raise")
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, callback).fit(seeded(), loader(), loader(seed=1))
    assert callback.source._samples is None
    callback.run_measurer.loss_fn = None
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=2))
    fresh = measure()
    trainer(tmp_path, fresh, max_epochs=1).fit(seeded(), loader(), loader(seed=2))
    assert [m.step for m in callback.history] == [0, 6]
    for one, other in zip(callback.history, fresh.history, strict=True):
        assert torch.equal(one.spectrum.eigenvalues, other.spectrum.eigenvalues)


@pytest.mark.parametrize(
    ("options", "run", "places"),
    [
        ({"every_n_epochs": 50}, {"max_epochs": 3}, [("fit_start", 0), ("epoch", 6), ("epoch", 18)]),
        ({"every_n_epochs": 2}, {"max_epochs": 3}, [("fit_start", 0), ("epoch", 6), ("epoch", 18)]),
        ({"at_steps": [0]}, {"max_epochs": 2}, [("fit_start", 0), ("epoch", 12)]),
        ({"at_steps": []}, {"max_epochs": 2}, [("epoch", 12)]),
        ({"at_steps": [0, 12]}, {"max_epochs": 2}, [("fit_start", 0), ("step", 12)]),
        ({"at_steps": [3]}, {"max_epochs": -1, "max_steps": 8}, [("step", 3), ("epoch", 8)]),
        ({"at_steps": [0]}, {"max_epochs": 2, "val_check_interval": 0.5}, [("fit_start", 0), ("epoch", 12)]),
        ({"at_steps": [0]}, {"max_epochs": 3, "limit_val_batches": 0}, [("fit_start", 0), ("epoch", 18)]),
    ],
)
def test_the_end_is_measured_once_where_it_is_wanted(options: Any, run: Any, places: Any, tmp_path: Any) -> None:
    callback = measure(at_end=True, dataloader="train", predict=None, **options)
    trainer(tmp_path, callback, **run).fit(seeded(), loader(), loader(seed=1))
    assert [(entry.when, entry.step) for entry in callback.history] == places


def test_the_end_that_a_stopper_makes_is_measured(tmp_path: Any) -> None:
    callback = measure(at_steps=[0], at_end=True)
    stopper = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    run = trainer(tmp_path, callback, stopper, max_epochs=9)
    run.fit(seeded(), loader(), loader(seed=1))
    assert [(entry.when, entry.step) for entry in callback.history] == [("fit_start", 0), ("fit_end", run.global_step)]
    assert run.global_step < 54


def test_a_stop_before_its_time_is_not_the_end(tmp_path: Any) -> None:
    callback = measure(at_steps=[0], at_end=True)

    class Impatient(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    trainer(tmp_path, Impatient(), callback, max_epochs=9, min_epochs=3).fit(seeded(), loader(), loader(seed=1))
    assert [(entry.when, entry.step) for entry in callback.history] == [("fit_start", 0), ("epoch", 18)]
