"""Token ids and completion masks, by rendered text, by offsets, and on real tokenizers."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from toys import assets_dir, toy_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from notus.data.chat import ChatEncoder, check_vocabulary, resolve_template

BOS_ID, EOS_ID = 1, 2

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # as Llama 2's: writes BOS itself, trims, refuses a system turn, has no generation prompt
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_EOS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (  # as Qwen 3's: the last answer gets an empty thought, which earlier ones do not have
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def learned(encoder: ChatEncoder, prompt: Any, completion: Any) -> str:
    encoded = encoder.encode([(prompt, completion)])[0]
    return encoder.tokenizer.decode(encoded.ids[encoded.mask == 1].tolist())


def ids_of(encoder: ChatEncoder, prompt: Any, completion: Any) -> list[int]:
    return encoder.encode([(prompt, completion)])[0].ids.tolist()


def chatml_tokenizer(eos: str) -> PreTrainedTokenizerBase:
    tokenizer = toy_tokenizer(bos=False, chat_template=CHATML)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.eos_token = eos
    return tokenizer


def byte_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """As Mistral's: "▁" for a space and in front of each text, bytes for characters without a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "i", "▁H"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "H")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


ENCODERS = ChatEncoder(toy_tokenizer(bos=True)), ChatEncoder(toy_tokenizer(bos=False))


class TestRendering:
    def test_zephyr_text_and_span(self) -> None:
        prompt = [system("Be kind."), user("Hello?")]
        rendered = ChatEncoder(toy_tokenizer()).render(prompt, [assistant("Yes.")])
        prefix = "<|system|>\nBe kind.</s>\n<|user|>\nHello?</s>\n<|assistant|>\n"
        assert rendered.text == prefix + "Yes.</s>"  # the newline after EOS is cut
        assert rendered.spans == [(len(prefix), len(prefix) + len("Yes.</s>"))]

    def test_empty_system_turn_only_where_there_is_none(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(), add_empty_system=True)
        start = "<|system|>\n</s>\n<|user|>\nHello?"
        assert encoder.render([user("Hello?")], [assistant("Yes.")]).text.startswith(start)
        with_one = encoder.render([system("Be kind."), user("Hello?")], [assistant("Yes.")]).text
        assert with_one.count("<|system|>") == 1

    def test_plain_text_uses_no_template(self) -> None:
        rendered = ChatEncoder(toy_tokenizer(chat_template=CHATML)).render("2 + 2 =", " 4")
        assert rendered.text == "2 + 2 = 4</s>"
        assert rendered.spans == [(7, 13)]

    def test_every_answer_of_a_conversation_is_learned_and_nothing_else(self) -> None:
        turns = [assistant("one"), user("and?"), assistant("two"), user("thanks")]
        assert learned(ChatEncoder(toy_tokenizer()), [user("count")], turns) == "one</s>two</s>"

    def test_blank_answers_and_an_answer_to_nothing_are_context(self) -> None:
        turns = [assistant(" "), user("and?"), assistant("two"), user("more?"), assistant("")]
        encoder = ChatEncoder(toy_tokenizer())
        assert learned(encoder, [], [assistant("hi"), user("count"), *turns]) == "two</s>"

    def test_template_that_trims(self) -> None:
        tokenizer = toy_tokenizer(chat_template=INST)
        assert learned(ChatEncoder(tokenizer), [user(" hi ")], [assistant("\n yes \n")]) == " yes </s>"

    def test_template_that_trims_in_the_middle_of_a_conversation(self) -> None:
        tokenizer = toy_tokenizer(chat_template=INST)
        turns = [assistant("one "), user("and?"), assistant(" two")]
        assert learned(ChatEncoder(tokenizer), [user("count")], turns) == " one </s> two </s>"

    def test_template_that_alters_the_last_answer_only(self) -> None:
        tokenizer = toy_tokenizer(chat_template=THINKING)
        turns = [assistant("one"), user("and?"), assistant("two")]
        assert learned(ChatEncoder(tokenizer), [user("count")], turns) == "one</s><think></think>two</s>"
        assert learned(ChatEncoder(tokenizer), [user("count")], [*turns, user("on")]).endswith("</think>two</s>")

    def test_refused_conversation_names_the_reason_and_the_remedy(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=INST))
        with pytest.raises(ValueError, match=r"system, user.*no system turns here.*chat_template=zephyr"):
            encoder.encode([([system("x"), user("y")], [assistant("z")])])

    def test_prompt_that_is_no_prefix_of_the_conversation_is_refused(self) -> None:
        template = NO_EOS.replace("'assistant: '", "'assistant (thinking): '")
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        with pytest.raises(ValueError, match=r"turn 2 differently.*thinking.*chat_template=zephyr"):
            encoder.encode([([user("y")], [assistant("z")])])


