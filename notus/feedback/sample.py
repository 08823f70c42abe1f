"""`python -m notus sample`: let models answer the prompts of a file, several times each, as UltraFeedback records.

Local models work one after the other, each prompted as `notus generate` prompts it. Models behind endpoints are asked
over HTTP. Finished work is kept, so that the same command resumes after it was killed, with the same result.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from notus.evaluation.arguments import add_model_options, check_no_effect, count, day, positive
from notus.evaluation.generate import add_answer_arguments, add_engine_argument, answer_settings
from notus.feedback.records import (
    RATINGS,
    Record,
    check_out,
    digest_of,
    earlier_settings,
    finish,
    held,
    is_finished,
    join,
    kept_folder,
    prompt_key,
    prompt_record,
    read_records,
    repeated,
    with_completions,
)
from notus.feedback.sampled_models import SampledModel, parse_models
from notus.runtime.process import STOPPED, tell, tell_apart

if TYPE_CHECKING:
    import torch

    from notus.evaluation.decoding import Decoding
    from notus.evaluation.endpoint import Endpoint
    from notus.evaluation.prompts import Prompt
    from notus.feedback.endpoint_sampling import Sampled
    from notus.feedback.local_sampling import LocalModel

MANY = 0.1  # the share of empty or cut completions from which a model is named
SAME = 0.5  # the share of prompts whose completions are all the same, from which a model is named
_MAX_NEW_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "prompts",
        type=os.path.expanduser,
        metavar="PROMPTS",
        help="a .jsonl, .json, .csv or .parquet file of rows with prompt, messages, conversations or instruction; or a "
        ".txt file, one prompt a line",
    )
    parser.add_argument(
        "out", type=os.path.expanduser, metavar="OUT", help="a .jsonl file of records, there when complete"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="a model's, an adapter's or a run's folder, a hub id, or NAME@http://host:8000/v1, a model behind an "
        "OpenAI-compatible endpoint; LABEL=MODEL sets its name in the records",
    )
    # torchrun takes --n for one of its own options, abbreviated, and rejects it as ambiguous
    parser.add_argument(
        "--n",
        "--num-samples",
        dest="n",
        type=count,
        default=4,
        metavar="N",
        help="completions of each model per prompt (default: 4); under torchrun write --num-samples",
    )
    add_answer_arguments(parser, "completion", max_new_tokens=_MAX_NEW_TOKENS, heat="1; with --n 1: 0")
    parser.add_argument("--top-k", type=count, help="draw from the k likeliest tokens")
    parser.add_argument("--system", metavar="TEXT", help="a system turn for conversations without one")
    parser.add_argument(
        "--with",
        dest="earlier",
        type=os.path.expanduser,
        metavar="RECORDS",
        help="records of the same prompts, whose completions come first",
    )
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="of a prompt's completions with the same text, keep the first",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete"
    )
    _add_local_arguments(parser)
    _add_endpoint_arguments(parser)


def _add_local_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_argument(parser)
    add_model_options(parser)
    parser.add_argument(
        "--template-date",
        type=day,
        metavar="YYYY-MM-DD",
        help="what chat templates take for today (default: the run's data.template_date, or the day on which the "
        "sampling began)",
    )
    parser.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="read special tokens in prompts as plain text, as data.split_special_tokens (default: as the run did)",
    )


def _add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        default="OPENAI_API_KEY",
        help="the environment variable that holds the endpoints' key (default: OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--timeout", type=positive, default=120.0, metavar="SECONDS", help="of one request (default: 120)"
    )
    parser.add_argument("--parallel", type=count, default=8, help="requests at a time (default: 8)")
    parser.add_argument(
        "--max-requests", type=count, metavar="N", help="stop after N requests in all, retries included"
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """What is sampled."""

    prompts: list["Prompt"]  # with strings as user turns
    plain: list["Prompt"] | None  # with strings as text to continue, where a model takes them so
    records: list[Record]  # of the prompts, without completions
    earlier: list[list[dict[str, Any]]]  # for each prompt the completions of --with
    digest: str  # of the prompts
    earlier_digest: str | None

    def prompts_of(self, model: "LocalModel") -> list["Prompt"]:
        """The prompts as a local model takes them."""
        return self.prompts if model.as_turns or self.plain is None else self.plain

    @property
    def occurrences(self) -> list[int]:
        """How often each prompt came before."""
        seen: dict[str, int] = {}
        found = []
        for record in self.records:
            key = prompt_key(record)
            found.append(seen.get(key, 0))
            seen[key] = found[-1] + 1
        return found


def run(args: argparse.Namespace) -> int:
    """Sample as `args` say; under torchrun the ranks share the local models' work, and the first asks the endpoints.

    Returns 0; 1 if completions failed, or the budget ended; 75 if a signal stopped it. Raises ValueError or OSError
    with a message for the user.
    """
    with _stopping(args.out), contextlib.ExitStack() as stack:
        try:
            return _run(args, stack)
        except KeyboardInterrupt:  # came while an endpoint was asked
            tell(f"stopped: the completions that came are kept beside {args.out}; the same command resumes")
            return STOPPED


def _run(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Sample; `stack` holds OUT until the end."""
    decoding = _check(args)
    earlier = read_records(args.earlier) if args.earlier else []
    taken = {completion["model"] for _, record in earlier for completion in record["completions"]}
    models = parse_models(args.models, taken)
    _check_kinds(args, models)
    check_out(Path(args.out), args.prompts, args.earlier)
    endpoints = _endpoints(args, models)
    from notus.runtime import distributed

    with distributed.process_group() as device:
        models, local = _find(args, models, distributed.on_main(lambda: _began(args)))
        task = distributed.on_main(lambda: _read(args, list(local.values()), earlier))
        settings = _settings(args, decoding, task, models, local)
        if args.template_date not in (None, datetime.date.today().isoformat()) and settings["date"] is None:
            distributed.say("note: --template-date has no effect: no model's chat template writes the date")
        distributed.on_main(lambda: stack.enter_context(held(Path(args.out))) and None)
        if distributed.on_main(lambda: is_finished(Path(args.out), settings, overwrite=args.overwrite)):
            distributed.say(f"{args.out} is finished already: the same prompts, models and settings made it")
            return 0
        start = time.monotonic()
        distributed.on_main(lambda: _check_prompts(models, local, task))
        if local and endpoints:  # a wrong key or address shows before the local models work
            distributed.on_main(lambda: _try_endpoints(args, models, endpoints, task))
        found = _sample_local(args, models, local, task, decoding, device)
        speaks = distributed.is_main()
    if not speaks:  # asking endpoints can take hours, and the other ranks have no part in it
        return 0
    found |= _sample_endpoints(args, models, endpoints, task)
    return _finish(args, models, task, settings, found, time.monotonic() - start)


