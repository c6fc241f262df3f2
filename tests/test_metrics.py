"""The metrics against fits, torchmetrics' own behaviour, and replication over ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from hessian_callback import metrics
from hessian_callback.metrics import PowerLawFitError, PowerLawSlope, SpectrumMetric, take_first_if_equal
from hessian_callback.power_law.fit import fit_power_law
from tests.helpers.ranks import run_ranks

SPECTRUM = 2.0 * torch.arange(1, 51, dtype=torch.float64) ** -1.3
OTHER = torch.exp(-torch.arange(1, 31, dtype=torch.float64) / 10)


class Largest(SpectrumMetric):
    """A metric of a user's own."""

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.max()


CASES: dict[type[SpectrumMetric], Callable[[Tensor], float]] = {
    PowerLawSlope: lambda x: fit_power_law(x).slope,
    PowerLawFitError: lambda x: fit_power_law(x).fit_error,
    Largest: lambda x: x.max().item(),
}
FITTED = [PowerLawSlope, PowerLawFitError]


def value_of(metric: SpectrumMetric, spectrum: Tensor) -> float:
    return CASES[type(metric)](spectrum)


@pytest.fixture(params=list(CASES))
def metric(request: pytest.FixtureRequest) -> SpectrumMetric:
    return request.param()


@pytest.mark.parametrize("spectrum", [SPECTRUM, OTHER, SPECTRUM.float()])
def test_value_is_a_scalar_of_the_fit(metric: SpectrumMetric, spectrum: Tensor) -> None:
    value = metric(spectrum)
    assert (value.dtype, value.shape) == (torch.float64, ())
    assert value.item() == value_of(metric, spectrum)
    assert metric(spectrum.tolist()).item() == value.item()


def test_metric_is_the_value_of_the_latest_spectrum(metric: SpectrumMetric) -> None:
    metric.update(OTHER)
    metric.update(SPECTRUM)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().shape == ()
    assert metric.compute().item() == value_of(metric, SPECTRUM)


def test_forward_returns_and_keeps_the_same_value(metric: SpectrumMetric) -> None:
    assert metric(OTHER).item() == value_of(metric, OTHER)
    assert metric(SPECTRUM).item() == value_of(metric, SPECTRUM)
    assert metric.compute().item() == value_of(metric, SPECTRUM)


@pytest.mark.parametrize("make", FITTED)
def test_options_choose_the_eigenvalues(make: Callable[..., SpectrumMetric]) -> None:
    chosen = SPECTRUM[3:23]
    assert make(num_eigenvalues=20, drop_first=3)(SPECTRUM).item() == make()(chosen).item()


def test_pickle_keeps_the_spectrum(metric: SpectrumMetric) -> None:
    metric.update(SPECTRUM)
    restored = pickle.loads(pickle.dumps(metric))
    assert torch.equal(restored.eigenvalues, SPECTRUM)
    assert restored.compute() == metric.compute()
    restored.update(OTHER)
    assert restored.compute().item() == value_of(metric, OTHER)


def test_clone_is_independent(metric: SpectrumMetric) -> None:
    metric.update(SPECTRUM)
    clone = metric.clone()
    clone.update(OTHER)
    assert metric.compute().item() == value_of(metric, SPECTRUM)
    assert clone.compute().item() == value_of(metric, OTHER)


def test_caller_may_reuse_its_tensor(metric: SpectrumMetric) -> None:
    buffer = SPECTRUM.clone()
    metric.update(buffer)
    buffer.zero_()
    assert metric.compute().item() == value_of(metric, SPECTRUM)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_compute_without_a_spectrum_says_what_to_call(metric: SpectrumMetric) -> None:
    with pytest.raises(RuntimeError, match=r"call update\(eigenvalues\) before compute\(\)"):
        metric.compute()
    metric.update(SPECTRUM)
    metric.reset()
    with pytest.raises(RuntimeError, match=r"after every reset\(\)"):
        metric.compute()


@pytest.mark.parametrize("make", FITTED)
def test_unfittable_spectrum_raises_instead_of_a_sentinel(make: Callable[..., SpectrumMetric]) -> None:
    metric = make()
    metric.update(torch.tensor([0.0, -1.0, -2.0]))
    with pytest.raises(ValueError, match="compute more eigenvalues"):
        metric.compute()


def test_update_checks_the_eigenvalues(metric: SpectrumMetric) -> None:
    with pytest.raises(ValueError, match="check that the loss"):
        metric.update(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="at least one eigenvalue"):
        metric.update(torch.empty(0))
    with pytest.raises(TypeError, match="pass a dense one"):
        metric.update(SPECTRUM.to_sparse())


