"""Which path a model takes, and what the check at load finds."""

import json

import pytest
import torch
import transformers
from families import make_family
from toys import toy_config, toy_model
from transformers.models.mistral.modeling_mistral import MistralMLP

from notus.model import policy as policies
from notus.model import verify
from notus.model.structure import blocks_of, text_config
from notus.model.verify import choose_path

SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(verify, "_cache", {})


def phi3(**settings):
    return transformers.Phi3Config(
        **{**SMALL, "max_position_embeddings": 4096}, original_max_position_embeddings=64,
        rope_parameters=dict(LONG_ROPE), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma", "opt"])
def test_what_the_packed_path_expresses_is_packed(kind):
    assert choose_path(toy_config(kind)).name == "packed"


def test_a_state_space_model_is_plain():
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8)
    found = choose_path(config)
    assert found.name == "plain"
    assert found.reason == "block 0 (MambaBlock) does not attend through packed attention"


def test_a_head_that_the_policy_forgets_is_found(monkeypatch):
    """As a soft cap under a name that nobody knows would be."""
    whole = policies.Policy._token_logprobs
    monkeypatch.setattr(policies.Policy, "_token_logprobs", lambda self, batch: 1.01 * whole(self, batch))
    assert choose_path(toy_config("llama")).name == "plain"


def test_a_gradient_that_is_off_is_found(monkeypatch):
    whole = policies.Policy._token_logprobs

    def detached(self, batch):
        found = whole(self, batch)
        return found.detach() + 0.99 * (found - found.detach())

    monkeypatch.setattr(policies.Policy, "_token_logprobs", detached)
    found = choose_path(toy_config("llama"))
    assert "gradient" in found.reason


def test_asking_for_packed_where_it_is_wrong_is_an_error():
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8)
    with pytest.raises(ValueError, match=r"^model.path is 'packed', but for 'mamba' .*set model.path=auto"):
        choose_path(config, wanted="packed")


def test_asking_for_plain_gives_plain_without_a_reason():
    found = choose_path(toy_config("llama"), wanted="plain")
    assert (found.name, found.reason) == ("plain", None)


def test_frequencies_that_change_beyond_a_context_matter_where_the_data_get_there():
    assert choose_path(phi3(), longest=64).name == "packed"
    beyond = choose_path(phi3(), longest=65)
    assert beyond.name == "plain"
    assert not beyond.padded  # a longer sequence beside it would change a shorter one's frequencies


def test_windows_are_tried_where_the_data_fill_them():
    assert choose_path(toy_config("mistral", sliding_window=64), longest=200).name == "packed"


def test_a_model_that_sees_later_tokens_is_an_error():
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="'bert' is not causal as it is configured"):
        choose_path(config)


def test_what_is_random_in_training_does_not_run(monkeypatch):
    monkeypatch.setattr(verify, "disable_dropout", lambda model: None)
    assert choose_path(toy_config("mistral", attention_dropout=0.5)).name == "packed"


def test_a_forward_pass_that_is_random_is_an_error(monkeypatch):
    forward = MistralMLP.forward
    monkeypatch.setattr(MistralMLP, "forward", lambda self, x: forward(self, x) * (1 + torch.rand(1)))
    with pytest.raises(ValueError, match=r"its own forward pass is not the same|is not causal"):
        choose_path(toy_config("mistral", rms_norm_eps=1e-7), wanted="plain")


def test_the_check_draws_from_nobodys_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    choose_path(toy_config("qwen2"))
    assert torch.equal(torch.rand(3), expected)


def test_the_config_stays_as_it_is():
    config = phi3()
    before = json.dumps(config.to_dict(), default=str)
    choose_path(config, longest=4096)
    assert json.dumps(config.to_dict(), default=str) == before


