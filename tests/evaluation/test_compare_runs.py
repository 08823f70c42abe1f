"""Which of several runs is the best; the table itself is tested with the sweep."""

import pytest
from report_runs import write_run

from notus.evaluation.compare_runs import Measure, Row, higher_is_better, read_rows, sorted_rows, table

ACCURACY = "eval_rewards/accuracies"


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("loss", False), ("eval_loss/ipo", False), ("eval_rewards/accuracies", True), ("eval_kl", None), ("epoch", None)],
)
def test_which_end_of_a_metric_is_the_better_one(metric, higher):
    assert higher_is_better(metric) is higher


def test_a_run_is_ranked_by_the_model_that_it_exported():
    accuracy = {"a": Measure(0.6, 0.9, 2), "b": Measure(0.7, 0.8, 2)}
    for best_metric, order in ((None, "ba"), (ACCURACY, "ab"), ("eval_loss", "ba")):
        tree = {"training": {"best_metric": best_metric}}
        rows = [Row(name, "finished", tree, {ACCURACY: found}) for name, found in accuracy.items()]
        assert "".join(row.name for row in sorted_rows(rows, ACCURACY)) == order


def test_the_model_before_training_is_no_result(tmp_path):
    metrics = [{"step": step, "eval_loss": loss} for step, loss in ((2, 0.9), (4, 0.8))]
    run = write_run(tmp_path / "run", metrics=metrics)
    (run / "initial_evaluation.json").write_text('{"step": 0, "eval_loss": 0.7}')
    (row,) = read_rows(tmp_path, {"run": {}}, ())
    assert row.metrics["eval_loss"] == Measure(0.8, 0.8, 4)


def test_keys_that_end_alike_are_shown_in_full():
    rows = [Row("a", "finished", {}, {})]
    settings = {"lora.alpha": [16.0], "dpo.options": [{"alpha": 1.0}], "dpo.alpha": [2.0]}
    assert table(rows, settings, None).splitlines()[0].split()[:3] == ["lora.alpha", "options", "dpo.alpha"]
