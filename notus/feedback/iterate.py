"""`notus iterate CONFIG`: train in rounds of sample, rate, curate and DPO, each from the last round's model.

Every stage is an ordinary command, see `stages.py`, in a process of its own. A stage is complete when its output is
there; the same command then continues with the next one.

OUTPUT/iterate.yaml  dpo.yaml  report.html
       start/prompts.jsonl  answers.jsonl
       round-1/prompts.jsonl  records.jsonl  rated.jsonl  pairs.jsonl  run/  answers.jsonl  compared.jsonl
               evaluation.json  round.json
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from notus.config_reference import sections_text
from notus.feedback import rounds
from notus.feedback.records import summary_file
from notus.feedback.rounds import (
    CONFIG,
    PROMPTS,
    RECORDS,
    ROUND,
    RUN,
    Round,
    read_round,
    round_folders,
    summarise,
    write_round,
)
from notus.feedback.settings import OWN_SECTIONS, Settings, load_settings
from notus.feedback.stages import (
    DPO_CONFIG,
    NAMES,
    Stage,
    dpo_config,
    holds_out,
    plan,
    round_stages,
    start_folder,
    start_stages,
)
from notus.runtime.children import Child, hold, notus_command, process_count
from notus.runtime.files import write_text
from notus.runtime.process import STOPPED, tell

if TYPE_CHECKING:
    from notus.evaluation.prompts import Prompt
    from notus.feedback.slices import Pool

REPORT = "report.html"
_KEYS = """The sections of the config that a DPO config lacks, with their defaults. The others are those of `notus dpo`,
without data.train. Set keys in CONFIG.yaml, or here as --section.key=value."""
# Runs `notus WORDS`, on the ranks of torchrun if it shares its work among them, and returns its exit code.
Runner = Callable[[Sequence[str], bool], int]
# What may differ when an iteration is resumed, beside what may differ in a run: where and how fast it computes, how
# long it goes on, and what it may cost.
_FREE_KEYS = frozenset(
    {
        "iterate.rounds", "iterate.stop_win_rate", "iterate.stop_kl", "sample.allow_failed",
        "sample.batch_size", "sample.api_key_env", "sample.timeout", "sample.parallel", "sample.max_requests",
        "rate.api_key_env", "rate.timeout", "rate.parallel", "rate.max_requests", "rate.max_cost", "rate.price_in",
        "rate.price_out", "rate.batch_size", "rate.allow_failed",
    }
)  # fmt: skip

_RATING = ("rate", "compare")
_OF_RECORDS = ("sample", "answers", *_RATING)


class Stopped(Exception):
    """The iteration ends early; `code` is its exit code. The same command continues it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    keys = f"{_KEYS}\n\n{sections_text(OWN_SECTIONS)}"
    parser.epilog = keys.replace("%", "%%")  # argparse formats it
    parser.add_argument("config", type=os.path.expanduser, metavar="CONFIG.yaml", help="see docs/rounds.md")
    _add_options(parser)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=process_count, metavar="N", help="compute on N GPUs, under torchrun")
    parser.add_argument("--print", action="store_true", help="print one command per stage for a scheduler")
    parser.add_argument("--only", choices=NAMES, help="run one stage of one round, given by --round, and stop")
    parser.add_argument("--round", type=int, metavar="K", help="the round of --only, from 1; 0: the starting model's")


