"""The Python API: rows and models in memory, callbacks, results, and a process that is left as it was."""

import contextlib
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers.utils.logging
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, read_metrics, settings, words, write_pairs
from toys import toy_model, toy_tokenizer

import notus
from notus.evaluation.resolve_model import read_run_settings, with_paths
from notus.training.checkpoint import checkpoints_in


def rows(count: int = 18, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `write_pairs`."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, first, second = (words(generator, 1, 9) for _ in range(3))
        found.append({"prompt": prompt, "chosen": f" {first}a", "rejected": f" {second}b"})
    return found


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Make a config of a short run, without data."""

    def make(name: str = "run", **overrides: Any) -> dict[str, dict[str, Any]]:
        tree = settings(tmp_path / name, model_folder, tmp_path / "none", **overrides)
        if "data__train" not in overrides:
            del tree["data"]["train"]
        return tree

    return make


class Notes(notus.Callback):
    """Writes down what it receives; `stop_at` and `fail_at` are steps."""

    def __init__(self, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.logged: list[int] = []
        self.evaluated: list[tuple[int, list[str]]] = []
        self.saved: list[tuple[int, Path, bool]] = []
        self._stop_at, self._fail_at = stop_at, fail_at

    def on_log(self, step: int, metrics: Mapping[str, float]) -> bool:
        assert not any(name.startswith("eval_") for name in metrics)
        assert "loss" in metrics
        self.logged.append(step)
        if step == self._fail_at:
            raise ZeroDivisionError("a fault of the callback")
        return step == self._stop_at

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        assert all(name.startswith("eval_") for name in metrics)
        self.evaluated.append((step, sorted(metrics)))

    def on_save(self, step: int, path: Path) -> None:
        self.saved.append((step, path, (path / "state.json").is_file()))


# ---- training ----


def test_rows_in_memory_train_as_the_same_rows_in_a_file(tmp_path: Path, config: Any) -> None:
    result = notus.train(config(training__eval_every=2), train=rows(), eval=rows(6, seed=1))
    tree = config("file", training__eval_every=2)
    tree["data"] |= {"train": str(write_pairs(tmp_path / "train.jsonl", 18))}
    tree["data"] |= {"eval": str(write_pairs(tmp_path / "eval.jsonl", 6, seed=1))}
    notus.train(tree)
    assert_same_run(tmp_path / "run", tmp_path / "file")
    assert result.metrics == read_metrics(tmp_path / "run")
    assert result.finished
    assert result.output_dir == tmp_path / "run"
    assert result.model_path == tmp_path / "run" / "model"
    steps = [line["step"] for line in result.evaluations]
    assert steps == [0, 2, 4, 5]
    assert all(set(line) > {"eval_loss", "step"} and "loss" not in line for line in result.evaluations)
    assert result.config.training.batch_size == 4


def test_the_same_rows_resume_and_other_rows_are_refused(tmp_path: Path, config: Any) -> None:
    whole = notus.train(config("whole"), train=rows())
    first = Notes(stop_at=2)
    stopped = notus.train(config(), train=rows(), callbacks=[first])
    assert not stopped.finished
    assert stopped.model_path is None
    assert stopped.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000003"
    with pytest.raises(ValueError, match=r"not finished"):
        stopped.load_model()
    with pytest.raises(ValueError, match=r"began with another train"):
        notus.train(config(), train=rows(seed=1))
    resumed = notus.train(config(), train=rows())
    assert resumed.finished
    assert_same_run(whole.output_dir, resumed.output_dir)
    with pytest.raises(ValueError, match=r"began with another train"):  # also where nothing is left to do
        notus.train(config(), train=rows(seed=1))
    again = notus.train(config(training__resume="never"), train=rows(seed=1))
    assert again.metrics != resumed.metrics
    assert list((tmp_path / "run").glob("previous-*/inputs/train.jsonl"))


def test_a_run_that_was_moved_is_resumed(tmp_path: Path, config: Any) -> None:
    whole = notus.train(config("whole"), train=rows())
    held = rows(2, seed=1)
    given: dict[str, Any] = {"model": toy_model(), "tokenizer": toy_tokenizer(), "train": rows(), "eval": held}
    for name, callbacks in (("before", [Notes(stop_at=2)]), ("after", [])):
        if name == "after":
            (tmp_path / "before").rename(tmp_path / "after")
        tree = config(name, training__eval_every=10)
        del tree["model"]
        moved = notus.train(tree, **given, callbacks=callbacks)
    assert moved.finished
    assert [line["loss"] for line in moved.metrics] == [line["loss"] for line in whole.metrics]
    (tmp_path / "after").rename(tmp_path / "archive")
    run = tmp_path / "archive"
    found = with_paths(read_run_settings(run), run)
    assert found["data"]["train"][0]["path"] == str(run / "inputs" / "train.jsonl")
    assert found["model"]["name_or_path"] == str(run / "inputs" / "model")


def test_a_loaded_model_trains_as_its_folder_does_and_is_left_alone(tmp_path: Path, config: Any) -> None:
    by_folder = notus.train(config("folder", lora__rank=4), train=rows())
    tree = config(lora__rank=4)
    del tree["model"]
    model = toy_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config_before = model.config.to_dict()
    result = notus.train(tree, model=model, tokenizer=toy_tokenizer(), train=rows())
    assert_same_run(by_folder.output_dir, result.output_dir)
    assert model.training
    assert model.config.to_dict() == config_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    used = toy_tokenizer()
    used(["a", "a b"], padding=True, truncation=True, max_length=4) if used.pad_token else used("a")
    assert notus.train(tree, model=model, tokenizer=used, train=rows()).finished
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"began with another model"):
        notus.train(tree, model=model, tokenizer=toy_tokenizer(), train=rows())


def test_the_trained_model_is_loaded_with_its_adapter(config: Any, model_folder: Path) -> None:
    result = notus.train(config(lora__rank=4, training__learning_rate=0.05), train=rows())
    model, tokenizer = result.load_model()
    ids = torch.tensor([tokenizer("the quick fox")["input_ids"]])
    start = type(model).from_pretrained(model_folder)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, start(ids).logits, atol=1e-3)
    read = notus.load_result(result.output_dir)
    assert read == result


def test_sft_learns_from_rows_in_memory(config: Any) -> None:
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows()]
    result = notus.train(config(), task="sft", train=demonstrations)
    assert result.config.task == "sft"
    assert result.finished
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]


def test_numbers_of_numpy(config: Any) -> None:
    result = notus.train(
        config(training__max_steps=np.int64(2), training__learning_rate=np.float64(1e-4)), train=rows()
    )
    assert (result.config.training.max_steps, result.config.training.learning_rate) == (2, 1e-4)


def test_a_config_object_and_overrides(tmp_path: Path, config: Any) -> None:
    tree = config()
    tree["data"]["train"] = str(tmp_path / "nowhere.jsonl")
    loaded = notus.train.__globals__["config_from_dict"](tree, "dpo")
    result = notus.train(loaded, train=rows(), overrides={"training.max_steps": 1, "dpo.beta": 0.3})
    assert result.config.dpo.beta == 0.3
    assert [line["step"] for line in result.metrics] == [1]


def test_arguments_replace_what_a_starter_config_names(
    tmp_path: Path, config: Any, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = config(data__train="pairs.csv", data__eval_size=0.05, training__max_steps=1)
    tree["model"]["name_or_path"] = "of/nobody"
    path = tmp_path / "starter.yaml"
    path.write_text(json.dumps(tree))
    result = notus.train(path, train=rows(), eval=rows(3, seed=1), model=model_folder)
    told = f"{path}: the arguments of train replace data.train, data.eval_size, model.name_or_path"
    assert told in capsys.readouterr().out.splitlines()
    read = result.config
    assert [Path(source["path"]).name for source in (*read.data.train, *(read.data.eval or []))] == [
        "train.jsonl",
        "eval.jsonl",
    ]
    assert (read.data.eval_size, read.model.name_or_path) == (0, str(model_folder))
    assert [line["step"] for line in result.evaluations] == [0, 1]
    assert notus.train(path, train=rows(), eval=rows(3, seed=1), model=model_folder) == result
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"^train: holds no rows"):
        notus.train(config(), train=[])
    assert "replace" not in capsys.readouterr().out


def test_a_loaded_model_brings_its_tokenizer(model_folder: Path) -> None:
    model = type(toy_model()).from_pretrained(model_folder)
    expected = notus.score(model, toy_tokenizer(), rows(2)).logps
    assert torch.equal(notus.score(model, None, rows(2)).logps, expected)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": []}, r"^train: holds no rows"),
        ({"train": [{"prompt": "a", "chosen": "b", "rejected": "c"}, "text"]}, r"^train, row 2: is a str"),
        ({"train": [{"prompt": "a", "chosen": object(), "rejected": "c"}]}, r"^train, row 1: key 'chosen'.* object"),
        ({"train": {"prompt": ["a"]}}, r"^train: is a dict; give a datasets.Dataset or a list"),
        ({"train": rows(2), "eval": []}, r"^eval: holds no rows"),
        ({"train": rows(2), "tokenizer": "gpt2"}, r"^tokenizer: has no effect"),
        (
            {"train": rows(2), "overrides": {"data.train": "a"}},
            r"^overrides: has 'data\.train', .* train= .*: pass one of them$",
        ),
        ({"train": rows(2), "eval": rows(2), "overrides": {"data.eval_size": 2}}, r"^overrides: has 'data\.eval_size'"),
        (
            {"train": rows(2), "model": "a", "overrides": {"model.name_or_path": "b"}},
            r"^overrides: has 'model\.name_or",
        ),
        ({"train": rows(2), "model": torch.nn.Linear(2, 2)}, r"^model: is a Linear; give a folder"),
        ({"train": rows(2), "task": "ppo"}, r"^task: must be 'dpo' or 'sft', not 'ppo'"),
        ({"train": rows(2), "callbacks": [print]}, r"^callbacks: .* is no notus.Callback"),
        ({"train": rows(2), "overrides": {"beta": 1}}, r"^overrides: 'beta' is no key"),
        ({}, r"^config: there is no training data"),
    ],
)
def test_mistakes_are_one_line(config: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        notus.train(config(), **given)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, config: Any) -> None:
    bad = [*rows(3), {"prompt": "a", "chosen": "b"}]
    for kind in (list, datasets.Dataset.from_list):  # JSON Lines, Parquet
        with pytest.raises(ValueError, match=r"^train, row 4: "):
            notus.train(config(), train=kind(bad))
    with pytest.raises(ValueError, match=r"^eval: no row is left"):
        notus.train(config(), train=rows(3), eval=[{"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert notus.train(config(), train=rows()).finished  # a run that did not begin binds nobody


# ---- callbacks ----


def test_callbacks_hear_of_every_log_evaluation_and_save(tmp_path: Path, config: Any) -> None:
    notes = Notes()
    tree = config(training__eval_every=2, training__save_every=2, training__log_every=2, data__eval_size=4)
    result = notus.train(tree, train=rows(20), callbacks=[notes])
    assert notes.logged == [2, 4]
    assert [step for step, _ in notes.evaluated] == [0, 2, 4]
    assert "eval_rewards/margins" in notes.evaluated[-1][1]
    assert [(step, there) for step, _, there in notes.saved] == [(2, True), (4, True)]
    assert notes.saved[-1][1] == result.checkpoint


def test_an_error_in_a_callback_ends_the_run_after_its_line_is_written(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ZeroDivisionError, match="a fault of the callback"):
        notus.train(config(), train=rows(), callbacks=[Notes(fail_at=3)])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert not dist.is_initialized()


class Faulty(notus.Callback):
    """Fails in one method, at its first call."""

    def __init__(self, method: str) -> None:
        setattr(self, method, self.fail)

    def fail(self, *_: Any) -> None:
        raise ZeroDivisionError("a fault of the callback")


def _with_faulty_callbacks(trees: dict[str, dict[str, Any]], ports: list[int]) -> None:
    for (method, tree), port in zip(trees.items(), ports, strict=True):
        with launched(port) as rank, pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
            notus.train(tree, callbacks=[Faulty(method)])
        if rank == 0:
            assert caught.type is ZeroDivisionError
            assert caught.traceback[-1].name == "fail"
        else:  # not by a lost connection, which NCCL may notice after minutes
            assert str(caught.value) == "rank 0 ended: ZeroDivisionError: a fault of the callback"


def test_an_error_in_a_callback_ends_every_rank(tmp_path: Path, config: Any) -> None:
    cases = {
        "on_log": ([1], 0),  # before the update of step 2
        "on_evaluate": ([], 0),  # before that of step 1
        "on_save": ([1, 2], 1),  # after the last step, before the export
    }
    run = {
        "training__max_steps": 2,
        "data__train": str(write_pairs(tmp_path / "pairs.jsonl", 12)),
        "data__eval_size": 4,
    }
    trees = {method: config(method, **run) for method in cases}
    run_ranks(_with_faulty_callbacks, 2, tmp_path, trees, free_ports(len(trees)))
    for method, (steps, saved) in cases.items():
        assert [line["step"] for line in read_metrics(tmp_path / method)] == steps
        assert len(checkpoints_in(tmp_path / method / "checkpoints")) == saved
        assert not (tmp_path / method / "model").exists()


# ---- the process ----


def process_state() -> dict[str, Any]:
    """What a program would notice that runs on after a call."""
    loggers = {name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.utils.are_progress_bars_disabled()
    return {
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook, warnings.showwarning),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "environment": dict(os.environ),
        "folder": (os.getcwd(), tempfile.tempdir),
        "streams": (sys.stdout, sys.stderr),
        "logging": {"": logging.root.level} | {name: each.level for name, each in loggers.items() if each.level},
        "warnings": list(warnings.filters),
        "bars": (*bars, transformers.utils.logging.get_verbosity(), datasets.logging.get_verbosity()),
        "draws": (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()),
        "dtypes": (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "threads": (torch.get_num_threads(), sorted(thread.name for thread in threading.enumerate())),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "group": dist.is_initialized(),
    }


def test_the_process_is_left_as_it_was(config: Any) -> None:
    torch.manual_seed(7)
    notus.score(toy_model(), toy_tokenizer(), rows(2))  # libraries are imported, and have their threads
    before = process_state()
    notus.score(toy_model(), toy_tokenizer(), rows(2))
    notus.train(config("one", training__max_steps=1, data__eval_size=2), train=rows()).load_model()
    notus.train(config("two", training__max_steps=1, training__deterministic=True), train=rows())
    with pytest.raises(ValueError, match=r"not finite.* Look at these rows, or lower training\.learning_rate$"):
        notus.train(config("fails", training__learning_rate=1e30), train=rows())
    assert process_state() == before


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": float64_by_default,
}


@pytest.mark.parametrize("mode", MODES)
def test_the_modes_of_the_caller_change_no_number(mode: str, config: Any) -> None:
    model = toy_model()
    scores = notus.score(model, toy_tokenizer(), rows(3))
    result = notus.train(config("usual", training__max_steps=2), train=rows())
    with MODES[mode]():
        there = notus.score(model, toy_tokenizer(), rows(3))
        trained = notus.train(config(training__max_steps=2), train=rows())
    assert torch.equal(there.logps, scores.logps)
    assert there.path == scores.path
    assert [line["loss"] for line in trained.metrics] == [line["loss"] for line in result.metrics]


def test_another_process_group_is_named(config: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"torch\.distributed is initialized"):
            notus.train(config(), train=rows())
    finally:
        dist.destroy_process_group()


class Interrupt(notus.Callback):
    """Presses Ctrl-C at step 2."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_and_raises(tmp_path: Path, config: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        notus.train(config(), train=rows(), callbacks=[Interrupt()])
    assert signal.getsignal(signal.SIGINT) is before
    stopped = notus.load_result(tmp_path / "run")
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.name == "step-00000003"
    assert notus.train(config(), train=rows()).finished


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_before_the_first_step_raises_at_once(tmp_path: Path, config: Any, monkeypatch: Any) -> None:
    from notus.training import setup

    monkeypatch.setattr(setup, "load_inputs", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        notus.train(config(), train=rows())
    assert not dist.is_initialized()


def test_a_thread_trains(config: Any) -> None:
    found: list[notus.Result] = []
    thread = threading.Thread(target=lambda: found.append(notus.train(config(training__max_steps=1), train=rows())))
    thread.start()
    thread.join()
    assert found[0].finished


def test_importing_notus_imports_no_torch() -> None:
    check = "import notus, sys; dir(notus); notus.Config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    for name in notus.__all__:
        assert getattr(notus, name).__module__.startswith("notus.")
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        notus.trane  # type: ignore[attr-defined]  # noqa: B018


# ---- scoring ----


def expected_logps(model: torch.nn.Module, prompt: str, completion: str) -> tuple[float, int]:
    """What transformers' own forward says of a completion and the end-of-sequence token, and how many tokens it has."""
    tokenizer = toy_tokenizer()
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor(tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id])
    was_training = model.training
    with torch.no_grad():
        logps = model.eval()(ids[None]).logits[0].double().log_softmax(-1)
    model.train(was_training)
    return logps[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum().item(), len(ids) - start


def expected_scores(model: torch.nn.Module, pairs: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    found = [[expected_logps(model, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in pairs]
    return torch.tensor(found)[..., 0], torch.tensor(found)[..., 1].long()


def snapshot(model: torch.nn.Module) -> list[Any]:
    """All that scoring could change of a model."""
    modules = [
        (name, type(each), each.training, sorted(vars(each)), "forward" in vars(each))
        for name, each in model.named_modules()
    ]
    places = [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()]
    return [modules, places, model.config.to_dict(), model.config._attn_implementation]


@pytest.mark.parametrize("path", ["packed", "plain"])
def test_scores_are_those_of_transformers_own_forward(path: str) -> None:
    model, pairs = toy_model("llama").train(), rows(7)
    hooks = []
    if path == "plain":  # what a hook does is not known to the packed path
        hooks.append(model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5))
    before = snapshot(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = notus.score(model, toy_tokenizer(), pairs)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert scores.path == path
    assert (scores.path_reason is None) == (path == "packed")
    logps, tokens = expected_scores(model, pairs)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.tokens, tokens)
    assert torch.equal(scores.chosen, scores.logps[:, 0])
    with pytest.raises(ValueError, match="pass reference="):
        _ = scores.margins


def test_rewards_are_relative_to_the_reference(model_folder: Path) -> None:
    pairs, policy = rows(5), toy_model(seed=1)
    scores = notus.score(policy, toy_tokenizer(), datasets.Dataset.from_list(pairs), reference=model_folder, beta=0.3)
    (policy_logps, _), (reference_logps, _) = (expected_scores(each, pairs) for each in (policy, toy_model()))
    torch.testing.assert_close(scores.reference_logps, reference_logps, rtol=1e-5, atol=1e-5)
    rewards = 0.3 * (policy_logps - reference_logps)
    torch.testing.assert_close(scores.rewards, rewards, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.margins, rewards[:, 0] - rewards[:, 1], rtol=1e-4, atol=1e-5)
    by_path = notus.score(str(model_folder), None, pairs, reference=toy_model())
    torch.testing.assert_close(by_path.rewards, torch.zeros(5, 2), rtol=0, atol=1e-5)


def test_prompts_with_one_completion_and_rows_that_are_dropped() -> None:
    model = toy_model()
    pairs = [("the quick", " fox"), ("a poem", ""), ("the sea", " hello world")]
    scores = notus.score(model, toy_tokenizer(), pairs)
    assert scores.rows.tolist() == [0, 2]
    assert "1" in str(scores.report)
    expected = [expected_logps(model, *pairs[index]) for index in (0, 2)]
    torch.testing.assert_close(scores.logps, torch.tensor([[each] for each, _ in expected]), rtol=1e-5, atol=1e-5)
    assert scores.tokens.tolist() == [[count] for _, count in expected]
    with pytest.raises(ValueError, match="not pairs"):
        _ = scores.rejected


def test_a_model_with_peft_adapters_is_scored_by_its_own_forward() -> None:
    import peft

    wrapped = peft.get_peft_model(toy_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    pairs = rows(3)
    scores = notus.score(wrapped, toy_tokenizer(), pairs)
    assert scores.path == "plain"
    torch.testing.assert_close(scores.logps, expected_scores(wrapped, pairs)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores.logps, expected_scores(toy_model(), pairs)[0], atol=0.1)
    with pytest.raises(ValueError, match="merge_and_unload"):
        notus.train({"training": {"output_dir": "nowhere"}}, model=wrapped, tokenizer=toy_tokenizer(), train=pairs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": []}, "holds no rows"),
        ({"pairs": [("a", "b"), ("a", "b", "c")]}, r"row 2: is not a tuple \(prompt, completion\)"),
        ({"pairs": [{"question": "a"}]}, "no known"),
        ({"tokenizer": None}, "^tokenizer: is required with this model, which does not say where it was loaded from"),
        ({"model": "nowhere/at all"}, "nowhere/at all"),
        ({"model": torch.nn.Linear(1, 1)}, r"^model: is a Linear"),
        ({"reference": 3}, r"^reference: is a int"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"pairs": [("the sea " * 200, " fox")]}, r"the context of model ends at 256.*set max_length"),
    ],
)
def test_scoring_names_what_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        notus.score(**{"model": toy_model(), "tokenizer": toy_tokenizer(), "pairs": rows(2), **given})
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


TWO_RANKS = """
import os, sys
import notus
from toys import toy_model, toy_tokenizer
from test_api import Notes, rows
import json

tree = json.loads(sys.argv[1])
stopped = notus.train(tree, model=toy_model(), tokenizer=toy_tokenizer(), train=rows(), callbacks=[Notes(stop_at=2)])
whole = notus.train(tree, model=toy_model(), tokenizer=toy_tokenizer(), train=rows())
scores = notus.score(toy_model(seed=1), toy_tokenizer(), rows(5), reference=whole.model_path)
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump([stopped.finished, whole.finished, scores.margins.tolist()], file)
"""


@pytest.mark.slow
def test_two_ranks_train_twice_and_score(tmp_path: Path, config: Any) -> None:
    tree = config()
    del tree["model"]
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    arguments = [json.dumps(tree), str(tmp_path / "out")]
    subprocess.run([*launch, *arguments], env={**os.environ, "PYTHONPATH": paths}, check=True)
    found = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][:2] == [False, True]
    alone = notus.train(config("alone"), train=rows())
    for line, expected in zip(notus.load_result(tmp_path / "run").metrics, alone.metrics, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    scores = notus.score(toy_model(seed=1), toy_tokenizer(), rows(5), reference=alone.model_path)
    torch.testing.assert_close(scores.margins, torch.tensor(found[0][2]), rtol=1e-3, atol=1e-3)
