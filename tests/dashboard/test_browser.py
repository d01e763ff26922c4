"""The page of a live run in a real browser: draws, updates, survives a restart of the learner."""

from __future__ import annotations

import os
import signal

import pytest
from browser import SOURCES, chromium, console_errors, until
from conftest import MODEL

import dask_isgd as isgd
from dask_isgd.events import Progress, topic_of

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

STEP = (
    "const h = Bokeh.documents[0].get_model_by_name('header').text; const m = h.match(/step<.div><div[^>]*>([\\d,]+)/);"
)
STEP += "return m ? parseInt(m[1].replaceAll(',', '')) : 0;"
EVIL = "<img src=x onerror=window.hacked=1>"
SELECT = "Bokeh.documents[0].get_model_by_name('run')"


@pytest.fixture(scope="module")
def run(client, digits, tmp_path_factory):
    """A run without end, well under way."""
    learning = isgd.Learning(
        steps=10_000_000,
        batch_size=32,
        learning_rate=0.02,
        publish_every=20,
        report_every=10,
        evaluate_every=100,
        checkpoint_seconds=2,
        threads=1,
    )
    folder = tmp_path_factory.mktemp("watched")
    run = isgd.fit(client, MODEL, digits, folder / "run", learning=learning, validation=digits.split("test"))
    yield run
    run.stop(timeout=120)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def page(client, browser, path):
    browser.get(client.dashboard_link.removesuffix("/status") + path)
    until(browser, "return Boolean(window.Bokeh && Bokeh.documents[0]);", f"{path} has a document")


def drawn(browser) -> dict[str, int]:
    return {title.partition(":")[0]: rows for title, rows in browser.execute_script(SOURCES).items()}


def test_the_page_draws_every_panel_without_an_error(client, browser, run):
    page(client, browser, "/isgd")
    complete = f"const f = (() => {{{SOURCES}}})(); return f && Object.values(f).length === 10 && "
    complete += "Object.values(f).every(n => n > 0);"
    until(browser, complete, "every panel shows something", timeout=180)
    assert {"Training loss", "Validation error", "Weights", "Chunks by age"} <= set(drawn(browser))
    assert console_errors(browser) == []


def test_the_page_updates_by_itself(client, browser, run):
    page(client, browser, "/isgd")
    first = until(browser, STEP, "a step is shown", timeout=120)
    until(browser, f"return (() => {{{STEP}}})() > {first};", "the step grows", timeout=120)
    assert console_errors(browser) == []


def test_the_page_survives_a_restart_of_the_learner(client, browser, run):
    page(client, browser, "/isgd")
    until(browser, f"return (() => {{{STEP}}})() > 0;", "a step is shown", timeout=120)
    wait_for_a_checkpoint(run)
    address = run.latest["learner"]
    pid = client.run(os.getpid, workers=[address])[address]
    os.kill(pid, signal.SIGKILL)
    text = "return Bokeh.documents[0].get_model_by_name('event-log').text"
    until(browser, f"{text}.includes('incarnation 2 took over');", "the restart is logged", timeout=180)
    until(
        browser,
        "return document.body && Bokeh.documents[0].get_model_by_name('header').text.includes('running');",
        "it runs again",
        timeout=120,
    )
    seen = browser.execute_script(f"return (() => {{{STEP}}})();")
    until(browser, f"return (() => {{{STEP}}})() > {seen};", "the step grows again", timeout=180)
    assert console_errors(browser) == []


def wait_for_a_checkpoint(run) -> None:
    import time

    deadline = time.monotonic() + 120
    while not run.directory.checkpoints().names():
        run._pause(deadline, "a checkpoint")


def test_what_others_write_is_shown_as_text(client, browser, run):
    fault = {"kind": "fault", "run": run.id, "incarnation": 1, "what": "test", "detail": EVIL}
    client.log_event(f"isgd-{run.id}", fault)
    page(client, browser, "/isgd")
    until(browser, "return Bokeh.documents[0].get_model_by_name('event-log').text.includes('onerror');", "the fault")
    hostile = Progress(run=EVIL, incarnation=1, step=1, address=EVIL, open=True, why=EVIL, values={"loss": 1.0})
    client.log_event(topic_of(EVIL), hostile.record())
    until(browser, f"return JSON.stringify({SELECT}.options).includes('onerror');", "the run in the list")
    browser.execute_script(f"{SELECT}.value = {EVIL!r};")
    until(browser, "return Bokeh.documents[0].get_model_by_name('header').text.includes('onerror');", "the run chosen")
    assert browser.execute_script("return window.hacked === undefined;")
    assert console_errors(browser) == []


@pytest.mark.parametrize("name", ["loss", "gain", "ages", "weights", "faults", "overview"])
def test_each_page_of_its_own_draws(client, browser, run, name):
    page(client, browser, f"/individual-isgd-{name}")
    ready = "return Bokeh.documents[0].is_idle;"
    until(browser, ready, "the page is idle")
    assert name == "faults" or any(drawn(browser).values())
    assert console_errors(browser) == []


def test_dasks_menu_leads_to_the_page(client, browser, run):
    page(client, browser, "/status")
    link = browser.execute_script("return document.querySelector(\"a[href='isgd']\").href")
    assert link == client.dashboard_link.removesuffix("status") + "isgd"
    listed = browser.execute_script("return [...document.querySelectorAll('.dropdown-content a')].map(a => a.href)")
    assert any(url.endswith("/individual-isgd-overview") for url in listed)
