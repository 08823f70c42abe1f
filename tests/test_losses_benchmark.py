"""`benchmarks/losses.py`: a tiny run that resumes, every loss with a valid config, and the table by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from notus.config import config_from_dict
from notus.losses import LOSSES

pytestmark = pytest.mark.usefixtures("benchmarks")
ROOT = Path(__file__).resolve().parents[1]


def test_every_loss_is_trained_at_two_betas_with_a_config_that_is_valid() -> None:
    from losses import variants

    found = variants()
    names = [variant.name for variant in found]
    assert names[: len(LOSSES)] == list(LOSSES)
    assert len(set(names)) == len(names)
    for variant in found:
        low, high = variant.betas
        assert 0 < low < high
        for beta in variant.betas:
            tree = {
                "model": {"name_or_path": "m"},
                "data": {"train": "t"},
                "training": {"output_dir": "o"},
                "dpo": {"beta": beta, **variant.dpo},
            }
            config_from_dict(tree, "dpo")


def test_a_run_is_kept_and_its_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import synthetic_runs
    from losses import main

    out = tmp_path / "out.json"
    command = ["--quick", "--seeds=0", "--steps=1", f"--work={tmp_path}", f"--results={out}", "--only"]
    main([*command, "sigmoid"])
    trained: list[str] = []
    train = synthetic_runs.train

    def noting(task: Any, folder: Path, *rest: Any) -> None:
        trained.append(folder.name)
        if folder.name == "ipo-beta-0.5":
            from notus.training.trainer import NonFiniteError

            raise NonFiniteError("step 1: the loss is not finite")
        train(task, folder, *rest)

    monkeypatch.setattr(synthetic_runs, "train", noting)
    main([*command, "sigmoid", "ipo"])
    assert trained == ["ipo-beta-0.1", "ipo-beta-0.5"]
    (seed,) = json.loads(out.read_text())["seeds"]
    assert [(run["loss"], run["beta"]) for run in seed["runs"]] == [
        ("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.1), ("ipo", 0.5),
    ]  # fmt: skip
    # the only step is where warm-up begins, at learning rate 0: nothing moves, and ties count half
    for run in seed["runs"][:3]:
        assert run["margin"] == pytest.approx(0.0, abs=1e-5)
        assert run["chosen_change"] == pytest.approx(0.0, abs=1e-5)
        assert 16 * run["win_rate"] == sum(4 * share for share in run["by_task"].values())
    assert "not finite" in seed["runs"][3]["failed"]
    lines = out.with_suffix(".md").read_text().splitlines()
    assert (
        lines[-1]
        == "| `ipo` | 0.1 / 0.5 | 0.0 / not finite | 50.0 / not finite | 0.00 / not finite | +0.00 / not finite |"
    )
    again = tmp_path / "again.json"
    main([f"--stored={out}", f"--results={again}"])
    assert again.with_suffix(".md").read_text() == out.with_suffix(".md").read_text()


def test_the_table_by_hand() -> None:
    from losses import table

    def run(beta: float, value: float) -> dict[str, Any]:
        measured = dict.fromkeys(["win_rate", "reward_accuracy"], value) | {"margin": value, "chosen_change": -value}
        return {"loss": "sigmoid", "beta": beta, **measured, "rejected_change": value}

    seeds = [
        {"seed": seed, "start": {"win_rate": 0.5}, "runs": [run(0.1, rate), run(0.5, 0.25)]}
        for seed, rate in enumerate([0.1, 0.2, 0.3])
    ]
    results = {
        "size": {"steps": 7, "held_out": 1000},
        "recipes": {"dpo": {"batch_size": 32}},
        "losses": [{"name": "sigmoid", "betas": [0.1, 0.5]}],
        "seeds": seeds,
    }
    lines = table(results).splitlines()
    assert lines[0].startswith("Seeds 0, 1, 2; 7 steps of 32 prompts, 1,000 held-out prompts;")
    assert lines[0].endswith("The start answers 50.0 ± 0.0% right.")
    # mean 0.2, deviation 0.1, so 4.302653 * 0.1 / √3 = 0.248
    assert lines[4] == (
        "| `sigmoid` | 0.1 / 0.5 | 20.0 ± 24.8 / 25.0 ± 0.0 | 20.0 ± 24.8 / 25.0 ± 0.0 | 0.20 ± 0.25 / 0.25 ± 0.00 | "
        "-0.20 ± 0.25 / -0.25 ± 0.00 |"
    )


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    from losses import main

    with pytest.raises(ValueError, match="--only sigmod: there is no such loss; use sigmoid, "):
        main(["--only", "sigmod", f"--work={tmp_path / 'work'}"])
    assert not (tmp_path / "work").exists()


def test_every_kind_of_loss_gets_the_same_prompts_per_step(tmp_path: Path) -> None:
    from synthetic_runs import Size, make_data, write_rows

    data = make_data(Size(sft=4, preferences=40, held_out=4), 0)
    pairs, lists, labels = (write_rows(kind, data, tmp_path) for kind in ("pairs", "lists", "labels"))
    assert 0 < pairs.count < 40  # without the prompts whose two answers are the same
    assert (lists.count, labels.count) == (pairs.count, 2 * pairs.count)
    assert (pairs.per_step, lists.per_step, labels.per_step) == (32, 32, 64)
    assert labels.digest == pairs.digest  # the trainer makes two labelled rows of a pair


def test_rows_that_do_not_last_are_an_error(tmp_path: Path) -> None:
    from synthetic_runs import DPO, Size, loss_run, make_data, write_rows

    data = make_data(Size(sft=4, preferences=40, held_out=4), 0)
    rows = write_rows("pairs", data, tmp_path)
    with pytest.raises(ValueError, match="do not last for 64"):
        loss_run(tmp_path / "run", data, rows, {"loss_type": "sigmoid", "beta": 0.1}, {**DPO, "max_steps": 2}, tmp_path)


def test_the_page_and_the_table_are_those_of_the_results() -> None:
    from losses import table

    stored = ROOT / "benchmarks" / "results" / "losses.json"
    results = json.loads(stored.read_text())
    assert not results["quick"]
    lines = table(results).splitlines()
    assert stored.with_suffix(".md").read_text().splitlines() == lines
    page = (ROOT / "docs" / "losses.md").read_text().splitlines()
    assert {line for line in lines if line.startswith("|")} <= set(page)
