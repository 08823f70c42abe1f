"""The report in a real browser: it renders without errors or network, is true to the run, and is readable.

Skipped where there is no Chromium with its driver.
"""

import itertools
import json

import pytest
from browsers import OVERFLOWS, colours, contrast, forget_logs, look, needs_browser, open_browser, requests_of, rgb
from report_runs import dpo_metrics, sft_metrics, write_run
from selenium.webdriver.support.wait import WebDriverWait

from notus.evaluation.read_run import read_runs
from notus.evaluation.report.page import render
from notus.evaluation.results import Figure, Result, write_result

pytestmark = needs_browser

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
EVIL_NAME = "<img src=x onerror=window.hacked=3>"
HISTOGRAM = {"edges": [0, 10, 20, 30], "counts": [1, 6, 3]}
SPLIT = {
    "rows": 10, "report": {"read": 14, "dropped": {"empty completion": 4}},
    "lengths": {"prompt": HISTOGRAM, "chosen": HISTOGRAM}, "ratings": None, "sources": {EVIL: 7, "a" * 60: 3},
}  # fmt: skip
BINS = [{"confidence": 0.6, "frequency": 0.7, "interval": [0.4, 0.9]}]


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports: of a run with everything and hostile texts in it, alone and beside one of SFT that is not finished."""
    folder = tmp_path_factory.mktemp("reports")
    full, other = _full_run(folder / EVIL_NAME), write_run(folder / "b", "sft", metrics=sft_metrics(30), finished=False)
    for name, runs in (("one", [full]), ("two", [full, other])):
        (folder / f"{name}.html").write_text(render(read_runs([str(run) for run in runs])))
    return folder


@pytest.fixture
def show(browser, pages):
    """Show a page at a width and in a colour scheme; what was logged before is forgotten."""

    def at(name="one", *, width=1440, scheme="light"):
        look(browser, width=width, scheme=scheme)
        forget_logs(browser)
        browser.get((pages / f"{name}.html").as_uri())
        return browser

    return at


def _full_run(folder):
    samples = [
        {"step": step, "index": index, "prompt": EVIL, "completion": f"{EVIL} {'long ' * 400}"}
        for step in (0, 60)
        for index in range(3)
    ]
    write_run(
        folder, metrics=dpo_metrics(60, eval_every=20), samples=samples, data={"train": SPLIT, "eval": SPLIT},
        environment={"hardware": EVIL, "seconds": 7000.0}, dpo__beta=0.25,
    )  # fmt: skip
    published = dict.fromkeys(("Zephyr-7B-β", "Notus 7B v1", EVIL), 64.0)
    arc = Figure("AI2 Reasoning Challenge", "acc_norm", 62.5, "%", 1.25, 1172, "25-shot", None, published)
    write_result(folder / "evaluations" / "open-llm", Result("open-llm", "m" * 80, [arc], {}))
    details = {"calibration": {"bins": BINS, "ece": 0.1, "brier": 0.2, "best_beta": 0.1}}
    write_result(folder / "evaluations" / "preferences", Result("preferences", "m", [arc], {}, details))
    start = {"step": 0, "eval_loss": 0.693, "eval_rewards/accuracies": 0.8}  # the accuracy falls, the loss as well
    (folder / "initial_evaluation.json").write_text(json.dumps(start))
    return folder


def test_it_renders_without_errors_and_without_network(show):
    page = show()
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg').length)"
    )
    assert len(drawn) == 10
    assert min(drawn) > 0
    assert page.execute_script("return failures") == []
    assert page.get_log("browser") == []
    assert [url[:7] for url in requests_of(page)] == ["file://"]  # the page itself


def test_plotly_reads_the_runs_values(show):
    page = show()
    read = "return document.getElementById('loss-dpo-plot').calcdata.map(line => line.map(point => [point.x, point.y]))"
    train, _, held_out = page.execute_script(read)
    metrics = dpo_metrics(60, eval_every=20)
    assert [tuple(point) for point in train] == [(m["step"], pytest.approx(m["loss"], rel=1e-6)) for m in metrics]
    assert held_out.pop(0) == [0, pytest.approx(0.693)]
    assert [tuple(point) for point in held_out] == [(step, pytest.approx(0.6 - 0.001 * step)) for step in (20, 40, 60)]


def test_texts_of_the_run_run_nothing(show):
    page = show("two")
    page.execute_script("Plotly.Fx.hover('loss-dpo-plot', [{curveNumber: 0, pointNumber: 3}])")
    shown = page.execute_script("return document.querySelector('#loss-dpo-plot .hoverlayer').textContent")
    assert EVIL_NAME in shown
    assert page.execute_script("return document.querySelectorAll('img').length") == 0
    assert page.execute_script("return window.hacked ?? null") is None
    assert EVIL_NAME in page.title


@pytest.mark.parametrize("width", [390, 1440])
def test_it_reads_well(show, width):
    for name in ("one", "two"):
        page = show(name, width=width)
        page.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert not page.execute_script(OVERFLOWS)
        beyond = """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&
                    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
        assert page.execute_script(beyond) == []
        small = """return [...document.querySelectorAll('body *')].filter(e => !e.matches('script')
                   && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
                   && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 90))"""
        assert page.execute_script(small) == []
        covered = """const box = e => e.getBoundingClientRect();
                     return [...document.querySelectorAll('.chart .keys')].filter(keys =>
                     box(keys).bottom > box(keys.nextElementSibling).top).length"""
        assert page.execute_script(covered) == 0
        inside = """return [...document.querySelectorAll('.plot')].filter(plot => {
                    const outer = plot.getBoundingClientRect();
                    const inner = plot.querySelector('.main-svg').getBoundingClientRect();
                    return Math.abs(inner.width - outer.width) > 1.5 || inner.height < 200}).length"""
        assert page.execute_script(inside) == 0


