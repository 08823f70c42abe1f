"""The stages of `notus iterate`: which ordinary command each one is, and what is there once it is complete.

The plan follows from the settings alone, so it can be printed for a scheduler before anything runs. Round 0 is the
starting model, whose answers all rounds are compared with.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from notus.config import section_keys, to_yaml
from notus.feedback.rounds import (
    ANSWERS,
    COMPARED,
    EVALUATION,
    OWN_PAIRS,
    PAIRS,
    PROMPTS,
    RATED,
    RECORDS,
    ROUND,
    RUN,
)
from notus.feedback.settings import JUDGES, RateConfig, Settings

DPO_CONFIG = "dpo.yaml"  # the config of round 1's run; the commands of the others override what differs
NAMES = ("prompts", "sample", "rate", "own-pairs", "curate", "dpo", "answers", "compare", "evaluate", "round")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a round.

    Attributes:
        name: one of `NAMES`.
        round: from 1; 0: the starting model's.
        output: the file or run that is there once the stage is complete.
        words: the `notus` command that makes it; none: `notus iterate` makes it itself.
        spread: whether the command shares its work among the ranks of torchrun.
    """

    name: str
    round: int
    output: Path
    words: tuple[str, ...] = ()
    spread: bool = False

    def __str__(self) -> str:
        """For people: "round 2, sample"."""
        return f"{f'round {self.round}' if self.round else 'start'}, {self.name}"


def plan(settings: Settings) -> list[Stage]:
    """Return all stages of all rounds, in order."""
    stages = list(start_stages(settings))
    for number in range(1, settings.iterate.rounds + 1):
        stages += round_stages(settings, number)
    return stages


def policy_name(number: int) -> str:
    """Return what records call the model that a round starts from: "start", then "round-1", and so on."""
    return "start" if number == 1 else f"round-{number - 1}"


def start_folder(settings: Settings) -> Path:
    """Return the folder of the starting model's answers."""
    return settings.output / "start"


def start_stages(settings: Settings) -> Iterator[Stage]:
    """Yield what is done once, before the first round: none without prompts to compare on."""
    if settings.iterate.eval_prompts is None:
        return
    folder = start_folder(settings)
    yield Stage("prompts", 0, folder / PROMPTS)
    words = _answer_words(settings, folder / ANSWERS, f"{policy_name(1)}={settings.start}")
    yield Stage("answers", 0, folder / ANSWERS, words, spread=True)


def round_stages(settings: Settings, number: int) -> Iterator[Stage]:
    """Yield the stages of a round."""
    folder, has_comparison = settings.folder(number), settings.iterate.eval_prompts is not None
    yield Stage("prompts", number, folder / PROMPTS)
    yield Stage("sample", number, folder / RECORDS, _sample_words(settings, number), spread=True)
    rate = _rate_words(settings, number, RECORDS, RATED)
    yield Stage("rate", number, folder / RATED, rate, spread=_is_local(settings.rate))
    if settings.iterate.old_share:
        yield Stage("own-pairs", number, folder / OWN_PAIRS, _curate_words(settings, number, OWN_PAIRS))
    old = [settings.folder(earlier) / OWN_PAIRS for earlier in range(1, number)] if settings.iterate.old_share else []
    yield Stage("curate", number, folder / PAIRS, _curate_words(settings, number, PAIRS, old))
    yield Stage("dpo", number, folder / RUN, _dpo_words(settings, number), spread=True)
    if has_comparison:
        with_start = ("--with", str(start_folder(settings) / ANSWERS))
        words = _answer_words(settings, folder / ANSWERS, f"{policy_name(number + 1)}={folder / RUN}", with_start)
        yield Stage("answers", number, folder / ANSWERS, words, spread=True)
        compare = _rate_words(settings, number, ANSWERS, COMPARED)
        yield Stage("compare", number, folder / COMPARED, compare, spread=_is_local(settings.rate))
    if settings.iterate.kl_samples or holds_out(settings):
        yield Stage("evaluate", number, folder / EVALUATION, _evaluate_words(settings, number), spread=True)
    yield Stage("round", number, folder / ROUND)


def dpo_config(settings: Settings) -> str:
    """Return the content of OUTPUT/dpo.yaml."""
    head = "# Written by notus iterate. Each round's command sets what differs from round 1.\n"
    return head + to_yaml(settings.dpo(1))


def _is_local(rate: RateConfig) -> bool:
    """Whether the judge is a model that is computed here."""
    return rate.local_judge is not None or rate.reward_model is not None


def holds_out(settings: Settings) -> bool:
    """Whether every round's run has rows to be evaluated on."""
    return settings.given("data.eval") is not None or bool(settings.given("data.eval_size"))


