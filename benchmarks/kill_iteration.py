"""Kill `notus iterate` at random moments, start it again, and compare what it made with an undisturbed iteration.

    python benchmarks/kill_iteration.py --kills 20 --output benchmarks/results/kill-iteration.json

A small model of random weights, two rounds, a Python judge. Each disturbed iteration is killed several times, and the
same command continues it. Its pairs, its records and its models must then be those of the undisturbed one, bit for bit.

The kills are spread over sampling, rating and training. To import torch takes longer than such a small stage. So the
command and its stages are forked from this process, which has imported it, and most moments count from when a stage's
first results are on disk.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

JUDGE = """
import time
import zlib


def rate(prompt, completions):
    time.sleep(0.1)
    return [1 + zlib.crc32(completion.encode()) % 5 for completion in completions]
"""
# What is killed: the command alone, whose stage then ends by itself; its stage alone; all at once, as a machine that
# loses power; or the command is asked to stop, as a scheduler does.
WAYS = ("command", "stage", "all", "asked")
PATIENCE = 600.0
AT_START = 0.15  # share of the kills whose moment counts from the start of a stage, not from its first results
STAGES = ("sample", "rate", "dpo")  # the stages that kills are aimed at


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was killed, and what the iteration was doing then."""

    way: str
    stage: str
    done: int  # the lines that the stage had on disk: completions, verdicts or steps; 0 for other stages
    code: int  # the command's exit code; a signal's number, negative


def make_inputs(folder: Path, *, rounds: int, evaluate: bool, prompts_per_round: int = 32) -> Path:
    """Write a model, prompts, a judge and a config to `folder`; return the config."""
    from notus.config import dump_yaml
    from notus.curation import synthetic
    from notus.demo import make_base

    make_base(folder / "start", seed=1)
    train, held_out = synthetic.make_prompts([rounds * prompts_per_round, 4], seed=1)
    for name, prompts in (("prompts", train), ("eval", held_out)):
        (folder / f"{name}.txt").write_text("".join(f"{prompt.instruction}\n" for prompt in prompts))
    (folder / "judge.py").write_text(JUDGE)
    iterate: dict[str, Any] = {
        "prompts": str(folder / "prompts.txt"),
        "rounds": rounds,
        "kl_samples": 4 if evaluate else 0,
    }
    if evaluate:
        iterate["eval_prompts"] = str(folder / "eval.txt")
    config = {
        "iterate": iterate,
        "sample": {"n": 4, "max_new_tokens": 16, "batch_size": 4},
        "rate": {"judge_function": f"{folder / 'judge.py'}:rate"},
        "curate": {},
        "model": {"name_or_path": str(folder / "start")},
        "data": {"max_length": 128, "chat_template": "zephyr", "cache_dir": str(folder / "cache")},
        "training": {
            "output_dir": str(folder / "undisturbed"), "batch_size": 2, "epochs": 2, "save_every": 2,
            "precision": "fp32", "learning_rate": 1e-4, "activation_checkpointing": "none",
        },
        "tracking": {"samples": 0},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config))
    return path


def aimed_at(rounds: int) -> list[str]:
    """Return the stages that kills are aimed at, in order, as the command names them."""
    return [f"round {number}, {stage}" for number in range(1, rounds + 1) for stage in STAGES]


def done(output: Path, stage: str) -> int:
    """Return how many lines of its results a stage has on disk while it runs."""
    from notus.feedback.records import kept_folder
    from notus.feedback.rounds import RATED, RECORDS, RUN

    number, _, name = stage.removeprefix("round ").partition(", ")
    folder = output / f"round-{number}"
    patterns = {
        "sample": (kept_folder(folder / RECORDS), "model-*/rank-*.jsonl"),
        "rate": (kept_folder(folder / RATED), "verdicts-*.jsonl"),
        "dpo": (folder / RUN, "metrics.jsonl"),
    }
    if name not in patterns:
        return 0
    where, pattern = patterns[name]
    count = 0
    for path in where.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # the stage has just ended
            count += path.read_bytes().count(b"\n")
    return count


