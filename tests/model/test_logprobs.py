"""Chunked log-probs against all logits at once."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import relative

from notus.model import logprobs
from notus.model.logprobs import full_logprobs, linear_logprobs, linear_scores, linear_statistics
from notus.runtime import switches

NUM_TOKENS, WIDTH, VOCABULARY = 23, 8, 50


def inputs(dtype=torch.float32, num_tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator)
    return hidden, weight, targets, upstream


def with_gradients(function, hidden, weight, targets, upstream):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = function(hidden, weight, targets)
    return [logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream.to(logps.dtype))]


@pytest.mark.parametrize("function", [linear_logprobs, full_logprobs])
def test_logprobs_by_hand(function):
    # One hidden unit of value 1 and weights ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log().requires_grad_()
    logp = function(hidden, weight, torch.tensor([2]))
    assert logp.item() == pytest.approx(math.log(5 / 8))
    logp.backward()
    # weight: one-hot - probabilities; hidden: the target's weight less the mean weight
    assert weight.grad.flatten().tolist() == pytest.approx([-1 / 8, -2 / 8, 3 / 8])
    assert hidden.grad.item() == pytest.approx(math.log(5) - (2 * math.log(2) + 5 * math.log(5)) / 8)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 22, 23, 24, 1024])
def test_chunked_is_full_in_fp32(chunk_tokens):
    chunked = partial(linear_logprobs, chunk_tokens=chunk_tokens)
    for found, expected in zip(
        with_gradients(chunked, *inputs()), with_gradients(full_logprobs, *inputs()), strict=True
    ):
        assert found.dtype == torch.float32
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1024])
def test_bf16_is_no_worse_than_all_logits_at_once(chunk_tokens):
    chunked = partial(linear_logprobs, chunk_tokens=chunk_tokens)
    exact = with_gradients(full_logprobs, *[x.double() if x.is_floating_point() else x for x in inputs(torch.bfloat16)])
    plain = with_gradients(full_logprobs, *inputs(torch.bfloat16))
    found = with_gradients(chunked, *inputs(torch.bfloat16))
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for got, other, wanted in zip(found, plain, exact, strict=True):
        assert relative(got, wanted) <= 1.3 * relative(other, wanted)


def test_the_weights_gradient_is_summed_in_fp32():
    # 1024 chunks of one token, each of which adds -1/2 and 1/2: a bf16 sum would stick at 128.
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    linear_logprobs(hidden, weight, targets, chunk_tokens=1).sum().backward()
    assert weight.grad.flatten().tolist() == [512.0, -512.0]


def test_wholly_frozen_inputs_need_no_graph():
    hidden, weight, targets, _ = inputs()
    assert not linear_logprobs(hidden, weight, targets).requires_grad


def test_no_tokens_give_no_logprobs_and_gradients_of_zero():
    logps, of_hidden, of_weight = with_gradients(linear_logprobs, *inputs(num_tokens=0))
    assert logps.shape == (0,)
    assert of_hidden.shape == (0, WIDTH)
    assert torch.equal(of_weight, torch.zeros(VOCABULARY, WIDTH))


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_logprobs(hidden.expand(3, 1), weight, torch.arange(3)).tolist() == [0.0, -1e4, -2e4]


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


class _Operations(TorchDispatchMode):
    """Counts matrix products, and notes the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        tensors = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_logits_of_one_chunk_at_most_exist_at_a_time():
    with _Operations() as operations:
        with_gradients(partial(linear_logprobs, chunk_tokens=10), *inputs(num_tokens=64))
    assert operations.largest == max(10 * VOCABULARY, 64 * WIDTH)
    with _Operations() as operations:
        with_gradients(full_logprobs, *inputs(num_tokens=64))
    assert operations.largest == 64 * VOCABULARY


@pytest.mark.parametrize(
    ("train_hidden", "train_weight", "products"), [(True, True, 3), (True, False, 2), (False, True, 2)]
)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(train_hidden, train_weight, products):
    hidden, weight, targets, upstream = inputs()
    _, *expected = with_gradients(full_logprobs, hidden, weight, targets, upstream)
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    with _Operations() as operations:
        linear_logprobs(hidden, weight, targets).backward(upstream)
    assert operations.products == products  # the logits, and one per gradient
    for tensor, wanted in zip((hidden, weight), expected, strict=True):
        assert relative(tensor.grad, wanted) < 1e-6 if tensor.requires_grad else tensor.grad is None


def test_the_last_chunks_logits_are_not_computed_again():
    hidden, weight, targets, upstream = inputs(num_tokens=64)
    with _Operations() as operations:
        linear_logprobs(hidden.requires_grad_(), weight, targets, chunk_tokens=30).backward(upstream)
    assert operations.products == 3 + 2 + 3  # chunks of 30, 30 and 4: forward, again, and the gradient


