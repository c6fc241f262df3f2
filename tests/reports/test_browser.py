"""What a user sees: TensorBoard's own pages in a real browser, after a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import TensorBoard, elements, wait_for
from tests.helpers.lightning import TensorBoardLogger
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took", "ignore:.*samples are few")
RUN = "toy/one"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs")
    callback = measure(figures=True)
    logger = TensorBoardLogger(folder, name="toy", version="one")
    trainer(folder, callback, logger=logger).fit(seeded(), loader(), loader(seed=1))
    return folder, callback


@pytest.fixture(scope="module")
def board(run: Any, browser: Any, tensorboard: Any) -> TensorBoard:
    return tensorboard(run[0])


@pytest.mark.parametrize("name", ["slope", "fit_error"])
def test_scalar_card_shows_what_was_logged(name: str, board: TensorBoard, run: Any, browser: Any) -> None:
    expected = [getattr(measurement, name) for measurement in run[1].history]
    found = [value for _, value in board.scalars(RUN, f"hessian/{name}")]
    assert found == pytest.approx(expected, rel=1e-6)
    # Only what the filter lets through is drawn, and the table below the curve holds its last value.
    browser.get("about:blank")
    browser.get(f"{board.url}/?tagFilter=hessian%2F{name}%24#timeseries")
    last = f"{expected[-1]:.4g}"

    def card() -> bool:
        cards = [element.text for element in elements(browser, "scalar-card")]
        return any(name in text and last in text.split() for text in cards)

    wait_for(card, f"a card of {name} with {last}; there are {[e.text for e in elements(browser, 'scalar-card')]}")


def test_spectrum_of_the_last_measurement_is_on_the_page(board: TensorBoard, browser: Any) -> None:
    browser.get("about:blank")
    browser.get(f"{board.url}/#images")
    script = "const i = arguments[0]; return i.complete && i.naturalWidth ? [i.naturalWidth, i.naturalHeight] : null"

    def sizes() -> list[Any]:
        return [size for image in elements(browser, "img") if (size := browser.execute_script(script, image))]

    assert [512, 384] in wait_for(sizes, "the picture of the spectrum")
    heads = " ".join(element.text for element in elements(browser, "tf-image-loader"))
    assert "hessian/spectrum" in heads
    assert f"step {board.scalars(RUN, 'hessian/slope')[-1][0]}" in " ".join(heads.split())


def test_custom_scalars_are_laid_out(board: TensorBoard, browser: Any) -> None:
    browser.get("about:blank")
    browser.get(f"{board.url}/#custom_scalars")

    def page() -> str:
        return " ".join(element.text for element in elements(browser, "tf-custom-scalar-dashboard"))

    for title in ("hessian: slope", "hessian: fit error", "hessian: cost", "slope with its 95 % interval"):
        wait_for(lambda title=title: title in page(), f"{title!r} among the custom scalars, which are {page()!r}")
