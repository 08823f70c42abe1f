"""Kept work: what a killed process left is found again, whole records alone; a resumed generation is `generate`'s."""

import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from disks import largest_file
from ranks import run_ranks
from toys import toy_model, toy_tokenizer

from notus.evaluation import generation
from notus.evaluation.generation import generate, generate_kept, model_digest
from notus.evaluation.kept import keep, read_kept

PROMPTS = ["The quick brown fox", "a", "Write a poem about the sea", "hello world", "12 + 30 =", "dog", "a", "yes"]
GREEDY = {"max_new_tokens": 6, "batch_size": 3}
DRAWN = {**GREEDY, "temperature": 2.0, "seed": 5}


def test_records_come_back_and_a_torn_line_does_not(tmp_path):
    path = tmp_path / "new" / "kept.jsonl"
    assert read_kept(path) == []
    keep(path, [{"a": 1}, {"b": "é\n"}])
    path.write_bytes(path.read_bytes() + b'{"torn": "' + b"x" * 70_000)  # longer than the block that is read
    assert read_kept(path) == [{"a": 1}, {"b": "é\n"}]
    keep(path, [{"c": 3}])
    assert read_kept(path) == [{"a": 1}, {"b": "é\n"}, {"c": 3}]
    path.write_bytes(b'{"torn')
    keep(path, [{"d": 4}])
    assert path.read_bytes() == b'{"d": 4}\n'


