"""A packed row through the policy against each sequence alone through the plain transformers model."""

import copy

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from toys import relative, toy_example, toy_model

from notus.data.packing import collate
from notus.model.attention import IMPLEMENTATION
from notus.model.fused import fuse
from notus.model.plain import PlainPolicy
from notus.model.policy import Policy

# name: (kind, overrides of the toy config, which has 4 query and 2 key/value heads)
MODELS = {
    "mistral": ("mistral", {}),
    "mistral, window below the trunks": ("mistral", {"sliding_window": 5}),
    "mistral, window between": ("mistral", {"sliding_window": 16}),
    "mistral, one key head, tied": ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama, as many key heads, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, a window that it has no use for": ("llama", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
}


def pairs(seed=0):
    """Long and one-token trunks, one-token branches, holes in a mask, a branch without a loss token."""
    rng = np.random.default_rng(seed)
    return [
        toy_example(rng, 0, 13, [5, 9]),
        toy_example(rng, 1, 1, [3, 1]),
        toy_example(rng, 2, 7, [6, 2], [[1, 1, 0, 0, 0, 1], [0, 1]]),
        toy_example(rng, 3, 4, [2, 3], [[0, 0], [1, 1, 1]]),
        toy_example(rng, 4, 20, [1, 14]),
    ]


def policy_of(model, fused=True):
    packed = copy.deepcopy(model)
    packed.set_attn_implementation(IMPLEMENTATION)
    if fused:
        fuse(packed)
    return Policy(packed)


def logps_alone(model, examples):
    """[E, K]: each conversation through the whole model by itself, with all its logits."""
    model.set_attn_implementation("eager")
    return torch.stack([torch.stack(conversation_logps(model, item)) for item in examples])


def conversation_logps(model, item):
    sums = []
    for branch, mask in zip(item.branches, item.loss_masks, strict=True):
        ids = torch.from_numpy(np.concatenate([item.trunk, branch]))
        logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        of_tokens = logps.gather(-1, ids[1:, None]).squeeze(-1)
        learned = np.concatenate([np.zeros(len(item.trunk), dtype=bool), mask])[1:]
        sums.append(of_tokens[torch.from_numpy(learned)].sum())
    return sums


