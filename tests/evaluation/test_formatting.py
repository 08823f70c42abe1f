"""Numbers as a reader wants them: three digits, percentages with one decimal, settings as they were typed."""

from notus.evaluation.formatting import change, duration, number, setting, short_path, with_error


def test_measured_values_have_three_digits():
    values = (0.0, 3.0, 0.5, -0.05927, 0.69314718, 9.999, 99.96, 123.4, 999.7, 12345.678)
    assert [number(value) for value in values] == [
        "0", "3.00", "0.500", "−0.0593", "0.693", "10.0", "100", "123", "1,000", "12,346"
    ]  # fmt: skip
    assert [number(value) for value in (2.5e-5, 5e-7, 0.00123456, 1.2345e-9)] == [
        "2.5e-5",
        "5e-7",
        "0.00123",
        "1.23e-9",
    ]


def test_percentages_have_one_decimal():
    assert [number(0.90625, "share"), number(64.586, "%"), number(0.0, "share")] == ["90.6%", "64.6%", "0.0%"]
    assert number(-0.0001, "share") == "0.0%"


def test_what_is_not_finite_is_a_dash():
    assert [number(float("nan")), number(float("inf"), "share")] == ["–", "–"]


def test_a_value_and_its_error_have_the_same_decimals():
    assert with_error(-0.5, 0.0123) == "−0.500 ± 0.012"
    assert with_error(12.3456, 1.26) == "12.3 ± 1.3"
    assert with_error(64.586, 1.25, "%") == "64.6% ± 1.2%"  # a tie to even
    assert [with_error(0.5, None), with_error(0.5, 0.0)] == ["0.500", "0.500"]


def test_changes_have_a_sign():
    assert [change(0.906, 0.5, "share"), change(61.0, 64.1, "%")] == ["+40.6 points", "−3.1 points"]
    assert [change(0.583, 0.693), change(0.25, 0.0), change(0.5, 0.5)] == ["−0.110", "+0.250", "±0"]
    assert change(0.50001, 0.5, "share") == "±0.0 points"


def test_durations_and_paths():
    assert [duration(s) for s in (59.4, 59.6, 3590.0, 3599.6, 6700.0)] == [
        "59 s", "1 min 0 s", "59 min 50 s", "1 h 0 min", "1 h 52 min"
    ]  # fmt: skip
    assert [short_path(p) for p in ("/a/b/c/model", "hub/model", "runs/x/y/z")] == [
        "…/c/model", "hub/model", "runs/x/y/z"
    ]  # fmt: skip


def test_settings_as_a_user_writes_them():
    values = (0.1, 5e-7, 1e20, 16.0, 64, True, None, ["q_proj", "v_proj"], [], {"a": 0.5}, "/a/b/c/d.jsonl")
    assert [setting(value) for value in values] == [
        "0.1", "5e-7", "1e20", "16", "64", "true", "null", "q_proj, v_proj", "none", "a: 0.5", "…/c/d.jsonl"
    ]  # fmt: skip
    sources = [{"path": "a/b.jsonl", "split": "train", "weight": 1.0}, {"path": "o/n", "split": "x", "weight": 0.5}]
    assert setting(sources) == "a/b.jsonl, o/n, split x, weight 0.5"
