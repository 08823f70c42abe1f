"""The formats of a data row, each read into one normal form: a prompt and its completions.

The columns say which format a row has. A column that is null counts as absent. The first line that fits decides:

    task  columns                                          contents
    ----  -----------------------------------------------  ------------------------------------------------------
    DPO   conversations, chosen, rejected                  ShareGPT; `conversations` is the prompt
    DPO   instruction, chosen_response, rejected_response  Argilla v1: strings, a user turn and its two answers
    DPO   prompt, chosen, rejected                         all strings: plain text; otherwise messages, either
                                                           what follows the prompt or the whole conversations
                                                           (Argilla's cleaned release)
    DPO   instruction, chosen, rejected                    Alpaca: strings, a user turn and its two answers
    DPO   messages, chosen, rejected                       the same, where `messages` ends before the answer
    DPO   chosen, rejected                                 whole conversations; the leading turns that they share
                                                           are the prompt. Strings: plain text that begins alike
    SFT   messages                                         a conversation; every assistant turn is learned
    SFT   prompt, completion                               both strings: plain text; otherwise messages
    SFT   instruction, output                              Alpaca: strings, a user turn and its answer
    SFT   the columns of a DPO row                         the chosen side
    SFT   conversations                                    as `messages`
    list  prompt, completions, ratings                     K completions, each as one of a DPO row, and a number for
                                                           each. Instead of `prompt`: instruction (Alpaca), messages or
                                                           conversations
    list  the columns of a DPO row                         two completions, with their ratings if they have some
    label prompt, completion, label                        as for SFT; whether the completion is a good one
    label instruction, output, label                       the same, Alpaca
    label messages, label                                  a conversation; its last turn, an answer, is the completion
    label conversations, label                             the same
    label the columns of a DPO row                         two rows: chosen, which is good, and rejected, which is not

The completions of a list come in any order and are read best first; those of the same rating keep their order. One
without a rating (null or NaN), or null itself, is left out. Where a DPO row's ratings contradict it, a list goes by the
ratings. A label is true or false, 1 or 0, or one of these as a string. It may be called `kto_tag`.

`messages` says what a message is. Where messages are expected, a string stands for one turn: of the user in a prompt,
of the assistant in a completion. A string that holds the JSON of a list of messages, or a conversation in the form
"\\n\\nHuman: ...\\n\\nAssistant: ...", is read as that conversation. Only the columns of Alpaca and Argilla v1 are
strings in any case.

Further columns:

- `system` (string): the system turn. Where it is a string, even an empty one, strings are turns and no plain text.
  A CSV file does not distinguish an empty field from none, so its rows are turns as soon as it has this column.
- `tools`, `chat_template_kwargs`: for the chat template; see `messages.read_tools`. The second is an object
  or its JSON.
- `input`, `history` (beside `instruction`): the user's turn is instruction, newline, input. `history` is a list of
  [user, assistant] that stands before it. It is never learned.
- `source` and the ratings of `RATINGS` are kept for reports, and for losses that need ratings.

No column that would change the meaning is dropped without a word. A column of another form beside the one that is read
must repeat what is read (as UltraFeedback's `prompt` and `messages` do). `images` and the like are errors, and so is
`label` where it has no meaning.
`unknown_columns` lists what has no effect. `data.columns: {their name: ours}` maps other names, and `unused` as our
name leaves a column out. A row may lack a column of theirs, as the sources of a mixture may call one thing differently;
two columns that are read as one of ours must agree.
"""

import difflib
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

from notus.data.messages import (
    MESSAGE_KEYS,
    Message,
    Turns,
    bare,
    check_text,
    described,
    dialogue_answer,
    is_dialogue,
    is_empty,
    is_letter,
    listed,
    listed_messages,
    parse_json,
    read_messages,
    read_object,
    read_string,
    read_tools,
)
from notus.runtime.command_line import called_as

__all__ = [
    "Message",
    "Provenance",
    "Reading",
    "Record",
    "Task",
    "Turns",
    "find_form",
    "guess_task",
    "normalize",
    "read_provenance",
    "readings",
    "unknown_columns",
    "used_columns",
]

Task = Literal["dpo", "sft", "lists", "labels"]
"""What a row is for: "dpo" a chosen and a rejected completion, "sft" a demonstration, "lists" K rated completions, best
first, "labels" one completion with a label, good or bad."""
Form = tuple[str, ...]
_T = TypeVar("_T")

