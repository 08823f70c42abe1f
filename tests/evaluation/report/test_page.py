"""What stands in the page, read without a browser: figures, tables, escaping, and what is left out."""

import base64
import hashlib
import json
import re
import sys

import numpy as np
import pytest
from report_runs import dpo_metrics, label_metrics, list_metrics, sft_metrics

from notus.__main__ import main
from notus.evaluation.formatting import number
from notus.evaluation.read_run import read_runs
from notus.evaluation.report.page import COLOURS, render
from notus.evaluation.results import Figure, Result, write_result

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
HISTOGRAM = {"edges": [0, 10, 20, 30], "counts": [1, 6, 3]}
DATA = {
    "train": {
        "rows": 10,
        "report": {"read": 14, "dropped": {"empty completion": 4}, "prompts_cut": 2, "kept": 10},
        "lengths": {"prompt": HISTOGRAM, "chosen": HISTOGRAM, "rejected": HISTOGRAM},
        "ratings": {"chosen": HISTOGRAM, "rejected": HISTOGRAM},
        "sources": {"sharegpt": 7, "flan": 3},
    },
    "eval": None,
}
COMPARED = {"count": 10, "accuracy": 0.8, "accuracy_interval": [0.49, 0.943]}
DETAILS = {
    "calibration": {
        "bins": [{"confidence": 0.6, "frequency": 0.7, "interval": [0.4, 0.9]}],
        "ece": 0.1, "brier": 0.2, "best_beta": None,
    },
    "by_source": [{"source": "sharegpt", **COMPARED}],
    "by_length": [{"low": 8, "high": 15, **COMPARED}],
    "length_bias": None,
    "kl": {"per_sequence": 3.5, "per_token": 0.25},
}  # fmt: skip


def page_of(*folders):
    return render(read_runs([str(folder) for folder in folders]))


def figures_of(page):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)[1])


def text_of(page):
    """The page's own text, without its scripts and styles, in one line."""
    own = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", own.replace("<wbr>", "")).split())


def values(array):
    if isinstance(array, dict):
        array = np.frombuffer(base64.b64decode(array["bdata"]), dtype=np.dtype(array["dtype"]))
    return np.asarray(array)


def lines(figures, name):
    return [(values(trace["x"]), values(trace["y"])) for trace in figures[name]["data"]]


def test_curves_have_the_runs_values(make_run):
    metrics = dpo_metrics(20, eval_every=10)
    figures = figures_of(page_of(make_run(metrics=metrics, dpo__beta=0.5)))
    (steps, loss), _, (eval_steps, eval_loss) = lines(figures, "loss-dpo")  # the second is the first one's mean
    assert steps.tolist() == list(range(1, 21))
    np.testing.assert_allclose(loss, [line["loss"] for line in metrics], rtol=1e-6)
    assert eval_steps.tolist() == [10, 20]
    np.testing.assert_allclose(eval_loss, [0.59, 0.58], rtol=1e-6)
    # drift is reward / β: at step 20 0.02 * 19 / 0.5 and -0.03 * 19 / 0.5
    chosen, _, rejected, _ = lines(figures, "drift")
    np.testing.assert_allclose([chosen[1][-1], rejected[1][-1]], [0.76, -1.14], rtol=1e-6)


def test_a_long_curve_is_shown_with_its_moving_mean(make_run):
    figure = figures_of(page_of(make_run(metrics=dpo_metrics(60))))["margins"]
    raw, calm = figure["data"]
    assert raw["opacity"] < 1
    assert calm["hoverinfo"] == "skip"
    np.testing.assert_allclose(values(raw["y"]), [0.05 * step for step in range(60)], rtol=1e-6, atol=1e-9)


def test_the_key_has_the_moving_means_end(make_run):
    metrics = dpo_metrics(60, eval_every=30)
    metrics[-1]["rewards/accuracies"] = 0.9  # of a last step of two pairs, say
    before = [line["rewards/accuracies"] for line in metrics[-3:-1]]
    page = page_of(make_run(metrics=metrics))
    calm = values(figures_of(page)["accuracy"]["data"][1]["y"])
    # 5% of 60 points on either side together: at the end the last of them and two before
    assert calm[-1] == pytest.approx((sum(before) + 0.9) / 3)
    assert number(float(calm[-1]), "share") in text_of(page)


