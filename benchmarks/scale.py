"""Seconds and memory from a million pairs on disk to packed rows: `python benchmarks/scale.py [--pairs 10000 100000]`.

Seeded pairs of UltraFeedback's lengths (prompts of about 176 tokens, completions of about 300 and 280, long tails) are
written to disk, tokenised by `load_pairs` with two workers, opened, digested, planned and packed for one of 8 ranks.
Every phase is a process of its own. Its private memory is what it holds beside files that are mapped: those are read
through the system's page cache, which gives way when memory is short.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import MIB, markdown, process_memory, write_json

if TYPE_CHECKING:
    from notus.data.dataset import TokenizedDataset

MEAN_TOKENS = (176, 300, 280)  # prompt, chosen, rejected
SPREADS = (1.0, 0.8, 0.8)  # standard deviation of the lengths' logarithm
CORRELATIONS = ((1.0, 0.3, 0.3), (0.3, 1.0, 0.5), (0.3, 0.5, 1.0))
MAX_LENGTH, MAX_PROMPT = 1024, 512
RANKS, BATCH_SIZE, TOKENS_PER_ROW = 8, 64, 8192
WORKERS = 2
_VOCABULARY, _DISTINCT_WORDS, _TOKENS_PER_WORD = 8000, 20_000, 2.3


def random_lengths(generator: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of prompt, chosen and rejected: int64 [count, 3], at least 4 each."""
    normal = generator.multivariate_normal(np.zeros(3), np.array(CORRELATIONS), size=count)
    spreads = np.array(SPREADS)
    lengths = np.exp(np.log(MEAN_TOKENS) - spreads**2 / 2 + spreads * normal)
    return np.clip(lengths.round().astype(int), 4, None)


def make_words(seed: int) -> list[str]:
    """Made-up words, as many as a large text has, some of them beyond ASCII."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmwfgypbvkäß数"))
    return ["".join(generator.choice(letters, size)) for size in generator.integers(2, 11, size=_DISTINCT_WORDS)]


def make_pairs(path: Path, count: int, seed: int, shorter: float = 1) -> None:
    """Write `count` pairs as JSON lines, a few at a time; their lengths are divided by `shorter`."""
    generator = np.random.default_rng([seed, 1])
    text = generator.permutation(make_words(seed) * 5).tolist()
    names = ("prompt", "chosen", "rejected")
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, count, 1000):
            sizes = (random_lengths(generator, min(1000, count - first)) / (shorter * _TOKENS_PER_WORD)).astype(int) + 1
            starts = generator.integers(0, len(text) - 20_000, size=sizes.shape)
            for row, sizes_of_row in zip(starts.tolist(), np.minimum(sizes, 20_000).tolist(), strict=True):
                parts = (" " + " ".join(text[at : at + size]) for at, size in zip(row, sizes_of_row, strict=True))
                file.write(json.dumps(dict(zip(names, parts, strict=True)), ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path, seed: int) -> None:
    """Train a byte-level BPE tokenizer on the words and write it to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(make_words(seed))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@dataclasses.dataclass
class Measured:
    """One phase, in a process of its own.

    Attributes:
        phase: its name.
        pairs: pairs on disk.
        seconds: the phase alone, without imports and what earlier phases did.
        private_mib: the most private memory at a time, less what it was after the imports.
        worker_mib: the largest resident set of a process that it started, 0 if none.
        notes: what was found.
    """

    phase: str
    pairs: int
    seconds: float
    private_mib: float
    worker_mib: float
    notes: str


