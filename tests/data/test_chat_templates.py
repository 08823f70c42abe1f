"""Ids and masks of well-known chat formats, against an oracle that renders turn by turn, and against hostile texts.

The formats are re-implemented here, as far as users, assistants and systems go. Where TRL is installed, the templates
that it brings are held against the same oracle.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from toys import toy_tokenizer
from transformers import PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, Encoded, check_exported, template_to_export

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Format:
    """A chat format: a template, its tokens, and what closes a turn in the middle and at the end of a conversation."""

    template: str
    closing: str
    last_closing: str
    eos: str = "</s>"
    special: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    systems: bool = True
    before: str = ""  # what is learned before the words
    before_last: str = ""  # and before those of the last turn

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = toy_tokenizer(bos=False, chat_template=self.template)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in (*self.special, self.eos)])
        tokenizer.add_tokens(list(self.ordinary))
        tokenizer.eos_token = self.eos
        tokenizer.bos_token = "<s>"
        return tokenizer


def by_role(user: str, assistant: str, system: str, generation: str, *, text: str = "m.content", end: str = "") -> str:
    """A template of one rule a role, in each of which %s is the text."""
    rules = {"user": user, "assistant": assistant, "system": system}
    branches = "".join(
        f"{{% {'if' if role == 'user' else 'elif'} m.role == '{role}' %}}{rule.replace('%s', '{{ ' + text + ' }}')}"
        for role, rule in rules.items()
    )
    turns = "{% for m in messages %}" + branches + "{% endif %}{% endfor %}"
    return turns + "{% if add_generation_prompt %}" + generation + "{% else %}" + end + "{% endif %}"


def marked_by(mark: str, generation: str, *, text: str = "m.content", end: str = "") -> str:
    """A template of one rule for all roles, in which %r is the role and %s the text."""
    rule = mark.replace("%r", "{{ m.role }}").replace("%s", "{{ " + text + " }}")
    return (
        "{% for m in messages %}"
        + rule
        + "{% endfor %}{% if add_generation_prompt %}"
        + generation
        + ("{% else %}" + end + "{% endif %}")
    )


BOS = "{{ bos_token }}"
TRIM = "m.content | trim"
CHATML = marked_by("<|im_start|>%r\n%s<|im_end|>{{ '\n' }}", "<|im_start|>assistant{{ '\n' }}")
IM = ("<|im_start|>", "<|im_end|>")
LLAMA3 = BOS + marked_by(
    "<|start_header_id|>%r<|end_header_id|>\n\n%s<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}", text=TRIM
)  # fmt: skip
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SYSTEM_IN_FIRST_USER = (
    "{%- set first = messages[0].content if messages[0].role == 'system' else none %}"
    "{%- for m in messages if m.role != 'system' %}"
    "{%- if m.role == 'user' %}{{ USER }}{%- else %}{{ ANSWER }}{%- endif %}{%- endfor %}"
)
LLAMA2 = BOS + SYSTEM_IN_FIRST_USER.replace(
    "USER",
    "'[INST] ' + ('<<SYS>>\n' + first + '\n<</SYS>>\n\n' if first and loop.first else '')+ m.content|trim + ' [/INST]'",
).replace("ANSWER", "' ' + m.content|trim + ' ' + eos_token")
MISTRAL1 = BOS + SYSTEM_IN_FIRST_USER.replace(
    "USER", "'[INST] ' + (first + '\n\n' if first and loop.first else '') + m.content + ' [/INST]'"
).replace("ANSWER", "m.content + eos_token")
MISTRAL3 = BOS + SYSTEM_IN_FIRST_USER.replace(
    "USER", "'[INST] ' + (first + '\n\n' if first and loop.last else '') + m.content + '[/INST]'"
).replace("ANSWER", "' ' + m.content|trim + eos_token")
QWEN3 = (
    "{%- set seen = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set seen.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- set text = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in text %}{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > seen.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- set text = text.lstrip('\n') %}"
    "{%- endif %}{%- endif %}"
    "{{- text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
DATED = (
    BOS + "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set messages = messages[1:] %}"
    "{%- endif %}"
    "<|eot_id|>" + LLAMA3.removeprefix(BOS)
)
FORMATS = {
    "chatml": Format(CHATML, "<|im_end|>", "<|im_end|>", "<|im_end|>", IM),
    "chatml beside another EOS": Format(CHATML, "<|im_end|>", "<|im_end|></s>", special=IM),
    "chatml of ordinary tokens": Format(CHATML, "<|im_end|>", "<|im_end|></s>", ordinary=IM),
    "chatml as mere text": Format(CHATML, "<|im_end|>", "<|im_end|></s>"),
    "zephyr": Format(
        marked_by("<|%r|>\n%s{{ eos_token + '\n' }}", "<|assistant|>{{ '\n' }}"), "</s>", "</s>"
    ),
    "llama 2": Format(LLAMA2, " </s>", " </s>", before=" ", before_last=" "),
    "llama 3": Format(LLAMA3, "<|eot_id|>", "<|eot_id|>", "<|eot_id|>", HEADERS),
    "llama 3, base model's EOS": Format(LLAMA3, "<|eot_id|>", "<|eot_id|></s>", special=HEADERS),
    "llama 3.1": Format(DATED, "<|eot_id|>", "<|eot_id|>", "<|eot_id|>", HEADERS),
    "gemma": Format(
        BOS + by_role(
            "<start_of_turn>user\n%s<end_of_turn>\n", "<start_of_turn>model\n%s<end_of_turn>{{ '\n' }}",
            "{{ raise_exception('no system turns') }}", "<start_of_turn>model{{ '\n' }}", text=TRIM,
        ), "<end_of_turn>", "<end_of_turn><eos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), systems=False,
    ),
    "phi 3": Format(
        marked_by("<|%r|>\n%s<|end|>{{ '\n' }}", "<|assistant|>{{ '\n' }}", end="{{ eos_token }}"),
        "<|end|>", "<|end|>\n<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "qwen 2.5": Format(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>{{ '\n' }}{% endif %}" + CHATML,
        "<|im_end|>", "<|im_end|>", "<|im_end|>", IM, ("<tool_call>",),
    ),
    "qwen 3": Format(
        QWEN3, "<|im_end|>", "<|im_end|>", "<|im_end|>", IM, ("<think>", "</think>"),
        before_last="<think>\n\n</think>\n\n",
    ),
    "mistral 1": Format(MISTRAL1, "</s>", "</s>"),
    "mistral 3": Format(MISTRAL3, "</s>", "</s>", special=("[INST]", "[/INST]"), systems=False, before=" ",
                        before_last=" "),
    "mistral 7": Format(
        BOS + by_role("[INST] %s[/INST]", " %s{{ eos_token }}", "[SYSTEM_PROMPT] %s[/SYSTEM_PROMPT]", ""),
        "</s>", "</s>", special=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), before=" ",
        before_last=" ",
    ),
    "glm 4": Format(
        "[gMASK]<sop>" + marked_by("<|%r|>\n%s", "<|assistant|>{{ '\n' }}"), "", "<|endoftext|>", "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "command r": Format(
        BOS + by_role(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>%s<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>%s<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>%s<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", text=TRIM,
        ), "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "deepseek": Format(
        BOS + by_role("<｜User｜>%s", "<｜Assistant｜>%s{{ eos_token }}", "%s", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "tulu": Format(
        by_role("<|user|>\n%s\n", "<|assistant|>\n%s{{ eos_token + ('' if loop.last else '\n') }}", "<|system|>\n%s\n",
                "<|assistant|>{{ '\n' }}"), "</s>", "</s>",
    ),
    "falcon": Format(
        "{% for m in messages %}{{ '\n' if not loop.first else '' }}{{ m.role | capitalize + ': ' + m.content | trim }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
        "", "<|endoftext|>", "<|endoftext|>", before=" ", before_last=" ",
    ),
    "vicuna": Format(
        by_role("USER: %s ", "ASSISTANT: %s{{ eos_token }}", "%s{{ '\n\n' }}", "ASSISTANT:"), "</s>", "</s>",
        before=" ", before_last=" ",
    ),
    "alpaca": Format(
        by_role("### Instruction:\n%s\n\n", "### Response:\n%s{{ eos_token + '\n\n' }}", "%s\n\n",
                "### Response:{{ '\n' }}"), "</s>", "</s>",
    ),
    "granite": Format(
        marked_by("<|start_of_role|>%r<|end_of_role|>%s<|end_of_text|>{{ '\n' }}",
                  "<|start_of_role|>assistant<|end_of_role|>"),
        "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "openchat": Format(
        BOS + by_role(
            "GPT4 Correct User: %s<|end_of_turn|>", "GPT4 Correct Assistant: %s<|end_of_turn|>", "%s<|end_of_turn|>",
            "GPT4 Correct Assistant:",
        ), "<|end_of_turn|>", "<|end_of_turn|></s>", special=("<|end_of_turn|>",), before=" ", before_last=" ",
    ),
}  # fmt: skip


def turns(*texts: str, system: str | None = None) -> Messages:
    """Messages of user and assistant in turn, behind a system turn if there is one."""
    first = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return first + [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def oracle(tokenizer: PreTrainedTokenizerBase, messages: Messages, first: int) -> tuple[list[int], list[int]]:
    """Ids and mask by `apply_chat_template` turn by turn, for answers of words that occur once in their rendering."""

    def rendered(count: int, **options: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **options))

    def read(text: str) -> list[tuple[int, tuple[int, int]]]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    whole, spans = rendered(len(messages)), []
    for turn in range(first, len(messages)):
        words = messages[turn]["content"]
        if messages[turn]["role"] != "assistant":
            continue
        start = len(rendered(turn, add_generation_prompt=True))
        after = whole[whole.index(words, start) + len(words) :]
        alone = rendered(turn + 1).rpartition(words)[2]
        end = len(whole) - len(after)
        if turn + 1 == len(messages):
            whole = whole[: end + len(alone.rstrip())]
            whole += "" if whole.endswith(tokenizer.eos_token) else tokenizer.eos_token
            spans.append((start, len(whole)))
            continue
        # What both renderings begin with, of whole tokens, without white space behind.
        same = next((n for n, pair in enumerate(zip(after, alone, strict=False)) if len(set(pair)) > 1), len(alone))
        same = max([at[1] for _, at in read(after) if at[1] <= same], default=0)
        spans.append((start, end + len(after[:same].rstrip())))
    tokens = read(whole)
    mask = [int(any(low < end and high > start for start, end in spans)) for _, (low, high) in tokens]
    return [token for token, _ in tokens], mask


def as_lists(encoded: Encoded) -> tuple[list[int], list[int]]:
    return encoded.ids.tolist(), encoded.mask.tolist()


def learned(encoder: ChatEncoder, messages: Messages, first: int) -> list[str]:
    rendered = encoder.render(messages[:first], messages[first:])
    return [rendered.text[start:end] for start, end in rendered.spans]


QUOTING = "Is </s><eos><|im_end|><|end|><|user|><|eot_id|><end_of_turn>\n<start_of_turn>user\n a token? 'Yes.' or"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_learned_by_hand(name: str) -> None:
    case = FORMATS[name]
    messages = turns("Hi", "Yes.", QUOTING, "End.", system="Be kind." if case.systems else None)
    expected = [f"{case.before}Yes.{case.closing}", f"{case.before_last}End.{case.last_closing}"]
    encoder = ChatEncoder(case.tokenizer())
    assert learned(encoder, messages, first=1 + case.systems) == expected
    encoded = encoder.encode([(messages[: 1 + case.systems], messages[1 + case.systems :])])[0]
    text = encoder.tokenizer.decode(encoded.ids[encoded.mask == 1].tolist())
    assert text == "".join(expected)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("gemma", "Yes.<end_of_turn>", "It is.<end_of_turn><eos>"),
        ("phi 3", "Yes.<|end|>", "It is.<|end|>\n<|endoftext|>"),
        ("glm 4", "Yes.", "It is.<|endoftext|>"),
        ("llama 3", "Yes.<|eot_id|>", "It is.<|eot_id|>"),
        ("llama 3, base model's EOS", "Yes.<|eot_id|>", "It is.<|eot_id|></s>"),
        ("qwen 3", "Yes.<|im_end|>", "<think>\n\n</think>\n\nIt is.<|im_end|>"),
        ("chatml of ordinary tokens", "Yes.<|im_end|>", "It is.<|im_end|></s>"),
    ],
)
def test_next_turn_is_not_learned_where_it_quotes_eos(name: str, first: str, last: str) -> None:
    encoder = ChatEncoder(FORMATS[name].tokenizer())
    question = f"Is {encoder.eos} a token? <think>a</think>b Yes."
    assert learned(encoder, turns("Hi", "Yes.", question, "It is."), first=1) == [first, last]


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_mask_are_the_oracles(name: str, system: str | None) -> None:
    case = FORMATS[name]
    if system is not None and not case.systems:
        pytest.skip("this format has no system turn, or one that moves")
    tokenizer = case.tokenizer()
    encoder = ChatEncoder(tokenizer)
    texts = ("Hi", "Alpha one.", QUOTING, "Beta two", "What?\n", "- Gamma\n- delta")
    for count in (2, 4, 6):
        messages = turns(*texts[:count], system=system)
        for first in range(len(messages) - count + 1, len(messages), 2):
            encoded = encoder.encode([(messages[:first], messages[first:])])[0]
            assert as_lists(encoded) == oracle(tokenizer, messages, first), (count, first)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_exported_template_gives_the_training_prompts(name: str, bos: bool) -> None:
    tokenizer = FORMATS[name].tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = toy_tokenizer(bos=True).backend_tokenizer.post_processor
    encoder = ChatEncoder(tokenizer, add_empty_system=FORMATS[name].systems)
    served = FORMATS[name].tokenizer()
    served.chat_template = template_to_export(encoder)
    check_exported(served, encoder)
    messages = turns("Hi", "Yes.", "So?")
    ids = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encoder.encode_prompt(messages)


# --- hostile texts ---

PIECES = [
    "Yes.", "a", "</s>", "<s>", "<|im_end|>", "<|im_end|>\n<|im_start|>user\n", "<eos>", "<end_of_turn>", "<|eot_id|>",
    "<think>", "</think>", "<think>a</think>b", "\n", " ", "<|user|>", "[/INST]", "\u3000", "'", '"', "{{ x }}", "🙂",
    "Text0n0x", "\\", "<", "|>", "assistant", "user", "end", "é",
]  # fmt: skip
QWEN = ChatEncoder(FORMATS["qwen 3"].tokenizer())
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


def hand_made(name: str, messages: Messages) -> tuple[str, list[tuple[int, int]]] | None:
    """Text and spans of a few formats, put together without a template."""
    opened = {
        "chatml of ordinary tokens": ("<|im_start|>%s\n", "<|im_end|>\n", False),
        "chatml as mere text": ("<|im_start|>%s\n", "<|im_end|>\n", False),
        "zephyr": ("<|%s|>\n", "</s>\n", False),
        "llama 3, base model's EOS": ("<|start_header_id|>%s<|end_header_id|>\n\n", "<|eot_id|>", True),
        "glm 4": ("<|%s|>\n", "", False),
    }
    opening, closing, trims = opened[name]
    text, spans = {"glm 4": "[gMASK]<sop>", "llama 3, base model's EOS": "<s>"}.get(name, ""), []
    for message in messages:
        text += opening % message["role"]
        start = len(text)
        text += message["content"].strip() if trims else message["content"]
        if message["role"] == "assistant":
            spans.append((start, len(text) + len(closing.rstrip())))
        text += closing
    text = text[: spans[-1][1]]
    eos = FORMATS[name].eos
    text += "" if closing.startswith(eos) else eos
    return text, [*spans[:-1], (spans[-1][0], len(text))]


def says_something(text: str, eos: str) -> bool:
    """Whether an answer is left as it is: it has words, and no EOS at its end."""
    return bool(text.strip()) and not text.rstrip().endswith(eos)


@pytest.mark.parametrize(
    "name", ["chatml of ordinary tokens", "chatml as mere text", "zephyr", "llama 3, base model's EOS", "glm 4"]
)
def test_no_text_is_taken_for_the_end_of_a_turn(name: str) -> None:
    encoder = ChatEncoder(FORMATS[name].tokenizer())

    @settings(max_examples=120, deadline=None)
    @given(st.lists(HOSTILE, min_size=4, max_size=4))
    def check(texts: list[str]) -> None:
        if not all(says_something(text, encoder.eos) for text in texts):
            return
        messages = turns(*texts)
        rendered = encoder.render(messages[:1], messages[1:])
        assert (rendered.text, rendered.spans) == hand_made(name, messages)

    check()


@settings(max_examples=150, deadline=None)
@given(st.lists(HOSTILE, min_size=4, max_size=4))
def test_reasoning_is_learned_whole_or_refused(texts: list[str]) -> None:
    encoder = QWEN
    if not all(says_something(text, encoder.eos) for text in texts):
        return
    messages = turns(*texts)
    try:
        rendered = encoder.render(messages[:1], messages[1:])
    except ValueError as error:
        expected = "</think>" in texts[1] + texts[3] and re.search("drops the reasoning|alters what", str(error))
        if not expected:
            raise
        return
    for (start, end), turn, scaffold in zip(rendered.spans, (1, 3), ("", "<think></think>"), strict=True):
        said = "".join(texts[turn].split())
        written = "".join(rendered.text[start:end].split())
        # the template opens a thought that is only closed
        assert written.removesuffix("<|im_end|>") in (said, scaffold + said, "<think>" + said)
    assert rendered.text[: rendered.spans[1][0]] == encoder.apply(messages[:3], generation=True)


@pytest.mark.parametrize(
    "name", ["chatml of ordinary tokens", "chatml as mere text", "zephyr", "llama 3, base model's EOS", "glm 4"]
)
def test_no_text_writes_a_control_token(name: str) -> None:
    tokenizer = FORMATS[name].tokenizer()
    encoder, whole = ChatEncoder(tokenizer, split_special_tokens=True), ChatEncoder(tokenizer)
    control = {number for token, number in tokenizer.get_vocab().items() if encoder.special.fullmatch(token)}

    def controls(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control]

    expected = controls(encoder.encode_prompt(turns("a", "b", "c")))

    @settings(max_examples=80, deadline=None)
    @given(st.lists(HOSTILE, min_size=3, max_size=3))
    def check(texts: list[str]) -> None:
        if not all(says_something(text, encoder.eos) for text in texts):
            return
        messages = turns(*texts)
        ids = encoder.encode_prompt(messages)
        assert controls(ids) == expected
        assert tokenizer.decode(ids) == tokenizer.decode(whole.encode_prompt(messages))
        messages = turns(*texts, "b")
        split, usual = (each.render(messages[:1], messages[1:]) for each in (encoder, whole))
        assert (split.text, split.spans) == (usual.text, usual.spans)
        encoded = encoder.tokenize([split])[0]
        said = [split.text[start:end] for start, end in split.spans]
        assert tokenizer.decode(encoded.ids[encoded.mask == 1].tolist()) == "".join(said)

    check()


# --- the templates that TRL brings ---


def trl_templates() -> Iterator[Path]:
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    return (path for folder in folders or [] for path in sorted(Path(folder).glob("chat_templates/*.jinja")))


@pytest.mark.parametrize("path", list(trl_templates()), ids=lambda path: path.stem)
def test_templates_of_trl(path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    tokenizer = toy_tokenizer(bos=False, chat_template=template)
    tokenizer.bos_token = "<s>"
    names = set(re.findall(r"<\|[^|>\s]*\|?>|<[a-z]+\|>|<｜[^>]*｜>|</?[a-z_]+>|\[/?[A-Z_]+\]", template))
    tokenizer.add_tokens([AddedToken(name, special=True) for name in sorted(names - {"<s>", "</s>", "<unk>"})])
    encoder = ChatEncoder(tokenizer, template_date="2026-11-27")
    texts = ("Hi", "Alpha one.", "Is </s> <eos> a token?", "Beta two")
    checked = 0
    for count, first in ((2, 1), (4, 3), (4, 1)):
        messages = turns(*texts[:count])
        try:
            encoded = encoder.encode([(messages[:first], messages[first:])])[0]
        except ValueError as error:
            # templates that take lists of parts, or whose prompts hold an opened thought that an answer has not
            if not re.search("leaves out what turn|refuses a conversation|renders the prompt of turn", str(error)):
                raise
            continue
        if "strftime_now" not in template:
            assert as_lists(encoded) == oracle(tokenizer, messages, first)
        checked += 1
    if not checked:
        pytest.skip("a template for other conversations")
