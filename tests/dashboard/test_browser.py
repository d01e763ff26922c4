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
    assert run.name in browser.execute_script("return Bokeh.documents[0].get_model_by_name('header').text")
    assert console_errors(browser) == []


def test_small_losses_are_not_labelled_zero(client, browser, run):
    page(client, browser, "/individual-isgd-loss")
    found = "[...Bokeh.documents[0]._all_models.values()].find(m => m.type === 'CustomJSTickFormatter')"
    labels = browser.execute_script(f"return {found}.doFormat([0.0003, 0.03, 0.1 + 0.2, 5000], {{loc: 0}})")
    assert labels == ["0.0003", "0.03", "0.3", "5000"]


@pytest.mark.parametrize("path", ["/isgd", "/individual-isgd-overview", "/individual-isgd-gain"])
@pytest.mark.parametrize("size", [(1280, 800), (1600, 1000)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_nothing_overflows(client, browser, run, path, size):
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page(client, browser, path)
        until(browser, "return Bokeh.documents[0].is_idle;", "the page is idle")
        root = "document.documentElement"
        found = browser.execute_script(f"return [{root}.scrollWidth, {root}.scrollHeight]")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert found[0] <= size[0]
    assert found[1] <= size[1]


@pytest.mark.parametrize(
    ("path", "scheme", "background", "text"),
    [
        ("/individual-isgd-loss", "dark", "rgb(17, 17, 17)", "#dddddd"),
        ("/individual-isgd-loss", "light", "rgba(0, 0, 0, 0)", "#222222"),
        ("/isgd", "dark", "rgba(0, 0, 0, 0)", "#222222"),  # as light as the rest of Dask's pages
    ],
)
def test_colours_are_those_of_the_page_around(client, browser, run, path, scheme, background, text):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page(client, browser, path)
        colour = "return [...Bokeh.documents[0]._all_models.values()].find(m => m.type === 'Title').text_color"
        until(browser, f"{colour} === {text!r};", f"text is {text}")
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == background
        assert console_errors(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_dasks_menu_leads_to_the_page(client, browser, run):
    page(client, browser, "/status")
    link = browser.execute_script("return document.querySelector(\"a[href='isgd']\").href")
    assert link == client.dashboard_link.removesuffix("status") + "isgd"
    listed = browser.execute_script("return [...document.querySelectorAll('.dropdown-content a')].map(a => a.href)")
    assert any(url.endswith("/individual-isgd-overview") for url in listed)
