"""Tokens that a run adds: rows that start as the mean, trained, exported, resumed, and separate from padding."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, launched, run_ranks
from runs import config, read_metrics, write_pairs
from test_second_stages import assert_near, plain_logps, train
from toys import toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from notus.evaluation.resolve_model import load_unfinished, read_run_settings
from notus.model.export import load_causal_lm
from notus.runtime.distributed import process_group
from notus.training import dpo
from notus.training.checkpoint import checkpoints_in

NEW = ["<tool>", "<call>"]
QUICK: dict[str, Any] = {
    "training__max_steps": 2, "training__learning_rate": 2e-2, "training__optimizer": "adamw", "data__new_tokens": NEW,
}  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs with the new tokens in them."""
    path = write_pairs(tmp_path / "pairs.jsonl", 10)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["prompt"] += " <tool>"
        row["chosen"] += "<call>x"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def enlarged(base: Path, count: int = 2) -> torch.nn.Module:
    """The base with rows by transformers, without its random part."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        assert weight.shape[0] == 400
    embedding, head = (each.weight.detach() for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    means = embedding.mean(0), head.mean(0)
    model.resize_token_embeddings(400 + count, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[400:] = means[0]
        model.get_output_embeddings().weight[400:] = means[1]
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_new_tokens_are_learned_and_exported(tied: bool, rank: int, pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=tied)
    lora = {"lora__rank": rank, "lora__modules_to_save": ["embed_tokens", "lm_head"]} if rank else {}
    out = tmp_path / "run"
    reference, trained, rows = train(config("dpo", out, base, pairs, training__save_every=1, **lora, **QUICK))
    assert_near(reference, plain_logps(enlarged(base), rows))
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert {400, 401} < {int(token) for example in rows([0]) for token in (*example.trunk, *example.branches[0])}
    model, tokenizer = load_causal_lm(out / "model", dtype=torch.float32, device="cpu")
    assert_near(plain_logps(model, rows), trained)
    assert tokenizer("<tool><call>", add_special_tokens=False).input_ids == [400, 401]
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == 402
    if rank:
        peft = pytest.importorskip("peft")
        model = peft.AutoPeftModelForCausalLM.from_pretrained(out / "model").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    assert_near(plain_logps(model, rows), trained)
    start = enlarged(base).get_input_embeddings().weight
    assert (model.get_input_embeddings().weight[400:] - start[400:]).abs().max() > 1e-3
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2)
    assert model.generate(input_ids=torch.tensor([[400, 401, 7]]), generation_config=settings).shape[1] > 3
    with process_group():
        snapshot, tokenizer, checkpoint = load_unfinished(out, read_run_settings(out))
    assert checkpoint == checkpoints_in(out / "checkpoints")[0]
    assert_near(plain_logps(snapshot.eval(), rows), trained)
    assert len(tokenizer) == 402


def test_a_resumed_run_with_new_tokens_ends_as_an_undisturbed_one(pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    given = {**QUICK, "training__max_steps": 3, "training__save_every": 1, "training__keep_checkpoints": None}
    dpo.run(config("dpo", tmp_path / "whole", base, pairs, **given))
    given["training__resume"] = str(tmp_path / "whole" / "checkpoints" / "step-00000001")
    dpo.run(config("dpo", tmp_path / "resumed", base, pairs, **given))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "resumed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_padded_vocabulary_has_room(pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", vocab_size=410)
    reference, trained, rows = train(config("dpo", tmp_path / "run", base, pairs, **QUICK))
    assert_near(reference, plain_logps(AutoModelForCausalLM.from_pretrained(base).eval(), rows))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.vocab_size == 410
    assert_near(plain_logps(model, rows), trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__new_tokens": ["</s>"]}, "'</s>' is in the tokenizer already: remove it"),
        ({"data__new_tokens": ["<a>", "<a>"]}, "'<a>' is given twice"),
        ({"lora__rank": 2}, r"set lora\.modules_to_save=\[embed_tokens, lm_head\]"),
        ({"lora__rank": 2, "lora__modules_to_save": ["lm_head"]}, r"modules_to_save=\[lm_head, embed_tokens\]"),
    ],
)
def test_what_cannot_be_added_is_one_line(change: dict[str, Any], message: str, pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        dpo.run(config("dpo", tmp_path / "run", base, pairs, **{**QUICK, **change}))


def test_an_added_token_that_no_row_uses_does_no_harm(tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # id 400, which the embedding of 400 rows does not have
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<image>") == 400
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    given = {"training__max_steps": 1, "training__learning_rate": 1e-3}
    assert dpo.run(config("dpo", tmp_path / "run", base, path, **given)) == 0
    row = {"prompt": "see <image>", "chosen": " a", "rejected": " b"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl.*5.*'<image>' has id 400, .* ends at 399"):
        dpo.run(config("dpo", tmp_path / "other", base, path, **given))


def on_two_ranks(port: int, base: str, pairs: str, out: str, settings: dict[str, Any]) -> None:
    with launched(port):
        dpo.run(config("dpo", Path(out), Path(base), Path(pairs), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_ranks_start_and_end_as_one(rank: int, pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=rank == 0)
    lora = {"lora__rank": rank, "lora__modules_to_save": ["embed_tokens", "lm_head"]} if rank else {}
    settings = {**QUICK, **lora, "training__optimizer": "rmsprop"}
    dpo.run(config("dpo", tmp_path / "one", base, pairs, **settings))
    run_ranks(on_two_ranks, 2, tmp_path, free_port(), str(base), str(pairs), str(tmp_path / "two"), settings)
    for key in ("loss", "logps/chosen", "grad_norm"):
        ones, twos = ([line[key] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
        assert twos == pytest.approx(ones, rel=1e-4)


@pytest.mark.parametrize("stage", ["merged", "stacked", "continued", "more"])
def test_a_second_stage_keeps_the_tokens_of_the_first(stage: str, pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    first, second = tmp_path / "first", tmp_path / "second"
    lora = {"lora__rank": 2, "lora__modules_to_save": ["embed_tokens"]}
    _, trained, rows = train(config("dpo", first, base, pairs, **lora, **QUICK))
    change: dict[str, Any] = {
        "merged": {"data__new_tokens": []},
        "stacked": {"data__new_tokens": [], "lora__rank": 3, "lora__target_modules": ["v_proj", "up_proj"]},
        "continued": {"data__new_tokens": [], "lora__continue": True, **lora},
        "more": {"data__new_tokens": ["<third>"]},
    }[stage]
    settings = config("dpo", second, first, pairs, **{**QUICK, **change})
    reference, trained_again, again = train(settings)
    if stage == "more":  # another row is another term of the softmax
        start, _ = load_causal_lm(first / "model", dtype=torch.float32, device="cpu")
        mean = start.get_input_embeddings().weight.detach().mean(0)
        start.resize_token_embeddings(403, mean_resizing=False)
        with torch.no_grad():
            start.get_input_embeddings().weight[402:] = mean
        trained = plain_logps(start.eval(), rows)
    assert_near(reference, trained)
    assert (again.digests() == rows.digests()).all()
    model, tokenizer = load_causal_lm(second / "model", dtype=torch.float32, device="cpu")
    assert_near(plain_logps(model, rows), trained_again)
    assert len(tokenizer) == model.config.vocab_size == (403 if stage == "more" else 402)
