"""Iterations: whole ones of toys, interrupted ones, and what stops them. Stages run within this process."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from round_folders import completion, record, write_lines, write_object
from runs import assert_same_run, at_call, read_metrics, terminate
from runs import config as run_config
from toy_iterations import Counting, in_process, read_lines, tree, write_config, write_prompts, write_start

import notus.__main__ as entry
from notus.config import load_config, to_yaml
from notus.evaluation.decoding import KeptTokens
from notus.feedback import iterate
from notus.feedback.function_judge import FunctionJudge
from notus.feedback.records import summary_file
from notus.feedback.settings import load_settings
from notus.runtime.files import lock
from notus.runtime.process import STOPPED
from notus.training import dpo

SHORT = {"iterate__eval_prompts": None, "iterate__kl_samples": 0, "data__eval_size": 0}
WITH_OLD = {"iterate__old_share": 0.4, "sample__batch_size": 9}


@pytest.fixture(autouse=True)
def no_report(monkeypatch, request):
    """Reports have tests of their own."""
    if "report" not in request.keywords:
        monkeypatch.setattr(iterate, "_report", lambda settings, runner, last: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model and prompts, which no test changes."""
    folder = tmp_path_factory.mktemp("inputs")
    write_start(folder / "start")
    write_prompts(folder / "prompts.txt", 12)
    write_prompts(folder / "eval.txt", 3, first=100)
    return folder


@pytest.fixture
def iteration(inputs, tmp_path) -> Callable[..., str]:
    """Return what writes a config whose output is the test's own folder `out`, and gives its path."""

    def written(**changes: Any) -> str:
        defaults = {"training__output_dir": str(tmp_path / "out"), **changes}
        return write_config(tmp_path / "c.yaml", tree(inputs, **defaults))

    return written


# ---- whole iterations ----


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    """Two rounds without evaluation, with old pairs in the second."""
    folder = tmp_path_factory.mktemp("undisturbed")
    changes = {**SHORT, **WITH_OLD, "training__output_dir": str(folder / "out")}
    assert iterate.iterate([write_config(folder / "c.yaml", tree(inputs, **changes))], in_process) == 0
    return folder / "out"


def test_each_round_trains_the_last_rounds_model_on_its_own_answers(inputs, undisturbed):
    one, two = undisturbed / "round-1", undisturbed / "round-2"
    texts = [{row["prompt"] for row in read_lines(folder / "prompts.jsonl")} for folder in (one, two)]
    assert [len(each) for each in texts] == [6, 6]
    assert not texts[0] & texts[1]
    for folder, policy in ((one, "start"), (two, "round-1")):
        records = read_lines(folder / "records.jsonl")
        assert {each["model"] for row in records for each in row["completions"]} == {policy}
        assert {len(row["completions"]) for row in records} == {3}
        rated = {row["instruction"]: row["completions"] for row in read_lines(folder / "rated.jsonl")}
        own = [row for row in read_lines(folder / "pairs.jsonl") if row["chosen-model"] == policy]
        for pair in own:
            found = {each["response"]: each["fine-grained_score"] for each in rated[pair["prompt"]]}
            chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
            assert found[chosen] == max(found.values()) > found[rejected]
            assert found[chosen] == 1 + min(4, chosen.count("e"))
        assert read_metrics(folder / "run")[0]["loss"] == pytest.approx(
            0.693147, abs=1e-5
        )  # the reference is the start
    models = [load_config(folder / "run" / "config.yaml", "dpo").model.name_or_path for folder in (one, two)]
    assert models == [str(inputs / "start"), str(one / "run")]
    # own pairs of round 2 and old ones of round 1, so that these are 40%
    pairs, own_pairs = read_lines(two / "pairs.jsonl"), read_lines(two / "own-pairs.jsonl")
    old = [pair for pair in pairs if pair not in own_pairs]
    assert [pair for pair in pairs if pair in own_pairs] == own_pairs
    assert 0 < len(old) == round(0.4 / 0.6 * len(own_pairs))
    assert all(pair in read_lines(one / "own-pairs.jsonl") for pair in old)
    summary = json.loads((two / "round.json").read_text())
    assert (summary["prompts"], summary["pairs"]["rows"]) == (6, len(pairs))


