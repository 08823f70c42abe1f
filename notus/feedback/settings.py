"""The config of `notus iterate`: the sections of a DPO config, and those of sampling, rating and curating.

Keys of `sample`, `rate` and `curate` are the options of these commands, with underscores. They are filled and checked
as `notus.config` does it. The sections of DPO are checked by building the config of every round's run.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from notus.config import (
    EXACT,
    SECTIONS,
    Config,
    Count,
    FilePath,
    Index,
    Invalid,
    NoneOrMore,
    NonNegative,
    Positive,
    Share,
    String,
    Strings,
    TrainingConfig,
    check_keys,
    config_from_dict,
    dump_yaml,
    fill_sections,
    loss_name,
    read_arguments,
    section_keys,
)
from notus.feedback.rounds import PAIRS, RUN


@dataclass(frozen=True, kw_only=True, config=EXACT)
class IterateConfig:
    """The rounds. `training.output_dir` is the folder of the iteration."""

    prompts: FilePath
    """The prompts to train on, as `notus sample` reads them. Each round takes other ones."""
    rounds: Count = 3
    """How many rounds. It may be raised later."""
    prompts_per_round: Count | None = None
    """Prompts of a round, drawn with `seed`. null: the prompts divided by `rounds`."""
    eval_prompts: FilePath | None = None
    """Prompts that the start and every round's model answer greedily. The judge compares the answers. null: no
    comparison."""
    reference: Literal["last", "first"] = "last"
    """The reference of a round's DPO: the model of the last round, which the round starts from, or the first model."""
    old_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of a round's pairs that is drawn from the pairs of all earlier rounds."""
    stop_win_rate: Annotated[float, Gt(0), Le(1)] | None = None
    """Stop after the round whose model wins at least this share against the start on `eval_prompts`. null: no such
    rule."""
    stop_kl: Positive | None = None
    """Stop after the round whose KL to the start, in nats per completion, is above this. The result is then the last
    model below it. null: no such rule."""
    kl_samples: Index = 64
    """Completions to sample for the KL to the start. 0: do not measure it."""
    seed: Index = 42
    """Seed of the draw of prompts. Round k samples, rates and curates with `seed` + k."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class SampleConfig:
    """How completions are sampled: the options of `notus sample`, which docs/sample-and-rate.md describes."""

    models: NoneOrMore = field(default_factory=list)
    """Models that answer beside the policy: a folder, a hub id, or `NAME@http://host/v1` for one at an endpoint."""
    n: Count = 4
    """Completions per prompt and model."""
    temperature: NonNegative | None = None
    """Sampling temperature. null: 1, or 0 (greedy) if `n` is 1."""
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    """Sample from the likeliest tokens with this share of the probability. null: from all."""
    top_k: Count | None = None
    """Sample from the k likeliest tokens. null: from all."""
    max_new_tokens: Count = 512
    """Longest completion, in tokens. It also holds for the answers to `iterate.eval_prompts` and for the KL."""
    batch_size: Count | None = None
    """Sequences at a time. null: the command's default."""
    engine: Literal["batched", "continuous"] | None = None
    """How local models generate. null: the command's default."""
    precision: Literal["bf16", "fp32"] | None = None
    """Dtype of local models. null: `training.precision`."""
    api_key_env: String | None = None
    """The environment variable that holds the endpoints' key."""
    timeout: Positive | None = None
    """Seconds of one request to an endpoint. null: the command's default."""
    parallel: Count | None = None
    """Requests to an endpoint at a time. null: the command's default."""
    max_requests: Count | None = None
    """Most requests to endpoints in a round. null: no limit."""
    drop_duplicates: bool = False
    """Drop exact duplicates among a prompt's completions."""
    allow_failed: Share = 0.05
    """Share of completions that endpoints may fail to give. Above it, the iteration stops before it trains."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class RateConfig:
    """Who rates the completions, and how: the options of `notus rate`, which docs/sample-and-rate.md describes."""

    judge: String | None = None
    """A judge behind an OpenAI-compatible endpoint: its URL. Set `judge_model`, too."""
    judge_model: String | None = None
    """The judge's name at its endpoint."""
    local_judge: FilePath | None = None
    """A judge that is a chat model on this machine or the hub."""
    reward_model: FilePath | None = None
    """A reward model (sequence classification) on this machine or the hub."""
    judge_function: String | None = None
    """A judge that is a Python function: `FILE.py:NAME` or `package.module:NAME`."""
    aspects: Strings | None = None
    """What is rated. null: the four aspects of UltraFeedback."""
    instructions: FilePath | None = None
    """A file with the judge's instructions. null: the ones of this project."""
    again_share: Share | None = None
    """Share of a round's prompts that are rated twice, in two orders. null: the command's default."""
    api_key_env: String | None = None
    """The environment variable that holds the endpoint's key."""
    timeout: Positive | None = None
    """Seconds of one request. null: the command's default."""
    parallel: Count | None = None
    """Requests at a time. null: the command's default."""
    max_requests: Count | None = None
    """Most requests of one rating command; a round has two with `iterate.eval_prompts`. null: no limit."""
    max_cost: Positive | None = None
    """Most US dollars of one rating command, by the prices below. null: no limit."""
    price_in: NonNegative | None = None
    """US dollars for a million tokens that the judge reads."""
    price_out: NonNegative | None = None
    """US dollars for a million tokens that the judge writes."""
    max_new_tokens: Count | None = None
    """Longest answer of a judge that is a language model, in tokens. null: the command's default."""
    batch_size: Count | None = None
    """Sequences at a time of a local judge or a reward model. null: the command's default."""
    precision: Literal["bf16", "fp32"] | None = None
    """Dtype of a local judge or a reward model. null: the command's default."""
    chat_template: FilePath | None = None
    """Chat template of a local judge or a reward model: "zephyr", or a `.jinja` file. null: its tokenizer's own."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a local judge or a reward model."""
    allow_failed: Share = 0.05
    """Share of prompts that may stay without ratings. Above it, the iteration stops before it trains."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class CurateConfig:
    """How ratings become pairs: the options of `notus curate`, which docs/data.md describes."""

    by: Literal["ratings", "reward"] | None = None
    """The score that ranks. null: "reward" with `rate.reward_model`, otherwise "ratings"."""
    rejected: Literal["lower", "any"] | None = None
    """What the rejected completion is drawn from. null: the command's default."""
    listwise: bool = False
    """Make lists of all rated completions, for losses that learn from lists."""
    decontaminate: FilePath | None = None
    """Drop the prompts that hold a question of this file."""
    ngram: Count | None = None
    """Words in the n-grams that find such a question. null: the command's default."""
    drop_source: NoneOrMore = field(default_factory=list)
    """Drop the records of these sources."""
    keep_identical: bool = False
    """Keep pairs of two equal texts."""


