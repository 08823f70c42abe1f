"""Generation: greedy equals a plain loop, draws follow from the seed, and a killed call resumes."""

import json

import pytest
import torch
from decoded import generate
from ranks import run_ranks
from tokenizers import Tokenizer, decoders, models
from toys import assets_dir, toy_model, toy_tokenizer
from transformers import PreTrainedTokenizerFast

from notus.data.chat import ChatEncoder
from notus.evaluation import decoding as generation
from notus.evaluation.decoding import KeptTokens, model_digest
from notus.evaluation.prompts import Prompt
from notus.model.export import load_causal_lm

PROMPTS = [
    "The quick brown fox",
    "a",
    "Write a poem about the sea, please! Yes, no",
    "hello world",
    "12 + 30 =",
]
MANY = ["The quick brown fox", "a", "Write a poem about the sea", "hello world", "12 + 30 =", "dog", "a", "yes"]
GREEDY = {"max_new_tokens": 6, "batch_size": 3}
DRAWN = {**GREEDY, "temperature": 2.0, "seed": 5}


@torch.no_grad()
def plain_loop(model, tokenizer, prompt, max_new_tokens, ends=(2,)):
    """One prompt, one token at a time, the whole sequence computed anew: no cache, no padding."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) - start < max_new_tokens:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt)


def expected(model, tokenizer, max_new_tokens, **options):
    return [plain_loop(model, tokenizer, prompt, max_new_tokens, **options) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mistral", {"sliding_window": 8}), ("llama", {}), ("qwen3", {"tie_word_embeddings": True})],
)
def test_greedy_is_a_plain_loop_for_every_batch_size(kind, settings):
    model, tokenizer = toy_model(kind, **settings), toy_tokenizer()
    wanted = expected(model, tokenizer, 12)
    assert len(set(wanted)) == len(wanted)
    for batch_size in (1, 2, 5):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == wanted


def test_ends_at_the_tokenizers_eos_and_the_models_other_ends():
    model, tokenizer = toy_model(), toy_tokenizer()
    free = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=8)[0]
    third = tokenizer(PROMPTS[0] + free).input_ids[len(tokenizer(PROMPTS[0]).input_ids) :][2]
    with_end = toy_model()
    with_end.generation_config.eos_token_id = [2, third]
    wanted = expected(model, tokenizer, 8, ends=(2, third))
    assert wanted[0] != free
    assert generate(with_end, tokenizer, PROMPTS, max_new_tokens=8) == wanted
    tokenizer.eos_token = "<unk>"
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected(model, tokenizer, 8, ends=(0, 2))


def test_models_own_generation_settings_are_left_out():
    model, tokenizer = toy_model(), toy_tokenizer()
    wanted = expected(model, tokenizer, 10)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    before = model.generation_config
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=10) == wanted
    assert model.generation_config is before


def test_draws_follow_from_the_seed():
    model, tokenizer = toy_model(scale=1.5), toy_tokenizer()

    def draw(seed, **options):
        return generate(model, tokenizer, PROMPTS, max_new_tokens=10, temperature=1.0, seed=seed, **options)

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)
    samples = generate(model, tokenizer, PROMPTS[:1] * 4, max_new_tokens=10, temperature=1.0, batch_size=2)
    assert len(set(samples)) == 4
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert draw(1, top_k=1) == draw(1, top_p=1e-6) == greedy != draw(1)


def test_draws_have_the_models_probabilities():
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("hello").input_ids])).logits[0, -1]
    top = logits.topk(3)
    wanted: dict[str, float] = {}
    for share, token in zip((top.values / 2).softmax(0).tolist(), top.indices.tolist(), strict=True):
        text = tokenizer.decode([token])
        wanted[text] = wanted.get(text, 0) + share
    options = {"max_new_tokens": 1, "batch_size": 500, "temperature": 2.0, "top_k": 3}
    drawn = generate(model, tokenizer, ["hello"] * 2000, **options)
    assert len(wanted) > 1
    assert set(drawn) == set(wanted)
    for text, share in wanted.items():
        assert drawn.count(text) / 2000 == pytest.approx(share, abs=0.05)  # over four standard deviations


def test_messages_are_rendered_as_in_training():
    model, tokenizer = toy_model(seed=2), toy_tokenizer()
    messages = [{"role": "user", "content": "a"}]
    rendered = "<|user|>\na</s>\n<|assistant|>\n"
    with_system = "<|system|>\n</s>\n" + rendered
    wanted = generate(model, tokenizer, [rendered, with_system], max_new_tokens=8)
    assert wanted[0] != wanted[1]
    assert generate(model, tokenizer, [messages], max_new_tokens=8) == wanted[:1]
    assert generate(model, tokenizer, [messages], max_new_tokens=8, add_empty_system=True) == wanted[1:]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert generate(model, tokenizer, [messages], max_new_tokens=8, chat_template="zephyr") == wanted[:1]


def test_completion_ends_with_the_context():
    model, tokenizer = toy_model(max_position_embeddings=20), toy_tokenizer()
    long = "a b c d e f"
    room = 20 - len(tokenizer(long).input_ids)
    assert 0 < room < 12
    wanted = [plain_loop(model, tokenizer, long, room), plain_loop(model, tokenizer, "a", 12)]
    assert generate(model, tokenizer, [long, "a"], max_new_tokens=12) == wanted


def test_rejects_prompts_without_room_or_text():
    model, tokenizer = toy_model(max_position_embeddings=20), toy_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 2: the prompt's 38 tokens fill the model's context of 20"):
        generate(model, tokenizer, ["a", " b c d e f g h i j k l m n o p q r s t u"])
    with pytest.raises(ValueError, match="here: the prompt is empty"):
        generate(model, toy_tokenizer(bos=False), [""], places=["here"])


def metaspace_tokenizer():
    pieces = ["<unk>", "<s>", "</s>", "▁a", "▁b", "<0x0A>", "<0xE4>"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_first_space_is_kept():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([4]) == "b"  # stripped
    assert generation._decode(tokenizer, [1, 3], [4, 2]) == " b"
    assert generation._decode(tokenizer, [1], [3, 4]) == "a b"


def test_bytes_that_are_no_text_leave_the_prompt_out():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([5, 6]) == "\N{REPLACEMENT CHARACTER}" * 2  # the newline is spoilt with the rest
    assert generation._decode(tokenizer, [1, 3, 5], [6]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.skipif(assets_dir() is None, reason="needs the stories260K checkpoint")
def test_stories_come_out_word_for_word():
    folder = assets_dir() / "stories260K"
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    golden = (folder / "golden-greedy.txt").read_text()
    assert generate(model, tokenizer, [""], max_new_tokens=256) == [golden.rstrip("\n")]
    assert generate(model, tokenizer, ["Once upon a"], max_new_tokens=3)[0].startswith(" time")


class Killed(BaseException):
    pass


def killed_after(monkeypatch, batches):
    """Let `generate` die when it begins the batch after that many; returns the batches that it computed."""
    computed = []
    complete = generation._complete

    def dying(causal_lm, batch, *rest):
        if len(computed) == batches:
            raise Killed
        computed.append(batch.indices)
        return complete(causal_lm, batch, *rest)

    monkeypatch.setattr(generation, "_complete", dying)
    return computed


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_a_killed_generation_goes_on(tmp_path, monkeypatch, options):
    model, tokenizer = toy_model(), toy_tokenizer()
    wanted = generate(model, tokenizer, MANY, **options)
    arguments = (model, tokenizer, MANY)
    folder = tmp_path / "kept"
    for done, torn in ((1, False), (1, True)):
        with monkeypatch.context() as patch:
            computed = killed_after(patch, done)
            with pytest.raises(Killed):
                generate(*arguments, kept=KeptTokens(folder, "model"), **options)
        assert len(computed) == 1
        if torn:  # the process died within the write of its second batch
            file = folder / "rank-0.jsonl"
            file.write_bytes(file.read_bytes()[:-5])
    with monkeypatch.context() as patch:
        computed = killed_after(patch, 99)
        assert generate(*arguments, kept=KeptTokens(folder, "model"), **options) == wanted
        assert len(computed) == 2  # of three: the first is kept whole, the second lost its last line
        assert generate(*arguments, kept=KeptTokens(folder, "model"), **options) == wanted
        assert len(computed) == 2


def test_only_the_same_work_is_found_again(tmp_path, monkeypatch):
    model, tokenizer = toy_model(), toy_tokenizer()
    computed = killed_after(monkeypatch, 99)

    def batches(prompts=MANY[:2], identity="model", **options):
        before = len(computed)
        options = {"max_new_tokens": 4, "temperature": 1.0, **options}
        found = generate(model, tokenizer, prompts, kept=KeptTokens(tmp_path, identity), **options)
        assert found == generate(model, tokenizer, prompts, **options)
        return len(computed) - before - 1  # without the one that `generate` computes

    assert batches() == 1
    assert batches() == 0
    assert batches(identity="other") == 1
    assert batches(seed=1) == 1
    assert batches(top_k=3) == 1
    assert batches(top_p=0.5) == 1
    assert batches(temperature=2.0) == 1
    assert batches(max_new_tokens=5) == 1
    assert batches(add_empty_system=True) == 0  # strings have no turns
    assert batches(MANY[:3]) == 1  # a neighbour takes part in the draws
    assert batches(temperature=0) == 1
    assert batches(MANY[1::-1], temperature=0) == 0  # but not in greedy completions
    assert batches(MANY[:3], temperature=0) == 1
    assert batches(temperature=0, max_new_tokens=5) == 1


@pytest.mark.parametrize("line", [{"completion": "a"}, {"key": [], "ids": [1]}, {"key": "a", "ids": ["1"]}])
def test_a_file_of_something_else_is_named(tmp_path, line):
    (tmp_path / "rank-3.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"rank-3.jsonl, line 1: not a kept completion"):
        generate(toy_model(), toy_tokenizer(), ["a"], kept=KeptTokens(tmp_path, ""), **GREEDY)


def resume(folder, reached, options):
    """On two ranks: what was kept so far, then the whole again, with how many batches were computed now."""
    model, tokenizer = toy_model(), toy_tokenizer()
    counts, complete = [], generation._complete
    generation._complete = lambda *given: counts.append(1) or complete(*given)
    found = generate(model, tokenizer, MANY, kept=KeptTokens(folder, "model"), **options)
    reached.mkdir(exist_ok=True)
    rank = torch.distributed.get_rank()
    (reached / f"{rank}.json").write_text(json.dumps([len(counts), found]))


def test_the_number_of_ranks_may_change(tmp_path, monkeypatch):
    model, tokenizer = toy_model(), toy_tokenizer()
    options = {**DRAWN, "batch_size": 2}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            generate(model, tokenizer, MANY, kept=KeptTokens(tmp_path / "kept", "model"), **options)
    run_ranks(resume, 2, tmp_path, tmp_path / "kept", tmp_path / "reached", options)
    wanted = generate(model, tokenizer, MANY, **options)
    reached = [json.loads((tmp_path / "reached" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert reached == [[2, wanted], [1, wanted]]  # the three batches that were left
    computed = killed_after(monkeypatch, 0)
    assert generate(model, tokenizer, MANY, kept=KeptTokens(tmp_path / "kept", "model"), **options) == wanted
    assert computed == []


def disagree(folder, reached, identities, prompts):
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match="the ranks have different prompts or weights"):
        generate(toy_model(), toy_tokenizer(), prompts[rank], kept=KeptTokens(folder, identities[rank]), **GREEDY)
    (reached / str(rank)).touch()


@pytest.mark.parametrize(("identities", "prompts"), [("ab", ["a", "a"]), ("aa", ["a", "b"])])
def test_ranks_with_different_models_or_prompts_do_not_mix_completions(tmp_path, identities, prompts):
    run_ranks(disagree, 2, tmp_path, tmp_path / "kept", tmp_path, identities, prompts)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}


def test_the_digest_of_a_model_tells_weights_and_settings_apart():
    digest = model_digest(toy_model())
    assert model_digest(toy_model()) == digest
    with_bf16 = toy_model().to(torch.bfloat16)
    changed = toy_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    others = [toy_model(seed=1), toy_model(sliding_window=8), with_bf16, changed]
    assert digest not in {model_digest(model) for model in others}


def test_tools_and_arguments_of_a_prompt_reach_its_template():
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %} {{ tools | length if tools else 'no' }} tools"
        "{% if enable_thinking is defined %} thinking {{ enable_thinking }}{% endif %}:"
    )
    tokenizer = toy_tokenizer(chat_template=template)
    turn, tool = [{"role": "user", "content": "dog"}], {"type": "function", "function": {"name": "f"}}
    for chat_template_kwargs, more, text in (
        ({}, {}, "dog no tools:"),
        ({}, {"tools": [tool]}, "dog 1 tools:"),
        ({"enable_thinking": "off"}, {}, "dog no tools thinking off:"),
        ({"enable_thinking": "off"}, {"template_kwargs": {"enable_thinking": "on"}}, "dog no tools thinking on:"),
    ):
        encoder = ChatEncoder(tokenizer, chat_template_kwargs=chat_template_kwargs)
        assert generation.encode_prompt(encoder, Prompt("here", turn, **more)) == tokenizer(text).input_ids
