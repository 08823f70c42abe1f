"""Soft caps and sinks against each sequence alone, in fp64 and plainly written, and against values found by hand."""

import math

import pytest
import torch
from toys import relative

from notus.data.packing import build_layout
from notus.model import attention
from notus.model import attention_variants as variants
from notus.model.attention import check_kernel, dense_kernel, kernel_for, packed_attention
from notus.model.attention_variants import block_mask, flex_kernel, plain_kernel, sink_kernel

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
KERNELS = {"plain": plain_kernel, "dense": dense_kernel, "flex": flex_kernel}
# name: (soft cap, whether there are sinks)
VARIANTS = {"soft cap": (1.5, False), "sinks": (None, True), "both": (1.5, True)}
ROWS = {
    "pairs": ([5, 3], [[4, 6], [2, 7]]),
    "no trunk, one-token branches": ([0, 2, 6], [[3, 1], [2, 2], [1, 1]]),
    "more than a block of flex attention": ([150, 3], [[40, 60], [20, 7]]),
    "lists of different length": ([3, 0, 4], [[1, 2, 3], [2], [1, 2, 1, 3]]),
}


@pytest.fixture(autouse=True)
def _flex_attention_on_cpu(monkeypatch):
    """Its plain code has gradients there, but is only let run without."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)


def leaves_of(num_tokens, heads, kv_heads, *, value_dim=6, sinks=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, 8), (num_tokens, kv_heads, 8), (num_tokens, kv_heads, value_dim)]
    shapes += [(heads,)] if sinks else []
    return [(torch.randn(shape, generator=generator) * 1.5).to(dtype).requires_grad_() for shape in shapes]


def attend(leaves, layout, softcap, window, kernel):
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in leaves[:3])
    options = {"softcap": softcap, "s_aux": leaves[3] if len(leaves) > 3 else None}
    out, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.5, layout=layout, sliding_window=window, kernel=kernel,
        **options,
    )  # fmt: skip
    return out.squeeze(0)


def alone(leaves, trunks, branches, softcap, window):
    """Each sequence by itself, in fp64; a trunk's outputs are those of its first branch."""
    query, key, value, *sinks = (leaf.double() for leaf in leaves)
    outputs, start = [], 0
    for trunk, parts in zip(trunks, branches, strict=True):
        begin = start + trunk
        for number, length in enumerate(parts):
            tokens = [*range(start, start + trunk), *range(begin, begin + length)]
            out = one_sequence(query[tokens], key[tokens], value[tokens], sinks, softcap, window)
            outputs.append(out if number == 0 else out[trunk:])
            begin += length
        start = begin
    return torch.cat(outputs)


def one_sequence(query, key, value, sinks, softcap, window):
    groups = query.shape[1] // key.shape[1]
    rows = []
    for position in range(len(query)):
        first = 0 if window is None else max(0, position - window + 1)
        heads = []
        for head in range(query.shape[1]):
            keys, values = (each[first : position + 1, head // groups] for each in (key, value))
            scores = 0.5 * keys @ query[position, head]
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            if sinks:
                scores = torch.cat([scores, sinks[0][head : head + 1]])
            heads.append(scores.softmax(0)[: len(keys)] @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("row", "window", "heads", "kv_heads"), [
    ("pairs", None, 4, 2), ("pairs", 3, 3, 1), ("no trunk, one-token branches", 2, 2, 2),
    ("more than a block of flex attention", None, 2, 1), ("more than a block of flex attention", 30, 2, 1),
])  # fmt: skip
def test_packed_is_each_sequence_alone(row, window, heads, kv_heads, variant, kernel):
    (softcap, sinks), (trunks, branches) = VARIANTS[variant], ROWS[row]
    leaves = leaves_of(sum(trunks) + sum(map(sum, branches)), heads, kv_heads, sinks=sinks)
    found = attend(leaves, build_layout(trunks, branches), softcap, window, KERNELS[kernel])
    expected = alone(leaves, trunks, branches, softcap, window)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    assert relative(found.detach(), expected.detach()) < 1e-6
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert relative(got, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
def test_by_hand(kernel):
    # Two tokens with values 6 and 12, a sink of log 2, and scores 0: weights 1 / (2 + 1) and 1 / (2 + 2) each.
    query, key = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    value, sinks = torch.tensor([6.0, 12.0]).view(2, 1, 1), torch.tensor([math.log(2)], requires_grad=True)
    layout = build_layout([1], [[1]])
    out = KERNELS[kernel](query, key, value, layout, 1.0, None, sinks=sinks)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 4.5]))
    # d/da of 6 / (e^a + 1) and 18 / (e^a + 2) at e^a = 2: -6 * 2 / 9 - 18 * 2 / 16
    (gradient,) = torch.autograd.grad(out.sum(), sinks)
    torch.testing.assert_close(gradient, torch.tensor([-4 / 3 - 9 / 4]))
    # A score of 1000 and one of 0, capped at log 3: weights 3 / 4 and 1 / 4.
    query, key = torch.ones(2, 1, 1), torch.tensor([1000.0, 0.0]).view(2, 1, 1)
    out = KERNELS[kernel](query, key, value, layout, 1.0, None, softcap=math.log(3))
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 7.5]))


