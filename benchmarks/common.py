"""What several benchmarks share: made models and pairs, the machine, stopwatches, tables.

Importing this module imports the standard library alone, since a supervisor must stay light and without torch.
`python common.py MODEL_FOLDER SEED SIZE` writes a made model.
"""

import dataclasses
import hashlib
import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import MistralConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the project, installed or not
MIB, GIB = 2**20, 2**30

# ---- made pairs ----

VOCABULARY = 8_000  # words in the pairs, whatever the model's size
MEAN_PROMPT, MEAN_COMPLETION = 125, 45
# Standard deviation of the logarithm of the lengths. 300 real pairs (Capybara, Orca, UltraFeedback) have 1.5 for
# prompts, 1.1 to 1.3 for completions, and a correlation of 0.45 between them. The narrower spread here leaves the peer
# less padding.
LOG_SPREAD, CORRELATION = 0.7, 0.45
LONGEST_PROMPT, LONGEST_COMPLETION = 512, 256


def made_lengths(
    generator: "np.random.Generator",
    count: int,
    prompt: int = MEAN_PROMPT,
    completion: int = MEAN_COMPLETION,
    spread: float = LOG_SPREAD,
) -> "np.ndarray":
    """Words of prompt, chosen and rejected, int64 [count, 3]: log-normal, or all the same at a `spread` of 0.

    `<s>` and `</s>` are tokens of the means too.
    """
    import numpy as np

    covariance = np.array([[1, 0, 0], [0, 1, CORRELATION], [0, CORRELATION, 1]])
    normal = generator.multivariate_normal(np.zeros(3), covariance, size=count)
    means = np.array([prompt, completion, completion]) - 1
    lengths = np.exp(np.log(means) - spread**2 / 2 + spread * normal)
    longest = np.maximum(3 * means, [LONGEST_PROMPT, LONGEST_COMPLETION, LONGEST_COMPLETION])
    return np.clip(lengths.round().astype(int), 2, longest)


