"""`notus evaluate`: its figures are transformers' own, from full models, adapters, runs, and on two ranks."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import config, read_metrics, words, write_pairs
from toys import toy_model, toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.__main__ import main
from notus.evaluation.preferences import scores, table
from notus.evaluation.preferences.command import DETAILS
from notus.evaluation.preferences.metrics import calibration
from notus.evaluation.results import read_result
from notus.model.export import load_causal_lm
from notus.training import dpo
from notus.training.parallelize import build_policy

FP32 = ["--precision", "fp32", "--max-length", "120"]


@torch.no_grad()
def logps(model, tokenizer, pairs_file):
    """[n, 2] completion log-probs, each conversation by itself through transformers' forward."""
    found = []
    for line in pairs_file.read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["prompt"]).input_ids)
        sums = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[side] + "</s>").input_ids])
            tokens = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(tokens[start - 1 :].sum())
        found.append(torch.stack(sums))
    return torch.stack(found).double()


def evaluate(tmp_path, *arguments):
    output = tmp_path / "result.json"
    assert main(["evaluate", *map(str, arguments), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def check_rewards(result, policy, base, beta):
    rewards = beta * (policy - base)
    margins = rewards[:, 0] - rewards[:, 1]
    assert result["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert result["rewards/chosen"] == pytest.approx(rewards[:, 0].mean().item(), abs=1e-5)
    assert result["rewards/accuracies"] == pytest.approx((margins > 0).double().mean().item())
    assert result["loss"] == pytest.approx(torch.nn.functional.softplus(-margins).mean().item(), abs=1e-5)
    assert result["logps/rejected"] == pytest.approx(policy[:, 1].mean().item(), abs=1e-4)


def test_against_a_base_as_transformers_computes_it(tmp_path, capsys, model_folder, other_folder, pairs_file):
    result = evaluate(tmp_path, other_folder, "--pairs", pairs_file, "--base", model_folder, "--beta", 0.3, *FP32)
    policy, base = (
        logps(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), pairs_file)
        for folder in (other_folder, model_folder)
    )
    check_rewards(result, policy, base, 0.3)
    assert (result["ranked_by"], result["num_pairs"], result["beta"]) == ("rewards", 10, 0.3)
    table = capsys.readouterr().out
    assert re.search(rf"reward .* {result['rewards/accuracies']:.4f}\n", table)
    assert "rows: 10 read, 10 kept" in table


def test_alone_by_log_prob(tmp_path, capsys, model_folder, pairs_file):
    result = evaluate(tmp_path, model_folder, "--pairs", pairs_file, *FP32)
    policy = logps(
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
        pairs_file,
    )
    assert result["ranked_by"] == "logps"
    assert result["base"] is None
    assert result["beta"] is None
    assert result["logps/accuracies"] == pytest.approx((policy[:, 0] > policy[:, 1]).double().mean().item())
    assert result["logps/margins"] == pytest.approx((policy[:, 0] - policy[:, 1]).mean().item(), abs=1e-4)
    assert not {"rewards/accuracies", "loss"} & set(result)
    assert "without a base" in capsys.readouterr().out


def test_adapter_is_held_against_its_own_base(tmp_path, lora_run, model_folder, pairs_file):
    result = evaluate(tmp_path, lora_run / "model", "--pairs", pairs_file, *FP32)
    merged, tokenizer = load_causal_lm(lora_run, dtype=torch.float32, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert result["base"] == str(model_folder)
    check_rewards(result, logps(merged, tokenizer, pairs_file), logps(base, tokenizer, pairs_file), 0.1)
    assert abs(result["rewards/margins"]) > 1e-3  # the adapter has learned something


def test_adapter_and_its_base_are_loaded_once(tmp_path, lora_run, model_folder, pairs_file, monkeypatch):
    built = []
    monkeypatch.setattr(
        scores, "build_policy", lambda *args, **kwargs: built.append(1) or build_policy(*args, **kwargs)
    )
    kl = ["--kl-samples", 4, "--kl-max-new-tokens", 5]
    once = evaluate(tmp_path, lora_run, "--pairs", pairs_file, *kl)
    assert len(built) == 1
    named = evaluate(tmp_path, lora_run, "--pairs", pairs_file, "--base", model_folder, *kl)
    assert len(built) == 3
    assert once == named


def test_run_keeps_its_result(tmp_path, full_run, model_folder, pairs_file):
    kl = ["--kl-samples", 4, "--kl-max-new-tokens", 5]
    result = evaluate(tmp_path, full_run, "--pairs", pairs_file, "--base", model_folder, *kl)
    kept = read_result(full_run / "evaluations" / "preferences" / "result.json")
    assert (kept.suite, kept.model) == ("preferences", str(full_run))
    assert kept.details == {name: result[name] for name in DETAILS}
    figures = {figure.metric: figure for figure in kept.figures}
    assert list(figures) == ["accuracy", "margin", "loss", "ece", "kl_per_sequence"]
    accuracy = figures["accuracy"]
    assert (accuracy.unit, accuracy.count, accuracy.dataset) == ("%", 10, "pairs.jsonl")
    assert accuracy.value == pytest.approx(100 * result["rewards/accuracies"])
    assert accuracy.stderr == pytest.approx(100 * result["overall"]["accuracy_stderr"])
    assert figures["margin"].value == pytest.approx(result["rewards/margins"])
    assert figures["kl_per_sequence"].count == 4
    assert kept.settings["beta"] == 0.5
    assert "loss" not in kept.settings


def test_breakdowns_stand_for_the_same_pairs(tmp_path, capsys, model_folder, other_folder, pairs_file):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps({**row, "source": f"made {n % 2}"}) for n, row in enumerate(rows[:9])))
    result = evaluate(tmp_path, other_folder, "--pairs", named, "--base", model_folder, "--beta", 0.01, *FP32)
    assert result["overall"]["margin"] == pytest.approx(result["rewards/margins"])
    assert result["overall"]["accuracy"] == pytest.approx(result["rewards/accuracies"])
    assert [(row["source"], row["count"]) for row in result["by_source"]] == [("made 0", 5), ("made 1", 4)]
    for breakdown in ("by_source", "by_length", "by_longer"):
        total = sum(row["count"] * row["margin"] for row in result[breakdown])
        assert total / 9 == pytest.approx(result["rewards/margins"]), breakdown
    assert sum(entry["count"] for entry in result["calibration"]["bins"]) == 9
    assert result["calibration"]["brier"] == pytest.approx(0.25, abs=0.1)  # a small beta is sure of nothing
    printed = capsys.readouterr().out
    assert re.search(r"made 0 +5 .*\[", printed)
    assert "calibration" not in printed  # of nine pairs it says nothing

    def said(margins: list[float]) -> str:
        return table.table({**result, "calibration": calibration(np.array(margins), 0.1)})

    # 0.1 log(3) / 1 fits best where 3 of 4 margins of 1 have the right sign, and 0 where half of them have
    assert "; beta 0.11 would fit these pairs best\n" in said([1.0] * 75 + [-1.0] * 25)
    assert "; the rewards do not predict these preferences\n" in said([1.0] * 50 + [-1.0] * 50)
    assert "; no finite beta fits best\n" in said([1.0] * 100)
    assert "calibration" not in said([1.0] * 99)


def test_alone_there_is_nothing_to_calibrate(tmp_path, model_folder, pairs_file):
    result = evaluate(tmp_path, model_folder, "--pairs", pairs_file, *FP32)
    assert (result["calibration"], result["kl"], result["by_source"]) == (None, None, None)
    assert result["overall"]["margin"] == pytest.approx(result["logps/margins"])


def test_one_pair(tmp_path, model_folder, other_folder, pairs_file):
    one = tmp_path / "one.jsonl"
    one.write_text(pairs_file.read_text().splitlines()[0])
    kl = ["--kl-samples", 1, "--kl-max-new-tokens", 2]
    result = evaluate(tmp_path, other_folder, "--pairs", one, "--base", model_folder, *kl, *FP32)
    assert result["length_bias"] is None
    assert result["overall"]["accuracy_stderr"] is None
    assert result["kl"]["per_sequence_stderr"] is None


@pytest.mark.parametrize("held_out", [{"data__eval_size": 3}, {"data__eval": "pairs"}])
def test_a_run_is_measured_on_what_it_held_out_against_its_start(tmp_path, model_folder, pairs_file, held_out):
    (tmp_path / "pairs.jsonl").write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:4]))
    held_out = {key: str(tmp_path / "pairs.jsonl") if value == "pairs" else value for key, value in held_out.items()}
    dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, training__max_steps=2, **held_out))
    result = evaluate(tmp_path, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert result["num_pairs"] == held_out.get("data__eval_size", 4)
    assert result["base"] == str(model_folder)
    found = [result[key] for key in ("loss", "rewards/margins", "rewards/accuracies")]
    assert found == pytest.approx([last[f"eval_{key}"] for key in ("loss", "rewards/margins", "rewards/accuracies")])


def test_other_pairs_than_the_run_held_out_do_not_pass_for_them(tmp_path, capsys, model_folder):
    pairs = write_pairs(tmp_path / "train.jsonl", 10)
    dpo.run(config("dpo", tmp_path / "run", model_folder, pairs, training__max_steps=2, data__eval_size=3))
    first, *rest = pairs.read_text().splitlines()
    pairs.write_text("\n".join([*rest, first]))  # others are drawn, some of which were learned
    assert "no longer what they were" in error_of(capsys, tmp_path / "run")
    evaluate(tmp_path, tmp_path / "run", "--pairs", pairs)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, full_run, model_folder, pairs_file):
    run = shutil.copytree(full_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    (run / "evaluations").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "build_policy", lambda *_, **__: pytest.fail("it was computed first"))
        message = error_of(capsys, run, "--pairs", pairs_file)
        assert f"no results can be written there (Not a directory); evaluate {run / 'model'}" in message
        output = ["--output", run / "evaluations" / "out.json"]
        assert "no results can be written there" in error_of(capsys, model_folder, "--pairs", pairs_file, *output)
    evaluate(tmp_path, run / "model", "--pairs", pairs_file, *FP32)


