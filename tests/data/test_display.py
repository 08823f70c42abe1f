"""Tokens as text: exact for every kind of tokenizer, learned tokens marked, control characters harmless."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from toys import assets_dir, toy_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from notus.data.display import Pieces, describe_example, marked, shown
from notus.data.packing import Example

TEXTS = ["Hello  world\n\t 你好 🙂 é", " leading", "a\x1b[31mred</s>", "x = [1, 2]\n\n\nend "]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: ▁ for spaces, a byte token for what the vocabulary lacks, one space put in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw", "▁h", "he"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("h", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", "[SEP]", "play", "##ing", "now", "a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_pieces_are_the_text(text):
    tokenizer = toy_tokenizer()
    assert Pieces(tokenizer).text(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback_pieces_are_the_text_with_the_space_that_the_model_sees(text):
    tokenizer = byte_fallback_tokenizer()
    found = Pieces(tokenizer).text(tokenizer(text, add_special_tokens=False)["input_ids"])
    # the tokenizer itself puts a space in front of each part between special tokens
    assert found.removeprefix(" ") == text


def test_a_wordpiece_joins_the_word_before_it():
    tokenizer = wordpiece_tokenizer()
    pieces = Pieces(tokenizer)
    assert [pieces[token] for token in tokenizer("playing now")["input_ids"]] == [b" play", b"ing", b" now"]


def test_part_of_a_character_is_its_bytes():
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert [Pieces(tokenizer)[token] for token in ids] == [b" ", b"\xc3", b"\xa9"]
    assert Pieces(tokenizer).text(ids[:2]) == " \ufffd"


def test_an_id_beyond_the_tokenizer_is_named():
    assert Pieces(toy_tokenizer()).text([399999]) == "<399999>"


@pytest.mark.skipif(assets_dir() is None, reason="no assets")
@pytest.mark.parametrize("text", TEXTS)
def test_mistrals_pieces_are_the_text(text):
    tokenizer = AutoTokenizer.from_pretrained(assets_dir() / "mistral-7b-tokenizer")
    found = Pieces(tokenizer).text(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found.removeprefix(" ").replace("</s> ", "</s>") == text


def example(tokenizer, prompt, completion, *, learned_from=0):
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)  # noqa: E731
    branch = encode(completion)
    mask = np.arange(len(branch)) >= learned_from
    return Example(0, encode(prompt), (branch, branch[:1]), (mask, mask[:1]))


def test_an_example_is_described_with_what_is_learned():
    tokenizer = toy_tokenizer()
    found = describe_example(example(tokenizer, "<s>poem", "sea</s>"), tokenizer)
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("<s>poem", "sea</s>")]
    first = tokenizer.decode(tokenizer("sea", add_special_tokens=False)["input_ids"][:1])
    assert found.splitlines() == [
        f"prompt ({counts[0]} tokens):", "<s>poem",
        f"chosen ({counts[1]} tokens, {counts[1]} learned):", "⟦sea</s>⟧",
        "rejected (1 token, 1 learned):", f"⟦{first}⟧",
    ]  # fmt: skip


def test_the_two_completions_of_a_list_are_no_pair():
    tokenizer = toy_tokenizer()
    found = describe_example(example(tokenizer, "<s>poem", "sea</s>"), tokenizer, is_list=True)
    assert [line.split(" (")[0] for line in found.splitlines()[::2]] == ["prompt", "completion 1", "completion 2"]


def test_what_is_not_learned_of_a_branch_stands_outside_of_the_markers():
    tokenizer = toy_tokenizer()
    ids = np.array([1, 2, *tokenizer("a", add_special_tokens=False)["input_ids"], 2])
    spans = list(Pieces(tokenizer).spans(ids, np.array([0, 1, 0, 1])))
    assert spans == [("<s>", False, True), ("</s>", True, True), ("a", False, False), ("</s>", True, True)]
    assert marked(iter(spans)) == "<s>⟦</s>⟧a⟦</s>⟧"
    assert marked(iter(spans), colour=True) == (
        "\x1b[2m<s>\x1b[0m\x1b[32m\x1b[2m</s>\x1b[0ma\x1b[32m\x1b[2m</s>\x1b[0m"
    )


def test_a_terminal_obeys_nothing_that_a_row_says():
    assert shown("a\x1b[2J\r\x9b\u202eb\tc\n") == "a\\x1b[2J\\r\\x9b\\u202eb\tc\n"
    tokenizer = toy_tokenizer()
    assert "\x1b" not in describe_example(example(tokenizer, "\x1b[2J", "\x1b]0;x\x07"), tokenizer)
