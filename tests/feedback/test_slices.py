"""Which prompts each round takes."""

import json

import pytest
from toy_iterations import read_lines, write_prompts

from notus.evaluation.prompts import read_prompts
from notus.feedback.slices import keys_of, prompt_key, read_pool
from notus.feedback.slices import write_prompts as write_slice


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_rounds_take_different_prompts_and_the_same_again(tmp_path):
    pool = read_pool(write_prompts(tmp_path / "p.txt", 12), None)
    used: set[str] = set()
    drawn = []
    for number in (1, 2, 3):
        drawn.append(pool.draw(number, 4, used, seed=1))
        assert texts(drawn[-1]) == texts(pool.draw(number, 4, used, seed=1))
        used |= {prompt_key(prompt) for prompt in drawn[-1]}
    assert len({text for prompts in drawn for text in texts(prompts)}) == 12
    assert texts(drawn[0]) != texts(pool.draw(1, 4, (), seed=2))
    assert texts(drawn[0]) != texts(pool.prompts.values())[:4]


def test_repeated_and_evaluation_prompts_are_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": "a"}], "id": 7},
        {"prompt": "b"},
        {"prompt": "c"},
    ]
    path, held_out = tmp_path / "p.jsonl", tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps({"instruction": "c"}) + "\n" + json.dumps({"prompt": "d"}) + "\n")
    pool = read_pool(path, held_out)
    assert texts(pool.prompts.values()) == ["a", "b"]
    assert (pool.repeated, pool.held_out) == (1, 1)
    assert next(iter(pool.prompts.values())).row == {"prompt": "a"}  # the first of the two


def test_tools_make_another_prompt_and_template_settings_do_not(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"prompt": "a"}, {"prompt": "a", "tools": [tool]}, {"prompt": "a", "chat_template_kwargs": {"x": 1}}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_pool(path, None).prompts) == 2


@pytest.mark.parametrize(
    ("rounds", "per_round", "used", "message"),
    [
        (3, 4, 0, r"10 prompts are too few for 3 rounds of 4: .*iterate.prompts_per_round=3 or fewer iterate.rounds"),
        (2, 4, 4, r"6 prompts \(without those 4 used by earlier rounds\) are too few for 2 rounds of 4"),
        (11, 0, 0, r"10 prompts are too few for 11 rounds of 1"),
    ],
)
def test_too_few_prompts_are_named_with_the_numbers(tmp_path, rounds, per_round, used, message):
    pool = read_pool(write_prompts(tmp_path / "p.txt", 10), None)
    with pytest.raises(ValueError, match=message):
        pool.check(rounds, per_round, used)
    pool.check(2, 5)
    pool.check(1, 6, 4)


def test_a_slice_keeps_rows_and_adds_their_source_and_template_settings(tmp_path):
    rows = [
        {"prompt": "a", "id": 3},
        {"prompt": "b", "source": "mine", "chat_template_kwargs": {"thinking": True}},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path, strings_are_turns=True)
    out = tmp_path / "new" / "slice.jsonl"
    write_slice(out, prompts, path, {"thinking": False, "x": 1})
    assert read_lines(out) == [
        {"source": "p.jsonl", "prompt": "a", "id": 3, "chat_template_kwargs": {"thinking": False, "x": 1}},
        {"source": "mine", "prompt": "b", "chat_template_kwargs": {"thinking": True, "x": 1}},
    ]
    assert keys_of(out) == {prompt_key(prompt) for prompt in prompts}
    write_slice(out, prompts[:1], path, {})
    assert read_lines(out) == [{"source": "p.jsonl", "prompt": "a", "id": 3}]
