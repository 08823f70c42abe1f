"""How fast `python -m notus curate` is: `python benchmarks/curation.py [--records 64000] [--decontaminate]`.

Writes seeded records with the form and size of openbmb/UltraFeedback (four completions of about 300 tokens,
each with a critique and six rationales), curates them through the command's own code, and prints seconds
and records per second. The time to make the records is not counted. With `--decontaminate` 813 listed questions
stand inside as many of the prompts: the report says how many were found.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common  # noqa: F401  (the project's path)
from notus.curation import command as curate

ASPECTS = {"instruction_following": False, "honesty": False, "truthfulness": True, "helpfulness": True}
QUESTIONS = 813
SOURCES = ("evol_instruct", "false_qa", "flan_v2_niv2", "sharegpt", "truthful_qa", "ultrachat")


def sentences(rng: random.Random, count: int = 2000) -> list[str]:
    """Sentences of 8 to 24 made-up words, with some text beyond ASCII and some that JSON must escape."""
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(4000)]
    words += ["naïve", "“so”", "数学", '"quoted"', "line\nbreak"]
    return [" ".join(rng.choices(words, k=rng.randint(8, 24))) + "." for _ in range(count)]


def record(rng: random.Random, pool: list[str], number: int) -> dict[str, Any]:
    """One record: ratings near the completion's quality, some "N/A"; some of the low scores stored as 10."""

    def text(count: int) -> str:
        return " ".join(rng.choices(pool, k=count))

    def annotation(quality: int, aspect: str, typed: bool) -> dict[str, Any]:
        rating = str(min(5, max(1, quality + rng.randint(-1, 1))))
        rating = "N/A" if aspect == "honesty" and rng.random() < 0.05 else rating
        plain = {"Rating": rating, "Rationale": text(3)}
        return {"Type": ["1"], **plain, "Rationale For Rating": text(2)} if typed else plain

    def completion(model: str) -> dict[str, Any]:
        quality = rng.randint(1, 5)
        score = 10.0 if quality == 1 and rng.random() < 0.2 else 2.0 * quality - rng.choice((0.5, 1.0))
        annotations = {aspect: annotation(quality, aspect, typed) for aspect, typed in ASPECTS.items()}
        return {
            "annotations": annotations, "custom_system_prompt": text(2), "model": model, "principle": "helpfulness",
            "response": text(14), "critique": text(8), "overall_score": score, "fine-grained_score": float(quality),
        }  # fmt: skip

    models = [f"model-{(number + index) % 17}" for index in range(4)]
    return {
        "source": rng.choice(SOURCES), "instruction": f"{number}: {text(4)}", "models": models,
        "completions": [completion(model) for model in models], "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }  # fmt: skip


def records(count: int, seed: int, embedded: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`count` records; the prompts of the first ones hold the `embedded` questions, one each, between sentences."""
    rng = random.Random(seed)
    pool = sentences(rng)
    for number in range(count):
        made = record(rng, pool, number)
        if number < len(embedded):
            made["instruction"] += f" {embedded[number]} {rng.choice(pool)}"
        yield made


def timed_run(source: Path, questions: Path | None) -> tuple[float, float]:
    """(wall seconds, processor seconds) of one run of the command on `source`."""
    command = [str(source), str(source.with_stem("pairs"))]
    if questions is not None:
        command += ["--decontaminate", str(questions)]
    parser = argparse.ArgumentParser()
    curate.add_arguments(parser)
    wall, processor = time.perf_counter(), time.process_time()
    curate.run(parser.parse_args(command))
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=64_000)
    parser.add_argument("--parquet", action="store_true", help="read and write Parquet, not JSON lines")
    parser.add_argument("--decontaminate", action="store_true", help=f"look for {QUESTIONS} questions as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    args = parser.parse_args()
    listed = sentences(random.Random(args.seed + 1), QUESTIONS) if args.decontaminate else []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, questions = Path(folder) / "records.jsonl", Path(folder) / "questions.jsonl"
        if args.parquet:
            source = source.with_suffix(".parquet")
        with source.open("wb") as file:
            curate.write_rows(file, records(args.records, args.seed, listed), source.suffix)
        questions.write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")
        wall, processor = timed_run(source, questions if listed else None)
        size = f"{args.records:,} records, {source.stat().st_size / 1e6:,.0f} MB"
    print(f"{size}: {wall:.1f} s (CPU {processor:.1f} s), {args.records / wall:,.0f} records/s")


if __name__ == "__main__":
    main()
