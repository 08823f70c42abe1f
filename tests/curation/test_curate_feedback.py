"""Curating what `notus rate` writes: rewards, conversations, one rating for everything, and old rows."""

import argparse
import json

import pytest

from notus.curation import command as curate
from notus.curation.old_rows import V1, Form, draw_old, row_digest
from notus.curation.ultrafeedback import ConversationError, curate_lists
from notus.curation.ultrafeedback import curate as curate_pairs
from notus.data.formats import normalize, readings

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def record(number=0, rewards=(0.5, -3.25, None), ratings=None, judge="mine", **more):
    """A record as `notus rate` writes it, scored by a reward model or, with `ratings`, by a judge."""
    completions = []
    for place, reward in enumerate(rewards if ratings is None else ratings):
        completion = {"model": f"m{place}", "response": f"answer {place} to {number}"}
        if ratings is None:
            completion |= {} if reward is None else {"reward": reward}
        else:
            completion["annotations"] = {"overall": {"Rating": str(reward), "Rationale": ""}}
        completions.append(completion)
    rated = {"judge": judge, "order": list(range(len(completions)))}
    return {"source": "s", "instruction": f"question {number}", "completions": completions, "rated": rated, **more}


def conversation(**more):
    return record(1, messages=TURNS, instruction="system: Be short.\n\nuser: Hi ...", **more)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(*arguments):
    parser = argparse.ArgumentParser()
    curate.add_arguments(parser)
    return curate.run(parser.parse_args([str(argument) for argument in arguments]))


def read(path):
    return [row for _, row in curate.read_file(path)]


def test_rewards_rank_as_they_are_negative_ones_too():
    (pair,), report = curate_pairs([record(rewards=(-7.5, None, -0.125, -3))], by="reward", seed=1)
    assert (pair["chosen_response"], pair["chosen_avg_rating"]) == ("answer 2 to 0", -0.125)
    assert pair["rejected_avg_rating"] in (-7.5, -3.0)
    assert (report.unscored, report.compared) == (1, 0)
    assert "overall_score" not in str(report)  # nothing to compare
    read = readings(pair, "dpo")[0]
    assert read.ratings == (-0.125, pair["rejected_avg_rating"])


def test_rewards_of_lists_reach_training_best_first():
    (row,), _ = curate_lists([record(rewards=(-7.5, None, 30.25, -3))], by="reward")
    assert row["ratings"] == [-7.5, 30.25, -3.0]
    (read,) = readings(row, "lists")
    assert read.ratings == (30.25, -3.0, -7.5)
    assert [turns[0]["content"] for turns in read.record.completions] == [
        "answer 2 to 0",
        "answer 3 to 0",
        "answer 0 to 0",
    ]


@pytest.mark.parametrize("reward", ["high", True, float("nan"), float("inf"), 1e31, [1.0]])
def test_a_reward_that_is_no_number_is_named(reward):
    with pytest.raises(ValueError, match=r"record 1: completions\[0\]: reward is .*, not a number"):
        curate_pairs([record(rewards=(reward, 1.0))], by="reward")
    curate_pairs([record(rewards=(reward, 1.0))])  # where it does not rank, it may be anything


def test_a_conversation_keeps_its_turns_tools_and_arguments():
    more = {"tools": TOOLS, "chat_template_kwargs": {"thinking": False}}
    records = [record(), conversation(**more)]
    (plain, pair), _ = curate_pairs(records, by="reward", schema="cleaned", conversations=True)
    read = normalize(pair, "dpo")
    assert read.prompt == TURNS
    assert list(read.completions) == [
        [{"role": "assistant", "content": "answer 0 to 1"}],
        [{"role": "assistant", "content": "answer 1 to 1"}],
    ]
    assert (read.tools, dict(read.template_kwargs)) == (TOOLS, {"thinking": False})
    simple = normalize(plain, "dpo")
    assert simple.prompt == [{"role": "user", "content": "question 0"}]
    assert (simple.tools, dict(simple.template_kwargs)) == (None, {})
    assert plain.keys() == pair.keys()  # one type of row for one file
    (_, row), _ = curate_lists(records, by="reward", conversations=True)
    as_list = normalize(row, "lists")
    assert (as_list.prompt, as_list.completions) == (read.prompt, read.completions)
    assert (as_list.tools, dict(as_list.template_kwargs)) == (TOOLS, {"thinking": False})


