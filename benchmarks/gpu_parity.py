"""Is what the device computes right? Attention, log-probs and a whole toy policy against plain fp32 references.

Rows with shared, empty and one-token trunks, branches of no tokens, fillers and tails; one, two and three branches; as
many key heads as query heads, fewer, and one; with and without a sliding window; bf16 and fp32; forward and backward.
The tolerances are those of tests/model.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from notus.data.packing import Example, Layout, build_layout, collate
from notus.model import attention, fused
from notus.model.logprobs import full_logprobs, linear_logprobs
from notus.model.policy import Policy
from notus.runtime.determinism import deterministic

# name: (trunk lengths, branch lengths)
ROWS = {
    "one branch": ([300, 1, 0], [[120], [77], [45]]),
    "pairs": ([300, 1, 40], [[120, 77], [1, 260], [3, 1]]),
    "three branches": ([30, 7], [[11, 2, 65], [1, 1, 40]]),
    "no trunk": ([0, 20], [[33, 1], [2, 20]]),
    "an empty branch": ([40, 9], [[12, 0], [17, 30]]),
    "fillers": ([1, 1], [[1, 1], [1, 1]]),
    "a tail": ([60, 0], [[20, 31], [145, 0]]),
    # The fp32 kernel cuts a segment's mask from the corner of the widest segment's, which is 96 keys wide here. CUDA's
    # memory-efficient kernel wants masks aligned to 16; these corners begin at columns 15 and 21.
    "a corner at column 15": ([60], [[10, 36, 21]]),
    "a corner at column 21": ([60, 50], [[10, 36], [12, 25]]),
}
HEADS = {"multi-head": (8, 8), "grouped-query": (8, 2), "one key head": (4, 1)}
WINDOWS = (None, 16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION_TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
REPEATS = "attention repeats bit for bit when deterministic"
POLICIES = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head, window": {"num_key_value_heads": 1, "sliding_window": 9},
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the error that was found and the most that is let pass."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


# What is compared as a whole: its name, and the comparisons as they come.
Comparison = tuple[str, Callable[[], Iterable[Check]]]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    """Everything that is compared on `device`."""
    for row, heads, window, precision in itertools.product(ROWS, HEADS, WINDOWS, DTYPES):
        name = f"attention, {row}, {heads}, {f'window {window}, ' if window else ''}{precision}"
        yield name, partial(_attention_check, name, row, heads, window, precision, device)
    yield "log-probs", partial(_logprob_checks, device)
    for kind in POLICIES:
        yield f"policy, {kind}", partial(_policy_checks, kind, device)
    yield "policy, all cases", partial(_bf16_checks, device)
    for precision in DTYPES:
        yield f"{REPEATS}, {precision}", partial(_repeats, device, precision)
        yield f"fused, {precision}", partial(_fused_checks, device, precision)


def relative(found: Tensor, expected: Tensor) -> float:
    """The 2-norm of the difference over that of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- attention and fused functions ----


def _attention_check(
    name: str, row: str, heads: str, window: int | None, precision: str, device: torch.device
) -> Iterator[Check]:
    """The largest relative error among the output and the gradients of query, key and value."""
    layout = build_layout(*ROWS[row]).to(device)
    leaves, upstream = _inputs(layout, HEADS[heads], DTYPES[precision], device)
    found = _attend(None, leaves, upstream, layout, window)
    expected = _attend(attention.dense_kernel, [leaf.float() for leaf in leaves], upstream, layout, window)
    errors = [relative(got, wanted) for got, wanted in zip(found, expected, strict=True)]
    yield Check(name, _largest(errors), ATTENTION_TOLERANCE[precision])


def _repeats(device: torch.device, precision: str) -> Iterator[Check]:
    """Output and gradients of attention, twice, bit for bit."""
    layout = build_layout(*ROWS["pairs"]).to(device)
    leaves, upstream = _inputs(layout, HEADS["grouped-query"], DTYPES[precision], device)
    with deterministic(True):
        first, second = (_attend(None, leaves, upstream, layout, None) for _ in range(2))
    unequal = sum(not torch.equal(one, other) for one, other in zip(first, second, strict=True))
    yield Check(f"{REPEATS}, {precision}", float(unequal), 0.0)


def _fused_checks(device: torch.device, precision: str) -> Iterator[Check]:
    """The fused elementwise functions against their plain twins."""
    for name, error, tolerance in fused.fused_checks(device, DTYPES[precision]):
        yield Check(f"fused, {name}, {precision}", error, tolerance)


def _inputs(
    layout: Layout, counts: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and the gradient of the output."""
    (heads, kv_heads), num_tokens = counts, sum(layout.query_lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, num_tokens, 64) for count in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return leaves, torch.randn(1, num_tokens, heads, 64, generator=generator).to(device)


def _attend(
    kernel: attention.Kernel | None, leaves: list[Tensor], upstream: Tensor, layout: Layout, window: int | None
) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output, _ = attention.packed_attention(
        torch.nn.Identity(), *leaves, None, scaling=0.125, layout=layout, sliding_window=window, kernel=kernel
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def _largest(errors: list[float]) -> float:
    """NaN if there is one: max() would pass over it."""
    return float(np.max(errors))


# ---- log-probs ----


def _logprob_checks(device: torch.device) -> Iterator[Check]:
    """fp32: chunked is full. bf16: chunked is no further from the exact values than all logits at once are."""
    for frozen in (False, True):
        what = "log-probs, frozen head" if frozen else "log-probs"
        for name, dtype in DTYPES.items():
            chunked = _logprobs(_chunked, device, dtype, dtype, frozen)
            plain = _logprobs(full_logprobs, device, dtype, dtype, frozen)
            exact = _logprobs(full_logprobs, device, dtype, torch.float64, frozen)
            for part, got, other, wanted in zip(("forward", "hidden", "weight"), chunked, plain, exact, strict=False):
                most = 1e-6 if name == "fp32" else 1.3 * relative(other, wanted)
                yield Check(f"{what}, {part}, {name}", relative(got, other if name == "fp32" else wanted), most)


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprobs(hidden, weight, targets, chunk_tokens=100)


def _logprobs(
    function: Callable[..., Tensor], device: torch.device, rounded: torch.dtype, dtype: torch.dtype, frozen: bool
) -> list[Tensor]:
    """[log-probs, gradient of the hidden states, of the weight] from inputs that are rounded alike."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((230, 32), (500, 32)))
    targets = torch.randint(500, (230,), generator=generator).to(device)
    upstream = torch.randn(230, generator=generator).to(device)
    hidden, weight = (x.to(device, rounded).to(dtype) for x in (hidden, weight))
    leaves = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    logps = function(hidden, weight, targets)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))]


