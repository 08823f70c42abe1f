"""The curate command: files in, a file of pairs and a report out."""

import argparse
import json
from types import SimpleNamespace

import datasets
import pytest

from notus.curation import command as curate


def raw(number, scores=(5, 1, 3), source="flan", instruction=None):
    completions = [
        {
            "model": f"m{index}",
            "response": f"response {index} to {number} – “é”",
            "annotations": {"honesty": {"Rating": str(score), "Rationale": "r"}},
            "overall_score": float(score),
            "critique": "c",
        }
        for index, score in enumerate(scores)
    ]
    return {"source": source, "instruction": instruction or f"question {number}?", "completions": completions}


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def command(*arguments):
    parser = argparse.ArgumentParser()
    curate.add_arguments(parser)
    return curate.run(parser.parse_args([str(argument) for argument in arguments]))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


RECORDS = [raw(0), raw(1, (2, 2)), raw(2), raw(3, (4,)), raw(4)]


def test_pairs_come_in_input_order_with_a_report(tmp_path, capsys):
    source, output = lines(tmp_path / "in.jsonl", RECORDS), tmp_path / "new" / "out.jsonl"
    assert command(source, output) == 0
    pairs = read(output)
    assert [pair["instruction"] for pair in pairs] == ["question 0?", "question 2?", "question 4?"]
    assert [pair["chosen_model"] for pair in pairs] == ["m0", "m0", "m0"]
    printed = capsys.readouterr().out
    assert "5 records -> 3 pairs by ratings" in printed
    assert "all scored completions tie: 1" in printed
    assert f"wrote {output}" in printed


