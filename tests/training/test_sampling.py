"""Sampling while training: what plain greedy decoding says, and no trace of it in the training."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import at_call, config, read_metrics, settings, terminate, without_timings, write_messages
from safetensors.torch import load_file
from toys import toy_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.config import config_from_dict
from notus.data.dataset import load_pairs, load_sft
from notus.data.rows import Rows
from notus.entry import STOPPED
from notus.training import dpo, sampling, sft
from notus.training.build import build_policy, read_model_config
from notus.training.metering import Meter
from notus.training.sampling import Sample, Sampler, build_sampler, first_prompts

LORA = {"lora__rank": 2, "lora__dropout": 0.3}
SAMPLED = {"tracking__samples": 3, "tracking__sample_tokens": 5}


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def greedy(folder: Path, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """One whole forward pass of transformers' model per token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _sampler(folder: Path, device: torch.device, prompts: list[list[int]], **options: Any) -> Sampler:
    policy = build_policy(folder, read_model_config(folder), device=device, precision="fp32")
    given = {"max_new_tokens": 6, "longest": 100, "ends": {2}, **options}
    arrays = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return Sampler(policy, AutoTokenizer.from_pretrained(folder), arrays, device=device, **given)


PROMPTS = [[1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71]]


@pytest.mark.parametrize("longest", [100, 10])  # all in one row; the longest prompt may grow by 3 tokens, in its own
def test_samples_are_those_of_plain_greedy_decoding(longest: int, model_folder: Path, device: torch.device) -> None:
    passes: list[int] = []
    plain = [greedy(model_folder, prompt, min(6, longest - len(prompt)), set()) for prompt in PROMPTS]
    end = plain[0][2]  # ends the first after two tokens, if not before
    sampler = _sampler(model_folder, device, PROMPTS, longest=longest, ends={end})
    found = sampler(lambda: passes.append(1))
    expected = [greedy(model_folder, prompt, min(6, longest - len(prompt)), {end}) for prompt in PROMPTS]
    assert len(expected[0]) <= 2
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in (PROMPTS, expected)]
    assert found == [Sample(index, *both) for index, both in enumerate(zip(*texts, strict=True))]
    # one pass per token, and one for the token that ends a completion
    tokens = max(len(new) + (len(new) < 6) for new in expected) if longest == 100 else 0
    assert longest == 10 or len(passes) == tokens


def test_no_pass_follows_the_last_token(model_folder: Path, device: torch.device) -> None:
    everything = set(range(400))
    passes: list[int] = []
    found = _sampler(model_folder, device, PROMPTS, ends=everything)(lambda: passes.append(1))
    assert ([sample.completion for sample in found], len(passes)) == (["", "", ""], 1)
    assert _sampler(model_folder, device, [])(lambda: passes.append(1)) == []
    assert len(passes) == 1


