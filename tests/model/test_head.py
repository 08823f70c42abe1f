"""The heads of many families against the logits of their own forward."""

import pytest
import torch
import transformers
from test_policy_families import FAMILIES, SHAPE, family
from torch import nn
from toys import toy_model
from transformers import AutoModelForCausalLM

from notus.model.head import Head, head_of
from notus.model.structure import decoder_of


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_heads_logits_are_the_models_own(name):
    model = family(*FAMILIES[name])
    ids = torch.randint(3, 400, (2, 7), generator=torch.Generator().manual_seed(0))
    hidden = decoder_of(model)(input_ids=ids)[0]
    torch.testing.assert_close(head_of(model).logits(hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        ("gemma2", 1.0, 3.0),
        ("granite", 2.0, None),  # divided by 0.5
        ("granite, experts", 2.0, None),
        ("hyperclova x", 2.5, None),  # multiplied
        ("cohere", 2.5, None),
        ("minicpm3", 0.25, None),  # 8 / 32
        ("nanochat", 1.0, 3.0),
        ("phi", 1.0, None),
    ],
)
def test_what_a_head_does(name, scale, softcap):
    model = family(*FAMILIES[name])
    head = head_of(model)
    assert head == Head(model.get_output_embeddings(), scale, softcap)
    assert (head.linear.bias is not None) == (name == "phi")


def test_falcon_h1_multiplies_and_recurrentgemma_caps():
    shape = {**SHAPE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = family("FalconH1Config", {**shape, "lm_head_multiplier": 0.3})
    assert (head_of(model).scale, head_of(model).softcap) == (0.3, None)
    model = family("RecurrentGemmaConfig", {"lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 7.0})
    assert (head_of(model).scale, head_of(model).softcap) == (1.0, 7.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"logit_scale": 0.5}, "its logit_scale is 0.5, and whether it multiplies or divides is unknown"),
        ({"logits_scaling": 2}, "its logits_scaling is 2"),
        ({"final_logit_softcapping": 0.0}, r"it caps its logits at \[0.0\]"),
        ({"final_logit_softcapping": 2.0, "logits_soft_cap": 3.0}, r"it caps its logits at \[2.0, 3.0\]"),
        ({"unpadded_vocab_size": 300}, "it cuts its vocabulary"),
    ],
)
def test_a_setting_whose_meaning_is_unknown_is_refused(settings, told):
    model = toy_model(**settings)
    with pytest.raises(ValueError, match=f"MistralForCausalLM: its output head is not understood: {told}"):
        head_of(model)


def test_a_setting_that_changes_nothing_is_let_pass():
    assert head_of(toy_model(logit_scale=1.0, logits_scaling=1, final_logit_softcapping=None)).scale == 1.0


def test_what_stands_between_decoder_and_head_is_refused():
    model = toy_model()
    model.transform = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="transform may stand between it and the decoder"):
        head_of(model)
    shape = {**SHAPE, "is_decoder": True}
    for kind in ("BertConfig", "ModernBertDecoderConfig"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**shape))
        with pytest.raises(ValueError, match="its output head is not understood"):
            head_of(model)


def test_a_head_by_hand():
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [2.0]]))
        linear.bias.copy_(torch.tensor([1.0, 0.0]))
    hidden = torch.tensor([[3.0]])
    assert Head(linear).logits(hidden).tolist() == [[4.0, 6.0]]
    assert Head(linear, scale=0.5).logits(hidden).tolist() == [[2.0, 3.0]]
    capped = 4 * torch.tanh(torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(Head(linear, scale=0.5, softcap=4.0).logits(hidden), capped)
