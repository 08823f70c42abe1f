"""Token ids and completion masks, by rendered text, by offsets, and on real tokenizers."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from toys import assets_dir, toy_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from notus.data.chat import ChatEncoder, EncodingError, Rendered, check_ids, check_vocabulary, resolve_template
from notus.data.messages import read_messages

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
            encoder.render([user("a")], [assistant("b")])

    def test_plain_text_with_two_bos_is_refused_where_its_row_is_known(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        assert ids_of(encoder, "<s>a", " b")[:2] == [BOS_ID, encoder.tokenizer.convert_tokens_to_ids("a")]
        with pytest.raises(ValueError, match="two BOS"):
            encoder.render("<s><s>a", " b")

    def test_error_of_tokens_says_which_text(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        good, bad = encoder.render("a", " b"), Rendered("<s><s>a</s>", [(7, 12)])
        with pytest.raises(EncodingError, match="two BOS") as raised:
            encoder.tokenize([good, good, bad, good])
        assert raised.value.item == 2
        copied = pickle.loads(pickle.dumps(raised.value))  # as a worker process raises it
        assert (str(copied), copied.item) == (str(raised.value), 2)

    @pytest.mark.parametrize("template", [None, "zephyr"])
    def test_eos_in_the_content_is_not_doubled(self, template: str | None) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS), chat_template=template)
        assert learned(encoder, [user("a")], [assistant("b</s></s>")]) == "b</s>"
        assert learned(encoder, [user("a")], [assistant("b</s>\n </s>\n")]) == "b</s>"
        assert learned(encoder, "a", " b</s>") == " b</s>"
        assert learned(encoder, "a", " b</s>\n") == " b</s>"
        assert learned(encoder, "a", " b\n") == " b\n</s>"

    def test_eos_at_the_end_of_other_turns_is_what_they_say(self) -> None:
        rendered = ChatEncoder(toy_tokenizer(chat_template=NO_EOS)).render(
            [system("s</s>"), user("u</s>"), assistant("a</s>"), user("v</s>")], [assistant("b</s>")]
        )
        assert rendered.text == "system: s</s>\nuser: u</s>\nassistant: a\nuser: v</s>\nassistant: b</s>"
        assert ChatEncoder(toy_tokenizer()).render("a</s>", " b</s>").text == "a</s> b</s>"

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

    def test_eos_that_is_no_token_is_refused(self) -> None:
        tokenizer = toy_tokenizer()
        encoder = ChatEncoder(tokenizer)
        encoder.eos = "<end>"  # as if the tokenizer read its EOS as text
        with pytest.raises(ValueError, match="special token"):
            encoder.encode([("a", "b")])


SHOUTING = NO_EOS.replace("m['content']", "(m['content'] | upper if m['role'] == 'assistant' else m['content'])")


class TestTurns:
    """Which turns are learned, and that they are learned as the row says them."""

    turns = (assistant("one"), user("and?"), assistant("two"))

    @pytest.mark.parametrize("template", [None, CHATML, NO_EOS, INST])
    def test_history_is_masked(self, template: str | None) -> None:
        tokenizer = toy_tokenizer(chat_template=template)
        both, last = ChatEncoder(tokenizer), ChatEncoder(tokenizer, mask_history=True)
        conversation = ([user("count")], [*self.turns, user("thanks"), assistant(" ")])
        assert "one" in learned(both, *conversation)
        assert learned(last, *conversation).strip().startswith("two")
        assert ids_of(last, *conversation) == ids_of(both, *conversation)

    def test_turn_that_the_row_leaves_out(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        one, question, two = self.turns
        assert learned(encoder, [user("count")], [{**one, "learn": False}, question, two]) == "two</s>"
        rendered = encoder.render([user("count")], [one, question, {**two, "learn": False}])
        assert rendered.text == "<|user|>\ncount</s>\n<|assistant|>\none</s>"  # what follows it is cut
        assert not encoder.has_text([{**one, "learn": False}, question])
        with_mask = ChatEncoder(toy_tokenizer(), mask_history=True)
        assert learned(with_mask, [user("count")], [one, question, {**two, "learn": False}]) == "one</s>"

    def test_words_that_the_template_alters_are_refused(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=SHOUTING))
        with pytest.raises(ValueError, match=r"^the chat template alters what turn 2 says, .*template that keeps it$"):
            encoder.render([user("a")], [assistant("bc")])
        assert ChatEncoder(toy_tokenizer()).encode_prompt([user("a")])

    def test_turns_are_counted_as_the_row_does(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=SHOUTING), add_empty_system=True)
        with pytest.raises(ValueError, match="turn 2 says"):
            encoder.render([user("a")], [assistant("bc")])

    def test_turn_that_the_template_leaves_out_is_refused(self) -> None:
        template = NO_EOS.replace("in messages", "in messages if m['role'] != 'system'")
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        with pytest.raises(ValueError, match=r"leaves out what turn 1 \(system\) says"):
            encoder.render([system("Be kind."), user("a")], [assistant("b")])

    @pytest.mark.parametrize(
        ("turns", "left_out"),
        [
            ([user("6*7?"), assistant("Let me look."), {"role": "tool", "content": "42"}, assistant("It is 42.")], "3"),
            ([system("Be brief"), user("Be brief please"), assistant("Yes.")], "1"),
            ([system("assistant"), user("Hi"), assistant("Yes.")], "1"),
            ([user("Hi"), system("Answer in words of one syllable."), user("What?"), assistant("I must "
              "Answer in words of one syllable. So: no.")], "2"),
        ],
    )  # fmt: skip
    def test_turn_that_is_left_out_is_refused_though_its_words_stand_elsewhere(self, turns: Any, left_out: str) -> None:
        template = NO_EOS.replace("in messages", "in messages if m['role'] in ('user', 'assistant')")
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        with pytest.raises(ValueError, match=rf"leaves out what turn {left_out} \("):
            encoder.render(turns[:-1], turns[-1:])
        assert ChatEncoder(toy_tokenizer(chat_template=NO_EOS)).render(turns[:-1], turns[-1:])

    def test_system_turn_that_moves_into_the_first_user_turn_stays_though_it_is_quoted(self) -> None:
        template = (
            "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
            "{% for m in messages if m.role != 'system' %}"
            "{% if m.role == 'user' %}{{ '[INST] ' + first + ' ' + m.content + ' [/INST]' }}"
            "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
        )
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        rendered = encoder.render([system("Be brief"), user("Be brief please")], [assistant("Be brief")])
        assert rendered.text == "[INST] Be brief Be brief please [/INST]Be brief</s>"

    def test_template_that_reads_what_a_short_turn_says(self) -> None:
        check = "{% if messages[0].content not in ('on', 'off') %}{{ raise_exception('on or off') }}{% endif %}"
        encoder = ChatEncoder(toy_tokenizer(chat_template=check + NO_EOS))
        rendered = encoder.render([system("on"), user("a")], [assistant("b")])
        assert rendered.text == "system: on\nuser: a\nassistant: b</s>"

    def test_turn_that_the_template_writes_in_another_form_stays(self) -> None:
        template = NO_EOS.replace("m['content']", "(m['content'] | tojson if m['role'] == 'tool' else m['content'])")
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        tool = {"role": "tool", "content": 'say "x"'}
        rendered = encoder.render([user("a"), assistant("b"), tool], [assistant("c")])
        assert rendered.text == 'user: a\nassistant: b\ntool: "say \\"x\\""\nassistant: c</s>'

    def test_white_space_of_an_answer_is_learned_where_the_template_keeps_it(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS))
        turns = [assistant(" b \n"), user("c"), assistant("\td \n")]
        assert learned(encoder, [user("a")], turns) == " b \n\td \n</s>"


REASONING = (  # as Qwen 3's: reasoning before the last question is dropped
    "{%- set seen = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set seen.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|' + m.role + '|>' }}"
    "{%- set thought = m.reasoning_content or '' %}{%- set words = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in words %}"
    "{%- set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- set words = words.split('</think>')[-1].lstrip() %}{%- endif %}"
    "{%- if thought and loop.index0 > seen.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- words + eos_token + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


class TestReasoning:
    """Reasoning is learned whole or not at all, whether it stands in the content or beside it."""

    @pytest.fixture
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(toy_tokenizer(chat_template=REASONING))

    thinking = (assistant("<think>a</think>b"), {**assistant("b"), "reasoning_content": "a"})

    @pytest.mark.parametrize("answer", thinking)
    def test_of_the_last_turn_is_learned(self, encoder: ChatEncoder, answer: dict[str, str]) -> None:
        assert learned(encoder, [user("x")], [answer]) == "<think>\na\n</think>\n\nb</s>"

    @pytest.mark.parametrize("answer", thinking)
    def test_that_the_template_drops_from_an_earlier_turn_is_refused(
        self, encoder: ChatEncoder, answer: dict[str, str]
    ) -> None:
        turns = [answer, user("y"), assistant("c")]
        message = r"drops the reasoning of turn 2, .*keeps it, or data.mask_history: true, which learns the last"
        with pytest.raises(ValueError, match=message):
            encoder.render([user("x")], turns)
        # as history it may be dropped, which is how the model is prompted
        last = ChatEncoder(encoder.tokenizer, mask_history=True)
        assert (
            last.render([user("x")], turns).text
            == "<|user|>x</s>\n<|assistant|>b</s>\n<|user|>y</s>\n<|assistant|>c</s>"
        )
        assert learned(last, [user("x")], turns) == "c</s>"
        assert learned(encoder, [user("x"), *turns[:2]], turns[2:]) == "c</s>"

    @pytest.mark.parametrize("answer", ["<think>\n\n</think>\n\nb", "b<think>a</think>c", "<think>a</think>b</think>c"])
    def test_tags_and_words_around_them_are_not_dropped_either(self, encoder: ChatEncoder, answer: str) -> None:
        with pytest.raises(ValueError, match="turn 2"):
            encoder.render([user("x")], [assistant(answer)])

    def test_that_a_template_has_no_place_for_is_refused(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        with pytest.raises(ValueError, match=r"drops the reasoning of turn 2, .*keeps it$"):
            encoder.render([user("x")], [{**assistant("b"), "reasoning_content": "a"}])
        assert learned(encoder, [user("x")], [assistant("<think>a</think>b")]) == "<think>a</think>b</s>"

    @pytest.mark.parametrize("words", ["<think>", "a</think>", "<think>a</think>\n", "a <think>b"])
    def test_tags_at_the_ends_are_learned_as_they_are(self, words: str) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS))
        turns = [assistant(words), user("y"), assistant(words)]
        rendered = encoder.render([user("x")], turns)
        assert [rendered.text[start:end] for start, end in rendered.spans] == [words, words + "</s>"]

    def test_prompt_that_begins_the_reasoning(self) -> None:
        template = NO_EOS.replace("{{ 'assistant: ' }}", "{{ 'assistant: <think>\n' }}")
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        assert learned(encoder, [user("x")], [assistant("<think>\na</think>b")]) == "a</think>b</s>"
        with pytest.raises(ValueError, match="prompt of turn 2 differently"):
            encoder.render([user("x")], [assistant("b")])

    def test_user_who_quotes_an_answer_with_reasoning(self, encoder: ChatEncoder) -> None:
        turns = [assistant("b"), user("What is <think>a</think>b</s>?"), assistant("<think>a</think>b")]
        assert learned(encoder, [user("x")], turns) == "b</s><think>\na\n</think>\n\nb</s>"


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds </s>", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": "</s>"}}}]}
RESULT = {"role": "tool", "content": "3</s>", "tool_call_id": "x", "name": "add"}


class TestTools:
    """Tools, calls and results reach the template, or are an error."""

    def test_calls_are_learned_and_results_are_context(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=TOOL_TEMPLATE))
        assert encoder.has_text([CALL])
        rendered = encoder.render([user("1 + 2?")], [CALL, RESULT, assistant("3")], tools=TOOLS)
        call = '<call>{"name": "add", "arguments": {"a": "</s>"}}</call></s>'
        listed = (
            'tools: [{"type": "function", "function": {"name": "add", "description": "Adds </s>", "parameters": {}}}]'
        )
        assert rendered.text == (f"{listed}\nuser: 1 + 2?</s>\nassistant: {call}\ntool: 3</s></s>\nassistant: 3</s>")
        assert [rendered.text[start:end] for start, end in rendered.spans] == [call, "3</s>"]
        assert encoder.render([user("1 + 2?")], [CALL], tools=TOOLS).text.endswith(call)
        assert rendered.special_tokens == 3  # in the tool, the call and its result

    def test_call_whose_arguments_stand_before_its_name(self) -> None:
        arguments = "{{ call.function.arguments | tojson + ' ' + call.function.name }}"
        template = TOOL_TEMPLATE.replace("{{ '<call>' + call.function | tojson + '</call>' }}", arguments)
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        rendered = encoder.render([user("1 + 2?")], [CALL, RESULT, CALL])
        call = '{"a": "</s>"} add</s>'
        assert [rendered.text[start:end] for start, end in rendered.spans] == [call, call]
        assert rendered.text.endswith(call)

    @pytest.mark.parametrize("written", ["{{ c.name }}{{ c.arguments }}", "{{ c.name + c.arguments }}"])
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ('{"city": "Zürich", "n": null, "ok": true}', '{"city": "Zürich", "n": null, "ok": true}'),
            ({"quote": 'it\'s "so"', "list": [1.5, {"a": False}]},
             '{"quote": "it\'s \\"so\\"", "list": [1.5, {"a": false}]}'),
            ({}, "{}"),
            ({"a": "</s>"}, '{"a": "</s>"}'),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("split", [False, True])
    def test_arguments_are_json_where_the_template_takes_text(
        self, written: str, arguments: Any, expected: str, split: bool
    ) -> None:
        calls = read_messages(
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}], "completion", "assistant"
        )
        template = NO_EOS.replace("+ '\n' }}", "}}{% for each in m.tool_calls or [] %}{% set c = each.function %}"
                                  + written + "{% endfor %}{{ '\n' }}")  # fmt: skip
        encoder = ChatEncoder(toy_tokenizer(chat_template=template), split_special_tokens=split)
        rendered = encoder.render([user("a"), *calls, {"role": "tool", "content": "3"}], [*calls])
        assert rendered.text == f"user: a\nassistant: f{expected}\ntool: 3\nassistant: f{expected}</s>"
        assert [rendered.text[start:end] for start, end in rendered.spans] == [f"f{expected}</s>"]
        prompt = encoder.encode_prompt([user("a"), *calls, {"role": "tool", "content": "3"}])
        assert prompt == encoder.tokenize([rendered])[0].ids[: len(prompt)].tolist()

    def test_arguments_stay_an_object_where_the_template_reads_it(self) -> None:
        template = TOOL_TEMPLATE.replace(
            "call.function | tojson",
            "call.function.name + '(' + (call.function.arguments.a + '!') + call.function.arguments | tojson + ')'",
        )
        encoder = ChatEncoder(toy_tokenizer(chat_template=template))
        call = {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": {"a": "x"}}}]}
        assert (
            encoder.render([user("1?")], [call]).text == 'user: 1?</s>\nassistant: <call>add(x!{"a": "x"})</call></s>'
        )

    def test_template_that_writes_only_the_name_of_a_call_or_some_arguments(self) -> None:
        for written in ("call.function.name", "call.function.name + (call.function.arguments.a or '')"):
            encoder = ChatEncoder(toy_tokenizer(chat_template=TOOL_TEMPLATE.replace("call.function | tojson", written)))
            call = {"function": {"name": "add", "arguments": {"a": "1", "b": 2}}}
            turns = [{**assistant(""), "tool_calls": [{"function": {"name": "go", "arguments": {}}}]}, RESULT]
            with pytest.raises(ValueError, match=r"leaves out the arguments of the tool calls of turn 4; use a templ"):
                encoder.render([user("a"), *turns], [{**assistant(""), "tool_calls": [call]}])

    def test_refused_call_is_not_sent_to_a_template_without_calls(self) -> None:
        template = TOOL_TEMPLATE.replace("call.function | tojson", "call.function.name + 1")
        with pytest.raises(ValueError, match=r"refuses .*change these turns, or use a template for tools$"):
            ChatEncoder(toy_tokenizer(chat_template=template)).render([user("a")], [CALL])

    def test_template_that_lets_no_conversation_end_with_a_call(self) -> None:
        refusal = "{% if messages[-1].tool_calls %}{{ raise_exception('an unanswered call') }}{% endif %}"
        encoder = ChatEncoder(toy_tokenizer(chat_template=refusal + TOOL_TEMPLATE))
        rendered = encoder.render([user("1 + 2?")], [CALL, RESULT, assistant("3")])
        call = '<call>{"name": "add", "arguments": {"a": "</s>"}}</call></s>'
        assert [rendered.text[start:end] for start, end in rendered.spans] == [call, "3</s>"]

    def test_prompt_has_the_tools(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=TOOL_TEMPLATE))
        prompt = encoder.encode_prompt([user("Q")], tools=TOOLS)
        whole = encoder.tokenize([encoder.render([user("Q")], [assistant("A")], tools=TOOLS)])[0]
        assert prompt == whole.ids[whole.mask == 0].tolist() != encoder.encode_prompt([user("Q")])

    def test_template_that_leaves_them_out(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=NO_EOS))
        with pytest.raises(ValueError, match="has tools, but the chat template leaves them out"):
            encoder.render([user("Q")], [assistant("A")], tools=TOOLS)
        with pytest.raises(ValueError, match="has tools, but the chat template leaves them out"):
            encoder.encode_prompt([user("Q")], tools=TOOLS)
        with pytest.raises(ValueError, match="leaves out the tool calls of turn 2"):
            encoder.render([user("Q"), CALL, RESULT], [assistant("A")])
        with pytest.raises(ValueError, match="leaves out the tool calls of turn 2"):
            encoder.render([user("Q")], [CALL])

    def test_plain_text_takes_none(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        with pytest.raises(ValueError, match=r"plain text, .* but has tools"):
            encoder.render("Q", " A", tools=TOOLS)
        with pytest.raises(ValueError, match=r"plain text, .* but has chat_template_kwargs"):
            encoder.encode_prompt("Q", template_kwargs={"x": 1})

    def test_template_for_tools_of_a_tokenizer_with_several(self) -> None:
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = {"default": NO_EOS, "tool_use": TOOL_TEMPLATE}
        encoder = ChatEncoder(tokenizer)
        assert encoder.render([user("Q")], [assistant("A")]).text == "user: Q\nassistant: A</s>"
        assert encoder.render([user("Q")], [assistant("A")], tools=TOOLS).text.startswith("tools: [")


class TestArguments:
    template = NO_EOS.replace("m['role']", "(mood | default('') + m.role)") + "{{ raise_exception('') if false }}"

    def test_of_the_run_and_of_a_row_which_win(self) -> None:
        tokenizer = toy_tokenizer(chat_template=self.template.replace("'assistant: '", "mood + 'assistant: '"))
        encoder = ChatEncoder(tokenizer, chat_template_kwargs={"mood": "calm "})
        assert encoder.render([user("a")], [assistant("b")]).text == "calm user: a\ncalm assistant: b</s>"
        own = encoder.render([user("a")], [assistant("b")], template_kwargs={"mood": ""})
        assert own.text == "user: a\nassistant: b</s>"
        assert (
            encoder.encode_prompt([user("a")], template_kwargs={"mood": ""})
            == encoder.tokenizer("user: a\nassistant: ")["input_ids"]
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"moood": 1}, "the chat template has no argument 'moood'"),
            ({"m": 1}, "the chat template has no argument 'm'"),  # the template's own variable
            ({"role": "x"}, "the chat template has no argument 'role'"),
            ({"content": "x"}, "the chat template has no argument 'content'"),
            ({"raise_exception": 1}, "the chat template has no argument 'raise_exception'"),
            ({"tokenize": True}, "'tokenize' is not for templates"),
            ({"messages": []}, "'messages' is not for templates"),
            ({"eos_token": "x"}, "'eos_token' is not for templates"),
        ],
    )
    def test_without_effect_or_not_the_templates(self, arguments: dict[str, Any], message: str) -> None:
        tokenizer = toy_tokenizer(chat_template=self.template)
        with pytest.raises(ValueError, match=f"^chat_template_kwargs: {message}"):
            ChatEncoder(tokenizer, chat_template_kwargs=arguments)
        with pytest.raises(ValueError, match=f"^the row's chat_template_kwargs: {message}"):
            ChatEncoder(tokenizer).render([user("a")], [assistant("b")], template_kwargs=arguments)

    def test_template_that_writes_half_a_character(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template="{{ '\\ud800' }}" + NO_EOS))
        with pytest.raises(ValueError, match=r"^the tokenizer's chat template writes half of a surrogate pair at char"):
            encoder.render([user("a")], [assistant("b")])
        with pytest.raises(ValueError, match="surrogate"):
            encoder.encode_prompt([user("a")])


class TestReport:
    @pytest.mark.parametrize(
        ("prompt", "completion", "glued"),
        [
            ("the oven", "To cook", True),
            ("2", "4", True),
            ("über", "été", True),
            ("는", "네", True),
            ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", False),  # Chinese: no spaces between words
            ("\u6cd5\u56fd", "Paris", False),
            ("Paris", "\u3067\u3059", False),  # Japanese
            ("\u0e27\u0e31\u0e19", "\u0e19\u0e35\u0e49", False),  # Thai
            ("the oven ", "To cook", False),
            ("the oven", " To cook", False),
            ("the oven:", "To cook", False),
            ("the oven", "(To cook", False),
            ("", "To cook", False),
        ],
    )
    def test_glued_answers(self, prompt: str, completion: str, glued: bool) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        assert encoder.render(prompt, completion).glued is glued
        assert not encoder.render([user(prompt)], [assistant(completion)]).glued

    @pytest.mark.parametrize("split", [False, True])
    def test_special_tokens_in_texts_are_counted(self, split: bool) -> None:
        encoder = ChatEncoder(toy_tokenizer(), split_special_tokens=split)
        assert encoder.render("a</s><s>", " b</s>c</s>").special_tokens == 3  # EOS at the end is ours
        messages = [system("</s>"), user("a<unk>b </s>")], [assistant("c</s>d</s>")]
        assert encoder.render(*messages).special_tokens == 4
        assert encoder.render([user("a < s>")], [assistant("b")]).special_tokens == 0

    def test_turn_markers_that_are_ordinary_tokens_count_but_no_others(self) -> None:
        tokenizer = toy_tokenizer(chat_template=CHATML)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"])
        encoder = ChatEncoder(tokenizer)
        assert encoder.render([user("<|im_end|>")], [assistant("<think>b")]).special_tokens == 1


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

    @pytest.mark.parametrize("split", [False, True])
    def test_worker_processes_get_the_same_encoder(self, split: bool) -> None:
        settings: dict[str, Any] = {"split_special_tokens": split, "mask_history": True, "template_date": "2026-11-27"}
        encoder = ChatEncoder(toy_tokenizer(), **settings)
        copied = pickle.loads(pickle.dumps(encoder))
        assert copied.digest() == encoder.digest()
        assert ids_of(copied, [user("a</s>")], [assistant("b")]) == ids_of(encoder, [user("a</s>")], [assistant("b")])

    def test_long_runs_of_eos_and_tags_take_no_time(self) -> None:
        encoder = ChatEncoder(toy_tokenizer())
        assert not encoder.has_text("</s> \n" * 100_000)
        rendered = encoder.render([user("a")], [assistant("<" + "think" * 50_000 + "</s>" * 50_000)])
        assert rendered.text.endswith("think</s>")

    def test_vocabulary_must_fit_the_model(self) -> None:
        largest = max(toy_tokenizer().get_vocab().values())
        check_vocabulary(toy_tokenizer(), largest + 1)
        with pytest.raises(ValueError, match=f"id {largest}, but the model's vocabulary ends at {largest - 1}"):
            check_vocabulary(toy_tokenizer(), largest)

    def test_an_added_token_needs_a_row_only_where_it_is_used(self) -> None:
        tokenizer = toy_tokenizer()
        size = 1 + max(tokenizer.get_vocab().values())
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        check_vocabulary(tokenizer, size)
        check_ids(tokenizer, "row 1", size - 1, size)
        with pytest.raises(ValueError, match=f"row 2: its token '<image>' has id {size}, .* ends at {size - 1}"):
            check_ids(tokenizer, "row 2", size, size)
        tokenizer.eos_token = "<image>"
        with pytest.raises(ValueError, match=f"its token '<image>' has id {size}"):
            check_vocabulary(tokenizer, size)

    def test_digest_covers_what_decides_the_tokens_and_no_more(self) -> None:
        tokenizer = toy_tokenizer()
        digest = ChatEncoder(tokenizer).digest()
        tokenizer("a long text", truncation=True, max_length=2)
        assert ChatEncoder(tokenizer).digest() == digest
        assert ChatEncoder(tokenizer, add_empty_system=True).digest() != digest
        assert ChatEncoder(toy_tokenizer(chat_template=CHATML)).digest() != digest
        assert ChatEncoder(toy_tokenizer(bos=False)).digest() != digest
        assert ChatEncoder(tokenizer, mask_history=True).digest() != digest
        assert ChatEncoder(tokenizer, split_special_tokens=True).digest() != digest
        assert ChatEncoder(tokenizer, template_date="2026-11-27").digest() == digest  # it asks for none
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