def test_the_policy_is_left_as_it_was_whatever_ends_the_sampling(model_folder: Path, device: torch.device) -> None:
    sampler = _sampler(model_folder, device, PROMPTS)
    policy = sampler._policy.train()
    state = torch.get_rng_state()
    modes: list[bool] = []

    def stop() -> None:
        modes.append(policy.training)
        if len(modes) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampler(stop)
    assert (modes, policy.training) == ([False] * 3, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def _rows(folder: Path, records: list[dict[str, str]], load: Callable[..., Any], path: Path, **options: Any) -> Rows:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Rows(load(path, tokenizer, max_length=40, cache_dir=path.parent / "cache", **options)[0])


def test_prompts_are_the_first_different_ones_up_to_the_completion(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = ["one", "two", "one", "three and more", "four"]
    pairs = [{"prompt": prompt, "chosen": f" a{i}", "rejected": f" b{i}"} for i, prompt in enumerate(prompts)]
    rows = _rows(model_folder, pairs, load_pairs, tmp_path / "pairs.jsonl", max_prompt_length=20)
    texts = [tokenizer.decode(prompt) for prompt in first_prompts(rows, 3, 40)]
    assert texts == ["<s>one", "<s>two", "<s>three and more"]
    assert len(first_prompts(rows, 9, 40)) == 4
    longest = max(len(prompt) for prompt in first_prompts(rows, 9, 40))
    assert "<s>three and more" not in [tokenizer.decode(prompt) for prompt in first_prompts(rows, 9, longest)]
    monkeypatch.setattr(sampling, "SEARCHED", 3)  # rows, not prompts: "one" is there twice
    assert [tokenizer.decode(prompt) for prompt in first_prompts(rows, 9, 40)] == ["<s>one", "<s>two"]
    chats = [{"prompt": prompt, "completion": " yes"} for prompt in prompts]
    rows = _rows(model_folder, chats, load_sft, tmp_path / "chats.jsonl")
    assert [tokenizer.decode(prompt) for prompt in first_prompts(rows, 2, 40)] == ["<s>one", "<s>two"]


def test_the_end_is_where_tokenizer_or_model_says(tmp_path: Path, model_folder: Path, device: torch.device) -> None:
    from transformers import GenerationConfig

    rows = _rows(model_folder, [{"prompt": "one", "completion": " two"}], load_sft, tmp_path / "chats.jsonl")
    policy = build_policy(model_folder, read_model_config(model_folder), device=device, precision="fp32")
    options: dict[str, Any] = {"count": 1, "max_new_tokens": 4, "tokens_per_row": 300, "device": device}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for told, ends in ((None, {2}), ([7, 8], {2, 7, 8}), (9, {2, 9})):
        generation = GenerationConfig(eos_token_id=told) if told else None
        sampler = build_sampler(policy, tokenizer, rows, generation_config=generation, **options)
        assert sampler is not None
        assert (sampler._ends, sampler._longest) == (ends, 256)  # the toy's context
    assert build_sampler(policy, tokenizer, rows, generation_config=None, **{**options, "count": 0}) is None


@pytest.mark.parametrize("kind", ["dpo-full", "dpo-lora", "sft-lora"])
def test_training_is_bitwise_the_same_with_and_without(
    kind: str, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    task, _, what = kind.partition("-")
    data = pairs_file if task == "dpo" else write_messages(tmp_path / "chats.jsonl", 18)
    overrides = {"training__eval_every": 2, "data__eval_size": 5} | (LORA if what == "lora" else {})
    for name, more in (("without", {}), ("with", SAMPLED)):
        run = {"dpo": dpo.run, "sft": sft.run}[task]
        assert run(config(task, tmp_path / name, model_folder, data, **overrides, **more)) == 0
    files = [next((tmp_path / name / "model").glob("*.safetensors")) for name in ("without", "with")]
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert without_timings(tmp_path / "without") == without_timings(tmp_path / "with")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = samples_of(tmp_path / "with")
    assert [(line["step"], line["index"]) for line in found] == [(step, i) for step in (0, 2, 4) for i in range(3)]
    assert all(set(line) == {"step", "index", "prompt", "completion"} for line in found)


def test_the_last_samples_are_those_of_the_exported_model(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    overrides = {**SAMPLED, "training__learning_rate": 0.05, "training__max_steps": 3}
    assert dpo.run(config("dpo", run, model_folder, pairs_file, **overrides)) == 0
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for folder, step in ((model_folder, 0), (run / "model", 3)):
        for line in samples_of(run):
            if line["step"] == step:
                prompt = [1, *tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]]
                new = greedy(folder, prompt, 5, {2})
                assert line["completion"] == tokenizer.decode(new, skip_special_tokens=True)
    texts = [[line["completion"] for line in samples_of(run) if line["step"] == step] for step in (0, 3)]
    assert texts[0] != texts[1]


def _on_two_ranks(trees: list[dict[str, Any]], ports: list[int]) -> None:
    for tree, port in zip(trees, ports, strict=True):
        with launched(port) as rank, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meter, "memory", lambda self, rank=rank: 1.5 + rank)
            assert dpo.run(config_from_dict(tree, "dpo")) == 0


def test_two_ranks_say_what_one_says(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    overrides = {**SAMPLED, "training__tokens_per_row": 70, "training__max_steps": 2, "data__eval_size": 5}
    # an odd number of prompts, and fewer than ranks: one of them has nothing to say, and goes along
    kinds = {"full": overrides, "lora": {**overrides, "lora__rank": 2, "tracking__samples": 1}}
    for kind, options in kinds.items():
        dpo.run(config("dpo", tmp_path / kind / "one", model_folder, pairs_file, **options))
    trees = [settings(tmp_path / kind / "two", model_folder, pairs_file, **options) for kind, options in kinds.items()]
    run_ranks(_on_two_ranks, 2, tmp_path, trees, free_ports(2))
    for kind, options in kinds.items():
        one, two = tmp_path / kind / "one", tmp_path / kind / "two"
        assert samples_of(two) == samples_of(one)
        assert len(samples_of(two)) == 2 * options["tracking__samples"]
        assert {line["system/host_memory_gib"] for line in read_metrics(two)} == {2.5}  # the larger
        assert json.loads((two / "environment.json").read_text())["world_size"] == 2


def _stopped_on_one_rank(tree: dict[str, Any], ports: list[int]) -> None:
    passes: list[int] = []
    inner = Sampler._next_tokens

    def next_tokens(sampler: Sampler, *given: Any) -> list[int]:
        passes.append(1)
        if len(passes) == 7 and os.environ["RANK"] == "1":  # at step 2's evaluation
            terminate()
        return inner(sampler, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "end_tokens", lambda *_: set())
        patch.setattr(Sampler, "_next_tokens", next_tokens)
        for port, (code, total) in zip(ports, ((STOPPED, 7), (0, 7 + 2 * 5)), strict=True):
            with launched(port):
                assert (dpo.run(config_from_dict(tree, "dpo")), len(passes)) == (code, total)


def test_a_signal_to_one_rank_while_sampling_ends_all_at_the_same_pass(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    overrides = {**SAMPLED, "training__eval_every": 2, "data__eval_size": 5}
    run_ranks(
        _stopped_on_one_rank, 2, tmp_path, settings(tmp_path / "run", model_folder, pairs_file, **overrides),
        free_ports(2),
    )  # fmt: skip
    found = [(line["step"], line["index"]) for line in samples_of(tmp_path / "run")]
    assert found == [(step, index) for step in (0, 2, 4) for index in range(3)]


@pytest.mark.parametrize("call", [2, 9])  # of 5 forward passes each: at step 0, and at step 2's evaluation
def test_a_signal_while_sampling_ends_the_run_at_once_and_nothing_is_said_twice(
    call: int, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {**SAMPLED, "training__eval_every": 2, "training__save_every": 3, "data__eval_size": 5}
    monkeypatch.setattr(sampling, "end_tokens", lambda *_: set())
    assert dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **overrides)) == 0
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **overrides)
    with monkeypatch.context() as patch:
        passes: list[int] = []
        inner = Sampler._next_tokens
        patch.setattr(Sampler, "_next_tokens", lambda *given: passes.append(1) or inner(*given))
        at_call(patch, Sampler, "_next_tokens", call, terminate)
        assert dpo.run(cut) == STOPPED
    assert len(passes) == call
    assert {line["step"] for line in samples_of(tmp_path / "cut")} == (set() if call == 2 else {0})
    assert dpo.run(cut) == 0
    assert samples_of(tmp_path / "cut") == samples_of(tmp_path / "whole")
    assert without_timings(tmp_path / "cut") == without_timings(tmp_path / "whole")


def test_samples_after_the_checkpoint_go_when_a_killed_run_goes_on(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    overrides = {**SAMPLED, "training__eval_every": 1, "training__save_every": 2, "data__eval_size": 5}
    overrides["tracking__tensorboard"] = True
    assert dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **overrides)) == 0
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **overrides)
    for step in (2, 4):  # in the step after the first, before any checkpoint; after three
        with monkeypatch.context() as patch:
            at_call(patch, dpo.DPOTask, "row_loss", step, kill)
            with pytest.raises(Killed):
                dpo.run(cut)
    assert max(line["step"] for line in samples_of(tmp_path / "cut")) == 3
    assert dpo.run(cut) == 0
    assert samples_of(tmp_path / "cut") == samples_of(tmp_path / "whole")
    told = json.loads((tmp_path / "cut" / "environment.json").read_text())
    # the first launch left nothing; the second a checkpoint at step 2
    assert [(launch["from_step"], launch["to_step"]) for launch in told["launches"]] == [(0, 2), (2, 4)]
    assert told["seconds"] == pytest.approx(sum(launch["seconds"] for launch in told["launches"]))
    assert min(launch["seconds"] for launch in told["launches"]) > 0
    _assert_events_once(tmp_path / "cut")


def _assert_events_once(run: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("system/tokens_per_second")] == [1, 2, 3, 4]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 1, 2, 3, 4]
    for title, part in (("config", "batch_size: 4"), ("data", '"rows": 13')):
        texts = events.Tensors(f"{title}/text_summary")
        assert [event.step for event in texts] == [0, 3]
        assert part in texts[0].tensor_proto.string_val[0].decode()


def test_earlier_samples_stay_where_a_run_goes_on_without(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)
        assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **SAMPLED)) == STOPPED
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file)) == 0
    assert [line["step"] for line in samples_of(tmp_path / "run")] == [0, 0, 0]


def test_tokens_beyond_the_tokenizer_are_passed_over(tmp_path: Path, device: torch.device) -> None:
    folder = toy_model_folder(tmp_path / "padded", vocab_size=4096)  # its tokenizer has 400
    (sample,) = _sampler(folder, device, [[1, 50]], ends=set())(lambda: None)
    assert isinstance(sample.completion, str)
