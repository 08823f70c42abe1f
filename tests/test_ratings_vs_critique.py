"""A tiny run of `benchmarks/ratings_vs_critique.py`, its intervals by hand, and that its page says what it found."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from notus.curation.ultrafeedback import curate

pytestmark = pytest.mark.usefixtures("benchmarks")
ROOT = Path(__file__).resolve().parents[1]


def test_a_run_is_kept_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import synthetic_runs
    from ratings_vs_critique import main

    out = tmp_path / "out.json"
    command = ["--quick", "--seeds=0", "--fault-rates", "1", "--steps=1", f"--work={tmp_path}", f"--results={out}"]
    verdicts = synthetic_runs.verdicts

    def killed_at_the_last_run(folder: Path, data: Any) -> dict[str, Any]:
        if folder.name == "overall-score-1":
            raise KeyboardInterrupt
        return verdicts(folder, data)

    monkeypatch.setattr(synthetic_runs, "verdicts", killed_at_the_last_run)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    trained: list[str] = []
    train = synthetic_runs.train

    def noting(task: Any, folder: Path, *rest: Any) -> None:
        trained.append(folder.name)
        train(task, folder, *rest)

    monkeypatch.setattr(synthetic_runs, "verdicts", verdicts)
    monkeypatch.setattr(synthetic_runs, "train", noting)
    main(command)
    assert trained == ["overall-score-1"]
    (seed,) = json.loads(out.read_text())["seeds"]
    runs = [seed["ratings"], *seed["overall_score"]]
    assert [run["fault_rate"] for run in runs] == [None, 1]
    assert [run["steps"] for run in runs] == [1, 1]
    assert [run["first_loss"] for run in runs] == pytest.approx([0.693147] * 2, abs=1e-4)  # ln 2: one start for all
    assert all(len(run["right"]) == 16 for run in runs)
    assert "| 100% |" in out.with_suffix(".md").read_text()
    other = synthetic_runs.make_data(synthetic_runs.Size(64, 9, 9), 1)
    with pytest.raises(ValueError, match="remove it, or name another --work"):
        synthetic_runs.start_run(tmp_path / "seed-0" / "start", other)


def test_how_the_rules_choose() -> None:
    from ratings_vs_critique import Size, choices, described, make_data, pairs_by_ratings, records_at

    data = make_data(Size(sft=4, preferences=300, held_out=4), 0)
    honest, faulty = choices(data, 0.0), choices(data, 1.0)
    assert honest["ratings"] == faulty["ratings"]
    # about half of the answers are wrong, and a third of those scored 1
    assert honest["stored_as_10"] == 0 < 0.1 < faulty["stored_as_10"] < 0.25
    assert faulty["overall_score"]["kept_chosen_right"] < honest["overall_score"]["kept_chosen_right"] - 0.2
    _, report = curate(records_at(data, 1.0), by="ratings", seed=0)
    assert faulty["both"] == report.compared
    assert faulty["chosen_differs"] == report.differing_share > 0.2
    pair = {
        "source": "synthetic_count",
        "instruction": "Count these digits: 1234",
        "chosen_response": "4",
        "rejected_response": "10",
    }
    turned = {**pair, "source": "synthetic_repeat", "chosen_response": "10", "rejected_response": "4"}
    pairs = [pair, turned, {**pair, "rejected_response": "4"}]
    found = described(pairs, pairs_by_ratings(data)[1])
    assert (found["pairs"], found["kept"], found["chosen_right"]) == (3, 2, 2 / 3)
    assert [found[name] for name in ("kept_hard", "kept_chosen_right", "kept_rejected_right")] == [0.5, 0.5, 0.5]


def test_too_few_pairs_for_the_steps_are_refused(tmp_path: Path) -> None:
    from ratings_vs_critique import Size, dpo_run, make_data, pairs_by_ratings

    data = make_data(Size(sft=4, preferences=40, held_out=4), 0)
    with pytest.raises(ValueError, match="do not last for 64"):
        dpo_run(tmp_path, data, pairs_by_ratings(data)[0], tmp_path, "", steps=2)


def test_head_to_head_counts_the_prompts_whose_answers_differ() -> None:
    from ratings_vs_critique import head_to_head

    first = {"answers": ["4", "5", "10", "7", "9"], "right": "11001"}
    second = {"answers": ["4", "10", "12", "8", "3"], "right": "10010", "fault_rate": 0.5}
    found = {"fault_rate": 0.5, "differ": 4, "ratings_wins": 2, "critique_wins": 1, "ties": 1}
    assert head_to_head(first, second) == found


def test_intervals() -> None:
    from ratings_vs_critique_report import over_seeds, paired

    # three won, one lost of eight: 2/8, variance (4 - 4/8) / 64
    assert paired("11110000", "00011000") == pytest.approx((0.25, 1.959964 * (3.5 / 64) ** 0.5))
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    assert over_seeds([0.5]) == (0.5, None)


@pytest.mark.parametrize("name", ["ratings-vs-critique", "ratings-vs-critique-32-steps"])
def test_the_page_and_the_tables_are_those_of_the_results(name: str) -> None:
    from ratings_vs_critique_report import RATE_HEADS, table

    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert not results["quick"]
    lines = table(results).splitlines()
    assert (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().splitlines() == lines
    page = (ROOT / "docs" / "ratings-vs-critique.md").read_text().splitlines()
    learned = lines.index(f"| {' | '.join(RATE_HEADS)} |")
    upto = learned + 2 + len(results["fault_rates"])
    assert {line for line in lines[:upto] if line.startswith("|")} <= set(page)


def test_without_matplotlib_a_plot_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from ratings_vs_critique import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-bench\.txt"):
        main([f"--plot={tmp_path / 'plot.svg'}", f"--work={tmp_path / 'work'}"])
    assert not (tmp_path / "work").exists()


def test_the_plot_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ratings_vs_critique import main

    stored = ROOT / "benchmarks" / "results" / "ratings-vs-critique.json"
    files = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for file in files:
        main([f"--stored={stored}", f"--plot={file}"])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "ratings less overall score" in files[0].read_text()


def test_pairs_against_lists_by_hand() -> None:
    from ratings_vs_critique_report import list_table

    def run(name: str, steps: int, tokens: int, rate: float) -> dict[str, Any]:
        measured = {"win_rate": rate, "reward_accuracy": 0.5, "margin": 1.0, "chosen_change": -0.5}
        return {"of": "4 steps", "name": name, "steps": steps, "tokens": tokens, **measured}

    def runs(gain: float) -> list[dict[str, Any]]:
        return [
            run("pairs", 4, 1000, 0.5),
            run("pairs, equal tokens", 5, 1250, 0.6),
            run("plackett_luce", 4, 1260, 0.5 + gain),
        ]

    results = {
        "size": {"held_out": 1000, "preferences": 200},
        "recipes": {"dpo": {"batch_size": 32}},
        "seeds": [
            {"seed": seed, "start": 0.25, "chosen_right": {"clean": 1.0, "careless": gain}, "runs": runs(gain)}
            for seed, gain in enumerate([0.1, 0.2, 0.3])
        ],
    }
    lines = list_table(results).splitlines()
    assert lines[0].startswith("Seeds 0, 1, 2; 200 rated prompts, 32 in a step, 1,000 held-out prompts;")
    assert lines[0].endswith("100.0% have a right answer as the chosen one, with a careless critic 20.0%.")
    assert lines[4] == "| 4 steps | pairs | 4 | 1,000 | 50.0% |  |  |  | 50.0% | 1.00 | -0.500 |"
    assert lines[5].startswith(
        "| 4 steps | pairs, equal tokens | 5 | 1,250 | 60.0% | +10.0 ± 0.0 | +10.0, +10.0, +10.0 |  |"
    )
    # gains of 10, 20, 30 points: mean 20, deviation 10, so 4.302653 * 10 / √3 = 24.8
    assert lines[6].startswith(
        "| 4 steps | plackett_luce | 4 | 1,260 | 70.0% | +20.0 ± 24.8 | +10.0, +20.0, +30.0 | +10.0 ± 24.8 |"
    )


def test_a_plot_of_lists_is_refused(tmp_path: Path) -> None:
    from ratings_vs_critique import main

    with pytest.raises(ValueError, match="--plot has no effect with --lists"):
        main(["--lists", f"--plot={tmp_path / 'plot.svg'}", f"--work={tmp_path / 'work'}"])
    assert not (tmp_path / "work").exists()


def test_pairs_against_lists_take_equal_steps_and_equal_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven runs. What is measured of a model is measured of the first one, and taken for all."""
    import synthetic_runs
    from ratings_vs_critique import main

    verdicts, moved = synthetic_runs.verdicts, synthetic_runs.moved
    of_first = functools.cache(lambda: json.loads((tmp_path / "seed-0" / "start" / "result.json").read_text()))
    kept: list[dict[str, float]] = []

    def verdicts_of_start(folder: Path, data: Any) -> dict[str, Any]:
        if folder.name == "start":
            return verdicts(folder, data)
        return {name: of_first()[name] for name in ("win_rate", "by_task", "right", "answers")}

    def moved_once(*given: Any) -> dict[str, float]:
        kept.append(kept[0] if kept else moved(*given))
        return kept[0]

    monkeypatch.setattr(synthetic_runs, "verdicts", verdicts_of_start)
    monkeypatch.setattr(synthetic_runs, "moved", moved_once)
    out = tmp_path / "out.json"
    main(["--lists", "--quick", "--seeds=0", f"--work={tmp_path}", f"--results={out}"])
    (seed,) = json.loads(out.read_text())["seeds"]
    assert len(kept) == 11
    (pairs, longer, *lists), careless = seed["runs"][:4], "2 steps, careless critic"
    assert 0.5 < seed["chosen_right"]["careless"] < 0.9 < seed["chosen_right"]["clean"]
    names = ["pairs", "pairs, equal tokens", "plackett_luce", "all_pairs"]
    assert [run["name"] for run in seed["runs"]] == [*names, *names, "pairs", *names[2:]]
    assert [run["of"] for run in seed["runs"]] == ["2 steps"] * 4 + [careless] * 4 + ["140 records"] * 3
    assert [run["steps"] for run in (pairs, *lists)] == [2, 2, 2]
    # of the same prompts, two more answers of about 4 tokens each beside about 28 tokens of a pair
    assert {run["tokens"] for run in lists} == {lists[0]["tokens"]}
    assert 1.15 < lists[0]["tokens"] / pairs["tokens"] < 1.6
    assert abs(longer["tokens"] - lists[0]["tokens"]) < 0.6 * pairs["tokens"] / 2
    assert f"| 2 steps | plackett_luce | 2 | {lists[0]['tokens']:,} |" in out.with_suffix(".md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "seed-0" / "lists.jsonl").read_text().splitlines()]
    paired = [
        json.loads(line)["instruction"] for line in (tmp_path / "seed-0" / "pairs.jsonl").read_text().splitlines()
    ]
    assert [row["prompt"][0]["content"] for row in rows] == paired
    assert max(len(row["ratings"]) for row in rows) == 4
    few = tmp_path / "seed-0" / "140-records"
    all_lists = [json.loads(line) for line in (few / "all-lists.jsonl").read_text().splitlines()]
    assert all(len({text[0]["content"] for text in row["completions"]}) > 1 for row in all_lists)
    assert len((few / "pairs.jsonl").read_text().splitlines()) < len(all_lists) <= 140
    assert [run["steps"] for run in seed["runs"][8:]] == [2, len(all_lists) // 32, len(all_lists) // 32]


def test_the_page_has_the_table_of_pairs_against_lists() -> None:
    from ratings_vs_critique_report import list_table

    stored = ROOT / "benchmarks" / "results" / "pairs-vs-lists.json"
    results = json.loads(stored.read_text())
    assert not results["quick"]
    lines = list_table(results).splitlines()
    assert stored.with_suffix(".md").read_text().splitlines() == lines
    page = (ROOT / "docs" / "ratings-vs-critique.md").read_text().splitlines()
    assert {line for line in lines if line.startswith("|")} <= set(page)
