"""`python -m notus demo`: from rated completions to an aligned model, on a CPU, in a few minutes.

Data and judge are `curation/synthetic.py`. A model of under a million parameters learns the tasks from scratch. Every
stage is what a user would run: `curate`, `train_sft.py`, `train_dpo.py`, `evaluate`, `generate`, `export`.

DIR/data/  base/  sft/  dpo/  export/  answers-sft.jsonl  answers-dpo.jsonl  evaluation.json  summary.json

With --real: a published model and published pairs, see `real_demo.py`.

With --own-feedback: from prompts alone, in rounds. Two models answer the prompts, `curation/synthetic.py:rate` rates
the answers, and `notus iterate` does the rest.

DIR/data/  base/  sft/  second/  iterate.yaml  rounds/  (an iteration's folder, with report.html)  own-feedback.json
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus import real_demo
from notus.__main__ import run_command
from notus.curation import synthetic
from notus.runtime.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from notus.config import Config, Task

OUTPUT = "runs/demo"
SUMMARY = "summary.json"
# Prompts of each part; no prompt is in two parts.
SIZES = {"sft": 14_400, "preferences": 4_500, "held_out": 400}
COMMON = {
    "batch_size": 32,
    "tokens_per_row": 2048,
    "epochs": 1,
    "warmup_ratio": 0.1,
    "precision": "fp32",
    "activation_checkpointing": "none",
}
SFT = {**COMMON, "optimizer": "adamw", "learning_rate": 3e-3, "lr_schedule": "cosine", "log_every": 10}
DPO = {**COMMON, "optimizer": "rmsprop", "learning_rate": 2.5e-5, "lr_schedule": "linear"}
# --own-feedback: the prompts of all rounds, and SFT steps of the second model, a third of the policy's
OWN_OUTPUT, OWN_SETTINGS = "runs/own-feedback", "own-feedback.json"
OWN_SIZES = {"sft": 14_400, "prompts": 2_000, "held_out": 400}
SECOND_STEPS = 150
ROUNDS, MOST_ROUNDS = 2, 20
OWN_DPO = {**DPO, "learning_rate": 5e-5}
ITERATION: dict[str, dict[str, Any]] = {
    "iterate": {"kl_samples": 64},
    "sample": {"n": 2, "temperature": 1.0, "max_new_tokens": 12, "batch_size": 100},
    "rate": {"judge_function": "notus.curation.synthetic:rate", "again_share": 0.1},
}
MAX_LENGTH = 64  # tokens of prompt and answer; the longest have about 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        help=f"a new folder (default: {OUTPUT}; with --real: {real_demo.OUTPUT}; with --own-feedback: {OWN_OUTPUT})",
    )
    parser.add_argument("--seed", type=int, default=42, help="of data, model and training (default: 42)")
    parser.add_argument(
        "--real",
        action="store_true",
        help="train a published chat model on published pairs in place of made ones: some minutes on two cores",
    )
    parser.add_argument(
        "--own-feedback",
        action="store_true",
        help="start from prompts alone: sample two models, rate, and train in rounds, on a CPU",
    )
    parser.add_argument("--rounds", type=_rounds, metavar="N", help="with --own-feedback: how many (default: 2)")
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        metavar="ID_OR_PATH",
        help=f"with --real: a chat model (default: {real_demo.MODEL})",
    )
    parser.add_argument(
        "--pairs",
        type=os.path.expanduser,
        metavar="ID_OR_PATH",
        help=f"with --real: preference pairs (default: {'/'.join(real_demo.PAIRS)})",
    )
    parser.add_argument("--lora", action="store_true", help="with --real: train LoRA adapters, not all weights")


def _rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {MOST_ROUNDS}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the whole path into a new folder, print a table, return 0. A finished demo only shows its table.

    Raises ValueError for a folder that holds something else, and for options without effect.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the demo runs in one process: start it without torchrun")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; give 0 or more")
    if args.real and args.own_feedback:
        raise ValueError("--real and --own-feedback are two demos: give one of them")
    if args.rounds is not None and not args.own_feedback:
        raise ValueError("--rounds has no effect on a demo without rounds; add --own-feedback")
    default = real_demo.OUTPUT if args.real else OWN_OUTPUT if args.own_feedback else OUTPUT
    args.output = args.output or default
    if args.real:
        return real_demo.run(args)
    for option in ("model", "pairs", "lora"):
        if getattr(args, option):
            raise ValueError(f"--{option} has no effect on the demo with made data; add --real")
    return _run_own_feedback(args) if args.own_feedback else _run_made(args)


def _run_made(args: argparse.Namespace) -> int:
    """Run the demo with made data and a made model."""
    began = time.monotonic()
    folder = Path(args.output)
    _check(folder, args.seed)
    if not (folder / SUMMARY).is_file():
        summary = _make(folder, args.seed)
        summary["seconds"] = round(time.monotonic() - began, 1)
        write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    else:
        print(f"finished already: {folder}", flush=True)
    print(report(folder))
    return 0


def _check(folder: Path, seed: int) -> None:
    remedy = "name a new folder with --output, or remove this one first"
    if (folder / SUMMARY).is_file():
        before = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["seed"]
        if before != seed:
            raise ValueError(f"{folder} holds a demo with seed {before}, not {seed}; {remedy}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and holds no finished demo; {remedy}")


def _make(folder: Path, seed: int) -> dict[str, Any]:
    """Run all stages in order and return the summary."""
    import torch

    from notus.training import dpo, sft

    # The matrices are too small to gain much from more, and threads that wait for a busy core cost minutes.
    torch.set_num_threads(1)
    _announce("data: prompts, demonstrations, and answers with their ratings")
    write_data(folder / "data", seed)
    _announce("a small model, its weights random")
    make_base(folder / "base", seed)
    _announce("SFT: the model learns to answer as the imaginary models do")
    _check_finished(sft.run(_config("sft", folder, seed)))
    _announce("curation: ratings become preference pairs; answers are short, so both are the same in many pairs")
    chosen_right = _curate(folder / "data", seed)
    _announce("DPO: the model learns which answers were preferred")
    _check_finished(dpo.run(_config("dpo", folder, seed)))
    _announce("evaluation on prompts that nothing was trained on")
    rewards = _evaluate(folder)
    rates = {name: _answer(folder, name) for name in ("sft", "dpo")}
    _announce("export")
    run_command("export", folder / "dpo", folder / "export")
    return {
        "seed": seed,
        "sft_win_rate": rates["sft"]["all"],
        "dpo_win_rate": rates["dpo"]["all"],
        "eval_reward_accuracy": rewards["rewards/accuracies"],
        "eval_reward_margin": rewards["rewards/margins"],
        "step0_loss": _first_loss(folder / "dpo"),
        "chosen_right_by_ratings": chosen_right["ratings"],
        "chosen_right_by_overall_score": chosen_right["overall_score"],
        "win_rates": rates,
    }


def _check_finished(code: int) -> None:
    if code:
        sys.exit(code)  # a signal ended the run


def _announce(stage: str) -> None:
    print(f"\n== {stage}", flush=True)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path, seed: int) -> None:
    """Write demonstrations for SFT, rated records for training and evaluation, and the held-out prompts."""
    folder.mkdir(parents=True)
    for_sft, for_preferences, held_out = synthetic.make_prompts(list(SIZES.values()), seed=seed)
    _write_rows(folder / "sft-train.jsonl", synthetic.demonstrations(for_sft, seed=seed))
    for part, prompts in (("train", for_preferences), ("eval", held_out)):
        records = synthetic.ultrafeedback_records(prompts, seed=seed)
        _write_rows(folder / f"records-{part}.jsonl", records)
    _write_rows(folder / "prompts-eval.jsonl", ({"instruction": p.instruction} for p in held_out))


def make_base(folder: Path, seed: int) -> None:
    """Write a model of the Mistral architecture with random weights, and its tokenizer, in Hugging Face layout."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = make_tokenizer()
    config = MistralConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        # Sequences are short and the model narrow: with the usual 1e4 and 0.02 it learns at a third of the speed.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,
        vocab_size=len(tokenizer),
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Return byte-level BPE with the words of the tasks' phrasings, single digits, and Zephyr's role markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    phrasings = [phrasing.format("") for task in synthetic.TASKS for phrasing in task.phrasings]
    tokenizer.train_from_iterator(phrasings, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _config(task: "Task", folder: Path, seed: int) -> "Config":
    from notus.config import config_from_dict

    data = folder / "data"
    tree: dict[str, dict[str, Any]]
    if task == "sft":
        model, training = folder / "base", SFT
        tree = {"data": {"train": str(data / "sft-train.jsonl")}}
    else:
        model, training = folder / "sft" / "model", DPO
        tree = {"data": {"train": str(data / "pairs-train.jsonl"), "eval": str(data / "pairs-eval.jsonl")}}
        tree["dpo"] = {"beta": 0.1, "loss_type": "sigmoid"}
    tree["data"]["max_length"] = MAX_LENGTH
    tree["model"] = {"name_or_path": str(model)}
    tree["training"] = {**training, "output_dir": str(folder / task), "seed": seed}
    return config_from_dict(tree, task, source="the demo's settings")


def _curate(data: Path, seed: int) -> dict[str, float]:
    """Make pairs by mean rating, and by overall score for comparison. Return how many chosen answers are right."""
    places = {"ratings": data / "pairs-train.jsonl", "overall_score": data / "pairs-train-by-overall-score.jsonl"}
    for rule, pairs in places.items():
        run_command("curate", data / "records-train.jsonl", pairs, "--by", rule, "--seed", seed)
    run_command("curate", data / "records-eval.jsonl", data / "pairs-eval.jsonl", "--seed", seed)
    return {rule: _win_rate(_read_rows(pairs), "chosen_response") for rule, pairs in places.items()}


def _win_rate(rows: list[dict[str, Any]], key: str) -> float:
    return synthetic.win_rate([row["instruction"] for row in rows], [row[key] for row in rows])


def _evaluate(folder: Path) -> dict[str, Any]:
    """Compare the DPO model with the SFT model on the held-out pairs."""
    result, pairs = folder / "evaluation.json", folder / "data" / "pairs-eval.jsonl"
    run_command("evaluate", folder / "dpo", "--base", folder / "sft", "--pairs", pairs, "--output", result)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _answer(folder: Path, name: str) -> dict[str, float]:
    """Answer the held-out prompts greedily. Return the share of right answers, of all and of each task."""
    prompts, answers = folder / "data" / "prompts-eval.jsonl", folder / f"answers-{name}.jsonl"
    run_command("generate", folder / name, prompts, answers, "--overwrite", "--max-new-tokens", 12, "--batch-size", 100)
    rows = _read_rows(answers)
    rates = {"all": _win_rate(rows, "completion")}
    for number, task in enumerate(synthetic.TASKS):
        rates[task.name] = _win_rate(rows[number :: len(synthetic.TASKS)], "completion")
    return rates


def _first_loss(run_folder: Path) -> float:
    """Return the loss before the first update."""
    first = _read_rows(run_folder / "metrics.jsonl")[0]
    assert first["step"] == 1, "DPO logs every step"
    return float(first["loss"])


def report(folder: Path) -> str:
    """Return the table of a finished demo, with a few answers before and after DPO."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    rates = summary["win_rates"]
    lines = ["", f"{'right answers to held-out prompts':36}" + "".join(f"{name:>10}" for name in rates["sft"])]
    for name, title in (("sft", "after SFT"), ("dpo", "after DPO")):
        lines.append(f"{title:36}" + "".join(f"{rate:10.1%}" for rate in rates[name].values()))
    lines += [
        "",
        f"{'chosen answers that are right':36}{summary['chosen_right_by_ratings']:10.1%} by ratings"
        f"{summary['chosen_right_by_overall_score']:10.1%} by overall score",
        f"{'reward accuracy on held-out pairs':36}{summary['eval_reward_accuracy']:10.1%}",
        f"{'DPO loss before the first step':36}{summary['step0_loss']:10.6f}",
        f"{'seconds':36}{summary['seconds']:10.1f}",
        "",
        *_samples(folder),
        "",
        f"next: python -m notus evaluate {folder / 'dpo'}, then report, card or export in its place",
    ]
    return "\n".join(lines)


def _samples(folder: Path, per_task: int = 2) -> list[str]:
    before, after = (_read_rows(folder / f"answers-{name}.jsonl") for name in ("sft", "dpo"))
    lines = [f"{'prompt':44}{'after SFT':>12}{'after DPO':>12}{'right':>12}"]
    for old, new in list(zip(before, after, strict=True))[: per_task * len(synthetic.TASKS)]:
        answers = (old["completion"], new["completion"], synthetic.right_answer(old["instruction"]))
        lines.append(f"{old['instruction']:44}" + "".join(f"{answer:>12}" for answer in answers))
    return lines


# ---- with --own-feedback ----


def _run_own_feedback(args: argparse.Namespace) -> int:
    """Train in rounds from prompts alone and print a table. The same command resumes a demo that was stopped."""
    import torch

    folder, rounds, seed = Path(args.output), args.rounds or ROUNDS, args.seed
    _claim(folder, {"seed": seed, "rounds": rounds})
    torch.set_num_threads(1)  # as in `_make`
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the stages, which are processes of their own
    _announce("data: demonstrations for SFT, prompts for the rounds, prompts for evaluation")
    write_prompts(folder / "data", seed)
    _announce("two small models: SFT on imaginary models' answers, the second one for a third of the steps")
    if not (folder / "base").exists():
        make_base(folder / "base.part", seed)
        (folder / "base.part").rename(folder / "base")
    for name, steps in (("sft", None), ("second", SECOND_STEPS)):
        _check_finished(sft_run(folder, name, steps, seed))
    write_text(folder / "iterate.yaml", own_config(folder, rounds, seed))
    _announce(f"rounds: notus iterate {folder / 'iterate.yaml'}")
    run_command("iterate", folder / "iterate.yaml")
    print(own_report(folder))
    return 0


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Record what the demo in `folder` is. Raises ValueError if it holds another one, or something else."""
    path, remedy = folder / OWN_SETTINGS, "name a new folder with --output, or remove this one first"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != settings:
            told = ", ".join(f"{name} {value}" for name, value in before.items())
            raise ValueError(f"{folder} holds a demo with {told}; {remedy}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and holds no demo with --own-feedback; {remedy}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings) + "\n")


def write_prompts(folder: Path, seed: int) -> None:
    """Write demonstrations for SFT, the rounds' prompts, and held-out prompts; no prompt is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for_sft, *asked = synthetic.make_prompts(list(OWN_SIZES.values()), seed=seed)
    rows = {"sft-train": synthetic.demonstrations(for_sft, seed=seed)}
    for name, prompts in zip(("prompts", "prompts-eval"), asked, strict=True):
        rows[name] = [{"instruction": prompt.instruction} for prompt in prompts]
    for name, found in rows.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def sft_run(folder: Path, name: str, steps: int | None, seed: int) -> int:
    """Train the base for all steps, or for `steps` of them, into `folder/name`; return the exit code."""
    from notus.config import config_from_dict
    from notus.training import sft

    tree = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "data" / "sft-train.jsonl"), "max_length": MAX_LENGTH},
        "training": {**SFT, "max_steps": steps, "output_dir": str(folder / name), "seed": seed, "save_every": 100},
    }
    return sft.run(config_from_dict(tree, "sft", source="the demo's settings"))


def own_config(folder: Path, rounds: int, seed: int) -> str:
    """Return the YAML of the iteration."""
    from notus.config import dump_yaml

    data = folder / "data"
    prompts = {"prompts": str(data / "prompts.jsonl"), "eval_prompts": str(data / "prompts-eval.jsonl")}
    tree: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(folder / "sft")},
        "data": {"max_length": MAX_LENGTH},
        "training": {**OWN_DPO, "output_dir": str(folder / "rounds"), "seed": seed},
        "dpo": {"beta": 0.1, "loss_type": "sigmoid"},
        "iterate": {**prompts, "rounds": rounds, **ITERATION["iterate"], "seed": seed},
        "sample": {"models": [str(folder / "second")], **ITERATION["sample"]},
        "rate": ITERATION["rate"],
    }
    return f"# notus iterate {folder / 'iterate.yaml'}\n" + str(dump_yaml(tree))


def own_report(folder: Path) -> str:
    """Return the table of the rounds, and what a few prompts were answered at the start and after the last round."""
    from notus.feedback.rounds import ANSWERS, both_answers, read_round, round_folders

    lines = ["", f"{'':12}{'right answers':>16}{'wins against start':>20}{'KL to start':>14}{'pairs':>8}"]
    places = round_folders(folder / "rounds")
    for number, place in enumerate(places, start=1):
        rows = _read_rows(place / ANSWERS)
        answers = [both_answers(str(place / ANSWERS), row) for row in rows]
        prompts = [row["instruction"] for row in rows]
        before, after = (synthetic.win_rate(prompts, [pair[which]["response"] for pair in answers]) for which in (0, 1))
        if number == 1:
            lines.append(f"{'start':12}{before:16.1%}{'':>20}{'':>14}{'':>8}")
        found = read_round(place)
        wins = "" if found.win_rate is None else f"{found.win_rate:.1%}"
        kl = "" if found.kl is None else f"{found.kl:.2f} nats"
        pairs = found.pairs.rows if found.pairs else 0
        lines.append(f"{f'round {number}':12}{after:16.1%}{wins:>20}{kl:>14}{pairs:8,}")
    lines += ["", f"{'prompt':44}{'start':>12}{f'round {len(places)}':>12}{'right':>12}"]
    for prompt, (start, last) in list(zip(prompts, answers, strict=True))[: 2 * len(synthetic.TASKS)]:
        shown = (start["response"].strip(), last["response"].strip(), synthetic.right_answer(prompt))
        lines.append(f"{prompt:44}" + "".join(f"{answer:>12}" for answer in shown))
    page = folder / "rounds" / "report.html"
    lines += [
        "",
        f"report: {page}" if page.is_file() else "report: pip install plotly, then run the same command again",
    ]
    return "\n".join(lines)