def run(args: argparse.Namespace) -> int:
    """Run the iteration and return its exit code.

    Returns:
        0; 1 if a stage failed; 75 if it was stopped by SIGTERM or by `training.max_hours`, 130 by SIGINT. The same
        command then resumes.

    Raises:
        ValueError: a user's mistake, in one line, before the first stage starts.
    """
    # options may stand after CONFIG, among the overrides
    options = argparse.ArgumentParser(prog="notus iterate", allow_abbrev=False)
    _add_options(options)
    args, overrides = options.parse_known_args(args.overrides, args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("an iteration starts its stages itself: start it without torchrun, with --nproc-per-node N")
    if (args.only is None) != (args.round is None):
        raise ValueError("--only and --round belong together: --only dpo --round 2")
    if args.print and args.only:
        raise ValueError("--print prints all stages: leave --only out")
    words = [args.config, *overrides]
    if args.print:
        return _print(words, args.nproc_per_node)
    child = Child()

    def start(command: Sequence[str], spread: bool) -> int:
        code = child.run(notus_command(command, args.nproc_per_node if spread else None))
        # how a command without a handler of its own ends does not matter
        return (STOPPED if child.signal == signal.SIGTERM else 128 + child.signal) if child.signal else code

    with child.listening():
        return iterate(words, start, only=(args.only, args.round) if args.only else None)


def iterate(words: Sequence[str], runner: Runner, only: tuple[str, int] | None = None) -> int:
    """Run the iteration of `CONFIG.yaml [--section.key=value ...]`, or one stage of it, and return its exit code.

    Raises ValueError before the first stage for what is wrong with the config; else see `run`.
    """
    settings = load_settings(words)
    with hold(settings.output, "iteration", "choose another training.output_dir"):
        settings = begin(settings, check_model=True)
        try:
            if only is not None:
                _run_one(settings, runner, *only)
            else:
                _run_all(settings, runner)
        except Stopped as stopped:
            return stopped.code
    return 0


def _print(words: Sequence[str], nproc_per_node: int | None) -> int:
    """Print a command for each stage, in order; stages that are no command of their own are those of --only."""
    settings = load_settings(words)
    with hold(settings.output, "iteration", "choose another training.output_dir"):
        settings = begin(settings)
    for stage in plan(settings):
        own = ["iterate", *words, "--only", stage.name, "--round", str(stage.round)]
        tell(shlex.join(notus_command(stage.words or own, nproc_per_node if stage.spread else None)))
    tell(shlex.join(notus_command(["report", str(settings.output)])))
    if settings.iterate.stop_win_rate is not None or settings.iterate.stop_kl is not None:
        tell("note: these commands do not stop by the stopping rules; `--only STAGE --round K` does", sys.stderr)
    return 0


# ---- the folder ----


def begin(settings: Settings, *, check_model: bool = False) -> Settings:
    """Check what the stages will need, record the config in the folder, and return it as recorded.

    The first launch decides the prompts per round and the date that chat templates take for today.

    Args:
        settings: as given.
        check_model: also find the starting model, which may be downloaded, unless it was sampled already.

    Raises:
        ValueError: a file is missing, the prompts are too few, or the folder holds another iteration.
    """
    from notus.training.run_folder import CONFIG_FILE

    if (settings.output / CONFIG_FILE).exists():
        raise ValueError(f"{settings.output} holds a run: choose another training.output_dir for the iteration")
    # until a stage has begun, nothing was made by what is recorded
    begun = start_folder(settings).exists() or round_folders(settings.output)
    recorded = _recorded(settings.output / CONFIG) if begun else None
    if recorded is not None:
        settings = _continued(settings, recorded)
    elif settings.given("data.template_date") is None:
        settings = settings.with_keys(data__template_date=datetime.date.today().isoformat())
    _check_files(settings)
    _check_eval_prompts(settings)
    if check_model and not (settings.folder(1) / RECORDS).exists():
        _check_start(settings)
    settings = _with_prompts(settings)
    write_text(settings.output / DPO_CONFIG, dpo_config(settings))
    write_text(settings.output / CONFIG, settings.to_yaml())
    return settings


def _recorded(path: Path) -> Settings | None:
    if not path.exists():
        return None
    try:
        return load_settings([str(path)])
    except ValueError as error:
        raise ValueError(f"{error}; restore the file, or choose another training.output_dir") from None


def _continued(settings: Settings, recorded: Settings) -> Settings:
    """Return the settings that resume an iteration. Raises ValueError, naming the keys, if they are of another one."""
    from notus.training.run_folder import FREE_KEYS

    if settings.iterate.prompts_per_round is None:
        settings = settings.with_keys(iterate__prompts_per_round=recorded.iterate.prompts_per_round)
    if settings.given("data.template_date") is None:
        settings = settings.with_keys(data__template_date=recorded.given("data.template_date"))
    before, now = recorded.flat(), settings.flat()
    changed = [key for key in now if key not in FREE_KEYS | _FREE_KEYS and before[key] != now[key]]
    if changed:
        changes = ", ".join(f"{key} (was {json.dumps(before[key])}, is {json.dumps(now[key])})" for key in changed)
        raise ValueError(
            f"{settings.output} holds an iteration with another config: {changes}. Restore the config to resume, or "
            "choose another training.output_dir"
        )
    begun = len(round_folders(settings.output))
    if settings.iterate.rounds < begun:
        raise ValueError(f"iterate.rounds is {settings.iterate.rounds}, but {settings.output} holds {begun} rounds")
    return settings


def _check_files(settings: Settings) -> None:
    """Raise ValueError for what later stages would miss, after hours of sampling."""
    template = settings.given("data.chat_template")
    files = {
        "iterate.prompts": settings.iterate.prompts,
        "iterate.eval_prompts": settings.iterate.eval_prompts,
        "rate.instructions": settings.rate.instructions,
        "curate.decontaminate": settings.curate.decontaminate,
        "data.chat_template": os.path.expanduser(template) if str(template).endswith(".jinja") else None,
    }
    for key, name in files.items():
        if name is not None and not Path(name).is_file():
            raise ValueError(f"{key}={name}: there is no such file; check the path")
    for section, variable in (("sample", settings.sample.api_key_env), ("rate", settings.rate.api_key_env)):
        if variable is not None and not os.environ.get(variable):
            raise ValueError(f"{section}.api_key_env: the environment has no {variable}; set it to the endpoint's key")
    if settings.rate.judge_function is not None:
        from notus.evaluation.win_rate import load_function

        load_function(settings.rate.judge_function)


def _check_eval_prompts(settings: Settings) -> None:
    """Raise ValueError if the start answered other prompts: all rounds are compared on these, and train on none."""
    from notus.feedback.slices import keys_of

    path, answered = settings.iterate.eval_prompts, start_folder(settings) / PROMPTS
    if path is not None and answered.exists() and keys_of(Path(path)) != keys_of(answered):
        raise ValueError(
            f"iterate.eval_prompts={path} has other prompts than when the iteration began, which {answered} holds: "
            "restore the file, or choose another training.output_dir"
        )


def _check_start(settings: Settings) -> None:
    """Raise ValueError unless the start takes a prompt as training on pairs will, as a turn of a chat.

    Also if it is an adapter on the hub that is to be trained further, since the plan took it for a model; and for a
    prompt that fills its context, which may be drawn in any round.
    """
    from notus.evaluation.resolve_model import find_source  # imports torch
    from notus.feedback.local_sampling import LocalModel, check_prompts
    from notus.model.export import load_tokenizer

    data, trust = settings.dpo(1).data, settings.dpo(1).model.trust_remote_code
    source = find_source(settings.start, trust_remote_code=trust)
    if settings.given("lora.continue") and source.base is not None and not Path(settings.start).is_dir():
        raise ValueError(
            f"model.name_or_path={settings.start} is an adapter on the hub: download it and name its folder, so that "
            "lora.continue trains it further"
        )
    named = argparse.Namespace(
        chat_template=data.chat_template, add_empty_system=None, precision=None, trust_remote_code=trust
    )
    options = source.options(named)
    if not options.strings_are_turns(load_tokenizer(source.folder, trust)):
        raise ValueError(
            f"model.name_or_path={settings.start} has no chat template, or learned plain text only: set "
            "data.chat_template, with which all rounds sample and train"
        )
    # of a run, sampling takes the settings that the config lacks; training does not
    learned = options.chat
    flags = [key for key in ("add_empty_system", "split_special_tokens") if getattr(learned, key) > getattr(data, key)]
    lacking = ["chat_template_kwargs"] if learned.chat_template_kwargs.keys() - data.chat_template_kwargs.keys() else []
    for key in flags + lacking:
        raise ValueError(
            f"model.name_or_path={settings.start} was trained with data.{key}={json.dumps(getattr(learned, key))}: set "
            "that here, too, or name its model/ folder"
        )
    check_prompts(LocalModel("the start", source, options, as_turns=True, dated=False), _all_prompts(settings))


def _with_prompts(settings: Settings) -> Settings:
    """Return the settings with the number of prompts per round. Raises ValueError if there are too few prompts."""
    from notus.feedback.slices import keys_of

    numbers = range(1, settings.iterate.rounds + 1)
    drawn = [path for number in numbers if (path := settings.folder(number) / PROMPTS).exists()]
    if len(drawn) == len(numbers):
        return settings
    pool = _pool(settings)
    per_round = settings.iterate.prompts_per_round
    if per_round is None:
        per_round = len(pool.prompts) // len(numbers)
    used = set().union(*(keys_of(path) for path in drawn)) & pool.prompts.keys()
    pool.check(len(numbers) - len(drawn), per_round, len(used))
    return settings.with_keys(iterate__prompts_per_round=per_round)


def _all_prompts(settings: Settings) -> list["Prompt"]:
    """Return the prompts that rounds may draw, and those for evaluation."""
    from notus.evaluation.prompts import read_prompts

    eval_prompts = settings.iterate.eval_prompts
    held_out = read_prompts(Path(eval_prompts), strings_are_turns=True) if eval_prompts else []
    return [*_pool(settings).prompts.values(), *held_out]


def _pool(settings: Settings) -> "Pool":
    from notus.feedback.slices import read_pool

    eval_prompts = settings.iterate.eval_prompts
    return read_pool(Path(settings.iterate.prompts), Path(eval_prompts) if eval_prompts else None)


# ---- the stages ----


def _run_all(settings: Settings, runner: Runner) -> None:
    number, reason = 0, None
    for stage in start_stages(settings):
        _run_stage(settings, stage, runner)
    for number in range(1, settings.iterate.rounds + 1):
        for stage in round_stages(settings, number):
            _run_stage(settings, stage, runner)
        if (reason := stop_reason(settings, number)) is not None:
            break
    _report(settings, runner, last=number)
    tell("\n" + "\n".join(_result(settings, number, reason)))


def _run_one(settings: Settings, runner: Runner, name: str, number: int) -> None:
    """Run one stage. Raises ValueError if there is none such, or if a stage before it is not complete."""
    stages = plan(settings)
    place = next((place for place, stage in enumerate(stages) if (stage.name, stage.round) == (name, number)), None)
    if place is None:
        known = ", ".join(stage.name for stage in stages if stage.round == number) or "none"
        raise ValueError(f"--only {name} --round {number}: there is no such stage; the stages of that round: {known}")
    for earlier in stages[:place]:
        if not is_complete(settings, earlier):
            raise ValueError(f"--only {name} --round {number}: {earlier} is not complete; run it first")
        if earlier.name == "round" and (reason := stop_reason(settings, earlier.round)) is not None:
            tell(f"round {number}: nothing to do, since {reason}")
            return
    _run_stage(settings, stages[place], runner)


def _run_stage(settings: Settings, stage: Stage, runner: Runner) -> None:
    """Run a stage unless it is complete. Raises Stopped if it fails or is stopped."""
    if is_complete(settings, stage):
        tell(f"== {stage}: complete already")
        return
    tell(f"\n== {stage}")
    if not stage.words:
        _OWN_STAGES[stage.name](settings, stage)
        return
    if stage.name == "evaluate" and not holds_out(settings):
        tell("no rows are held out: of the figures below only the KL counts, the others are of the training pairs")
    code = runner(stage.words, stage.spread)
    if code in (STOPPED, 128 + signal.SIGINT):
        how = "Ctrl-C" if code != STOPPED else "a signal"
        _end(code, f"stopped by {how} in {stage}; the same command continues")
    if code == 1 and stage.name in _OF_RECORDS and stage.output.exists():  # some requests failed
        code = 0
    if code:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        _end(1, f"failed: {stage} ({how}); its error stands above. The same command starts this stage again")
    if stage.name in _OF_RECORDS:
        _check_usable(settings, stage)
    if not is_complete(settings, stage):  # a run that stopped at training.max_hours
        _end(STOPPED, f"{stage} is not finished; the same command continues")


def _end(code: int, message: str) -> NoReturn:
    tell(message, sys.stderr)
    raise Stopped(code)


def is_complete(settings: Settings, stage: Stage) -> bool:
    """Whether a stage's output is there, and is what training may use."""
    if stage.name == "dpo":
        from notus.training.run_folder import is_finished

        return is_finished(stage.output)
    if not stage.output.exists():
        return False
    if stage.name not in _OF_RECORDS or _is_followed(settings, stage):
        return True
    return _is_usable(settings, stage, _read_summary(stage.output))


def _is_followed(settings: Settings, stage: Stage) -> bool:
    """Whether the next stage is complete: a file of records then was, too, whatever `allow_failed` has become since."""
    stages = plan(settings)
    return stages[stages.index(stage) + 1].output.exists()


def _read_summary(records: Path) -> dict[str, Any] | None:
    """Return the summary of a file of records; None if it is another file's: the command was killed between the two."""
    path = summary_file(records)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        with records.open("rb") as file:
            return summary if summary["sha256"] == hashlib.file_digest(file, "sha256").hexdigest() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): remove {records} to start this stage again") from error


