"""AlpacaEval's scores by hand and as the package computes them; files that hold something else are refused."""

import json
import random
import re

import pytest

from notus.__main__ import main
from notus.evaluation.alpaca_eval import read_annotations, score
from notus.evaluation.results import read_result


def entry(number, preference, **changes):
    return {
        "instruction": f"question {number}",
        "output_1": "yes",
        "generator_1": "text_davinci_003",
        "output_2": "no" * (number % 3),
        "generator_2": "mine",
        "dataset": "koala",
        "annotator": "alpaca_eval_gpt4",
        "preference": preference,
        **changes,
    }


def write(folder, entries):
    path = folder / "annotations.json"
    path.write_text(json.dumps(entries))
    return path


def test_notus_wins_735_of_804(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preferences = [2.0] * 735 + [1.0] * 69 + [None]
    path = write(tmp_path, [entry(number, preference) for number, preference in enumerate(preferences)])
    assert main(["evaluate", "--suite", "alpaca-eval", "--annotations", str(path)]) == 0
    told = capsys.readouterr().out
    assert "91.42 ± 0.99 %" in told
    assert "804 annotated, 1 left out: 735 wins, 69 losses, 0 ties" in told
    result = read_result(tmp_path / "evaluations" / "mine" / "alpaca-eval" / "result.json")
    rate, length = result.figures
    assert (rate.metric, rate.unit, rate.count) == ("win_rate", "%", 804)
    assert rate.value == pytest.approx(100 * 735 / 804)
    # sqrt(p(1-p)/(n-1)), the sample's standard deviation over sqrt(n)
    assert rate.stderr == pytest.approx(100 * (735 / 804 * 69 / 804 / 803) ** 0.5)
    assert rate.reference == {"Zephyr-7B-β": 90.60, "Notus 7B v1": 91.42}
    assert (length.metric, length.value, length.count) == ("avg_length", 1, 805)  # 1.998 characters, cut
    assert result.details["left_out"] == 1


def test_published_figures_stand_beside_their_own_judge_and_baseline_alone(tmp_path, capsys):
    path = write(tmp_path, [entry(1, 2, annotator="other"), entry(2, 1, annotator="other")])
    assert main(["evaluate", "--suite=alpaca-eval", "--annotations", str(path), "--output", str(tmp_path / "o")]) == 0
    assert read_result(tmp_path / "o" / "result.json").figures[0].reference == {}
    assert "published:" not in capsys.readouterr().out


def test_figures_of_a_judge_that_weighs_bear_the_packages_names(tmp_path):
    path = write(tmp_path, [entry(1, 1.9), entry(2, 1.6), entry(3, 1.0)])
    assert main(["evaluate", "--suite=alpaca-eval", "--annotations", str(path), "--output", str(tmp_path / "o")]) == 0
    first, second, _ = read_result(tmp_path / "o" / "result.json").figures
    assert (first.metric, first.value) == ("win_rate", pytest.approx(50))
    assert first.stderr == pytest.approx(100 * (0.42 / 2 / 3) ** 0.5)  # 0.4² + 0.1² + 0.5² about the mean
    assert (second.metric, second.value) == ("discrete_win_rate", pytest.approx(200 / 3))


def test_what_counts(tmp_path):
    preferences = [1.5, 1.51, 1.49, 2, 1, 0, None, float("nan")]
    scores = score(read_annotations(write(tmp_path, [entry(*pair) for pair in enumerate(preferences)])))
    assert (scores.wins, scores.losses, scores.ties, scores.count, scores.left_out) == (2, 2, 2, 6, 2)
    assert scores.discrete_win_rate == 50  # 2 wins and 2 halves of 6
    assert scores.win_rate == pytest.approx(100 * (0.5 + 0.51 + 0.49 + 1 + 0 + 0.5) / 6)
    alone = score(read_annotations(write(tmp_path, [entry(1, 2)])))
    assert (alone.win_rate, alone.standard_error) == (100, None)


def test_scores_are_the_packages(tmp_path):
    helpers = pytest.importorskip("alpaca_eval.metrics.helpers")
    draw = random.Random(0)
    kinds = [lambda: draw.choice([1, 2]), lambda: draw.choice([0, 1, 1.5, 2, None]), lambda: draw.uniform(1, 2)]
    for kind in kinds:
        entries = [entry(number, kind(), output_2="x" * draw.randrange(50)) for number in range(60)]
        scores = score(read_annotations(write(tmp_path, entries)))
        preferences = [entry["preference"] for entry in entries]
        weighted = helpers.AbsoluteScoringRule().describe_head2head(preferences)
        counted = helpers.ZeroOneScoringRule().describe_head2head(preferences)
        assert scores.win_rate == pytest.approx(weighted["win_rate"])
        assert scores.standard_error == pytest.approx(weighted["standard_error"])
        assert scores.discrete_win_rate == pytest.approx(counted["win_rate"])
        assert scores.discrete_standard_error == pytest.approx(counted["standard_error"])
        assert (scores.wins, scores.losses, scores.ties, scores.count) == tuple(
            counted[name] for name in ("n_wins", "n_wins_base", "n_draws", "n_total")
        )


TWICE = [entry(1, 2), entry(2, 1), entry(1, 1)]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"a": 1}, "line 1: key 'instruction'"),
        ([], "the file is empty"),
        (["text"], r"row 1 \(line \d+\): Input should be"),
        (
            [entry(1, 2), {"instruction": "a", "output_2": "b", "generator_2": "c"}],
            r"row 2 \(line \d+\): key 'preference': Field required",
        ),
        (
            [{"output_2": "b", "preference": 1, "generator_2": "c"}],
            r"row 1 \(line \d+\): key 'instruction': Field required",
        ),
        ([entry(1, 2, output_2=None)], r"row 1 \(line \d+\): key 'output_2'"),
        ([entry(1, 2), entry(2, 2.5)], r"row 2 \(line \d+\): key 'preference': the preference 2.5 is out of range"),
        ([entry(1, -1)], "the preference -1 is out of range"),
        ([entry(1, 10**400)], "the preference 10000000000000000000 is out of range"),
        ([entry(1, float("inf"))], "the preference inf is out of range"),
        ([entry(1, "2")], "the preference 2 is out of range"),
        ([entry(1, True)], "the preference True is out of range"),
        (
            [entry(1, 2), entry(2, 2, generator_2="his")],
            r"row 2 \(line \d+\): generator_2 is 'his', that of the first entry is 'mine'",
        ),
        (TWICE, r"row 3 \(line \d+\): the same pair as"),
        ([entry(1, None), entry(2, None)], "none of its 2 entries has a preference"),
    ],
)
def test_wrong_files_are_named(tmp_path, capsys, entries, told):
    path = write(tmp_path, entries)
    assert main(["evaluate", "--suite", "alpaca-eval", "--annotations", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert re.search(told, error)
    assert error.count("\n") == 1


def test_files_that_are_no_json(tmp_path):
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(ValueError, match=r"a.json, line 1: not JSON"):
        read_annotations(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b.json: there is no such file"):
        read_annotations(tmp_path / "b.json")


def test_the_same_text_in_two_data_sets_is_no_repetition(tmp_path):
    assert len(read_annotations(write(tmp_path, [entry(1, 2), entry(1, 2, dataset="vicuna")]))) == 2


def test_data_sets_and_models_may_be_numbers(tmp_path):
    path = write(tmp_path, [entry(1, 2, dataset=7, generator_1=3, annotator=1.5), entry(2, 2, generator_1=0)])
    first, second = read_annotations(path)
    assert (first.dataset, first.generator_1, first.annotator) == ("7", "3", "1.5")
    assert second.generator_1 == "unknown"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["model"], "the model model has no effect with --annotations"),
        (["--judge", "x"], "--judge has no effect"),
        (["--temperature", "0"], "--temperature has no effect"),
        (["--trust-remote-code"], "--trust-remote-code has no effect"),
    ],
)
def test_options_of_the_generation_do_not_go_with_annotations(tmp_path, capsys, more, told):
    path = write(tmp_path, [entry(1, 2)])
    assert main(["evaluate", "--suite", "alpaca-eval", "--annotations", str(path), *more]) == 1
    assert told in capsys.readouterr().err