def test_the_copy_of_a_large_model_is_small_and_has_every_kind_of_layer():
    config = transformers.Gemma3TextConfig()  # 26 layers, the 6th attends to everything
    copies = verify._copies(config, 8192, False)
    assert [len(blocks_of(verify.new_model(each, "eager", False, torch.float32, "meta"))) for each in copies] == [6] * 3
    assert copies[0].layer_types == config.layer_types[:6]
    sizes = [
        sum(each.numel() for each in verify.new_model(copy, "eager", False, torch.float32, "meta").parameters())
        for copy in copies
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.05 * sum(each.numel() for each in verify.new_model(
        config, "eager", False, torch.float32, "meta").parameters())  # fmt: skip
    assert text_config(copies[0]).sliding_window < 10 < config.sliding_window


def test_what_cannot_be_tried_is_plain(monkeypatch):
    monkeypatch.setattr(verify, "MOST", 1000)
    found = choose_path(toy_config("llama"))
    assert (found.name, found.attention, found.padded) == ("plain", "eager", False)
    assert "no copy of it is small enough" in found.reason
    with pytest.raises(ValueError, match="no copy of it is small enough"):
        choose_path(toy_config("llama"), wanted="packed")


def test_a_copy_whose_forward_pass_fails_is_not_used(monkeypatch):
    """Narrow layers may be built and still not fit each other."""
    whole = verify._cut_heads
    monkeypatch.setattr(verify, "SMALL", 0)

    def cut(config):
        whole(config)
        config.intermediate_size = 0

    monkeypatch.setattr(verify, "_cut_heads", cut)
    assert choose_path(toy_config("llama")).name == "packed"


def test_tokens_of_a_cut_vocabulary_exist():
    config = transformers.LlamaConfig(vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128009])
    assert choose_path(config).name == "packed"


def test_the_toy_is_expressed_at_once(monkeypatch):
    """A second run of the same model in one process does not try again."""
    tried = []
    inner = verify._choose
    monkeypatch.setattr(verify, "_choose", lambda *args: tried.append(1) or inner(*args))
    config = toy_model("mistral").config
    assert choose_path(config) == choose_path(config)
    assert tried == [1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mamba", {"backbone.layers.*.mixer.dt_proj"}),  # the model reads its weight without calling it
        ("falcon_mamba", {"backbone.layers.*.mixer.dt_proj"}),
        ("jamba", {"model.layers.*.mamba.dt_proj"}),
        ("longcat_flash", {"model.layers.*.mlp.router.classifier"}),
        # it only chooses tokens, and a choice has no gradient
        ("deepseek_v32", {f"model.layers.*.self_attn.indexer.{each}" for each in ("wq_b", "wk", "weights_proj")}),
        ("llama", set()),
        ("mixtral", set()),
        ("gemma3", set()),
    ],
)
def test_linear_layers_that_do_not_act_are_found(name, expected):
    assert choose_path(make_family(name).config).idle == expected


def test_of_layers_that_act_in_some_blocks_the_others_are_named():
    """Each of Zamba2's shared blocks has an adapter for every place where the block stands, and uses one."""
    of_block = "model.layers.{}.shared_transformer.feed_forward.gate_up_proj_adapter_list.{}.{}"
    expected = {of_block.format(block, place, part) for block, place in ((1, 1), (3, 0)) for part in (0, 1)}
    assert choose_path(make_family("zamba2").config).idle == expected


def test_a_cut_copy_finds_the_layers_of_every_block():
    config = transformers.MambaConfig(vocab_size=80_000, hidden_size=256, num_hidden_layers=5, state_size=8)
    assert choose_path(config).idle == {"backbone.layers.*.mixer.dt_proj"}


def test_an_expert_without_a_token_counts_as_acting():
    class Experts(transformers.MistralForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
            self.model.layers[0].mlp.unused = torch.nn.Linear(32, 32)

    assert verify._idle(Experts(toy_config("mistral")), set(), exact=False) >= {"model.layers.*.mlp.unused"}
    assert "model.layers.*.mlp.experts.*" not in verify._idle(Experts(toy_config("mistral")), set(), exact=False)
