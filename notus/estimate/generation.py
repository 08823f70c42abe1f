"""How long a model takes to generate, and what a judge reads and writes.

Generation has two parts. The prefill computes a prompt once, at the speed of arithmetic; its n samples share it. Then
each decode step makes one token for each of B sequences, and takes the longest of three times:

    memory       (W + B c (T + t)) bytes / (bandwidth * share)   every weight, and the cached keys and values, read once
    computation  B (2 W + 4 layers width (T + t)) / (peak * utilisation)
    host         layers * HOST_SECONDS                           Python launches the kernels of each block

where W is the weights of blocks and head (of a mixture of experts all of them: a batch meets every expert), c the
numbers that a token keeps in the cache, T the prompt's tokens and t half of the steps. The first two are the roofline
of Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102), section 2. In a batch, sequences that
have ended wait for the longest one; a continuous engine puts new ones in their place. Not counted: loading the model,
the tokenizer, the padding of prompts of different lengths, and prompts that a judge's server has cached.
"""

import dataclasses
import math

import numpy as np

from notus.estimate.sizes import SPREAD
from notus.model.flops import GPU, Dimensions, forward_flops
from notus.model.size import ModelSize
from notus.training.memory_estimate import BYTES, RUNTIME_MARGIN

# Shares and times that the estimate assumes.
BANDWIDTH_SHARE = 0.7  # of the memory bandwidth on the data sheet
HOST_SECONDS = 0.5e-3  # of a decode step per block, in transformers' eager code; 0.3e-3 was measured on a CPU core
ANNOTATION = 50  # tokens that a judge writes for one rating: a sentence or two that explain it, and its JSON


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the time of generating follows from.

    Attributes:
        dimensions: of the arithmetic.
        weights: numbers that a decode step reads.
        parameters: numbers that are held, the embedding included.
        cache: numbers that a token keeps, keys and values of all blocks.
        precision: "bf16" or "fp32".
    """

    dimensions: Dimensions
    weights: int
    parameters: int
    cache: int
    precision: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """Data-parallel GPUs, each with the whole model, and the shares of their speed that are assumed."""

    gpu: GPU
    gpus: int
    utilisation: float
    bandwidth_share: float = BANDWIDTH_SHARE

    def operations(self, precision: str) -> float:
        """Operations per second of one GPU."""
        return self.gpu.rate(precision) * 1e12 * self.utilisation


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is generated: `n` answers to each of `prompts` prompts.

    Attributes:
        prompt_tokens: of a prompt, the mean.
        lengths: int [k], tokens of answers, a sample.
        batch_size: sequences at a time on each GPU.
        continuous: whether new sequences take the place of those that ended.
    """

    prompts: int
    n: int
    prompt_tokens: float
    lengths: np.ndarray
    batch_size: int
    continuous: bool = False

    @property
    def count(self) -> int:
        """Sequences."""
        return self.prompts * self.n

    @property
    def tokens(self) -> float:
        """Generated tokens."""
        return self.count * float(self.lengths.mean())


@dataclasses.dataclass(frozen=True)
class Generation:
    """Seconds of generating.

    Attributes:
        prefill, decode: of all prompts and of all steps, on as many GPUs as there are.
        step: of one decode step.
        bound: what a step waits for: "memory", "computation" or "host".
        batch: sequences that a step serves.
        missing: bytes by which a GPU's memory is too small for weights and cache; negative: bytes to spare.
    """

    prefill: float
    decode: float
    step: float
    bound: str
    batch: int
    missing: float

    @property
    def seconds(self) -> float:
        """Prefill and decode."""
        return self.prefill + self.decode


def decoder(size: ModelSize, dimensions: Dimensions, precision: str) -> Decoder:
    """Return what generating follows from, of a model without adapters (they are merged)."""
    return Decoder(
        dimensions,
        weights=size.parameters - size.root + dimensions.head_weights,
        parameters=size.parameters,
        cache=size.layers * (size.key_width + size.value_width),
        precision=precision,
    )