def _is_usable(settings: Settings, stage: Stage, summary: dict[str, Any] | None) -> bool:
    if summary is None:
        return False
    share, _ = _failed_share(settings, stage, summary)
    return share <= _allowed(settings, stage) and not (stage.name == "rate" and _is_indifferent(summary))


def _failed_share(settings: Settings, stage: Stage, summary: dict[str, Any]) -> tuple[float, str]:
    """Return the share of what failed in a finished file of records, and what that is."""
    if stage.name in _RATING:
        return summary["failed"] / max(1, summary["prompts"]), "prompts have no ratings"
    asked = summary["prompts"] * (
        1 if stage.name == "answers" else settings.sample.n * (1 + len(settings.sample.models))
    )
    return summary["failed"] / max(1, asked), "completions failed"


def _allowed(settings: Settings, stage: Stage) -> float:
    return settings.rate.allow_failed if stage.name in _RATING else settings.sample.allow_failed


def _is_indifferent(summary: dict[str, Any]) -> bool:
    """Whether a judge gave everything the same rating."""
    return summary["different"] == 1 and summary["rated"] > 1


def _check_usable(settings: Settings, stage: Stage) -> None:
    """End the iteration where records cannot be trained on, or would be others when the command is repeated."""
    summary = _read_summary(stage.output)
    if summary is None:
        _end(1, f"failed: {stage}: {stage.output} is not what its summary is of; the same command starts it again")
    section = "rate" if stage.name in _RATING else "sample"
    (share, what), allowed = _failed_share(settings, stage, summary), _allowed(settings, stage)
    if share > allowed:
        _end(
            1,
            f"stopped before training: {stage}: {share:.1%} of the {what}, and {section}.allow_failed is {allowed:g}. "
            f"The same command asks again for these; or raise {section}.allow_failed to do without them",
        )
    if share:
        tell(f"note: {share:.1%} of the {what} and are left out ({section}.allow_failed is {allowed:g})")
    if stage.name == "rate" and _is_indifferent(summary):
        _end(
            1,
            f"stopped before training: {stage}: {summary['judge']} gave everything the same rating, so nothing can be "
            f"learned from it. Change the judge or its instructions, and choose another training.output_dir",
        )