def test_runs_of_two_tasks_share_the_charts_that_both_have(make_run):
    page = page_of(make_run("sft", "sft", metrics=sft_metrics(10)), make_run("dpo"))
    figures = figures_of(page)
    assert len(figures["learning-rate"]["data"]) == 2
    assert {trace["meta"]["colour"] for trace in figures["learning-rate"]["data"]} == {0, 1}
    assert [trace["name"] for trace in figures["loss-sft"]["data"]] == ["sft, train"]  # other quantities, other axes
    assert [trace["name"] for trace in figures["loss-dpo"]["data"]] == ["dpo, train"]
    assert "logps-chosen" in figures
    assert "logps-rejected" in figures
    assert "Settings that differ" in text_of(page)
    for chart in figures.values():  # colour is never the only sign
        looks = [(t["marker"]["symbol"], t["line"]["dash"]) for t in chart["data"] if t.get("hoverinfo") != "skip"]
        assert len(set(looks)) == len(looks)


def test_names_break_at_their_joints(make_run):
    run = make_run(model__name_or_path="runs/<b>/sft_model")
    assert "<dd>runs/&lt;b&gt;/<wbr>sft_<wbr>model</dd>" in page_of(run)


def test_headline_figures(make_run):
    text = text_of(page_of(make_run(metrics=dpo_metrics(20, eval_every=10), finished=False, training__epochs=3)))
    assert "Held-out accuracy 75.0% at step 20" in text
    assert "Held-out reward margin 0.250 at step 20" in text
    assert "Held-out loss 0.580 at step 20" in text
    # ln 2 falls by 0.01 a step; the mean of the last two of 20 is ln 2 - 0.185
    assert "Training loss 0.508 ▼ −0.185 from 0.693 at the start at step 20, moving mean" in text
    assert "Chosen log-prob change +3.80 nats per answer, training" in text  # 0.02 * 19 / β
    assert "Speed 50.5 pairs/s median" in text  # of 41 to 60
    assert "DPO of all weights, from base: 20 of 30 steps of 4 pairs" in text
    assert "unfinished" in text
    assert text.index("Held-out accuracy") < text.index("Learning rate") < text.index("Settings that are not")


def with_start(folder, **values):
    """A run's folder with the evaluation before training."""
    start = {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0, **values}
    (folder / "initial_evaluation.json").write_text(json.dumps({"step": 0, **start}))
    return folder


def test_the_start_is_the_baseline_of_held_out_figures(make_run):
    page = page_of(with_start(make_run(metrics=dpo_metrics(20, eval_every=20))))
    text = text_of(page)
    assert "Held-out accuracy 75.0% ▲ +25.0 points from 50.0% at the start at step 20" in text
    assert "Held-out reward margin 0.250 ▲ +0.250 from 0 at the start" in text
    assert "Held-out loss 0.580 ▼ −0.113 from 0.693 at the start" in text
    # with the training loss, and without the margin, of which more is not better
    assert page.count('class="change better"') == 3
    steps, accuracies = lines(figures_of(page), "accuracy")[2]
    assert (steps.tolist(), accuracies.tolist()) == ([0, 20], [0.5, 0.75])  # a line, and no lone square
    worse = page_of(with_start(make_run("worse", metrics=dpo_metrics(20, eval_every=20)), eval_loss=0.25))
    assert "Held-out loss 0.580 ▲ +0.330 from 0.250 at the start" in text_of(worse)
    assert worse.count('class="change worse"') == 1


def test_held_out_figures_are_those_of_the_exported_model(make_run):
    metrics = dpo_metrics(30, eval_every=10)  # the loss falls, the accuracies are made here
    for line, accuracy in zip(metrics[9::10], (0.7, 0.8, 0.6), strict=True):
        line["eval_rewards/accuracies"] = accuracy
    more = {"training__best_metric": "eval_rewards/accuracies", "training__eval_every": 10, "data__eval_size": 4}
    run = with_start(make_run(metrics=metrics, **more), **{"eval_rewards/accuracies": 0.9})
    text = text_of(page_of(run))
    assert "Held-out accuracy 80.0% ▼ −10.0 points from 90.0% at the start at step 20, whose model is exported" in text
    assert "Held-out loss 0.580 ▼ −0.113 from 0.693 at the start at step 20" in text
    unfinished = make_run("unfinished", metrics=metrics, finished=False, **more)
    assert "Held-out accuracy 60.0% at step 30" in text_of(page_of(unfinished))


