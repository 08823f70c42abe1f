"""The seven benchmarks of the Open LLM Leaderboard as Notus 7B v1 was measured, and what was found."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the seven.

    Attributes:
        task: lm-eval's name of the task or group.
        title: what people call it.
        shots: examples in the prompt.
        metric: lm-eval's name of the measure.
        filter: which of the task's readings of an answer counts; "none" where it has one alone.
        dataset: hub id.
        zephyr, notus: figures of Zephyr-7B-beta and of Notus 7B v1, in %.
    """

    task: str
    title: str
    shots: int
    metric: str
    filter: str
    dataset: str
    zephyr: float
    notus: float


BENCHMARKS = (
    Benchmark("arc_challenge", "ARC-Challenge", 25, "acc_norm", "none", "allenai/ai2_arc", 62.03, 64.59),
    Benchmark("hellaswag", "HellaSwag", 10, "acc_norm", "none", "Rowan/hellaswag", 84.36, 84.78),
    Benchmark("mmlu", "MMLU", 5, "acc", "none", "cais/mmlu", 61.07, 63.03),
    Benchmark("truthfulqa_mc2", "TruthfulQA", 0, "acc", "none", "truthfulqa/truthful_qa", 57.45, 54.37),
    Benchmark("winogrande", "Winogrande", 5, "acc", "none", "allenai/winogrande", 77.74, 79.40),
    Benchmark("gsm8k", "GSM8K", 5, "exact_match", "strict-match", "openai/gsm8k", 12.74, 15.16),
    Benchmark("drop", "DROP", 3, "f1", "none", "EleutherAI/drop", 9.66, 8.91),
)
BY_TASK = {benchmark.task: benchmark for benchmark in BENCHMARKS}
# What a reader of the figures has to know.
NOTES = {
    "MMLU": "MMLU is lm-eval's mean over examples; the published figures are means over its 57 subjects",
    "TruthfulQA": "TruthfulQA is contaminated: UltraFeedback, from which Zephyr and Notus learned, holds its prompts",
}