def test_rows_of_the_runs_own_are_taken_as_they_are(capsys, full_run, model_folder):
    assert "no DPO run that held rows out" in error_of(capsys, full_run)
    assert "no DPO run that held rows out" in error_of(capsys, model_folder)
    assert "--max-length needs --pairs" in error_of(capsys, full_run, "--max-length", 20)
    assert "--split needs --pairs" in error_of(capsys, full_run, "--split", "test")


def test_run_brings_its_settings(tmp_path, full_run, model_folder, pairs_file):
    result = evaluate(tmp_path, full_run, "--pairs", pairs_file, "--base", model_folder)
    expected = {"precision": "fp32", "max_length": 120, "max_prompt_length": 60, "beta": 0.5}
    assert {key: result[key] for key in expected} == expected
    shorter = evaluate(tmp_path, full_run, "--pairs", pairs_file, "--max-length", "20", "--max-prompt-length", 10)
    assert shorter["max_length"] == 20
    assert shorter["logps/chosen"] > result["logps/chosen"]  # fewer tokens are left


def test_tokens_per_row_does_not_matter(tmp_path, model_folder, pairs_file):
    one = evaluate(tmp_path, model_folder, "--pairs", pairs_file, *FP32)
    other = evaluate(tmp_path, model_folder, "--pairs", pairs_file, "--tokens-per-row", 60, *FP32)
    assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)


