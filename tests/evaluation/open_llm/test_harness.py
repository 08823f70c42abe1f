"""NotusLM answers lm-eval's requests as lm-eval's own class for transformers models does."""

import json
import random

import pytest
import torch
from runs import words
from toys import toy_model, toy_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from notus.evaluation.decoding import model_digest
from notus.evaluation.open_llm.harness import NotusLM
from notus.model.verify import PathChoice
from notus.runtime import distributed


@pytest.fixture(autouse=True)
def group():
    with distributed.process_group():
        yield


def notus_lm(folder, causal_lm, tokenizer, *, max_length=256, **options):
    settings = {
        "name": "toy",
        "path": PathChoice("packed"),
        "tokens_per_row": None,
        "batch_size": 3,
        "identity": model_digest(causal_lm),
    }
    return NotusLM(causal_lm, tokenizer, max_length=max_length, kept=folder, **{**settings, **options})


def requests(kind, arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def pairs():
    draw = random.Random(1)
    found = []
    for _ in range(8):
        context = words(draw, 4, 30)
        found += [(context, f" {words(draw, 1, 5)}") for _ in range(draw.choice([1, 3, 4]))]
    found += [
        ("the quick  ", "brown"),  # spaces move to the continuation
        ("the quick", " brown"),
        ("", "the quick brown fox"),  # BOS, or EOS, stands before it
        ("<s>the quick", " brown"),  # BOS is there already
        ("hello wör", "ld 你好 🙂"),
        ("Answer:", " A"),
        ("Answer:", " B"),
        ("Answer:", " A B"),  # an option that begins as another
        (" ".join(["sea"] * 60), " poem about the sea"),
    ]
    return found + found[:3]


def plain(causal_lm, lm, arguments, max_length):
    """Each request alone through an ordinary forward pass."""
    scores = []
    for context, continuation in arguments:
        before = lm.tok_encode(context.rstrip()) if context else [lm.prefix_token_id]
        whole = lm.tok_encode(context + continuation) if context else [*before, *lm.tok_encode(continuation, False)]
        ids = [*before, *whole[len(before) :]]
        count = len(ids) - len(before)
        ids = torch.tensor([ids[-(max_length + 1) :]])
        with torch.no_grad():
            logps = causal_lm(ids[:, :-1]).logits[0, -count:].log_softmax(-1)
        wanted = ids[0, -count:]
        scores.append((logps.gather(1, wanted[:, None]).sum().item(), bool((logps.argmax(-1) == wanted).all())))
    return scores


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("max_length", [256, 23])
def test_log_likelihoods(tmp_path, bos, max_length):
    causal_lm, tokenizer = toy_model(), toy_tokenizer(bos=bos)
    lm = notus_lm(tmp_path, causal_lm, tokenizer, max_length=max_length)
    arguments = pairs()
    # what the model itself would say, so that some continuations are greedy
    for context in ("the quick", "hello world answer", ""):
        ids = lm.tok_encode(context) or [lm.prefix_token_id]
        with torch.no_grad():
            arguments.append(
                (context or "poem", tokenizer.decode(causal_lm(torch.tensor([ids])).logits[0, -1].argmax()))
            )
    found = lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    expected = plain(causal_lm, lm, arguments, max_length)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {True, False} <= {greedy for _, greedy in found}
    assert causal_lm.config._attn_implementation == "sdpa"  # as it was


def test_a_context_of_spaces_alone(tmp_path):
    """lm-eval moves them to the continuation; without a BOS nothing would stand before that."""
    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer(bos=False))
    found = lm.loglikelihood(
        requests("loglikelihood", [("the quick brown fox", " jumps"), (" ", "sea"), ("", " sea")]), disable_tqdm=True
    )
    assert found[1] == found[2]


def peer(causal_lm, tokenizer, max_length, batch_size=3):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=causal_lm, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("max_length", [256, 23])
def test_hflm_says_the_same(tmp_path, bos, max_length):
    causal_lm, tokenizer = toy_model(), toy_tokenizer(bos=bos)
    ours, theirs = (
        notus_lm(tmp_path, causal_lm, tokenizer, max_length=max_length),
        peer(causal_lm, tokenizer, max_length),
    )
    arguments = pairs()
    found, expected = (
        lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True) for lm in (ours, theirs)
    )
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [("the quick brown fox " * 9,), ("",), ("sea",), ("<s>poem about the sea",), ("héllo 🙂 " * 7,)]
    rolled, rolled_by_them = (
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in (ours, theirs)
    )
    assert rolled == pytest.approx(rolled_by_them, abs=1e-3)
    assert (rolled[1] == 0) is not bos  # nothing to score, or the BOS that the tokenizer puts there
    settings = {"until": ["o", "\n\n"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    other = {"until": "the", "max_gen_toks": 4}
    prompts = [(words(random.Random(seed), 1, 30), settings if seed % 3 else other) for seed in range(10)]
    written, by_them = (lm.generate_until(requests("generate_until", prompts)) for lm in (ours, theirs))
    assert written == by_them
    assert len(set(written)) > 3


def test_stop_strings_end_the_generation(tmp_path, monkeypatch):
    causal_lm, tokenizer = toy_model(), toy_tokenizer()
    lm = notus_lm(tmp_path, causal_lm, tokenizer)
    (whole,) = lm.generate_until(requests("generate_until", [("hello world", {"until": [], "max_gen_toks": 40})]))
    end = whole[3:5]
    steps = []
    forward = causal_lm.forward
    monkeypatch.setattr(causal_lm, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    (cut,) = lm.generate_until(requests("generate_until", [("hello world", {"until": [end], "max_gen_toks": 40})]))
    assert cut == whole[: whole.index(end)]
    assert len(steps) < 10


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_special_token_may_end_the_generation(tmp_path, batch_size):
    """As "<|im_end|>" does in GSM8K's `until`, where it is not the EOS; the text itself leaves such tokens out."""
    causal_lm, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        causal_lm.lm_head.weight[tokenizer.unk_token_id] *= 3
    ours = notus_lm(tmp_path, causal_lm, tokenizer, batch_size=batch_size)
    settings = {"until": ["<unk>", "zzz"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(f"hello {word} world", settings) for word in ("a", "quick", "fox", "Yes")])
    unstopped = requests("generate_until", [(one.args[0], {**settings, "until": []}) for one in asked])
    written = ours.generate_until(asked)
    assert written == peer(causal_lm, tokenizer, 256, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert written != ours.generate_until(unstopped)


def test_drawn_completions_follow_temperature_and_repeat(tmp_path):
    causal_lm, tokenizer = toy_model(), toy_tokenizer()
    draw = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    asked = requests("generate_until", [("hello world", draw)] * 4)
    first, second = (notus_lm(tmp_path / name, causal_lm, tokenizer).generate_until(asked) for name in "ab")
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"until": [], "num_beams": 3}, "num_beams"), ({"until": [], "max_gen_toks": 300}, "do not fit")],
)
def test_what_cannot_be_generated_is_refused(tmp_path, settings, told):
    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer())
    with pytest.raises(ValueError, match=told):
        lm.generate_until(requests("generate_until", [("hello", settings)]))


