"""SFT runs on toys, against a plain loop over whole sequences written here."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from runs import config, read_metrics, words
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.training import sft


def _write(path: Path, count: int, seed: int = 0) -> Path:
    generator = random.Random(seed)
    rows = [{"prompt": words(generator, 1, 8), "completion": f" {words(generator, 1, 9)}"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _nll(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, row: dict[str, str]
) -> tuple[torch.Tensor, int]:
    whole = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
    ids = torch.tensor([*whole["input_ids"], tokenizer.eos_token_id])
    first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(row["prompt"]))
    logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return -logits.gather(-1, ids[1:, None])[first - 1 :].sum(), len(ids) - first


def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path: Path, model_folder: Path) -> None:
    data = _write(tmp_path / "train.jsonl", 7)
    held_out = _write(tmp_path / "eval.jsonl", 3, seed=1)
    run = tmp_path / "run"
    sft.run(
        config(
            "sft", run, model_folder, data, data__shuffle=False, data__eval=str(held_out), training__batch_size=3,
            training__optimizer="adamw", training__weight_decay=0.1, training__lr_schedule="cosine",
            training__warmup_ratio=0.5, training__max_grad_norm=None, training__tokens_per_row=60,
        )
    )  # fmt: skip
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder))
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    others = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 3)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    losses, rates = [], []
    for start in (0, 3, 6):  # the last step has one row
        parts = [_nll(model, tokenizer, row) for row in rows[start : start + 3]]
        loss = torch.stack([nll for nll, _ in parts]).sum() / sum(count for _, count in parts)
        loss.backward()
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lines = read_metrics(run)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    trained, start = (load_file(run / "model" / "model.safetensors"), load_file(model_folder / "model.safetensors"))
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - start[name]).norm()
        assert (trained[name] - parameter.detach()).norm() < 2e-3 * moved, name
    with torch.no_grad():
        parts = [_nll(model, tokenizer, json.loads(line)) for line in held_out.read_text().splitlines()]
    expected = sum(nll.item() for nll, _ in parts) / sum(count for _, count in parts)
    assert lines[-1]["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_window_of_steps_is_logged_as_one_mean_over_its_tokens(tmp_path: Path, model_folder: Path) -> None:
    data = _write(tmp_path / "train.jsonl", 6)
    for every in (1, 3):
        sft.run(
            config("sft", tmp_path / str(every), model_folder, data, training__batch_size=2, training__log_every=every)
        )
    single, window = (read_metrics(tmp_path / str(every)) for every in (1, 3))
    assert [line["step"] for line in window] == [3]
    tokens = [b["num_tokens"] - a for a, b in zip([0, *(line["num_tokens"] for line in single)], single, strict=False)]
    assert sum(tokens) == window[0]["num_tokens"]
    losses = [line["loss"] for line in single]
    assert min(losses) < window[0]["loss"] < max(losses)
    assert window[0]["grad_norm"] == single[-1]["grad_norm"]
