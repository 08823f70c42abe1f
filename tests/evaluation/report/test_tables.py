"""The tables' own parts: which settings differ, and what runs are called by them."""

import copy

from runs import settings

from notus.evaluation.read_run import read_runs
from notus.evaluation.report.tables import differing_settings, with_labels


def test_differing_settings_have_one_value_per_run(tmp_path):
    one = settings(tmp_path / "one", "base", tmp_path / "a.jsonl", dpo__beta=0.05, training__learning_rate=1e-6)
    two = settings(tmp_path / "two", "base", tmp_path / "a.jsonl", dpo__beta=0.1, training__learning_rate=1e-6)
    assert differing_settings([one, two]) == {"dpo.beta": [0.05, 0.1]}
    assert differing_settings([one, two, two]) == {"dpo.beta": [0.05, 0.1, 0.1]}
    assert differing_settings([one]) == {}


def test_what_cannot_change_the_result_does_not_differ(tmp_path):
    one = settings(tmp_path, "base", tmp_path / "a.jsonl")
    two = copy.deepcopy(one)
    two["training"] |= {"output_dir": "elsewhere", "resume": "never", "save_every": 7, "extend": True}
    two["tracking"] |= {"run_name": "other", "wandb": True}
    two["reference"] = {"cache_dir": "shared"}
    assert differing_settings([one, two]) == {}


def test_a_key_that_an_earlier_version_lacks_has_its_default(tmp_path):
    old = settings(tmp_path, "base", tmp_path / "a.jsonl", dpo__beta=0.1)
    new = copy.deepcopy(old)
    new["dpo"] |= {"label_smoothing": 0.0, "nll_weight": 0.5}
    new["lora"] = {"rank": 0, "continue": False, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    old["lora"] = {"rank": 0}
    assert differing_settings([old, new]) == {"dpo.nll_weight": [0.0, 0.5]}


def test_a_section_that_a_run_lacks_has_no_values(tmp_path):
    sft = settings(tmp_path, "base", tmp_path / "a.jsonl")
    dpo = copy.deepcopy(sft) | {"dpo": {"beta": 0.3}}
    assert differing_settings([sft, dpo])["dpo.beta"] == [None, 0.3]


def labels(*folders):
    return [run.label for run in with_labels(read_runs([str(folder) for folder in folders]))]


def test_runs_are_called_by_the_settings_that_differ(make_run):
    one, two = make_run("one", dpo__beta=0.05), make_run("two", dpo__beta=0.1)
    assert labels(one, two) == ["beta 0.05", "beta 0.1"]
    three = make_run("three", dpo__beta=0.1, training__learning_rate=1e-6)
    assert labels(one, three) == ["learning_rate 0.001, beta 0.05", "learning_rate 1e-6, beta 0.1"]
    assert labels(one, two, make_run("again", dpo__beta=0.1)) == ["one", "two", "again"]  # two would be called alike
    assert labels(one, make_run("sft", "sft")) == ["one", "sft"]  # they differ in too much
    assert labels(one) == ["one"]
