"""Runs on lists of rated completions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from rated import write_lists
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.config import config_from_dict
from notus.losses import LOSSES
from notus.runtime.process import STOPPED
from notus.training import dpo

LISTS = [name for name, loss in LOSSES.items() if loss.rows == "lists"]
EVERY = {"training__save_every": 3, "training__log_every": 2, "training__epochs": 2, "training__eval_every": 5,
         "data__eval_size": 5}  # fmt: skip


@pytest.fixture(scope="session")
def lists_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lists(tmp_path_factory.mktemp("lists") / "lists.jsonl", 13)


def _plain_logps(folder: Path, lists: Path) -> list[list[float]]:
    """Log-prob of each completion as the data order them, from whole sequences through transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in map(json.loads, lists.read_text().splitlines()):
        sums = []
        for completion in row["completions"]:
            whole = tokenizer(row["prompt"] + completion, return_offsets_mapping=True)
            ids = torch.tensor([*whole["input_ids"], tokenizer.eos_token_id])
            first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(row["prompt"]))
            with torch.no_grad():
                logps = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            sums.append(logps.gather(-1, ids[1:, None])[first - 1 :].sum().item())
        found.append(sums)
    return found


@pytest.mark.parametrize("name", LISTS)
def test_every_loss_of_lists_trains(name: str, tmp_path: Path, model_folder: Path, lists_file: Path) -> None:
    run = tmp_path / "run"
    overrides = {"training__batch_size": 13, "training__epochs": 3, "training__learning_rate": 1e-4}
    dpo.run(config("dpo", run, model_folder, lists_file, dpo__loss_type=name, **overrides))
    lines = read_metrics(run)
    assert lines[2]["loss"] < lines[0]["loss"]
    for metric in ("rewards/accuracies", "rewards/margins"):
        assert lines[2][metric] > lines[0][metric]
    assert lines[0]["rewards/accuracies"] == 0.5
    assert lines[0]["rewards/kendall_tau"] == 0  # all rewards are equal
    assert lines[2]["rewards/kendall_tau"] > 0


def test_evaluation_is_that_of_plain_log_probs(tmp_path: Path, model_folder: Path, lists_file: Path) -> None:
    held_out, run = write_lists(tmp_path / "eval.jsonl", 6, seed=5), tmp_path / "run"
    common = {"data__eval": str(held_out), "training__max_steps": 3, "dpo__nll_weight": 0.5}
    dpo.run(config("dpo", run, model_folder, lists_file, dpo__loss_type="all_pairs", dpo__beta=0.3, **common))
    after, before = _plain_logps(run / "model", held_out), _plain_logps(model_folder, held_out)
    losses, taus, right, pairs, top, best = [], [], 0, 0, 0, []
    for row, new, old in zip(map(json.loads, held_out.read_text().splitlines()), after, before, strict=True):
        rewards, ratings = [0.3 * (b - a) for a, b in zip(old, new, strict=True)], row["ratings"]
        margins = [x - y for x, p in zip(rewards, ratings, strict=True) for y, q in zip(rewards, ratings, strict=True)
                   if p > q]  # fmt: skip
        losses.append(sum(math.log1p(math.exp(-margin)) for margin in margins) / max(1, len(margins)))
        right, pairs = right + sum(margin > 0 for margin in margins), pairs + len(margins)
        top += ratings[rewards.index(max(rewards))] == max(ratings)
        if margins:
            # τ-b: no two rewards are equal, and some ratings are
            count = len(rewards) * (len(rewards) - 1) / 2
            taus.append(sum(math.copysign(1, margin) for margin in margins) / math.sqrt(len(margins) * count))
        best.append(new[ratings.index(max(ratings))])
    line = read_metrics(run)[-1]
    assert line["eval_loss"] - 0.5 * line["eval_nll_loss"] == pytest.approx(sum(losses) / 6, abs=2e-5)
    assert line["eval_logps/chosen"] == pytest.approx(sum(best) / 6, abs=1e-4)
    assert line["eval_rewards/accuracies"] == pytest.approx(right / pairs)
    assert line["eval_rewards/kendall_tau"] == pytest.approx(sum(taus) / len(taus))
    assert line["eval_rewards/top_1"] == pytest.approx(top / 6)