@pytest.mark.parametrize("line", [b"notes", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"kept.jsonl, line 2: not a record of kept work"):
        read_kept(path)


def test_what_another_process_is_appending_is_no_torn_line(tmp_path):
    path = tmp_path / "kept.jsonl"
    with path.open("ab", buffering=0) as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"a"')
        kept = pool.submit(keep, path, [{"b": 2}])
        time.sleep(0.3)
        other.write(b": 1}\n")
        fcntl.flock(other, fcntl.LOCK_UN)
        kept.result(timeout=60)
    assert read_kept(path) == [{"a": 1}, {"b": 2}]


def test_a_full_disk_is_told_with_the_file_and_what_was_kept_stays(tmp_path):
    path = tmp_path / "kept.jsonl"
    keep(path, [{"a": 1}])
    with largest_file(100), pytest.raises(OSError, match=r"kept.jsonl: cannot be written \(.*GB free"):
        keep(path, [{"b": "x" * 1000}])
    assert read_kept(path) == [{"a": 1}]


class Killed(BaseException):
    pass


def killed_after(monkeypatch, batches):
    """Let `generate` die when it begins the batch after that many; returns the batches that it computed."""
    computed = []
    complete = generation._complete

    def dying(causal_lm, batch, *rest):
        if len(computed) == batches:
            raise Killed
        computed.append(batch.indices)
        return complete(causal_lm, batch, *rest)

    monkeypatch.setattr(generation, "_complete", dying)
    return computed


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_a_killed_generation_goes_on(tmp_path, monkeypatch, options):
    model, tokenizer = toy_model(), toy_tokenizer()
    wanted = generate(model, tokenizer, PROMPTS, **options)
    arguments = (model, tokenizer, PROMPTS)
    kept = {"kept": tmp_path / "kept", "identity": "model"}
    for done, torn in ((1, False), (1, True)):
        with monkeypatch.context() as patch:
            computed = killed_after(patch, done)
            with pytest.raises(Killed):
                generate_kept(*arguments, **kept, **options)
        assert len(computed) == 1
        if torn:  # the process died within the write of its second batch
            file = kept["kept"] / "rank-0.jsonl"
            file.write_bytes(file.read_bytes()[:-5])
    with monkeypatch.context() as patch:
        computed = killed_after(patch, 99)
        assert generate_kept(*arguments, **kept, **options) == wanted
        assert len(computed) == 2  # of three: the first is kept whole, the second lost its last line
        assert generate_kept(*arguments, **kept, **options) == wanted
        assert len(computed) == 2


def test_only_the_same_work_is_found_again(tmp_path, monkeypatch):
    model, tokenizer = toy_model(), toy_tokenizer()
    computed = killed_after(monkeypatch, 99)

    def batches(prompts=PROMPTS[:2], identity="model", **options):
        before = len(computed)
        options = {"max_new_tokens": 4, "temperature": 1.0, **options}
        found = generate_kept(model, tokenizer, prompts, kept=tmp_path, identity=identity, **options)
        assert found == generate(model, tokenizer, prompts, **options)
        return len(computed) - before - 1  # without the one that `generate` computes

    assert batches() == 1
    assert batches() == 0
    assert batches(identity="other") == 1
    assert batches(seed=1) == 1
    assert batches(top_k=3) == 1
    assert batches(top_p=0.5) == 1
    assert batches(temperature=2.0) == 1
    assert batches(max_new_tokens=5) == 1
    assert batches(add_empty_system=True) == 0  # strings have no turns
    assert batches(PROMPTS[:3]) == 1  # a neighbour takes part in the draws
    assert batches(temperature=0) == 1
    assert batches(PROMPTS[1::-1], temperature=0) == 0  # but not in greedy completions
    assert batches(PROMPTS[:3], temperature=0) == 1
    assert batches(temperature=0, max_new_tokens=5) == 1


@pytest.mark.parametrize("line", [{"completion": "a"}, {"key": [], "ids": [1]}, {"key": "a", "ids": ["1"]}])
def test_a_file_of_something_else_is_named(tmp_path, line):
    (tmp_path / "rank-3.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"rank-3.jsonl, line 1: not a kept completion"):
        generate_kept(toy_model(), toy_tokenizer(), ["a"], kept=tmp_path, identity="", **GREEDY)


def resume(folder, reached, options):
    """On two ranks: what was kept so far, then the whole again, with how many batches were computed now."""
    model, tokenizer = toy_model(), toy_tokenizer()
    counts, complete = [], generation._complete
    generation._complete = lambda *given: counts.append(1) or complete(*given)
    found = generate_kept(model, tokenizer, PROMPTS, kept=folder, identity="model", **options)
    reached.mkdir(exist_ok=True)
    rank = torch.distributed.get_rank()
    (reached / f"{rank}.json").write_text(json.dumps([len(counts), found]))


def test_the_number_of_ranks_may_change(tmp_path, monkeypatch):
    model, tokenizer = toy_model(), toy_tokenizer()
    options = {**DRAWN, "batch_size": 2}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            generate_kept(model, tokenizer, PROMPTS, kept=tmp_path / "kept", identity="model", **options)
    run_ranks(resume, 2, tmp_path, tmp_path / "kept", tmp_path / "reached", options)
    wanted = generate(model, tokenizer, PROMPTS, **options)
    reached = [json.loads((tmp_path / "reached" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert reached == [[2, wanted], [1, wanted]]  # the three batches that were left
    computed = killed_after(monkeypatch, 0)
    assert generate_kept(model, tokenizer, PROMPTS, kept=tmp_path / "kept", identity="model", **options) == wanted
    assert computed == []


def disagree(folder, reached, identities, prompts):
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match="the ranks have different prompts or weights"):
        generate_kept(toy_model(), toy_tokenizer(), prompts[rank], kept=folder, identity=identities[rank], **GREEDY)
    (reached / str(rank)).touch()


@pytest.mark.parametrize(("identities", "prompts"), [("ab", ["a", "a"]), ("aa", ["a", "b"])])
def test_ranks_with_different_models_or_prompts_do_not_mix_completions(tmp_path, identities, prompts):
    run_ranks(disagree, 2, tmp_path, tmp_path / "kept", tmp_path, identities, prompts)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}


def test_the_digest_of_a_model_tells_weights_and_settings_apart():
    digest = model_digest(toy_model())
    assert model_digest(toy_model()) == digest
    with_bf16 = toy_model().to(torch.bfloat16)
    changed = toy_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    others = [toy_model(seed=1), toy_model(sliding_window=8), with_bf16, changed]
    assert digest not in {model_digest(model) for model in others}
