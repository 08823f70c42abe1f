"""The text of chat templates: dates, arguments, and the head that an exported template gets."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import toy_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from notus.data import chat_template
from notus.data.chat import ChatEncoder, check_exported, resolve_template, template_to_export, uses_date
from notus.data.chat_template import arguments_of, date_head, defaults_head, split_date_head, with_head

TURNS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + TURNS
LLAMA = (  # as Llama 3.1's, which takes a date, and else asks for one
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}'
    '{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "{{- 'Today Date: ' + date_string + '\n' }}" + TURNS
)
USER = [{"role": "user", "content": "Q"}]
ANSWER = [{"role": "assistant", "content": "A"}]


def render(template: str, **arguments: Any) -> str:
    """The conversation as transformers renders it."""
    return str(toy_tokenizer().apply_chat_template(USER, chat_template=template, tokenize=False, **arguments))


class TestDates:
    def test_which_templates_ask(self) -> None:
        assert uses_date(DATED)
        assert uses_date(LLAMA)
        assert not uses_date(TURNS)
        assert not uses_date(TURNS + "{# strftime_now #}{{ 'strftime_now' }} strftime_now")
        assert uses_date("{{ strftime_now")  # broken: an error where it is used

    @pytest.mark.parametrize(("template", "start"), [(DATED, "Today: "), (LLAMA, "Today Date: ")])
    def test_frozen(self, template: str, start: str) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=template), template_date="2024-02-09")
        text = encoder.render(USER, ANSWER).text
        assert text == f"{start}09 Feb 2024\nuser: Q\nassistant: A</s>"
        assert encoder.tokenizer.decode(encoder.encode_prompt(USER)).startswith(f"<s>{start}09 Feb 2024\n")

    def test_of_the_present_day_without_one(self) -> None:
        before = datetime.date.today()
        encoder = ChatEncoder(toy_tokenizer(chat_template=DATED))
        assert before <= encoder.date <= datetime.date.today()
        assert encoder.render(USER, ANSWER).text.startswith(f"Today: {encoder.date.strftime('%d %b %Y')}\n")

    def test_digest_covers_it_where_it_is_used(self) -> None:
        def digest(template: str, date: str) -> str:
            return ChatEncoder(toy_tokenizer(chat_template=template), template_date=date).digest()

        assert digest(DATED, "2026-11-27") != digest(DATED, "2026-11-28")
        assert digest(TURNS, "2026-11-27") == digest(TURNS, "2026-11-28")

    def test_of_a_row_that_brings_its_own(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=LLAMA), template_date="2024-02-09")
        rendered = encoder.render(USER, ANSWER, template_kwargs={"date_string": "1 Jan 2000"})
        assert rendered.text.startswith("Today Date: 1 Jan 2000\n")

    @pytest.mark.parametrize(
        "written", ["today", "2026-13-45", "2026-2-3", "20261127", "2026-11-27T00:00", "٢٠٢٦-11-27"]
    )
    def test_no_date(self, written: str) -> None:
        with pytest.raises(ValueError, match=f"template_date '{written}' is no date YYYY-MM-DD"):
            ChatEncoder(toy_tokenizer(), template_date=written)

    @pytest.mark.parametrize(
        "form",
        ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%a %-d %b %y", "%H:%M:%S", "%j %U %W %w %u", "100%% %d%%d", "%x %c",
         "%D %e %F %I %p", "{}"],
    )  # fmt: skip
    @pytest.mark.parametrize("date", [datetime.date(2024, 2, 9), datetime.date(2026, 11, 27)])
    def test_is_written_as_strftime_does(self, form: str, date: datetime.date) -> None:
        template = with_head("{{ strftime_now(form) }}", date_head(date))
        assert render(template, form=form) == datetime.datetime(date.year, date.month, date.day).strftime(form)


class TestArguments:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (TURNS, {"messages", "add_generation_prompt"}),
            (LLAMA, {"messages", "add_generation_prompt", "date_string"}),
            ("{%- if x is not defined %}{%- set x = 1 %}{%- endif %}{{ x }}", {"x"}),
            ("{% set x = x or 1 %}{{ x }}{% set y = 1 %}{{ y }}", {"x"}),
            ("{% for a in b %}{% generation %}{{ c }}{% endgeneration %}{% break %}{% endfor %}", {"b", "c"}),
            ("{% macro f(a) %}{{ a.k }}{{ b }}{% endmacro %}{{ f(c) }}{{ namespace(d=e).d }}", {"b", "c", "e"}),
            ("{{ raise_exception(strftime_now('%Y')) }}", set()),
            ("{{ a.b | unknown }}", {"a", "b", "unknown"}),  # cannot be parsed: all names
        ],
    )
    def test_of_a_template(self, template: str, expected: set[str]) -> None:
        assert arguments_of(template) == expected

    def test_of_heads(self) -> None:
        headed = with_head(TURNS, date_head(datetime.date(2026, 1, 1)), defaults_head({"x": "false"}))
        assert arguments_of(headed) == {"messages", "add_generation_prompt", "x"}


class TestHeads:
    @pytest.mark.parametrize(
        "template",
        [
            TURNS,
            "  {% if true %}\n  a\n  {% endif %}b{{ x }}",
            "\n\n  {%- if true %} a {%- endif %} {{ x }}",
            "   {{ x }} ",
            "\n{{ x }}\n",
            "{#- comment #}\n {{ x }}",
            "{% macro write() %}{{ x }}{% endmacro %}{{ write() }}{% for m in messages %}{{ write() }}{% endfor %}",
        ],
    )
    def test_changes_nothing_else(self, template: str) -> None:
        expected = render(template, x="false")
        headed = with_head(template, date_head(datetime.date(2026, 1, 1)), defaults_head({"x": "false"}))
        assert render(headed) == expected
        assert render(with_head(template, written="<s>"), x="false") == "<s>" + expected
        assert with_head(template) == template

    @pytest.mark.parametrize(
        "value",
        [True, False, None, 3, -1.5, 1e30, 'it\'s "so"\n\\ {{ x }} 🙂 é', [1, [None, "a"]], {"a": {"b": True}}, [], {}],
    )
    def test_arguments_of_every_kind(self, value: Any) -> None:
        template = "{{ x | tojson }}"
        assert render(with_head(template, defaults_head({"x": value}))) == render(template, x=value)
        assert render(with_head(template, defaults_head({"x": value})), x="mine") == '"mine"'


def served(encoder: ChatEncoder, *, bos: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer as it is exported."""
    tokenizer = toy_tokenizer(bos=bos)
    tokenizer.chat_template = template_to_export(encoder)
    return tokenizer


