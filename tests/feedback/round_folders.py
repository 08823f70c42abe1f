"""Folders of rounds and iterations as `notus iterate` leaves them, for the tests of what reads them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from notus.feedback.rounds import summarise


def completion(
    model: str, response: str, score: float | None = None, *, reward: float | None = None, tokens: int | None = None,
    cut: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A record's completion; `tokens` are its words if they are not given."""
    made = {
        "model": model,
        "response": response,
        "settings": {"temperature": 1.0, "sample": 0},
        "finish_reason": "length" if cut else "stop",
        "tokens": len(response.split()) if tokens is None else tokens,
    }
    if score is not None:
        made["annotations"] = {"helpfulness": {"Rating": str(score), "Rationale": ""}}
        made["fine-grained_score"] = score
    return made if reward is None else {**made, "reward": reward}


def record(prompt: str, *completions: dict[str, Any]) -> dict[str, Any]:
    """A record with these completions."""
    models = list(dict.fromkeys(each["model"] for each in completions))
    return {"source": "prompts", "instruction": prompt, "models": models, "completions": list(completions)}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines, with the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_object(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON object, with the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def rate_summary(**changes: Any) -> dict[str, Any]:
    """What `notus rate` writes beside its records."""
    return {
        "settings": {}, "judge": "rater", "prompts": 2, "rated": 4, "unreadable": 0, "failed": 0, "requests": 3,
        "prompt_tokens": 300, "completion_tokens": 60, "cost": 0.25, "seconds": 1.5,
        "ratings": {"helpfulness": {"1": 0, "2": 1, "3": 1, "4": 1, "5": 1}},
        "again": {"prompts": 1, "exact": 0.5, "within_one": 1.0, "same_best": 1.0, "correlation": None},
        "position": {"mean_rating": [3.5, 3.0], "best": [1.5, 0.5]}, **changes,
    }  # fmt: skip


def write_round(folder: Path, *, number: int = 1) -> Path:
    """Write a finished round, whose answers win on two prompts of four, lose one and tie on one."""
    policy, other = f"round-{number}", "other"
    sampled = [
        record("p1", completion(policy, "a b a b", 4.0), completion(policy, "a b c", 3.0), completion(other, "x", 2.0)),
        record("p2", completion(policy, "", 1.0), completion(policy, "x", cut=True), completion(other, "y", 5.0)),
    ]
    write_lines(folder / "prompts.jsonl", [{"prompt": "p1"}, {"prompt": "p2"}])
    write_lines(folder / "records.jsonl", sampled)
    models = {policy: {"completions": 4, "tokens_per_second": 50.0}, other: {"completions": 2}}
    write_object(
        folder / "records.summary.json",
        {"settings": {}, "prompts": 2, "completions": 6, "dropped_duplicates": 1, "seconds": 8.0, "models": models},
    )
    write_lines(folder / "rated.jsonl", sampled)
    write_object(folder / "rated.summary.json", rate_summary())
    pair = {"source": "s", "instruction": "p1", "chosen_response": "a", "rejected_response": "b"}
    ratings = [(4.0, 2.0), (5.0, 1.0), (3.5, 3.0)]
    write_lines(
        folder / "pairs.jsonl", [{**pair, "chosen_avg_rating": c, "rejected_avg_rating": r} for c, r in ratings]
    )
    metrics = [
        {"step": 1, "loss": 0.69, "rewards/accuracies": 0.5, "rewards/margins": 0.0},
        {"step": 2, "loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.25, "eval_loss": 0.6},
        {"step": 3, "loss": 0.4, "rewards/accuracies": 1.0, "rewards/margins": 0.5},
    ]
    write_lines(folder / "run" / "metrics.jsonl", metrics)
    answers = [
        record("q1", completion("start", "one two", 2.0), completion("now", "one two three", 4.0)),
        record("q2", completion("start", "one", 3.0), completion("now", "two", 3.5)),
        record("q3", completion("start", "four", 5.0), completion("now", "five six", 4.0)),
        record("q4", completion("start", "same", 1.0), completion("now", "same", 2.0)),
    ]
    write_lines(folder / "answers.jsonl", answers)
    write_lines(folder / "compared.jsonl", answers)
    write_object(folder / "compared.summary.json", rate_summary(cost=0.5, requests=4))
    kl = {"samples": 4, "tokens": 40, "cut_share": 0.25, "max_new_tokens": 8, "per_sequence": 1.5,
          "per_sequence_stderr": 0.25, "per_token": 0.15}  # fmt: skip
    overall = {"count": 10, "accuracy": 0.8, "accuracy_interval": [0.49, 0.94], "margin": 0.1}
    evaluation = {"model": "m", "base": "b", "pairs": "20 rows held out of data.train", "overall": overall, "kl": kl}
    write_object(folder / "evaluation.json", evaluation)
    return folder


CONFIG = """\
model:
  name_or_path: models/start
training:
  output_dir: runs/own
iterate:
  prompts: prompts.jsonl
  eval_prompts: questions.jsonl
  rounds: 2
  reference: last
sample:
  n: 4
rate:
  judge_model: rater
"""


def write_iteration(folder: Path, *, rounds: int = 2, config: str = CONFIG) -> Path:
    """Write an iteration's folder with so many finished rounds, all of them the round of `write_round`."""
    folder.mkdir(parents=True)
    (folder / "iterate.yaml").write_text(config)
    for number in range(1, rounds + 1):
        write_round(folder / f"round-{number}", number=number)
        (folder / f"round-{number}" / "round.json").write_text(
            json.dumps(dataclasses.asdict(summarise(folder / f"round-{number}")))
        )
    return folder