def _draw_prompts(settings: Settings, stage: Stage) -> None:
    """Write the prompts of a round, or those that the models are compared on."""
    from notus.evaluation.prompts import read_prompts
    from notus.feedback.slices import keys_of, write_prompts

    iterate, template_kwargs = settings.iterate, settings.dpo(1).data.chat_template_kwargs
    if stage.round == 0:
        assert iterate.eval_prompts is not None
        path = Path(iterate.eval_prompts)
        prompts = read_prompts(path, strings_are_turns=True)
        left_out = ""
    else:
        assert iterate.prompts_per_round is not None
        path, pool = Path(iterate.prompts), _pool(settings)
        earlier = [keys_of(settings.folder(number) / PROMPTS) for number in range(1, stage.round)]
        pool.check(1, iterate.prompts_per_round, len(set().union(*earlier) & pool.prompts.keys()))
        prompts = pool.draw(stage.round, iterate.prompts_per_round, set().union(*earlier), iterate.seed)
        left_out = f"; {pool.repeated} repeated and {pool.held_out} evaluation prompts are never drawn"
    write_prompts(stage.output, prompts, path, template_kwargs)
    tell(f"{len(prompts)} prompts of {path}{left_out}")


def _sum_up(settings: Settings, stage: Stage) -> None:
    folder = settings.folder(stage.round)
    summary = summarise(folder)
    write_round(folder, summary)
    tell("; ".join(_figures(summary)) or f"wrote {stage.output}")


