"""The judge that is a local model: what it is asked, how its answers are read, and each rank by itself."""

import argparse
import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_reward_judge import reward_folder
from toys import toy_model, toy_tokenizer

from notus.data import chat_template
from notus.evaluation.budget import Usage
from notus.evaluation.decoding import Completion, Generated
from notus.feedback import local_judge, reward_judge
from notus.feedback.judge import Annotation, JudgeError, Question, Verdict
from notus.feedback.local_judge import make_judge
from notus.runtime.distributed import process_group

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INSTRUCTIONS = "## Aspect: tone\n1 to 5\n## Aspect: truth\n1 to 5\n## Now\n{prompt}\n{completions}\n{answer_format}\n"


def judge_folder(folder, *, template=TEMPLATE, **more):
    toy_model("llama", max_position_embeddings=2048, **more).save_pretrained(folder)
    toy_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return judge_folder(tmp_path_factory.mktemp("judge"))


def arguments(folder, **more):
    given = {
        "local_judge": str(folder),
        "aspects": ["tone", "truth"],
        "instructions": str(folder / "instructions.txt"),
        "max_new_tokens": 12,
        "batch_size": 2,
        "precision": "fp32",
        "chat_template": None,
        "trust_remote_code": False,
    }
    (folder / "instructions.txt").write_text(INSTRUCTIONS)
    return argparse.Namespace(**{**given, **more})


def made(folder, **more):
    with process_group():
        return make_judge(arguments(folder, **more))


def asked(number, *completions):
    return Question(f"key {number}", f"r.jsonl, line {number}", f"Prompt {number}?", completions, range(2))


def outcomes(judge, questions):
    found = {}
    judge.rate(questions, lambda question, outcome: found.setdefault(question.place, []).append(outcome))
    assert all(len(each) == 1 for each in found.values())
    return {place: each[0] for place, each in found.items()}


QUESTIONS = [asked(1, "Yes.", "No."), asked(2, "hello world " * 30, "a"), asked(3, "x", "y")]


def test_answers_are_read_as_those_of_an_endpoint(folder, monkeypatch):
    judge, calls = made(folder), []
    reply = {
        "completion_1": {"tone": {"rationale": "fine", "rating": "5"}, "truth": "N/A"},
        "completion_2": {"tone": 2},
    }

    def scripted(causal_lm, encoder, prompts, decoding, *, alone):
        calls.append(([prompt.place for prompt in prompts], decoding.temperature, alone))
        texts = [("no idea", "length") if "line 3" in each.place else (json.dumps(reply), "stop") for each in prompts]
        return Generated([[Completion(text, [5] * 9, how, 9)] for text, how in texts], 9, 1.0)

    monkeypatch.setattr(local_judge, "generate_completions", scripted)
    found = outcomes(judge, QUESTIONS)
    # the longest question first, two at a time
    assert calls == [(["r.jsonl, line 2", "r.jsonl, line 1"], 0.0, True), (["r.jsonl, line 3"], 0.0, True)]
    verdict = found["r.jsonl, line 1"]
    lacking = Annotation(None, unreadable=True)
    assert verdict.annotations == [
        {"tone": Annotation(5.0, "fine"), "truth": Annotation(None)},
        {"tone": Annotation(2.0), "truth": lacking},
    ]
    ids = judge._encoder.encode_prompt([{"role": "user", "content": judge._instructions.text(QUESTIONS[0])}])
    assert verdict.usage == Usage(1, len(ids), 9)
    error = found["r.jsonl, line 3"]
    assert str(error) == "r.jsonl, line 3: no rating in the answer, which was cut after 9 tokens: 'no idea'"
    assert error.usage.completion_tokens == 9


def test_a_toy_model_answers_nonsense_which_is_counted(folder):
    one_by_one = outcomes(made(folder, batch_size=1), QUESTIONS)
    together = outcomes(made(folder, batch_size=3), QUESTIONS)
    assert all(isinstance(error, JudgeError) for error in together.values())
    assert {place: str(error) for place, error in one_by_one.items()} == {
        place: str(error) for place, error in together.items()
    }
    assert all(0 < error.usage.completion_tokens <= 12 for error in together.values())


def test_a_question_that_does_not_fit_fails_alone(folder):
    judge = made(folder)
    questions = [asked(4, "hello world " * 900, "a"), QUESTIONS[0]]
    found = outcomes(judge, questions)
    said = str(found["r.jsonl, line 4"])
    assert said.startswith("r.jsonl, line 4: the prompt's ")
    assert "fill the model's context of 2048" in said
    assert found["r.jsonl, line 4"].usage == Usage()
    assert found["r.jsonl, line 1"].usage.requests == 1


def test_the_identity_is_all_that_decides_the_answers(folder, tmp_path):
    judge = made(folder)
    assert (judge.name, judge.shared) == (str(folder), True)
    assert made(folder, batch_size=5).identity == judge.identity
    others = [
        made(folder, max_new_tokens=13),
        made(folder, precision="bf16"),
        made(folder, chat_template="zephyr"),
        made(folder, aspects=["tone"]),
        made(judge_folder(tmp_path / "other", seed=1)),
        made(judge_folder(tmp_path / "template", template=TEMPLATE + " ")),
    ]
    assert len({judge.identity, *(each.identity for each in others)}) == 7
    assert made(judge_folder(tmp_path / "copy")).identity == judge.identity


def test_a_template_with_the_date_is_the_same_judge_tomorrow(tmp_path, monkeypatch):
    dated = judge_folder(tmp_path / "dated", template="{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    today = made(dated)
    tomorrow = today._encoder.date + datetime.timedelta(days=1)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return tomorrow

    monkeypatch.setattr(chat_template, "datetime", SimpleNamespace(date=Tomorrow))
    again = made(dated)
    assert again._encoder.date == tomorrow
    assert again.identity == today.identity


def test_a_judge_needs_a_chat_template(tmp_path):
    folder = judge_folder(tmp_path / "plain", template=None)
    with pytest.raises(ValueError, match=r"a judge is asked in a user turn, and this model has no chat template"):
        made(folder)
    assert made(folder, chat_template="zephyr").shared


def rate_by_itself(folder, reward):
    """A rank with a question more than the other: a collective would wait for ever, or mix the ranks' questions."""
    mine = QUESTIONS[: 3 - 2 * torch.distributed.get_rank()]
    judge = make_judge(arguments(folder, batch_size=1))
    expected = {question.place for question in mine}
    assert set(outcomes(judge, mine)) == expected
    more = {"reward_model": str(reward)}
    scored = outcomes(reward_judge.make_judge(arguments(folder, batch_size=1, **more)), mine)
    assert set(scored) == expected
    assert all(isinstance(verdict, Verdict) for verdict in scored.values())


@pytest.mark.slow
def test_every_rank_rates_its_own_questions(folder, tmp_path):
    run_ranks(rate_by_itself, 2, tmp_path, folder, reward_folder(tmp_path / "reward"))