def test_a_conversation_needs_rows_that_hold_it():
    for only in ({"messages": TURNS}, {"tools": TOOLS}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(ConversationError, match="record 1: the prompt has messages, tools or"):
            curate_pairs([record(**only)], by="reward")
        with pytest.raises(ConversationError):
            curate_lists([record(**only)], by="reward")
    with pytest.raises(ValueError, match="for conversations choose 'cleaned'"):
        curate_pairs([], conversations=True)
    nothing = {"messages": None, "tools": [], "chat_template_kwargs": None}
    assert len(curate_pairs([record(**nothing)], by="reward")[0]) == 1


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "messages must be a list of the turns before the answer, not str"),
        ([], "messages must be a list"),
        ([{"role": "robot", "content": "x"}], "key 'messages', turn 1"),
        ([*TURNS, {"role": "assistant", "content": "Fine."}], "messages ends with an assistant turn"),
    ],
)
def test_messages_that_are_none_are_named(messages, said):
    with pytest.raises(ValueError, match=f"record 1: {said}"):
        curate_pairs([record(messages=messages)], by="reward", schema="cleaned", conversations=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("options", [[], ["--listwise"]])
def test_the_command_takes_the_schema_that_holds_conversations(tmp_path, capsys, suffix, options):
    records = [record(number) for number in range(3)] + [conversation(tools=TOOLS)]
    output = tmp_path / f"out{suffix}"
    command(lines(tmp_path / "in.jsonl", records), output, "--by", "reward", *options)
    rows, printed = read(output), capsys.readouterr().out
    assert len(rows) == 4
    assert ("note: prompts of more than one user turn need --schema cleaned" in printed) == (not options)
    task = "lists" if options else "dpo"
    assert [normalize(row, task).prompt for row in rows[2:]] == [[{"role": "user", "content": "question 2"}], TURNS]
    assert [normalize(row, task).tools for row in rows[2:]] == [None, TOOLS]


def test_schema_v1_is_an_error_where_it_cannot_hold_the_prompt(tmp_path):
    source = lines(tmp_path / "in.jsonl", [record(), conversation()])
    with pytest.raises(ValueError, match=r"in.jsonl, line 2: the prompt has .* which --schema v1 cannot hold"):
        command(source, tmp_path / "out.jsonl", "--by", "reward", "--schema", "v1")
    assert not (tmp_path / "out.jsonl").exists()


def test_parquet_has_no_type_for_calls_of_tools(tmp_path):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    turns = [
        TURNS[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "name": "now"},
    ]
    source = lines(tmp_path / "in.jsonl", [record(messages=turns, tools=TOOLS)])
    with pytest.raises(ValueError, match="a turn with 'tool_calls', for which Parquet has no type"):
        command(source, tmp_path / "out.parquet", "--by", "reward")
    command(source, tmp_path / "out.jsonl", "--by", "reward")
    (row,) = read(tmp_path / "out.jsonl")
    assert normalize(row, "dpo").prompt == turns


@pytest.mark.parametrize("options", [[], ["--listwise"], ["--rejected", "any"]])
def test_a_judge_that_says_the_same_of_everything_is_named(tmp_path, options):
    records = [record(number, ratings=(3, 3, "N/A"), judge="gpt-0") for number in range(4)]
    source = lines(tmp_path / "in.jsonl", records)
    said = "the judge gpt-0 gave all 8 completions the same score by ratings, 3, so there is nothing to prefer"
    with pytest.raises(ValueError, match=f"in.jsonl: {said}"):
        command(source, tmp_path / "out.jsonl", *options)
    assert not (tmp_path / "out.jsonl").exists()
    lines(source, [*records, record(5, ratings=(3, 4))])
    command(source, tmp_path / "out.jsonl", *options)


def test_records_without_the_score_name_what_is_missing(tmp_path):
    source = lines(tmp_path / "in.jsonl", [record(number) for number in range(3)])
    with pytest.raises(ValueError, match=r"no completion has a score by ratings; .* --by overall_score or --by reward"):
        command(source, tmp_path / "out.jsonl")


# ---- old rows ----


def pairs(numbers, **options):
    return curate_pairs([record(number) for number in numbers], by="reward", **options)[0]


def mixed(tmp_path, new, old, share, *options, name="out.jsonl"):
    """The instructions in an output of new records and old rows."""
    source = lines(tmp_path / "in.jsonl", [record(number) for number in new])
    paths = [lines(tmp_path / f"old-{number}.jsonl", rows) for number, rows in enumerate(old)]
    command(source, tmp_path / name, "--by", "reward", "--old", *paths, "--old-share", share, *options)
    return [row["instruction"] for row in read(tmp_path / name)]


def test_old_rows_make_their_share_of_the_output(tmp_path, capsys):
    found = mixed(tmp_path, range(6), [pairs(range(100, 110)), pairs(range(200, 210))], 0.4)
    assert found[:6] == [f"question {number}" for number in range(6)]
    assert len(found) == 10  # 4 of 10 rows are old
    assert len(set(found)) == 10
    assert "4 of 20 old rows drawn: 40.0% of the 10 rows" in capsys.readouterr().out
    assert mixed(tmp_path, range(6), [pairs(range(100, 110)), pairs(range(200, 210))], 0.4) == found
    others = mixed(tmp_path, range(6), [pairs(range(100, 110)), pairs(range(200, 210))], 0.4, "--seed", 7)
    assert set(others[6:]) != set(found[6:])
    # the same rows in other files and another order are the same draw
    assert set(mixed(tmp_path, range(6), [pairs([*range(209, 199, -1), *range(100, 110)])], 0.4)) == set(found)


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 3), (0.1, 0), (0.2, 1), (0.7, 7)])
def test_the_number_of_old_rows_is_rounded(tmp_path, share, drawn):
    # 3 new rows: 3 S / (1 - S) is 3, 0.33, 0.75 and 7
    old = lines(tmp_path / "old.jsonl", pairs(range(20)))
    rows, said = draw_old([old], Form(V1, False), share, 0, [b"1", b"2", b"3"])
    assert (said.rows, said.wanted, len(list(rows()))) == (drawn, drawn, drawn)


