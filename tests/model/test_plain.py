"""The plain path: the model's own forward pass behind the policy's interface, alone and sharded."""

from pathlib import Path

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import config, read_metrics, read_samples, write_pairs
from toys import relative, toy_examples, toy_model, toy_model_folder

from notus.data.packing import collate
from notus.model.plain import PlainPolicy
from notus.model.policy import Policy
from notus.training import dpo

EXAMPLES = ((5, (9, 4)), (0, (6, 3)), (3, (2, 8)))


def by_hand(model, examples):
    """[E, K]: each sequence alone, the log-softmax of all its logits."""
    rows = []
    for example in examples:
        row = []
        for branch, mask in zip(example.branches, example.loss_masks, strict=True):
            ids = torch.tensor([*example.trunk, *branch])
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            places = [len(example.trunk) + place for place in mask.nonzero()[0]]
            row.append(sum(logps[place - 1, ids[place]] for place in places if place > 0))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
def test_equals_each_sequence_alone(padded):
    model, other = toy_model("qwen3"), toy_model("qwen3")
    examples = toy_examples(*EXAMPLES)
    found = PlainPolicy(model, padded=padded)(collate(examples, 2))
    expected = by_hand(other, examples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert relative(one.grad, two.grad) < 1e-5, name


@pytest.mark.parametrize("padded", [False, True])
def test_lists_of_different_length_are_each_sequence_alone(padded):
    model, other = toy_model("qwen3"), toy_model("qwen3")
    examples = toy_examples((5, (9, 4, 2, 7)), (4, (6,)), (3, (2, 8, 1)))
    found = PlainPolicy(model, padded=padded)(collate(examples, 4))
    sums = [by_hand(other, [example])[0] for example in examples]
    expected = torch.stack([torch.nn.functional.pad(each, (0, 4 - len(each))) for each in sums])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert relative(one.grad, two.grad) < 1e-5, name


def test_padding_brings_similar_lengths_together():
    policy = PlainPolicy(toy_model(), padded=True)
    assert policy._groups([8, 100, 80, 7, 3]) == [[1, 2], [0, 3], [4]]
    policy.padded = False
    assert policy._groups([8, 100]) == [[0], [1]]


def test_masked_tokens_and_fillers_weigh_nothing():
    examples = toy_examples((4, (3, 2)))
    examples[0].loss_masks[0][:] = [False, True, False]
    batch = collate(examples, 2)
    policy = PlainPolicy(toy_model())
    torch.testing.assert_close(policy(batch), by_hand(policy.causal_lm, examples), rtol=1e-5, atol=1e-5)
    filler = policy(collate([], 2))
    assert filler.shape == (1, 2)
    assert torch.isfinite(filler).all()


def test_scores_say_which_tokens_are_the_likeliest():
    model = toy_model()
    examples = toy_examples((4, (3, 2)))
    ids = torch.tensor([*examples[0].trunk, *examples[0].branches[0]])
    best = int(model(input_ids=ids[None, :5]).logits[0, 4].argmax())
    examples[0].branches[0][1] = best  # the token that stands at place 5
    logps, greedy = PlainPolicy(model).token_scores(collate(examples, 2))
    assert greedy.tolist()[1] is True
    torch.testing.assert_close(logps, PlainPolicy(model).token_logprobs(collate(examples, 2)))


def test_the_next_token_of_left_padded_sequences():
    model = toy_model()
    policy = PlainPolicy(model)
    ids = torch.tensor([[0, 0, 5, 9], [7, 8, 30, 11]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = policy.new_cache()
    first = policy.next_token(ids, mask, mask, cache)
    expected = [int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()) for row in ([5, 9], [7, 8, 30, 11])]
    assert first.tolist() == expected
    grown = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    second = policy.next_token(first[:, None], grown, grown, cache)
    row = [7, 8, 30, 11, expected[1]]
    assert second.tolist()[1] == int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())


def test_is_the_packed_path_to_rounding():
    batch = collate(toy_examples(*EXAMPLES), 2)
    plain = toy_model("mistral")
    packed = toy_model("mistral")
    packed.set_attn_implementation("notus_packed")
    torch.testing.assert_close(PlainPolicy(plain)(batch), Policy(packed)(batch), rtol=1e-5, atol=1e-5)


def _sharded_run(folder: Path, model: Path, pairs: Path, path: str, ports: list[int]) -> None:
    """Two runs by every rank, full and with adapters."""
    adapters = {"lora__rank": 2, "lora__target_modules": "all-linear"}
    for name, extra, port in (("full", {}, ports[0]), ("lora", adapters, ports[1])):
        settings = config("dpo", folder / name, model, pairs, model__path=path, tracking__samples=2, **extra)
        with launched(port):
            assert dpo.run(settings) == 0


def test_a_run_on_the_plain_path_learns_what_a_packed_one_learns(tmp_path):
    """On two ranks, which have different numbers of sequences and must still meet in every gathering."""
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 22)
    run_ranks(_sharded_run, 1, tmp_path, tmp_path / "packed", model, pairs, "packed", free_ports(2))
    run_ranks(_sharded_run, 2, tmp_path, tmp_path / "plain", model, pairs, "plain", free_ports(2))
    for name in ("full", "lora"):
        packed, plain = (read_metrics(tmp_path / path / name) for path in ("packed", "plain"))
        assert len(packed) == len(plain) == 6
        for one, two in zip(packed, plain, strict=True):
            for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
                assert one[key] == pytest.approx(two[key], rel=2e-4, abs=2e-5), (name, key)
        spoken = [[line["completion"] for line in read_samples(tmp_path / path / name)] for path in ("packed", "plain")]
        assert spoken[0] == spoken[1]
