"""Runs on pairs beyond plain DPO: losses without a reference, sums, ratings, and losses of single tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from rated import write_rated_pairs
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate, write_pairs
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.config import config_from_dict
from notus.losses import LOSSES
from notus.runtime.process import STOPPED
from notus.training import dpo
from notus.training.checkpoint import checkpoints_in, read_identity
from notus.training.run_folder import CHECKPOINTS

EVERY = {"training__save_every": 3, "training__log_every": 2, "training__epochs": 2, "training__eval_every": 5,
         "data__eval_size": 5}  # fmt: skip


def _plain_tokens(model: torch.nn.Module, tokenizer: Any, prompt: str, completion: str) -> tuple[Any, Any]:
    """Log-probs of the completion's tokens, and log Σ p² at each, from one whole sequence through transformers."""
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    ids = torch.tensor([*whole["input_ids"], tokenizer.eos_token_id])
    first = next(i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt))
    logps = model(ids[None]).logits[0, first - 1 : -1].double().log_softmax(-1)
    return logps.gather(-1, ids[first:, None])[:, 0], (2 * logps).logsumexp(-1)


def _plain(folder: Path, pairs: Path) -> list[list[tuple[Any, Any]]]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [
            [_plain_tokens(model, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
            for pair in map(json.loads, pairs.read_text().splitlines())
        ]


@pytest.fixture(scope="session")
def rated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rated_pairs(tmp_path_factory.mktemp("rated") / "pairs.jsonl", 8)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.rows == "pairs"])
def test_every_loss_of_pairs_trains(name: str, tmp_path: Path, model_folder: Path, rated_file: Path) -> None:
    smoothing = {"dpo__label_smoothing": 0.1} if name == "exo_pair" else {}
    run = tmp_path / "run"
    overrides: dict[str, Any] = {
        "training__batch_size": 8,
        "training__epochs": 3,
        "dpo__loss_type": name,
        "training__learning_rate": 1e-5,
    }
    dpo.run(config("dpo", run, model_folder, rated_file, **overrides, **smoothing))
    lines = read_metrics(run)
    assert lines[2]["loss"] < lines[0]["loss"]
    if name != "discopop":  # its loss has a valley on either side of 0
        assert lines[2]["rewards/margins"] > lines[0]["rewards/margins"]
    assert (run / "reference").exists() == LOSSES[name].reference


