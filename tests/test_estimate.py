"""`python -m notus estimate`: the recipe fits, deep models answer at once, mistakes are reported in a line."""

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from runs import settings, write_pairs
from toys import toy_config, toy_model_folder

from notus import __main__ as entry
from notus.config import config_from_dict, save_config
from notus.estimate.plan import make_plan
from notus.estimate.sizes import Lengths, mismatched_lengths
from notus.model.flops import forward_flops

RECIPES = Path(__file__).parents[1] / "configs" / "notus-7b-v1"
FULL = str(RECIPES / "dpo-full-8xa100-40gb.yaml")


def told(capsys, *words: str) -> str:
    capsys.readouterr()
    assert entry.main(["estimate", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert entry.main(["estimate", *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_the_notus_recipe_fits_under_34_gigabytes_in_two_hours(capsys):
    text = told(capsys, FULL, "--price", "2")
    assert "Fits 39.59 GiB" in text
    assert number(text, r"in all +([\d.]+)\n") < 34 / 1.0737  # GB to GiB
    hours = number(text, r"in all +([\d.]+) h")
    assert 1 < hours < 2
    assert number(text, r"cost +([\d.]+) USD") == pytest.approx(hours * 8 * 2, rel=0.01)


@pytest.mark.parametrize("name", ["dpo-lora-8xa100-40gb", "sft-8xa100-40gb"])
def test_the_other_recipes_fit(capsys, name):
    assert "Fits 39.59 GiB" in told(capsys, str(RECIPES / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("gpu", "gib"), [("rtx4090", "23.99"), ("rtx-3090", "24.00"), ("l4", "22.49"), ("a10g", "22.49")]
)
def test_qlora_of_7b_fits_24_gigabytes_and_lora_does_not(capsys, gpu, gib):
    words = (str(RECIPES / "dpo-qlora-24gb.yaml"), "--gpus", "1", "--gpu", gpu)
    text = told(capsys, *words)
    assert f"Fits {gib} GiB" in text
    assert "7.41 billion parameters, 0.17 billion trained" in text
    # 32 blocks of 41.9 (attention) + 176.2 (MLP) million weights in 4.14 bits, the rest in bf16, 0.17 billion in fp32
    expected = (32 * 218.1e6 * 4.14 / 8 + 262e6 * 2 + 0.168e9 * 4) / 2**30
    assert number(text, r"weights \(.*\) +([\d.]+)\n") == pytest.approx(expected, rel=0.01)
    assert "Does NOT fit" in told(capsys, *words, "--model.quantization=null")


def test_70b_answers_within_ten_seconds_of_cpu_time_and_tells_what_would_fit(capsys):
    began = time.process_time()
    text = told(capsys, FULL, "--gpus", "8", "--gpu", "h100", "--model.name_or_path=meta-llama/Llama-3.1-70B")
    assert time.process_time() - began < 10
    assert "70.55 billion parameters" in text
    assert "Does NOT fit" in text
    assert "take more GPUs" in text
    assert "Step of 64 pairs, and the run, if the memory sufficed\n" in text
    changes = ("--model.name_or_path=meta-llama/Llama-3.1-70B", "--training.activation_checkpointing=auto")
    text = told(capsys, FULL, "--gpus=32", "--gpu=h100", *changes)
    assert "Fits 79.65 GiB" in text
    assert "if the memory sufficed" not in text
    assert "activation_checkpointing products" in text


def test_what_a_config_has_already_is_not_advised(capsys):
    words = (str(RECIPES / "dpo-lora-8xa100-40gb.yaml"), "--gpus=1", "--gpu=l4")
    words += ("--model.name_or_path=meta-llama/Llama-3.1-70B",)
    text = told(capsys, *words)
    assert "lora.rank" not in text
    assert "set model.quantization=nf4, or as a last resort set training.cpu_offload=true." in text
    text = told(capsys, *words, "--model.quantization=nf4")
    assert "helps: take more GPUs or larger ones, or as a last resort set training.cpu_offload=true." in text


def test_more_is_needed_for_more(capsys):
    pattern = r"tensors +([\d.]+)\n"
    least = number(told(capsys, FULL), pattern)
    for change in (
        "--training.optimizer=adamw", "--training.tokens_per_row=16384", "--gpus=4", "--training.precision=fp32",
        "--model.name_or_path=Qwen/Qwen2.5-14B",
    ):  # fmt: skip
        assert number(told(capsys, FULL, change), pattern) > least, change
    assert number(told(capsys, FULL, "--training.cpu_offload=true"), pattern) < least


def test_offload_tells_the_hosts_memory_and_no_hours(capsys):
    pattern = r"host memory .*: ([\d.]+) GiB"
    offload = "--training.cpu_offload=true"
    text = told(capsys, FULL, offload)
    assert "time: not estimated with training.cpu_offload" in text
    assert "pairs/s" not in text
    assert " h\n" not in text
    billions = 7.2417
    assert number(text, pattern) == pytest.approx(12 * billions / 1.0737, rel=1e-3)
    text = told(capsys, FULL, offload, "--training.optimizer=adamw", "--training.optimizer_dtype=bf16")
    assert number(text, pattern) == pytest.approx(12 * billions / 1.0737, rel=1e-3)
    # frozen weights in bf16: little more than two bytes each
    lora = told(capsys, str(RECIPES / "dpo-lora-8xa100-40gb.yaml"), offload)
    assert 2 * billions < number(lora, pattern) * 1.0737 < 3 * billions


def test_fp32_runs_at_the_rate_of_fp32(capsys):
    text = told(capsys, FULL, "--training.precision=fp32", "--gpu=a40")
    assert "of 37.4 TFLOP/s" in text
    assert "of 150 TFLOP/s" in told(capsys, FULL, "--gpu=a40")


def test_evaluation_on_a_file_of_its_own_is_counted_or_told(tmp_path, capsys):
    pairs, pattern = write_pairs(tmp_path / "pairs.jsonl", 6), r"in all +([\d.]+) h"
    changes = ("--data.eval_size=0", "--training.eval_every=1", f"--data.eval={pairs}", "--training.max_steps=1000")
    text = told(capsys, FULL, *changes)
    assert "not counted" not in text
    assert number(text, r"evaluation +([\d.]+) h") > 0
    text = told(capsys, FULL, *changes, f"--data.eval={tmp_path / 'elsewhere.parquet'}")
    assert "evaluation on data.eval: not counted" in text
    assert number(text, pattern) < number(told(capsys, FULL, *changes), pattern)


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen3-4B", "4.02"), ("Qwen/Qwen3-8B", "8.19")])
def test_known_models_have_their_sizes(capsys, name, billions):
    assert f"{billions} billion parameters" in told(capsys, FULL, f"--model.name_or_path={name}")


def test_hybrid_sharding_needs_the_memory_of_a_node(capsys):
    pattern = r"weights.* ([\d.]+)\n"
    one_node = number(told(capsys, FULL, "--gpus", "8"), pattern)
    assert number(told(capsys, FULL, "--gpus", "16"), pattern) == pytest.approx(one_node / 2, abs=0.01)
    assert number(told(capsys, FULL, "--gpus", "16", "--training.sharding=hybrid"), pattern) == one_node


def test_twice_the_utilisation_is_half_the_time(capsys):
    pattern = r"computation ([\d.]+) s"
    slow, fast = (number(told(capsys, FULL, "--utilisation", share), pattern) for share in ("0.2", "0.4"))
    assert slow == pytest.approx(2 * fast, rel=0.01)


def test_slow_links_are_told(capsys):
    text = told(capsys, FULL, "--gpu", "rtx4090", "--gpus", "8", "--training.tokens_per_row=2048")
    assert "bound by COMMUNICATION" in text


def test_the_datas_own_lengths_where_data_and_tokenizer_are_at_hand(tmp_path, capsys):
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 6)
    tree = settings(tmp_path / "run", model, pairs)
    save_config(config_from_dict(tree, "dpo"), tmp_path / "config.yaml")
    text = told(capsys, str(tmp_path / "config.yaml"), "--gpus", "1")
    assert "6 examples of the data, tokenised" in text
    assert "reference pass" in text
    text = told(capsys, str(tmp_path / "config.yaml"), "--gpus=1", "--lengths=10,20,30")
    assert "drawn: log-normal, mean tokens 10, 20, 30" in text


def test_a_configuration_file_stands_for_the_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(toy_config().to_dict()))
    text = told(capsys, FULL, "--model-config", str(tmp_path / "config.json"))
    assert f"({tmp_path / 'config.json'})" in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpu", "a100-40"], "--gpu a100-40: not a GPU that the estimate knows; did you mean a100-40gb?"),
        (["--model.name_or_path=nobody/nothing"], "give its config.json with --model-config"),
        (["--lengths", "1,2"], "--lengths 1,2: give 3 mean numbers of tokens"),
        (["--training.tokens_per_roww=3"], "tokens_per_roww"),
        (["--training.tokens_per_row=100"], "training.tokens_per_row=100 is less than the longest example"),
        (["--training.sharding=hybrid"], "training.sharding=hybrid has no effect on 8 GPUs"),
        (["--data.train=nosuch.jsonl"], "data.train: nosuch.jsonl: no such file"),
        (["--gpu", "a100"], "did you mean a100-40gb or a100-80gb?"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, words, error):
    assert error in refused(capsys, FULL, *words)


# ---- losses that learn from other rows, or need other passes ----

LIST = ("--dpo.loss_type=plackett_luce", "--training.tokens_per_row=8192")


def hours(text: str, name: str) -> float:
    return number(text, rf"{name} +([\d.]+) h")


def test_lists_take_as_many_means_as_there_are_completions(capsys):
    text = told(capsys, FULL, *LIST)
    assert "mean tokens 176, 290, 290, 290, 290 (trunk, branches)" in text
    assert "Step of 64 lists" in text
    assert "lists/s" in text
    text = told(capsys, FULL, *LIST, "--lengths", "100,50,60,70")
    assert "mean tokens 100, 50, 60, 70 (trunk, branches)" in text
    # a list of two is a pair
    pattern = r"necessary operations ([\de.+]+),"
    of_lists = number(told(capsys, FULL, *LIST, "--lengths=176,300,280"), pattern)
    assert of_lists > 0
    assert of_lists == number(told(capsys, FULL, "--lengths=176,300,280"), pattern)
    assert "--lengths 100,50: give 3 or more mean numbers" in refused(capsys, FULL, *LIST, "--lengths", "100,50")
    assert "Step of 64 completions" in told(capsys, FULL, "--dpo.loss_type=bco")
    assert "give 2 mean numbers" in refused(capsys, FULL, "--dpo.loss_type=bco", "--lengths", "100,50,60")


def test_a_list_of_four_costs_less_than_its_six_pairs(capsys):
    lengths = "--lengths=176,290,290,290,290"
    pair = number(told(capsys, FULL, "--lengths=176,290,290"), r"necessary operations ([\de.+]+),")
    four = number(told(capsys, FULL, *LIST, lengths), r"necessary operations ([\de.+]+),")
    # tokens: (176 + 4 * 290) / (176 + 2 * 290) = 1.77; of six pairs 6
    assert four / pair == pytest.approx(1336 / 756, rel=0.02)


def test_another_reference_has_a_pass_of_its_own_size(capsys):
    text = told(capsys, FULL)
    same = told(capsys, FULL, "--reference.model=mistralai/Mistral-7B-v0.1")
    assert "Reference: 7.24 billion parameters, 32 blocks" in same
    assert hours(same, "reference pass") == hours(text, "reference pass")
    assert "its pass, before training" not in same  # less than training
    large = told(capsys, FULL, "--reference.model=meta-llama/Llama-2-70b-hf")
    assert hours(large, "reference pass") / hours(text, "reference pass") == pytest.approx(68.7 / 7.1, rel=0.1)
    assert hours(large, "training") == hours(text, "training")
    assert "its pass, before training" not in large  # 16 GiB of weights on each of 8 GPUs, with the gathered blocks
    alone = told(
        capsys, str(RECIPES / "dpo-qlora-24gb.yaml"), "--gpus=1", "--reference.model=meta-llama/Llama-2-70b-hf"
    )
    need = number(alone, r"at most ([\d.]+) GiB per GPU, which does NOT fit")
    assert 35 < need < 45  # 70B in 4.5 bits, and the rest


def test_a_loss_without_a_reference_needs_no_reference_pass(capsys):
    for loss in ("simpo", "cpo", "orpo", "slic", "{simpo: 0.5, orpo: 0.5}"):
        text = told(capsys, FULL, f"--dpo.loss_type={loss}", "--reference.cache_dir=null")
        assert "No reference pass: dpo.loss_type " in text, loss
        assert "reference pass  " not in text, loss
    text = told(capsys, FULL)
    assert hours(text, "reference pass") > 0
    assert "No reference pass" not in text
    # one member of a sum that has one is enough
    assert hours(told(capsys, FULL, "--dpo.loss_type={sigmoid: 0.8, orpo: 0.2}"), "reference pass") > 0


def test_a_pair_is_two_examples_of_a_loss_of_labels(capsys, tmp_path):
    pairs, labelled = tmp_path / "pairs.jsonl", tmp_path / "labelled.jsonl"
    pairs.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n\n' * 640)
    labelled.write_text('{"prompt": "q", "completion": "a", "label": true}\n' * 640)
    settings = ("training.batch_size=64", "training.epochs=1", "training.eval_every=null", "data.eval_size=0")
    overrides, steps = [f"--{each}" for each in settings], []
    for loss, path in (("sigmoid", pairs), ("bco", pairs), ("bco", labelled)):
        text = told(capsys, FULL, f"--data.train={path}", f"--dpo.loss_type={loss}", *overrides)
        steps.append(number(text, r"Run of (\d+) steps"))
    assert steps == [10, 20, 10]


def test_kto_scores_mismatched_completions_too(capsys):
    lengths = ("--lengths=176,290",)
    bco, kto = (told(capsys, FULL, f"--dpo.loss_type={loss}", *lengths) for loss in ("bco", "kto"))
    assert "mismatched" not in bco
    before = number(kto, r"mismatched completions ([\d.]+) s before it")
    step = r"  ([\d.]+) s, [\d.]+ completions/s"
    assert number(kto, step) == pytest.approx(number(bco, step) + before, abs=0.02)
    assert hours(kto, "reference pass") == pytest.approx(2 * hours(bco, "reference pass"), abs=0.02)
    assert before / number(bco, step) == pytest.approx(
        1 / 3, abs=0.02
    )  # one forward pass; a step without recomputation


def test_the_mismatched_pass_by_hand(capsys, monkeypatch):
    plans = []
    monkeypatch.setattr("notus.estimate.plan.make_plan", lambda setting: plans.append(make_plan(setting)) or plans[0])
    told(capsys, FULL, "--dpo.loss_type=kto", "--gpus=8", "--utilisation=0.5", "--gpu=a100-80gb")
    setting = plans[0].setting
    lengths = Lengths(np.array([10, 20]), np.array([[30], [50]]), "two")
    others = mismatched_lengths(lengths, 65)
    assert (others.trunks.tolist(), others.branches.tolist()) == ([10, 20], [[50], [30]])
    assert mismatched_lengths(lengths, 55).branches.tolist() == [[45], [30]]
    plan = make_plan(dataclasses.replace(setting, lengths=lengths, mismatched=others, gpus=1))
    operations = forward_flops(setting.dimensions, others.trunks, others.branches, np.array([50, 30])).mean()
    assert plan.mismatched == pytest.approx(64 * operations / (312e12 * 0.5), rel=1e-6)
    without = make_plan(dataclasses.replace(setting, lengths=lengths, mismatched=None, gpus=1))
    assert plan.seconds == pytest.approx(without.seconds + plan.mismatched)
    assert plan.scoring == pytest.approx(without.scoring + plan.mismatched / 64)
    assert plan.footprint == without.footprint


def test_keys_of_lists_that_lack_completions_by_hand():
    # 4 + (2 + 3 + 1) of 4 each, and 5 + 6: trunks are gathered three times and once
    lengths = Lengths(np.array([4, 5]), np.array([[2, 3, 1], [6, 0, 0]]), "two")
    assert lengths.totals.tolist() == [10, 11]
    assert lengths.key_ratio == pytest.approx((3 * 4 + 6 + 5 + 6) / 21)


def test_the_true_lengths_of_lists(tmp_path, capsys):
    model, lines = toy_model_folder(tmp_path / "model"), []
    for row in range(6):
        answers = [[{"role": "assistant", "content": f"answer {row} {place}"}] for place in range(2 + row % 3)]
        lines.append({"prompt": f"question {row}", "completions": answers, "ratings": list(range(len(answers)))})
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = settings(tmp_path / "run", model, tmp_path / "lists.jsonl", dpo__loss_type="plackett_luce")
    save_config(config_from_dict(tree, "dpo"), tmp_path / "config.yaml")
    text = told(capsys, str(tmp_path / "config.yaml"), "--gpus", "1")
    assert "6 examples of the data, tokenised" in text
    assert "lists/s" in text
