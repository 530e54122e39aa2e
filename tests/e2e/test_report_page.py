"""The report of a committed sweep in a browser: nothing fails, heads sort, the filter filters, figures load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cfsp.cli import report
from tests.conftest import ROOT

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the dev extra)")

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in (CHROMIUM, DRIVER):
        if not program.is_file():
            pytest.skip(f"needs {program} (Debian: chromium, chromium-driver), which is not here")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, "window-size=1280,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The report of a sweep with a figure and several seeds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("experiments/block_metric", "results/records/block_metric"):
        shutil.copytree(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert report.main(["experiment=block_metric"]) == 0
    return (folder / "outputs" / "reports" / "block_metric-bundled.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page as it opens; afterwards the console must be empty."""
    browser.get_log("browser")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []


def _all(page, selector: str) -> list:
    return page.find_elements("css selector", selector)


def _head(page, table: str, label: str):
    """The button of a column, its th, and the column's number."""
    heads = _all(page, f"table.{table} > thead th")
    (at,) = [at for at, head in enumerate(heads) if head.text.startswith(label)]
    return heads[at].find_element("css selector", "button"), heads[at], at


def _column(page, rows: str, at: int) -> list[str]:
    return [row.find_elements("css selector", "th, td")[at].text for row in _all(page, rows) if row.is_displayed()]


def test_figures_load_and_nothing_is_asked_of_a_network(page):
    page.get_log("performance")
    page.refresh()
    images = _all(page, "figure img")
    assert len(images) == 1
    assert all(image.get_property("complete") and image.get_property("naturalWidth") > 0 for image in images)
    asked = page.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in asked if not name.startswith("data:")] == []
    sent = [
        entry["message"] for entry in page.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert not [message for message in sent if '"url":"http' in message]


def test_a_head_sorts_each_group_and_the_dense_row_stays(page):
    button, head, at = _head(page, "results", "perplexity")
    assert head.get_attribute("aria-sort") is None
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    for group in (1, 2):
        rows = f"table.results tbody:nth-of-type({group}) tr:not(.section)"
        names, values = _column(page, rows, 0), [float(text.split(" ")[0]) for text in _column(page, rows, at)]
        assert names[0] == "dense"
        assert len(values) == 6
        assert values[1:] == sorted(values[1:])
    button.send_keys("\n")  # the keyboard does the same
    assert head.get_attribute("aria-sort") == "descending"
    assert values[1:] == [float(text.split(" ")[0]) for text in _column(page, rows, at)][:0:-1]
    assert len(_all(page, "table.results th[aria-sort]")) == 1


def test_the_best_comes_first_where_higher_is_better(page):
    button, head, at = _head(page, "results", "zero-shot")
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    first = _all(page, "table.results tbody:nth-of-type(2) tr:not(.section)")[1]
    assert first.find_elements("css selector", "td")[at - 1].find_elements("css selector", "strong")


def test_runs_sort_by_number_with_their_details(page):
    button, _, at = _head(page, "runs", "perplexity")
    ids = [one.text for one in _all(page, "table.runs summary")]
    button.click()
    values = [float(text) for text in _column(page, "table.runs > tbody > tr:first-child", at)]
    assert len(values) == 30
    assert values == sorted(values)
    after = [one.text for one in _all(page, "table.runs summary")]
    assert after != ids
    assert sorted(after) == sorted(ids)
    link = _all(page, "table.runs a")[0]
    assert after[0] in link.get_attribute("href")


def test_the_filter_and_the_details(page):
    output = _all(page, "form.filter output")[0]
    assert output.text == "30 of 30 runs"
    select = _all(page, "form.filter select")[0]
    (option,) = [one for one in select.find_elements("css selector", "option") if one.text == "mae"]
    option.click()
    assert output.text == "6 of 30 runs"
    assert set(_column(page, "table.runs > tbody > tr:first-child", 0)) == {"mae"}
    run = next(one for one in _all(page, "table.runs summary") if one.is_displayed())
    run_id = run.text
    run.click()
    assert "temperature: 1.0" in next(one.text for one in _all(page, "pre") if one.is_displayed())
    _all(page, "form.filter input")[0].send_keys(run_id.upper())
    assert output.text == "1 of 30 runs"
    _all(page, "form.filter button")[0].click()
    assert output.text == "30 of 30 runs"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_screen(page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
