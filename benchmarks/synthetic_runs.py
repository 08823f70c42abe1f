"""What the experiments on synthetic data share: a seed's data and start, training, verdicts, and finished runs kept.

The data are `notus/curation/synthetic.py`'s, whose judge knows the answers; model and recipe are the demo's.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from notus import demo
from notus.config import Task, config_from_dict
from notus.curation import synthetic
from notus.curation.ultrafeedback import Report, curate
from notus.losses import loss_components
from notus.runtime.files import write_text

Rows = list[dict[str, Any]]
SFT: dict[str, Any] = {**demo.SFT, "save_every": 100}
DPO: dict[str, Any] = demo.DPO
MAX_LENGTH = demo.MAX_LENGTH


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of prompts, and of DPO's steps. The demo's, but for the held-out prompts and the fixed steps."""

    sft: int = demo.SIZES["sft"]
    preferences: int = demo.SIZES["preferences"]
    held_out: int = 1000
    steps: int = 64


@dataclasses.dataclass(frozen=True)
class Data:
    """What a seed makes. `records` are those that a fault rate of 0 gives: see `records_at`."""

    size: Size
    seed: int
    demonstrations: Rows
    preferences: list[synthetic.Prompt]
    records: Rows
    held_out: list[synthetic.Prompt]


def make_data(size: Size, seed: int) -> Data:
    """The data of a seed; no prompt is in two parts."""
    lists = synthetic.make_prompts([size.sft, size.preferences, size.held_out], seed=seed)
    for_sft, preferences, held_out = lists
    records = synthetic.ultrafeedback_records(preferences, seed=seed, fault_rate=0.0)
    return Data(size, seed, synthetic.demonstrations(for_sft, seed=seed), preferences, records, held_out)


def pairs_by_ratings(data: Data) -> tuple[Rows, Report]:
    """The pairs of the mean ratings: the same at every fault rate, as `choices` asserts."""
    return curate(data.records, by="ratings", seed=data.seed, keep_identical=True)


def differing(pairs: Rows) -> Rows:
    """The pairs whose two responses differ: the trainer drops the others."""
    return [row for row in pairs if row["chosen_response"] != row["rejected_response"]]


def share(flags: Iterable[bool]) -> float:
    """The share of those that are true."""
    found = list(flags)
    return sum(found) / len(found)


def start_run(folder: Path, data: Data) -> dict[str, Any]:
    """The model that every experiment starts from: SFT on the demonstrations, once per seed."""
    text = json_lines(data.demonstrations)

    def make() -> dict[str, Any]:
        demo.make_base(folder / "base", data.seed)
        (folder / "train.jsonl").write_text(text)
        tree = {"model": {"name_or_path": str(folder / "base")}, "training": SFT}
        train("sft", folder, folder / "train.jsonl", tree, data.seed)
        weights = digest((folder / "run" / "model" / "model.safetensors").read_bytes())
        return {"seed": data.seed, "start": weights, **verdicts(folder, data)}

    return kept_run(folder, {"data": digest(text), "prompts": digest(prompt_lines(data)), "recipe": SFT}, make)


def check_enough(name: str, count: int, steps: int, batch_size: int) -> None:
    """Raise ValueError if so many rows do not last for the steps without a repetition."""
    needed = steps * batch_size
    if count < needed:
        raise ValueError(f"{name}: {count} rows do not last for {needed}: take more prompts or fewer steps")


def right_against_mistake(prompt: synthetic.Prompt) -> dict[str, Any]:
    """A held-out pair as the judge would choose it, in the columns of the curated ones."""
    return {
        "source": f"synthetic_{prompt.task.name}",
        "instruction": prompt.instruction,
        "chosen_response": prompt.task.answer(prompt.digits),
        "rejected_response": prompt.task.mistake(prompt.digits),
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 1.0,
        "chosen_model": "judge",
    }


def train(task: Task, folder: Path, rows: Path, tree: dict[str, dict[str, Any]], seed: int) -> None:
    """Run `train_sft.py`'s or `train_dpo.py`'s path on a file of rows into `folder/run`.

    Ends the process if a signal ended that.
    """
    import torch

    from notus.training import dpo, sft

    torch.set_num_threads(1)  # as the demo: the matrices are too small to gain from more
    data = {"train": str(rows), "max_length": MAX_LENGTH, "cache_dir": str(folder / "cache")}
    tree = {
        **tree,
        "data": {**data, **tree.get("data", {})},
        "training": {**tree["training"], "output_dir": str(folder / "run"), "seed": seed},
    }
    code = {"sft": sft, "dpo": dpo}[task].run(config_from_dict(tree, task, source="the benchmark's settings"))
    if code:
        raise SystemExit(code)


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """The training rows of a kind of loss: the file, how many, how many a step takes, and a digest of the file."""

    path: Path
    count: int
    per_step: int
    digest: str


def write_rows(kind: str, data: Data, folder: Path) -> TrainingRows:
    """Write the training rows of a kind of loss into a folder.

    "pairs": one pair per prompt, by the mean ratings. "lists": all its rated answers. "labels": the two completions of
    the pair, each with its label; the trainer reads them from the pair. These kinds have the same prompts, those whose
    pair has two different texts, and go through them at the same pace. "all lists": the lists of all prompts that have
    one.
    """
    rows = pairs = differing(pairs_by_ratings(data)[0])
    if kind in ("lists", "all lists"):
        lists, prompts = rated_lists(data, folder), {pair["instruction"] for pair in pairs}
        rows = [row for row in lists if kind == "all lists" or row["prompt"][0]["content"] in prompts]
    assert kind == "all lists" or len(rows) == len(pairs)
    path, text = folder / f"{kind.replace(' ', '-')}.jsonl", json_lines(rows)
    path.write_text(text)
    per_prompt = 2 if kind == "labels" else 1
    return TrainingRows(path, per_prompt * len(rows), per_prompt * DPO["batch_size"], digest(text))