def test_old_rows_that_repeat_are_taken_once_and_too_few_are_all_taken(tmp_path, capsys):
    old = pairs([1, 2, 100])
    found = mixed(tmp_path, [0, 1], [old, pairs([100, 101])], 0.9)
    # question 1 is a new row word for word; 100 stands in both files
    assert found == ["question 0", "question 1", "question 2", "question 100", "question 101"]
    printed = capsys.readouterr().out
    assert "3 of 3 old rows drawn: 60.0% of the 5 rows; the share asks for 18, so all there are were taken" in printed
    assert "2 old rows that repeat another were left out" in printed


def test_an_old_row_with_a_new_prompt_stays(tmp_path):
    old = pairs([0])
    old[0]["chosen_response"] = "of an earlier round"
    assert mixed(tmp_path, [0], [old], 0.5) == ["question 0", "question 0"]


def test_every_row_is_drawn_as_often(tmp_path):
    paths, form = [lines(tmp_path / "old.jsonl", pairs(range(4)))], Form(V1, False)
    counts = dict.fromkeys(map(str, range(4)), 0)
    for seed in range(200):
        rows, _ = draw_old(paths, form, 0.5, seed, [b"new row"])
        for row in rows():
            counts[row["instruction"][-1]] += 1
    assert sum(counts.values()) == 200
    assert all(30 <= count <= 70 for count in counts.values())  # 50 each; 4 standard deviations are 24