def digests(output: Path) -> dict[str, str]:
    """Return the content of all that must be the same: prompts, records, ratings, pairs, models and figures."""
    wanted = ["round-*/*.jsonl", "round-*/run/model/*.safetensors", "start/*.jsonl"]
    paths = sorted(path for pattern in wanted for path in output.glob(pattern))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Forked:
    """`notus WORDS` in a process forked from this one, with the interface of `subprocess.Popen` that is needed."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        process_group: int | None = None,
        preexec_fn: Callable[[], object] = lambda: None,
    ) -> None:
        """Start it; `command` is that of a new interpreter."""
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number in (signal.SIGTERM, signal.SIGINT):  # as a new interpreter has them
                    signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
                if process_group is not None:
                    os.setpgid(0, process_group)
                preexec_fn()
                os.environ.update(env)
                sys.argv = list(command[command.index("notus") :])
                run_notus()
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)  # not reached by a command that ended well

    def poll(self) -> int | None:
        """Return the exit code, a signal's number negative; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("notus", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def run_notus() -> None:
    """Run the command of `sys.argv`, whose stages are forked, and end the process."""
    from notus.__main__ import entry

    with mock.patch("notus.runtime.children.subprocess", types.SimpleNamespace(Popen=Forked)):
        entry()


def warm_up(folder: Path) -> None:
    """Import what the stages will, but compute nothing: threads would not survive the fork."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(folder / "start")
    for name in ("feedback.local_sampling", "feedback.sample", "feedback.rate", "curation.command", "training.dpo"):
        importlib.import_module(f"notus.{name}")


@dataclasses.dataclass
class Launched:
    """A command under way in a session of its own, with its output in a file."""

    process: Forked
    log: Path

    def others(self) -> list[int]:
        """Return the ids of living processes that it started, directly or not."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(session) == self.process.pid:
                    found.append(int(path.name))
        return sorted(set(found) - {self.process.pid})

    def stage(self) -> str:
        """Return the last stage that it named."""
        named = re.findall(r"^== (.*?)(?:: complete already)?$", self.log.read_text(errors="replace"), re.MULTILINE)
        return named[-1] if named else "start"

    def wait_for(self, stage: str, output: Path, *, results: bool) -> None:
        """Wait until it has started a stage or, with `results`, has new results of it; or until it has ended."""
        named = re.compile(f"^== {stage}(: complete already)?$", re.MULTILINE)
        before = done(output, stage)
        while self.process.poll() is None:
            found = named.search(self.log.read_text(errors="replace"))
            if found and (found[1] or not results or done(output, stage) != before):
                return
            time.sleep(0.02)

    def kill(self, way: str) -> None:
        """Kill it in one of `WAYS`."""
        victims = {"command": [self.process.pid], "asked": [self.process.pid], "stage": self.others()}
        number = signal.SIGTERM if way == "asked" else signal.SIGKILL
        for pid in victims.get(way, [self.process.pid, *self.others()]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        """Wait until it and all that it started have ended; return its exit code."""
        code = self.process.wait(timeout=PATIENCE)
        end = time.monotonic() + PATIENCE
        while self.others():
            assert time.monotonic() < end, f"{self.others()} stay behind"
            time.sleep(0.05)
        return code


def launch(config: Path, output: Path, log: Path) -> Launched:
    """Start an iteration, or continue it."""

    def alone() -> None:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    words = ["notus", "iterate", str(config), f"--training.output_dir={output}"]
    log.write_bytes(b"")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Launched(Forked(words, environment, preexec_fn=alone), log)


def undisturbed(config: Path, output: Path, log: Path, rounds: int) -> dict[str, float]:
    """Run the command undisturbed; return for how many seconds the results of each stage grew."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    seen = dict.fromkeys(aimed_at(rounds), 0)
    launched = launch(config, output, log)
    while launched.process.poll() is None:
        for stage, before in seen.items():
            if (now := done(output, stage)) != before:
                seen[stage], ended[stage] = now, time.monotonic()
                began.setdefault(stage, ended[stage])
        time.sleep(0.02)
    if launched.wait() != 0:
        raise RuntimeError(log.read_text(errors="replace")[-2000:])
    return {stage: ended[stage] - began[stage] for stage in began}


def disturb(
    config: Path, output: Path, log: Path, dice: random.Random, aims: list[str], seconds: dict[str, float]
) -> Iterator[Kill]:
    """Kill a command once in each stage of `aims`, then let it end. Raises RuntimeError if it does not end well.

    `seconds`: how long the results of each stage grow in an undisturbed iteration.
    """
    for aim in aims:
        launched = launch(config, output, log)
        launched.wait_for(aim, output, results=dice.random() >= AT_START)
        try:
            launched.process.wait(timeout=dice.uniform(0.0, seconds[aim] / aims.count(aim)))
        except subprocess.TimeoutExpired:
            stage, way = launched.stage(), dice.choice(WAYS)
            lines = done(output, stage)
            if way == "stage" and not launched.others():
                way = "all"
            launched.kill(way)
            if (code := launched.wait()) == 0:
                return  # it ended by itself at this moment
            yield Kill(way, stage, lines, code)
        else:
            break  # it is complete: later moments have nothing to kill
    if (code := launch(config, output, log).wait()) != 0:
        raise RuntimeError(f"exit code {code}: {log.read_text(errors='replace')[-2000:]}")


def draw_aims(dice: random.Random, rounds: int, kills: int) -> list[str]:
    """Draw the stages of an iteration's kills, in order; their numbers differ by 1 at most."""
    stages = range(len(aimed_at(rounds)))
    whole, rest = divmod(kills, len(stages))
    return [aimed_at(rounds)[place] for place in sorted([*stages] * whole + dice.sample(stages, rest))]


def measure(
    folder: Path,
    *,
    kills: int,
    each: int = 10,
    seed: int = 0,
    rounds: int = 2,
    evaluate: bool = False,
) -> dict[str, Any]:
    """Kill iterations until there were `kills`, `each` of them in one iteration; return what came of it."""
    config = make_inputs(folder, rounds=rounds, evaluate=evaluate)
    warm_up(folder)
    began, dice = time.monotonic(), random.Random(seed)
    output = folder / "undisturbed"
    seconds = undisturbed(config, output, folder / "undisturbed.log", rounds)
    print({stage: round(each, 1) for stage, each in seconds.items()}, flush=True)
    whole, expected = time.monotonic() - began, digests(output)
    found: list[Kill] = []
    different: list[str] = []
    iterations = 0
    while len(found) < kills:
        iterations += 1
        output = folder / f"disturbed-{iterations}"
        log = folder / f"{output.name}.log"
        aims = draw_aims(dice, rounds, min(each, kills - len(found)))
        for kill in disturb(config, output, log, dice, aims, seconds):
            found.append(kill)
            print(f"kill {len(found)}: {kill}", flush=True)
        different += [f"{output.name}/{name}" for name in compare(digests(output), expected)]
        print(f"{output.name}: {different or 'the same'}", flush=True)
    return {
        "kills": [dataclasses.asdict(kill) for kill in found],
        "iterations": iterations,
        "files": len(expected),
        "different": different,
        "undisturbed_seconds": round(whole, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def compare(made: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the files that are not the same."""
    return [name for name in sorted(made.keys() | expected.keys()) if made.get(name) != expected.get(name)]


def main() -> int:
    """Measure and print; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each", type=int, default=10, help="kills of one iteration (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="also compare answers and measure the KL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-iteration"), help="a new folder")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    result = measure(
        args.folder.absolute(),
        kills=args.kills,
        each=args.each,
        seed=args.seed,
        rounds=args.rounds,
        evaluate=args.evaluate,
    )
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