def error_of(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_rejects(tmp_path, capsys, model_folder, pairs_file, full_run):
    pairs = ["--pairs", pairs_file]
    assert "--beta has no effect" in error_of(capsys, model_folder, *pairs, "--beta", 0.2)
    assert "--kl-samples has no effect without a base" in error_of(capsys, model_folder, *pairs, "--kl-samples", 2)
    based = [model_folder, *pairs, "--base", model_folder]
    assert "--kl-prompts has no effect without --kl-samples" in error_of(capsys, *based, "--kl-prompts", pairs_file)
    assert "--kl-max-new-tokens has no effect" in error_of(capsys, *based, "--kl-max-new-tokens", 2)
    blank = tmp_path / "blank.txt"
    blank.write_text("\n")
    assert "holds no prompts" in error_of(capsys, *based, "--kl-samples", 2, "--kl-prompts", blank, *FP32)
    assert "raise it" in error_of(capsys, model_folder, *pairs, "--tokens-per-row", 3, *FP32)
    assert "no such folder" in error_of(capsys, tmp_path / "none", *pairs)
    assert "no config.json" in error_of(capsys, tmp_path, *pairs)
    assert "would replace the input" in error_of(capsys, model_folder, *pairs, "--output", pairs_file)
    assert "the result is JSON; " in error_of(capsys, model_folder, *pairs, "--output", tmp_path / "out.csv")
    mine = tmp_path / "mine.json"
    for content in ("[]", '{"model": "a"}', "\x00"):
        mine.write_text(content)
        assert "`notus evaluate` did not write" in error_of(capsys, model_folder, *pairs, "--output", mine)
        assert mine.read_text() == content
    unfinished = tmp_path / "unfinished"
    shutil.copytree(full_run, unfinished, ignore=shutil.ignore_patterns("model", "checkpoints"))
    assert str(unfinished) in error_of(capsys, unfinished, *pairs)
    assert not (tmp_path / "result.json").exists()


def test_rejects_a_base_of_another_vocabulary(tmp_path, capsys, model_folder, pairs_file):

    small = tmp_path / "small"
    toy_model(vocab_size=300).save_pretrained(small)
    message = error_of(capsys, model_folder, "--pairs", pairs_file, "--base", small, *FP32)
    assert "does not fit the model" in message


def test_rejects_log_probs_that_are_not_finite(tmp_path, capsys, pairs_file):

    broken = tmp_path / "broken"
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    toy_tokenizer().save_pretrained(broken)
    assert error_of(capsys, broken, "--pairs", pairs_file, *FP32).rstrip().endswith("check the weights")
    assert "--precision fp32" in error_of(capsys, broken, "--pairs", pairs_file, "--precision", "bf16")


def test_empty_system_turn_is_the_runs_or_the_users(tmp_path, model_folder):
    row = {"prompt": [{"role": "user", "content": "poem"}]}
    row |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pairs = tmp_path / "chat.jsonl"
    pairs.write_text(json.dumps(row))
    plain = evaluate(tmp_path, model_folder, "--pairs", pairs, *FP32)
    system = evaluate(tmp_path, model_folder, "--pairs", pairs, "--add-empty-system", *FP32)
    assert plain["logps/chosen"] != system["logps/chosen"]
    assert (plain["add_empty_system"], system["add_empty_system"]) == (False, True)


def test_swapped_pairs_flip_the_margin(tmp_path, model_folder, other_folder, pairs_file):
    swapped = tmp_path / "swapped.jsonl"
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    swapped.write_text(
        "\n".join(json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) for row in rows)
    )
    one, other = (
        evaluate(tmp_path, other_folder, "--pairs", file, "--base", model_folder, *FP32)
        for file in (pairs_file, swapped)
    )
    assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "opt"])  # rotary positions and learned ones