def _check(args: argparse.Namespace) -> "Decoding":
    """Return how completions are drawn. Raises ValueError for options that contradict each other."""
    if args.temperature is None:
        args.temperature = 1.0 if args.n > 1 else 0.0
    if args.temperature == 0 and args.n > 1:
        raise ValueError("--n above 1 would repeat a greedy completion: set --temperature above 0")
    if args.raw and args.system is not None:
        raise ValueError("--raw takes prompts as plain text, which has no turns: leave --system out")
    if args.raw and (args.chat_template or args.add_empty_system):
        raise ValueError("--raw uses no chat template: leave --chat-template and --add-empty-system out")
    if not Path(args.prompts).exists():
        raise ValueError(f"{args.prompts}: there is no such file; give one with prompts")
    settings = answer_settings(args, "completions", _MAX_NEW_TOKENS)
    return dataclasses.replace(settings, samples=args.n, engine=args.engine)


def _check_kinds(args: argparse.Namespace, models: Sequence[SampledModel]) -> None:
    """Raise ValueError for options of local models without any, and for those of endpoints without any."""
    if all(model.url is None for model in models):
        check_no_effect(args, _add_endpoint_arguments, "on local models")
        return
    if args.raw is not None:
        option = "--raw" if args.raw else "--no-raw"
        raise ValueError(f"{option} has no effect on a model behind an endpoint, which renders its own chat template")
    if all(model.url is not None for model in models):
        check_no_effect(args, _add_local_arguments, "on models behind endpoints")
        if args.batch_size is not None:
            raise ValueError("--batch-size has no effect on models behind endpoints; see --parallel")


def _endpoints(args: argparse.Namespace, models: Sequence[SampledModel]) -> dict[str, "Endpoint"]:
    """Return the endpoints by the models' names. Raises ValueError for a wrong address."""
    from notus.evaluation.endpoint import Endpoint

    key = os.environ.get(args.api_key_env, "").strip() or None
    return {
        model.name: Endpoint(model.url, model.model, api_key=key, timeout=args.timeout)
        for model in models
        if model.url is not None
    }


