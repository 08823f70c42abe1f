"""Sampling while training: what plain greedy decoding says, and no trace of it in the training."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import at_call, config, read_metrics, read_samples, settings, terminate, without_timings, write_messages
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from toys import toy_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from notus.config import LoraConfig, config_from_dict
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Example, collate
from notus.data.tokenize import load_pairs, load_sft
from notus.model.lora import inject_lora, merge_lora
from notus.model.policy import Policy
from notus.runtime.process import STOPPED
from notus.training import dpo, sampling, sft
from notus.training import parallelize as parallel
from notus.training.parallelize import build_policy, read_model_config
from notus.training.sampling import Sample, Sampler, build_sampler, first_prompts
from notus.training.throughput import Meter

LORA = {"lora__rank": 2, "lora__dropout": 0.3}
SAMPLED = {"tracking__samples": 3, "tracking__sample_tokens": 5}


def greedy(source: Path | PreTrainedModel, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """What transformers' own greedy generation says after one prompt, without the end."""
    model = AutoModelForCausalLM.from_pretrained(source) if isinstance(source, Path) else source
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=0, do_sample=False)
    ids = torch.tensor([prompt])
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
    return [token for token in out[0, len(prompt) :].tolist() if token not in ends]


def _sampler(folder: Path, device: torch.device, prompts: list[list[int]], **options: Any) -> Sampler:
    policy = build_policy(folder, read_model_config(folder), device=device, precision="fp32")
    return _sampler_of(policy, folder, device, prompts, **options)


def _sampler_of(
    policy: Policy, folder: Path, device: torch.device, prompts: list[list[int]], **options: Any
) -> Sampler:
    given = {"max_new_tokens": 6, "longest": 100, "ends": {2}, **options}
    arrays = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return Sampler(policy, AutoTokenizer.from_pretrained(folder), arrays, device=device, **given)


def _completions(folder: Path, expected: list[list[int]], prompts: list[list[int]]) -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in (prompts, expected)]
    return [Sample(index, *both) for index, both in enumerate(zip(*texts, strict=True))]


PROMPTS = [[1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71]]


@pytest.mark.parametrize("longest", [100, 10])  # all in one batch; the longest prompt may grow by 3 tokens, in its own
def test_samples_are_those_of_greedy_generation(longest: int, model_folder: Path, device: torch.device) -> None:
    passes: list[int] = []
    plain = [greedy(model_folder, prompt, min(6, longest - len(prompt)), set()) for prompt in PROMPTS]
    end = plain[0][2]  # ends the first after two tokens, if not before
    sampler = _sampler(model_folder, device, PROMPTS, longest=longest, ends={end})
    found = sampler(lambda: passes.append(1))
    expected = [greedy(model_folder, prompt, min(6, longest - len(prompt)), {end}) for prompt in PROMPTS]
    assert len(expected[0]) <= 2 < max(map(len, expected))
    assert found == _completions(model_folder, expected, PROMPTS)
    # a pass per token of a batch: 3 for the longest prompt, whose room that is, and 6 for each of the others alone
    assert len(passes) == (6 if longest == 100 else 3 + 6 + 6)


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},  # shorter than a prompt, and than every text
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},  # in the second layer alone
    "qwen3": {},
    "gemma": {},
    "phi3": {"sliding_window": 6},
    # learned positions, of which there are as many as the context has
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 30},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_says_what_it_generates(kind: str, tmp_path: Path, device: torch.device) -> None:
    folder = toy_model_folder(tmp_path / "model", kind, **FAMILIES[kind])
    prompts = [*PROMPTS, list(range(40, 56))]
    longest = 30 if kind == "opt" else 200  # then 14 tokens follow the longest prompt
    end = greedy(folder, PROMPTS[0], 20, set())[10]
    for ends in (set(), {end}):
        expected = [greedy(folder, prompt, min(20, longest - len(prompt)), ends) for prompt in prompts]
        sampler = _sampler(folder, device, prompts, max_new_tokens=20, longest=longest, ends=ends)
        assert sampler(lambda: None) == _completions(folder, expected, prompts)
        # not one token over and over, and a completion that ends early
        assert len(expected[0]) <= 10 if ends else max(len(set(new)) for new in expected) > 3