@pytest.mark.parametrize("kernel", ["plain", "dense"])
def test_bf16_stays_near_fp64(kernel):
    trunks, branches = ROWS["pairs"]
    leaves = leaves_of(27, 4, 2, dtype=torch.bfloat16)
    found = attend(leaves, build_layout(trunks, branches), 1.5, 4, KERNELS[kernel])
    expected = alone(leaves, trunks, branches, 1.5, 4)
    assert found.dtype == torch.bfloat16
    assert relative(found.detach(), expected.detach()) < 1e-2
    upstream = torch.ones_like(found)
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, wanted) < 2e-2


def test_the_plain_kernel_is_an_operator_as_torch_wants_them():
    layout = build_layout(*ROWS["pairs"])
    leaves = leaves_of(27, 4, 2)
    keys, values = (leaf.detach()[layout.key_index].requires_grad_() for leaf in leaves[1:3])
    for softcap, window, sinks in ((1.5, 3, leaves[3]), (None, None, None)):
        args = (leaves[0], keys, values, sinks, layout.lengths, 0.5, window, softcap)
        torch.library.opcheck(variants._plain, args)


# --- FlashAttention with sinks, with torch's CPU flash attention in its place ---


def _segments(query_starts, key_starts):
    return zip(query_starts.diff().tolist(), key_starts.diff().tolist(), strict=True)


def _split(tensor, sizes):
    return [part.transpose(0, 1).unsqueeze(0) for part in tensor.split(sizes)]


def _mask(rows, columns, window_size):
    window = None if window_size[0] == -1 else window_size[0] + 1
    return attention.causal_mask(rows, columns, window, CPU, torch.float32)[None, None]


def varlen_on_cpu(
    query, key, value, starts, key_starts, longest, longest_key, *, return_aux, scale, window_size, enable_gqa=False
):
    """Segment by segment, (output [N, H, D], log-sum-exp [H, N])."""
    assert return_aux.lse
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    sizes = list(_segments(starts, key_starts))
    rows, columns = ([size[place] for size in sizes] for place in (0, 1))
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=_mask(*size, window_size), scale=scale
        )
        for q, k, v, size in zip(_split(query, rows), _split(key, columns), _split(value, columns), sizes, strict=True)
    ]
    out = torch.cat([each[0].squeeze(0).transpose(0, 1) for each in found])
    return out, torch.cat([each[1].squeeze(0) for each in found], dim=1)


