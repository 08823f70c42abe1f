"""Rows, truncation, drops, cache and mixtures, against values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from toys import assets_dir, toy_tokenizer
from transformers import AutoTokenizer

from notus.data import tokenize
from notus.data.chat import ChatEncoder, Encoded
from notus.data.dataset import FEATURES, PROVENANCE, TRACE, Outcome, TokenizedDataset
from notus.data.drop_report import DropReport
from notus.data.formats import find_form
from notus.data.tokenize import Rule, load_labels, load_lists, load_pairs, load_sft, split_trunk, truncate
from notus.training.reference import digest_of_rows

EOS_ID = 2


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def bytes_of(text: str) -> list[int]:
    """The toy tokenizer's ids of characters that it never merges."""
    return [toy_tokenizer().convert_tokens_to_ids(character) for character in text]


def load(path: Any, *, bos: bool = True, **settings: Any) -> tuple[datasets.Dataset, DropReport]:
    return load_pairs(path, toy_tokenizer(bos=bos), **{"max_length": 64, "max_prompt_length": 32, **settings})


def encoded(prompt: list[int], completion: list[int]) -> Encoded:
    mask = [0] * len(prompt) + [1] * len(completion)
    return Encoded(np.array(prompt + completion, dtype=np.int32), np.array(mask, dtype=np.int8))


