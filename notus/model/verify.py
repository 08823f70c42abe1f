"""Which path computes a model: packed where it is equal to the model's own forward pass, plain elsewhere.

`choose_path` finds out at the start of a run, before any data is read. A cut-down copy of the model, with random
weights, computes one short row: two pairs, log-probs and gradients. The yardstick is plain transformers: each sequence
by itself, through the model's own forward pass with its own `eager` attention, in evaluation mode, in which a
policy keeps the model in training, too (see `Policy.train`).

Limits that the data reach (a sliding window, the context at which rotary frequencies change) lie within the short row;
those that the data do not reach lie beyond it. So a model whose frequencies change at 4,096 tokens is packed where
`longest` is less.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel

from notus.data.packing import Batch, Example, collate
from notus.model.attention import IMPLEMENTATION, recorded_calls
from notus.model.check_config import explained
from notus.model.fused import fuse
from notus.model.make import make_model
from notus.model.plain import PlainPolicy
from notus.model.policy import Policy
from notus.model.structure import blocks_of, pattern_of, text_config, text_parameters
from notus.model.supported import disable_dropout
from notus.runtime.process import first_line

# Nats, the largest difference of a token's log-prob; and of a parameter's gradient, relative. fp32 on random weights
# gives 1e-5 and 1e-4 for deep models; what was wrong in models that were tried began at 1e-2.
LOGPROB_TOLERANCE, GRADIENT_TOLERANCE = 5e-4, 2e-3
# A copy with more parameters than this has fewer and narrower layers.
SMALL = 20_000_000
NARROW, FEW_TOKENS = 16, 512
# No copy has more, so that it fits where a rank's share of the model will be.
MOST = 1_500_000_000
# (trunk, branches): sequences of 10, 7, 4 and 9 tokens.
ROW = ((4, (6, 3)), (2, (2, 7)))

_WIDTHS = re.compile(r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner)(_.*)?")
# What a limit that the data reach becomes. Of the two sequences that padding brings together, one is beyond the context
# from which frequencies change, and one is not.
_LIMITS = {"sliding_window": 5, "attention_chunk_size": 5, "original_max_position_embeddings": 9}
# Parameters of state-space layers that are no matrices of a product, and have values of their own.
_OF_STATE = re.compile(r"(^|\.)(A_log|A|D|dt_bias|time_.*)$")


@dataclasses.dataclass(frozen=True)
class PathChoice:
    """How a model is computed.

    Attributes:
        name: "packed" or "plain".
        reason: why not packed, where the user did not ask for plain.
        attention: the implementation that the plain path uses, as transformers names it.
        padded: the plain path may run sequences together, padded on the right.
        idle: names, or patterns (see `pattern_of`), of linear layers that the model does not call, or whose weights get
            no gradient: an adapter on them has no effect. Empty for a model of which no copy could be tried.
    """

    name: str
    reason: str | None = None
    attention: str = "sdpa"
    padded: bool = False
    idle: frozenset[str] = frozenset()

    @property
    def implementation(self) -> str:
        """The attention implementation that the model is made with."""
        return IMPLEMENTATION if self.name == "packed" else self.attention

    @property
    def kernel(self) -> str:
        """What distinguishes its rounding from another path's, for the plain one."""
        return f"plain-{self.attention}{'-padded' * self.padded}"


def choose_path(
    config: PreTrainedConfig,
    *,
    wanted: str = "auto",
    longest: int = 0,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PathChoice:
    """Return how to compute a model; a few seconds at most, for which a cut-down copy is held in fp32.

    Args:
        config: of the model.
        wanted: "auto", "packed" or "plain".
        longest: most tokens of a sequence; 0: shorter than every limit of the model.
        device: where to try; None: the CPU.
        trust_remote_code: the code that comes with the model may run.

    Raises:
        ValueError: `wanted` is "packed" and that is not equal; the model cannot be built; it is not causal, or its own
            forward pass is random.
    """
    described = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (type(config), described, wanted, longest, device or torch.device("cpu"), trust_remote_code)
    found = _cache.get(key)
    if found is None:
        # Under a mode, tensors may hold no numbers; what is random here must not move what is random elsewhere.
        with (
            _disable_current_modes(),
            torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []),
        ):
            found = _cache[key] = _choose(config, wanted, longest, key[4], trust_remote_code)
    return found