PAIR_FORMS: tuple[Form, ...] = (
    ("conversations", "chosen", "rejected"),
    ("instruction", "chosen_response", "rejected_response"),
    ("prompt", "chosen", "rejected"),
    ("instruction", "chosen", "rejected"),
    ("messages", "chosen", "rejected"),
    ("chosen", "rejected"),
)
RATINGS = (
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen-rating", "rejected-rating"),
    ("score_chosen", "score_rejected"),
)
SFT_FORMS: tuple[Form, ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    *PAIR_FORMS,
    ("conversations",),
)
TAGS = ("label", "kto_tag")
LIST_FORMS: tuple[Form, ...] = (
    *((prompt, "completions", "ratings") for prompt in ("prompt", "instruction", "messages", "conversations")),
    *PAIR_FORMS,
)
LABEL_FORMS: tuple[Form, ...] = (
    *(
        (*form, tag)
        for form in (("prompt", "completion"), ("instruction", "output"), ("messages",), ("conversations",))
        for tag in TAGS
    ),
    *PAIR_FORMS,
)
FORMS: Mapping[Task, tuple[Form, ...]] = MappingProxyType(
    {"dpo": PAIR_FORMS, "sft": SFT_FORMS, "lists": LIST_FORMS, "labels": LABEL_FORMS}
)

UNUSED = "unused"
"""Our name, in `data.columns`, for a column that is to be left out."""

_FORM_COLUMNS = frozenset(column for form in SFT_FORMS for column in form)
_LITERAL = ("chosen_response", "rejected_response", "output")  # always strings, whatever they hold
_CONTENT = _FORM_COLUMNS | {"input", "history"}
_CONTEXT = ("system", "tools", "chat_template_kwargs", "input", "history")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_LABELS = (
    "labelled completions are for losses of labels, as with dpo.loss_type=kto; for others pair a good and a bad "
    "completion of each prompt as 'chosen' and 'rejected', or keep the good ones alone for SFT"
)
_COLUMN_WISE = (
    "this is column-wise JSON, a whole table instead of a row; write one object per row (pandas: "
    "to_json(path, orient='records', lines=True) for .jsonl)"
)
_LISTS = (
    "these are lists of rated completions, for losses of lists, as with dpo.loss_type=plackett_luce; for others make "
    "pairs of the raw records with `{}`, without --listwise"
)
_RAW = "these are UltraFeedback's: make {} of them with `{}{}` first"
_DEMONSTRATIONS = "these are demonstrations: train on them with `{}`, or add the answer that is worse as 'rejected'"
_UNSUPPORTED = {
    **dict.fromkeys(TAGS, _LABELS),
    **dict.fromkeys(_MEDIA, "only text can be learned; leave these rows out"),
    "functions": "give these in a column 'tools'",
    "weight": "rows cannot be weighted one by one; weigh whole files with {path, weight} in data.train",
}
# What any task reads; what a task's own forms add to it.
_KNOWN = _FORM_COLUMNS | {*_CONTEXT, *_UNSUPPORTED, "source", *(name for pair in RATINGS for name in pair)}
_KNOWN_TO: Mapping[Task, frozenset[str]] = MappingProxyType(
    {task: _KNOWN | {column for form in forms for column in form} for task, forms in FORMS.items()}
)
_KNOWN_TO_ANY = frozenset[str]().union(*_KNOWN_TO.values())
_EXPECTED = {"completions": "a list of completions", "ratings": "a list of numbers", **dict.fromkeys(TAGS, "a label")}
# True and 1.0 are equal to 1, False and 0.0 to 0.
_TRUTHS: Mapping[Any, bool] = {
    **dict.fromkeys(
        (1, "true", "1", "1.0"), True
    ),  # pandas writes "1.0" into CSV if the column lacks a label somewhere
    **dict.fromkeys((0, "false", "0", "0.0"), False),
}
# Columns that may hold the prompt of answers that seem to have none, the likeliest first.
_LIKE_PROMPTS = ("question", "query", "input", "problem", "user", "prompt_text", "text", "task", "context")
# What a row must not set: arguments of transformers' `apply_chat_template`, and what it hands to templates itself.
# `documents` it passes on as it gets them. `chat_template.check_arguments` has the same rule, but loads transformers.
_RESERVED = frozenset(
    [
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "strftime_now", "raise_exception"),
    ]
)
_LONG = 20  # characters of a prompt that two answers do not both begin with by chance
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Record(NamedTuple):
    """A prompt and its K completions, all messages or all plain text.

    DPO: chosen, rejected; SFT: one; lists: the best rated first; labels: one, or two of a row that is a pair.

    Attributes:
        prompt: what stands before the completions.
        completions: messages that follow it; K of them.
        tools: functions that the conversation may call, as JSON schemas, for the chat template.
        template_kwargs: further arguments of the chat template.
    """

    prompt: Turns
    completions: tuple[Turns, ...]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})


class Provenance(NamedTuple):
    """Where a row came from and how its answers were rated, as its data say; None: they do not."""

    source: str | None
    chosen_rating: float | None
    rejected_rating: float | None


class Reading(NamedTuple):
    """What is learned from a row, and what its data say of it.

    Attributes:
        record: the prompt and its completions.
        source: where it came from; None: the data do not say.
        ratings: of each completion, None if unknown; None: all are unknown.
        label: whether its one completion is a good one; None for other tasks.
        left_out: completions of a list without a rating or content.
    """

    record: Record
    source: str | None = None
    ratings: tuple[float | None, ...] | None = None
    label: bool | None = None
    left_out: int = 0


