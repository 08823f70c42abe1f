"""The config: defaults, overrides, what is rejected and how, the way to disk and back, the configs we ship."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from notus import config as config_module
from notus.config import (
    SECTIONS,
    Config,
    config_from_dict,
    dump_yaml,
    load_config,
    options_of,
    read_yaml,
    save_config,
    to_yaml,
)
from notus.feedback.settings import load_settings
from notus.losses import LOSSES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

MINIMAL = """
model:
  name_or_path: a/model
data:
  train: pairs.jsonl
training:
  output_dir: runs/here
"""


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return str(path)


def load(minimal: str, *overrides: str, task: Any = "dpo") -> Config:
    return load_config([minimal, *overrides], task)


def test_defaults(minimal: str) -> None:
    config = load_config(minimal, "dpo")
    assert config.data.train == [{"path": "pairs.jsonl", "split": "train", "weight": 1.0}]
    assert config.data.eval is None
    assert (config.data.max_length, config.data.max_prompt_length) == (1024, 512)
    assert (config.training.batch_size, config.training.tokens_per_row) == (64, 4096)
    assert (config.training.learning_rate, config.training.lr_schedule) == (5e-7, "linear")
    assert (config.training.optimizer, config.training.precision) == ("rmsprop", "bf16")
    assert (config.training.epochs, config.training.max_steps, config.training.resume) == (3, None, "auto")
    assert (config.dpo.beta, config.dpo.loss_type) == (0.1, "sigmoid")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (0, 16.0, 0.0)
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (config.tracking.wandb, config.tracking.tensorboard) == (False, False)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(minimal: str) -> None:
    config = load(
        minimal,
        "--training.learning_rate=1e-6",
        "--training.max_steps=5",
        "--training.max_steps=7",
        "--training.output_dir=elsewhere",
        "--lora.rank=8",
        "--lora.target_modules=[q_proj, up_proj]",
        "--data.eval=[{path: held-out.jsonl, weight: 2}, org/name]",
        "--training.save_every=null",
        "--dpo.beta=1",
    )
    assert config.training.learning_rate == 1e-6
    assert config.training.max_steps == 7
    assert config.training.output_dir == "elsewhere"
    assert config.training.save_every is None
    assert config.lora.target_modules == ["q_proj", "up_proj"]
    assert config.data.eval == [
        {"path": "held-out.jsonl", "split": "train", "weight": 2.0},
        {"path": "org/name", "split": "train", "weight": 1.0},
    ]
    assert type(config.dpo.beta) is float


def test_overrides_may_stand_before_the_file_and_name_sections_it_lacks(minimal: str) -> None:
    assert load_config(["--dpo.beta=0.2", minimal], "dpo").dpo.beta == 0.2


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_what_is_saved_loads_again_unchanged(minimal: str, tmp_path: Path, task: Any) -> None:
    options = ["--lora.rank=4", "--training.max_grad_norm=0", "--tracking.wandb=true", "--tracking.run_name='1e5'"]
    options += ["--data.eval_size=3", "--training.learning_rate=3e-5", "--data.max_length=300"]
    config = load(minimal, *options, task=task)
    again = tmp_path / "config.yaml"
    save_config(config, again)
    assert load_config(again, task) == config
    assert to_yaml(load_config(again, task)) == again.read_text()


@pytest.mark.parametrize(("written", "kind"), [("3", int), ("0.1", float), ("1e-3", float), ("0", int)])
def test_the_size_of_the_held_out_share_stays_as_it_is_written(minimal: str, written: str, kind: type) -> None:
    config = load(minimal, f"--data.eval_size={written}")
    assert type(config.data.eval_size) is kind
    assert yaml.safe_load(to_yaml(config))["data"]["eval_size"] == float(written)


def test_resolution(minimal: str) -> None:
    assert load(minimal, "--training.max_grad_norm=0").training.max_grad_norm is None
    assert load(minimal, "--data.max_length=300").data.max_prompt_length == 150
    assert load(minimal, "--data.max_length=4096").data.max_prompt_length == 512
    assert load(minimal, "--data.max_length=300", "--data.max_prompt_length=299").data.max_prompt_length == 299
    assert load(minimal, task="sft").data.max_prompt_length is None
    assert load(minimal, "--lora.rank=2", "--lora.target_modules=all-linear").lora.target_modules == "all-linear"


def test_the_saved_config_of_sft_has_no_section_that_sft_does_not_use(minimal: str) -> None:
    saved = to_yaml(load(minimal, task="sft"))
    assert "dpo:" not in saved
    assert "reference:" not in saved


# Each line holds the one before. That of line 49 is too deep in line 50, whose value is nested 51 deep.
CHAIN = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 99))])
# Each line holds the one before nine times: 1 + 9 * 1 = 10, 91, 820, 7,381, 66,430 and on line 7 597,871 values.
BOMB = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 12))])

MISTAKES = {
    # override: what the message must contain besides "command line" and the key
    "--training.learning_rat=1": "did you mean 'learning_rate'?",
    "--training.beta=0.1": "did you mean 'dpo.beta'?",
    "--lora.xyz=1": "valid: rank, alpha, dropout, target_modules, rslora",
    "--training.epochs=abc": "an integer >= 1, not 'abc'",
    "--training.epochs=1.5": "an integer >= 1, not 1.5",
    "--training.epochs=true": "an integer >= 1, not True",
    "--training.epochs=0": "an integer >= 1, not 0",
    "--training.epochs=null": "an integer >= 1, not None",
    "--training.max_steps=0": "an integer >= 1 or null, not 0",
    "--training.learning_rate=0": "a number > 0, not 0",
    "--training.learning_rate=.nan": "a number > 0, not nan",
    "--training.learning_rate=.inf": "a number > 0, not inf",
    "--training.learning_rate=false": "a number > 0, not False",
    "--training.learning_rate='1e-6'": "a number > 0, not '1e-6'",
    "--training.warmup_ratio=1.1": "a number >= 0 and <= 1, not 1.1",
    "--training.warmup_ratio=-0.1": "a number >= 0 and <= 1, not -0.1",
    "--training.seed=-1": "an integer >= 0",
    "--training.precision=fp16": "'bf16' or 'fp32', not 'fp16': fp16 needs loss scaling, which is not implemented, and "
    "bf16 has the range of fp32. On a GPU without bf16, set fp32",
    "--training.lr_schedule=wds": "'linear', 'cosine', 'constant' or 'wsd', not 'wds'; did you mean 'wsd'?",
    "--training.min_lr_ratio=1.1": "a number >= 0 and <= 1, not 1.1",
    "--training.warmup_steps=-1": "an integer >= 0 or null, not -1",
    "--training.decay_ratio=0": "a number > 0 and <= 1, not 0",
    "--data.eval_size=1.0": "an integer >= 0 or number > 0 and < 1, not 1.0",
    "--data.eval_size=0.0": "an integer >= 0 or number > 0 and < 1, not 0.0",
    "--data.eval_size=-0.5": "an integer >= 0 or number > 0 and < 1, not -0.5",
    "--data.eval_size=-1": "an integer >= 0 or number > 0 and < 1, not -1",
    "--data.eval_size=true": "an integer >= 0 or number > 0 and < 1, not True",
    "--training.output_dir=3": "a string (in quotes if it reads as something else), not 3",
    "--training.output_dir=null": "a string",
    "--model.name_or_path=''": "a string",
    "--data.shuffle=1": "true or false, not 1",
    "--data.train=null": "a path or list of {path, split, weight}: path must be a string",
    "--data.train=[]": "a path or list of {path, split, weight}",
    "--data.train=[{path: a, wieght: 2}]": "wieght does not exist; did you mean 'weight'?",
    "--data.train=[{split: a}]": "path is required",
    "--data.train=[{path: a, weight: 0}]": "weight must be a number > 0, not 0",
    "--data.eval=4": "path must be a string",
    "--data.chat_template=chatml": "'zephyr', a .jinja file or null, not 'chatml'",
    "--dpo.loss_type=sigmod": "'sigmod' does not exist; did you mean 'sigmoid'?",
    "--dpo.simpo_gamma=1": "dpo.simpo_gamma does not exist; did you mean 'dpo.options.simpo_gamma'?",
    "--dpo.loss_type={sigmoid: 1, hing: 2}": "'hing' does not exist; did you mean 'hinge'?",
    "--dpo.loss_type={sigmoid: 0}": "a string or mapping of strings to numbers > 0, not {'sigmoid': 0}",
    "--dpo.loss_type={}": "loss_type names no loss",
    "--dpo.options.discopop_tua=0.1": "has no effect with dpo.loss_type 'sigmoid'; did you mean 'discopop_tau'?",
    "--dpo.options.discopop_tau=0.1": "has no effect with dpo.loss_type 'sigmoid': use one of discopop",
    "--dpo.options={label_smoothing: 0.1}": "holds label_smoothing, which has a key of its own",
    "--dpo.options=0.1": "a mapping of strings to numbers or strings, not 0.1",
    "--dpo.nll_mean=words": "'tokens' or 'completions', not 'words'",
    "--dpo.ld_alpha=1": "a number >= 0 and < 1 or null, not 1",
    "--dpo.beta=0": "a number > 0, not 0",
    "--dpo.label_smoothing=0.6": "a number >= 0 and <= 0.5, not 0.6",
    "--lora.dropout=1": "a number >= 0 and < 1, not 1",
    "--lora.target_modules=q_proj,,v_proj": "a list of strings or 'all-linear', not ['q_proj', '', 'v_proj']",
    "--lora.target_modules=[]": "a list of strings or 'all-linear', not []",
    "--lora.target_modules=[3]": "a list of strings or 'all-linear', not [3]",
    "--training.seed=2026-13-45": "an integer >= 0, not '2026-13-45'",
    "--training.seed=1:30": "an integer >= 0, not '1:30'",
    "--training.seed=010": "an integer >= 0, not '010'",
    f"--training.seed={2**63}": "an integer >= 0, not 9223372036854775808, which takes more than 64 bits",
    f"--training.batch_size={10**100}": "00, which takes more than 64 bits",
    f"--training.learning_rate={'1' * 400}": "a number > 0, not '1111111111",
    f"--training.learning_rate={'1' * 5000}": "a number > 0, not '1111111111",
    f"--training.learning_rate=[{'1, ' * 5000}]": "a number > 0, not [1, 1, 1, 1, 1, 1, ...]",
    f"--training.output_dir=[{'a' * 5000}]": "not ['aaaaaaaaaaaaaaaa",
    f"--training.precision={'b' * 5000}": "'bf16' or 'fp32', not 'bbbbbbbbbbbbbbb",
    f"--training.seed={'[' * 3000}": "line 1: not valid YAML: nested more than 50 deep",
    "--training.timeout_minutes=1e300": "a number > 0 and <= 525600, not 1e+300",
    "--training.timeout_minutes=525601": "a number > 0 and <= 525600, not 525601",
    "--training.timeout_minutes=1:30": "a number > 0 and <= 525600, not '1:30'",
    "--model.name_or_path=NO": "a string (in quotes if it reads as something else), not False",
    "--data.shuffle=y": "true or false, not 'y'",
    "--training.epochs": "--section.key=value",
    "--training.max_steps=": "--section.key=value (write null for no value)",
    "--data.train=[a": "line 1: not valid YAML",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_on_the_command_line_are_named(minimal: str, override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(MISTAKES[override])) as caught:
        load(minimal, override)
    assert str(caught.value).startswith("command line: ")
    assert override.removeprefix("--").split("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_sections_and_single_dashes_are_named(minimal: str) -> None:
    with pytest.raises(ValueError, match=r"command line: .*'trainin' does not exist; did you mean 'training'"):
        load(minimal, "--trainin.tokens_per_row=1")
    with pytest.raises(ValueError, match=r"command line: .*'trainin' does not exist; set training\.epochs$"):
        load(minimal, "--trainin.epochs=1")
    with pytest.raises(ValueError, match=r"command line: '-v' .*--section\.key=value"):
        load(minimal, "-v")


def test_a_value_after_a_space_is_not_a_second_file(minimal: str) -> None:
    with pytest.raises(ValueError, match=r"^command line: '--dpo\.beta 0\.2' needs a = between: --dpo\.beta=0\.2$"):
        load(minimal, "--training.seed=1", "--dpo.beta", "0.2")
    with pytest.raises(ValueError, match=r"expected CONFIG\.yaml .* but got "):
        load(minimal, "--dpo.beta=0.2", "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "dpo: {bata: 0.1}", "dpo.bata does not exist; did you mean 'beta'?"),
        (MINIMAL + "dpo: {beta: high}", "dpo.beta must be a number > 0, not 'high'"),
        (MINIMAL + "dpo: 0.1", "expected the sections model, data,"),
        (MINIMAL + "model: {}", "line 8: not valid YAML: 'model' is given twice"),
        (MINIMAL + "traning: {}", "traning is not a section; did you mean 'training'?"),
        (MINIMAL.replace("name_or_path: a/model", ""), "model.name_or_path is required"),
        (MINIMAL.replace("train: pairs.jsonl", ""), "data.train is required"),
        (MINIMAL.replace("output_dir: runs/here", ""), "training.output_dir is required"),
        ("", "expected the sections model, data,"),
        ("- model", "expected the sections model, data,"),
        (MINIMAL + "dpo: {1: 2}", "dpo.1 does not exist; valid: beta, loss_type,"),
    ],
)
def test_mistakes_in_the_file_are_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_config(path, "dpo")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--lora.alpha=32"], "lora.alpha has no effect while lora.rank is 0: set lora.rank, or lora.alpha=16.0"),
        (["--lora.target_modules=[q_proj]"], "lora.target_modules has no effect while lora.rank is 0"),
        (["--lora.rslora=true"], "lora.rslora has no effect while lora.rank is 0"),
        (["--tracking.project=x"], "tracking.project has no effect while tracking.wandb is false"),
        (["--tracking.run_name=x"], "tracking.run_name has no effect while tracking.wandb is false"),
        (["--tracking.samples=0", "--tracking.sample_tokens=9"], "tracking.sample_tokens has no effect"),
        (["--training.eval_every=5"], "training.eval_every has no effect without evaluation data"),
        (["--data.eval=a", "--data.eval_size=5"], "data.eval_size has no effect beside data.eval"),
        (["--training.eval_at_start=false"], "training.eval_at_start has no effect without evaluation data"),
        (["--training.best_metric=eval_loss"], "training.best_metric has no effect without evaluation data"),
        (["--data.eval_size=5", "--training.best_metric=eval_loss"], "training.best_metric needs evaluations while"),
        (
            ["--data.eval_size=5", "--training.eval_every=5", "--training.early_stopping_patience=2"],
            "training.early_stopping_patience needs a metric to improve: set training.best_metric",
        ),
        (
            ["--training.lr_schedule=constant", "--training.min_lr_ratio=0.1"],
            "training.min_lr_ratio has no effect with training.lr_schedule 'constant'",
        ),
        (["--training.decay_ratio=0.2"], "training.decay_ratio has no effect with training.lr_schedule 'linear'"),
        (
            ["--training.warmup_steps=5", "--training.warmup_ratio=0.2"],
            "training.warmup_ratio has no effect beside training.warmup_steps",
        ),
        (
            ["--training.lr_schedule=wsd", "--training.warmup_ratio=0.5", "--training.decay_ratio=0.6"],
            "training.decay_ratio (0.6) and training.warmup_ratio (0.5) are more than all steps: lower one of them",
        ),
        (
            ["--training.weight_decay_exclude=[]"],
            "training.weight_decay_exclude has no effect while training.weight_de",
        ),
        (["--training.extend=true", "--training.resume=never"], "training.extend has no effect with training.resume"),
        (["--data.max_prompt_length=1024"], "data.max_prompt_length (1024) must be below data.max_length (1024)"),
        (["--dpo.loss_type=hinge", "--dpo.label_smoothing=0.1"], "dpo.label_smoothing has no effect with"),
        (
            ["--dpo.loss_type=robust", "--dpo.label_smoothing=0.5"],
            "dpo.label_smoothing must be at least 0 and below 0.5 with",
        ),
        (
            ["--dpo.loss_type=exo_pair"],
            "dpo.label_smoothing must be above 0 and at most 0.5 with dpo.loss_type 'exo_pair'",
        ),
        (["--dpo.loss_type=discopop", "--dpo.options.discopop_tau=1"], "dpo.options.discopop_tau must be above 0 and"),
        (["--dpo.loss_type={hinge: 1, ipo: 1}", "--dpo.label_smoothing=0.1"], "with dpo.loss_type 'hinge', 'ipo': use"),
        (["--dpo.nll_mean=completions"], "dpo.nll_mean has no effect while dpo.nll_weight is 0"),
        (["--dpo.loss_type=ipo", "--dpo.ld_alpha=0.5"], "dpo.ld_alpha has no meaning with dpo.loss_type 'ipo'"),
        (["--dpo.loss_type={sigmoid: 1, simpo: 1}", "--dpo.ld_alpha=0.5"], "no meaning with dpo.loss_type 'simpo'"),
        (["--dpo.loss_type=plackett_luce", "--dpo.ld_alpha=0.5"], "dpo.ld_alpha is of pairs, and dpo.loss_type 'plac"),
        (["--dpo.loss_type=kto", "--dpo.wpo=true"], "dpo.wpo is of pairs, and dpo.loss_type 'kto' learns from labels"),
        (
            ["--dpo.loss_type=bco", "--dpo.nll_weight=1"],
            "dpo.nll_weight is of pairs and lists, and dpo.loss_type 'bco'",
        ),
        (
            ["--dpo.loss_type=kto", "--training.batch_size=1"],
            "training.batch_size must be at least 2 with dpo.loss_type",
        ),
        (["--dpo.loss_type={sigmoid: 1, kto: 1}"], "must learn from the same rows of data"),
        (
            ["--dpo.loss_type=simpo", "--reference.cache_dir=x"],
            "reference.cache_dir has no effect with dpo.loss_type 's",
        ),
        (["--dpo.options.f_alpha=0.3"], "dpo.options.f_alpha has no effect unless dpo.options.f_divergence is alpha_"),
        (["--dpo.options.f_divergence=kl"], "dpo.options.f_divergence must be one of"),
    ],
)
def test_settings_without_effect_are_rejected(minimal: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(minimal, *overrides)


ADAPTERS = "lora: {alpha: 32, target_modules: all-linear, continue: true}\n"
EVALUATED = "eval_every: 5, best_metric: eval_loss, early_stopping_patience: 2"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (ADAPTERS, []),
        ("lora: {rank: 4, rslora: true, modules_to_save: [a]}\n", ["--lora.rank=0"]),
        ("tracking: {wandb: true, project: x, run_name: y}\n", ["--tracking.wandb=false"]),
        ("tracking: {sample_tokens: 9}\n", ["--tracking.samples=0"]),
        (f"training: {{{EVALUATED}, eval_at_start: false}}\ndata: {{eval_size: 5}}\n", ["--data.eval_size=0"]),
        (f"training: {{{EVALUATED}}}\ndata: {{eval_size: 5}}\n", ["--training.eval_every=null"]),
        (f"training: {{{EVALUATED}}}\ndata: {{eval_size: 5}}\n", ["--training.best_metric=null"]),
        ("data: {eval_size: 5}\n", ["--data.eval=x"]),
        ("data: {eval: x}\n", ["--data.eval_size=0.1"]),
        ("training: {min_lr_ratio: 0.1}\n", ["--training.lr_schedule=constant"]),
        ("training: {lr_schedule: wsd, decay_ratio: 0.2}\n", ["--training.lr_schedule=cosine"]),
        ("training: {warmup_ratio: 0.2}\n", ["--training.warmup_steps=5"]),
        ("training: {weight_decay: 0.1, weight_decay_exclude: []}\n", ["--training.weight_decay=0"]),
        ("training: {resume: never}\n", ["--training.extend=true"]),
        ("training: {keep_every: 10, save_every: 5}\n", ["--training.keep_checkpoints=null"]),
        ("training: {compile: true}\n", ["--model.path=plain"]),
        ("dpo: {nll_mean: completions, nll_weight: 1}\n", ["--dpo.nll_weight=0"]),
        ("dpo: {nll_weight: 1, ld_alpha: 0.5, wpo: true}\n", ["--dpo.loss_type=kto"]),
        ("dpo: {ld_alpha: 0.5}\n", ["--dpo.loss_type=ipo"]),
        ("dpo: {label_smoothing: 0.1}\n", ["--dpo.loss_type=hinge"]),
        ("dpo: {loss_type: discopop, options: {discopop_tau: 0.1}}\n", ["--dpo.loss_type=sigmoid"]),
        ("reference: {cache_dir: x}\n", ["--dpo.loss_type=simpo"]),
    ],
)
def test_what_a_message_advises_works_on_the_command_line(tmp_path: Path, text: str, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    tree = yaml.safe_load(MINIMAL)
    for section, keys in yaml.safe_load(text).items():
        tree[section] = {**tree.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(tree))
    complaints = []
    for _ in range(4):
        try:
            load_config([str(path), *overrides], "dpo")
        except ValueError as error:
            complaints.append(str(error))
            assert "remove" not in complaints[-1]
            advised = re.findall(r"\w+\.\w+=\S+?(?=$| |, )", str(error))
            overrides = [*overrides, *(f"--{each}" for each in advised)]
    load_config([str(path), *overrides], "dpo")
    assert 1 <= len(complaints) <= 3, complaints


def test_all_keys_without_effect_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + ADAPTERS)
    off = "lora.alpha=16.0 lora.target_modules=[q_proj,k_proj,v_proj,o_proj] lora.continue=false"
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: lora.alpha has no effect while lora.rank is 0: ")
    ) as caught:
        load_config(path, "dpo")
    assert str(caught.value).endswith(f"set lora.rank, or {off}")


def test_the_starter_config_without_its_evaluation(tmp_path: Path) -> None:
    path = str(Path(__file__).parents[1] / "configs" / "dpo-lora.yaml")
    with pytest.raises(ValueError, match=r"training\.eval_every has no effect .*, or training\.eval_every=null$"):
        load_config([path, "--data.eval_size=0"], "dpo")
    config = load_config([path, "--data.eval_size=0", "--training.eval_every=null"], "dpo")
    assert (config.data.eval_size, config.training.eval_every) == (0, None)
    with pytest.raises(ValueError, match=r"data\.eval_size has no effect beside data\.eval: .* or data\.eval_size=0$"):
        load_config([path, "--data.eval=held-out.csv"], "dpo")
    config = load_config([path, "--data.eval=held-out.csv", "--data.eval_size=0"], "dpo")
    assert (config.data.eval_size, config.training.eval_every) == (0, 50)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--dpo.beta=0.2", "dpo.beta has no effect in SFT: run the command dpo, or set dpo.beta=0.1"),
        ("--reference.cache_dir=x", "reference.cache_dir has no effect in SFT"),
        ("--data.max_prompt_length=5", "data.max_prompt_length has no effect in SFT, which cuts long rows"),
    ],
)
def test_sft_rejects_what_only_dpo_uses(minimal: str, override: str, message: str) -> None:
    load(minimal, override, task="dpo")
    with pytest.raises(ValueError, match=re.escape("command line: " + message)):
        load(minimal, override, task="sft")


@pytest.mark.parametrize("overrides", [
    ["--lora.rank=4", "--lora.alpha=32"],
    ["--tracking.wandb=true", "--tracking.project=x"],
    ["--tracking.tensorboard=true"],
    ["--tracking.samples=0"],
    ["--tracking.samples=2", "--tracking.sample_tokens=9"],
    ["--data.eval=a", "--training.eval_every=5"],
    ["--data.eval_size=9", "--training.eval_every=5"],
    ["--data.eval_size=0.1", "--training.eval_every=5", "--training.eval_at_start=false"],
    ["--data.eval_size=9", "--training.eval_every=5", "--training.best_metric=eval_loss"],
    ["--data.eval=a", "--training.eval_every=5", "--training.best_metric=eval_loss",
     "--training.early_stopping_patience=2"],
    ["--training.lr_schedule=wsd", "--training.decay_ratio=0.2", "--training.min_lr_ratio=0.1"],
    ["--training.lr_schedule=cosine", "--training.min_lr_ratio=1", "--training.warmup_steps=0"],
    ["--training.weight_decay=0.1", "--training.weight_decay_exclude=[]"],
    ["--training.extend=true", "--training.max_steps=9"],
    ["--dpo.loss_type=exo_pair", "--dpo.label_smoothing=1e-3"],
    ["--dpo.label_smoothing=0.5"],
    ["--dpo.loss_type={hinge: 1, robust: 0.5}", "--dpo.label_smoothing=0.1"],
    ["--dpo.nll_weight=1", "--dpo.nll_mean=completions", "--dpo.ld_alpha=0", "--dpo.wpo=true"],
    ["--dpo.loss_type={sigmoid: 1, cpo: 1}", "--reference.cache_dir=x", "--dpo.ld_alpha=0.5"],
    ["--dpo.loss_type=all_pairs", "--dpo.nll_weight=1"],
    ["--dpo.loss_type=kto", "--dpo.options.desirable_weight=1.3"],
    ["--dpo.options={f_divergence: alpha_divergence, f_alpha: 0.3}"],
    ["--data.chat_template=templates/mine.jinja"],
])  # fmt: skip
def test_the_same_settings_are_valid_where_they_have_an_effect(minimal: str, overrides: list[str]) -> None:
    load(minimal, *overrides)


@pytest.mark.parametrize(
    ("overrides", "section", "key", "expected"),
    [
        (["--lora.rank=2", "--lora.target_modules=q_proj,v_proj"], "lora", "target_modules", ["q_proj", "v_proj"]),
        (["--lora.rank=2", "--lora.target_modules=q_proj"], "lora", "target_modules", ["q_proj"]),
        (["--lora.rank=2", "--lora.target_modules=all-linear"], "lora", "target_modules", "all-linear"),
        (["--lora.rank=2", "--lora.target_modules=[a, b]"], "lora", "target_modules", ["a", "b"]),
        (["--lora.rank=2", "--lora.modules_to_save=a, b"], "lora", "modules_to_save", ["a", "b"]),
        (["--data.new_tokens=<a>,<b>"], "data", "new_tokens", ["<a>", "<b>"]),
        (["--data.train=a,b.jsonl"], "data", "train", [{"path": "a,b.jsonl", "split": "train", "weight": 1.0}]),
        (["--training.output_dir=a,b"], "training", "output_dir", "a,b"),
        (["--tracking.wandb=true", "--tracking.run_name=a,b"], "tracking", "run_name", "a,b"),
    ],
)
def test_a_comma_separates_the_entries_of_a_list_of_strings_alone(
    minimal: str, overrides: list[str], section: str, key: str, expected: Any
) -> None:
    assert getattr(getattr(load(minimal, *overrides), section), key) == expected


def test_a_config_of_dpo_is_none_of_sft(tmp_path: Path) -> None:
    """Decided by the sections of the file, also where their values are the defaults; an empty one says nothing."""
    path = tmp_path / "run.yaml"
    for section in ("dpo: {beta: 0.1}", "reference: {cache_dir: null}"):
        path.write_text(f"{MINIMAL}{section}\n")
        name = section.split(":")[0]
        with pytest.raises(ValueError, match=f"has a section `{name}`, which is of DPO: train with the command dpo"):
            load_config(path, "sft")
    path.write_text(f"{MINIMAL}dpo:\n")
    assert load_config(path, "sft").task == "sft"


def test_entries_of_a_mapping_are_set_one_by_one(minimal: str, tmp_path: Path) -> None:
    dpo = load(minimal, "--dpo.loss_type=discopop", "--dpo.options.discopop_tau=0.1").dpo
    assert dpo.options == {"discopop_tau": 0.1}
    with_options = tmp_path / "more.yaml"
    with_options.write_text(MINIMAL + "dpo: {loss_type: {discopop: 2, sigmoid: 1}, options: {discopop_tau: 0.3}}\n")
    assert load_config(with_options, "dpo").dpo.options == {"discopop_tau": 0.3}
    changed = load_config([str(with_options), "--dpo.options.discopop_tau=0.5"], "dpo").dpo
    assert changed.options == {"discopop_tau": 0.5}
    assert changed.loss_type == {"discopop": 2.0, "sigmoid": 1.0}
    one_more = load_config([str(with_options), "--dpo.loss_type.robust=0.5"], "dpo").dpo
    assert one_more.loss_type == {"discopop": 2.0, "sigmoid": 1.0, "robust": 0.5}
    saved = tmp_path / "saved.yaml"
    save_config(load_config(with_options, "dpo"), saved)
    assert load_config(saved, "dpo") == load_config(with_options, "dpo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--dpo.options.discopop_tau=[1]",
            "dpo.options must be a mapping of strings to numbers or strings, not {'disc",
        ),
        ("--training.seed.x=1", "training.seed must be an integer >= 0, not {'x': 1}"),
        ("--training.output_dir.x=1", "training.output_dir is 'runs/here', which has no entries: set training.output"),
        ("--dpo.options.a.b=1", "is not of the form --section.key=value"),
    ],
)
def test_entries_of_what_is_no_mapping_are_rejected(minimal: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^command line: .*" + re.escape(message)):
        load(minimal, override)


@pytest.mark.parametrize(
    ("loss", "rows"), [("sigmoid", "dpo"), ("cpo", "dpo"), ("plackett_luce", "lists"), ("kto", "labels")]
)
def test_the_loss_says_which_rows_a_run_learns_from(minimal: str, loss: str, rows: str) -> None:
    assert load(minimal, f"--dpo.loss_type={loss}").rows == rows
    assert load(minimal, f"--dpo.loss_type={{{loss}: 2}}").rows == rows
    assert load(minimal, task="sft").rows == "sft"


def test_each_loss_of_a_sum_gets_its_own_options(minimal: str) -> None:
    words = ["--dpo.loss_type={sigmoid: 1, discopop: 1}", "--dpo.label_smoothing=0.1", "--dpo.options.discopop_tau=0.2"]
    dpo = load(minimal, *words).dpo
    assert options_of(dpo, LOSSES["sigmoid"]) == {"label_smoothing": 0.1}
    assert options_of(dpo, LOSSES["discopop"]) == {"discopop_tau": 0.2}


@pytest.mark.parametrize("words", [[], ["--dpo.beta=0.1"], ["a.yaml", "b.yaml"]])
def test_exactly_one_file_is_expected(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"command line: expected CONFIG\.yaml \[--section\.key=value"):
        load_config(words, "dpo")


def test_config_from_dict() -> None:
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o"}, "lora": None}
    assert config_from_dict(tree, "sft").task == "sft"
    with pytest.raises(ValueError, match=r"here: dpo\.beta must be"):
        config_from_dict({**tree, "dpo": {"beta": -1}}, "dpo", source="here")


def test_every_field_is_described() -> None:
    """A text stands below each field: the only place where the keys are explained."""
    tree = ast.parse(inspect.getsource(config_module))
    sections = {cls.__name__ for cls in SECTIONS.values()}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in sections:
            body = node.body[1:]  # after the class's own docstring
            assert len(body) % 2 == 0, node.name
            for item, text in zip(body[::2], body[1::2], strict=True):
                assert isinstance(item, ast.AnnAssign), ast.unparse(item)
                assert isinstance(text, ast.Expr), ast.unparse(item)
                assert isinstance(ast.literal_eval(text.value), str)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, notus.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# configs/launch holds files for schedulers
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "launch")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_configs_we_ship_load_and_say_how_to_run_them(path: Path) -> None:
    task: Any = next((name for name in ("sft", "iterate") if path.name.startswith(name)), "dpo")
    if task == "iterate":
        load_settings([str(path)])
    else:
        load_config(path, task)
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    place = path.relative_to(CONFIGS)
    assert f"train_{task}.py configs/{place}" in head or f"notus {task} configs/{place}" in head
    for word in ("Command", "Hardware", "Time", "Expect"):
        assert re.search(rf"^# {word}", head, flags=re.MULTILINE), word


def test_a_config_of_rounds_names_its_command() -> None:
    with pytest.raises(ValueError, match="iterate is a section of rounds: run the command iterate"):
        load_config(CONFIGS / "own-feedback" / "iterate.yaml", "dpo")


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_older_values_of_activation_checkpointing_get_a_hint(minimal: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing must be .*: set '(full|none)'$"):
        load(minimal, f"--training.activation_checkpointing={value}")


# Each key that takes a string, and whether it is a path.
STRINGS = {
    "model.name_or_path": True,
    "model.adapter": True,
    "data.exclude": True,
    "data.chat_template": True,
    "data.cache_dir": True,
    "training.output_dir": True,
    "training.resume": True,
    "reference.model": True,
    "reference.cache_dir": True,
    "data.template_date": False,
    "training.best_metric": False,
    "tracking.project": False,
    "tracking.run_name": False,
}


def test_home_is_expanded_in_every_path(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    overrides = ["--tracking.wandb=true", "--data.train=[~/a, {path: ~/b}]", "--data.eval=~/c"]
    overrides += ["--training.eval_every=5"]
    strings = [key for key in STRINGS if key != "data.template_date"]
    config = load(minimal, *overrides, *(f"--{key}=~/x.jinja" for key in strings))
    for key in strings:
        section, name = key.split(".")
        found = getattr(getattr(config, section), name)
        assert found == ("/home/ada/x.jinja" if STRINGS[key] else "~/x.jinja"), key
    assert config.data.eval is not None
    assert [source["path"] for source in [*config.data.train, *config.data.eval]] == [f"/home/ada/{n}" for n in "abc"]
    assert "output_dir: /home/ada/x.jinja\n" in to_yaml(config)


def test_every_key_that_takes_a_string_is_known_for_a_path_or_none() -> None:
    """A new key must be put into `STRINGS`."""
    found = set()
    for section, cls in SECTIONS.items():
        for name, hint in get_type_hints(cls, include_extras=True).items():
            parts = [hint, *get_args(hint)]
            if any(get_origin(part) is Annotated and get_args(part)[0] is str for part in parts):
                found.add(f"{section}.{name}")
    assert found == set(STRINGS)


def test_home_is_expanded_in_the_path_of_the_config(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(minimal).parent))
    assert load_config("~/run.yaml", "dpo") == load_config(minimal, "dpo")
    with pytest.raises(ValueError, match=f"{Path(minimal).parent}/absent.yaml: cannot read"):
        load_config(["~/absent.yaml"], "dpo")


def test_dates_need_no_quotes(minimal: str, tmp_path: Path) -> None:
    """Nor does a written config change them."""
    config = load(minimal, "--data.template_date=2026-01-31", "--data.chat_template_kwargs={since: 2025-02-28}")
    assert config.data.template_date == "2026-01-31"
    assert config.data.chat_template_kwargs == {"since": "2025-02-28"}
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml", "dpo") == config
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["data"]["template_date"] == "2026-01-31"


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace("train: pairs.jsonl", "train: &rows [{path: a}, b]\n  eval: *rows"))
    config = load_config(path, "dpo")
    assert config.data.eval == config.data.train
    assert len(config.data.train) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # a string in YAML 1.1
        ("5E-7", 5e-7),
        ("-2.e3", -2000.0),
        (".5e1", 5.0),
        ("1e", "1e"),
        ("e5", "e5"),
        ('"1e-6"', "1e-6"),
        ("1.5", 1.5),
        ("3", 3),
        ("null", None),
        ("true", True),
        ("[a, 1e2]", ["a", 100.0]),
        # What YAML 1.1 reads as a date, as 90, as 90.5 and as 8:
        ("2026-01-31", "2026-01-31"),
        ("2026-13-45", "2026-13-45"),
        ("2026-01-31 10:00:00", "2026-01-31 10:00:00"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("1_000", 1000),
        ("-12", -12),
        ("+12", 12),
        ("0", 0),
        ("0x10", 16),
        ("0b11", 3),
        ("1_0.5", 10.5),
        ("0_", "0_"),
        ("0x_", "0x_"),
        ("0b_", "0b_"),
        ("_", "_"),
        (".5", 0.5),
        ("-.5", -0.5),
        ("01.5", 1.5),
        ("1.", 1.0),
        ("1.2.3", "1.2.3"),
        ("9" * 300, int("9" * 300)),
        ("9" * 301, "9" * 301),
        ("-" + "9" * 5000, "-" + "9" * 5000),
        # As every reader of YAML in Python has them:
        ("yes", True),
        ("off", False),
        ("NO", False),
        ("y", "y"),
        ('"no"', "no"),
    ],
)
def test_yaml_values_and_their_way_back(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.yaml"
    path.write_text(text)
    found = read_yaml(path)
    assert found == value
    assert type(found) is type(value)
    path.write_text(dump_yaml(found))
    assert read_yaml(path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML: 'a' is given twice"),
        ("a: 1\nb: [2\n", "line 3: not valid YAML"),
        ("a: !!python/object:os.system {}", "line 1: not valid YAML: could not determine a constructor"),
        ("a: 1\nb: " + "[" * 3000 + "]" * 3000, "line 2: not valid YAML: nested more than 50 deep"),
        ("a: 1\nb: " + "{x: " * 3000 + "}" * 3000, "line 2: not valid YAML: nested more than 50 deep"),
        ("a: 1\nb: " + "[" * 100_000, "line 2: not valid YAML: nested more than 50 deep"),
        ("a: 1\nb: &b [*b]", "line 2: not valid YAML: its aliases stand for values nested more than 50 deep"),
        ("a: 1\nb: &b {c: {d: *b}}", "line 2: not valid YAML: its aliases stand for values nested more than 50"),
        (CHAIN, "line 49: not valid YAML: its aliases stand for values nested more than 50 deep"),
        (BOMB, "line 7: not valid YAML: its aliases stand for over 100000 values"),
        ("a: 1\nb: !!int abc", "line 2: not valid YAML: 'abc' is no int"),
        ("b: !!bool abc", "line 1: not valid YAML: 'abc' is no bool"),
        ("b: !!float abc", "line 1: not valid YAML: 'abc' is no float"),
        ("b: !!timestamp abc", "line 1: not valid YAML: 'abc' is no timestamp"),
        ("b: !!timestamp 2026-13-45", "line 1: not valid YAML: '2026-13-45' is no timestamp"),
        ("a: 1\nb: x\x01", "line 2: not valid YAML: character 0x1 is not allowed"),
    ],
)
def test_broken_yaml_names_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_yaml(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot read the config file: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="cannot read the config file: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.yaml: not UTF-8 text"):
        read_yaml(tmp_path / "binary.yaml")
