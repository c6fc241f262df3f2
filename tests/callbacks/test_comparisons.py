"""Protocols, blocks and extras in real runs: logged, kept, announced, refused, and without a trace in training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hessian_callback import (
    Density,
    FrobeniusNorm,
    HessianOperator,
    Lanczos,
    OutlierRatio,
    PublishedProtocol,
    Subspace,
    Trace,
    fit_power_law,
    top_eigenvalues,
)
from hessian_callback.algorithms.pooled_ritz import pooled_ritz_values
from hessian_callback.algorithms.trace import trace
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.measurement.measurement import Measurement
from tests.helpers.lightning import MisconfigurationException
from tests.helpers.toy_runs import NUM_EIGENVALUES, Net, loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took", "ignore:.*samples are few")

ALL = [
    *(Trace(num_hvps=12), FrobeniusNorm(num_hvps=12), Density(num_hvps=20), Subspace(dimension=2), "norms"),
    *("numerical_interval", "split_half", OutlierRatio(num_classes=3)),
]
GROUPS = {"first": r"net\.0", "head": r"net\.4"}


def fit(callback: PowerLawHessianCallback, tmp_path: Any, **options: Any) -> tuple[Any, Net]:
    module = seeded()
    run = trainer(tmp_path, callback, **{"max_epochs": 1, **options})
    run.fit(module, loader(), loader(seed=1))
    return run, module


def operator_of(module: Net, parameters: str | None = None) -> HessianOperator:
    """The Hessian of a measurement of all 48 held-out samples, for which no random subset matters."""
    module.eval()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return HessianOperator(module, loss_fn, list(loader(seed=1)), parameters=parameters)


# -- everything at once ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    callback = measure(num_samples=48, extras=ALL, groups=GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, module = fit(callback, tmp_path_factory.mktemp("run"))
    return callback, run, module


def test_what_is_logged(measured: Any) -> None:
    callback, run, _ = measured
    names = {name.removeprefix("hessian/") for name in run.callback_metrics if name.startswith("hessian/")}
    base = {"slope", "fit_error", "slope_stderr", "density_exponent", "lambda_max", "num_fitted", "num_hvps"}
    base |= {"slope_low", "slope_high", "critical_distance", "critical_distance_paper"}
    assert names >= base | {f"{name}/{group}" for name in base for group in GROUPS}
    comparisons = {
        *("trace", "trace_stderr", "frobenius_norm", "frobenius_norm_stderr"),
        *("negative_mass", "negative_mass_stderr"),
        *("subspace_angle", "subspace_overlap", "subspace_change", "subspace_sine_bound"),
        *("parameter_norm", "gradient_norm", "slope_numerical_low", "slope_numerical_high"),
        *("slope_half_1", "slope_half_2", "slope_sampling_stderr", "outlier_ratio", "num_extra_hvps"),
    }
    missing = comparisons - names
    # A gap that is not positive has no finite bound.
    assert missing <= {"subspace_sine_bound"}
    last = callback.history[-1]
    assert not last.not_compared
    for name, value in last.scalars().items():
        assert float(run.callback_metrics[f"hessian/{name}"]) == pytest.approx(value, rel=1e-6), name


def test_numbers_are_those_of_the_functions(measured: Any) -> None:
    callback, _, module = measured
    last = callback.history[-1]
    values = last.comparisons
    operator = operator_of(module)
    spectrum = top_eigenvalues(
        operator, NUM_EIGENVALUES, rtol=0.05, max_matvecs=60, positive_only=True, return_eigenvectors=True
    )
    torch.testing.assert_close(last.spectrum.eigenvalues, spectrum.eigenvalues, rtol=1e-3, atol=1e-4)
    expected = trace(operator, num_matvecs=12, spectrum=spectrum)
    assert values["trace"] == pytest.approx(expected.value, rel=1e-2)
    assert values["parameter_norm"] == pytest.approx(
        float(torch.cat([p.detach().flatten() for p in module.parameters()]).norm()), rel=1e-5
    )
    total = torch.stack([nn.functional.cross_entropy(module(x), y) for x, y in loader(seed=1)]).mean()
    gradient = torch.autograd.grad(total, list(module.parameters()))
    assert values["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in gradient]).norm()), rel=1e-4)
    assert values["slope_numerical_low"] < last.slope < values["slope_numerical_high"]
    halves = [values["slope_half_1"], values["slope_half_2"]]
    assert values["slope_sampling_stderr"] == pytest.approx(abs(halves[0] - halves[1]) / 2)
    assert values["slope_sampling_stderr"] > 0
    assert 0 <= values["negative_mass"] < 1
    assert last.density.size == last.num_parameters


def test_a_group_is_the_hessian_of_its_parameters(measured: Any) -> None:
    callback, _, module = measured
    groups = callback.history[-1].groups
    assert list(groups) == list(GROUPS)
    for group, expression in GROUPS.items():
        operator = operator_of(module, expression)
        expected = top_eigenvalues(operator, NUM_EIGENVALUES, rtol=0.05, max_matvecs=60, positive_only=True)
        torch.testing.assert_close(groups[group].spectrum.eigenvalues, expected.eigenvalues, rtol=1e-3, atol=1e-4)
        assert groups[group].num_parameters == operator.num_parameters
        assert groups[group].slope == pytest.approx(fit_power_law(expected.positive_converged).slope, rel=1e-2)


def test_the_first_subspace_has_nothing_to_be_compared_with(measured: Any) -> None:
    first, last = measured[0].history
    assert not any(name.startswith("subspace") for name in first.comparisons)
    assert 0 < last.comparisons["subspace_angle"] <= torch.pi / 2
    assert "subspace" not in first.not_compared
    assert not measured[0].run_measurer.states  # released with the run


def test_costs_are_counted(measured: Any) -> None:
    first, last = measured[0].history
    for measurement, rotation in ((first, 0), (last, 2)):
        halves = measurement.comparisons["num_extra_hvps"] - 12 - 20 - rotation
        assert 2 * NUM_EIGENVALUES < halves <= 120


def test_state_goes_through_a_weights_only_checkpoint(measured: Any, tmp_path: Any) -> None:
    callback = measured[0]
    torch.save(callback.state_dict(), tmp_path / "state.ckpt")
    assert (tmp_path / "state.ckpt").stat().st_size < 60_000
    other = measure()
    other.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert other.history == callback.history
    assert [one.scalars() for one in other.history] == [one.scalars() for one in callback.history]
    torch.testing.assert_close(other.history[-1].density.nodes, callback.history[-1].density.nodes)
    assert all(part.spectrum.eigenvectors is None for one in callback.history for part in (one, *one.groups.values()))


def test_training_is_not_disturbed(measured: Any, tmp_path: Any) -> None:
    _, plain = fit(measure(at_steps=[10_000]), tmp_path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, measured[2].state_dict()[name]), name
    assert plain.losses == measured[2].losses


# -- the paper's protocol ----------------------------------------------------------------------------


def test_paper_mode_pools_and_judges_by_its_own_constant(tmp_path: Any) -> None:
    callback = measure(solver=PublishedProtocol(runs=2, steps=6), num_samples=48, extras=["trace"])
    run, module = fit(callback, tmp_path)
    last = callback.history[-1]
    pool = pooled_ritz_values(operator_of(module), num_runs=2, num_steps=6)
    torch.testing.assert_close(last.spectrum.eigenvalues, pool.ritz_values[:NUM_EIGENVALUES], rtol=1e-3, atol=1e-4)
    assert last.slope == pytest.approx(fit_power_law(pool.ritz_values[:NUM_EIGENVALUES]).slope, rel=1e-2)
    assert last.num_hvps == 12
    assert float(run.callback_metrics["hessian/critical_distance"]) == pytest.approx(1.36 / NUM_EIGENVALUES**0.5)
    # The metric classes see the same eigenvalues.
    assert float(run.callback_metrics["hessian/slope"]) == pytest.approx(last.slope)
    assert "trace" in last.comparisons
    assert "paper protocol" in last.summary()


def test_another_protocol_within_a_run_is_warned_of(tmp_path: Any) -> None:
    callback = measure()
    fit(callback, tmp_path)
    state = callback.state_dict()
    for changed, text in (
        ({"num_eigenvalues": 5}, "of 5 eigenvalues"),
        ({"solver": PublishedProtocol()}, "mode='paper'"),
    ):
        resumed = measure(**changed)
        resumed.load_state_dict(state)
        with pytest.warns(UserWarning, match=f"(?s){text}.*must not be compared"):
            trainer(tmp_path, resumed).validate(seeded(), loader(seed=1), verbose=False)
    same = measure()
    same.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, same).validate(seeded(), loader(seed=1), verbose=False)
    assert not any("must not be compared" in str(warning.message) for warning in caught)


# -- failing -----------------------------------------------------------------------------------------


def uncut() -> dict[str, Any]:
    """A single batch that can't be cut, because its tensors are of different lengths."""
    (x, y), *_ = loader(seed=1, batch_size=48)
    return {
        "dataloader": [(x, y, torch.zeros(3))],
        "num_samples": 48,
        "batch_weight": lambda batch: float(len(batch[0])),
        "loss_fn": lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
    }


