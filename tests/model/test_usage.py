"""What goes beside the weights: the model stops where it learned to, and the tokenizer keeps its templates and ids."""

import json

import pytest
import torch
from tokenizers import processors
from toys import toy_config, toy_model, toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from notus.model.export import export_adapter, export_model, load_causal_lm, read_generation_config
from notus.model.lora import init_lora, inject_lora
from notus.model.usage import (
    chat_templates,
    ends_of,
    generation_config_to_write,
    learned_plain_text,
    set_chat_template,
    tokenizer_difference,
    with_learned_end,
)

CPU = {"dtype": torch.float32, "device": "cpu"}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
NAMED = {"default": PLAIN, "tool_use": "{{ tools | length }} tools" + PLAIN, "rag": "documents" + PLAIN}


def ending_in(token):
    """A tokenizer whose EOS has this id."""
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    assert tokenizer.eos_token_id == token
    return tokenizer


@torch.no_grad()
def says(token, **settings):
    """A model that says this token whatever it reads: its blocks add nothing to embeddings that are all alike."""
    model = toy_model(**settings)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.fill_(1)
    model.lm_head.weight.zero_()
    model.lm_head.weight[token] = 1
    return model


def export(model, folder, tokenizer, **options):
    export_model(model, folder, hf_config=model.config, tokenizer=tokenizer, dtype=torch.float32, **options)
    return folder


def spoken(model, **options):
    """How many tokens transformers generates, of at most 10."""
    return len(model.generate(torch.tensor([[1, 30, 40]]), do_sample=False, max_new_tokens=10, **options)[0]) - 3


def eos_of(folder, file):
    return json.loads((folder / file).read_text()).get("eos_token_id")


@pytest.mark.parametrize(
    ("of_config", "of_base", "config", "generation"),
    [
        (2, None, [2, 8], [2, 8]),  # no generation_config.json: one is made
        (2, GenerationConfig(eos_token_id=2), [2, 8], [2, 8]),
        (2, GenerationConfig(eos_token_id=[5, 2]), [2, 8], [5, 2, 8]),
        (2, GenerationConfig(temperature=0.7), [2, 8], [2, 8]),  # names none: transformers would not look elsewhere
        ([9, 2], GenerationConfig(eos_token_id=8), [9, 2, 8], 8),
        (8, GenerationConfig(eos_token_id=8), 8, 8),
        ([8, 2], GenerationConfig(eos_token_id=[2, 8]), [8, 2], [2, 8]),
        (None, None, 8, 8),
    ],
)
def test_transformers_generates_up_to_the_eos_that_was_learned(tmp_path, of_config, of_base, config, generation):
    model = says(8, eos_token_id=of_config)
    assert spoken(model) == (1 if of_config in (8, [8, 2]) else 10)
    folder = export(model, tmp_path / "out", ending_in(8), generation_config=of_base)
    assert eos_of(folder, "config.json") == config
    assert eos_of(folder, "generation_config.json") == generation
    assert model.config.eos_token_id == of_config  # the caller's is left alone
    assert spoken(AutoModelForCausalLM.from_pretrained(folder)) == 1
    (folder / "generation_config.json").unlink()
    assert spoken(AutoModelForCausalLM.from_pretrained(folder)) == 1


def test_the_tokens_that_ended_the_base_still_end_the_model(tmp_path):
    folder = export(says(2), tmp_path / "out", ending_in(8))
    assert spoken(AutoModelForCausalLM.from_pretrained(folder)) == 1


@pytest.mark.parametrize(
    ("ids", "eos", "wanted"),
    [(2, 8, [2, 8]), (2, 2, 2), ([2, 8], 8, [2, 8]), ([9, 2], 8, [9, 2, 8]), (None, 8, 8), ([], 8, 8)],
)
def test_the_learned_end_joins_the_others(ids, eos, wanted):
    assert with_learned_end(ids, ending_in(eos)) == wanted


