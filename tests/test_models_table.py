"""Families of models against plain transformers: a part of what docs/models.md shows, and the known silent faults."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, LEFT_OUT, make_family
from family_checks import measure, own_logprobs, pairs
from toys import toy_model_folder
from transformers import AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from notus.data.packing import collate
from notus.model.plain import PlainPolicy
from notus.model.supported import disable_dropout
from notus.training.parallelize import build_policy, read_model_config

ROOT = Path(__file__).resolve().parents[1]
# Of each kind one: sliding windows, soft caps, sinks, latent attention, scaled logits, biases, blocks under other
# names, state spaces, a part of a multimodal model, random layers. `python docs/make_models.py --check` measures all.
SOME = [
    "mistral", "gemma2", "gpt_oss", "deepseek_v3", "cohere", "phi", "gpt2", "falcon_h1", "qwen3_next", "gemma3", "opt",
    "phi3/longrope",
]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_a_family_is_what_transformers_computes(name: str, device: torch.device) -> None:
    found = measure(name, device)
    assert not found.faults, found


def test_the_page_has_every_family() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w/.-]+) \| .* \| (packed|plain|refused)(?:: .*)? \|", text, re.MULTILINE)
    shown = dict(rows)
    assert not set(FAMILIES) - set(shown), "run: python docs/make_models.py"
    assert {name: shown[name] for name in FAMILIES} == {name: each.expected_path for name, each in FAMILIES.items()}


def test_every_causal_model_of_transformers_is_a_family_or_left_out_with_a_reason() -> None:
    known = {name.split("/")[0] for name in FAMILIES} | {name for names in LEFT_OUT.values() for name in names}
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 23)
    assert newer or not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known


# ---- what once was trained on wrong numbers, without a word ----

SCALED = """
from transformers import LlamaConfig, LlamaForCausalLM


class ScaledConfig(LlamaConfig):
    model_type = "scaled_llama"


class ScaledLlama(LlamaForCausalLM):
    config_class = ScaledConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3.0
        return output
"""
OWN_ATTENTION = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (repeat_kv(each, self.num_key_value_groups) for each in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), None


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = OwnAttention(config, number)
        self.post_init()
"""


def with_code(folder: Path, code: str, config: str, model: str, model_type: str) -> Path:
    """A folder of a toy Llama whose computation is in a file beside it."""
    toy_model_folder(folder, "llama")
    (folder / "modeling_own.py").write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": f"modeling_own.{config}", "AutoModelForCausalLM": f"modeling_own.{model}"}
    settings |= {"model_type": model_type, "architectures": [model], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def difference(folder: Path, device: torch.device, own: PreTrainedModel, *, trust_remote_code: bool = False) -> float:
    """The largest difference of a log-prob between the policy of a folder, in training mode, and the model's own."""
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    policy = build_policy(
        folder, config, device=device, precision="fp32", trust_remote_code=trust_remote_code, longest=64
    ).train()
    expected = [own_logprobs(own.eval(), examples) for examples in pairs()]
    found = [policy.token_logprobs(collate(examples, 2).to(device)).detach() for examples in pairs()]
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers keep copies of remote code in the test's folder."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_field_of_remote_code_changes_nothing_when_it_is_not_trusted(tmp_path: Path, device: torch.device) -> None:
    make_family("gpt_oss").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert difference(tmp_path, device, make_family("gpt_oss")) < 5e-5


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize(
    ("code", "config", "model", "model_type"),
    [(SCALED, "ScaledConfig", "ScaledLlama", "scaled_llama"), (OWN_ATTENTION, "OwnConfig", "OwnLlama", "own_llama")],
    ids=["scaled", "attention"],
)
def test_remote_code_is_computed_as_it_is_written(
    tmp_path: Path, device: torch.device, code: str, config: str, model: str, model_type: str
) -> None:
    folder = with_code(tmp_path / "model", code, config, model, model_type)
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    own = AutoModelForCausalLM.from_pretrained(folder, **options)
    plain = AutoModelForCausalLM.from_pretrained(toy_model_folder(tmp_path / "plain", "llama"), dtype=torch.float32)
    if code == SCALED:  # the code does something; in the other case, only in a packed row
        examples = pairs()[0]
        assert (own_logprobs(own, examples) - own_logprobs(plain, examples)).abs().max() > 1
    assert difference(folder, device, own, trust_remote_code=True) < 5e-5


@pytest.mark.parametrize("name", ["recurrent_gemma", "opt", "xglm"])
def test_a_soft_cap_under_another_name_and_layers_left_out_at_random(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    make_family(name).save_pretrained(tmp_path)
    assert difference(tmp_path, device, make_family(name)) < 5e-5


def test_experts_are_not_chosen_at_random_in_training() -> None:
    """The router of Phi-3.5-MoE draws them in training mode, and its jitter counts in evaluation mode as well."""
    model, examples = make_family("phimoe"), pairs()[0]
    expected = own_logprobs(model, examples)
    disable_dropout(model)
    policy = PlainPolicy(model).train()
    assert policy.training
    assert not model.training
    assert (policy.token_logprobs(collate(examples, 2)) - expected).abs().max() < 5e-5
