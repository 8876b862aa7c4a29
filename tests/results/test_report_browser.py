"""What a reader does with a report, in a real browser.

`make test-browser`; needs Debian's packages chromium and chromium-driver.
"""

import io
import json
import re
import shutil
import time
from base64 import b64decode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.manifest import SCHEMA
from pipeline.results import report
from pipeline.results.report import plots
from pipeline.results.report.tables import Results
from tests.browser import chromium, screenshot
from tests.results.test_report import SMALL, Setup, make_run, manifest_of, no_image_of
from tests.stored import stored

pytestmark = pytest.mark.browser

MANY = tuple(f"detector_{i:02}" for i in range(40))
SETS = {f"near-{i}": "near_ood" for i in range(4)} | {f"far-{i}": "far_ood" for i in range(6)}
LIMIT = 5_000_000
"""Bytes of the page of 40 detectors and 10 datasets."""
SECONDS = 5
"""Until it is open, with all charts drawn."""
BEST = 6
"""Detectors whose lines are drawn at first."""


class Browser:
    """A browser, and what a page in it shows and does."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page, width=1280, dark=False):
        """Open a page; returns the seconds until it is drawn."""
        self.run(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.run("Emulation.setEmulatedMedia", features=[scheme])
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        begun = time.monotonic()
        self.driver.get(page.as_uri())
        self.js("return document.documentElement.scrollHeight")
        return time.monotonic() - begun

    def run(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def requested(self):
        """Addresses that the page asked for, but for data that it holds itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def keep(self, name, selector="body"):
        """Leave a picture of what is seen of an element."""
        self.js("document.querySelector(arguments[0]).scrollIntoView()", selector)
        screenshot(self.driver, f"report-{name}")


@pytest.fixture(scope="module")
def browser():
    with chromium(1280, 900) as driver:
        yield Browser(driver)