class TestRows:
    def test_pair(self, tmp_path: Path) -> None:
        rows, report = load(write_rows(tmp_path / "a.jsonl", [pair("QQ", "XY", "Z")]))
        q, x, y, z = bytes_of("QXYZ")
        expected = {"trunk": [1, q, q], "branches": [[x, y, EOS_ID], [z, EOS_ID]], "loss_mask": [[1, 1, 1], [1, 1]]}
        assert list(rows.select_columns(list(FEATURES))) == [expected]
        assert list(rows.select_columns(list(PROVENANCE))) == [{"source": None, "ratings": None, "label": None}]
        assert report == DropReport(read=1, glued=1)
        assert rows.features == {**FEATURES, **PROVENANCE, **TRACE}

    def test_completions_that_begin_alike_are_not_in_the_trunk(self, tmp_path: Path) -> None:
        rows, _ = load(write_rows(tmp_path / "a.jsonl", [pair("Q", "XY", "XZ")]), bos=False)
        q, x, y, z = bytes_of("QXYZ")
        assert rows[0]["trunk"] == [q]
        assert rows[0]["branches"] == [[x, y, EOS_ID], [x, z, EOS_ID]]

    def test_empty_prompt_without_bos_learns_from_the_second_token(self, tmp_path: Path) -> None:
        rows, _ = load(write_rows(tmp_path / "a.jsonl", [pair("", "XY", "ZY")]), bos=False)
        assert rows[0]["trunk"] == []
        assert rows[0]["loss_mask"] == [[0, 1, 1], [0, 1, 1]]

    def test_trunk_ends_where_the_prompts_tokens_part(self) -> None:
        assert split_trunk([encoded([5, 6, 7], [8]), encoded([5, 6, 9, 9], [8])]) == 2
        assert split_trunk([encoded([5, 6], [8, 8]), encoded([5, 6, 8], [8])]) == 2
        assert split_trunk([encoded([5, 6], [8])] * 4) == 2
        assert split_trunk([encoded([5, 6, 7], [8])]) == 3

    def test_demonstration_of_several_turns(self, tmp_path: Path) -> None:
        turns = [("user", "Q"), ("assistant", "X"), ("user", "Q"), ("assistant", "Y")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        tokenizer = toy_tokenizer()
        rows, _ = load_sft(write_rows(tmp_path / "a.jsonl", [row]), tokenizer, max_length=200)
        (branch,), (mask,) = rows[0]["branches"], rows[0]["loss_mask"]
        assert tokenizer.decode(rows[0]["trunk"]) == "<s><|user|>\nQ</s>\n<|assistant|>\n"
        assert tokenizer.decode(branch) == "X</s>\n<|user|>\nQ</s>\n<|assistant|>\nY</s>"
        x, y = bytes_of("XY")
        assert [token for token, learned in zip(branch, mask, strict=True) if learned] == [x, EOS_ID, y, EOS_ID]

    def test_settings_of_the_chat_reach_the_tokens(self, tmp_path: Path) -> None:
        path = write_rows(
            tmp_path / "a.jsonl", [{"instruction": "Q", "chosen_response": "X", "rejected_response": "Y"}]
        )
        (tmp_path / "mine.jinja").write_text(
            "{% for m in messages %}[{{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[{% endif %}"
        )
        tokenizer = toy_tokenizer()
        rows, _ = load(path, chat_template=str(tmp_path / "mine.jinja"), add_empty_system=True)
        assert tokenizer.decode(rows[0]["trunk"]) == "<s>[[Q["


class TestTruncation:
    @pytest.mark.parametrize(
        ("row", "lengths", "expected", "outcome"),
        [
            # short enough
            ([([5] * 6, [7, 7]), ([5] * 6, [8])], (8, 2), [[5, 5, 5, 5, 5, 5, 7, 7], [5, 5, 5, 5, 5, 5, 8]], 0),
            # 6 + 3 > 8: both prompts keep their last 4, also where the completion is short; 4 + 3 <= 8
            ([([1, 2, 3, 4, 5, 6], [7, 7, 7]), ([1, 2, 3, 4, 5, 6], [8])], (8, 4),
             [[3, 4, 5, 6, 7, 7, 7], [3, 4, 5, 6, 8]], Outcome.PROMPT_CUT),
            # then completions are cut at the end
            ([([1, 2, 3], [7, 7, 7, 9]), ([1, 2, 3], [8, 9])], (5, 2),
             [[2, 3, 7, 7, 7], [2, 3, 8, 9]], Outcome.PROMPT_CUT | Outcome.COMPLETION_CUT),
            # as the original: completions are cut to 6 - 3 tokens, whatever the prompt's length
            ([([1], [7] * 9), ([1], [8])], (6, 3), [[1, 7, 7, 7], [1, 8]], Outcome.COMPLETION_CUT),
            # prompts of unequal tokens lose the same tokens
            ([([1, 2, 3, 4], [7, 7]), ([1, 2, 3], [8, 8])], (5, 2), [[3, 4, 7, 7], [3, 8, 8]], Outcome.PROMPT_CUT),
            # prompts that fork early keep a token
            ([([1, 2, 3, 4, 5, 6], [7, 7]), ([1, 6], [8, 8])], (5, 2), [[5, 6, 7, 7], [6, 8, 8]], Outcome.PROMPT_CUT),
            # demonstrations are cut at the end only
            ([([1, 2, 3], [7, 7, 9])], (4, None), [[1, 2, 3, 7]], Outcome.COMPLETION_CUT),
        ],
    )  # fmt: skip
    def test_by_hand(self, row: Any, lengths: Any, expected: list[list[int]], outcome: int) -> None:
        cut, found = truncate([encoded(*each) for each in row], *lengths)
        assert ([item.ids.tolist() for item in cut], found) == (expected, outcome)
        assert [item.mask.tolist() for item in cut] == [[int(token >= 7) for token in ids] for ids in expected]

    def test_whole_path(self, tmp_path: Path) -> None:
        # <s> and 6 prompt tokens, completions of 7 and 3 with EOS: the prompt keeps 4, of the 7 stay 8 - 4
        rows, report = load(
            write_rows(tmp_path / "a.jsonl", [pair("QQQQJK", "XXXXXX", "ZZ")]), max_length=8, max_prompt_length=4
        )
        q, j, k, x, z = bytes_of("QJKXZ")
        assert rows[0]["trunk"] == [q, q, j, k]
        assert rows[0]["branches"] == [[x, x, x, x], [z, z, EOS_ID]]
        assert (report.prompts_cut, report.completions_cut) == (1, 1)

    @pytest.mark.parametrize("max_prompt_length", [0, 64, 65])
    def test_lengths_must_leave_room(self, tmp_path: Path, max_prompt_length: int) -> None:
        with pytest.raises(ValueError, match=f"max_prompt_length is {max_prompt_length}, but must be at least 1"):
            load(write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y")]), max_prompt_length=max_prompt_length)

    def test_length_of_demonstrations(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="max_length is 1"):
            load_sft(tmp_path / "a.jsonl", toy_tokenizer(), max_length=1)


class TestDrops:
    def test_reasons_are_counted_and_printed(self, tmp_path: Path) -> None:
        rows = [
            pair("Q", "X", "Y"),
            pair("Q", " \n", "Y"),
            pair("Q", "X", ""),
            pair("Q", "X", "X"),
            pair("Q", "X" * 80, "X" * 80 + "Y"),  # alike within max_length
            pair("Q", "X" * 80, "Y"),
        ]
        kept, report = load(write_rows(tmp_path / "a.jsonl", rows))
        assert len(kept) == report.kept == 2
        assert kept[0]["branches"][1] == [*bytes_of("Y"), EOS_ID]
        # <s>Q and 81 or 2 tokens, of 2 x 2 + 83: what is beyond the 32 that max_prompt_length leaves is cut
        assert report.cut_share == pytest.approx((81 - 32) / (4 + 4 + 81 + 2 + 4), abs=1e-9)
        assert str(report) == (
            "rows: 6 read, 2 kept, 4 dropped\n"
            "  dropped 2: empty completion\n"
            "  dropped 2: chosen and rejected identical\n"
            f"  cut to length: 0 prompts, 1 rows' completions ({report.cut_share:.1%} of the tokens)\n"
            f"  warning: {report.cut_share:.0%} of the tokens are cut away; raise data.max_length, or set "
            "data.too_long=drop\n"
            "  warning: 2 answers begin with a letter or digit right behind one of the prompt, as in 'ovenTo cook'; "
            "plain text is joined as it is, so begin answers with a space or end prompts with one"
        )

    @pytest.mark.parametrize("count", [1, 3])
    def test_pairs_that_are_rated_the_wrong_way_round(self, tmp_path: Path, count: int) -> None:
        ratings = [(1, 5)] * count + [(5, 1), (3, 3), (None, 5)][: 5 - count]
        rows = [
            {**pair(f"Q{number}", " X", " Y"), "score_chosen": one, "score_rejected": other}
            for number, (one, other) in enumerate(ratings)
        ]
        rows.append({**pair("Q", " X", " X"), "score_chosen": 1, "score_rejected": 5})  # dropped
        path = write_rows(tmp_path / "a.jsonl", rows)
        report = load(path)[1]
        assert report.reversed == count
        line = f"rated the wrong way round: {count} rows, whose chosen answer is rated below the rejected one"
        assert (f"\n  {line}" if count == 1 else f"\n  warning: {line}; check") in str(report)
        lengths = {"max_length": 64, "max_prompt_length": 32}
        assert load_labels(path, toy_tokenizer(), **lengths)[1].reversed == 2 * count
        # these go by the ratings, or do not learn the other answer
        assert load_lists(path, toy_tokenizer(), **lengths)[1].reversed == 0
        assert load_sft(path, toy_tokenizer(), max_length=64)[1].reversed == 0

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "list"])
    def test_columns_that_no_row_has_are_named(self, tmp_path: Path, suffix: str) -> None:
        first, second = pair("Q", " X", " Y"), {"frage": "R", "chosen": " X", "rejected": " Y", "tag": "a"}
        columns = {"frage": "prompt", "question": "prompt", "tag": "unused", "tags": "unused"}
        sources = []
        for number, row in enumerate((first, second)):
            path = tmp_path / f"{number}.{suffix}"
            if suffix == "parquet":
                datasets.Dataset.from_list([row]).to_parquet(path)
            elif suffix == "csv":
                path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
            else:
                write_rows(path, [row])
            sources.append({"path": str(path)})
        report = load([first, second] if suffix == "list" else sources, columns=columns)[1]
        assert report.missing_columns == ("question", "tags")
        assert "\n  named in data.columns, but in no row: question, tags" in str(report)

    def test_demonstration_whose_prompt_fills_the_row(self, tmp_path: Path) -> None:
        rows = [{"prompt": "Q" * 9, "completion": "X"}, {"prompt": "Q", "completion": "X"}, {"messages": []}]
        kept, report = load_sft(write_rows(tmp_path / "a.jsonl", rows), toy_tokenizer(), max_length=9)
        assert len(kept) == 1
        assert report.dropped == {"empty completion": 1, "completion cut away by max_length": 1}

    def test_nothing_left_is_an_error_with_the_reasons(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "X"), pair("Q", "", "X")])
        with pytest.raises(ValueError, match=r"a.jsonl: no row is left[^$]*dropped 1: empty[^$]*dropped 1: chosen"):
            load(path)

    def test_reports_of_several_sources_add_up(self, tmp_path: Path) -> None:
        good, same, empty = pair("Q", "X", "Y"), pair("Q", "X", "X"), pair("Q", "", "Y")
        one = write_rows(tmp_path / "a.jsonl", [good, same, pair("Q", "X" * 80, "Y")])
        two = write_rows(tmp_path / "b.jsonl", [good, good, same, empty])
        kept, report = load([{"path": str(one)}, {"path": str(two), "weight": 2}])
        assert (report.read, report.prompts_cut, report.completions_cut, report.duplicates) == (7, 0, 1, 2)
        assert report.dropped == {"empty completion": 1, "chosen and rejected identical": 2}
        assert list(report.dropped) == ["empty completion", "chosen and rejected identical"]
        assert report.kept == 4
        assert len(kept) == 2 + 2 * 2


