"""`python -m notus estimate`: will a run fit, how long will it take, what will it cost; without weights or a GPU."""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.config import Config, Task, load_config, loss_name
from notus.evaluation.arguments import count, positive
from notus.runtime.command_line import called_as
from notus.runtime.process import tell

if TYPE_CHECKING:
    from notus.estimate.plan import Setting
    from notus.estimate.sizes import Lengths

# Pairs after curation, of data sets that the project's configs name.
KNOWN_PAIRS = {"argilla/ultrafeedback-binarized-preferences": 63619}
# Local data up to this size is tokenised for its true lengths.
SMALL_DATA = 16 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "config", type=os.path.expanduser, metavar="CONFIG.yaml", help="as for the commands dpo, sft and iterate"
    )
    _add_options(parser)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("dpo", "sft"), help="default: sft if the file's name has it, else dpo")
    parser.add_argument("--gpus", type=count, default=8, help="how many (default: 8)")
    parser.add_argument("--gpu", default="a100-40gb", help="which: a100-80gb, h100, ...; an unknown one lists all")
    parser.add_argument(
        "--lengths",
        metavar="TRUNK,BRANCH,...",
        help="mean tokens of prompt, chosen and rejected (SFT and labels: prompt, answer; lists: prompt, each "
        "completion), in place of those of the data, which is read if it is local and small",
    )
    parser.add_argument(
        "--examples", type=count, help="training examples, of an iteration all prompts, if the data is not at hand"
    )
    parser.add_argument(
        "--utilisation", type=_share, default=0.45, help="share of the peak reached, an assumption (default: 0.45)"
    )
    parser.add_argument("--price", type=positive, metavar="USD", help="per GPU-hour")
    for name, verb in (("--price-in", "reads"), ("--price-out", "writes")):
        parser.add_argument(
            name, type=positive, metavar="USD", help=f"of an iteration: per million tokens that the judge {verb}"
        )
    parser.add_argument(
        "--model-config", type=os.path.expanduser, metavar="FILE", help="a config.json, in place of the model's own"
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and at most 1")
    return value


def read_options(args: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments with the options that stand after CONFIG, and the overrides among which they stood."""
    options = argparse.ArgumentParser(prog=called_as("estimate"), allow_abbrev=False)
    _add_options(options)
    return options.parse_known_args(args.overrides, args)


def estimate_run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print the estimate of one run. Raises ValueError: a user's mistake, in one line."""
    for option in ("price_in", "price_out"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} has no effect on a run without a judge: give the config of an iteration")
    task: Task = args.task or ("sft" if "sft" in Path(args.config).name else "dpo")
    config = load_config([args.config, *overrides], task)
    return 0 if tell("\n".join(estimate(config, args))) else 1


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a loss takes beside the forward and backward pass of its rows.

    Attributes:
        reference: whether it compares with a reference, so that one pass over the data comes first.
        mismatched: whether each step and each of those passes also scores mismatched completions (KTO).
    """

    reference: bool
    mismatched: bool


def passes_of(config: Config) -> Passes:
    """Return what the run's losses need, by the registry of losses."""
    from notus.losses import loss_components

    losses = loss_components(config.dpo.loss_type) if config.task == "dpo" else {}
    return Passes(any(loss.reference for loss in losses), any(loss.shift == "kl" for loss in losses))


UNITS = {"dpo": "pairs", "sft": "examples", "lists": "lists", "labels": "completions"}


def estimate(config: Config, args: argparse.Namespace) -> list[str]:
    """The report's lines."""
    from notus.data.mixture import rows_to_hold
    from notus.estimate import report
    from notus.estimate.plan import make_plan

    lengths, rows = _lengths(config, args)
    passes = passes_of(config)
    setting, source = make_setting(config, args, lengths, passes)
    plan = make_plan(setting)
    lines = report.head(setting, source, args.gpu)
    scoring = plan
    if config.reference.model is not None:
        other, of = _reference(config, setting)
        scoring = make_plan(other)
        lines += report.reference(scoring, plan, of)
    lines += ["", *report.memory(plan), ""]
    if setting.cpu_offload:
        return [*lines, report.OFFLOADED]
    lines += [*report.step(plan, UNITS[config.rows]), *report.advice(plan), ""]
    if config.task == "dpo" and not passes.reference:
        lines.append(f"No reference pass: dpo.loss_type {loss_name(config.dpo)} has no reference.")
    steps, held_out = config.training.max_steps, None
    if config.data.eval is None and (rows is not None or isinstance(config.data.eval_size, int)):
        held_out = rows_to_hold(config.data.eval_size, rows or 0)
    if rows is not None:
        whole = math.ceil((rows - (held_out or 0)) / config.training.batch_size) * config.training.epochs
        steps = whole if steps is None else min(steps, whole)
    if steps is None:
        return [*lines, "Hours: how many examples the data holds is not known here; give --examples."]
    every = config.training.eval_every
    if config.data.eval is not None:
        held_out = _rows(config, config.data.eval)
    besides = 0 if config.data.eval is None else held_out or 0
    return lines + report.run_time(
        plan,
        steps=steps,
        reference=scoring.scoring * ((rows or 0) + besides) if passes.reference else 0.0,
        evaluations=math.ceil(steps / every) if every else 1,
        held_out=held_out,
        price=args.price,
    )


def make_setting(config: Config, args: argparse.Namespace, lengths: "Lengths", passes: Passes) -> "tuple[Setting, str]":
    from notus.estimate.plan import Setting
    from notus.estimate.sizes import find_config, mismatched_lengths, sizes
    from notus.model.flops import PER_NODE, find_gpu
    from notus.training.model_folders import local_names

    gpu, training, lora = find_gpu(args.gpu), config.training, config.lora
    names = local_names(config.model.name_or_path, config.model.adapter)
    model, source = find_config(args.model_config or names.base)
    size, dimensions = sizes(
        model,
        lora_rank=lora.rank,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        quantization=config.model.quantization,
        modules_to_save=lora.modules_to_save,
    )
    if training.sharding == "hybrid" and args.gpus <= PER_NODE:
        raise ValueError(
            f"training.sharding=hybrid has no effect on {args.gpus} GPUs, one node: set training.sharding=full"
        )
    setting = Setting(
        size=size,
        dimensions=dimensions,
        gpu=gpu,
        gpus=args.gpus,
        lengths=lengths,
        batch_size=training.batch_size,
        tokens_per_row=training.tokens_per_row,
        checkpointing=training.activation_checkpointing,
        precision=training.precision,
        optimizer=training.optimizer,
        optimizer_dtype=training.optimizer_dtype,
        hybrid=training.sharding == "hybrid",
        cpu_offload=training.cpu_offload,
        utilisation=args.utilisation,
        mismatched=mismatched_lengths(lengths, config.data.max_length) if passes.mismatched else None,
    )
    return setting, source


def _reference(config: Config, setting: "Setting") -> "tuple[Setting, str]":
    """The same for the model of `reference.model`, whose weights are frozen; and where its size is from."""
    from notus.estimate.sizes import find_config, sizes
    from notus.training.model_folders import local_names

    model, source = find_config(local_names(str(config.reference.model), key="reference.model").base)
    size, dimensions = sizes(
        model,
        frozen=True,
        quantization=config.model.quantization,
        modules_to_save=config.lora.modules_to_save,
    )
    # its passes have no gradients, whatever the checkpointing
    return dataclasses.replace(setting, size=size, dimensions=dimensions, checkpointing="none"), source


def _lengths(config: Config, args: argparse.Namespace) -> "tuple[Lengths, int | None]":
    """How long examples are, and how many there are, as far as it is known without the network."""
    from notus.estimate.sizes import draw, parse_means, typical

    for source in config.data.train:
        if Path(source["path"]).suffix in (".jsonl", ".json", ".parquet") and not Path(source["path"]).is_file():
            raise ValueError(f"data.train: {source['path']}: no such file")
    if args.lengths is None:
        found = _tokenised(config)
        if found is not None:
            return found, args.examples or len(found.trunks)
    means = parse_means(args.lengths, config.rows) if args.lengths else typical(config.rows)
    data = config.data
    lengths = draw(means, max_length=data.max_length, max_prompt_length=data.max_prompt_length or data.max_length // 2)
    return lengths, args.examples or _rows(config, data.train)


def _rows(config: Config, sources: list[dict[str, Any]]) -> int | None:
    """How many examples, of known data sets and of small local files with one on each line; None: not known.

    Losses of labels make two examples of a pair.
    """
    total = 0.0
    for source in sources:
        path = Path(source["path"])
        count, holds_pairs = KNOWN_PAIRS.get(source["path"]), True
        if path.suffix == ".jsonl" and path.is_file() and path.stat().st_size <= SMALL_DATA:
            lines = [line for line in path.read_bytes().splitlines() if line.strip()]
            count, holds_pairs = len(lines), bool(lines) and _is_pair(lines[0], config)
        if count is None:
            return None
        total += count * source["weight"] * (2 if holds_pairs and config.rows == "labels" else 1)
    return round(total)


def _is_pair(line: bytes, config: Config) -> bool:
    from notus.data.formats import guess_task

    try:
        return guess_task(json.loads(line), config.data.columns) == "dpo"
    except ValueError:  # reported, with its place, where the data are read
        return False


def _tokenised(config: Config) -> "Lengths | None":
    """The true lengths, if data and tokenizer are on this machine and small."""
    from notus.training.model_folders import local_names

    names = local_names(config.model.name_or_path, config.model.adapter)
    folders = [Path(name) for name in (names.adapter, names.base) if name is not None]
    folder = next((each for each in folders if (each / "tokenizer_config.json").is_file()), folders[-1])
    paths = [Path(source["path"]) for source in config.data.train]
    if not all(path.is_file() for path in paths) or not (folder / "tokenizer_config.json").is_file():
        return None
    if sum(path.stat().st_size for path in paths) > SMALL_DATA:
        return None
    from notus.data.dataset import TokenizedDataset
    from notus.data.mixture import mixed
    from notus.data.tokenize import read_shares
    from notus.estimate.sizes import tokenised
    from notus.model.export import load_tokenizer
    from notus.model.new_tokens import add_tokens
    from notus.training.run_data import rule_of

    data, tokenizer = config.data, load_tokenizer(folder, config.model.trust_remote_code)
    add_tokens(tokenizer, data.new_tokens)
    shares, _ = read_shares(
        data.train,
        rule_of(data, tokenizer, config.rows),
        on_bad_row=data.on_bad_row,
        num_workers=data.num_workers,
        cache_dir=data.cache_dir,
    )
    return tokenised(TokenizedDataset(mixed(shares, config.training.seed)))