def rated_lists(data: Data, folder: Path) -> Rows:
    """The lists that `notus curate --listwise` makes: none of prompts whose answers are all one text."""
    from notus.__main__ import run_command

    records, out = folder / "records.jsonl", folder / "curated-lists.jsonl"
    records.write_text(json_lines(data.records))
    run_command("curate", records, out, "--listwise")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def loss_run(
    folder: Path, data: Data, rows: TrainingRows, dpo: dict[str, Any], recipe: dict[str, Any], start: Path
) -> dict[str, Any]:
    """Train a loss from the start, `recipe["max_steps"]` steps; what the model then makes of the held-out prompts.

    The reference log-probs and the tokenised rows are kept in the start's folder, since runs share them.

    Returns:
        `tokens` of the training, what `verdicts` and `moved` find, without the answers; or `failed`, what the trainer
        says if a step's loss or gradient is not finite, which is a result, too.

    Raises:
        ValueError: there are too few rows for the steps.
    """
    from notus.training.trainer import NonFiniteError

    check_enough(folder.name, rows.count, recipe["max_steps"], rows.per_step)
    recipe = {**recipe, "batch_size": rows.per_step}
    tree = {
        "model": {"name_or_path": str(start / "run" / "model")},
        "data": {"cache_dir": str(start / "cache")},
        "dpo": dpo,
        "reference": {"cache_dir": str(start / "reference")} if has_reference(dpo) else {},
        "tracking": {"samples": 0},
        "training": recipe,
    }

    def make() -> dict[str, Any]:
        try:
            train("dpo", folder, rows.path, tree, data.seed)
        except NonFiniteError as error:
            return {"failed": str(error)}
        last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == recipe["max_steps"]
        found = {"tokens": last["num_tokens"], **verdicts(folder, data), **moved(folder, start, data)}
        del found["answers"]  # they stay in the folder
        return found

    inputs = {
        "rows": rows.digest,
        "prompts": digest(prompt_lines(data)),
        "start": json.loads((start / "result.json").read_text())["start"],
        "dpo": dpo,
        "recipe": recipe,
    }
    return kept_run(folder, inputs, make)


def has_reference(dpo: Mapping[str, Any]) -> bool:
    """Whether a loss of a `dpo` section compares with a reference model."""
    return any(loss.reference for loss in loss_components(dpo["loss_type"]))


def moved(folder: Path, start: Path, data: Data) -> dict[str, float]:
    """How log-probs of the right answers and the usual mistakes stand against the start's; means over held-out pairs.

    `chosen_change` and `rejected_change` are in nats per token, first averaged over each completion; `margin` is the
    difference of the summed log-ratios, in nats; `reward_accuracy` the share of pairs where it is positive.
    """
    found, before = scores(folder, data, start), scores(start, data)
    sides = {
        f"{side}_change": found[f"logps_per_token/{side}"] - before[f"logps_per_token/{side}"]
        for side in ("chosen", "rejected")
    }
    return {**sides, "reward_accuracy": found["rewards/accuracies"], "margin": found["rewards/margins"]}


def scores(folder: Path, data: Data, base: Path | None = None) -> dict[str, Any]:
    """What `notus evaluate` finds for a run on the held-out pairs; the start's are kept, as every run needs them."""
    from notus.__main__ import run_command

    pairs, out = (base or folder) / "held-out-pairs.jsonl", folder / "evaluation.json"
    if base is not None or not out.exists():
        pairs.write_text(json_lines([right_against_mistake(prompt) for prompt in data.held_out]))
        against = [] if base is None else ["--base", base / "run" / "model", "--beta", 1]
        settings = ["--max-length", MAX_LENGTH, "--precision", "fp32"]
        run_command("evaluate", folder / "run" / "model", "--pairs", pairs, *against, *settings, "--output", out)
    return dict(json.loads(out.read_text()))


def verdicts(folder: Path, data: Data) -> dict[str, Any]:
    """Greedy answers to the held-out prompts, and a 1 or 0 for each: whether the judge passes it."""
    from notus.evaluation import generate

    asked, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    asked.write_text(prompt_lines(data))
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    options = ["--overwrite", "--max-new-tokens", "12", "--batch-size", "100"]
    generate.run(parser.parse_args([str(folder / "run"), str(asked), str(out), *options]))
    answers = [json.loads(line)["completion"].strip() for line in out.read_text(encoding="utf-8").splitlines()]
    right = [synthetic.judge(prompt.instruction, answer) for prompt, answer in zip(data.held_out, answers, strict=True)]
    by_task = {task.name: share(right[number :: len(synthetic.TASKS)]) for number, task in enumerate(synthetic.TASKS)}
    return {"win_rate": share(right), "by_task": by_task, "right": "".join("01"[x] for x in right), "answers": answers}


def prompt_lines(data: Data) -> str:
    """The held-out prompts as `notus generate` reads them."""
    return json_lines([{"instruction": prompt.instruction} for prompt in data.held_out])


def json_lines(rows: Rows) -> str:
    """The rows as a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def digest(content: str | bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def kept_run(folder: Path, inputs: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in `folder`, made now if there is none. ValueError if one is there that other inputs gave."""
    path, begun = folder / "result.json", folder / "inputs.json"
    folder.mkdir(parents=True, exist_ok=True)
    if begun.exists() and json.loads(begun.read_text()) != inputs:
        raise ValueError(f"{folder} holds a run of other data or settings: remove it, or name another --work")
    if not path.exists():
        write_text(begun, json.dumps(inputs, indent=1))
        write_text(path, json.dumps(make()))
    return dict(json.loads(path.read_text()))