class TestErrors:
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_bad_row_is_named_with_its_line(
        self, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenize, "BATCH_ROWS", 2)
        rows = [pair("Q", "X", "Y")] * 4
        path = write_rows(tmp_path / "a.jsonl", [*rows, {**rows[0], "chosen": None}])
        with pytest.raises(ValueError, match=r"a.jsonl, line 5: key 'chosen' is null"):
            load(path, num_workers=num_workers)


class TestBadRows:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y"), {"prompt": "Q"}, pair("J", "X", "Y")])
        path.write_text(path.read_text() + "{not json\n" + json.dumps({**pair("K", "X", "Y"), "chosen": 3}) + "\n")
        return path

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_skipped_ones_are_counted_and_the_first_named(
        self, path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenize, "BATCH_ROWS", 2)
        for _ in range(2):  # made, then from the cache
            rows, report = load(path, on_bad_row="skip", num_workers=num_workers)
            assert (len(rows), report.read, report.dropped) == (2, 5, {"cannot be read": 3})
            places = [place.split(":")[0].rpartition("/")[2] for place in report.unreadable]
            assert places == ["a.jsonl, line 2", "a.jsonl, line 4", "a.jsonl, line 5"]
            assert "key 'chosen' is of type int" in str(report)

    def test_error_raises_also_where_the_cache_holds_the_rows(self, path: Path) -> None:
        load(path, on_bad_row="skip")
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: the columns prompt are of no known dpo form"):
            load(path)

    def test_all_bad_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no row is left[^$]*cannot be read: .*a.jsonl, line 1"):
            load(write_rows(tmp_path / "a.jsonl", [{"prompt": "Q"}]), on_bad_row="skip")

    def test_a_text_that_cannot_be_tokenised_is_one_bad_row(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y"), pair("<s><s>Q", "X", "Y"), pair("K", "X", "Y")])
        rows, report = load(path, on_bad_row="skip")
        assert (len(rows), report.dropped) == (2, {"cannot be read": 1})
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*two BOS"):
            load(path)


class TestLongRows:
    def test_dropped_instead_of_cut(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y"), pair("Q", "X" * 80, "Y")])
        rows, report = load(path, too_long="drop")
        assert (len(rows), report.dropped, report.cut_share) == (1, {"longer than max_length": 1}, 0)
        assert load(path)[1].completions_cut == 1

    def test_a_row_far_beyond_the_length_is_dropped_before_it_takes_the_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenize, "MOST_CHARACTERS", 2000)
        seen: list[int] = []
        tokenise = ChatEncoder.tokenize

        def spy(self: ChatEncoder, rendered: Any, **options: Any) -> Any:
            seen.append(sum(len(item.text) for item in rendered))
            return tokenise(self, rendered, **options)

        monkeypatch.setattr(ChatEncoder, "tokenize", spy)
        rows = [pair("Q" * 400, "X", "Y")] * 7 + [pair("Q" * 1500, "X", "Y")]
        kept, report = load(write_rows(tmp_path / "a.jsonl", rows))
        assert (len(kept), report.dropped) == (7, {"too long to be tokenised": 1})
        assert max(seen) < 2000 + 2 * 410  # of the limit, and of the row that passed it
        assert len(seen) == 3


class TestRule:
    def test_the_caches_key_holds_every_setting_that_decides_the_tokens(self, tmp_path: Path) -> None:
        (tmp_path / "a.jinja").write_text(
            "{% for m in messages %}{{ m['content'] ~ tone ~ strftime_now('%Y') }}{% endfor %}"
        )
        template = {"chat_template": str(tmp_path / "a.jinja"), "template_date": "2020-01-01"}

        def digest(encoder: dict[str, Any], **settings: Any) -> str:
            chat = {**template, "chat_template_kwargs": {"tone": "a"}, **encoder}
            return Rule(
                ChatEncoder(toy_tokenizer(), **chat), "dpo", **{"max_length": 64, "max_prompt_length": 32, **settings}
            ).digest()

        changed_chat: list[dict[str, Any]] = [
            {"chat_template_kwargs": {"tone": "b"}}, {"template_date": "2021-01-01"}, {"add_empty_system": True},
            {"mask_history": True}, {"split_special_tokens": True},
        ]  # fmt: skip
        changed: list[dict[str, Any]] = [
            {"max_length": 65}, {"max_prompt_length": 31}, {"columns": {"x": "prompt"}}, {"too_long": "drop"},
        ]  # fmt: skip
        found = [digest({}), *(digest(each) for each in changed_chat), *(digest({}, **each) for each in changed)]
        assert len(set(found)) == len(found)
        assert digest({}) == found[0]

    def test_a_length_that_holds_many_characters_raises_the_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenize, "MOST_CHARACTERS", 2000)
        path = write_rows(tmp_path / "a.jsonl", [pair("Q" * 2500, "X", "Y")])  # two texts: 5,000 characters and more
        assert len(load(path, max_length=320)[0]) == 1  # 16 x 320 are 5,120
        with pytest.raises(ValueError, match="dropped 1: too long to be tokenised"):
            load(path, max_length=300)

    @pytest.mark.parametrize(("length", "warned"), [(40, True), (22, False)])
    def test_heavy_truncation_is_a_warning(self, tmp_path: Path, length: int, warned: bool) -> None:
        # 20 tokens fit behind a prompt of 12: EOS and the letters beyond are cut, 21 of 74 tokens or 3 of 56
        path = write_rows(tmp_path / "a.jsonl", [pair(" " + "Q" * 10, "X" * length, "Y" * 19)])
        _, report = load(path, max_length=32, max_prompt_length=12)
        assert report.cut_share == pytest.approx((length + 1 - 20) / (2 * 12 + length + 1 + 20))
        assert ("of the tokens are cut away; raise data.max_length" in str(report)) == warned


