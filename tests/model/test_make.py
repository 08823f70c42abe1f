"""Which class a configuration is for, what of it is text, and that the attention it asks for is not obeyed."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, make_family
from toys import logits, toy_config, toy_model, toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from notus.model.export import export_model, load_causal_lm
from notus.model.make import auto_class_of, make_model, read_config
from notus.model.structure import text_parameters


def on_meta(config: PreTrainedConfig, attention: str | None = None) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return make_model(config, trust_remote_code=False, attn_implementation=attention, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "architectures", "kind"),
    [
        ("mistral", None, "MistralForCausalLM"),
        ("gemma3_text", None, "Gemma3ForCausalLM"),
        ("gemma3", None, "Gemma3ForConditionalGeneration"),
        ("mistral3", None, "Mistral3ForConditionalGeneration"),
        ("qwen2_5_vl", None, "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_vl", None, "Qwen3VLForConditionalGeneration"),
        ("llama4", None, "Llama4ForConditionalGeneration"),
        ("llama4", ["Llama4ForConditionalGeneration"], "Llama4ForConditionalGeneration"),
        ("llama4", ["Llama4ForCausalLM"], "Llama4ForCausalLM"),
        ("qwen3_5", None, "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
    ],
)
def test_the_class_holds_every_weight_of_a_checkpoint(name: str, architectures: list[str] | None, kind: str) -> None:
    config = FAMILIES[name].config()
    config.architectures = architectures
    before = copy.deepcopy(config)
    model = on_meta(config, "eager")
    assert type(model).__name__ == kind
    assert model.config._attn_implementation == model.config.get_text_config()._attn_implementation == "eager"
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == before._attn_implementation


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.CLIPTextConfig(),
            "no causal language model of type 'clip_text_model'; take another model, or set",
        ),
        (transformers.Pix2StructConfig(), "Pix2StructForConditionalGeneration has no text decoder with a head"),
        (transformers.Florence2Config(), "Florence2ForConditionalGeneration has no text decoder with a head"),
    ],
)
def test_a_model_that_does_not_continue_text_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(config)


def test_code_that_is_not_trusted_does_not_choose_the_class() -> None:
    config = FAMILIES["llama4"].config()
    config.auto_map = {"AutoModelForCausalLM": "stranger.Model"}
    assert auto_class_of(config) is AutoModelForImageTextToText
    assert auto_class_of(config, trust_remote_code=True) is AutoModelForCausalLM


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl_moe", "llama4", "qwen3_5", "smolvlm"])
def test_the_text_parameters_of_a_multimodal_model_are_those_that_text_reaches(name: str) -> None:
    model = make_family(name)
    model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 12, 13, 14]])).logits.square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    text = text_parameters(model)
    assert reached <= text
    experts_or_all = {name for name in text - reached if "experts" not in name}
    assert experts_or_all <= {"lm_head.weight"}  # its other name, where it is tied
    assert not [name for name in text if "vision" in name or "visual" in name or "connector" in name]
    assert len(text) < len(list(model.named_parameters()))


def test_every_parameter_of_a_text_model_is_text() -> None:
    model = toy_model(tie_word_embeddings=True)
    assert text_parameters(model) == {*dict(model.named_parameters()), "lm_head.weight"}


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_the_attention_that_a_config_asks_for_is_not_obeyed(key: str, tmp_path: Path) -> None:
    folder = toy_model_folder(tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "flash_attention_2"}))
    model, _ = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(model), logits(toy_model()))
    config = read_config(folder)
    assert type(on_meta(config)).__name__ == "MistralForCausalLM"
    export_model(model, tmp_path / "out", hf_config=config, tokenizer=toy_tokenizer(), dtype=torch.float32)
    assert "attn" not in (tmp_path / "out" / "config.json").read_text()


def test_a_configs_parts_forget_their_attention_too(tmp_path: Path) -> None:
    config = FAMILIES["gemma3"].config()
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["_attn_implementation"] = content["vision_config"]["_attn_implementation"] = "eager"
    path.write_text(json.dumps({**content, "_attn_implementation": "flash_attention_2"}))
    found = read_config(tmp_path)
    parts = (found, found.text_config, found.vision_config)
    assert [part._attn_implementation for part in parts] == [None] * 3


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match=r"config\.json: not the configuration of a model \(.*\); compare it with"):
        read_config(tmp_path)
    toy_config().save_pretrained(tmp_path)
    assert read_config(tmp_path).model_type == "mistral"
