"""Killed Lanczos runs continue from their last save to the same bits; other runs and damaged files are refused."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from hessian_callback import HessianOperator, Spectrum
from hessian_callback.algorithms import solver_checkpoint
from hessian_callback.algorithms.lanczos import LanczosProgress, top_eigenvalues
from hessian_callback.algorithms.solver_checkpoint import CheckpointError, SolverCheckpoint
from tests.helpers.cases import CASES, rotated
from tests.helpers.faults import Killed, dying, full_disk
from tests.helpers.ranks import DiagonalOperator, run_ranks
from tests.helpers.spectra import SPECTRA, operator_of

DTYPES = [torch.float64, torch.float32]
POWER_LAW = rotated(SPECTRA["power law"]())


def killed_after(products: int, operator: Any, folder: Path, k: int = 10, **options: Any) -> None:
    with pytest.raises(Killed):
        top_eigenvalues(operator, k, progress=dying(products), checkpoint=folder, checkpoint_every=0, **options)


def assert_same(one: Spectrum, other: Spectrum) -> None:
    for field in fields(Spectrum):
        value, expected = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected, field.name


# -- the same bits ---------------------------------------------------------------------------------


def assert_same_state(one: Any, other: Any) -> None:
    (leaves, shape), (expected, expected_shape) = tree_flatten(one), tree_flatten(other)
    assert shape == expected_shape
    for value, known in zip(leaves, expected, strict=True):
        assert torch.equal(value, known) if isinstance(value, Tensor) else value == known


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Return the saved states by number of products; at the same number they must be equal in every run."""
    states: dict[int, Any] = {}
    save = SolverCheckpoint.save

    def noting(self: SolverCheckpoint, basis: Any, solver: Any, **more: Any) -> None:
        products = solver["decomposition"]["num_matvecs"]
        state = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, solver)
        assert_same_state(states.setdefault(products, state), state)
        save(self, basis, solver, **more)

    monkeypatch.setattr(SolverCheckpoint, "save", noting)
    return states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "k", "dtype"),
    [
        ("power law", 10, torch.float64),
        ("slow power law", 10, torch.float32),
        ("five times", 10, torch.float64),
        ("every one twice", 10, torch.float32),
        ("spikes and a semicircle", 30, torch.float64),
        ("rank 8", 10, torch.float64),
        ("zero", 10, torch.float32),
        ("identity", 10, torch.float64),
    ],
    ids=str,
)
def test_a_run_that_is_killed_repeatedly(
    name: str, k: int, dtype: torch.dtype, saved: dict[int, Any], tmp_path: Path
) -> None:
    """Kills fall between checks, after probes that found nothing, and within probes that found something."""
    matrix = rotated(SPECTRA[name]())
    solve = partial(
        top_eigenvalues, operator_of(matrix, dtype), k, max_matvecs=min(len(matrix), 250), checkpoint_every=0
    )
    products: list[int] = []
    whole = solve(progress=lambda now: products.append(now.num_matvecs))
    assert_same(solve(checkpoint=tmp_path / "whole"), whole)
    spectrum = None
    for after in count(3, 3):
        seen: list[int] = []
        die = dying(after)

        def progress(now: LanczosProgress, seen: list[int] = seen, die: Any = die) -> None:
            seen.append(now.num_matvecs)
            die(now)

        with suppress(Killed):
            spectrum = solve(checkpoint=tmp_path / "run", progress=progress)
        assert seen == products[seen[0] - 1 : seen[-1]]
        if spectrum is not None:
            break
    assert after > 3
    assert spectrum is not None
    assert_same(spectrum, whole)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", [(2, None), (2, 0), (2, 1)], ids=str)
