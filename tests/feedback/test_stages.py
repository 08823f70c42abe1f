"""The plan: which command each stage of a config is."""

import argparse
from pathlib import Path

import pytest
from toy_iterations import tree, write_config

import notus.__main__ as entry
from notus.config import load_config
from notus.feedback.settings import load_settings
from notus.feedback.stages import dpo_config, plan


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Return the plan of a config with changes, written with paths relative to the folder."""
    monkeypatch.chdir(tmp_path)

    def planned(**changes):
        config = tree(Path(), **changes)
        return plan(load_settings([write_config(Path("c.yaml"), config)]))

    return planned


def words(stages, name, number):
    (found,) = [stage for stage in stages if (stage.name, stage.round) == (name, number)]
    return " ".join(found.words)


def test_the_stages_stand_in_their_order(stages):
    of_round = ["prompts", "sample", "rate", "curate", "dpo", "answers", "compare", "evaluate", "round"]
    found = [(stage.round, stage.name) for stage in stages()]
    assert found == [(0, "prompts"), (0, "answers"), *((k, name) for k in (1, 2) for name in of_round)]
    alone = stages(iterate__eval_prompts=None, iterate__kl_samples=0, data__eval_size=0, iterate__rounds=1)
    assert [stage.name for stage in alone] == ["prompts", "sample", "rate", "curate", "dpo", "round"]


def test_each_stage_is_an_ordinary_command(stages):
    found = stages()
    generated = "--max-new-tokens=8 --batch-size=32 --precision=fp32"
    assert words(found, "answers", 0) == (
        f"sample out/start/prompts.jsonl out/start/answers.jsonl --models start=start --n=1 {generated}"
    )
    assert words(found, "sample", 1) == (
        f"sample out/round-1/prompts.jsonl out/round-1/records.jsonl --models start=start --seed=43 --n=3 {generated}"
    )
    assert words(found, "sample", 2) == (
        "sample out/round-2/prompts.jsonl out/round-2/records.jsonl --models round-1=out/round-1/run --seed=44 --n=3 "
        + generated
    )
    assert words(found, "rate", 2) == (
        "rate out/round-2/records.jsonl out/round-2/rated.jsonl --judge-function=judge.py:rate --seed=44"
    )
    assert words(found, "curate", 2) == (
        "curate out/round-2/rated.jsonl out/round-2/pairs.jsonl --by=ratings --schema=cleaned --seed=44"
    )
    assert words(found, "dpo", 2) == (
        "dpo out/dpo.yaml --model.name_or_path=out/round-1/run --data.train=out/round-2/pairs.jsonl "
        "--training.output_dir=out/round-2/run --training.seed=43"
    )
    assert words(found, "answers", 2) == (
        "sample out/start/prompts.jsonl out/round-2/answers.jsonl --models round-2=out/round-2/run --n=1 "
        f"--with out/start/answers.jsonl {generated}"
    )
    assert words(found, "compare", 2) == (
        "rate out/round-2/answers.jsonl out/round-2/compared.jsonl --judge-function=judge.py:rate --again-share=0 "
        "--seed=44"
    )
    assert words(found, "evaluate", 2) == (
        "evaluate out/round-2/run --base start --output out/round-2/evaluation.json --kl-samples=4 --kl-prompts "
        "out/start/prompts.jsonl --kl-max-new-tokens=8"
    )


def test_options_are_passed_on(stages):
    found = stages(
        sample__models=["a/b", "m@http://h:1/v1"], sample__temperature=0.7, sample__top_p=0.9, sample__engine="batched",
        sample__drop_duplicates=True, sample__parallel=16, data__chat_template="zephyr", data__add_empty_system=True,
        model__trust_remote_code=True, rate__judge_function=None, rate__judge="http://j/v1", rate__judge_model="judge",
        data__template_date="2024-12-31", data__split_special_tokens=True,
        rate__aspects=["clarity", "wit"], rate__again_share=0.25, rate__max_cost=0.000001, rate__price_in=1,
        rate__price_out=2, curate__rejected="any", curate__drop_source=["x", "y"], data__eval_size=0,
    )  # fmt: skip
    assert words(found, "sample", 1).endswith(
        "--models start=start a/b m@http://h:1/v1 --seed=43 --n=3 --temperature=0.7 --top-p=0.9 --parallel=16 "
        "--drop-duplicates --max-new-tokens=8 --batch-size=32 --engine=batched --precision=fp32 --chat-template=zephyr "
        "--add-empty-system --template-date=2024-12-31 --split-special-tokens "
        "--trust-remote-code"
    )
    assert words(found, "rate", 1).endswith(
        "--judge=http://j/v1 --judge-model=judge --aspects clarity wit --max-cost=1e-06 --price-in=1.0 --price-out=2.0 "
        "--again-share=0.25 --seed=43"
    )
    assert "--again-share=0 " in words(found, "compare", 1)
    assert "--rejected=any --drop-source=x --drop-source=y" in words(found, "curate", 1)
    # no rows are held out, so the training pairs stand in
    assert "--pairs out/round-1/pairs.jsonl" in words(found, "evaluate", 1)
    assert words(found, "evaluate", 1).endswith("--trust-remote-code")


def test_old_pairs_come_from_all_earlier_rounds_own(stages):
    found = stages(iterate__old_share=0.25, iterate__rounds=3, data__eval_size=0)
    assert words(found, "own-pairs", 3).startswith("curate out/round-3/rated.jsonl out/round-3/own-pairs.jsonl ")
    assert "--old" not in words(found, "own-pairs", 3) + words(found, "curate", 1)
    assert words(found, "curate", 3).endswith(
        "--old out/round-1/own-pairs.jsonl out/round-2/own-pairs.jsonl --old-share=0.25"
    )


def test_lists_and_rewards(stages):
    lists = stages(
        curate__listwise=True, dpo__loss_type="plackett_luce", rate__judge_function=None, rate__reward_model="r"
    )
    assert words(lists, "curate", 1) == "curate out/round-1/rated.jsonl out/round-1/pairs.jsonl --by=reward --listwise"
    assert words(lists, "rate", 1).endswith("--reward-model=r --seed=43")
    assert words(lists, "compare", 1).endswith("--reward-model=r --seed=43")  # which rates nothing twice anyway


def test_what_shares_its_work_is_spread(stages):
    def spread(**changes):
        return {stage.name for stage in stages(**changes) if stage.spread}

    assert spread() == {"sample", "dpo", "answers", "evaluate"}
    local = spread(rate__judge_function=None, rate__local_judge="m")
    assert local == {"sample", "dpo", "answers", "evaluate", "rate", "compare"}


def test_every_planned_command_can_be_read(stages, tmp_path):
    """The real parsers take the options, and the config of each round is the one that its command gives."""
    many = {
        "sample__models": ["a/b", "m@http://h:1/v1"], "sample__engine": "batched", "sample__parallel": 2,
        "sample__timeout": 5, "sample__max_requests": 9, "sample__api_key_env": "K", "sample__drop_duplicates": True,
        "sample__top_p": 0.9, "sample__top_k": 5, "curate__rejected": "any", "curate__keep_identical": True,
        "iterate__old_share": 0.5, "data__eval_size": 0,
    }  # fmt: skip
    endpoint = {
        "rate__judge_function": None, "rate__judge": "http://h/v1", "rate__judge_model": "m", "rate__aspects": ["a"],
        "rate__parallel": 3, "rate__timeout": 5, "rate__max_requests": 9, "rate__max_cost": 1, "rate__price_in": 1,
        "rate__price_out": 1, "rate__max_new_tokens": 7, "rate__api_key_env": "K", "rate__again_share": 0.5,
    }  # fmt: skip
    local = {
        "rate__judge_function": None, "rate__local_judge": "m", "rate__batch_size": 2, "rate__precision": "fp32",
        "rate__chat_template": "zephyr", "rate__trust_remote_code": True,
    }  # fmt: skip
    settings = load_settings([write_config(tmp_path / "c.yaml", tree(Path(), **many, **endpoint))])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dpo.yaml").write_text(dpo_config(settings))
    for stage in [*stages(**many, **endpoint), *stages(**local)]:
        if stage.name == "dpo":
            assert load_config(stage.words[1:], "dpo") == settings.dpo(stage.round)
        elif stage.words:
            assert isinstance(entry._parse(list(stage.words)), argparse.Namespace)


def test_paths_of_any_letters_are_kept(tmp_path):
    folder = tmp_path / "a b: 'ü' #1"
    folder.mkdir()
    settings = load_settings([write_config(tmp_path / "c.yaml", tree(folder))])
    (folder / "dpo.yaml").write_text(dpo_config(settings))
    (dpo,) = [stage for stage in plan(settings) if (stage.name, stage.round) == ("dpo", 2)]
    assert load_config([str(folder / "dpo.yaml"), *dpo.words[2:]], "dpo") == settings.dpo(2)