_cache: dict[tuple[Any, ...], PathChoice] = {}


def _choose(config: PreTrainedConfig, wanted: str, longest: int, device: torch.device, trust: bool) -> PathChoice:
    try:
        trial = _Trial(config, longest, device, trust)
    except TooLargeError as error:
        if wanted == "packed":
            raise
        return PathChoice("plain", str(error), "eager")
    reason = None
    if wanted != "plain":
        reason = trial.difference(trial.packed)
        if reason is None:
            return PathChoice("packed", idle=trial.idle)
        if wanted == "packed":
            raise ValueError(
                f"model.path is 'packed', but for {config.model_type!r} that is not what the model computes: {reason}; "
                "set model.path=auto, which takes the plain path"
            )
    for attention, padded in (("sdpa", True), ("eager", True), ("sdpa", False), ("eager", False)):
        wrong = trial.difference(functools.partial(trial.plain, attention, padded))
        if wrong is None:
            return PathChoice("plain", reason, attention, padded, trial.idle)
    raise ValueError(
        f"model type {config.model_type!r}: its own forward pass is not the same with another attention, or twice "
        f"({wrong}); take another model"
    )


@dataclasses.dataclass
class Outcome:
    """What a path computes for the row: log-probs of the completion tokens [M], and gradients by parameter."""

    logps: Tensor
    gradients: dict[str, Tensor]


class TooLargeError(ValueError):
    """A model cannot be cut down to a size that is quick to compute."""


class _Trial:
    """A cut-down copy, and what its own forward pass gives for the row."""

    def __init__(self, config: PreTrainedConfig, longest: int, device: torch.device, trust: bool) -> None:
        self._device, self._trust, self._whole = device, trust, _depth(config)
        failure: Exception | None = None
        for shape in _copies(config, longest, trust):
            failure = self._adopt(shape)
            if failure is None:
                break
        if isinstance(failure, TooLargeError):
            raise failure
        if failure is not None:
            with explained(f"model type {config.model_type!r}", config.to_dict(), "its own forward pass fails"):
                raise failure
        _check_causal(self._own, self._batch.input_ids[: ROW[0][0] + ROW[0][1][0]])

    def _adopt(self, shape: PreTrainedConfig) -> Exception | None:
        """Make a copy of this shape and run its own forward pass, as transformers has it; return what fails."""
        try:
            self._check_size(shape)
            self._own = new_model(shape, "eager", self._trust, torch.float32, self._device).eval()
            _randomise(self._own)
            self._config, self._weights = shape, self._own.state_dict()
            self._batch = _row(min(FEW_TOKENS, text_config(shape).vocab_size)).to(self._device)
            with _calls_of_linears(self._own) as called:
                self._expected = _outcome(PlainPolicy(self._own), self._batch)
            self.idle = _idle(self._own, called, exact=_depth(shape) == self._whole)
        except Exception as error:  # a class may take no other sizes than its own, and says so in any way
            return error
        return None

    def _check_size(self, shape: PreTrainedConfig) -> None:
        count = sum(each.numel() for each in new_model(shape, "eager", self._trust, torch.float32, "meta").parameters())
        if count > MOST:
            raise TooLargeError(f"no copy of it is small enough to be tried: the smallest has {count:.1e} parameters")

    def _build(self, attention: str) -> PreTrainedModel:
        causal_lm = new_model(self._config, attention, self._trust, torch.float32, self._device)
        disable_dropout(causal_lm)
        return causal_lm

    def packed(self) -> Policy:
        causal_lm = self._build(IMPLEMENTATION)
        causal_lm.load_state_dict(self._weights)
        fuse(causal_lm)
        return Policy(causal_lm)

    def plain(self, attention: str, padded: bool) -> PlainPolicy:
        causal_lm = self._build(attention)
        causal_lm.load_state_dict(self._weights)
        return PlainPolicy(causal_lm, padded=padded)

    def difference(self, build: Callable[[], Policy]) -> str | None:
        """Say how a path differs from the model's own forward pass; None if it does not."""
        try:
            policy = build()
            policy.train()
            with recorded_calls() as calls:
                found = _outcome(policy, self._batch)
            if policy.path == "packed":
                _check_called(policy, set(calls))
        except Exception as error:  # a model's code may stumble over what it was not written for in any way
            return _in_words(error)
        return _difference(found, self._expected)


