"""The metrics by torchmetrics' own habits, and what replication over ranks asks of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from hessian_callback import metrics
from hessian_callback.metrics import (
    PowerLawFitError,
    PowerLawSlope,
    SpectrumMetric,
    power_law_metrics,
    take_first_if_equal,
)
from hessian_callback.power_law import functional, spectral_statistics
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.goodness_of_fit import ks_p_value
from hessian_callback.power_law.maximum_entropy import entropy_deficit

SPECTRUM = 2.0 * torch.arange(1, 51, dtype=torch.float64) ** -1.3
OTHER = torch.exp(-torch.arange(1, 31, dtype=torch.float64) / 10)


# Each metric, its functional twin, and what both must equal.
CASES: dict[str, tuple[Callable[..., SpectrumMetric], Callable[..., Tensor], Callable[[Tensor], float]]] = {
    "PowerLawSlope": (PowerLawSlope, functional.power_law_slope, lambda x: fit_power_law(x).slope),
    "PowerLawFitError": (
        PowerLawFitError,
        functional.power_law_fit_error,
        lambda x: fit_power_law(x).fit_error,
    ),
    "PowerLawSlopeStderr": (
        metrics.PowerLawSlopeStderr,
        functional.power_law_slope_stderr,
        lambda x: fit_power_law(x).slope_stderr,
    ),
    "PowerLawDensityExponent": (
        metrics.PowerLawDensityExponent,
        functional.power_law_density_exponent,
        lambda x: fit_power_law(x).density_exponent,
    ),
    "PowerLawRSquared": (
        metrics.PowerLawRSquared,
        functional.power_law_r_squared,
        lambda x: fit_power_law(x).r_squared,
    ),
    "PowerLawPValue": (
        metrics.PowerLawPValue,
        functional.power_law_p_value,
        lambda x: ks_p_value(fit_power_law(x)),
    ),
    "PowerLawNumFitted": (
        metrics.PowerLawNumFitted,
        functional.power_law_num_fitted,
        lambda x: fit_power_law(x).num_eigenvalues,
    ),
    "LargestEigenvalue": (
        metrics.LargestEigenvalue,
        functional.largest_eigenvalue,
        lambda x: fit_power_law(x).lambda_1,
    ),
    "EigengapExponent": (
        metrics.EigengapExponent,
        functional.eigengap_exponent,
        lambda x: fit_eigengaps(x).exponent,
    ),
    "MaximumEntropyDeficit": (
        metrics.MaximumEntropyDeficit,
        functional.maximum_entropy_deficit,
        lambda x: entropy_deficit(x).deficit,
    ),
    "EffectiveRank": (
        metrics.EffectiveRank,
        functional.effective_rank,
        spectral_statistics.effective_rank,
    ),
    "IntrinsicDimension": (
        metrics.IntrinsicDimension,
        functional.intrinsic_dimension,
        spectral_statistics.intrinsic_dimension,
    ),
    "ParticipationRatio": (
        metrics.ParticipationRatio,
        functional.participation_ratio,
        spectral_statistics.participation_ratio,
    ),
    "OutlierRatio": (
        partial(metrics.OutlierRatio, num_classes=5),
        partial(functional.outlier_ratio, num_classes=5),
        partial(spectral_statistics.outlier_ratio, num_classes=5),
    ),
}


def value_of(metric: Metric, spectrum: Tensor) -> float:
    return CASES[type(metric).__name__][2](spectrum)


@pytest.fixture(params=list(CASES))
def metric(request: pytest.FixtureRequest) -> SpectrumMetric:
    return CASES[request.param][0]()


def test_every_metric_and_function_has_a_case() -> None:
    classes = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)}
    assert classes - {"SpectrumMetric"} == set(CASES)
    twins = {getattr(twin, "func", twin).__name__ for _, twin, _ in CASES.values()}
    assert twins == set(functional.__all__)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("spectrum", [SPECTRUM, OTHER, SPECTRUM.float()])
def test_functional_twin_gives_the_same_scalar(name: str, spectrum: Tensor) -> None:
    make, twin, reference = CASES[name]
    metric = make()
    value = twin(spectrum)
    assert (value.dtype, value.shape) == (torch.float64, ())
    assert value.item() == reference(spectrum)
    assert metric(spectrum).item() == value.item()
    assert twin(spectrum.tolist()).item() == value.item()


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


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("PowerLaw", "Largest", "Eigen", "Max"))])
def test_options_choose_the_eigenvalues(name: str) -> None:
    make, twin, reference = CASES[name]
    chosen = SPECTRUM[3:23]
    options = {"num_eigenvalues": 20, "drop_first": 3}
    assert make(**options)(SPECTRUM).item() == twin(SPECTRUM, **options).item() == reference(chosen)
    assert make()(chosen).item() == reference(chosen)


def test_options_reach_the_simulation_and_the_ratio() -> None:
    spectrum = torch.tensor(np.exp(np.random.default_rng(0).standard_exponential(60)))
    p_value = metrics.PowerLawPValue(draws=99, seed=5)(spectrum).item()
    assert p_value == ks_p_value(fit_power_law(spectrum), draws=99, seed=5)
    assert p_value == functional.power_law_p_value(spectrum, draws=99, seed=5).item()
    assert metrics.OutlierRatio(num_classes=2)(SPECTRUM).item() == SPECTRUM[0] / SPECTRUM[2]


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


def test_unfittable_spectrum_raises_instead_of_a_sentinel(metric: SpectrumMetric) -> None:
    metric.update(torch.tensor([0.0, -1.0, -2.0]))
    with pytest.raises(ValueError, match=r"compute more eigenvalues|pass the largest eigenvalues"):
        metric.compute()
    with pytest.raises(ValueError, match="check that the loss"):
        metric.update(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="at least one eigenvalue"):
        metric.update(torch.empty(0))


def test_state_dict_restores_the_spectrum(metric: SpectrumMetric) -> None:
    metric.update(SPECTRUM)
    assert not metric.state_dict()
    metric.persistent(True)
    fresh = CASES[type(metric).__name__][0]()
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
    # Half precision makes neighbours equal, which only the gaps and the entropy notice.
    if type(metric) not in (metrics.EigengapExponent, metrics.MaximumEntropyDeficit):
        assert metric.compute().item() == pytest.approx(value_of(metric, SPECTRUM), rel=0.01)


def test_device_without_float64_gets_float32(metric: SpectrumMetric, monkeypatch: pytest.MonkeyPatch) -> None:
    metric.update(SPECTRUM)
    metric.compute()
    monkeypatch.setattr(functional, "widest_float", lambda device: torch.float32)
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


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_collection_of_all_has_every_value_and_one_state() -> None:
    collection = power_law_metrics(num_classes=5, theory=True, prefix="hessian/")
    assert {type(metric).__name__ for metric in collection.values()} == set(CASES)
    collection.update(SPECTRUM)  # Groups form in the first update.
    for spectrum in (OTHER, SPECTRUM):
        values = collection(spectrum)
        for name, metric in collection.items():
            assert values[name].item() == value_of(metric, spectrum), name
        assert values.keys() == collection.compute().keys()
    assert len(collection.compute_groups) == 1
    assert {"hessian/slope", "hessian/fit_error", "hessian/outlier_ratio", "hessian/entropy_deficit"} <= values.keys()
    clone = pickle.loads(pickle.dumps(collection.clone(prefix="covariance/")))
    assert clone.compute()["covariance/slope"] == values["hessian/slope"]
    collection.reset()
    with pytest.raises(RuntimeError, match=r"call update\(eigenvalues\)"):
        collection.compute()


def test_collection_passes_its_options_on() -> None:
    collection = power_law_metrics(num_eigenvalues=20, drop_first=3, sync_on_compute=True)
    fit = fit_power_law(SPECTRUM, num_eigenvalues=20, drop_first=3)
    values = collection(SPECTRUM)
    assert (values["slope"].item(), values["num_fitted"].item()) == (fit.slope, 20)
    assert values["lambda_max"].item() == fit.lambda_1
    assert "outlier_ratio" not in values
    assert "eigengap_exponent" not in values
    assert all(metric.sync_on_compute for metric in collection.values())
    with pytest.raises(ValueError, match="give the number of classes"):
        power_law_metrics(num_classes=0)


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


def _on_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
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
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_do_not_count_the_spectrum_twice(tmp_path: Path) -> None:
    mp.spawn(_on_two_ranks, (str(tmp_path),), nprocs=2)
    expected = fit_power_law(SPECTRUM).slope
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(results["state"], SPECTRUM)
        for name in ("unsynced", "synced", "after", "on_compute"):
            assert results[name] == expected, name
        assert "over all ranks together" in results["values"]
        assert "[50, 49] eigenvalues" in results["lengths"]
        assert "call update on every rank" in results["missing"]
