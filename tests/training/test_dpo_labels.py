"""Runs on single completions with labels: KTO and BCO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from rated import write_labels
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate
from transformers import AutoModelForCausalLM

from notus.config import config_from_dict
from notus.data.dataset import Mismatched, mismatched
from notus.runtime.process import STOPPED
from notus.training import dpo
from notus.training.checkpoint import checkpoints_in
from notus.training.run_folder import CHECKPOINTS
from notus.training.setup import start

EVERY = {"training__save_every": 3, "training__log_every": 2, "training__epochs": 2, "training__eval_every": 5,
         "data__eval_size": 5}  # fmt: skip


@pytest.fixture(scope="session")
def labels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels.jsonl", 18)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_both_losses_train(name: str, tmp_path: Path, model_folder: Path, labels_file: Path) -> None:
    run = tmp_path / "run"
    overrides = {"training__batch_size": 18, "training__epochs": 3, "training__learning_rate": 1e-4}
    dpo.run(config("dpo", run, model_folder, labels_file, dpo__loss_type=name, **overrides))
    lines = read_metrics(run)
    assert lines[2]["loss"] < lines[0]["loss"]
    assert lines[0]["rewards/accuracies"] == 0.5
    for metric in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        assert lines[2][metric] > lines[0][metric]
    assert lines[2]["rewards/rejected"] < 0


@torch.no_grad()
def _log_probs(folder: Path, rows: Any) -> torch.Tensor:
    """[n] of rows of one branch, sequence by sequence through transformers; from the tokens, fp64 sums."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for (example,) in (rows([index]) for index in range(len(rows))):
        trunk, branch, mask = (torch.from_numpy(part.astype("int64")) for part in (
            example.trunk, example.branches[0], example.loss_masks[0]))  # fmt: skip
        logps = model(torch.cat([trunk, branch])[None]).logits[0, len(trunk) - 1 : -1].double().log_softmax(-1)
        found.append((logps.gather(-1, branch[:, None])[:, 0] * mask).sum())
    return torch.stack(found)


def test_ktos_kl_is_the_mean_log_ratio_of_mismatched_completions(
    tmp_path: Path, model_folder: Path, labels_file: Path
) -> None:
    """Of the step in training, of the whole data in evaluation; by the policy as it stands then."""
    held_out, one, two = write_labels(tmp_path / "eval.jsonl", 6, seed=3), tmp_path / "one", tmp_path / "two"
    common: dict[str, Any] = {"data__eval": str(held_out), "data__shuffle": False, "training__lr_schedule": "constant"}
    for run, steps in ((one, 1), (two, 2)):
        dpo.run(
            config("dpo", run, model_folder, labels_file, dpo__loss_type="kto", training__max_steps=steps, **common)
        )
    again = config("dpo", tmp_path / "again", model_folder, labels_file, dpo__loss_type="kto", **common)
    with start(again, train=False) as job:
        assert job is not None
        train, others = mismatched(job.train_rows, 120), mismatched(job.eval_rows, 120)
        held_out_rows = job.eval_rows
        second = job.plan.indices(1)
        own = _log_probs(one / "model", held_out_rows) - _log_probs(model_folder, held_out_rows)
        labels = torch.from_numpy(held_out_rows.labels)
    ratios = _log_probs(one / "model", train) - _log_probs(model_folder, train)
    expected = max(0.0, ratios[torch.from_numpy(second)].mean().item())
    assert expected > 0.01
    lines = read_metrics(two)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[1]["kl"] == pytest.approx(expected, rel=1e-3)
    shift = max(0.0, (_log_probs(one / "model", others) - _log_probs(model_folder, others)).mean().item())
    line = read_metrics(one)[-1]
    assert line["eval_kl"] == pytest.approx(shift, rel=1e-3)
    beyond = 0.1 * (own - shift)
    loss = torch.where(labels, 1 - beyond.sigmoid(), beyond.sigmoid()).mean().item()
    assert line["eval_loss"] == pytest.approx(loss, abs=1e-5)
    right = ((beyond > 0) == labels).double().mean().item()
    assert line["eval_rewards/accuracies"] == pytest.approx(right)


def test_bcos_shift_is_the_mean_reward_of_the_steps_before(tmp_path: Path, model_folder: Path) -> None:
    labels = write_labels(tmp_path / "labels.jsonl", 10, good=1.0)
    run = tmp_path / "run"
    overrides = {"training__epochs": 2, "training__learning_rate": 1e-3}
    dpo.run(config("dpo", run, model_folder, labels, dpo__loss_type="bco", **overrides))
    lines = read_metrics(run)
    counts = [4, 4, 2, 4, 4, 2]
    total, seen = 0.0, 0
    for line, count in zip(lines, counts, strict=True):
        assert line["rewards/shift"] == pytest.approx(total / max(1, seen), rel=1e-5)
        assert "rewards/rejected" not in line
        total, seen = total + count * line["rewards/chosen"], seen + count
    assert abs(lines[-1]["rewards/shift"]) > 0.01
    newest = json.loads((checkpoints_in(run / CHECKPOINTS)[0] / "state.json").read_text())
    assert newest["progress"]["task"]["log_ratios"] == pytest.approx([total / 0.1, 20.0])
    # a branch with another β: the mean of the same log-ratios, times its own β
    start = str(run / CHECKPOINTS / "step-00000003")
    branch = {**overrides, "dpo__beta": 0.3, "training__max_steps": 4, "training__resume": start}
    dpo.run(config("dpo", tmp_path / "branch", model_folder, labels, dpo__loss_type="bco", **branch))
    (line,) = read_metrics(tmp_path / "branch")
    assert line["rewards/shift"] == pytest.approx(3 * lines[3]["rewards/shift"], rel=1e-5)


