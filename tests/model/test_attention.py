"""Packed, prefix-shared attention against each sequence alone."""

import pytest
import torch
import torch.nn.attention.varlen
import transformers
from toys import relative
from transformers import AttentionInterface, AttentionMaskInterface

from notus.data.packing import build_layout
from notus.model import attention
from notus.model import attention_variants as variants
from notus.model.attention import (
    IMPLEMENTATION,
    Sizes,
    attention_sizes,
    causal_mask,
    check_kernel,
    dense_kernel,
    kernel_for,
    kernel_name,
    mask_alignment,
    packed_attention,
    recorded_calls,
    sdpa_kernel,
    varlen_kernel,
)
from notus.model.compiled_attention import hidden_attention

CPU = torch.device("cpu")
KERNELS = {"sdpa": sdpa_kernel, "dense": dense_kernel}

# name: (trunk lengths, branch lengths)
ROWS = {
    "pairs": ([5, 3], [[4, 6], [2, 7]]),
    "single": ([4, 1, 6], [[3], [5], [1]]),
    "four branches": ([3, 2], [[1, 2, 3, 4], [2, 1, 5, 1]]),
    "no trunk": ([0, 2], [[3, 1], [2, 2]]),
    "one-token branches": ([6, 1], [[1, 1], [1, 1]]),
    "long second branch": ([1], [[1, 3]]),
    "lists of different length": ([3, 0, 4, 1], [[1, 2, 3], [2, 1], [3], [1, 1, 2, 1, 3, 1, 1, 2]]),
}


def attend(query, key, value, layout, *, kernel=None, window=None, scale=0.5):
    """[N, H, D] through the function that transformers calls, which takes and gives other shapes."""
    to_model = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    output, weights = packed_attention(
        torch.nn.Identity(), *to_model, None, scaling=scale, layout=layout, sliding_window=window, kernel=kernel
    )
    assert weights is None
    return output.squeeze(0)


def alone(query, key, value, trunks, branches, *, window=None, scale=0.5):
    """Each sequence by itself, in fp64, plainly written; a trunk's outputs are those of its first branch."""
    query, key, value = query.double(), key.double(), value.double()
    outputs, start = [], 0
    for trunk, parts in zip(trunks, branches, strict=True):
        begin = start + trunk
        for number, length in enumerate(parts):
            tokens = [*range(start, start + trunk), *range(begin, begin + length)]
            out = plain_attention(query[tokens], key[tokens], value[tokens], window, scale)
            outputs.append(out if number == 0 else out[trunk:])
            begin += length
        start = begin
    return torch.cat(outputs)


def plain_attention(query, key, value, window, scale):
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for position in range(len(query)):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            keys, values = (each[first : position + 1, head // groups] for each in (key, value))
            output[position, head] = (scale * keys @ query[position, head]).softmax(0) @ values
    return output


def inputs(num_tokens, heads, kv_heads, dtype=torch.float32, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    *leaves, upstream = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [leaf.requires_grad_() for leaf in leaves], upstream


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("row", ROWS)
def test_packed_is_each_sequence_alone(row, heads, kv_heads, window, kernel):
    trunks, branches = ROWS[row]
    leaves, upstream = inputs(sum(trunks) + sum(map(sum, branches)), heads, kv_heads)
    found = attend(*leaves, build_layout(trunks, branches), kernel=KERNELS[kernel], window=window)
    expected = alone(*leaves, trunks, branches, window=window)
    assert relative(found, expected) < 1e-6
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_stays_near_fp32(kernel):
    trunks, branches = ROWS["pairs"]
    leaves, upstream = inputs(27, 4, 2, torch.bfloat16)
    found = attend(*leaves, build_layout(trunks, branches), kernel=KERNELS[kernel], window=4)
    expected = alone(*leaves, trunks, branches, window=4)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 1e-2
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, wanted) < 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("window", "outputs", "value_gradient"),
    [
        # trunk 1 2, branches (4) and (8 16): with equal scores each output is the mean of what it sees
        (None, [1, 3 / 2, 7 / 3, 11 / 3, 27 / 4], [29 / 12, 17 / 12, 1 / 3, 7 / 12, 1 / 4]),
        # two positions back at most: 1 | 1 2 | 2 4 | 2 8 | 8 16
        (2, [1, 3 / 2, 3, 5, 12], [3 / 2, 3 / 2, 1 / 2, 1, 1 / 2]),
    ],
)
def test_attention_by_hand(kernel, window, outputs, value_gradient):
    query, key = torch.zeros(5, 1, 1), torch.ones(5, 1, 1)
    value = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(5, 1, 1).requires_grad_()
    found = attend(query, key, value, build_layout([2], [[1, 2]]), kernel=KERNELS[kernel], window=window)
    torch.testing.assert_close(found.flatten(), torch.tensor(outputs))
    found.sum().backward()
    torch.testing.assert_close(value.grad.flatten(), torch.tensor(value_gradient))


def test_rows_without_sharing_or_window_build_no_mask(monkeypatch):
    sizes = []

    def recorded(num_queries, num_keys, *rest):
        sizes.append((num_queries, num_keys))
        return causal_mask(num_queries, num_keys, *rest)

    monkeypatch.setattr(attention, "causal_mask", recorded)
    leaves, _ = inputs(21, 2, 2)
    attend(*leaves, build_layout([8, 3], [[7], [3]]), kernel=sdpa_kernel)
    attend(*leaves, build_layout([8], [[9, 4]]), kernel=sdpa_kernel)  # only branch 2 needs one: 4 x 12
    assert sizes == [(4, 12)]


# Rows whose largest mask is 32 numbers wide, so that its own strides are in order: CUDA's kernel would be handed it.
ALIGNED_WIDTH = ([24, 9, 3], [[5, 8], [6, 7], [1, 2]])


@pytest.mark.parametrize("window", [None, 3, 20])
def test_on_cuda_every_mask_begins_where_its_kernel_may_load(window, monkeypatch):
    trunks, branches = ALIGNED_WIDTH
    leaves, upstream = inputs(sum(trunks) + sum(map(sum, branches)), 2, 2)
    expected = attend(*leaves, build_layout(trunks, branches), kernel=dense_kernel, window=window)
    masks, call = [], attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "mask_alignment", lambda device: mask_alignment(torch.device("cuda")))
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *args, **options: (masks.append(options["attn_mask"]), call(*args, **options))[1],
    )
    found = attend(*leaves, build_layout(trunks, branches), kernel=sdpa_kernel, window=window)
    masks = [mask for mask in masks if mask is not None]
    assert len(masks) == (3 if window is None else 6)
    for mask in masks:
        begins = mask.storage_offset() * mask.element_size()  # the storage itself is aligned by the allocator
        assert (begins % 16, mask.stride(0) % 8, mask.stride(1)) == (0, 0, 1)
    assert relative(found, expected) < 1e-6
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert relative(got, wanted) < 1e-5