def test_several_chains(state: tuple[int, int | None], saved: dict[int, Any], tmp_path: Path) -> None:
    """A probe adds a copy with a chain of its own; the run is killed while either of the two chains is expanded."""
    values = torch.arange(1, 151, dtype=torch.float64) ** -1.0
    operator = operator_of(rotated(torch.cat([values, values[2].repeat(4)])))
    whole = top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", checkpoint_every=0, return_eigenvectors=True)
    chains = {n: (len(solver["decomposition"]["chains"]), solver["chain"]) for n, solver in saved.items()}
    last = max(products for products, chain in chains.items() if chain == state)
    killed_after(last + 1, operator, tmp_path / "run")
    assert_same(top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", return_eigenvectors=True), whole)


@pytest.mark.parametrize("options", [
    {"positive_only": True, "criterion": lambda lower, upper: bool((upper - lower < 0.05 * lower).all())},
    {"start": torch.linspace(-1, 1, 400, dtype=torch.float64)},
    {"basis_device": "cpu", "seed": 3},
], ids=["criterion", "start", "basis_device"])  # fmt: skip
def test_options_are_arguments_of_the_same_call(options: dict[str, Any], tmp_path: Path) -> None:
    operator = operator_of(POWER_LAW)
    whole = top_eigenvalues(operator, 10, **options)
    killed_after(whole.num_matvecs * 2 // 3, operator, tmp_path / "run", **options)
    assert_same(top_eigenvalues(operator, 10, checkpoint=str(tmp_path / "run"), **options), whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_the_hessian_of_a_network(hvp: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES["mlp"](dtype)

    def operator() -> HessianOperator:
        return HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, hvp=hvp)

    whole = top_eigenvalues(operator(), 8)
    killed_after(whole.num_matvecs // 2, operator(), tmp_path / "run", 8)
    assert_same(top_eigenvalues(operator(), 8, checkpoint=tmp_path / "run"), whole)


# -- files, and when they are written -------------------------------------------------------------------


def test_nothing_is_saved_in_the_first_seconds_nor_left_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = operator_of(POWER_LAW)
    sizes = []

    def look(now: LanczosProgress) -> None:
        sizes.append({path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()})

    top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", progress=look)
    assert {tuple(sorted(one)) for one in sizes} == {("rank0.basis", "rank0.state0")}
    assert {one["rank0.basis"] for one in sizes} == {0}
    assert list(tmp_path.iterdir()) == []
    # With a clock on which a product takes a minute.
    sizes.clear()
    ticks = count(0, 60)
    monkeypatch.setattr(solver_checkpoint.time, "monotonic", lambda: next(ticks))
    whole = top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", progress=look)
    saved = [one["rank0.basis"] // (400 * 8) for one in sizes]
    assert saved[:9] == [0, 0, 0, 0, 0, 5, 5, 5, 5]
    assert 4 <= len(set(saved)) <= whole.num_matvecs // 4


def test_the_basis_is_appended_to_and_small_states_take_turns(tmp_path: Path) -> None:
    operator = operator_of(POWER_LAW, torch.float32)
    folder = tmp_path / "run"
    written = [b""]
    inodes = set()

    def look(now: LanczosProgress) -> None:
        data = (folder / "rank0.basis").read_bytes()
        assert data.startswith(written[-1])
        assert len(data) <= 4 * 400 * now.num_matvecs
        written.append(data)
        inodes.add((folder / "rank0.basis").stat().st_ino)
        assert {path.name for path in folder.iterdir()} <= {"rank0.basis", "rank0.state0", "rank0.state1"}

    top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0, progress=look)
    assert len(inodes) == 1
    assert len(set(written)) > 20


def test_a_folder_with_other_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "ranks.csv").write_text("mine")
    top_eigenvalues(operator_of(POWER_LAW), 3, checkpoint=tmp_path, checkpoint_every=0)
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.csv"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(solver_checkpoint.SolverCheckpoint, "__init__", None)
    top_eigenvalues(operator_of(POWER_LAW), 3, checkpoint_every=0)
    assert list(tmp_path.iterdir()) == []


def test_seconds_must_not_be_negative(tmp_path: Path) -> None:
    for every in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="checkpoint_every must be a number of seconds, at least 0"):
            top_eigenvalues(operator_of(POWER_LAW), 3, checkpoint=tmp_path, checkpoint_every=every)


# -- killed within a save --------------------------------------------------------------------------


@pytest.mark.parametrize("remains", ["vectors", "half a vector", "a new state"])
def test_leftovers_of_an_unfinished_save_are_overwritten(remains: str, tmp_path: Path) -> None:
    operator, folder = operator_of(POWER_LAW), tmp_path / "run"
    whole = top_eigenvalues(operator, 10)
    killed_after(20, operator, folder)
    assert (folder / "rank0.basis").stat().st_size == 8 * 400 * 19
    if remains == "a new state":
        (folder / "rank0.new").write_bytes((folder / "rank0.state0").read_bytes()[:100])
    else:
        with (folder / "rank0.basis").open("ab") as file:
            file.write(os.urandom(8 * 400 * 3 if remains == "vectors" else 700))
    killed_after(2, operator, folder)
    assert (folder / "rank0.basis").stat().st_size == 8 * 400 * 20
    assert_same(top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0), whole)
    assert not folder.exists()


def test_the_previous_state_is_used_if_the_last_is_missing(tmp_path: Path) -> None:
    """A rank goes back by one save if the others lack its last one; here the file is deleted."""
    operator, folder = operator_of(POWER_LAW), tmp_path / "run"
    whole = top_eigenvalues(operator, 10)
    killed_after(30, operator, folder)
    newest = max(folder.glob("rank0.state?"), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    assert_same(top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0), whole)


@pytest.mark.parametrize("written", [4, 5], ids=["vectors", "state"])
def test_after_a_save_that_fails_the_run_goes_on_and_the_save_before_stays(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, folder = operator_of(POWER_LAW), tmp_path / "run"
    whole = top_eigenvalues(operator, 10)
    killed_after(20, operator, folder)
    solve = partial(top_eigenvalues, operator, 10, checkpoint=folder, checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(solver_checkpoint.os, "fsync", partial(full_disk, count(written, -1)))
        told = pytest.warns(UserWarning, match=r"saved: No space left on device\. The computation continues")
        with told as caught, pytest.raises(Killed):
            solve(progress=dying(15))
    assert len(caught) == 1
    assert last_save(folder, rank=0) == 19 + 2  # two files a save, and the third of this process failed
    assert {path.name: path.stat().st_size for path in folder.glob("*.[bn]*")} == {"rank0.basis": 8 * 400 * 21}
    first: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(solver_checkpoint.os, "fsync", partial(full_disk, count(written, -1)))
        with pytest.warns(UserWarning, match="continues without further saves"):
            assert_same(solve(progress=lambda now: first.append(now.num_matvecs)), whole)
    assert first[0] == 22
    assert not folder.exists()


def test_runs_that_share_a_folder_are_warned(tmp_path: Path) -> None:
    operator, folder = operator_of(POWER_LAW), tmp_path / "run"

    def look(now: LanczosProgress) -> None:
        if now.num_matvecs == 20:  # The other run ends.
            solver_checkpoint.delete_files(folder, 0)

    with pytest.warns(UserWarning, match=r"rank0\.basis\): do two runs share this folder\? Give each its own"):
        spectrum = top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0, progress=look)
    assert_same(spectrum, top_eigenvalues(operator, 10))


def test_files_that_cannot_be_deleted_do_not_cost_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = operator_of(POWER_LAW)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(UserWarning, match=r"could not be deleted: Permission denied \(.*\); delete .* yourself"):
        spectrum = top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", checkpoint_every=0)
    assert_same(spectrum, top_eigenvalues(operator, 10))


def test_a_folder_that_cannot_be_written_is_found_before_the_first_product(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    products: list[LanczosProgress] = []
    with pytest.raises(
        CheckpointError, match=r"can't be used for the .*: Not a directory \(.*\); make it readable and"
    ):
        top_eigenvalues(operator_of(POWER_LAW), 3, checkpoint=tmp_path / "file" / "run", progress=products.append)
    assert not products


@pytest.mark.parametrize("written", [0, 1], ids=["state", "basis"])
def test_a_full_disk_is_found_before_the_first_product(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver_checkpoint.os, "fsync", partial(full_disk, count(written, -1)))
    products: list[LanczosProgress] = []
    with pytest.raises(CheckpointError, match=r"can't be used for the .*: No space left on device"):
        top_eigenvalues(operator_of(POWER_LAW), 3, checkpoint=tmp_path / "run", progress=products.append)
    assert not products
    assert list(tmp_path.iterdir()) == []


# -- runs that must be refused ------------------------------------------------------------------------


def stepped(case: Any, lr: float) -> None:
    loss = case.loss_fn(case.model, case.batches[0])
    with torch.no_grad():
        gradients = torch.autograd.grad(loss, list(case.model.parameters()))
        for parameter, gradient in zip(case.model.parameters(), gradients, strict=True):
            parameter -= lr * gradient


@pytest.mark.parametrize("change", ["weights", "samples", "loss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_hessian_is_refused(change: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES["mlp"](dtype)

    def solve(**options: Any) -> Spectrum:
        operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
        return top_eigenvalues(operator, 8, checkpoint=tmp_path / "run", checkpoint_every=0, **options)

    with pytest.raises(Killed):
        solve(progress=dying(20))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    own = {name: value.clone() for name, value in case.model.state_dict().items()}
    batches, weights, loss_fn = case.batches, case.weights, case.loss_fn
    if change == "weights":
        stepped(case, lr=1e-3)
    elif change == "samples":
        case.batches, case.weights = batches[:1], weights[:1]
    else:
        case.loss_fn = lambda model, batch: 1.0001 * loss_fn(model, batch)
    with pytest.raises(ValueError, match=r"another matrix.*restore the weights and the data.*or delete the folder"):
        solve()
    # Nothing is lost, so the original run can still be continued.
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    case.batches, case.weights, case.loss_fn = batches, weights, loss_fn
    case.model.load_state_dict(own)
    assert_same(solve(), top_eigenvalues(HessianOperator(case.model, loss_fn, batches, weights=weights), 8))


@pytest.mark.slow
def test_the_same_hessian_by_another_engine_is_accepted(tmp_path: Path) -> None:
    case = CASES["attention"](torch.float32)
    first, second = (
        HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, hvp=hvp)
        for hvp in ("double_backward", "linearize")
    )
    whole = top_eigenvalues(first, 8)
    killed_after(20, first, tmp_path / "run", 8)
    spectrum = top_eigenvalues(second, 8, checkpoint=tmp_path / "run")
    assert ((spectrum.eigenvalues - whole.eigenvalues).abs() <= spectrum.error_bounds + whole.error_bounds).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 9}, r"k=10, and this one has k=9"),
        ({"rtol": 1e-3}, r"rtol=0.01, and"),
        ({"max_matvecs": 70}, r"max_matvecs=100, and"),
        ({"seed": 1}, r"seed=0, and"),
        ({"positive_only": True}, r"positive_only=False, and"),
        ({"operator": operator_of(POWER_LAW, torch.float32)}, r"dtype=float64, and this one has dtype=float32"),
        ({"operator": operator_of(POWER_LAW[:399, :399])}, r"parameters=400, and this one has parameters=399"),
        ({"version": "0.0.9"}, r"version=.*, and this one has version=0.0.9"),
    ],
    ids=["k", "rtol", "max_matvecs", "seed", "positive_only", "dtype", "parameters", "version"],
)
def test_another_run_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(15, operator_of(POWER_LAW), tmp_path / "run", max_matvecs=100)
    if version := options.pop("version", None):
        monkeypatch.setattr(solver_checkpoint, "__version__", version)
    defaults: dict[str, Any] = {"operator": operator_of(POWER_LAW), "k": 10, "max_matvecs": 100}
    with pytest.raises(
        CheckpointError, match=rf"{named}.*run it with the original arguments, or delete the folder to start over"
    ):
        top_eigenvalues(checkpoint=tmp_path / "run", **{**defaults, **options})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("name", ["rank0.basis", "rank0.state0", "rank0.state1"])