def test_old_rows_take_the_form_of_the_output_or_the_other_way_round(tmp_path):
    v1, cleaned = pairs([7]), pairs([8], schema="cleaned")
    talk = curate_pairs([conversation(tools=TOOLS)], by="reward", schema="cleaned", conversations=True)[0]
    source = lines(tmp_path / "in.jsonl", [record(number) for number in range(3)])
    old = [lines(tmp_path / "old-v1.jsonl", v1), lines(tmp_path / "old-cleaned.jsonl", cleaned)]
    output = tmp_path / "out.jsonl"
    options = ["--by", "reward", "--old-share", 0.5]
    command(source, output, *options, "--old", *old)  # v1 and cleaned: cleaned
    assert [row.get("prompt") for row in read(output)] == [f"question {number}" for number in (0, 1, 2, 7, 8)]
    command(source, output, *options, "--old", *old, lines(tmp_path / "talk.jsonl", talk))
    rows = read(output)
    assert [row["prompt"][-1]["content"] for row in rows] == [
        *(f"question {number}" for number in (0, 1, 2, 7, 8)),
        "How are you?",
    ]
    assert len({frozenset(row) for row in rows}) == 1
    expected = [normalize(row, "dpo").completions for row in (*v1, *cleaned, *talk)]
    assert [normalize(row, "dpo").completions for row in rows[3:]] == expected
    assert readings(rows[3], "dpo")[0].ratings == readings(v1[0], "dpo")[0].ratings
    assert normalize(rows[-1], "dpo").tools == TOOLS
    # an old v1 row beside new conversations
    command(lines(source, [conversation()]), tmp_path / "out.parquet", *options, "--old", old[0])
    assert [normalize(row, "dpo").prompt[-1]["content"] for row in read(tmp_path / "out.parquet")] == [
        "How are you?",
        "question 7",
    ]
    with pytest.raises(ValueError, match="--schema v1 cannot hold the old rows, which are cleaned pairs"):
        command(source, output, *options, "--old", *old, "--schema", "v1")


def test_old_lists(tmp_path):
    old = lines(tmp_path / "old.jsonl", curate_lists([record(number) for number in range(5, 9)], by="reward")[0])
    source, output = lines(tmp_path / "in.jsonl", [record(0), conversation()]), tmp_path / "out.jsonl"
    options = ["--by", "reward", "--listwise", "--old", old, "--old-share", 0.5]
    command(source, output, *options, "--seed", 3)
    rows = read(output)
    assert len(rows) == 4
    assert len({frozenset(row) for row in rows}) == 1
    assert all(normalize(row, "lists").prompt for row in rows)
    with pytest.raises(ValueError, match="the old rows are lists, and the new ones are v1 pairs"):
        command(source, output, *options[:2], *options[3:])


def test_a_digest_is_of_the_content():
    (row,) = pairs([0], schema="cleaned")
    reordered = dict(reversed(list(row.items())))
    with_nulls = {**row, "tools": None, "chosen": [{**turn, "name": None} for turn in row["chosen"]]}
    assert row_digest(row) == row_digest(reordered) == row_digest(with_nulls)
    assert row_digest(row) != row_digest({**row, "chosen-rating": 0.25})


