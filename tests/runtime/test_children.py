"""Command lines of this project's own commands."""

import sys

from torch.distributed.run import parse_args

from notus.runtime.children import notus_command


def test_torchrun_leaves_a_commands_options_to_it():
    words = ["sample", "p.jsonl", "o.jsonl", "--models", "m", "--n=1", "--with", "x"]
    command = notus_command(words, 2)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    found = parse_args(command[3:])
    assert (found.module, found.training_script, found.training_script_args) == (True, "notus", words)
    assert found.nproc_per_node == "2"


def test_without_ranks_it_is_plain_python():
    assert notus_command(["report", "x"]) == [sys.executable, "-m", "notus", "report", "x"]
