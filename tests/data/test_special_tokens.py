"""Special tokens that stand in texts: found, and read as plain text with all other tokens as ever."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from toys import assets_dir, toy_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from notus.data.chat import ChatEncoder
from notus.data.special_tokens import PlainReader, free_mark, marked, pattern_of, unmarked

EOS_ID = 2


def unigram_tokenizer() -> PreTrainedTokenizerBase:
    """As T5's: pieces with scores, among them the special tokens, and "▁" in front of the first word only."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("a", -3.0), ("b", -3.0)]
    pieces += [(character, -4.0) for character in "</s>:\n user"]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class TestMarks:
    special = pattern_of(["</s>", "<s>", "<s>x", "#"])

    def test_longest_token_is_found(self) -> None:
        assert self.special.findall("<s>x<s></s>#") == ["<s>x", "<s>", "</s>", "#"]
        assert not pattern_of([]).search("anything")

    def test_put_into_every_string_but_roles(self) -> None:
        value = {"role": "</s>", "content": "a</s>", "calls": [{"x": "#", "n": 1, "none": None}]}
        found = marked(value, self.special, "!")
        assert found == {"role": "</s>", "content": "a<!/s>", "calls": [{"x": "#!", "n": 1, "none": None}]}

    def test_removed_with_spans_moved(self) -> None:
        # a < ! / s > | b # ! c </s>: learned is what stands from b on
        text, spans, regions = unmarked("a<!/s>b#!c</s>", [(6, 14)], self.special, "!")
        assert (text, spans) == ("a</s>b#c</s>", [(5, 12)])
        assert [text[start:end] for start, end in regions] == ["</s>", "#"]

    def test_mark_is_in_no_text(self) -> None:
        assert free_mark(["a", "\ufdd0"], self.special) == "\ufdd1"
        with pytest.raises(ValueError, match="U\\+FDD0 to U\\+FDEF"):
            free_mark([chr(code) for code in range(0xFDD0, 0xFDF0)], self.special)

    def test_template_that_escapes_it(self) -> None:
        with pytest.raises(ValueError, match="escapes what messages say"):
            unmarked("a<\\uFDD0/s>", [], self.special, "\ufdd0")