def test_an_interrupted_iteration_ends_as_an_undisturbed_one(
    inputs, undisturbed, iteration, tmp_path, monkeypatch, capsys
):
    """Killed within sampling, stopped by a failing judge and by SIGTERM within training, and between two stages."""
    config = [iteration(**SHORT, **WITH_OLD)]
    out = tmp_path / "out"

    class KilledError(Exception):
        pass

    def killed() -> None:
        raise KilledError

    def fails() -> None:
        raise ValueError("the judge failed")

    with monkeypatch.context() as patch:
        at_call(patch, KeptTokens, "add", 2, killed)
        with pytest.raises(KilledError):
            iterate.iterate(config, in_process)
    assert not (out / "round-1" / "records.jsonl").exists()
    assert list((out / "round-1").glob("records.jsonl.kept/**/*.jsonl"))  # the first batch
    with monkeypatch.context() as patch:
        at_call(patch, FunctionJudge, "_verdict", 3, fails)
        assert iterate.iterate(config, in_process) == 1
    assert "the judge failed" in (shown := capsys.readouterr()).err
    assert "failed: round 1, rate (exit code 1); its error stands above" in shown.err
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)
        assert iterate.iterate(config, in_process) == STOPPED
    assert "stopped by a signal in round 1, dpo; the same command continues" in capsys.readouterr().err
    between = Counting(lambda words: STOPPED if words[0] == "curate" and "round-2" in words[1] else None)
    assert iterate.iterate(config, between) == STOPPED
    assert between.names == ["dpo", "sample", "rate", "curate"]
    last = Counting()
    assert iterate.iterate(config, last) == 0
    assert last.names == ["curate", "curate", "dpo"]
    for number in (1, 2):
        mine, theirs = out / f"round-{number}", undisturbed / f"round-{number}"
        for name in ("prompts.jsonl", "own-pairs.jsonl", "pairs.jsonl"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
        assert_same_run(mine / "run", theirs / "run")
    again = Counting()
    assert iterate.iterate(config, again) == 0  # there is nothing left to do
    assert again.commands == []


# ---- stages that are not run, for what decides between them ----


OVERALL = {"accuracy": 0.5, "accuracy_interval": None, "count": 4}


class Fake:
    """Runs `rate` and `curate`, and writes at once what the other commands would: `figures` by round."""

    def __init__(self, rates: Sequence[float] = (), kls: Sequence[float] = ()) -> None:
        self.rates, self.kls = list(rates), list(kls)
        self.names: list[str] = []

    def __call__(self, words: Sequence[str], spread: bool) -> int:
        self.names.append(words[0])
        paths = [Path(word) for word in words[1:]]
        number = next((int(part[6:]) for path in paths for part in path.parts if part.startswith("round-")), 0)
        if words[0] == "sample":
            self._sample(paths[0], paths[1], words, number)
        elif words[0] == "dpo":
            folder = Path(next(word for word in words if word.startswith("--training.output_dir")).split("=")[1])
            write_object(folder / "model" / "config.json", {})
        elif words[0] == "evaluate":
            kl = {"per_sequence": self.kls[number - 1], "samples": 4}
            write_object(Path(words[words.index("--output") + 1]), {"pairs": "p", "overall": OVERALL, "kl": kl})
        else:
            return in_process(words, spread)
        return 0

    def _sample(self, prompts: Path, out: Path, words: Sequence[str], number: int) -> None:
        name = words[words.index("--models") + 1].split("=")[0]
        rows, asked = [], read_lines(prompts)
        for place, row in enumerate(asked):
            if out.name == "records.jsonl":
                found = [completion(name, "e" * sample) for sample in range(3)]
            else:  # as many answers win against the start's as the rate says
                wins = number and place < round(self.rates[number - 1] * len(asked))
                found = [completion("start", "e"), completion(name, "ee" if wins else "")][: 2 if number else 1]
            rows.append(record(row["prompt"], *found))
        write_lines(out, rows)
        told = {"settings": {}, "prompts": len(rows), "dropped_duplicates": 0, "seconds": 1.0, "models": {name: {}}}
        write_object(summary_file(out), {**told, "sha256": _sha256(out), "failed": 0})


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_stops_when_the_win_rate_is_reached(iteration, tmp_path, capsys):
    fake = Fake(rates=[1 / 3, 2 / 3, 1.0])
    changes = {"iterate__rounds": 3, "iterate__prompts_per_round": 2, "iterate__kl_samples": 0, "data__eval_size": 0}
    assert iterate.iterate([iteration(**changes, iterate__stop_win_rate=0.6)], fake) == 0
    shown = capsys.readouterr().out
    assert "stopped: round 2 wins 66.7% against the start, and iterate.stop_win_rate is 0.6" in shown
    assert f"the model is in {tmp_path}/out/round-2/run" in shown
    assert not (tmp_path / "out" / "round-3").exists()
    # without the rule, the same iteration goes on
    assert iterate.iterate([iteration(**changes)], fake) == 0
    assert fake.names.count("dpo") == 3


def test_a_kl_above_the_budget_leaves_the_last_model_within_it(iteration, tmp_path, capsys):
    changes = {"iterate__rounds": 3, "iterate__prompts_per_round": 2, "iterate__stop_kl": 2.0}
    assert iterate.iterate([iteration(**changes)], Fake(rates=[2 / 3, 1 / 3, 1], kls=[1.5, 2.5, 3])) == 0
    shown = capsys.readouterr().out
    assert "stopped: the KL of round 2 to the start is 2.5, above iterate.stop_kl=2" in shown
    assert f"the model is in {tmp_path}/out/round-1/run" in shown
    assert not (tmp_path / "out" / "round-3").exists()
    only = iteration(**changes, training__output_dir=str(tmp_path / "other"))
    assert iterate.iterate([only], Fake(rates=[1], kls=[9.0])) == 0
    assert "no round's model is within the budget: the result is the starting model" in capsys.readouterr().out


def test_the_best_round_is_named_if_it_is_not_the_last(iteration, tmp_path, capsys):
    assert iterate.iterate([iteration()], Fake(rates=[2 / 3, 1 / 3], kls=[1, 2])) == 0
    shown = capsys.readouterr().out
    assert f"finished after 2 of 2 rounds: the model is in {tmp_path}/out/round-2/run" in shown
    assert f"round 1 has the best win rate against the start, 66.7%: {tmp_path}/out/round-1/run" in shown


def test_a_judge_that_says_the_same_of_everything_ends_it_before_training(inputs, iteration, capsys):
    config = [iteration(**SHORT, rate__judge_function=f"{inputs / 'judge.py'}:flat")]
    for fake in (Fake(), Fake()):  # the same command finds the same
        assert iterate.iterate(config, fake) == 1
        assert "gave everything the same rating, so nothing can be learned" in capsys.readouterr().err
        assert "curate" not in fake.names


def test_too_many_prompts_without_ratings_end_it_and_few_do_not(iteration, capsys, monkeypatch):
    from notus.feedback.judge import JudgeError

    inner, failing = FunctionJudge._verdict, ["1", "4"]

    def verdict(judge: FunctionJudge, question: Any) -> Any:
        if question.prompt.split()[-1] in failing:
            raise JudgeError("no answer")
        return inner(judge, question)

    def rate(judge: FunctionJudge, questions: Any, done: Any) -> None:
        for question in questions:
            try:
                done(question, verdict(judge, question))
            except JudgeError as error:
                done(question, error)

    monkeypatch.setattr(FunctionJudge, "rate", rate)
    changes = {**SHORT, "iterate__rounds": 1, "iterate__prompts_per_round": 12}
    fake = Fake()
    assert iterate.iterate([iteration(**changes)], fake) == 1
    assert (
        "round 1, rate: 16.7% of the prompts have no ratings, and rate.allow_failed is 0.05" in capsys.readouterr().err
    )
    assert fake.names == ["sample", "rate"]
    failing.pop()
    assert iterate.iterate([iteration(**changes)], fake) == 1  # it asks again for the two
    assert "8.3% of the prompts have no ratings" in capsys.readouterr().err
    assert iterate.iterate([iteration(**changes, rate__allow_failed=0.1)], fake) == 0
    assert fake.names == ["sample", "rate", "rate", "curate", "dpo"]
    failing.clear()  # what was trained on stays, though the judge could rate it all now
    assert iterate.iterate([iteration(**changes)], fake) == 0
    assert len(fake.names) == 5


def test_failed_completions_count_by_their_share(iteration, capsys):
    class Failing(Fake):
        def _sample(self, prompts: Path, out: Path, words: Sequence[str], number: int) -> None:
            super()._sample(prompts, out, words, number)
            summary = json.loads(summary_file(out).read_text())
            write_object(summary_file(out), {**summary, "failed": 2})

        def __call__(self, words: Sequence[str], spread: bool) -> int:
            return super().__call__(words, spread) or (words[0] == "sample")

    assert iterate.iterate([iteration(**SHORT)], Failing()) == 1  # 2 of 18
    assert (
        "round 1, sample: 11.1% of the completions failed, and sample.allow_failed is 0.05" in capsys.readouterr().err
    )
    assert iterate.iterate([iteration(**SHORT, sample__allow_failed=0.2)], Failing()) == 0


def test_records_without_their_summary_are_made_again(iteration, tmp_path):
    config = [iteration(**SHORT)]
    first = Fake()
    assert (
        iterate.iterate(config, Counting(lambda words: STOPPED if words[0] == "rate" else first(words, False)))
        == STOPPED
    )
    records = tmp_path / "out" / "round-1" / "records.jsonl"
    records.write_text(records.read_text() + "\n")  # killed between the records and their summary
    second = Fake()
    assert iterate.iterate(config, second) == 0
    assert second.names[:2] == ["sample", "rate"]


# ---- the folder ----


def test_a_changed_config_is_refused_by_key_and_what_is_free_is_not(iteration, tmp_path):
    changes = {**SHORT, "iterate__rounds": 1, "iterate__prompts_per_round": None}
    assert iterate.iterate([iteration(**changes)], Fake()) == 0
    recorded = load_settings([str(tmp_path / "out" / "iterate.yaml")])
    assert recorded.iterate.prompts_per_round == 12
    for more, message in (
        ({"dpo__beta": 0.2}, r"dpo.beta \(was 0.1, is 0.2\). Restore the config to resume"),
        ({"sample__n": 5, "rate__judge_function": "x.py:f"}, r"sample.n \(was 3, is 5\), rate.judge_function \(was"),
        ({"iterate__old_share": 0.5, "iterate__rounds": 2}, r"iterate.old_share \(was 0.0, is 0.5\)"),
        (
            {"iterate__rounds": 2},
            r"0 prompts \(without those 12 used by earlier rounds\) are too few for 1 r",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            iterate.iterate([iteration(**{**changes, **more})], Fake())
    free = {
        "rate__allow_failed": 0.5,
        "sample__batch_size": 3,
        "training__tokens_per_row": 300,
        "training__log_every": 3,
    }
    assert iterate.iterate([iteration(**changes, **free)], Fake()) == 0


def test_rounds_are_added_with_prompts_that_are_new(iteration, tmp_path, inputs):
    changes = {**SHORT, "iterate__prompts": str(tmp_path / "mine.txt"), "iterate__prompts_per_round": None}
    write_prompts(tmp_path / "mine.txt", 8)
    assert iterate.iterate([iteration(**changes)], Fake()) == 0
    write_prompts(tmp_path / "mine.txt", 12)
    assert iterate.iterate([iteration(**changes, iterate__rounds=3)], Fake()) == 0
    drawn = [row["prompt"] for n in (1, 2, 3) for row in read_lines(tmp_path / "out" / f"round-{n}" / "prompts.jsonl")]
    assert len(drawn) == len(set(drawn)) == 12
    with pytest.raises(ValueError, match=r"iterate.rounds is 2, but .*out holds 3 rounds"):
        iterate.iterate([iteration(**changes, iterate__rounds=2)], Fake())


def test_nothing_starts_without_what_later_stages_need(iteration, tmp_path, inputs, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    for changes, message in (
        ({"iterate__prompts": "gone.txt"}, r"iterate.prompts=gone.txt: there is no such file"),
        ({"rate__judge_function": "gone.py:f"}, r"gone.py"),
        ({"curate__decontaminate": "gone.txt"}, r"curate.decontaminate=gone.txt: there is no such file"),
        ({"data__chat_template": "gone.jinja"}, r"data.chat_template=gone.jinja: there is no such file"),
        ({"iterate__prompts_per_round": 7}, r"12 prompts are too few for 2 rounds of 7"),
        ({"iterate__prompts": str(inputs / "eval.txt")}, r"0 prompts \(without those 3 also in iterate.eval_prompts\)"),
        ({"training__output_dir": str(tmp_path / "run")}, r"run holds a run: choose another training.output_dir"),
        (
            {"sample__models": ["m@http://h/v1"], "sample__api_key_env": "NOTUS_NO_KEY"},
            r"sample.api_key_env: the environment has no NOTUS_NO_KEY",
        ),
    ):
        fake = Fake()
        with pytest.raises(ValueError, match=message):
            iterate.iterate([iteration(**changes)], fake)
        assert fake.names == []


def test_a_prompt_that_fills_the_starts_context_is_named_before_any_stage(iteration, tmp_path):
    (tmp_path / "long.txt").write_text("fox\n" * 3 + "dog\nsea\n" + "poem " * 600 + "\n")
    fake = Fake()
    with pytest.raises(ValueError, match=r"long.txt, line 6: the prompt's \d+ tokens fill the model's context"):
        iterate.iterate(
            [iteration(iterate__prompts=str(tmp_path / "long.txt"), iterate__rounds=1, iterate__prompts_per_round=1)],
            fake,
        )
    assert fake.names == []


def test_a_config_may_change_until_a_stage_has_begun(iteration, tmp_path, capsys):
    def refused(words, spread):
        raise ValueError("no stage starts")

    entry.main(["iterate", iteration(), "--print"])
    assert (tmp_path / "out" / "iterate.yaml").exists()
    with pytest.raises(ValueError, match="no stage starts"):
        iterate.iterate([iteration(dpo__beta=0.2, iterate__eval_prompts=None)], refused)
    assert load_settings([str(tmp_path / "out" / "iterate.yaml")]).given("dpo.beta") == 0.2


def test_a_start_without_chat_template_is_named(iteration, tmp_path):
    write_start(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    config = iteration(**SHORT, model__name_or_path=str(tmp_path / "plain"))
    fake = Fake()
    with pytest.raises(ValueError, match=r"plain has no chat template, .*: set data.chat_template"):
        iterate.iterate([config], fake)
    assert fake.names == []
    assert iterate.iterate([config, "--data.chat_template=zephyr"], fake) == 0


def test_a_start_that_is_a_run_is_sampled_as_the_rounds_train(iteration, tmp_path, inputs):
    """Sampling takes a run's settings of conversations where the config has none; training would not."""
    run, chat = tmp_path / "sft", {"data__add_empty_system": True, "data__chat_template_kwargs": {"x": 1}}
    shutil.copytree(inputs / "start", run / "model")
    template = run / "model" / "chat_template.jinja"
    template.write_text("{% if x %}{% endif %}" + template.read_text())
    (run / "config.yaml").write_text(to_yaml(run_config("sft", run, inputs / "start", inputs / "eval.txt", **chat)))
    config, fake = iteration(**SHORT, model__name_or_path=str(run)), Fake()
    with pytest.raises(ValueError, match=r"sft was trained with data.add_empty_system=true: set that here, too"):
        iterate.iterate([config], fake)
    with pytest.raises(ValueError, match=r"sft was trained with data.chat_template_kwargs=\{\"x\": 1\}: set that"):
        iterate.iterate([config, "--data.add_empty_system=true"], fake)
    assert fake.names == []
    assert iterate.iterate([config, "--data.add_empty_system=true", "--data.chat_template_kwargs={x: 2}"], fake) == 0


def test_evaluation_prompts_stay_as_the_start_answered_them(iteration, tmp_path):
    """Else a prompt that all rounds are compared on could be trained on."""
    config = iteration(iterate__eval_prompts=str(tmp_path / "mine.txt"), iterate__kl_samples=0, data__eval_size=0)
    write_prompts(tmp_path / "mine.txt", 3, first=100)
    fake = Fake(rates=[1, 1])
    assert iterate.iterate([config], fake, only=("prompts", 0)) == 0
    write_prompts(tmp_path / "mine.txt", 2, first=100)
    with pytest.raises(ValueError, match=r"iterate.eval_prompts=.*mine.txt has other prompts than when the iteration"):
        iterate.iterate([config], fake)
    write_prompts(tmp_path / "mine.txt", 3, first=100)
    assert iterate.iterate([config], fake) == 0


def test_a_second_iteration_in_the_folder_is_refused(iteration, tmp_path):
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print(flush=True); time.sleep(60)", str(tmp_path / "out" / ".lock")], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match=r"out is in use by another iteration: wait for its end"):
            iterate.iterate([iteration(**SHORT)], Fake())
    finally:
        holder.kill()
        holder.wait()
    with (tmp_path / "out" / ".lock").open("a") as file:
        lock(file)


# ---- for schedulers ----


def test_commands_are_printed_in_order(iteration, tmp_path, capsys):
    config = iteration(iterate__rounds=1)
    assert entry.main(["iterate", config, "--print", "--nproc-per-node=4", "--dpo.beta=0.3"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    plain, torchrun = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    own = [*plain, "-m", "notus", "iterate", config, "--dpo.beta=0.3", "--only"]
    assert lines[0] == [*own, "prompts", "--round", "0"]
    assert lines[1][:9] == [*torchrun, "--nproc-per-node=4", "-m", "--", "notus", "sample"]
    commands = [line[line.index("notus") + 1] for line in lines]
    assert commands == [
        "iterate",
        "sample",
        "iterate",
        *["sample", "rate", "curate", "dpo", "sample", "rate", "evaluate"],
        "iterate",
        "report",
    ]
    (trained,) = [line for line in lines if "dpo" in line]
    assert load_config(trained[trained.index("dpo") + 1 :], "dpo").dpo.beta == 0.3  # dpo.yaml is there
    assert not (tmp_path / "out" / "round-1").exists()


def test_one_stage_runs_if_those_before_it_have(iteration, tmp_path, capsys):
    config = [iteration(**SHORT)]
    fake = Fake()
    with pytest.raises(ValueError, match=r"--only rate --round 1: round 1, prompts is not complete; run it first"):
        iterate.iterate(config, fake, only=("rate", 1))
    with pytest.raises(ValueError, match=r"there is no such stage; the stages of that round: prompts, sample, rate"):
        iterate.iterate(config, fake, only=("compare", 1))
    for name in ("prompts", "sample", "rate"):
        assert iterate.iterate(config, fake, only=(name, 1)) == 0
    assert fake.names == ["sample", "rate"]
    assert iterate.iterate(config, fake, only=("rate", 1)) == 0
    assert "round 1, rate: complete already" in capsys.readouterr().out
    assert fake.names == ["sample", "rate"]


def test_after_a_stop_the_stages_of_later_rounds_do_nothing(iteration, capsys):
    config = [iteration(iterate__stop_kl=2.0)]
    fake = Fake(rates=[1, 1], kls=[3.0, 3.0])
    assert iterate.iterate(config, fake) == 0
    before = list(fake.names)
    for name in ("prompts", "sample", "dpo"):
        assert iterate.iterate(config, fake, only=(name, 2)) == 0
    assert "round 2: nothing to do, since the KL of round 1 to the start is 3" in capsys.readouterr().out
    assert fake.names == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "dpo"], "--only and --round belong together"),
        (["--round", "1"], "--only and --round belong together"),
        (["--print", "--only", "dpo", "--round", "1"], "--print prints all stages"),
    ],
)
def test_options_that_do_not_go_together(iteration, words, message, capsys):
    assert entry.main(["iterate", iteration(), *words]) == 1
    assert message in capsys.readouterr().err


def test_ranks_do_not_start_iterations(iteration, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun, with --nproc-per-node N"):
        iterate.run(entry._parse(["iterate", iteration()]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_own_code(iteration, monkeypatch, capsys, number, code):
    def run(child: Any, command: list[str]) -> int:
        child._receive(number, None)
        return -int(number)

    monkeypatch.setattr(iterate.Child, "run", run)
    assert entry.main(["iterate", iteration(**SHORT)]) == code
    assert "in round 1, sample; the same command continues" in capsys.readouterr().err