def test_what_old_rows_cannot_be(tmp_path):
    source, output = lines(tmp_path / "in.jsonl", [record()]), tmp_path / "out.jsonl"
    old = lines(tmp_path / "old.jsonl", pairs([1]))
    other = lines(tmp_path / "other.jsonl", [*pairs([2]), {"prompt": "a", "chosen": "b", "rejected": "c"}])
    empty = lines(tmp_path / "empty.jsonl", [])
    cases = [
        (["--old", old], "--old FILE and --old-share S need each other"),
        (["--old-share", 0.5], "--old FILE and --old-share S need each other"),
        (["--old", tmp_path / "none.jsonl", "--old-share", 0.5], "none.jsonl: there is no such file"),
        (["--old", empty, "--old-share", 0.5], "empty.jsonl"),
        (["--old", other, "--old-share", 0.5], r"other.jsonl, line 2: not a row that `notus curate` wrote"),
        (["--old", source, "--old-share", 0.5], r"in.jsonl, line 1: not a row that `notus curate` wrote"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            command(source, output, "--by", "reward", *options)
        assert not output.exists()
    with pytest.raises(ValueError, match="the output is one of the files of --old"):
        command(source, old, "--by", "reward", "--old", old, "--old-share", 0.5)
    for share in ("0", "1", "-0.5", "nan"):
        with pytest.raises(SystemExit):
            command(source, output, "--old", old, f"--old-share={share}")


PLAIN = "The capital of France is"


def plain(*responses, prompt=PLAIN, **more):
    """A record whose prompt was continued as text, the best continuation first."""
    scored = [{"model": "m", "response": text, "reward": -place} for place, text in enumerate(responses)]
    return {"source": "s", "instruction": prompt, "plain_text": True, "completions": scored, **more}


def test_plain_text_stays_text_in_pairs_and_lists():
    records = [plain(" Paris.", "\n\nLyon "), record(1, rewards=(2, 1))]
    pairs, _ = curate_pairs(records, by="reward", schema="cleaned")
    wide, _ = curate_pairs(records, by="reward", schema="cleaned", conversations=True)
    for rows in (pairs, wide):
        assert normalize(rows[0], "dpo") == (PLAIN, (" Paris.", "\n\nLyon "), None, {})
        assert normalize(rows[1], "dpo").prompt == [{"role": "user", "content": "question 1"}]
    lists, _ = curate_lists(records, by="reward")
    assert normalize(lists[0], "lists") == (PLAIN, (" Paris.", "\n\nLyon "), None, {})
    assert normalize(lists[1], "lists").prompt == [{"role": "user", "content": "question 1"}]
    unmarked, _ = curate_pairs([plain("a", "b", plain_text=False)], by="reward", schema="cleaned")
    assert unmarked[0]["prompt"] == PLAIN
    assert unmarked[0]["chosen"][-1] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "responses",
    [
        ("\n\nHuman: Hi\n\nAssistant: Ho", " Paris"),  # is read as a dialogue
        (" Paris", "\n\nHuman: Hi\n\nHuman: Ho"),  # an error as a dialogue
        ('[{"role": "assistant", "content": "a"}]', " Paris"),  # messages in JSON
        (f"{PLAIN} Paris", f"{PLAIN} Lyon"),  # both repeat the prompt, which training would remove
    ],
)
def test_plain_text_that_training_would_read_otherwise_is_dropped_and_counted(responses):
    records = [plain(*responses), plain(" Paris", " Lyon")]
    for curated in (curate_pairs(records, by="reward", schema="cleaned"), curate_lists(records, by="reward")):
        rows, report = curated
        assert len(rows) == 1
        assert "dropped, plain text that training would read as a conversation, or as repeating the prompt: 1" in str(
            report
        )
        assert (report.empty, report.made.total()) == (0, 1)


def test_a_mark_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="record 1: plain_text must be true or false, not str 'yes'"):
        curate_lists([plain("a", "b", plain_text="yes")])
    with pytest.raises(ValueError, match="record 1: plain_text is true, but messages, tools or"):
        curate_lists([plain("a", "b", messages=TURNS)])


def test_the_command_takes_the_schema_that_holds_plain_text(tmp_path, capsys):
    records = [record(1, rewards=(2, 1)), plain(" Paris", " Lyon"), conversation(), plain(" Rome", " Oslo")]
    source = lines(tmp_path / "in.jsonl", records)
    command(source, tmp_path / "out.jsonl", "--by", "reward")
    assert "note: prompts of plain text need --schema cleaned, which is taken" in capsys.readouterr().out
    rows = read(tmp_path / "out.jsonl")
    assert [normalize(row, "dpo").prompt for row in rows] == [
        [{"role": "user", "content": "question 1"}], PLAIN, TURNS, PLAIN,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: the prompt is plain text, of which --schema v1 would"):
        command(source, tmp_path / "out.jsonl", "--by", "reward", "--schema", "v1")
    with pytest.raises(ValueError, match="plain text and some are messages, for which Parquet has no common type"):
        command(source, tmp_path / "out.parquet", "--by", "reward")
    command(lines(tmp_path / "in.jsonl", [records[1]]), tmp_path / "out.parquet", "--by", "reward")
    assert normalize(read(tmp_path / "out.parquet")[0], "dpo") == (PLAIN, (" Paris", " Lyon"), None, {})


@pytest.mark.parametrize("more", [[], ["--listwise"]])
def test_old_rows_of_plain_text_stay_so(tmp_path, more):
    command(lines(tmp_path / "in.jsonl", [plain(" Paris", " Lyon")]), tmp_path / "old.jsonl", "--by", "reward", *more)
    for new in (record(1, rewards=(2, 1)), conversation(), plain(" Rome", " Oslo")):
        source, out = lines(tmp_path / "in.jsonl", [new]), tmp_path / "out.jsonl"
        command(source, out, "--by", "reward", "--old", tmp_path / "old.jsonl", "--old-share", "0.5", *more)
        old = normalize(read(out)[1], "lists" if more else "dpo")
        assert old == (PLAIN, (" Paris", " Lyon"), None, {})
