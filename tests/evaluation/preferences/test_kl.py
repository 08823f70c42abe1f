"""KL by sampling: the estimates by hand, and whole against what the distributions give in closed form."""

import json
import math
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from runs import words
from toys import toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM

from notus.__main__ import main
from notus.data.chat import ChatEncoder
from notus.data.dataset import FEATURES, TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.evaluation.preferences.kl import Samples, choose, kl, prompts_of, read_prompts, sample

FP32 = ["--precision", "fp32", "--max-length", "120"]


def rows(*records):
    columns = dict(zip(("trunk", "branches", "loss_mask"), zip(*records, strict=True), strict=True))
    return TokenizedDataset(datasets.Dataset.from_dict({k: list(v) for k, v in columns.items()}, features=FEATURES))


def test_estimates_by_hand():
    samples = Samples(rows(([1], [[5, 2]], [[1, 1]]), ([1], [[6]], [[1]])), np.array([False, True]), 9)
    policy = torch.tensor([-1.0, -2.0, -1.0])
    base = torch.tensor([-2.0, -1.0, -3.0])  # log r: -1, 1, -2
    found = kl(policy, base, samples)
    assert (found["samples"], found["tokens"], found["cut_share"], found["max_new_tokens"]) == (2, 3, 0.5, 9)
    # k1 of the samples: 1 - 1 = 0 and 2; squares about their mean 1: 1 + 1
    assert found["per_sequence"] == pytest.approx(1.0)
    assert found["per_sequence_stderr"] == pytest.approx(math.sqrt(2 / 1 / 2))
    # 2 nats in 3 tokens; what is left of the samples, 0 - 4/3 and 2 - 2/3, over the mean length 3/2: -8/9, 8/9
    assert found["per_token"] == pytest.approx(2 / 3)
    assert found["per_token_stderr"] == pytest.approx(8 / 9)
    k3 = [math.exp(-1) - 1 + 1, math.exp(1) - 1 - 1, math.exp(-2) - 1 + 2]
    assert found["k3_per_sequence"] == pytest.approx(sum(k3) / 2)
    assert found["k3_per_token"] == pytest.approx(sum(k3) / 3)


def test_one_sample_has_no_standard_error():
    samples = Samples(rows(([1], [[5]], [[1]])), np.array([False]), 9)
    found = kl(torch.tensor([-1.0]), torch.tensor([-3.0]), samples)
    assert (found["per_sequence"], found["per_sequence_stderr"], found["per_token_stderr"]) == (2.0, None, None)


def test_prompts_end_where_learning_begins_and_are_taken_once():
    first = ([1, 4], [[5, 6, 2], [7, 2]], [[0, 1, 1], [1, 1]])  # a prompt token that the trunk has lost
    assert prompts_of(rows(first, ([1], [[8], [9]], [[1], [1]]), first)) == [[1, 4, 5], [1]]


def test_prompts_of_a_file_are_those_of_the_pairs(tmp_path):
    turns = [{"role": "user", "content": "write a poem"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": turns, **answers}))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": turns}))
    for system in (False, True):
        chat = {"add_empty_system": system}
        pairs, _ = load_pairs(tmp_path / "pairs.jsonl", toy_tokenizer(), max_length=120, max_prompt_length=60, **chat)
        (prompt,) = prompts_of(TokenizedDataset(pairs))
        encoder = ChatEncoder(toy_tokenizer(), **chat)
        assert read_prompts(tmp_path / "prompts.jsonl", encoder, strings_are_turns=False) == [prompt]