def test_pairs_beyond_the_context_of_model_or_base_are_one_clear_error(tmp_path, capsys, kind, model_folder):
    small = toy_model_folder(tmp_path / "small", kind, max_position_embeddings=16)
    pairs = ["--pairs", write_pairs(tmp_path / "pairs.jsonl", 30)]
    said = error_of(capsys, small, *pairs, *FP32)
    assert f"but the context of {small} ends at 16" in said
    assert "set --max-length to 16 or less" in said
    assert "--max-length to 16 or less" in error_of(capsys, model_folder, *pairs, "--base", small, *FP32)
    evaluate(tmp_path, small, *pairs, "--max-length", 16, *FP32[:2])


def write_lists(path, count, *, seed=0):
    """Lists of two to four completions in no order, one of them sometimes without a rating."""
    generator, lines = random.Random(seed), []
    for number in range(count):
        completions = [f" {words(generator, 1, 5)}" for _ in range(2 + number % 3)]
        ratings = [generator.choice([1, 2.5, 4]) for _ in completions]
        ratings[:2] = [1, 3]
        if len(ratings) == 4:
            ratings[3] = None
        row = {"prompt": words(generator, 1, 6), "completions": completions, "ratings": ratings}
        lines.append(json.dumps({**row, "source": f"made {number % 2}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@torch.no_grad()
def completion_logp(model, tokenizer, prompt, completion):
    """The log-prob of one conversation by itself, through transformers' forward; and its tokens."""
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + completion + "</s>").input_ids])
    tokens = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :, 0]
    return tokens.sum().item(), len(tokens)


def tau_b(one, other):
    """Kendall's τ-b, pair by pair."""
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i in range(len(one)) for j in range(i)]
    return sum(a * b for a, b in signs) / math.sqrt(sum(a * a for a, _ in signs) * sum(b * b for _, b in signs))