def test_an_evaluation_of_the_held_out_rows_gives_the_interval(make_run):
    run = with_start(make_run(metrics=dpo_metrics(20, eval_every=20)))
    accuracy = Figure("reward accuracy", "accuracy", 80.0, "%", 4.0, 100, "beta 0.1, against base")
    details = {"overall": {"accuracy_interval": [0.711, 0.867]}}
    of_run = {"base": "base", "pairs": "other.jsonl", "ranked_by": "rewards"}
    result = Result("preferences", str(run), [accuracy], of_run, details)
    write_result(run / "evaluations" / "preferences", result)
    assert "Held-out accuracy 75.0%" in text_of(page_of(run))  # of other rows
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("eval: null", "eval: [{path: other.jsonl, split: train, weight: 1.0}]")
    )
    told = "Held-out accuracy 80.0% ▲ +30.0 points from 50.0% at the start 95% interval: 71.1% to 86.7% 100 pairs"
    assert told in text_of(page_of(run))
    early = Result("preferences", f"{run} (step 10)", [accuracy], of_run, details)
    write_result(run / "evaluations" / "preferences", early)
    assert "Held-out accuracy 75.0%" in text_of(page_of(run))  # of an earlier step


def test_only_settings_off_their_default_are_listed_before_all_of_them(make_run):
    page = page_of(make_run(dpo__beta=0.3))
    text = text_of(page)
    listed = text[text.index("Settings that are not at their default") : text.index("All settings")]
    assert "dpo.beta 0.3 0.1" in listed
    assert "training.precision fp32 bf16" in listed
    assert "training.seed" not in listed
    assert "seed: 42" in text[text.index("All settings") :]


def test_equal_histograms_are_drawn_once(make_run):
    figures = figures_of(page_of(make_run("one", data=DATA)))
    assert [trace["name"] for trace in figures["lengths"]["data"]] == ["prompt, chosen and rejected"]
    train = {**DATA["train"], "lengths": {"prompt": HISTOGRAM, "chosen": {"edges": [0, 10], "counts": [10]}}}
    first, second = make_run("two", data={"train": train}), make_run("three", data={"train": train}, dpo__beta=0.3)
    page = page_of(first, second)
    assert [trace["name"] for trace in figures_of(page)["lengths"]["data"]] == ["prompt", "chosen"]  # of both runs
    assert text_of(page).count("sharegpt") == 1
    third = page_of(first, make_run("four", data=DATA, dpo__beta=0.3))
    assert [trace["name"] for trace in figures_of(third)["lengths-prompt"]["data"]] == ["beta 0.1 and beta 0.3"]
    assert len(figures_of(third)["lengths-chosen"]["data"]) == 2


def test_results_of_several_runs_side_by_side(make_run):
    first = with_start(make_run("one", metrics=dpo_metrics(20, eval_every=20), dpo__beta=0.05))
    page = page_of(first, make_run("two", dpo__beta=0.1, finished=False))
    text = text_of(page)
    assert "beta 0.05 and beta 0.1" in text
    results = text[text.index("Results Run") : text.index("Settings that differ")]
    assert "Run Held-out accuracy Training accuracy Held-out reward margin" in results
    assert "one 75.0% ▲ +25.0 points –" in results
    assert "unfinished" in results
    assert "dpo.beta 0.05 0.1" in text


def test_data_and_environment(make_run):
    environment = {"hardware": "2 x A100", "seconds": 6700.0, "versions": {"torch": "2.13.0", "numpy": "2"}}
    page = page_of(make_run(data=DATA, environment=environment))
    text = text_of(page)
    assert "Training time 1 h 52 min 2 x A100" in text
    assert "Hardware 2 x A100 Versions torch 2.13.0" in text
    assert "read 14 kept 10 dropped: empty completion 4 prompts cut to length 2 used 10" in text
    assert "sharegpt 7 flan 3" in text
    ((edges, shares),) = lines(figures_of(page), "ratings")
    assert edges.tolist() == [0, 10, 20, 30]
    assert shares.tolist() == [0.1, 0.6, 0.3, 0.3]
    assert [trace["name"] for trace in figures_of(page)["lengths"]["data"]] == ["prompt, chosen and rejected"]


