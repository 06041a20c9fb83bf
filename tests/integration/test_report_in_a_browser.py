"""In a browser, the report draws its charts, shows tooltips and fits the window."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermoe_ds.report.page import bins_per_run, build_page
from hypermoe_ds.report.reading import read_run
from tests.helpers.synthetic_runs import write_run

webdriver = pytest.importorskip("selenium.webdriver")
ui = pytest.importorskip("selenium.webdriver.support.ui")
exceptions = pytest.importorskip("selenium.common.exceptions")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Build a report of one run and a report of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, steps=steps, layers=4, experts=8) for name, steps in (("a", 1000), ("b", 700))]
    made = {}
    for count in (1, 2):
        made[count] = folder / f"{count}.html"
        made[count].write_text(build_page([read_run(run, run.name, bins_per_run(count)) for run in runs[:count]]))
    return made


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")  # discard messages of earlier pages
    browser.get(page.as_uri())


def wait_for(browser: Any, script: str) -> Any:
    return ui.WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(script))


def tooltip(browser: Any, chart: str, tip: str, beginning: str = "") -> str:
    """Hover over a chart until its tooltip starts with `beginning`; retry if a redraw replaces the chart."""
    offsets = itertools.cycle((0, 5))

    def hover(driver: Any) -> str | None:
        element = driver.find_element("css selector", chart)
        actions = webdriver.ActionChains(driver).scroll_to_element(element)
        actions.move_to_element_with_offset(element, next(offsets), 0).perform()
        text: str = driver.find_element("css selector", tip).get_property("innerText")
        return text if text.startswith(beginning) else None

    replaced = [exceptions.StaleElementReferenceException, exceptions.NoSuchElementException]
    waiting = ui.WebDriverWait(browser, 20, ignored_exceptions=replaced)
    shown: str = waiting.until(hover)
    return shown


def stacked_values(browser: Any) -> dict[str, str]:
    """Return the values in the tooltip of the chart of step parts."""
    parts = "#speed section:last-child"
    return {
        line.split()[0]: line.split()[1]
        for line in tooltip(browser, f"{parts} .u-over", f"{parts} .tip").splitlines()[1:]
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("count", [1, 2])
def test_the_page_draws_its_charts_within_the_window_and_without_errors(
    browser: Any, pages: dict[int, Path], count: int, width: int, scheme: str
) -> None:
    show(browser, pages[count], width, scheme)
    wait_for(browser, "return document.querySelectorAll('#loss .u-over').length > 0")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.documentElement.dataset.theme") == scheme
    drawn = """
        const canvas = document.querySelector('#loss canvas');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(new Uint32Array(pixels.buffer)).size;"""
    assert browser.execute_script(drawn) > 10, "the canvas should have the colours of axes and curves"
    sections = browser.execute_script("return [...document.querySelectorAll('main > section')].map((each) => each.id)")
    expected = ["summary", "loss", "validation", "optimization", "speed", "memory", "data", "routing", "hyperexperts"]
    assert sections == [*expected, "settings", "samples"]
    browser.execute_script("document.getElementById('routing').scrollIntoView()")
    wait_for(browser, "return document.querySelectorAll('#routing .u-over').length > 0")
    assert browser.execute_script("return document.querySelectorAll('canvas.heat').length") == 2
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_hovering_shows_the_values_and_the_controls_redraw(browser: Any, pages: dict[int, Path]) -> None:
    show(browser, pages[1], 1280, "light")
    wait_for(browser, "return document.querySelectorAll('#loss .u-over').length > 0")
    tip = tooltip(browser, "#loss .u-over", "#loss .tip", "step ")
    assert "training" in tip
    assert "nats/token" in tip
    axis = ui.Select(browser.find_element("id", "axis"))
    assert [option.text for option in axis.options] == ["step", "million tokens", "hours"]
    axis.select_by_visible_text("hours")
    for box in ("logx", "logy"):
        browser.find_element("id", box).click()
    browser.find_element("id", "theme").click()
    wait_for(browser, "return document.documentElement.dataset.theme === 'dark'")
    browser.execute_script(
        "const slider = document.getElementById('smoothing'); slider.value = 0.9; slider.oninput();"
        "document.querySelector('#validation .legend button').click();"
    )
    tooltip(browser, "#loss .u-over", "#loss .tip", "hours ")
    browser.execute_script("document.getElementById('speed').scrollIntoView()")
    wait_for(browser, "return document.querySelectorAll('#speed section:last-child .u-over').length > 0")
    parts = browser.find_elements("css selector", "#speed section:last-child .legend button")
    assert [part.text for part in parts] == ["data", "forward", "backward", "optimizer", "checkpoint", "other"]
    values = [stacked_values(browser)]
    parts[1].click()
    values.append(stacked_values(browser))
    assert values[1] == {part: value for part, value in values[0].items() if part != "forward"}
    assert "of the mean" in tooltip(browser, "canvas.heat", "#routing .heat + .tip")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
