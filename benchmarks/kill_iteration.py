"""Kill `notus iterate` at random moments, start it again, and compare what it made with an undisturbed iteration.

    python benchmarks/kill_iteration.py --kills 20 --output benchmarks/results/kill-iteration.json

A small model of random weights, two rounds, a Python judge. Each disturbed iteration is killed several times, and the
same command continues it. Its pairs, its records and its models must then be those of the undisturbed one, bit for bit.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT

MARK = "NOTUS_KILL_MARK"
JUDGE = """
import zlib


def rate(prompt, completions):
    return [1 + zlib.crc32(completion.encode()) % 5 for completion in completions]
"""
# What is killed: the command alone, whose stage then ends by itself; its stage alone; all at once, as a machine that
# loses power; or the command is asked to stop, as a scheduler does.
WAYS = ("command", "stage", "all", "asked")
PATIENCE = 600.0
AT_START = 0.15  # share of the kills whose moment counts from the start of the process, not from its first stage


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was killed, and what the iteration was doing then."""

    way: str
    stage: str
    seconds: float  # after its start, or after its first stage began
    code: int  # the command's exit code; a signal's number, negative


def make_inputs(folder: Path, *, rounds: int, evaluate: bool) -> Path:
    """Write a model, prompts, a judge and a config to `folder`; return the config."""
    from notus.config import dump_yaml
    from notus.curation import synthetic
    from notus.demo import make_base

    make_base(folder / "start", seed=1)
    train, held_out = synthetic.make_prompts([24, 4], seed=1)
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
        "sample": {"n": 4, "max_new_tokens": 16, "batch_size": 8},
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


def command(config: Path, output: Path, ranks: int | None) -> list[str]:
    """Return the command line of an iteration."""
    words = [sys.executable, "-m", "notus", "iterate", str(config), f"--training.output_dir={output}"]
    return words if ranks is None else [*words, f"--nproc-per-node={ranks}"]


def digests(output: Path) -> dict[str, str]:
    """Return the content of all that must be the same: prompts, records, ratings, pairs, models and figures."""
    wanted = ["round-*/*.jsonl", "round-*/run/model/*.safetensors", "start/*.jsonl"]
    paths = sorted(path for pattern in wanted for path in output.glob(pattern))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@dataclasses.dataclass
class Launched:
    """A command under way, with its output in a file."""

    process: "subprocess.Popen[bytes]"
    log: Path
    mark: str

    def others(self) -> list[int]:
        """Return the ids of living processes that it started, directly or not."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self.mark.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return sorted(set(found) - {self.process.pid})

    def stage(self) -> str:
        """Return the last stage that it named."""
        named = re.findall(r"^== (.*?)(?:: complete already)?$", self.log.read_text(errors="replace"), re.MULTILINE)
        return named[-1] if named else "start"

    def wait_for_stage(self) -> None:
        """Wait until it runs a stage, or has ended."""
        pattern = re.compile(r"^== (?!.*: complete already$)", re.MULTILINE)
        while self.process.poll() is None and not pattern.search(self.log.read_text(errors="replace")):
            time.sleep(0.05)

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


def launch(words: list[str], log: Path) -> Launched:
    """Start a command."""
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return Launched(process, log, mark)


def disturb(words: list[str], log: Path, dice: random.Random, kills: int, seconds: float) -> Iterator[Kill]:
    """Kill a command so many times, then let it end. Raises RuntimeError if it does not end well.

    `seconds`: how long it takes undisturbed.
    """
    done = 0
    while done < kills:
        launched = launch(words, log)
        if dice.random() >= AT_START:  # its start-up alone may take longer than a stage
            launched.wait_for_stage()
        moment = dice.uniform(0.0, 2 * seconds / kills)
        try:
            launched.process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            stage, way = launched.stage(), dice.choice(WAYS)
            if way == "stage" and not launched.others():
                way = "all"
            launched.kill(way)
            code = launched.wait()
            if code == 0 and launched.stage() == stage and way != "command":
                return  # it ended by itself at this moment
            done += 1
            yield Kill(way, stage, round(moment, 2), code)
        else:
            break  # it is complete: later moments have nothing to kill
    if (code := launch(words, log).wait()) != 0:
        raise RuntimeError(f"exit code {code}: {log.read_text(errors='replace')[-2000:]}")


def measure(
    folder: Path,
    *,
    kills: int,
    each: int = 5,
    seed: int = 0,
    ranks: int | None = None,
    rounds: int = 2,
    evaluate: bool = False,
) -> dict[str, Any]:
    """Kill iterations until there were `kills`, `each` of them in one iteration; return what came of it."""
    config = make_inputs(folder, rounds=rounds, evaluate=evaluate)
    began, dice = time.monotonic(), random.Random(seed)
    output = folder / "undisturbed"
    if launch(command(config, output, ranks), folder / "undisturbed.log").wait() != 0:
        raise RuntimeError((folder / "undisturbed.log").read_text(errors="replace")[-2000:])
    seconds, expected = time.monotonic() - began, digests(output)
    found: list[Kill] = []
    different: list[str] = []
    while len(found) < kills:
        output = folder / f"disturbed-{len(found)}"
        log = folder / f"{output.name}.log"
        words = command(config, output, ranks)
        for kill in disturb(words, log, dice, min(each, kills - len(found)), seconds):
            found.append(kill)
            print(f"kill {len(found)}: {kill}", flush=True)
        made = digests(output)
        different += [
            f"{output.name}/{name}" for name in sorted(made.keys() | expected) if made.get(name) != expected.get(name)
        ]
    return {
        "kills": [dataclasses.asdict(kill) for kill in found],
        "files": len(expected),
        "different": different,
        "undisturbed_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "ranks": ranks or 1,
    }


def main() -> int:
    """Measure and print; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each", type=int, default=5, help="kills of one iteration (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="also compare answers and measure the KL")
    parser.add_argument("--ranks", type=int, help="under torchrun on as many")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-iteration"), help="a new folder")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    result = measure(
        args.folder.absolute(),
        kills=args.kills,
        each=args.each,
        seed=args.seed,
        ranks=args.ranks,
        evaluate=args.evaluate,
    )
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
