"""Training is left as it was where modules, data and libraries keep state in unusual places.

Each test trains twice from one seed, with the callback and without it, and compares everything that can be observed.
"""

from __future__ import annotations

import collections
import copy
import io
import itertools
import multiprocessing
import random
import types
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hessian_callback.measurement.errors import SampleError
from hessian_callback.operators.product_check import WrongProductError
from tests.helpers.lightning import LightningModule
from tests.helpers.toy_runs import Net, data, loader, measure, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:.*are few for.*eigenvalues"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

Loaders = Callable[[], tuple[Any, Any]]


def plain_loaders() -> tuple[Any, Any]:
    return loader(shuffle=True), loader(seed=1)


def observed(run: Any, model: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in run.optimizers]),
        "modes": [module.training for module in model.modules()],
        "random": [random.getstate(), np.random.get_state()[1], torch.get_rng_state()],
        "logged": {name: v.clone() for name, v in run.callback_metrics.items() if not name.startswith("hessian/")},
        "steps": run.global_step,
    }


def assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert one == other, where


def assert_trains_alike(
    tmp_path: Any,
    make: Any,
    loaders: Loaders = plain_loaders,
    *,
    look: Callable[[Any], Any] = lambda model: None,
    measured: bool = True,
    choice: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train with the callback and without it; return the callback."""
    results = []
    for callbacks in ([measure(**(choice or {}))], []):
        model = seeded(make)
        train, val = loaders()
        run = trainer(tmp_path, *callbacks, **options)
        run.fit(model, train, val)
        results.append({**observed(run, model), "look": look(model)})
        if callbacks:
            callback = callbacks[0]
    assert_same(*results, "run")
    reasons = [entry.reason for entry in callback.history]
    assert bool(callback.history) or not measured
    assert all(entry.logged for entry in callback.history) == measured, reasons
    return callback


# -- modes and hooks ---------------------------------------------------------------------------------


class Compiled(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
        # A traced module has the mode of its dropout in its graph.
        self.net[0] = (
            torch.jit.script(inner.append(nn.Dropout(0.2)))
            if kind == "script"
            else torch.jit.trace(inner, torch.ones(2, 5))
        )


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_compiled_modules_go_on_in_their_modes(kind: str, tmp_path: Any) -> None:
    # The second derivatives of scripted modules are wrong. Traced ones update buffers in place in any mode, so that
    # their measurement fails, and leaves no trace either.
    choice = {"hvp": "finite_difference"} if kind == "script" else {"at_steps": [6]}
    assert_trains_alike(tmp_path, lambda: Compiled(kind), choice=choice, measured=kind == "script")


def test_wrong_second_derivatives_of_scripted_modules_are_refused(tmp_path: Any) -> None:
    with pytest.raises(WrongProductError, match="differ by"):
        trainer(tmp_path, measure()).fit(seeded(Compiled, kind="script"), loader(), loader(seed=1))


class Observed(Net):
    """Keeps gradients per step, and counts them, by hooks of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        # Outside of what is restored: an observer that writes a file could not be restored.
        self.log_of_hooks = LOG_OF_HOOKS
        LOG_OF_HOOKS.clear()
        for name, parameter in self.named_parameters():
            parameter.register_hook(
                lambda grad, name=name: LOG_OF_HOOKS.__setitem__(name, LOG_OF_HOOKS.get(name, 0) + 1)
            )
        self.net[4].register_full_backward_hook(lambda *_: self.counts.update(["backward"]))
        self.net[0].weight.register_hook(lambda grad: setattr(self.net[0].weight, "grad_sample", grad.clone()))


LOG_OF_HOOKS: dict[str, int] = {}


def test_observers_of_gradients_see_those_of_training_alone(tmp_path: Any) -> None:
    assert_trains_alike(
        tmp_path,
        Observed,
        look=lambda m: [dict(LOG_OF_HOOKS), dict(m.counts), m.net[0].weight.grad_sample],
        choice={"memory_budget": 0},
    )


# -- state of the module -----------------------------------------------------------------------------


class Dict(dict[str, int]):
    pass


class List(list[int]):
    pass


class Keeping(Net):
    """Keeps state of fourteen kinds."""

    shared: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        type(self).shared = []
        self.counter: Any = collections.Counter()
        self.dict, self.list, self.count = Dict(n=0), List(), itertools.count()
        self.cycle, self.recent = itertools.cycle("abc"), collections.deque([1], maxlen=5)
        self.bytes, self.stream, self.rng = bytearray(1), io.StringIO(), np.random.default_rng(0)
        self.ordered: Any = collections.OrderedDict(a=1, b=2)
        self.nested: Any = {"a": {"b": {"c": {"d": {"e": [0]}}}}}
        self.ring: Any = [(torch.zeros(2), 0.0)] * 12_000
        self.hidden: Any = None
        self.save_hyperparameters({"tau": 1.0})
        self.read: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counter.update(batch[1].tolist())
        self.dict["n"] += 1
        self.list.append(1)
        self.shared.append(1)
        self.recent.append(int(batch[1][0]))
        self.bytes[0] += 1
        self.stream.write("x")
        self.ordered.move_to_end("a" if len(self.list) % 2 else "b")
        self.nested["a"]["b"]["c"]["d"]["e"][0] += 1
        self.ring[self.dict["n"]] = (batch[0][0], 1.0)
        self.hparams.tau *= 0.99
        self.hidden = batch[0].mean() if self.hidden is None else 0.5 * self.hidden + batch[0].mean()
        self.read.append((next(self.count), next(self.cycle), float(self.rng.random())))
        return super().training_step(batch, batch_idx)

    def look(self) -> Any:
        return {
            "counter": dict(self.counter),
            "dict": dict(self.dict),
            "lists": [list(self.list), list(self.recent), list(self.shared), self.read],
            "ordered": list(self.ordered),
            "bytes": bytes(self.bytes),
            "text": self.stream.getvalue(),
            "nested": self.nested,
            "ring": [number for number, entry in enumerate(self.ring) if entry[1]],
            "tau": self.hparams.tau,
            "hidden": self.hidden,
        }


def test_state_of_every_kind_in_a_module_is_restored(tmp_path: Any) -> None:
    assert_trains_alike(tmp_path, Keeping, look=Keeping.look)


class Decaying(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.99
        return super().training_step(batch, batch_idx)


def test_learning_rates_that_a_step_changes_are_restored(tmp_path: Any) -> None:
    assert_trains_alike(tmp_path, Decaying)


class Recurrent(LightningModule):
    """Carries the hidden state over from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)
        self.state: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out, state = self.rnn(batch[0][:, None], self.state)
        self.state = state.detach()
        return nn.functional.cross_entropy(self.head(out[:, 0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("dataloader", ["train", "val"])
def test_hidden_state_is_restored_whether_or_not_the_loss_can_be_measured(dataloader: str, tmp_path: Any) -> None:
    results = []
    for callbacks in ([measure(dataloader=dataloader, at_steps=[3, 8])], []):
        model = seeded(Recurrent)
        run = trainer(tmp_path, *callbacks)
        run.fit(model, *plain_loaders())
        results.append([observed(run, model), model.state])
    assert_same(*results, "run")


class SemiSupervised(Net):
    """Takes the second batch of a step from an iterator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.unlabelled: Any = None

    def on_fit_start(self) -> None:
        self.unlabelled = iter(DataLoader(data(400, seed=3), batch_size=8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = next(self.unlabelled)
        return {"loss": super().training_step(batch, batch_idx)["loss"] + self(x).square().mean()}


def test_an_iterator_over_other_data_is_not_read(tmp_path: Any) -> None:
    callback = assert_trains_alike(
        tmp_path, SemiSupervised, look=lambda m: m.unlabelled._num_yielded, measured=False, choice={"at_steps": [6]}
    )
    assert "SemiSupervised.unlabelled" in callback.history[-1].reason
    assert "loss_fn=" in callback.history[-1].reason


class Noisy(Net):
    """Holds more lists than are visited, and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.deep = [[number] for number in range(250_000)], {"rng": [random.Random(0)]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] + self.deep["rng"][0].random(), batch[1]), batch_idx)


def test_a_long_table_of_a_module_is_named_and_hides_no_generator(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"Noisy\.table\[\.\.\.\] holds too many objects or bytes to be compared"):
        assert_trains_alike(tmp_path, Noisy, look=lambda m: m.deep["rng"][0].getstate())


class Cumulative(Net):
    """Changes an array or tensor that is too large to copy."""

    def __init__(self, bank: Any) -> None:
        super().__init__()
        self.bank = bank

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        memory = self.bank.numpy() if isinstance(self.bank, torch.Tensor) else self.bank
        memory[-1] += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_large_array_that_a_loss_changes_is_named(kind: str, tmp_path: Any) -> None:
    bank: Any = np.zeros(9_000_000) if kind == "array" else torch.zeros(9_000_000, dtype=torch.float64)
    callback, module = measure(at_steps=[3]), seeded(Cumulative, bank=bank)
    with pytest.warns(UserWarning, match="the loss changes") as caught:
        trainer(tmp_path, callback, max_epochs=1).fit(module, *plain_loaders())
    texts = [str(warning.message) for warning in caught]
    assert any("the loss changes Cumulative.bank" in text and "too large to copy" in text for text in texts)
    assert any(f"changed the {kind} Cumulative.bank in place" in text and "loss_fn=" in text for text in texts)
    assert not any("holds too many" in text for text in texts)
    assert "Cumulative.bank" in callback.history[-1].reason


# -- global variables --------------------------------------------------------------------------------


class Totals:
    steps = 0


STEPS, LOG, RECENT, TABLE = 0, [0], collections.deque([0], maxlen=3), {"n": {"deep": [0]}}
LAST, COUNTER = None, collections.Counter()  # type: ignore[var-annotated]
SUMS, AVERAGE, LABELS = np.zeros(3), torch.zeros(3), {0}
NUMBERS, METER, TEACHER = itertools.count(), types.SimpleNamespace(total=0), nn.BatchNorm1d(5, affine=False)
AUGMENT = types.SimpleNamespace(rng=random.Random(0))


def reset() -> None:
    global STEPS, NUMBERS, LAST
    STEPS, NUMBERS, LAST, Totals.steps = 0, itertools.count(), None, 0
    for container in (LOG, RECENT, COUNTER, LABELS):
        container.clear()
    LOG.append(0)
    TABLE["n"]["deep"][0] = METER.total = 0
    SUMS.fill(0)
    AVERAGE.fill_(0)
    AUGMENT.rng.seed(0)
    TEACHER.reset_running_stats()


def note(y: Any) -> None:
    """Change all global variables of this module."""
    global STEPS, LAST
    STEPS += 1
    LAST = y
    Totals.steps += 1
    LOG.append(1)
    RECENT.append(int(y[0]))
    TABLE["n"]["deep"][0] += 1
    COUNTER.update(y.tolist())
    LABELS.update(y.tolist())
    SUMS[:] += 1
    AVERAGE.mul_(0.9).add_(1)
    METER.total += next(NUMBERS)


class Global(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        note(batch[1])
        x = TEACHER.train()(batch[0]) + AUGMENT.rng.random() + 1 / len(LOG)
        return super().training_step((x, batch[1]), batch_idx)

    @staticmethod
    def look(_: Any) -> Any:
        return {
            "numbers": [STEPS, Totals.steps, METER.total, next(NUMBERS)],
            "lists": [list(LOG), list(RECENT), TABLE["n"]["deep"], dict(COUNTER), sorted(LABELS), SUMS.copy()],
            "tensors": [AVERAGE.clone(), TEACHER.running_mean.clone(), LAST],
            "random": AUGMENT.rng.getstate(),
        }


def test_global_variables_that_a_step_changes_are_restored(tmp_path: Any) -> None:
    def make() -> Any:
        reset()
        return Global()

    assert_trains_alike(tmp_path, make, look=Global.look)


# -- data --------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """The rows of `data`, shifted by what a state makes of each."""

    def __init__(self, state: Any, shift: Callable[[Any, int], float], **more: Any) -> None:
        self.rows, self.shift = data(), shift
        vars(self).update(more)
        # Behind the others.
        self.parts = {"inner": [state]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index]
        return x + self.shift(self.parts["inner"][0], index), y


class Sample(NamedTuple):
    path: str
    label: int


LONG: dict[str, Callable[[range], Any]] = {
    "tuples": lambda numbers: [(f"{number}.png", number % 3) for number in numbers],
    "paths": lambda numbers: [(Path(f"{number}.png"), number % 3) for number in numbers],
    "named tuples": lambda numbers: [Sample(f"{number}.png", number % 3) for number in numbers],
    "dictionary": lambda numbers: {number: (f"{number}.png", np.float32(number)) for number in numbers},
    "deque": lambda numbers: collections.deque((f"{number}.png", number % 3) for number in numbers),
    "set": lambda numbers: {(f"{number}.png", number % 3) for number in numbers},
    "array": lambda numbers: np.array([f"{number}.png" for number in numbers], dtype=object),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_list_of_files_hides_no_generator(kind: str, tmp_path: Any, recwarn: pytest.WarningsRecorder) -> None:
    samples = LONG[kind](range(250_000))

    def loaders() -> tuple[Any, Any]:
        rows = Rows(random.Random(0), lambda rng, _: rng.random(), samples=samples)
        return DataLoader(rows, batch_size=8), loader(seed=1)

    assert_trains_alike(tmp_path, Net, loaders, choice={"dataloader": "train", "num_samples": 16})
    assert not [str(w.message) for w in recwarn if "holds too many" in str(w.message)]


def count_up(values: Any, index: int) -> float:
    values[index % len(values)] += 1
    return float(values[index % len(values)])


@pytest.mark.parametrize("kind", ["array", "view", "tensor"])
def test_a_large_array_that_the_loading_of_samples_changes_is_named(kind: str, tmp_path: Any) -> None:
    values: Any = np.zeros(200_000) if kind == "array" else np.zeros((2, 200_000)).T[:, 0]
    if kind == "tensor":
        values = torch.zeros(200_000)
    rows = Rows(values, count_up)
    callback = measure(dataloader="train", num_samples=16)
    with pytest.warns(UserWarning, match=r"changed the \w+ Rows\.parts\['inner'\]\[0\] in place.*dataloader="):
        trainer(tmp_path, callback, max_epochs=1).fit(seeded(), DataLoader(rows, batch_size=8), loader(seed=1))
    assert "it was not copied, because it is too large" in callback.history[0].reason


class Shared:
    """The first byte of memory with a name."""

    def __init__(self) -> None:
        self.memory = shared_memory.SharedMemory(create=True, size=8)
        self.memory.buf[:8] = bytes(8)

    def add(self) -> float:
        self.memory.buf[0] += 1
        return float(self.memory.buf[0])

    def __del__(self) -> None:
        self.memory.close()
        self.memory.unlink()


def count_value(value: Any, _: int) -> float:
    value.value += 1
    return float(value.value)


SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any, int], float]]] = {
    "value": (lambda: multiprocessing.Value("i", 0), count_value),
    "raw value": (lambda: multiprocessing.RawValue("d", 0), count_value),
    "array": (lambda: multiprocessing.Array("d", 7), count_up),
    "raw array": (lambda: multiprocessing.RawArray("i", 7), count_up),
    "tensor": (lambda: torch.zeros(7).share_memory_(), count_up),
    "memory with a name": (Shared, lambda shared, _: shared.add()),
}


@pytest.mark.parametrize("kind", SHARED)
def test_memory_that_processes_share_is_restored(kind: str, tmp_path: Any) -> None:
    make, shift = SHARED[kind]

    def loaders() -> tuple[Any, Any]:
        return DataLoader(Rows(make(), shift), batch_size=8), loader(seed=1)

    assert_trains_alike(tmp_path, Net, loaders, choice={"dataloader": "train", "num_samples": 16})


class Lines(IterableDataset[Any]):
    """Goes on where it was: an open file, or an iterator."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        for line in self.source:
            numbers = [float(word) for word in line.split()]
            yield torch.tensor(numbers[:5]), int(numbers[5])


def text() -> str:
    return "".join(f"{' '.join(map(str, x.tolist()))} {int(y)}\n" for x, y in data(400))


SOURCES: dict[str, Callable[[Any], Any]] = {
    "file": lambda path: path.open(),
    "memory": lambda path: io.StringIO(path.read_text()),
    "list": lambda path: iter(path.read_text().splitlines()),
    "map": lambda path: map(str.strip, iter(path.read_text().splitlines())),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dataloader", ["train", "val"])
def test_streams_that_go_on_where_they_were_are_not_read(source: str, dataloader: str, tmp_path: Any) -> None:
    path = tmp_path / "lines"
    path.write_text(text())

    def loaders() -> tuple[Any, Any]:
        stream = DataLoader(Lines(SOURCES[source](path)), batch_size=8)
        return (stream, loader(seed=1)) if dataloader == "train" else (loader(shuffle=True), stream)

    limits = {"limit_train_batches": 6} if dataloader == "train" else {"limit_val_batches": 3}
    run = trainer(tmp_path, measure(dataloader=dataloader), max_epochs=1, **limits)
    train, val = loaders()
    module = seeded()
    with pytest.raises(SampleError, match=r"reads on from its dataset\.source .*dataloader=my_loader"):
        run.fit(module, train, val)
    # Nothing was read before training, which did not begin.
    assert module.calls == 0
    assert len(list((train if dataloader == "train" else val).dataset)) == 400


def test_a_generator_of_data_is_not_read(tmp_path: Any) -> None:
    """It cannot be rewound, so the measurement is refused before training, with the remedy."""
    path = tmp_path / "lines"
    path.write_text(text())
    stream = DataLoader(Lines(line for line in path.read_text().splitlines()), batch_size=8)
    run = trainer(tmp_path, measure(dataloader="train"), max_epochs=1, limit_train_batches=6)
    source = stream.dataset.source
    with pytest.raises(SampleError, match=r"reads on from its dataset\.source .*dataloader=my_loader"):
        run.fit(seeded(), stream, loader(seed=1))
    assert stream.dataset.source is source


@pytest.mark.parametrize("where", ["attribute", "closure", "library"])
def test_random_generators_of_a_collator_are_restored(where: str, tmp_path: Any) -> None:
    """Both loaders share the collator, so a draw for the Hessian's samples would change those of training."""

    def loaders() -> tuple[Any, Any]:
        collate: Any
        if where == "library":
            transformers = pytest.importorskip("transformers")
            tokenizers = pytest.importorskip("tokenizers")
            words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, **{f"w{number}": number + 3 for number in range(60)}}
            vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=vocabulary, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
            )
            masked = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=5)

            def collate(rows: Any) -> Any:
                x, y = torch.utils.data.default_collate(rows)
                marked = masked([{"input_ids": [3, 4, 5, 6]} for _ in rows])["labels"]
                return x + (marked > 0).sum(1, keepdim=True), y

        elif where == "closure":
            rng = np.random.default_rng(0)

            def collate(rows: Any) -> Any:
                x, y = torch.utils.data.default_collate(rows)
                return x + float(rng.random()), y

        else:
            collate = Shifting()
        return loader(shuffle=True, collate_fn=collate), loader(seed=1, collate_fn=collate)

    assert_trains_alike(tmp_path, Net, loaders)


class Shifting:
    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)

    def __call__(self, rows: Any) -> Any:
        x, y = torch.utils.data.default_collate(rows)
        return x + torch.rand((), generator=self.rng), y