def test_a_single_batch_is_cut_into_halves(tmp_path: Any) -> None:
    callback = measure(num_samples=48, dataloader=loader(seed=1, batch_size=48), extras=["split_half"])
    fit(callback, tmp_path)
    assert not callback.history[0].not_compared
    assert callback.history[0].comparisons["slope_sampling_stderr"] > 0


def test_a_comparison_that_fails_leaves_the_slope(tmp_path: Any) -> None:
    callback = measure(**uncut(), extras=["split_half", "norms"])
    with pytest.warns(UserWarning, match=r"(?s)the measurement has no split_half.*smaller batch size"):
        fit(callback, tmp_path)
    for measurement in callback.history:
        assert measurement.logged
        assert list(measurement.not_compared) == ["split_half"]
        assert "gradient_norm" in measurement.comparisons
    assert Measurement.from_state(callback.history[0].to_state()) == callback.history[0]


def test_a_comparison_that_fails_ends_the_run_on_demand(tmp_path: Any) -> None:
    callback = measure(**uncut(), on_error="raise", extras=["split_half"])
    with pytest.raises(ValueError, match="smaller batch size"):
        fit(callback, tmp_path)


def test_few_samples_are_warned_of_with_what_it_does(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"num_samples of at least 40.*extras=\['split_half'\]"):
        fit(measure(num_samples=39), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(measure(num_samples=40), tmp_path)
    assert not any("samples are few" in str(warning.message) for warning in caught)


def test_the_cost_is_said_beforehand(tmp_path: Any, capsys: Any) -> None:
    callback = measure(verbose=True, extras=["trace", "split_half"], groups={"head": r"net\.4"})
    fit(callback, tmp_path)
    output = capsys.readouterr()
    # 16 for the spectrum, 30 for the trace, and 16 each for the halves and for the group.
    assert "about 16 Hessian-vector products (at most 60), about 62 more for trace, split_half, group head" in (
        output.out + output.err
    )


# -- refused -----------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, dict[str, Any]] = {
    r"Subspace\(dimension=50\) must be below": {"extras": [Subspace(dimension=50)]},
    "the names in groups must not contain slashes": {"groups": {"a/b": "net"}},
    "the names in groups must be ": {"groups": {1: "net"}},
    r"groups\[.head.\] must be ": {"groups": {"head": 1}},
    "groups\\['a'\\].*not a valid regular expression": {"groups": {"a": "net("}},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_at_once(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerLawHessianCallback(**BAD_OPTIONS[message])


@pytest.mark.parametrize(
    ("expression", "text"), [("nothing", "chooses no trainable"), (r"net\.4\.bias", "only 3 rows")]
)
def test_a_group_that_cannot_be_measured_is_refused_before_training(expression: str, text: str, tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"groups\['few'\].*{text}"):
        fit(measure(groups={"few": expression}), tmp_path)


def test_options_can_be_given_in_a_configuration_file() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PowerLawHessianCallback, "callback")
    choice = {
        "groups": {"head": "^head", "body": r"net\.\d"},
        "extras": ["trace", {"class_path": "hessian_callback.Density", "init_args": {"num_hvps": 8}}],
    }
    choice["solver"] = {"class_path": "hessian_callback.Lanczos", "init_args": {"rtol": 0.1}}
    callback = parser.instantiate_classes(parser.parse_object({"callback": choice})).callback
    assert callback.measurer.groups == choice["groups"]
    assert callback.measurer.extras == (Trace(), Density(num_hvps=8))
    assert callback.measurer.solver == Lanczos(rtol=0.1)