class TestPlainReader:
    def test_reads_names_as_text_and_templates_tokens_as_tokens(self) -> None:
        tokenizer = toy_tokenizer(bos=False)
        encoder = ChatEncoder(tokenizer, split_special_tokens=True)
        text = [tokenizer.convert_tokens_to_ids(character) for character in "</s>"]
        encoded = encoder.encode([("Q</s>", "X</s>Y</s>")])[0]
        q, x, y = (tokenizer.convert_tokens_to_ids(letter) for letter in "QXY")
        assert encoded.ids.tolist() == [q, *text, x, *text, y, EOS_ID]
        assert encoded.mask.tolist() == [0] * 5 + [1] * 7
        assert encoder.encode_prompt("</s>") == text
        messages = [{"role": "user", "content": "Q</s>"}]
        prompt = encoder.encode_prompt(messages)
        assert tokenizer.decode(prompt) == "<|user|>\nQ</s></s>\n<|assistant|>\n"
        assert prompt.count(EOS_ID) == 1

    def test_bos_that_a_text_quotes_is_not_the_texts(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(), split_special_tokens=True)
        assert encoder.encode([("<s><s>Q", "X")])[0].ids.tolist().count(1) == 1

    def test_tokens_of_a_thousand_are_told_apart(self) -> None:
        tokenizer = toy_tokenizer()
        tokenizer.add_tokens([AddedToken(f"<|reserved_{number}|>", special=True) for number in range(1000)])
        reader = ChatEncoder(tokenizer, split_special_tokens=True)._reader
        assert reader
        text = "a<|reserved_7|><|reserved_77|>b<|reserved_777|>"
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.encode([text], [()])[0][0] == expected
        at = text.index("<|reserved_77|>")
        split = reader.encode([text], [[(at, at + len("<|reserved_77|>"))]])[0][0]
        assert [token for token in split if token >= 400] == [token for token in expected if token >= 400][::2]

    def test_characters_that_stand_for_tokens_are_refused(self) -> None:
        encoder = ChatEncoder(toy_tokenizer(), split_special_tokens=True)
        with pytest.raises(ValueError, match=r"private-use character U\+100001"):
            encoder.render([{"role": "user", "content": "\U00100001"}], [{"role": "assistant", "content": "a"}])
        with pytest.raises(ValueError, match=r"U\+100000"):
            encoder.encode_prompt("\U00100000")
        assert ChatEncoder(toy_tokenizer()).encode_prompt("\U00100000")

    def test_tokenizer_that_reads_a_token_by_more_than_its_name(self) -> None:
        tokenizer = toy_tokenizer()
        # With such a normalizer, ordinary tokens are found only behind the space that it prepends.
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.add_tokens([AddedToken("<END>", normalized=True)])
        with pytest.raises(ValueError, match=r"its token '<END>' is matched .* normalized=False"):
            PlainReader(tokenizer, pattern_of(["<END>", "</s>"]))
        PlainReader(tokenizer, pattern_of(["</s>"]))

    @pytest.mark.parametrize("make", [unigram_tokenizer, toy_tokenizer])
    def test_all_else_is_read_as_ever(self, make: Any) -> None:
        tokenizer = make()
        tokenizer.add_tokens(["<think>", AddedToken("<pad>", special=True, lstrip=True, rstrip=True)])
        encoder = ChatEncoder(tokenizer, split_special_tokens=True)
        assert encoder._reader
        pieces = st.sampled_from(["a", "b", " ", "\n", "</s>", "<s>", "<think>", "<pad>", "user:", "<", "é"])

        @settings(max_examples=150, deadline=None)
        @given(st.lists(pieces, max_size=8).map("".join))
        def check(text: str) -> None:
            expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            assert encoder._reader
            ids, offsets = encoder._reader.encode([text], [()])[0]
            assert ids == expected["input_ids"]
            assert offsets == [tuple(offset) for offset in expected["offset_mapping"]]

        check()

    def test_pieces_that_are_special_are_not_found_in_text(self) -> None:
        encoder = ChatEncoder(unigram_tokenizer(), split_special_tokens=True)
        assert EOS_ID not in encoder.encode_prompt("a</s>b")
        assert EOS_ID in ChatEncoder(unigram_tokenizer()).encode_prompt("a</s>b")


@pytest.mark.parametrize("name", ["mistral-7b-tokenizer", "stories260K"])
def test_real_tokenizers(name: str) -> None:
    assets = assets_dir()
    if assets is None:
        pytest.skip("the assets folder is absent")
    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    encoder, usual = ChatEncoder(tokenizer, split_special_tokens=True), ChatEncoder(tokenizer)
    assert encoder._reader
    rows = json.loads((assets / "preferences" / "dpo_en_demo.json").read_text())[::5]
    for row in rows:
        prompt = [{"role": "user", "content": row["conversations"][0]["value"]}]
        answer = [{"role": "assistant", "content": row["chosen"]["value"]}]
        rendered = usual.render(prompt, answer)
        assert encoder._reader.encode([rendered.text], [()])[0][0] == tokenizer(
            rendered.text, add_special_tokens=False, verbose=False
        )["input_ids"]  # fmt: skip
        assert encoder.render(prompt, answer) == rendered
    # "</s>" in the middle of a text is three tokens of text, with no space that nobody wrote
    ids = encoder.encode_prompt([{"role": "user", "content": "Hi </s> there"}])
    assert tokenizer.decode(ids).replace("<s> ", "").replace("</s> ", "</s>", 2) == (
        "<|user|>\nHi </s>there</s>\n<|assistant|>\n"
    )
    assert ids.count(EOS_ID) == 1
