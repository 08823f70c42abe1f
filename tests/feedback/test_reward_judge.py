"""The judge that is a reward model: the same score in a batch as alone, on any kind of padding, and what it rejects."""

import argparse
import json
import math
import shutil

import pytest
import torch
from toys import toy_config, toy_model_folder, toy_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, GPT2Config

from notus.curation import command as curate
from notus.data.formats import normalize
from notus.feedback import rate
from notus.feedback.judge import JudgeError, Question
from notus.feedback.reward_judge import RewardJudge, load_reward_model, make_judge
from notus.runtime.distributed import process_group

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
CPU = torch.device("cpu")


def config_of(kind, **more):
    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return BertConfig(vocab_size=400, max_position_embeddings=256, num_labels=1, **sizes, **more)
    if kind == "gpt2":
        return GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, num_labels=1, **more)
    return toy_config(kind, num_labels=1, **more)


def reward_folder(folder, kind="llama", *, padding_side="right", pad_token=None, template=TEMPLATE, **more):
    """Write a toy reward model, whose scores lie far apart, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(kind, **more), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer = toy_tokenizer(chat_template=template)
    tokenizer.padding_side = padding_side
    if pad_token:
        tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(folder)
    return folder


def asked(*completions, prompt="What is the capital of France?", number=0, **more):
    return Question(f"key {number}", f"r.jsonl, line {number}", prompt, completions, range(len(completions)), **more)


QUESTIONS = [
    asked("Yes.", "The quick brown fox jumps over the lazy dog. " * 6, "", number=1),
    asked("hello world " * 9, "no", prompt="Write a poem about the sea, please! " * 4, number=2),
    asked("question answer", prompt="Hi", number=3),
]


def judge_of(folder, dtype=torch.float32, **more):
    return RewardJudge("toy", "identity", *load_reward_model(folder, dtype, CPU), **more)


def outcomes(judge, questions=QUESTIONS):
    found = {}
    judge.rate(questions, lambda question, outcome: found.setdefault(question.place, []).append(outcome))
    assert all(len(each) == 1 for each in found.values())
    return {place: each[0] for place, each in found.items()}


def rewards(judge, questions=QUESTIONS):
    found = outcomes(judge, questions)
    assert all(len(verdict.annotations) == len(verdict.rewards) for verdict in found.values())
    return [reward for question in questions for reward in found[question.place].rewards]


@torch.no_grad()
def alone(folder, questions=QUESTIONS):
    """The scores as a model card computes them: one conversation after the other, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = toy_tokenizer(chat_template=TEMPLATE)
    found = []
    for question in questions:
        for completion in question.completions:
            turns = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": completion}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            found.append(model(input_ids=torch.tensor([ids])).logits.item())
    return found