def _find(
    args: argparse.Namespace, models: Sequence[SampledModel], began: str
) -> tuple[list[SampledModel], dict[str, "LocalModel"]]:
    """Find the local models; return all models, of unfinished runs with the step in their names, and the local ones."""
    from notus.feedback.local_sampling import find_local

    found, local = [], {}
    for model in models:
        if model.url is None:
            of_model = find_local(model, args, began)
            model = dataclasses.replace(model, name=of_model.name)
            local[model.name] = of_model
        found.append(model)
    return found, local


def _began(args: argparse.Namespace) -> str:
    """Return --template-date; else the day on which the work on OUT began, where its settings say so; else today."""
    if args.template_date is not None:
        return str(args.template_date)
    settings = earlier_settings(Path(args.out), overwrite=args.overwrite)
    return str(settings.get("date") or datetime.date.today().isoformat())


# ---- prompts and settings ----


def _read(args: argparse.Namespace, local: Sequence["LocalModel"], earlier: list[tuple[str, Record]]) -> Task:
    """Read the prompts as the models take them; for rank 0. Raises ValueError, naming file and line, or the model."""
    from notus.evaluation.prompts import read_prompts

    path = Path(args.prompts)
    prompts = read_prompts(path, strings_are_turns=True, system=args.system)
    plain = None
    if not all(model.as_turns for model in local):
        plain = read_prompts(path, strings_are_turns=False, system=args.system)
        _check_plain(args, plain, next(model for model in local if not model.as_turns))
    records = [prompt_record(prompt, path) for prompt in prompts]
    completions: list[list[dict[str, Any]]] = [[] for _ in records]
    digest, joined = digest_of(records), None
    if args.earlier:
        joined = join(records, [prompt.place for prompt in prompts], earlier)
        completions = [[_unrated(completion) for completion in other["completions"]] for other in joined]
    all_plain = plain is not None and len(local) == len(args.models) and not any(model.as_turns for model in local)
    records = _marked(records, plain, joined, all_plain=all_plain)
    if again := repeated(records):
        tell(f"note: {again} of {len(records)} prompts came before in the file; each is sampled on its own")
    return Task(prompts, plain, records, completions, digest, digest_of(completions) if args.earlier else None)


def _marked(
    records: Sequence[Record], plain: Sequence["Prompt"] | None, earlier: Sequence[Record] | None, *, all_plain: bool
) -> list[Record]:
    """Return the records, `plain_text` where every model continues the prompt as text, those of --with included.

    Training then takes it as text, too. `all_plain`: no model takes strings as user turns.
    """
    marked, mixed = [], 0
    for number, record in enumerate(records):
        is_text = plain is not None and isinstance(plain[number].turns, str)
        was_text = earlier[number].get("plain_text") is True if earlier is not None else is_text
        mark = all_plain and is_text and was_text
        mixed += not mark and (is_text or was_text)
        marked.append({**record, "plain_text": True} if mark else record)
    if mixed:
        tell(
            f"note: some models continue {mixed} of the prompts as plain text, others answer them as a user's turn; "
            "training will take all of their completions as answers to a user's turn"
        )
    return marked


def _check_plain(args: argparse.Namespace, prompts: Sequence["Prompt"], model: "LocalModel") -> None:
    """Raise ValueError for what a model that continues plain text cannot take."""
    if args.system is not None and any(isinstance(prompt.turns, str) for prompt in prompts):
        raise ValueError(
            f"--system has no effect on {model.name}, for which string prompts are plain text: it has no chat format, "
            "or learned plain text only; add --chat-template or --no-raw, or sample it on its own"
        )
    chat = next((prompt for prompt in prompts if not isinstance(prompt.turns, str)), None)
    if args.raw and chat is not None:
        raise ValueError(f"{chat.place}: holds messages, which --raw does not take: leave --raw out")


