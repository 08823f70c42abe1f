"""The page across rounds: its figures, its links, what unfinished iterations show, and that data runs nothing in it."""

import json
import re

import pytest
from browsers import OVERFLOWS, forget_logs, look, needs_browser, open_browser, requests_of
from report_runs import write_run
from round_folders import CONFIG, completion, rate_summary, record, write_iteration, write_lines, write_object

from notus.__main__ import main
from notus.evaluation.html import security_policy
from notus.feedback import rounds
from notus.feedback.report import read_iteration, read_samples, render
from notus.feedback.round_charts import CHARTS, at_path, figure_of, round_panels

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(autouse=True)
def _without_plotly(request, monkeypatch):
    """Leave the 4 MB of plotly out of the pages that no browser draws."""
    if "browser" not in request.node.name:
        monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "// plotly")


def page_of(folder):
    return render(read_iteration(folder), folder)


def figures_of(page):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)[1])


def text_of(page):
    """The page's own text, without its scripts and styles, in one line."""
    own = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", own.replace("<wbr>", "")).split())


def sums(folder, number, **parts):
    """Change what is known of a round in its round.json."""
    path = folder / f"round-{number}" / "round.json"
    tree = json.loads(path.read_text())
    for part, changes in parts.items():
        tree[part] = None if changes is None else {**(tree[part] or {}), **changes}
    path.write_text(json.dumps(tree))


def test_headlines_are_those_of_the_last_round(tmp_path):
    folder = write_iteration(tmp_path / "own")
    sums(folder, 1, comparison={"win_rate": 0.25})
    text = text_of(page_of(folder))
    assert "own finished 2 rounds of sampling, rating and DPO, from models/start. The result is the model of" in text
    # of four prompts two are won, one is lost, one is tied; the interval is checked where it is computed
    assert "Win rate against the start 62.5% 95% interval: 21.9% to 90.8% round 2, 4 prompts" in text
    assert "4 prompts 2 won, 1 lost, 1 tied, of these 1 the same text" in text
    assert "Mean rating 3.38 ▲ +0.625 from 2.75 at the start round 2" in text
    assert "KL to the start 1.50 ± 0.25 nats per completion, round 2 25% of the samples were cut" in text
    assert "Length 1.75 ▲ +0.500 from 1.25 at the start" in text
    # of two rounds, each with two ratings: 2 · (0.25 + 0.5) dollars, 2 · (3 + 4) requests, 4 · 300 tokens and 4 · 60
    assert "Judge, in all $1.50 14 requests 16 completions rated 1,200 tokens read, 240 written 6 s" in text
    assert "Pairs, in all 6 from 4 prompts" in text  # three of each round's two prompts, as the folder has it


def test_a_row_for_each_round(tmp_path):
    folder = write_iteration(tmp_path / "own")
    sums(folder, 2, pairs={"rows": 5, "old": 2})
    text = text_of(page_of(folder))
    assert "Start – 2.75 – 1.25 100.0%" in text
    assert (
        "Round 1 62.5% 21.9% to 90.8% 3.38 start 2.75 1.50 ± 0.25 1.75 100.0% 25.0% 3 of 2 prompts 2.17 $0.75" in text
    )
    assert "25.0% 5 2 of earlier rounds 2.17 $0.75" in text
    assert "Pairs, in all 6" in text  # those of earlier rounds count once


def test_charts_have_the_rounds_values(tmp_path):
    folder = write_iteration(tmp_path / "own")
    sums(folder, 2, comparison={"win_rate": 0.75, "interval": [0.5, 0.875]}, evaluation={"kl": 2.5, "kl_stderr": None})
    figures = figures_of(page_of(folder))
    (line, level) = figures["win-rate"]["data"]
    assert (line["x"], line["y"]) == ([1, 2], [0.625, 0.75])
    assert line["error_y"]["array"][1] == 0.125
    assert line["error_y"]["arrayminus"][1] == 0.25
    assert level["y"] == [0.5, 0.5]
    (kl,) = figures["kl"]["data"]
    assert kl["y"] == [1.5, 2.5]
    assert kl["error_y"]["array"] == pytest.approx([1.959964 * 0.25, 0])  # that of the second is not known
    answers, sampled = figures["length"]["data"]
    assert (answers["x"], answers["y"]) == ([0, 1, 2], [1.25, 1.75, 1.75])  # from the start on
    assert (sampled["x"], sampled["y"]) == ([1, 2], [2.0, 2.0])
    assert [trace["y"] for trace in figures["distinct"]["data"]] == [
        pytest.approx([4 / 5, 6 / 7, 6 / 7]), [1.0, 1.0, 1.0], [1.0, 1.0],  # the start wrote no three words
    ]  # fmt: skip
    assert [trace["y"] for trace in figures["position"]["data"]] == [[1.5, 1.5], [0.5, 0.5], [1.0, 1.0]]  # by chance