def test_lists_of_two_are_pairs(tmp_path: Path, model_folder: Path) -> None:
    lists = write_lists(tmp_path / "lists.jsonl", 8, most=2)
    rows = list(map(json.loads, lists.read_text().splitlines()))
    rows = [{**row, "ratings": [5, 1]} for row in rows]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for row in rows:
            chosen, rejected = row["completions"]
            file.write(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
    for name, data in (("plackett_luce", lists), ("sigmoid", pairs)):
        dpo.run(config("dpo", tmp_path / name, model_folder, data, dpo__loss_type=name, training__epochs=2))
    for one, other in zip(*(read_metrics(tmp_path / name) for name in ("plackett_luce", "sigmoid")), strict=True):
        assert {
            key: one[key] for key in other if key.startswith(("loss", "rewards", "logps", "grad"))
        } == pytest.approx(
            {key: value for key, value in other.items() if key.startswith(("loss", "rewards", "logps", "grad"))},
            abs=1e-6,
        )


def test_a_list_without_ratings_is_an_error_where_they_are_learned(tmp_path: Path, model_folder: Path) -> None:
    lists = tmp_path / "lists.jsonl"
    rows = [{"prompt": f"hello {number}", "completions": [" a", " b c", " d"]} for number in range(4)]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="ratings"):
        dpo.run(config("dpo", tmp_path / "rated", model_folder, lists, dpo__loss_type="info_nca"))
    assert not (tmp_path / "rated" / "reference").exists()


def test_a_resumed_run_is_bitwise_undisturbed(
    tmp_path: Path, model_folder: Path, lists_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"dpo__loss_type": {"plackett_luce": 1.0, "lipo_lambda": 0.1}, "dpo__nll_weight": 0.5}
    whole, cut = (config("dpo", tmp_path / name, model_folder, lists_file, **EVERY, **kind) for name in "ab")
    assert dpo.run(whole) == 0
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 3, terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_changed_ratings_are_refused(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = write_lists(tmp_path / "lists.jsonl", 8)
    run = config("dpo", tmp_path / "run", model_folder, lists, dpo__loss_type="plackett_luce", training__save_every=1)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 1, terminate)
        assert dpo.run(run) == STOPPED
    write_lists(lists, 8, shift=1.0)
    with pytest.raises(ValueError, match=r"other contents of data\.train \(ratings\)"):
        dpo.run(run)


def _on_ranks(tree: dict[str, Any], port: int) -> None:
    with launched(port):
        assert dpo.run(config_from_dict(tree, "dpo")) == 0


def test_neither_ranks_nor_rows_change_the_result(tmp_path: Path, model_folder: Path, lists_file: Path) -> None:
    kind: dict[str, Any] = {"dpo__loss_type": "plackett_luce", "dpo__nll_weight": 0.5, "data__eval_size": 4}
    dpo.run(config("dpo", tmp_path / "one", model_folder, lists_file, **kind))
    kind["training__tokens_per_row"] = 80
    dpo.run(config("dpo", tmp_path / "short", model_folder, lists_file, **kind))
    run_ranks(_on_ranks, 2, tmp_path, settings(tmp_path / "two", model_folder, lists_file, **kind), free_ports(1)[0])
    one = read_metrics(tmp_path / "one")
    for name in ("short", "two"):
        for line, expected in zip(read_metrics(tmp_path / name), one, strict=True):
            same = {
                key for key in expected if key.removeprefix("eval_").startswith(("loss", "rewards", "logps", "nll"))
            }
            assert {key: line[key] for key in same} == pytest.approx({key: expected[key] for key in same}, abs=2e-5)