def make_policy(causal_lm: PreTrainedModel, path: PathChoice) -> Policy:
    """Return the policy of a model that was made with the path's implementation of attention."""
    if path.name == "packed":
        return Policy(causal_lm)
    return PlainPolicy(causal_lm, padded=path.padded, reason=path.reason)


def new_model(
    config: PreTrainedConfig, attention: str, trust: bool, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """Return a transformers causal LM without weights of its own, on a device, which may be "meta"."""
    with torch.device(device):
        return make_model(config, trust_remote_code=trust, attn_implementation=attention, dtype=dtype)


def _row(vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Any:
        return torch.randint(3, vocabulary, (count,), generator=generator).numpy()

    def example(index: int, trunk: int, branches: tuple[int, ...]) -> Example:
        masks = tuple(torch.ones(length, dtype=torch.bool).numpy() for length in branches)
        return Example(index, draw(trunk), tuple(draw(length) for length in branches), masks)

    return collate([example(index, *lengths) for index, lengths in enumerate(ROW)], 2)


def _outcome(policy: Policy, batch: Batch) -> Outcome:
    logps = policy.token_logprobs(batch)
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    gradients = {name: each.grad for name, each in policy.named_parameters() if each.grad is not None}
    return Outcome(logps.detach(), gradients)


@contextlib.contextmanager
def _calls_of_linears(causal_lm: nn.Module) -> Iterator[set[nn.Module]]:
    """Yield a set that fills with the linear layers that are called."""
    called: set[nn.Module] = set()
    linears = [module for module in causal_lm.modules() if isinstance(module, nn.Linear)]
    hooks = [each.register_forward_hook(lambda module, *_: called.add(module)) for each in linears]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _idle(causal_lm: PreTrainedModel, called: set[nn.Module], *, exact: bool) -> frozenset[str]:
    """Return the patterns of linear layers of which, in no block, one was called and got a gradient.

    Routed experts are not among them: a row this short has no token for some. If `exact`, the copy has every block of
    the model, and single layers that are idle are among them, too.
    """
    head, of_text = causal_lm.get_output_embeddings(), text_parameters(causal_lm)
    idle: set[str] = set()
    acting: set[str] = set()
    for name, module in causal_lm.named_modules():
        if not isinstance(module, nn.Linear) or module is head or f"{name}.weight" not in of_text:
            continue
        learns = module.weight.grad is not None or not module.weight.requires_grad
        (acting if "expert" in name or (module in called and learns) else idle).add(name)
    patterns = {pattern_of(name) for name in idle} - {pattern_of(name) for name in acting}
    return frozenset(patterns | {name for name in idle if exact and pattern_of(name) not in patterns})


def _depth(config: PreTrainedConfig) -> int | None:
    return getattr(text_config(config), "num_hidden_layers", None)


def _check_called(policy: Policy, calls: set[nn.Module]) -> None:
    """Raise ValueError for a block in which nothing called the packed attention, so that it may mix what is packed."""
    for number, block in enumerate(policy.blocks):
        if not calls & set(block.modules()):
            raise ValueError(f"block {number} ({type(block).__name__}) does not attend through packed attention")


def _in_words(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):  # looked up in a table of its own
        return "its attention is not behind transformers' attention interface"
    return first_line(error) or type(error).__name__


def _difference(found: Outcome, expected: Outcome) -> str | None:
    off = (found.logps - expected.logps).abs().max().item()
    if not off <= LOGPROB_TOLERANCE:
        return f"its log-probs are up to {off:.2g} nats off"
    if not torch.isfinite(expected.logps).all():
        return "its log-probs are not finite"
    floor = 1e-3 * max(each.norm().item() for each in expected.gradients.values())
    for name in sorted(found.gradients.keys() | expected.gradients.keys()):
        pair = [each.gradients.get(name) for each in (found, expected)]
        got, wanted = (torch.zeros(()) if each is None else each for each in pair)
        error = ((got.to(wanted.device) - wanted).norm() / (wanted.norm() + floor)).item()
        if not error <= GRADIENT_TOLERANCE:
            return f"its gradient of {name} is off by {error:.1%}"
    return None


@torch.no_grad()
def _check_causal(causal_lm: PreTrainedModel, ids: Tensor) -> None:
    """Raise ValueError if a later token changes an earlier prediction."""
    half = len(ids) // 2
    other = torch.cat([ids[:half], ids[half:].flip(0)])  # as long, since lengths may matter
    one, two = (causal_lm(input_ids=each[None]).logits[0, :half].float().log_softmax(-1) for each in (ids, other))
    off = (one - two).abs().max().item()
    if off > LOGPROB_TOLERANCE * 10:
        raise ValueError(
            f"model type {causal_lm.config.model_type!r} is not causal as it is configured: later tokens change what "
            "it predicts before; take a causal language model"
        )


# ---- the copy ----


def _copies(config: PreTrainedConfig, longest: int, trust: bool) -> list[PreTrainedConfig]:
    """Configurations to try, the smallest first. Not every model takes narrow layers; then it has few of its own."""
    whole = copy.deepcopy(config)
    _lower_limits(whole, longest)
    meta = new_model(whole, "eager", trust, torch.float32, "meta")
    if sum(each.numel() for each in meta.parameters()) <= SMALL:
        return [whole]
    shallow = copy.deepcopy(whole)
    _cut_layers(shallow, _enough_layers(meta))
    narrow = copy.deepcopy(shallow)
    _cut_widths(narrow)
    slim = copy.deepcopy(narrow)
    _cut_heads(slim)
    return [slim, narrow, shallow]


def _lower_limits(config: PreTrainedConfig, longest: int) -> None:
    """Put limits that the data reach within the row, and let those that it does not reach lie beyond it."""
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for home in (vars(text), *([rope, *nested] if isinstance(rope, dict) else [])):
        for name, within in _LIMITS.items():
            value = home.get(name)
            if isinstance(value, int) and 0 < value < longest:
                home[name] = min(value, within)


def _enough_layers(meta: PreTrainedModel) -> int:
    """How many blocks, from the first, have one of each kind; two at least."""
    kinds = [_kind(block) for block in blocks_of(meta)]
    return max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What distinguishes kinds of blocks: their modules, and their settings except for the block's number."""
    return tuple(
        (name, type(module).__name__, tuple(sorted((key, repr(value)) for key, value in _settings(module))))
        for name, module in block.named_modules()
    )


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    simple = (bool, int, float, str, type(None))
    return [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, simple) and not key.startswith("_") and "idx" not in key and "index" not in key
    ]


def _cut_layers(config: PreTrainedConfig, layers: int) -> None:
    text = text_config(config)
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole and whole > layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(whole, layers)
    vision = getattr(config, "vision_config", None)
    for name in ("num_hidden_layers", "depth"):
        if isinstance(getattr(vision, name, None), int):
            setattr(vision, name, 1)


def _cut_widths(config: PreTrainedConfig) -> None:
    """Narrow the MLPs and shorten the vocabulary."""
    text = text_config(config)
    for name, value in list(vars(text).items()):
        if _WIDTHS.fullmatch(name):
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(text, name, min(value, NARROW))
            elif isinstance(value, list):
                setattr(text, name, [min(each, NARROW) if isinstance(each, int) else each for each in value])
    text.vocab_size = min(text.vocab_size, FEW_TOKENS)
    for part in {id(config): config, id(text): text}.values():
        for name, value in list(vars(part).items()):
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= text.vocab_size:
                setattr(part, name, None if name == "pad_token_id" else 2)


def _cut_heads(config: PreTrainedConfig) -> None:
    """Keep two groups of heads, with as many queries a group, and a residual stream that is as much narrower."""
    text = text_config(config)
    if getattr(text, "num_attention_heads", None) is None:  # a state-space model has none
        return
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    fewer = 2 if groups in (None, heads) else min(2, groups) * (heads // groups)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.hidden_size, text.num_attention_heads = min(text.hidden_size, fewer * width), fewer
    if groups is not None:
        text.num_key_value_heads = min(2, groups)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Give every parameter a part in the result: a soft cap, a bias or a sink that is left out must show."""
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    of_head = None if head is None else getattr(head, "weight", None)
    for name, parameter in model.named_parameters():
        if _OF_STATE.search(name):
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if parameter.dim() < 2:
            parameter.add_((0.5 if name.endswith("bias") or "sink" in name else 0.1) * noise)
        else:
            gain = 3.0 if parameter is of_head else 1.5
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * noise)