def _unrated(completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return a completion of --with. Ratings are left out: a judge rates all completions of a prompt together."""
    return {key: value for key, value in completion.items() if key not in RATINGS}


def _settings(
    args: argparse.Namespace,
    decoding: "Decoding",
    task: Task,
    models: Sequence[SampledModel],
    local: Mapping[str, "LocalModel"],
) -> dict[str, Any]:
    """Return all that decides the records; collective."""
    described = []
    for model in models:
        if model.name in local:
            described.append(local[model.name].identity)
        else:
            described.append({"name": model.name, "model": model.model, "endpoint": model.url})
    drawn: tuple[str, ...] = ("temperature",)
    if decoding.temperature:
        drawn += ("top_p", "top_k", "seed")
    if local and decoding.temperature:  # both decide the draws, but no greedy completion
        drawn += ("batch_size", "engine")
    return {
        "prompts": Path(args.prompts).name,
        "prompts_sha256": task.digest,
        "with_sha256": task.earlier_digest,
        "n": args.n,
        "max_new_tokens": decoding.max_new_tokens,
        **{name: getattr(decoding, name) for name in drawn},
        "system": args.system,
        "raw": args.raw,
        "drop_duplicates": args.drop_duplicates,
        # the day that chat templates write
        "date": next((model.options.chat.template_date for model in local.values() if model.dated), None),
        "models": described,
    }


# ---- sampling ----


def _check_prompts(models: Sequence[SampledModel], local: Mapping[str, "LocalModel"], task: Task) -> None:
    """Raise ValueError for prompts that a later model cannot take, before an earlier one has worked for hours.

    The first one finds its own when it begins.
    """
    from notus.feedback.local_sampling import check_prompts

    for model in [local[model.name] for model in models if model.name in local][1:]:
        check_prompts(model, task.prompts_of(model))


def _sample_local(
    args: argparse.Namespace,
    models: Sequence[SampledModel],
    local: Mapping[str, "LocalModel"],
    task: Task,
    decoding: "Decoding",
    device: "torch.device",
) -> dict[str, "Sampled"]:
    """Let the local models work, one after the other; collective."""
    from notus.feedback.local_sampling import free_memory, sample_local
    from notus.runtime import distributed

    found: dict[str, Sampled] = {}
    for number, model in enumerate(models, start=1):
        if model.name not in local:
            continue
        distributed.say(_asked(model.name, task, args.n))
        folder = kept_folder(Path(args.out)) / f"model-{number}"
        if found:
            free_memory(device)  # of the model before
        of_model = local[model.name]
        # with one seed, similar models would draw the same: torch's random numbers are the same for equal batches
        drawn = dataclasses.replace(decoding, seed=decoding.seed + number - 1)
        found[model.name] = sample_local(of_model, task.prompts_of(of_model), drawn, folder, device)
    return found


def _asked(name: str, task: Task, n: int) -> str:
    total = len(task.records) * n
    return f"{name}: {total:,} completions of {len(task.records):,} prompts"


def _sample_endpoints(
    args: argparse.Namespace,
    models: Sequence[SampledModel],
    endpoints: Mapping[str, "Endpoint"],
    task: Task,
    *,
    only_first: bool = False,
) -> dict[str, "Sampled"]:
    """Ask the endpoints, one after the other; for rank 0. The budget is for all of them together.

    `only_first`: each for its first completion alone.
    """
    from notus.feedback.endpoint_sampling import EndpointSampler, Sampling, draws, kept_requests

    seed = 42 if args.seed is None else args.seed
    sampling = Sampling(args.n, args.max_new_tokens or _MAX_NEW_TOKENS, args.temperature, args.top_p, args.top_k, seed)
    keys = [prompt_key(record) for record in task.records]
    folder = kept_folder(Path(args.out))
    files = {model.name: folder / f"model-{number}.jsonl" for number, model in enumerate(models, start=1) if model.url}
    found: dict[str, Sampled] = {}
    for name, kept in files.items():
        if not only_first:
            tell(_asked(name, task, args.n))
        others = sum(kept_requests(file) for file in files.values() if file != kept)
        most = None if args.max_requests is None else max(0, args.max_requests - others)
        sampler = EndpointSampler(name, endpoints[name], sampling, kept, parallel=args.parallel, max_requests=most)
        asked = draws(keys, task.occurrences, sampling, name)
        found[name] = sampler.sample(task.prompts, asked[:1] if only_first else asked)
    return found


def _try_endpoints(
    args: argparse.Namespace, models: Sequence[SampledModel], endpoints: Mapping[str, "Endpoint"], task: Task
) -> None:
    """Ask each endpoint for one completion, which is kept. Raises ValueError if it rejects every request."""
    for name, sampled in _sample_endpoints(args, models, endpoints, task, only_first=True).items():
        if sampled.failures:
            tell(f"note: {name}: {sampled.failures[0]}; asked again after the local models")


@contextlib.contextmanager
def _stopping(out: str) -> Iterator[None]:
    """End the process at SIGTERM or SIGINT with the exit code of a run that can be resumed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            tell_apart(f"{name}: stopped; finished work is kept beside {out}, and the same command resumes")
        os._exit(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the result ----


def _finish(
    args: argparse.Namespace,
    models: Sequence[SampledModel],
    task: Task,
    settings: dict[str, Any],
    found: Mapping[str, "Sampled"],
    seconds: float,
) -> int:
    """Write records and summary, print the table, and return the exit code; for rank 0."""
    if missing := sum(sampled.over_budget for sampled in found.values()):
        tell(
            f"stopped: --max-requests {args.max_requests} is used up, and {missing:,} completions are missing; the "
            "same command with a larger --max-requests resumes"
        )
        return 1
    ordered = {model.name: found[model.name] for model in models}
    for name, sampled in ordered.items():
        if not any(sampled.completions):
            raise ValueError(f"{name}: not one completion came ({sampled.failures[0]}); fix it and run the same again")
    groups = [
        [*before, *(each for sampled in ordered.values() for each in sampled.completions[number])]
        for number, before in enumerate(task.earlier)
    ]
    kept = [_distinct(group) for group in groups] if args.drop_duplicates else groups
    records = [with_completions(record, group) for record, group in zip(task.records, kept, strict=True)]
    failed = sum(len(sampled.failures) for sampled in ordered.values())
    summary = {
        "settings": settings,
        "prompts": len(records),
        "completions": sum(map(len, kept)),
        "dropped_duplicates": sum(map(len, groups)) - sum(map(len, kept)),
        "seconds": seconds,
        "models": {name: _figures(sampled) for name, sampled in ordered.items()},
    }
    finish(Path(args.out), records, summary, failed=failed)
    tell(_table(summary))
    for name, sampled in ordered.items():
        _report(name, sampled)
    tell(f"wrote {summary['completions']:,} completions of {len(records):,} prompts to {args.out}")
    return 1 if failed else 0


def _distinct(completions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first completion of each text."""
    first: dict[str, dict[str, Any]] = {}
    for completion in completions:
        first.setdefault(completion["response"], completion)
    return list(first.values())


def _figures(sampled: "Sampled") -> dict[str, Any]:
    """Return a model's part of the summary; before duplicates are dropped."""
    completions = [completion for of_prompt in sampled.completions for completion in of_prompt]
    tokens = [completion["tokens"] for completion in completions]
    return {
        "completions": len(completions),
        "empty": sum(not completion["response"].strip() for completion in completions),
        "cut": sum(completion["finish_reason"] == "length" for completion in completions),
        "failed": len(sampled.failures),
        "tokens": None if None in tokens else sum(tokens),
        "tokens_per_second": sampled.tokens_per_second,
        "requests": sampled.requests,
    }


def _table(summary: Mapping[str, Any]) -> str:
    """Return the models' figures for people."""
    rows = [("model", "completions", "empty", "cut", "mean tokens", "tokens/s", "failed")]
    for name, figures in summary["models"].items():
        count, tokens, speed = figures["completions"], figures["tokens"], figures["tokens_per_second"]
        rows.append(
            (
                name,
                f"{count:,}",
                f"{figures['empty'] / count:.1%}",
                f"{figures['cut'] / count:.1%}",
                "-" if tokens is None else f"{tokens / count:.1f}",
                "-" if speed is None else f"{speed:,.1f}",
                f"{figures['failed']:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if summary["dropped_duplicates"]:
        lines.append(f"{summary['dropped_duplicates']:,} completions with the text of an earlier one are dropped")
    return "\n".join(lines)


def _report(name: str, sampled: "Sampled") -> None:
    """Name a model with many empty, cut or equal completions, and the failures, with what to change."""
    figures = _figures(sampled)
    empty, cut = figures["empty"] / figures["completions"], figures["cut"] / figures["completions"]
    if empty >= MANY:
        tell(
            f"warning: {name}: {empty:.0%} of its completions are empty; check its chat template (--chat-template, "
            "--raw), since the model ends at once"
        )
    if cut >= MANY:
        tell(
            f"warning: {name}: {cut:.0%} of its completions are cut at their most tokens; raise --max-new-tokens, or "
            "check that the model learned to end its answers with its EOS token"
        )
    several = [{each["response"] for each in of_prompt} for of_prompt in sampled.completions if len(of_prompt) > 1]
    if several and (same := sum(len(texts) == 1 for texts in several) / len(several)) >= SAME:
        tell(
            f"warning: {name}: all completions of {same:.0%} of the prompts are the same; raise --temperature, or "
            "check that the server heeds it: `transformers serve` needs do_sample in the model's generation_config.json"
        )
    if sampled.failures:
        tell(
            f"{name}: {len(sampled.failures):,} completions failed, the first: {sampled.failures[0]}; the same command "
            "asks for them again"
        )