def test_evaluations_beside_published_figures(make_run):
    first, second = make_run("one"), make_run("two")
    for folder, value in ((first, 62.5), (second, 64.0)):
        arc = Figure("ARC", "acc_norm", value, "%", 1.25, 1172, "25-shot", reference={"Zephyr": 62.03})
        write_result(folder / "evaluations" / "open-llm", Result("open-llm", str(folder), [arc], {}))
    margin = Figure("margin", "margin", -0.5, stderr=0.0123, setup="against /home/me/runs/sft/model")
    write_result(
        second / "evaluations" / "preferences",
        Result("preferences", "two", [margin], {"base": "runs/sft/model"}, DETAILS),
    )
    page = page_of(first, second)
    text = text_of(page)
    assert "one two Zephyr ARC acc_norm, 25-shot 62.5% ± 1.2% n = 1,172 64.0% ± 1.2% n = 1,172 62.0%" in text
    assert "margin against …/sft/model −0.500 ± 0.012" in text
    assert "3.50 nats per answer, from runs/sft/model" in text
    assert "sharegpt two 80.0% 49–94%, n = 10" in text
    assert "KL to the base per token, nats, sampled 0.250" in text
    assert "β at which" not in text  # there is none
    assert len(figures_of(page)["calibration"]["data"]) == 2


def test_samples_before_and_after_and_of_two_runs(make_run):
    def samples(word):
        return [
            {"step": step, "index": index, "prompt": f"prompt {index}", "completion": f"{word} {step}.{index}"}
            for step in (0, 5, 10)
            for index in range(5)
        ]

    first, second = make_run("one", samples=samples("uno")), make_run("two", samples=samples("due"))
    alone = text_of(page_of(first))
    assert "Prompt prompt 0 Before training uno 0.0 After step 10 uno 10.0" in alone
    assert "uno 5." not in alone
    assert "1 more" in alone
    assert "Prompt prompt 4 one, step 10 uno 10.4 two, step 10 due 10.4" in text_of(page_of(first, second))


def test_while_samples_are_written_and_with_one_step_only(make_run):
    sample = {"step": 0, "index": 0, "prompt": "p", "completion": ""}
    assert "Prompt p Before training (no text)" in text_of(page_of(make_run("a", samples=[sample])))
    half = [sample, {**sample, "index": 1, "prompt": "q"}, {**sample, "step": 9, "completion": "x"}]
    text = text_of(page_of(make_run("b", samples=half)))
    assert "After step 9 x" in text
    assert "Prompt q" not in text


def test_what_is_not_there_has_no_section(make_run):
    folder = make_run(
        data={
            "train": {
                "rows": 3,
                "report": {},
                "lengths": {"prompt": {"edges": [0, 1], "counts": [0]}},
                "ratings": None,
                "sources": None,
            }
        }
    )
    page = page_of(folder)
    assert 'id="data"' in page
    assert "lengths" not in figures_of(page)
    assert "Sources" not in text_of(page)
    (folder / "data.json").unlink()
    (folder / "metrics.jsonl").write_text("")
    page = page_of(folder)
    for section in ("training", "data", "evaluation", "samples"):
        assert f'id="{section}"' not in page
        assert f'href="#{section}"' not in page
    assert 'class="tiles"' not in page


def test_texts_of_the_run_stay_texts(make_run):
    evil = {"step": 0, "index": 0, "prompt": EVIL, "completion": EVIL}
    data = {"train": {**DATA["train"], "sources": {EVIL: 3}}, "eval": None}
    run = make_run("<img src=x onerror=hacked=3>", samples=[evil], data=data, environment={"hardware": EVIL})
    other = make_run("b")
    result = Result("preferences", EVIL, [Figure(EVIL, EVIL, 1.0, reference={EVIL: 1.0})], {}, DETAILS)
    write_result(run / "evaluations" / "preferences", result)
    page = page_of(run, other)
    assert page.count("<script") == 3 + page.count('"<script')
    assert "<img" not in page.split("<script")[0]
    assert EVIL not in page
    names = {trace.get("name") for trace in figures_of(page)["loss-dpo"]["data"]}
    assert "&lt;img src=x onerror=hacked=3&gt;, train" in names  # plotly reads names as HTML of a kind


