"""The rows of the table of `gpu.py`: the model for the memory at hand, pairs, and how a configuration is measured."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
from transformers import AutoModelForCausalLM, MistralConfig, OlmoeConfig, PreTrainedConfig

from common import GIB, synchronize
from gpu_report import in_words
from notus.data.packing import Example, collate
from notus.model.fused import KERNELS
from notus.model.kernels import failures
from notus.model.quantization import DEQUANTIZE
from notus.runtime.switches import OPTIMISATIONS, disabled, disabled_names
from notus.training.activation_checkpointing import MODES
from notus.training.optimizers import RMSprop
from profile_step import longest, record, shares
from step import Step, build, num_tokens, predicted_bytes, random_example, work_of
from step import rows as rows_of

# ---- the model and the pairs ----

PAIRS_PER_STEP = 64
LONGEST = 1024  # prompt and completion, as `data.max_length`
# Means of trunk, chosen and rejected, and the spread of their logarithms.
LENGTHS = ((176, 0.9), (300, 0.7), (280, 0.7))
# Per parameter, on one rank: master, gradient, RMSprop's state, and either the gathered bf16 copy or the optimizer's
# temporaries; with a frozen bf16 base the weight and its gathered copy.
BYTES_FULL, BYTES_LORA = 4 + 4 + 4 + 4, 2 + 2
SHARE_FOR_ACTIVATIONS = 0.15

MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, sliding_window=4096, pad_token_id=None,
)  # fmt: skip
SMALL = MistralConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=32768, sliding_window=4096, pad_token_id=None,
)  # fmt: skip
# OLMoE-1B-7B: 6.9 billion parameters, of which a token meets 1.3 billion.
OLMOE_7B = OlmoeConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096, pad_token_id=None,
    tie_word_embeddings=False,
)  # fmt: skip
TOY_MIXTURE = OlmoeConfig(
    vocab_size=400, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, max_position_embeddings=512, pad_token_id=None,
    bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
TOY = MistralConfig(
    vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=None, pad_token_id=None,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        shapes, mixtures: by name, the largest first; layers are left out until one fits. Mixtures are of experts.
        pairs_per_step: of an optimizer step.
        divisor: lengths are UltraFeedback's divided by this.
        tokens_per_row: to begin with, by activation checkpointing; halved while memory does not suffice.
        least_tokens_per_row: below which it is not halved.
    """

    shapes: dict[str, PreTrainedConfig]
    mixtures: dict[str, PreTrainedConfig]
    pairs_per_step: int
    divisor: int
    tokens_per_row: dict[str, int]
    least_tokens_per_row: int


GPU = Scale(
    shapes={"Mistral-7B": MISTRAL_7B, "Mistral, width 2048": SMALL},
    mixtures={"OLMoE-1B-7B": OLMOE_7B},
    pairs_per_step=PAIRS_PER_STEP,
    divisor=1,
    tokens_per_row={"full": 16384, "selective": 8192, "products": 8192, "none": 4096},
    least_tokens_per_row=2048,
)
CPU = Scale(
    shapes={"toy": TOY},
    mixtures={"toy mixture": TOY_MIXTURE},
    pairs_per_step=8,
    divisor=16,
    tokens_per_row={"full": 512, "selective": 256, "products": 256, "none": 256},
    least_tokens_per_row=128,
)