def draw_answers(mean: float, most: int, seed: int = 0) -> np.ndarray:
    """Return int64 [4096]: log-normal lengths of answers with this mean before the cut at `most` tokens."""
    normal = np.random.default_rng(seed).standard_normal(4096)
    lengths = mean * np.exp(SPREAD * normal - SPREAD**2 / 2)
    return lengths.round().astype(np.int64).clip(1, most)


def expected_longest(lengths: np.ndarray, batch: int) -> float:
    """Return the mean over batches of the longest of `batch` lengths, drawn with replacement from `lengths`."""
    ordered = np.sort(lengths)
    below = (np.arange(len(ordered) + 1) / len(ordered)) ** batch  # the chance that all are among the i shortest
    return float((ordered * np.diff(below)).sum())


def generation(model: Decoder, machine: Machine, answers: Answers) -> Generation:
    """Return how long a model takes to generate answers; the formulas stand at the head of this module."""
    prompts, sequences = math.ceil(answers.prompts / machine.gpus), math.ceil(answers.count / machine.gpus)
    batch = max(1, min(answers.batch_size, sequences))  # there may be none
    if answers.continuous:
        steps = sequences * float(answers.lengths.mean()) / batch
        at_once = float(answers.lengths.mean())
    else:
        at_once = expected_longest(answers.lengths, batch)
        steps = math.ceil(sequences / batch) * at_once
    times = _step(model, machine, batch, answers.prompt_tokens + at_once / 2)
    bound = max(times, key=times.__getitem__)
    longest = answers.prompt_tokens + float(answers.lengths.max())
    held = BYTES[model.precision] * (model.parameters + batch * longest * model.cache)
    return Generation(
        prefill=prompts * scoring(model, machine, answers.prompt_tokens),
        decode=steps * times[bound],
        step=times[bound],
        bound=bound,
        batch=batch,
        missing=held + RUNTIME_MARGIN - machine.gpu.capacity,
    )


def scoring(model: Decoder, machine: Machine, tokens: float) -> float:
    """Return the seconds that one GPU takes for a forward pass over `tokens` tokens, the head on the last one alone."""
    whole = np.array([round(tokens)])
    operations = forward_flops(model.dimensions, whole, np.zeros((1, 0), dtype=np.int64), np.ones(1, dtype=np.int64))
    return float(operations[0]) / machine.operations(model.precision)


def _step(model: Decoder, machine: Machine, batch: int, context: float) -> dict[str, float]:
    """Seconds of one decode step by what it would wait for."""
    flops = model.dimensions
    read = BYTES[model.precision] * (model.weights + batch * context * model.cache)
    products = 2 * (flops.body_weights + flops.head_weights) + 4 * flops.layers * flops.attention_width * context
    return {
        "memory": read / (machine.gpu.bandwidth * 1e9 * machine.bandwidth_share),
        "computation": batch * products / machine.operations(model.precision),
        "host": flops.layers * HOST_SECONDS,
    }


@dataclasses.dataclass(frozen=True)
class Judging:
    """What a judge is asked: whole numbers of requests and tokens."""

    requests: int
    tokens_in: int
    tokens_out: int

    def cost(self, price_in: float, price_out: float) -> float:
        """USD at prices per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


def judging(
    prompts: int,
    completions: int,
    *,
    instructions: float,
    around: float,
    prompt_tokens: float,
    completion_tokens: float,
    aspects: int,
    again_share: float,
) -> Judging:
    """Return what it takes to rate `completions` completions of each prompt, all of them in one request.

    Args:
        prompts: how many are rated.
        completions: of each prompt.
        instructions: tokens of the judge's instructions.
        around: tokens that each completion adds beside its own: its tags, and its part in the form of the answer.
        prompt_tokens, completion_tokens: means.
        aspects: ratings of each completion.
        again_share: share of the prompts that is rated a second time.
    """
    requests = prompts + round(prompts * again_share)
    asked = instructions + prompt_tokens + completions * (completion_tokens + around)
    return Judging(requests, round(requests * asked), requests * completions * aspects * ANNOTATION)