def list_images(run, setup):
    """Listings of the datasets with an image of noise in each row, again and again the same ones."""
    rng, noise = np.random.default_rng(0), []
    for _ in range(120):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(file, "JPEG", quality=60)
        noise.append(file.getvalue())
    for name, entry in manifest_of(setup)["datasets"].items():
        rows = [
            {"key": f"{number}.png", "bytes": noise[number % 120], "label": 1, "accepted": []}
            for number in range(setup.rows)
        ]
        folder = run.parents[2] / "manifests" / f"{name}-{entry['digest'][:16]}"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "rows.parquet")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The run of 40 detectors and 10 datasets, with its report."""
    return large_run(tmp_path_factory.mktemp("large"))


def large_run(folder, **more):
    rng = np.random.default_rng(5)
    shift = {name: float(rng.uniform(0.2, 3)) for name in MANY}
    costs = {name: {"scores": 1000, "seconds": i + 1} for i, name in enumerate(MANY[:-1])}
    setup = Setup(SETS, MANY, shift, full_spectrum=True, uses_ood=MANY[3:4], costs=costs, **more)
    run = make_run(folder / "runs" / "r", setup)
    list_images(run, setup)
    report.write(run, 6)
    return run


def page_of(run):
    return run / "report" / "index.html"


def test_a_large_report_is_small_opens_quickly_and_asks_for_nothing(large, browser):
    assert page_of(large).stat().st_size < LIMIT
    assert browser.open(page_of(large)) < SECONDS
    assert browser.requested() == [page_of(large).as_uri()]
    assert browser.complaints() == []
    browser.keep("large")


def test_a_report_of_100_000_images_is_as_small_and_as_quick(tmp_path, browser):
    sets = ["cifar10_test", *SETS, "production"]
    run = large_run(tmp_path, rows=100_000 // len(sets) + 1)
    results = Results.read(run)
    assert sum(len(results.column(name, MANY[0])) for name in sets) >= 100_000
    assert page_of(run).stat().st_size < LIMIT
    assert browser.open(page_of(run)) < SECONDS
    assert len(legend(browser, 9)) == BEST
    assert browser.complaints() == []


def test_a_click_sorts_with_the_best_first_and_another_turns_it_round(large, browser):
    browser.open(page_of(large))
    rows = pq.read_table(large / "metrics.parquet").to_pylist()
    for metric, title in (("auroc", "AUROC"), ("fpr95_id", "FPR95, ID kept")):
        means = {
            r["detector"]: r["value"]
            for r in rows
            if r["dataset"] == r["group"] == "far_ood" and r["metric"] == metric
        }
        wanted = sorted(means, key=means.get, reverse=metric == "auroc")
        at = {"auroc": 3, "fpr95_id": 4}[metric]
        button = browser.find("#summary thead tr:last-child button")[at]
        head = button.find_element("xpath", "..")
        assert button.accessible_name.startswith(f"Sort by {title}")
        for key, expected in (("\ue007", wanted), (" ", wanted[::-1])):  # Enter and space
            button.send_keys(key)
            shown = [cell.text.split()[0] for cell in browser.find("#summary tbody th")]
            assert shown == expected
        assert head.get_attribute("aria-sort") == ("ascending" if metric == "auroc" else "descending")
        assert len(browser.find("#summary [aria-sort]")) == 1
    browser.keep("sorted", "#summary")


def test_what_is_not_known_comes_last_in_either_order(large, browser):
    browser.open(page_of(large))
    button = browser.find("#summary thead button")[-1]
    for known in (list(MANY[:-1]), list(MANY[-2::-1])):
        button.send_keys(" ")
        assert [cell.text.split()[0] for cell in browser.find("#summary tbody th")] == [*known, MANY[-1]]


def test_what_is_typed_filters_the_rows(large, browser):
    browser.open(page_of(large))
    field = browser.find("#summary .filter input")[0]
    assert "Summary" in field.accessible_name
    field.send_keys("TOR_1")
    shown = {cell.text for cell in browser.find("#summary tbody tr:not([hidden]) th")}
    assert shown == {name for name in MANY if "tor_1" in name}
    assert "10 of 40" in browser.find("#summary .filter")[0].text
    assert (
        len(
            [
                row
                for row in browser.find("#datasets tbody")[0].find_elements("css selector", "tr")
                if row.is_displayed()
            ]
        )
        == 40
    )


def test_the_first_row_and_column_stay_in_sight(large, browser):
    browser.open(page_of(large))
    box = browser.find("#datasets .scroll")[0]
    browser.js("arguments[0].scrollIntoView(); arguments[0].scrollTo(300, 400)", box)
    place = """
        const [a, b] = [...arguments].map((element) => element.getBoundingClientRect());
        return [b.left - a.left, b.top - a.top];
    """
    head, cell = browser.find("#datasets thead th")[0], browser.find("#datasets tbody th")[0]
    left, top = browser.js(place, box, head)
    assert abs(left) <= 2 and abs(top) <= 2
    assert abs(browser.js(place, box, cell)[0]) <= 2
    browser.keep("scrolled", "#datasets")


def legend(browser, panel):
    """Values of the lines that a panel of ROC curves shows, by detector."""
    rows = browser.js(
        """
        const panel = document.querySelectorAll("#roc .chart")[arguments[0]];
        const rows = [...panel.querySelectorAll(".u-legend tr")].slice(1);
        return rows.filter((row) => row.checkVisibility()).map((row) => row.innerText);
        """,
        panel,
    )
    return {words[1]: words[2:] for words in map(str.split, rows)}


def coloured(element):
    """Dots of an element that are not grey."""
    with Image.open(io.BytesIO(element.screenshot_as_png)) as image:
        return int((np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2) > 40).sum())


def test_the_best_detectors_are_drawn_first_and_others_are_chosen_from_a_list(large, browser):
    browser.open(page_of(large))
    ranked = Results.read(large).detectors
    boxes = browser.find(".choices input")
    assert [label.text for label in browser.find(".choices label")] == ranked
    assert [box.is_selected() for box in boxes] == [i < BEST for i in range(40)]
    before = coloured(browser.find("#roc .u-wrap")[0])
    for panel in range(10):
        assert set(legend(browser, panel)) == set(ranked[:BEST])
    boxes[20].send_keys(" ")
    for panel in range(10):
        assert set(legend(browser, panel)) == {*ranked[:BEST], ranked[20]}
    time.sleep(0.2)
    assert coloured(browser.find("#roc .u-wrap")[0]) > before > 100
    captions = [each.text for each in browser.find("#scores .gallery:not(.static) figcaption")]
    assert captions == [*ranked[:BEST], ranked[20]]
    browser.keep("chosen", "#roc")
    browser.find(".presets button")[2].click()
    assert legend(browser, 0) == {}
    browser.find(".presets button")[1].click()
    assert set(legend(browser, 9)) == set(ranked)
    assert not any(image.is_displayed() for image in browser.find(".static img"))
    assert browser.complaints() == []


def test_lines_differ_in_colour_or_dashes(large, browser):
    browser.open(page_of(large))
    kinds = {
        (p.get_attribute("stroke"), p.get_attribute("stroke-dasharray"))
        for p in browser.find(".choices path")
    }
    assert len(kinds) == 40


def test_arrow_keys_read_the_values_of_a_chart(large, browser):
    browser.open(page_of(large))
    chart = browser.find("#roc .chart")[1]
    assert "near-1" in chart.accessible_name
    for _ in range(12):
        chart.send_keys("\ue014")  # right: rates 0, 0.001, ...
    dataset, rate = list(SETS)[1], 0.011
    time.sleep(0.2)
    assert f"FPR {rate}" in browser.find("#roc .u-legend")[1].text
    results = Results.read(large)
    for detector, shown in legend(browser, 1).items():
        fpr, tpr = plots.roc_points(
            results.scores(["cifar10_test"], detector), results.scores([dataset], detector)
        )
        above = np.searchsorted(fpr, rate, side="right")
        part = (rate - fpr[above - 1]) / (fpr[above] - fpr[above - 1])
        wanted = tpr[above - 1] + part * (tpr[above] - tpr[above - 1])
        assert float(shown[0]) == pytest.approx(wanted, abs=1e-4)
    browser.keep("values", "#roc")


def test_every_thumbnail_is_there(large, browser):
    browser.open(page_of(large))
    browser.js("for (const image of document.images) image.loading = 'eager'")
    time.sleep(0.5)
    sizes = browser.js("return [...document.querySelectorAll('.strip img')].map(i => i.naturalWidth)")
    assert len(sizes) >= 6 * 3 * len(SETS)
    assert set(sizes) == {96}
    browser.keep("images", "#review")


def test_a_dark_page_is_dark_and_its_charts_are_turned_round(large, browser):
    browser.open(page_of(large), dark=True)
    colours = browser.js(
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    back, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert back < 40 < 200 < ink
    browser.js("document.querySelector('#roc').scrollIntoView()")
    with Image.open(io.BytesIO(browser.find("#roc .u-wrap")[0].screenshot_as_png)) as image:
        dots = np.asarray(image.convert("RGB")).astype(int)
    assert np.median(dots) < 60
    title = dots[:, :24]
    assert (title.min(axis=2) > 180).sum() > 50, "of the axis, beside which no lines are"
    browser.keep("dark", "#roc")


def test_without_scripts_the_static_figures_and_all_values_are_there(large):
    with chromium(1280, 900, **{"profile.managed_default_content_settings.javascript": 2}) as driver:
        plain = Browser(driver)
        plain.open(page_of(large))
        assert len(plain.find(".static img")) == len(SETS) + 8
        assert all(image.is_displayed() for image in plain.find(".static img"))
        assert not plain.find(".chart")
        assert not any(note.is_displayed() for note in plain.find(".live"))
        plain.keep("without-scripts", "#roc")


def overflow(browser):
    """CSS pixels by which the page is wider than what is seen of it."""
    return browser.js("const page = document.documentElement; return page.scrollWidth - page.clientWidth")


def test_a_phone_scrolls_tables_and_not_the_page(large, browser):
    browser.open(page_of(large), width=390)
    assert overflow(browser) == 0
    assert browser.js(
        "const e = document.querySelector('#summary .scroll'); return e.scrollWidth > e.clientWidth"
    )
    browser.keep("phone", "#roc")


def test_printed_tables_have_their_heading_on_every_page_and_every_column(large, browser):
    import pypdf

    browser.open(page_of(large))
    pages = [
        page.extract_text()
        for page in pypdf.PdfReader(io.BytesIO(b64decode(browser.driver.print_page()))).pages
    ]
    boards = [text for text in pages if len(re.findall(r"detector_\d\d\s+0\.\d{4}", text)) > 3]
    assert len(boards) >= 4
    for text in boards:
        assert "Detector" in text
        assert re.search("AUROC|far-0|AURC", re.sub(r"-\s+", "-", text))
    assert "far-5" in re.sub(r"-\s+", "-", "".join(boards))
    assert sum("TPR" in text or "Near-OOD)" in text for text in pages) >= 2, "charts"


CASES = {
    "no OOD set": Setup(ood={}),
    "one detector": Setup(detectors=("knn",)),
    "images of one set not read": Setup(SMALL, errors={"svhn": 3}),
    "no image of one set read": Setup(SMALL, errors={"production": 120}),
    "one class": Setup(SMALL),
}


@pytest.mark.parametrize("case", CASES)
def test_reports_that_lack_something_open_without_complaint(tmp_path, browser, case):
    run = make_run(tmp_path, CASES[case])
    if case == "one class":
        for name in ("cifar10_test", *SMALL):
            table = pq.read_table(run / "scores" / name)
            shutil.rmtree(run / "scores" / name)
            same = pa.array(np.zeros(len(table)), pa.int32())
            at = table.schema.get_field_index("prediction")
            stored(run / "scores" / name, [table.set_column(at, "prediction", same)])
    if case == "no image of one set read":
        no_image_of(run, "production")
    report.write(run, 2)
    browser.open(page_of(run), width=390)
    assert overflow(browser) == 0
    assert len(browser.find("#scores .chart canvas")) == len(CASES[case].detectors)
    assert len(browser.find("#roc .chart canvas")) == len(CASES[case].ood)
    assert browser.complaints() == []
    browser.keep(case.replace(" ", "-"), "#scores")