def test_texts_that_cannot_be_scored_are_refused(tmp_path):
    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer(), max_length=5, tokens_per_row=4)
    for context in ("hello", ""):
        with pytest.raises(ValueError, match="no tokens"):
            lm.loglikelihood(requests("loglikelihood", [(context, "")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="--max-length 5"):
        lm.loglikelihood(requests("loglikelihood", [("hello", " the quick brown fox jumps over")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="--tokens-per-row 4 is less"):
        lm.loglikelihood(requests("loglikelihood", [("the quick brown fox", " jumps")]), disable_tqdm=True)


def test_rows_sizes_do_not_change_scores_and_done_ones_are_not_computed_again(tmp_path, monkeypatch):
    causal_lm, tokenizer = toy_model(), toy_tokenizer()
    asked = requests("loglikelihood", pairs())
    whole = notus_lm(tmp_path / "a", causal_lm, tokenizer).loglikelihood(asked, disable_tqdm=True)
    small = notus_lm(tmp_path / "b", causal_lm, tokenizer, tokens_per_row=130)
    calls = []
    from notus.model.policy import Policy

    scores = Policy.token_scores

    def dying(self, batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch.indices.tolist())
        return scores(self, batch)

    monkeypatch.setattr(Policy, "token_scores", dying)
    with pytest.raises(KeyboardInterrupt):
        small.loglikelihood(asked, disable_tqdm=True)
    with (tmp_path / "b" / "log-likelihoods" / "rank-0.jsonl").open("a") as file:
        file.write('{"key": "torn')
    done = list(calls)
    calls.clear()
    monkeypatch.setattr(
        Policy, "token_scores", lambda self, batch: calls.append(batch.indices.tolist()) or scores(self, batch)
    )
    again = notus_lm(tmp_path / "b", causal_lm, tokenizer, tokens_per_row=130)
    resumed = again.loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in resumed] == pytest.approx([score for score, _ in whole], abs=1e-4)
    assert not {text for row in calls for text in row} & {text for row in done for text in row}
    calls.clear()
    assert again.loglikelihood(asked, disable_tqdm=True) == resumed
    assert not calls
    other = notus_lm(tmp_path / "b", toy_model(seed=5), tokenizer, tokens_per_row=130)
    assert other.loglikelihood(asked, disable_tqdm=True) != resumed
    assert calls


def test_chat_format(tmp_path):
    from notus.data.chat import ZEPHYR_TEMPLATE, ChatEncoder, template_to_export

    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer(), template=ZEPHYR_TEMPLATE)
    turns = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(turns) == "<|user|>\nhi</s>\n<|assistant|>\n"
    begun = [*turns, {"role": "assistant", "content": "so"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("<|assistant|>\nso")
    assert lm.chat_template(True) == ZEPHYR_TEMPLATE
    assert lm.chat_template(False) is None
    encoder = ChatEncoder(toy_tokenizer(), chat_template="zephyr", add_empty_system=True)
    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer(), template=template_to_export(encoder))
    assert lm.tok_encode(lm.apply_chat_template(turns)) == encoder.encode_prompt(turns)


@pytest.mark.parametrize(
    "record", [{"key": "a"}, {"key": [], "logp": -1.0, "greedy": True}, {"key": "a", "logp": "-1"}]
)
def test_a_file_of_something_else_is_named(tmp_path, record):
    lm = notus_lm(tmp_path, toy_model(), toy_tokenizer())
    (tmp_path / "log-likelihoods").mkdir()
    (tmp_path / "log-likelihoods" / "rank-0.jsonl").write_text(json.dumps({"greedy": True, **record}) + "\n")
    with pytest.raises(ValueError, match=r"rank-0.jsonl, line 1: not a kept log-likelihood"):
        lm.loglikelihood(requests("loglikelihood", [("the", " quick")]), disable_tqdm=True)