def test_only_cuda_asks_for_alignment():
    assert [mask_alignment(torch.device(name)) for name in ("cpu", "cuda")] == [1, 8]
    mask = causal_mask(3, 13, None, CPU, torch.float32, 8)
    assert (mask.shape, mask.stride()) == ((3, 13), (16, 1))
    assert mask.tolist() == causal_mask(3, 13, None, CPU, torch.float32).tolist()


def test_a_layer_that_drops_the_layout_is_an_error_of_one_line():
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="Identity got no layout of the packed row"):
        packed_attention(torch.nn.Identity(), query, query, query, None, scaling=1.0)


# --- FlashAttention's call, with a stand-in that follows its documentation ---


def varlen_by_the_book(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """(left, right): query i sees keys i - left to i + right, aligned at the last key; -1 is unbounded."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert len(query) == cu_seq_q[-1]
    assert len(key) == len(value) == cu_seq_k[-1]
    assert window_size[1] == 0
    assert enable_gqa or key.shape[1] == query.shape[1]
    window = None if window_size[0] == -1 else window_size[0] + 1
    outputs = []
    for segment in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[segment] : cu_seq_q[segment + 1]]
        k, v = (x[cu_seq_k[segment] : cu_seq_k[segment + 1]] for x in (key, value))
        padded = torch.cat([q.new_zeros(len(k) - len(q), *q.shape[1:]), q])
        outputs.append(plain_attention(padded, k, v, window, scale)[len(k) - len(q) :])
    return torch.cat(outputs)


def varlen_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    given = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return varlen_by_the_book(*given, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("stand_in", [varlen_by_the_book, varlen_of_torch_2_11])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 2, None), (4, 2, None), (4, 2, 1), (2, 2, 3)])
def test_flash_attention_is_asked_for_the_same(monkeypatch, stand_in, heads, kv_heads, window):
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(variants, "TOLD_OF_GROUPS", stand_in is varlen_by_the_book)
    trunks, branches = ROWS["pairs"]
    leaves, _ = inputs(27, heads, kv_heads)
    layout = build_layout(trunks, branches)
    found = attend(*leaves, layout, kernel=varlen_kernel, window=window)
    assert relative(found, alone(*leaves, trunks, branches, window=window)) < 1e-6


# --- the gather ---


def gradient_of(gather, x, upstream):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gather(x), x, upstream)
    return gradient


@pytest.mark.parametrize("row", ROWS)
def test_gather_is_plain_indexing_forward_and_backward(row):
    trunks, branches = ROWS[row]
    layout = build_layout(trunks, branches)
    x = torch.randn(sum(trunks) + sum(map(sum, branches)), 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attention._GatherKeys.apply(x, layout), x[layout.key_index])
    upstream = torch.randn(len(layout.key_index), 2, 3, generator=torch.Generator().manual_seed(1))
    found = [gradient_of(lambda x: attention._GatherKeys.apply(x, layout), x, upstream) for _ in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], gradient_of(lambda x: x[layout.key_index], x, upstream), atol=1e-6, rtol=0)


# --- registration and the start-up check ---


def test_transformers_knows_the_attention_and_no_mask_for_it():
    assert AttentionInterface()[IMPLEMENTATION] is packed_attention
    assert IMPLEMENTATION not in AttentionMaskInterface().valid_keys()


def test_the_kernel_follows_from_device_and_dtype():
    assert kernel_for(CPU, torch.bfloat16)[0] == kernel_for(CPU, torch.float32)[0] == "sdpa"
    assert (
        kernel_for(torch.device("cuda"), torch.bfloat16)[0]
        == kernel_for(torch.device("cuda"), torch.float16)[0]
        == "varlen"
    )
    assert kernel_for(torch.device("cuda"), torch.float32)[0] == "sdpa"  # FlashAttention-2 takes no fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3, 4096])
def test_check_accepts_the_cpu_kernel(dtype, window):
    check_kernel(CPU, dtype, num_heads=8, num_kv_heads=2, head_dim=16, window=window)


class _WrongValueGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


WRONG = {
    "a scale": (lambda q, k, v, layout, scale, window: sdpa_kernel(q, k, v, layout, 1.1 * scale, window), "output"),
    "no window": (lambda q, k, v, layout, scale, window: sdpa_kernel(q, k, v, layout, scale, None), "output"),
    "one key more": (lambda q, k, v, layout, scale, window: sdpa_kernel(q, k, v, layout, scale, window + 1), "output"),
    "NaN": (lambda *args: sdpa_kernel(*args) * float("nan"), "output"),
    "the value's gradient": (lambda q, k, v, *rest: sdpa_kernel(q, k, _WrongValueGradient.apply(v), *rest), "value"),
    "the key's gradient": (lambda q, k, v, *rest: sdpa_kernel(q, _WrongValueGradient.apply(k), v, *rest), "key"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_refuses_a_wrong_kernel_and_says_where(monkeypatch, wrong, dtype):
    kernel, where = WRONG[wrong]
    monkeypatch.setattr(attention, "kernel_for", lambda *_: ("faulty", kernel))
    with pytest.raises(ValueError, match=rf"'faulty' .* in its {where} .*use another torch version"):
        check_kernel(CPU, dtype, num_heads=4, num_kv_heads=2, head_dim=8, window=4)


def test_check_refuses_a_wrong_gather(monkeypatch):
    class Forgetful(attention._GatherKeys):
        @staticmethod
        def backward(ctx, grad):
            return grad.index_select(0, ctx.layout.first_copy), None

    monkeypatch.setattr(attention, "_GatherKeys", Forgetful)
    with pytest.raises(ValueError, match="in its key"):
        check_kernel(CPU, torch.float32, num_heads=4, num_kv_heads=2, head_dim=8, window=None)


# --- what a model may ask for ---


def ask(module=None, mask=None, **options):
    query = torch.zeros(1, 2, 4, 4)
    layout = build_layout([2], [[2]])
    return packed_attention(module or torch.nn.Identity(), query, query, query, mask, layout=layout, **options)


@pytest.mark.parametrize(
    ("keyword", "value", "told"),
    [
        ("position_bias", torch.zeros(1), "position_bias,"),
        ("indices", torch.zeros(1), "indices,"),
        ("is_causal", False, "is_causal=False,"),
        ("dropout", 0.1, "dropout=0.1,"),
        ("use_cache", True, "use_cache=True,"),
        ("output_attentions", True, "output_attentions=True,"),
        ("cu_seq_lens_q", torch.zeros(1), "cu_seq_lens_q,"),
        ("logit_cap", 30.0, "logit_cap=30.0,"),
    ],
)
def test_an_unknown_keyword_is_refused_by_name(keyword, value, told):
    with pytest.raises(ValueError, match=rf"^Identity calls its attention with {told} which packed attention does not"):
        ask(**{keyword: value})
    with pytest.raises(ValueError, match=told):
        hidden_attention(
            torch.nn.Identity(),
            *[torch.zeros(1, 2, 4, 4)] * 3,
            None,
            layout=build_layout([2], [[2]]),
            **{keyword: value},
        )


def test_keywords_that_change_nothing_are_let_pass():
    neutral = {"use_cache": False, "output_attentions": False, "is_causal": True, "dropout": 0.0, "position_bias": None}
    out, _ = ask(**neutral, position_ids=torch.arange(4)[None], cache_position=torch.arange(4), indices=None)
    torch.testing.assert_close(out, ask()[0])


def test_a_mask_that_the_model_built_and_a_layer_that_is_not_causal_are_refused():
    with pytest.raises(ValueError, match=r"^Identity built an attention mask by itself"):
        ask(mask=torch.zeros(1, 1, 4, 4))
    module = torch.nn.Identity()
    module.is_causal = False
    with pytest.raises(ValueError, match=r"^Identity is not causal"):
        ask(module)


def test_without_a_scale_it_is_that_of_the_heads():
    leaves, _ = inputs(27, 4, 2)
    layout = build_layout(*ROWS["pairs"])
    torch.testing.assert_close(attend(*leaves, layout, scale=None), attend(*leaves, layout, scale=8**-0.5))


def test_calls_are_recorded_within_the_context_alone():
    first, second = torch.nn.Identity(), torch.nn.Identity()
    ask(first)
    with recorded_calls() as calls:
        ask(second, sliding_window=3, softcap=2.0)
        assert list(calls) == [second]
        with recorded_calls() as inner:
            ask(first, s_aux=torch.zeros(2))
        ask(first)
    ask(torch.nn.Identity())
    assert list(calls) == [second, first]
    assert calls[second] == Sizes(2, 2, 4, 4, window=3, softcap=2.0)
    assert inner == {first: Sizes(2, 2, 4, 4, sinks=True)}


# --- values of another size than queries and keys, as multi-head latent attention has them ---


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("value_dim", [5, 8, 11])
def test_values_may_have_another_size(kernel, window, value_dim):
    trunks, branches = ROWS["pairs"]
    query, key, value = inputs(27, 4, 2)[0]
    value = torch.randn(27, 2, value_dim, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = attend(query, key, value, build_layout(trunks, branches), kernel=KERNELS[kernel], window=window)
    wide = torch.nn.functional.pad(value, (0, 11 - value_dim))
    expected = alone(
        *(torch.nn.functional.pad(each, (0, 3)) for each in (query, key)), wide, trunks, branches, window=window
    )
    assert found.shape == (27, 4, value_dim)
    assert relative(found, expected[..., :value_dim]) < 1e-6
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected[..., :value_dim], (query, key, value), upstream.double())
    for got, gradient in zip(torch.autograd.grad(found, (query, key, value), upstream), wanted, strict=True):
        assert relative(got, gradient) < 1e-5


@pytest.mark.parametrize(("head_dim", "value_dim", "asked"), [(12, 6, 16), (8, 16, 16), (24, 24, 24), (20, 20, 24)])
def test_flash_attention_gets_heads_of_one_size_that_it_takes(monkeypatch, head_dim, value_dim, asked):
    seen = []

    def stand_in(query, key, value, *rest, **options):
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return varlen_by_the_book(query, key, value, *rest, **options)

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(variants, "TOLD_OF_GROUPS", True)
    trunks, branches = ROWS["pairs"]
    query, key, _ = inputs(27, 4, 2, head_dim=head_dim)[0]
    value = inputs(27, 4, 2, head_dim=value_dim)[0][2]
    found = attend(query, key, value, build_layout(trunks, branches), kernel=varlen_kernel)
    expected = attend(query, key, value, build_layout(trunks, branches), kernel=dense_kernel)
    assert seen == [(asked, asked, asked)]
    torch.testing.assert_close(found, expected)


def test_flash_attention_is_not_asked_for_heads_that_it_does_not_take(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", None)
    trunks, branches = ROWS["pairs"]
    leaves, _ = inputs(27, 4, 2, head_dim=512)
    found = attend(*leaves, build_layout(trunks, branches), kernel=varlen_kernel)
    torch.testing.assert_close(found, attend(*leaves, build_layout(trunks, branches), kernel=dense_kernel))


def test_check_takes_values_of_another_size():
    check_kernel(CPU, torch.float32, num_heads=8, num_kv_heads=8, head_dim=24, value_dim=16, window=None)


def test_sizes_are_those_of_every_kind_of_layer():
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    shape = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 9, "pad_token_id": 0}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**shape, **mla, **experts))
    assert attention_sizes(model) == [Sizes(4, 4, 12, 6)]
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "num_local_experts": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape))
    assert attention_sizes(model) == [Sizes(4, 2, 8, 8, window=5, sinks=True)]
    assert kernel_name(model, torch.device("cuda"), torch.bfloat16) == "varlen-sinks"
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, attn_logit_softcapping=2.0))
    assert attention_sizes(model) == [Sizes(4, 2, 8, 8, window=5, softcap=2.0)]
    assert kernel_name(model, torch.device("cuda"), torch.bfloat16) == "flex"
    assert kernel_name(model, CPU, torch.bfloat16) == "plain"
