from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hessian_callback.algorithms.lanczos_tridiagonal import lanczos_tridiagonal
from hessian_callback.linalg.linear_operator import MatvecOperator
from hessian_callback.linalg.random_vectors import gaussian_slice

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "peers.py").exists(), reason="the benchmarks are not part of an installed package"
)

if (ROOT / "benchmarks" / "peers.py").exists():
    from benchmarks import __main__ as report
    from benchmarks import limit, paper_scale, peers, product_table, references, scaling_table, top_table
    from benchmarks.cases import Case, cross_entropy, measured
    from benchmarks.timing import in_turns, ratios, spread


@pytest.fixture(scope="module")
def truth() -> list[float]:
    """The tiny network's spectrum from its dense Hessian, which no product of ours or theirs has a part in."""
    case = references.in_float64(measured("tiny"))
    parameters = dict(case.model.named_parameters())
    inputs, labels = (torch.cat(column) for column in zip(*case.batches, strict=True))

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([parameter.numel() for parameter in parameters.values()])
        chosen = {name: piece.view_as(parameters[name]) for name, piece in zip(parameters, pieces, strict=True)}
        outputs = torch.func.functional_call(case.model, chosen, (inputs,))
        return torch.nn.functional.cross_entropy(outputs, labels)

    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    matrix = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    return torch.linalg.eigvalsh(matrix).flip(0).tolist()


def test_errors_and_missing_values() -> None:
    reference = [4.0, 2.0, 1.0]
    assert peers.error([1.0, 4.0, 2.0], reference) == 0
    assert peers.error([4.0, 2.0, 0.9], reference) == pytest.approx(0.1)
    assert peers.error([4.0, 2.0], reference) == float("inf")
    assert peers.error([4.0, 2.0, float("nan")], reference) == float("inf")
    ghost = [4.0, 4.0, 2.0]  # an eigenvalue returned twice
    assert peers.error(ghost, reference) == pytest.approx(1.0)
    assert peers.num_missing(ghost, reference, 1e-2) == 1
    assert peers.num_missing(reference, reference, 1e-2) == 0


def test_references_are_those_of_the_dense_hessian_and_are_kept(tmp_path: Path, truth: list[float]) -> None:
    kept = tmp_path / "references.json"
    case = measured("tiny")
    values = references.reference("tiny", case, 10, kept=kept)
    assert peers.error(values, truth[:10]) <= references.RTOL
    written = kept.read_text()
    assert references.reference("tiny", case, 5, kept=kept) == values[:5]
    assert kept.read_text() == written
    assert peers.error(references.independent(case, 10), truth[:10]) <= 1e-9


def test_another_batch_or_weight_is_another_case() -> None:
    case = measured("tiny")
    digest = references.digest(case)
    assert references.digest(measured("tiny")) == digest
    assert references.digest(Case(case.model, cross_entropy, case.batches[1:])) != digest
    with torch.no_grad():
        next(case.model.parameters()).flatten()[0] += 1e-7
    assert references.digest(case) != digest


def test_products_agree_and_are_told_in_gradients() -> None:
    pytest.importorskip("hessian_eigenthings")
    case = measured("tiny")
    vector = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(1))
    right = peers.own(references.in_float64(case), "double_backward")(vector.double())
    for product in peers.PEER_PRODUCTS.values():
        torch.testing.assert_close(product(case)(vector).double(), right, rtol=1e-4, atol=1e-5)
    gradient = peers.gradient(case)(vector)
    case.model.zero_grad()
    loss = sum(cross_entropy(case.model, batch) for batch in case.batches) / len(case.batches)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, flat)