def gradients(model, logps):
    """Of a sum with a different weight on every branch, by parameter name."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_each_sequence_alone(name, fused):
    kind, overrides = MODELS[name]
    model = toy_model(kind, **overrides)
    policy, examples = policy_of(model, fused), pairs()
    found, expected = policy(collate(examples, 2)), logps_alone(model, examples)
    assert found.shape == (5, 2)
    assert found.dtype == torch.float32
    assert found[3, 0] == expected[3, 0] == 0  # nothing is learned there
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    packed, plain = gradients(policy.causal_lm, found), gradients(model, expected)
    assert packed.keys() == plain.keys()
    for parameter, gradient in plain.items():
        assert relative(packed[parameter], gradient) < 1e-5, parameter


@pytest.mark.parametrize("num_branches", [1, 2, 3, 4])
def test_any_number_of_branches(num_branches):
    rng = np.random.default_rng(num_branches)
    examples = [toy_example(rng, n, trunk, rng.integers(1, 9, num_branches)) for n, trunk in enumerate([6, 1, 11])]
    model = toy_model("mistral", sliding_window=7)
    policy = policy_of(model)
    found, expected = policy(collate(examples, num_branches)), logps_alone(model, examples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    packed, plain = gradients(policy.causal_lm, found), gradients(model, expected)
    assert all(relative(packed[parameter], plain[parameter]) < 1e-5 for parameter in plain)


# rows of 1 to 4 lists: a trunk and 1 to 8 branches; where lists differ in length, every branch has a token to learn
lists = st.lists(
    st.tuples(st.integers(1, 14), st.lists(st.integers(1, 9), min_size=1, max_size=8)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", ["mistral, window below the trunks", "qwen3"])
@fuzz(12)
@given(row=lists, seed=st.integers(0, 99))
def test_lists_of_different_length_are_each_sequence_alone(name, row, seed):
    rng, (kind, overrides) = np.random.default_rng(seed), MODELS[name]
    examples = []
    for number, (trunk, branches) in enumerate(row):
        masks = [rng.integers(0, 2, length) for length in branches]
        for mask in masks:
            mask[rng.integers(len(mask))] = 1
        examples.append(toy_example(rng, number, trunk, branches, masks))
    most = max(len(branches) for _, branches in row)
    model = toy_model(kind, **overrides)
    policy, batch = policy_of(model), collate(examples, most)
    model.set_attn_implementation("eager")
    alone = [conversation_logps(model, item) for item in examples]
    expected = torch.stack([torch.stack([*sums, *[torch.zeros(())] * (most - len(sums))]) for sums in alone])
    found = policy(batch)
    assert batch.present.tolist() == [[place < len(sums) for place in range(most)] for sums in alone]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    packed, plain = gradients(policy.causal_lm, found * weights), gradients(model, expected * weights)
    floor = 1e-6 * max(gradient.norm() for gradient in plain.values())  # of one token, queries and keys have none
    for parameter, gradient in plain.items():
        assert (packed[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + floor, parameter


def test_the_statistics_of_lists_are_each_sequence_alone():
    rng = np.random.default_rng(0)
    examples = [toy_example(rng, 0, 6, [3, 1, 4]), toy_example(rng, 1, 2, [5]), toy_example(rng, 2, 4, [2, 2])]
    model = toy_model()
    expected = []
    for item in examples:
        for branch in item.branches:
            ids = torch.from_numpy(np.concatenate([item.trunk, branch]))
            logits = model(input_ids=ids[None]).logits[0, len(item.trunk) - 1 : -1].detach().double()
            expected.append(torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1))
    for policy in (policy_of(model), PlainPolicy(copy.deepcopy(model))):
        batch = collate(examples, 3)
        logps, collisions = policy.token_statistics(batch)
        assert (logps.requires_grad, collisions.requires_grad, collisions.dtype) == (True, False, torch.float32)
        torch.testing.assert_close(collisions, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(logps, policy.token_logprobs(batch))


def test_without_a_trunk_the_conversation_starts_with_the_branch():
    rng = np.random.default_rng(0)
    examples = [toy_example(rng, 0, 0, [4, 6]), toy_example(rng, 1, 3, [2, 2]), toy_example(rng, 2, 0, [1, 5])]
    model = toy_model()
    found = policy_of(model)(collate(examples, 2))
    torch.testing.assert_close(found, logps_alone(model, examples), rtol=1e-5, atol=1e-5)
    assert found[2, 0] == 0  # a lone first token is not predicted


@torch.no_grad()
def test_the_order_and_company_of_examples_in_a_row_do_not_matter():
    examples, policy = pairs(), policy_of(toy_model("qwen2"))
    together = policy(collate(examples, 2))
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(
        policy(collate([examples[place] for place in order], 2)), together[order], rtol=1e-5, atol=1e-5
    )
    alone = torch.cat([policy(collate([item], 2)) for item in examples])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_bf16_is_no_worse_against_fp32_than_the_plain_path(kind, fused):
    model = toy_model(kind, seed=2, scale=2.0).bfloat16()
    examples = [item for seed in range(4) for item in pairs(seed)]
    exact = copy.deepcopy(model).float()
    expected = logps_alone(exact, examples)
    plain, packed = logps_alone(model, examples), policy_of(model, fused)
    found = packed(collate(examples, 2))
    assert found.dtype == torch.float32
    # Both errors are sums of many roundings: the margins allow for their luck, not for a lost factor of two.
    assert relative(found.detach(), expected.detach()) <= 1.5 * relative(plain.detach(), expected.detach())
    wanted, other, got = (gradients(exact, expected), gradients(model, plain), gradients(packed.causal_lm, found))

    def error(of):
        names = wanted.keys()
        return relative(*(torch.cat([part[name].flatten().float() for name in names]) for part in (of, wanted)))

    assert error(got) <= 1.1 * error(other)


def test_a_filler_gives_finite_numbers_and_no_gradient_when_it_weighs_nothing():
    policy = policy_of(toy_model())
    batch = collate([], 2)
    logps = policy(batch)
    assert logps.shape == (1, 2)
    assert torch.isfinite(logps).all()
    (logps.sum(1) * batch.weights).sum().backward()
    assert all(not parameter.grad.any() for parameter in policy.parameters())


def test_a_row_without_a_loss_token_gives_zeros():
    rng = np.random.default_rng(0)
    policy = policy_of(toy_model())
    logps = policy(collate([toy_example(rng, 0, 4, [3, 2], [[0, 0, 0], [0, 0]])], 2))
    assert logps.tolist() == [[0.0, 0.0]]
    logps.sum().backward()
    assert all(not parameter.grad.any() for parameter in policy.parameters())


def test_a_frozen_head_gets_no_gradient_and_the_body_the_same_as_before():
    model = toy_model()
    policy, batch = policy_of(model), collate(pairs(), 2)
    before = {name: grad.clone() for name, grad in gradients(policy.causal_lm, policy(batch)).items()}
    policy.causal_lm.lm_head.weight.requires_grad_(False)
    policy.causal_lm.lm_head.weight.grad = None
    after = gradients(policy.causal_lm, policy(batch))
    assert after.pop("lm_head.weight") is None
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())


@torch.no_grad()
def test_a_branchs_logprob_is_the_sum_of_its_tokens():
    policy, batch = policy_of(toy_model()), collate(pairs(), 2)
    of_tokens = policy.token_logprobs(batch)
    assert of_tokens.shape == batch.targets.shape
    expected = [part.sum() for part in of_tokens.split(batch.lengths.flatten().tolist())]
    torch.testing.assert_close(policy(batch).flatten(), torch.stack(expected))


def test_a_head_that_is_not_understood_and_a_decoder_without_blocks_are_refused():
    model = toy_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="MistralForCausalLM: its output head is not understood: it is a Sequential"):
        Policy(model)
    model = toy_model()
    del model.model.layers
    with pytest.raises(ValueError, match="MistralForCausalLM: its decoder has no list of blocks"):
        Policy(model)
