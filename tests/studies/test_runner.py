"""Studies that are really run: real trainers in processes of their own, killed, resumed and in each other's way."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock

from hessian_callback.measurement.history import read_histories
from hessian_callback.studies import command, one_run, runner
from hessian_callback.studies.definition import StudyError, load_study
from hessian_callback.studies.runner import run_all
from tests.helpers.forks import ForkedModule, context

ROOT = Path(__file__).parents[2]

STUDY: dict[str, Any] = {
    "title": "Digits",
    "base": str(ROOT / "example_configs" / "digits_cnn.yaml"),
    "set": {
        "model.init_args.channels": [2, 4],
        "trainer.max_epochs": 1,
        "trainer.callbacks.0.init_args.num_eigenvalues": 5,
        "trainer.callbacks.0.init_args.num_samples": 60,
        "trainer.callbacks.0.init_args.solver": {"class_path": "hessian_callback.Lanczos", "init_args": {"rtol": 0.05}},
        "trainer.callbacks.0.init_args.figures": False,
    },
    "seeds": [0],
    "factors": {"rate": {"key": "model.init_args.learning_rate", "values": [0.05, 0.01]}},
    "fitted": [3, 5],
    "rows": "first and last",
    "published": [{"at": {"rate": 0.05, "when": "trained"}, "fit_error": 0.25, "slope": 1.5, "holds": True}],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def forked(command: list[str], *, stdin: int, stdout: Any, stderr: int, start_new_session: bool, env: Any) -> Any:
    """Start a run as the runner does, by a fork, which need not import Lightning again."""
    interpreter, option, module, *arguments = command
    assert (interpreter, option, start_new_session) == (sys.executable, "-m", True)
    assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
    return ForkedModule(module, arguments, cwd=Path.cwd(), env=env, stdout=Path(stdout.name))


def quick_runs(patch: pytest.MonkeyPatch) -> None:
    """Let the runner start its runs as forks, of one thread each."""
    context()  # Which is not for threads to start.
    names = ("DEVNULL", "STDOUT", "TimeoutExpired")
    kept = {name: getattr(subprocess, name) for name in names}
    patch.setattr(runner, "subprocess", SimpleNamespace(Popen=forked, **kept))
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_runs(monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two runs that has been run by the command."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        quick_runs(patch)
        # As in a job of several tasks, of which this is not the first.
        patch.setenv("SLURM_PROCID", "3")
        patch.setenv("RANK", "3")
        with pytest.raises(SystemExit) as ending:
            command.main([str(written(folder)), "--output", str(folder / "out"), "--processes", "2"])
    assert ending.value.code == 0
    return folder


def test_a_folder_for_each_run_and_a_table(done: Path) -> None:
    out = done / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "rate-0.01_seed-0",
        "rate-0.05_seed-0",
        "results.csv",
        "results.md",
        "study.yaml",
    ]
    ending = json.loads((out / "rate-0.01_seed-0" / one_run.FINISHED).read_text())
    assert ending["device"] == "CPU, 1 thread(s)"
    assert ending["resumed"] is False
    assert (out / "rate-0.01_seed-0" / one_run.CHECKPOINT).is_file()
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rate"], row["when"], row["K"]) for row in rows] == [
        (rate, when, k) for rate in ("0.05", "0.01") for when in ("random init", "trained") for k in ("3", "5")
    ]
    table = (out / "results.md").read_text()
    assert "| 0.05 | trained | 5 | 1 |" in table
    assert "| 0.2500 | 1.500 | holds | " in table


def test_the_table_has_what_the_run_measured(done: Path) -> None:
    history = read_histories(done / "out" / "rate-0.05_seed-0" / "hessian_history.jsonl").histories["hessian"]
    with (done / "out" / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rate"] == "0.05" and row["K"] == "5"]
    for row, measurement in zip(rows, (history[0], history[-1]), strict=True):
        assert measurement.fit is not None
        assert float(row["d_ks"]) == measurement.fit.fit_error
        assert float(row["s_hat"]) == measurement.fit.slope
        assert row["holds_paper"] == str(measurement.fit.within_critical_distance_paper)
        assert int(row["step"]) == measurement.step
    assert rows[0]["test_loss"] == ""  # Nothing has been validated before the first step.
    assert 0 < float(rows[1]["test_error"]) < 1


def test_what_is_finished_is_not_run_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*") if path.parent.name != "out"}
    with pytest.raises(SystemExit) as ending:
        command.main([str(done / "digits.yaml"), "--output", str(done / "out")])
    assert ending.value.code == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("more", [[], ["--tables"]])
def test_another_configuration_does_not_take_a_folder_over(
    more: list[str], done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [str(done / "digits.yaml"), "--output", str(done / "out"), "--set", "trainer.max_epochs=2", *more]
    with pytest.raises(SystemExit) as stopped:
        command.main(changed)
    assert stopped.value.code == 2
    assert "holds a run of another configuration than the study now describes" in capsys.readouterr().err


def test_another_configuration_is_refused_under_the_lock_as_well(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands may both have found the folder empty."""
    folder = done / "out" / "rate-0.05_seed-0"
    before = (folder / one_run.SETTINGS).read_text()
    wanted = done / "wanted.yaml"
    wanted.write_text(one_run.settings_text({"model": {}}, "another"))
    assert one_run.main(folder, wanted) == 1
    assert "holds a run of another configuration" in capsys.readouterr().out
    assert (folder / one_run.SETTINGS).read_text() == before