def test_a_wrong_peer_is_listed_with_its_error_and_not_compared(tmp_path: Path, truth: list[float]) -> None:
    pytest.importorskip("hessian_eigenthings")
    weights = tmp_path / "tiny.pt"
    measured("tiny", weights=weights)
    # 40 eigenvalues from 80 steps that are not reorthogonalised: its defaults.
    cell = top_table.measure(0, "tiny", weights, 40, 1, 0.0, tmp_path / "references.json")
    by_label = {entry.label: entry for entry in cell.entries}
    ours, wrong = by_label[top_table.OWN], by_label["eigenthings, by its defaults"]
    assert ours.last is not None
    assert ours.error <= 1e-2
    assert peers.error(ours.last.values, truth[:40]) <= 1e-2
    assert wrong.error > 1e-2
    rows = {row[2]: row for row in top_table.comparison(cell)}
    assert rows["eigenthings, by its defaults"][7].startswith("wrong (")
    assert rows["scipy eigsh over curvlinops, by hand"][9] == "1"
    assert float(rows["scipy eigsh over curvlinops, by hand"][7]) > 0
    # The limit is less than any run that is right can take, but for the scatter of times.
    assert cell.fewest <= ours.products
    assert float(rows[top_table.OWN][8]) > 0
    factors = top_table.factors(cell)
    assert factors[2:4] == [str(ours.products), str(cell.fewest)]
    shares = [float(cell) for cell in top_table.breakdown(cell)[3:6]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    text = top_table.report([cell], [("gpt", 200)])
    assert "| gpt | 200 | all | not run |" in text


def test_the_fewest_products_are_those_of_a_run_that_is_told_the_truth() -> None:
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.0
    operator = MatvecOperator(lambda v: values * v, 300, dtype=torch.float64)
    fewest = limit.fewest_products(operator, values[:5].tolist(), 1e-2)
    start = gaussian_slice(operator.partition, seed=0, draw=0, dtype=torch.float64, device=torch.device("cpu"))

    def is_right(steps: int) -> bool:
        found = lanczos_tridiagonal(operator, start.clone(), steps).ritz_values[:5]
        return len(found) == 5 and bool(((found - values[:5]).abs() <= 1e-2 * values[:5]).all())

    assert fewest == next(steps for steps in range(1, 301) if is_right(steps))


def test_a_wrong_product_is_not_compared() -> None:
    seconds = {label: [1.0, 2.0] for label in ("gradient", "auto", *peers.PEER_PRODUCTS)}
    errors = {"curvlinops": 0.5, "eigenthings": 5e-3}
    row = product_table.peer_row("tiny", {"seconds": seconds, "errors": errors})
    assert row[1] == "wrong (0.5)"
    assert row[2].endswith("off by 0.005")
    assert row[3] == "eigenthings"


def test_contestants_take_turns() -> None:
    order: list[str] = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, seconds_a_turn=0.0)
    assert order[4:] == ["a", "b", "b", "a"]
    assert {label: len(values) for label, values in seconds.items()} == {"a": 2, "b": 2}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([1.0, 3.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_the_large_run_accounts_for_its_time_and_memory() -> None:
    torch.set_num_threads(1)
    case = measured("tiny")
    result = paper_scale.measure(case, 10, rtol=1e-2, hvp="double_backward")
    assert result["all_bounds_met"]
    parts = [result[f"seconds_{part}"] for part in ("preparing", "products", "orthogonalisation", "checks")]
    assert sum(parts) == pytest.approx(result["seconds"], abs=0.3)
    assert result["basis_bytes"] == result["products"] * case.num_parameters * 4


def test_a_report_can_be_made_in_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that fails loses none of those made before, and a table that is made again replaces its section alone."""
    output = tmp_path / "RESULTS.md"
    arguments = ["benchmarks", "--quick", "--output", str(output), "--only"]
    monkeypatch.setattr(report.product_table, "report", lambda *_: "first\n\n### More\n\nproducts")
    monkeypatch.setattr(report.scaling_table, "report", lambda *_: pytest.fail("a rank ended"))
    monkeypatch.setattr(sys, "argv", [*arguments, "products", "scaling"])
    with pytest.raises(pytest.fail.Exception):
        report.main()
    kept = sections_of(output)
    assert list(kept) == [report.TITLES["products"]]
    assert kept[report.TITLES["products"]].endswith("first\n\n### More\n\nproducts")
    monkeypatch.setattr(report.scaling_table, "report", lambda *_: "growth")
    monkeypatch.setattr(sys, "argv", [*arguments, "scaling"])
    report.main()
    found = sections_of(output)
    assert list(found) == [report.TITLES["products"], report.TITLES["scaling"]]
    assert found[report.TITLES["products"]] == kept[report.TITLES["products"]]


def sections_of(output: Path) -> dict[str, str]:
    _, *parts = output.read_text(encoding="utf-8").strip().split("\n\n## ")
    return {title: text for title, _, text in (part.partition("\n\n") for part in parts)}


def test_growth_is_measured_along_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_table, "MIDDLE", (8, 32, 3))
    for name, axis in {"WIDTHS": (8, 12), "SAMPLES": (32, 48), "EIGENVALUES": (3, 4)}.items():
        monkeypatch.setattr(scaling_table, name, axis)
    found = scaling_table.measure(0, 1, False)
    assert [[value for value, _, _ in points] for points in list(found.values())[1:]] == [[32, 48], [3, 4]]
    assert all(products > 3 for points in found.values() for _, _, products in points)