def gradients_on_cpu(
    grad, query, key, value, out, lse, starts, key_starts, longest, longest_key, causal, state, scale, window_size
):
    assert causal == (window_size == [-1, 0])
    groups = query.shape[1] // key.shape[1]
    wide = [each.repeat_interleave(groups, dim=1) for each in (key, value)]
    sizes = list(_segments(starts, key_starts))
    rows, columns = ([size[place] for size in sizes] for place in (0, 1))
    parts = [_split(each, rows) for each in (grad, query)]
    parts += [_split(each, columns) for each in wide]
    parts += [_split(out, rows), [each.unsqueeze(0) for each in lse.split(rows, dim=1)]]
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *segment, 0.0, False, attn_mask=_mask(*size, window_size), scale=scale
        )
        for *segment, size in zip(*parts, sizes, strict=True)
    ]
    of_query, of_key, of_value = (torch.cat([each[n].squeeze(0).transpose(0, 1) for each in found]) for n in range(3))
    of_key, of_value = (each.unflatten(1, (-1, groups)).sum(2) for each in (of_key, of_value))
    return of_query, of_key, of_value


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 2, None), (4, 2, None), (4, 2, 3)])
@pytest.mark.parametrize("value_dim", [8, 6])
def test_a_flash_kernels_backward_is_exact_with_the_sink_in_its_output_and_its_sum(
    monkeypatch, heads, kv_heads, window, value_dim
):
    monkeypatch.setattr(variants, "varlen_attn", varlen_on_cpu)
    monkeypatch.setattr(variants, "_flash_gradients", gradients_on_cpu)
    trunks, branches = ROWS["pairs"]
    leaves = leaves_of(27, heads, kv_heads, value_dim=value_dim)
    found = attend(leaves, build_layout(trunks, branches), None, window, sink_kernel)
    expected = alone(leaves, trunks, branches, None, window)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    assert relative(found.detach(), expected.detach()) < 1e-6
    gradients = torch.autograd.grad(found, leaves, upstream)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert relative(got, wanted) < 1e-5


# --- the blocks that flex attention computes ---