def test_charts_follow_the_window(show):
    page = show(width=1440)
    look(page, width=390)
    width = "return document.querySelector('.plot .main-svg').getBoundingClientRect().width"
    WebDriverWait(page, 30).until(lambda driver: driver.execute_script(width) < 390)
    assert not page.execute_script(OVERFLOWS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out(show, scheme):
    page = show("two", scheme=scheme)
    for selector in (
        "body", ".eyebrow", "nav a", ".badge.unfinished", "dt", ".note", ".lead", ".key", "thead th", "td small",
        ".answers .label", "footer p", ".plot .xtick text", ".plot .ytick text",
    ):  # fmt: skip
        assert contrast(*colours(page, selector)) >= 4.5, selector
    page = show("one", scheme=scheme)
    for selector in (".badge.finished", ".summary", ".tile small", ".tile .unit", ".change.better", ".change.worse"):
        assert contrast(*colours(page, selector)) >= 4.5, selector
    card = colours(page, ".chart")[1]
    style = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
    for number in range(int(page.execute_script(style, "--colours"))):
        assert contrast(rgb(page.execute_script(style, f"--c{number}")), card) >= 3, number


def test_colours_follow_the_scheme_without_a_reload(show):
    page = show(scheme="light")
    read = """const line = document.querySelector('#loss-dpo-plot .scatterlayer .js-line');
              return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke,
                      getComputedStyle(document.querySelector('#loss-dpo-plot .xtick text')).fill]"""
    light = page.execute_script(read)
    look(page, scheme="dark")
    dark = page.execute_script(read)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert sum(rgb(light[0])) > 600 > 150 > sum(rgb(dark[0]))


def test_a_key_hides_its_lines(show):
    page = show()
    visible = "return document.getElementById('loss-dpo-plot')._fullData.map(trace => trace.visible)"
    assert page.execute_script(visible) == [True, True, True]
    key = page.find_element("css selector", "#loss-dpo .key")
    key.send_keys("\n")  # by the keyboard
    assert key.get_attribute("aria-pressed") == "false"
    assert page.execute_script(visible) == [False, False, True]
    key.click()
    assert page.execute_script(visible) == [True, True, True]


def test_screen_readers_are_told(show):
    page = show()
    assert page.execute_script("return document.documentElement.lang") == "en"
    label = page.execute_script("return document.getElementById('loss-dpo-plot').getAttribute('aria-label')")
    assert label == (
        "Preference loss. train: from 0.693 at step 1 to 0.103 at step 60. "
        "held-out: from 0.693 at step 0 to 0.540 at step 60."
    )
    levels = page.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert page.execute_script("return [...document.querySelectorAll('.plot')].every(p => p.ariaLabel)")