class TestExport:
    def test_template_that_needs_nothing_is_left_alone(self) -> None:
        for bos, template in ((False, TURNS), (True, "{{ bos_token }}" + TURNS)):
            encoder = ChatEncoder(toy_tokenizer(bos=bos, chat_template=template))
            assert template_to_export(encoder) == template

    def test_bos_that_the_tokenizer_adds_is_written_by_the_template(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=TURNS))
        tokenizer = served(encoder)
        ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_prompt(USER)
        assert tokenizer.decode(ids) == "<s>user: Q\nassistant: "
        again = ChatEncoder(tokenizer)  # training with the export does not double it
        assert again.encode_prompt(USER) == ids
        assert template_to_export(again) == tokenizer.chat_template

    def test_date_arguments_and_empty_system_turn_come_along(self) -> None:
        template = DATED.replace("m.role +", "(mood or '') + m.role +")
        encoder = ChatEncoder(
            toy_tokenizer(chat_template=template),
            template_date="2024-02-09",
            chat_template_kwargs={"mood": "calm "},
            add_empty_system=True,
        )
        tokenizer = served(encoder)
        check_exported(tokenizer, encoder)
        text = tokenizer.apply_chat_template(USER, tokenize=False)
        assert text == "<s>Today: 09 Feb 2024\ncalm system: \ncalm user: Q\n"
        messages = [{"role": "system", "content": "S"}, *USER]
        text = tokenizer.apply_chat_template(messages, tokenize=False, mood="")
        assert text == "<s>Today: 09 Feb 2024\nsystem: S\nuser: Q\n"

    def test_all_templates_of_a_tokenizer_are_kept(self) -> None:
        tokenizer = toy_tokenizer()
        rag = "{% for text in documents %}{{ text }}{% endfor %}{{ raise_exception('no documents') }}"
        tokenizer.chat_template = {"default": TURNS, "tool_use": "{{ tools }}" + TURNS, "rag": rag}
        exported = template_to_export(ChatEncoder(tokenizer))
        assert isinstance(exported, dict)
        assert list(exported) == ["default", "tool_use", "rag"]
        assert exported["rag"] == rag
        assert [exported[name].endswith(TURNS) for name in ("default", "tool_use")] == [True, True]
        assert all(exported[name].startswith('{{- "<s>" }}') for name in ("default", "tool_use"))
        assert template_to_export(ChatEncoder(tokenizer, chat_template="zephyr")) == with_head(
            chat_template.ZEPHYR_TEMPLATE, written="<s>"
        )

    def test_tokenizer_that_writes_a_space_in_front_of_the_first_word_only(self) -> None:
        # Trained on ▁ a, behind the BOS that the post-processor adds; "<s>a" would be a without ▁.
        vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "\u2581", *"user:\nasitnQ"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.post_processor = toy_tokenizer(bos=True).backend_tokenizer.post_processor
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = TURNS
        encoder = ChatEncoder(tokenizer)
        tokenizer.chat_template = template_to_export(encoder)
        check_exported(tokenizer, encoder)
        assert str(tokenizer.chat_template).startswith('{{- "<s> " }}')
        assert encoder.encode_prompt(USER)[:3] == [1, vocab["\u2581"], vocab["u"]]

    @pytest.mark.parametrize("bos", [True, False])
    @pytest.mark.parametrize(
        ("kwargs", "adds_system"), [({}, False), ({"mood": "calm "}, False), ({}, True), ({"mood": "calm "}, True)]
    )
    def test_training_from_an_export_takes_its_own_date(
        self, bos: bool, kwargs: dict[str, str], adds_system: bool
    ) -> None:
        template = DATED.replace("m.role +", "(mood or '') + m.role +")
        first = ChatEncoder(
            toy_tokenizer(bos=bos, chat_template=template),
            template_date="2020-01-01",
            chat_template_kwargs=kwargs,
            add_empty_system=adds_system,
        )
        exported = served(first, bos=bos)
        begin, mood = "<s>" if bos else "", kwargs.get("mood", "")
        empty = f"{mood}system: \n" if adds_system else ""

        def prompt(tokenizer: PreTrainedTokenizerBase) -> str:
            return str(tokenizer.apply_chat_template(USER, tokenize=False))

        assert prompt(exported) == f"{begin}Today: 01 Jan 2020\n{empty}{mood}user: Q\n"
        # the export's date stays where none is given, as for an evaluation
        assert ChatEncoder(exported).date == datetime.date(2020, 1, 1)
        assert ChatEncoder(exported).encode_prompt(USER) == first.encode_prompt(USER)
        again = ChatEncoder(exported, template_date="2026-11-27")
        assert again.date == datetime.date(2026, 11, 27)
        expected = f"{begin}Today: 27 Nov 2026\n{empty}{mood}user: Q\n"
        assert again.tokenizer.decode(again.encode_prompt(USER)) == expected + "assistant: "
        exported.chat_template = template_to_export(again)
        check_exported(exported, again)
        assert prompt(exported) == expected
        assert "2020" not in exported.chat_template
        third = ChatEncoder(exported, template_date="2030-05-06", chat_template_kwargs={"mood": "glad "})
        exported.chat_template = template_to_export(third)
        check_exported(exported, third)
        empty = "glad system: \n" if adds_system else ""
        assert prompt(exported) == f"{begin}Today: 06 May 2030\n{empty}glad user: Q\n"

    def test_dates_of_all_templates_of_an_export_are_replaced(self) -> None:
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = {"default": DATED, "tool_use": "{{ tools }}" + DATED}
        tokenizer.chat_template = template_to_export(ChatEncoder(tokenizer, template_date="2020-01-01"))
        exported = template_to_export(ChatEncoder(tokenizer, template_date="2026-11-27"))
        assert all("27 Nov 2026" in render(text, tools=[]) for text in exported.values())
        assert not any("2020" in text for text in exported.values())

    def test_two_date_heads_are_both_taken_off(self) -> None:
        old, new = date_head(datetime.date(2020, 1, 1)), date_head(datetime.date(2026, 11, 27))
        inner = with_head(DATED, old, written="<s>")
        assert split_date_head(with_head(inner, new)) == (with_head(DATED, written="<s>"), datetime.date(2026, 11, 27))
        assert split_date_head(DATED) == (DATED, None)

    @pytest.mark.parametrize("bos", [True, False])
    def test_template_that_needs_an_argument_of_each_row(self, bos: bool) -> None:
        template = "{% if mood is not defined %}{{ raise_exception('give a mood') }}{% endif %}{{ mood }} " + TURNS
        encoder = ChatEncoder(toy_tokenizer(bos=bos, chat_template=template))
        expected = encoder.render(USER, ANSWER, template_kwargs={"mood": "calm"})
        assert expected.text == "calm user: Q\nassistant: A</s>"
        tokenizer = served(encoder, bos=bos)
        check_exported(tokenizer, encoder)
        text = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False, mood="calm")
        assert text == ("<s>" if bos else "") + "calm user: Q\nassistant: "

    @pytest.mark.parametrize("named", [False, True])
    def test_template_that_needs_tools(self, named: bool) -> None:
        template = (
            "{{ bos_token }}{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ tools[0].name + strftime_now(' %Y') + '\n' }}" + TURNS
        )
        tokenizer = toy_tokenizer(bos=False, chat_template=template)
        tokenizer.bos_token = "<s>"
        if named:
            tokenizer.chat_template = {"default": TURNS, "tool_use": template}
        encoder = ChatEncoder(tokenizer, template_date="2024-02-09")
        tools = [{"name": "add"}]
        expected = encoder.encode_prompt(USER, tools=tools)
        assert encoder.tokenizer.decode(expected) == "<s>add 2024\nuser: Q\nassistant: "
        tokenizer.chat_template = template_to_export(encoder)
        check_exported(tokenizer, encoder)
        ids = tokenizer.apply_chat_template(USER, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ids == expected

    def test_documents_of_all_rows(self) -> None:
        # apply_chat_template defines documents as none where they are not given
        template = "{% for d in documents or [] %}{{ d.text + '\n' }}{% endfor %}" + TURNS
        kwargs = {"documents": [{"title": "T", "text": "It rains."}]}
        encoder = ChatEncoder(toy_tokenizer(chat_template=template), chat_template_kwargs=kwargs)
        tokenizer = served(encoder)
        check_exported(tokenizer, encoder)
        assert tokenizer.apply_chat_template(USER, tokenize=False) == "<s>It rains.\nuser: Q\n"
        mine = [{"title": "U", "text": "Mine."}]
        assert tokenizer.apply_chat_template(USER, tokenize=False, documents=mine) == "<s>Mine.\nuser: Q\n"
        assert tokenizer.apply_chat_template(USER, tokenize=False, documents=[]) == "<s>user: Q\n"

    def test_wrong_template_is_noticed(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(chat_template=TURNS))
        check_exported(served(encoder), encoder)
        with pytest.raises(ValueError, match=r"token 0 is 'us?e?r?', but was '<s>' in training"):
            check_exported(toy_tokenizer(chat_template=TURNS), encoder)
        with pytest.raises(ValueError, match="gives other prompts"):
            check_exported(toy_tokenizer(chat_template=TURNS.replace("assistant: ", "assistant:")), encoder)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"mine.jinja' is no UTF-8 text"):
        resolve_template(toy_tokenizer(), str(tmp_path / "mine.jinja"))
