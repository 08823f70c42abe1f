"""DPO runs on toys, against a plain loop over whole sequences written here."""

import json
import math
from dataclasses import astuple, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from runs import config, read_metrics, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.config import DPOConfig
from notus.training import dpo
from notus.training.objective import PairObjective, Sums

KEYS = {
    "step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logps/chosen_change",
    "pairs_per_second", "system/tokens_per_second", "system/host_memory_gib",
}  # fmt: skip


def _plain_logp(model: torch.nn.Module, tokenizer: Any, prompt: str, completion: str) -> torch.Tensor:
    """Sum of completion log-probs from one whole sequence through transformers' own attention."""
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    ids = torch.tensor([*whole["input_ids"], tokenizer.eos_token_id])
    first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt))
    logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, ids[1:, None])[first - 1 :].sum()


def _plain_dpo(model_folder: Path, pairs: Path, steps: int, batch: int, beta: float = 0.1) -> tuple[list[float], Any]:
    """Losses of plain DPO in data order: RMSprop 1e-3 falling linearly over `steps`, gradient norm clipped to 1."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    data = [json.loads(line) for line in pairs.read_text().splitlines()]
    losses = []
    for step in range(steps):
        total = torch.zeros(())
        part = data[step * batch : (step + 1) * batch]
        for pair in part:
            with torch.no_grad():
                anchors = [
                    _plain_logp(reference, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")
                ]
            values = [_plain_logp(policy, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
            margin = (values[0] - anchors[0]) - (values[1] - anchors[1])
            total = total - torch.nn.functional.logsigmoid(beta * margin) / len(part)
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, policy


def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    dpo.run(config("dpo", run, model_folder, pairs_file, data__shuffle=False))
    expected, policy = _plain_dpo(model_folder, pairs_file, steps=5, batch=4)
    lines = read_metrics(run)
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=2e-5)
    trained = load_file(run / "model" / "model.safetensors")
    start = load_file(model_folder / "model.safetensors")
    for name, parameter in policy.named_parameters():
        moved = (parameter.detach() - start[name]).norm()
        assert (trained[name] - parameter.detach()).norm() < 2e-3 * moved, name
    assert all(set(line) == KEYS for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/accuracies"] == 0.5  # at the start every pair is a tie, and a tie counts half
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["epoch"] == 1.0


def test_what_a_run_leaves_behind(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    settings = config("dpo", run, model_folder, pairs_file, training__max_steps=2)
    dpo.run(settings)
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "reference",
        "model",
    }
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    before = (run / "metrics.jsonl").read_bytes()
    dpo.run(settings)  # finished: says so, changes nothing
    assert (run / "metrics.jsonl").read_bytes() == before


def test_neither_rows_nor_checkpointing_change_the_result(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"training__tokens_per_row": 70},
        {"training__activation_checkpointing": "full"},
    ]
    losses = []
    for number, overrides in enumerate(settings):
        run = tmp_path / str(number)
        dpo.run(config("dpo", run, model_folder, pairs_file, **overrides))
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_evaluation_is_the_mean_over_held_out_pairs(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    held_out = write_pairs(tmp_path / "eval.jsonl", 5, seed=9)
    run = tmp_path / "run"
    dpo.run(
        config(
            "dpo",
            run,
            model_folder,
            pairs_file,
            data__eval=str(held_out),
            training__eval_every=2,
            training__max_steps=3,
        )
    )
    lines = read_metrics(run)
    assert ["eval_loss" in line for line in lines] == [False, True, True]
    last = lines[-1]
    trained = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    start = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    margins = []
    with torch.no_grad():
        for pair in map(json.loads, held_out.read_text().splitlines()):
            ratios = [
                _plain_logp(trained, tokenizer, pair["prompt"], pair[side])
                - _plain_logp(start, tokenizer, pair["prompt"], pair[side])
                for side in ("chosen", "rejected")
            ]
            margins.append(0.1 * (ratios[0] - ratios[1]).item())
    assert last["eval_rewards/margins"] == pytest.approx(sum(margins) / 5, abs=1e-4)
    assert last["eval_rewards/accuracies"] == sum(margin > 0 for margin in margins) / 5
    assert last["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 5, abs=1e-4)


def test_the_nll_term_is_a_token_mean_over_the_step(tmp_path: Path, model_folder: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    run = tmp_path / "run"
    dpo.run(config("dpo", run, model_folder, pairs, dpo__nll_weight=0.5, training__tokens_per_row=60))
    (line,) = read_metrics(run)
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for pair in map(json.loads, pairs.read_text().splitlines()):
            total -= _plain_logp(model, tokenizer, pair["prompt"], pair["chosen"]).item()
            prompt = tokenizer(pair["prompt"])["input_ids"]
            tokens += len(tokenizer(pair["prompt"] + pair["chosen"])["input_ids"]) + 1 - len(prompt)
    assert line["nll_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert line["loss"] == pytest.approx(math.log(2) + 0.5 * total / tokens, rel=1e-5)


def test_the_chat_format_leaves_with_the_model(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    chats.write_text(json.dumps({"prompt": [{"role": "user", "content": "hello"}], **sides}) + "\n")
    for name, data in (("chat", chats), ("text", pairs_file)):
        dpo.run(config("dpo", tmp_path / name, model_folder, data, training__max_steps=1))
    chat, text = (AutoTokenizer.from_pretrained(tmp_path / name / "model") for name in ("chat", "text"))
    rendered = chat.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert rendered == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    assert text.chat_template is None


def test_a_sweep_fills_the_reference_once(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    shared = tmp_path / "reference"
    for number, overrides in enumerate([{}, {"dpo__beta": 0.5}, {"training__seed": 1, "training__batch_size": 3}]):
        run = tmp_path / str(number)
        dpo.run(
            config(
                "dpo",
                run,
                model_folder,
                pairs_file,
                reference__cache_dir=str(shared),
                training__max_steps=1,
                **overrides,
            )
        )
    assert len(list(shared.iterdir())) == 1


def test_a_reference_of_another_computation_stops_the_run_at_step_0(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file)
    with monkeypatch.context() as patch:
        inner = dpo.score
        patch.setattr(dpo, "score", lambda *args, **named: inner(*args, **named) - torch.tensor([0.0, 0.5]))
        dpo.fill_reference(settings)
    # the log-ratio of the rejected is 0.5: softplus(0.1 * 0.5) = 0.718460
    with pytest.raises(ValueError, match=r"at step 0 the sigmoid loss is 0\.718\d+, not ln 2.*, please report it$"):
        dpo.run(settings)


@pytest.mark.parametrize(
    ("loss", "shift", "told"),
    [
        ({}, [0.5, 0.5], "the chosen completions is -0.500"),
        ({"dpo__ld_alpha": 0.5}, [0, 0, 0.5, 0.5], "the chosen completions' first parts is -0.500"),
        ({"lora__rank": 2, "lora__dropout": 0.3}, [-0.5, -0.5], "the chosen completions is 0.500"),
        ({"dpo__loss_type": "plackett_luce"}, [0, 0.5, 0], "completion 2 of the lists is -0.500"),
        ({"dpo__loss_type": "bco"}, [0.125], "the completions is -0.125"),
    ],
    ids=["pairs", "ld-dpo", "lora", "lists", "labels"],
)
def test_a_shift_that_cancels_in_the_loss_stops_the_run_at_step_0(
    loss: dict[str, Any], shift: list[float], told: str, tmp_path: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = {
        # as many are good as are bad: to first order, the shift cancels
        1: [{"prompt": f"sea {n}", "completion": " fox", "label": n % 2 == 0} for n in range(4)],
        3: [{"prompt": "sea", "completions": [" fox", " dog", " poem"], "ratings": [3, 2, 1]}] * 4,
    }.get(len(shift), [{"prompt": "sea", "chosen": " fox", "rejected": " dog jumps"}] * 4)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config("dpo", tmp_path / "run", model_folder, tmp_path / "rows.jsonl", **loss)
    with monkeypatch.context() as patch:
        inner = dpo.score

        def shifted(*args: Any, **named: Any) -> torch.Tensor:
            found = inner(*args, **named)
            return found + torch.tensor(shift)[: found.shape[1]] * (found != 0)

        patch.setattr(dpo, "score", shifted)
        dpo.fill_reference(settings)
    with pytest.raises(ValueError, match=rf"at step 0 the mean log-ratio of {told}\d* nats, not 0 \(tolerance 0.002\)"):
        dpo.run(settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_tolerance_of_a_log_ratio_follows_the_noise_of_bf16() -> None:
    task = object.__new__(dpo.DPOTask)
    task._precision, task._objective = "bf16", PairObjective(DPOConfig())

    def check(chosen: list[float], rejected: list[float]) -> None:
        task._train = SimpleNamespace(
            rows=SimpleNamespace(loss_tokens=np.tile([[100, 400]], (len(chosen), 1)), num_branches=2)
        )
        task.plan = SimpleNamespace(indices=lambda step: np.arange(len(chosen)))
        columns = np.array([chosen, rejected])
        task._check_log_ratios([*columns.sum(axis=1).tolist(), *(columns**2).sum(axis=1).tolist()])

    # four are too few to tell the noise: within 4 * 0.2 * sqrt(400) / 4 = 4 nats of 4 x 100 tokens, 8 of 4 x 400
    check([3.9] * 4, [-7.9] * 4)
    with pytest.raises(ValueError, match=r"the chosen completions is 4\.1.*tolerance 4\)"):
        check([4.1] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match=r"the rejected completions is -8\.1.*tolerance 8\)"):
        check([0.0] * 4, [-8.1] * 4)
    with pytest.raises(ValueError, match="nan nats"):
        check([math.nan] * 4, [0.0] * 4)
    # of sixteen with a deviation of 0.6, five standard errors are 5 * 0.6 / sqrt(15) = 0.775
    noise = np.array([0.6, -0.6] * 8)
    check((noise + 0.77).tolist(), noise.tolist())
    with pytest.raises(ValueError, match=r"the chosen completions is 0\.78.*tolerance 0\.775\)"):
        check((noise + 0.78).tolist(), noise.tolist())
    # equal ones have none: 5 * 0.03 * sqrt(1600) / 16 = 0.375 is allowed, and of noise beyond measure 0.8 * 40 / 16 = 2
    with pytest.raises(ValueError, match=r"the chosen completions is 0\.38.*tolerance 0\.375\)"):
        check([0.38] * 16, noise.tolist())
    with pytest.raises(ValueError, match=r"the chosen completions is 2\.1.*tolerance 2\)"):
        check((10 * noise + 2.1).tolist(), noise.tolist())


def test_the_tolerance_at_step_0_follows_the_noise_of_bf16() -> None:
    task = object.__new__(dpo.DPOTask)
    task._precision, task._objective = "bf16", PairObjective(DPOConfig())

    # 4 pairs, chosen completions of 100 tokens: 0.05 * 4 * 0.2 * sqrt(400) / 4 = 0.2
    def sums(examples: float, loss: float, chosen_tokens: float) -> list[float]:
        zeros = {field.name: 0.0 for field in fields(Sums)}
        total = Sums(**{**zeros, "examples": examples, "sigmoid_loss": examples * loss, "chosen_tokens": chosen_tokens})
        return list(astuple(total))

    task.check_first_step(sums(4, math.log(2) + 0.199, 400))
    with pytest.raises(ValueError, match="at step 0"):
        task.check_first_step(sums(4, math.log(2) + 0.201, 400))
    # 16,384 pairs of 100: 0.0031 is below the least tolerance, 5e-3
    with pytest.raises(ValueError, match="at step 0"):
        task.check_first_step(sums(16384, math.log(2) + 0.006, 1638400))


def test_bf16_starts_at_ln_2_and_keeps_fp32_masters(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    settings = config("dpo", run, model_folder, pairs_file, training__precision="bf16", training__learning_rate=1e-6)
    dpo.run(settings)
    assert read_metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    file = next((run / "checkpoints" / "step-00000005").glob("*.safetensors"))
    saved = load_file(file)
    start = load_file(model_folder / "model.safetensors")
    head = saved["model.causal_lm.lm_head.weight"]
    assert head.dtype == torch.float32
    moved = (head - start["lm_head.weight"]).abs()
    assert 0 < moved.max() < 1e-4  # steps that bf16 weights would round away
    assert load_file(run / "model" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