class TestTrace:
    def test_what_a_row_says_of_itself(self, tmp_path: Path) -> None:
        rows = [pair("Q", "", "Y"), {**pair("QQQQJK", "XXXXXX", "ZZ"), "source": "mine", "score_chosen": 2}]
        found, _ = load(write_rows(tmp_path / "a.jsonl", rows), max_length=8, max_prompt_length=4)
        info = TokenizedDataset(found).info(0)
        assert info.place == f"{tmp_path}/a.jsonl, line 2"
        assert (info.source, info.ratings, info.label) == ("mine", (2.0, None), None)
        # <s> and 6 letters to 4 tokens; 7 tokens with EOS to 8 - 4, 3 stay
        assert info.cut == (3, 3, 0)
        assert set(info.flags) == {"plain text", "prompt cut", "completion cut", "glued answer"}

    def test_the_id_is_of_what_the_row_says_alone(self, tmp_path: Path) -> None:
        ids = set()
        for name, extra in (("a", {}), ("b", {"source": "mine"})):
            path = write_rows(tmp_path / f"{name}.jsonl", [{**pair("Q", "X", "Y"), **extra}])
            ids |= {TokenizedDataset(load(path, bos=bos)[0]).info(0).id for bos in (True, False)}
        assert len(ids) == 1
        assert all(len(each) == 16 for each in ids)
        other = load(write_rows(tmp_path / "c.jsonl", [pair("Q", "X", "Z")]))[0]
        assert TokenizedDataset(other).info(0).id not in ids

    def test_stored_digests_are_those_of_the_tokens(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q" * n, "X" * n, "Y") for n in range(1, 9)])
        rows, _ = load(path)
        computed = TokenizedDataset(rows.remove_columns(list(TRACE)))
        assert np.array_equal(TokenizedDataset(rows).digests(), computed.digests())

    def test_excluded_rows_are_counted(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y"), pair("J", "X", "Y"), pair("Q", "X", "Y")])
        first = TokenizedDataset(load(path)[0]).info(0).id
        rows, report = load(path, exclude={first, "0" * 16})
        assert (len(rows), report.dropped) == (1, {"excluded by data.exclude": 2})

    def test_rows_in_memory(self) -> None:
        rows = [{**pair(letter, "X", "Y"), "source": "mine"} for letter in "QJ"]
        from_list, report = load(rows)
        from_dataset, _ = load(datasets.Dataset.from_list(rows))
        assert list(from_list) == list(from_dataset)
        assert (report.read, from_list["place"][1]) == (2, "rows, row 2")


class TestCache:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        chat = {"instruction": "Q", "chosen_response": "X", "rejected_response": "Y"}
        return write_rows(tmp_path / "a.jsonl", [pair("Q", "X", "Y"), pair("Q", "X", "Z"), chat])

    @pytest.fixture
    def refuse(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill the cache, then let nothing be tokenised any more."""
        load(path)

        def fail(*args: Any) -> None:
            raise RuntimeError("tokenised again")

        monkeypatch.setattr(ChatEncoder, "tokenize", fail)

    @pytest.mark.usefixtures("refuse")
    @pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"chat_template": "zephyr"}, {"seed": 1}])
    def test_second_run_reads_it(self, path: Path, settings: dict[str, Any]) -> None:
        rows, report = load(path, **settings)
        assert len(rows) == report.read == 3

    @pytest.mark.usefixtures("refuse")
    @pytest.mark.parametrize(
        "settings",
        [
            {"max_length": 63},
            {"max_prompt_length": 31},
            {"bos": False},
            {"add_empty_system": True},
            {"chat_template": "mine.jinja"},
        ],
    )
    def test_another_setting_does_not(
        self, path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(path.parent)
        Path("mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        with pytest.raises(RuntimeError, match="tokenised again"):
            load(path, **settings)

    @pytest.mark.usefixtures("refuse")
    def test_another_content_does_not(self, path: Path) -> None:
        with pytest.raises(RuntimeError, match="tokenised again"):
            load(write_rows(path, [pair("Q", "X", "Z")]))

    def test_workers_do_not_change_the_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenize, "BATCH_ROWS", 3)
        rows = [pair("Q" * n, "X" * n, "Y" if n % 3 else "") for n in range(1, 12)]
        path = write_rows(tmp_path / "a.jsonl", rows)
        alone, report = load(path, cache_dir=tmp_path / "one")
        together, same_report = load(path, cache_dir=tmp_path / "two", num_workers=2)
        assert len(list((tmp_path / "two").glob("*/*.arrow"))) == 2  # one per worker
        assert list(alone) == list(together)
        assert report == same_report

    def test_arrow_sources(self, tmp_path: Path) -> None:
        rows = [
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "chosen": [{"role": "assistant", "content": c}],
                "rejected": r,
            }
            for c, r in [("X", [{"role": "assistant", "content": "Y"}]), ("X", [])]
        ]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
        write_rows(tmp_path / "a.jsonl", rows)
        from_parquet, report = load(tmp_path / "a.parquet")
        from_json, _ = load(tmp_path / "a.jsonl")
        assert list(from_parquet.remove_columns("place")) == list(from_json.remove_columns("place"))
        assert report.dropped == {"empty completion": 1}


class TestMixtures:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> tuple[str, str]:
        numbered = [
            write_rows(tmp_path / f"{name}.jsonl", [pair("Q" * n, name, "Z") for n in range(1, 11)]) for name in "XY"
        ]
        return str(numbered[0]), str(numbered[1])

    def taken(self, source: Any, **settings: Any) -> list[tuple[int, str]]:
        """Of each row, the number of its prompt's letters and its chosen letter."""
        rows, _ = load(source, bos=False, **settings)
        return [(len(row["trunk"]), toy_tokenizer().decode(row["branches"][0][:1])) for row in rows]

    def test_sources_in_order(self, paths: tuple[str, str]) -> None:
        expected = [(n, name) for name in "XY" for n in range(1, 11)]
        assert self.taken([{"path": path} for path in paths]) == expected

    def test_weights(self, paths: tuple[str, str]) -> None:
        source = [{"path": paths[0], "weight": 0.5}, {"path": paths[1], "weight": 2.3}]
        taken = self.taken(source)
        half, more = taken[:5], taken[5:]
        assert all(name == "X" for _, name in half)
        assert sorted(set(half)) == half  # five different rows, in the order of the file
        twice = [(n, "Y") for n in range(1, 11)] * 2
        assert more[:20] == twice
        assert len(set(more[20:])) == len(more[20:]) == 3
        assert self.taken(source) == taken
        assert any(self.taken(source, seed=seed) != taken for seed in (1, 2))

    def test_weight_that_takes_nothing(self, paths: tuple[str, str]) -> None:
        with pytest.raises(ValueError, match=r"X.jsonl: weight 0.01 of 10 rows is none"):
            load([{"path": paths[0], "weight": 0.01}])


# --- provenance: from the columns of the data to `Rows`, and into no digest ---

RATED = {
    "source": "flan",
    "instruction": "Q",
    "chosen_response": "X",
    "rejected_response": "Y",
    "chosen_avg_rating": 4.5,
    "rejected_avg_rating": 2.0,
}
EXPECTED = {"source": "flan", "ratings": [4.5, 2.0], "label": None}


def provenance(rows: datasets.Dataset) -> list[dict[str, Any]]:
    return list(rows.select_columns(list(PROVENANCE)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_kept_past_dropped_rows(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH_ROWS", 2)
    empty, other = {**RATED, "chosen_response": ""}, {**RATED, "source": "sharegpt"}
    path = write_rows(tmp_path / "a.jsonl", [empty, RATED, empty, other])
    for _ in range(2):  # made, then from the cache
        rows, report = load(path, num_workers=num_workers)
        assert report.kept == 2
        assert provenance(rows) == [EXPECTED, {**EXPECTED, "source": "sharegpt"}]


def test_from_arrow_with_columns_of_these_names(tmp_path: Path) -> None:
    datasets.Dataset.from_list([RATED]).to_parquet(tmp_path / "a.parquet")
    assert provenance(load(tmp_path / "a.parquet")[0]) == [EXPECTED]


def test_mixed_with_rows_that_have_none(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / "rated.jsonl", [RATED]),
        write_rows(tmp_path / "plain.jsonl", [{"prompt": "Q", "chosen": "X", "rejected": "Y"}]),
    ]
    rows = TokenizedDataset(load([{"path": str(path)} for path in paths])[0])
    assert rows.sources == ["flan", TokenizedDataset.UNKNOWN_SOURCE]
    np.testing.assert_array_equal(rows.ratings, [[4.5, 2.0], [np.nan, np.nan]])


def test_no_part_of_what_is_computed(tmp_path: Path) -> None:
    bare = {key: value for key, value in RATED.items() if key in find_form(RATED, "dpo")}
    one, other = (load(write_rows(tmp_path / f"{n}.jsonl", [row]))[0] for n, row in enumerate((RATED, bare)))
    assert digest_of_rows(TokenizedDataset(one).digests()) == digest_of_rows(TokenizedDataset(other).digests())


def test_code_of_the_columns_is_part_of_the_caches_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [RATED])
    load(path)
    read_bytes = Path.read_bytes

    def as_of_another_version(file: Path) -> bytes:
        return read_bytes(file) + (b"#" if file.name == "dataset.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", as_of_another_version)
    load(path)
    assert len(list((tmp_path / "cache" / "notus").glob("rows-*"))) == 2


# --- real data ---


@pytest.mark.parametrize("name", ["mistral-7b-tokenizer", "stories260K"])
def test_real_pairs_load_whole(name: str, tmp_path: Path) -> None:
    assets = assets_dir()
    if assets is None:
        pytest.skip("the assets folder is absent")
    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    path = assets / "preferences" / "dpo_en_demo.json"
    rows, report = load_pairs(path, tokenizer, max_length=1024, max_prompt_length=512)
    assert (len(rows), report.dropped, report.templated) == (300, {}, 300)
    for row in rows:
        lengths = [len(row["trunk"]) + len(branch) for branch in row["branches"]]
        assert max(lengths) <= 1024
        for branch, mask in zip(row["branches"], row["loss_mask"], strict=True):
            assert len(branch) == len(mask)
            assert (branch[-1] == EOS_ID) or sum(mask) == 512
            assert mask == sorted(mask)  # one completion, at the end
            assert 1 in mask
