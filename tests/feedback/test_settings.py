"""The config of an iteration: what it takes, what each round's run gets, and what is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
from toy_iterations import tree, write_config

import notus.__main__ as entry
from notus.feedback import settings
from notus.feedback.settings import Settings, load_settings


def load(folder: Path, *words: str, **changes: Any) -> Settings:
    return load_settings([write_config(folder / "c.yaml", tree(folder, **changes)), *words])


def test_a_round_sets_what_belongs_to_it(tmp_path):
    found = load(tmp_path, "--training.seed=7", "--dpo.beta=0.3", "--iterate.rounds=3")
    first, third, out = found.dpo(1), found.dpo(3), tmp_path / "out"
    assert (first.model.name_or_path, third.model.name_or_path) == (f"{tmp_path}/start", f"{out}/round-2/run")
    assert first.data.train == [{"path": f"{out}/round-1/pairs.jsonl", "split": "train", "weight": 1.0}]
    assert third.data.train == [{"path": f"{out}/round-3/pairs.jsonl", "split": "train", "weight": 1.0}]
    assert third.training.output_dir == f"{out}/round-3/run"
    assert (first.training.seed, third.training.seed) == (7, 9)
    assert (first.dpo.beta, third.dpo.beta) == (0.3, 0.3)
    assert found.policy(1) == f"{tmp_path}/start"
    assert found.output == out


def test_the_reference_is_the_first_model_if_asked(tmp_path):
    found = load(tmp_path, "--iterate.reference=first")
    assert [found.dpo(number).reference.model for number in (1, 2)] == [None, f"{tmp_path}/start"]
    assert load(tmp_path).dpo(2).reference.model is None


def test_the_config_that_is_written_gives_the_same_settings(tmp_path):
    found = load(tmp_path, "--sample.models=a/b,other@http://h:1/v1", "--training.seed=3", tracking__wandb=True)
    (tmp_path / "again.yaml").write_text(found.to_yaml())
    again = load_settings([str(tmp_path / "again.yaml")])
    assert again.flat() == found.flat()
    assert again.keys(2) == found.keys(2)
    assert found.flat()["training.output_dir"] == f"{tmp_path}/out"
    assert not {"data.train", "reference.model", "model.adapter", "training.resume"} & found.flat().keys()


def test_runs_are_called_after_the_iteration_and_the_round(tmp_path):
    assert load(tmp_path, tracking__wandb=True).dpo(2).tracking.run_name == "out-round-2"
    assert load(tmp_path, tracking__wandb=True, tracking__run_name="x").dpo(1).tracking.run_name == "x-round-1"
    assert load(tmp_path).dpo(1).tracking.run_name is None


def test_an_adapter_is_trained_further_once_there_is_one(tmp_path, monkeypatch):
    lora = {"lora__rank": 4, "lora__continue": True}
    monkeypatch.setattr(settings, "starts_from_adapter", lambda start: False)
    assert [load(tmp_path, **lora).dpo(number).lora.continue_ for number in (1, 2)] == [False, True]
    monkeypatch.setattr(settings, "starts_from_adapter", lambda start: True)
    assert [load(tmp_path, **lora).dpo(number).lora.continue_ for number in (1, 2)] == [True, True]
    assert load(tmp_path, lora__rank=4).dpo(2).lora.continue_ is False


def test_a_start_that_is_an_adapter_is_known(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "b", "r": 4, "lora_alpha": 8}'
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert settings.starts_from_adapter(str(tmp_path / "adapter"))
    assert not settings.starts_from_adapter(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--iterate.round=2", r"command line: iterate.round does not exist; did you mean 'rounds'\?"),
        ("--iterate.rounds=0", r"command line: iterate.rounds must be an integer >= 1, not 0"),
        ("--iterate.old_share=1", r"iterate.old_share must be a number >= 0 and < 1, not 1"),
        ("--sample.learning_rate=1", r"sample.learning_rate does not exist; did you mean 'training.learning_rate'\?"),
        ("--temperature=1", r"--temperature has no section; set sample.temperature"),
        ("--smaple.n=2", r"section 'smaple' does not exist; did you mean 'sample'\?"),
        ("--dpo.betta=1", r"command line: dpo.betta does not exist; did you mean 'beta'\?"),
        ("--dpo.beta=-1", r"command line: dpo.beta must be a number > 0, not -1"),
        ("--training.epochs=0", r"command line: training.epochs must be an integer >= 1, not 0"),
        ("--lora.alpha=3", r"command line: lora.alpha has no effect while lora.rank is 0"),
        ("--data.train=a.jsonl", r"data.train has no place in an iteration: the rounds make their own pairs"),
        ("--data.columns.a=prompt", r"data.columns has no place in an iteration"),
        ("--reference.model=a", r"reference.model has no place in an iteration: iterate.reference chooses it"),
        ("--model.adapter=a", r"model.adapter has no place in an iteration: name the adapter itself"),
        ("--training.resume=never", r"training.resume has no place in an iteration: the same command resumes"),
        ("--sample.n=1", r"sample.n is 1, and one completion makes no pair: raise it, or add sample.models"),
        ("--sample.temperature=0", r"sample.temperature 0 would repeat one completion 3 times"),
        ("--sample.timeout=3", r"sample.timeout has no effect without an endpoint in sample.models"),
        ("--rate.judge=http://h/v1", r"is one of the judges .*: set only one of rate.judge, rate.judge_function"),
        ("--rate.judge_function=null", r"rate.judge is one of the judges .*: no judge is given"),
        ("--rate.aspects=a,b", r"rate.aspects has no effect with rate.judge_function: set rate.aspects=null"),
        ("--rate.max_cost=3", r"rate.max_cost has no effect with rate.judge_function"),
        ("--curate.by=reward", r"curate.by 'reward' needs a reward model"),
        ("--curate.ngram=5", r"curate.ngram has no effect without curate.decontaminate"),
        ("--curate.listwise=true", r"curate.listwise does not fit: dpo.loss_type 'sigmoid' learns from pairs"),
        ("--dpo.loss_type=plackett_luce", r"learns from lists: set curate.listwise=true"),
        ("--iterate.reference=first --dpo.loss_type=simpo", r"iterate.reference 'first' has no effect .* 'simpo'"),
        ("--iterate.stop_kl=2 --iterate.kl_samples=0", r"iterate.stop_kl needs the KL"),
        ("--iterate.eval_prompts=null --iterate.stop_win_rate=0.7", r"iterate.stop_win_rate needs answers to compare"),
        ("--iterate.old_share=0.5", r"data.eval_size with iterate.old_share would hold out old pairs that an earlier"),
        ("--model.quantization=nf4 --lora.rank=4", r"model.quantization needs lora.continue=true in several rounds"),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, *words.split())
    assert "\n" not in str(caught.value)


def test_a_key_that_is_missing_or_wrong_in_the_file_is_named_with_the_file(tmp_path):
    for changes, message in (
        ({"iterate__prompts": None}, r"c.yaml: iterate.prompts is required"),
        ({"model__name_or_path": None}, r"c.yaml: model.name_or_path is required"),
        ({"training__output_dir": None}, r"c.yaml: training.output_dir is required"),
        ({"training__seed": "x"}, r"c.yaml: training.seed must be an integer >= 0, not 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **changes)


def test_judges_take_their_own_options(tmp_path):
    none = {"rate__judge_function": None}
    endpoint = load(
        tmp_path, **none, rate__judge="http://h/v1", rate__judge_model="m", rate__max_cost=3, rate__price_in=0.1,
        rate__price_out=0.4, rate__parallel=8,
    )  # fmt: skip
    assert (endpoint.rate.max_cost, endpoint.rate.parallel) == (3.0, 8)
    assert load(tmp_path, **none, rate__reward_model="m", rate__batch_size=4, curate__by="reward").rate.batch_size == 4
    for changes, message in (
        ({"rate__judge": "http://h/v1"}, "rate.judge_model names the judge"),
        (
            {"rate__judge": "http://h/v1", "rate__judge_model": "m", "rate__max_cost": 3},
            "rate.max_cost needs the prices",
        ),
        ({"rate__reward_model": "m", "curate__by": "ratings"}, "curate.by 'ratings' needs a judge that rates"),
        ({"rate__local_judge": "m", "rate__parallel": 3}, "rate.parallel has no effect with rate.local_judge"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **none, **changes)


def test_the_help_lists_every_key_without_torch(capsys):
    with pytest.raises(SystemExit) as ended:
        entry.main(["iterate", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, section in settings.OWN_SECTIONS.items():
        assert f"\n{name}: " in shown
        assert all(f"\n  {key} " in shown for key in section.__dataclass_fields__)