def test_only_the_scripts_of_the_page_are_allowed(make_run):
    page = page_of(make_run())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src {allowed};" in policy


def test_the_command_writes_and_replaces_its_own_report_alone(make_run, tmp_path, monkeypatch, capsys):
    first, second = make_run("one"), make_run("two")
    assert main(["report", str(first)]) == 0
    assert main(["report", str(first)]) == 0
    assert (first / "report.html").read_text().startswith("<!doctype html>")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "two"]) == 0
    assert (tmp_path / "report.html").is_file()
    (second / "notes.html").write_text("mine")
    assert main(["report", "two", "--output", "two/notes.html"]) == 1
    assert (second / "notes.html").read_text() == "mine"
    assert "that is no report" in capsys.readouterr().err
    assert main(["report", "two", "--output", "two/figures.json"]) == 1
    assert "two/figures.json: the result is HTML; " in capsys.readouterr().err
    assert main(["report", "two", "--output", str(tmp_path)]) == 1
    assert main(["report", "two", "--output", str(second / "notes.html" / "x.html")]) == 1
    assert "choose another place with --output" in capsys.readouterr().err
    assert main(["report", "nothing"]) == 1
    assert not (tmp_path / "nothing").exists()


def test_without_plotly_it_says_what_to_install(make_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["report", str(make_run())]) == 1
    assert "pip install plotly" in capsys.readouterr().err


def test_a_run_of_lists(make_run):
    loss = {"plackett_luce": 1.0, "all_pairs": 0.5}
    run = make_run(metrics=list_metrics(20), dpo__loss_type=loss)
    ranking = {"prompts": 10, "kendall_tau": 0.5, "top_1": 0.6, "top_1_chance": 0.25}
    tau = Figure("reward Kendall's τ", "kendall_tau", 0.5, stderr=0.1, count=10)
    details = {**DETAILS, "by_longer": [{"longer": "chosen", **COMPARED}], "ranking": ranking}
    write_result(run / "evaluations" / "preferences", Result("preferences", "m", [tau], {}, details))
    page = page_of(run)
    figures, text = figures_of(page), text_of(page)
    np.testing.assert_allclose(lines(figures, "tau")[0][1], [0.02 * step for step in range(20)], atol=1e-7)
    assert {name for name in figures if name.startswith(("loss", "accuracy", "margins", "drift", "lists-per"))} == {
        "loss-lists", "accuracy-lists", "margins-lists", "drift-lists", "lists-per-second"
    }  # fmt: skip
    assert {trace["name"] for trace in figures["components"]["data"]} == {"plackett_luce, train", "all_pairs, train"}
    assert "Preference optimization with lists, of all weights" in text
    assert "1 plackett_luce + 0.5 all_pairs, β = 0.1" in text
    assert "4 lists a step" in text
    assert "Held-out Kendall&#39;s τ 0.500 ± 0.10 n = 10" not in text
    assert "Held-out Kendall&#39;s τ 0.500 at step 20" in text
    assert "Top-1 accuracy of a random choice 0.250" in text
    assert "better rated is longer 80.0%" in text
    own = text.replace("pairs.jsonl", "").replace("all_pairs", "").partition("Settings 20")[0]
    assert "over pairs" not in own
    assert "ln 2" not in own


