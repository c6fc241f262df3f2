"""What a study's file means, and what is said of one that means nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from hessian_callback.studies.definition import StudyError, load_study, with_overrides

STUDIES = sorted(Path(__file__).parents[2].glob("example_configs/studies/*.yaml"))

WHOLE: dict[str, Any] = {
    "title": "A study",
    "base": {"model": {"width": 1}, "trainer": {"callbacks": [{"init_args": {"k": 1}}]}},
    "set": {"trainer.callbacks.0.init_args.k": 5},
    "seeds": [3, 4],
    "factors": {
        "width": {"key": "model.width", "values": [10, 20]},
        "rate": {"levels": {"fast": {"model.rate": 1.0}, "slow": {"model.rate": 0.1, "trainer.epochs": 9}}},
    },
    "fitted": [50, 200],
    "published": [{"at": {"width": 10, "when": "trained"}, "fit_error": 0.1, "slope": 1.0, "holds": True}],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_every_combination_once_seed_by_seed(tmp_path: Path) -> None:
    runs = load_study(written(tmp_path, WHOLE)).runs()
    assert [run.name for run in runs[:4]] == [
        "width-10_rate-fast_seed-3",
        "width-10_rate-slow_seed-3",
        "width-20_rate-fast_seed-3",
        "width-20_rate-slow_seed-3",
    ]
    assert [run.seed for run in runs] == [3] * 4 + [4] * 4
    assert runs[3].labels == {"width": "20", "rate": "slow"}
    assert runs[3].config == {
        "model": {"width": 20, "rate": 0.1},
        "trainer": {"callbacks": [{"init_args": {"k": 5}}], "epochs": 9},
        "seed_everything": 3,
    }
    assert len({run.digest for run in runs}) == 8


def test_settings_of_the_command_line_come_before_the_factors(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, WHOLE), {"model.width": 7, "trainer.callbacks.0.init_args.k": 6})
    assert study.base["trainer"] == {"callbacks": [{"init_args": {"k": 6}}]}
    assert study.runs()[0].config["model"]["width"] == 10


def test_a_base_in_a_file_counts_from_the_study(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {width: 1}\n")
    study = load_study(written(tmp_path, {"title": "", "base": "base.yaml", "seeds": [0]}))
    assert [run.name for run in study.runs()] == ["seed-0"]
    assert study.runs(seeds=[5])[0].config == {"model": {"width": 1}, "seed_everything": 5}


def test_runs_by_their_names(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, WHOLE))
    assert [run.name for run in study.runs(["width-1*_seed-4"])] == [
        "width-10_rate-fast_seed-4",
        "width-10_rate-slow_seed-4",
    ]
    with pytest.raises(StudyError, match="no run of study is called 'width-11'; --list shows"):
        study.runs(["width-10*", "width-11"])


def test_published_figures_belong_to_their_setting(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, WHOLE))
    found = study.published_for({"width": "10", "rate": "slow", "when": "trained"})
    assert found is not None
    assert (found.fit_error, found.slope, found.holds) == (0.1, 1.0, True)
    assert study.published_for({"width": "10", "rate": "slow", "when": "random init"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown seed; a study has base, factors"),
        ({"seeds": None}, "seeds must be a list of whole numbers, got None"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"base": 3}, "base must be a configuration or the name of a file"),
        ({"base": "missing.yaml"}, "there is no file .*missing.yaml; paths count from"),
        ({"fitted": [2]}, "fitted must be a list of numbers of eigenvalues, 3 at the least"),
        ({"fit_rtol": 2}, "fit_rtol must be a number between 0 and 1, got 2"),
        ({"set": [1]}, "set must be a mapping, got"),
        ({"factors": [1]}, "factors must be a mapping, got"),
        ({"factors": {"a": {"levels": {"x": 3}}}}, "factor 'a' must be"),
        ({"published": [{"at": {"width": 11}}]}, "a published figure is at no setting of the study: width"),
        ({"published": [{"at": {"witdh": 10}}]}, "a published figure is at no setting of the study: witdh"),
        ({"published": [{"at": {"width": 10}, "fit_error": "0.1"}]}, "published figures must be numbers"),
        ({"rows": "some"}, "rows must be one of last, first and last, all; got 'some'"),
        ({"factors": {"a": {"values": [1]}}}, "factor 'a' must be"),
        ({"factors": {"a": {"levels": {"x y": {}, "x-y": {}}}}, "published": []}, "two runs would have one name"),
        ({"factors": {"K": {"key": "model.width", "values": [1]}}}, "a factor cannot be called K, as a column"),
        ({"published": [{"fit_error": 0.1}]}, "a published figure has at, fit_error"),
        ({"published": [{"at": {}, "error": 0.1}]}, "a published figure has at, fit_error"),
        ({"set": {"trainer.callbacks.1.k": 0}}, "asks for entry 1 of a list of 1, counted from 0"),
        ({"set": {"model.width.deep.deeper": 0}}, "leads into 1, which has no settings"),
        ({"set": {"trainer.callbacks.k": 0}}, "asks for entry k of a list"),
        ({"set": {"trainer.callbacks.²": 0}}, "asks for entry ² of a list"),
        ({"set": {"a." * 1000 + "b": 0}}, "has more than 30 parts"),
        ({"known_to": 0.05}, "known_to is called fit_rtol now; rename it"),
        ({"printed": []}, "printed is called published now; rename it"),
        ({"predict": "no"}, "predict must be true or false, got 'no'"),
        ({"predict": 0}, "predict must be true or false, got 0"),
        ({"title": None}, "title must be a text, got None"),
        ({"title": 3}, "title must be a text, got 3"),
        ({"seeds": [2**32]}, "a seed lies between 0 and 4294967295, got 4294967296"),
        ({"factors": {"a": {"key": "k", "values": ["1", 1]}}}, "two levels of factor 'a' have the name '1'"),
        ({"factors": {"a": {"key": "k", "values": []}}}, "with at least one level"),
        ({"factors": {"a": {"key": ["k"], "values": [1]}}}, "factor 'a' must be"),
        ({"factors": {"a": {"levels": {1: {}, "1": {}}}}}, "two levels of factor 'a' have the name '1'"),
        ({"factors": {1: {"levels": {"x": {}}}, "1": {"levels": {"x": {}}}}}, "two factors have the name '1'"),
        ({"factors": {"a": {"levels": {"x" * 300: {}}}}, "published": []}, "a run's name has 309 bytes"),
        ({"published": [{"at": {}, "fit_error": True}]}, "published figures must be numbers"),
        ({"published": [{"at": {}, "slope": float("nan")}]}, "published figures must be numbers"),
        ({"published": [{"at": {}, "holds": "yes"}]}, "holds must be true or false, got 'yes'"),
        ({"base": {"trainer": 3}, "set": {}}, "trainer must be a mapping, got 3"),
        ({"base": {"trainer": {"callbacks": [3]}}, "set": {}}, "an entry of trainer.callbacks is a class's name"),
        ({"base": "a\0b.yaml"}, "can't be read: "),
        ({"base": "/dev/zero"}, "can't be read: it is no file"),
    ],
)
def test_what_is_not_understood(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(written(tmp_path, {**WHOLE, **changes}))


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="seeds, title is missing"):
        load_study(written(tmp_path, {"base": {}}))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(StudyError, match=r"bad\.yaml can't be read"):
        load_study(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(StudyError, match="holds no settings"):
        load_study(tmp_path / "list.yaml")


GRID = {f"f{number}": {"key": f"model.x{number}", "values": list(range(10))} for number in range(6)}


def test_a_grid_of_a_million_runs_is_refused_before_it_is_made(tmp_path: Path) -> None:
    content = {"title": "", "base": {"model": {"text": "x" * 1000}}, "seeds": [0], "factors": GRID}
    path = written(tmp_path, content)
    tracemalloc.start()
    with pytest.raises(StudyError, match="study has 1000000 runs; at most 10000 are possible, so vary fewer factors"):
        load_study(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    # Seeds of the command line count as well.
    study = load_study(written(tmp_path, {**content, "factors": {"f0": GRID["f0"], "f1": GRID["f1"]}}))
    assert len(study.runs(seeds=range(3))) == 300
    with pytest.raises(StudyError, match="study has 10100 runs"):
        study.runs(seeds=range(101))


def laughs(number: int, join: str) -> str:
    """A document whose aliases stand for ``9 ** number`` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, number)]
    if join == "merge":
        lines = ["a0: &a0 {x: 1}"]
        lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, number)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(12, "list"), "it has more than 10000 values"),
        (laughs(12, "merge"), "it has more than 10000 values"),
        ("title: &a " + "x" * 200_000 + "\nbase: [" + "*a, " * 5000 + "]", "it has more than 10000 values"),
        ("title: &a [*a]", "it contains itself"),
        ("title: &a {b: *a}", "it contains itself"),
        ("title: " + "[" * 100_000, "it is nested more than 50 levels deep"),
        ("title: " + "[" * 60 + "]" * 60, "it is nested more than 50 levels deep"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)),
            "it is nested more than 50 levels deep",
        ),
        ("title: " + "9" * 5000, "can't be read"),
        ("title: 2001-99-99", "can't be read"),
        ("title: a\ntitle: b", "the key 'title' occurs twice in line 2"),
        ("title: !!python/object:os.system x", "it is no YAML: could not determine a constructor"),
        ("title: \x00", "it is no YAML"),
        ("# " + "x" * 1_000_001, "it is larger than 1000000 bytes"),
    ],
)
def test_documents_that_would_grow_or_mean_something_else_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    tracemalloc.start()
    with pytest.raises(StudyError, match=message) as refused:
        load_study(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert len(str(refused.value)) < 1000


def test_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("title: x\nbase: {a: &a {b: 1}, c: {<<: *a, d: 2}, e: *a}\nseeds: [0]\n")
    assert load_study(path).base == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}


def test_a_study_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"title: \xe9\nbase: {}\nseeds: [0]\n")
    with pytest.raises(StudyError, match="can't be read: 'utf-8' codec"):
        load_study(path)


def test_overrides_leave_the_original() -> None:
    original: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}}
    value = {"d": 3}
    changed = with_overrides(original, {"a.b.1.c": value, "a.b.0": 5, "e": None})
    value["d"] = 4
    assert original == {"a": {"b": [1, {"c": 2}]}}
    assert changed == {"a": {"b": [5, {"c": {"d": 3}}]}, "e": None}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_paper_can_be_read(path: Path) -> None:
    study = load_study(path)
    runs = study.runs()
    assert len({run.digest for run in runs}) == len(runs)
    # Each published figure is that of a setting that occurs.
    places = [{**run.labels, "when": run.labels.get("when", "trained")} for run in runs]
    places += [{**place, "when": "random init"} for place in places]
    steps = study.base["trainer"]["callbacks"][0]["init_args"].get("at_steps") or []
    places += [{**run.labels, "when": f"step {step}"} for run in runs for step in steps]
    assert all(any(published.matches(place) for place in places) for published in study.published)


def test_there_are_studies() -> None:
    assert len(STUDIES) > 10