KINDS = [
    ("llama", {}),  # no pad token anywhere
    ("llama", {"pad_token_id": 0, "pad_token": "<unk>"}),
    ("llama", {"pad_token": "</s>", "pad_token_id": 2}),  # then the head never looks at the end of a turn
    ("llama", {"pad_token": "</s>"}),  # the tokenizer alone has one
    ("qwen3", {}),
    ("gpt2", {"pad_token_id": None}),  # learned positions
    ("bert", {}),  # looks at the first token
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_scores_in_a_batch_are_those_of_conversations_alone(tmp_path, kind, options):
    expected = alone(reward_folder(tmp_path / "left", kind, padding_side="left", **options))
    assert max(expected) - min(expected) > 0.01  # or equality would show nothing
    shutil.copytree(tmp_path / "left", tmp_path / "right")
    settings = tmp_path / "right" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"left"', '"right"'))
    for side, size in (("left", 6), ("right", 2)):
        found = rewards(judge_of(tmp_path / side, batch_size=size))
        assert found == pytest.approx(expected, abs=1e-5), (side, size)


def test_a_head_that_looks_at_padding_scores_row_by_row(tmp_path, capsys):
    reward_folder(tmp_path)
    judge = judge_of(tmp_path, batch_size=4)
    forward = judge._model.forward

    def last_column(input_ids, attention_mask):
        hidden = judge._model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        output = forward(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = judge._model.score(hidden[:, -1])
        return output

    judge._model.forward = last_column
    assert rewards(judge) == pytest.approx(alone(tmp_path), abs=1e-5)
    assert "note: toy scores padded rows differently" in capsys.readouterr().out


def test_questions_with_the_same_key_keep_their_own_scores(tmp_path):
    reward_folder(tmp_path)
    twice = [QUESTIONS[0], Question(**{**vars(QUESTIONS[0]), "place": "r.jsonl, line 9"})]
    found = outcomes(judge_of(tmp_path), twice)
    first, second = (list(found[question.place].rewards) for question in twice)
    assert first == pytest.approx(second, abs=1e-5)
    assert len(first) == 3


def test_bf16_rounds_the_body_and_not_the_reward(tmp_path):
    expected = alone(reward_folder(tmp_path))
    judge = judge_of(tmp_path, torch.bfloat16)
    assert (judge._model.dtype, judge._model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    found = rewards(judge)
    assert found == pytest.approx(expected, rel=0.1, abs=0.2)
    rounded = torch.tensor(found).bfloat16().float().tolist()
    assert found != rounded


def test_messages_tools_and_arguments_reach_the_template(tmp_path):
    template = "{{ mood }}" + TEMPLATE
    judge = judge_of(reward_folder(tmp_path, template=template))
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    question = asked("Yes.", messages=turns, tools=[{"name": "now"}], template_kwargs={"mood": "glad"})
    ids = judge._ids(question, "Yes.", "here")
    text = judge._tokenizer.decode(ids)
    assert text == 'glad<|system|>Be short.</s><|user|>Hi</s><|assistant|>Yes.</s>[{"name": "now"}]'
    other = judge_of(tmp_path, chat_template="zephyr")
    assert other._tokenizer.decode(other._ids(question, "Yes.", "here")).startswith("<|system|>\nBe short.</s>\n")


def test_a_template_that_hides_the_completion_fails_the_question(tmp_path):
    judge = judge_of(reward_folder(tmp_path, template="{{ messages[0].content }}"))
    (error,) = outcomes(judge, [asked("Yes.", number=4)]).values()
    assert str(error) == "r.jsonl, line 4: completion 1: the reward model's chat template leaves out a part of it"
    refusing = judge_of(reward_folder(tmp_path, template="{{ raise_exception('no such turn') }}"))
    (error,) = outcomes(refusing, [asked("Yes.", number=4)]).values()
    assert "chat template refuses it (no such turn)" in str(error)


def test_nothing_is_cut(tmp_path):
    judge = judge_of(reward_folder(tmp_path, max_position_embeddings=64))
    long = asked("fine", "hello world " * 60, number=5)
    found = outcomes(judge, [long, QUESTIONS[2]])
    assert isinstance(found[long.place], JudgeError)
    tokens = len(judge._ids(long, long.completions[1], "here"))
    said = f"completion 2 with its prompt has {tokens} tokens, and the reward model's context is 64"
    assert said in str(found[long.place])
    assert len(found[QUESTIONS[2].place].rewards) == 1


def test_a_reward_that_is_no_number_fails_the_question(tmp_path):
    judge = judge_of(reward_folder(tmp_path), batch_size=1)
    with torch.no_grad():
        judge._model.score.weight.fill_(math.nan)
    (error,) = outcomes(judge, [QUESTIONS[2]]).values()
    assert str(error) == "r.jsonl, line 3: the reward of completion 1 is nan"


def arguments(folder, **more):
    given = {"precision": "fp32", "chat_template": None, "trust_remote_code": False, "batch_size": 2}
    return argparse.Namespace(**{"reward_model": str(folder), **given, **more})


def made(folder, **more):
    with process_group():
        return make_judge(arguments(folder, **more))


def test_the_commands_judge_and_its_identity(tmp_path):
    reward_folder(tmp_path)
    judge = made(tmp_path)
    assert (judge.name, judge.shared) == (str(tmp_path), True)
    assert rewards(judge) == pytest.approx(alone(tmp_path), abs=1e-5)
    assert made(tmp_path, batch_size=7).identity == judge.identity
    assert made(tmp_path, chat_template="zephyr").identity != judge.identity
    assert made(tmp_path, precision=None).identity != judge.identity  # bf16
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pad_token_id": 2}))
    with_pad = made(tmp_path).identity
    assert with_pad != judge.identity
    toy_tokenizer(chat_template=TEMPLATE + " ").save_pretrained(tmp_path)
    assert made(tmp_path).identity not in (judge.identity, with_pad)


def test_a_checkpoint_without_its_head_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    reward_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack score.weight, and with random values"):
        made(tmp_path)
    more = {**weights, "score.weight": head, "regression.bias": torch.zeros(1)}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights hold regression.bias, for which"):
        made(tmp_path)
    save_file({**weights, "score.weight": head, "lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    made(tmp_path)


def test_what_is_no_reward_model_is_named(tmp_path):
    lm = toy_model_folder(tmp_path / "lm", "llama")
    with pytest.raises(ValueError, match=r"config.json: a LlamaForCausalLM, which has no score head"):
        made(lm)
    several = reward_folder(tmp_path / "several")
    AutoConfig.from_pretrained(several, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}).save_pretrained(
        several
    )
    with pytest.raises(ValueError, match=r"the model has 2 labels \(bad, good\), but a reward model has one"):
        made(several)
    bare = reward_folder(tmp_path / "bare", template=None)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        made(bare)
    assert made(bare, chat_template="zephyr").shared
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter; merge it into its base"):
        made(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no such folder"):
        made("none here")


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def test_from_records_to_pairs_that_train(tmp_path):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    records = []
    for question in QUESTIONS[:2]:
        completions = [{"model": "m", "response": text} for text in question.completions]
        records.append({"source": "s", "instruction": question.prompt, "completions": completions})
    records.append({**records[1], "messages": turns})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = reward_folder(tmp_path / "model")
    rated, pairs = tmp_path / "rated.jsonl", tmp_path / "pairs.jsonl"
    assert command(rate, tmp_path / "records.jsonl", rated, "--reward-model", folder, "--precision", "fp32") == 0
    found = [json.loads(line) for line in rated.read_text().splitlines()]
    talk = asked("hello world " * 9, "no", messages=turns, number=9)
    scores = rewards(judge_of(folder), [*QUESTIONS[:2], talk])
    given = [each["reward"] for record in found for each in record["completions"]]
    assert given == pytest.approx(scores, abs=1e-5)
    command(curate, rated, pairs, "--by", "reward")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert normalize(rows[2], "dpo").prompt == turns
    for row, record in zip(rows, found, strict=True):
        best = max(record["completions"], key=lambda each: each["reward"])
        assert normalize(row, "dpo").completions[0][-1]["content"] == best["response"]
        assert row["chosen-rating"] == best["reward"] > row["rejected-rating"]