def test_a_run_of_labels(make_run):
    data = {"train": {"rows": 10, "report": {"read": 10, "left_out": 2}, "labels": {"true": 6, "false": 4}}}
    run = make_run(metrics=label_metrics(20), dpo__loss_type="kto", data=data)
    row = {"count": 10, "accuracy": 0.7, "accuracy_interval": [0.4, 0.9]}
    rows = [
        {"low": 2, "high": 3, **row, "auc": 0.875, "auc_interval": [0.8, 0.9]},
        {"low": 4, "high": 7, **row, "auc": None, "auc_interval": None},
    ]
    details = {"by_source": None, "by_length": rows, "by_longer": None, "calibration": None, "ranking": None}
    auc = Figure("reward AUC", "auc", 0.9, count=10)
    write_result(run / "evaluations" / "preferences", Result("preferences", "m", [auc], {}, details))
    page = page_of(run)
    figures, text = figures_of(page), text_of(page)
    np.testing.assert_allclose(lines(figures, "kl")[0][1], [0.125 * step for step in range(1, 21)], rtol=1e-6)
    assert {"loss-labels", "accuracy-labels", "margins-labels", "drift-labels"} <= set(figures)
    assert {trace["name"] for trace in figures["logps-labels"]["data"]} == {"good, train", "bad, train"}
    assert "AUC by length of the answer" in text
    assert "2 to 3 tokens 87.5% 80–90%, n = 10" in text
    assert "4 to 7 tokens" not in text
    assert "of them good 6 of them bad 4" in text
    assert "4 labelled completions a step" in text


def test_a_loss_without_a_reference_has_no_drift_from_one(make_run):
    page = page_of(make_run(dpo__loss_type="simpo", dpo__beta=2.0))
    assert "drift" not in figures_of(page)
    assert "margins" in figures_of(page)
    text = text_of(page)
    assert "simpo, β = 2, simpo_gamma = " in text
    assert "no reference" in text
    assert "Preference optimization with pairs, of all weights" in text


def test_runs_of_pairs_and_lists_beside_each_other(make_run):
    figures = figures_of(page_of(make_run("pairs"), make_run("lists", dpo__loss_type="all_pairs")))
    assert [trace["name"] for trace in figures["accuracy"]["data"]] == ["loss_type sigmoid, train"]
    assert [trace["name"] for trace in figures["accuracy-lists"]["data"]] == ["loss_type all_pairs, train"]
    assert len(figures["grad-norm"]["data"]) == 2


def test_a_long_run_gives_a_small_file(make_run):
    long, short = make_run("long", metrics=dpo_metrics(20_000, eval_every=100)), make_run("short")
    assert len(page_of(long)) - len(page_of(short)) < 500_000


@pytest.mark.parametrize(
    ("file", "tree"),
    [
        ("data.json", {"train": {"rows": 5, "lengths": {"prompt": {"edges": [1, 2]}}}}),
        ("data.json", {"train": [1]}),
        ("environment.json", {"seconds": "long"}),
        ("evaluations/preferences/result.json", {"figures": [{"name": "a", "metric": "b", "value": None}]}),
        ("evaluations/preferences/result.json", {"details": {"calibration": {"bins": [{"confidence": 0.5}]}}}),
    ],
)
def test_what_another_version_or_a_fault_left_is_named_in_one_line(make_run, capsys, file, tree):
    folder = make_run()
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "result.json":
        tree = {"suite": "preferences", "model": "m", "figures": [], "settings": {}, "date": "2026-01-01", **tree}
    path.write_text(json.dumps(tree))
    assert main(["report", str(folder)]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert path.name in told
    assert str(folder) in told
    assert not (folder / "report.html").exists()


def test_half_a_character_does_not_stop_the_report(make_run):
    folder = make_run(samples=[{"step": 0, "index": 0, "prompt": "p\ud800q", "completion": "a"}])
    assert main(["report", str(folder)]) == 0
    assert "p?q" in (folder / "report.html").read_text(encoding="utf-8")


def test_no_two_of_many_runs_share_colour_and_symbol(make_run):
    runs = [make_run(f"run-{i}", metrics=dpo_metrics(3)) for i in range(9)]
    page = page_of(*runs)
    looks = {
        (trace["meta"]["colour"] % COLOURS, trace["marker"]["symbol"]) for trace in figures_of(page)["accuracy"]["data"]
    }
    assert len(looks) == 9
    assert re.search(r"<h1>(.*?)</h1>", page)[1].strip() == "9 runs"  # their names would fill a screen
    assert re.search(r"<title>(.*?)</title>", page)[1] == "9 runs · Notus report"


def test_the_start_is_no_result_of_a_run_that_trains(make_run):
    run = with_start(make_run(metrics=dpo_metrics(3), finished=False))
    text = text_of(page_of(run))
    assert "Training accuracy" in text
    assert "Held-out accuracy" not in text
    (run / "metrics.jsonl").write_text("")
    assert "Held-out accuracy 50.0%" in text_of(page_of(run))
