"""Reward margins under a run: those that its own evaluation found, whether the reference is stored or scored."""

import json
import shutil

import datasets
import numpy as np
import pytest
from rated import write_lists
from rows_of_data import load_data
from runs import read_metrics, settings, write_pairs
from yaml import safe_dump

from notus import __main__ as entry
from notus.config import config_from_dict
from notus.data.dataset import FEATURES, PROVENANCE, TokenizedDataset
from notus.data_browser import margins
from notus.training.dpo import run as train_dpo


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """A run of two steps, with its config."""
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_pairs(folder / "pairs.jsonl", 14)
    tree = settings(folder / "run", model_folder, pairs, data__eval_size=6, training__learning_rate=1e-2)
    (folder / "config.yaml").write_text(safe_dump(tree))
    assert train_dpo(config_from_dict(tree, "dpo")) == 0
    return folder


def found(folder, *words):
    out = []

    def keep(text, stream=None):
        out.append((text, stream))
        return True  # it was printed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("notus.data_browser.command.tell", keep)
        command = ["data", str(folder / "config.yaml"), "--run", str(folder / "run"), "--json", "-n", "0", *words]
        assert entry.main(command) == 0
    return [json.loads(text)["margin"] for text, stream in out if stream is None]


def test_they_are_what_the_run_evaluated_and_the_most_wrong_comes_first(trained):
    values = found(trained, "--split", "eval")
    last = [line for line in read_metrics(trained / "run") if "eval_rewards/margins" in line][-1]
    assert sum(values) / 6 == pytest.approx(last["eval_rewards/margins"], abs=1e-5)
    assert sum(value > 0 for value in values) / 6 == pytest.approx(last["eval_rewards/accuracies"])
    assert values == sorted(values)
    assert max(map(abs, values)) > 1e-3


def test_without_stored_log_probs_the_reference_is_scored(trained, tmp_path, monkeypatch):
    stored = found(trained)
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.copy(trained / "config.yaml", tmp_path)
    scored = []
    score = margins.score_model
    monkeypatch.setattr(margins, "score_model", lambda *args: scored.append(args[0].name) or score(*args))
    assert found(tmp_path) == pytest.approx(stored, abs=1e-4)
    assert len(scored) == 2
    scored.clear()
    found(trained)
    assert len(scored) == 1  # the policy alone


def test_a_damaged_cache_is_an_error(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "reference").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    command = ["data", str(trained / "config.yaml"), "--run", str(tmp_path / "run")]
    assert entry.main(command) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("device")
def test_rows_keep_their_own_margin(trained, device):
    data = load_data(trained / "config.yaml")
    values = margins.reward_margins(str(trained / "run"), data, device, trust_remote_code=False)
    ranked = data.with_margins(values)
    assert [ranked.row(index).margin for index in ranked.order] == sorted(values)


def test_with_a_base_in_4_bits_policy_and_reference_are_both_scored_on_the_base_as_it_was(
    tmp_path, model_folder, monkeypatch
):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    more = {"model__quantization": "nf4", "lora__rank": 2, "training__learning_rate": 1e-2}
    tree = settings(tmp_path / "run", model_folder, pairs, **more)
    (tmp_path / "config.yaml").write_text(safe_dump(tree))
    assert train_dpo(config_from_dict(tree, "dpo")) == 0
    scored = []
    score = margins.score_adapter
    monkeypatch.setattr(margins, "score_adapter", lambda *args: scored.append(args[0].name) or score(*args))
    assert max(map(abs, found(tmp_path))) > 1e-3
    assert len(scored) == 1  # and no log-probs of the base in 4 bits are read


def rows_of(counts, labels=None):
    """Rows of one-token branches, as many as `counts` says."""
    columns = {
        "trunk": [[1]] * len(counts),
        "branches": [[[2]] * count for count in counts],
        "loss_mask": [[[1]] * count for count in counts],
        "source": [None] * len(counts),
        "ratings": [None] * len(counts),
        "label": labels or [None] * len(counts),
    }
    return TokenizedDataset(datasets.Dataset.from_dict(columns, features=datasets.Features({**FEATURES, **PROVENANCE})))


def test_a_lists_margin_is_that_of_the_best_over_the_worst():
    rewards = np.array([[1.0, 9.0, 4.0], [2.0, -1.0, 7.0], [0.5, 0.0, 0.0]])
    assert margins.margins_of(rewards, rows_of([3, 2, 2])).tolist() == [1 - 4, 2 + 1, 0.5]


def test_a_bad_completions_margin_is_minus_its_reward():
    rewards = np.array([[1.5], [2.0], [-3.0]])
    assert margins.margins_of(rewards, rows_of([1] * 3, [True, False, False])).tolist() == [1.5, -2.0, 3.0]


def test_lists_of_caches_of_other_lengths_have_the_margins_of_a_scored_reference(tmp_path, model_folder, monkeypatch):
    """The longest lists of training, of evaluation and of the rows looked at differ, and so do the caches."""
    train, held_out = write_lists(tmp_path / "train.jsonl", 12), write_lists(tmp_path / "eval.jsonl", 4, seed=1, most=3)
    more = {"data__eval": str(held_out), "dpo__loss_type": "plackett_luce", "training__learning_rate": 1e-2}
    tree = settings(tmp_path / "run", model_folder, train, **more)
    assert train_dpo(config_from_dict(tree, "dpo")) == 0
    lines = [*train.read_text().splitlines(), *held_out.read_text().splitlines()]
    short = [line for line in lines if len(json.loads(line)["completions"]) == 2]
    some, mixed = tmp_path / "some.jsonl", tmp_path / "mixed.jsonl"
    some.write_text("\n".join(short))
    mixed.write_text("\n".join([*short, *held_out.read_text().splitlines()]))
    scored, score = [], margins.score_model
    monkeypatch.setattr(margins, "score_model", lambda *args: scored.append(args[0].name) or score(*args))
    stored = []
    for path in (some, mixed):
        tree["data"] = {**tree["data"], "train": str(path), "eval": None}
        (tmp_path / "config.yaml").write_text(safe_dump(tree))
        stored.append(found(tmp_path))
    assert len(scored) == 2  # the policy alone
    shutil.rmtree(tmp_path / "run" / "reference")
    assert found(tmp_path) == pytest.approx(stored[1], abs=1e-4)
    assert len(scored) == 4
    assert max(map(abs, stored[0])) > 1e-3