def test_a_graph_that_is_kept_gives_the_same_gradient_twice():
    hidden, weight, targets, upstream = inputs()
    out = linear_logprobs(hidden.requires_grad_(), weight, targets, chunk_tokens=5)
    first, second = (torch.autograd.grad(out, hidden, upstream, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_scores_are_the_log_probs_and_the_likeliest(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    targets = (hidden @ weight.t()).argmax(-1)
    targets[::2] = (targets[::2] + 1) % 11
    logps, greedy = linear_scores(hidden, weight, targets, chunk_tokens=chunk)
    torch.testing.assert_close(logps, full_logprobs(hidden, weight, targets))
    assert greedy.tolist() == [False, True, False, True, False, True, False]


def test_products_that_add_to_fp32_are_used_where_they_work(monkeypatch):
    """The operators exist for CUDA alone: here they are stood in for by what they compute."""
    used = []

    def mm(left, right, *, out_dtype):
        used.append("mm")
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(total, left, right, *, out_dtype, out):
        used.append("addmm")
        return torch.add(total, left.to(out_dtype) @ right.to(out_dtype), out=out)

    chunked = partial(linear_logprobs, chunk_tokens=8)
    exact = with_gradients(full_logprobs, *[x.double() if x.is_floating_point() else x for x in inputs(torch.bfloat16)])
    plain = with_gradients(chunked, *inputs(torch.bfloat16))
    assert not logprobs._adds_to_fp32(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(logprobs, "_adds_to_fp32", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = with_gradients(chunked, *inputs(torch.bfloat16))
    assert used == ["mm", "addmm", "addmm"]
    assert relative(found[2], exact[2]) < 1.2 * relative(plain[2], exact[2]) < 1e-2
    used.clear()
    with switches.disabled("fp32_addmm"):
        again = with_gradients(chunked, *inputs(torch.bfloat16))
    assert used == []
    assert torch.equal(again[2], plain[2])


# --- heads with a bias, a scale, a soft cap ---

HEADS = {
    "bias": {"bias": True},
    "scale": {"scale": 0.125},
    "soft cap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 2.5, "softcap": 3.0},
}


def head_inputs(name, dtype=torch.float32, num_tokens=21):
    hidden, weight, targets, upstream = inputs(dtype, num_tokens=num_tokens)
    head = dict(HEADS[name])
    if head.get("bias"):
        head["bias"] = (
            torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        )
    return (hidden, weight, targets), upstream, head


def head_gradients(function, args, upstream, head, dtype=None):
    hidden, weight, targets = args

    def cast(x):
        return x.detach().to(dtype or x.dtype).requires_grad_()

    head = {key: cast(value) if isinstance(value, torch.Tensor) else value for key, value in head.items()}
    hidden, weight = cast(hidden), cast(weight)
    logps = function(hidden, weight, targets, **head)
    leaves = [hidden, weight, *([head["bias"]] if "bias" in head else [])]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))]


@pytest.mark.parametrize("chunk", [1, 5, 21, 100])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_the_plain_one_with_all_gradients(name, chunk):
    args, upstream, head = head_inputs(name)
    found = head_gradients(partial(linear_logprobs, chunk_tokens=chunk), args, upstream, head)
    exact = head_gradients(_plain_head, args, upstream, head, torch.float64)
    plain = head_gradients(full_logprobs, args, upstream, head)
    for got, wanted, other in zip(found, exact, plain, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(other, wanted.float(), rtol=2e-5, atol=2e-5)


def _plain_head(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    """As transformers writes it, in the inputs' dtype."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("name", HEADS)
def test_in_bf16_a_head_is_no_worse_than_as_transformers_has_it(name):
    args, upstream, head = head_inputs(name, torch.bfloat16, num_tokens=64)
    exact = head_gradients(_plain_head, args, upstream, head, torch.float64)
    plain = head_gradients(_plain_head, args, upstream, head)
    found = head_gradients(partial(linear_logprobs, chunk_tokens=10), args, upstream, head)
    assert found[0].dtype == torch.float32
    for got, wanted, other in zip(found, exact, plain, strict=True):
        assert (got - wanted).norm() <= 1.5 * (other - wanted).norm()  # allows for luck, not for a factor of two


@pytest.mark.parametrize("name", HEADS)
def test_scores_of_a_head_are_its_logprobs_and_its_likeliest_tokens(name):
    (hidden, weight, targets), _, head = head_inputs(name)
    logps, greedy = linear_scores(hidden, weight, targets, **head, chunk_tokens=5)
    torch.testing.assert_close(logps, full_logprobs(hidden, weight, targets, **head).detach())
    logits = torch.nn.functional.linear(hidden, weight, head.get("bias"))
    assert torch.equal(greedy, logits.argmax(-1) == targets)
    _, all_greedy = linear_scores(hidden, weight, logits.argmax(-1), **head, chunk_tokens=5)
    assert all_greedy.all()


def test_a_head_by_hand():
    # logits 0 and 2 (log 3) / 2 capped at log 3: (log 3) tanh(1); with a bias of log 3 on the first: equal at scale 1
    weight, hidden, targets = torch.tensor([[0.0], [1.0]]), torch.tensor([[math.log(3)]]), torch.tensor([1])
    bias = torch.tensor([math.log(3), 0.0])
    assert linear_logprobs(hidden, weight, targets, bias=bias).item() == pytest.approx(-math.log(2))
    scaled = linear_logprobs(hidden, weight, targets, scale=2.0).item()
    assert scaled == pytest.approx(math.log(9 / 10))
    capped = linear_logprobs(1e4 * hidden, weight, targets, softcap=math.log(3)).item()
    assert capped == pytest.approx(math.log(3 / 4))


def test_what_is_frozen_in_a_head_gets_no_gradient():
    (hidden, weight, targets), _, head = head_inputs("all")
    linear_logprobs(hidden.detach(), weight.detach(), targets, **head).sum().backward()
    assert head["bias"].grad is not None
    assert not linear_logprobs(hidden.detach(), weight.detach(), targets, scale=2.0).requires_grad


def test_without_bias_scale_and_cap_a_head_is_the_fast_path_bit_for_bit():
    args, upstream, _ = head_inputs("scale")
    expected = with_gradients(linear_logprobs, *args, upstream)
    found = head_gradients(partial(linear_logprobs, bias=None, scale=1.0, softcap=None), args, upstream, {})
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


# --- how concentrated the predictions are ---


@pytest.mark.parametrize(
    "head", [{}, {"scale": 2.0}, {"bias": torch.tensor([0.0, math.log(2), 0.0])}, {"softcap": math.log(5)}]
)
def test_the_collision_probability_by_hand(head):
    # weights ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8, whose squares sum to 30/64
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]]).log()
    odds = {(): [1, 2, 5], ("scale",): [1, 4, 25], ("bias",): [1, 4, 5]}.get(tuple(head))
    if odds is None:  # capped: 5 to the tanh of how far the logit is of ln 5
        odds = [5 ** math.tanh(math.log(odd, 5)) for odd in (1, 2, 5)]
    logps, collisions = linear_statistics(hidden, weight, torch.tensor([2]), **head)
    assert logps.item() == pytest.approx(math.log(odds[2] / sum(odds)), rel=1e-6)
    assert collisions.item() == pytest.approx(math.log(sum(odd**2 for odd in odds) / sum(odds) ** 2), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 21, 100])
@pytest.mark.parametrize("name", [None, *HEADS])
def test_statistics_are_the_logprobs_to_the_bit_and_collisions_without_gradient(name, chunk):
    args, upstream, head = head_inputs(name) if name else (inputs()[:3], inputs()[3], {})
    found = head_gradients(lambda *a, **h: linear_statistics(*a, **h, chunk_tokens=chunk)[0], args, upstream, head)
    expected = head_gradients(partial(linear_logprobs, chunk_tokens=chunk), args, upstream, head)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
    (hidden, weight, targets), head = args, {key: _double(value) for key, value in head.items()}
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), head.get("bias")) * head.get("scale", 1.0)
    cap = head.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    hidden.requires_grad_()
    head = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in head.items()}
    logps, collisions = linear_statistics(hidden, weight, targets, **head, chunk_tokens=chunk)
    assert (logps.requires_grad, collisions.requires_grad) == (True, False)
    assert (logps.dtype, collisions.dtype) == (torch.float32, torch.float32)
    wanted = torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)
    torch.testing.assert_close(collisions, wanted.detach().float(), rtol=1e-5, atol=1e-5)


def _double(value):
    return value.detach().double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", [None, "all"])
def test_collisions_cost_no_product_and_no_larger_tensor(name):
    args, upstream, head = head_inputs(name, num_tokens=64) if name else (inputs(num_tokens=64)[:3], torch.ones(64), {})
    seen = []
    for function in (linear_logprobs, lambda *a, **h: linear_statistics(*a, **h)[0]):
        with _Operations() as operations:
            head_gradients(partial(function, chunk_tokens=10), args, upstream, head)
        seen.append((operations.products, operations.largest))
    assert seen[0] == seen[1]


def test_collisions_of_bf16_logits_of_no_tokens_and_of_large_logits():
    hidden, weight, targets, _ = inputs(torch.bfloat16)
    logps, collisions = linear_statistics(hidden, weight, targets, chunk_tokens=7)
    wanted = torch.logsumexp(2 * (logits := (hidden @ weight.t()).double()), -1) - 2 * torch.logsumexp(logits, -1)
    torch.testing.assert_close(collisions, wanted.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logps, linear_logprobs(hidden, weight, targets, chunk_tokens=7))
    assert [len(each) for each in linear_statistics(hidden[:0], weight, targets[:0])] == [0, 0]
    certain, flat = torch.tensor([[1e4]]), torch.zeros(1, 1)
    heads = torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_statistics(certain, heads, torch.tensor([1]))[1].item() == 0.0
    assert linear_statistics(flat, heads, torch.tensor([1]))[1].item() == pytest.approx(-math.log(3))