def test_a_tokenizer_without_eos_adds_none():
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    assert with_learned_end(2, tokenizer) == 2


def test_a_generation_config_that_is_made_has_bos_and_padding():
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = "<unk>"
    config = toy_config(bos_token_id=None, pad_token_id=None)
    made = generation_config_to_write(None, config, tokenizer)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, 0)
    kept = generation_config_to_write(GenerationConfig(temperature=0.5), config, tokenizer)
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id, kept.temperature) == (None, 2, None, 0.5)


def adapter_of(base, folder, tokenizer):
    """An adapter that changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], rslora=False)
    init_lora(model, seed=0)
    export_adapter(model, folder, base_model_name_or_path=str(base), tokenizer=tokenizer)
    return folder


def test_an_adapter_says_where_it_stops_although_peft_asks_its_base(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    says(8).save_pretrained(tmp_path / "base")
    folder = adapter_of(tmp_path / "base", tmp_path / "adapter", ending_in(8))
    said = capsys.readouterr().out
    assert "(8), but its base's generation config stops at 2, and PEFT and transformers read that one" in said
    assert f"GenerationConfig.from_pretrained('{folder}')" in said
    learned = GenerationConfig.from_pretrained(folder)
    assert learned.eos_token_id == [2, 8]
    for theirs in (
        peft.AutoPeftModelForCausalLM.from_pretrained(folder),
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert spoken(theirs) == 10  # they read the base's: should this change, the note can go
        assert spoken(theirs, generation_config=learned) == 1


def test_an_adapter_that_ends_as_its_base_does_says_nothing(tmp_path, capsys):
    says(2).save_pretrained(tmp_path / "base")
    folder = adapter_of(tmp_path / "base", tmp_path / "adapter", toy_tokenizer())
    assert capsys.readouterr().out == ""
    assert read_generation_config(folder).eos_token_id == 2


def test_a_merged_adapter_stops_where_it_learned_to(tmp_path):
    says(8).save_pretrained(tmp_path / "base")
    folder = adapter_of(tmp_path / "base", tmp_path / "adapter", ending_in(8))
    merged, tokenizer = load_causal_lm(folder, **CPU)
    export(merged, tmp_path / "out", tokenizer)
    assert eos_of(tmp_path / "out", "config.json") == eos_of(tmp_path / "out", "generation_config.json") == [2, 8]
    assert spoken(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("before", "trained", "after"),
    [
        (None, "NEW", "NEW"),
        ("old", "NEW", "NEW"),
        ("old", {"default": "NEW"}, "NEW"),
        (NAMED, "NEW", {**NAMED, "default": "NEW"}),
        (NAMED, {"default": "NEW", "tool_use": "TOO"}, {**NAMED, "default": "NEW", "tool_use": "TOO"}),
        ({"rag": "r"}, "NEW", {"rag": "r", "default": "NEW"}),
        # one that writes tools was used for conversations with tools, too
        (NAMED, "{{ tools }}", {**NAMED, "default": "{{ tools }}", "tool_use": "{{ tools }}"}),
        ("old", "{{ tools }}", "{{ tools }}"),
    ],
)
def test_the_trained_template_leaves_the_others(before, trained, after):
    tokenizer = toy_tokenizer(chat_template=before)
    set_chat_template(tokenizer, trained)
    assert tokenizer.chat_template == after


def test_templates_by_name():
    assert chat_templates(toy_tokenizer()) == {}
    assert chat_templates(toy_tokenizer(chat_template="one")) == {"default": "one"}
    assert chat_templates(toy_tokenizer(chat_template=NAMED)) == NAMED


def conversation_ids(tokenizer, **options):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("adapter", [False, True])
def test_all_named_templates_are_exported(tmp_path, adapter):
    base = toy_model_folder(tmp_path / "base")
    toy_tokenizer(chat_template=dict(NAMED)).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = "{{ bos_token }}" + PLAIN
    set_chat_template(tokenizer, trained)
    folder = tmp_path / "out"
    if adapter:
        adapter_of(base, folder, tokenizer)
    else:
        export(toy_model(), folder, tokenizer)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == {**NAMED, "default": trained}
    tools = [{"type": "function", "function": {"name": "f"}}]
    eos = [2]
    ours = toy_tokenizer(bos=False)
    turns = [*ours("[user]hello").input_ids, *eos, *ours("[assistant]yes").input_ids, *eos]
    assert conversation_ids(read) == conversation_ids(tokenizer) == [1, *turns]
    with_tools = [*ours("1 tools[user]hello").input_ids, *turns[len(ours("[user]hello").input_ids) :]]
    assert conversation_ids(read, tools=tools) == conversation_ids(tokenizer, tools=tools) == with_tools
    assert conversation_ids(read, chat_template="rag") == conversation_ids(tokenizer, chat_template="rag")


def test_a_template_that_reaches_the_disk_altered_is_not_published(tmp_path, monkeypatch):
    tokenizer = toy_tokenizer(chat_template=dict(NAMED))
    save = tokenizer.save_pretrained

    def damaged(folder):
        save(folder)
        (folder / "additional_chat_templates" / "rag.jinja").write_text(PLAIN)

    monkeypatch.setattr(tokenizer, "save_pretrained", damaged)
    with pytest.raises(ValueError, match="not what was written: the chat template 'rag'"):
        export(toy_model(), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_differences_of_a_tokenizer_are_named():
    tokenizer = toy_tokenizer(chat_template=PLAIN)
    assert tokenizer_difference(tokenizer, toy_tokenizer(chat_template=PLAIN)) is None
    assert tokenizer_difference(tokenizer, toy_tokenizer(chat_template=PLAIN, vocab_size=399)) == "the vocabulary"
    assert tokenizer_difference(tokenizer, toy_tokenizer()) == "the chat template 'default'"
    other = ending_in(8)
    other.chat_template = PLAIN
    assert tokenizer_difference(tokenizer, other) == "bos_token or eos_token"
    other = toy_tokenizer(chat_template=PLAIN)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert tokenizer_difference(tokenizer, other) == "the ids of a string"


def test_a_template_may_have_any_line_ends_dates_and_refusals(tmp_path):
    for template in (
        "{% for m in messages %}\r\n{{ m.content }}\r{% endfor %}",
        "{{ strftime_now('%d %b %Y') }}" + PLAIN,
        "{{ raise_exception('a system turn is needed') }}",
        "{{ messages[0].tool_calls[0].name }}",
    ):
        folder = export(toy_model(), tmp_path / "out", toy_tokenizer(chat_template=template))
        read = AutoTokenizer.from_pretrained(folder).chat_template
        assert read.splitlines() == template.splitlines()


def test_only_plain_text_beside_a_template_is_noted(tmp_path):
    chat, text = toy_tokenizer(chat_template=PLAIN), toy_tokenizer()
    assert learned_plain_text(export(toy_model(), tmp_path / "a", chat, plain_text=True))
    assert not learned_plain_text(export(toy_model(), tmp_path / "a", chat))  # replaced, whole
    assert not learned_plain_text(export(toy_model(), tmp_path / "b", text, plain_text=True))
    assert not (tmp_path / "b" / "notus.json").exists()
    path = tmp_path / "b" / "notus.json"
    path.write_text('{"string_prompts": "turns"}')
    with pytest.raises(ValueError, match=r"notus\.json: holds .* not .*; restore or remove it"):
        learned_plain_text(tmp_path / "b")


def test_a_config_of_ones_own_may_name_no_end():
    config = PreTrainedConfig()
    assert not hasattr(config, "eos_token_id")
    assert ends_of(None, config) is None
    assert ends_of(GenerationConfig(eos_token_id=[5]), config) == [5]
    assert generation_config_to_write(None, config, ending_in(8)).eos_token_id == 8