def test_every_figure_of_the_charts_is_one_of_a_round(tmp_path):
    whole = rounds.summarise(write_iteration(tmp_path / "own") / "round-1")
    for chart in CHARTS:
        for figure in (*chart.lines, *chart.start.values(), *chart.stderr.values()):
            figure_of(whole, figure)  # a wrong name raises AttributeError
        assert any(figure_of(whole, figure) is not None for figure in chart.lines), chart.name
        assert {*chart.start, *chart.interval, *chart.stderr} <= chart.lines.keys()
        for figure in chart.interval.values():
            assert len(at_path(whole, figure)) == 2
    assert [panel.name for panel in round_panels({1: whole}, "rating")] == [chart.name for chart in CHARTS]
    assert round_panels({1: rounds.Round()}, "rating") == []


def test_an_iteration_that_has_just_begun(tmp_path):
    folder = write_iteration(tmp_path / "own", rounds=0)
    text = text_of(page_of(folder))
    assert "own unfinished 0 of 2 rounds" in text
    assert "No round has begun." in text
    (folder / "round-1").mkdir()
    write_lines(folder / "round-1" / "records.jsonl", [record("p", completion("m", "a"), completion("m", "b"))])
    text = text_of(page_of(folder))
    assert "Round 1 in progress" in text
    assert "Win rate" not in text.split("Settings")[0]


def test_a_round_in_progress_beside_a_finished_one(tmp_path):
    folder = write_iteration(tmp_path / "own", rounds=1)
    (folder / "round-2").mkdir()
    text = text_of(page_of(folder))
    assert "own unfinished 1 of 2 rounds" in text
    assert "Round 1 62.5%" in text
    assert "Round 2 in progress – – –" in text
    assert "round 1, 4 prompts" in text  # the headline is that of the last round with answers


@pytest.mark.parametrize(
    ("rule", "done", "said"),
    [
        ("stop_win_rate: 0.6", 1, "Stopped: round 1 wins 62.5% against the start, and iterate.stop_win_rate is 0.6. "
         "The result is the model of round 1"),
        ("stop_win_rate: 0.7", 1, "unfinished"),
        ("stop_kl: 1.2", 1, "Stopped: the KL of round 1 to the start is 1.5, above iterate.stop_kl=1.2. The result is "
         "the starting model"),
        ("stop_kl: 1.5", 1, "unfinished"),  # the KL is 1.5, not above it
        ("stop_kl: 1.5", 2, "Stopped: the KL of round 2 to the start is 1.75, above iterate.stop_kl=1.5. The "
         "result is the model of round 1"),
    ],
)  # fmt: skip
def test_why_it_stopped_and_what_the_result_is(tmp_path, rule, done, said):
    config = CONFIG.replace("rounds: 2", f"rounds: 3\n  {rule}")
    folder = write_iteration(tmp_path / "own", rounds=done, config=config)
    if done == 2:
        sums(folder, 2, evaluation={"kl": 1.75})
    assert said in text_of(page_of(folder))


def test_a_reward_model_gives_rewards(tmp_path):
    folder = write_iteration(tmp_path / "own", rounds=1)
    sums(
        folder, 1, comparison={"scale": "reward"}, rated={"scale": "reward"}, judging={"again": None, "position": None}
    )
    page = page_of(folder)
    assert "Mean reward 3.38" in text_of(page)
    assert "higher reward than the start&#39;s" in page
    assert {"agreement", "position"}.isdisjoint(figures_of(page))


def test_a_judge_without_requests_or_prices_is_shown_by_what_it_rated(tmp_path):
    folder = write_iteration(tmp_path / "own", rounds=1)
    free = {"requests": 0, "prompt_tokens": None, "completion_tokens": None, "cost": None}
    sums(folder, 1, judging=free, judging_of_answers=free)
    text = text_of(page_of(folder))
    assert "Judge, in all 8 completions rated 3 s" in text
    assert "$" not in text


