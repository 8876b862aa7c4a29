"""Pages of a real MLflow server in a real browser: two evaluations, and one that is under way.

`make test-browser`; needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from pipeline.results.mlflow import tracking
from tests.browser import chromium, screenshot
from tests.results.test_tracking import SCORES, Server, write_run
from tests.servers import wait

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

WORSE = {key: value / 2 for key, value in SCORES.items()}
MANY = {("energy", f"set{number}", "near_ood"): 0.5 + number / 100 for number in range(20)}


@dataclass(frozen=True)
class Shown:
    """A server with three evaluations in one experiment."""

    server: Server
    first: tracking.Session
    second: tracking.Session
    running: tracking.Session

    def runs(self) -> str:
        return f"{self.server.uri}/#/experiments/{self.first.experiment_id}/runs"

    def page_of(self, run_id: str, tab: str = "") -> str:
        return f"{self.server.uri}/#/experiments/{self.first.experiment_id}/runs/{run_id}{tab}"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    sessions = []
    for name, scores in (("0123", SCORES | MANY), ("4567", WORSE)):
        run = write_run(folder / "runs" / "quick" / name, scores)
        sessions.append(tracking.begin(run, uri, "ood", f"quick/{name}", name))
        tracking.publish(sessions[-1])
    running = write_run(folder / "runs" / "quick" / "89ab")
    sessions.append(tracking.begin(running, uri, "ood", "quick/89ab", "89ab"))
    for seconds in range(0, 50, 10):
        tracking.progress(sessions[-1], "extract", 100 * seconds, seconds)
    server = Server(folder, tracking.link(sessions[0]))
    yield Shown(server, *sessions)
    server.tell(signal.SIGKILL)
    server.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium(1500, 1000) as found:
        yield found


def text_of(browser: Chrome, page: str, *wanted: str) -> str:
    """What a page says once it says all that is wanted."""
    browser.get("about:blank")
    browser.get(page)

    def said() -> str:
        found = browser.find_element(By.TAG_NAME, "body").text
        return found if all(each in found for each in wanted) else ""

    try:
        return str(wait(f"{page}: {wanted}", said, 60))
    except TimeoutError:
        body = browser.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"{page}: {[each for each in wanted if each not in body]}: {body}") from None
    finally:
        screenshot(browser, re.sub(r"\W+", "-", f"mlflow {wanted[0]}"))


def test_the_experiment_lists_evaluations_by_names_that_tell_them_apart(
    shown: Shown, browser: Chrome
) -> None:
    text_of(browser, shown.runs(), "quick/0123", "quick/4567", "quick/89ab")


def test_an_evaluation_says_what_is_best_and_what_it_was_made_of(shown: Shown, browser: Chrome) -> None:
    page = text_of(browser, shown.page_of(shown.first.run_id), "best_auroc/far_ood", "2 detectors of OOD")
    for line in (
        "resnet",
        "Best on far_ood: energy, AUROC 1.0000",
        "id_accuracy",
        "detectors",
        "energy, knn-50",
    ):
        assert line in page, line


def test_a_detector_has_few_metrics_and_the_others_in_a_table(shown: Shown, browser: Chrome) -> None:
    client = tracking.connected(shown.first.uri)
    (child,) = client.search_runs(
        [shown.first.experiment_id],
        f"tags.detector = 'energy' and tags.mlflow.parentRunId = '{shown.first.run_id}'",
    )
    page = text_of(browser, shown.page_of(child.info.run_id), "energy (quick/0123)", "auroc/near_ood")
    assert len(set(re.findall(r"auroc/[\w.]+|threshold", page))) <= 12


def test_two_evaluations_stand_side_by_side(shown: Shown, browser: Chrome) -> None:
    runs, experiments = ([shown.first.run_id, shown.second.run_id], [shown.first.experiment_id])
    page = f"{shown.server.uri}/#/compare-runs?runs={quote(json.dumps(runs))}"
    page += f"&experiments={quote(json.dumps(experiments))}"
    text = text_of(browser, page, "Comparing 2 Runs", "quick/0123", "quick/4567", "best_auroc/far_ood")
    assert "\naccuracy/test\nbest_auroc/far_ood\n" in text, "names stand below each other,"
    assert "\n0.934\n0.934\n1\n0.5\n" in text, "and so do their values, of both runs"


def test_the_link_opens_charts_of_the_detectors(shown: Shown, browser: Chrome) -> None:
    text_of(browser, shown.server.page, "auroc/far_ood", "energy (quick/0123)", "knn-50 (quick/0123)")


def test_one_that_is_under_way_shows_how_far_it_is(shown: Shown, browser: Chrome) -> None:
    page = text_of(browser, shown.page_of(shown.running.run_id), "Running", "done/extract")
    assert "4000" in page
    text_of(browser, shown.page_of(shown.running.run_id, "/model-metrics"), "done/extract")