def _sample_words(settings: Settings, number: int) -> tuple[str, ...]:
    sample, folder = settings.sample, settings.folder(number)
    of_endpoints = ("api_key_env", "timeout", "parallel", "max_requests")
    greedy = sample.temperature == 0 or (sample.temperature is None and sample.n == 1)
    return (
        "sample", str(folder / PROMPTS), str(folder / RECORDS),
        "--models", f"{policy_name(number)}={settings.policy(number)}", *sample.models,
        *([] if greedy else [f"--seed={settings.iterate.seed + number}"]),
        *_options(sample, ("n", "temperature", "top_p", "top_k", *of_endpoints, "drop_duplicates")),
        *_generation_options(settings),
    )  # fmt: skip


def _answer_words(settings: Settings, out: Path, model: str, with_start: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the command that lets a model answer the evaluation prompts, greedily."""
    prompts = str(start_folder(settings) / PROMPTS)
    return ("sample", prompts, str(out), "--models", model, "--n=1", *with_start, *_generation_options(settings))


def _generation_options(settings: Settings) -> list[str]:
    """Return how local models are computed and prompted: as DPO will do it, whatever model they start from."""
    config, sample = settings.dpo(1), settings.sample
    words = _options(sample, ("max_new_tokens", "batch_size", "engine"))
    words.append(f"--precision={sample.precision or config.training.precision}")
    if config.data.chat_template is not None:
        words.append(f"--chat-template={config.data.chat_template}")
    if config.data.add_empty_system:
        words.append("--add-empty-system")
    if config.data.template_date is not None:
        words.append(f"--template-date={config.data.template_date}")
    if config.data.split_special_tokens:
        words.append("--split-special-tokens")
    if config.model.trust_remote_code:
        words.append("--trust-remote-code")
    return words


def _rate_words(settings: Settings, number: int, records: str, rated: str) -> tuple[str, ...]:
    """Return the command that rates a file of the round. Only training records are rated twice."""
    rate, folder = settings.rate, settings.folder(number)
    names = [name for name in section_keys(rate) if name not in ("allow_failed", "again_share")]
    again = _options(rate, ("again_share",))
    if records == ANSWERS and rate.reward_model is None:
        again = ["--again-share=0"]
    seed = f"--seed={settings.iterate.seed + number}"
    judge = [name for name in JUDGES if name in names]
    others = [name for name in names if name not in judge]
    return ("rate", str(folder / records), str(folder / rated), *_options(rate, (*judge, *others)), *again, seed)


def _curate_words(settings: Settings, number: int, out: str, old: Iterable[Path] = ()) -> tuple[str, ...]:
    """Return the command that makes pairs; all rounds have the same schema, so that old pairs fit."""
    curate, folder = settings.curate, settings.folder(number)
    by = curate.by or ("reward" if settings.rate.reward_model else "ratings")
    words = ["curate", str(folder / RATED), str(folder / out), f"--by={by}"]
    words += _options(curate, ("rejected", "decontaminate", "ngram", "keep_identical", "listwise"))
    words += [f"--drop-source={source}" for source in curate.drop_source]
    paths = [str(path) for path in old]
    if not curate.listwise:
        words.append("--schema=cleaned")
    if paths or not curate.listwise:  # lists alone draw nothing
        words.append(f"--seed={settings.iterate.seed + number}")
    if paths:
        words += ["--old", *paths, f"--old-share={settings.iterate.old_share}"]
    return tuple(words)


def _dpo_words(settings: Settings, number: int) -> tuple[str, ...]:
    overrides = [f"--{key}={_yaml_word(value)}" for key, value in settings.keys(number).items()]
    return ("dpo", str(settings.output / DPO_CONFIG), *overrides)


def _evaluate_words(settings: Settings, number: int) -> tuple[str, ...]:
    """Return the command that measures a round's model beside the start.

    Without rows that the run held out, it ranks the training pairs: the command needs some, and only the KL counts.
    """
    iterate, folder = settings.iterate, settings.folder(number)
    words = ["evaluate", str(folder / RUN), "--base", settings.start, "--output", str(folder / EVALUATION)]
    if not holds_out(settings):
        words += ["--pairs", str(folder / PAIRS)]
    if iterate.kl_samples:
        prompts = start_folder(settings) / PROMPTS if iterate.eval_prompts is not None else folder / PROMPTS
        words += [f"--kl-samples={iterate.kl_samples}", "--kl-prompts", str(prompts)]
        words.append(f"--kl-max-new-tokens={settings.sample.max_new_tokens}")
    if settings.given("model.trust_remote_code"):
        words.append("--trust-remote-code")
    return tuple(words)


def _options(section: Any, names: Iterable[str]) -> list[str]:
    """Return the options of a command that keys of a section stand for; those at null or false are left out."""
    words = []
    for name in names:
        option, value = f"--{name.replace('_', '-')}", getattr(section, name)
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [option, *value]
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    return words


def _yaml_word(value: Any) -> str:
    """Return a value as YAML on one line: a path as it is where YAML reads it as that string, else in quotes."""
    is_plain = isinstance(value, str) and "/" in value and re.fullmatch(r"[\w/.][\w/.+-]*", value)
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)
