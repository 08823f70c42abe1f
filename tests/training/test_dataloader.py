"""The rows that the loop gets: those of the plan, by cost, made ahead; and the thread that makes them."""

import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import config, write_pairs
from toys import toy_model_folder

from notus.data import batching as schedule
from notus.data.batching import StepPlan, step_rows
from notus.data.dataset import TokenizedDataset
from notus.model.flops import dimensions, forward_flops
from notus.training import dpo, trainer
from notus.training.dataloader import Dataloader, Prefetch, row_costs
from notus.training.setup import start

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path: Path):
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 11)
    with start(config("dpo", tmp_path / "run", model, pairs)) as found:
        yield found


def tokens(batches) -> list[list[int]]:
    """Of bare rows, or of a feed's, which come with whether they are the last."""
    return [(batch[0] if isinstance(batch, tuple) else batch).input_ids.tolist() for batch in batches]


def feed(rows: TokenizedDataset, costs: np.ndarray, plan: StepPlan, steps: range) -> Dataloader:
    return Dataloader(rows, costs, plan, steps, tokens_per_row=int(rows.lengths.max()), device=CPU)


def test_each_step_gets_its_rows_wherever_the_run_begins(job) -> None:
    rows, plan = job.train_rows, StepPlan(11, 4, seed=3)
    costs = row_costs(job.policy, rows)
    options = {"rank": 0, "world_size": 1, "tokens_per_row": int(rows.lengths.max())}
    expected = []
    for step in range(6):
        indices = plan.indices(step)
        expected.append(tokens(step_rows(rows, indices, costs=costs[indices], **options)))
    assert any(len(step) > 1 for step in expected)
    with feed(rows, costs, plan, range(6)) as whole:
        assert [tokens(whole.step()) for _ in range(6)] == expected
        assert whole.idle_share == 0  # a rank alone waits for nobody
    with feed(rows, costs, plan, range(4, 6)) as resumed:
        assert [tokens(resumed.step()) for _ in range(2)] == expected[4:]


def test_the_last_row_of_a_step_is_known_as_such(job) -> None:
    rows, plan = job.train_rows, StepPlan(11, 4, seed=3)
    with feed(rows, row_costs(job.policy, rows), plan, range(3)) as whole:
        for _ in range(3):
            lasts = [last for _, last in whole.step()]
            assert lasts == [False] * (len(lasts) - 1) + [True]


def test_costs_are_the_necessary_operations(job) -> None:
    rows = job.train_rows
    expected = forward_flops(
        dimensions(job.policy.causal_lm), rows.trunk_lengths, rows.branch_lengths, rows.loss_tokens.sum(axis=1)
    )
    assert row_costs(job.policy, rows).tolist() == expected.tolist()
    some = np.array([7, 2])
    assert row_costs(job.policy, rows, some).tolist() == expected[some].tolist()


def test_idle_share_is_that_of_the_heavier_rank(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notus.training.dataloader.world_size", lambda: 2)
    plan = StepPlan(3, 3, shuffle=False)
    costs = np.array([5, 3, 1] + [0] * 8)
    with Dataloader(job.train_rows, costs, plan, range(1), tokens_per_row=1000, device=CPU) as one:
        assert len(list(one.step())) == 1
        assert one.idle_share == pytest.approx(1 / 10)  # ranks of 5 and 4


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def run(tmp_path: Path, **overrides: object) -> None:
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 12)
    dpo.run(config("dpo", tmp_path / "run", model, pairs, **overrides))


def test_the_thread_makes_rows_during_the_run_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, update = [], trainer.clipped_update
    monkeypatch.setattr(trainer, "clipped_update", lambda *args: (seen.append(len(prefetching())), update(*args))[1])
    run(tmp_path)
    assert seen == [1, 1, 1]
    assert prefetching() == []
    told = capsys.readouterr().out
    assert "packing: 0.00% padding" in told
    assert "rank" not in told  # there is one


def test_the_thread_ends_with_a_run_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(trainer.NonFiniteError):
        run(tmp_path, training__learning_rate=1e30)
    assert prefetching() == []


def test_an_error_on_the_thread_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collate = schedule.collate

    def broken(examples, num_branches):
        if threading.current_thread() in prefetching() and 7 in [example.index for example in examples]:
            raise KeyError("a broken row")
        return collate(examples, num_branches)

    monkeypatch.setattr(schedule, "collate", broken)
    with pytest.raises(KeyError, match="a broken row"):
        run(tmp_path)
    assert prefetching() == []


# --- the thread alone: `Prefetch` ---


def test_all_items_come_in_order_from_another_thread() -> None:
    where = []

    def items() -> Iterator[int]:
        for number in range(9):
            where.append(threading.current_thread())
            yield number

    with Prefetch(items(), prepare=lambda: where.append(threading.current_thread())) as ready:
        assert list(ready) == list(range(9))
        assert list(ready) == []
    assert len(where) == 10
    assert set(where).isdisjoint([threading.current_thread()])
    assert len(set(where)) == 1
    assert prefetching() == []


def test_the_next_items_are_made_while_one_is_in_use_and_no_more_than_asked_for() -> None:
    made, third = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with Prefetch(items(), ahead=2) as ready:
        assert next(ready) == 0
        assert third.wait(10)  # nobody has asked for 1 or 2
        time.sleep(0.05)
        assert made == [0, 1, 2]
    assert made == [0, 1, 2]
    assert prefetching() == []


def test_an_error_comes_in_its_place_with_its_own_traceback() -> None:
    def this_fails() -> None:
        raise OSError("the disk is gone")

    def items() -> Iterator[int]:
        yield 1
        this_fails()

    with Prefetch(items()) as ready:
        assert next(ready) == 1
        with pytest.raises(OSError, match="the disk is gone") as caught:
            next(ready)
    assert "this_fails" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert prefetching() == []


def test_the_wait_is_measured() -> None:
    def items(seconds: float) -> Iterator[int]:
        for number in range(3):
            time.sleep(seconds)
            yield number

    with Prefetch(items(0.1)) as slow:
        list(slow)
    with Prefetch(items(0.0)) as quick:
        for _ in quick:
            time.sleep(0.1)
    assert 0.28 < slow.waited < 3
    assert quick.waited < 0.1
