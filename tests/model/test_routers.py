"""The routers' loss beside transformers' own, alone and packed, in every mode of checkpointing; and routers' noise."""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from toys import toy_examples
from transformers import AutoModelForCausalLM, PreTrainedModel

from notus.data.packing import Batch, Example, collate
from notus.model.attention import IMPLEMENTATION
from notus.model.lora import init_lora, inject_lora, lora_layers
from notus.model.policy import Policy
from notus.model.routers import Routers, check_routers
from notus.model.supported import disable_dropout
from notus.training import activation_checkpointing as checkpointing
from notus.training.activation_checkpointing import MODES, checkpointed

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "pad_token_id": None, "sliding_window": None,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
FAMILIES = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "Phimoe", "FlexOlmo"]


def toy_mixture(kind: str, *, experts: str = "eager", **overrides: object) -> PreTrainedModel:
    """A mixture of experts whose matrices are scaled up, so that routers and predictions are far from uniform."""
    made = getattr(transformers, f"{kind}Config")
    default = made()
    settings = {name: value for name, value in (SHAPE | overrides).items() if hasattr(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**settings), dtype=torch.float32, experts_implementation=experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    disable_dropout(model)
    return model


def policy_of(model: PreTrainedModel) -> Policy:
    model.set_attn_implementation(IMPLEMENTATION)
    return Policy(model).train()


def read(policy: Policy, routers: Routers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with routers.reading():
        logps = policy(batch)
    return logps, routers.losses(batch)


def sequence(example: Example) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([example.trunk, *example.branches]))[None]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_of_one_sequence_is_transformers_own(kind: str) -> None:
    """Layer by layer; transformers pools its layers, which is the same where there is one."""
    model = toy_mixture(kind)
    own = importlib.import_module(type(model).__module__).load_balancing_loss_func
    model.set_attn_implementation("eager")
    example = toy_examples((5, (4,)))[0]
    logits = model(sequence(example), output_router_logits=True).router_logits
    if logits is None:  # GraniteMoe in transformers 5.17
        pytest.skip("this version of transformers does not give the logits")
    expected = torch.stack([own((layer,), 4, 2) for layer in logits]).mean()
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    policy = policy_of(model)
    _, found = read(policy, Routers(model), collate([example], 1))
    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert gradients
    for name, each in model.named_parameters():
        if name in gradients and "head" not in name:
            torch.testing.assert_close(each.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    """Two tokens, three experts, one each: both go to the first. f = (2/2, 0, 0), so the loss is 3 * mean of P_0."""
    from notus.model.routers import _balance

    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    experts = torch.tensor([[0], [0], [1]])
    found = _balance(logits, experts, torch.tensor([0, 0, 1]), 2)
    first = 3 * (np.e**2 / (np.e**2 + 2) + np.e / (np.e + 2)) / 2
    torch.testing.assert_close(found, torch.tensor([first, 1.0], dtype=torch.float32))  # even: one expert a token


def losses_and_gradients(policy: Policy, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> tuple:
    policy.zero_grad()
    routers, found = Routers(policy.causal_lm), torch.zeros(len(examples))
    for row in rows:
        batch = collate([examples[place] for place in row], max(len(each.branches) for each in examples))
        logps, losses = read(policy, routers, batch)
        (0.1 * losses.sum() + 0.01 * logps.sum()).backward()
        found[list(row)] = losses.detach()
    return found, {name: each.grad.clone() for name, each in policy.named_parameters() if each.grad is not None}


LENGTHS = {
    "pairs": [(5, (4, 6)), (3, (7, 2)), (9, (1, 5))],
    "lists": [(5, (4, 6, 1, 3)), (3, (7,)), (9, (1, 5, 2))],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "GptOss", "DeepseekV2"])
def test_packed_is_alone(kind: str, lengths: str) -> None:
    policy = policy_of(toy_mixture(kind))
    examples = toy_examples(*LENGTHS[lengths])
    packed, gradients = losses_and_gradients(policy, examples, [[0, 1, 2]])
    alone, expected = losses_and_gradients(policy, examples, [[2], [0], [1]])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert (packed - packed.mean()).abs().max() > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_sequences_one_by_one_are_the_packed_row() -> None:
    """As the model's own forward runs them: trunk and branch, the trunk again for each branch."""
    model = toy_mixture("Mixtral")
    policy, routers = policy_of(model), Routers(model)
    examples = toy_examples((5, (4, 6, 2)), (3, (7, 2)), (4, (1,)))
    batch = collate(examples, 3)
    _, packed = read(policy, routers, batch)
    model.set_attn_implementation("eager")
    with routers.reading():
        for example in examples:
            for branch in example.branches:
                model(torch.from_numpy(np.concatenate([example.trunk, branch]))[None])
    torch.testing.assert_close(routers.losses(batch), packed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_every_mode_of_checkpointing_and_of_experts_gives_the_same(experts: str) -> None:
    examples, found = toy_examples((5, (4, 6)), (3, (7, 2))), {}
    reference = losses_and_gradients(policy_of(toy_mixture("Qwen2Moe")), examples, [[0, 1]])
    for mode in MODES:
        policy = policy_of(toy_mixture("Qwen2Moe", experts=experts))
        for block in policy.causal_lm.model.layers:
            block.forward = checkpointed(block, mode)
        found[mode] = losses_and_gradients(policy, examples, [[0, 1]])
    for losses, gradients in found.values():
        torch.testing.assert_close(losses, reference[0], rtol=1e-5, atol=1e-6)
        assert gradients.keys() == reference[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, reference[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "noise"), [("Mixtral", {"router_jitter_noise": 0.3}), ("Phimoe", {"input_jitter_noise": 0.3})]
)
def test_routers_choose_in_training_as_in_evaluation(kind: str, noise: dict[str, float]) -> None:
    policy, batch = policy_of(toy_mixture(kind, **noise)), collate(toy_examples((5, (4, 6))), 2)
    torch.manual_seed(1)
    trained = policy.train()(batch)
    assert torch.equal(trained, policy.eval()(batch))
    assert torch.equal(trained, policy.train()(batch))


def test_models_without_such_routers_are_refused() -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef has no effect: MistralForCausalLM has no routers"):
        check_routers(transformers.MistralConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"DeepseekV3TopkRouter.*balanced by a bias"):
        check_routers(toy_mixture("DeepseekV3").config)


def test_adapters_leave_stacked_experts_frozen() -> None:
    """Experts are parameters of three dimensions, no linear layers, and PEFT takes shared experts for parts of them."""
    model = toy_mixture("Qwen2Moe")
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"set lora.target_modules=\[k_proj, o_proj, q_proj, v_proj\]"):
        inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=attention)
    init_lora(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(0.1)
    policy = policy_of(model)
    adapted = {name.rpartition(".")[2] for name in lora_layers(model)}
    assert adapted == set(attention)

    examples = toy_examples((5, (4, 6)), (3, (7, 2)))
    packed, gradients = losses_and_gradients(policy, examples, [[0, 1]])
    alone, expected = losses_and_gradients(policy, examples, [[0], [1]])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["products", "selective"])
def test_checkpointing_keeps_the_products_of_experts(mode: str) -> None:
    """Of q, k, v, o, the router, and the experts' two: all, or every second from the first."""
    policy = policy_of(toy_mixture("Mixtral", experts="grouped_mm", num_hidden_layers=1))
    block, batch = policy.causal_lm.model.layers[0], collate(toy_examples((5, (4, 6))), 2)
    kept, forward = checkpointing._Kept(mode, "0"), block.forward

    def keeping(*args: object, **kwargs: object) -> object:
        with checkpointing._Keep(kept):
            return forward(*args, **kwargs)

    block.forward = keeping
    policy(batch)
    shapes = [tuple(value.shape) for value in kept.values.values() if isinstance(value, torch.Tensor)]
    # 15 tokens of width 32, keys of 16; 4 experts of width 48, each token to two of them
    products = [(15, 32), (15, 16), (15, 16), (15, 32), (15, 4), (30, 96), (30, 32)]
    assert shapes == (products if mode == "products" else products[::2])


def test_a_router_that_is_a_linear_layer_takes_no_adapter() -> None:
    model = toy_mixture("Phimoe")
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