def test_learned_positions_end_with_the_context(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose prompt fills the context goes on beside one whose prompt does not, but not in its positions."""
    folder = toy_model_folder(tmp_path / "model", "opt", **{**FAMILIES["opt"], "max_position_embeddings": 10})
    prompts = [list(range(40, 48)), [1]]
    sampler = _sampler(folder, device, prompts, max_new_tokens=20, longest=10)
    monkeypatch.setattr(sampling, "world_size", lambda: 2)
    passes: list[int] = []
    assert sampler._complete(lambda: passes.append(1)) == {0: greedy(folder, prompts[0], 2, {2})}
    assert len(passes) == 8  # of the 9 for which the other rank has room: then both were asked


def test_bf16_says_what_the_model_says_in_bf16(model_folder: Path, device: torch.device) -> None:
    policy = build_policy(model_folder, read_model_config(model_folder), device=device, precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    found = _sampler_of(policy, model_folder, device, PROMPTS)(lambda: None)
    assert found == _completions(model_folder, [greedy(model, prompt, 6, {2}) for prompt in PROMPTS], PROMPTS)


@pytest.mark.parametrize("offload", [False, True])
def test_adapters_speak_without_dropout(
    offload: bool, model_folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if offload:  # as on a GPU, but for the pinned memory, which needs one
        monkeypatch.setattr(parallel, "CPUOffloadPolicy", lambda: CPUOffloadPolicy(pin_memory=False))
    adapter = LoraConfig(rank=2, alpha=4, dropout=0.5, target_modules="all-linear", rslora=False)
    config = read_model_config(model_folder)
    policy = build_policy(model_folder, config, device=device, precision="fp32", lora=adapter, cpu_offload=offload)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    inject_lora(plain, rank=2, alpha=4, dropout=0.5, target_modules="all-linear", rslora=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for sharded, whole in zip(policy.parameters(), plain.parameters(), strict=True):
            if sharded.requires_grad:
                values = torch.randn(whole.shape, generator=generator) / 4
                whole.copy_(values)
                sharded.to_local().copy_(values)
    before = greedy(model_folder, PROMPTS[1], 6, {2})
    merge_lora(plain)
    expected = [greedy(plain, prompt, 6, {2}) for prompt in PROMPTS]
    assert expected[1] != before
    found = _sampler_of(policy.train(), model_folder, device, PROMPTS)(lambda: None)
    assert found == _completions(model_folder, expected, PROMPTS)


def test_ranks_ask_each_other_every_few_passes_whether_all_is_said(
    model_folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = set(range(400))
    for every, expected in ((8, 8), (3, 3), (1, 1), (50, 20)):
        passes: list[int] = []
        monkeypatch.setattr(sampling, "AGREE_EVERY", every)
        sampler = _sampler(model_folder, device, PROMPTS, max_new_tokens=20, ends=everything)
        found = sampler(lambda passes=passes: passes.append(1))
        assert ([sample.completion for sample in found], len(passes)) == (["", "", ""], expected)
    assert _sampler(model_folder, device, [])(lambda: passes.append(1)) == []
    assert len(passes) == 20


STOPPED_AT = (None, 3)
MODES = [("none", False), ("selective", False), ("full", False), ("selective", True)]


@pytest.mark.parametrize(("mode", "compiled"), MODES)
@pytest.mark.parametrize("stopped_at", STOPPED_AT)
def test_the_policy_is_left_as_it_was_whatever_ends_the_sampling(
    mode: str,
    compiled: bool,
    stopped_at: int | None,
    model_folder: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    policy, untouched = (
        build_policy(
            model_folder, read_model_config(model_folder), device=device, precision="fp32",
            activation_checkpointing=mode, compile=compiled,
        ).train()
        for _ in range(2)
    )  # fmt: skip
    sampler = _sampler_of(policy, model_folder, device, PROMPTS)
    before, state, modes = _describe(policy), torch.get_rng_state(), []

    def stop() -> None:
        modes.append(policy.training)
        if len(modes) == stopped_at:
            raise InterruptedError

    if stopped_at is None:
        expected = [greedy(model_folder, prompt, 6, {2}) for prompt in PROMPTS]
        assert sampler(stop) == _completions(model_folder, expected, PROMPTS)
    else:
        with pytest.raises(InterruptedError):
            sampler(stop)
    assert (set(modes), len(modes), policy.training) == ({False}, stopped_at or 6, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert {(type(parameter.data), parameter.dtype) for parameter in policy.parameters()} == {(DTensor, torch.float32)}
    assert _describe(policy) == before
    assert all(torch.equal(*both) for both in zip(_gradients(policy), _gradients(untouched), strict=True))


def _describe(policy: Policy) -> dict[str, Any]:
    """What sampling takes away for a while."""
    forwards = {name: vars(module)["forward"] for name, module in policy.named_modules() if "forward" in vars(module)}
    assert len(forwards) >= 2
    return {**forwards, "attention": policy.causal_lm.config._attn_implementation}


def _gradients(policy: Policy) -> list[torch.Tensor]:
    trunk, branch = np.arange(5, 20), np.arange(30, 40)
    example = Example(0, trunk, (branch, branch[::-1].copy()), (np.ones(10, dtype=bool),) * 2)
    policy(collate([example], 2)).sum().backward()
    return [parameter.grad.to_local() for parameter in policy.parameters() if parameter.grad is not None]


def test_a_model_without_sdpa_takes_its_eager_attention(model_folder: Path, device: torch.device) -> None:
    sampler = _sampler(model_folder, device, PROMPTS)
    model = sampler._policy.causal_lm
    model._supports_sdpa = False
    taken: list[str] = []
    found = sampler(lambda: taken.append(model.config._attn_implementation))
    assert set(taken) == {"eager"}
    expected = [greedy(model_folder, prompt, 6, {2}) for prompt in PROMPTS]
    assert found == _completions(model_folder, expected, PROMPTS)


def _rows(
    folder: Path, records: list[dict[str, str]], load: Callable[..., Any], path: Path, **options: Any
) -> TokenizedDataset:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TokenizedDataset(load(path, tokenizer, max_length=40, cache_dir=path.parent / "cache", **options)[0])


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
    found = read_samples(tmp_path / "with")
    assert [(line["step"], line["index"]) for line in found] == [(step, i) for step in (0, 2, 4) for i in range(3)]
    assert all(set(line) == {"step", "index", "prompt", "completion"} for line in found)


def test_the_last_samples_are_those_of_the_exported_model(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    overrides = {**SAMPLED, "training__learning_rate": 0.05, "training__max_steps": 3}
    assert dpo.run(config("dpo", run, model_folder, pairs_file, **overrides)) == 0
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for folder, step in ((model_folder, 0), (run / "model", 3)):
        for line in read_samples(run):
            if line["step"] == step:
                prompt = [1, *tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]]
                new = greedy(folder, prompt, 5, {2})
                assert line["completion"] == tokenizer.decode(new, skip_special_tokens=True)
    texts = [[line["completion"] for line in read_samples(run) if line["step"] == step] for step in (0, 3)]
    assert texts[0] != texts[1]


def _on_two_ranks(trees: list[dict[str, Any]], ports: list[int]) -> None:
    for tree, port in zip(trees, ports, strict=True):
        with launched(port) as rank, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meter, "memory", lambda self, rank=rank: 1.5 + rank)
            assert dpo.run(config_from_dict(tree, "dpo")) == 0


def test_two_ranks_say_what_one_says(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    overrides = {**SAMPLED, "training__tokens_per_row": 70, "training__max_steps": 2, "data__eval_size": 5}
    # an odd number of prompts, and fewer than ranks: one of them has nothing to say, and goes along
    kinds = {
        "full": overrides,
        "lora": {**overrides, "lora__rank": 2, "tracking__samples": 1, "training__activation_checkpointing": "full"},
        "selective": {**overrides, "training__activation_checkpointing": "selective", "tracking__sample_tokens": 20},
    }
    for kind, options in kinds.items():
        dpo.run(config("dpo", tmp_path / kind / "one", model_folder, pairs_file, **options))
    trees = [settings(tmp_path / kind / "two", model_folder, pairs_file, **options) for kind, options in kinds.items()]
    run_ranks(_on_two_ranks, 2, tmp_path, trees, free_ports(3))
    for kind, options in kinds.items():
        one, two = tmp_path / kind / "one", tmp_path / kind / "two"
        assert read_samples(two) == read_samples(one)
        assert len(read_samples(two)) == 2 * options["tracking__samples"]
        assert {line["system/host_memory_gib"] for line in read_metrics(two)} == {2.5}  # the larger
        for key in ("loss", "grad_norm", "rewards/margins"):
            both = [[line[key] for line in read_metrics(run)] for run in (one, two)]
            assert both[1] == pytest.approx(both[0], abs=2e-5), key
        assert json.loads((two / "environment.json").read_text())["world_size"] == 2


def _stopped_on_one_rank(tree: dict[str, Any], ports: list[int]) -> None:
    passes: list[int] = []
    inner = Policy.next_token

    def next_token(policy: Policy, *given: Any) -> torch.Tensor:
        passes.append(1)
        if len(passes) == 7 and os.environ["RANK"] == "1":  # at step 2's evaluation
            terminate()
        return inner(policy, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "end_tokens", lambda *_: set())
        patch.setattr(Policy, "next_token", next_token)
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
    found = [(line["step"], line["index"]) for line in read_samples(tmp_path / "run")]
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
        inner = Policy.next_token
        patch.setattr(Policy, "next_token", lambda *given: passes.append(1) or inner(*given))
        at_call(patch, Policy, "next_token", call, terminate)
        assert dpo.run(cut) == STOPPED
    assert len(passes) == call
    assert {line["step"] for line in read_samples(tmp_path / "cut")} == (set() if call == 2 else {0})
    assert dpo.run(cut) == 0
    assert read_samples(tmp_path / "cut") == read_samples(tmp_path / "whole")
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
    assert max(line["step"] for line in read_samples(tmp_path / "cut")) == 3
    assert dpo.run(cut) == 0
    assert read_samples(tmp_path / "cut") == read_samples(tmp_path / "whole")
    told = json.loads((tmp_path / "cut" / "environment.json").read_text())
    # the first launch left nothing; the second a checkpoint at step 2
    assert [(launch["from_step"], launch["to_step"]) for launch in told["launches"]] == [(0, 2), (2, 4)]
    assert told["seconds"] == pytest.approx(sum(launch["seconds"] for launch in told["launches"]))
    assert min(launch["seconds"] for launch in told["launches"]) > 0
    _assert_events_once(tmp_path / "cut")


def _assert_events_once(run: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run / "tensorboard"))
    events.Reload()  # files of one second come in any order
    assert sorted(event.step for event in events.Scalars("train/loss")) == [1, 2, 3, 4]
    assert sorted(event.step for event in events.Scalars("eval/loss")) == [0, 1, 2, 3, 4]
    assert sorted(event.step for event in events.Scalars("system/tokens_per_second")) == [1, 2, 3, 4]
    assert sorted(event.step for event in events.Tensors("samples/text_summary")) == [0, 1, 2, 3, 4]
    for title, part in (("config", "batch_size: 4"), ("data", '"rows": 13')):
        texts = events.Tensors(f"{title}/text_summary")
        assert sorted(event.step for event in texts) == [0, 3]
        assert part in texts[0].tensor_proto.string_val[0].decode()


def test_earlier_samples_stay_where_a_run_goes_on_without(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)
        assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **SAMPLED)) == STOPPED
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file)) == 0
    assert [line["step"] for line in read_samples(tmp_path / "run")] == [0, 0, 0]


def test_tokens_beyond_the_tokenizer_are_passed_over(tmp_path: Path, device: torch.device) -> None:
    folder = toy_model_folder(tmp_path / "padded", vocab_size=4096)  # its tokenizer has 400
    (sample,) = _sampler(folder, device, [[1, 50]], ends=set())(lambda: None)
    assert isinstance(sample.completion, str)
