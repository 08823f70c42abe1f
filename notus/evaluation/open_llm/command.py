"""`python -m notus evaluate MODEL --suite open-llm`: the Open LLM Leaderboard's tasks, or any others of lm-eval.

The tasks, their prompts and their measures are lm-eval's; what the model computes is this project's. Under torchrun the
ranks share the work. What is done is kept in the output folder, so the same command resumes after an end.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, add_output_argument, count
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.open_llm.benchmarks import BY_TASK
from notus.runtime.process import first_line

if TYPE_CHECKING:
    import torch

    from notus.evaluation.models import ModelSource
    from notus.evaluation.open_llm.model import NotusLM

SUITE, TRIAL = "open-llm", "open-llm-trial"
RESULTS, TABLE, KEPT = "lm-eval.json", "table.md", "kept"


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
    parser.add_argument("--include-path", metavar="DIR", help="task files of your own, for --tasks")
    parser.add_argument(
        "--num-fewshot",
        type=_whole,
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


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print the table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    _check(args)
    from notus.runtime import distributed

    with distributed.process_group() as device:
        _evaluate(args, device)
    return 0


def _check(args: argparse.Namespace) -> None:
    try:
        importlib.import_module("lm_eval.api.group")  # which earlier versions do not have
    except ImportError as error:
        told = f"--suite {SUITE} needs the lm-eval package, 0.4.13 or later ({first_line(error)})"
        raise ValueError(f"{told}: pip install -U lm-eval") from error
    if args.include_path and not args.tasks:
        raise ValueError("--include-path has no effect without --tasks: name the tasks")
    if not args.apply_chat_template:
        for option in ("chat_template", "add_empty_system", "fewshot_as_multiturn"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                raise ValueError(f"{name} has no effect without --apply-chat-template: add that, or leave it out")


def _evaluate(args: argparse.Namespace, device: "torch.device") -> None:
    from notus.evaluation.files import hold_folder
    from notus.evaluation.models import find_together
    from notus.evaluation.open_llm import tasks
    from notus.evaluation.results import result_folder
    from notus.runtime.distributed import on_main, say

    # the names first: a wrong one is told before anything is loaded
    manager, opened = tasks.open_tasks(args.tasks or list(BY_TASK), args.include_path)
    if args.num_fewshot is None:
        tasks.set_shots(opened)
    source = find_together(args.model, trust_remote_code=args.trust_remote_code)
    folder = result_folder(args.output, source.run, source.name, _suite(args))
    on_main(lambda: hold_folder(folder))
    lm = _load(args, source, folder / KEPT, device)
    results = tasks.evaluate(
        lm,
        manager,
        opened,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        chat=args.apply_chat_template,
        multiturn=args.fewshot_as_multiturn is not False,
        system=args.system_instruction,
    )
    names = [item.name if isinstance(item, tasks.Group) else item.task_name for item in opened]
    say(on_main(lambda: _write(args, source, lm, results, names, folder)))
    say(f"results are in {folder}")


def _suite(args: argparse.Namespace) -> str:
    """What the result is filed under: a trial does not take the place of the whole."""
    return TRIAL if args.limit else SUITE


def _load(args: argparse.Namespace, source: "ModelSource", kept: Path, device: "torch.device") -> "NotusLM":
    from lm_eval.models.utils import resolve_max_length

    from notus.data.chat import check_vocabulary, resolve_template
    from notus.evaluation.generation import model_digest
    from notus.evaluation.open_llm.model import NotusLM
    from notus.model.export import load_causal_lm
    from notus.model.supported import check_supported
    from notus.training.parallelize import COMPUTE_DTYPES, check_attention

    dtype = COMPUTE_DTYPES[source.choose(args.precision, "training.precision", "bf16")]
    causal_lm, tokenizer = load_causal_lm(
        source.folder, dtype=dtype, device=device, trust_remote_code=args.trust_remote_code
    )
    check_supported(causal_lm.config)
    check_attention(causal_lm.config, device, dtype)
    check_vocabulary(tokenizer, causal_lm.config.vocab_size)
    longest = resolve_max_length(causal_lm.config, tokenizer)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(
            f"--max-length {args.max_length} is more than the model's context of {longest} tokens: lower it"
        )
    template = None
    if args.apply_chat_template:
        template = resolve_template(tokenizer, source.choose(args.chat_template, "data.chat_template", None))
    return NotusLM(
        causal_lm,
        tokenizer,
        name=source.name,
        max_length=args.max_length or longest,
        tokens_per_row=args.tokens_per_row,
        batch_size=args.batch_size,
        kept=kept,
        identity=model_digest(causal_lm),
        template=template,
        add_empty_system=source.choose(args.add_empty_system, "data.add_empty_system", False),
    )


def _write(
    args: argparse.Namespace,
    source: "ModelSource",
    lm: "NotusLM",
    results: dict[str, Any],
    names: list[str],
    folder: Path,
) -> str:
    """lm-eval's own JSON, the table and the suite's result; returns the table."""
    from lm_eval.utils import handle_non_serializable

    from notus.evaluation.files import replacing
    from notus.evaluation.open_llm.table import figures, markdown
    from notus.evaluation.results import Result, write_result

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESULTS) as file:
        json.dump(results, file, indent=2, default=handle_non_serializable, ensure_ascii=False)
        file.write("\n")
    found = figures(results, names, limit=args.limit)
    remarks = [f"A trial: the first {args.limit} examples of each task alone."] if args.limit else []
    table = markdown(source.name, found, remarks)
    with replacing(folder / TABLE) as file:
        file.write(table)
    settings = {
        "lm_eval": results["lm_eval_version"],
        "precision": str(lm.causal_lm.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "limit": args.limit,
        "chat_template": args.apply_chat_template,
        "fewshot_as_multiturn": args.apply_chat_template and args.fewshot_as_multiturn is not False,
        "system_instruction": args.system_instruction,
    }
    write_result(folder, Result(_suite(args), source.name, found, settings, details={"versions": results["versions"]}))
    return table
