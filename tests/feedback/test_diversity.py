"""How different texts are, with shares counted by hand."""

import pytest

from notus.feedback.diversity import WORDS, diversity, similarity, words


def test_distinct_n_counts_different_n_grams_over_all_texts():
    # unigrams a b a b, a b c, x: 4 different of 8; bigrams ab ba ab, ab bc: 3 of 5; trigrams aba bab, abc: 3 of 3
    measured = diversity([["a b a b", "a b c"], ["x"]])
    assert measured.distinct == (4 / 8, 3 / 5, 1.0, 1.0)  # no n-gram reaches over the end of a text
    # of the first prompt the bigrams {ab, ba} and {ab, bc}: 2 · 1 / (2 + 2); the second has one text, and no pair
    assert measured.self_similarity == 0.5
    assert measured.duplicates == 0.0


def test_n_grams_that_no_text_is_long_enough_for_are_none():
    assert diversity([["a b", "c"]]).distinct == (1.0, 1.0, None, None)
    assert diversity([]) == diversity([[""]])
    assert diversity([[""]]).distinct == (None, None, None, None)
    assert diversity([["a"], ["b"]]).self_similarity is None
    assert diversity([["a"], ["b"]]).duplicates is None


def test_equal_texts_are_wholly_similar_and_duplicates():
    # of three texts one repeats an earlier one; pairs: 1 and twice 0. The other prompt has two different texts.
    measured = diversity([["the same", "the same", "quite other words"], ["a b", "a c"]])
    assert measured.duplicates == 1 / 5
    assert measured.self_similarity == pytest.approx((1 / 3 + 0) / 2)
    assert diversity([["", "", ""]]).self_similarity == 1.0
    assert diversity([["a ", "a"]]).duplicates == 0.0  # to the letter


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [2, 3, 4], 0.5),  # {12, 23} and {23, 34}
        ([1, 2, 1, 2, 1], [1, 2], 2 / 3),  # {12, 21} and {12}
        ([1], [1], 1.0),
        ([1], [2], 0.0),
        ([1], [1, 2], 0.0),
        ([], [], 1.0),
        ([], [1], 0.0),
    ],
)
def test_similarity_is_the_dice_coefficient_of_bigrams(one, other, shared):
    assert similarity(one, other) == similarity(other, one) == pytest.approx(shared)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("Hello, World! 3.14", ["hello", ",", "world", "!", "3", ".", "14"]),
        ("naïve a\u0301b go_on", ["naïve", "a\u0301b", "go_on"]),  # a mark belongs to its letter
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("我喜歡 tea", ["我", "喜", "歡", "tea"]),
        ("これはペンです。", ["こ", "れ", "は", "ペ", "ン", "で", "す", "。"]),
        ("한국어 말", ["한국어", "말"]),  # Korean writes spaces
        ("👍 \ud800", ["👍", "?"]),  # half a surrogate pair, as JSON can hold it
        (" \n\t", []),
    ],
)
def test_words_of_any_language(text, split):
    assert words(text) == split


@pytest.mark.parametrize("length", [1, 30])  # of a word: the beginning of the text holds enough of them, or not
def test_only_the_first_words_count(length):
    first = [f"{number:0{length}}"[-length:] for number in range(WORDS)]
    assert words(" ".join([*first, "more", "words"])) == first
    # a longer text of the same beginning is as different
    assert diversity([[" ".join([*first, *["again"] * 50])]]) == diversity([[" ".join(first)]])