def test_tables_are_of_all_that_is_there(done: Path) -> None:
    before = (done / "out" / "results.md").read_text()
    with pytest.raises(SystemExit) as ending:
        command.main([str(done / "digits.yaml"), "--output", str(done / "out"), "--only", "*0.01*"])
    assert ending.value.code == 0
    assert (done / "out" / "results.md").read_text() == before


def test_a_run_that_is_told_to_end_while_it_measures_its_end(tmp_path: Path) -> None:
    """Lightning would save the last epoch all the same, and the run would be complete without its measurement."""
    slow = {
        **STUDY["set"],
        "trainer.max_epochs": 2,
        "trainer.callbacks.0.init_args.num_eigenvalues": 20,
        "trainer.callbacks.0.init_args.solver": {
            "class_path": "hessian_callback.Lanczos",
            "init_args": {"max_hvps": 2000, "rtol": 1.0e-8},
        },
        "trainer.callbacks.0.init_args.at_steps": [],
        "trainer.callbacks.0.init_args.at_end": True,
    }
    study = load_study(written(tmp_path, set=slow, factors={}, published=[]))
    (run,) = study.runs()
    folder = tmp_path / "out" / run.name

    def tell() -> None:
        while "first measurement" not in (folder / "log.txt").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(KeyboardInterrupt):
        run_all([run], tmp_path / "out")
    teller.join()
    assert one_run.finished(folder) is None
    assert not (folder / "hessian_history.jsonl").exists()
    (outcome,) = run_all([run], tmp_path / "out")
    assert outcome.status == "finished"
    history = read_histories(folder / "hessian_history.jsonl").histories["hessian"]
    assert [entry.step for entry in history] == [150]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The run that is killed has an interpreter of its own, as a user's."""
    changes = {"set": {**STUDY["set"], "trainer.max_epochs": 4}, "factors": {}, "published": []}
    study = load_study(written(tmp_path, **changes))
    (run,) = study.runs()
    (whole,) = run_all([run], tmp_path / "whole")
    folder = tmp_path / "killed" / run.name
    arguments = ["study", str(tmp_path / "digits.yaml"), "--output", str(tmp_path / "killed")]
    process = ForkedModule("hessian_callback.cli.main", arguments, cwd=ROOT, env=os.environ, stdout=Path(os.devnull))
    while not (folder / one_run.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode != 0
    assert one_run.finished(folder) is None
    (ended,) = run_all([run], tmp_path / "killed")
    assert (whole.status, ended.status) == ("finished", "finished")
    ending = one_run.finished(folder)
    assert ending is not None
    assert ending["resumed"] is True
    one, other = (
        read_histories(place / "hessian_history.jsonl").histories["hessian"] for place in (whole.folder, folder)
    )
    assert [(m.epoch, m.slope, m.fit_error) for m in one] == [(m.epoch, m.slope, m.fit_error) for m in other]


def test_a_failing_run_is_told_of_and_the_others_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {"rate": {"levels": {"none": {"model.init_args.learning_rat": 1}, "some": {}}}}
    with pytest.raises(SystemExit) as ending:
        command.main([str(written(tmp_path, factors=factors, published=[])), "--output", str(tmp_path / "out")])
    assert ending.value.code == 1
    told = capsys.readouterr()
    assert "rate-none_seed-0: failed; " in told.out
    assert "learning_rat" in told.out
    assert "rate-some_seed-0: finished in" in told.out
    assert "1 of 2 runs failed" in told.err


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    (run, _) = load_study(written(tmp_path)).runs()
    folder = tmp_path / "out" / run.name
    folder.mkdir(parents=True)
    with FileLock(folder / "running.lock"):
        (outcome,) = run_all([run], tmp_path / "out")
    assert outcome.status == "taken"
    assert one_run.finished(folder) is None


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"seconds": "1", "device": "CPU"}', "[" * 100_000, "\\xff"])
def test_a_damaged_mark_of_a_complete_run_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    (run, _) = load_study(path).runs()
    folder = tmp_path / "out" / run.name
    folder.mkdir(parents=True)
    (folder / "finished.json").write_text(content)
    with pytest.raises(SystemExit) as ending:
        command.main([str(path), "--tables", "--output", str(tmp_path / "out")])
    assert ending.value.code == 2
    assert "move it away to have the run continued" in capsys.readouterr().err


def test_names_are_listed_without_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path))
    with pytest.raises(SystemExit) as ending:
        command.main([path, "--list", "--seeds", "4,5", "--only", "*0.01*"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.split() == ["rate-0.01_seed-4", "rate-0.01_seed-5"]
    with pytest.raises(SystemExit):
        command.main([path, "--tables", "--output", str(tmp_path / "none")])
    assert "0 of 2 runs are finished; there is no table yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "a"], "--seeds takes whole numbers with commas"),
        (["--set", "a"], "--set takes KEY=VALUE"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--only", "x"], "--list shows the names"),
        (["--seeds", "²"], "--seeds takes whole numbers with commas"),
        (["--set", "a={"], "the value can't be read: it is no YAML"),
        (["--set", "a=&a [*a]"], "the value can't be read: it contains itself"),
        (["--seeds", "4294967296"], "a seed lies between 0 and 4294967295"),
    ],
)
def test_unusable_arguments_are_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        command.main([str(written(tmp_path)), "--list", *arguments])
    assert ending.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_missing_study(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        command.main(["missing.yaml"])
    assert ending.value.code == 2
    assert "there is no file missing.yaml" in capsys.readouterr().err
    with pytest.raises(StudyError):
        load_study(os.devnull)