def readings(row: Mapping[str, Any], task: Task, columns: Mapping[str, str] = _NOTHING) -> list[Reading]:
    """Read one row with its ratings or label. Only a pair that is read as "labels" gives two readings.

    Arguments and errors as in `normalize`. A list with fewer than two rated completions has no completion.
    """
    try:
        record, known = normalize(row, task, columns), read_provenance(row, columns)
    except ValueError as error:
        if isinstance(row, Mapping) and _is_column_wise(row, columns):
            raise ValueError(_COLUMN_WISE) from error
        raise
    form, given = find_form(row, task, columns), _present(_renamed(row, columns))
    if "completions" in form:
        entries, left_out = _entries(given)
        rated = tuple(rating for _, _, rating in entries)
        return [Reading(record, known.source, rated if record.completions else None, None, left_out)]
    if form[-1] in TAGS:
        return [Reading(record, known.source, None, _label(given, form[-1]))]
    ratings: tuple[float | None, ...] = (known.chosen_rating, known.rejected_rating)
    if task == "labels":
        return [
            Reading(record._replace(completions=(completion,)), known.source, _if_known((rating,)), is_good)
            for completion, rating, is_good in zip(record.completions, ratings, (True, False), strict=True)
        ]
    ordered = _best_first(ratings, ratings) if task == "lists" else ratings
    return [Reading(record, known.source, _if_known(ordered[: len(record.completions)]))]