@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
@pytest.mark.parametrize(
    "row",
    [
        ([5, 3], [[4, 6], [2, 7]]),
        ([300, 1, 40], [[120, 77], [1, 260], [3, 1]]),
        ([128, 256], [[128, 128], [384, 1]]),
        ([1000], [[20, 30]]),
        ([0, 700], [[130, 600], [1, 1]]),
    ],
)
def test_flex_attention_skips_what_is_hidden_and_masks_what_is_not_all_seen(row, window):
    layout = build_layout(*row)
    queries, keys = sum(layout.query_lengths), sum(layout.key_lengths)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    at_query = at_key = 0
    for rows, columns in zip(layout.query_lengths, layout.key_lengths, strict=True):
        visible = attention.causal_mask(rows, columns, window, CPU, torch.float32) == 0
        seen[at_query : at_query + rows, at_key : at_key + columns] = visible
        at_query, at_key = at_query + rows, at_key + columns
    mask = block_mask(layout, window)
    assert mask is block_mask(layout, window)  # made once
    everywhere = torch.ones(queries, keys, dtype=torch.bool)
    places = torch.arange(queries)[:, None], torch.arange(keys)[None]
    mask_mod = variants._seen(variants._places(layout), window)
    assert torch.equal(mask_mod(None, None, *places) & everywhere, seen)
    partial, full = variants._blocks(layout, window)
    assert not (partial & full).any()
    for row_block in range(partial.shape[0]):
        for column_block in range(partial.shape[1]):
            block = seen[row_block * 128 : (row_block + 1) * 128, column_block * 128 : (column_block + 1) * 128]
            assert full[row_block, column_block] <= bool(block.all())
            assert bool(block.any()) <= bool(partial[row_block, column_block] | full[row_block, column_block])
            assert bool(partial[row_block, column_block]) <= bool(block.any())  # nothing is computed in vain
    for name, blocks in (("kv", partial), ("full_kv", full), ("q", partial.t()), ("full_q", full.t())):
        counts, order = mask[f"{name}_num_blocks"][0, 0], mask[f"{name}_indices"][0, 0]
        for row_block, wanted in enumerate(blocks):
            listed = order[row_block, : counts[row_block]].tolist()
            assert listed == wanted.nonzero().flatten().tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_is_compiled_once_for_rows_of_every_length(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(variants._flex_attention, backend=backend)
    monkeypatch.setattr(variants, "_flex", lambda _: compiled)
    for row in (([150, 3], [[40, 60], [20, 7]]), ([300, 31, 40], [[120, 77], [9, 260], [3, 5]]), ([700], [[130, 90]])):
        layout = build_layout(*row)
        leaves = [leaf.detach() for leaf in leaves_of(sum(layout.query_lengths), 4, 2)]
        for window in (None, 20):
            expected = attend(leaves, layout, 1.5, window, dense_kernel)
            torch.testing.assert_close(attend(leaves, layout, 1.5, window, flex_kernel), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2  # with a window and without


# --- which kernel, and its check ---


def test_the_kernel_of_a_variant(monkeypatch):
    assert kernel_for(CUDA, torch.bfloat16, softcap=True) == ("flex", flex_kernel)
    assert kernel_for(CUDA, torch.bfloat16, sinks=True) == ("varlen-sinks", sink_kernel)
    assert kernel_for(CUDA, torch.bfloat16, softcap=True, sinks=True) == ("flex", flex_kernel)
    for device, dtype in ((CUDA, torch.float32), (CPU, torch.bfloat16)):
        assert (
            kernel_for(device, dtype, softcap=True) == kernel_for(device, dtype, sinks=True) == ("plain", plain_kernel)
        )
    monkeypatch.setenv("NOTUS_DISABLE", "attention_variants")
    assert kernel_for(CUDA, torch.bfloat16, sinks=True)[0] == "plain"
    monkeypatch.delenv("NOTUS_DISABLE")
    monkeypatch.setitem(variants.failures, "flex", "it fails")
    assert kernel_for(CUDA, torch.bfloat16, softcap=True)[0] == "plain"


SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_dim": 6, "window": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_check_accepts_the_cpu_kernel(variant, dtype):
    softcap, sinks = VARIANTS[variant]
    assert check_kernel(CPU, dtype, **SIZES, softcap=softcap, sinks=sinks) == []


def _wrong(*args, softcap, sinks):
    return plain_kernel(*args, softcap=softcap, sinks=None if sinks is None else sinks.detach() + 0 * sinks)


@pytest.mark.parametrize(("variant", "wrong", "where"), [
    ("soft cap", lambda *args, softcap, sinks: plain_kernel(*args, softcap=2 * softcap), "output"),
    ("sinks", lambda *args, softcap, sinks: plain_kernel(*args) + 0 * sinks.sum(), "output"),
    ("sinks", _wrong, "sinks"),
])  # fmt: skip
def test_check_refuses_a_wrong_kernel_and_says_where(monkeypatch, variant, wrong, where):
    softcap, sinks = VARIANTS[variant]
    monkeypatch.setattr(attention, "kernel_for", lambda *_, **__: ("faulty", wrong))
    with pytest.raises(ValueError, match=rf"'faulty' .* in its {where} .*use another torch version"):
        check_kernel(CPU, torch.float32, **SIZES, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_for_soft_caps_that_fails_on_some_rank_is_used_by_none_and_says_so(monkeypatch, fault):
    monkeypatch.setitem(variants.failures, "flex", None)

    def kernel(*args, softcap, sinks):
        if fault == "raises":
            raise RuntimeError("no compiler")
        return 1.1 * plain_kernel(*args, softcap=softcap, sinks=sinks)

    def choose(device, dtype, **_):
        return ("flex", kernel) if variants.failures["flex"] is None else ("plain", plain_kernel)

    monkeypatch.setattr(attention, "kernel_for", choose)
    (told,) = check_kernel(CPU, torch.float32, **SIZES, softcap=1.5)
    assert told.startswith("attention kernel flex is not used, and attention is slower: ")
    assert ("no compiler" if fault == "raises" else "relative error 1.0") in told
    monkeypatch.setitem(variants.failures, "flex", None)
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype, **_: (
        ("flex", plain_kernel) if variants.failures["flex"] is None else ("plain", plain_kernel)
    ))  # fmt: skip
    (told,) = check_kernel(CPU, torch.float32, **SIZES, softcap=1.5, gather=lambda mine: [mine, {"flex": "rank 1"}])
    assert told.endswith("rank 1")


@pytest.mark.parametrize("window", [None, 40])
def test_the_tables_of_a_block_mask_lie_row_by_row(window):
    """Flex attention's kernels do not ask for strides: on a GPU, a transposed table gave wrong gradients of keys."""
    made = block_mask(build_layout([100, 300], [[200, 150], [64, 128]]), window)
    assert len(made) == 8
    for name, table in made.items():
        assert table.is_contiguous(), name