def test_without_a_reference_there_is_no_pass_and_no_cache(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(dpo, "score", None)  # which a reference pass would call
    run_config = config("dpo", run, model_folder, pairs_file, dpo__loss_type="simpo", dpo__beta=2.0)
    dpo.run(run_config)
    told = capsys.readouterr().out
    assert told.count("has no reference: no reference pass, and no cache") == 1
    assert "reference log-probs" not in told
    assert not (run / "reference").exists()
    (path,) = checkpoints_in(run / CHECKPOINTS)
    assert not [key for key in read_identity(path) if key.startswith("reference")]
    expected = []
    for chosen, rejected in _plain(model_folder, pairs_file):
        margin = 2 * (chosen[0].mean() - rejected[0].mean()) - 0.5
        expected.append(math.log1p(math.exp(-margin)))
    first = tmp_path / "first"
    whole = {"training__batch_size": 18, "dpo__loss_type": "simpo", "dpo__beta": 2.0}
    dpo.run(config("dpo", first, model_folder, pairs_file, **whole))
    assert read_metrics(first)[0]["loss"] == pytest.approx(sum(expected) / 18, rel=1e-5)


def test_there_is_no_reference_to_compute_ahead(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run_config = config("dpo", tmp_path / "run", model_folder, pairs_file, dpo__loss_type={"cpo": 1.0, "orpo": 2.0})
    with pytest.raises(ValueError, match=r"dpo\.loss_type 'cpo', 'orpo' has no reference: there is nothing to compute"):
        dpo.fill_reference(run_config)


def test_a_sum_in_which_one_loss_has_a_reference_needs_it(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    dpo.run(config("dpo", run, model_folder, pairs_file, dpo__loss_type={"cpo": 0.5, "sigmoid": 2.0}))
    assert len(list((run / "reference").iterdir())) == 1
    for line in read_metrics(run):
        assert line["loss"] == pytest.approx(0.5 * line["loss/cpo"] + 2 * line["loss/sigmoid"], rel=1e-6)
    assert read_metrics(run)[0]["loss/sigmoid"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        {"dpo__loss_type": "orpo", "dpo__nll_weight": 1.0, "dpo__nll_mean": "completions"},
        {"dpo__loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}, "dpo__ld_alpha": 0.5, "dpo__wpo": True},
    ],
    ids=["no-reference", "tokens"],
)
def test_a_resumed_run_is_bitwise_undisturbed(
    overrides: dict[str, Any], tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (config("dpo", tmp_path / name, model_folder, pairs_file, **EVERY, **overrides) for name in "ab")
    assert dpo.run(whole) == 0
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 5, terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_ld_dpo_and_its_reference(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    """A sweep over α computes the reference once; losses are those of plain log-probs of tokens."""
    held_out, shared = write_pairs(tmp_path / "eval.jsonl", 4, seed=9), tmp_path / "shared"
    common = {"data__eval": str(held_out), "training__max_steps": 2, "reference__cache_dir": str(shared)}
    for number, alpha in enumerate((0.25, 0.0)):
        run = tmp_path / str(number)
        dpo.run(config("dpo", run, model_folder, pairs_file, dpo__ld_alpha=alpha, **common))
        assert len(list(shared.iterdir())) == 2
        start, trained = _plain(model_folder, held_out), _plain(run / "model", held_out)
        losses = []
        for before, after in zip(start, trained, strict=True):
            common_length = min(len(side[0]) for side in before)
            weights = [torch.where(torch.arange(len(side[0])) < common_length, 1.0, alpha) for side in before]
            sides = zip(weights, before, after, strict=True)
            c, r = (float((weight * (new[0] - old[0])).sum()) for weight, old, new in sides)
            losses.append(math.log1p(math.exp(-0.1 * (c - r))))
        lines = read_metrics(run)
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines[-1]["eval_loss"] == pytest.approx(sum(losses) / 4, abs=2e-5)
    dpo.run(config("dpo", tmp_path / "plain", model_folder, pairs_file, **common))
    assert len(list(shared.iterdir())) == 4  # without single tokens, another file, under the name it always had


def test_wpo_weighs_by_what_the_policy_would_write(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    dpo.run(config("dpo", run, model_folder, pairs_file, dpo__wpo=True, training__batch_size=18))
    weights = [
        math.exp(min(0.0, sum(float((logps - collisions).mean()) for logps, collisions in pair)))
        for pair in _plain(model_folder, pairs_file)
    ]
    assert read_metrics(run)[0]["loss"] == pytest.approx(math.log(2) * sum(weights) / 18, rel=1e-4)


def test_ratings_that_are_missing_stop_the_run_before_the_reference_pass(
    tmp_path: Path, model_folder: Path, rated_file: Path
) -> None:
    rows = list(map(json.loads, rated_file.read_text().splitlines()))
    del rows[2]["chosen-rating"], rows[2]["rejected-rating"]
    partly = tmp_path / "partly.jsonl"
    partly.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    message = r"^data\.train: dpo\.loss_type 'odpo' needs ratings, but 1 of 8 rows .*partly\.jsonl, line 3"
    with pytest.raises(ValueError, match=message):
        dpo.run(config("dpo", run, model_folder, partly, dpo__loss_type="odpo"))
    assert not (run / "reference").exists()
    dpo.run(config("dpo", run, model_folder, partly, training__max_steps=1, training__resume="never"))


def test_changed_ratings_are_refused_where_they_are_learned(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("odpo", "sigmoid"):
        pairs = write_rated_pairs(tmp_path / f"{name}.jsonl", 8)
        run_config = config("dpo", tmp_path / name, model_folder, pairs, dpo__loss_type=name, training__save_every=1)
        with monkeypatch.context() as patch:
            at_call(patch, dpo.DPOTask, "row_loss", 1, terminate)
            assert dpo.run(run_config) == STOPPED
        write_rated_pairs(pairs, 8, shift=1.0)
        if name == "sigmoid":
            assert dpo.run(run_config) == 0
        else:
            with pytest.raises(ValueError, match=r"other contents of data\.train \(ratings\)"):
                dpo.run(run_config)


def test_public_sums_stand_in_a_cache_beside_the_sums(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = tmp_path / "run"
    dpo.run(config("dpo", run, model_folder, pairs_file, dpo__ld_alpha=0.5, training__max_steps=1))
    (path,) = (run / "reference").iterdir()
    with safe_open(path, "pt") as file:
        logps, public = file.get_tensor("logps"), file.get_tensor("public_logps")
    for row, pair in enumerate(_plain(model_folder, pairs_file)):
        length = min(len(side[0]) for side in pair)
        for column, side in enumerate(pair):
            assert logps[row, column].item() == pytest.approx(float(side[0].sum()), abs=1e-4)
            assert public[row, column].item() == pytest.approx(float(side[0][:length].sum()), abs=1e-4)


def _on_ranks(tree: dict[str, Any], port: int) -> None:
    with launched(port):
        assert dpo.run(config_from_dict(tree, "dpo")) == 0


def test_neither_ranks_nor_rows_change_losses_of_single_tokens(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    kind: dict[str, Any] = {"dpo__loss_type": {"sigmoid": 1.0, "cpo": 0.5}, "dpo__ld_alpha": 0.25, "dpo__wpo": True,
                            "dpo__nll_weight": 0.5, "dpo__nll_mean": "completions", "data__eval_size": 4}  # fmt: skip
    dpo.run(config("dpo", tmp_path / "one", model_folder, pairs_file, **kind))
    kind["training__tokens_per_row"] = 80
    run_ranks(_on_ranks, 2, tmp_path, settings(tmp_path / "two", model_folder, pairs_file, **kind), free_ports(1)[0])
    for line, expected in zip(*(read_metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        same = {key for key in expected if key.removeprefix("eval_").startswith(("loss", "rewards", "logps", "nll"))}
        assert len(same) >= 11
        assert {key: line[key] for key in same} == pytest.approx({key: expected[key] for key in same}, abs=5e-5)