def _is_column_wise(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether what should be a row, and cannot be read, is a whole table, column by column.

    pandas' `to_json` writes {column: {"0": value, "1": value}} by default. Others write {column: [value, value]}.
    There, only strings and lists count as values: a row may have two lists of as many messages.
    """
    values = list(row.values())
    if values and all(isinstance(value, Mapping) for value in values):
        return all(value and list(value) == list(map(str, range(len(value)))) for value in values)
    read = [value for name, value in row.items() if columns.get(name, name) in _FORM_COLUMNS]
    if not read or not all(isinstance(value, list | tuple) for value in values):
        return False
    are_values = all(isinstance(each, str | list | tuple) for value in read for each in value)
    return are_values and len({len(value) for value in values}) == 1


def _if_known(ratings: tuple[float | None, ...]) -> tuple[float | None, ...] | None:
    return None if all(rating is None for rating in ratings) else ratings


def normalize(row: Mapping[str, Any], task: Task, columns: Mapping[str, str] = _NOTHING) -> Record:
    """Read what is learned from one row of any of the forms above.

    Args:
        row: the columns and their values.
        task: see `Task`.
        columns: what the row calls its columns, {their name: ours}, where it is not as above.

    Raises:
        ValueError: naming the key and turn, for columns of no known form, contents that are no strings, unknown roles,
            conversations that do not fit their prompt, columns that contradict each other, and whatever would change
            the meaning but is not supported.
    """
    form, renamed = find_form(row, task, columns), _renamed(row, columns)
    given = _present(renamed)
    _check_supported(given, form, task)
    if form == ("messages",) and {"chosen", "rejected"} <= set(given) and not _is_answered(given["messages"]):
        form = find_form(renamed, "dpo")
    names = form[-2:] if form in PAIR_FORMS else form[-1:]
    if "completions" in form:
        entries, _ = _entries(given)
        if len(entries) < 2:
            return Record([], ())
        names = tuple(name for name, _, _ in entries)
        record = _answers({**given, **{name: value for name, value, _ in entries}}, form[0], names)
    elif form[-1] in TAGS:
        names = form[-2:-1]
        record = _labelled(given, form)
    else:
        record = _read(given, form, task)
    if form == ("chosen", "rejected"):
        _check_prompt_names(record, _unmet(row, columns))
    with_system = _with_system(record, given)
    _check_copies(given, form, task, (record, with_system))
    if task == "sft":
        with_system = with_system._replace(completions=with_system.completions[:1])
    record = _finished(with_system, given, names)
    if task == "lists" and form in PAIR_FORMS:
        return record._replace(completions=_best_first(record.completions, read_provenance(row, columns)[1:]))
    return record


def find_form(row: Mapping[str, Any], task: Task, columns: Mapping[str, str] = _NOTHING) -> Form:
    """The columns (by our names) that are read from such a row; ValueError if they are of no known form."""
    unmet = _unmet(row, columns) if isinstance(row, Mapping) else {}
    row = _renamed(row, columns)
    given = _present(row)
    forms = FORMS[task]
    for form in forms:
        if all(column in given for column in form):
            return form
    for form in forms:  # the columns are there, but one is null
        missing = [column for column in form if column not in given]
        if all(column in row for column in missing):
            expected = _EXPECTED.get(missing[0], "a string or a list of messages")
            raise ValueError(f"key '{missing[0]}' is null, but must be {expected}")
    accepted = "; ".join("+".join(form) for form in forms)
    remedy = "rename the columns, or map them with data.columns: {their name: ours}"
    if {"completions", "ratings"} <= set(given) and task != "lists":
        remedy = _LISTS.format(called_as("curate"))
    elif {"instruction", "completions"} <= set(given):
        kind, option = ("lists", " --listwise") if task == "lists" else ("pairs", "")
        remedy = _RAW.format(kind, called_as("curate"), option)
    elif not given.keys().isdisjoint(TAGS):
        remedy = _LABELS
    elif unmet:
        remedy = f"of data.columns, the row lacks {listed(unmet)}; correct the names"
    elif task == "dpo" and any(all(column in given for column in form) for form in SFT_FORMS):
        remedy = _DEMONSTRATIONS.format(called_as("sft"))
    raise ValueError(f"the columns {listed(row) or '(none)'} are of no known {task} form ({accepted}); {remedy}")


def guess_task(row: Mapping[str, Any], columns: Mapping[str, str] = _NOTHING) -> Task:
    """The task that a row is for: the first of pairs, lists, labels and demonstrations whose columns it has.

    Raises ValueError if it has those of none.
    """
    given = _present(_renamed(row, columns))
    tasks: tuple[Task, ...] = ("dpo", "lists", "labels")
    for task in tasks:
        if any(all(column in given for column in form) for form in FORMS[task]):
            return task
    find_form(row, "sft", columns)
    return "sft"


def read_provenance(row: Mapping[str, Any], columns: Mapping[str, str] = _NOTHING) -> Provenance:
    """What stands in a row's `source` and ratings; never an error, because training does not need them."""
    row = {columns.get(key, key): value for key, value in row.items() if value is not None}
    source = row.get("source")
    if isinstance(source, str):
        source = source.encode(errors="replace").decode()  # half of a surrogate pair cannot be stored
    ratings = [(_number(row.get(chosen)), _number(row.get(rejected))) for chosen, rejected in RATINGS]
    found = next((pair for pair in ratings if pair != (None, None)), (None, None))
    return Provenance(source if isinstance(source, str) and source else None, *found)


def _number(value: Any) -> float | None:
    """The finite number that a value is, or that a string says, as in CSV; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None  # NaN compares false; beyond, fp32 overflows


def unknown_columns(row: Mapping[str, Any], task: Task, columns: Mapping[str, str] = _NOTHING) -> list[str]:
    """What of a row has no effect: its columns by their own names, and keys of messages as "messages[].key".

    What is null or empty is not listed, nor what `columns` maps to `unused`.
    """
    given, form = _present(_renamed(row, columns)), find_form(row, task, columns)
    names = {ours: theirs for theirs, ours in columns.items() if row.get(theirs) is not None}
    known = _KNOWN_TO[task]
    found = [names.get(key, str(key)) for key, value in given.items() if key not in known and not is_empty(value)]
    for column in form:
        if column == "completions":
            keys = dict.fromkeys(key for _, value, _ in _entries(given)[0] for key in _unread_keys(value))
            found += [f"{names.get(column, column)}[][].{key}" for key in keys]
        else:
            found += [f"{names.get(column, column)}[].{key}" for key in _unread_keys(given[column])]
    return found


def _unread_keys(value: Any) -> list[str]:
    """Keys of messages that nothing reads, each once."""
    value = listed_messages(value) if isinstance(value, str) else value
    turns = value if isinstance(value, list | tuple) else [value]
    pairs = (pair for turn in turns if isinstance(turn, Mapping) for pair in turn.items())
    return list(dict.fromkeys(str(key) for key, each in pairs if key not in MESSAGE_KEYS and not is_empty(each)))


def used_columns(names: Sequence[str], task: Task, columns: Mapping[str, str] = _NOTHING) -> list[str]:
    """Which of a file's columns `normalize` and `read_provenance` could read; all, if they are of no known form.

    The rest need not be loaded. They are what `unknown_columns` would list.
    """
    ours = {name: columns.get(name, name) for name in names}
    if not any(set(form) <= set(ours.values()) for form in FORMS[task]):
        return list(names)  # so that the error can name them
    has_prompt = not {"prompt", "instruction", "conversations", "messages"}.isdisjoint(ours.values())
    known = _KNOWN_TO[task]
    return [name for name in names if ours[name] in known or (ours[name] in _LIKE_PROMPTS and not has_prompt)]


def _renamed(row: Any, columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with our names of its columns, without those that are left out."""
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {described(row)}, but must be an object with the columns of a form")
    if not columns:
        return row
    _check_columns(columns)
    renamed: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in row.items():
        ours = columns.get(key, key)
        if ours == UNUSED and key in columns:
            continue
        found = renamed.get(ours)
        if found is None or (found == "" and value is not None):  # an empty field of CSV
            renamed[ours], names[ours] = value, key
        elif value not in (None, "", found):
            raise ValueError(
                f"the columns '{names[ours]}' and '{key}' are both read as '{ours}' (data.columns), but differ; map "
                f"one of them to '{UNUSED}'"
            )
    return renamed


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _check_columns(columns: Mapping[str, str]) -> None:
    for theirs, ours in columns.items():
        if ours in _KNOWN_TO_ANY or ours == UNUSED:
            continue
        near = difflib.get_close_matches(ours, _KNOWN_TO_ANY, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"see docs/data.md, or use '{UNUSED}' to leave it out"
        raise ValueError(f"data.columns maps '{theirs}' to '{ours}', which is no column that is read; {hint}")


def _unmet(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Those of `columns` that the row lacks by either name: another source of a mixture may have them."""
    has = {columns.get(key, key) for key in row} if columns else set()
    return {theirs: ours for theirs, ours in columns.items() if ours != UNUSED and ours not in has}


def _check_supported(given: Mapping[str, Any], form: Form, task: Task) -> None:
    for column, value in given.items():
        if column not in _UNSUPPORTED or is_empty(value) or (column == "weight" and 1 in (value, _number(value))):
            continue
        if column in TAGS and form[-1] in TAGS:
            continue
        reason = _UNSUPPORTED[column]
        if column in TAGS and task == "labels":
            reason = "of a pair, the chosen completion is the good one and the rejected the bad one"
        raise ValueError(
            f"the row has a column '{column}', which is not supported: {reason}. If it means something "
            f"else, map it with data.columns: {{{column}: {UNUSED}}}"
        )


def _read(given: Mapping[str, Any], form: Form, task: Task) -> Record:
    if len(form) == 1:
        return _conversation(given[form[0]], form[0])
    if form == ("chosen", "rejected"):
        return _without_prompt(given, form, task)
    return _answers(given, form[0], form[1:])


def _entries(given: Mapping[str, Any]) -> tuple[list[tuple[str, Any, float]], int]:
    """The rated completions of a list, best first: what errors call each, it and its rating. And how many it lacks.

    Raises:
        ValueError: these are no lists, of different lengths, or a rating is no number.
    """
    completions, ratings = _listed(given, "completions"), _listed(given, "ratings")
    if len(completions) != len(ratings):
        raise ValueError(
            f"key 'completions' has {len(completions)} entries, but key 'ratings' has {len(ratings)}; give a rating "
            "for each completion, null where there is none"
        )
    found = []
    for number, (value, rating) in enumerate(zip(completions, ratings, strict=True), start=1):
        score = _rating(rating, f"key 'ratings', entry {number}")
        if value is not None and score is not None:
            found.append((f"completions, entry {number}", value, score))
    return sorted(found, key=lambda entry: -entry[2]), len(completions) - len(found)


def _listed(given: Mapping[str, Any], column: str) -> Sequence[Any]:
    """The list in a column, or in the JSON that it holds, as in CSV."""
    value = given[column]
    if isinstance(value, str):
        value = parse_json(value, f"key '{column}'")
    if not isinstance(value, list | tuple):
        raise ValueError(f"key '{column}' is {described(value)}, but must be {_EXPECTED[column]}")
    return value


def _rating(value: Any, place: str) -> float | None:
    """The number that a rating is; None for null and NaN. ValueError for anything else."""
    is_nan = isinstance(value, float) and math.isnan(value)
    if value is None or is_nan or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        return None
    found = _number(value)
    if found is None:
        raise ValueError(f"{place} is {value!r:.40}, but must be a finite number, or null where there is none")
    return found


def _best_first(items: Sequence[_T], ratings: Sequence[float | None]) -> tuple[_T, ...]:
    """A pair's items in the order of its ratings: as they are, unless the second is rated above the first."""
    chosen, rejected = ratings
    is_reversed = chosen is not None and rejected is not None and rejected > chosen
    return tuple(reversed(items)) if is_reversed else tuple(items)


def _labelled(given: Mapping[str, Any], form: Form) -> Record:
    """The one completion that a label is of."""
    _label(given, form[-1])
    if len(form) == 3:
        return _answers(given, form[0], form[1:2])
    column = form[0]
    if _text(given[column], column) is not None:
        raise ValueError(f"key '{column}' is a string, but must be a list of messages")
    messages = read_messages(given[column], column, "user")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"key '{column}' must end with an assistant turn, which key '{form[-1]}' is a label of")
    return Record(messages[:-1], (messages[-1:],))


def _label(given: Mapping[str, Any], column: str) -> bool:
    """The label in a column. ValueError if it is none, or if it has another value under its other name."""
    found = {}
    for name in TAGS:
        value = given.get(name)
        if is_empty(value) and name != column:
            continue
        said = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(said, bool | int | float | str) or said not in _TRUTHS:
            raise ValueError(f"key '{name}' is {value!r:.40}, but must be a label: true or false, 1 or 0")
        found[name] = _TRUTHS[said]
    if len(set(found.values())) > 1:
        raise ValueError("the keys 'label' and 'kto_tag' contradict each other; correct one, or leave it out")
    return found[column]


def _is_answered(messages: Any) -> bool:
    """Whether a conversation ends with an answer, and so is no prompt."""
    turns = read_messages(messages, "messages", "user")
    return not turns or turns[-1]["role"] == "assistant"


def _conversation(value: Any, column: str) -> Record:
    """A conversation to learn every answer of: the prompt is what stands before the first."""
    if _text(value, column) is not None:
        raise ValueError(f"key '{column}' is a string, but must be a list of messages")
    messages = read_messages(value, column, "user")
    # An answer to nothing is context only.
    greetings = len(list(takewhile(lambda message: message["role"] == "assistant", messages)))
    first = greetings + len(list(takewhile(lambda message: message["role"] != "assistant", messages[greetings:])))
    return Record(messages[:first], (messages[first:],))


def _without_prompt(given: Mapping[str, Any], form: Form, task: Task) -> Record:
    texts = [_text(given[column], column) for column in form]
    if None not in texts:
        return _shared_text(given, task, *(str(text) for text in texts))
    for column, text in zip(form, texts, strict=True):
        if text is not None:
            raise ValueError(f"key '{column}' is a string, so there is no prompt; add a key 'prompt', or give messages")
    return _shared_turns(*(read_messages(given[column], column, "assistant") for column in form))


def _check_prompt_names(record: Record, unmet: Mapping[str, str]) -> None:
    """Raise ValueError for a prompt split off two strings, where `data.columns` names a column that should hold it."""
    for theirs, ours in unmet.items():
        if isinstance(record.prompt, str) and ours in ("prompt", "instruction", "conversations", "messages"):
            raise ValueError(
                f"data.columns maps '{theirs}' to '{ours}', but the row has neither, and its keys 'chosen' and "
                "'rejected' are strings; correct the name, or give the row a prompt"
            )


def _shared_text(given: Mapping[str, Any], task: Task, chosen: str, rejected: str) -> Record:
    """Split two strings into the beginning that they share, and the rest.

    TRL (`extract_prompt`) splits at the first character that differs, and leaves a space before it to the
    completions. Here a word is not split either: "It is late" and "It is later" share "It is".
    """
    _check_no_prompt(given)
    if chosen == rejected and task != "sft":
        return Record("", (chosen, rejected))  # no difference: dropped as identical
    if chosen == rejected:  # SFT would learn the prompt in them, too
        raise ValueError(
            "keys 'chosen' and 'rejected' are the same string, so no prompt can be split off; add a key "
            "'prompt', or leave the row out"
        )
    lengths = range(1, min(len(chosen), len(rejected)) + 1)
    shared = bisect_left(lengths, True, key=lambda length: chosen[:length] != rejected[:length])
    if any(is_letter(text[shared : shared + 1]) for text in (chosen, rejected)):
        shared -= len(list(takewhile(is_letter, reversed(chosen[:shared]))))
    if chosen[:shared].endswith(" "):
        shared -= 1
    if not chosen[:shared].strip():
        raise ValueError(
            "keys 'chosen' and 'rejected' are strings that do not begin alike, so there is no prompt; add a key "
            "'prompt', or give messages"
        )
    return Record(chosen[:shared], (chosen[shared:], rejected[shared:]))


def _check_no_prompt(given: Mapping[str, Any]) -> None:
    """Raise ValueError where a column beside two strings says that the prompt stands apart."""
    begin = "keys 'chosen' and 'rejected' are strings without a prompt, but there is a column"
    for name in _LIKE_PROMPTS:
        if isinstance(given.get(name), str) and given[name]:
            raise ValueError(
                f"{begin} '{name}'; if it holds the prompt, map it with data.columns: {{{name}: prompt}}, "
                f"else to '{UNUSED}'"
            )
    if "system" in given:
        raise ValueError(
            f"{begin} 'system', which stands before a prompt; map the prompt's column with data.columns: "
            f"{{its name: prompt}}, or leave this one out with {{system: {UNUSED}}}"
        )


def _answers(given: Mapping[str, Any], prompt_column: str, columns: Form) -> Record:
    """An explicit prompt, and the completions in `columns`."""
    prompt, base = given[prompt_column], _prompt(given, prompt_column)
    if isinstance(base, str):
        answers = [_text(given[column], column) for column in columns]
        if None not in answers and "system" not in given:
            return Record(base, _without_repeats(base, [str(answer) for answer in answers]))
        base = [{"role": "user", "content": base}]
    is_text = len(base) == 1 and (base[0]["content"] == prompt or prompt_column == "instruction")
    in_dialogue = isinstance(prompt, str) and is_dialogue(prompt) and not is_text
    completions = [_answer(given[column], column, in_dialogue) for column in columns]
    if _are_whole(base, completions, is_text):
        return _check_prompt(_shared_turns(*completions), base, completions, (prompt_column, columns[0]))
    completions = _without_repeated_turn(base, completions, [given[column] for column in columns])
    rest = [_after(base, turns, column) for turns, column in zip(completions, columns, strict=True)]
    if not base:
        raise ValueError(f"key '{prompt_column}' holds no turn; a completion needs a prompt")
    for turns, column in zip(rest, columns, strict=True):
        if turns and base[-1]["role"] == turns[0]["role"] == "assistant" and turns[0]["content"]:
            raise ValueError(
                f"key '{prompt_column}' ends with an assistant turn, and key '{column}' begins with another; end the "
                "prompt with the turn that is answered"
            )
    return Record(base, tuple(rest))


def _prompt(given: Mapping[str, Any], column: str) -> Turns:
    """The prompt in a column: a string where it is plain text."""
    value = given[column]
    if column == "instruction":
        return _instruction(given)
    found = read_string(value, column) if isinstance(value, str) else read_messages(value, column, "user")
    if isinstance(found, str):
        return found if column == "prompt" else [{"role": "user", "content": found}]
    if isinstance(value, str) and is_dialogue(value):
        found = found[:-1] if found[-1] == {"role": "assistant", "content": ""} else found
        if found[-1]["role"] != "user":
            raise ValueError(f"key '{column}' ends within an answer of the Assistant; end it with 'Assistant:'")
    return found


def _instruction(given: Mapping[str, Any]) -> list[Message]:
    """Alpaca's prompt: the turns of `history`, then the user's turn, which is instruction, newline, input."""
    texts = [given.get(column, "") for column in ("instruction", "input")]
    for text, column in zip(texts, ("instruction", "input"), strict=True):
        check_text(text, f"key '{column}'")
    history = given.get("history", [])
    history = parse_json(history, "key 'history'") if isinstance(history, str) and history.strip() else history or []
    if not isinstance(history, Sequence):
        raise ValueError(f"key 'history' is {described(history)}, but must be a list of [user, assistant]")
    turns: list[Message] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"key 'history', entry {number} is no pair of [user, assistant]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            check_text(text, f"key 'history', entry {number}, {role}")
            turns.append({"role": role, "content": text})
    return [*turns, {"role": "user", "content": "\n".join(text for text in texts if text)}]


def _text(value: Any, column: str) -> str | None:
    """The string in a column, if it holds no conversation."""
    found = read_string(value, column) if isinstance(value, str) else None
    return found if isinstance(found, str) else None


def _answer(value: Any, column: str, in_dialogue: bool) -> list[Message]:
    """The turns in a completion's column. `in_dialogue`: the prompt is a string "Human: ... Assistant:"."""
    if column in _LITERAL:
        check_text(value, f"key '{column}'")
        return [{"role": "assistant", "content": value}]
    text = _text(value, column) if in_dialogue else None
    return read_messages(value, column, "assistant") if text is None else dialogue_answer(text, column)


def _without_repeats(prompt: str, completions: Sequence[str]) -> tuple[str, ...]:
    """The completions of a pair without the prompt, if both repeat it.

    One alone may be an answer that quotes the prompt, and two may well begin alike with a short one ("Hello").
    So the completion of a demonstration stays as it is.
    """
    repeated = len(completions) > 1 and all(text.startswith(prompt) for text in completions)
    return tuple(text[len(prompt) if repeated and len(prompt) >= _LONG else 0 :] for text in completions)


def _without_repeated_turn(
    base: list[Message], completions: list[list[Message]], values: Sequence[Any]
) -> list[list[Message]]:
    """The same for strings that are read as turns: the user's last is what both may repeat.

    The white space between the prompt and the answer is removed with it, because the template separates turns.
    """
    if not base or base[-1]["role"] != "user" or not all(map(_is_string_turn, completions, values)):
        return completions
    texts = [str(turns[0]["content"]) for turns in completions]
    rest = _without_repeats(str(base[-1]["content"]), texts)
    if list(rest) == texts:
        return completions
    return [[{"role": "assistant", "content": text.lstrip()}] for text in rest]


def _is_string_turn(turns: Sequence[Message], value: Any) -> bool:
    """Whether turns are the one of an answer that was given as a string."""
    if not isinstance(value, str):
        return False
    return list(turns) in [[{"role": "assistant", "content": text}] for text in (value, value.strip())]


def _is_continuation(turns: Sequence[Message]) -> bool:
    """Whether the turns continue a prompt, rather than begin a conversation."""
    return not turns or turns[0]["role"] in ("assistant", "tool")


def _are_whole(base: list[Message], completions: Sequence[list[Message]], is_text: bool) -> bool:
    """Whether the completions are whole conversations, and the prompt a string or one of them.

    Then the prompt is a copy, and the turns that they share are what stands before the completions.
    """
    if any(_is_continuation(turns) for turns in completions):
        return False
    return is_text or bare(base) in [bare(turns) for turns in completions]


def _check_prompt(record: Record, base: list[Message], whole: Sequence[list[Message]], names: Form) -> Record:
    """The record, if the prompt's column repeats a turn of its prompt, or is one of the whole conversations."""
    said = str(base[0]["content"]) if base else ""
    asked = [
        turn["content"].strip() for turn in record.prompt if isinstance(turn, dict) and turn["role"] != "assistant"
    ]
    if said.strip() and bare(base) not in [bare(turns) for turns in whole] and said.strip() not in asked:
        raise ValueError(
            f"key '{names[0]}' is {said[:40]!r}, but no turn that the conversations of key '{names[1]}' share says "
            f"so; correct one, or leave the former out with data.columns: {{{names[0]}: {UNUSED}}}"
        )
    return record


def _after(base: list[Message], turns: list[Message], column: str) -> list[Message]:
    """What follows the prompt, of turns that may repeat it."""
    if base and bare(turns[: len(base)]) == bare(base):
        return turns[len(base) :]
    if not _is_continuation(turns):
        raise ValueError(
            f"key '{column}' begins with a {turns[0]['role']} turn, but not with the prompt's turns; give "
            "what follows the prompt, or the whole conversation"
        )
    return turns


def _shared_turns(*conversations: list[Message]) -> Record:
    """Split whole conversations into the leading turns they share, and the rest: a turn of each at least."""
    room = max(min(len(turns) for turns in conversations) - 1, 0)
    leading = zip(*(bare(turns[:room]) for turns in conversations), strict=True)
    shared = len(list(takewhile(lambda turns: all(turn == turns[0] for turn in turns), leading)))
    if shared == 0:
        raise ValueError("the conversations share no leading turn, so there is no prompt; add a key 'prompt'")
    return Record(conversations[0][:shared], tuple(turns[shared:] for turns in conversations))


def _with_system(record: Record, given: Mapping[str, Any]) -> Record:
    """The record with the turn of the column `system` in front, unless it stands there."""
    if "system" not in given:
        return record
    check_text(given["system"], "key 'system'")
    assert not isinstance(record.prompt, str), "strings beside a system turn are read as turns"
    turns = [*record.prompt, *(turn for each in record.completions for turn in each if isinstance(turn, dict))]
    others = [turn["content"] for turn in turns if turn["role"] == "system"]
    if not given["system"]:
        return record
    if any(other.strip() != given["system"].strip() for other in others):
        raise ValueError(
            f"key 'system' is {given['system'][:40]!r}, but the conversation has the system turn {others[0][:40]!r}; "
            f"keep one, or leave the former out with data.columns: {{system: {UNUSED}}}"
        )
    return (
        record if others else record._replace(prompt=[{"role": "system", "content": given["system"]}, *record.prompt])
    )


def _check_copies(given: Mapping[str, Any], form: Form, task: Task, records: Sequence[Record]) -> None:
    """Raise ValueError for a column of another form that does not repeat what is read."""
    read = {*form, "input", "history"} if form[0] == "instruction" else set(form)
    if task == "sft":  # which does not learn them
        read |= {"rejected", "rejected_response"}
    for column, value in given.items():
        if column in read or column not in _CONTENT:
            continue
        if not is_empty(value) and not any(_is_copy(value, column, record) for record in records):
            raise ValueError(
                f"the row is read by {', '.join(form)}, but its key '{column}' says something else; correct it, or "
                f"leave it out with data.columns: {{{column}: {UNUSED}}}"
            )


def _is_copy(value: Any, column: str, record: Record) -> bool:
    """Whether a column repeats a turn, or leading turns, or a completion of what is read."""
    if column == "history" or not isinstance(value, str | Mapping | list | tuple):
        return False
    if isinstance(record.prompt, str):
        said = {record.prompt.strip(), *(str(text).strip() for text in record.completions)}
        return {turn["content"].strip() for turn in read_messages(value, column, "user")} <= said
    answers = [bare(turns) for turns in record.completions if isinstance(turns, list)]
    talks = [[*bare(record.prompt), *answer] for answer in answers]
    if isinstance(value, str) and any(turn["content"].strip() == value.strip() for talk in talks for turn in talk):
        return True
    found = bare(read_messages(value, column, "user"))
    return found in answers or any(talk[: len(found)] == found for talk in talks)


def _finished(record: Record, given: Mapping[str, Any], names: Form) -> Record:
    """The record with tools and template arguments, and with the marks of what is learned where they count.

    `names` are what errors call the completions.
    """
    tools = read_tools(given.get("tools"), "key 'tools'")
    kwargs = _template_kwargs(given.get("chat_template_kwargs"))
    if isinstance(record.prompt, str):
        if tools or kwargs:
            name = "tools" if tools else "chat_template_kwargs"
            raise ValueError(f"key '{name}' is for the chat template, but the row is plain text; give messages")
        return record
    completions = [turns for turns in record.completions if isinstance(turns, list)]
    for turns, column in zip(completions, names, strict=False):
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if answers and not any(turn.get("learn", True) for turn in answers):
            raise ValueError(f"key '{column}' has no assistant turn to learn: each has weight 0; leave the row out")
    brought = [turn["tools"] for turns in (record.prompt, *completions) for turn in turns if "tools" in turn]
    if any(each != (tools or brought[0]) for each in brought):
        raise ValueError("the row has tools twice, in the column 'tools' or system turns, and they differ; keep one")
    prompt = [{key: value for key, value in turn.items() if key not in ("tools", "learn")} for turn in record.prompt]
    rest = tuple([{k: v for k, v in turn.items() if k != "tools"} for turn in turns] for turns in completions)
    return Record(prompt, rest, tools or (brought[0] if brought else None), kwargs)


def _template_kwargs(value: Any) -> Mapping[str, Any]:
    place = "key 'chat_template_kwargs'"
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else None
    found = {} if value is None else read_object(value, place)
    taken = sorted(_RESERVED & set(found))
    if taken:
        raise ValueError(f"{place} sets '{taken[0]}', which is not for a row to set; remove it")
    return found
