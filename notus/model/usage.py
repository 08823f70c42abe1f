"""How an exported model is to be used, in the files beside its weights.

They are the tokenizer with all its chat templates, the generation config with the tokens that end a completion, and
`notus.json`, which exists only where strings are not to be taken for a user's turns.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, check_exported, template_to_export
from notus.model.load import read_json, write_json

USAGE = "notus.json"
PLAIN_TEXT = {"string_prompts": "text"}

# What is tokenised with the written tokenizer and with the one in memory: with and without a template, and with what
# tokenizers treat in ways of their own.
_PROBE = " Hello, world!  12 + 30 =\n\nhéllo 你好 🙂 "
_CONVERSATION = [
    {"role": "user", "content": _PROBE},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "No?"},
]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, trained: str | Mapping[str, str]) -> None:
    """Give the tokenizer the chat template that the model was trained with, or several by name, and keep its others.

    transformers takes the template "tool_use" for conversations with tools if there is one, and "default" for all
    else. A single template becomes the default. Where it writes tools itself, it was used for them in training, so it
    also takes the place of a "tool_use".
    """
    known = chat_templates(tokenizer)
    if isinstance(trained, str):
        writes_tools = re.search(r"\btools\b", trained) is not None
        trained = {"default": trained} | ({"tool_use": trained} if writes_tools and "tool_use" in known else {})
    templates = {**known, **trained}
    tokenizer.chat_template = templates["default"] if set(templates) == {"default"} else templates


def set_trained_templates(tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder) -> None:
    """Give a tokenizer the chat templates with which servers prompt a model as `encoder` did in training.

    Raises:
        ValueError: with them, `apply_chat_template` does not give the trained ids.
    """
    set_chat_template(tokenizer, template_to_export(encoder))
    check_exported(tokenizer, encoder)


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a tokenizer's chat templates by name; a single one is called "default"."""
    templates = tokenizer.chat_template
    if not templates:
        return {}
    return dict(templates) if isinstance(templates, dict) else {"default": templates}


def with_learned_end(ids: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """Return a model's EOS ids with the tokenizer's EOS, which training teaches, behind them if it is not among them.

    The tokens at which the base model stops stay: it may have learned to end a turn with them.
    """
    learned = tokenizer.eos_token_id
    known = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if learned is None or learned in known:
        return ids
    return [*known, learned] if known else learned


def ends_of(generation: GenerationConfig | None, config: PreTrainedConfig) -> int | list[int] | None:
    """Return the EOS ids at which a model stops: its generation config's, or else its config's."""
    if generation is not None and generation.eos_token_id is not None:
        return generation.eos_token_id
    ids: int | list[int] | None = getattr(config, "eos_token_id", None)  # a config of one's own may lack it
    return ids


def generation_config_to_write(
    base: GenerationConfig | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Return the base model's generation config, or one made of its config, that stops where training taught it to.

    One that was made of the config also gets the tokenizer's BOS and padding where the config names none.
    """
    made = base is None or bool(base._from_model_config)
    generation = GenerationConfig.from_model_config(config) if base is None else copy.deepcopy(base)
    generation.eos_token_id = with_learned_end(ends_of(generation, config), tokenizer)
    if made and generation.bos_token_id is None:
        generation.bos_token_id = tokenizer.bos_token_id
    if made and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return generation


def write_generation_config(generation: GenerationConfig, folder: Path) -> None:
    """Write `generation_config.json`, also with settings that `save_pretrained` refuses and published models have.

    An example is a temperature without sampling.
    """
    generation.to_json_file(folder / "generation_config.json")


def write_plain_text(folder: Path) -> None:
    """Note that a model learned plain text only: a string prompt is to be continued as it is."""
    write_json(folder / USAGE, PLAIN_TEXT)


def learned_plain_text(folder: Path) -> bool:
    """Return whether `write_plain_text` noted it. Raises ValueError, naming the file, if that is damaged."""
    path = folder / USAGE
    if not path.is_file():
        return False
    content = read_json(path)
    if content != PLAIN_TEXT:
        raise ValueError(f"{path}: holds {json.dumps(content)}, not {json.dumps(PLAIN_TEXT)}; restore or remove it")
    return True


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, without what transformers notes of where it was loaded from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")})


def tokenizer_difference(tokenizer: PreTrainedTokenizerBase, written: PreTrainedTokenizerBase) -> str | None:
    """Return in what a tokenizer differs from the one that it was written from, or None.

    Compared are the vocabulary's size, BOS, EOS, the chat templates, and the ids of a string and a conversation that
    each template renders.
    """
    if len(written) != len(tokenizer):
        return "the vocabulary"
    if (written.bos_token_id, written.eos_token_id) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return "bos_token or eos_token"
    ours, theirs = (
        {name: _lines(text) for name, text in chat_templates(each).items()} for each in (tokenizer, written)
    )
    if ours != theirs:
        differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
        return f"the chat template {min(differing)!r}"
    if written(_PROBE).input_ids != tokenizer(_PROBE).input_ids:
        return "the ids of a string"
    for name, template in chat_templates(tokenizer).items():
        if _rendered_ids(written, template) != _rendered_ids(tokenizer, template):
            return f"the ids of a conversation that the chat template {name!r} renders"
    return None


def _lines(template: str) -> str:
    """A template as it is read from a file, which makes one of all kinds of line ends; as Jinja does."""
    return template.replace("\r\n", "\n").replace("\r", "\n")


def _rendered_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> Any:
    """The ids of a conversation, or why the template refuses it: not every one takes such a conversation."""
    try:
        return tokenizer.apply_chat_template(
            _CONVERSATION,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            strftime_now=_today,
        )
    except Exception as error:  # besides Jinja's own, a template's expressions raise whatever Python's do
        return repr(error)


def _today(form: str) -> str:
    """A date for templates that ask for one, so that midnight makes no difference."""
    return form