def test_every_input_form_gives_the_same_bytes(tmp_path, monkeypatch):
    expected = tmp_path / "expected.jsonl"
    command(lines(tmp_path / "in.jsonl", RECORDS), expected)
    array, in_lines, parquet = tmp_path / "array.json", tmp_path / "lines.json", tmp_path / "in.parquet"
    array.write_text("\ufeff" + json.dumps(RECORDS, indent=1), encoding="utf-8")
    lines(in_lines, RECORDS)
    in_lines.write_text("\n" + in_lines.read_text(encoding="utf-8").replace("\n", "\r\n\n"), encoding="utf-8")
    dataset = datasets.Dataset.from_list([{**record, "models": ["x"]} for record in RECORDS])
    dataset.to_parquet(parquet)
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "a.jsonl", RECORDS[:2])
    datasets.Dataset.from_list(RECORDS[2:]).to_parquet(folder / "b.parquet")
    (folder / "README.md").write_text("not data")
    loads = []
    on_hub = SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/openbmb/UltraFeedback/a"]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: on_hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: loads.append((name, split)) or dataset)
    for source in (array, in_lines, parquet, folder, "openbmb/UltraFeedback"):
        output = tmp_path / "out.jsonl"
        command(source, output)
        assert output.read_bytes() == expected.read_bytes(), source
    command("openbmb/UltraFeedback", tmp_path / "out.jsonl", "--split", "test")
    assert loads == [("openbmb/UltraFeedback", "train"), ("openbmb/UltraFeedback", "test")]


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    source = lines(tmp_path / "in.jsonl", [raw(number) for number in range(30)])
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        command(source, tmp_path / f"{name}.jsonl", "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_options_reach_the_rule(tmp_path):
    records = [raw(0), raw(1, source="truthful_qa"), raw(2, (0, 3)), raw(3, instruction="Why, then?")]
    records[0]["completions"][1]["overall_score"] = 10.0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why then\n\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"
    options = ["--drop-source", "truthful_qa", "--min-rating", 0, "--decontaminate", prompts, "--by", "overall_score"]
    command(lines(tmp_path / "in.jsonl", records), output, *options)
    pairs = read(output)
    assert [pair["instruction"] for pair in pairs] == ["question 0?", "question 2?"]
    assert pairs[0]["chosen_model"] == "m1"


def test_zephyrs_rule_is_two_options(tmp_path):
    source, output = lines(tmp_path / "in.jsonl", [raw(0, (3, 3))]), tmp_path / "out.jsonl"
    command(source, output, "--by", "overall_score", "--rejected", "any")
    (pair,) = read(output)
    assert (pair["chosen_response"][:10], pair["rejected_response"][:10]) == ("response 0", "response 1")


def test_identical_responses_are_dropped_unless_they_are_asked_for(tmp_path, capsys):
    records = [raw(0, (5, 1)), raw(1)]
    for completion in records[0]["completions"]:
        completion["response"] = "the same"
    source, output = lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    command(source, output)
    assert [pair["instruction"] for pair in read(output)] == ["question 1?"]
    assert "same text: 1" in capsys.readouterr().out
    command(source, output, "--keep-identical")
    assert [pair["instruction"] for pair in read(output)] == ["question 0?", "question 1?"]


def test_ngram_reaches_the_rule_and_needs_a_list(tmp_path):
    records = [raw(0, instruction="Say why one two three four is odd"), raw(1, instruction="something else")]
    source, output, prompts = lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", tmp_path / "p.txt"
    prompts.write_text("one two three four five six")  # six words, of which the prompt holds four
    command(source, output, "--decontaminate", prompts)
    assert len(read(output)) == 2
    command(source, output, "--decontaminate", prompts, "--ngram", 4)
    assert [pair["instruction"] for pair in read(output)] == ["something else"]
    with pytest.raises(ValueError, match="--ngram 13 has no effect without --decontaminate"):
        command(source, output, "--ngram", 13)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\ufefffirst\r\nsecond one\n"),
        ("p", "first\nsecond one"),
        ("p.jsonl", '"first"\n{"question": "second one", "best": "x"}\n'),
        ("p.json", '[{"prompt": "first"}, {"instruction": "second one"}]'),
    ],
)
def test_a_list_of_prompts_has_several_forms(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert [prompt.strip() for prompt in curate.read_prompts(tmp_path / name)] == ["first", "second one"]


def test_a_list_of_prompts_in_parquet(tmp_path):
    datasets.Dataset.from_dict({"question": ["first"], "type": ["x"]}).to_parquet(tmp_path / "p.parquet")
    assert curate.read_prompts(tmp_path / "p.parquet") == ["first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.xml", b"<a/>", "convert it"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.txt", b"\xff", "not UTF-8 at byte 0"),
        ("p.jsonl", b'"a"\n{"text": "b"}\n', r"p.jsonl, line 2: not a prompt"),
        ("p.txt", b"a\n...\n", r"'\.\.\.'.*nothing to compare"),
    ],
)
def test_a_wrong_list_of_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    source = lines(tmp_path / "in.jsonl", RECORDS)
    with pytest.raises(ValueError, match=message):
        command(source, tmp_path / "out.jsonl", "--decontaminate", tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        command(source, tmp_path / "out.jsonl", "--decontaminate", tmp_path / "missing.txt")


GOOD = json.dumps(raw(0)).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", GOOD + b"\n\n{broken\n", r"in.jsonl, line 3: not valid JSON"),
        ("in.jsonl", GOOD + b"\n[1]\n", "in.jsonl, line 2: list .* is no record"),
        ("in.jsonl", GOOD + b'\n{"a": "\xff"}\n', "in.jsonl, line 2: not UTF-8 at byte 7"),
        ("in.jsonl", GOOD + b"\n" + GOOD.replace(b'"5"', b'"7"'), "in.jsonl, line 2: .*Rating is '7'"),
        ("in.jsonl", b"", "in.jsonl: the file holds no records"),
        ("in.json", b"[" + GOOD + b", 3]", r"in.json, row 2 \(line 1\): int 3 is no record"),
    ],
)
def test_bad_input_is_named_and_leaves_the_output_alone(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    with pytest.raises(ValueError, match=message):
        command(tmp_path / name, output)
    assert output.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl"])


def test_nothing_left_is_an_error_after_the_report(tmp_path, capsys):
    with pytest.raises(ValueError, match="no pair is left"):
        command(lines(tmp_path / "in.jsonl", [raw(0, (3, 3))]), tmp_path / "out.jsonl")
    assert "all scored completions tie: 1" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl").exists()


def test_paths_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    source, output = lines(tmp_path / "in.jsonl", RECORDS), tmp_path / "o" / "out.jsonl"
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    cases = [
        ((source, tmp_path / "out.csv"), "name it .jsonl or .parquet"),
        ((source, tmp_path / "folder.jsonl"), "there is a folder of that name"),
        ((source, source), "part of the input"),
        ((tmp_path, tmp_path / "out.jsonl"), "part of the input"),
        ((tmp_path / "none.jsonl", output), "there is no such file"),
        ((tmp_path / "empty", output), "the folder holds no .jsonl"),
        ((source, output, "--split", "test"), "--split test chooses from a hub dataset"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            command(*arguments)

    def unreachable(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match=r"some/name: .*no route"):
        command("some/name", output)