def make_pairs(
    path: Path,
    count: int,
    seed: int,
    *,
    prompt: int = MEAN_PROMPT,
    completion: int = MEAN_COMPLETION,
    spread: float = LOG_SPREAD,
) -> None:
    """Write `count` pairs of random words as JSONL, with lengths by `made_lengths`."""
    import numpy as np

    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for lengths in made_lengths(generator, count, prompt, completion, spread):
            texts = [" ".join(f"w{word}" for word in generator.integers(0, VOCABULARY - 3, size=n)) for n in lengths]
            pair = {"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}
            file.write(json.dumps(pair) + "\n")


# ---- made models ----

# 15.6M, 100.1M and 1.1B parameters (the last is for a GPU)
SIZES: dict[str, dict[str, Any]] = {
    "15m": {"vocab_size": 8_000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
            "num_attention_heads": 6, "num_key_value_heads": 2},
    "100m": {"vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4},
    "1b": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip


def model_config(size: str = "15m", **overrides: Any) -> "MistralConfig":
    """A Mistral of one of `SIZES`."""
    from transformers import MistralConfig

    settings = {"head_dim": 64, "max_position_embeddings": 2048, "sliding_window": None, "bos_token_id": 1,
                "eos_token_id": 2, **SIZES[size], **overrides}  # fmt: skip
    return MistralConfig(**settings)


def make_model(folder: Path, seed: int, size: str = "15m", **overrides: Any) -> None:
    """Write a randomly initialised Mistral and its tokenizer to `folder`."""
    import torch
    from transformers import MistralForCausalLM

    torch.manual_seed(seed)
    MistralForCausalLM(model_config(size, **overrides)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer(vocabulary: int = VOCABULARY) -> "PreTrainedTokenizerFast":
    """One token per word `w0`, `w1`, ...: the text fixes the token ids, whoever tokenises it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    words = [*specials, *(f"w{number}" for number in range(vocabulary - len(specials)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# ---- the machine ----


def describe_machine() -> str:
    """Device, threads and version of torch."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


class PeakMemory:
    """The most memory in use from its creation on: resident set as Linux counts it, or allocated on CUDA."""

    def __init__(self) -> None:
        """Create it after the imports."""
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        self.baseline_mib = 0.0
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
            self.baseline_mib = process_memory("VmRSS")

    def peak_mib(self) -> float:
        return self._cuda.max_memory_allocated() / MIB if self._cuda else process_memory("VmHWM")


def process_memory(name: str) -> float:
    """MiB of this process that Linux counts under `name`: "VmRSS", "VmHWM", "RssAnon"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done all that it was asked to."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def fastest(call: Callable[[], object], device: "torch.device", seconds: float) -> float:
    """Seconds of the fastest call in so many seconds, after one to warm up."""
    best, end = float("inf"), time.perf_counter() + seconds
    call()
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(
    layers: Iterable[tuple[Sequence[int], int, int]], device: "torch.device", dtype: "torch.dtype", seconds: float
) -> float:
    """FLOP/s of the three products of a training step of each linear layer, each product alone at its fastest.

    Args:
        layers: (shape of the weight, tokens, how many layers are like this).
        device: where.
        dtype: of all operands.
        seconds: for which each product is repeated.
    """
    import torch

    total, flops = 0.0, 0
    for (outputs, inputs), tokens, count in layers:
        sizes = ((outputs, inputs), (tokens, inputs), (tokens, outputs))
        weight, hidden, gradient = (torch.randn(size, dtype=dtype, device=device) for size in sizes)
        for product in (lambda: hidden @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ hidden):  # noqa: B023
            total += count * fastest(product, device, seconds)
        flops += count * 6 * tokens * outputs * inputs
    return flops / total


# ---- a job for a measured process, and its outcome; `--against` needs both to stay as they are ----

BETA = 0.1
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0


class Stored:
    """Reads and writes a dataclass as JSON."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: str | Path) -> None:
        assert dataclasses.is_dataclass(self)
        Path(path).write_text(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Job(Stored):
    """One run of one side: RMSprop, linear schedule, no dropout, examples in the order of the file.

    Attributes:
        model: folder of a Hugging Face causal LM with its tokenizer.
        pairs: JSONL file with the strings `prompt`, `chosen` and `rejected`.
        scratch: an empty folder for whatever the run writes.
        precision: `fp32` or `bf16` (fp32 weights, bf16 arithmetic).
        max_length: no pair is longer than this, so that nothing is truncated.
        options: what is particular to this side.
    """

    model: str
    pairs: str
    scratch: str
    batch_size: int
    epochs: int
    precision: str
    learning_rate: float
    max_length: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome(Stored):
    """What one run of one side measured.

    Attributes:
        seconds: reference pass and training; without imports, loading and tokenisation.
        reference_seconds: of these, a reference pass ahead of training (0 where it runs inside the steps).
        total_seconds: from after the imports to the last step's end: loading and tokenisation too; no export.
        losses: one per optimizer step.
        step_seconds: one per optimizer step; where the reference pass runs inside the steps, it is in them.
        baseline_mib: memory in use after the imports (on CUDA: 0).
        peak_mib: the most memory in use from then on: resident set, or allocated CUDA memory.
        machine: device, threads and version of torch.
        tokens: per pair, in the order of the file, what `describe_tokens` says.
    """

    seconds: float
    reference_seconds: float
    total_seconds: float
    losses: list[float]
    step_seconds: list[float]
    baseline_mib: float
    peak_mib: float
    machine: str
    tokens: list[list[Any]]


def describe_tokens(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> list[Any]:
    """A pair's token counts and the digest of its ids: `[prompt, chosen, rejected, digest]`."""
    counts = [len(prompt), len(chosen), len(rejected)]
    ids = [*prompt, *chosen, *rejected]
    packed = struct.pack(f"<{len(ids) + 3}q", *counts, *ids)
    return [*counts, hashlib.blake2b(packed, digest_size=8).hexdigest()]


# ---- tables ----


def markdown(heads: Sequence[object], rows: Iterable[Sequence[object]], align: str = "---") -> str:
    """A Markdown table."""
    lines = [heads, [align] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_json(path: Path, found: object) -> None:
    path.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