def test_samples_are_the_answers_of_every_round(tmp_path):
    folder = write_iteration(tmp_path / "own")
    samples = read_samples(read_iteration(folder))
    assert [sample.prompt for sample in samples] == ["q1", "q2", "q3", "q4"]
    assert [(answer.name, answer.text) for answer in samples[0].answers] == [
        ("Start", "one two"),
        ("Round 1: 4.00, the start 2.00", "one two three"),
        ("Round 2: 4.00, the start 2.00", "one two three"),
    ]
    # four prompts evenly spread over ten, of which the last round has one twice; the first round lacks some
    last = [record(f"q{i}", completion("start", f"s{i}"), completion("now", f"n{i}")) for i in (*range(10), 5)]
    (folder / "round-2" / "compared.jsonl").unlink()
    write_lines(folder / "round-2" / "answers.jsonl", last)
    samples = read_samples(read_iteration(folder), count=4)
    assert [sample.prompt for sample in samples] == ["q0", "q2", "q5", "q8"]
    assert [answer.name for answer in samples[1].answers] == ["Start", "Round 1: 3.50, the start 3.00", "Round 2"]
    assert [(answer.name, answer.text) for answer in samples[2].answers] == [("Start", "s5"), ("Round 2", "n5")]


def test_links_lead_to_the_reports_of_the_rounds_runs(tmp_path):
    folder = write_iteration(tmp_path / 'a "b" #1')
    (folder / "round-2" / "run" / "report.html").write_text("")
    assert re.findall('<a href="([^#"]*)">', page_of(folder)) == ["round-2/run/report.html"]  # round 1 has none
    page = render(read_iteration(folder), tmp_path)
    assert re.findall('<a href="([^#"]*)">', page) == ["a%20%22b%22%20%231/round-2/run/report.html"]


def test_the_command_writes_the_page_of_an_iteration_and_the_report_of_a_run(tmp_path, capsys):
    folder, run = write_iteration(tmp_path / "own", rounds=1), write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert "Notus report across rounds" in (folder / "report.html").read_text()
    assert main(["report", str(folder)]) == 0  # an earlier report is replaced
    assert main(["report", str(run)]) == 0
    assert "Notus training report" in (run / "report.html").read_text()
    assert main(["report", str(folder), str(run)]) == 1
    assert "own: an iteration of rounds has a report of its own; name it alone" in capsys.readouterr().err
    (tmp_path / "mine.html").write_text("mine")
    assert main(["report", str(folder), "--output", str(tmp_path / "mine.html")]) == 1
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize("config", ["- a list\n", "iterate: 3\n"])
def test_a_damaged_config_is_named(tmp_path, config):
    folder = write_iteration(tmp_path / "own", rounds=0, config=config)
    with pytest.raises(ValueError, match=r"iterate\.yaml: not the config of an iteration"):
        read_iteration(folder)


def test_a_damaged_record_is_named(tmp_path):
    folder = write_iteration(tmp_path / "own", rounds=1)
    write_lines(folder / "round-1" / "compared.jsonl", [{"completions": []}])
    with pytest.raises(ValueError, match=r"compared\.jsonl, line 1: instruction is missing"):
        page_of(folder)


def write_evil(folder):
    """An iteration whose every string is hostile."""
    config = CONFIG.replace("rater", json.dumps(EVIL)).replace("models/start", json.dumps(EVIL))
    write_iteration(folder, config=config + f"# {EVIL}\n")
    for number in (1, 2):
        answers = record(EVIL, completion(EVIL, EVIL, 1.0), completion(EVIL, f"{EVIL} {'long ' * 400}", 2.0))
        write_lines(folder / f"round-{number}" / "compared.jsonl", [answers])
        write_object(folder / f"round-{number}" / "rated.summary.json", rate_summary(judge=EVIL))
        (folder / f"round-{number}" / "round.json").unlink()
    return folder


def test_what_the_data_say_stays_text(tmp_path):
    page = page_of(write_evil(tmp_path / "<img src=x onerror=window.hacked=3>"))
    assert "<script>window" not in page
    assert "<img" not in page
    assert "&lt;img src=x" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    assert f'content="{security_policy(scripts)}"'.replace("'", "&#39;") in page  # these two scripts and no other


@needs_browser
def test_the_page_in_a_browser(tmp_path):
    folder = write_evil(tmp_path / "<img src=x onerror=window.hacked=3>")
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    browser = next(opened := open_browser())
    try:
        for width in (390, 1440):
            look(browser, width=width)
            forget_logs(browser)
            browser.get((tmp_path / "page.html").as_uri())
            assert browser.execute_script("return failures") == []
            assert browser.get_log("browser") == []
            assert [url[:7] for url in requests_of(browser)] == ["file://"]  # the page itself
            assert not browser.execute_script(OVERFLOWS)
        drawn = "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg').length)"
        assert min(browser.execute_script(drawn)) > 0
        browser.execute_script("Plotly.Fx.hover('win-rate-plot', [{curveNumber: 0, pointNumber: 1}])")
        shown = browser.execute_script("return document.querySelector('#win-rate-plot .hoverlayer').textContent")
        assert "win rate(2, 100.0%" in shown
        assert browser.execute_script("return window.hacked ?? null") is None
        assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    finally:
        next(opened, None)
