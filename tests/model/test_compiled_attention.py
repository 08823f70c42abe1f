"""Compiled attention with soft caps, sinks and values of another size: the dense reference, gradients included."""

import pytest
import torch
from torch.fx.experimental import _config as symbols
from toys import relative, toy_examples
from transformers import StableLmConfig, StableLmForCausalLM

from notus.data.packing import build_layout, collate
from notus.model import attention
from notus.model import attention_variants as variants
from notus.model.attention import IMPLEMENTATION, dense_kernel, packed_attention
from notus.model.compiled_attention import HIDDEN, graph_attention, hidden_attention
from notus.model.policy import Policy

LAYER = torch.nn.Identity()
ROWS = [([5, 3], [[4, 6], [2, 7]]), ([9, 30], [[14, 6], [12, 17]]), ([20, 2], [[4, 5], [3, 3]])]
LISTS = [
    ([5, 3], [[4, 6, 2], [2, 7]]),
    ([9, 30], [[14, 6], [12, 17, 3, 2, 5, 4, 3, 6]]),
    ([20, 2], [[4, 5], [3, 3]]),
    ([7, 2, 4], [[4, 5, 2, 6], [3, 3, 5], [2]]),
]
# name: (value's size, soft cap, sinks)
KINDS = {"values of another size": (6, None, False), "soft cap": (8, 1.5, False), "sinks": (8, None, True)}
KINDS |= {"all": (6, 1.5, True)}


def outputs(attend, leaves, layout, softcap, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    sinks = leaves[3] if len(leaves) > 3 else None
    out, _ = attend(LAYER, *leaves[:3], None, scaling=0.5, layout=layout, softcap=softcap, s_aux=sinks, **options)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def varlen(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
    """What torch's varlen attention computes, by operations that the compiler sees."""
    places, segments, behind = [], [], []  # behind: tokens from here to the segment's end
    for ends, rows in ((starts, query), (key_starts, key)):
        places.append(torch.arange(len(rows)))
        segments.append(torch.searchsorted(ends[1:], places[-1].int(), right=True))
        behind.append(ends[segments[-1] + 1] - places[-1])
    seen = (segments[0][:, None] == segments[1]) & (behind[1] >= behind[0][:, None])
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize(
    ("attend", "window"), [(hidden_attention, None), (hidden_attention, 4), (graph_attention, None)]
)
@pytest.mark.parametrize("lengths", [ROWS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_dense_and_other_rows_do_not_compile_again(monkeypatch, kind, attend, window, lengths):
    value_dim, softcap, sinks = KINDS[kind]
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(variants, "TOLD_OF_GROUPS", True)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(lengths):
        layout = build_layout(*row)
        rows = sum(layout.query_lengths)
        shapes = [(1, 4, rows, 8), (1, 2, rows, 8), (1, 2, rows, value_dim), *([(4,)] if sinks else [])]
        leaves = [torch.randn(shape, generator=generator) for shape in shapes]
        expected = outputs(packed_attention, leaves, layout, softcap, sliding_window=window, kernel=dense_kernel)
        with symbols.patch(use_duck_shape=False), torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = outputs(compiled, leaves, layout, softcap, sliding_window=window)
        assert all(relative(got, wanted) < 1e-5 for got, wanted in zip(found, expected, strict=True))


def test_compiled_blocks_that_drop_keywords_get_the_layout():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = StableLmForCausalLM(StableLmConfig(**shape, num_key_value_heads=2, vocab_size=400)).eval()
    model.set_attn_implementation(IMPLEMENTATION)
    policy = Policy(model)
    rows = [collate(toy_examples((20, (4, 9)), (2, (2, 5))), 2), collate(toy_examples((7, (14, 3)), (9, (6, 5))), 2)]
    expected = [policy(row).detach() for row in rows]
    torch._dynamo.reset()
    for block in policy.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=True)
    model.set_attn_implementation(HIDDEN)
    for row, wanted in zip(rows, expected, strict=True):
        found = policy(row)
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)
        found.sum().backward()