@pytest.mark.parametrize(("name", "place"), [("kto", "row_loss"), ("bco", "row_loss"), ("kto", "evaluate")])
def test_a_resumed_run_is_bitwise_undisturbed(
    name: str, place: str, tmp_path: Path, model_folder: Path, labels_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"dpo__loss_type": name, "lora__rank": 2, "lora__dropout": 0.3}
    whole, cut = (config("dpo", tmp_path / each, model_folder, labels_file, **EVERY, **kind) for each in "ab")
    assert dpo.run(whole) == 0
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, place, 5 if place == "row_loss" else 1, terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("sign", [1, -1])
def test_mismatched_completions_are_held_against_their_reference_at_step_0(
    sign: int, tmp_path: Path, model_folder: Path, labels_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("dpo", tmp_path / "run", model_folder, labels_file, dpo__loss_type="kto")
    with monkeypatch.context() as patch:
        inner = dpo.score

        def wrong(policy: Any, rows: Any, *args: Any, **named: Any) -> torch.Tensor:
            return inner(policy, rows, *args, **named) + 0.5 * sign * isinstance(rows, Mismatched)

        patch.setattr(dpo, "score", wrong)
        dpo.fill_reference(settings)
    with pytest.raises(ValueError, match=rf"mean log-ratio of mismatched completions is {-0.5 * sign:.4f}\d*, not 0"):
        dpo.run(settings)


def test_changed_labels_are_refused(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = write_labels(tmp_path / "labels.jsonl", 8)
    run = config("dpo", tmp_path / "run", model_folder, labels, dpo__loss_type="bco", training__save_every=1)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 1, terminate)
        assert dpo.run(run) == STOPPED
    write_labels(labels, 8, swap=True)
    with pytest.raises(ValueError, match=r"other contents of data\.train \(labels\)"):
        dpo.run(run)


def test_labels_that_are_all_alike_are_warned_of_once(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(tmp_path / "labels.jsonl", 8, good=1.0)
    dpo.run(config("dpo", tmp_path / "run", model_folder, labels, dpo__loss_type="kto", data__eval_size=2))
    assert capsys.readouterr().out.count("warning: no training row is bad") == 1


def test_a_mismatched_row_that_fits_no_packed_row_is_an_error(tmp_path: Path, model_folder: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [("the fox " * 20, " b"), ("a", " the fox" * 20)]
    labels.write_text("".join(json.dumps({"prompt": p, "completion": c, "label": True}) + "\n" for p, c in rows))
    tight = config("dpo", tmp_path / "run", model_folder, labels, dpo__loss_type="kto", training__tokens_per_row=60)
    with pytest.raises(ValueError, match=r"training\.tokens_per_row=60 is less than the longest example"):
        dpo.run(tight)


def test_completions_of_one_prompt_alone_are_an_error(tmp_path: Path, model_folder: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [{"prompt": "hello", "completion": f" {word}", "label": True} for word in ("a", "b", "c")]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"^data\.train: all rows have the same prompt"):
        dpo.run(config("dpo", tmp_path / "kto", model_folder, labels, dpo__loss_type="kto"))
    assert dpo.run(config("dpo", tmp_path / "bco", model_folder, labels, dpo__loss_type="bco")) == 0


def _on_ranks(tree: dict[str, Any], port: int) -> None:
    with launched(port):
        assert dpo.run(config_from_dict(tree, "dpo")) == 0


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_neither_ranks_nor_rows_change_the_result(
    name: str, tmp_path: Path, model_folder: Path, labels_file: Path
) -> None:
    kind: dict[str, Any] = {"dpo__loss_type": name, "data__eval_size": 4, "training__epochs": 2}
    dpo.run(config("dpo", tmp_path / "one", model_folder, labels_file, **kind))
    kind["training__tokens_per_row"] = 80
    dpo.run(config("dpo", tmp_path / "short", model_folder, labels_file, **kind))
    run_ranks(_on_ranks, 2, tmp_path, settings(tmp_path / "two", model_folder, labels_file, **kind), free_ports(1)[0])
    one = read_metrics(tmp_path / "one")
    for other in ("short", "two"):
        for line, expected in zip(read_metrics(tmp_path / other), one, strict=True):
            same = {key for key in expected if key.removeprefix("eval_").startswith(("loss", "rewards", "logps", "kl"))}
            assert {key: line[key] for key in same} == pytest.approx({key: expected[key] for key in same}, abs=5e-5)
