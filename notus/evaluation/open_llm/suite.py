"""`python -m notus evaluate MODEL --suite open-llm`: the Open LLM Leaderboard's tasks, or any others of lm-eval.

The tasks, their prompts and their measures are lm-eval's; what the model computes is this project's. Under torchrun the
ranks share the work. What is done is kept in the output folder, so the same command resumes where it stopped.
"""

import argparse
import dataclasses
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, add_output_argument, count
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.results import Figure, Result, hold_folder, result_folder, write_result
from notus.runtime.files import write_text
from notus.runtime.process import first_line

if TYPE_CHECKING:
    import torch

    from notus.data.chat import ChatEncoder
    from notus.evaluation.open_llm.harness import NotusLM
    from notus.evaluation.resolve_model import ModelSource

SUITE, TRIAL = "open-llm", "open-llm-trial"
RESULTS, TABLE, KEPT = "lm-eval.json", "table.md", "kept"
ZEPHYR, NOTUS = "Zephyr-7B-beta", "Notus 7B v1"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the seven benchmarks of the Open LLM Leaderboard, as Notus 7B v1 was measured."""

    task: str  # lm-eval's name of the task or group
    title: str  # what people call it
    shots: int  # examples in the prompt
    metric: str  # lm-eval's name of the measure
    filter: str  # which of the task's readings of an answer counts; "none" where it has only one
    dataset: str  # hub id
    # zephyr, notus: figures of Zephyr-7B-beta and of Notus 7B v1, in %.
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
# Shares of 1, which people read in %.
_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "brier_acc", "contains", "em", "exact_match", "f1"})
_IN_PERCENT = ("squadv2", "scrolls_")  # how tasks begin whose `em` and `f1` lm-eval gives in % already


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME[,NAME]",
        help=f"tasks or groups of lm-eval, * for any (default: {', '.join(BY_TASK)})",
    )
    parser.add_argument(
        "--include-path", type=os.path.expanduser, metavar="DIR", help="task files of your own, for --tasks"
    )
    parser.add_argument(
        "--num-fewshot",
        type=_not_negative,
        help="examples in the prompt, but for tasks that are set to 0 (default: the leaderboard's for its seven tasks, "
        "else the task's own)",
    )
    parser.add_argument("--limit", type=count, help="take the first so many examples of each task: a trial")
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="put prompts into the chat format (default: plain text, as the leaderboard had it)",
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples as turns of their own (default, with a chat template), or all in one",
    )
    parser.add_argument("--system-instruction", metavar="TEXT", help="stands before every prompt")
    parser.add_argument(
        "--max-length", type=count, help="tokens of context; longer prompts lose their beginning (default: the model's)"
    )
    parser.add_argument(
        "--tokens-per-row",
        type=count,
        help="tokens of one forward pass: sets memory and speed, not the result (default: 4096, or the longest text's)",
    )
    parser.add_argument("--batch-size", type=count, default=32, help="completions generated at a time (default: 32)")
    add_output_argument(parser, SUITE)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one task")
    return list(dict.fromkeys(names))


def _not_negative(text: str) -> int:
    return 0 if int(text) == 0 else count(text)


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print the table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    _check(args)
    from notus.evaluation.open_llm import harness
    from notus.evaluation.resolve_model import find_together
    from notus.runtime.distributed import on_main, process_group, say

    with process_group() as device:
        # The tasks first: a wrong name is an error before anything is loaded.
        manager, opened = harness.open_tasks(args.tasks or list(BY_TASK), args.include_path)
        if args.num_fewshot is None:
            harness.set_shots(opened, {benchmark.task: benchmark.shots for benchmark in BENCHMARKS})
        source = find_together(args.model, trust_remote_code=args.trust_remote_code)
        folder = result_folder(args.output, source.run, source.name, _suite(args))
        on_main(lambda: hold_folder(folder))
        lm = _load(args, source, folder / KEPT, device)
        results = harness.evaluate(lm, manager, opened, args)
        say(on_main(lambda: _write(args, lm, results, list(map(harness.name_of, opened)), folder)))
        say(f"results are in {folder}")
    return 0


def _check(args: argparse.Namespace) -> None:
    try:
        importlib.import_module("lm_eval.api.group")  # which earlier versions do not have
    except ImportError as error:
        needed = f"--suite {SUITE} needs the lm-eval package, 0.4.13 or later ({first_line(error)})"
        raise ValueError(f"{needed}: pip install -U lm-eval") from error
    if args.include_path and not args.tasks:
        raise ValueError("--include-path has no effect without --tasks: name the tasks")
    if not args.apply_chat_template:
        for option in ("chat_template", "add_empty_system", "fewshot_as_multiturn"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                raise ValueError(f"{name} has no effect without --apply-chat-template: add that, or leave it out")


def _suite(args: argparse.Namespace) -> str:
    """Return what the result is filed under: a trial does not replace the whole."""
    return TRIAL if args.limit else SUITE


def _load(args: argparse.Namespace, source: "ModelSource", kept: Path, device: "torch.device") -> "NotusLM":
    from lm_eval.models.utils import resolve_max_length

    from notus.evaluation.decoding import model_digest
    from notus.evaluation.open_llm.harness import NotusLM
    from notus.model.supported import check_supported
    from notus.training.parallelize import check_attention, find_path

    options = source.options(args)
    causal_lm, tokenizer = source.load(options, device)
    check_supported(causal_lm.config)
    longest = resolve_max_length(causal_lm.config, tokenizer)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(
            f"--max-length {args.max_length} is more than the model's context of {longest} tokens: lower it"
        )
    path = find_path(
        causal_lm.config,
        "auto",
        longest=args.max_length or longest,
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
    if path.name == "packed":
        check_attention(causal_lm, device, options.dtype)
    return NotusLM(
        causal_lm,
        tokenizer,
        name=source.name,
        path=path,
        max_length=args.max_length or longest,
        tokens_per_row=args.tokens_per_row,
        batch_size=args.batch_size,
        kept=kept,
        identity=model_digest(causal_lm),
        template=_template(options.chat.encoder(tokenizer)) if args.apply_chat_template else None,
    )


def _template(encoder: "ChatEncoder") -> str:
    """The template that renders prompts as in training, with the arguments, the date and the system turn of a run."""
    from notus.data.chat import template_to_export

    exported = template_to_export(encoder)
    return exported if isinstance(exported, str) else exported["default"]


def _write(args: argparse.Namespace, lm: "NotusLM", results: dict[str, Any], names: list[str], folder: Path) -> str:
    """Write lm-eval's own JSON, the table and the suite's result; returns the table. For rank 0."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_text(folder / RESULTS, as_json + "\n")
    found = figures(results, names, limit=args.limit)
    table = markdown(lm.name, found, limit=args.limit)
    write_text(folder / TABLE, table)
    settings = {
        "lm_eval": results["lm_eval_version"],
        "precision": str(lm.causal_lm.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "limit": args.limit,
        "chat_template": args.apply_chat_template,
        "fewshot_as_multiturn": args.apply_chat_template and args.fewshot_as_multiturn is not False,
        "system_instruction": args.system_instruction,
    }
    write_result(folder, Result(_suite(args), lm.name, found, settings, details={"versions": results["versions"]}))
    return table


def figures(results: dict[str, Any], names: Sequence[str], *, limit: int | None = None) -> list[Figure]:
    """Return the figures of tasks and groups: for the leaderboard's seven its own measure, for others all they have.

    `results` are lm-eval's `simple_evaluate`'s, `names` says which, in order. `limit`: of a trial, how many examples of
    each task were taken.
    """
    found = []
    for name in names:
        own = []
        for key, value in {**results["results"], **results.get("groups", {})}.get(name, {}).items():
            metric, _, reading = key.partition(",")
            is_measure = reading and not metric.endswith("_stderr") and isinstance(value, int | float)
            benchmark = BY_TASK.get(name)
            if is_measure and (benchmark is None or (metric, reading) == (benchmark.metric, benchmark.filter)):
                own.append(_figure(results, name, metric, reading, limit))
        # a group without a measure of its own stands for its members
        found += own or figures(results, [task for task in _tasks_of(results, name) if task != name], limit=limit)
    return found


def _figure(results: dict[str, Any], name: str, metric: str, reading: str, limit: int | None) -> Figure:
    values = {**results["results"], **results.get("groups", {})}[name]
    value, stderr = values[f"{metric},{reading}"], values.get(f"{metric}_stderr,{reading}")
    scale, unit = _scale(name, metric, value)
    tasks = _tasks_of(results, name)
    setup = f"{results['n-shot'][tasks[0]]}-shot"
    benchmark = BY_TASK.get(name)
    return Figure(
        name=benchmark.title if benchmark else name,
        metric=metric if reading == "none" else f"{metric} ({reading})",
        value=scale * value,
        unit=unit,
        stderr=scale * stderr if isinstance(stderr, int | float) else None,
        count=sum(results["n-samples"][task]["effective"] for task in tasks),
        setup=setup if limit is None else f"{setup}, the first {limit} examples",
        dataset=benchmark.dataset if benchmark else results["configs"][tasks[0]].get("dataset_path"),
        reference={ZEPHYR: benchmark.zephyr, NOTUS: benchmark.notus} if benchmark else {},
    )


def _scale(name: str, metric: str, value: float) -> tuple[float, str]:
    """Return what to multiply a measure by, and the unit that it has then."""
    if metric not in _SHARES:
        return 1.0, ""
    if name.startswith(_IN_PERCENT) and metric in ("em", "f1"):
        return 1.0, "%"
    # more than 1 is no share, whatever a task of the user's calls it
    return (1.0, "") if value > 1 else (100.0, "%")


def _tasks_of(results: dict[str, Any], name: str) -> list[str]:
    """Return the tasks of a group, down to the last, or the task itself."""
    members = [member for member in results.get("group_subtasks", {}).get(name, []) if member != name]
    return [task for member in members for task in _tasks_of(results, member)] if members else [name]


def markdown(model: str, found: Sequence[Figure], *, limit: int | None = None) -> str:
    """Return one table, with notes below it."""
    model = model.replace("|", "\\|")
    lines = [
        f"| benchmark | measure | examples | {model} | {ZEPHYR} | {NOTUS} |",
        "|---|---|---:|---:|---:|---:|",
        *(_line(figure) for figure in found),
        "",
    ]
    lines += [f"\\* {NOTES[figure.name]}." for figure in found if figure.name in NOTES]
    if any(figure.reference for figure in found):
        lines.append(
            f"{ZEPHYR} and {NOTUS}: figures of the Open LLM Leaderboard, by the lm-evaluation-harness of its time; "
            "later versions may score a task differently."
        )
    if limit is not None:
        lines.append(f"A trial: the first {limit} examples of each task alone.")
    return "\n".join(lines).rstrip() + "\n"


def _line(figure: Figure) -> str:
    star = "\\*" if figure.name in NOTES else ""
    value = f"{figure.value:.2f}" if abs(figure.value) < 1e6 else f"{figure.value:.3g}"
    value += f" {figure.unit}".rstrip()
    error = f" ± {figure.stderr:.2f}" if figure.stderr is not None else ""
    peers = [f"{figure.reference[peer]:.2f}" if peer in figure.reference else "-" for peer in (ZEPHYR, NOTUS)]
    measure = f"{figure.metric}, {figure.setup}"
    return f"| {figure.name}{star} | {measure} | {figure.count} | {value}{error} | {' | '.join(peers)} |"