OWN_SECTIONS: dict[str, Any] = {
    "iterate": IterateConfig,
    "sample": SampleConfig,
    "rate": RateConfig,
    "curate": CurateConfig,
}
ALL_SECTIONS: dict[str, Any] = {**OWN_SECTIONS, **SECTIONS}
JUDGES = ("judge", "local_judge", "reward_model", "judge_function")
# Keys of a DPO config that an iteration sets itself, or that have no meaning in it, and why.
_NOT_HERE = {
    "data.train": "the rounds make their own pairs: remove it",
    "data.columns": "the rounds' own pairs need no renaming: rename those of data.eval in its file, and remove it",
    "data.exclude": "the rows of the rounds' own pairs are not known beforehand: remove it",
    "data.new_tokens": "only the first round could add them: train a run with them first, and start from it",
    "model.adapter": "name the adapter itself, or the run that trained it, as model.name_or_path",
    "reference.model": "iterate.reference chooses it: remove it",
    "training.resume": "the same command resumes an iteration: remove it",
    "training.extend": "raise iterate.rounds to add rounds: remove it",
}
_OF_ENDPOINTS = ("api_key_env", "timeout", "parallel", "max_requests")
_OF_PRICES = ("max_cost", "price_in", "price_out")
_OF_LOCAL = ("batch_size", "precision", "chat_template", "trust_remote_code")
_OF_ASKING = ("aspects", "instructions", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config of an iteration.

    Attributes:
        iterate, sample, rate, curate: its own sections.
        tree: the sections of DPO, as given.
        source, origins: where keys come from, for errors; see `notus.config.config_from_dict`.
    """

    iterate: IterateConfig
    sample: SampleConfig
    rate: RateConfig
    curate: CurateConfig
    tree: Mapping[str, Mapping[str, Any]]
    source: str = "config"
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The iteration's folder."""
        return Path(self.given("training.output_dir")).expanduser()

    @property
    def start(self) -> str:
        """The model that the first round starts from."""
        return os.path.expanduser(self.given("model.name_or_path"))

    def given(self, key: str) -> Any:
        """Return what the file or the command line sets a key of DPO's sections to; None for nothing."""
        section, name = key.split(".")
        return (self.tree.get(section) or {}).get(name)

    def folder(self, number: int) -> Path:
        """Return the folder of a round; they are counted from 1."""
        return self.output / f"round-{number}"

    def policy(self, number: int) -> str:
        """Return the model that a round starts from: the start, or the last round's run."""
        return self.start if number == 1 else str(self.folder(number - 1) / RUN)

    def keys(self, number: int) -> dict[str, Any]:
        """Return what a round sets in its DPO config, by section.key; the rest is as given."""
        keys: dict[str, Any] = {
            "model.name_or_path": self.policy(number),
            "data.train": str(self.folder(number) / PAIRS),
            "training.output_dir": str(self.folder(number) / RUN),
            # the same for all rounds would drop and shuffle in the same way each time
            "training.seed": self._first_seed + number - 1,
        }
        if self.iterate.reference == "first" and number > 1:
            keys["reference.model"] = self.start
        if self.given("lora.continue"):
            keys["lora.continue"] = number > 1 or starts_from_adapter(self.start)
        if self.given("tracking.wandb"):
            keys["tracking.run_name"] = f"{self.given('tracking.run_name') or self.output.name}-round-{number}"
        return keys

    @property
    def _first_seed(self) -> int:
        seed = self.given("training.seed")
        return seed if type(seed) is int else TrainingConfig(output_dir="-").seed  # DPO's check reports another value

    def dpo(self, number: int) -> Config:
        """Return the config of a round's DPO run. Raises ValueError as `notus.config.load_config` does."""
        if number not in self._configs:
            self._configs[number] = self._config(number)
        return self._configs[number]

    @functools.cached_property
    def _configs(self) -> dict[int, Config]:
        return {}

    def _config(self, number: int) -> Config:
        tree = {name: dict(self.tree.get(name) or {}) for name in SECTIONS}
        for key, value in self.keys(number).items():
            section, name = key.split(".")
            tree[section][name] = value
        return config_from_dict(tree, "dpo", source=self.source, origins=dict(self.origins))

    def with_keys(self, **values: Any) -> "Settings":
        """Return the settings with other values of `section__key`."""
        own: dict[str, Any] = {name: getattr(self, name) for name in OWN_SECTIONS}
        tree = {name: dict(keys or {}) for name, keys in self.tree.items()}
        for place, value in values.items():
            section, key = place.split("__")
            if section in own:
                own[section] = dataclasses.replace(own[section], **{key: value})
            else:
                tree.setdefault(section, {})[key] = value
        return dataclasses.replace(self, **own, tree=tree)

    def flat(self) -> dict[str, Any]:
        """Return every key's value by section.key, resolved where DPO's config resolves it."""
        config = self.dpo(1)
        sections = [(name, getattr(self, name)) for name in OWN_SECTIONS]
        sections += [(name, getattr(config, name)) for name in SECTIONS]
        found = {f"{name}.{key}": value for name, section in sections for key, value in section_keys(section).items()}
        found = {key: value for key, value in found.items() if key not in _NOT_HERE}
        for key in self.keys(1).keys() & found.keys():  # as given, not as a round has them
            found[key] = self._first_seed if key == "training.seed" else self.given(key)
        return found

    def to_yaml(self) -> str:
        """Return the config, with every key, as YAML that loads to an equal one."""
        tree: dict[str, dict[str, Any]] = {}
        for key, value in self.flat().items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        return dump_yaml(tree)


def starts_from_adapter(start: str) -> bool:
    """Whether a folder is an adapter, or a run that trained one; a hub id is taken for a model."""
    from notus.training.model_folders import local_names  # imports torch

    return local_names(start).adapter is not None


def load_settings(words: Sequence[str]) -> Settings:
    """Return the settings of `CONFIG.yaml [--section.key=value ...]`.

    Raises ValueError, naming the file or "command line", the key and the remedy, for what is no valid config.
    """
    tree, source, origins = read_arguments(words, "dpo", ALL_SECTIONS)
    try:
        settings = _fill_settings(tree, source, origins)
        for conflict in _conflicts(settings):
            raise conflict
    except Invalid as error:
        raise ValueError(f"{origins.get(error.key, source)}: {error}") from None
    for number in range(1, settings.iterate.rounds + 1):
        settings.dpo(number)
    return settings


def _fill_settings(tree: Mapping[str, Any], source: str, origins: Mapping[str, str]) -> Settings:
    check_keys(tree, ALL_SECTIONS)
    run = {name: tree.get(name) or {} for name in SECTIONS}
    for key, reason in _NOT_HERE.items():
        section, name = key.split(".")
        if run[section].get(name) not in (None, False, {}, []):
            raise Invalid(key, f"has no place in an iteration: {reason}")
    own = fill_sections({name: tree.get(name) or {} for name in OWN_SECTIONS}, OWN_SECTIONS)
    needed = ("model", "training")  # what the rounds' configs are made from
    fill_sections({name: run[name] for name in needed}, {name: SECTIONS[name] for name in needed})
    return Settings(**own, tree=run, source=source, origins=origins)


# ---- checks across keys ----


def _conflicts(settings: Settings) -> Iterator[Invalid]:
    """Yield what contradicts other keys, or would be ignored because of them."""
    yield from _iterate_conflicts(settings)
    yield from _sample_conflicts(settings.sample)
    yield from _rate_conflicts(settings.rate)
    yield from _curate_conflicts(settings)


def _iterate_conflicts(settings: Settings) -> Iterator[Invalid]:
    from notus.losses import loss_components  # imports torch

    iterate, config = settings.iterate, settings.dpo(1)
    if iterate.stop_win_rate is not None and iterate.eval_prompts is None:
        yield Invalid("iterate.stop_win_rate", "needs answers to compare: set iterate.eval_prompts")
    if iterate.stop_kl is not None and not iterate.kl_samples:
        yield Invalid("iterate.stop_kl", "needs the KL, which iterate.kl_samples=0 turns off: set that above 0")
    if iterate.reference == "first" and not any(loss.reference for loss in loss_components(config.dpo.loss_type)):
        reason = f"'first' has no effect with dpo.loss_type {loss_name(config.dpo)}, which has no reference"
        yield Invalid("iterate.reference", f"{reason}: set iterate.reference=last")
    if iterate.old_share and config.data.eval_size:
        reason = "would hold out old pairs that an earlier round trained on: set it to 0, or name pairs in data.eval"
        yield Invalid("data.eval_size", f"with iterate.old_share {reason}")
    if config.model.quantization and not config.lora.continue_ and iterate.rounds > 1:
        reason = "needs lora.continue=true in several rounds: without it, a round would merge the last round's adapter"
        yield Invalid("model.quantization", f"{reason} and quantize the sum, which is another model than was sampled")


def _sample_conflicts(sample: SampleConfig) -> Iterator[Invalid]:
    if sample.n == 1 and not sample.models:
        yield Invalid("sample.n", "is 1, and one completion makes no pair: raise it, or add sample.models")
    greedy = sample.temperature == 0 or (sample.temperature is None and sample.n == 1)
    if greedy and sample.n > 1:
        yield Invalid(
            "sample.temperature", f"0 would repeat one completion {sample.n} times: raise it, or set sample.n=1"
        )
    if greedy:
        yield from _unused("sample", sample, ("top_p", "top_k"), "on greedy completions: raise sample.temperature, or")
    if not any("@http" in model for model in sample.models):
        yield from _unused("sample", sample, _OF_ENDPOINTS, "without an endpoint in sample.models: add one, or")


def _rate_conflicts(rate: RateConfig) -> Iterator[Invalid]:
    given = [name for name in JUDGES if getattr(rate, name) is not None]
    if len(given) != 1:
        found = f"set only one of {', '.join(f'rate.{name}' for name in given)}" if given else "no judge is given"
        choices = ", ".join(f"rate.{name}" for name in JUDGES)
        yield Invalid(f"rate.{given[-1] if given else JUDGES[0]}", f"is one of the judges {choices}: {found}")
        return
    if (rate.judge is None) != (rate.judge_model is None):
        yield Invalid("rate.judge_model", "names the judge at the endpoint rate.judge: set both or neither")
    (kind,) = given
    without = {
        "judge": _OF_LOCAL,
        "local_judge": (*_OF_ENDPOINTS, *_OF_PRICES),
        "reward_model": (*_OF_ENDPOINTS, *_OF_PRICES, *_OF_ASKING, "again_share"),
        "judge_function": (*_OF_ENDPOINTS, *_OF_PRICES, *_OF_ASKING, *_OF_LOCAL),
    }
    yield from _unused("rate", rate, without[kind], f"with rate.{kind}:")
    if rate.max_cost is not None and (rate.price_in is None or rate.price_out is None):
        yield Invalid("rate.max_cost", "needs the prices: set rate.price_in and rate.price_out")


def _curate_conflicts(settings: Settings) -> Iterator[Invalid]:
    curate, config = settings.curate, settings.dpo(1)
    is_reward = settings.rate.reward_model is not None
    if curate.by == "reward" and not is_reward:
        yield Invalid("curate.by", "'reward' needs a reward model: set rate.reward_model, or curate.by=ratings")
    if curate.by == "ratings" and is_reward:
        yield Invalid(
            "curate.by", "'ratings' needs a judge that rates, and rate.reward_model scores: set curate.by=reward"
        )
    if curate.decontaminate is None:
        yield from _unused("curate", curate, ("ngram",), "without curate.decontaminate: set that, or")
    if curate.listwise:
        yield from _unused("curate", curate, ("rejected", "keep_identical"), "on lists: set curate.listwise=false, or")
    if curate.listwise != (config.rows == "lists"):
        rows = f"dpo.loss_type {loss_name(config.dpo)} learns from {'lists' if config.rows == 'lists' else 'pairs'}"
        yield Invalid(
            "curate.listwise", f"does not fit: {rows}: set curate.listwise={str(not curate.listwise).lower()}"
        )


def _unused(name: str, section: Any, keys: Sequence[str], why: str) -> Iterator[Invalid]:
    """Yield the first of some optional keys that is set where it has no effect."""
    off = {key: "false" if getattr(section, key) is True else "null" for key in keys}
    for key in keys:
        if getattr(section, key) not in (None, False):
            yield Invalid(f"{name}.{key}", f"has no effect {why} set {name}.{key}={off[key]}")
