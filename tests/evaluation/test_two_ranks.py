"""The commands on two ranks under torchrun give what one process gives, and report a mistake once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from notus.__main__ import main

# One process group for all the commands: starting the ranks costs more than what they do.
WORKER = """
import contextlib, json, sys
from notus.__main__ import main
from notus.runtime import distributed

with distributed.process_group() as device:
    distributed.process_group = lambda: contextlib.nullcontext(device)
    codes = [main(command) for command in json.loads(sys.argv[1])]
assert codes == [0, 0, 0, 0, 1], codes
"""


def torchrun(folder: Path, commands: list[list[str]]) -> subprocess.CompletedProcess:
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [*command, str(script), json.dumps(commands)],
        env={**os.environ, **own, "HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON tree, by its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, int | float):
        yield path, float(tree)


def test_two_ranks_do_the_work_of_one(tmp_path, lora_run, pairs_file):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\na\nwrite a poem about the sea\nhello world\ndog\n")

    lists = tmp_path / "lists.jsonl"
    rows = [
        {
            "prompt": "the quick",
            "completions": [" fox", " brown dog", " sea"][: 2 + n % 2],
            "ratings": [1, n, 2][: 2 + n % 2],
        }
        for n in range(2, 7)
    ]
    lists.write_text("\n".join(map(json.dumps, rows)))

    def commands(ending):
        draw = ["--temperature", "2", "--batch-size", "2", "--max-new-tokens", "6"]
        return [
            [
                "evaluate",
                str(lora_run),
                "--pairs",
                str(pairs_file),
                "--output",
                str(tmp_path / f"{ending}.json"),
                "--kl-samples",
                "7",
                "--kl-max-new-tokens",
                "9",
            ],
            ["generate", str(lora_run), str(prompts), str(tmp_path / f"{ending}.jsonl"), *draw],
            ["evaluate", str(lora_run), "--pairs", str(lists), "--output", str(tmp_path / f"{ending}-lists.json")],
            [
                "sample",
                str(prompts),
                str(tmp_path / f"{ending}-records.jsonl"),
                "--models",
                str(lora_run),
                "--n",
                "2",
                *draw,
            ],
            ["evaluate", str(lora_run), "--pairs", str(tmp_path / "none.jsonl")],
        ]

    done = torchrun(tmp_path, commands("two"))
    assert done.returncode == 0, done.stderr
    assert [main(command) for command in commands("one")] == [0, 0, 0, 0, 1]
    for kind, fewest in (("", 60), ("-lists", 50)):
        alone, together = (json.loads((tmp_path / f"{name}{kind}.json").read_text()) for name in ("one", "two"))
        numbers, of_both = dict(leaves(alone)), dict(leaves(together))
        assert len(numbers) > fewest
        assert numbers.keys() == of_both.keys()
        for key, number in numbers.items():
            assert of_both[key] == pytest.approx(number, rel=1e-4, abs=1e-6), key
    for kind in (".jsonl", "-records.jsonl"):
        assert (tmp_path / f"two{kind}").read_text() == (tmp_path / f"one{kind}").read_text()
    assert done.stdout.count("sigmoid loss") == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "none.jsonl" in errors[0]