def test_state_dict_restores_the_spectrum(metric: SpectrumMetric) -> None:
    metric.update(SPECTRUM)
    assert not metric.state_dict()
    metric.persistent(True)
    fresh = type(metric)()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    assert torch.equal(fresh.eigenvalues, SPECTRUM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_read_as_it_is_and_kept_in_float64(metric: SpectrumMetric, dtype: torch.dtype) -> None:
    metric.update(SPECTRUM.to(dtype))
    assert metric.eigenvalues.dtype == torch.float64
    assert metric.compute().item() == value_of(metric, SPECTRUM.to(dtype))


def test_casting_a_module_leaves_the_state_alone(metric: SpectrumMetric) -> None:
    metric.update(SPECTRUM)
    module = torch.nn.ModuleDict({"metric": metric}).half()
    assert torch.equal(module["metric"].eigenvalues, SPECTRUM)
    metric.set_dtype(torch.float16)
    assert metric.eigenvalues.dtype == torch.float16
    assert metric.compute().item() == pytest.approx(value_of(metric, SPECTRUM), rel=0.01)


def test_device_without_float64_gets_float32(metric: SpectrumMetric, monkeypatch: pytest.MonkeyPatch) -> None:
    metric.update(SPECTRUM)
    metric.compute()
    monkeypatch.setattr(metrics, "widest_float", lambda device: torch.float32)
    metric.to("cpu")
    assert metric.compute().dtype == torch.float32  # The cached value.
    assert metric.eigenvalues.dtype == torch.float32
    metric.update(OTHER)
    assert metric.eigenvalues.dtype == torch.float32
    assert metric.compute().dtype == torch.float32
    assert metric.compute().item() == pytest.approx(value_of(metric, OTHER.float()), rel=1e-5)


def test_collection_shares_one_state() -> None:
    collection = MetricCollection([PowerLawSlope(), PowerLawFitError()])
    for spectrum in (OTHER, SPECTRUM):
        collection.update(spectrum)
        fit = fit_power_law(spectrum)
        values = {name: value.item() for name, value in collection.compute().items()}
        assert values == {"PowerLawSlope": fit.slope, "PowerLawFitError": fit.fit_error}
    assert len(collection.compute_groups) == 1


def test_plot_draws_one_value_and_a_series(metric: SpectrumMetric) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric.update(SPECTRUM)
    for values in (None, [metric(OTHER), metric(SPECTRUM)]):
        figure, axes = metric.plot(values)
        assert axes.get_title() or axes.lines or axes.collections
        pyplot.close(figure)


def test_reduction_takes_the_first_of_equal_states() -> None:
    assert torch.equal(take_first_if_equal(torch.stack([SPECTRUM, SPECTRUM])), SPECTRUM)
    different = SPECTRUM.clone()
    different[-1] = torch.nextafter(different[-1], torch.tensor(0.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"rank 1 holds other eigenvalues .* over all ranks together"):
        take_first_if_equal(torch.stack([SPECTRUM, different]))
    assert pickle.loads(pickle.dumps(take_first_if_equal)) is take_first_if_equal


def test_base_class_names_the_missing_method() -> None:
    metric = SpectrumMetric()
    metric.update(SPECTRUM)
    with pytest.raises(NotImplementedError, match=r"must implement evaluate\(eigenvalues\)"):
        metric.compute()


def _on_two_ranks(rank: int) -> dict[str, object]:
    results: dict[str, object] = {}
    metric = PowerLawSlope()
    metric.update(SPECTRUM)
    results["unsynced"] = metric.compute().item()
    metric.sync()
    results["state"] = metric.eigenvalues.clone()
    metric.unsync()
    metric.update(SPECTRUM)  # Forget the cached value.
    metric.sync()
    results["synced"] = metric.compute().item()  # Leaves the metric unsynced.
    results["after"] = metric.compute().item()

    metric = PowerLawSlope(sync_on_compute=True)
    metric.update(SPECTRUM)
    results["on_compute"] = metric.compute().item()

    for name, spectrum in {
        "values": SPECTRUM * (1 + rank),
        "lengths": SPECTRUM[: 50 - rank],
        "missing": SPECTRUM if rank == 0 else None,
    }.items():
        metric = PowerLawSlope()
        if spectrum is not None:
            metric.update(spectrum)
        try:
            metric.sync()
        except ValueError as error:
            results[name] = str(error)
    return results


def test_two_ranks_do_not_count_the_spectrum_twice() -> None:
    expected = fit_power_law(SPECTRUM).slope
    for results in (outcome.value for outcome in run_ranks(_on_two_ranks, 2)):
        assert torch.equal(results["state"], SPECTRUM)
        for name in ("unsynced", "synced", "after", "on_compute"):
            assert results[name] == expected, name
        assert "over all ranks together" in results["values"]
        assert "[50, 49] eigenvalues" in results["lengths"]
        assert "call update on every rank" in results["missing"]
