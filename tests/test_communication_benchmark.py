"""What ranks send in a row: counted on fake ranks, as the estimate has it."""

import sys
from pathlib import Path

import pytest
from transformers import MistralConfig

from notus.estimate.plan import moved_bytes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import communication
from estimator import SHAPES, Case, size_of


@pytest.mark.parametrize("mode", ["none", "products"])
def test_the_estimate_moves_the_bytes_that_the_collectives_move(mode):
    size = size_of(MistralConfig(**SHAPES["mid"]), Case(0, "none", "rmsprop"))
    events = communication.count("mid", mode)
    found = {kind: [event.size for event in events if event.kind == kind] for kind in ("gather", "reduce")}
    assert (sum(found["gather"]), sum(found["reduce"])) == moved_bytes(size, precision="bf16", backward=True)
    # each block twice and the root once; every gradient once, the root's last
    assert len(found["gather"]) == 2 * size.layers + 1
    assert len(found["reduce"]) == size.layers + 1
    assert found["reduce"][-1] == 4 * size.root


def test_a_block_is_gathered_before_the_one_ahead_of_it_computes_its_gradients():
    backward = [event.kind for event in communication.count("mid") if event.backward]
    # Of the head 6 products (two a chunk of 1,024 tokens, and those computed again), then by block 14; the gathering of
    # the next block stands before them, and the reduction behind.
    following = "".join(kind[0] for kind in backward[backward.index("gather") :])
    blocks = [part.count("p") for part in following.split("g")[2:]]
    assert blocks == [14, 14, 14 + 14]