_OWN_STAGES: dict[str, Callable[[Any, Any], None]] = {"prompts": _draw_prompts, "round": _sum_up}


# ---- the end ----


def stop_reason(settings: Settings, number: int) -> str | None:
    """Return why the iteration ends after a complete round; None if it does not."""
    iterate, summary = settings.iterate, read_round(settings.folder(number))
    return rounds.stop_reason(number, summary, stop_win_rate=iterate.stop_win_rate, stop_kl=iterate.stop_kl)


def _figures(summary: Round) -> list[str]:
    found = []
    if summary.win_rate is not None:
        found.append(f"win rate against the start {summary.win_rate:.1%}")
    if summary.kl is not None:
        found.append(f"KL to the start {summary.kl:.4g} nats per completion")
    return found


def _result(settings: Settings, last: int, reason: str | None) -> list[str]:
    """Return what is said at the end: why it ends, and which model is the result."""
    found = {number: read_round(settings.folder(number)) for number in range(1, last + 1)}
    within = [number for number, summary in found.items() if rounds.is_within(summary, settings.iterate.stop_kl)]
    lines = [f"stopped: {reason}"] if reason is not None else []
    if not within:
        return [*lines, f"no round's model is within the budget: the result is the starting model, {settings.start}"]
    result = within[-1]
    lines.append(
        f"finished after {last} of {settings.iterate.rounds} rounds: the model is in {settings.folder(result) / RUN}"
    )
    rates = {number: rate for number in within if (rate := found[number].win_rate) is not None}
    if rates and (best := max(rates, key=lambda number: rates[number])) != result:
        folder = settings.folder(best) / RUN
        lines.append(f"round {best} has the best win rate against the start, {rates[best]:.1%}: {folder}")
    return lines


def _report(settings: Settings, runner: Runner, *, last: int) -> None:
    """Write the report, unless there is one that is newer than round `last`. Raises Stopped if that fails."""
    path, newest = settings.output / REPORT, settings.folder(last) / ROUND
    if path.exists() and path.stat().st_mtime_ns > newest.stat().st_mtime_ns:
        return
    if importlib.util.find_spec("plotly") is None:
        tell(f"no report: it is drawn with plotly (pip install plotly). Then run notus report {settings.output}")
        return
    if code := runner(["report", str(settings.output)], False):
        _end(code if code in (STOPPED, 128 + signal.SIGINT) else 1, "failed: the report; its error stands above")