class TestEnds:
    @pytest.mark.parametrize("bos", [True, False])
    @pytest.mark.parametrize(("template", "prompt"), [(None, "Hello"), (None, [user("a")]), (INST, [user("a")])])
    def test_bos_stands_once_where_tokenizer_or_template_puts_it(
        self, template: str | None, prompt: Any, bos: bool
    ) -> None:
        tokenizer = toy_tokenizer(bos=bos, chat_template=template)
        if template:
            tokenizer.bos_token = "<s>"
        ids = ids_of(ChatEncoder(tokenizer), prompt, " b" if isinstance(prompt, str) else [assistant("b")])
        assert [place for place, token in enumerate(ids) if token == BOS_ID] == ([0] if bos or template else [])

    def test_template_with_two_bos_is_refused(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template="{{ bos_token }}" + INST))
        with pytest.raises(ValueError, match="two BOS"):
            encoder.encode([([user("a")], [assistant("b")])])

    @pytest.mark.parametrize("template", [None, "zephyr"])
    def test_eos_in_the_content_is_not_doubled(self, template: str | None) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS), chat_template=template)
        assert learned(encoder, [user("a")], [assistant("b</s></s>")]).replace("\n", "") == "b</s>"
        assert learned(encoder, "a", " b</s>") == " b</s>"

    def test_template_without_eos_gets_one(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS))
        assert encoder.render([user("a")], [assistant("b ")]).text == "user: a\nassistant: b </s>"
        turns = [assistant("b"), user("c"), assistant("d")]
        assert learned(encoder, [user("a")], turns) == "bd</s>"

    def test_chatml_whose_closing_token_is_eos(self) -> None:
        encoder = ChatEncoder(chatml_tokenizer("<|im_end|>"))
        turns = [assistant("b"), user("c"), assistant("d")]
        assert learned(encoder, [user("a")], turns) == "b<|im_end|>d<|im_end|>"
        assert ids_of(encoder, [user("a")], turns)[-1] == encoder.tokenizer.eos_token_id

    def test_chatml_beside_another_eos_learns_its_closing_token_and_then_eos(self) -> None:
        encoder = ChatEncoder(chatml_tokenizer("</s>"))
        turns = [assistant("b"), user("c"), assistant("d")]
        assert learned(encoder, [user("a")], turns) == "b<|im_end|>d<|im_end|></s>"

    @pytest.mark.parametrize("turns_template", [NO_EOS, CHATML])
    def test_template_that_closes_the_conversation_alone_with_eos(self, turns_template: str) -> None:
        tokenizer = chatml_tokenizer("</s>")
        tokenizer.chat_template = turns_template + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
        turns = [assistant("b"), user("c"), assistant("d")]
        expected = "bd\n</s>" if turns_template == NO_EOS else "b<|im_end|>d<|im_end|>\n</s>"
        assert learned(ChatEncoder(tokenizer), [user("a")], turns) == expected

    def test_template_that_hides_the_content_is_learned_whole(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS.replace("m['content']", "m['content'] | upper")))
        assert learned(encoder, [user("a")], [assistant("bc")]) == "BC</s>"

    def test_eos_that_is_no_token_is_refused(self) -> None:
        tokenizer = toy_tokenizer()
        encoder = ChatEncoder(tokenizer)
        encoder.eos = "<end>"  # as if the tokenizer read its EOS as text
        with pytest.raises(ValueError, match="special token"):
            encoder.encode([("a", "b")])


