"""lm-eval's results as figures and as a table beside Zephyr and Notus."""

from notus.evaluation.open_llm.suite import BENCHMARKS, figures, markdown

RESULTS = {
    "results": {
        "arc_challenge": {"alias": "arc", "acc,none": 0.5, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
        "mmlu": {"alias": "mmlu", "acc,none": 0.6103, "acc_stderr,none": 0.004},
        "mmlu_stem": {"acc,none": 0.5},
        "mmlu_a": {"acc,none": 0.5},
        "mmlu_b": {"acc,none": 0.7},
        "truthfulqa_mc2": {"acc,none": 0.55, "acc_stderr,none": "N/A"},
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
    },
    "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_b"], "mmlu_stem": ["mmlu_a"], "gsm8k": []},
    "n-shot": {"arc_challenge": 25, "mmlu_a": 5, "mmlu_b": 5, "truthfulqa_mc2": 0, "gsm8k": 5},
    "n-samples": {
        name: {"original": 9, "effective": count}
        for name, count in {"arc_challenge": 4, "mmlu_a": 3, "mmlu_b": 2, "truthfulqa_mc2": 8, "gsm8k": 7}.items()
    },
    "configs": {},
}


def test_the_leaderboards_tasks_have_one_figure_each():
    found = figures(RESULTS, ["arc_challenge", "mmlu", "truthfulqa_mc2", "gsm8k"])
    assert [(figure.name, figure.metric, round(figure.value, 6), figure.stderr) for figure in found] == [
        ("ARC-Challenge", "acc_norm", 60.0, 1.0),
        ("MMLU", "acc", 61.03, 0.4),
        ("TruthfulQA", "acc", 55.0, None),
        ("GSM8K", "exact_match (strict-match)", 10.0, None),
    ]
    assert [(figure.count, figure.setup) for figure in found] == [
        (4, "25-shot"),
        (5, "5-shot"),
        (8, "0-shot"),
        (7, "5-shot"),
    ]
    assert found[1].reference == {"Zephyr-7B-beta": 61.07, "Notus 7B v1": 63.03}


def test_what_is_no_share_of_one_is_not_made_percent_of():
    """lm-eval gives the f1 of squadv2 and the em of scrolls in %, even where that is less than 1."""
    measured = {"squadv2": {"f1,none": 0.8, "exact,none": 61.0}, "scrolls_quality": {"em,none": 52.5, "acc,none": 0.5}}
    measured["own"] = {"em,none": 1.0, "f1,none": 42.0, "f1_stderr,none": 2.0}
    rest = {key: {name: {"effective": 3} for name in measured} for key in ("n-samples", "n-shot")}
    found = figures({"results": measured, "configs": {name: {} for name in measured}, **rest}, list(measured))
    assert [(figure.name, figure.metric, figure.value, figure.unit) for figure in found] == [
        ("squadv2", "f1", 0.8, "%"),
        ("squadv2", "exact", 61.0, ""),
        ("scrolls_quality", "em", 52.5, "%"),
        ("scrolls_quality", "acc", 50.0, "%"),
        ("own", "em", 100.0, "%"),
        ("own", "f1", 42.0, ""),
    ]
    assert found[-1].stderr == 2.0


def test_table():
    table = markdown("mine", figures(RESULTS, ["arc_challenge", "truthfulqa_mc2"]), limit=4)
    assert table.splitlines()[:4] == [
        "| benchmark | measure | examples | mine | Zephyr-7B-beta | Notus 7B v1 |",
        "|---|---|---:|---:|---:|---:|",
        "| ARC-Challenge | acc_norm, 25-shot | 4 | 60.00 % ± 1.00 | 62.03 | 64.59 |",
        "| TruthfulQA\\* | acc, 0-shot | 8 | 55.00 % | 57.45 | 54.37 |",
    ]
    assert "\\* TruthfulQA is contaminated: UltraFeedback" in table
    assert table.endswith("the first 4 examples of each task alone.\n")
    assert "contaminated" not in markdown("mine", figures(RESULTS, ["arc_challenge"]))


def test_shots_measures_and_names_are_the_leaderboards():
    assert [(item.task, item.shots, item.metric) for item in BENCHMARKS] == [
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("mmlu", 5, "acc"),
        ("truthfulqa_mc2", 0, "acc"),
        ("winogrande", 5, "acc"),
        ("gsm8k", 5, "exact_match"),
        ("drop", 3, "f1"),
    ]