# ---- the whole policy ----


@dataclasses.dataclass
class _Outcome:
    logps: Tensor
    gradients: dict[str, Tensor]

    @property
    def gradient(self) -> Tensor:
        return torch.cat([gradient.flatten().float() for gradient in self.gradients.values()])


def _policy_checks(kind: str, device: torch.device) -> Iterator[Check]:
    model = _toy(POLICIES[kind]).to(device)
    for num_branches in (1, 2, 3):
        examples, name = _examples(num_branches), f"policy, {kind}, K={num_branches}"
        exact, packed = _outcome(_alone, model, examples), _outcome(_packed, model, examples)
        errors = [relative(packed.gradients[key], wanted) for key, wanted in exact.gradients.items()]
        yield Check(f"{name}, log-probs, fp32", relative(packed.logps, exact.logps), 1e-5)
        yield Check(f"{name}, gradient of each parameter, fp32", _largest(errors), 1e-5)


def _bf16_checks(device: torch.device) -> Iterator[Check]:
    """Packed in bf16 is no further from fp32 than transformers' plain path in bf16 is.

    Both errors are sums of many roundings, taken together over all cases: the margins allow for their luck, not for a
    lost factor of two.
    """
    outcomes = [_bf16_case(kind, num_branches, device) for kind in POLICIES for num_branches in (1, 2, 3)]
    for what, margin in (("logps", 1.5), ("gradient", 1.1)):
        parts = zip(*([getattr(outcome, what).flatten() for outcome in case] for case in outcomes), strict=True)
        got, other, wanted = (torch.cat(part) for part in parts)
        yield Check(f"policy, all cases, {what}, bf16", relative(got, wanted), margin * relative(other, wanted))


def _bf16_case(kind: str, num_branches: int, device: torch.device) -> tuple[_Outcome, _Outcome, _Outcome]:
    """Packed in bf16, plain in bf16, plain in fp32."""
    model = _toy(POLICIES[kind]).to(device)
    half, examples = copy.deepcopy(model).bfloat16(), _examples(num_branches)
    return _outcome(_packed, half, examples), _outcome(_alone, half, examples), _outcome(_alone, model, examples)


def _toy(overrides: dict[str, object]) -> MistralForCausalLM:
    """Four query heads, two layers; matrices scaled up so that the predictions are far from uniform."""
    settings = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**settings, **overrides})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


def _examples(num_branches: int) -> list[Example]:
    """Long and one-token trunks and branches, a branch without a scored token, an empty trunk, a filler."""
    rng = np.random.default_rng(num_branches)
    found = []
    for number, (trunk, low) in enumerate([(13, 3), (1, 1), (27, 5), (0, 8), (60, 2), (1, 1), (33, 9)]):
        lengths = rng.integers(low, low + 30, num_branches) if low > 1 else np.ones(num_branches, dtype=int)
        masks = [np.arange(length) > (length if number == 2 and k else 0) - 1 for k, length in enumerate(lengths)]
        branches = tuple(rng.integers(3, 400, length) for length in lengths)
        found.append(Example(number, rng.integers(3, 400, trunk), branches, tuple(masks)))
    return found


def _outcome(forward: Callable[..., Tensor], model: MistralForCausalLM, examples: Sequence[Example]) -> _Outcome:
    """Log-probs, and the gradients of a sum with a different weight on every branch."""
    model.zero_grad()
    logps = forward(model, examples)
    weights = torch.linspace(-1, 2, logps.numel(), device=logps.device)
    (logps * weights.view_as(logps)).sum().backward()
    return _Outcome(logps.detach(), {name: parameter.grad for name, parameter in model.named_parameters()})


def _packed(model: MistralForCausalLM, examples: Sequence[Example]) -> Tensor:
    model.set_attn_implementation(attention.IMPLEMENTATION)
    fused.fuse(model)
    device = next(model.parameters()).device
    logps = Policy(model)(collate(examples, len(examples[0].branches)).to(device))
    for module in model.modules():  # it is the plain model next
        vars(module).pop("forward", None)
    return logps


def _alone(model: MistralForCausalLM, examples: Sequence[Example]) -> Tensor:
    """[E, K]: each conversation through transformers' plain model by itself, with all its logits."""
    model.set_attn_implementation("eager")
    device = next(model.parameters()).device
    sums = []
    for item in examples:
        for branch, mask in zip(item.branches, item.loss_masks, strict=True):
            ids = torch.from_numpy(np.concatenate([item.trunk, branch])).to(device)
            logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            learned = torch.from_numpy(np.concatenate([np.zeros(len(item.trunk), dtype=bool), mask])[1:])
            sums.append(logps.gather(-1, ids[1:, None]).squeeze(-1)[learned.to(device)].sum())
    return torch.stack(sums).view(len(examples), -1)