def test_damaged_files_are_refused(name: str, damage: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_after(15, operator_of(POWER_LAW), folder)
    damage(folder / name)
    if not (folder / name).exists() and name != "rank0.basis":
        return  # One of two states is enough.
    with pytest.raises(CheckpointError, match=rf"{name} is cut off or damaged; delete the folder to start over"):
        top_eigenvalues(operator_of(POWER_LAW), 10, checkpoint=folder)


# -- files of others -------------------------------------------------------------------------------

FOREIGN = [
    "rankings.basis", "rank.basis", "rank0.basis.bak", "rank00.basis", "rank-1.basis", "rank0basis", "Rank0.basis",
    "rank1a.state0", "ranked.state1", "rank0.news", "mine.basis", "rank0.state2", "rank\u0663.basis",
]  # fmt: skip


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_foreign_files_survive(finished: bool, tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "rank0.folder").mkdir()
    if not finished:
        killed_after(12, operator_of(POWER_LAW), tmp_path)
    top_eigenvalues(operator_of(POWER_LAW), 10, checkpoint=tmp_path, checkpoint_every=0)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN, "rank0.folder"}
    assert all((tmp_path / name).read_bytes() == name.encode() for name in FOREIGN)


def test_a_foreign_basis_of_the_same_name_is_refused_and_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "rank0.basis"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match=r"rank0\.basis is not a solver's checkpoint: .*; move it elsewhere, or"):
        top_eigenvalues(operator_of(POWER_LAW), 10, checkpoint=tmp_path)
    solver_checkpoint.delete_files(tmp_path, 0)
    assert [one.name for one in tmp_path.iterdir()] == ["rank0.basis"]
    assert path.read_text() == "mine"