def test_lists_as_transformers_computes_them(tmp_path, capsys, model_folder, other_folder):
    file = write_lists(tmp_path / "lists.jsonl", 7)
    result = evaluate(tmp_path, other_folder, "--pairs", file, "--base", model_folder, "--beta", 0.3, *FP32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    policy, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (other_folder, model_folder))
    taus, tops, right, pairs, margins = [], [], 0.0, 0, []
    for row in map(json.loads, file.read_text().splitlines()):
        rated = [pair for pair in zip(row["completions"], row["ratings"], strict=True) if pair[1] is not None]
        texts, ratings = zip(*rated, strict=True)
        rewards = []
        for text in texts:
            ratio = sum(
                sign * completion_logp(model, tokenizer, row["prompt"], text)[0]
                for sign, model in ((1, policy), (-1, base))
            )
            rewards.append(0.3 * ratio)
        taus.append(tau_b(rewards, ratings))
        tops.append(ratings[int(np.argmax(rewards))] == max(ratings))
        found = [
            rewards[i] - rewards[j] for i in range(len(texts)) for j in range(len(texts)) if ratings[i] > ratings[j]
        ]
        right, pairs, margins = right + sum(margin > 0 for margin in found), pairs + len(found), margins + found
    assert (result["rows"], result["num_rows"], result["num_pairs"]) == ("lists", 7, pairs)
    assert result["rewards/kendall_tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert result["rewards/top_1"] == pytest.approx(np.mean(tops))
    assert result["rewards/accuracies"] == pytest.approx(right / pairs)
    assert result["overall"]["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert result["overall"]["count"] == pairs
    assert result["ranking"]["kendall_tau"] == result["rewards/kendall_tau"]
    assert [row["prompts"] for row in result["by_source"]] in ([4, 3], [3, 4])
    assert sum(entry["count"] for entry in result["calibration"]["bins"]) == pairs
    table = capsys.readouterr().out
    assert f"7 lists with {pairs} pairs of different ratings" in table
    assert "top-1 of a random choice" in table


@pytest.mark.parametrize(("loss", "write"), [("plackett_luce", write_lists), ("kto", write_pairs)])
def test_a_run_of_lists_or_labels_is_measured_as_it_was_at_its_end(tmp_path, model_folder, loss, write):
    rows, held_out = write(tmp_path / "train.jsonl", 8), write(tmp_path / "eval.jsonl", 6, seed=1)
    keys = {"training__max_steps": 2, "training__learning_rate": 1e-2, "data__eval": str(held_out)}
    dpo.run(config("dpo", tmp_path / "run", model_folder, rows, dpo__loss_type=loss, **keys))
    result, last = evaluate(tmp_path, tmp_path / "run"), read_metrics(tmp_path / "run")[-1]
    names = {"rewards/chosen": "rewards/good", "rewards/rejected": "rewards/bad"} if loss == "kto" else {}
    same = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
    if loss != "kto":  # whose accuracy in training is about its shift
        same += ["rewards/accuracies", "rewards/kendall_tau", "rewards/top_1"]
    for key in same:
        assert result[names.get(key, key)] == pytest.approx(last[f"eval_{key}"], abs=1e-6), key
    assert result["rows"] == ("labels" if loss == "kto" else "lists")
    figures = read_result(tmp_path / "run" / "evaluations" / "preferences" / "result.json").figures
    expected = ["auc", "accuracy", "margin"] if loss == "kto" else ["kendall_tau", "top_1", "accuracy", "margin", "ece"]
    assert [figure.metric for figure in figures] == expected


def test_lists_without_a_base(tmp_path, model_folder):
    result = evaluate(tmp_path, model_folder, "--pairs", write_lists(tmp_path / "lists.jsonl", 5), *FP32)
    assert (result["ranked_by"], result["calibration"]) == ("logps", None)
    assert result["ranking"]["top_1"] == result["logps/top_1"]
    assert "rewards/top_1" not in result


def test_labels_are_told_apart(tmp_path, capsys, model_folder, other_folder, pairs_file):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    file = tmp_path / "labels.jsonl"
    lines = [
        json.dumps({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
        for row in rows
        for side in ("chosen", "rejected")
    ]
    file.write_text("\n".join(lines))
    base = ["--base", model_folder, "--beta", 0.3, *FP32]
    pairs = evaluate(tmp_path, other_folder, "--pairs", pairs_file, *base)
    result = evaluate(tmp_path, other_folder, "--pairs", file, *base)
    assert (result["rows"], result["num_rows"], result["num_pairs"]) == ("labels", 20, None)
    assert result["rewards/good"] == pytest.approx(pairs["rewards/chosen"], abs=1e-5)
    assert result["rewards/bad"] == pytest.approx(pairs["rewards/rejected"], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    policy, reference = (
        logps(AutoModelForCausalLM.from_pretrained(folder), tokenizer, pairs_file)
        for folder in (other_folder, model_folder)
    )
    good, bad = (policy - reference).unbind(1)
    assert result["rewards/auc"] == pytest.approx((good[:, None] > bad[None, :]).double().mean().item())
    assert result["rewards/accuracies"] == pytest.approx(((good > 0).sum() + (bad < 0).sum()).item() / 20)
    assert (result["calibration"], result["by_longer"], result["length_bias"]) == (None, None, None)
    assert "20 labelled completions" in capsys.readouterr().out
    alone = evaluate(tmp_path, other_folder, "--pairs", file, *FP32)
    assert alone["overall"]["accuracy"] is None
    assert "rewards/auc" not in alone


@pytest.mark.parametrize(("loss", "per_token"), [("simpo", True), ("cpo", False)])
def test_a_run_without_a_reference_is_measured_by_its_own_rewards(
    tmp_path, capsys, model_folder, pairs_file, loss, per_token
):
    keys = {"training__max_steps": 2, "training__learning_rate": 1e-2, "data__eval_size": 3, "dpo__beta": 2.0}
    dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, dpo__loss_type=loss, **keys))
    capsys.readouterr()
    result = evaluate(tmp_path, tmp_path / "run")
    table = capsys.readouterr().out
    last = read_metrics(tmp_path / "run")[-1]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert result[key] == pytest.approx(last[f"eval_{key}"], abs=1e-5), key
    measure = "logps_per_token" if per_token else "logps"
    assert result["rewards/margins"] == pytest.approx(2 * result[f"{measure}/margins"])
    assert "loss" not in result
    assert f"{loss} has no reference: its reward is beta * log-prob" in table
    assert "change from the base" in table
    kept = read_result(tmp_path / "run" / "evaluations" / "preferences" / "result.json")
    assert kept.figures[0].setup.startswith("beta 2, log-prob")
    assert kept.settings["loss_type"] == loss
    against = evaluate(tmp_path, tmp_path / "run", "--base", model_folder)
    assert (against["beta"], against["is_relative"]) == (0.1, True)
    assert against["rewards/margins"] == pytest.approx(0.1 * result["logps_change/margins"], abs=1e-6)


def test_one_kind_of_label_and_lists_without_an_order_say_nothing(tmp_path, capsys, model_folder):
    row = {"prompt": "the", "completion": " fox", "label": True}
    (tmp_path / "good.jsonl").write_text(json.dumps(row))
    assert "good.jsonl: all 1 completions are good" in error_of(
        capsys, model_folder, "--pairs", tmp_path / "good.jsonl", *FP32
    )
    row = {"prompt": "the", "completions": [" fox", " dog"], "ratings": [2, 2]}
    (tmp_path / "tied.jsonl").write_text(json.dumps(row))
    assert "tied.jsonl: no prompt has two completions with different ratings" in error_of(
        capsys, model_folder, "--pairs", tmp_path / "tied.jsonl", *FP32
    )


def test_a_run_with_relative_paths_is_evaluated_from_any_folder(
    tmp_path, model_folder, pairs_file, monkeypatch, capsys
):
    place = tmp_path / "project"
    (place / "data").mkdir(parents=True)
    shutil.copyfile(pairs_file, place / "data" / "pairs.jsonl")
    shutil.copytree(model_folder, place / "start")
    monkeypatch.chdir(place)
    overrides = {"data__eval_size": 4, "lora__rank": 2, "training__max_steps": 1, "training__learning_rate": 0.05}
    run = Path("runs") / "lora"
    dpo.run(config("dpo", run, Path("start"), Path("data") / "pairs.jsonl", **overrides))
    here = evaluate(tmp_path, run)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.copytree(run, moved)
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_pairs(Path("pairs.jsonl"), 8, seed=5)  # of the same name, but not the run's
    there = evaluate(tmp_path, place / run)
    assert {**there, "model": "", "base": "", "pairs": ""} == {**here, "model": "", "base": "", "pairs": ""}
    # a copy elsewhere: its own folder does not say where it was trained, but the data may have moved with it
    assert main(["evaluate", "moved"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: moved: data/pairs.jsonl, where its held-out rows are, is not there: ")
    assert told.endswith("or name held-out pairs or lists with --pairs")
    shutil.copytree(place / "data", "data", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert evaluate(tmp_path, moved)["rewards/margins"] == here["rewards/margins"]