class TestMask:
    def test_token_across_the_boundary_belongs_to_the_completion(self) -> None:
        encoded = ChatEncoder(byte_fallback_tokenizer()).encode([("Hi ", "Hi")])[0]
        assert encoded.ids.tolist() == [BOS_ID, 262, 261, 262, 261, EOS_ID]  # <s> ▁H i ▁H i </s>
        assert encoded.mask.tolist() == [0, 0, 0, 1, 1, 1]

    def test_all_byte_tokens_of_a_character_are_learned(self) -> None:
        encoder = ChatEncoder(byte_fallback_tokenizer())
        encoded = encoder.encode([("Hi", " 🦊")])[0]
        fox = [3 + byte for byte in "🦊".encode()]
        assert encoded.ids.tolist() == [BOS_ID, 262, 261, 259, *fox, EOS_ID]  # <s> ▁H i ▁ 🦊 </s>
        assert encoded.mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]

    def test_space_that_the_normalizer_prepends_to_the_completion_is_learned(self) -> None:
        # after a special token the tokenizer writes "▁": generation starts before it, so it is learned
        encoded = ChatEncoder(byte_fallback_tokenizer()).encode([("Hi</s>", "i")])[0]
        assert encoded.ids.tolist() == [BOS_ID, 262, 261, EOS_ID, 259, 261, EOS_ID]
        assert encoded.mask.tolist() == [0, 0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize("trim", [True, False])
    def test_tokens_of_spaces_whose_offsets_the_tokenizer_trims(self, trim: bool) -> None:
        tokenizer = toy_tokenizer(bos=False)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        encoder = ChatEncoder(tokenizer)
        assert learned(encoder, "yes", "   x   ") == "   x   </s>"
        assert learned(encoder, "yes  ", "x") == "x</s>"

    def test_nothing_predicts_the_first_token(self) -> None:
        encoded = ChatEncoder(toy_tokenizer(bos=False)).encode([("", "b")])[0]
        assert encoded.mask.tolist() == [0, 1]
        encoded = ChatEncoder(toy_tokenizer(bos=True)).encode([("", "b")])[0]
        assert encoded.mask.tolist() == [0, 1, 1]

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
    @example("\n\n", "\n x \n")
    @example("你好", "🙂🙃 e\u0301 \u200d")
    def test_learned_tokens_decode_to_the_completion(self, prompt: str, completion: str) -> None:
        for encoder in ENCODERS:
            assert learned(encoder, [user(prompt)], [assistant(completion)]) == completion + "</s>"
            assert learned(encoder, f"Q{prompt}", completion).endswith(completion + "</s>")

    def test_prompt_alone_is_how_the_conversation_begins(self) -> None:
        for encoder in ENCODERS:
            prompt = [user("What is the capital of France?")]
            encoded = encoder.encode([(prompt, [assistant("Paris")])])[0]
            assert encoder.encode_prompt(prompt) == encoded.ids[encoded.mask == 0].tolist()
            assert encoder.encode_prompt("Hello") == encoder.tokenizer("Hello")["input_ids"]


class TestSettings:
    def test_template_of_the_tokenizer_or_zephyr_or_a_file(self, tmp_path: Any) -> None:
        zephyr = resolve_template(toy_tokenizer(), None)
        assert "<|assistant|>" in zephyr
        assert resolve_template(toy_tokenizer(chat_template=CHATML), None) == CHATML
        assert resolve_template(toy_tokenizer(chat_template=CHATML), "zephyr") == zephyr
        (tmp_path / "mine.jinja").write_text(NO_EOS)
        assert resolve_template(toy_tokenizer(), str(tmp_path / "mine.jinja")) == NO_EOS

    @pytest.mark.parametrize("name", ["chatml", "missing.jinja"])
    def test_unknown_template(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"'{name}' is neither 'zephyr' nor an existing .jinja file"):
            ChatEncoder(toy_tokenizer(), chat_template=name)

    def test_tokenizer_without_eos_is_refused(self) -> None:
        tokenizer = toy_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no EOS token"):
            ChatEncoder(tokenizer)

    def test_vocabulary_must_fit_the_model(self) -> None:
        largest = max(toy_tokenizer().get_vocab().values())
        check_vocabulary(toy_tokenizer(), largest + 1)
        with pytest.raises(ValueError, match=f"id {largest}, but the model's vocabulary ends at {largest - 1}"):
            check_vocabulary(toy_tokenizer(), largest)

    def test_digest_covers_what_decides_the_tokens_and_no_more(self) -> None:
        tokenizer = toy_tokenizer()
        digest = ChatEncoder(tokenizer).digest()
        tokenizer("a long text", truncation=True, max_length=2)
        assert ChatEncoder(tokenizer).digest() == digest
        assert ChatEncoder(tokenizer, add_empty_system=True).digest() != digest
        assert ChatEncoder(toy_tokenizer(chat_template=CHATML)).digest() != digest
        assert ChatEncoder(toy_tokenizer(bos=False)).digest() != digest
        tokenizer.add_tokens(["<tool>"])
        assert ChatEncoder(tokenizer).digest() != digest

    def test_completions_with_something_to_learn(self) -> None:
        has_text = ChatEncoder(toy_tokenizer()).has_text
        assert has_text(" a")
        assert has_text([user("x"), assistant("a</s>")])
        assert not any(has_text(nothing) for nothing in ("", " \n", "</s>", [], [user("x")]))
        assert not any(has_text([assistant(nothing)]) for nothing in ("", " ", "</s></s>"))


def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    assets = assets_dir()
    if assets is None:
        pytest.skip("the assets folder is absent")
    return AutoTokenizer.from_pretrained(assets / name)


def test_mistral_tokens() -> None:
    tokenizer = real_tokenizer("mistral-7b-tokenizer")
    encoder = ChatEncoder(tokenizer)
    assert encoder.encode_prompt("Hello world") == [1, 22557, 1526]
    encoded = encoder.encode([("Hello", " world")])[0]
    assert (encoded.ids.tolist(), encoded.mask.tolist()) == ([1, 22557, 1526, 2], [0, 0, 1, 1])


@pytest.mark.parametrize("name", ["mistral-7b-tokenizer", "stories260K"])
def test_real_conversations_decode_to_their_completions(name: str) -> None:
    encoder = ChatEncoder(real_tokenizer(name))
    rows = json.loads((assets_dir() / "preferences" / "dpo_en_demo.json").read_text())[::3]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for row in rows:
        prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        for side in ("chosen", "rejected"):
            text = row[side]["value"]
            # these tokenizers' decoders strip one leading space
            assert learned(encoder, prompt, [assistant(text)]).lstrip(" ") == text.lstrip(" ") + "</s>"