def test_a_basis_of_the_first_unfinished_save_is_overwritten(tmp_path: Path) -> None:
    """A kill within the first save leaves vectors and the state without vectors."""
    operator = operator_of(POWER_LAW)
    with pytest.raises(Killed):
        top_eigenvalues(operator, 10, checkpoint=tmp_path / "run", progress=dying(3))
    with (tmp_path / "run" / "rank0.basis").open("ab") as file:
        file.write(os.urandom(5000))
    # Nothing was saved, so other arguments are accepted.
    assert_same(
        top_eigenvalues(operator, 9, checkpoint=tmp_path / "run", checkpoint_every=0), top_eigenvalues(operator, 9)
    )
    assert not (tmp_path / "run").exists()


def linked(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(victim)


@pytest.mark.parametrize("name", ["rank0.basis", "rank0.state0", "rank0.state1", "rank0.new"])
@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_symbolic_links_are_not_followed(name: str, dangling: bool, resumed: bool, tmp_path: Path) -> None:
    folder, victim, operator = tmp_path / "run", tmp_path / "victim", operator_of(POWER_LAW)
    folder.mkdir()
    if resumed:
        killed_after(15, operator, folder)
    if not dangling:
        victim.write_text("mine")
    linked(folder / name, victim)
    error: CheckpointError | None = None
    try:
        top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0)
    except CheckpointError as exception:
        error = exception
    assert victim.exists() != dangling
    assert dangling or victim.read_text() == "mine"
    # Only a leftover of an unfinished save is replaced without an error.
    assert (error is None) == (name == "rank0.new")
    assert error is None or "symbolic link" in str(error) or "is not a solver's checkpoint" in str(error)
    solver_checkpoint.delete_files(folder, 0)
    assert victim.exists() != dangling