def parameters(config: PreTrainedConfig) -> int:
    """Of a model of this shape."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in causal_lm.parameters())


def fitting(scale: Scale, memory: int | None, *, lora: bool, mixture: bool = False) -> tuple[str, PreTrainedConfig]:
    """The name and the largest shape whose weights and optimizer fit into `memory` bytes (None: any fits).

    Raises:
        ValueError: not even four layers of the smallest shape do.
    """
    per_parameter = BYTES_LORA if lora else BYTES_FULL
    for name, whole in (scale.mixtures if mixture else scale.shapes).items():
        for layers in sorted({whole.num_hidden_layers, 24, 16, 12, 8, 4}, reverse=True):
            config = type(whole)(**{**whole.to_dict(), "num_hidden_layers": min(layers, whole.num_hidden_layers)})
            if memory is None or parameters(config) * per_parameter <= (1 - SHARE_FOR_ACTIVATIONS) * memory:
                cut = layers < whole.num_hidden_layers
                return f"{name}, {layers} of {whole.num_hidden_layers} layers" if cut else name, config
    raise ValueError("less than 4 GB of memory: run with --cpu")


def pairs(count: int, scale: Scale, vocab: int, *, num_branches: int = 2, seed: int = 0) -> list[Example]:
    """`count` examples of random tokens with UltraFeedback's lengths; with one branch, the chosen one alone."""
    rng = np.random.default_rng(seed)
    longest, found = LONGEST // scale.divisor, []
    for number in range(count):
        trunk, *branches = (
            max(1, int(rng.lognormal(np.log(mean / scale.divisor) - spread**2 / 2, spread))) for mean, spread in LENGTHS
        )
        trunk = min(trunk, longest // 2)
        branches = [min(branch, longest - trunk) for branch in branches][:num_branches]
        found.append(random_example(rng, vocab, trunk, *branches, number=number))
    return found


# ---- the configurations ----

LEAST_STEPS, MOST_STEPS, STEPS_OF_DATA = 2, 8, 4


# Checkpointing modes, the one that is expected to be the fastest first; "none" fits only into short rows.
PREFERENCE = ("products", "selective", "full", "none")
BY_PREFERENCE = sorted(MODES, key=lambda mode: PREFERENCE.index(mode) if mode in PREFERENCE else len(PREFERENCE))
# Optimisations that a row leaves out to compare, on CUDA. This one is to be seen in compiled blocks alone.
COMPARED = ("fused_elementwise", "gradient_handover", "fused_optimizer", "fp32_addmm")
COMPARED_COMPILED = ("graph_attention",)
# Each configuration compiles graphs of its own; past the limit, which is 8, blocks would run uncompiled.
torch._dynamo.config.recompile_limit = 128


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        task: "dpo" or "sft".
        rank: of LoRA; 0: every parameter is trained.
        variant: "shared", "packed" or "padded", see `step.rows`.
        checkpointing: one of `MODES`.
        compile: each block.
        profile: find the shares of its time, too.
        without: optimisations that are switched off, see `notus.runtime.switches`.
        again: measured before; how far two measurements are apart says what a difference means.
        quantization: of the frozen base: "nf4" or None.
        optimizer: its name and the dtype of its states, as in the config.
        mixture: of experts, not a dense model.
    """

    task: str
    rank: int
    variant: str
    checkpointing: str = BY_PREFERENCE[0]
    compile: bool = False
    profile: bool = False
    without: tuple[str, ...] = ()
    again: bool = False
    quantization: str | None = None
    optimizer: tuple[str, str] = ("rmsprop", "fp32")
    mixture: bool = False

    @property
    def name(self) -> str:
        kind = f"{'Q' if self.quantization else ''}LoRA r={self.rank}" if self.rank else "full"
        compiled = ", compiled" if self.compile else ""
        without = f", without {self.without[0]}" if self.without else ", again" if self.again else ""
        without = ", all optimisations off" if len(self.without) > 1 else without
        mixture = "MoE " if self.mixture else ""
        states = "" if self.optimizer == ("rmsprop", "fp32") else f", {' '.join(self.optimizer)}"
        what = f"{mixture}{self.task.upper()} {kind}, {self.variant}, checkpointing {self.checkpointing}"
        return f"{what}{compiled}{states}{without}"


def plan(rank: int) -> list[Row | str]:
    """Every row, the most important first; a name stands for a row of another kind, see `gpu_worker.row_tasks`.

    Args:
        rank: of the LoRA rows.
    """
    full = [Row("dpo", 0, "shared", mode, profile=mode == BY_PREFERENCE[0]) for mode in BY_PREFERENCE]
    compiled = [Row("dpo", 0, "shared", mode, compile=True, profile=mode == BY_PREFERENCE[0]) for mode in BY_PREFERENCE]
    switched = [Row("dpo", 0, "shared", again=True)]
    switched += [Row("dpo", 0, "shared", without=(name,)) for name in COMPARED]
    switched += [Row("dpo", 0, "shared", compile=True, without=(name,)) for name in COMPARED_COMPILED]
    switched.append(Row("dpo", 0, "shared", without=tuple(OPTIMISATIONS)))
    states = [Row("dpo", 0, "shared", optimizer=("adamw", dtype)) for dtype in ("int8", "bf16", "fp32")]
    mixtures = [Row("dpo", 0, "shared", mode, mixture=True) for mode in ("products", "full")]
    first, later = [], []
    for task, size, sharing in (("dpo", rank, "shared"), ("sft", 0, "packed")):
        first += [Row(task, size, sharing), Row(task, size, "padded")]
        later += [Row(task, size, sharing, compile=True)]
        later += [Row(task, size, sharing, mode) for mode in BY_PREFERENCE[1:]]
    quantized = [Row("dpo", rank, "shared", mode, quantization="nf4") for mode in BY_PREFERENCE]
    later += [Row("dpo", rank, "shared", compile=True, quantization="nf4")]
    return [
        *full, *compiled[:2], "transformers", "trl", Row("dpo", 0, "padded"), *mixtures, *states, *switched,
        *first, *quantized, "recompiles", Row("dpo", 0, "packed"), Row("dpo", rank, "packed"), *compiled[2:], *later,
    ]  # fmt: skip


def release(device: torch.device) -> None:
    """Free what a row has left: modules and their hooks refer to each other in circles.

    Compiled code stays, for the next row that has the same graph. It keeps no weights alive: those are inputs to it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()  # an error of a kernel is reported here at the latest
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(row: Row, scale: Scale, device: torch.device, seconds: float, memory: int | None) -> dict[str, Any]:
    """Measure a row; on CUDA with rows of half as many tokens as long as memory does not suffice.

    Args:
        row: what.
        scale: how large.
        device: where.
        seconds: that the timed steps may take.
        memory: of the device, in bytes.

    Raises:
        torch.OutOfMemoryError: not even the shortest rows fit.
    """
    shape, config = fitting(scale, memory, lora=row.rank > 0, mixture=row.mixture)
    tokens = scale.tokens_per_row[row.checkpointing]
    while True:
        found = _try(row, config, scale, device, seconds, tokens)
        if found is not None:
            return {"shape": shape, "parameters": parameters(config), **dataclasses.asdict(row), **found}
        tokens //= 2
        release(device)
        if tokens < scale.least_tokens_per_row:
            raise torch.OutOfMemoryError("not even the shortest rows fit")


def _try(
    row: Row, config: PreTrainedConfig, scale: Scale, device: torch.device, seconds: float, tokens_per_row: int
) -> dict[str, Any] | None:
    """None if memory does not suffice; what was built is gone by the return."""
    try:
        with disabled(*disabled_names(), *row.without):
            return _measured(row, config, scale, device, seconds, tokens_per_row)
    except torch.OutOfMemoryError:
        return None


def _measured(
    row: Row, config: PreTrainedConfig, scale: Scale, device: torch.device, seconds: float, tokens_per_row: int
) -> dict[str, Any]:
    policy, work = build(
        config,
        device,
        rank=row.rank,
        checkpointing=row.checkpointing,
        compile=row.compile,
        quantization=row.quantization,
    )
    step = Step(policy, row.task, config.vocab_size, row.optimizer)
    steps = steps_of(row, scale, config.vocab_size)
    longest = LONGEST // scale.divisor
    batches = [rows_of(row.variant, examples, tokens_per_row, longest) for examples in steps]
    times = timed(lambda number: step(batches[number]), seconds, device, warm_up=2 if row.compile else 1)
    found: dict[str, Any] = {
        "tokens_per_row": tokens_per_row,
        "pairs_per_step": len(steps[0]),
        "rows_per_step": len(batches[0]),
        **rates(times, steps),
        "necessary_flops_per_second": median(work.necessary(steps[number]) / took for number, took in times),
        **peaks(device),
    }
    if unused := failures((*KERNELS, DEQUANTIZE, RMSprop.kernel)):
        found["notes"] = unused
    extra(found, "done_flops_per_second", lambda: median(work.done(batches[number]) / took for number, took in times))
    fullest = [each for batch in batches for each in batch]
    extra(found, "predicted_gib", lambda: predicted_bytes(work, fullest, optimizer=row.optimizer) / GIB)
    if row.profile:
        extra(found, "shares", lambda: _profile(found, lambda: step(batches[0])))
    return found


def _profile(found: dict[str, Any], step: Callable[[], object]) -> dict[str, float]:
    """The shares of a step's time; the device's longest events go into `found`."""
    events = record(step)
    found["longest_events"] = longest(events)
    return shares(events)


def extra(found: dict[str, Any], key: str, function: Callable[[], Any]) -> None:
    """Add what is good to know: an error in it becomes a note, and what was measured stays."""
    try:
        found[key] = function()
    except Exception as error:
        found.setdefault("notes", []).append(f"no {key}: {in_words(error)}")


def steps_of(row: Row, scale: Scale, vocab: int) -> list[list[Example]]:
    """The same few steps' examples for every row of a task."""
    size = scale.pairs_per_step
    examples = pairs(STEPS_OF_DATA * size, scale, vocab, num_branches=2 if row.task == "dpo" else 1)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def timed(
    step: Callable[[int], object], seconds: float, device: torch.device, warm_up: int = 1
) -> list[tuple[int, float]]:
    """(which of the steps of data, seconds) of some steps after warming up: for `seconds`, but at least two."""
    for number in range(warm_up):
        _seconds(step, number, device)
    times: list[tuple[int, float]] = []
    while len(times) < LEAST_STEPS or (len(times) < MOST_STEPS and sum(took for _, took in times) < seconds):
        number = (warm_up + len(times)) % STEPS_OF_DATA
        times.append((number, _seconds(step, number, device)))
    return times


def _seconds(step: Callable[[int], object], number: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step(number)
    synchronize(device)
    return time.perf_counter() - start


def rates(times: Sequence[tuple[int, float]], steps: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """Medians over the timed steps; tokens are those of packed rows with sharing, whatever the variant."""
    tokens = [sum(map(num_tokens, step)) for step in steps]
    return {
        "steps": len(times),
        "times": [list(item) for item in times],
        "seconds_per_step": median(took for _, took in times),
        "pairs_per_second": median(len(steps[number]) / took for number, took in times),
        "tokens_per_second": median(tokens[number] / took for number, took in times),
    }


def necessary_rate(
    config: MistralConfig, steps: Sequence[Sequence[Example]], times: Sequence[tuple[int, float]]
) -> float:
    """Necessary operations per second of full fine-tuning, whoever does it."""
    work = work_of(config, "none")
    return median(work.necessary(steps[number]) / took for number, took in times)


def peaks(device: torch.device) -> dict[str, float]:
    """GiB that were allocated, and reserved by the allocator, at most since the last `release`; empty on CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def recompiles(scale: Scale, device: torch.device, steps: int = 50) -> dict[str, Any]:
    """How many graphs are compiled over steps of rows that all differ, of two layers, which are alike.

    What an earlier row compiled is used again, so there may be none.
    """
    whole = next(iter(scale.shapes.values()))
    config = MistralConfig(**{**whole.to_dict(), "num_hidden_layers": 2})
    policy, _ = build(config, device, rank=0, checkpointing=BY_PREFERENCE[0], compile=True)
    examples, rng = pairs(4 * steps, scale, config.vocab_size), np.random.default_rng(0)
    before, after = _graphs(), []
    for number in range(steps):
        row = examples[4 * number : 4 * number + int(rng.integers(1, 5))]
        policy(collate(row, 2).to(device)).sum().backward()
        policy.zero_grad()
        after.append(_graphs() - before)
    return {"steps": steps, "graphs": after[-1], "graphs_after_two_steps": after[1], "graphs_by_step": after}


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