def test_strings_are_turns_or_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("poem")
    plain = toy_tokenizer()
    (ids,) = read_prompts(path, ChatEncoder(plain), strings_are_turns=False)
    assert plain.decode(ids) == "<s>poem"
    (ids,) = read_prompts(path, ChatEncoder(plain), strings_are_turns=True)
    assert plain.decode(ids).endswith("<|user|>\npoem</s>\n<|assistant|>\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "q"}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"empty.jsonl, line 2: the prompt is empty"):
        read_prompts(empty, ChatEncoder(toy_tokenizer(bos=False)), strings_are_turns=False)


def test_prompts_are_drawn_without_replacement():
    prompts = [[number] for number in range(20)]
    drawn = choose(prompts, 5)
    assert len({ids[0] for ids in drawn}) == 5
    assert drawn == sorted(drawn) != prompts[:5]
    assert choose(prompts, 99) == prompts


def test_samples_hold_the_token_that_ends_them(tmp_path):
    model = toy_model(max_position_embeddings=40)
    with torch.no_grad():  # every token is as likely as EOS
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = [2, 3, 4, 5, 6, 7, 8, 9]  # 8 of 400
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    prompts = [[1, 5], [1] * 20, [1] * 39] * 40
    scoring = SimpleNamespace(
        tokenizer=toy_tokenizer(), precision="fp32", device=torch.device("cpu"), trust_remote_code=False
    )
    samples = sample(tmp_path, scoring, prompts, 30)
    for prompt, example, cut in zip(prompts, samples.rows(np.arange(120)), samples.cut, strict=True):
        drawn = example.branches[0].tolist()
        assert example.trunk.tolist() == prompt
        assert not set(drawn[:-1]) & set(range(2, 10))
        assert cut == (drawn[-1] not in range(2, 10))
        assert not cut or len(drawn) == min(30, 40 - len(prompt))
    assert samples.rows.loss_tokens.tolist() == samples.rows.branch_lengths.tolist()
    # not ended after 30, 20 and 1 tokens: 0.98^30 = 0.55, 0.98^20 = 0.67 and 0.98 of 40 each, 87.8 in all
    assert 70 < samples.cut.sum() < 105
    with pytest.raises(ValueError, match="40 tokens fill the model's context of 40"):
        sample(tmp_path, scoring, [[1] * 40], 30)


@pytest.fixture(scope="module")
def near_folder(tmp_path_factory, model_folder):
    """The base, its output head somewhat changed."""
    folder = tmp_path_factory.mktemp("models") / "near"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        torch.manual_seed(3)
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight), alpha=0.12)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def evaluated(tmp_path, *arguments):
    output = tmp_path / "result.json"
    assert main(["evaluate", *map(str, arguments), "--output", str(output), *FP32]) == 0
    return json.loads(output.read_text())["kl"]


@torch.no_grad()
def exact(policy_folder, base_folder, texts):
    """The mean over prompts of Σ π(v) log(π(v) / base(v)) of the next token, by transformers alone."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy_folder, base_folder)]
    found = []
    for text in texts:
        ids = torch.tensor([toy_tokenizer()(text).input_ids])
        policy, base = (model(ids).logits[0, -1].double().log_softmax(-1) for model in models)
        found.append((policy.exp() * (policy - base)).sum().item())
    return sum(found) / len(found)


def test_next_token_in_closed_form(tmp_path, near_folder, model_folder, pairs_file):
    generator = random.Random(0)
    texts = sorted({words(generator, 2, 6) for _ in range(440)})[:400]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(texts))
    found = evaluated(
        tmp_path, near_folder, "--base", model_folder, "--pairs", pairs_file,
        "--kl-samples", 400, "--kl-prompts", prompts, "--kl-max-new-tokens", 1,
    )  # fmt: skip
    expected = exact(near_folder, model_folder, texts)
    assert (found["samples"], found["tokens"]) == (400, 400)
    for name in ("per_sequence", "per_token", "k3_per_sequence", "k3_per_token"):
        assert found[f"{name}_stderr"] < expected / 4
        assert abs(found[name] - expected) < 3 * found[f"{name}_stderr"], name


def test_a_model_against_itself_is_exactly_zero(tmp_path, model_folder, pairs_file):
    found = evaluated(
        tmp_path, model_folder, "--base", model_folder, "--pairs", pairs_file,
        "--kl-samples", 10, "--kl-max-new-tokens", 20,
    )  # fmt: skip
    assert found["tokens"] > 100
    for name in ("per_sequence", "per_token", "k3_per_sequence", "k3_per_token"):
        assert (found[name], found[f"{name}_stderr"]) == (0, 0)