def test_a_link_put_in_place_during_a_run_is_not_written_through(tmp_path: Path) -> None:
    operator, folder, victim = operator_of(POWER_LAW), tmp_path / "run", tmp_path / "victim"
    victim.write_text("mine")

    def swap(now: LanczosProgress) -> None:
        if now.num_matvecs == 20:
            linked(folder / "rank0.basis", victim)

    with pytest.warns(UserWarning, match=r"could not be saved: .*rank0\.basis is a symbolic link"):
        spectrum = top_eigenvalues(operator, 10, checkpoint=folder, checkpoint_every=0, progress=swap)
    assert victim.read_text() == "mine"
    assert_same(spectrum, top_eigenvalues(operator, 10))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes named pipes")
@pytest.mark.parametrize("name", ["rank0.basis", "rank0.state0"])
def test_a_pipe_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    killed_after(15, operator_of(POWER_LAW), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"can't be used .*: not a regular file"):
        top_eigenvalues(operator_of(POWER_LAW), 10, checkpoint=tmp_path)


def forged(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return zlib.crc32(buffer.getvalue()).to_bytes(4, "big") + buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        forged([1, 2]),
        forged({}),
        forged({"number": "1", "run": {}, "vectors": 1, "checksum": 0, "solver": {}}),
        forged({"number": 1, "run": [], "vectors": 1, "checksum": 0, "solver": {}}),
        forged({"number": -1, "run": {}, "vectors": 1, "checksum": 0, "solver": {}}),
        forged({"number": 1, "run": {}, "vectors": 1.5, "checksum": 0, "solver": {}}),
        forged({"number": 1, "run": {}, "vectors": 1, "checksum": 0}),
        zlib.crc32(b"text").to_bytes(4, "big") + b"text",
        b"\0\0\0\0",
        forged(Path("object")),
    ],
    ids=count(),
)
def test_a_state_of_other_content_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rank0.state0").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank0\.state0 is cut off or damaged; delete the folder"):
        top_eigenvalues(operator_of(POWER_LAW), 10, checkpoint=tmp_path)


