"""Log-likelihoods for lm-eval: this project's rows, which share prefixes, against lm-eval's own class (HFLM).

Few-shot questions as ARC-Challenge's: each has examples of its own, and some options. Both get the same model, on the
CPU or GPU, and the same requests; both give the same numbers, or the script ends with an error. Needs lm-eval and
accelerate:

    python benchmarks/lm_eval_speed.py --questions 8 --shots 25
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common import word_tokenizer
from notus.evaluation.open_llm.harness import NotusLM
from notus.model.verify import choose_path
from notus.runtime.distributed import process_group

VOCABULARY = 2000


def requests(questions: int, shots: int, options: int) -> list[Instance]:
    """Multiple-choice requests; words are tokens: 30 a question, 8 an option."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 4)}" for _ in range(count))

    found = []
    for _ in range(questions):
        context = " ".join(text(38) for _ in range(shots)) + " " + text(30)
        pairs = [(context, " " + text(8)) for _ in range(options)]
        found += [Instance("loglikelihood", {}, pair, len(found)) for pair in pairs]
    return found


def model(width: int, layers: int, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama at its random start, with weights that tell tokens apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=4096,
        initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype).eval()


def timed(work: Callable[[], list[tuple[float, bool]]]) -> tuple[float, list[tuple[float, bool]]]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def main() -> None:
    """Measure both, three times each in turn; print the best of each and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"questions": 8, "shots": 25, "options": 4, "width": 256, "layers": 4, "batch-size": 4}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    asked = requests(args.questions, args.shots, args.options)
    words, causal_lm = word_tokenizer(VOCABULARY), model(args.width, args.layers, device, dtype)
    words.pad_token = "</s>"
    path = choose_path(causal_lm.config, longest=4096, device=causal_lm.device)
    peer = HFLM(pretrained=causal_lm, tokenizer=words, batch_size=args.batch_size)

    def ours(folder: Path) -> list[tuple[float, bool]]:
        options = {"path": path, "max_length": 4096, "tokens_per_row": None, "batch_size": 1}
        lm = NotusLM(causal_lm, words, name="speed", kept=folder, identity="", **options)
        return lm.loglikelihood(asked, disable_tqdm=True)

    times: dict[str, list[float]] = {"notus": [], "hflm": []}
    with process_group(), tempfile.TemporaryDirectory() as scratch:
        for turn in range(3):
            seconds, found = timed(lambda turn=turn: ours(Path(scratch, str(turn))))  # nothing kept from the last turn
            times["notus"].append(seconds)
            seconds, expected = timed(lambda: peer.loglikelihood(asked, disable_tqdm=True))
            times["hflm"].append(seconds)
    worst = max(abs(one - two) for (one, _), (two, _) in zip(found, expected, strict=True))
    if worst > (0.5 if dtype == torch.bfloat16 else 1e-3):
        raise SystemExit(f"the two differ by up to {worst} nats")
    for name, seconds in times.items():
        print(f"{name}: {min(seconds):.2f} s, {len(asked) / min(seconds):.1f} requests/s")
    print(f"{min(times['hflm']) / min(times['notus']):.2f} times as fast; largest difference {worst:.1e} nats")


if __name__ == "__main__":
    main()