class _PrivateMemory(threading.Thread):
    """The most anonymous memory of this process, looked at every 20 ms: Linux keeps no record of it."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()
        self._before = self._most = process_memory("RssAnon")
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self._most = max(self._most, process_memory("RssAnon"))

    def end(self) -> float:
        """MiB at the most, less what was there at the beginning."""
        self._ended.set()
        self.join()
        return max(self._most, process_memory("RssAnon")) - self._before


def measure(phase: str, folder: Path, files: list[Path]) -> Measured:
    """Run a phase here, on the pairs of these files; those before it have run."""
    from transformers import AutoTokenizer

    from notus.data.dataset import TokenizedDataset
    from notus.data.tokenize import load_pairs

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    memory, began = _PrivateMemory(), time.perf_counter()
    dataset, report = load_pairs(
        [{"path": str(file)} for file in files],
        tokenizer,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT,
        num_workers=WORKERS,
        cache_dir=folder / "cache",
    )
    notes = f"{report.kept:,} rows"
    if phase != "tokenise":
        rows = TokenizedDataset(dataset)
        notes = f"{rows.lengths.mean():.0f} tokens a pair"
        if phase != "open":
            began = time.perf_counter()
            notes = {"digest": _digest, "plan": _plan, "pack": _pack}[phase](rows)
    seconds = time.perf_counter() - began
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return Measured(phase, report.read, seconds, memory.end(), worker, notes)


PHASES = ("tokenise", "open", "digest", "plan", "pack")


def _digest(rows: "TokenizedDataset") -> str:
    return f"{rows.digests().nbytes / MIB:.1f} MiB of digests"


def _steps(rows: "TokenizedDataset") -> Iterator[tuple[np.ndarray, list[float], list[list[list[int]]]]]:
    """A step's rows, their costs and how they are dealt, for one epoch."""
    from notus.data.batching import StepPlan, balance
    from notus.model.flops import Dimensions, forward_flops

    mistral = Dimensions(layers=32, attention_width=4096, body_weights=6_979_321_856, head_weights=131_072_000)
    costs = forward_flops(mistral, rows.trunk_lengths, rows.branch_lengths, rows.loss_tokens.sum(axis=1))
    plan = StepPlan(len(rows), BATCH_SIZE)
    for step in range(plan.steps_per_epoch):
        indices = plan.indices(step)
        of_step = costs[indices].tolist()
        yield indices, of_step, balance(rows.lengths[indices].tolist(), of_step, RANKS, TOKENS_PER_ROW)


def _plan(rows: "TokenizedDataset") -> str:
    from notus.data.batching import lockstep_cost

    began, steps, cost, paid = time.perf_counter(), 0, 0.0, 0.0
    for _, costs, balanced in _steps(rows):
        steps, cost, paid = steps + 1, cost + sum(costs), paid + RANKS * lockstep_cost(balanced, costs)
    each = (time.perf_counter() - began) / steps
    return f"{steps:,} steps, {1e3 * each:.2f} ms each; {RANKS} ranks idle {1 - cost / paid:.2%} by cost"


def _pack(rows: "TokenizedDataset") -> str:
    from notus.data.batching import packed

    began, steps, made = time.perf_counter(), 0, 0
    for indices, _, balanced in _steps(rows):
        made += sum(1 for _ in packed(rows, indices, balanced[0]))
        steps += 1
    return f"{made:,} rows of one rank, {1e3 * (time.perf_counter() - began) / steps:.2f} ms a step"


def table(results: list[Measured]) -> str:
    """The results as Markdown."""
    heads = ("pairs", "phase", "seconds", "private memory", "largest worker", "found")
    rows = []
    for found in results:
        worker = f"{found.worker_mib:,.0f} MiB" if found.worker_mib else "-"
        memory = f"{found.private_mib:,.0f} MiB"
        rows.append((f"{found.pairs:,}", found.phase, f"{found.seconds:,.1f}", memory, worker, found.notes))
    return markdown(heads, rows)


def run_phase(phase: str, folder: Path, files: list[Path]) -> Measured:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--files", *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_all(folder: Path, pairs: int, per_file: int, seed: int, shorter: float = 1) -> list[Measured]:
    """All phases for so many pairs. Each file is tokenised by a process of its own: seconds add up."""
    make_tokenizer(folder / "tokenizer", seed)
    files, began = [], time.perf_counter()
    for number, first in enumerate(range(0, pairs, per_file)):
        files.append(folder / f"pairs-{number}.jsonl")
        make_pairs(files[-1], min(per_file, pairs - first), seed + number, shorter)
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{pairs:,} pairs written in {time.perf_counter() - began:.0f} s, {size:,.0f} MB", flush=True)
    parts = [run_phase("tokenise", folder, [file]) for file in files]
    tokenised = dataclasses.replace(
        max(parts, key=lambda part: part.private_mib),
        pairs=pairs,
        seconds=sum(part.seconds for part in parts),
        worker_mib=max(part.worker_mib for part in parts),
        notes=f"{sum(file.stat().st_size for file in (folder / 'cache').rglob('*.arrow')) / 1e6:,.0f} MB on disk",
    )
    return [tokenised, *(run_phase(phase, folder, files) for phase in PHASES[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--per-file", type=int, default=1_000_000, help="pairs of a file; each is tokenised by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shorter", type=float, default=1, help="divide the lengths by this")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(dataclasses.asdict(measure(args.phase, args.folder, args.files))))
        return
    results: list[Measured] = []
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results += run_all(Path(folder), pairs, args.per_file, args.seed, args.shorter)
    print(table(results))
    if args.results:
        write_json(args.results, [dataclasses.asdict(result) for result in results])


if __name__ == "__main__":
    main()