SAVED_FIELDS = {
    "next_check": [-1, 2.5, None],
    "chain": [-1, 1, "0"],
    "seen": [3, (3,), (-1, 0.5), (3, math.nan), (3, "x")],
    "num_probes": [-1, 1.0],
    "rounding_basis": ["guessed", 1],
    "tested_size": [-1, 10**6, True],
    "measured_size": [-1, 10**6],
    "num_precise": [-1, None],
    "num_converged": [-1, 11],
    "leading": [[1.0], torch.ones(11, dtype=torch.float64), torch.ones(2), torch.full((2,), math.nan).double()],
    "decomposition": [None, [], {}],
    "decomposition/norm": [-1.0, math.inf, 1, "1"],
    "decomposition/product_error": [-1.0, math.nan],
    "decomposition/orthogonality": [-1.0, None],
    "decomposition/discrepancy": [1.0, (1.0,), (-1.0, 3), (1.0, 0.5)],
    "decomposition/neglected": [-1.0],
    "decomposition/next_test": ["32"],
    "decomposition/num_matvecs": [-1, 0, 10**6],
    "decomposition/draws": [-1, None],
    "decomposition/diagonal": [[], [1.0], [math.nan] * 15, ["1"] * 15, torch.ones(15)],
    "decomposition/couplings": [None, [1], [(1, 0)], [(0, 0, 1.0)], [(0, 1, 1.0)], [(99, 0, 1.0)],
                                [(2, 1, 1.0), (1, 0, 1.0)], [(1, 0, math.inf)]],
    "decomposition/gram": [1.0, torch.eye(2, dtype=torch.float64), torch.ones(1, 1), torch.ones(1).double()],
    "decomposition/chains": [None, [], [1], [(torch.ones(3), 14, False)], [(torch.ones(400).double(), 15, False)],
                             [(torch.ones(400).double(), 14, 0)]],
}  # fmt: skip


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    killed_after(15, operator_of(POWER_LAW), folder)
    return folder


@pytest.mark.parametrize("name", SAVED_FIELDS)
def test_a_field_that_no_run_saves_is_refused(name: str, saved_run: Path, tmp_path: Path) -> None:
    """Each is removed, and replaced by other types, other lengths, and numbers out of range."""
    operator = operator_of(POWER_LAW)
    *parents, key = name.split("/")
    removed = object()
    for number, value in enumerate([removed, *SAVED_FIELDS[name]]):
        folder = tmp_path / str(number)
        shutil.copytree(saved_run, folder)
        for path in folder.glob("*.state?"):
            content = torch.load(io.BytesIO(path.read_bytes()[4:]), weights_only=True)
            fields_of = content["solver"]
            if content["number"] == 0:
                continue
            for parent in parents:
                fields_of = fields_of[parent]
            assert key in fields_of
            if value is removed:
                del fields_of[key]
            else:
                fields_of[key] = value
            path.write_bytes(forged(content))
        optional = {"rounding_basis", "tested_size", "measured_size", "num_precise"}
        if value is removed and name in optional:  # Earlier versions lack it.
            assert top_eigenvalues(operator, 10, checkpoint=folder).all_converged
            continue
        with pytest.raises(CheckpointError, match=r"can't be used: .*; delete the folder to start over"):
            top_eigenvalues(operator, 10, checkpoint=folder)


# -- several ranks ---------------------------------------------------------------------------------


def spectrum_on(rank: int, folder: Path | None, killed: int | None = None) -> tuple[Spectrum, tuple[int, int]]:
    """Return the spectrum, and at the first product its number and that of the last save.

    With ``killed``, rank 1 dies within the save after so many products.
    """
    if killed is not None:
        own = SolverCheckpoint._write_state

        def write_state(self: SolverCheckpoint, number: int, solver: Any) -> None:
            if rank == 1 and self._vectors >= killed:
                os.kill(os.getpid(), signal.SIGKILL)
            own(self, number, solver)

        SolverCheckpoint._write_state = write_state  # type: ignore[method-assign]
    seen: list[tuple[int, int]] = []

    def progress(now: LanczosProgress) -> None:
        seen.append((now.num_matvecs, 0 if folder is None else last_save(folder, rank)))

    options: dict[str, Any] = {"return_eigenvectors": True, "progress": progress}
    return top_eigenvalues(DiagonalOperator(300), 8, checkpoint=folder, checkpoint_every=0, **options), seen[0]


def last_save(folder: Path, rank: int) -> int:
    """The number of a rank's last save."""
    states = [io.BytesIO(path.read_bytes()[4:]) for path in folder.glob(f"rank{rank}.state?")]
    return max((torch.load(state, weights_only=True)["number"] for state in states), default=0)


def test_ranks_that_were_killed_between_their_saves_go_back_to_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = [outcome.value for outcome in run_ranks(spectrum_on, 2, None)]
    survivor, killed = run_ranks(spectrum_on, 2, folder, 17, expect_errors=True)
    assert (survivor.error, killed.exitcode) == ("RankLostError", -signal.SIGKILL)
    assert last_save(folder, rank=0) == last_save(folder, rank=1) + 1
    for outcome, (expected, _) in zip(run_ranks(spectrum_on, 2, folder), whole, strict=True):
        spectrum, first = outcome.value
        assert first == (17, 16)  # from the previous save; rank 0's later one is discarded
        assert_same(spectrum, expected)
    assert not folder.exists()


def refusals_on(rank: int, folder: Path) -> list[str]:
    """Return the messages if rank 1 has no files, if one is damaged, and if its disk is full."""
    said = []
    for fault in ("lost", "damaged"):
        with pytest.raises(CheckpointError) as refused:
            spectrum_on(rank, folder / fault)
        said.append(str(refused.value))
    left = count(8 if rank == 1 else 1000, -1)
    solver_checkpoint.os.fsync = partial(full_disk, left)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="could not be saved") as warned:
        spectrum, _ = spectrum_on(rank, folder / "full")
    assert_same(spectrum, spectrum_on(rank, None)[0])
    return said + [str(warning.message) for warning in warned]


def dies_on(rank: int, folder: Path) -> None:
    for name in ("ranks", "lost", "damaged"):
        with pytest.raises(Killed):
            top_eigenvalues(DiagonalOperator(300), 8, checkpoint=folder / name, checkpoint_every=0, progress=dying(15))


def test_ranks_refuse_and_give_up_saving_together(tmp_path: Path) -> None:
    run_ranks(dies_on, 2, tmp_path)
    for path in (tmp_path / "lost").glob("rank1.state?"):
        path.unlink()
    flip(tmp_path / "damaged" / "rank1.basis")
    first, second = (outcome.value for outcome in run_ranks(refusals_on, 2, tmp_path))
    assert first[0] == second[0]
    assert "lacks files of rank 1; restore them, or delete the folder" in first[0]
    assert "rank 1 could not load the solver's checkpoint in" in first[1]
    assert "see the error message of rank 1" in first[1]
    assert "rank1.basis is cut off or damaged; delete the folder" in second[1]
    assert len(first) == len(second) == 3
    assert "could not be saved: see rank 1. The computation continues without further saves" in first[2]
    assert "could not be saved: No space left on device. The computation continues" in second[2]
    # The states of the survivor are those of two ranks, and one rank alone holds half of the vectors.
    (alone,) = run_ranks(spectrum_on, 1, tmp_path / "ranks", expect_errors=True)
    assert alone.error == "CheckpointError"
    assert (
        "ranks=2, and this one has ranks=1; run it with the original arguments, or delete the folder" in alone.message
    )


def saves_by_clocks(rank: int, folder: Path) -> list[int]:
    """Rank 1's clock stands still."""
    ticks = count(0, 60 if rank == 0 else 0)
    solver_checkpoint.time.monotonic = lambda: next(ticks)  # type: ignore[assignment]
    saved: list[int] = []

    def look(_: LanczosProgress) -> None:
        saved.append((folder / f"rank{rank}.basis").stat().st_size)

    top_eigenvalues(DiagonalOperator(300), 10, checkpoint=folder, progress=look)
    return saved


def test_one_clock_decides_for_all_ranks(tmp_path: Path) -> None:
    first, second = (outcome.value for outcome in run_ranks(saves_by_clocks, 2, tmp_path / "run"))
    assert len(set(first)) > 3
    assert first == second
